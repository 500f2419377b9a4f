"""FashionIQ (Wu et al., CVPR 2021): 3 categories of garments, two captions per triplet, recall at 10 and 50.

Published numbers follow several protocols, which differ in the gallery, in whether the reference image stays in it and
in how the two captions become queries. `FashionIQConfig` offers them; a benchmark's ``protocol`` line names its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from lavis_cir_plugin.benchmarks.benchmark import (
    EVALUATION_SPLITS,
    Benchmark,
    Group,
    Query,
    Triplet,
    check_split,
    complete_triplets,
    config_from_mapping,
    coverage,
    drawn_like,
    find_annotation,
    no_metrics,
    one_of,
    read_json,
    read_records,
    record_error,
    require_listed,
    some_of,
    text_field,
    without_missing,
)
from lavis_cir_plugin.benchmarks.images import find_images, image_folders, verify_images
from lavis_cir_plugin.ranking import Ranking, recall_at

SPLITS = ("train", *EVALUATION_SPLITS)
CUTOFFS = (10, 50)

_ROOT_NAMES = ("fashionIQ_dataset", "FashionIQ", "fashion-iq", "fashioniq", "fashionIQ", "fiq")
_IMAGE_FOLDERS = ("images", "resized_images", "resized_image", "image_data")
_CAPTION_MODES = {
    "and": "captions 'a and b'",
    "both_orders_avg": "features of 'a and b' and 'b and a' averaged",
    "two_queries": "two queries per triplet ('a and b', 'b and a')",
    "per_caption": "one query per caption",
}


@dataclass(frozen=True)
class FashionIQConfig:
    """Keys of ``datasets.fashioniq.build_info``.

    Attributes:
        root: The data set's folder (with ``captions/`` or ``json/``, ``image_splits/``, ``images/``) or its parent.
        annotations: Folder of the JSON files where it is not below ``root``.
        images: Folder of the image files, flat or one sub-folder per category, where it is not below ``root``.
        categories: Which to read.
        gallery: ``original``: the whole split file. ``val``: only the images that occur in a query of the split (the
            "VAL split", smaller and easier).
        reference: ``kept`` in the gallery or ``removed`` from its own ranking.
        captions: Evaluation text. ``and``: one query 'a and b'. ``both_orders_avg``: one query, the features of both
            orders averaged (SEARLE). ``two_queries``: one query per order (CosMo, ARTEMIS). ``per_caption``: one query
            per non-empty caption (VAL).
        training_text: ``random4``: drawn anew from 'a and b', 'b and a', 'a', 'b' (SPRC). ``and``: always 'a and b'.
        missing_images: ``error``, or ``skip`` what needs a missing image and say how much that is.
        verify_images: Check every image file before the run.
    """

    root: str
    annotations: str | None = None
    images: str | None = None
    categories: tuple[str, ...] = some_of("dress", "shirt", "toptee")
    gallery: str = one_of("original", "val")
    reference: str = one_of("kept", "removed")
    captions: str = one_of(*_CAPTION_MODES)
    training_text: str = one_of("random4", "and")
    missing_images: str = one_of("error", "skip")
    verify_images: bool = False

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> FashionIQConfig:
        """Build the configuration; raise ValueError with every unknown key and impossible value."""
        return config_from_mapping(cls, "fashioniq", mapping)


@dataclass(frozen=True)
class _Record:
    candidate: str
    target: str | None
    captions: tuple[str, str]


@dataclass(frozen=True)
class _Category:
    name: str
    records: list[_Record]
    split: list[str]


def check_config(config: Mapping[str, Any]) -> None:
    """Check the keys and values of a ``build_info`` without reading anything.

    Raises:
        ValueError: every unknown key and impossible value.
    """
    FashionIQConfig.from_mapping(config)


def read_train(config: Mapping[str, Any]) -> tuple[list[Triplet], dict[str, Path]]:
    """Read the training triplets of the configured categories, in file order, and the paths of their images.

    Raises:
        ValueError: a key, value or record of the configuration or an annotation file is wrong.
        FileNotFoundError: an annotation file or an image is missing.
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
    """Read the ``val``, ``test`` (without targets, hence without metrics) or ``seen`` split.

    ``seen`` is drawn from the training triplets and their images to val's sizes (`drawn_like`), with val's rules and
    evaluation texts. With ``missing_images: skip`` the galleries shrink and queries whose reference or target is
    missing are left out; the protocol line says how many.

    Raises:
        ValueError: a key, value or record of the configuration or an annotation file is wrong, or no such split.
        FileNotFoundError: an annotation file or an image is missing.
    """
    check_split(split, "fashioniq")
    settings = FashionIQConfig.from_mapping(config)
    if split == "test" and settings.gallery == "val":
        raise ValueError(
            "the VAL-split gallery is made of a split's targets, which test does not have; "
            "set datasets.fashioniq.build_info.gallery to original."
        )
    if split == "seen":
        settings = replace(settings, verify_images=False)  # reading the training split is what verifies its images
    is_removed = settings.reference == "removed"
    complete = [
        Group(category.name, _gallery(category, settings, split), _queries(category, settings), is_removed)
        for category in _read_split(settings, split)
    ]
    paths, missing = _find_images(settings, (name for group in complete for name in group.gallery))
    groups = available = [without_missing(group, paths) for group in complete] if missing else complete
    if split == "seen":
        val = read_benchmark({**config, "verify_images": False}, "val")
        groups = [drawn_like(group, like) for group, like in zip(available, val.groups)]
        paths = {name: paths[name] for group in groups for name in group.gallery}
    has_targets = all(query.target is not None for group in groups for query in group.queries)
    return Benchmark(
        name="fashioniq",
        split=split,
        groups=tuple(groups),
        image_paths=paths,
        protocol=_protocol(settings, split, groups, available) + coverage(complete, available),
        metrics=_metrics if has_targets else no_metrics,
        selection_metric="mean",
    )


def training_text(captions: tuple[str, ...], rng: random.Random) -> str:
    """Draw the text of a triplet: 'a and b', 'b and a', 'a' or 'b', 25 % each (SPRC); of one caption, itself."""
    texts = _clean(captions)
    if len(texts) < 2:
        return "".join(texts)
    first, second = texts
    return rng.choice((f"{first} and {second}", f"{second} and {first}", first, second))


def _clean(captions: Iterable[str]) -> list[str]:
    """Strip what all of the field's code strips, and drop captions of which nothing is left."""
    stripped = (caption.strip(".?, ") for caption in captions)
    return [caption for caption in stripped if caption]


def _training_captions(captions: tuple[str, ...], settings: FashionIQConfig) -> tuple[str, ...]:
    return (" and ".join(_clean(captions)),) if settings.training_text == "and" else captions


def _query_texts(captions: tuple[str, ...], mode: str) -> list[tuple[str, ...]]:
    """Return the texts of each query that a record gives."""
    texts = _clean(captions)
    if mode == "per_caption":
        return [(text,) for text in texts or [""]]
    forward, backward = " and ".join(texts), " and ".join(reversed(texts))
    if mode == "two_queries":
        return [(forward,), (backward,)]
    return [(forward, backward)] if mode == "both_orders_avg" else [(forward,)]


def _queries(category: _Category, settings: FashionIQConfig) -> tuple[Query, ...]:
    return tuple(
        Query(record.candidate, texts, record.target)
        for record in category.records
        for texts in _query_texts(record.captions, settings.captions)
    )


def _gallery(category: _Category, settings: FashionIQConfig, split: str) -> tuple[str, ...]:
    if settings.gallery == "original" and split != "seen":
        return tuple(category.split)
    used = {name for record in category.records for name in (record.candidate, record.target)}
    return tuple(name for name in category.split if name in used)


def _protocol(settings: FashionIQConfig, split: str, groups: list[Group], available: list[Group]) -> str:
    gallery = f"{'original' if settings.gallery == 'original' else 'VAL'}-split gallery"
    queries, all_queries = (sum(len(group.queries) for group in some) for some in (groups, available))
    counted = f"{queries:,} queries"
    if split == "seen":
        gallery = f"gallery of training images drawn up to the size of val's {gallery}"
        counted = f"{queries:,} of {all_queries:,} training queries"
    sizes = ", ".join(f"{group.name} {len(group.gallery):,}" for group in groups)
    return (
        f"FashionIQ {split}, {gallery} ({sizes}), reference {settings.reference}, {_CAPTION_MODES[settings.captions]}, "
        f"{counted}, ties by gallery order"
    )


def _metrics(rankings: Mapping[str, Ranking]) -> dict[str, float]:
    """Compute recall per category, the unweighted means over categories, and the mean of those, in percent."""
    metrics = {
        f"{category}_R@{k}": recall_at(ranking.ranks, k) for category, ranking in rankings.items() for k in CUTOFFS
    }
    for k in CUTOFFS:
        metrics[f"R@{k}"] = mean(metrics[f"{category}_R@{k}"] for category in rankings)
    metrics["mean"] = mean(metrics[f"R@{k}"] for k in CUTOFFS)
    return metrics


# -- files -----------------------------------------------------------------------------------------------------------


def _bases(settings: FashionIQConfig) -> list[Path]:
    root = Path(settings.root).expanduser()
    return [root, *(root / name for name in _ROOT_NAMES if (root / name).is_dir())]


def _read_split(settings: FashionIQConfig, split: str) -> list[_Category]:
    bases = [Path(settings.annotations).expanduser()] if settings.annotations else _bases(settings)
    return [_read_category(bases, category, "train" if split == "seen" else split) for category in settings.categories]


def _read_category(bases: list[Path], category: str, split: str) -> _Category:
    path = find_annotation(bases, ("captions", "json", ""), f"cap.{category}.{split}.json", "fashioniq")
    split_path = find_annotation(bases, ("image_splits", ""), f"split.{category}.{split}.json", "fashioniq")
    names = read_json(split_path)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{split_path} must hold a non-empty list of image names; correct the file or copy it again.")
    listed = dict.fromkeys(names)
    if len(listed) < len(names):
        raise ValueError(f"{split_path} lists {len(names) - len(listed):,} images twice; its names must be distinct.")
    records = [_record(item, path, number, split) for number, item in enumerate(read_records(path))]
    used = [name for record in records for name in (record.candidate, record.target) if name is not None]
    require_listed(used, listed, path, split_path)
    return _Category(category, records, names)


def _record(item: Mapping[str, Any], path: Path, number: int, split: str) -> _Record:
    captions = item.get("captions")
    if not isinstance(captions, list) or [type(text) for text in captions] != [str, str]:
        raise record_error(path, number, "needs 'captions', a list of 2 texts")
    candidate = text_field(item, "candidate", path, number)
    target = text_field(item, "target", path, number, optional=split == "test")
    return _Record(str(candidate), target, (captions[0], captions[1]))


def _find_images(settings: FashionIQConfig, names: Iterable[str]) -> tuple[dict[str, Path], list[str]]:
    guesses = [base / folder for base in _bases(settings) for folder in _IMAGE_FOLDERS]
    folders = image_folders([Path(settings.images).expanduser()] if settings.images else guesses, "fashioniq")
    paths, missing = find_images(names, folders, "fashioniq", settings.missing_images)
    if settings.verify_images:
        verify_images(paths.values())
    return paths, missing
