"""Read LaSCo (Levy et al., AAAI 2024): 389,305 queries on COCO 2014 pictures from VQA 2.0, training and validation.

The authors' repository ``levymsn/LaSCo`` describes ``lasco_train.json`` and ``lasco_val.json`` as lists of ::

    {"qid": 28714000, "query-image": [28714, "val2014/COCO_val2014_000000028714.jpg"],
     "query-text": "The person is riding the bike", "target-image": [277005, "val2014/COCO_val2014_000000277005.jpg"]}

and publishes the validation gallery, ``lasco_val_corpus.json``, with 39,826 entries such as ``{"id": 42, "path":
"val/val2014/COCO_val2014_000000000042.jpg"}``. The two disagree about the folders above ``val2014``, so a picture is
found by its file name in any folder.

People keep the three files in ``downloads/`` (as the repository does), ``captions/``, ``annotations/`` or
``metadata/``, or beside the pictures. They keep COCO's folders ``train2014`` and ``val2014`` below ``root``,
``images/``, ``coco/``, ``train/`` or ``val/``. We found no statement whether the reference competes in the authors' own
evaluation. ``reference`` offers both, and the protocol line says which one was used.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Optional

from lavis_cir_plugin.benchmarks.annotation_files import (
    find_annotation,
    image_name,
    read_records,
    record_error,
    require_listed,
    text_field,
    whole_number_field,
)
from lavis_cir_plugin.benchmarks.images import find_images, image_folders
from lavis_cir_plugin.benchmarks.json_lines import one_text
from lavis_cir_plugin.benchmarks.survey import Checklist, Usage, train_in_cirr_project
from lavis_cir_plugin.benchmarks.types import (
    Benchmark,
    Group,
    Query,
    Triplet,
    check_split,
    complete_triplets,
    coverage,
    first_or_drawn,
    without_missing,
)
from lavis_cir_plugin.core.error_messages import shown
from lavis_cir_plugin.core.settings import Folder, NotNegative, Positive, Section
from lavis_cir_plugin.ranking.metrics import HasRanks, recall_at

SPLITS = ("train", "val")
CUTOFFS = (1, 5, 10, 50)

_ROOT_NAMES = ("LaSCo", "LASCO", "lasco")
_ANNOTATION_FOLDERS = ("", "downloads", "captions", "annotations", "metadata")
_IMAGE_FOLDERS = ("", "images", "coco", "train", "val")
_CORPUS = "lasco_val_corpus.json"


@dataclass(frozen=True)
class LaSCoConfig(Section):
    """Keys of ``datasets.lasco.build_info``.

    Attributes:
        root: Folder of the data set or its parent.
        annotations: Folder of the JSON files if it is not below ``root``.
        images: Folder of ``train2014`` and ``val2014`` if it is not below ``root``.
        reference: ``removed`` from its own ranking, or ``kept`` in the gallery.
        selection_metric: Metric that chooses the best checkpoint.
        max_triplets: Largest number of training triplets: the first ones, or a random sample if ``seed`` is set.
        seed: Seed of the sample. For one seed, a smaller sample is a part of a larger one.
        missing_images: ``error``, or ``skip`` to leave out what needs a missing image and report how much that is.
        verify_images: Whether to check every image file before the run.
    """

    WHERE = "datasets.lasco.build_info"

    root: Folder
    annotations: Optional[Folder] = None
    images: Optional[Folder] = None
    reference: Literal["removed", "kept"] = "removed"
    selection_metric: Literal["R@10", "R@1", "R@5", "R@50"] = "R@10"
    max_triplets: Optional[Positive] = None
    seed: Optional[NotNegative] = None
    missing_images: Literal["error", "skip"] = "error"
    verify_images: bool = False


@dataclass(frozen=True)
class _Record:
    identifier: str
    reference: str
    text: str
    target: str


CONFIG = LaSCoConfig
"""Section ``build_info`` of the config."""


def read_train(config: Mapping[str, Any]) -> tuple[list[Triplet], dict[str, Path]]:
    """Return the training triplets in file order and the paths of their images.

    Raises:
        ValueError: If a key or value of the config, or a record, is wrong.
        FileNotFoundError: If a file or an image is missing.
    """
    settings = LaSCoConfig.from_mapping(config)
    records = _read_queries(_find(settings, "lasco_train.json"))
    triplets = [
        Triplet(record.reference, record.target, (record.text,))
        for record in first_or_drawn(records, settings.max_triplets, settings.seed)
    ]
    paths, _ = _find_images(settings, (name for item in triplets for name in (item.reference, item.target)))
    return complete_triplets(triplets, paths, "lasco"), paths


def read_benchmark(config: Mapping[str, Any], split: str) -> Benchmark:
    """Return the ``val`` split; the gallery is the published corpus in its order.

    With ``missing_images: skip`` the gallery shrinks, and queries that need a missing image are left out. The protocol
    line counts them.

    Raises:
        ValueError: If a key or value of the config, or a record, is wrong, or if there is no such split.
        FileNotFoundError: If a file or an image is missing.
    """
    check_split(split, "lasco", SPLITS[1:])
    settings = LaSCoConfig.from_mapping(config)
    path, corpus_path = _find(settings, "lasco_val.json"), _find(settings, _CORPUS)
    records, gallery = _read_queries(path), _read_corpus(corpus_path)
    uses = ((number, "target-image", record.target) for number, record in enumerate(records))
    require_listed(uses, gallery, path, corpus_path)
    queries = tuple(
        Query(record.reference, (record.text,), record.target, identifier=record.identifier) for record in records
    )
    complete = group = Group("lasco", tuple(gallery), queries, settings.reference == "removed")
    paths, missing = _find_images(settings, [*group.gallery, *(query.reference for query in queries)])
    if missing:
        group = without_missing(complete, paths)
    protocol = (
        f"LaSCo {split}, gallery of {len(group.gallery):,} images, reference {settings.reference}, "
        f"{len(group.queries):,} queries, ties by gallery order"
    )
    return Benchmark(
        name="lasco",
        split=split,
        groups=(group,),
        image_paths=paths,
        protocol=protocol + coverage([complete], [group]),
        metrics=_metrics,
        selection_metric=settings.selection_metric,
    )


def training_text(captions: tuple[str, ...], rng: random.Random) -> str:
    """Return the only text of a query."""
    return captions[0]


def _metrics(rankings: Mapping[str, HasRanks]) -> dict[str, float]:
    return {f"R@{k}": recall_at(rankings["lasco"].ranks, k) for k in CUTOFFS}


# -- files -----------------------------------------------------------------------------------------------------------


def _bases(settings: LaSCoConfig) -> list[Path]:
    root = Path(settings.root)
    return [root, *(root / name for name in _ROOT_NAMES if (root / name).is_dir())]


def _find(settings: LaSCoConfig, name: str) -> Path:
    bases = [Path(settings.annotations)] if settings.annotations else _bases(settings)
    return find_annotation(bases, _ANNOTATION_FOLDERS, name, "lasco")


def _find_images(settings: LaSCoConfig, names: Iterable[str]) -> tuple[dict[str, Path], Sequence[str]]:
    guesses = [base / folder for base in _bases(settings) for folder in _IMAGE_FOLDERS]
    folders = image_folders([Path(settings.images)] if settings.images else guesses, "lasco")
    return find_images(names, folders, "lasco", settings.missing_images, settings.verify_images)


def _read_queries(path: Path) -> list[_Record]:
    return [
        _Record(
            identifier=str(whole_number_field(record, "qid", path, number, optional=True) or number),
            reference=_image(record, "query-image", path, number),
            text=one_text(record.get("query-text"), "query-text", partial(record_error, path, number)),
            target=_image(record, "target-image", path, number),
        )
        for number, record in enumerate(read_records(path))
    ]


def _image(record: Mapping[str, Any], key: str, path: Path, number: int) -> str:
    """Return the name of an image that is given as ``[id, path]``."""
    value = record.get(key)
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)):
        raise record_error(path, number, f"has {key} = {shown(value)}; it must be a list of an image's id and its path")
    return image_name(PurePosixPath(value[1]).stem, key, path, number)


def _read_corpus(path: Path) -> dict[str, int]:
    """Return the gallery's images with the numbers of their records."""
    numbers: dict[str, int] = {}
    for number, record in enumerate(read_records(path)):
        file = str(text_field(record, "path", path, number))
        name = image_name(PurePosixPath(file).stem, "path", path, number)
        if numbers.setdefault(name, number) != number:
            raise record_error(path, number, f"has path = {shown(file)} like record {numbers[name]}")
    return numbers


# -- lavis-cir check ------------------------------------------------------------------------------------------------


CHECKLIST = Checklist(
    title="LaSCo",
    usages=(Usage("training", "train"), Usage("val", "val")),
    published={},
    absent_files="lasco_train.json, lasco_val.json and lasco_val_corpus.json are in downloads/ of its repository",
    absent_images="the images are COCO's train2014.zip and val2014.zip",
    training=train_in_cirr_project("lasco"),
)
