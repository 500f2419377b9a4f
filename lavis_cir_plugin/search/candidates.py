"""Candidates from a large gallery by an inverted file of FAISS, mapped from a file, and its recall against exact."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin.ranking.index import SAMPLE_PER_LIST, VECTORS_PER_LIST
from lavis_cir_plugin.ranking.ranks import rank
from lavis_cir_plugin.ranking.scoring import memory_slices

PAYS_FROM = 1_000_000
"""Feature vectors from which on candidates are worth their building; below, an exact scan takes well under a second."""

NEW_SHARE = 0.1
"""Share of rows that may be newer than the candidates, and are scanned exactly, before these are built again."""

HITS_PER_RESULT = 4
"""Feature vectors that are asked for per picture that is wanted."""

DRAWN_QUERIES, RECALL_AT, ENOUGH, MOST_PROBES = 16, 50, 0.995, 512
"""How recall is measured when candidates are built, how much is enough, and where raising it ends."""

_ADDED_AT_ONCE = 64 * 2**20


@dataclass
class Candidates:
    """An inverted file over the feature vectors of the first rows of a gallery.

    Attributes:
        path: FAISS's file.
        rows: How many rows of the gallery it covers; later ones are scanned exactly.
        per_picture: Feature vectors of a row.
        probes: Lists that a search looks at.
    """

    path: Path
    rows: int
    per_picture: int
    probes: int
    _vectors: Any = None

    def find(self, query: Tensor, count: int, allowed: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any] | None:
        """Return rows that are likely the best of a query, distinct and sorted; ``None`` where it found too few.

        Args:
            query: ``(D,)``.
            count: How many pictures are wanted.
            allowed: Sorted rows to choose from; ``None`` for all.
        """
        faiss = _faiss()
        vectors = self.open()
        settings: dict[str, Any] = {"nprobe": min(self.probes, vectors.nlist)}
        if allowed is not None:
            bits = np.zeros(self.rows, dtype=bool)
            bits[allowed[allowed < self.rows]] = True
            packed = np.packbits(np.repeat(bits, self.per_picture), bitorder="little")
            settings["sel"] = faiss.IDSelectorBitmap(packed)
        wanted = min(count, self.rows)
        hits = HITS_PER_RESULT * wanted
        most = min(vectors.ntotal, max(hits, wanted * self.per_picture))
        while True:
            found = self._search(faiss, vectors, query, min(hits, most), settings)
            if len(found) >= wanted or hits >= most:
                return found if len(found) >= wanted else None
            hits *= 4

    def _search(
        self, faiss: Any, vectors: Any, query: Tensor, hits: int, settings: dict[str, Any]
    ) -> np.ndarray[Any, Any]:
        row = query.float().cpu().numpy().reshape(1, -1)
        numbers: np.ndarray[Any, Any] = vectors.search(row, hits, params=faiss.SearchParametersIVF(**settings))[1][0]
        rows: np.ndarray[Any, Any] = np.unique(numbers[numbers >= 0] // self.per_picture)
        return rows

    def open(self) -> Any:
        """Map the file, once, and return FAISS's index, which is there for good even if the file is replaced.

        Raises:
            ValueError: FAISS is not installed, or the file is missing or damaged.
        """
        faiss = _faiss()
        if self._vectors is None:
            try:
                self._vectors = faiss.read_index(str(self.path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
            except RuntimeError:
                raise ValueError(f"{self.path} is damaged; build the index again.") from None
        return self._vectors


def build_candidates(gallery: Tensor, path: Path, probes: int = 16) -> Candidates:
    """Build an inverted file over a gallery of unit features and write it to a path, whole.

    Args:
        gallery: ``(G, K, D)``, perhaps mapped from a file; it is read in blocks.
        path: The file, which must not exist.
        probes: Lists that a search will look at.

    Raises:
        ValueError: FAISS is not installed, or the gallery has under 39 feature vectors.
        OSError: the file cannot be written.
    """
    faiss = _faiss()
    vectors = gallery.flatten(0, 1)
    count, width = vectors.shape
    lists = max(1, min(math.isqrt(count), count // VECTORS_PER_LIST))
    # 8 bits per number: half of the features' size, and what is found is scored again from the features themselves.
    found = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    found.cp.seed = 0
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: SAMPLE_PER_LIST * lists]
    found.train(vectors[chosen.sort().values].float().numpy())
    for part in memory_slices(count, _ADDED_AT_ONCE, 4 * width):
        found.add(vectors[part].float().numpy())
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        faiss.write_index(found, str(unfinished))
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (RuntimeError, OSError) as error:  # FAISS says by a RuntimeError that the disk is full
        raise OSError(
            f"{path} cannot be written: {str(error).rpartition(' failed: ')[2]}; free some space and run the command "
            "again, which goes on where it was."
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return Candidates(path, len(gallery), gallery.shape[1], probes)


def tune(candidates: Candidates, gallery: Tensor) -> float:
    """Raise the number of probes until enough of the exact results are found; return the share that is.

    The queries are drawn: each lies between two pictures of the gallery, as a fused query does.

    Args:
        candidates: Candidates of this gallery; their ``probes`` are changed.
        gallery: ``(G, K, D)``.
    """
    generator = torch.Generator().manual_seed(0)
    ends = torch.randint(len(gallery), (2, DRAWN_QUERIES), generator=generator)
    queries = F.normalize(gallery[ends].float().mean(dim=2).sum(dim=0), dim=1)
    depth = min(RECALL_AT, len(gallery))
    none = torch.full((DRAWN_QUERIES,), -1)
    exact = rank(queries, gallery, none, top_k=depth).top.numpy()
    while True:
        recall = float(np.mean([_share_found(candidates, query, rows) for query, rows in zip(queries, exact)]))
        if recall >= ENOUGH or candidates.probes >= MOST_PROBES:
            return recall
        candidates.probes *= 2


def _share_found(candidates: Candidates, query: Tensor, exact: np.ndarray[Any, Any]) -> float:
    found = candidates.find(query, len(exact), None)
    return 1.0 if found is None else float(np.isin(exact, found).mean())


def has_faiss() -> bool:
    """Return whether FAISS is installed."""
    try:
        _faiss()
    except ValueError:
        return False
    return True


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ValueError(
            "candidates need FAISS, which is not installed; pip install faiss-cpu, or build the index with "
            "--candidates none."
        ) from None
    return faiss
