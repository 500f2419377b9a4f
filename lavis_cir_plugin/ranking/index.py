"""Search of a gallery for its best images: exactly, or among candidates that FAISS finds."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin.core.atomic_files import replacing
from lavis_cir_plugin.core.error_messages import did_you_mean
from lavis_cir_plugin.ranking import scoring
from lavis_cir_plugin.ranking.ranks import rank, rerank
from lavis_cir_plugin.ranking.scoring import longest_feature, split

KINDS = ("exact", "flat", "ivf", "hnsw")

HITS_PER_RESULT = 4
"""How many feature vectors FAISS is asked for per image that is wanted, at least."""

SPARE = 16
"""How many images beyond the best k are scored again, because FAISS may have a few of them in a wrong order."""

VECTORS_PER_LIST, SAMPLE_PER_LIST = 39, 64
"""Vectors that a list of an inverted file needs, so that FAISS trains it without a warning, and is trained on."""

GPU_HITS = 2048
"""The most hits that FAISS returns from a GPU."""

LEAST_BEAM = 64
"""How many vectors a search of a graph keeps in mind, at least."""

_FORMAT = "lavis_cir_plugin index 2"
_LONGEST_HEADER = 1000


@dataclass(frozen=True)
class Owners:
    """The images behind each of V distinct vectors.

    FAISS's graph links a vector to its nearest ones, so that many equal vectors link to each other alone and are cut
    off from the rest. So equal vectors are indexed once.

    Attributes:
        first: ``(V,)`` ascending places, among all G x K vectors, where each distinct vector is for the first time.
        bounds: ``(V + 1,)`` where the images of each begin and end in ``images``.
        images: Gallery indices, ascending for each vector; an image is there once for each of its distinct vectors.
    """

    first: Tensor
    bounds: Tensor
    images: Tensor

    def of(self, vectors: Tensor, width: int) -> Tensor:
        """Return the images of vectors ``(Q, H)``, nearest first, -1 for none: ``(Q, up to width)``, -1 pads."""
        bounds, images = self.bounds.to(vectors.device), self.images.to(vectors.device)
        places = vectors.clamp(min=0)
        counts = torch.where(vectors >= 0, bounds[places + 1] - bounds[places], 0)
        ends = counts.cumsum(1)
        column = torch.arange(min(width, int(ends[:, -1].max())), device=vectors.device).expand(len(vectors), -1)
        column = column.contiguous()
        hit = torch.searchsorted(ends, column, right=True).clamp(max=vectors.shape[1] - 1)
        inside = column - (ends - counts).gather(1, hit)
        found = images[(bounds[places.gather(1, hit)] + inside).clamp(max=len(images) - 1)]
        return torch.where(column < ends[:, -1:], found, -1)


@dataclass
class Index:
    """A gallery, and where its nearest feature vectors are found; made by `build_index` or `load_index`.

    Attributes:
        kind: One of `KINDS`.
        gallery: ``(G, K, D)`` or ``(G, D)``; may be mapped from a file.
        longest: Length of the longest gallery feature.
        vectors: FAISS's index of the V distinct ones of all G x K vectors; ``None`` for kind ``exact``.
        owners: The images that each distinct vector belongs to; ``None`` where all G x K vectors are distinct.
    """

    kind: str
    gallery: Tensor
    longest: float
    vectors: Any = None
    owners: Owners | None = None
    _on_gpu: Any = field(default=None, repr=False)

    def search(
        self, query: Tensor, k: int, *, excluded: Tensor | None = None, hits: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the best k images of every query.

        FAISS finds the nearest feature vectors; the images that these belong to are scored again by the arithmetic of
        `rank`, over all their features, and ordered by its tie rule. So a result differs from the exact one only where
        FAISS misses an image altogether.

        Args:
            query: ``(Q, D)``.
            k: How many images, at most G.
            excluded: ``(Q,)`` gallery index that is left out of a query's result (its reference), -1 for none.
            hits: How many vectors to ask FAISS for; by default `HITS_PER_RESULT` per image. More are asked for where
                they belong to fewer than k images.

        Returns:
            Scores ``(Q, k)`` float64 and gallery indices ``(Q, k)`` int64, best first, on the query's device; -inf and
            -1 where fewer were found.

        Raises:
            ValueError: a shape or k does not fit, or a query is not finite.
        """
        self._check(query, k, excluded, hits)
        none = torch.full((len(query),), -1, device=query.device)
        excluded = none if excluded is None else excluded.to(query.device)
        if self.vectors is None:
            candidates = rank(query, self.gallery, none, excluded=excluded, top_k=k).top
            return rerank(query, self.gallery, candidates, k, longest=self.longest)
        hits = min(hits or HITS_PER_RESULT * k, self.vectors.ntotal)
        most = max(hits, min((k + 1) * self._per_image, self.vectors.ntotal))
        parts = []
        for part in split(len(query), scoring.WORKING_BYTES, 16 * max(most, self._width(k))):
            candidates = self._candidates(query[part], k, excluded[part], hits, most)
            parts.append(rerank(query[part], self.gallery, candidates, k, longest=self.longest))
        scores, indices = zip(*parts)
        return torch.cat(scores), torch.cat(indices)

    def save(self, path: str | Path) -> Path:
        """Write the index to a file, whole or not at all. The gallery stays where it is. Returns the path.

        Raises:
            OSError: it cannot be written; an older file is then left as it was.
        """
        path = Path(path)
        with replacing(path) as file:
            file.write(json.dumps(self._header()).encode() + b"\n")
            if self.owners is not None:
                for part in (self.owners.first, self.owners.bounds, self.owners.images):
                    file.write(part.numpy().tobytes())
            if self.vectors is not None:
                faiss = _faiss(self.kind)
                faiss.write_index(self.vectors, faiss.PyCallbackIOWriter(file.write))
        return path

    @property
    def _per_image(self) -> int:
        return 1 if self.gallery.dim() == 2 else self.gallery.shape[1]

    def _width(self, k: int) -> int:
        """Return how many owners of the nearest vectors hold all candidates: an image has `_per_image` vectors."""
        return (k + SPARE + 1) * self._per_image

    def _candidates(self, query: Tensor, k: int, excluded: Tensor, hits: int, most: int) -> Tensor:
        """Return distinct images ``(Q, C)``, best first, -1 at the end; k to k + SPARE where FAISS finds so many."""
        while True:
            vectors = self._nearest(query, hits)
            if self.owners is None:
                images = torch.where(vectors >= 0, vectors // self._per_image, -1)
            else:
                images = self.owners.of(vectors, self._width(k))
            images.masked_fill_(images == excluded.unsqueeze(1), -1)
            is_new = _first_occurrences(images) & (images >= 0)
            counts = is_new.sum(dim=1)
            if hits >= most or not ((counts < k) & (vectors[:, -1] >= 0)).any():  # -1: FAISS has no more
                best = (~is_new).int().argsort(dim=1, stable=True)[:, : max(k, min(int(counts.max()), k + SPARE))]
                return images.masked_fill_(~is_new, -1).gather(1, best)
            hits = min(2 * hits, most)

    def _nearest(self, query: Tensor, hits: int) -> Tensor:
        """Return the numbers of the nearest vectors, ``(Q, hits)``, on the query's device."""
        vectors = self.vectors if self._on_gpu is None or hits > GPU_HITS else self._on_gpu
        if self.kind == "hnsw":
            vectors.hnsw.efSearch = max(hits, LEAST_BEAM)
        return torch.from_numpy(vectors.search(_rows(F.normalize(query.double(), dim=1)), hits)[1]).to(query.device)

    def _header(self) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "kind": self.kind,
            "gallery": [list(self.gallery.shape), str(self.gallery.dtype), _checksum(self.gallery)],
            "longest": self.longest,
            "owners": None if self.owners is None else [len(self.owners.first), len(self.owners.images)],
        }

    def _check(self, query: Tensor, k: int, excluded: Tensor | None, hits: int | None) -> None:
        if query.dim() != 2 or query.shape[1] != self.gallery.shape[-1] or not len(query):
            raise ValueError(f"query must be (Q, {self.gallery.shape[-1]}), got {tuple(query.shape)}.")
        if not 1 <= k <= len(self.gallery):
            raise ValueError(f"k must be from 1 to the gallery's {len(self.gallery):,} images, got {k}.")
        if hits is not None and hits < k:
            raise ValueError(f"hits must be at least k = {k}, got {hits}.")
        if excluded is not None and excluded.shape != query.shape[:1]:
            raise ValueError(f"excluded must be ({len(query)},), got {tuple(excluded.shape)}.")
        longest_feature(query, "query")  # finite


def build_index(kind: str, gallery: Tensor, *, lists: int | None = None, probes: int = 32, links: int = 32) -> Index:
    """Index a gallery for search.

    ``exact`` needs no building: it computes all scores. The others are FAISS's: ``flat`` keeps all vectors as float32;
    ``ivf`` (an inverted file) and ``hnsw`` (a graph) keep them as float16 and look at a part of them only. The graph
    depends on the order in which threads build it. ``flat`` and ``ivf`` search on a GPU where FAISS has one.

    Args:
        kind: One of `KINDS`.
        gallery: ``(G, K, D)`` or ``(G, D)``; it may be mapped from a file, and is read in blocks.
        lists: ``ivf``: number of lists, by default about the square root of the number of vectors.
        probes: ``ivf``: lists that a search looks at.
        links: ``hnsw``: neighbours of a vector in the graph.

    Returns:
        The index; it holds on to the gallery, whose features the candidates are scored with.

    Raises:
        ValueError: the kind is unknown, FAISS is not installed, the gallery is empty or not finite, or it has too few
            vectors for the lists.
    """
    if kind not in KINDS:
        raise ValueError(f"index kind must be one of {', '.join(KINDS)}, got '{kind}'" + did_you_mean(kind, KINDS))
    if gallery.dim() not in (2, 3) or not gallery.numel():
        raise ValueError(f"gallery must be (G, D) or (G, K, D) and not empty, got {tuple(gallery.shape)}.")
    longest = longest_feature(gallery)
    if kind == "exact":
        return Index(kind, gallery, longest)
    faiss, owners = _faiss(kind), _owners(gallery)
    count = gallery.numel() // gallery.shape[-1] if owners is None else len(owners.first)
    if lists is None:
        lists = max(1, min(math.isqrt(count), count // VECTORS_PER_LIST))
    if kind == "ivf" and not 1 <= lists <= max(1, count // VECTORS_PER_LIST):
        raise ValueError(
            f"{lists:,} lists need {VECTORS_PER_LIST * lists:,} vectors to be trained, the gallery has {count:,} that "
            f"differ; "
            f"set lists to {max(1, count // VECTORS_PER_LIST):,} or less, or use kind 'exact'."
        )
    vectors = _empty(faiss, kind, gallery.shape[-1], lists, links)
    scale = 1 / longest if longest else 1.0  # whatever the features' length, float16 then holds them
    if kind == "ivf":
        vectors.nprobe = probes
        vectors.cp.seed = 0
        vectors.train(_rows(_sample(gallery, SAMPLE_PER_LIST * lists, owners), scale))
    for part in split(len(gallery), scoring.WORKING_BYTES // 4, 8 * gallery[0].numel()):
        rows = gallery[part].reshape(-1, gallery.shape[-1])
        if owners is not None:
            begin = part.start * (gallery[0].numel() // gallery.shape[-1])
            here = torch.searchsorted(owners.first, torch.tensor([begin, begin + len(rows)]))
            rows = rows[(owners.first[here[0] : here[1]] - begin).to(rows.device)]
        if len(rows):
            vectors.add(_rows(rows, scale))
    return Index(kind, gallery, longest, vectors, owners, _on_gpu(faiss, kind, vectors))


def load_index(path: str | Path, gallery: Tensor) -> Index:
    """Read an index that `Index.save` wrote.

    FAISS does not defend itself against files made to harm; load your own.

    Args:
        path: The file.
        gallery: The features that it was built from, in memory or mapped from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no index or damaged, FAISS is not installed, or the gallery is another one (a sample of the
            features is compared).
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            header = json.loads(file.readline(_LONGEST_HEADER))
            if header["format"] != _FORMAT:
                raise ValueError
            index = Index(header["kind"], gallery, header["longest"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not an index of this version; build it again.") from None
        if header["gallery"] != index._header()["gallery"]:
            raise ValueError(
                f"{path} was built from other features ({header['gallery'][0]}, {header['gallery'][1]}) than the "
                f"gallery's ({list(gallery.shape)}, {gallery.dtype}); build it again."
            )
        if index.kind != "exact":
            faiss = _faiss(index.kind)
            try:
                if header["owners"] is not None:
                    index.owners = _read_owners(file, *header["owners"])
                index.vectors = faiss.read_index(faiss.PyCallbackIOReader(file.read))
            except (RuntimeError, ValueError, KeyError, TypeError):
                raise ValueError(f"{path} is damaged; build it again.") from None
            index._on_gpu = _on_gpu(faiss, index.kind, index.vectors)
    return index


def recall_against_exact(found: Tensor, exact: Tensor) -> float:
    """Compute the share of the exact results that were found, in percent.

    Args:
        found: ``(Q, k)`` gallery indices of an approximate search; -1 pads.
        exact: ``(Q, k')`` gallery indices of the exact one; -1 pads and is not counted.

    Raises:
        ValueError: the exact search found nothing.
    """
    counted = exact >= 0
    if not counted.any():
        raise ValueError("recall against no exact result is undefined; search for at least one query.")
    hit = torch.zeros_like(counted)
    for column in found.unbind(1):
        hit |= exact == column.unsqueeze(1)
    return 100.0 * int((hit & counted).sum()) / int(counted.sum())


def _faiss(kind: str) -> ModuleType:
    try:
        import faiss
    except ImportError:
        raise ValueError(
            f"index kind '{kind}' needs FAISS, which is not installed; pip install faiss-cpu, or use kind 'exact'."
        ) from None
    return faiss  # type: ignore[no-any-return]


def _empty(faiss: ModuleType, kind: str, width: int, lists: int, links: int) -> Any:
    if kind == "flat":
        return faiss.IndexFlatIP(width)
    half, product = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        return faiss.IndexHNSWSQ(width, half, links, product)
    return faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(width), width, lists, half, product)


def _on_gpu(faiss: ModuleType, kind: str, vectors: Any) -> Any:
    """Return a copy on the first GPU; ``None`` without one, and for graphs, which FAISS searches on the CPU only."""
    if kind == "hnsw" or faiss.get_num_gpus() == 0:
        return None
    resources = faiss.StandardGpuResources()
    copy = faiss.index_cpu_to_gpu(resources, 0, vectors)
    copy.resources = resources  # it does not keep them alive itself
    return copy


def _first_occurrences(rows: Tensor) -> Tensor:
    """Return where a row holds a value for the first time: ``(Q, C)`` bool."""
    values, order = rows.sort(dim=1, stable=True)
    is_new = torch.ones_like(values, dtype=torch.bool)
    is_new[:, 1:] = values[:, 1:] != values[:, :-1]
    return torch.empty_like(is_new).scatter_(1, order, is_new)


def _rows(features: Tensor, scale: float = 1.0) -> np.ndarray[Any, Any]:
    """Return features ``(..., D)`` as FAISS takes them: ``(N, D)`` float32, scaled."""
    return np.ascontiguousarray((features.flatten(0, -2).double() * scale).float().cpu().numpy())


def _sample(gallery: Tensor, count: int, owners: Owners | None) -> Tensor:
    """Draw so many distinct feature vectors, always the same; all in order where there are fewer."""
    vectors = gallery.flatten(0, -2)
    total = len(vectors) if owners is None else len(owners.first)
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].sort().values
    if owners is not None:
        chosen = owners.first[chosen]
    return vectors[chosen.to(gallery.device)]


def _owners(gallery: Tensor) -> Owners | None:
    """Find the vectors that are equal bit by bit, and their images; None where there are none."""
    rows = gallery.flatten(0, -2)
    hashes = torch.cat([_hashes(rows[part]) for part in split(len(rows), scoring.WORKING_BYTES // 4, _cost(rows))])
    order = hashes.argsort(stable=True)
    is_first = torch.ones(len(rows), dtype=torch.bool)
    is_first[1:] = hashes[order[1:]] != hashes[order[:-1]]
    if bool(is_first.all()):
        return None
    leader = torch.empty_like(order)  # the first vector with the same hash
    leader[order] = order[is_first][is_first.cumsum(0) - 1]
    # Equal hashes prove nothing: a vector that differs from its leader stays on its own.
    copies = (leader != torch.arange(len(rows))).nonzero().flatten()
    for part in split(len(copies), scoring.WORKING_BYTES // 4, 2 * _cost(rows)):
        some = copies[part]
        own, others = rows[some.to(rows.device)], rows[leader[some].to(rows.device)]
        leader[some] = torch.where((own == others).all(dim=1).cpu(), leader[some], some)
    first, vector = leader.unique(return_inverse=True)
    per_image = 1 if gallery.dim() == 2 else gallery.shape[1]
    pairs = torch.stack([vector, torch.arange(len(rows)) // per_image]).unique(dim=1)  # sorted by vector, then image
    if len(first) == len(rows):
        return None
    bounds = torch.searchsorted(pairs[0].contiguous(), torch.arange(len(first) + 1))
    return Owners(first, bounds, pairs[1].contiguous())


def _cost(rows: Tensor) -> int:
    return 16 * rows.shape[1]


def _hashes(rows: Tensor) -> Tensor:
    """Return a number of 64 bits for each row ``(n, D)``, equal for equal rows: a weighted sum of the entries' bits."""
    bits = rows.contiguous().cpu().view(_BITS[rows.element_size()]).long()
    weights = torch.randint(-(2**63), 2**63 - 1, bits.shape[1:], generator=torch.Generator().manual_seed(0)) | 1
    return (bits * weights).sum(dim=1)  # modulo 2^64


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _read_owners(file: BinaryIO, vectors: int, images: int) -> Owners:
    """Read what `Index.save` wrote of them."""
    parts = []
    for count in (vectors, vectors + 1, images):
        content = bytearray(file.read(8 * count))
        if len(content) != 8 * count:
            raise ValueError("the file is too short")
        parts.append(torch.frombuffer(content, dtype=torch.int64))
    return Owners(*parts)


def _checksum(gallery: Tensor) -> int:
    """Return a checksum of up to 256 images spread over the gallery."""
    rows = torch.linspace(0, len(gallery) - 1, min(len(gallery), 256), dtype=torch.float64).long()
    sample = gallery[rows.to(gallery.device)].contiguous().cpu()
    return zlib.crc32(sample.view(torch.uint8).numpy().tobytes())
