"""Write a garments world as CIRCO's files: one gallery, and queries that several of its images answer.

The gallery grows in families of looks. A look is a category with a colour, pattern, sleeve, length and neckline, the
salient attributes; its garments differ in the details (fit, belt, buttons, the colour of a pattern, ...), and the looks
of a family differ in one or two salient attributes. A query goes from a garment of one look to another look. The looks
between and around them are the near misses: right in all but one thing.

The truth rule: a garment is a ground truth of a query exactly if it has the reference's category, everything that the
caption says is true of it, and of the salient attributes those that the caption does not mention are the reference's.
The details that the caption does not mention are free. `truth.is_answer` computes it for every image of the gallery;
nothing is sampled. The shared concept names the category and the salient attributes that stay.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .attributes import ATTRIBUTES, DISTINCT_CATEGORIES, VALUES, Garment, draw_new, edited, sample, sample_photo
from .truth import Gallery
from .wording import Phrase, concept, phrases, predicate, tokens, told
from .world import World, check_drawing, check_types, full_disk_named, write_json, write_pictures

GENERATOR_VERSION = 1
"""Part of the cache key; raise it with every change of the written files."""

SPLITS = ("val", "test")

SALIENT = ("colour", "pattern", "sleeve", "length", "neckline")
"""What a reference and the answers to its query share unless the caption changes it."""

MAX_GROUND_TRUTHS = 15

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
"""CIRCO's nine semantic aspects. No caption of this world speaks of the viewpoint, which is the same in all photos."""

_DETAILS = tuple(name for name in ATTRIBUTES if name not in (*SALIENT, "secondary", "graphic"))
_NOTHING = {
    "pattern": "solid", "sleeve": "sleeveless", "graphic": "none", "buttons": "no", "belt": "no", "hem": "straight",
}  # fmt: skip
_PLACES = frozenset(("bottom", "chest", "front", "waist"))
_LOOKS = (3, 4, 5, 6)
_SHARE_WITH_DETAIL = 0.25
# Skewed as CIRCO's ground truths are: mean 4, few of ten and more.
_GARMENTS_OF_LOOK = {1: 5, 2: 7, 3: 7, 4: 5, 5: 4, 6: 3, 8: 2, 10: 1, 12: 1}
_MOST_CHANGES = 2
_COCO_IDS = 600_000
_ATTEMPTS_PER_QUERY = 200


@dataclass(frozen=True)
class CIRCOGarments:
    """Set a world's sizes.

    seed: everything follows from it. images: of the one gallery, more than the queries of either split. val_queries,
    test_queries: >= 1; the references of a split are different images. image_width, image_height: pixels, >= 32.

    CIRCO's own size is images=123403, val_queries=220, test_queries=800.

    Raises:
        ValueError: a value outside these ranges.
    """

    seed: int = 0
    images: int = 800
    val_queries: int = 220
    test_queries: int = 80
    image_width: int = 96
    image_height: int = 120

    def __post_init__(self) -> None:
        check_types(self)
        for split in SPLITS:
            if not 1 <= self.queries(split) < self.images:
                raise ValueError(
                    f"garments: {split}_queries must be at least 1 and less than images = {self.images}, "
                    f"got {self.queries(split)}."
                )
        check_drawing(self.image_width, self.image_height)

    def queries(self, split: str) -> int:
        """Return the number of queries of a split."""
        return {"val": self.val_queries, "test": self.test_queries}[split]


@dataclass(frozen=True)
class Question:
    """Hold one query: the reference and the ground truths (the target first) as places in the gallery, and the text."""

    reference: int
    ground_truths: tuple[int, ...]
    changes: tuple[Phrase, ...]
    caption: str
    concept: str
    aspects: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """Hold a world before it is drawn: image ids and garments in gallery order, and the queries by split."""

    ids: tuple[int, ...]
    garments: tuple[Garment, ...]
    questions: dict[str, tuple[Question, ...]]


def plan_world(config: CIRCOGarments) -> Plan:
    """Invent the gallery and the queries: pure, and equal for equal arguments.

    No two images show the same garment.

    Raises:
        ValueError: the world has no room for that many garments or queries.
    """
    rng = random.Random(f"garments/circo/{config.seed}")
    families = list(_families(config.images, rng))
    garments = [garment for family in families for look in family for garment in look]
    places = list(range(len(garments)))
    rng.shuffle(places)
    garments = [garments[place] for place in places]
    gallery = Gallery(garments)
    place_of = {id(garment): place for place, garment in enumerate(garments)}
    looks = [[[place_of[id(garment)] for garment in look] for look in family] for family in families]
    questions = {
        split: tuple(_questions(config, split, gallery, looks, random.Random(f"garments/circo/{config.seed}/{split}")))
        for split in SPLITS
    }
    ids = rng.sample(range(1, max(_COCO_IDS, 5 * config.images)), config.images)
    return Plan(tuple(ids), tuple(garments), questions)


def _families(images: int, rng: random.Random) -> Iterator[list[list[Garment]]]:
    """Yield families of looks of different garments until there are `images`."""
    seen: set[tuple[str, ...]] = set()
    left = images
    while left:
        category = rng.choice(DISTINCT_CATEGORIES)
        styles = [sample(category, rng)]
        for _ in range(rng.choice(_LOOKS) - 1):
            styles.append(edited(rng.choice(styles), rng, rng.choice((1, 1, 2)), SALIENT))
        family = []
        for style in styles:
            count = min(left, rng.choices(tuple(_GARMENTS_OF_LOOK), tuple(_GARMENTS_OF_LOOK.values()))[0])
            look = list(_look(style, count, seen, rng))
            left -= len(look)
            if look:
                family.append(look)
        yield family


def _look(style: Garment, count: int, seen: set[tuple[str, ...]], rng: random.Random) -> Iterator[Garment]:
    """Yield up to `count` new garments of a style that differ in details, each in a photo of its own."""
    details = tuple(name for name in _DETAILS if len(VALUES[style.category][name]) > 1)

    def draw() -> Garment:
        return replace(edited(style, rng, rng.choice((0, 1, 2)), details), photo=sample_photo(rng))

    for _ in range(count):
        garment = draw_new(draw, seen)
        if garment is not None:
            yield garment


def _questions(
    config: CIRCOGarments,
    split: str,
    gallery: Gallery,
    families: Sequence[Sequence[Sequence[int]]],
    rng: random.Random,
) -> Iterator[Question]:
    """Yield the queries of a split, each from another reference."""
    usable = [family for family in families if len(family) > 1]
    used: set[int] = set()
    for _ in range(_ATTEMPTS_PER_QUERY * config.queries(split)):
        if len(used) == config.queries(split):
            return
        if not usable:
            break
        source, destination = rng.sample(rng.choice(usable), 2)
        reference, target = rng.choice(source), rng.choice(destination)
        question = _question(gallery, reference, target, rng)
        if reference not in used and question is not None:
            used.add(reference)
            yield question
    if len(used) < config.queries(split):
        raise ValueError(
            f"garments: {config.images} images gave {len(used)} queries for {split}, not {config.queries(split)}; "
            "raise images or lower the number of queries."
        )


def _question(gallery: Gallery, reference: int, target: int, rng: random.Random) -> Question | None:
    """Ask for the look of a target, and now and then for one of its details too; ``None``: too many answer, or none."""
    before, after = gallery.garments[reference], gallery.garments[target]
    said = phrases(before, after)
    about = [name for name in said if name in SALIENT]
    details = [name for name in said if name in _DETAILS]
    if not 1 <= len(about) <= _MOST_CHANGES:
        return None
    if details and rng.random() < _SHARE_WITH_DETAIL:
        about.append(rng.choice(details))
    changes = told(before, after, rng, only=about)
    answers = gallery.answers(before, after, changes, kept=SALIENT)
    if target not in answers or len(answers) > MAX_GROUND_TRUTHS:
        return None
    others = [place for place in answers if place != target]
    rng.shuffle(others)
    spoken_of = {name for phrase in changes for name in phrase.covers}
    shared = concept(before, [name for name in SALIENT if name not in spoken_of], rng)
    caption = predicate(changes, rng)
    aspects = semantic_aspects(before, changes, caption)
    return Question(reference, (target, *others), tuple(changes), caption, shared, aspects)


def semantic_aspects(reference: Garment, changes: Sequence[Phrase], caption: str) -> tuple[str, ...]:
    """Name the aspects that a caption has which makes these changes to a reference, in the order of `ASPECTS`.

    cardinality: it counts ("two colors"). addition: something comes that was not there (a belt, buttons, ruffles,
    sleeves, a pattern). negation: it says what is not there. direct_addressing: it names the target's own value.
    compare_change: it names old and new value. comparative_statement: it compares by degree ("darker").
    statement_with_conjunction: it makes two statements. spatial_relations_background: it says where something is.
    """
    said = set(tokens(caption))
    touched = {name for phrase in changes for name in phrase.covers}
    holds = {
        "cardinality": bool(said & {"one", "two"}),
        "addition": any(getattr(reference, name) == nothing for name, nothing in _NOTHING.items() if name in touched),
        "negation": bool(said & {"no", "not", "without"}),
        "direct_addressing": any(phrase.absolute for phrase in changes),
        "compare_change": bool(said & {"instead", "not"}),
        "comparative_statement": any(not phrase.absolute for phrase in changes),
        "statement_with_conjunction": len(changes) > 1,
        "spatial_relations_background": bool(said & _PLACES),
        "viewpoint": False,
    }
    return tuple(aspect for aspect in ASPECTS if holds[aspect])


def _record(plan: Plan, number: int, question: Question, with_targets: bool) -> dict[str, Any]:
    """Return a row of an annotation file."""
    row: dict[str, Any] = {"reference_img_id": plan.ids[question.reference]}
    answers = [plan.ids[place] for place in question.ground_truths]
    if with_targets:
        row["target_img_id"] = answers[0]
    row.update(relative_caption=question.caption, shared_concept=question.concept)
    if with_targets:
        row["gt_img_ids"] = answers
    row["id"] = number
    if with_targets:
        row["semantic_aspects"] = list(question.aspects)
    return row


def write_circo(root: Path, config: CIRCOGarments, progress: bool = True, workers: int | None = None) -> Path:
    """Write annotations/ and COCO2017_unlabeled/ below `root` and return `root`.

    The files depend on `config` alone, not on `workers`, the number of drawing processes (default: one per core).

    Raises:
        OSError: a file could not be written; a full disk is named as such.
    """
    root = Path(root)
    size = width, height = (config.image_width, config.image_height)
    with full_disk_named(root, config.images, size):
        plan = plan_world(config)
        names = [f"{number:012d}.jpg" for number in plan.ids]
        listed = [
            {"id": number, "file_name": name, "width": width, "height": height} for number, name in zip(plan.ids, names)
        ]
        for split, questions in plan.questions.items():
            rows = [_record(plan, number, one, with_targets=split == "val") for number, one in enumerate(questions)]
            write_json(root / "annotations" / f"{split}.json", rows)
        coco = root / "COCO2017_unlabeled"
        write_json(coco / "annotations" / "image_info_unlabeled2017.json", {"images": listed})
        write_pictures(coco / "unlabeled2017", dict(zip(names, plan.garments)), size, progress, workers)
    return root


WORLD = World("garments-circo", GENERATOR_VERSION, CIRCOGarments, write_circo)
