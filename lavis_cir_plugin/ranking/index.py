"""Search a gallery for the best images, exactly or among candidates that FAISS finds."""

from __future__ import annotations

import json
import logging
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin.core.atomic_files import replacing
from lavis_cir_plugin.core.error_messages import first_line
from lavis_cir_plugin.core.settings import check_argument, one_of
from lavis_cir_plugin.ranking import scoring
from lavis_cir_plugin.ranking.ranks import rank, rerank
from lavis_cir_plugin.ranking.scoring import longest_feature, memory_slices

KINDS = ("exact", "flat", "ivf", "hnsw")

HITS_PER_RESULT = 4
"""Minimum number of feature vectors that FAISS returns per image that is wanted."""

SPARE = 16
"""Number of images beyond the best k that are scored exactly, because FAISS may misorder a few of them."""

VECTORS_PER_LIST, SAMPLE_PER_LIST = 39, 64
"""Vectors that each list of an inverted file needs for FAISS to train without a warning, and vectors it trains on."""

GPU_HITS = 2048
"""Largest number of hits that FAISS returns from a GPU."""

LEAST_BEAM = 64
"""Minimum number of vectors that a graph search keeps as candidates."""

_FORMAT = "lavis_cir_plugin index 2"
_LONGEST_HEADER = 1000


@dataclass(frozen=True)
class Owners:
    """The images behind each of V distinct vectors.

    FAISS's graph links each vector to its nearest ones. Many equal vectors would link only to each other and be cut off
    from the rest, so equal vectors are indexed once.

    Attributes:
        first: ``(V,)`` ascending positions among all G x K vectors at which each distinct vector occurs first.
        bounds: ``(V + 1,)`` positions in ``images`` at which the images of each vector begin and end.
        images: Gallery indices, ascending for each vector. An image occurs once for each of its distinct vectors.
    """

    first: Tensor
    bounds: Tensor
    images: Tensor

    def of(self, vectors: Tensor, width: int) -> Tensor:
        """Return the images of vectors ``(Q, H)``, nearest first: ``(Q, up to width)``; -1 stands for none and pads."""
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
    """A gallery with a search structure for its feature vectors. `build_index` or `load_index` makes it.

    Attributes:
        kind: One of `KINDS`.
        gallery: Features ``(G, K, D)`` or ``(G, D)``, possibly mapped from a file.
        longest: Length of the longest gallery feature.
        vectors: FAISS's index of the V distinct vectors among all G x K; ``None`` for the kind ``exact``.
        owners: Images of each distinct vector; ``None`` if all G x K vectors are distinct.
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

        FAISS finds the nearest feature vectors. The images of these vectors are scored again over all their features by
        the arithmetic of `rank` and sorted by its tie rule. A result therefore differs from the exact one only if FAISS
        misses an image altogether.

        Args:
            query: Features ``(Q, D)``.
            k: Number of images, at most G.
            excluded: ``(Q,)`` gallery index that a query's result leaves out (its reference); -1 for none.
            hits: Number of vectors to request from FAISS; the default is `HITS_PER_RESULT` per image. The search
                requests more if the vectors belong to fewer than k images.

        Returns:
            Scores ``(Q, k)`` float64 and gallery indices ``(Q, k)`` int64, best first, on the query's device. If fewer
            images are found, -inf and -1 pad.

        Raises:
            ValueError: If a shape or k does not fit, or a query is not finite.
        """
        self._check(query, k, excluded, hits)
        none = torch.full((len(query),), -1, device=query.device)
        excluded = none if excluded is None else excluded.to(query.device)
        if self.vectors is None:
            candidates = rank(query, self.gallery, none, excluded=excluded, top_k=k).top
            return rerank(query, self.gallery, candidates, k, longest=self.longest)
        hits = min(hits or HITS_PER_RESULT * k, self.vectors.ntotal)
        most = max(hits, min((k + 1) * _per_image(self.gallery), self.vectors.ntotal))
        parts = []
        for part in memory_slices(len(query), scoring.WORKING_BYTES, 16 * max(most, self._width(k))):
            candidates = self._candidates(query[part], k, excluded[part], hits, most)
            parts.append(rerank(query[part], self.gallery, candidates, k, longest=self.longest))
        scores, indices = zip(*parts)
        return torch.cat(scores), torch.cat(indices)

    def save(self, path: str | Path) -> Path:
        """Write the index without the gallery's features to a file, whole or not at all, and return the path.

        Raises:
            OSError: If the file cannot be written. An old file then stays unchanged.
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

    def _width(self, k: int) -> int:
        """Return how many owners of the nearest vectors include all candidates; an image has `_per_image` vectors."""
        return (k + SPARE + 1) * _per_image(self.gallery)

    def _candidates(self, query: Tensor, k: int, excluded: Tensor, hits: int, most: int) -> Tensor:
        """Return distinct images ``(Q, C)``, best first and padded with -1: k to k + SPARE if FAISS finds that many."""
        while True:
            vectors = self._nearest(query, hits)
            if self.owners is None:
                images = torch.where(vectors >= 0, vectors // _per_image(self.gallery), -1)
            else:
                images = self.owners.of(vectors, self._width(k))
            images.masked_fill_(images == excluded.unsqueeze(1), -1)
            is_new = _first_occurrences(images) & (images >= 0)
            counts = is_new.sum(dim=1)
            if hits >= most or not ((counts < k) & (vectors[:, -1] >= 0)).any():  # -1: FAISS has no more vectors
                best = (~is_new).int().argsort(dim=1, stable=True)[:, : max(k, min(int(counts.max()), k + SPARE))]
                return images.masked_fill_(~is_new, -1).gather(1, best)
            hits = min(2 * hits, most)

    def _nearest(self, query: Tensor, hits: int) -> Tensor:
        """Return the indices of the nearest vectors, ``(Q, hits)``, on the query's device."""
        vectors = self.vectors if self._on_gpu is None or hits > GPU_HITS else self._on_gpu
        if self.kind == "hnsw":
            vectors.hnsw.efSearch = max(hits, LEAST_BEAM)
        return torch.from_numpy(vectors.search(_faiss_rows(F.normalize(query.double(), dim=1)), hits)[1]).to(
            query.device
        )

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
        longest_feature(query, "query")  # raises ValueError if a query is not finite


def build_index(kind: str, gallery: Tensor, *, lists: int | None = None, probes: int = 32, links: int = 32) -> Index:
    """Build an index of a gallery for search.

    The kind ``exact`` builds nothing and computes all scores. FAISS provides the other kinds: ``flat`` keeps all
    vectors as float32; ``ivf`` (an inverted file) and ``hnsw`` (a graph) keep them as float16 and search only a part of
    them. The graph depends on the order in which threads build it. ``flat`` and ``ivf`` search on a GPU if there is
    one.

    Args:
        kind: One of `KINDS`.
        gallery: Features ``(G, K, D)`` or ``(G, D)``, possibly mapped from a file. They are read in blocks.
        lists: Number of lists of ``ivf``; the default is about the square root of the number of vectors.
        probes: Number of lists that a search in ``ivf`` reads.
        links: Number of neighbours of a vector in the graph of ``hnsw``.

    Returns:
        The index. It keeps the gallery, because the features score the candidates.

    Raises:
        ValueError: If the kind is unknown, FAISS is not installed, the gallery is empty or not finite, or the gallery
            has too few vectors for the lists.
    """
    check_argument("index kind", Annotated[str, one_of(KINDS)], kind)
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
    vectors = _new_faiss_index(faiss, kind, gallery.shape[-1], lists, links)
    scale = 1 / longest if longest else 1.0  # float16 holds scaled features of any length
    if kind == "ivf":
        vectors.nprobe = probes
        vectors.cp.seed = 0
        vectors.train(_faiss_rows(_sample(gallery, SAMPLE_PER_LIST * lists, owners), scale))
    for part in memory_slices(len(gallery), scoring.WORKING_BYTES // 4, 8 * gallery[0].numel()):
        rows = gallery[part].reshape(-1, gallery.shape[-1])
        if owners is not None:
            begin = part.start * (gallery[0].numel() // gallery.shape[-1])
            here = torch.searchsorted(owners.first, torch.tensor([begin, begin + len(rows)]))
            rows = rows[(owners.first[here[0] : here[1]] - begin).to(rows.device)]
        if len(rows):
            vectors.add(_faiss_rows(rows, scale))
    return Index(kind, gallery, longest, vectors, owners, _on_gpu(faiss, kind, vectors))


def load_index(path: str | Path, gallery: Tensor) -> Index:
    """Read an index that `Index.save` wrote.

    FAISS does not protect itself against malicious files, so load only your own files.

    Args:
        path: Path of the file.
        gallery: Features from which the index was built, in memory or mapped from a file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is no index or is damaged, FAISS is not installed, or the gallery is another one (a
            sample of its features is compared).
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
    """Return the percentage of the exact results that an approximate search found.

    Args:
        found: ``(Q, k)`` gallery indices from the approximate search; -1 pads.
        exact: ``(Q, k')`` gallery indices from the exact search; -1 pads and does not count.

    Raises:
        ValueError: If the exact search found nothing.

    Examples:
        >>> recall_against_exact(torch.tensor([[4, 7, -1]]), exact=torch.tensor([[7, 2, 4]])) == 100 * 2 / 3
        True
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


def _new_faiss_index(faiss: ModuleType, kind: str, width: int, lists: int, links: int) -> Any:
    if kind == "flat":
        return faiss.IndexFlatIP(width)
    half, product = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        return faiss.IndexHNSWSQ(width, half, links, product)
    return faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(width), width, lists, half, product)


def _on_gpu(faiss: ModuleType, kind: str, vectors: Any) -> Any:
    """Return a copy on torch's current GPU.

    Returns:
        ``None`` without a GPU, without enough memory on it, or for graphs, which FAISS searches only on the CPU.
    """
    if kind == "hnsw" or faiss.get_num_gpus() == 0:
        return None
    gpu = 0
    try:
        gpu = torch.cuda.current_device() if torch.cuda.is_available() else 0
        resources = faiss.StandardGpuResources()
        copy = faiss.index_cpu_to_gpu(resources, gpu, vectors)
    except RuntimeError as error:
        logging.warning("the index is searched on the CPU, as GPU %d does not take it (%s)", gpu, first_line(error))
        return None
    copy.resources = resources  # the copy does not keep its resources alive by itself
    return copy


def _first_occurrences(rows: Tensor) -> Tensor:
    """Return ``(Q, C)`` bool: whether a value occurs for the first time in its row."""
    values, order = rows.sort(dim=1, stable=True)
    is_new = torch.ones_like(values, dtype=torch.bool)
    is_new[:, 1:] = values[:, 1:] != values[:, :-1]
    return torch.empty_like(is_new).scatter_(1, order, is_new)


def _faiss_rows(features: Tensor, scale: float = 1.0) -> np.ndarray[Any, Any]:
    """Return features ``(..., D)`` in the form that FAISS takes: ``(N, D)`` float32, scaled."""
    return np.ascontiguousarray((features.flatten(0, -2).double() * scale).float().cpu().numpy())


def _sample(gallery: Tensor, count: int, owners: Owners | None) -> Tensor:
    """Sample `count` distinct feature vectors, the same in each call, or return all in order if there are fewer."""
    vectors = gallery.flatten(0, -2)
    total = len(vectors) if owners is None else len(owners.first)
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].sort().values
    if owners is not None:
        chosen = owners.first[chosen]
    return vectors[chosen.to(gallery.device)]


def _owners(gallery: Tensor) -> Owners | None:
    """Find vectors that are equal bit by bit, and their images; return None if all vectors differ."""
    rows = gallery.flatten(0, -2)
    hashes = torch.cat(
        [_hashes(rows[part]) for part in memory_slices(len(rows), scoring.WORKING_BYTES // 4, _bytes_per_row(rows))]
    )
    order = hashes.argsort(stable=True)
    is_first = torch.ones(len(rows), dtype=torch.bool)
    is_first[1:] = hashes[order[1:]] != hashes[order[:-1]]
    if bool(is_first.all()):
        return None
    leader = torch.empty_like(order)  # the first vector with the same hash
    leader[order] = order[is_first][is_first.cumsum(0) - 1]
    # Equal hashes prove nothing, so a vector that differs from its leader stays separate.
    copies = (leader != torch.arange(len(rows))).nonzero().flatten()
    for part in memory_slices(len(copies), scoring.WORKING_BYTES // 4, 2 * _bytes_per_row(rows)):
        batch = copies[part]
        own, others = rows[batch.to(rows.device)], rows[leader[batch].to(rows.device)]
        leader[batch] = torch.where((own == others).all(dim=1).cpu(), leader[batch], batch)
    first, vector = leader.unique(return_inverse=True)
    if len(first) == len(rows):
        return None
    image = torch.arange(len(rows)) // _per_image(gallery)
    pairs = torch.stack([vector, image]).unique(dim=1)  # sorted by vector, then image
    bounds = torch.searchsorted(pairs[0].contiguous(), torch.arange(len(first) + 1))
    return Owners(first, bounds, pairs[1].contiguous())


def _per_image(gallery: Tensor) -> int:
    """Return the number of feature vectors of an image."""
    return 1 if gallery.dim() == 2 else gallery.shape[1]


def _bytes_per_row(rows: Tensor) -> int:
    return 16 * rows.shape[1]


def _hashes(rows: Tensor) -> Tensor:
    """Return a 64-bit number for each row ``(n, D)``, equal for equal rows: a weighted sum of the entries' bits."""
    bits = rows.contiguous().cpu().view(_BITS[rows.element_size()]).long()
    weights = torch.randint(-(2**63), 2**63 - 1, bits.shape[1:], generator=torch.Generator().manual_seed(0)) | 1
    return (bits * weights).sum(dim=1)  # modulo 2^64


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _read_owners(file: BinaryIO, vectors: int, images: int) -> Owners:
    """Read the owners that `Index.save` wrote."""
    parts = []
    for count in (vectors, vectors + 1, images):
        content = bytearray(file.read(8 * count))
        if len(content) != 8 * count:
            raise ValueError("the file is too short")
        parts.append(torch.frombuffer(content, dtype=torch.int64))
    return Owners(*parts)


def _checksum(gallery: Tensor) -> int:
    """Return a checksum of up to 256 images that are spread over the gallery."""
    rows = torch.linspace(0, len(gallery) - 1, min(len(gallery), 256), dtype=torch.float64).long()
    sample = gallery[rows.to(gallery.device)].contiguous().cpu()
    return zlib.crc32(sample.view(torch.uint8).numpy().tobytes())
