"""CIRR (Liu et al., ICCV 2021): one caption per pair, recall on the whole gallery and within sets of six images."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
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
    text_field,
    without_missing,
)
from lavis_cir_plugin.benchmarks.images import find_images, image_folders, verify_images
from lavis_cir_plugin.ranking import Ranking, recall_at

SPLITS = ("train", *EVALUATION_SPLITS)
CUTOFFS = (1, 5, 10, 50)
SUBSET_CUTOFFS = (1, 2, 3)

_FILE_SPLITS = {"train": "train", "val": "val", "test": "test1", "seen": "train"}
_ROOT_NAMES = ("cirr_dataset", "CIRR", "cirr")


@dataclass(frozen=True)
class CIRRConfig:
    """Keys of ``datasets.cirr.build_info``.

    Attributes:
        root: The data set's folder (with ``cirr/captions/`` or ``captions/``, and ``train/``, ``dev/``, ``test1/`` in
            it or in ``img_raw/``) or its parent.
        annotations: Folder of the JSON files where it is not below ``root``.
        images: Folder with ``train/``, ``dev/`` and ``test1/`` where it is not below ``root``.
        missing_images: ``error``, or ``skip`` what needs a missing image and say how much that is.
        verify_images: Check every image file before the run.
    """

    root: str
    annotations: str | None = None
    images: str | None = None
    missing_images: str = one_of("error", "skip")
    verify_images: bool = False

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> CIRRConfig:
        """Build the configuration; raise ValueError with every unknown key and impossible value."""
        return config_from_mapping(cls, "cirr", mapping)


def check_config(config: Mapping[str, Any]) -> None:
    """Check the keys and values of a ``build_info`` without reading anything.

    Raises:
        ValueError: every unknown key and impossible value.
    """
    CIRRConfig.from_mapping(config)


def read_train(config: Mapping[str, Any]) -> tuple[list[Triplet], dict[str, Path]]:
    """Read the training triplets, in file order, and the paths of their images.

    ``pairid``, ``target_soft`` and ``img_set`` are not needed.

    Raises:
        ValueError: a key, value or record of the configuration or an annotation file is wrong.
        FileNotFoundError: an annotation file or an image is missing.
    """
    settings = CIRRConfig.from_mapping(config)
    queries, split = _read_split(settings, "train")
    triplets = [Triplet(query.reference, str(query.target), query.texts) for query in queries]
    used = dict.fromkeys(name for t in triplets for name in (t.reference, t.target))
    paths, _ = _find_images(settings, {name: split[name] for name in used})
    return complete_triplets(triplets, paths, "cirr"), paths


def read_benchmark(config: Mapping[str, Any], split: str) -> Benchmark:
    """Read the ``val``, ``test`` (file name ``test1``; without targets, hence without metrics) or ``seen`` split.

    The gallery is the split file: 137 images of test1 are never a reference. The reference is removed from every
    ranking. The target is ``target_hard``; ``target_soft`` contradicts it in 42 queries of val and is not used.
    With ``missing_images: skip`` the gallery shrinks and queries that need a missing image, be it only as a member of
    their image set, are left out; the protocol line says how many.

    ``seen`` is drawn from the training queries and the images they use to val's sizes (`drawn_like`), with val's rules.
    A training file in the reduced shape has no image sets; there are then no subset metrics, and ``R@5`` stands in for
    ``mean``.

    Raises:
        ValueError: a key, value or record of the configuration or an annotation file is wrong, or no such split.
        FileNotFoundError: an annotation file or an image is missing.
    """
    check_split(split, "cirr")
    settings = CIRRConfig.from_mapping(config)
    if split == "seen":
        settings = replace(settings, verify_images=False)  # reading the training split is what verifies its images
    queries, listed = _read_split(settings, split)
    has_members = all(query.members for query in queries)
    if not has_members:
        queries = [replace(query, members=()) for query in queries]
    gallery = listed
    if split == "seen":
        used = set(_used_images(queries))
        gallery = {name: place for name, place in listed.items() if name in used}
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
    return Benchmark(
        name="cirr",
        split=split,
        groups=(group,),
        image_paths=paths,
        protocol=_protocol(split, group, available, has_members) + coverage([complete], [available]),
        metrics=(_metrics if has_members else _gallery_metrics) if has_targets else no_metrics,
        selection_metric="mean" if has_members else "R@5",
    )


def training_text(captions: tuple[str, ...], rng: random.Random) -> str:
    """Return the only caption of a triplet."""
    return captions[0]


def _protocol(split: str, group: Group, available: Group, has_members: bool) -> str:
    gallery, counted = f"{len(group.gallery):,} images", f"{len(group.queries):,} queries"
    if split == "seen":
        gallery = f"{len(group.gallery):,} training images drawn up to the size of val's"
        counted = f"{len(group.queries):,} of {len(available.queries):,} training queries"
    subset = "R_subset among the 5 other members of the image set" if has_members else "no image sets, so no R_subset"
    name = split if split == "seen" else _FILE_SPLITS[split]
    return (
        f"CIRR {name}, gallery of {gallery}, reference removed, {counted}, hard targets, {subset}, "
        f"ties by gallery order"
    )


def _gallery_metrics(rankings: Mapping[str, Ranking]) -> dict[str, float]:
    """Compute R@K on the whole gallery, in percent."""
    return {f"R@{k}": recall_at(rankings["cirr"].ranks, k) for k in CUTOFFS}


def _metrics(rankings: Mapping[str, Ranking]) -> dict[str, float]:
    """Compute R@K, R_subset@K and ``mean`` = (R@5 + R_subset@1) / 2, in percent."""
    metrics = _gallery_metrics(rankings)
    metrics.update({f"R_subset@{k}": recall_at(rankings["cirr"].subset_ranks, k) for k in SUBSET_CUTOFFS})
    return {**metrics, "mean": (metrics["R@5"] + metrics["R_subset@1"]) / 2}


# -- files -----------------------------------------------------------------------------------------------------------


def _bases(settings: CIRRConfig) -> list[Path]:
    root = Path(settings.root).expanduser()
    below = dict.fromkeys(root / name / part for name in _ROOT_NAMES for part in ("", "cirr"))
    return [root, *(place for place in below if place.is_dir())]


def _read_split(settings: CIRRConfig, split: str) -> tuple[list[Query], dict[str, str]]:
    """Return the queries (texts: the caption) and the split file: image name to path under the image folder."""
    bases = [Path(settings.annotations).expanduser()] if settings.annotations else _bases(settings)
    path = find_annotation(bases, ("captions", ""), f"cap.rc2.{_FILE_SPLITS[split]}.json", "cirr")
    split_path = find_annotation(bases, ("image_splits", ""), f"split.rc2.{_FILE_SPLITS[split]}.json", "cirr")
    images = read_json(split_path)
    if not isinstance(images, dict) or not images or not all(isinstance(place, str) for place in images.values()):
        raise ValueError(f"{split_path} must map image names to paths; correct the file or copy it again.")
    queries = [_query(item, path, number, split) for number, item in enumerate(read_records(path))]
    require_listed(_used_images(queries), images, path, split_path)
    return queries, images


def _used_images(queries: Iterable[Query]) -> list[str]:
    used = (name for query in queries for name in (query.reference, query.target, *query.members) if name is not None)
    return list(dict.fromkeys(used))


def _query(item: Mapping[str, Any], path: Path, number: int, split: str) -> Query:
    reference = str(text_field(item, "reference", path, number))
    caption = str(text_field(item, "caption", path, number)).strip()
    target = text_field(item, "target_hard", path, number, optional=split == "test")
    if split == "train" or (split == "seen" and "img_set" not in item):
        return Query(reference, (caption,), target)
    image_set = item.get("img_set")
    members = image_set.get("members") if isinstance(image_set, dict) else None
    if not isinstance(members, list) or not all(isinstance(name, str) for name in members):
        raise record_error(path, number, "needs 'img_set' with 'members', a list of image names")
    if len(set(members)) < len(members) or not {reference, target or reference} <= set(members):
        raise record_error(path, number, "needs distinct 'members' that include the reference and the target")
    return Query(reference, (caption,), target, tuple(name for name in members if name != reference))


def _find_images(settings: CIRRConfig, split: Mapping[str, str]) -> tuple[dict[str, Path], list[str]]:
    tops = list(dict.fromkeys(_top_folder(place) for place in split.values()))
    bases = [Path(settings.images).expanduser()] if settings.images else _bases(settings)
    guesses = [base / below / top for base in bases for below in ("", "img_raw") for top in tops]
    folders = image_folders(guesses, "cirr")
    paths, missing = find_images(split, folders, "cirr", settings.missing_images)
    if settings.verify_images:
        verify_images(paths.values())
    return paths, missing


def _top_folder(place: str) -> str:
    """Return ``train`` of ``./train/34/train-11041-2-img0.png``: its images are found by name below it."""
    parts = PurePosixPath(place).parts
    return parts[0] if len(parts) > 1 else ""
