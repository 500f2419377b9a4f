"""Write a drawn world as FashionIQ's files: captions, image splits and images.

A split of a category grows in families. A family starts with a new garment; each further image is an edit of an earlier
member in a new photo. Only a few attributes vary within a family. A reference, its target and the hardest distractors
are therefore siblings, and only the captions tell them apart. The captions fit members of many families. So neither the
picture nor the text alone finds the target.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from lavis_cir_plugin.core.settings import Positive, Section

from .attributes import CATEGORIES, Garment, draw_new, edited, sample, sample_photo, varying_attributes
from .wording import captions, phrases
from .world import HeldOut, Pixels, World, explain_full_disk, write_json, write_pictures

GENERATOR_VERSION = 1
"""Version in the cache key. Raise it whenever the written files change."""

SPLITS = ("train", "val", "test")

_FAMILY_SIZE = 40
_VARYING = 4
_EDITS = {1: 3, 2: 5, 3: 2}


@dataclass(frozen=True)
class FashionIQGarments(Section):
    """Sizes of a drawn world in FashionIQ's files; counts are per category.

    Attributes:
        seed: Seed of everything.
        train_triplets: Number of training triplets, less than ``train_images``; every target occurs once.
        val_queries: Number of validation queries, less than ``val_images``.
        test_queries: Number of test queries, less than ``test_images``.
        train_images, val_images, test_images: Number of images of the split, among them distractors, which are neither
            target nor reference.
        image_width, image_height: Pixels of a picture.
        image_suffix: Format of the image files.
        held_out: Expected share of the (colour, pattern, sleeve) combinations that training never shows.

    FashionIQ's own size is about train_images=15537, train_triplets=6000, val_images=5179, val_queries=2005.

    Raises:
        ValueError: If a value is not allowed; the message has one line for each.
    """

    WHERE = "garments"

    seed: int = 0
    train_triplets: Positive = 1000
    train_images: Positive = 1040
    val_queries: Positive = 275
    val_images: Positive = 400
    test_queries: Positive = 100
    test_images: Positive = 120
    image_width: Pixels = 144
    image_height: Pixels = 180
    image_suffix: Literal[".jpg", ".png"] = ".jpg"
    held_out: HeldOut = 0.2

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence per split with more queries than images."""
        for split in SPLITS:
            queries, images = self.counts(split)
            if queries >= images:
                name = "train_triplets" if split == "train" else f"{split}_queries"
                yield f"garments.{name} must be less than garments.{split}_images: {images}, got {queries}."

    def counts(self, split: str) -> tuple[int, int]:
        """Return the numbers of queries (triplets in training) and of images of a split, per category."""
        queries = self.train_triplets if split == "train" else getattr(self, f"{split}_queries")
        return queries, getattr(self, f"{split}_images")


@dataclass(frozen=True)
class Annotation:
    """A triplet: two image names and two captions."""

    candidate: str
    target: str
    captions: tuple[str, str]


@dataclass(frozen=True)
class SplitPlan:
    """A split of a category before it is drawn: garments by image name in gallery order, and its triplets."""

    images: dict[str, Garment]
    annotations: tuple[Annotation, ...]


def image_name(seed: int, category: str, split: str, index: int) -> str:
    """Return an image name in the style of Amazon's article numbers: "B0" and eight characters of 0-9A-Z.

    Different arguments give different names for index < 10**7, because a bijection modulo 36**8 scrambles the number.
    """
    number = (SPLITS.index(split) * len(CATEGORIES) + CATEGORIES.index(category)) * 10**7 + index
    number = (number * 1_645_333_507_937 + seed * 97_003_331) % 36**8
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return "B0" + "".join(digits[number // 36**power % 36] for power in range(7, -1, -1))


def plan_split(config: FashionIQGarments, category: str, split: str) -> SplitPlan:
    """Plan the garments and triplets of a split. The plan depends on the arguments alone.

    No two images of a split show the same garment, so each query has one right answer. Training shows no held-out
    combination. All targets are different images, and a target is never its own reference.

    Raises:
        ValueError: If the world cannot hold that many different garments.
    """
    rng = random.Random(f"garments/{config.seed}/{category}/{split}")
    queries, images = config.counts(split)
    garments: list[Garment] = []
    parents: list[int | None] = []
    seen: set[tuple[str, ...]] = set()
    family_start = 0
    varying: tuple[str, ...] = ()
    families = max(1, min(round(images / _FAMILY_SIZE), images - queries))
    starts = {round(k * images / families) for k in range(families)}
    for index in range(images):
        if index in starts:
            family_start, varying = index, varying_attributes(category, rng, _VARYING)
        parent = None if index == family_start else rng.randrange(family_start, index)
        garment = _draw_unseen(
            config, category, split, None if parent is None else garments[parent], varying, seen, rng
        )
        garments.append(garment)
        parents.append(parent)
    order = list(range(images))
    rng.shuffle(order)
    position = {garment: place for place, garment in enumerate(order)}
    names = [image_name(config.seed, category, split, position[index]) for index in range(images)]
    edits = [(index, parent) for index, parent in enumerate(parents) if parent is not None]
    annotations = [
        Annotation(names[parent], names[index], captions(garments[parent], garments[index], rng))
        for index, parent in rng.sample(edits, queries)
    ]
    return SplitPlan({names[index]: garments[index] for index in order}, tuple(annotations))


def _draw_unseen(
    config: FashionIQGarments,
    category: str,
    split: str,
    parent: Garment | None,
    varying: tuple[str, ...],
    seen: set[tuple[str, ...]],
    rng: random.Random,
) -> Garment:
    """Sample a new garment that the split may hold, or such an edit of `parent` in `varying` attributes."""

    def draw() -> Garment | None:
        if parent is None:
            return sample(category, rng)
        garment = edited(parent, rng, rng.choices(tuple(_EDITS), tuple(_EDITS.values()))[0], varying)
        garment = replace(garment, photo=sample_photo(rng))
        return garment if phrases(parent, garment) else None

    garment = draw_new(draw, seen, config.held_out if split == "train" else 0)
    if garment is None:
        raise ValueError(f"garments: no unused {category} was found for {split}; lower {split}_images or held_out.")
    return garment


def write_fashioniq(root: Path, config: FashionIQGarments, progress: bool = True, workers: int | None = None) -> Path:
    """Write captions/, image_splits/ and images/ below `root`, in FashionIQ's format, and return `root`.

    The files depend on `config` alone and not on `workers`, the number of drawing processes (default: one per core).

    Raises:
        OSError: If a file cannot be written. The message says so if the disk is full.
    """
    root = Path(root)
    pictures: dict[str, Garment] = {}
    size = (config.image_width, config.image_height)
    images = len(CATEGORIES) * sum(config.counts(split)[1] for split in SPLITS)
    with explain_full_disk(root, images, size):
        for category in CATEGORIES:
            for split in SPLITS:
                plan = plan_split(config, category, split)
                pictures.update(plan.images)
                write_json(root / "image_splits" / f"split.{category}.{split}.json", list(plan.images))
                rows = [asdict(annotation) for annotation in plan.annotations]
                if split == "test":
                    for row in rows:
                        del row["target"]
                write_json(root / "captions" / f"cap.{category}.{split}.json", rows)
        files = {f"{name}{config.image_suffix}": garment for name, garment in pictures.items()}
        write_pictures(root / "images", files, size, progress, workers)
    return root


WORLD = World("garments-fashioniq", GENERATOR_VERSION, FashionIQGarments, write_fashioniq)
