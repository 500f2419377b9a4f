"""Builds an index of pictures and brings it up to date: every content is encoded once, also after a kill."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from lavis_cir_plugin.benchmarks.images import decode_rgb
from lavis_cir_plugin.core.atomic_files import replace_file
from lavis_cir_plugin.core.locks import FileLock, holder_of
from lavis_cir_plugin.core.processes import fail_in_all_processes, gather, rank_and_world, share
from lavis_cir_plugin.core.settings import check_argument, one_of
from lavis_cir_plugin.core.shared_rows import check_shared
from lavis_cir_plugin.core.workers import worker_setup
from lavis_cir_plugin.search.candidates import NEW_SHARE, PAYS_FROM, build_candidates, has_faiss, tune
from lavis_cir_plugin.search.catalogue import FILE_COLUMNS, Read, WritableCatalogue
from lavis_cir_plugin.search.encoder import Encoder, encoder_of
from lavis_cir_plugin.search.features import LOOK, RowFile, look_of
from lavis_cir_plugin.search.folders import (
    MANIFEST,
    WRITER,
    Signature,
    absolute,
    check_folders,
    is_below,
    is_index,
    scan_folders,
)
from lavis_cir_plugin.search.manifest import Manifest, read_blocks, read_manifest, write_blocks
from lavis_cir_plugin.search.metadata import lacking, read_metadata, summary

NOT_INDEXED = "not_indexed.tsv"
"""The list of files that are not in the index, with the reason of each."""

DEAD_SHARE, FEWEST_DEAD = 0.5, 1000
"""From this share and number of features that no picture has any more on, the file of features is written anew."""

LONGEST = 1.001
"""Bound on the length of every feature: unit vectors, rounded to half precision."""

BATCH = 64

CANDIDATES = ("auto", "always", "none")


@dataclass(frozen=True)
class Built:
    """What a call of `build_index_folder` did.

    Attributes:
        pictures: Number of pictures that are in the index now.
        encoded: Number of contents that all processes of this call encoded.
        read: Number of files that this call read.
        forgotten: Number of pictures that left the index, or that an interrupted call had read for it.
        not_indexed: The reason, by path, for every file that is not in the index.
        seconds: Time that the call took.
        notes: What else there is to say, a sentence each.
    """

    pictures: int
    encoded: int
    read: int
    forgotten: int
    not_indexed: dict[str, str]
    seconds: float
    notes: list[str] = field(default_factory=list)


def build_index_folder(
    folders: str | Path | Sequence[str | Path],
    out: str | Path,
    encoder: Any,
    *,
    metadata: str | Path | None = None,
    forget: str | Path | Sequence[str | Path] = (),
    thorough: bool = False,
    candidates: str = "auto",
    batch_size: int = BATCH,
    workers: int | None = None,
    quiet: bool = False,
) -> Built:
    """Index the pictures of folders, or bring an index of them up to date.

    Only new and changed files are read, and only contents that the index never had are encoded. Pictures whose files
    are gone are forgotten. Killed at any moment and started again, it goes on where it was. Readers see the index as it
    was until all is done. In a process group all processes call this and share the encoding.

    Args:
        folders: One or more folders of pictures; if none is named, those that the index has. Its other folders stay as
            they are.
        out: The index's folder.
        encoder: An `Encoder`, or what ``load_run`` returned; for an index that exists, the one that made it. The index
            keeps the name of an encoder of ``load_encoder``, by which searches load it; any other they must be given.
        metadata: A file of the user's columns, in place of those that the index has.
        forget: One or more folders whose pictures leave the index.
        thorough: Read all files again, not only those whose size or dates changed.
        candidates: ``auto`` (where they pay), ``always`` or ``none``.
        batch_size: Pictures that are encoded at once.
        workers: Processes that read pictures; by default as many as there are processors, at most 8.
        quiet: Show no progress.

    Returns:
        What was done, in the first process; the others return what they encoded alone.

    Raises:
        ValueError: another process writes to the index, the index is another model's, a folder lost all its pictures,
            there is no picture, or an argument is none of those above.
        OSError: the index cannot be written, or not all processes see its folder.
    """
    start = time.monotonic()
    check_argument("candidates", Annotated[str, one_of(CANDIDATES)], candidates)
    encoder = encoder_of(encoder)
    folders, forget = _listed(folders), _listed(forget)
    is_main = rank_and_world()[0] == 0
    index = Path(out).expanduser().absolute()
    writer: _Writer | None = None
    try:
        with fail_in_all_processes():
            if is_main:
                check_folders(folders)
                writer = _Writer(index, encoder)
                writer.prepare(folders, forget, thorough)
                writer.check(metadata)
        todo, known = gather((writer.todo, writer.known) if writer else None)[0]
        check_shared(index / WRITER, "the index's features", "choose a folder that all machines of this call see")
        own = share(len(todo))
        with fail_in_all_processes():
            part = _Part.create(index) if len(own) else None
            encoded = _read_and_encode(
                [todo[place] for place in own], known, encoder, part, batch_size, workers, quiet or not is_main
            )
        total = sum(gather(encoded))
        with fail_in_all_processes():
            if writer is None:
                return Built(0, encoded, len(own), 0, {}, time.monotonic() - start)
            notes = writer.finish(metadata, candidates)
            return replace(writer.summary(total, notes), seconds=time.monotonic() - start)
    finally:
        if writer is not None:
            writer.close()


def _listed(folders: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)


def locked(index: Path) -> FileLock:
    """Make an index's folder and take its writer's lock, which the system gives back when this process ends."""
    path = index / WRITER / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, "writing to it")
    if not lock.take():
        raise ValueError(f"{index} is being written by {holder_of(path) or 'another process'}; wait until it is done.")
    return lock


class _Writer:
    """What the first process does alone."""

    def __init__(self, index: Path, encoder: Encoder) -> None:
        self.index, self.encoder = index, encoder
        if index.is_dir() and any(index.iterdir()) and not is_index(index):
            raise ValueError(f"{index} holds other files and is no index; choose an empty or a new folder.")
        self._lock = locked(index)
        try:
            self.published = read_manifest(index) if (index / MANIFEST).exists() else None
            self.catalogue = WritableCatalogue(index / WRITER / "catalogue.sqlite")
            self._check_identity()
        except BaseException:
            self._lock.release()
            raise

    def close(self) -> None:
        self.catalogue.close()
        self._lock.release()

    def _check_identity(self) -> None:
        known = self._known_identity()
        if self.published is not None and known != dict(self.published.identity):
            raise ValueError(
                f"{self.index} has lost what its writer knows ({WRITER}); build the index again in a new folder."
            )
        refuse_another_model(self.index, known, self.encoder)
        self.identity = known or self.encoder.identity
        with self.catalogue.transaction():
            self.catalogue.note(**{f"identity_{name}": value for name, value in self.identity.items()})

    def _known_identity(self) -> dict[str, str]:
        """Return what made the features that are there; nothing where there are none."""
        if not self.rows and self.published is None and not self._parts():
            return {}
        found = {name: self.catalogue.fact(f"identity_{name}") for name in self.encoder.identity}
        return {name: value for name, value in found.items() if value is not None}

    def _parts(self) -> list[Path]:
        return sorted((self.index / WRITER).glob("part-*"))

    def prepare(self, folders: Sequence[str | Path], forget: Sequence[str | Path], thorough: bool) -> None:
        """Take over what earlier calls left behind, and find out which files have to be read."""
        self._take_over_parts()
        self.forget = [absolute(folder) for folder in forget]
        unknown = [folder for folder in self.forget if folder not in self.catalogue.folders]
        if unknown:
            raise ValueError(
                f"{unknown[0]} is none of the folders of {self.index} ({', '.join(self.catalogue.folders) or 'none'}); "
                "only these can be taken out by --forget."
            )
        known = [folder for folder in self.catalogue.folders if folder not in self.forget]
        scanned = [absolute(folder) for folder in folders] or known
        if not scanned:
            raise ValueError(f"{self.index} would have no folder of pictures; name at least one.")
        self.scanned = list(dict.fromkeys(scanned))
        self.folders = sorted({*known, *self.scanned})
        for folder in self.forget:
            above = next((other for other in self.folders if is_below(folder, other)), None)
            if above is not None:
                raise ValueError(
                    f"{folder} lies below {above}, which stays in the index with all of its pictures; take out {above} "
                    "by --forget, too, or move the pictures."
                )
        self.scan = scan_folders(self.scanned)
        self._refuse_emptied()
        self.todo = self.catalogue.unread(self.scan, thorough)
        self.known = self.catalogue.known_contents()

    def check(self, metadata: str | Path | None) -> None:
        """Refuse a wrong file of columns now, instead of after the hours that encoding may take."""
        if metadata is not None and self.todo:
            pictures = {*self.catalogue.paths(), *self.scan.pictures}
            read_metadata(metadata, pictures, self.folders, FILE_COLUMNS)

    def _refuse_emptied(self) -> None:
        paths = self.catalogue.paths()
        for folder in self.scanned:
            if any(is_below(path, folder) for path in self.scan.pictures):
                continue
            known = sum(is_below(path, folder) for path in paths)
            if known:
                raise ValueError(
                    f"{folder} holds no picture any more, and the index has {known:,} of it; mount its disk, or take "
                    f"them out by --forget {folder}."
                )

    def _take_over_parts(self) -> None:
        """Move what processes encoded from their parts into the index's files; nothing is lost or doubled by a kill."""
        for folder in self._parts():
            part = _Part(folder)
            try:
                self._take_over(part)
            finally:
                part.close()
            shutil.rmtree(folder)

    def _take_over(self, part: _Part) -> None:
        reads = list(part.reads())
        new: dict[bytes, int] = {}
        for read in reads:
            if not read.reason and read.row >= 0 and self.catalogue.row_of(read.sha256) is None:
                new.setdefault(read.sha256, read.row)
        count = self.rows
        if new:
            rows = np.array(list(new.values()), dtype=np.int64)
            shape = part.shape
            with self.catalogue.transaction():
                self.catalogue.note(per_picture=shape[0], width=shape[1])
            self.features.take_over(count, part.features, rows)
            self.looks.take_over(count, part.looks, rows)
        # What was appended counts from here on, and the part is known to be taken over, in one step.
        with self.catalogue.transaction():
            self.catalogue.add_contents((sha256, count + place) for place, sha256 in enumerate(new))
            self.catalogue.note(rows=count + len(new))
            self.catalogue.add(read for read in reads if read.reason or self.catalogue.row_of(read.sha256) is not None)

    @property
    def rows(self) -> int:
        return int(self.catalogue.fact("rows", 0))

    @property
    def features(self) -> RowFile:
        shape = (self.catalogue.fact("per_picture"), self.catalogue.fact("width"))
        return RowFile(self.index / f"features-{self.catalogue.fact('edition', 1)}.f16", shape, "float16")

    @property
    def looks(self) -> RowFile:
        return RowFile(self.index / f"looks-{self.catalogue.fact('edition', 1)}.u8", LOOK, "uint8")

    def finish(self, metadata: str | Path | None, candidates: str) -> list[str]:
        """Bring catalogue and files up to date and let readers see them."""
        self._take_over_parts()
        notes: list[str] = []
        with self.catalogue.transaction():
            self.catalogue.set_folders(self.folders)
            # An interrupted call may have read folders that this one does not name.
            self.forgotten = self.catalogue.forget_outside(self.folders)
            self.forgotten += self.catalogue.keep_only(self.scan, self.scanned)
            if metadata is not None:
                paths = self.catalogue.paths()
                columns = read_metadata(metadata, paths, self.folders, FILE_COLUMNS)
                self.catalogue.set_metadata(columns)
                notes += summary(columns, len(paths))
            else:
                notes += lacking(*self.catalogue.without_metadata(), self.catalogue.count("pictures"))
        self._write_list()
        if not self.catalogue.count("pictures"):
            raise ValueError(
                f"{', '.join(self.scanned)} holds no picture that can be indexed; see {self.index / NOT_INDEXED} for "
                "the reason of each file."
            )
        self._compact()
        return notes + self._publish(candidates)

    def _write_list(self) -> None:
        lines = [f"{_tsv_field(path)}\t{_tsv_field(reason)}\n" for path, reason in self.catalogue.not_indexed()]
        replace_file(self.index / NOT_INDEXED, "".join(lines).encode("utf-8", errors="backslashreplace"))

    def _compact(self) -> None:
        """Write features anew without those of forgotten pictures, where these are many."""
        live = np.unique(self.catalogue.pictures_by_row()[:, 0])
        dead = self.rows - len(live)
        if dead < FEWEST_DEAD or dead < DEAD_SHARE * self.rows:
            return
        old = self.features, self.looks
        edition = self.catalogue.fact("edition", 1) + 1
        new = (
            replace(old[0], path=self.index / f"features-{edition}.f16"),
            replace(old[1], path=self.index / f"looks-{edition}.u8"),
        )
        for source, target in zip(old, new):
            target.path.unlink(missing_ok=True)
            target.append_from(0, source, live)
        with self.catalogue.transaction():
            self.catalogue.renumber({int(row): place for place, row in enumerate(live)})
            self.catalogue.note(edition=edition, rows=len(live), candidates_rows=0)

    def _publish(self, candidates: str) -> list[str]:
        generation = (self.published.generation if self.published else 0) + 1
        files = {"features": self.features.path.name, "looks": self.looks.path.name}
        files["catalogue"] = f"catalogue-{generation}.sqlite"
        files["pictures"] = f"pictures-{generation}.npy"
        for job in ("catalogue", "pictures"):
            (self.index / files[job]).unlink(missing_ok=True)
        by_row = self.catalogue.pictures_by_row()
        self.catalogue.copy_to(self.index / files["catalogue"])
        with (self.index / files["pictures"]).open("wb") as file:
            np.save(file, by_row)
            file.flush()
            os.fsync(file.fileno())
        found, notes = self._candidates(candidates)
        if found:
            files["candidates"] = str(found.pop("file"))
        manifest = Manifest(
            generation=generation,
            name=self.encoder.name or (self.published.name if self.published else ""),  # of the same identity
            identity=self.identity,
            rows=self.rows,
            pictures=len(by_row),
            not_indexed=self.catalogue.count("not_indexed"),
            shape=self.features.shape,  # type: ignore[arg-type]
            longest=LONGEST,
            files=files,
            candidates=found,
        )
        manifest = replace(manifest, checksums=manifest.sampled(self.index))
        before = read_blocks(self.index, self.published.generation) if self.published else {}
        write_blocks(self.index, generation, manifest.blocks(self.index, before), before)
        manifest.write(self.index)
        self._remove_older(files)
        return notes

    def _candidates(self, wanted: str) -> tuple[dict[str, Any], list[str]]:
        """Build candidates, or keep those that still cover enough; return what the manifest says of them."""
        rows, per_picture = self.rows, self.features.shape[0]
        known = {name: self.catalogue.fact(f"candidates_{name}", 0) for name in ("rows", "probes", "recall", "file")}
        pays = wanted == "always" or (wanted == "auto" and rows * per_picture >= PAYS_FROM)
        if not pays:
            return {}, []
        if known["rows"] and rows - known["rows"] <= NEW_SHARE * rows and (self.index / str(known["file"])).is_file():
            return known, []
        if not has_faiss():
            return {}, ["an exact scan is used: FAISS, which would find candidates faster, is not installed"]
        name = f"candidates-{secrets.token_hex(4)}.faiss"
        gallery = self.features.tensor(rows)
        made = build_candidates(gallery, self.index / name)
        recall = tune(made, gallery)
        found = {"rows": rows, "probes": made.probes, "recall": recall, "file": name}
        with self.catalogue.transaction():
            self.catalogue.note(**{f"candidates_{key}": value for key, value in found.items()})
        return found, [f"candidates by FAISS: {100 * recall:.1f} % of the exact 50 best are found for drawn queries"]

    def _remove_older(self, files: dict[str, str]) -> None:
        """Remove the files of earlier states; readers that have them open keep what they see."""
        for pattern in ("features-*", "looks-*", "catalogue-*", "pictures-*", "candidates-*", ".candidates-*"):
            for path in self.index.glob(pattern):
                if path.name not in files.values():
                    with contextlib.suppress(OSError):  # Windows keeps files that are open; the next call removes them
                        path.unlink()

    def summary(self, encoded: int, notes: list[str]) -> Built:
        pictures = self.catalogue.count("pictures")
        not_indexed = dict(self.catalogue.not_indexed())
        return Built(pictures, encoded, len(self.todo), self.forgotten, not_indexed, 0.0, notes)


def refuse_another_model(index: str | Path, known: Mapping[str, str], encoder: Encoder) -> None:
    """Refuse an encoder whose features cannot be compared with those of an index.

    Raises:
        ValueError: model or transform differ; with what differs.
    """
    differing = encoder.differing(known)
    if differing:
        what = ", ".join(
            name if name == "weights" else f"{name} {known[name]} and not {encoder.identity.get(name)}"
            for name in differing
        )
        raise ValueError(
            f"{index} was made by another model or transform ({what}); name the model it was made by, or make a new "
            "index elsewhere."
        )


class _Part:
    """What one process has read and encoded and the index does not have yet: a folder that survives a kill."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._database = sqlite3.connect(folder / "journal.sqlite", isolation_level=None)
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS reads (path, bytes, modified_ns, changed_ns, read_ns, sha256, row, width, "
            "height, reason)"
        )
        self._database.execute("CREATE TABLE IF NOT EXISTS shape (per_picture, width)")
        self._rows = self._database.execute("SELECT COALESCE(MAX(row), -1) + 1 FROM reads").fetchone()[0]

    @classmethod
    def create(cls, index: Path) -> _Part:
        return cls(index / WRITER / f"part-{time.time_ns():020d}-{rank_and_world()[0]:05d}-{secrets.token_hex(4)}")

    def close(self) -> None:
        self._database.close()

    @property
    def shape(self) -> tuple[int, int]:
        found: tuple[int, int] = self._database.execute("SELECT per_picture, width FROM shape").fetchone()
        return found

    @property
    def features(self) -> RowFile:
        return RowFile(self.folder / "features.f16", self.shape, "float16")

    @property
    def looks(self) -> RowFile:
        return RowFile(self.folder / "looks.u8", LOOK, "uint8")

    def add(self, reads: Sequence[Read], features: np.ndarray[Any, Any], looks: np.ndarray[Any, Any]) -> None:
        """Keep what reading files gave; rows of the reads count from 0 within the features ``(n, K, D)``."""
        if len(features) and self._database.execute("SELECT COUNT(*) FROM shape").fetchone()[0] == 0:
            self._database.execute("INSERT INTO shape VALUES (?, ?)", features.shape[1:])
        if len(features):
            self.features.append(self._rows, features)
            self.looks.append(self._rows, looks)
        self._database.execute("BEGIN")
        self._database.executemany(
            "INSERT INTO reads VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            ((r.path, *r.signature, *r[2:4], r.row + self._rows if r.row >= 0 else -1, *r[5:]) for r in reads),
        )
        self._database.execute("COMMIT")
        self._rows += len(features)

    def reads(self) -> Iterator[Read]:
        for path, size, modified, changed, *rest in self._database.execute("SELECT * FROM reads ORDER BY rowid"):
            yield Read(path, Signature(size, modified, changed), *rest)


class _Files(Dataset):  # type: ignore[type-arg]
    """Files as tensors; what cannot be read is a reason.

    The files themselves stand in for their numbers. A list of them here would be copied into every worker, since
    Python writes to an object whenever it counts a reference to it.
    """

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __getitem__(self, file: tuple[str, Signature]) -> tuple[Read, Tensor | None, np.ndarray[Any, Any] | None]:
        path, signature = file
        read_ns = time.time_ns()
        sha256 = b""
        try:
            content = Path(path).read_bytes()
            sha256 = hashlib.sha256(content).digest()
            picture = decode_rgb(content, path, upright=True)
            read = Read(path, signature, read_ns, sha256, -1, picture.width, picture.height, "")
            return read, self.transform(picture), look_of(picture)
        except FileNotFoundError:
            reason = "it was gone when it should be read"
        except OSError as error:
            reason = f"it cannot be read: {error.strerror}"
        except ValueError as error:  # decode_rgb's, which begin with the path
            reason = str(error).partition("cannot be read as an image: ")[2].rstrip(".") or str(error)
        return Read(path, signature, read_ns, sha256, -1, 0, 0, reason), None, None


def _collate(items: list[Any]) -> tuple[list[Read], Tensor | None, np.ndarray[Any, Any], list[int]]:
    """Return the reads, the tensors and looks of those that are pictures, and where these stand among the reads."""
    places = [place for place, item in enumerate(items) if item[1] is not None]
    tensors = torch.stack([items[place][1] for place in places]) if places else None
    looks = np.stack([items[place][2] for place in places]) if places else np.empty((0, *LOOK), np.uint8)
    return [item[0] for item in items], tensors, looks, places


def _read_and_encode(
    files: Sequence[tuple[str, Signature]],
    known: set[bytes],
    encoder: Encoder,
    part: _Part | None,
    batch_size: int,
    workers: int | None,
    quiet: bool,
) -> int:
    """Read files and encode the contents that are not known; return how many these were."""
    if part is None:
        return 0
    if workers is None:
        workers = min(8, os.cpu_count() or 1) if len(files) > 2 * batch_size else 0
    loader = DataLoader(
        _Files(encoder.transform),
        batch_size=batch_size,
        sampler=files,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=worker_setup(),
    )
    seen, encoded = set(known), 0
    try:
        interval = 0.5 if sys.stderr.isatty() else 30  # seconds; a log file keeps every line
        with tqdm(
            total=len(files), desc="indexing", unit=" pictures", disable=quiet, smoothing=0.05, mininterval=interval
        ) as progress:
            for reads, tensors, looks, places in loader:
                encoded += _encode_batch(reads, tensors, looks, places, seen, encoder, part)
                progress.update(len(reads))
    finally:
        part.close()
    return encoded


def _encode_batch(
    reads: list[Read],
    tensors: Tensor | None,
    looks: np.ndarray[Any, Any],
    places: list[int],
    seen: set[bytes],
    encoder: Encoder,
    part: _Part,
) -> int:
    """Encode the new contents of a batch and keep all that was read; return how many were new."""
    new: dict[bytes, int] = {}
    for number, place in enumerate(places):
        if reads[place].sha256 not in seen:
            new.setdefault(reads[place].sha256, number)
    chosen = list(new.values())
    features = np.empty((0, 1, 1), np.float16)
    if tensors is not None and chosen:
        features = encoder.targets(tensors[chosen]).to(torch.float16).numpy()
    is_finite = np.isfinite(features).all(axis=(1, 2))
    row_of = dict(zip(np.array(list(new), dtype=object)[is_finite], range(int(is_finite.sum()))))
    refused = set(new) - set(row_of)
    kept = []
    for read in reads:
        if read.sha256 in refused and not read.reason:
            read = read._replace(reason="the model makes no finite features of it")
        kept.append(read._replace(row=row_of.get(read.sha256, -1)))
    part.add(kept, features[is_finite], looks[chosen][is_finite])
    seen.update(row_of)
    return len(chosen)


def _tsv_field(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
