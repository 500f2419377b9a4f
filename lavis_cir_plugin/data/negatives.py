"""Keep the negatives of training triplets: in memory, in a file, drawn from in each step."""

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
    """The negatives of N triplets over a gallery of G training images; arrays are of int32 and float32.

    Attributes:
        names: Of the gallery, G.
        references, targets: ``(N,)`` gallery indices.
        texts: N, with which the query was made.
        negatives: ``(N, P)`` gallery indices, hardest first, -1 pads.
        scores: ``(N, P)`` of the negatives by the source's ranking, cosines; nan for random ones.
        target_scores: ``(N,)`` of the right images, likewise; nan for random negatives.
        ranks: ``(N, P)`` of the negatives, from 0, among all images that the source ranks; -1 where unknown.
        target_ranks: ``(N,)`` of the right images, likewise; -1 where unknown, or below what was searched.
        about: What they were made of: data set, epoch, seed, ``run.dpo.positive`` and ``run.negatives``.
        paths: Of the gallery's pictures, G, to look at them later.
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
        """How many negatives each triplet has, ``(N,)``."""
        counts: np.ndarray[Any, Any] = (self.negatives >= 0).sum(axis=1)
        return counts

    @property
    def is_mined(self) -> bool:
        """Whether they were mined, not drawn at random."""
        return not bool(np.isnan(self.target_scores).all())

    def draw(self, index: int, count: int, rng: Any = random) -> list[int]:
        """Return up to ``count`` distinct columns of a triplet's negatives, in order."""
        available = int((self.negatives[index] >= 0).sum())
        return sorted(rng.sample(range(available), min(count, available)))

    def summary(self) -> str:
        """Return one line: how many triplets have no negative, and at which ranks the negatives are, from 1."""
        empty = float((self.counts == 0).mean())
        text = (
            f"{len(self.targets):,} triplets, {self.counts.mean():.1f} negatives each, {100 * empty:.1f} % without one"
        )
        shares = [f"{label} {share:.0f} %" for label, share in rank_histogram(self).items() if share >= 0.5]
        if not self.is_mined:
            return f"{text}; drawn at random"
        return f"{text}; ranks {', '.join(shares)}" if shares else text

    def save(self, path: Path) -> Path:
        """Write them to a file, whole or not at all.

        Raises:
            OSError: It cannot be written; an older file is then left as it was.
        """
        texts = {"format": _FORMAT, **{name: getattr(self, name) for name in _TEXTS}}
        # As an array of strings, each would take as much as the longest.
        content = np.frombuffer(json.dumps(texts).encode(), np.uint8)
        with replacing(path) as file:
            np.savez_compressed(file, texts=content, **{name: getattr(self, name) for name in _ARRAYS})
        return path


def negatives_path(run: Path, dataset: str, epoch: int) -> Path:
    """Return where a run keeps the negatives that a data set had from an epoch on."""
    return run / "negatives" / f"{dataset}_{epoch:03d}.npz"


_ARRAYS = ("references", "targets", "negatives", "scores", "target_scores", "ranks", "target_ranks")
_TEXTS = ("names", "texts", "paths", "about")
_DAMAGES = (
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
"""What numpy and zipfile raise on files that are damaged, or of another kind."""


def load_negatives(path: str | Path) -> NegativeSets:
    """Read what :meth:`NegativeSets.save` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, of another version, or another kind of file.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"negatives {path} does not exist; a retrieval_dpo run writes <run>/negatives/*.npz.")
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # before numpy takes memory for what a damaged header asks for
                raise ValueError("wrong check sum")
        with np.load(path, allow_pickle=False) as content:
            texts: dict[str, Any] = json.loads(content["texts"].tobytes())
            if texts.pop("format") != _FORMAT:
                raise ValueError("another version's")
            arrays: dict[str, Any] = {name: content[name] for name in _ARRAYS}
            return NegativeSets(**texts, **arrays)
    except _DAMAGES as error:
        raise ValueError(f"negatives {path} is damaged or no file of negatives ({error}); mine them again.") from error


def rank_histogram(sets: NegativeSets) -> dict[str, float]:
    """Return the share of negatives by rank, counted from 1, in percent: ``1-5``, ``6-10``, ``11-25`` ...

    The last range ends with the largest rank; there is none where no rank is known.
    """
    known = sets.ranks[sets.ranks >= 0]
    last = int(known.max()) + 1 if len(known) else 0
    bounds = [*(bound for bound in _RANKS if bound < last), last]
    return {
        f"{low + 1}-{high}" if high > low + 1 else f"{high}": 100.0 * float(((known >= low) & (known < high)).mean())
        for low, high in zip(bounds, bounds[1:])
    }
