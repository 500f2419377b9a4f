"""A copy of an index in a collection of Qdrant: one point per content, brought up to date by what differs."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from lavis_cir_plugin.search.build import locked
from lavis_cir_plugin.search.catalogue import ReadableCatalogue, Record, WritableCatalogue
from lavis_cir_plugin.search.features import LOOK
from lavis_cir_plugin.search.folders import WRITER
from lavis_cir_plugin.search.manifest import read_manifest
from lavis_cir_plugin.search.qdrant_filters import LARGEST_WHOLE, MISSING, PICTURES, Key, keys_of

FORMAT, VERSION = "lavis_cir_plugin search index", 1

API_KEY = "QDRANT_API_KEY"
"""Environment variable of the key that a server may ask for."""

ENOUGH, RECALL_AT, DRAWN_QUERIES = 0.995, 50, 32
"""Share of the exact 50 best of drawn queries that the graph has to find; more of it is visited until it does."""

VISITED = (128, 256, 512, 1024, 2048)
"""Points of the graph that a search keeps in view (hnsw_ef), as they are tried."""

_NUMBERS_AT_ONCE = 1_000_000
_POINTS_AT_ONCE = 1_000
_TIMEOUT_S = 120


@dataclass(frozen=True)
class State:
    """What a collection says of itself.

    Attributes:
        name: The name that the model is loaded by; empty if only code can make it.
        identity: The encoder's identity.
        source: A number that the index's folder carries, so that no other index overwrites the collection.
        shape: Shape ``[K, D]`` of a content's features.
        longest: Length of the longest feature.
        columns: Name and kind of each of the user's own columns.
        pictures: Number of pictures.
        is_complete: Whether all points have these columns.
        recall: Share of the exact 50 best that the engine's graph found; 0 where it was not measured.
        visited: Points of the graph that were kept in view for that.
    """

    name: str
    identity: Mapping[str, str]
    source: str
    shape: Sequence[int]
    longest: float
    columns: Sequence[Sequence[str]] = ()
    pictures: int = 0
    is_complete: bool = False
    recall: float = 0.0
    visited: int = VISITED[0]

    @property
    def own(self) -> dict[str, str]:
        """Kinds of the user's own columns, by name."""
        return {name: kind for name, kind in self.columns}

    @property
    def keys(self) -> dict[str, Key]:
        """Keys of all columns, by SQLite's name of them."""
        return keys_of(self.own)


class Point(NamedTuple):
    """A content as the engine holds it.

    Attributes:
        row: Row of its features in the index's folder.
        score: The engine's score; 0 where none was asked for.
        records: Its pictures, in order of their ids.
        features: ``(K, D)`` in half precision; none where they were not asked for.
        look: Its look.
    """

    row: int
    score: float
    records: list[Record]
    features: np.ndarray[Any, Any] | None
    look: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Kept:
    """What a call of `keep_in` did.

    Attributes:
        pictures: Number of pictures that are there now.
        added, changed, removed: Numbers of contents.
        recall: Recall of the engine's graph, 1 where it scans.
    """

    pictures: int
    added: int
    changed: int
    removed: int
    recall: float


class Collection:
    """A collection of a Qdrant server.

    Args:
        client: A ``qdrant_client.QdrantClient``.
        name: The collection's name.
        url: What it is called in messages.
    """

    def __init__(self, client: Any, name: str, url: str) -> None:
        from qdrant_client import models

        self.client, self.name, self.url, self.models = client, name, url, models

    def ask(self, method: str, **arguments: Any) -> Any:
        """Call a method of the client on this collection.

        Raises:
            ConnectionError: the server does not answer, or refuses.
        """
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        try:
            with warnings.catch_warnings():
                # In process, where tests run it, the engine scans and says so with every call.
                warnings.filterwarnings("ignore", message="(Local mode|Payload indexes have no effect)")
                return getattr(self.client, method)(self.name, **arguments)
        except ResponseHandlingException as error:
            reason = str(error) or type(error.source).__name__
            raise ConnectionError(f"{self.url} does not answer ({reason}); start Qdrant or correct the URL.") from error
        except UnexpectedResponse as error:
            if error.status_code in (401, 403):
                raise ConnectionError(f"{self.url} refuses access; set {API_KEY} to a key that may.") from error
            reason = " ".join(error.content.decode("utf-8", errors="replace").split())[:200]
            raise ConnectionError(f"{self.url} refuses {method} ({error.status_code}: {reason}).") from error

    @property
    def exists(self) -> bool:
        """Whether the server has the collection."""
        return bool(self.ask("collection_exists"))

    def state(self) -> State:
        """Return what the collection says of itself.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it was made by something else, or by a newer version.
        """
        if not self.exists:
            raise FileNotFoundError(
                f"{self.url} has no such collection; make it by lavis-cir index --out INDEX --to {self.url}."
            )
        found = dict(self.ask("get_collection").config.metadata or {})
        if found.pop("format", None) != FORMAT:
            raise ValueError(
                f"{self.url} was not made by lavis-cir index, or by a Qdrant older than 1.16, which keeps no metadata "
                "of collections; choose another name for the collection or a newer Qdrant."
            )
        version = found.pop("version", 0)
        if version > VERSION:
            raise ValueError(
                f"{self.url} has format {version}, this version of lavis_cir_plugin reads {VERSION}; install a newer "
                "version."
            )
        return State(**found)

    def create(self, state: State) -> None:
        """Make the collection, empty."""
        models = self.models
        # Numbers of 32 bits: Qdrant adds those of 16 bits in half precision on some processors.
        vectors = models.VectorParams(
            size=state.shape[1],
            distance=models.Distance.DOT,
            on_disk=True,
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
        )
        self.ask("create_collection", vectors_config=vectors, metadata=_described(state))

    def describe(self, state: State) -> None:
        """Replace what the collection says of itself."""
        self.ask("update_collection", metadata=_described(state))

    def make_payload_indexes(self, state: State) -> None:
        """Let the engine look up what conditions name; nothing changes where it does so already."""
        names = {Key("sampled_by", "float"), Key(f"{PICTURES}[].{MISSING}", "keyword")}
        names |= {Key(f"{PICTURES}[].{key.name}", key.kind) for key in state.keys.values()}
        for key in sorted(names):
            # An index of whole numbers would cut the bounds of a range, so only dates, whose bounds are whole, get one.
            kind = "integer" if key.kind == "date" else key.kind
            self.ask("create_payload_index", field_name=key.name, field_schema=kind, wait=True)

    def digests(self) -> dict[str, str]:
        """Return the digest of every point's payload, by id."""
        found, offset = {}, None
        while True:
            points, offset = self.ask(
                "scroll", limit=10 * _POINTS_AT_ONCE, offset=offset, with_payload=["digest"], with_vectors=False
            )
            found.update({str(point.id): str(point.payload.get("digest")) for point in points})
            if offset is None:
                return found

    def put(self, points: Mapping[str, tuple[Mapping[str, Any], np.ndarray[Any, Any]]]) -> None:
        """Write points: payload and features ``(K, D)`` by id."""
        made = [
            self.models.PointStruct(id=id_, payload=payload, vector=features.astype(np.float64).tolist())
            for id_, (payload, features) in points.items()
        ]
        self.ask("upsert", points=made, wait=True)

    def change(self, id_: str, payload: Mapping[str, Any]) -> None:
        """Replace a point's payload."""
        self.ask("overwrite_payload", payload=payload, points=[id_], wait=True)

    def remove(self, ids: Sequence[str]) -> None:
        """Remove points."""
        for start in range(0, len(ids), _POINTS_AT_ONCE):
            chosen = self.models.PointIdsList(points=list(ids[start : start + _POINTS_AT_ONCE]))
            self.ask("delete", points_selector=chosen, wait=True)

    def count(self, condition: Any = None) -> int:
        """Return how many points meet a filter."""
        return int(self.ask("count", count_filter=condition, exact=True).count)

    def values(self, key: str, most: int) -> list[Any]:
        """Return up to so many different values of a column."""
        found = self.ask("facet", key=f"{PICTURES}[].{key}", limit=most, exact=True)
        return [hit.value for hit in found.hits]

    def indexed(self) -> int:
        """Return how many vectors the engine has in its graph, whose search may miss some."""
        return int(self.ask("get_collection").indexed_vectors_count or 0)

    def wait_for_graph(self) -> None:
        """Wait while the engine builds its graph."""
        while self.ask("get_collection").status == self.models.CollectionStatus.YELLOW:
            time.sleep(1)

    def best(self, query: Tensor, condition: Any, count: int, visited: int | None, columns: int) -> list[Point]:
        """Return the best points for a query ``(D,)``, best first, with their features.

        Args:
            query: The query.
            condition: A filter, or ``None``.
            count: How many.
            visited: Points of the graph that are kept in view; ``None`` to scan every point.
            columns: Number of the user's own columns.
        """
        found = self._query(query, condition, count, visited, with_payload=True, with_vectors=True)
        return [_point(item, columns) for item in found]

    def scores(self, query: Tensor, condition: Any, count: int) -> np.ndarray[Any, Any]:
        """Return the scores of the best points that meet a filter, found by a scan."""
        found = self._query(query, condition, count, None, with_payload=False, with_vectors=False)
        return np.array([point.score for point in found], dtype=np.float64)

    def ids_of_best(self, query: Tensor, count: int, visited: int | None) -> list[str]:
        """Return the ids of the best points."""
        return [
            str(point.id) for point in self._query(query, None, count, visited, with_payload=False, with_vectors=False)
        ]

    def _query(self, query: Tensor, condition: Any, count: int, visited: int | None, **what: bool) -> Any:
        settings = self.models.SearchParams(hnsw_ef=visited, exact=visited is None)
        vectors = [query.double().cpu().tolist()]
        return self.ask(
            "query_points", query=vectors, query_filter=condition, limit=count, search_params=settings, **what
        ).points

    def of_contents(self, contents: Sequence[str], columns: int) -> list[Point]:
        """Return the points of contents, by their SHA-256 in hexadecimal, in order of their rows, without features."""
        ids = [id_of(bytes.fromhex(content)) for content in contents]
        found = self.ask("retrieve", ids=ids, with_payload=True, with_vectors=False)
        return sorted((_point(item, columns) for item in found), key=lambda point: point.row)

    def of_picture(self, picture_id: int, columns: int) -> Point | None:
        """Return the point that holds a picture, without features."""
        models = self.models
        is_it = models.FieldCondition(key="file_id", range=models.Range(gte=picture_id, lte=picture_id))
        nested = models.Nested(key=PICTURES, filter=models.Filter(must=[is_it]))
        wanted = models.Filter(must=[models.NestedCondition(nested=nested)])
        points, _ = self.ask("scroll", scroll_filter=wanted, limit=1, with_payload=True, with_vectors=False)
        return _point(points[0], columns) if points else None


def connect(url: str) -> Collection:
    """Return the collection that a URL such as ``http://localhost:6333/photos`` names; nothing is asked of it yet.

    Raises:
        ValueError: it is no such URL, or qdrant-client is not installed.
    """
    parts = urlsplit(url)
    base, _, name = parts.path.rstrip("/").rpartition("/")
    if parts.scheme not in ("http", "https") or not parts.hostname or not name or parts.query or parts.fragment:
        raise ValueError(f"{url} names no collection of Qdrant; write http://HOST:6333/COLLECTION.")
    try:
        from qdrant_client import QdrantClient
    except ImportError:
        raise ValueError(
            f"{url} needs qdrant-client, which is not installed; pip install 'lavis_cir_plugin[qdrant]'."
        ) from None
    port = parts.port or (443 if parts.scheme == "https" else 6333)
    server = urlunsplit((parts.scheme, f"{parts.hostname}:{port}", "", "", ""))
    client = QdrantClient(
        url=server,
        prefix=base.strip("/") or None,
        api_key=os.environ.get(API_KEY) or None,
        timeout=_TIMEOUT_S,
        check_compatibility=False,  # a question of its own to the server, with a warning for an error
    )
    return Collection(client, name, url)


def keep_in(collection: Collection, path: str | Path, quiet: bool = False) -> Kept:
    """Bring a collection up to date with an index's folder: new contents in, changed payloads over, others out.

    Killed at any moment and called again, it goes on where it was.

    Args:
        collection: The collection; it is made where there is none.
        path: The index's folder.
        quiet: Show no progress.

    Raises:
        ValueError: the collection is another model's or another index's, or a number is beyond 2^53.
        ConnectionError: the server does not answer, or refuses.
    """
    index = Path(path).expanduser().absolute()
    read_manifest(index)  # which raises where there is no index to lock
    lock = locked(index)
    try:
        folder = _Folder(index)
        manifest = folder.manifest
        wanted = State(manifest.name, manifest.identity, _source(index), list(manifest.shape), manifest.longest)
        known = _prepared(collection, wanted, folder.columns)
        digests = collection.digests()
        added, changed = _copy(collection, folder, digests, quiet)
        collection.remove(list(digests))
        known = replace(known, is_complete=True, pictures=manifest.pictures)
        collection.describe(known)
        known = _measured(collection, known, folder.features)
        return Kept(manifest.pictures, added, changed, len(digests), known.recall)
    finally:
        lock.release()


def _copy(collection: Collection, folder: _Folder, digests: dict[str, str], quiet: bool) -> tuple[int, int]:
    """Write what is new or differs, take its ids out of the digests, and return how many were new and how many not."""
    interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file keeps every line
    added = changed = 0
    with tqdm(total=folder.contents, desc="copying", unit=" contents", disable=quiet, mininterval=interval) as progress:
        for batch in folder.batches():
            new = {id_: point for id_, point in batch.items() if id_ not in digests}
            if new:
                collection.put(new)
            for id_, (payload, _) in batch.items():
                if digests.pop(id_, payload["digest"]) != payload["digest"]:
                    collection.change(id_, payload)
                    changed += 1
            added += len(new)
            progress.update(len(batch))
    return added, changed


class _Folder:
    """The state of an index's folder, as points."""

    def __init__(self, index: Path) -> None:
        self.manifest = manifest = read_manifest(index)
        self._catalogue = ReadableCatalogue(index / manifest.files["catalogue"])
        self.columns = self._catalogue.own_columns
        self.features = manifest.features(index).array(manifest.rows)
        self._looks = manifest.looks(index).array(manifest.rows)
        by_row = np.load(index / manifest.files["pictures"], allow_pickle=False)
        self._rows = np.unique(by_row[:, 0])
        self._at_once = max(1, _NUMBERS_AT_ONCE // int(np.prod(manifest.shape)))

    @property
    def contents(self) -> int:
        return len(self._rows)

    def batches(self) -> Iterator[dict[str, tuple[dict[str, Any], np.ndarray[Any, Any]]]]:
        """Yield payload and features of some contents at a time, by the id of their point."""
        for start in range(0, self.contents, self._at_once):
            records = self._catalogue.records(self._rows[start : start + self._at_once].tolist())
            yield {
                id_of(content): (_payload(list(same), self._looks[row]), self.features[row])
                for (row, content), same in groupby(records, key=lambda record: (record.row, record.sha256))
            }


def _source(index: Path) -> str:
    """Return the number that an index's folder carries, for good."""
    catalogue = WritableCatalogue(index / WRITER / "catalogue.sqlite")
    try:
        found = catalogue.fact("source")
        if found is None:
            found = uuid.uuid4().hex
            with catalogue.transaction():
                catalogue.note(source=found)
        return str(found)
    finally:
        catalogue.close()


def _prepared(collection: Collection, wanted: State, columns: Mapping[str, str]) -> State:
    """Make the collection, or check that it is this index's; return what it says of itself."""
    if not collection.exists:
        collection.create(wanted)
    known = collection.state()
    if known.identity != wanted.identity or list(known.shape) != list(wanted.shape):
        raise ValueError(
            f"{collection.url} was made by another model or transform; choose another collection, or delete that one."
        )
    if known.source != wanted.source:
        raise ValueError(
            f"{collection.url} is the copy of another index; choose another collection, or delete that one."
        )
    listed = [[name, kind] for name, kind in columns.items()]
    known = replace(known, name=wanted.name)
    if [list(column) for column in known.columns] != listed:
        known = replace(known, columns=listed, is_complete=False)
        collection.describe(known)
    collection.make_payload_indexes(known)
    return known


def _measured(collection: Collection, state: State, features: np.ndarray[Any, Any]) -> State:
    """Visit more of the engine's graph until enough of the exact results are found, and note the share that is."""
    collection.wait_for_graph()
    found = replace(state, recall=1.0)
    if collection.indexed():
        generator = torch.Generator().manual_seed(0)
        ends = torch.randint(len(features), (2, DRAWN_QUERIES), generator=generator).numpy()
        queries = F.normalize(torch.from_numpy(features[ends]).float().mean(dim=2).sum(dim=0), dim=1)
        exact = [set(collection.ids_of_best(query, RECALL_AT, None)) for query in queries]
        for visited in VISITED:
            near = [collection.ids_of_best(query, RECALL_AT, visited) for query in queries]
            recall = float(np.mean([len(best.intersection(ids)) / len(best) for best, ids in zip(exact, near)]))
            found = replace(state, recall=recall, visited=visited)
            if recall >= ENOUGH:
                break
    collection.describe(found)
    return found


def id_of(content: bytes) -> str:
    """Return the id of the point of a content, from the SHA-256 of its bytes."""
    return str(uuid.UUID(bytes=content[:16]))


def _described(state: State) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, **asdict(state)}


def _payload(records: Sequence[Record], look: np.ndarray[Any, Any]) -> dict[str, Any]:
    content = records[0].sha256
    payload = {
        "row": records[0].row,
        "sha256": content.hex(),
        "look": base64.b64encode(look.tobytes()).decode(),
        "sampled_by": int.from_bytes(content[16:22], "big") / 2**48,  # even, and the same whatever else is there
        PICTURES: [_entry(record) for record in records],
    }
    digest = hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()
    return {**payload, "digest": digest[:24]}


def _entry(record: Record) -> dict[str, Any]:
    """Return a picture under the keys of `keys_of`; columns without a value are listed."""
    own = {f"c{place}": value for place, value in enumerate(record.own)}
    for value in own.values():
        if isinstance(value, int) and abs(value) >= LARGEST_WHOLE:
            raise ValueError(
                f"{record.path} has the number {value}, which Qdrant cannot tell from its neighbours; make its column "
                "a text by --metadata."
            )
    return {
        "file_id": record.id,
        "file_path": record.path,
        "file_name": os.path.basename(record.path),
        "file_bytes": record.bytes,
        "file_width": record.width,
        "file_height": record.height,
        "file_modified": _whole_seconds(record.modified_ns),
        "file_added": record.added,
        "modified_ns": record.modified_ns,
        MISSING: [key for key, value in own.items() if value is None],
        **{key: value for key, value in own.items() if value is not None},
    }


def _whole_seconds(nanoseconds: int) -> int:
    """Divide as SQLite does, towards zero."""
    return nanoseconds // 10**9 if nanoseconds >= 0 else -(-nanoseconds // 10**9)


def _point(item: Any, columns: int) -> Point:
    """Read what `_payload` wrote, with so many columns of the user's own."""
    payload = item.payload
    content = bytes.fromhex(payload["sha256"])
    records = [
        Record(
            id=entry["file_id"],
            path=entry["file_path"],
            row=payload["row"],
            sha256=content,
            bytes=entry["file_bytes"],
            width=entry["file_width"],
            height=entry["file_height"],
            modified_ns=entry["modified_ns"],
            added=entry["file_added"],
            own=tuple(entry.get(f"c{place}") for place in range(columns)),
        )
        for entry in payload[PICTURES]
    ]
    features = None if item.vector is None else np.array(item.vector, dtype=np.float16)
    look = np.frombuffer(base64.b64decode(payload["look"]), np.uint8).reshape(LOOK)
    return Point(payload["row"], float(getattr(item, "score", 0.0)), records, features, look)
