"""Contact sheets of training queries with the negatives that were mined for them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

from lavis_cir_plugin.core.atomic_files import replace_file
from lavis_cir_plugin.data.negatives import NegativeSets
from lavis_cir_plugin.report.sheet_layout import (
    GREEN,
    ORANGE,
    SECTION_GAP,
    TEXT_WIDTH,
    Cell,
    Column,
    Picture,
    Words,
    draw_sheet,
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
    layout = [
        Column("reference = positive" if sets.about.get("positive") == "image" else "reference"),
        Column("modification text", TEXT_WIDTH),
        Column("target"),
        Column("negatives", space=SECTION_GAP),
        *[Column()] * (columns - 1),
    ]
    lines = [_line(sets, index, columns) for index in chosen]
    return replace_file(Path(path), draw_sheet(title, notes, layout, lines))


def _line(sets: NegativeSets, index: int, columns: int) -> list[Cell]:
    """Return the cells of one triplet: reference, text, target and its first negatives."""
    reference, target = int(sets.references[index]), int(sets.targets[index])

    def picture(image: int, label: str = "", frame: str = "") -> Picture:
        return Picture(Path(sets.paths[image]), label, frame, bool(sets.about.get("upright", False)))

    own = _rank_and_score(int(sets.target_ranks[index]), float(sets.target_scores[index]))
    labels = (own, "") if sets.about.get("positive") == "image" else ("", own)
    line: list[Cell] = [picture(reference, labels[0]), Words(sets.texts[index]), picture(target, labels[1], GREEN)]
    for column, image in enumerate(sets.negatives[index, :columns].tolist()):
        if image < 0:
            break
        label = _rank_and_score(int(sets.ranks[index, column]), float(sets.scores[index, column]))
        line.append(picture(image, label + (" (reference)" if image == reference else "")))
    return line if sets.counts[index] else [*line, Words("none passes the rules", ORANGE)]


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
