"""Write a drawn world as CIRCO's files: one gallery, and queries with several right images.

The gallery grows in families of looks. A look is a category with five salient attributes: colour, pattern, sleeve,
length and neckline. The garments of a look differ in the details (fit, belt, buttons, the colour of a pattern, ...).
The looks of a family differ in one or two salient attributes. A query leads from a garment of one look to another look.
The looks between and around them are near misses, which are right in all but one attribute.

A garment is a ground truth of a query exactly if it has the reference's category, if everything in the caption is true
of it, and if it has the reference's value in each salient attribute that the caption does not mention. The other
details are free. `ground_truth.is_answer` checks this rule for every image of the gallery; nothing is sampled. The
shared concept names the category and the salient attributes that stay.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavis_cir_plugin.core.settings import Positive, Section

from .attributes import ATTRIBUTES, DISTINCT_CATEGORIES, VALUES, Garment, draw_new, edited, sample, sample_photo
from .ground_truth import Gallery
from .wording import Phrase, choose_phrases, phrases, predicate, shared_concept, tokens
from .world import Pixels, World, explain_full_disk, write_json, write_pictures

GENERATOR_VERSION = 1
"""Version in the cache key. Raise it whenever the written files change."""

SPLITS = ("val", "test")

SALIENT = ("colour", "pattern", "sleeve", "length", "neckline")
"""Attributes that the answers share with the reference unless the caption changes them."""

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
"""CIRCO's nine semantic aspects. Captions of this world never mention the viewpoint, because all photos share it."""

_DETAILS = tuple(name for name in ATTRIBUTES if name not in (*SALIENT, "secondary", "graphic"))
_ABSENT_VALUES = {
    "pattern": "solid", "sleeve": "sleeveless", "graphic": "none", "buttons": "no", "belt": "no", "hem": "straight",
}  # fmt: skip
_PLACES = frozenset(("bottom", "chest", "front", "waist"))
_LOOKS = (3, 4, 5, 6)
_SHARE_WITH_DETAIL = 0.25
# The sizes are skewed like CIRCO's ground truths: their mean is 4, and few queries have ten or more.
_GARMENTS_OF_LOOK = {1: 5, 2: 7, 3: 7, 4: 5, 5: 4, 6: 3, 8: 2, 10: 1, 12: 1}
_MOST_CHANGES = 2
_COCO_IDS = 600_000
_ATTEMPTS_PER_QUERY = 200


@dataclass(frozen=True)
class CIRCOGarments(Section):
    """Sizes of a drawn world in CIRCO's files.

    Attributes:
        seed: Seed of everything.
        images: Number of images in the gallery, more than the queries of either split.
        val_queries, test_queries: Number of queries of the split, each with another reference.
        image_width, image_height: Pixels of a picture.

    CIRCO's own size is images=123403, val_queries=220, test_queries=800.

    Raises:
        ValueError: If a value is not allowed; the message has one line for each.
    """

    WHERE = "garments"

    seed: int = 0
    images: Positive = 800
    val_queries: Positive = 220
    test_queries: Positive = 80
    image_width: Pixels = 96
    image_height: Pixels = 120

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence per split with more queries than images."""
        for split in SPLITS:
            if self.queries(split) >= self.images:
                yield (
                    f"garments.{split}_queries must be less than garments.images: {self.images}, got "
                    f"{self.queries(split)}."
                )

    def queries(self, split: str) -> int:
        """Return the number of queries of a split."""
        return {"val": self.val_queries, "test": self.test_queries}[split]


@dataclass(frozen=True)
class PlannedQuery:
    """A query with its text, and with the gallery indices of its reference and ground truths (the target first)."""

    reference: int
    ground_truths: tuple[int, ...]
    changes: tuple[Phrase, ...]
    caption: str
    concept: str
    aspects: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A world before it is drawn: image ids and garments in gallery order, and the queries by split."""

    ids: tuple[int, ...]
    garments: tuple[Garment, ...]
    queries: dict[str, tuple[PlannedQuery, ...]]


def plan_world(config: CIRCOGarments) -> Plan:
    """Plan the gallery and the queries. The plan depends on `config` alone.

    No two images show the same garment.

    Raises:
        ValueError: If the world cannot hold that many garments or queries.
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
    queries = {
        split: tuple(_queries(config, split, gallery, looks, random.Random(f"garments/circo/{config.seed}/{split}")))
        for split in SPLITS
    }
    ids = rng.sample(range(1, max(_COCO_IDS, 5 * config.images)), config.images)
    return Plan(tuple(ids), tuple(garments), queries)


def _families(images: int, rng: random.Random) -> Iterator[list[list[Garment]]]:
    """Yield families of looks with different garments until there are `images` garments."""
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
    """Yield up to `count` new garments of a style. They differ in details, and each has its own photo."""
    details = tuple(name for name in _DETAILS if len(VALUES[style.category][name]) > 1)

    def draw() -> Garment:
        return replace(edited(style, rng, rng.choice((0, 1, 2)), details), photo=sample_photo(rng))

    for _ in range(count):
        garment = draw_new(draw, seen)
        if garment is not None:
            yield garment


def _queries(
    config: CIRCOGarments,
    split: str,
    gallery: Gallery,
    families: Sequence[Sequence[Sequence[int]]],
    rng: random.Random,
) -> Iterator[PlannedQuery]:
    """Yield the queries of a split, each with another reference."""
    usable = [family for family in families if len(family) > 1]
    used: set[int] = set()
    for _ in range(_ATTEMPTS_PER_QUERY * config.queries(split)):
        if len(used) == config.queries(split):
            return
        if not usable:
            break
        source, destination = rng.sample(rng.choice(usable), 2)
        reference, target = rng.choice(source), rng.choice(destination)
        query = _query(gallery, reference, target, rng)
        if reference not in used and query is not None:
            used.add(reference)
            yield query
    if len(used) < config.queries(split):
        raise ValueError(
            f"garments: {config.images} images gave {len(used)} queries for {split}, not {config.queries(split)}; "
            "raise images or lower the number of queries."
        )


def _query(gallery: Gallery, reference: int, target: int, rng: random.Random) -> PlannedQuery | None:
    """Return a query for the target's look, at times also for one detail, or ``None`` if the answers do not fit."""
    before, after = gallery.garments[reference], gallery.garments[target]
    said = phrases(before, after)
    about = [name for name in said if name in SALIENT]
    details = [name for name in said if name in _DETAILS]
    if not 1 <= len(about) <= _MOST_CHANGES:
        return None
    if details and rng.random() < _SHARE_WITH_DETAIL:
        about.append(rng.choice(details))
    changes = choose_phrases(before, after, rng, only=about)
    answers = gallery.answers(before, after, changes, kept=SALIENT)
    if target not in answers or len(answers) > MAX_GROUND_TRUTHS:
        return None
    others = [place for place in answers if place != target]
    rng.shuffle(others)
    mentioned = {name for phrase in changes for name in phrase.covers}
    shared = shared_concept(before, [name for name in SALIENT if name not in mentioned], rng)
    caption = predicate(changes, rng)
    aspects = semantic_aspects(before, changes, caption)
    return PlannedQuery(reference, (target, *others), tuple(changes), caption, shared, aspects)


def semantic_aspects(reference: Garment, changes: Sequence[Phrase], caption: str) -> tuple[str, ...]:
    """Return the semantic aspects of a caption with these changes to a reference, in the order of `ASPECTS`.

    cardinality: the caption counts ("two colors"). addition: the target has something that the reference lacks (a belt,
    buttons, ruffles, sleeves, a pattern). negation: the caption says what the target lacks. direct_addressing: it names
    the target's value. compare_change: it names the old and the new value. comparative_statement: it compares by degree
    ("darker"). statement_with_conjunction: it makes two statements. spatial_relations_background: it says where
    something is.
    """
    said = set(tokens(caption))
    touched = {name for phrase in changes for name in phrase.covers}
    holds = {
        "cardinality": bool(said & {"one", "two"}),
        "addition": any(
            getattr(reference, name) == absent for name, absent in _ABSENT_VALUES.items() if name in touched
        ),
        "negation": bool(said & {"no", "not", "without"}),
        "direct_addressing": any(phrase.absolute for phrase in changes),
        "compare_change": bool(said & {"instead", "not"}),
        "comparative_statement": any(not phrase.absolute for phrase in changes),
        "statement_with_conjunction": len(changes) > 1,
        "spatial_relations_background": bool(said & _PLACES),
        "viewpoint": False,
    }
    return tuple(aspect for aspect in ASPECTS if holds[aspect])


def _record(plan: Plan, number: int, query: PlannedQuery, with_targets: bool) -> dict[str, Any]:
    """Return one row of an annotation file."""
    row: dict[str, Any] = {"reference_img_id": plan.ids[query.reference]}
    answers = [plan.ids[place] for place in query.ground_truths]
    if with_targets:
        row["target_img_id"] = answers[0]
    row.update(relative_caption=query.caption, shared_concept=query.concept)
    if with_targets:
        row["gt_img_ids"] = answers
    row["id"] = number
    if with_targets:
        row["semantic_aspects"] = list(query.aspects)
    return row


def write_circo(root: Path, config: CIRCOGarments, progress: bool = True, workers: int | None = None) -> Path:
    """Write annotations/ and COCO2017_unlabeled/ below `root` and return `root`.

    The files depend on `config` alone and not on `workers`, the number of drawing processes (default: one per core).

    Raises:
        OSError: If a file cannot be written. The message says so if the disk is full.
    """
    root = Path(root)
    size = width, height = (config.image_width, config.image_height)
    with explain_full_disk(root, config.images, size):
        plan = plan_world(config)
        names = [f"{number:012d}.jpg" for number in plan.ids]
        listed = [
            {"id": number, "file_name": name, "width": width, "height": height} for number, name in zip(plan.ids, names)
        ]
        for split, queries in plan.queries.items():
            rows = [_record(plan, number, one, with_targets=split == "val") for number, one in enumerate(queries)]
            write_json(root / "annotations" / f"{split}.json", rows)
        coco = root / "COCO2017_unlabeled"
        write_json(coco / "annotations" / "image_info_unlabeled2017.json", {"images": listed})
        write_pictures(coco / "unlabeled2017", dict(zip(names, plan.garments)), size, progress, workers)
    return root


WORLD = World("garments-circo", GENERATOR_VERSION, CIRCOGarments, write_circo)
