"""Define the parts of every benchmark: triplets, queries, groups and splits."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from lavis_cir_plugin.ranking.metrics import HasRanks
    from lavis_cir_plugin.ranking.ranks import Ranking
T = TypeVar("T")

EVALUATION_SPLITS = ("val", "test", "seen")
"""Evaluation splits. ``seen`` is sampled from the training data for a comparison with ``val``."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Triplet:
    """One training example.

    Attributes:
        reference: Name (file stem) of the reference image.
        target: Name of the target image.
        captions: Captions from which ``training_text`` makes the modification text.
        category: Category in FashionIQ; empty in other data sets.
        reference_caption: Description of the reference, for losses that need it. Either all triplets of a data set have
            one, or it is empty in all.
        also_right: Further right answers in the annotation besides the target: CIRR's soft labels above 0, further
            targets in one's own triplets.
        members: Members of the image set for which the triplet was written, without the reference (CIRR).
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
        texts: Modification texts. If there are several, their query features are averaged and normalised again.
        target: Name of the target image, or ``None`` if the split's targets are not public.
        members: Image set that a subset metric ranks, without the reference (CIRR).
        relevance: Name and weight of every labelled image, for metrics that need more than the target: CIRCO's ground
            truths (each 1.0), CIRR's soft labels.
        identifier: Id in the annotation, by which a submission names the query.
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
        name: Name of the group (in FashionIQ the category).
        gallery: Distinct image names in the protocol's order, which also orders equal scores.
        queries: Queries in the order of the annotation file.
        reference_removed: Whether each query's ranking leaves out its reference.
    """

    name: str
    gallery: tuple[str, ...]
    queries: tuple[Query, ...]
    reference_removed: bool


def no_submissions(rankings: Mapping[str, Ranking]) -> dict[str, Any]:
    """Return no file, because the benchmark has no test server."""
    return {}


@dataclass(frozen=True)
class Benchmark:
    """A split with its protocol.

    Attributes:
        name: Registered name of the benchmark.
        split: One of `EVALUATION_SPLITS`.
        groups: Groups of queries, at least one.
        image_paths: File of every gallery and reference image.
        protocol: One line that states what makes the numbers comparable. It is printed beside them.
        metrics: Function from the ranking of each group to metrics in percent; empty if the targets are not public.
        selection_metric: Metric that chooses the best checkpoint.
        submissions: Function from the ranking of each group to the test server's files: content (for JSON) by file
            name.
        upright: Whether images are turned as their EXIF orientation says.
    """

    name: str
    split: str
    groups: tuple[Group, ...] = field(repr=False)  # a benchmark has up to a hundred thousand pictures and queries
    image_paths: Mapping[str, Path] = field(repr=False)
    protocol: str
    metrics: Callable[[Mapping[str, HasRanks]], dict[str, float]] = field(repr=False)
    selection_metric: str
    submissions: Callable[[Mapping[str, Ranking]], dict[str, Any]] = field(default=no_submissions, repr=False)
    upright: bool = False

    @property
    def has_targets(self) -> bool:
        """Whether all answers are public, so that the benchmark can be scored."""
        return all(query.target is not None for group in self.groups for query in group.queries)


def no_metrics(rankings: Mapping[str, HasRanks]) -> dict[str, float]:
    """Return no metric, because the targets of the split are not public."""
    return {}


def split_names(splits: Sequence[str] = EVALUATION_SPLITS) -> str:
    """Return the names of the evaluation splits as part of a sentence."""
    return " and ".join(filter(None, (", ".join(splits[:-1]), splits[-1])))


def check_split(split: str, dataset: str, splits: Sequence[str] = EVALUATION_SPLITS) -> None:
    """Raise ValueError unless ``split`` is an evaluation split of the benchmark."""
    if split not in splits:
        raise ValueError(
            f"{dataset} has the evaluation splits {split_names(splits)}, got '{split}'; "
            f"change datasets.{dataset}.splits."
        )


def complete_triplets(triplets: list[Triplet], image_paths: Mapping[str, Path], dataset: str) -> list[Triplet]:
    """Leave out the triplets that need a missing image, and log how many there are.

    Raises:
        ValueError: If no triplet is left.
    """
    return only_complete(triplets, lambda t: t.reference in image_paths and t.target in image_paths, dataset, "triplet")


def only_complete(examples: Sequence[T], has_images: Callable[[T], bool], dataset: str, what: str) -> list[T]:
    """Leave out the training examples that need a missing image, and log how many there are.

    Args:
        examples: Training examples.
        has_images: Function that says whether an example's images were found.
        dataset: Registered name of the data set, for messages.
        what: Word for one example, for messages.

    Raises:
        ValueError: If no example is left.
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
    """Return the first ``count`` items, or a random sample if a seed is given, or all if ``count`` is null or larger.

    The items keep their order. For one seed, a smaller sample is a part of a larger one, so the samples for a curve
    over the amount of data are nested.
    """
    if count is None or count >= len(items):
        return list(items)
    order = list(range(len(items)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return [items[index] for index in sorted(order[:count])]


def without_missing(group: Group, image_paths: Mapping[str, Path]) -> Group:
    """Leave missing images out of the gallery, and leave out the queries that need one of them.

    Raises:
        ValueError: If no query is left.
    """
    gallery = tuple(name for name in group.gallery if name in image_paths)
    queries = tuple(query for query in group.queries if all(name in image_paths for name in images_of(query)))
    if not queries:
        raise ValueError(f"{group.name}: every query needs an image that is missing; check build_info.images.")
    return replace(group, gallery=gallery, queries=queries)


def coverage(complete: Sequence[Group], groups: Sequence[Group]) -> str:
    """Return the end of a protocol line that counts what missing images removed, or "" if nothing was removed."""
    images, all_images = (sum(len(group.gallery) for group in selection) for selection in (groups, complete))
    queries, all_queries = (sum(len(group.queries) for group in selection) for selection in (groups, complete))
    if (images, queries) == (all_images, all_queries):
        return ""
    return (
        f"; incomplete: {all_images - images:,} of {all_images:,} gallery images missing, "
        f"{all_queries - queries:,} of {all_queries:,} queries left out"
    )


def images_of(query: Query) -> list[str]:
    """Return all image names in a query: reference, target, members and labelled images."""
    names = (query.reference, query.target, *query.members, *(name for name, _ in query.relevance))
    return [name for name in names if name is not None]
