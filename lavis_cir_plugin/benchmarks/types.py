"""Define what every benchmark is made of: triplets, queries, groups, splits."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from lavis_cir_plugin.ranking.metrics import HasRanks
    from lavis_cir_plugin.ranking.ranks import Ranking
T = TypeVar("T")

EVALUATION_SPLITS = ("val", "test", "seen")
"""Evaluation splits; ``seen`` is drawn from the training data, to be compared with ``val``."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Triplet:
    """One training example.

    Attributes:
        reference: Name (file stem) of the reference image.
        target: Name of the target image.
        captions: What ``training_text`` makes the modification text of.
        category: FashionIQ's; empty elsewhere.
        reference_caption: What the reference shows, for losses that need it; empty where the data do not say, which
            they do for all triplets of a data set or for none.
        also_right: What the annotation lists besides the target as a right answer (CIRR's soft labels above 0).
        members: Of the image set that the triplet was written for, without the reference (CIRR).
    """

    reference: str
    target: str
    captions: tuple[str, ...]
    category: str = ""
    reference_caption: str = ""
    also_right: tuple[str, ...] = ()
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Query:
    """One evaluation query.

    Attributes:
        reference: Name of the reference image.
        texts: Modification texts; the query features of several are averaged and normalised again.
        target: ``None`` where the split's targets are not public.
        members: The image set that a subset metric ranks, without the reference (CIRR).
        relevance: Every labelled image and its weight, where a metric needs more than the target: CIRCO's ground truths
            (each 1.0), CIRR's soft labels.
        identifier: The annotation's own id, which a submission names the query by.
    """

    reference: str
    texts: tuple[str, ...]
    target: str | None
    members: tuple[str, ...] = ()
    relevance: tuple[tuple[str, float], ...] = ()
    identifier: str = ""


@dataclass(frozen=True)
class Group:
    """Queries that are ranked against one gallery.

    Attributes:
        name: Of the group (FashionIQ: the category).
        gallery: Distinct image names in protocol order; equal scores are ordered by it.
        queries: In the order of the annotation file.
        reference_removed: The reference is taken out of its own ranking.
    """

    name: str
    gallery: tuple[str, ...]
    queries: tuple[Query, ...]
    reference_removed: bool


def no_submissions(rankings: Mapping[str, Ranking]) -> dict[str, Any]:
    """Return no file: the benchmark has no test server."""
    return {}


@dataclass(frozen=True)
class Benchmark:
    """A split with its protocol.

    Attributes:
        name: Of the benchmark, as registered.
        split: One of `EVALUATION_SPLITS`.
        groups: At least one.
        image_paths: File of every gallery and reference image.
        protocol: One line that says what makes the numbers comparable; print it beside them.
        metrics: Ranking per group name to metrics in percent; empty where the targets are not public.
        selection_metric: The metric that chooses the best checkpoint.
        submissions: Ranking per group name to the test server's files, the content (for JSON) by file name.
        upright: Whether its images are turned as their EXIF orientation says.
    """

    name: str
    split: str
    groups: tuple[Group, ...]
    image_paths: Mapping[str, Path]
    protocol: str
    metrics: Callable[[Mapping[str, HasRanks]], dict[str, float]]
    selection_metric: str
    submissions: Callable[[Mapping[str, Ranking]], dict[str, Any]] = no_submissions
    upright: bool = False

    @property
    def has_targets(self) -> bool:
        """Whether the answers are public, all of them, so that it can be scored."""
        return all(query.target is not None for group in self.groups for query in group.queries)


def no_metrics(rankings: Mapping[str, HasRanks]) -> dict[str, float]:
    """Return no metric: the targets of the split are not public."""
    return {}


def split_names(splits: Sequence[str] = EVALUATION_SPLITS) -> str:
    """Return the names of the evaluation splits for a sentence."""
    return " and ".join(filter(None, (", ".join(splits[:-1]), splits[-1])))


def check_split(split: str, dataset: str, splits: Sequence[str] = EVALUATION_SPLITS) -> None:
    """Raise ValueError unless ``split`` is one that the benchmark is evaluated on."""
    if split not in splits:
        raise ValueError(
            f"{dataset} has the evaluation splits {split_names(splits)}, got '{split}'; "
            f"change datasets.{dataset}.splits."
        )


def complete_triplets(triplets: list[Triplet], image_paths: Mapping[str, Path], dataset: str) -> list[Triplet]:
    """Leave out the triplets that need a missing image, and log how many.

    Raises:
        ValueError: no triplet is left.
    """
    return only_complete(triplets, lambda t: t.reference in image_paths and t.target in image_paths, dataset, "triplet")


def only_complete(examples: Sequence[T], has_images: Callable[[T], bool], dataset: str, what: str) -> list[T]:
    """Leave out the training examples that need a missing image, and log how many; ``what`` is one called.

    Raises:
        ValueError: none is left.
    """
    found = [example for example in examples if has_images(example)]
    if not found:
        raise ValueError(
            f"{dataset} train: every {what} needs an image that is missing; check datasets.{dataset}.build_info."
        )
    if len(found) < len(examples):
        left_out = len(examples) - len(found)
        logger.warning("%s train: %d of %d %ss left out, images missing.", dataset, left_out, len(examples), what)
    return found


def first_or_drawn(items: Sequence[T], count: int | None, seed: int | None) -> list[T]:
    """Return the first ``count`` items, or with a seed drawn ones; all where there are no more, or ``count`` is null.

    The items keep their order. Of one seed, those of a smaller count are among those of a larger one, so that the sets
    of a data-amount curve are nested.
    """
    if count is None or count >= len(items):
        return list(items)
    order = list(range(len(items)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return [items[index] for index in sorted(order[:count])]


def without_missing(group: Group, image_paths: Mapping[str, Path]) -> Group:
    """Leave missing images out of the gallery, and out of the queries those that need one of them.

    Raises:
        ValueError: no query is left.
    """
    gallery = tuple(name for name in group.gallery if name in image_paths)
    queries = tuple(query for query in group.queries if all(name in image_paths for name in images_of(query)))
    if not queries:
        raise ValueError(f"{group.name}: every query needs an image that is missing; check build_info.images.")
    return replace(group, gallery=gallery, queries=queries)


def coverage(complete: Sequence[Group], groups: Sequence[Group]) -> str:
    """Say what missing images took out of a benchmark, to be appended to its protocol line; empty for nothing."""
    images, all_images = (sum(len(group.gallery) for group in some) for some in (groups, complete))
    queries, all_queries = (sum(len(group.queries) for group in some) for some in (groups, complete))
    if (images, queries) == (all_images, all_queries):
        return ""
    return (
        f"; incomplete: {all_images - images:,} of {all_images:,} gallery images missing, "
        f"{all_queries - queries:,} of {all_queries:,} queries left out"
    )


def images_of(query: Query) -> list[str]:
    """Return all images that a query names: reference, target, members and labelled images."""
    names = (query.reference, query.target, *query.members, *(name for name, _ in query.relevance))
    return [name for name in names if name is not None]
