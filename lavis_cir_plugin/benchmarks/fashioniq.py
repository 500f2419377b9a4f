"""Read FashionIQ (Wu et al., CVPR 2021): 3 categories of garments, two captions per triplet, recall at 10 and 50.

Published numbers follow several protocols under one name. ``protocol`` chooses one by its paper or code and sets four
keys. Each key can also be set by itself, and a benchmark's ``protocol`` line says what was used.

============= ========= ========= ================= ============ ======= ==========================================
``protocol``  gallery   reference captions          average      queries who evaluates so
============= ========= ========= ================= ============ ======= ==========================================
``clip4cir``  original  kept      and               per_category   6,016 CLIP4Cir, SPRC, Bi-Blip4CIR, MagicLens
``searle``    original  kept      both_orders_avg   per_category   6,016 SEARLE, LinCIR
``pic2word``  original  kept      reversed          per_category   6,016 Pic2Word, TSCIR
``covr``      original  removed   and               per_category   6,016 CoVR, DQU-CIR
``artemis``   original  removed   two_queries       per_query     12,032 ARTEMIS
``cosmo``     val       removed   two_queries       per_category  12,032 CosMo's paper (its code: gallery original)
``val_split`` val       removed   per_caption       per_category  12,029 VAL
============= ========= ========= ================= ============ ======= ==========================================

The numbers of queries hold for the split val with all three categories; 3 of its 12,032 captions are empty. The
``original`` galleries hold 3,817, 6,346 and 5,373 images, the ``val`` galleries 2,628, 3,089 and 2,902. DQU-CIR's
second table is ``covr`` with ``gallery: val``.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

from lavis_cir_plugin.benchmarks.annotation_files import (
    find_annotation,
    image_name,
    read_json,
    read_records,
    record_error,
    require_listed,
    text_field,
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
from lavis_cir_plugin.core.error_messages import shown
from lavis_cir_plugin.core.settings import Folder, Limits, Section, is_text, one_of
from lavis_cir_plugin.ranking.metrics import HasRanks, recall_at

if TYPE_CHECKING:
    from lavis_cir_plugin.ranking.ranks import Ranking

SPLITS = ("train", *EVALUATION_SPLITS)
CUTOFFS = (10, 50)
TOP = 50
"""Number of names per query that the challenge takes."""
ANNOTATION_KEYS = frozenset({"candidate", "captions"})
"""Keys by which a record of an annotation file is recognised."""

_CATEGORIES = ("dress", "shirt", "toptee")
_MERGED = "all"
_ROOT_NAMES = ("fashionIQ_dataset", "FashionIQ", "fashion-iq", "fashioniq", "fashionIQ", "fiq")
_IMAGE_FOLDERS = ("images", "resized_images", "resized_image", "image_data")
_CAPTION_MODES = {
    "and": "captions 'a and b'",
    "reversed": "captions 'b and a' with the punctuation at their ends",
    "both_orders_avg": "features of 'a and b' and 'b and a' averaged",
    "two_queries": "two queries per triplet ('a and b', 'b and a')",
    "per_caption": "one query per caption",
}
_PROTOCOL_KEYS = ("gallery", "reference", "captions", "average")
PROTOCOLS = {
    "clip4cir": ("original", "kept", "and", "per_category"),
    "searle": ("original", "kept", "both_orders_avg", "per_category"),
    "pic2word": ("original", "kept", "reversed", "per_category"),
    "covr": ("original", "removed", "and", "per_category"),
    "artemis": ("original", "removed", "two_queries", "per_query"),
    "cosmo": ("val", "removed", "two_queries", "per_category"),
    "val_split": ("val", "removed", "per_caption", "per_category"),
}

logger = logging.getLogger(__name__)


def metric_names(categories: Iterable[str] = _CATEGORIES, average: str = "per_query") -> list[str]:
    """Return the names of the metrics in the order of the table."""
    means = ("", "query_") if average == "per_query" else ("",)
    names = [f"{category}_R@{k}" for k in CUTOFFS for category in categories]
    return names + [name for prefix in means for name in (*(f"{prefix}R@{k}" for k in CUTOFFS), f"{prefix}mean")]


_SELECTION_METRICS = ("mean", *(name for name in metric_names((*_CATEGORIES, _MERGED)) if name != "mean"))


@dataclass(frozen=True)
class FashionIQConfig(Section):
    """Keys of ``datasets.fashioniq.build_info``.

    Attributes:
        root: Folder of the data set (with ``captions/`` or ``json/``, ``image_splits/``, ``images/``) or its parent.
        annotations: Folder of the JSON files if it is not below ``root``.
        images: Folder of the image files, flat or with a sub-folder per category, if it is not below ``root``.
        categories: Categories to read. ``all`` stands for CoVR's merged files (``cap.all.train.json``), which do not
            say to which category a record belongs.
        protocol: Protocol that sets the next four keys, unless they are set themselves.
        gallery: ``original``: the whole split file. ``val``: only the images that occur in a query of the split (the
            "VAL split", smaller and easier).
        reference: ``kept`` in the gallery or ``removed`` from its own ranking.
        captions: Text for evaluation. ``and``: one query 'a and b'. ``reversed``: one query 'b and a' of the
            captions as they are (Pic2Word); the other values strip blanks and punctuation at their ends.
            ``both_orders_avg``: one query with the averaged features of both orders (SEARLE). ``two_queries``: one
            query per order (CosMo, ARTEMIS). ``per_caption``: one query per non-empty caption (VAL).
        average: ``per_category``: ``R@10``, ``R@50`` and ``mean`` are unweighted means over the categories.
            ``per_query``: in addition, ``query_R@10``, ``query_R@50`` and ``query_mean`` weight each category by its
            number of queries (ARTEMIS).
        selection_metric: Metric that chooses the best checkpoint.
        training_text: ``random4``: each time one of 'a and b', 'b and a', 'a', 'b' (SPRC). ``and``: always 'a and b'.
        missing_images: ``error``, or ``skip`` to leave out what needs a missing image and report how much that is.
        verify_images: Whether to check every image file before the run.
    """

    WHERE = "datasets.fashioniq.build_info"

    root: Folder
    annotations: Optional[Folder] = None
    images: Optional[Folder] = None
    categories: Annotated[tuple[str, ...], Limits(choices=(*_CATEGORIES, _MERGED), distinct=True)] = _CATEGORIES
    protocol: Annotated[str, one_of(PROTOCOLS)] = "clip4cir"
    gallery: Literal["original", "val"] = "original"
    reference: Literal["kept", "removed"] = "kept"
    captions: Annotated[str, one_of(_CAPTION_MODES)] = "and"
    average: Literal["per_category", "per_query"] = "per_category"
    selection_metric: Annotated[str, one_of(_SELECTION_METRICS)] = "mean"
    training_text: Literal["random4", "and"] = "random4"
    missing_images: Literal["error", "skip"] = "error"
    verify_images: bool = False

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> FashionIQConfig:
        """Build the config; raise ValueError that names every unknown key and impossible value."""
        given = super().from_mapping(mapping)
        chosen = dict(zip(_PROTOCOL_KEYS, PROTOCOLS[given.protocol]))
        free: dict[str, Any] = {key: value for key, value in chosen.items() if key not in mapping}
        settings = replace(given, **free)
        names = metric_names(settings.categories, settings.average)
        if _MERGED in settings.categories and len(settings.categories) > 1:
            raise ValueError(
                f"datasets.fashioniq.build_info.categories: {', '.join(settings.categories)} would count triplets "
                f"twice, because {_MERGED} is all of them; name {_MERGED} alone, or categories without it."
            )
        if settings.selection_metric not in names:
            raise ValueError(
                f"datasets.fashioniq.build_info.selection_metric: {settings.selection_metric} is not computed with "
                f"categories {', '.join(settings.categories)} and average {settings.average}; "
                f"choose one of {', '.join(names)}."
            )
        return settings


@dataclass(frozen=True)
class _Record:
    candidate: str
    target: str | None
    captions: tuple[str, str]
    annotation: Mapping[str, Any]


@dataclass(frozen=True)
class _Category:
    name: str
    records: list[_Record]
    split: list[str]


CONFIG = FashionIQConfig
"""Section ``build_info`` of the config."""


def read_train(config: Mapping[str, Any]) -> tuple[list[Triplet], dict[str, Path]]:
    """Return the training triplets of the chosen categories in file order, and the paths of their images.

    Raises:
        ValueError: If a key or value of the config, or a record of an annotation file, is wrong.
        FileNotFoundError: If an annotation file or an image is missing.
    """
    settings = FashionIQConfig.from_mapping(config)
    triplets = [
        Triplet(record.candidate, str(record.target), _training_captions(record.captions, settings), category.name)
        for category in _read_split(settings, "train")
        for record in category.records
    ]
    paths, _ = _find_images(settings, (name for t in triplets for name in (t.reference, t.target)))
    return complete_triplets(triplets, paths, "fashioniq"), paths


def read_benchmark(config: Mapping[str, Any], split: str) -> Benchmark:
    """Return the ``val``, ``test`` or ``seen`` split. ``test`` has no targets and therefore no metrics.

    ``seen`` is sampled from the training triplets and their images to val's sizes (`drawn_like`), with val's rules and
    evaluation texts. With ``missing_images: skip`` the galleries shrink, and queries whose reference or target is
    missing are left out. The protocol line counts them.

    Raises:
        ValueError: If a key or value of the config, or a record of an annotation file, is wrong, or if there is no such
            split.
        FileNotFoundError: If an annotation file or an image is missing.
    """
    check_split(split, "fashioniq")
    settings = FashionIQConfig.from_mapping(config)
    if split == "test" and settings.gallery == "val":
        raise ValueError(
            "the VAL-split gallery is made of a split's targets, which test does not have; "
            "set datasets.fashioniq.build_info.gallery to original."
        )
    if split == "seen":
        settings = replace(settings, verify_images=False)  # reading the training split verifies its images
    if split == "test" and settings.captions in ("two_queries", "per_caption"):
        raise ValueError(
            "the test split gives one ranking per record to submit, and datasets.fashioniq.build_info.captions: "
            f"{settings.captions} makes several; set it to and, reversed or both_orders_avg."
        )
    is_removed = settings.reference == "removed"
    categories = _read_split(settings, split)
    complete = [
        Group(category.name, _gallery(category, settings, split), _queries(category, settings), is_removed)
        for category in categories
    ]
    paths, missing = _find_images(settings, (name for group in complete for name in group.gallery))
    groups = available = [without_missing(group, paths) for group in complete] if missing else complete
    if split == "seen":
        val = read_benchmark({**config, "verify_images": False}, "val")
        groups = [drawn_like(group, like) for group, like in zip(available, val.groups)]
        paths = {name: paths[name] for group in groups for name in group.gallery}
    has_targets = all(query.target is not None for group in groups for query in group.queries)
    counts = {group.name: len(group.queries) for group in groups}
    annotations = {category.name: [record.annotation for record in category.records] for category in categories}
    return Benchmark(
        name="fashioniq",
        split=split,
        groups=tuple(groups),
        image_paths=paths,
        protocol=_protocol(settings, split, groups, available) + coverage(complete, available),
        metrics=partial(_metrics, counts=counts, average=settings.average) if has_targets else no_metrics,
        selection_metric=settings.selection_metric,
        submissions=partial(_submissions, groups=groups, annotations=annotations)
        if split == "test"
        else no_submissions,
    )


def training_text(captions: tuple[str, ...], rng: random.Random) -> str:
    """Return 'a and b', 'b and a', 'a' or 'b' with 25 % chance each (SPRC), or the only caption if there is one."""
    texts = _clean(captions)
    if len(texts) < 2:
        return "".join(texts)
    first, second = texts
    return rng.choice((f"{first} and {second}", f"{second} and {first}", first, second))


def _clean(captions: Iterable[str]) -> list[str]:
    """Strip the characters that all of the field's code strips, and drop captions that are then empty."""
    stripped = (caption.strip(".?, ") for caption in captions)
    return [caption for caption in stripped if caption]


def _training_captions(captions: tuple[str, ...], settings: FashionIQConfig) -> tuple[str, ...]:
    return (" and ".join(_clean(captions)),) if settings.training_text == "and" else captions


def _query_texts(captions: tuple[str, ...], mode: str) -> list[tuple[str, ...]]:
    """Return the texts of each query that a record gives."""
    if mode == "reversed":
        return [(" and ".join(caption for caption in reversed(captions) if _clean([caption])),)]
    texts = _clean(captions)
    if mode == "per_caption":
        return [(text,) for text in texts or [""]]
    forward, backward = " and ".join(texts), " and ".join(reversed(texts))
    if mode == "two_queries":
        return [(forward,), (backward,)]
    return [{"and": (forward,), "both_orders_avg": (forward, backward)}[mode]]


def _queries(category: _Category, settings: FashionIQConfig) -> tuple[Query, ...]:
    return tuple(
        Query(record.candidate, texts, record.target, identifier=str(number))
        for number, record in enumerate(category.records)
        for texts in _query_texts(record.captions, settings.captions)
    )


def _gallery(category: _Category, settings: FashionIQConfig, split: str) -> tuple[str, ...]:
    if settings.gallery == "original" and split != "seen":
        return tuple(category.split)
    used = {name for record in category.records for name in (record.candidate, record.target)}
    return tuple(name for name in category.split if name in used)


def _protocol(settings: FashionIQConfig, split: str, groups: list[Group], available: list[Group]) -> str:
    gallery = f"{'original' if settings.gallery == 'original' else 'VAL'}-split gallery"
    queries, all_queries = (sum(len(group.queries) for group in selection) for selection in (groups, available))
    counted = f"{queries:,} queries"
    if split == "seen":
        gallery = f"gallery of training images drawn up to the size of val's {gallery}"
        counted = f"{queries:,} of {all_queries:,} training queries"
    sizes = ", ".join(f"{group.name} {len(group.gallery):,}" for group in groups)
    means = ", means per category and per query" if settings.average == "per_query" else ""
    return (
        f"FashionIQ {split}, {gallery} ({sizes}), reference {settings.reference}, {_CAPTION_MODES[settings.captions]}, "
        f"{counted}, ties by gallery order{means}; protocol {_protocol_name(settings)}"
    )


def _protocol_name(settings: FashionIQConfig) -> str:
    """Return the name of the protocol and the keys in which the config differs from it."""
    chosen = zip(_PROTOCOL_KEYS, PROTOCOLS[settings.protocol])
    changed = [f"{key}: {getattr(settings, key)}" for key, value in chosen if getattr(settings, key) != value]
    return settings.protocol + (f" except {', '.join(changed)}" if changed else "")


def _metrics(rankings: Mapping[str, HasRanks], counts: Mapping[str, int], average: str) -> dict[str, float]:
    """Return recall per category, its means over categories (and over queries), and the means of those, in percent.

    The weights are the numbers of queries, not of ranks. The expected values of chance are computed from other numbers
    of ranks, and so have equal weights.
    """
    recalls = {k: {category: recall_at(ranking.ranks, k) for category, ranking in rankings.items()} for k in CUTOFFS}
    metrics = {f"{category}_R@{k}": value for k in CUTOFFS for category, value in recalls[k].items()}
    metrics.update({f"R@{k}": mean(recalls[k].values()) for k in CUTOFFS})
    metrics["mean"] = mean(metrics[f"R@{k}"] for k in CUTOFFS)
    if average == "per_query":
        total = sum(counts[category] for category in rankings)
        for k in CUTOFFS:
            metrics[f"query_R@{k}"] = sum(counts[name] * value for name, value in recalls[k].items()) / total
        metrics["query_mean"] = mean(metrics[f"query_R@{k}"] for k in CUTOFFS)
    return metrics


# -- submission ------------------------------------------------------------------------------------------------------


def _submissions(
    rankings: Mapping[str, Ranking], groups: Iterable[Group], annotations: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Return the challenge's files by category: the caption file with the best 50 names added as ``ranking``."""
    files = {}
    for group in groups:
        found = by_query(group, rankings[group.name].top[:, :TOP], group.gallery)
        files[f"{group.name}.test.pred.json"] = [
            {**annotations[group.name][int(number)], "ranking": names} for number, names in found.items()
        ]
    return files


def check_submission(content: Any, size: int, annotation: Path, gallery: Path | None) -> Review:
    """Check a category's file for the challenge, or such a file for val, and score it if the annotation has targets.

    Args:
        content: Content of the file.
        size: Size of the file in bytes; no limit is stated.
        annotation: Path of the caption file with the queries.
        gallery: Path of the split file with the image names; the default is the one beside the annotation.

    Raises:
        ValueError, FileNotFoundError: If the annotation or the split file cannot be read.
    """
    items = read_records(annotation)
    has_targets = all("target" in item for item in items)
    records = [_record(item, annotation, number, "val" if has_targets else "test") for number, item in enumerate(items)]
    if not isinstance(content, list):
        return Review("FashionIQ", problems={"file that is no list": [shown(content)]})
    review = Review(f"FashionIQ, {len(records):,} queries of {annotation.name}")
    rankings = {
        str(number): item.get("ranking") if isinstance(item, dict) else item for number, item in enumerate(content)
    }
    review.read_rows(
        rankings, [str(number) for number in range(len(records))], lambda value: value if is_text(value) else None
    )
    review.checked.append("candidates and captions of the records")
    for number, (record, item) in enumerate(zip(records, content)):
        given = (item.get("candidate"), item.get("captions")) if isinstance(item, dict) else ()
        if given != (record.candidate, list(record.captions)):
            review.refuse("records with another candidate or other captions than the annotation's", str(number))
    split_name = annotation.name.replace("cap.", "split.", 1)
    path = gallery_beside(annotation, gallery, ("../image_splits", ""), split_name)
    names = None if path is None else _read_names(path)
    review.check_rows(TOP if names is None else min(TOP, len(names)), names)
    review.note_gallery(path, len(names or ()), split_name)
    if has_targets and not review.problems:
        ranking = ranks_in(list(review.rows.values()), [record.target for record in records])
        review.metrics = {f"R@{k}": recall_at(ranking.ranks, k) for k in CUTOFFS}
    return review


# -- files -----------------------------------------------------------------------------------------------------------


def _bases(settings: FashionIQConfig) -> list[Path]:
    root = Path(settings.root)
    return [root, *(root / name for name in _ROOT_NAMES if (root / name).is_dir())]


def _read_split(settings: FashionIQConfig, split: str) -> list[_Category]:
    bases = [Path(settings.annotations)] if settings.annotations else _bases(settings)
    return [_read_category(bases, category, "train" if split == "seen" else split) for category in settings.categories]


def _read_category(bases: list[Path], category: str, split: str) -> _Category:
    path = find_annotation(bases, ("captions", "json", ""), f"cap.{category}.{split}.json", "fashioniq")
    split_path = find_annotation(bases, ("image_splits", ""), f"split.{category}.{split}.json", "fashioniq")
    names = _read_names(split_path)
    records = [_record(item, path, number, split) for number, item in enumerate(read_records(path))]
    images = ((("candidate", record.candidate), ("target", record.target)) for record in records)
    uses = ((number, *use) for number, pair in enumerate(images) for use in pair)
    require_listed(uses, names, path, split_path)
    return _Category(category, records, list(names))


def _read_names(path: Path) -> dict[str, int]:
    """Return the image names of a split file in gallery order, each with its position."""
    names = read_json(path)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must hold a non-empty list of image names; correct the file or copy it again.")
    places: dict[str, int] = {}
    for number, name in enumerate(names):
        places.setdefault(image_name(name, "name", path, number), number)
    if len(places) < len(names) and f".{_MERGED}." not in path.name:  # images occur in several categories
        raise ValueError(f"{path} lists {len(names) - len(places):,} images twice; its names must be distinct.")
    return places


def _record(item: Mapping[str, Any], path: Path, number: int, split: str) -> _Record:
    captions = item.get("captions")
    if not isinstance(captions, list) or len(captions) != 2 or not all(map(is_text, captions)):
        raise record_error(path, number, "needs 'captions', a list of 2 texts")
    if not _clean(captions):
        if split != "test":
            raise record_error(path, number, f"has 'captions' without a word, {shown(captions)}")
        logger.warning("%s: record %d (counting from 0) has captions without a word.", path, number)
    candidate = text_field(item, "candidate", path, number)
    target = text_field(item, "target", path, number, optional=split == "test")
    return _Record(
        image_name(candidate, "candidate", path, number),
        None if target is None else image_name(target, "target", path, number),
        (captions[0], captions[1]),
        item,
    )


def _find_images(settings: FashionIQConfig, names: Iterable[str]) -> tuple[dict[str, Path], list[str]]:
    guesses = [base / folder for base in _bases(settings) for folder in _IMAGE_FOLDERS]
    folders = image_folders([Path(settings.images)] if settings.images else guesses, "fashioniq")
    return find_images(names, folders, "fashioniq", settings.missing_images, settings.verify_images)


# -- lavis-cir check ------------------------------------------------------------------------------------------------


def _usages() -> tuple[Usage, ...]:
    """Return one evaluation per gallery, because other differences of the protocols need no other files."""
    by_gallery: dict[str, list[str]] = {}
    for name, (gallery, *_) in PROTOCOLS.items():
        by_gallery.setdefault(gallery, []).append(name)
    scored = (Usage(f"val by {', '.join(names)}", "val", {"gallery": name}) for name, names in by_gallery.items())
    return (Usage("training", "train"), *scored, Usage("test submission", "test", is_submission=True))


CHECKLIST = Checklist(
    title="FashionIQ",
    usages=_usages(),
    published={
        ("train", "dress"): 5_985, ("train", "shirt"): 5_988, ("train", "toptee"): 6_027,
        ("val", "dress"): 2_017, ("val", "shirt"): 2_038, ("val", "toptee"): 1_961,
        ("test", "dress"): 2_024, ("test", "shirt"): 2_038, ("test", "toptee"): 2_056,
    },
    absent_files="captions/ and image_splits/ are in the repository fashion-iq of its authors",
    absent_images=(
        "all of FashionIQ is 74,381 distinct images (77,683 counts those of two categories twice), and training "
        "needs those of its triplets; many of the shop's links are dead, so most people use a re-upload, often as "
        ".png, which is read as well"
    ),
    parts={name: {"categories": [name]} for name in ("dress", "shirt", "toptee")},
    training=("projects/wrf4cir/fiq.yaml",),
    is_evaluated=True,
)  # fmt: skip
