"""Hard negatives of training triplets: the object that training draws from, and its file."""

from __future__ import annotations

import json
import os
import random
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lavis_cir_plugin.core.atomic_files import replacing

_FORMAT = 1
_RANKS = (0, 5, 10, 25, 50, 100, 250, 500, 1000)


@dataclass
class NegativeSets:
    """The negatives of N triplets over a gallery of G training images. Arrays hold int32 or float32 numbers.

    Attributes:
        names: Names of the G gallery images.
        references: Gallery indices of the reference images, ``(N,)``.
        targets: Gallery indices of the targets, ``(N,)``.
        texts: The N texts with which the queries were made.
        negatives: Gallery indices of the negatives, ``(N, P)``, hardest first, padded with -1.
        scores: Cosines of the negatives in the ranking that they were mined from, ``(N, P)``; nan if they were drawn
            at random.
        target_scores: Cosines of the right images in that ranking, ``(N,)``; nan if the negatives were drawn at random.
        ranks: Ranks of the negatives in that ranking, from 0, ``(N, P)``; -1 if unknown.
        target_ranks: Ranks of the right images in that ranking, ``(N,)``; -1 if unknown or beyond the searched depth.
        about: Origin of the negatives: data set, epoch, seed, ``run.dpo.positive`` and ``run.negatives``.
        paths: Paths of the G gallery pictures, for contact sheets.
    """

    names: list[str]
    references: np.ndarray[Any, Any]
    targets: np.ndarray[Any, Any]
    texts: list[str]
    negatives: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]
    target_scores: np.ndarray[Any, Any]
    ranks: np.ndarray[Any, Any]
    target_ranks: np.ndarray[Any, Any]
    about: dict[str, Any] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)

    @property
    def counts(self) -> np.ndarray[Any, Any]:
        """Number of negatives of each triplet, ``(N,)``."""
        counts: np.ndarray[Any, Any] = (self.negatives >= 0).sum(axis=1)
        return counts

    @property
    def is_mined(self) -> bool:
        """Whether the negatives were mined rather than drawn at random."""
        return not bool(np.isnan(self.target_scores).all())

    def draw(self, index: int, count: int, rng: Any = random) -> list[int]:
        """Draw up to ``count`` distinct negatives of a triplet and return their columns in ascending order."""
        available = int((self.negatives[index] >= 0).sum())
        return sorted(rng.sample(range(available), min(count, available)))

    def summary(self) -> str:
        """Return one line on the number of triplets without a negative and on the negatives' ranks, counted from 1."""
        empty = float((self.counts == 0).mean())
        text = (
            f"{len(self.targets):,} triplets, {self.counts.mean():.1f} negatives each, {100 * empty:.1f} % without one"
        )
        shares = [f"{label} {share:.0f} %" for label, share in rank_histogram(self).items() if share >= 0.5]
        if not self.is_mined:
            return f"{text}; drawn at random"
        return f"{text}; ranks {', '.join(shares)}" if shares else text

    def save(self, path: Path) -> Path:
        """Write the negatives to a file, whole or not at all, and return its path.

        Raises:
            OSError: If the file cannot be written. An older file of that name then stays unchanged.
        """
        texts = {"format": _FORMAT, **{name: getattr(self, name) for name in _TEXTS}}
        # In a numpy array of strings each one would take as much space as the longest.
        content = np.frombuffer(json.dumps(texts).encode(), np.uint8)
        with replacing(path) as file:
            np.savez_compressed(file, texts=content, **{name: getattr(self, name) for name in _ARRAYS})
        return path


def negatives_path(run: Path, dataset: str, epoch: int) -> Path:
    """Return the path of the negatives that a run mined for a data set at the beginning of an epoch."""
    return run / "negatives" / f"{dataset}_{epoch:03d}.npz"


_ARRAYS = ("references", "targets", "negatives", "scores", "target_scores", "ranks", "target_ranks")
_TEXTS = ("names", "texts", "paths", "about")
_READ_ERRORS = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    OSError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)
"""Exceptions that numpy and zipfile raise on damaged files and on files of another kind."""


def load_negatives(path: str | Path) -> NegativeSets:
    """Read a file that :meth:`NegativeSets.save` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, of another version, or of another kind.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"negatives {path} does not exist; a retrieval_dpo run writes <run>/negatives/*.npz.")
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # a damaged header could make numpy ask for any amount of memory
                raise ValueError("wrong check sum")
        with np.load(path, allow_pickle=False) as content:
            texts: dict[str, Any] = json.loads(content["texts"].tobytes())
            if texts.pop("format") != _FORMAT:
                raise ValueError("another version's")
            arrays: dict[str, Any] = {name: content[name] for name in _ARRAYS}
            return NegativeSets(**texts, **arrays)
    except _READ_ERRORS as error:
        raise ValueError(f"negatives {path} is damaged or no file of negatives ({error}); mine them again.") from error


def rank_histogram(sets: NegativeSets) -> dict[str, float]:
    """Return the percentage of negatives in each range of ranks, counted from 1: ``1-5``, ``6-10``, ``11-25`` ...

    The last range ends with the largest rank. If no rank is known, the result is empty.
    """
    known = sets.ranks[sets.ranks >= 0]
    last = int(known.max()) + 1 if len(known) else 0
    bounds = [*(bound for bound in _RANKS if bound < last), last]
    return {
        f"{low + 1}-{high}" if high > low + 1 else f"{high}": 100.0 * float(((known >= low) & (known < high)).mean())
        for low, high in zip(bounds, bounds[1:])
    }
