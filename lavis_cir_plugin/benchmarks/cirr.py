"""Read CIRR (Liu et al., ICCV 2021): one caption per pair, recall in the gallery and in sets of six images."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from statistics import fmean, harmonic_mean
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, cast

from lavis_cir_plugin.benchmarks.annotation_files import (
    find_annotation,
    image_name,
    read_json,
    read_records,
    record_error,
    require_distinct,
    require_listed,
    text_field,
    whole_number_field,
)
from lavis_cir_plugin.benchmarks.images import find_images, image_folders
from lavis_cir_plugin.benchmarks.seen_split import drawn_like
from lavis_cir_plugin.benchmarks.submissions import Review, by_query, gallery_beside, ranks_in
from lavis_cir_plugin.benchmarks.survey import Checklist, Usage
from lavis_cir_plugin.benchmarks.types import (
    EVALUATION_SPLITS,
    Benchmark,
    Group,
    Query,
    Triplet,
    check_split,
    complete_triplets,
    coverage,
    no_metrics,
    no_submissions,
    without_missing,
)
from lavis_cir_plugin.core.error_messages import listed, shown
from lavis_cir_plugin.core.settings import Folder, Section, is_text, one_of
from lavis_cir_plugin.ranking.metrics import HasRanks, LabelledRanks, as_lists, recall_at

if TYPE_CHECKING:
    from torch import Tensor

    from lavis_cir_plugin.ranking.ranks import Ranking

SPLITS = ("train", *EVALUATION_SPLITS)
CUTOFFS = (1, 5, 10, 50)
SUBSET_CUTOFFS = (1, 2, 3)
VERSION = "rc2"
TOP, SUBSET_TOP = 50, 3
"""Number of names per query that the test server takes."""
SIZE_LIMIT = 5_000_000
"""Limit in bytes: the test server accepts only smaller files."""
ANNOTATION_KEYS = frozenset({"pairid", "reference", "caption"})
"""Keys by which a record of an annotation file is recognised."""

_LABELS = {
    "hard": "hard targets",
    "soft": "soft labels (the best weight among the first K) in R@K and R_subset",
    "cirplant": "soft labels (the best weight among the first K) in R@K and R_subset",
    "artemis": "soft labels (the best weight among the first K) in R@K and R_subset, the latter among the best 50",
    "covr": "R@K of hard targets, R_subset of soft labels (the best weight among the first K)",
}
_FILE_SPLITS = {"train": "train", "val": "val", "test": "test1", "seen": "train"}
_ROOT_NAMES = ("cirr_dataset", "CIRR", "cirr")
_SEVEN = (*(f"R@{k}" for k in CUTOFFS), *(f"R_subset@{k}" for k in SUBSET_CUTOFFS))
_MEANS_OF_SEVEN = {
    "arithmetic_mean": fmean,
    "geometric_mean": lambda values: math.prod(values) ** (1 / len(values)),
    "harmonic_mean": harmonic_mean,
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CIRRConfig(Section):
    """Keys of ``datasets.cirr.build_info``.

    Attributes:
        root: Folder of the data set or its parent. The data set has ``cirr/captions/`` or ``captions/``, and
            ``train/``, ``dev/`` and ``test1/`` in it, or in ``img_raw/`` in or beside it.
        annotations: Folder of the JSON files if it is not below ``root``.
        images: Folder with ``train/``, ``dev/`` and ``test1/`` if it is not below ``root``.
        labels: What recall counts. ``hard`` counts queries with ``target_hard`` among the first K. ``soft``, which
            equals ``cirplant``, averages the best ``target_soft`` weight (at least 0) among the first K over queries,
            in R@K and in R_subset@K (among the members of the image set). ``artemis`` is like ``soft``, but only
            members among the best 50 of the gallery count. ``covr`` uses hard labels in R@K and soft ones in
            R_subset@K.
        selection_metric: Metric that chooses the best checkpoint: a metric of the split, or a mean of the seven recalls
            (CLIP4Cir, SPRC), which is then reported too.
        missing_images: ``error``, or ``skip`` to leave out what needs a missing image and report how much that is.
        verify_images: Whether to check every image file before the run.
    """

    WHERE = "datasets.cirr.build_info"

    root: Folder
    annotations: Optional[Folder] = None
    images: Optional[Folder] = None
    labels: Annotated[str, one_of(_LABELS)] = "hard"
    selection_metric: Annotated[str, one_of(("mean", *_SEVEN, *_MEANS_OF_SEVEN))] = "mean"
    missing_images: Literal["error", "skip"] = "error"
    verify_images: bool = False


CONFIG = CIRRConfig
"""Section ``build_info`` of the config."""


def read_train(config: Mapping[str, Any]) -> tuple[list[Triplet], dict[str, Path]]:
    """Return the training triplets in file order and the paths of their images.

    ``pairid``, ``target_soft`` and ``img_set`` are optional. The last two say which images are no negatives of a
    triplet (``also_right``) and which are hard negatives (``members``, whose paths are then returned as well). Their
    entries that are not images of the split file are ignored.

    Raises:
        ValueError: If a key or value of the config, or a record of an annotation file, is wrong.
        FileNotFoundError: If an annotation file or an image is missing.
    """
    settings = CIRRConfig.from_mapping(config)
    queries, split = _read_split(settings, "train")
    triplets = [
        Triplet(
            query.reference,
            str(query.target),
            query.texts,
            also_right=tuple(name for name, weight in query.relevance if weight > 0 and name != query.target),
            members=query.members,
        )
        for query in queries
    ]
    used = dict.fromkeys(name for t in triplets for name in (t.reference, t.target, *t.members))
    paths, _ = _find_images(settings, {name: split[name] for name in used})
    return complete_triplets(triplets, paths, "cirr"), paths


def read_benchmark(config: Mapping[str, Any], split: str) -> Benchmark:
    """Return the ``val``, ``test`` or ``seen`` split; ``test`` (file name ``test1``) has neither targets nor metrics.

    The gallery is the split file; 137 images of test1 are never a reference. Every ranking leaves out the reference.
    The target is ``target_hard``. ``target_soft`` contradicts it in 42 queries of val and is not read for ``labels:
    hard``. A blank caption is refused except in ``test``, which has one (pairid 27098).

    With ``missing_images: skip`` the gallery shrinks, and queries that need a missing image, even if only as a member
    of their image set, are left out. The protocol line counts them.

    ``seen`` is sampled from the training queries and their images to val's sizes (`drawn_like`), with val's rules. A
    training file in the reduced form has no image sets. Then there are no subset metrics, and ``R@5`` replaces a
    selection metric that needs them. Such a file has no soft labels either.

    The submissions of ``test`` are the server's two files, by pairid: the best 50 of the gallery, and the best 3 of the
    image set by the scores of all its members.

    Raises:
        ValueError: If a key or value of the config, or a record of an annotation file, is wrong, or if there is no such
            split.
        FileNotFoundError: If an annotation file or an image is missing.
    """
    check_split(split, "cirr")
    settings = CIRRConfig.from_mapping(config)
    if split == "seen":
        settings = replace(settings, verify_images=False)  # reading the training split verifies its images
    queries, places = _read_split(settings, split)
    has_members = all(query.members for query in queries)
    if not has_members:
        queries = [replace(query, members=()) for query in queries]
    gallery = places
    if split == "seen":
        used = {name for query in queries for _, name in _uses(query)}
        gallery = {name: place for name, place in places.items() if name in used}
    complete = available = Group("cirr", tuple(gallery), tuple(queries), reference_removed=True)
    paths, missing = _find_images(settings, gallery)
    if missing:
        available = without_missing(complete, paths)
    group = available
    if split == "seen":
        (val,) = read_benchmark({**config, "verify_images": False}, "val").groups
        group = drawn_like(available, val)
        paths = {name: paths[name] for name in group.gallery}
    has_targets = all(query.target is not None for query in queries)
    selected = settings.selection_metric
    return Benchmark(
        name="cirr",
        split=split,
        groups=(group,),
        image_paths=paths,
        protocol=_protocol(settings, split, group, available, has_members) + coverage([complete], [available]),
        metrics=partial(_metrics, group=group, settings=settings) if has_targets else no_metrics,
        selection_metric=selected if has_members or selected.startswith("R@") else "R@5",
        submissions=partial(_submissions, group=group) if split == "test" else no_submissions,
    )


def training_text(captions: tuple[str, ...], rng: random.Random) -> str:
    """Return the only caption of a triplet."""
    return captions[0]


def _protocol(settings: CIRRConfig, split: str, group: Group, available: Group, has_members: bool) -> str:
    gallery, counted = f"{len(group.gallery):,} images", f"{len(group.queries):,} queries"
    if split == "seen":
        gallery = f"{len(group.gallery):,} training images drawn up to the size of val's"
        counted = f"{len(group.queries):,} of {len(available.queries):,} training queries"
    labels = _LABELS[settings.labels if any(query.relevance for query in group.queries) else "hard"]
    others = " or ".join(map(str, sorted({len(query.members) for query in group.queries})))
    subset = (
        f"R_subset among the {others} other members of the image set"
        if has_members
        else "no image sets, so no R_subset"
    )
    name = split if split == "seen" else _FILE_SPLITS[split]
    return f"CIRR {name}, gallery of {gallery}, reference removed, {counted}, {labels}, {subset}, ties by gallery order"


def _metrics(rankings: Mapping[str, HasRanks], group: Group, settings: CIRRConfig) -> dict[str, float]:
    """Compute R@K, R_subset@K, ``mean`` = (R@5 + R_subset@1) / 2 and a selected mean of the seven, in percent."""
    ranking = rankings["cirr"]
    metrics = _gallery_metrics(ranking, group.queries, settings.labels)
    if not all(query.members for query in group.queries):
        return metrics
    if settings.labels == "hard":
        metrics.update(_subset_metrics(ranking))
    else:
        metrics.update(
            _soft_subset_metrics(
                cast("Ranking", ranking),
                group,  # no file is scored by soft labels, so this is a Ranking
                TOP if settings.labels == "artemis" else None,
            )
        )
    metrics["mean"] = (metrics["R@5"] + metrics["R_subset@1"]) / 2
    selected = settings.selection_metric
    if selected in _MEANS_OF_SEVEN:
        metrics[selected] = _MEANS_OF_SEVEN[selected]([metrics[name] for name in _SEVEN])
    return metrics


def _gallery_metrics(ranking: HasRanks, queries: Sequence[Query], labels: str) -> dict[str, float]:
    if labels in ("hard", "covr"):
        return {f"R@{k}": recall_at(ranking.ranks, k) for k in CUTOFFS}
    return {f"R@{k}": _soft_recall_at(ranking.relevant_ranks, _weights(queries), k) for k in CUTOFFS}


def _subset_metrics(ranking: HasRanks) -> dict[str, float]:
    return {f"R_subset@{k}": recall_at(ranking.subset_ranks, k) for k in SUBSET_CUTOFFS}


def _soft_subset_metrics(ranking: Ranking, group: Group, best: int | None) -> dict[str, float]:
    """Score each query's members by soft labels, and count only those among the gallery's ``best`` if it is given.

    An image that is ranked above a member among the best is one of them too, so leaving out the others changes no rank.
    """
    ranks = []
    rows = zip(group.queries, as_lists(ranking.subset_top), as_lists(ranking.relevant_ranks))
    for query, members, gallery_ranks in rows:
        place = {group.gallery[index]: rank for rank, index in enumerate(members) if index >= 0}
        labelled = zip(query.relevance, gallery_ranks)
        ranks.append([place.get(name, -1) if best is None or rank < best else -1 for (name, _), rank in labelled])
    return {f"R_subset@{k}": _soft_recall_at(ranks, _weights(group.queries), k) for k in SUBSET_CUTOFFS}


def _weights(queries: Sequence[Query]) -> list[list[float]]:
    """Return the weights of each query's labelled images."""
    return [[weight for _, weight in query.relevance] for query in queries]


def _soft_recall_at(relevant_ranks: LabelledRanks, weights: Sequence[Sequence[float]], k: int) -> float:
    r"""Return the mean over queries of :math:`\max(0, \max_{i \le K} w_{p_i})`, in percent.

    Args:
        relevant_ranks: ``(Q, T)``, 0-based rank of every labelled image; -1 is padding or an unranked image.
        weights: Weights of each query's labelled images, without padding.
        k: Number K of images, at least 1.
    """
    best = (
        max([0.0, *(weight for rank, weight in zip(ranks, own) if 0 <= rank < k)])
        for ranks, own in zip(as_lists(relevant_ranks), weights)
    )
    return 100.0 * fmean(best)


# -- submission ------------------------------------------------------------------------------------------------------


def _submissions(rankings: Mapping[str, Ranking], group: Group) -> dict[str, Any]:
    ranking = rankings["cirr"]
    best = {"recall": ranking.top[:, :TOP], "recall_subset": ranking.subset_top[:, :SUBSET_TOP]}
    return {f"cirr_test1_{metric}.json": _submission(metric, rows, group) for metric, rows in best.items()}


def _submission(metric: str, best: Tensor, group: Group) -> dict[str, Any]:
    return {"version": VERSION, "metric": metric, **by_query(group, best, group.gallery)}


def check_submission(content: Any, size: int, annotation: Path, gallery: Path | None) -> Review:
    """Check a file for the test server, or such a file for val, and score it if the annotation has targets.

    Args:
        content: Content of the file.
        size: Size of the file in bytes.
        annotation: Path of the caption file with the queries.
        gallery: Path of the split file with the image names; the default is the one beside the annotation.

    Raises:
        ValueError, FileNotFoundError: If the annotation or the split file cannot be read.
    """
    has_targets = all("target_hard" in item for item in read_records(annotation))
    queries = {q.identifier: q for q in _read_queries(annotation, "val" if has_targets else "test", "hard")}
    if not isinstance(content, dict):
        return Review("CIRR", problems={"file that is no object": [shown(content)]})
    metric = content.get("metric")
    review = Review(f"CIRR, {len(queries):,} queries of {annotation.name}, metric {shown(metric)}")
    if content.get("version") != VERSION:
        review.refuse(f"wrong 'version', which must be {VERSION!r}", shown(content.get("version")))
    if size >= SIZE_LIMIT:
        review.refuse(f"file of {SIZE_LIMIT:,} bytes or more; write it without blanks and line breaks", f"{size:,}")
    lists = {key: value for key, value in content.items() if key not in ("version", "metric")}
    review.read_rows(lists, queries, lambda value: value if is_text(value) else None)
    review.checked += ["version", "metric", "the file's size", "queries with their own reference"]
    for identifier, row in review.rows.items():
        if queries[identifier].reference in row:
            review.refuse("queries with their own reference", identifier)
    if metric == "recall":
        split_name = annotation.name.replace("cap.", "split.", 1)
        path = gallery_beside(annotation, gallery, ("../image_splits", ""), split_name)
        names = None if path is None else _read_places(path)
        review.check_rows(TOP if names is None else min(TOP, len(names) - 1), names)
        review.note_gallery(path, len(names or ()), split_name)
    elif metric == "recall_subset":
        review.check_rows(SUBSET_TOP, None)
        review.checked.append("the images' names (by each query's set)")
        for identifier in review.rows:
            members = {*queries[identifier].members, queries[identifier].reference}
            review.check_each("queries with an image that is not in their set", identifier, members)
    else:
        review.refuse("wrong 'metric', which must be 'recall' or 'recall_subset'", shown(metric))
    if has_targets and not review.problems:
        ranking = ranks_in(list(review.rows.values()), [query.target for query in queries.values()])
        review.metrics = _gallery_metrics(ranking, (), "hard") if metric == "recall" else _subset_metrics(ranking)
    return review


# -- files -----------------------------------------------------------------------------------------------------------


def _bases(settings: CIRRConfig) -> list[Path]:
    root = Path(settings.root)
    below = dict.fromkeys(root / name / part for name in _ROOT_NAMES for part in ("", "cirr"))
    return [root, *(place for place in below if place.is_dir())]


def _read_split(settings: CIRRConfig, split: str) -> tuple[list[Query], dict[str, str]]:
    """Return the queries with their captions as texts, and the split file: paths in the image folder by image name."""
    bases = [Path(settings.annotations)] if settings.annotations else _bases(settings)
    path = find_annotation(bases, ("captions", ""), f"cap.rc2.{_FILE_SPLITS[split]}.json", "cirr")
    split_path = find_annotation(bases, ("image_splits", ""), f"split.rc2.{_FILE_SPLITS[split]}.json", "cirr")
    places = _read_places(split_path)
    queries = _read_queries(path, split, settings.labels)
    blank = [query.identifier for query in queries if not query.texts[0]]
    if blank:
        logger.warning("cirr test1: %d of %d captions are blank (pairid, %s).", len(blank), len(queries), listed(blank))
    if split == "train":
        queries = [
            replace(
                query,
                members=tuple(name for name in query.members if name in places),
                relevance=tuple((name, weight) for name, weight in query.relevance if name in places),
            )
            for query in queries
        ]
    uses = ((number, *use) for number, query in enumerate(queries) for use in _uses(query))
    require_listed(uses, places, path, split_path)
    return queries, places


def _read_places(path: Path) -> dict[str, str]:
    places = read_json(path)
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise ValueError(f"{path} must map image names to paths; correct the file or copy it again.")
    for number, (name, place) in enumerate(places.items()):
        image_name(name, "name", path, number)
        parts = PurePosixPath(place).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in place or not place.isprintable():
            problem = (
                f"maps {name} to {place!r}; it must be a path below the image folder, without '..' and backslashes"
            )
            raise record_error(path, number, problem)
    return places


def _read_queries(path: Path, split: str, labels: str) -> list[Query]:
    records = read_records(path)
    queries = [_query(item, path, number, split, labels) for number, item in enumerate(records)]
    require_distinct(records, "pairid", path)
    return queries


def _uses(query: Query) -> Iterator[tuple[str, str | None]]:
    """Yield field and name of every image in a record."""
    yield "reference", query.reference
    yield "target_hard", query.target
    yield from (("img_set.members", name) for name in query.members)
    yield from (("target_soft", name) for name, _ in query.relevance)


def _query(item: Mapping[str, Any], path: Path, number: int, split: str, labels: str) -> Query:
    is_training = split in ("train", "seen")
    pair = whole_number_field(item, "pairid", path, number, optional=is_training)
    reference = image_name(text_field(item, "reference", path, number), "reference", path, number)
    target = text_field(item, "target_hard", path, number, optional=split == "test")
    if target is not None:
        image_name(target, "target_hard", path, number)
    caption = str(text_field(item, "caption", path, number)).strip()
    if not caption and split != "test":
        raise record_error(path, number, "has an empty caption; it must say how the target differs")
    query = Query(reference, (caption,), target, identifier=str(number if pair is None else pair))
    if split == "train":
        members, soft = _members(item), item.get("target_soft")
        return replace(
            query,
            members=tuple(dict.fromkeys(name for name in members or () if is_text(name) and name != reference)),
            relevance=tuple((name, weight) for name, weight in soft.items() if type(weight) in (int, float))
            if isinstance(soft, dict)
            else (),
        )
    if labels != "hard" and target is not None:
        query = replace(query, relevance=_soft_labels(item, path, number, labels))
    if split == "seen" and "img_set" not in item:
        return query
    return replace(query, members=_other_members(item, query, path, number))


def _members(item: Mapping[str, Any]) -> list[Any] | None:
    image_set = item.get("img_set")
    members = image_set.get("members") if isinstance(image_set, dict) else None
    return members if isinstance(members, list) else None


def _other_members(item: Mapping[str, Any], query: Query, path: Path, number: int) -> tuple[str, ...]:
    members = _members(item)
    if members is None or not all(isinstance(name, str) for name in members):
        raise record_error(path, number, "needs 'img_set' with 'members', a list of image names")
    for name in members:
        image_name(name, "members", path, number)
    if len(set(members)) < len(members) or not {query.reference, query.target or query.reference} <= set(members):
        raise record_error(path, number, "needs distinct 'members' that include the reference and the target")
    return tuple(name for name in members if name != query.reference)


def _soft_labels(item: Mapping[str, Any], path: Path, number: int, setting: str) -> tuple[tuple[str, float], ...]:
    labels = item.get("target_soft")
    if (
        not isinstance(labels, dict)
        or not labels
        or not all(type(weight) in (int, float) and -1 <= weight <= 1 for weight in labels.values())
    ):
        raise record_error(
            path,
            number,
            "needs 'target_soft', which maps image names to weights from -1 to 1, for "
            f"datasets.cirr.build_info.labels = {setting}",
        )
    return tuple((image_name(name, "target_soft", path, number), float(weight)) for name, weight in labels.items())


def _find_images(settings: CIRRConfig, split: Mapping[str, str]) -> tuple[dict[str, Path], list[str]]:
    tops = list(dict.fromkeys(_top_folder(place) for place in split.values()))
    bases = [Path(settings.images)] if settings.images else _bases(settings)
    places = [base / below for base in bases for below in ("", "img_raw")]
    if not settings.images:
        places.append(Path(settings.root).absolute().parent / "img_raw")  # CIRR's README puts it beside cirr/
    folders = image_folders([place / top for place in places for top in tops], "cirr")
    return find_images(split, folders, "cirr", settings.missing_images, settings.verify_images)


def _top_folder(place: str) -> str:
    """Return ``train`` for ``./train/34/train-11041-2-img0.png``; the images are found by name below that folder."""
    parts = PurePosixPath(place).parts
    return parts[0] if len(parts) > 1 else ""


# -- lavis-cir check ------------------------------------------------------------------------------------------------


CHECKLIST = Checklist(
    title="CIRR",
    usages=(
        Usage("training", "train"),
        Usage("val, hard labels", "val"),
        Usage("val, soft labels", "val", {"labels": "soft"}),
        Usage("test1 submission", "test", is_submission=True),
    ),
    published={("train", ""): 28_225, ("val", ""): 4_181, ("test", ""): 4_148},
    absent_files="captions/ and image_splits/ are on the branch cirr_dataset of CIRR's repository, not on main",
    absent_images=(
        "the images are NLVR2's: by its form, or by mail from CIRR's authors; fetched by their URLs many are gone, "
        "and the sub-folders train/0 to train/99 with them"
    ),
    training=("projects/wrf4cir/cirr.yaml",),
    is_evaluated=True,
)
