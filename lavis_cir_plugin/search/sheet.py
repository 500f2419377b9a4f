"""An answer as one picture: references and words on the left, results with their scores on the right."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.core.whole_or_nothing import replace_file
from lavis_cir_plugin.report.sheet_layout import font, wrapped
from lavis_cir_plugin.search.engine import Answer

BOX, MARGIN, GAP, LINE = 200, 24, 12, 18
COLUMNS = 5
_BLACK, _GREY, _WHITE, _BLUE = "#111111", "#666666", "#ffffff", "#1f6feb"


def draw_sheet(answer: Answer, references: Sequence[Image.Image], question: Sequence[str], path: str | Path) -> Path:
    """Draw an answer and write it as PNG, whole or not at all.

    Args:
        answer: To be drawn; a picture whose file is gone is said to be so.
        references: RGB pictures of the question.
        question: Lines that say what was asked.
        path: Of the file.

    Returns:
        The path.

    Raises:
        OSError: it cannot be written.
    """
    left = BOX if references else 0
    rows = -(-max(1, len(answer.hits)) // COLUMNS)
    cell = BOX + 2 * LINE + GAP
    notes = [
        line for text in question for line in wrapped(text, 15, 2 * MARGIN + left + COLUMNS * (BOX + GAP) - 3 * MARGIN)
    ]
    top = MARGIN + len(notes) * (LINE + 4) + GAP
    width = 2 * MARGIN + (left + 3 * GAP if left else 0) + COLUMNS * (BOX + GAP) - GAP
    height = top + max(rows * cell, len(references) * (BOX + GAP)) + MARGIN
    sheet = Image.new("RGB", (width, height), _WHITE)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(notes):
        draw.text((MARGIN, MARGIN + number * (LINE + 4)), line, _GREY if number else _BLACK, font(15))
    for number, picture in enumerate(references):
        _paste(sheet, picture, MARGIN, top + number * (BOX + GAP), _BLUE)
    start = MARGIN + (left + 3 * GAP if left else 0)
    for number, hit in enumerate(answer.hits):
        x, y = start + number % COLUMNS * (BOX + GAP), top + number // COLUMNS * cell
        try:
            _paste(sheet, open_rgb(Path(hit.path), upright=True), x, y)
        except (FileNotFoundError, ValueError):
            draw.text((x + 8, y + 8), "the file is gone", _GREY, font(12))
            draw.rectangle((x, y, x + BOX - 1, y + BOX - 1), outline=_GREY)
        more = f", {len(hit.duplicates)} more like it" if hit.duplicates else ""
        draw.text((x, y + BOX + 2), f"{number + 1}.  {hit.score:.3f}{more}", _BLACK, font(12))
        draw.text((x, y + BOX + 2 + LINE), _shortened(Path(hit.path).name), _GREY, font(11))
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return replace_file(Path(path), content.getvalue())


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
