"""Hard negatives for training: mined among the training images, kept in a file, drawn from in each step."""

from __future__ import annotations

import argparse
import json
import os
import random
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin import fixed_point
from lavis_cir_plugin.benchmarks.benchmark import Triplet, did_you_mean
from lavis_cir_plugin.fixed_point import split
from lavis_cir_plugin.index import KINDS, Index
from lavis_cir_plugin.ranking import padded, rerank

SOURCES = ("query", "positive", "image_set")
LARGE_GALLERY = 10_000
"""From so many images on ``index: auto`` is an inverted file; below, exact search takes seconds."""
TWIN = 0.999
"""Cosine of mean features from which two images count as the same picture."""

_FORMAT = 1


@dataclass(frozen=True)
class Mining:
    """Which training images are negatives of a triplet, as it stands under ``run.negatives``.

    Images are ranked for each triplet; those that may not be negatives (see :func:`forbidden`) are left out and do not
    count. What passes every rule below is kept, best first.

    Attributes:
        source: What ranks the images: ``query``, the fused query of the triplet; ``positive``, the embedding of the
            right image itself, as the seed paper does; or ``image_set``, the query, within CIRR's set of six.
        count: Negatives in each step, >= 1, drawn without repetition from those kept; a triplet may have fewer.
        pool: How many are kept of each triplet, >= count.
        window: Ranks ``[first, last]`` from 0 that may be negatives, last excluded.
        cap: Share of the right image's score that a negative's must stay below (positive-aware mining, NV-Retriever,
            arXiv 2407.15831), > 0 and <= 1; ``null``: no limit. Of a negative score, as far below it.
        margin: Cosines that a negative must stay below the right image, >= 0; ``null``: no limit.
        steep_drop: Keep only what lies between the two largest drops of the score below the right image within the
            window (QuRe, arXiv 2507.12416).
        warmup_epochs: Epochs with random negatives before the first mining, >= 0.
        refresh: Mine again every so many epochs with the weights as they are then; 0: never.
        index: One of lavis_cir_plugin.index.KINDS, or ``auto``: exact below `LARGE_GALLERY` images, ivf from there on.
            All but ``hnsw`` find the same each time.
        file: Negatives of an earlier run, ``<run>/negatives/<data set>_<epoch>.npz``, in place of mining; of several
            training sets, a mapping by name.

    Raises:
        ValueError: One sentence per impossible value, all at once.
    """

    source: str = "query"
    count: int = 1
    pool: int = 16
    window: Sequence[int] = (0, 50)
    cap: float | None = 0.95
    margin: float | None = None
    steep_drop: bool = False
    warmup_epochs: int = 0
    refresh: int = 1
    index: str = "auto"
    file: str | None = None

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        problems = list(self._problems())
        if problems:
            raise ValueError(" ".join(problems))

    def mined_at(self, epoch: int) -> int:
        """Return the epoch at whose beginning the negatives of this one are found."""
        if epoch < self.warmup_epochs:
            return 0
        return epoch - (epoch - self.warmup_epochs) % self.refresh if self.refresh else self.warmup_epochs

    def _problems(self) -> Iterator[str]:
        kinds = ("auto", *KINDS)
        for key, allowed in {"source": SOURCES, "index": kinds}.items():
            value = getattr(self, key)
            if value not in allowed:
                yield f"run.negatives.{key} must be one of {', '.join(allowed)}, got {value!r}" + did_you_mean(
                    value, allowed
                )
        for key, least in {"count": 1, "pool": 1, "warmup_epochs": 0, "refresh": 0}.items():
            if not _is_whole(getattr(self, key), least):
                yield f"run.negatives.{key} must be a whole number >= {least}, got {getattr(self, key)!r}."
        if _is_whole(self.count, 1) and _is_whole(self.pool, 1) and self.pool < self.count:
            yield f"run.negatives.pool: {self.pool} is less than run.negatives.count: {self.count}."
        window = self.window
        is_pair = isinstance(window, Sequence) and not isinstance(window, str) and len(window) == 2
        if not (is_pair and _is_whole(window[0], 0) and _is_whole(window[1], 1) and window[0] < window[1]):
            shown = window if isinstance(window, str) or not isinstance(window, Sequence) else list(window)
            yield f"run.negatives.window must be two ranks [first, last] with 0 <= first < last, got {shown!r}."
        for key, most in {"cap": 1.0, "margin": 2.0}.items():
            value = getattr(self, key)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (is_number and (value > 0 if key == "cap" else value >= 0) and value <= most):
                bound = "> 0" if key == "cap" else ">= 0"
                yield f"run.negatives.{key} must be a number {bound} and <= {most:g}, or null, got {value!r}."
        if not isinstance(self.steep_drop, bool):
            yield f"run.negatives.steep_drop must be true or false, got {self.steep_drop!r}."
        if self.file is not None and not (isinstance(self.file, str) and self.file):
            yield f"run.negatives.file must be the path of a file, or null, got {self.file!r}."
        elif self.file is not None and (self.refresh or self.warmup_epochs):
            yield "run.negatives.file serves all epochs; set run.negatives.refresh and .warmup_epochs to 0."


@dataclass
class NegativeSets:
    """The negatives of N triplets over a gallery of G training images.

    Attributes:
        names: Of the gallery, G.
        references, targets: ``(N,)`` gallery indices.
        texts: N, with which the query was made.
        negatives: ``(N, P)`` gallery indices, hardest first, -1 pads.
        scores: ``(N, P)`` of the negatives by the source's ranking, cosines; nan for random ones.
        target_scores: ``(N,)`` of the right images, likewise.
        ranks: ``(N, P)`` of the negatives, from 0, before any rule; -1 where unknown.
        target_ranks: ``(N,)`` of the right images among what was searched; -1: below that.
        about: What they were made of: epoch, ``run.negatives``, and a fingerprint of the weights.
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

    def draw(self, index: int, count: int, rng: Any = random) -> list[int]:
        """Return up to ``count`` distinct columns of a triplet's negatives."""
        available = int((self.negatives[index] >= 0).sum())
        return sorted(rng.sample(range(available), min(count, available)))

    def summary(self) -> str:
        """Return one line: how many triplets have no negative, and at which ranks the negatives are."""
        empty = float((self.counts == 0).mean())
        known = self.ranks[(self.negatives >= 0) & (self.ranks >= 0)]
        text = f"{len(self.targets):,} triplets, {100 * empty:.1f} % without a negative, {self.counts.mean():.1f} each"
        if not len(known):
            return text + ", drawn at random"
        shares = ", ".join(f"{label} {share:.0f} %" for label, share in rank_histogram(self).items() if share >= 0.5)
        return f"{text}, at ranks {shares}"

    def save(self, path: Path) -> Path:
        """Write them to a file, whole or not at all.

        Raises:
            OSError: It cannot be written; an older file is then left as it was.
        """
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                np.savez_compressed(
                    file,
                    names=np.array(self.names),
                    texts=np.array(self.texts),
                    paths=np.array(self.paths, dtype=str),
                    about=np.array(json.dumps({"format": _FORMAT, **self.about}, sort_keys=True)),
                    **{name: getattr(self, name) for name in _ARRAYS},
                )
            os.replace(part, path)
        except OSError as error:
            raise OSError(
                f"the mined negatives cannot be written to {path} ({error.strerror or error}); free some space or set "
                "run.output_dir to another disk."
            ) from error
        finally:
            part.unlink(missing_ok=True)
        return path


def negatives_path(run: Path, dataset: str, epoch: int) -> Path:
    """Return where a run keeps the negatives that a data set had from an epoch on."""
    return run / "negatives" / f"{dataset}_{epoch:03d}.npz"


_ARRAYS = ("references", "targets", "negatives", "scores", "target_scores", "ranks", "target_ranks")


def load_negatives(path: str | Path) -> NegativeSets:
    """Read what :meth:`NegativeSets.save` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or another kind of file.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_file():
        raise FileNotFoundError(f"negatives {path} does not exist; a retrieval_dpo run writes <run>/negatives/*.npz.")
    try:
        with np.load(path, allow_pickle=False) as content:
            about = json.loads(str(content["about"]))
            if about.pop("format") != _FORMAT:
                raise ValueError("of another version")
            lists: dict[str, Any] = {
                name: [str(item) for item in content[name]] for name in ("names", "texts", "paths")
            }
            arrays: dict[str, Any] = {name: content[name] for name in _ARRAYS}
            return NegativeSets(about=about, **lists, **arrays)
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"negatives {path} is damaged or no file of negatives ({error}); mine them again.") from error


def forbidden(triplets: Sequence[Triplet]) -> list[set[str]]:
    """Return, for each triplet, the images that may never be its negatives.

    The target; the targets of triplets with the same reference and captions; and what the annotation lists as also
    right (CIRR's soft labels). Twins of the target are found by their features, when negatives are mined.
    """
    answers: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for triplet in triplets:
        answers.setdefault((triplet.reference, triplet.captions), set()).update((triplet.target, *triplet.also_right))
    return [answers[triplet.reference, triplet.captions] for triplet in triplets]


@dataclass(frozen=True)
class Mined:
    """What :func:`mine` found for Q queries; see :class:`NegativeSets`."""

    negatives: Tensor
    scores: Tensor
    target_scores: Tensor
    ranks: Tensor
    target_ranks: Tensor


def mine(
    query: Tensor,
    index: Index,
    targets: Tensor,
    banned: Tensor,
    settings: Mining,
    candidates: Tensor | None = None,
) -> Mined:
    """Mine the negatives of Q queries.

    Args:
        query: ``(Q, D)``: fused queries, or the right images' own embeddings.
        index: Over the gallery, ``(G, D)`` or ``(G, T, D)``.
        targets: ``(Q,)`` gallery indices.
        banned: ``(Q, F)`` gallery indices that may not be negatives, padded with -1.
        settings: The rules.
        candidates: ``(Q, C)`` gallery indices to choose from, padded with -1; by default the index searches the whole
            gallery.

    Returns:
        The negatives ``(Q, pool)``, best first, padded with -1.
    """
    size = len(index.gallery)
    # What is left out must not shorten the window; of twins, which are known later, a few are foreseen.
    depth = min(size, settings.window[1] + banned.shape[1] + 8)
    if candidates is None:
        scores, found = index.search(query, depth)
    else:
        scores, found = rerank(query, index.gallery, candidates, candidates.shape[1], longest=index.longest)
    own, _ = rerank(query, index.gallery, targets[:, None], 1, longest=index.longest)
    means = F.normalize(index.gallery.float().mean(dim=1), dim=-1) if index.gallery.dim() == 3 else index.gallery
    allowed = (found >= 0) & ~(found[:, :, None] == banned[:, None, :]).any(dim=2) & (found != targets[:, None])
    for part in split(len(query), fixed_point.WORKING_BYTES, 4 * found.shape[1] * means.shape[1]):
        alike = torch.einsum("qcd,qd->qc", means[found[part].clamp(min=0)].float(), means[targets[part]].float())
        allowed[part] &= alike < TWIN
    place = allowed.cumsum(dim=1) - 1  # the rank among what is allowed
    kept = allowed & (place >= settings.window[0]) & (place < settings.window[1])
    if settings.cap is not None:
        kept &= scores < own - (1 - settings.cap) * own.abs()
    if settings.margin is not None:
        kept &= scores < own - settings.margin
    if settings.steep_drop:
        kept &= _between_drops(scores, kept & (scores < own))
    order = (~kept).int().argsort(dim=1, stable=True)[:, : settings.pool]
    chosen = kept.gather(1, order)
    target_ranks = _first_place(found == targets[:, None])
    return Mined(
        negatives=_wide(found.gather(1, order).masked_fill(~chosen, -1), settings.pool, -1),
        scores=_wide(scores.gather(1, order).masked_fill(~chosen, torch.nan), settings.pool, torch.nan),
        target_scores=own[:, 0],
        ranks=_wide(order.masked_fill(~chosen, -1), settings.pool, -1),
        target_ranks=target_ranks,
    )


def random_negatives(targets: Tensor, banned: Sequence[set[int]], size: int, pool: int, seed: int) -> Tensor:
    """Draw negatives uniformly among the images that are not banned: ``(N, pool)``, distinct, padded with -1."""
    rows = []
    for number, (target, own) in enumerate(zip(targets.tolist(), banned)):
        rng = random.Random(f"{seed} {number}")
        drawn = rng.sample(range(size), min(size, pool + len(own) + 1))
        rows.append([image for image in drawn if image not in own and image != target][:pool])
    return padded(rows, pool)


def rank_histogram(sets: NegativeSets) -> dict[str, float]:
    """Return the share of negatives by rank, in percent: ``0-4``, ``5-9``, ``10-24`` ..."""
    known = sets.ranks[(sets.negatives >= 0) & (sets.ranks >= 0)]
    edges = (0, 5, 10, 25, 50, 100, 250, 500, 1000)
    last = int(known.max()) + 1 if len(known) else 1
    bounds = [*(edge for edge in edges if edge < last), last]
    return {
        f"{low}-{high - 1}": 100.0 * float(((known >= low) & (known < high)).mean()) if len(known) else 0.0
        for low, high in zip(bounds, bounds[1:])
    }


# -- lavis-cir negatives ---------------------------------------------------------------------------------------------


def add_command(subparsers: Any) -> None:
    """Add ``lavis-cir negatives``."""
    parser = subparsers.add_parser("negatives", help="look at the negatives that a retrieval_dpo run has mined")
    parser.add_argument("of", metavar="RUN", help="output folder of a run, or one of its negatives/*.npz")
    parser.add_argument("--epoch", type=int, help="whose negatives; by default the last that were mined")
    parser.add_argument("--rows", type=int, default=8, help="triplets on the sheet, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--output", help="picture (PNG); by default beside the run's files")
    parser.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> None:
    from lavis_cir_plugin import report  # draws, and takes seconds to import

    if args.rows < 1:
        raise ValueError(f"--rows must be a whole number >= 1, got {args.rows}.")
    for path in _files_of(Path(os.path.expanduser(args.of)), args.epoch):
        sets = load_negatives(path)
        output = Path(os.path.expanduser(args.output)) if args.output else path.with_suffix(".png")
        if output.suffix != ".png":
            raise ValueError(f"--output {output}: the picture is a PNG; choose a name that ends in .png.")
        print(f"{path}\n  {sets.summary()}")
        for label, share in rank_histogram(sets).items():
            print(f"  ranks {label:>9}  {share:5.1f} %  {'#' * round(share / 2)}")
        print(f"  written: {report.negatives_sheet(sets, output, args.rows, seed=args.seed)}")


def _files_of(run: Path, epoch: int | None) -> list[Path]:
    """Return one file per data set of a run, or the file itself."""
    if run.is_file():
        return [run]
    found: dict[str, dict[int, Path]] = {}
    for path in sorted((run / "negatives").glob("*_[0-9][0-9][0-9].npz")):
        found.setdefault(path.stem[:-4], {})[int(path.stem[-3:])] = path
    if not found:
        inside = sorted(path.parent.parent.name for path in run.glob("*/negatives/*.npz"))
        hint = f"; it holds runs that have: {', '.join(dict.fromkeys(inside))}" if inside else ""
        raise FileNotFoundError(f"{run} has no negatives/*.npz, which a run of the task retrieval_dpo writes{hint}.")
    if epoch is None:
        return [by_epoch[max(by_epoch)] for by_epoch in found.values()]
    known = sorted({number for by_epoch in found.values() for number in by_epoch})
    if epoch not in known:
        raise ValueError(f"--epoch {epoch}: {run} mined at the beginning of epochs {', '.join(map(str, known))}.")
    return [by_epoch[epoch] for by_epoch in found.values() if epoch in by_epoch]


def _between_drops(scores: Tensor, below: Tensor) -> Tensor:
    """Return what lies between the two largest drops from one allowed score to the next below the right image's."""
    result = torch.zeros_like(below)
    for row, columns in enumerate(below):
        places = columns.nonzero().squeeze(1)
        if len(places) < 3:
            continue
        values = scores[row, places]
        first, second = sorted((values[:-1] - values[1:]).topk(2).indices.tolist())
        result[row, places[first + 1 : second + 1]] = True
    return result


def _first_place(hits: Tensor) -> Tensor:
    return torch.where(hits.any(dim=1), hits.int().argmax(dim=1), -1)


def _wide(rows: Tensor, width: int, fill: float) -> Tensor:
    return F.pad(rows, (0, width - rows.shape[1]), value=fill)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
