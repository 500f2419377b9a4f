"""Read pictures with captions for training, from JSON lines or LAVIS's annotation files for captioning.

::

    my_captions/
      captions.jsonl  or  captions.json
      images/                                 JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF, to any depth

A line of ``captions.jsonl`` is one JSON object in UTF-8; blank lines are skipped. ``captions.json`` is a list of such
objects, as in LAVIS's captioning data sets (COCO, Flickr30k, NoCaps)::

    {"image": "shoes/a.jpg", "caption": "a red shoe"}
    {"image": "shoes/b.jpg", "caption": ["a boot", "a black boot with laces"]}

``image`` is the path of the picture below ``images/``, with ``/`` and the file's suffix; `Spelling` describes allowed
differences. If an object has several captions, one is drawn each time the object is read. Objects with the same image
are separate training samples; COCO has five per image. Other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional

from lavis_cir_plugin.benchmarks.annotation_files import read_records, record_error
from lavis_cir_plugin.benchmarks.images import Spelling, image_folders, scan_tree, select_images
from lavis_cir_plugin.benchmarks.json_lines import (
    Refusal,
    image_path,
    line_error,
    one_or_more_texts,
    parse_line,
    read_objects,
)
from lavis_cir_plugin.benchmarks.survey import Checklist, Usage, current_survey, scan_once
from lavis_cir_plugin.benchmarks.types import first_or_drawn, only_complete
from lavis_cir_plugin.core.settings import File, Folder, NotNegative, Positive, Section

SPLITS = ("train",)

_FILES = ("captions.jsonl", "captions.json")
_NAME_THE_FILE = (
    "set datasets.image_captions.build_info.root to the folder with captions.jsonl, or annotations to the file"
)


@dataclass(frozen=True)
class CaptionsConfig(Section):
    """Keys of ``datasets.image_captions.build_info``.

    Attributes:
        root: Folder with ``captions.jsonl`` or ``captions.json``.
        annotations: Path of the file of captions if it has another name or place.
        images: Folder of the image files if it is not ``images/`` below ``root``.
        max_images: Largest number of objects to train on: the first ones, or a random sample if ``seed`` is set.
        seed: Seed of the sample. For one seed, a smaller sample is a part of a larger one.
        missing_images: ``error``, or ``skip`` to leave out objects without their image and log how many there are.
        verify_images: Whether to check every image file before the run.
    """

    WHERE = "datasets.image_captions.build_info"

    root: Folder
    annotations: Optional[File] = None
    images: Optional[Folder] = None
    max_images: Optional[Positive] = None
    seed: Optional[NotNegative] = None
    missing_images: Literal["error", "skip"] = "error"
    verify_images: bool = False


@dataclass(frozen=True)
class CaptionedImage:
    """One training example.

    Attributes:
        image: Path below the image folder.
        captions: One or more captions, none empty, without blanks at their ends.
    """

    image: str
    captions: tuple[str, ...]


CONFIG = CaptionsConfig
"""Section ``build_info`` of the config."""


def image_folder(config: Mapping[str, Any]) -> Path:
    """Return the folder of the images; it need not exist."""
    return _image_folder(CaptionsConfig.from_mapping(config))


def read_captions(config: Mapping[str, Any]) -> tuple[list[CaptionedImage], dict[str, Path]]:
    """Return the captioned images in file order and the paths of their files.

    Raises:
        ValueError: If a key or value of the config, or a record, is wrong.
        FileNotFoundError: If the file or an image is missing.
    """
    settings = CaptionsConfig.from_mapping(config)
    examples = first_or_drawn(list(caption_records(_file(settings))), settings.max_images, settings.seed)
    scanned: dict[str, Path] = {}
    for folder in image_folders([_image_folder(settings)], "image_captions"):
        scanned = scan_once(scan_tree, folder)
    spelling = Spelling(scanned, "image_captions")
    examples = [replace(example, image=spelling.file_name(example.image)) for example in examples]
    spelling.log()
    remedy = "add them (an image is named by its path below that folder with its suffix, such as shoes/a.jpg)"
    paths, _ = select_images(
        (example.image for example in examples),
        scanned,
        str(_image_folder(settings)),
        remedy,
        "image_captions",
        settings.missing_images,
        settings.verify_images,
        spelling.near,
    )
    return only_complete(examples, lambda example: example.image in paths, "image_captions", "caption"), paths


def caption_records(path: Path, remedy: str = _NAME_THE_FILE) -> Iterator[CaptionedImage]:
    """Yield the records of a file of captions, which is a JSON list or JSON lines.

    Args:
        path: Path of the file. The suffix ``.json`` means a JSON list.
        remedy: Advice if the file does not exist.

    Raises:
        ValueError: If a record is wrong.
        FileNotFoundError: If the file does not exist.
    """
    if path.suffix == ".json":
        survey = current_survey()
        if survey is not None:
            survey.files.append(path)
        for number, item in enumerate(_list_of_records(path)):
            yield _example(item, partial(record_error, path, number))
        return
    for line, text in read_objects(path, remedy, ", or be called by a name that ends in .json"):
        refuse = partial(line_error, path, line)
        yield _example(parse_line(text, refuse, '{"image": ...}'), refuse)


def _list_of_records(path: Path) -> list[dict[str, Any]]:
    try:
        return read_records(path)
    except ValueError as error:
        cause = error.__cause__
        if isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data" and cause.lineno > 1:
            raise ValueError(
                f"{path} holds JSON lines and no list; give it a name that ends in .jsonl, or put its objects into a "
                f"list."
            ) from error
        raise


def _image_folder(settings: CaptionsConfig) -> Path:
    return Path(settings.images) if settings.images else Path(settings.root) / "images"


def _file(settings: CaptionsConfig) -> Path:
    if settings.annotations:
        return Path(settings.annotations)
    files = [Path(settings.root) / name for name in _FILES]
    return next((file for file in files if file.is_file()), files[0])


def _example(item: Mapping[str, Any], refuse: Refusal) -> CaptionedImage:
    for key in ("image", "caption"):
        if item.get(key) is None:
            raise refuse(f"has no '{key}'")
    return CaptionedImage(
        image=image_path(item["image"], "image", refuse),
        captions=one_or_more_texts(item["caption"], "caption", refuse),
    )


# -- lavis-cir check ------------------------------------------------------------------------------------------------


CHECKLIST = Checklist(
    title="Pictures with captions",
    usages=(Usage("training", "train"),),
    published={},
    absent_files="give the folder itself that has captions.jsonl or captions.json",
    absent_images="an image is named by its path below images/ with its suffix, such as shoes/a.jpg",
    name="image_captions",
    unit="captioned pictures",
    training=(
        "projects/tscir/mapping.yaml",
        "datasets.image_captions.vis_processor.train.name=clip_two_views",
        "datasets.caption_shards.splits=[]",
    ),
)
