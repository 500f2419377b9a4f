"""An answer as one picture: references and words on the left, results with their scores on the right."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.core.atomic_files import replace_file
from lavis_cir_plugin.report.sheet_layout import font, wrapped
from lavis_cir_plugin.search.engine import Answer, Hit

BOX, MARGIN, GAP, LINE = 200, 24, 12, 18
COLUMNS = 5
MOST_SHOWN = 200
"""Results that a sheet shows, at most; more would make a picture that no viewer opens."""

_FEWEST_COLUMNS = 3  # so that a question has room above few results
_HEADER_SIZE = 15
_BLACK, _GREY, _WHITE, _BLUE = "#111111", "#666666", "#ffffff", "#1f6feb"


def draw_sheet(answer: Answer, references: Sequence[Image.Image], question: Sequence[str], path: str | Path) -> Path:
    """Draw an answer as `sheet_of` and write it as PNG, whole or not at all; return the path.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()
    sheet_of(answer, references, question).save(content, "PNG")
    return replace_file(Path(path), content.getvalue())


def sheet_of(answer: Answer, references: Sequence[Image.Image], question: Sequence[str]) -> Image.Image:
    """Draw an answer: the question above, its pictures on the left, the first `MOST_SHOWN` results on the right.

    Args:
        answer: To be drawn; a picture whose file is gone is said to be so.
        references: RGB pictures of the question.
        question: Lines that say what was asked.
    """
    hits = answer.hits[:MOST_SHOWN]
    columns = min(COLUMNS, max(_FEWEST_COLUMNS, len(hits)))
    start = MARGIN + (BOX + 3 * GAP if references else 0)
    width = start + columns * (BOX + GAP) - GAP + MARGIN
    more = [f"the first {len(hits)} of {len(answer.hits)} results"] if len(hits) < len(answer.hits) else []
    nothing = [] if hits else ["nothing found"]
    lines = [line for text in (*question, *more, *nothing) for line in wrapped(text, _HEADER_SIZE, width - 2 * MARGIN)]
    top = MARGIN + len(lines) * (LINE + 4) + GAP
    cell = BOX + 2 * LINE + GAP
    height = top + max(-(-len(hits) // columns) * cell, len(references) * (BOX + GAP)) + MARGIN
    sheet = Image.new("RGB", (width, height), _WHITE)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * (LINE + 4)), line, _GREY if number else _BLACK, font(_HEADER_SIZE))
    for number, picture in enumerate(references):
        _paste(sheet, picture, MARGIN, top + number * (BOX + GAP), _BLUE)
    for number, hit in enumerate(hits):
        _draw_hit(sheet, hit, number, start + number % columns * (BOX + GAP), top + number // columns * cell)
    return sheet


def _draw_hit(sheet: Image.Image, hit: Hit, number: int, x: int, y: int) -> None:
    draw = ImageDraw.Draw(sheet)
    try:
        _paste(sheet, open_rgb(Path(hit.path), upright=True), x, y)
    except (FileNotFoundError, ValueError):
        draw.text((x + 8, y + 8), "the file is gone", _GREY, font(12))
        draw.rectangle((x, y, x + BOX - 1, y + BOX - 1), outline=_GREY)
    more = f", {len(hit.duplicates)} more like it" if hit.duplicates else ""
    draw.text((x, y + BOX + 2), f"{number + 1}.  {hit.score:.3f}{more}", _BLACK, font(12))
    draw.text((x, y + BOX + 2 + LINE), _shortened(Path(hit.path).name), _GREY, font(11))


def _paste(sheet: Image.Image, picture: Image.Image, x: int, y: int, frame: str = "#cccccc") -> None:
    scale = min((BOX - 2) / picture.width, (BOX - 2) / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (x + (BOX - size[0]) // 2, y + (BOX - size[1]) // 2))
    ImageDraw.Draw(sheet).rectangle((x, y, x + BOX - 1, y + BOX - 1), outline=frame, width=1 if frame != _BLUE else 3)


def _shortened(name: str) -> str:
    """Return a file name that fits below a picture: its middle left out where it is too long."""
    name = "".join(character if character.isprintable() else "?" for character in name)
    shown, kept = name, len(name)
    while font(11).getlength(shown) > BOX and kept > 4:
        kept -= 2
        shown = f"{name[: kept // 2]}…{name[-(kept // 2) :]}"
    return shown
