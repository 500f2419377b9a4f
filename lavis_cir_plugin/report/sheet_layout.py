"""Lay out pictures and texts on a contact sheet."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Union

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.benchmarks.types import Benchmark, Group

# Lengths are in pixels.
PICTURE = (120, 150)  # width and height of the box that holds a picture; garments are upright
GAP = 14
SECTION_GAP = 40
TEXT_WIDTH = 260
TEXT_SIZE = 16
LINE_HEIGHT = 21
LABEL_HEIGHT = 22
FRAME = 4
MARGIN = 32
BLACK, GREY, LIGHT_GREY, WHITE = "#1a1a1a", "#6b6b6b", "#d4d4d4", "#ffffff"
GREEN, ORANGE, BLUE = "#0f7a3c", "#c25400", "#1f5fa8"  # dark enough for small text on white


@dataclass(frozen=True)
class Picture:
    """A cell that shows a picture."""

    image: Path | Image.Image
    """File, or an RGB picture in memory."""
    label: str = ""
    """Text below the picture."""
    frame: str = ""
    """Colour of a thick frame and of the label; if it is empty, the frame is thin and grey."""
    upright: bool = False
    """Whether `open_rgb` turns a file as its EXIF orientation says, so that a sheet shows what the model sees."""


@dataclass(frozen=True)
class Words:
    """A cell that shows a text, and one line at the bottom of its row."""

    text: str
    colour: str = BLACK
    foot: str = ""
    foot_colour: str = GREY


Cell = Union[Picture, Words, None]


@dataclass(frozen=True)
class Column:
    """A column of a sheet."""

    title: str = ""
    width: int = PICTURE[0]
    space: int = GAP
    """Empty space to the left of the column, unless it is the first one."""


def draw_sheet(
    title: str,
    notes: Sequence[str],
    columns: Sequence[Column],
    rows: Sequence[Sequence[Cell]],
    box: tuple[int, int] = PICTURE,
    colours: Mapping[str, str] | None = None,
) -> bytes:
    """Draw a title, notes and a table of pictures and texts, and return the sheet as a PNG.

    Args:
        title: First line.
        notes: Lines below the title, wrapped at the sheet's width.
        columns: Columns from left to right.
        rows: Cells of each row, at most one per column; None leaves a place empty.
        box: Width and height of the box that holds each picture; pictures keep their aspect ratio.
        colours: Meaning of each colour that frames use, shown below the notes.

    Raises:
        ValueError: If a picture cannot be read.
        FileNotFoundError: If a picture is missing.
    """
    lefts: list[int] = []
    x = MARGIN
    for column in columns:
        x += column.space if lefts else 0
        lefts.append(x)
        x += column.width
    header = _header(title, notes, max(x, MARGIN + round(font(26).getlength(title))) + MARGIN, colours or {})
    row_height = box[1] + LABEL_HEIGHT + GAP
    top = header.height + LABEL_HEIGHT
    sheet = Image.new("RGB", (header.width, top + len(rows) * row_height + MARGIN - GAP), WHITE)
    sheet.paste(header, (0, 0))
    for left, column in zip(lefts, columns):
        ImageDraw.Draw(sheet).text((left, header.height - 4), column.title, GREY, font(13))
    for number, row in enumerate(rows):
        for left, column, cell in zip(lefts, columns, row):
            place = (left, top + number * row_height)
            if isinstance(cell, Picture):
                draw_picture(sheet, place, cell, box)
            elif cell is not None:
                _draw_words(sheet, place, cell, (column.width, box[1]))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def title_of(benchmark: Benchmark, group: Group) -> str:
    """Return the title of a sheet."""
    return f"{benchmark.name} {benchmark.split}: {group.name}"


def _header(title: str, notes: Sequence[str], width: int, colours: Mapping[str, str]) -> Image.Image:
    """Return a picture with the title, the notes below it, and the meaning of colours."""
    lines = [line for note in notes for line in wrapped(note, 15, width - 2 * MARGIN)]
    header = Image.new("RGB", (width, MARGIN + 42 + 22 * (len(lines) + bool(colours)) + 2 * GAP), WHITE)
    draw = ImageDraw.Draw(header)
    draw.text((MARGIN, MARGIN), title, BLACK, font(26))
    y = MARGIN + 42
    for line in lines:
        draw.text((MARGIN, y), line, GREY, font(15))
        y += 22
    x = float(MARGIN)
    for colour, meaning in colours.items():
        draw.rectangle((x + 1, y + 3, x + 13, y + 15), outline=colour, width=3)
        draw.text((x + 22, y), meaning, BLACK, font(15))
        x += 22 + font(15).getlength(meaning) + 2 * GAP
    return header


def draw_picture(sheet: Image.Image, place: tuple[int, int], picture: Picture, box: tuple[int, int] = PICTURE) -> None:
    """Fit a picture into a box of (width, height) at a place (left, top) of a sheet, with its label below the box."""
    left, top = place
    draw = ImageDraw.Draw(sheet)
    right, bottom = left + box[0] - 1, top + box[1] - 1
    image = picture.image if isinstance(picture.image, Image.Image) else open_rgb(picture.image, picture.upright)
    # The picture lies inside the frame, so the frame never hides a part of it.
    inner = (box[0] - 2 * FRAME, box[1] - 2 * FRAME)
    scale = min(inner[0] / image.width, inner[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(image, (left + (box[0] - size[0]) // 2, top + (box[1] - size[1]) // 2))
    outline, width = (picture.frame, FRAME) if picture.frame else (LIGHT_GREY, 1)
    draw.rectangle((left, top, right, bottom), outline=outline, width=width)
    draw.text((left + box[0] / 2, bottom + 4), picture.label, picture.frame or GREY, font(13), anchor="ma")


def _draw_words(sheet: Image.Image, place: tuple[int, int], words: Words, box: tuple[int, int]) -> None:
    """Write a text into a box with its foot at the bottom, and cut it with an ellipsis if it has too many lines."""
    draw = ImageDraw.Draw(sheet)
    lines = wrapped(words.text, TEXT_SIZE, box[0])
    fitting = (box[1] - LABEL_HEIGHT) // LINE_HEIGHT
    if len(lines) > fitting:
        lines = [*lines[: fitting - 1], lines[fitting - 1] + " ..."]
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + LINE_HEIGHT * number), line, words.colour, font(TEXT_SIZE))
    draw.text((place[0], place[1] + box[1]), words.foot, words.foot_colour, font(13), anchor="ls")


def wrapped(text: str, font_size: int, width: int) -> list[str]:
    """Break a text at blanks into lines of at most width pixels. A single word that is wider is broken inside."""
    face = font(font_size)
    lines = [""]
    for word in text.split():
        if face.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines.append("")
        for character in word:
            if face.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line]


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which matplotlib contains, because Pillow's default font differs between its versions."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
