"""Lay out pictures and texts on a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.benchmarks.types import Benchmark, Group

# Sizes on a sheet, in pixels.
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
GREEN, ORANGE, BLUE = "#14944a", "#e67800", "#1f5fa8"


def title_of(benchmark: Benchmark, group: Group) -> str:
    """Return the title of a sheet."""
    return f"{benchmark.name} {benchmark.split}: {group.name}"


def draw_header(title: str, notes: Sequence[str], width: int, colours: Mapping[str, str] | None = None) -> Image.Image:
    """Return a picture with the title, the notes below it, and the meaning of colours."""
    lines = [line for note in notes for line in wrapped(note, 15, width - 2 * MARGIN)]
    header = Image.new("RGB", (width, MARGIN + 42 + 22 * (len(lines) + 1) + 2 * GAP), WHITE)
    draw = ImageDraw.Draw(header)
    draw.text((MARGIN, MARGIN), title, BLACK, font(26))
    y = MARGIN + 42
    for line in lines:
        draw.text((MARGIN, y), line, GREY, font(15))
        y += 22
    x = float(MARGIN)
    for colour, meaning in (colours or {}).items():
        draw.rectangle((x + 1, y + 3, x + 13, y + 15), outline=colour, width=3)
        draw.text((x + 22, y), meaning, BLACK, font(15))
        x += 22 + font(15).getlength(meaning) + 2 * GAP
    return header


def draw_picture(
    sheet: Image.Image, place: tuple[int, int], path: Path, label: str = "", frame: str = "", upright: bool = False
) -> None:
    """Fit a picture into the box at place (left, top), with a label below and a coloured or thin grey frame.

    ``upright`` is passed to `open_rgb`, so that a sheet shows what the model sees.
    """
    left, top = place
    draw = ImageDraw.Draw(sheet)
    right, bottom = left + PICTURE[0] - 1, top + PICTURE[1] - 1
    picture = open_rgb(path, upright)
    # The picture lies inside the frame, so the frame never hides a part of it.
    inner = (PICTURE[0] - 2 * FRAME, PICTURE[1] - 2 * FRAME)
    scale = min(inner[0] / picture.width, inner[1] / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(picture, (left + (PICTURE[0] - size[0]) // 2, top + (PICTURE[1] - size[1]) // 2))
    draw.rectangle((left, top, right, bottom), outline=frame or LIGHT_GREY, width=FRAME if frame else 1)
    draw.text((left + PICTURE[0] / 2, bottom + 4), label, frame or GREY, font(13), anchor="ma")


def draw_text(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    """Write a modification text beside its reference image, and cut it with an ellipsis if it has too many lines."""
    lines = wrapped(text, TEXT_SIZE, TEXT_WIDTH)
    fitting = (PICTURE[1] - LABEL_HEIGHT) // LINE_HEIGHT
    if len(lines) > fitting:
        lines = [*lines[: fitting - 1], lines[fitting - 1] + " ..."]
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + LINE_HEIGHT * number), line, BLACK, font(TEXT_SIZE))


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
