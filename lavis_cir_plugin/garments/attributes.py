"""Define what a garment is, and sample and edit garments.

A picture shows a `Garment` in a `Photo`. Captions can speak of the garment, but not of the photo: its background, pose,
body, light and noise. Every function draws from an explicit `random.Random`, so equal seeds give equal garments on
every platform.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

CATEGORIES = ("dress", "shirt", "toptee")

DISTINCT_CATEGORIES = ("dress", "toptee")
"""Categories that one gallery may mix: a picture cannot tell a shirt from a top with equal attributes."""

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (205, 28, 38),
    "orange": (241, 126, 34),
    "yellow": (246, 212, 58),
    "green": (48, 142, 70),
    "teal": (22, 152, 156),
    "light blue": (148, 194, 238),
    "blue": (38, 88, 204),
    "navy": (28, 36, 92),
    "purple": (122, 58, 164),
    "pink": (246, 146, 184),
    "burgundy": (112, 18, 46),
    "brown": (112, 70, 42),
    "beige": (224, 200, 160),
    "gray": (142, 142, 146),
    "black": (26, 26, 29),
    "white": (244, 244, 241),
}

SLEEVES = ("sleeveless", "short", "elbow", "long")
"""Values in order from the barest to the most covered."""

LENGTHS: Mapping[str, tuple[str, ...]] = {
    "dress": ("mini", "knee", "midi", "maxi"),
    "shirt": ("cropped", "regular", "tunic"),
    "toptee": ("cropped", "regular", "tunic"),
}
"""Values in order from the shortest to the longest."""

NECKLINES = ("v", "square", "round", "boat", "collar", "high")
"""Values in order from the lowest to the highest: `v` and `square` are low, and only `high` is high."""

FITS = ("fitted", "regular", "loose")
"""Values in order from the tightest to the loosest."""

_PATTERNS = {
    "solid": 6,
    "stripes": 3,
    "vertical stripes": 2,
    "dots": 3,
    "plaid": 2,
    "floral": 3,
    "zigzag": 2,
    "two tone": 1.5,
}
_SLEEVE_WEIGHTS = {"sleeveless": 3, "short": 3, "elbow": 2, "long": 3}
_NO_GRAPHIC = {"none": 1}
_GRAPHICS = {"none": 5, "star": 1, "heart": 1, "lettering": 1, "circle": 1, "moon": 1}

VALUES: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    "dress": {
        "colour": dict.fromkeys(COLOURS, 1),
        "pattern": _PATTERNS,
        "sleeve": _SLEEVE_WEIGHTS,
        "length": {"mini": 2, "knee": 3, "midi": 2, "maxi": 2},
        "neckline": {"v": 3, "square": 2, "round": 3, "boat": 2, "high": 1},
        "fit": {"fitted": 2, "regular": 2, "loose": 2},
        "graphic": _NO_GRAPHIC,
        "buttons": {"no": 5, "yes": 1},
        "belt": {"no": 3, "yes": 1},
        "hem": {"straight": 4, "ruffled": 1},
        "finish": {"matte": 4, "shiny": 1},
    },
    "shirt": {
        "colour": dict.fromkeys(COLOURS, 1),
        "pattern": _PATTERNS,
        "sleeve": {"sleeveless": 1, "short": 4, "elbow": 2, "long": 4},
        "length": {"cropped": 1, "regular": 4, "tunic": 2},
        "neckline": {"v": 2, "round": 4, "collar": 4, "high": 1},
        "fit": {"fitted": 1, "regular": 3, "loose": 2},
        "graphic": _GRAPHICS,
        "buttons": {"no": 1, "yes": 1},
        "belt": {"no": 1},
        "hem": {"straight": 1},
        "finish": {"matte": 6, "shiny": 1},
    },
    "toptee": {
        "colour": dict.fromkeys(COLOURS, 1),
        "pattern": _PATTERNS,
        "sleeve": _SLEEVE_WEIGHTS,
        "length": {"cropped": 2, "regular": 4, "tunic": 2},
        "neckline": {"v": 3, "square": 2, "round": 4, "boat": 2, "high": 1},
        "fit": {"fitted": 2, "regular": 3, "loose": 2},
        "graphic": _GRAPHICS,
        "buttons": {"no": 6, "yes": 1},
        "belt": {"no": 1},
        "hem": {"straight": 4, "ruffled": 1},
        "finish": {"matte": 5, "shiny": 1},
    },
}
"""Weights by category, attribute and value. An attribute with a single value cannot be edited in that category."""

_EDIT_WEIGHTS = {
    "colour": 6.0,
    "secondary": 1.5,
    "pattern": 4.0,
    "sleeve": 4.0,
    "length": 3.0,
    "neckline": 2.5,
    "fit": 1.5,
    "graphic": 2.5,
    "buttons": 1.0,
    "belt": 1.5,
    "hem": 1.0,
    "finish": 1.0,
}

_ATTEMPTS = 1000

BACKGROUNDS = ("studio", "gradient", "wall", "street", "curtain")
BODIES = ("mannequin", "porcelain", "light", "tan", "brown", "dark")


@dataclass(frozen=True)
class Photo:
    """What distinguishes two photographs of one garment; no caption speaks of it.

    rotation is in degrees; shift_x, shift_y and scale are relative to the picture's width; light is in degrees with 90
    for light from above; gain and warmth multiply the channels; noise is the standard deviation in grey levels of 255.
    """

    background: str
    tint: float
    body: str
    hair: int
    legwear: int
    rotation: float
    shift_x: float
    shift_y: float
    scale: float
    arm_angle: float
    light: float
    gain: float
    warmth: float
    noise: float
    texture_seed: int


@dataclass(frozen=True)
class Garment:
    """One garment in one photo.

    `secondary` is the colour of pattern and graphic. `sample` and `edited` keep these invariants: `secondary` is ""
    exactly if the garment is solid without a graphic; only solid cloth has a graphic; every value is in
    ``VALUES[category]``.
    """

    category: str
    colour: str
    secondary: str
    pattern: str
    sleeve: str
    length: str
    neckline: str
    fit: str
    graphic: str
    buttons: str
    belt: str
    hem: str
    finish: str
    photo: Photo


ATTRIBUTES: tuple[str, ...] = tuple(f.name for f in fields(Garment) if f.name not in ("category", "photo"))


def attributes(garment: Garment) -> tuple[str, ...]:
    """Return the values in the order of `ATTRIBUTES`. Garments with equal values differ in the photo only."""
    return tuple(getattr(garment, name) for name in ATTRIBUTES)


def changed(reference: Garment, target: Garment) -> tuple[str, ...]:
    """Return the attributes in which two garments differ, in the order of `ATTRIBUTES`."""
    return tuple(name for name in ATTRIBUTES if getattr(reference, name) != getattr(target, name))


def lightness(colour: str) -> float:
    """Return a colour's luma in [0, 1] (ITU-R BT.601 weights)."""
    red, green, blue = COLOURS[colour]
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def chroma(colour: str) -> float:
    """Return a colour's chroma in [0, 1]: largest minus smallest channel."""
    return (max(COLOURS[colour]) - min(COLOURS[colour])) / 255


def contrasting(colour: str) -> tuple[str, ...]:
    """Return the colours that stay readable as a pattern on `colour`, even in a small picture."""
    return tuple(
        other
        for other in COLOURS
        if abs(lightness(other) - lightness(colour)) > 0.22
        and sum((a - b) ** 2 for a, b in zip(COLOURS[other], COLOURS[colour])) > 130**2
    )


def _pick(rng: random.Random, weights: Mapping[str, float], unlike: str | None = None) -> str:
    values = [value for value in weights if value != unlike]
    return rng.choices(values, [weights[value] for value in values])[0]


def sample_photo(rng: random.Random) -> Photo:
    """Sample a photo: background, body, pose, light and noise."""
    return Photo(
        background=rng.choice(BACKGROUNDS),
        tint=rng.random(),
        body=rng.choice(BODIES),
        hair=rng.randrange(6),
        legwear=rng.randrange(5),
        rotation=rng.uniform(-4, 4),
        shift_x=rng.uniform(-0.04, 0.04),
        shift_y=rng.uniform(-0.02, 0.03),
        scale=rng.uniform(0.93, 1.07),
        arm_angle=rng.uniform(-3, 9),
        light=rng.uniform(35, 145),
        gain=rng.uniform(0.9, 1.08),
        warmth=rng.uniform(-0.04, 0.04),
        noise=rng.uniform(1, 4),
        texture_seed=rng.randrange(2**32),
    )


def sample(category: str, rng: random.Random) -> Garment:
    """Sample a garment of a category in a photo.

    Raises:
        ValueError: If the category is not in `CATEGORIES`.
    """
    if category not in VALUES:
        raise ValueError(f"garments: category must be one of {', '.join(CATEGORIES)}, got {category!r}.")
    values = {name: _pick(rng, weights) for name, weights in VALUES[category].items()}
    if values["pattern"] != "solid":
        values["graphic"] = "none"
    garment = Garment(category=category, secondary="", photo=sample_photo(rng), **values)
    return _consistent(garment, rng)


def varying_attributes(category: str, rng: random.Random, count: int) -> tuple[str, ...]:
    """Sample the `count` different attributes, always with the colour, in which members of a family may differ."""
    weights = {name: _EDIT_WEIGHTS[name] for name, values in VALUES[category].items() if len(values) > 1}
    chosen = ["colour"]
    while len(chosen) < min(count, len(weights)):
        chosen.append(_pick(rng, {name: weight for name, weight in weights.items() if name not in chosen}))
    return tuple(chosen)


def edited(garment: Garment, rng: random.Random, edits: int, only: Sequence[str] = tuple(_EDIT_WEIGHTS)) -> Garment:
    """Change `edits` different attributes of a garment, each to another value, and keep the photo.

    One edit can cause others, so that the garment stays possible: a graphic makes the cloth solid, and a pattern
    removes the graphic. Both add, change or remove the secondary colour.

    Args:
        garment: Garment to edit; it stays unchanged.
        rng: Random generator of the edits.
        edits: Number of attributes to change.
        only: Names of the attributes from which the edits are chosen.

    Raises:
        ValueError: If fewer than `edits` of the attributes in `only` can be changed on this garment.
    """
    chosen: list[str] = []
    result = garment
    for _ in range(edits):
        free = {
            name: _EDIT_WEIGHTS[name]
            for name in only
            if name not in chosen
            and not (name == "graphic" and "pattern" in chosen)
            and not (name == "pattern" and "graphic" in chosen)
            and not (name == "secondary" and {"pattern", "graphic"} & set(chosen))
            and (result.secondary != "" if name == "secondary" else len(VALUES[garment.category][name]) > 1)
        }
        if not free:
            raise ValueError(f"garments: {edits} edits asked of a {garment.category}, only {len(chosen)} are possible.")
        name = _pick(rng, free)
        chosen.append(name)
        result = _edit(result, name, rng)
    return result


def _edit(garment: Garment, name: str, rng: random.Random) -> Garment:
    if name == "secondary":
        others = [colour for colour in contrasting(garment.colour) if colour != garment.secondary]
        return replace(garment, secondary=rng.choice(others))
    value = _pick(rng, VALUES[garment.category][name], unlike=getattr(garment, name))
    garment = replace(garment, **{name: value})  # type: ignore[arg-type]
    if name == "graphic" and value != "none":
        garment = replace(garment, pattern="solid")
    elif name == "pattern" and value != "solid":
        garment = replace(garment, graphic="none")
    return _consistent(garment, rng)


def _consistent(garment: Garment, rng: random.Random) -> Garment:
    """Set a secondary colour that is readable on the main colour if the garment shows one, otherwise remove it."""
    if garment.pattern == "solid" and garment.graphic == "none":
        return replace(garment, secondary="")
    readable = contrasting(garment.colour)
    if garment.secondary in readable:
        return garment
    neutral = [colour for colour in ("white", "black") if colour in readable]
    return replace(garment, secondary=rng.choice(neutral if neutral and rng.random() < 0.5 else readable))


def draw_new(draw: Callable[[], Garment | None], seen: set[tuple[str, ...]], held_out: float = 0.0) -> Garment | None:
    """Call `draw` until it returns a garment that is not in `seen`, and add that garment to `seen`.

    Args:
        draw: Function that returns a garment, or ``None`` for one that cannot be used.
        seen: Existing garments, each as its category and its `attributes`.
        held_out: Share in [0, 1]. Garments that `is_held_out` at this share are rejected.

    Returns:
        The garment, or ``None`` if no attempt succeeded.
    """
    for _ in range(_ATTEMPTS):
        garment = draw()
        if garment is None or is_held_out(garment, held_out):
            continue
        key = (garment.category, *attributes(garment))
        if key not in seen:
            seen.add(key)
            return garment
    return None


def is_held_out(garment: Garment, share: float) -> bool:
    """Return whether a garment's combination of colour, pattern and sleeve is kept out of training.

    The decision depends on a hash of the combination alone, so it is equal in every category, run and process. `share`
    in [0, 1] is the expected fraction of held-out combinations. A larger share holds out a superset.
    """
    key = f"{garment.colour}/{garment.pattern}/{garment.sleeve}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < share * 2**64
