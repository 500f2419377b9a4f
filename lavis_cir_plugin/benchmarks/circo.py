"""Read CIRCO (Baldrati et al., ICCV 2023): queries with several ground truths among 123,403 COCO images, mAP@K.

CIRCO has no training split. A model is trained on another data set and evaluated here.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

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
from lavis_cir_plugin.benchmarks.submissions import Review, by_query, gallery_beside, ranks_in
from lavis_cir_plugin.benchmarks.survey import Checklist, Usage
from lavis_cir_plugin.benchmarks.types import (
    Benchmark,
    Group,
    Query,
    Triplet,
    check_split,
    coverage,
    no_metrics,
    no_submissions,
    without_missing,
)
from lavis_cir_plugin.core.error_messages import listed, shown
from lavis_cir_plugin.core.settings import Folder, Section, is_text, one_of
from lavis_cir_plugin.ranking.metrics import HasRanks, as_lists, average_precision_at, recall_at

if TYPE_CHECKING:
    from lavis_cir_plugin.ranking.ranks import Ranking

SPLITS = ("val", "test")
CUTOFFS = (5, 10, 25, 50)
_DIGITS = 12
ASPECT_CUTOFF = 10
ASPECTS = (
    "cardinality",
    "addition",
    "negation",
    "direct_addressing",
    "compare_change",
    "comparative_statement",
    "statement_with_conjunction",
    "spatial_relations_background",
    "viewpoint",
)
TOP = 50
"""Exact number of ids per query that the test server takes."""
ANNOTATION_KEYS = frozenset({"reference_img_id", "relative_caption"})
"""Keys by which a record of an annotation file is recognised."""

_ROOT_NAMES = ("CIRCO", "circo")
_GALLERY_FILE = "image_info_unlabeled2017.json"
_GALLERY_FOLDERS = ("COCO2017_unlabeled/annotations", "annotations", "")
_IMAGE_FOLDERS = ("COCO2017_unlabeled/unlabeled2017", "unlabeled2017", "COCO2017_unlabeled")
_TEXTS = {
    "relative": "relative captions",
    "shared_and_relative": "texts 'find <shared concept> but <relative caption>'",
}

logger = logging.getLogger(__name__)
_SELECTION_METRICS = tuple(f"{metric}@{k}" for metric in ("mAP", "Recall") for k in CUTOFFS)


@dataclass(frozen=True)
class CIRCOConfig(Section):
    """Keys of ``datasets.circo.build_info``.

    Attributes:
        root: Folder of the data set (with ``annotations/`` and ``COCO2017_unlabeled/``) or its parent.
        annotations: Folder of ``val.json`` and ``test.json`` if it is not below ``root``.
        images: Folder ``unlabeled2017`` of the image files if it is not below ``root``. COCO's list of them may lie in
            ``annotations`` beside it.
        text: Text for evaluation. ``relative``: the relative caption (SEARLE, LinCIR). ``shared_and_relative``: 'find
            <shared concept> but <relative caption>' (MagicLens), which says more. Their numbers are not comparable.
        reference: ``kept`` in the gallery, as on the test server, or ``removed`` from its own ranking (CoVR). A
            reference is never a ground truth, so removing it can only raise the numbers.
        selection_metric: Metric of the split that chooses the best checkpoint.
        missing_images: ``error``, or ``skip`` to leave out what needs a missing image and report how much that is.
        verify_images: Whether to check every image file before the run.
    """

    WHERE = "datasets.circo.build_info"

    root: Folder
    annotations: Optional[Folder] = None
    images: Optional[Folder] = None
    text: Annotated[str, one_of(_TEXTS)] = "relative"
    reference: Literal["kept", "removed"] = "kept"
    selection_metric: Annotated[str, one_of(_SELECTION_METRICS)] = "mAP@5"
    missing_images: Literal["error", "skip"] = "error"
    verify_images: bool = False


@dataclass(frozen=True)
class _Record:
    """One record of an annotation file, with COCO ids for images."""

    id: int
    reference: int
    target: int | None
    ground_truths: tuple[int, ...]
    relative_caption: str
    shared_concept: str
    aspects: tuple[str, ...]


CONFIG = CIRCOConfig
"""Section ``build_info`` of the config."""


def read_train(config: Mapping[str, Any]) -> tuple[list[Triplet], dict[str, Path]]:
    """Raise an error, because there is no training split.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        "CIRCO has no training split; train on another data set (its splits: [train]) and keep datasets.circo.splits "
        "to val and test."
    )


def read_benchmark(config: Mapping[str, Any], split: str) -> Benchmark:
    """Return the ``val`` or ``test`` split. ``test`` has no public targets and therefore no metrics.

    Images are named by the stem of their file (``000000243611``); COCO's list of the gallery maps COCO's numbers to
    these names once. The gallery is that list in its order, for both splits. ``relevance`` holds the ground truths.
    With ``missing_images: skip`` the gallery shrinks, and queries that need a missing image, even if only as a ground
    truth, are left out. The protocol line counts them.

    The submission of ``test`` is the server's file: the best 50 images as COCO's numbers by the query's id.

    Raises:
        ValueError: If a key or value of the config, or a record of an annotation file, is wrong, or if there is no such
            split.
        FileNotFoundError: If an annotation file or an image is missing.
    """
    check_split(split, "circo", SPLITS)
    settings = CIRCOConfig.from_mapping(config)
    path = find_annotation(_annotation_bases(settings), ("annotations", ""), f"{split}.json", "circo")
    names_path = find_annotation(_gallery_bases(settings), _GALLERY_FOLDERS, _GALLERY_FILE, "circo")
    records, names = _read_records(path, settings.text, split == "test"), _read_gallery(names_path)
    blank = [record.id for record in records if not record.relative_caption]
    if blank:
        logger.warning("circo test: %d of %d captions are blank (id, %s).", len(blank), len(records), listed(blank))
    uses = ((number, *use) for number, record in enumerate(records) for use in _uses(record))
    require_listed(uses, names, path, names_path)
    queries = tuple(_query(record, names, settings.text) for record in records)
    complete = group = Group("circo", tuple(names.values()), queries, settings.reference == "removed")
    paths, missing = _find_images(settings, group.gallery)
    if missing:
        group = without_missing(complete, paths)
    identifiers = [query.identifier for query in group.queries]
    aspects = {str(record.id): record.aspects for record in records}
    has_targets = all(query.target is not None for query in queries)
    return Benchmark(
        name="circo",
        split=split,
        groups=(group,),
        image_paths=paths,
        protocol=_protocol(settings, split, group) + coverage([complete], [group]),
        metrics=partial(_metrics, identifiers=identifiers, aspects=aspects) if has_targets else no_metrics,
        selection_metric=settings.selection_metric,
        submissions=partial(_submissions, group=group, names=names) if split == "test" else no_submissions,
    )


def training_text(captions: tuple[str, ...], rng: random.Random) -> str:
    """Raise ValueError, because there is no training split."""
    raise ValueError("CIRCO has no training split, hence no training text.")


def _protocol(settings: CIRCOConfig, split: str, group: Group) -> str:
    return (
        f"CIRCO {split}, gallery of {len(group.gallery):,} images, reference {settings.reference}, "
        f"{_TEXTS[settings.text]}, {len(group.queries):,} queries, mAP@K over min(K, ground truths), "
        f"ties by gallery order"
    )


def _metrics(
    rankings: Mapping[str, HasRanks], identifiers: Sequence[str], aspects: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Return mAP@K, Recall@K of the target, and mAP@10 of the queries with each semantic aspect, in percent.

    Args:
        rankings: Ranking of the group by its name.
        identifiers: Ids of the group's queries.
        aspects: Aspects by id. An aspect without a query gives no metric.
    """
    ranking = rankings["circo"]
    labelled = as_lists(ranking.relevant_ranks)
    metrics = {f"mAP@{k}": average_precision_at(labelled, k) for k in CUTOFFS}
    metrics.update({f"Recall@{k}": recall_at(ranking.ranks, k) for k in CUTOFFS})
    for aspect in ASPECTS:
        ranks = [row for row, identifier in zip(labelled, identifiers) if aspect in aspects[identifier]]
        if ranks:
            metrics[f"mAP@{ASPECT_CUTOFF}_{aspect}"] = average_precision_at(ranks, ASPECT_CUTOFF)
    return metrics


# -- submission ------------------------------------------------------------------------------------------------------


def _submissions(rankings: Mapping[str, Ranking], group: Group, names: Mapping[int, str]) -> dict[str, Any]:
    number = {name: image for image, name in names.items()}
    numbers = [number[name] for name in group.gallery]
    return {"circo_test.json": by_query(group, rankings["circo"].top[:, :TOP], numbers)}


def check_submission(content: Any, size: int, annotation: Path, gallery: Path | None) -> Review:
    """Check a file for the test server, or such a file for val, and score it if the annotation has targets.

    Args:
        content: Content of the file.
        size: Size of the file in bytes; the server states no limit.
        annotation: Path of the split's JSON file.
        gallery: Path of COCO's list of images; the default is the one in the data set's folder.

    Raises:
        ValueError, FileNotFoundError: If the annotation or the list cannot be read.
    """
    has_targets = all("target_img_id" in item for item in read_records(annotation))
    records = {str(record.id): record for record in _read_records(annotation, "relative", is_test=not has_targets)}
    if not isinstance(content, dict):
        return Review("CIRCO", problems={"file that is no object": [shown(content)]})
    review = Review(f"CIRCO, {len(records):,} queries of {annotation.name}")
    review.read_rows(content, records, _as_number)
    path = gallery_beside(annotation, gallery, ("../COCO2017_unlabeled/annotations", ""), _GALLERY_FILE)
    names = None if path is None else _read_gallery(path)
    review.check_rows(TOP if names is None else min(TOP, len(names)), names)
    review.note_gallery(path, len(names or ()), _GALLERY_FILE)
    own = [identifier for identifier, row in review.rows.items() if records[identifier].reference in row]
    if own:
        review.notes.append(f"queries with their own reference, which is never right: {len(own):,} ({listed(own)})")
    if has_targets and not review.problems:
        ground_truths = [record.ground_truths for record in records.values()]
        ranking = ranks_in(list(review.rows.values()), [record.target for record in records.values()], ground_truths)
        aspects = {identifier: record.aspects for identifier, record in records.items()}
        review.metrics = _metrics({"circo": ranking}, list(records), aspects)
    return review


def _as_number(value: Any) -> int | None:
    """Return COCO's number from an integer or its digits as text, as the server does, or None.

    Names of COCO's files have twelve digits, so a negative or longer number cannot be one of its images.
    """
    is_digits = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= _DIGITS
    number = int(value) if type(value) is int or is_digits else -1
    return number if 0 <= number < 10**_DIGITS else None


# -- files -----------------------------------------------------------------------------------------------------------


def _bases(settings: CIRCOConfig) -> list[Path]:
    root = Path(settings.root)
    return [root, *(root / name for name in _ROOT_NAMES if (root / name).is_dir())]


def _annotation_bases(settings: CIRCOConfig) -> list[Path]:
    return [Path(settings.annotations)] if settings.annotations else _bases(settings)


def _gallery_bases(settings: CIRCOConfig) -> list[Path]:
    """Return the possible folders of COCO's list: with the annotations, or in or beside the image folder."""
    images = Path(settings.images).absolute() if settings.images else None
    return [*_annotation_bases(settings), *((images, images.parent) if images else ()), *_bases(settings)]


def _read_gallery(path: Path) -> dict[int, str]:
    """Return COCO's list of images as file stems by number, in file order."""
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise ValueError(f"{path} must hold 'images', a non-empty list of objects; correct the file or copy it again.")
    names = {}
    for number, image in enumerate(images):
        if not isinstance(image, dict):
            raise record_error(path, number, f"of 'images' must be an object, got {shown(image)}")
        file_name = image_name(text_field(image, "file_name", path, number), "file_name", path, number)
        names[_whole_number(image, "id", path, number)] = PurePosixPath(file_name).stem
    require_distinct(images, "id", path)
    if len(set(names.values())) < len(names):
        raise ValueError(f"{path} lists {len(names) - len(set(names.values())):,} files twice; correct the file.")
    return names


def _read_records(path: Path, text: str, is_test: bool) -> list[_Record]:
    items = read_records(path)
    records = [_record(item, path, number, text, is_test) for number, item in enumerate(items)]
    require_distinct(items, "id", path)
    return records


def _record(item: Mapping[str, Any], path: Path, number: int, text: str, is_test: bool) -> _Record:
    caption = str(text_field(item, "relative_caption", path, number)).strip()
    concept = (text_field(item, "shared_concept", path, number, optional=text == "relative") or "").strip()
    if not caption and not is_test:
        raise record_error(path, number, "has an empty relative_caption; it must say how the targets differ")
    if not concept and text == "shared_and_relative":
        raise record_error(
            path,
            number,
            "has an empty shared_concept, which datasets.circo.build_info.text = shared_and_relative needs",
        )
    reference = _whole_number(item, "reference_img_id", path, number)
    target = whole_number_field(item, "target_img_id", path, number, optional=is_test)
    return _Record(
        id=_whole_number(item, "id", path, number),
        reference=reference,
        target=target,
        ground_truths=() if target is None else _ground_truths(item, reference, target, path, number),
        relative_caption=caption,
        shared_concept=concept,
        aspects=_aspects(item, path, number),
    )


def _whole_number(item: Mapping[str, Any], key: str, path: Path, number: int) -> int:
    return int(whole_number_field(item, key, path, number) or 0)


def _ground_truths(item: Mapping[str, Any], reference: int, target: int, path: Path, number: int) -> tuple[int, ...]:
    images = item.get("gt_img_ids")
    if not isinstance(images, list) or not all(type(image) is int for image in images):
        raise record_error(path, number, "needs 'gt_img_ids', a list of whole numbers")
    if len(set(images)) < len(images) or target not in images or reference in images:
        raise record_error(path, number, "needs distinct 'gt_img_ids' with the target and without the reference")
    return tuple(images)


def _aspects(item: Mapping[str, Any], path: Path, number: int) -> tuple[str, ...]:
    aspects = item.get("semantic_aspects", [])
    if not isinstance(aspects, list) or not all(is_text(aspect) and aspect in ASPECTS for aspect in aspects):
        raise record_error(path, number, f"needs 'semantic_aspects', a list of some of {', '.join(ASPECTS)}")
    return tuple(aspects)


def _uses(record: _Record) -> list[tuple[str, int]]:
    """Return field and number of every image in a record."""
    return [("reference_img_id", record.reference), *(("gt_img_ids", image) for image in record.ground_truths)]


def _query(record: _Record, names: Mapping[int, str], text: str) -> Query:
    return Query(
        reference=names[record.reference],
        texts=(
            record.relative_caption
            if text == "relative"
            else f"find {record.shared_concept} but {record.relative_caption}",
        ),
        target=None if record.target is None else names[record.target],
        relevance=tuple((names[image], 1.0) for image in record.ground_truths),
        identifier=str(record.id),
    )


def _find_images(settings: CIRCOConfig, names: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    guesses = [base / folder for base in _bases(settings) for folder in _IMAGE_FOLDERS]
    folders = image_folders([Path(settings.images)] if settings.images else guesses, "circo")
    # The last folder contains the first. A survey may find none.
    return find_images(names, folders[:1], "circo", settings.missing_images, settings.verify_images)


# -- lavis-cir check ------------------------------------------------------------------------------------------------


CHECKLIST = Checklist(
    title="CIRCO",
    usages=(Usage("val", "val"), Usage("test submission", "test", is_submission=True)),
    published={("val", ""): 220, ("test", ""): 800},
    absent_files=(
        "val.json and test.json are in CIRCO's repository, the list of the gallery is COCO's "
        "image_info_unlabeled2017.zip, to be unpacked in COCO2017_unlabeled/"
    ),
    absent_images="the images are COCO's unlabeled2017.zip, 123,403 files, to be unpacked in COCO2017_unlabeled/",
    is_evaluated=True,
)
