"""Read SynthTriplets18M (Gu et al., TMLR 2024, CompoDiff): generated pairs of pictures with captions, training only.

The set is published as webdataset shards. The authors' repository describes no format; this module reads the fields
that TSCIR's data loader reads from the unpacked shards::

    000010023.source_image.jpg      000010023.target_image.jpg
    000010023.json                  {"source_caption": "a cat on a sofa", "target_caption": "a dog on a sofa", ...}

No instruction for getting from one picture to the other is known to be published (issue 10 of the repository asks for
it). So the modification text is the target's caption, as in TSCIR. Either every sample has the reference's caption,
``source_caption``, or none has. Nobody needs all 18.8 million samples: unpack the shards that you want (``tar -xf``)
into one folder or one per shard, and let ``ids`` name a file of the samples to take, one per line. TSCIR's own list of
87,000 is not published.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Optional

from lavis_cir_plugin.benchmarks.annotation_files import read_json
from lavis_cir_plugin.benchmarks.images import scan_images, select_images
from lavis_cir_plugin.benchmarks.json_lines import image_path, line_error, one_text, read_lines
from lavis_cir_plugin.benchmarks.survey import Checklist, Usage, current_survey, scan_once, train_in_cirr_project
from lavis_cir_plugin.benchmarks.types import Triplet, complete_triplets, first_or_drawn
from lavis_cir_plugin.core.error_messages import shown
from lavis_cir_plugin.core.settings import File, Folder, NotNegative, Positive, Section

SPLITS = ("train",)

_SOURCE, _TARGET = ".source_image", ".target_image"


@dataclass(frozen=True)
class SynthTriplets18MConfig(Section):
    """Keys of ``datasets.synthtriplets18m.build_info``.

    Attributes:
        root: Folder of the unpacked samples, or of folders of them.
        ids: Path of a text file of the samples to take, one per line: ``000010023``, optionally with its folder before
            it. The default is all samples that have an image.
        max_triplets: Largest number of training triplets: the first ones, or a random sample if ``seed`` is set. Only
            their JSON is read.
        seed: Seed of the sample. For one seed, a smaller sample is a part of a larger one.
        missing_images: ``error``, or ``skip`` to leave out triplets that need a missing image and log how many there
            are.
        verify_images: Whether to check every image file before the run.
    """

    WHERE = "datasets.synthtriplets18m.build_info"

    root: Folder
    ids: Optional[File] = None
    max_triplets: Optional[Positive] = None
    seed: Optional[NotNegative] = None
    missing_images: Literal["error", "skip"] = "error"
    verify_images: bool = False


CONFIG = SynthTriplets18MConfig
"""Section ``build_info`` of the config."""


def read_train(config: Mapping[str, Any]) -> tuple[list[Triplet], dict[str, Path]]:
    """Return the training triplets, sorted by sample or in the order of ``ids``, and the paths of their images.

    Raises:
        ValueError: If a key or value of the config, an id or a sample's JSON is wrong, or if there is no sample.
        FileNotFoundError: If a file or an image is missing.
    """
    settings = SynthTriplets18MConfig.from_mapping(config)
    root = Path(settings.root)
    scanned = scan_once(scan_images, (root,)) if root.is_dir() else {}
    samples = _read_ids(Path(settings.ids)) if settings.ids else _samples(scanned, root)
    samples = first_or_drawn(samples, settings.max_triplets, settings.seed)
    names = [sample + side for sample in samples for side in (_SOURCE, _TARGET)]
    remedy = f"unpack their shards (000010023{_SOURCE}.jpg)"
    paths, _ = select_images(
        names, scanned, str(root), remedy, "synthtriplets18m", settings.missing_images, settings.verify_images
    )
    pairs = [Triplet(sample + _SOURCE, sample + _TARGET, captions=()) for sample in samples]
    complete = complete_triplets(pairs, paths, "synthtriplets18m")
    files = [_captions_file(pair, scanned) for pair in complete]
    triplets = [pair if file is None else _with_captions(pair, file) for pair, file in zip(complete, files)]
    read = [(triplet, file) for triplet, file in zip(triplets, files) if file is not None]
    without = [file for triplet, file in read if not triplet.reference_caption]
    if 0 < len(without) < len(read):
        raise ValueError(
            f"{without[0]} has no 'source_caption' and {len(read) - len(without):,} of {len(read):,} samples have "
            f"one; give it in every file or in none."
        )
    return triplets, paths


def _captions_file(pair: Triplet, scanned: Mapping[str, Path]) -> Path | None:
    """Return the JSON beside a sample's pictures; ``None`` if neither is there, which only a survey passes on."""
    picture = scanned.get(pair.reference) or scanned.get(str(pair.target))
    return None if picture is None else picture.parent / f"{pair.reference[: -len(_SOURCE)]}.json"


def training_text(captions: tuple[str, ...], rng: random.Random) -> str:
    """Return the target's caption, the only caption of a triplet."""
    return captions[0]


def _samples(scanned: Mapping[str, Path], root: Path) -> list[str]:
    """Return the samples that have an image, sorted."""
    # An image of either side counts, so that a missing picture is reported.
    samples = sorted({os.path.splitext(name)[0] for name in scanned if name.endswith((_SOURCE, _TARGET))})
    if not samples:
        raise FileNotFoundError(
            f"synthtriplets18m: {root} has no image such as 000010023{_SOURCE}.jpg, nor a folder with one; unpack the "
            f"shards there (tar -xf), or set datasets.synthtriplets18m.build_info.root to where they are."
        )
    return samples


def _read_ids(path: Path) -> list[str]:
    remedy = "datasets.synthtriplets18m.build_info.ids must name a text file of samples, one per line"
    samples: dict[str, int] = {}
    for line, text in read_lines(path, remedy):
        refuse = partial(line_error, path, line)
        sample = PurePosixPath(image_path(text, "id", refuse)).name
        if samples.setdefault(sample, line) != line:
            raise refuse(f"has the id {shown(sample)} like line {samples[sample]}")
    return list(samples)


def _with_captions(triplet: Triplet, path: Path) -> Triplet:
    def refuse(problem: str) -> ValueError:
        return ValueError(f"{path} {problem}; correct the file or unpack its shard again.")

    survey = current_survey()
    if survey is not None:
        survey.files.append(path)
    record = read_json(path)
    if not isinstance(record, dict):
        raise refuse(f"must hold an object, got {shown(record)}")
    if record.get("target_caption") is None:
        raise refuse("has no 'target_caption'")
    source = record.get("source_caption")
    return replace(
        triplet,
        captions=(one_text(record["target_caption"], "target_caption", refuse),),
        reference_caption="" if source is None else one_text(source, "source_caption", refuse),
    )


# -- lavis-cir check ------------------------------------------------------------------------------------------------


CHECKLIST = Checklist(
    title="SynthTriplets18M",
    usages=(Usage("training", "train"),),
    published={},
    absent_files="unpack shards of it: samples of a .json, a .source_image.jpg and a .target_image.jpg",
    absent_images="a sample has a .source_image.jpg and a .target_image.jpg",
    training=train_in_cirr_project("synthtriplets18m"),
)
