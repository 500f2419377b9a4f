"""Write a drawn world as CIRR's files: sets of six near-identical images, and a sentence for each pair in a set.

A split grows in neighbourhoods of several sets. The first garment of a set is an edit of an earlier garment of the
neighbourhood. The other five are edits of earlier members of the set, each in its own photo. An edit is one or two
changes that a caption can mention. The image alone therefore leads to a neighbourhood, and the text alone to a few
members of every neighbourhood. A model needs both, most of all within a set.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from lavis_cir_plugin.core.settings import Limits, Positive, Section

from .attributes import DISTINCT_CATEGORIES, Garment, draw_new, edited, sample, sample_photo, varying_attributes
from .ground_truth import Gallery, is_answer
from .wording import Phrase, choose_phrases, edit_sentence, phrases
from .world import HeldOut, Pixels, World, explain_full_disk, write_json, write_pictures

GENERATOR_VERSION = 1
"""Version in the cache key. Raise it whenever the written files change."""

SPLITS = ("train", "val", "test1")

SET_SIZE = 6
MAX_QUERIES_PER_SET = 9

_FOLDERS = {"train": "train", "val": "dev", "test1": "test1"}
_TRAIN_FOLDERS = 100
_SETS_PER_NEIGHBOURHOOD = 6
_VARYING = 3
_EDITS_OF_MEMBER = {1: 3, 2: 2}
_EDITS_OF_SET = 2
_MOST_CHANGES = 2
_TOO_DIFFERENT = 4
_WORDINGS = 4


@dataclass(frozen=True)
class CIRRGarments(Section):
    """Sizes of a drawn world in CIRR's files.

    Attributes:
        seed: Seed of everything.
        train_sets, val_sets, test_sets: Number of image sets of the split, of six images each.
        queries_per_set: Largest number of queries of an image set.
        image_width, image_height: Pixels of a picture.
        held_out: Expected share of the (colour, pattern, sleeve) combinations that training never shows.

    CIRR's own size is about train_sets=2823, val_sets=383, test_sets=386 (by images), queries_per_set=9.

    Raises:
        ValueError: If a value is not allowed; the message has one line for each.
    """

    WHERE = "garments"

    seed: int = 0
    train_sets: Positive = 450
    val_sets: Positive = 60
    test_sets: Positive = 20
    queries_per_set: Annotated[int, Limits(ge=1, le=MAX_QUERIES_PER_SET)] = 7
    image_width: Pixels = 96
    image_height: Pixels = 120
    held_out: HeldOut = 0.2

    def sets(self, split: str) -> int:
        """Return the number of image sets of a split."""
        return {"train": self.train_sets, "val": self.val_sets, "test1": self.test_sets}[split]


@dataclass(frozen=True)
class Pair:
    """A query: the indices of its image set and of reference and target in that set, and what the caption says."""

    image_set: int
    reference: int
    target: int
    changes: tuple[Phrase, ...]
    caption: str


@dataclass(frozen=True)
class SplitPlan:
    """A split before it is drawn.

    images: garments by image name, in gallery order. sets: image names of each set, in the order in which its members
    were sampled. pairs: queries in file order.
    """

    images: dict[str, Garment]
    sets: tuple[tuple[str, ...], ...]
    pairs: tuple[Pair, ...]


def image_name(split: str, index: int) -> str:
    """Return an image name in NLVR2's style, in which eight images share a number: ``dev-12-0-img0``."""
    return f"{_FOLDERS[split]}-{index // 8}-{index // 2 % 4}-img{index % 2}"


def image_path(split: str, name: str) -> str:
    """Return the path of an image in a split file, such as ``./dev/dev-12-0-img0.png``."""
    folder = _FOLDERS[split]
    if split == "train":
        folder += f"/{int(name.split('-')[1]) % _TRAIN_FOLDERS}"
    return f"./{folder}/{name}.png"


def plan_split(config: CIRRGarments, split: str) -> SplitPlan:
    """Plan the garments and queries of a split. The plan depends on the arguments alone.

    No two images of a split show the same garment, and training shows no held-out combination. A caption mentions every
    difference between reference and target that a caption can mention: one or two. The target is the only image of the
    whole gallery that answers the query (`ground_truth.is_answer`).

    Raises:
        ValueError: If the world cannot hold that many different garments.
    """
    rng = random.Random(f"garments/cirr/{config.seed}/{split}")
    sets = list(_image_sets(config, split, rng))
    garments = [garment for members in sets for garment in members]
    places = list(range(len(garments)))
    rng.shuffle(places)
    names = [image_name(split, place) for place in places]
    gallery = Gallery(garments)
    pairs: list[Pair] = []
    for number, members in enumerate(sets):
        pairs.extend(_pairs(config, number, members, gallery, rng))
    if not pairs:
        raise ValueError(f"garments: {split} got no query; raise the number of sets or queries_per_set.")
    return SplitPlan(
        {name: garment for _, name, garment in sorted(zip(places, names, garments), key=lambda row: row[0])},
        tuple(tuple(names[start : start + SET_SIZE]) for start in range(0, len(names), SET_SIZE)),
        tuple(pairs),
    )


def _image_sets(config: CIRRGarments, split: str, rng: random.Random) -> Iterator[list[Garment]]:
    """Yield sets of six different garments, one neighbourhood after the other."""
    seen: set[tuple[str, ...]] = set()
    held_out = config.held_out if split == "train" else 0
    neighbours: list[Garment] = []

    def new(parent: Garment | None, edits: int, varying: tuple[str, ...]) -> Garment:
        def draw() -> Garment | None:
            if parent is None:
                return sample(rng.choice(DISTINCT_CATEGORIES), rng)
            garment = replace(edited(parent, rng, edits, varying), photo=sample_photo(rng))
            return garment if 1 <= len(phrases(parent, garment)) <= _MOST_CHANGES else None

        garment = draw_new(draw, seen, held_out)
        if garment is None:
            raise ValueError(
                f"garments: no unused garment was found for {split}; lower its number of sets, or held_out."
            )
        return garment

    for number in range(config.sets(split)):
        if number % _SETS_PER_NEIGHBOURHOOD == 0:
            neighbours = []
        parent = rng.choice(neighbours) if neighbours else None
        category = parent.category if parent else rng.choice(DISTINCT_CATEGORIES)
        first = new(parent, _EDITS_OF_SET, varying_attributes(category, rng, 2 * _VARYING))
        varying = varying_attributes(first.category, rng, _VARYING)
        members = [first]
        while len(members) < SET_SIZE:
            edits = rng.choices(tuple(_EDITS_OF_MEMBER), tuple(_EDITS_OF_MEMBER.values()))[0]
            members.append(new(rng.choice(members), edits, varying))
        neighbours.extend(members)
        yield members


def _pairs(
    config: CIRRGarments, number: int, members: Sequence[Garment], gallery: Gallery, rng: random.Random
) -> Iterator[Pair]:
    """Yield up to ``queries_per_set`` pairs of a set whose captions only the target answers."""
    ordered = [(a, b) for a in range(SET_SIZE) for b in range(SET_SIZE) if a != b]
    rng.shuffle(ordered)
    found = 0
    for reference, target in ordered:
        if found == config.queries_per_set:
            return
        if not 1 <= len(phrases(members[reference], members[target])) <= _MOST_CHANGES:
            continue
        for _ in range(_WORDINGS):
            changes = choose_phrases(members[reference], members[target], rng)
            if gallery.answers(members[reference], members[target], changes) == [number * SET_SIZE + target]:
                caption = edit_sentence(changes, members[reference].category, rng)
                yield Pair(number, reference, target, tuple(changes), caption)
                found += 1
                break


def soft_labels(members: Sequence[Garment], pair: Pair) -> dict[int, float]:
    """Return the labels of members of a pair's set by their index in it; some members have no label.

    The target has 1.0. A member has 0.5 if the caption is true of it although something else has changed too. Another
    member has -1.0 if it differs from the target in four or more respects.
    """
    labels = {pair.target: 1.0}
    for place, garment in enumerate(members):
        if place in (pair.reference, pair.target):
            continue
        if is_answer(garment, members[pair.reference], pair.changes, kept=()):
            labels[place] = 0.5
        elif len(phrases(members[pair.target], garment)) >= _TOO_DIFFERENT:
            labels[place] = -1.0
    return labels


def _records(plan: SplitPlan, split: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Yield the rows of an annotation file. `pairid` grows with gaps, and the members of a set are shuffled."""
    shuffled = [rng.sample(names, SET_SIZE) for names in plan.sets]
    pairid = -1
    for pair in plan.pairs:
        pairid += rng.choice((1, 1, 1, 2, 4))
        names = plan.sets[pair.image_set]
        image_set: dict[str, Any] = {
            "id": pair.image_set,
            "members": shuffled[pair.image_set],
            "reference_rank": pair.reference,
        }
        row: dict[str, Any] = {"pairid": pairid, "reference": names[pair.reference]}
        if split != "test1":
            labels = soft_labels([plan.images[name] for name in names], pair)
            row["target_hard"] = names[pair.target]
            row["target_soft"] = {names[place]: weight for place, weight in labels.items()}
            image_set["target_rank"] = pair.target
        yield {**row, "caption": pair.caption, "img_set": image_set}


def write_cirr(root: Path, config: CIRRGarments, progress: bool = True, workers: int | None = None) -> Path:
    """Write cirr/captions/, cirr/image_splits/, train/<n>/, dev/ and test1/ below `root` and return `root`.

    The files depend on `config` alone and not on `workers`, the number of drawing processes (default: one per core).

    Raises:
        OSError: If a file cannot be written. The message says so if the disk is full.
    """
    root = Path(root)
    pictures: dict[str, Garment] = {}
    size = (config.image_width, config.image_height)
    with explain_full_disk(root, SET_SIZE * sum(config.sets(split) for split in SPLITS), size):
        for split in SPLITS:
            plan = plan_split(config, split)
            paths = {name: image_path(split, name) for name in plan.images}
            rows = list(_records(plan, split, random.Random(f"garments/cirr/{config.seed}/{split}/records")))
            write_json(root / "cirr" / "captions" / f"cap.rc2.{split}.json", rows)
            write_json(root / "cirr" / "image_splits" / f"split.rc2.{split}.json", paths)
            pictures.update((paths[name], garment) for name, garment in plan.images.items())
        write_pictures(root, pictures, size, progress, workers)
    return root


WORLD = World("garments-cirr", GENERATOR_VERSION, CIRRGarments, write_cirr)
