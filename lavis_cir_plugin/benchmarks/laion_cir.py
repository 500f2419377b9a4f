"""Read Laion-CIR (Liu et al., BMVC 2023, TransAgg): training triplets from captioned LAION pictures, no evaluation.

The authors' repository ``ZS-CIR`` has one annotation file per variant. Its data loaders read them as follows.

=========================================  =============================================================================
``laion_template_info.json``               A list of ``{"ref_image_id": "306448", "relative_cap": "beds has been newly
                                           placed.", "tgt_image_id": "347794"}``: edits by templates.
``laion_llm_info.json``                    An object from the reference's id to ``{"tgt_image_id": "360301",
                                           "relative_cap": "Change the color of the car to red.", "tgt_cap": "A red car
                                           is ..."}``: edits by a language model.
``laion_combined_info.json``               A list like the first, with about 32,000 triplets of both; it comes with the
                                           pictures.
=========================================  =============================================================================

Image 306448 is the file ``0306448.png``, with seven digits. Every file may have either form, with ids as text or
numbers. Other fields are ignored, so files that others have derived from these are read as well.

People keep the files in ``files/`` or ``data/files/`` (as the repository does) or with the pictures. They keep the
pictures in one folder or in one per variant (``laion_cir_combined``, ``laion_cir_llm``, ``laion_cir_template``,
``laion_chatgpt_16k``). Pictures are found by name in the data set's folder and in the folders directly below it.

The files have no caption of the reference, on which TSCIR's second stage also trains. TSCIR's data loader reads
captions from an object of image files to texts, ``{"0306448.png": "A bed. It is ..."}``, and takes the first sentence.
``reference_captions`` names such a file.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Optional

from lavis_cir_plugin.benchmarks.annotation_files import find_annotation, read_json, record_error
from lavis_cir_plugin.benchmarks.images import find_images, image_folders
from lavis_cir_plugin.benchmarks.json_lines import Refusal, one_text
from lavis_cir_plugin.benchmarks.survey import Checklist, Usage, train_in_cirr_project
from lavis_cir_plugin.benchmarks.types import Triplet, complete_triplets, first_or_drawn
from lavis_cir_plugin.core.error_messages import listed, shown
from lavis_cir_plugin.core.settings import File, Folder, NotNegative, Positive, Section, is_text

SPLITS = ("train",)

_ANNOTATION_FOLDERS = ("", "files", "data/files")
_DIGITS = 7


@dataclass(frozen=True)
class LaionCIRConfig(Section):
    """Keys of ``datasets.laion_cir.build_info``.

    Attributes:
        root: Folder of the pictures, or the folder above them.
        annotations: Folder of the annotation files if it is not ``root`` or ``files`` or ``data/files`` below it.
        images: Folder of the pictures if it is not ``root``, ``root/images`` or directly below one of them.
        variant: File to read: ``combined``, ``template`` or ``llm``.
        reference_captions: Path of a JSON file from image file to caption; every reference must have a caption.
        max_triplets: Largest number of training triplets: the first ones, or a random sample if ``seed`` is set.
        seed: Seed of the sample. For one seed, a smaller sample is a part of a larger one.
        missing_images: ``error``, or ``skip`` to leave out triplets that need a missing image and log how many there
            are.
        verify_images: Whether to check every image file before the run.
    """

    WHERE = "datasets.laion_cir.build_info"

    root: Folder
    annotations: Optional[Folder] = None
    images: Optional[Folder] = None
    variant: Literal["combined", "template", "llm"] = "combined"
    reference_captions: Optional[File] = None
    max_triplets: Optional[Positive] = None
    seed: Optional[NotNegative] = None
    missing_images: Literal["error", "skip"] = "error"
    verify_images: bool = False


CONFIG = LaionCIRConfig
"""Section ``build_info`` of the config."""


def read_train(config: Mapping[str, Any]) -> tuple[list[Triplet], dict[str, Path]]:
    """Return the training triplets in file order and the paths of their images.

    Raises:
        ValueError: If a key or value of the config, a record or a caption is wrong.
        FileNotFoundError: If a file or an image is missing.
    """
    settings = LaionCIRConfig.from_mapping(config)
    bases = [Path(settings.annotations or settings.root)]
    path = find_annotation(bases, _ANNOTATION_FOLDERS, f"laion_{settings.variant}_info.json", "laion_cir")
    triplets = [_triplet(record, partial(record_error, path, number)) for number, record in enumerate(_records(path))]
    triplets = first_or_drawn(triplets, settings.max_triplets, settings.seed)
    if settings.reference_captions:
        triplets = _with_captions(triplets, Path(settings.reference_captions))
    root = Path(settings.root)
    folders = image_folders([Path(settings.images)] if settings.images else [root, root / "images"], "laion_cir")
    names = (name for triplet in triplets for name in (triplet.reference, triplet.target))
    paths, _ = find_images(names, folders, "laion_cir", settings.missing_images, settings.verify_images)
    return complete_triplets(triplets, paths, "laion_cir"), paths


def training_text(captions: tuple[str, ...], rng: random.Random) -> str:
    """Return the only edit of a triplet."""
    return captions[0]


def _records(path: Path) -> Iterable[Any]:
    content = read_json(path)
    if not isinstance(content, (list, dict)) or not content:
        raise ValueError(f"{path} must hold a list or an object of triplets, not empty, got {shown(content)}.")
    if isinstance(content, list):
        return content
    return ({"ref_image_id": key, **item} if isinstance(item, dict) else item for key, item in content.items())


def _triplet(record: Any, refuse: Refusal) -> Triplet:
    if not isinstance(record, dict):
        raise refuse(f"must be an object, got {shown(record)}")
    for key in ("ref_image_id", "tgt_image_id", "relative_cap"):
        if record.get(key) is None:
            raise refuse(f"has no '{key}'")
    return Triplet(
        reference=_image(record["ref_image_id"], "ref_image_id", refuse),
        target=_image(record["tgt_image_id"], "tgt_image_id", refuse),
        captions=(one_text(record["relative_cap"], "relative_cap", refuse),),
    )


def _image(value: Any, key: str, refuse: Refusal) -> str:
    """Return an image's name, which is its number with seven digits."""
    text = str(value) if type(value) is int else value
    if not (isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 12):
        raise refuse(f"has {key} = {shown(value)}; it must be the number of an image")
    return text.zfill(_DIGITS)


def _with_captions(triplets: list[Triplet], path: Path) -> list[Triplet]:
    """Give each triplet the first sentence of its reference's caption."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold an object of image file to caption, not empty, got {shown(content)}.")
    captions = {}
    for number, (file, caption) in enumerate(content.items()):
        sentence = caption.split(".")[0].strip() if is_text(caption) else ""
        if not sentence:
            problem = f"has {shown(file)} = {shown(caption)}; it must be a caption whose first sentence is not empty"
            raise record_error(path, number, problem)
        captions[PurePosixPath(file).stem.zfill(_DIGITS)] = sentence
    lacking = list(dict.fromkeys(triplet.reference for triplet in triplets if triplet.reference not in captions))
    if lacking:
        raise ValueError(
            f"{path} has no caption of {len(lacking):,} reference images ({listed(lacking)}); caption them all, or set "
            f"datasets.laion_cir.build_info.reference_captions: null."
        )
    return [replace(triplet, reference_caption=captions[triplet.reference]) for triplet in triplets]


# -- lavis-cir check ------------------------------------------------------------------------------------------------


CHECKLIST = Checklist(
    title="Laion-CIR-Combined",
    usages=(Usage("training", "train"),),
    published={},
    absent_files="laion_combined_info.json comes with the pictures, by the link in the repository ZS-CIR",
    absent_images="image 306448 is the file 0306448.png of the authors' archive",
    training=train_in_cirr_project("laion_cir"),
)
