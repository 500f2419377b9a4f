"""Contact sheets of training queries with the negatives that were mined for them."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from lavis_cir_plugin.core.whole_or_nothing import replace_file
from lavis_cir_plugin.data.negatives import NegativeSets
from lavis_cir_plugin.report.sheet_layout import (
    GAP,
    GREEN,
    GREY,
    LABEL_HEIGHT,
    MARGIN,
    ORANGE,
    PICTURE,
    SECTION_GAP,
    TEXT_SIZE,
    TEXT_WIDTH,
    WHITE,
    draw_header,
    draw_picture,
    draw_text,
    font,
)


def negatives_sheet(sets: NegativeSets, path: str | Path, rows: int = 8, columns: int = 8, seed: int = 0) -> Path:
    """Draw triplets with the negatives mined for them, as a PNG, and return ``path``.

    A line shows a triplet's reference image, modification text, target in a green frame, and first ``columns``
    negatives, hardest first. Below each picture stand its rank in the mined ranking, from 1, and its score. Random
    negatives have neither. ``min(rows, N)`` triplets are drawn at random with ``seed``.

    Raises:
        FileNotFoundError: If pictures are no longer where they were when the negatives were mined.
        ValueError: If a picture cannot be read.
        OSError: If the sheet cannot be written.
    """
    chosen = sorted(random.Random(seed).sample(range(len(sets.targets)), min(rows, len(sets.targets))))
    columns = min(columns, sets.negatives.shape[1])
    _check_pictures(sets, chosen, columns)
    text_left = MARGIN + PICTURE[0] + GAP
    target_left = text_left + TEXT_WIDTH + GAP
    first_left = target_left + PICTURE[0] + SECTION_GAP
    row_height = PICTURE[1] + LABEL_HEIGHT + GAP
    width = first_left + columns * (PICTURE[0] + GAP) - GAP + MARGIN
    settings = ", ".join(f"{key} {json.dumps(value)}" for key, value in sets.about.get("negatives", {}).items())
    notes = [
        f"Shown: {len(chosen)} of {len(sets.targets):,} triplets, chosen at random with seed {seed}, with the hardest "
        f"{columns} of up to {sets.negatives.shape[1]} negatives; gallery of {len(sets.names):,} training images",
        f"In all: {sets.summary()}",
        *([f"run.negatives: {settings}".replace('"', "")] if settings else []),
        "Below each picture: its rank among all that was ranked, from 1 (none: lower than was searched), and its score",
    ]
    name, way = sets.about.get("dataset", "a data set"), "mined" if sets.is_mined else "drawn"
    title = f"Negatives of {name}, {way} at the beginning of epoch {sets.about.get('epoch', 0)}"
    header = draw_header(title, notes, width)
    sheet = Image.new("RGB", (width, header.height + LABEL_HEIGHT + len(chosen) * row_height + MARGIN - GAP), WHITE)
    sheet.paste(header, (0, 0))
    draw = ImageDraw.Draw(sheet)
    upright = bool(sets.about.get("upright", False))
    right_is_reference = sets.about.get("positive") == "image"
    titles = {
        MARGIN: "reference = positive" if right_is_reference else "reference",
        text_left: "modification text",
        target_left: "target",
        first_left: "negatives",
    }
    for x, word in titles.items():
        draw.text((x, header.height - 4), word, GREY, font(13))
    for row, index in enumerate(chosen):
        y = header.height + LABEL_HEIGHT + row * row_height
        reference, target = int(sets.references[index]), int(sets.targets[index])
        draw_text(draw, (text_left, y), sets.texts[index])
        own = _rank_and_score(int(sets.target_ranks[index]), float(sets.target_scores[index]))
        labels = (own, "") if right_is_reference else ("", own)
        draw_picture(sheet, (MARGIN, y), Path(sets.paths[reference]), labels[0], "", upright)
        draw_picture(sheet, (target_left, y), Path(sets.paths[target]), labels[1], GREEN, upright)
        for column, image in enumerate(sets.negatives[index, :columns].tolist()):
            if image < 0:
                break
            label = _rank_and_score(int(sets.ranks[index, column]), float(sets.scores[index, column]))
            label += " (reference)" if image == reference else ""
            place = (first_left + column * (PICTURE[0] + GAP), y)
            draw_picture(sheet, place, Path(sets.paths[image]), label, "", upright)
        if sets.counts[index] == 0:
            draw.text((first_left, y + PICTURE[1] / 2), "none passes the rules", ORANGE, font(TEXT_SIZE), anchor="lm")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return replace_file(Path(path), buffer.getvalue())


def _check_pictures(sets: NegativeSets, triplets: Sequence[int], columns: int) -> None:
    images = {int(image) for rows in (sets.references, sets.targets) for image in rows[triplets]}
    images.update(image for image in sets.negatives[triplets, :columns].flatten().tolist() if image >= 0)
    moved = [sets.paths[image] for image in sorted(images) if not Path(sets.paths[image]).is_file()]
    if moved:
        raise FileNotFoundError(
            f"{len(moved)} of {len(images)} pictures are not where they were when the negatives were mined (first: "
            f"{moved[0]}); put them back, or mine again."
        )


def _rank_and_score(rank: int, score: float) -> str:
    return ", ".join([*([f"{rank + 1:,}"] if rank >= 0 else []), *([f"{score:.3f}"] if math.isfinite(score) else [])])
