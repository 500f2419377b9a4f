"""Draw a garment as a small product photo.

Shapes are given in figure coordinates: x points right from the body's axis, y points down, the picture is 1 wide and
1.25 high. Masks are filled at `_SUPERSAMPLING` times the picture's size and averaged down. Patterns, folds and light
are functions of the figure coordinates, evaluated at the picture's size, so a picture takes a few milliseconds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .attributes import COLOURS, Garment, lightness, sample

_SUPERSAMPLING = 3
_HEIGHT = 1.25

_SKIN = {
    "mannequin": (226, 222, 216),
    "porcelain": (250, 222, 205),
    "light": (236, 194, 166),
    "tan": (206, 156, 118),
    "brown": (150, 100, 70),
    "dark": (96, 62, 46),
}
_HAIR = ((34, 26, 24), (72, 46, 30), (122, 82, 48), (196, 156, 96), (120, 50, 30), (90, 88, 90))
_LEGWEAR = ((62, 80, 116), (46, 46, 52), (150, 132, 104), (118, 120, 124), (84, 86, 62))

_LETTERS = {
    "L": ("100", "100", "100", "100", "111"),
    "O": ("111", "101", "101", "101", "111"),
    "V": ("101", "101", "101", "101", "010"),
    "E": ("111", "100", "110", "100", "111"),
}

Array = NDArray[np.floating[Any]]
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class _Figure:
    """Landmarks of the right-hand side of a body in figure coordinates."""

    chin: float
    neck: tuple[float, float]
    shoulder: tuple[float, float]
    underarm: tuple[float, float]
    waist: tuple[float, float]
    hip: tuple[float, float]
    arm: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    arm_width: tuple[float, float]
    chest: float
    hems: dict[str, float]
    flare: dict[str, float]
    ease: dict[str, float]
    cell: float


_WHOLE_BODY = _Figure(
    chin=0.05,
    neck=(0.046, 0.115),
    shoulder=(0.165, 0.155),
    underarm=(0.138, 0.275),
    waist=(0.106, 0.445),
    hip=(0.158, 0.58),
    arm=((0.146, 0.180), (0.232, 0.40), (0.285, 0.615)),
    arm_width=(0.038, 0.022),
    chest=0.30,
    hems={"mini": 0.70, "knee": 0.87, "midi": 1.02, "maxi": 1.18},
    flare={"fitted": -0.02, "regular": 0.17, "loose": 0.34},
    ease={"fitted": 0.0, "regular": 0.012, "loose": 0.034},
    cell=0.085,
)
_UPPER_BODY = _Figure(
    chin=0.095,
    neck=(0.072, 0.185),
    shoulder=(0.252, 0.25),
    underarm=(0.208, 0.43),
    waist=(0.168, 0.68),
    hip=(0.222, 0.89),
    arm=((0.222, 0.290), (0.328, 0.61), (0.375, 0.93)),
    arm_width=(0.058, 0.034),
    chest=0.47,
    hems={"cropped": 0.67, "regular": 0.90, "tunic": 1.11},
    flare={"fitted": 0.0, "regular": 0.06, "loose": 0.26},
    ease={"fitted": 0.0, "regular": 0.026, "loose": 0.062},
    cell=0.115,
)

_SLEEVE_END = {"short": 0.27, "elbow": 0.53, "long": 0.97}


class _Canvas:
    """Convert figure coordinates to pixels in a photo's pose, and fill masks in these coordinates."""

    def __init__(self, garment: Garment, size: tuple[int, int]) -> None:
        photo = garment.photo
        self.size = size
        width, height = size
        frame = min(width, height / _HEIGHT)
        self.unit = frame * photo.scale
        self.cos, self.sin = math.cos(math.radians(photo.rotation)), math.sin(math.radians(photo.rotation))
        self.centre = (width / 2 + photo.shift_x * frame, height / 2 + photo.shift_y * frame)
        columns, rows = np.meshgrid(np.arange(width, dtype=np.float32) + 0.5, np.arange(height, dtype=np.float32) + 0.5)
        across, down = (columns - self.centre[0]) / self.unit, (rows - self.centre[1]) / self.unit
        self.x = across * self.cos + down * self.sin
        self.y = down * self.cos - across * self.sin + _HEIGHT / 2

    def _pixels(self, points: Points) -> list[tuple[float, float]]:
        zoom = self.unit * _SUPERSAMPLING
        left, top = self.centre[0] * _SUPERSAMPLING, self.centre[1] * _SUPERSAMPLING
        return [
            (
                left + zoom * (x * self.cos - (y - _HEIGHT / 2) * self.sin),
                top + zoom * (x * self.sin + (y - _HEIGHT / 2) * self.cos),
            )
            for x, y in points
        ]

    def mask(self, *shapes: Points, holes: Sequence[Points] = ()) -> Array:
        """Return the coverage of polygons with holes as (height, width) float32 in [0, 1]."""
        width, height = self.size
        image = Image.new("L", (width * _SUPERSAMPLING, height * _SUPERSAMPLING))
        pen = ImageDraw.Draw(image)
        for shape in shapes:
            pen.polygon(self._pixels(shape), fill=255)
        for hole in holes:
            pen.polygon(self._pixels(hole), fill=0)
        return np.asarray(image.reduce(_SUPERSAMPLING), dtype=np.float32) / 255

    def blurred(self, mask: Array, radius: float) -> Array:
        """Blur a mask with a Gaussian whose radius is in figure units."""
        return self.enlarged(self.blurred_half(mask, radius))

    def blurred_half(self, mask: Array, radius: float) -> Array:
        """Blur a mask at half its size, which costs a quarter of the time without visible loss."""
        half = Image.fromarray((mask * 255).astype(np.uint8)).reduce(2)
        soft = half.filter(ImageFilter.GaussianBlur(radius * self.unit / 2))
        return np.asarray(soft, dtype=np.float32) / 255

    def enlarged(self, values: Array) -> Array:
        """Enlarge values at half the size to the picture's size."""
        return np.asarray(Image.fromarray(values).resize(self.size, Image.Resampling.BILINEAR))


def _mirrored(points: Points) -> list[tuple[float, float]]:
    return [(-x, y) for x, y in points]


def _closed(right: Points) -> list[tuple[float, float]]:
    """Close a right-hand outline, from top to bottom, with its mirror image."""
    return [*right, *reversed(_mirrored(right))]


def _disc(x: float, y: float, radius: float, corners: int = 28) -> list[tuple[float, float]]:
    turns = (2 * math.pi * i / corners for i in range(corners))
    return [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]


def _box(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _limb(path: Points, widths: Sequence[float]) -> list[tuple[float, float]]:
    """Return the outline of a limb with the given half widths along a path and square ends."""
    points, half = np.asarray(path), np.asarray(widths)[:, None]
    along = np.gradient(points, axis=0)
    across = np.stack([along[:, 1], -along[:, 0]], axis=1) / np.linalg.norm(along, axis=1, keepdims=True)
    outline = np.concatenate([points + half * across, (points - half * across)[::-1]])
    return [(float(x), float(y)) for x, y in outline]


def _arm(figure: _Figure, angle: float) -> list[tuple[float, float]]:
    """Return 25 points of the right arm's axis from shoulder to wrist, turned outwards by an angle in degrees."""
    (x0, y0), elbow, wrist = figure.arm
    steps = np.linspace(0, 1, 25)
    bend = 2 * steps * (1 - steps)
    xs = (1 - steps) ** 2 * x0 + bend * (2 * elbow[0] - (x0 + wrist[0]) / 2) + steps**2 * wrist[0]
    ys = (1 - steps) ** 2 * y0 + bend * (2 * elbow[1] - (y0 + wrist[1]) / 2) + steps**2 * wrist[1]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return [(x0 + (x - x0) * cos + (y - y0) * sin, y0 + (y - y0) * cos - (x - x0) * sin) for x, y in zip(xs, ys)]


def _half_width(figure: _Figure, garment: Garment, y: Array) -> Array:
    """Return the half width of the cloth at heights from the underarm down, all in figure units."""
    ease, flare = figure.ease[garment.fit], figure.flare[garment.fit]
    waist = figure.waist[0] + ease * 1.4
    heights = [figure.underarm[1], figure.waist[1], figure.hip[1], _HEIGHT]
    hip = figure.hip[0] + ease + flare * (figure.hip[1] - figure.waist[1]) * 0.6
    widths = [figure.underarm[0] + ease, waist, hip, hip + flare * (_HEIGHT - figure.hip[1]) * 0.85]
    blur = 0.05
    table = np.linspace(0, 1.5, 97)
    smooth = np.mean([np.interp(table + shift * blur, heights, widths) for shift in (-1, -0.5, 0, 0.5, 1)], axis=0)
    return np.asarray(np.interp(y, table, smooth), dtype=np.float32)


def _neckline(figure: _Figure, garment: Garment) -> list[tuple[float, float]]:
    """Return the right half of the neckline from the middle outwards to the shoulder line."""
    neck_x, neck_y = figure.neck
    tip_x, tip_y = figure.shoulder
    unit = figure.shoulder[0]
    if garment.neckline == "high":
        top = figure.chin + 0.35 * (neck_y - figure.chin)
        return [(0, top + 0.006), (neck_x * 1.08, top), (neck_x * 1.12, neck_y - 0.012)]
    edge = {"v": 0.40, "square": 0.50, "round": 0.42, "boat": 0.78, "collar": 0.34}[garment.neckline] * unit
    depth = {"v": 0.78, "square": 0.58, "round": 0.34, "boat": 0.08, "collar": 0.22}[garment.neckline] * unit
    start = neck_y + (tip_y - neck_y) * (edge - neck_x) / (tip_x - neck_x)
    if garment.neckline in ("v", "collar"):
        return [(0, start + depth), (edge, start)]
    if garment.neckline == "square":
        return [(0, start + depth), (edge * 0.92, start + depth), (edge, start)]
    turns = np.linspace(0, math.pi / 2, 12)
    return [(edge * math.sin(turn), start + depth * math.cos(turn)) for turn in turns]


def _bodice(figure: _Figure, garment: Garment) -> list[tuple[float, float]]:
    """Return the outline of the cloth without its sleeves."""
    tip_x, tip_y = figure.shoulder
    under_x, under_y = figure.underarm
    hem = figure.hems[garment.length]
    ease = figure.ease[garment.fit]
    if garment.sleeve == "sleeveless":
        neck_x = _neckline(figure, garment)[-1][0]
        strap = max(tip_x * 0.80, neck_x + 0.02)
        middle = (tip_x * 0.74, tip_y + 0.45 * (under_y - tip_y))
        armhole = [(strap, tip_y - 0.008), middle, (under_x * 0.9, under_y - 0.03)]
    else:
        armhole = [(tip_x + ease * 0.4, tip_y), (tip_x + ease * 0.4, tip_y + 0.4 * (under_y - tip_y))]
    heights = np.linspace(under_y, hem, 24)
    sides = list(zip(_half_width(figure, garment, heights).tolist(), heights.tolist()))
    right = [*_neckline(figure, garment), *armhole, *sides]
    last = sides[-1][0]
    steps = np.linspace(0, 1, 25)[1:]
    if garment.hem == "ruffled":
        bottom = [(last * (1 - t), hem + 0.016 * abs(math.sin(t * 5.5 * math.pi)) + 0.012 * t) for t in steps]
    else:
        bottom = [(last * (1 - t), hem + 0.10 * last * (1 - (1 - t) ** 2)) for t in steps]
    return _closed([*right, *bottom])


def _sleeve_path(figure: _Figure, garment: Garment) -> tuple[list[tuple[float, float]], list[float]]:
    """Return the right sleeve's axis and half widths from the shoulder on."""
    arm = _arm(figure, garment.photo.arm_angle)
    path = arm[: max(3, round(_SLEEVE_END[garment.sleeve] * (len(arm) - 1)) + 1)]
    upper, lower = figure.arm_width
    ease = 0.010 + figure.ease[garment.fit] * 0.6
    steps = np.linspace(0, (len(path) - 1) / (len(arm) - 1), len(path))
    cap = [min(1.0, 0.62 + 0.1 * i) for i in range(len(path))]
    return path, [c * (upper + (lower - upper) * t + ease * (1 + 0.25 * t)) for c, t in zip(cap, steps.tolist())]


def _graphic(canvas: _Canvas, figure: _Figure, graphic: str) -> Array:
    """Return the mask of the print on the chest."""
    middle, radius = figure.chest + 0.035, figure.shoulder[0] * 0.44
    if graphic == "star":
        radii = (radius * 1.15, radius * 0.5)
        turns = [math.pi * i / 5 for i in range(10)]
        return canvas.mask(
            [(radii[i % 2] * math.sin(t), middle - radii[i % 2] * math.cos(t)) for i, t in enumerate(turns)]
        )
    if graphic == "heart":
        turns = [2 * math.pi * i / 40 for i in range(40)]
        return canvas.mask(
            [
                (
                    radius * math.sin(t) ** 3,
                    middle - radius / 16 * sum(a * math.cos((k + 1) * t) for k, a in enumerate((13, -5, -2, -1))),
                )
                for t in turns
            ]
        )
    if graphic == "circle":
        ring = canvas.mask(_disc(0, middle, radius), holes=[_disc(0, middle, radius * 0.66)])
        return ring + canvas.mask(_disc(0, middle, radius * 0.3))
    if graphic == "moon":
        return canvas.mask(_disc(0, middle, radius), holes=[_disc(radius * 0.45, middle - radius * 0.2, radius * 0.8)])
    dot = radius * 2.5 / 15
    left = -radius * 1.25
    return canvas.mask(
        *(
            _box(
                *(left + (4 * i + column) * dot, middle + (row - 2.5) * dot * 1.5),
                *(left + (4 * i + column + 1) * dot, middle + (row - 1.5) * dot * 1.5),
            )
            for i, letter in enumerate("LOVE")
            for row, bits in enumerate(_LETTERS[letter])
            for column, bit in enumerate(bits)
            if bit == "1"
        )
    )


def _pattern(name: str, p: Array, q: Array, cell: float, pixel: float, seed: int) -> Array:
    """Return a pattern's coverage in [0, 1] at cloth coordinates (p across, q down); `pixel` is a pixel's width."""

    def inside(distance: Array) -> Array:
        coverage: Array = np.clip(0.5 + distance / pixel, 0, 1)
        return coverage

    def bands(t: Array, period: float, width: float) -> Array:
        return inside(width / 2 - np.abs((t / period) % 1 - 0.5) * period)

    if name == "stripes":
        return bands(q, cell, 0.48 * cell)
    if name == "vertical stripes":
        return bands(p, cell * 0.85, 0.36 * cell)
    if name == "zigzag":
        return bands(q + np.abs((p / cell) % 1 - 0.5) * cell * 1.1, cell, 0.42 * cell)
    if name == "plaid":
        wide = np.maximum(bands(p, cell * 1.3, cell * 0.5), 0) + np.maximum(bands(q, cell * 1.3, cell * 0.5), 0)
        thin = bands(p + cell * 0.65, cell * 1.3, cell * 0.12) + bands(q + cell * 0.65, cell * 1.3, cell * 0.12)
        plaid: Array = np.clip(0.5 * wide + 0.4 * thin, 0, 1)
        return plaid
    pitch = cell * (0.72 if name == "dots" else 1.25)
    row = np.floor(q / pitch)
    column = np.floor(p / pitch + 0.5 * (row % 2))
    dx = (p / pitch + 0.5 * (row % 2)) - column - 0.5
    dy = q / pitch - row - 0.5
    if name == "dots":
        return inside((0.33 - np.hypot(dx, dy)) * pitch)
    # Integer arithmetic gives each cell the same random number on every platform. A hash by sines would not.
    cells = row.astype(np.int64) * 73_856_093 ^ column.astype(np.int64) * 19_349_663 ^ seed
    hashed = ((cells * 2_654_435_761 >> 15 & 0xFFFF) / 65536).astype(np.float32)
    dx, dy = dx - 0.2 * (hashed - 0.5), dy - 0.3 * ((hashed * 7) % 1 - 0.5)
    radius = np.hypot(dx, dy)
    petals = (0.33 + 0.1 * hashed) * (0.68 + 0.32 * np.cos(5 * np.arctan2(dy, dx) + 6.28 * hashed))
    return inside((petals - radius) * pitch) * (1 - inside((0.09 - radius) * pitch))


def _region(mask: Array) -> tuple[slice, slice]:
    """Return the smallest rectangle that contains all nonzero values of a mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


class _Painter:
    """Blend layers onto a picture with values in [0, 255]."""

    def __init__(self, garment: Garment, size: tuple[int, int]) -> None:
        self.garment = garment
        self.canvas = _Canvas(garment, size)
        self.figure = _WHOLE_BODY if garment.category == "dress" else _UPPER_BODY
        self.random = np.random.Generator(np.random.PCG64(garment.photo.texture_seed))
        self.light = math.radians(garment.photo.light)
        self.picture = self._background()

    def blend(self, colour: Array | Sequence[float], mask: Array) -> None:
        """Blend a colour, or an array of colours as large as the picture or the mask's region, onto the picture."""
        region = _region(mask)
        layer = np.asarray(colour, dtype=np.float32)
        picture = self.picture[region]
        if layer.shape == self.picture.shape:
            layer = layer[region]
        picture += (layer - picture) * mask[region][..., None]

    def darken(self, mask: Array, strength: float) -> None:
        region = _region(mask)
        self.picture[region] *= 1 - strength * mask[region][..., None]

    def relief(self, mask: Array, radius: float, depth: float) -> Array:
        """Return light factors around 1 that make a mask look as if it bulged towards the viewer."""
        bulge = self.canvas.blurred_half(mask, radius)
        rows, columns = np.gradient(bulge)
        slope = (columns * math.cos(self.light) + rows * math.sin(self.light)) * (self.canvas.unit * radius / 2)
        return self.canvas.enlarged(1 + depth * (1.1 * slope + 0.9 * np.clip(bulge, 0.35, 1) - 0.75))

    def _background(self) -> Array:
        photo, (width, height) = self.garment.photo, self.canvas.size
        across = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        down = np.linspace(0, 1, height, dtype=np.float32)[:, None]
        tone = 200 + 45 * photo.tint
        if photo.background == "studio":
            level = 250 - 10 * down * (1 - photo.tint) - 6 * across**2
        elif photo.background == "gradient":
            level = tone + 10 - 40 * down - 14 * across**2
        elif photo.background == "wall":
            edge = 0.86 + 0.05 * photo.tint
            level = np.where(down < edge, tone - 6 * across, tone - 38 + 20 * (down - edge))
        elif photo.background == "curtain":
            level = tone - 14 + 7 * np.sin(across * (9 + 8 * photo.tint) + 1.5 * np.sin(down * 2)) - 8 * down
        else:
            blocks = np.asarray(self.random.uniform(110, 235, (5, 4, 3)), dtype=np.uint8)
            soft = Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
            return np.asarray(soft, dtype=np.float32) * 0.6 + 80
        cast = np.asarray([1 + 0.03 * math.cos(6.28 * photo.tint + k) for k in (0.0, 2.1, 4.2)], dtype=np.float32)
        flat = np.broadcast_to(level, (height, width))
        return np.clip(flat[..., None] * cast, 0, 255).astype(np.float32)

    def paint(self) -> Image.Image:
        """Paint the layers from back to front and return the photo."""
        sleeves = self._sleeve_shapes()
        body = self._body_masks()
        cloth = self.canvas.mask(_bodice(self.figure, self.garment))
        everything = np.maximum(np.max(body, axis=0), cloth)
        shadow = np.roll(self.canvas.blurred(everything, 0.05), (3, round(4 * math.cos(self.light))), axis=(0, 1))
        self.darken(shadow, 0.28)
        self._paint_body(body)
        for shape, axis in sleeves:
            self._paint_sleeve(shape, axis)
        self._paint_bodice(cloth)
        self._paint_details(cloth)
        return self._developed()

    def _sleeve_shapes(self) -> list[tuple[list[tuple[float, float]], list[tuple[float, float]]]]:
        if self.garment.sleeve == "sleeveless":
            return []
        path, widths = _sleeve_path(self.figure, self.garment)
        shape = _limb(path, widths)
        return [(shape, path), (_mirrored(shape), _mirrored(path))]

    def _body_masks(self) -> list[Array]:
        """Return the masks of legs, skin and hair in painting order."""
        figure = self.figure
        neck_x, neck_y = figure.neck
        arm = _arm(figure, self.garment.photo.arm_angle)
        upper, lower = figure.arm_width
        arm_shape = _limb(arm, np.linspace(upper, lower, len(arm)).tolist())
        hand = _disc(arm[-1][0], arm[-1][1] + lower * 0.6, lower * 1.15)
        trunk = _closed(
            [
                (0, figure.chin),
                (neck_x * 0.9, figure.chin),
                (neck_x * 0.92, neck_y - 0.02),
                (neck_x * 1.5, neck_y + 0.012),
                (figure.shoulder[0] * 0.86, figure.shoulder[1] - 0.012),
                (figure.shoulder[0] + 0.01, figure.shoulder[1] + 0.03),
                (figure.underarm[0] * 0.94, figure.underarm[1]),
                figure.waist,
                figure.hip,
                (figure.hip[0] * 0.98, figure.hip[1] + 0.06),
            ]
        )
        face_x = neck_x * 1.55
        face = [(x * face_x, figure.chin + 0.012 + (y - 1) * face_x * 1.4) for x, y in _disc(0, 0, 1)]
        if self.garment.category == "dress":
            knee, ankle = 0.86, 1.19
            leg = _limb(
                [(0.078, figure.hip[1]), (0.07, knee), (0.066, 1.0), (0.06, ankle)], [0.076, 0.043, 0.041, 0.024]
            )
            shoe = [(0.03, ankle - 0.01), (0.085, ankle - 0.01), (0.105, 1.235), (0.035, 1.245)]
            skin = self.canvas.mask(
                leg, _mirrored(leg), trunk, arm_shape, _mirrored(arm_shape), hand, _mirrored(hand), face
            )
            return [self.canvas.mask(shoe, _mirrored(shoe)), skin, self._hair(face_x)]
        hip_x, hip_y = figure.hip
        waist = (figure.waist[0], 0.72)
        trousers = [(0, 0.72), waist, (hip_x, hip_y), (hip_x * 1.02, 1.4), (0.02, 1.4), (0.0, hip_y + 0.12)]
        skin = self.canvas.mask(trunk, arm_shape, _mirrored(arm_shape), hand, _mirrored(hand), face)
        return [skin, self.canvas.mask(_closed(trousers)), self._hair(face_x)]

    def _hair(self, face_x: float) -> Array:
        if self.garment.photo.body == "mannequin":
            return np.zeros_like(self.canvas.x)
        chin = self.figure.chin
        strand = [(face_x * 0.82, -0.2), (face_x * 1.35, -0.2), (face_x * 1.3, chin + 0.02), (face_x * 0.86, chin)]
        return self.canvas.mask(strand, _mirrored(strand))

    def _paint_body(self, masks: list[Array]) -> None:
        photo = self.garment.photo
        colours = [_LEGWEAR[photo.legwear], _SKIN[photo.body]]
        if self.garment.category != "dress":
            colours.reverse()
        for mask, colour in zip(masks, colours):
            tone = self.relief(mask, 0.03, 0.45)[..., None] * np.asarray(colour, dtype=np.float32)
            self.blend(tone, mask)
        self.blend(_HAIR[photo.hair], masks[2])
        chin_shadow = self.canvas.mask(
            [(x * self.figure.neck[0] * 0.9, self.figure.chin + 0.012 + y * 0.025) for x, y in _disc(0, 0, 1)]
        )
        self.darken(self.canvas.blurred(chin_shadow, 0.012) * masks[1 if self.garment.category == "dress" else 0], 0.3)

    def _cloth_colour(self, p: Array, q: Array, sleeve: bool) -> Array:
        garment, canvas = self.garment, self.canvas
        colour = np.asarray(COLOURS[garment.colour], dtype=np.float32)
        if garment.pattern == "solid" or (garment.pattern == "two tone" and sleeve):
            return np.broadcast_to(colour, (*p.shape, 3))
        if garment.pattern == "two tone":
            middle = self.figure.waist[1] if garment.category == "dress" else self.figure.chest + 0.05
            cover = np.clip((q - middle) * canvas.unit + 0.5, 0, 1)
        else:
            cover = _pattern(garment.pattern, p, q, self.figure.cell, 1 / canvas.unit, garment.photo.texture_seed)
        second = np.asarray(COLOURS[garment.secondary], dtype=np.float32)
        mixed: Array = colour + (second - colour) * cover[..., None]
        return mixed

    def _lit(self, colour: Array, factor: Array, folds: Array) -> Array:
        """Shade cloth by folds in [-1, 1]. Dark cloth becomes a little lighter so that its folds stay visible."""
        shiny = self.garment.finish == "shiny"
        shade = factor * (1 + (0.17 if shiny else 0.085) * folds)
        lit: Array = (colour * 0.95 + 6) * shade[..., None]
        if shiny:
            lit += (np.clip(folds - 0.25, 0, 1) ** 1.5 * 105)[..., None]
        return lit

    def _paint_sleeve(self, shape: Points, axis: Points) -> None:
        mask = self.canvas.mask(shape)
        self.darken(self.canvas.blurred(mask, 0.012), 0.18)
        (x0, y0), (x1, y1) = axis[0], axis[-1]
        length = math.hypot(x1 - x0, y1 - y0)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        region = _region(mask)
        x, y = self.canvas.x[region] - x0, self.canvas.y[region] - y0
        along, across = x * dx + y * dy, x * dy - y * dx
        phase = self.random.uniform(0, 6.28)
        folds = np.sin(along * 42 + across * 30 * math.copysign(1, x1) + phase) * np.sin(along * 17 + phase * 2)
        factor = self.relief(mask, 0.035, 0.55)[region]
        cuff = np.clip(1 - np.abs(along - length + 0.014) * self.canvas.unit / 0.8, 0, 1)
        colour = self._lit(self._cloth_colour(across, along + y0, True), factor * (1 - 0.25 * cuff), folds)
        self.blend(colour, mask)

    def _paint_bodice(self, mask: Array) -> None:
        figure, canvas = self.figure, self.canvas
        region = _region(mask)
        x, y = canvas.x[region], canvas.y[region]
        self.darken(canvas.blurred(mask, 0.016), 0.22)
        half = np.maximum(_half_width(figure, self.garment, y), 0.05)
        fan = x / half
        phases = self.random.uniform(0, 6.28, 5).tolist()
        drop = np.clip((y - figure.waist[1]) / (_HEIGHT - figure.waist[1]), 0, 1)
        looseness = {"fitted": 0.4, "regular": 0.8, "loose": 1.15}[self.garment.fit]
        hanging = np.sin(fan * 7.5 + phases[0] + 0.8 * np.sin(y * 5 + phases[1])) + 0.5 * np.sin(fan * 15 + phases[2])
        slanted = np.sin(x * 24 + y * 15 + phases[3]) * np.sin(y * 13 - x * 9 + phases[4])
        folds = np.clip(looseness * (1.3 * drop + 0.15) * hanging + 0.55 * slanted * (1 - drop), -1, 1)
        waist = np.exp(-(((y - figure.waist[1]) / 0.05) ** 2)) * (0.5 if self.garment.fit == "fitted" else 0.15)
        factor = self.relief(mask, 0.05, 0.6)[region] * (1 - 0.12 * waist)
        bend = folds * 0.006
        colour = self._lit(self._cloth_colour(x + bend, y + bend * 0.6, False), factor, folds)
        self.blend(colour, mask)

    def _paint_details(self, cloth: Array) -> None:
        garment, figure, canvas = self.garment, self.figure, self.canvas
        hem = figure.hems[garment.length]
        outline = _neckline(figure, garment)
        if garment.hem == "ruffled":
            self._paint_ruffle(cloth, hem)
        else:
            seam = np.clip(1 - np.abs(canvas.y - hem + 0.012) * canvas.unit / 0.8, 0, 1)
            self.darken(seam * cloth, 0.16)
        if garment.buttons == "yes":
            self._paint_buttons(cloth, outline[0][1], hem)
        if garment.graphic != "none":
            self.blend(COLOURS[garment.secondary], _graphic(canvas, figure, garment.graphic) * cloth * 0.94)
        if garment.belt == "yes":
            self._paint_belt(cloth)
        if garment.neckline == "collar":
            self._paint_collar(outline)
        elif garment.neckline == "high":
            fold = np.clip(1 - np.abs(canvas.y - figure.neck[1] + 0.004) * canvas.unit / 1.0, 0, 1)
            self.darken(fold * cloth * (np.abs(canvas.x) < figure.neck[0] * 1.2), 0.3)
        else:
            inner = [(x, y + 0.014) for x, y in outline]
            rim = canvas.mask(_closed([*outline, *reversed(inner)]))
            self.darken(rim * cloth, 0.2)

    def _paint_ruffle(self, cloth: Array, hem: float) -> None:
        canvas = self.canvas
        band = np.clip((canvas.y - hem + 0.075) * canvas.unit, 0, 1) * cloth
        half = np.maximum(_half_width(self.figure, self.garment, canvas.y), 0.05)
        waves = np.sin(canvas.x / half * 17.3)
        self.picture *= 1 + (0.24 * waves * band)[..., None]
        seam = np.clip(1 - np.abs(canvas.y - hem + 0.075) * canvas.unit / 1.1, 0, 1)
        self.darken(seam * cloth, 0.4)

    def _paint_buttons(self, cloth: Array, top: float, hem: float) -> None:
        radius = self.figure.shoulder[0] * 0.068
        light = lightness(self.garment.colour) < 0.5
        spots = np.arange(max(top, self.figure.neck[1]) + 0.045, hem - 0.03, self.figure.shoulder[0] * 0.36)
        placket = self.canvas.mask(_box(radius * 2.2, top, radius * 2.2 + 0.006, hem))
        self.darken(placket * cloth, 0.35)
        buttons = self.canvas.mask(*(_disc(0, float(y), radius, 12) for y in spots))
        self.blend((236, 230, 218) if light else (40, 34, 32), buttons * cloth)

    def _paint_belt(self, cloth: Array) -> None:
        y = self.figure.waist[1]
        dark = lightness(self.garment.colour) > 0.35
        band = self.canvas.mask(_box(-0.4, y - 0.021, 0.4, y + 0.021)) * cloth
        self.darken(self.canvas.blurred(band, 0.01) * cloth, 0.3)
        leather = np.asarray((72, 44, 28) if dark else (206, 168, 112), dtype=np.float32)
        self.blend(leather * self.relief(band, 0.015, 0.4)[..., None], band)
        buckle = self.canvas.mask(
            _box(-0.026, y - 0.026, 0.026, y + 0.026), holes=[_box(-0.014, y - 0.014, 0.014, y + 0.014)]
        )
        self.blend((222, 190, 96), buckle)

    def _paint_collar(self, outline: Points) -> None:
        (_, low), (edge, high) = outline[0], outline[-1]
        rise = self.figure.neck[1] - 0.045
        flap = [
            (0.0, low),
            (self.figure.neck[0] * 0.98, rise),
            (edge * 1.15, high - 0.012),
            (edge * 1.28, low + 0.012),
            (edge * 0.62, low + 0.045),
        ]
        mask = self.canvas.mask(flap, _mirrored(flap))
        self.darken(self.canvas.blurred(mask, 0.01), 0.45)
        colour = np.asarray(COLOURS[self.garment.colour], dtype=np.float32)
        self.blend((colour * 0.93 + 16) * self.relief(mask, 0.02, 0.4)[..., None], mask)

    def _developed(self) -> Image.Image:
        photo = self.garment.photo
        channels = np.asarray([1 + photo.warmth, 1.0, 1 - photo.warmth], dtype=np.float32) * photo.gain
        grain = self.random.standard_normal((*self.picture.shape[:2], 1), dtype=np.float32) * photo.noise
        return Image.fromarray(np.clip(self.picture * channels + grain, 0, 255).astype(np.uint8))


def draw(garment: Garment, size: tuple[int, int] = (144, 180)) -> Image.Image:
    """Draw a garment as an RGB picture of `size` = (width, height) pixels.

    The same garment always gives the same picture. The figure fits into any aspect ratio.

    Raises:
        ValueError: If a side is shorter than 16 pixels.
    """
    if min(size) < 16:
        raise ValueError(f"garments: a picture's sides must be at least 16 pixels, got {size[0]} x {size[1]}.")
    return _Painter(garment, size).paint()


def draw_for_name(name: str, category: str, size: tuple[int, int] = (144, 180)) -> Image.Image:
    """Draw a garment of a category that depends only on an image's name, as a stand-in for a missing photograph.

    Raises:
        ValueError: If the category is unknown or a side is shorter than 16 pixels.
    """
    return draw(sample(category, random.Random(f"garments/{category}/{name}")), size)
