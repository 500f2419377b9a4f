"""Draws an answer as one picture: the question and its pictures, and the results with their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lavis_cir_plugin.benchmarks.images import decode_rgb
from lavis_cir_plugin.report.sheet_layout import BLUE, GREY, Cell, Column, Picture, Words, draw_sheet, font
from lavis_cir_plugin.search.originals import ChangedError, open_indexed
from lavis_cir_plugin.search.questions import Answer, Hit

BOX = (180, 200)
"""Width and height of a picture's box, in pixels."""

COLUMNS = 5
MOST_SHOWN = 200
"""Results that a sheet shows, at most; more would make a picture that no viewer opens."""

_SPACE = 36  # between the question's pictures and the results
_WIDEST_TITLE = 900


def draw_answer(answer: Answer, references: Sequence[Image.Image], question: Sequence[str]) -> bytes:
    """Draw an answer as a PNG: the question's pictures on the left, the first `MOST_SHOWN` results on the right.

    Args:
        answer: The answer; a picture whose file is gone, changed or damaged is said to be so.
        references: RGB pictures of the question.
        question: At least one line that says what was asked.
    """
    hits = answer.hits[:MOST_SHOWN]
    title, notes = question[0], list(question[1:])
    if font(26).getlength(title) > _WIDEST_TITLE:
        title, notes = "Search", list(question)
    if len(hits) < len(answer.hits):
        notes.append(f"the first {len(hits)} of {len(answer.hits):,} results")
    if not hits:
        notes.append("nothing found")
    lines = [hits[start : start + COLUMNS] for start in range(0, len(hits), COLUMNS)]
    columns = [Column("", BOX[0]) for _ in range(COLUMNS)]
    results: list[list[Cell]] = [
        [_result(hit, 1 + COLUMNS * row + place) for place, hit in enumerate(line)] for row, line in enumerate(lines)
    ]
    if not references:
        return draw_sheet(title, notes, columns, results, BOX)
    rows: list[list[Cell]] = []
    for number in range(max(len(results), len(references))):
        reference = Picture(references[number], "asked with", BLUE) if number < len(references) else None
        rows.append([reference, *(results[number] if number < len(results) else [])])
    columns[0] = Column("", BOX[0], _SPACE)
    return draw_sheet(title, notes, [Column("", BOX[0]), *columns], rows, BOX)


def _result(hit: Hit, number: int) -> Cell:
    more = f" (+{len(hit.duplicates)} alike)" if hit.duplicates else ""
    label = _shortened(f"{number}.  {hit.score:.3f}{more}  ", Path(hit.path).name)
    try:
        with open_indexed(hit.picture) as file:
            return Picture(decode_rgb(file.read(), hit.path, upright=True), label)
    except ChangedError:
        return Words("the file is gone or has changed", GREY, label)
    except ValueError:
        return Words("the file is damaged", GREY, label)


def _shortened(start: str, name: str) -> str:
    """Return a label that fits below a picture: the middle of the file's name is left out where it is too long."""
    name = "".join(character if character.isprintable() else "?" for character in name)
    shown, kept = name, len(name)
    while font(13).getlength(start + shown) > BOX[0] and kept > 4:
        kept -= 2
        shown = f"{name[: kept // 2]}…{name[-(kept // 2) :]}"
    return start + shown
