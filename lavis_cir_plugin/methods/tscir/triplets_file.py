"""Captions read from a file, synthetic triplets written into one, and a contact sheet of them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from lavis_cir_plugin.benchmarks.captions import caption_records
from lavis_cir_plugin.methods.tscir.synthetic_triplets import Captions, Made, SyntheticTriplet
from lavis_cir_plugin.report.sheet_layout import TEXT_WIDTH, Cell, Column, Picture, Words, draw_sheet

SHEET_ROWS = 12
"""Number of triplets on a contact sheet."""


# -- files -----------------------------------------------------------------------------------------------------------


def read_captions(path: Path) -> Captions:
    """Read captions from any file that the data set ``image_captions`` reads.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be read, holds no captions, or a record has no image or caption.
    """
    numbers: dict[str, int] = {}
    texts, images = [], []
    known: set[tuple[int, str]] = set()
    for record in caption_records(path, remedy="name a file of captions"):
        for text in record.captions:
            image = numbers.setdefault(record.image, len(numbers))
            if (image, text) not in known:
                known.add((image, text))
                texts.append(text)
                images.append(image)
    return Captions(list(numbers), texts, images)


def as_lines(captions: Captions, triplets: Sequence[SyntheticTriplet]) -> str:
    """Write triplets as JSON lines of the data set ``triplets``."""
    return "".join(
        json.dumps(
            {
                "reference": captions.names[triplet.edit.image],
                "text": triplet.edit.text,
                "target": captions.names[triplet.target],
                "reference_caption": captions.texts[triplet.edit.row],
            },
            ensure_ascii=False,
        )
        + "\n"
        for triplet in triplets
    )


# -- what was made ---------------------------------------------------------------------------------------------------


def summary(captions: Captions, made: Made, count: int) -> str:
    """Say what was made, what was refused and why, and show examples."""
    lines = [
        f"{len(made.triplets):,} triplets of {count:,} wanted, from {len(captions.texts):,} captions of "
        f"{len(captions.names):,} images; {made.tried:,} edits tried",
        *(f"  {number:>9,} refused: {reason}" for reason, number in made.refused.most_common()),
    ]
    for triplet in made.triplets[:: max(1, len(made.triplets) // 5)][:5]:
        lines += [
            f'  "{captions.texts[triplet.edit.row]}"',
            f'    {triplet.edit.text}: "{captions.texts[triplet.target_row]}" ({triplet.similarity:.2f})',
        ]
    return "\n".join(lines)


def contact_sheet(captions: Captions, triplets: Sequence[SyntheticTriplet], images: Path, seed: int) -> bytes:
    """Draw some triplets, chosen at random: reference, modification, target, and both captions; a PNG.

    Raises:
        FileNotFoundError, ValueError: a picture is missing or broken.
    """
    chosen = sorted(random.Random(seed).sample(range(len(triplets)), min(SHEET_ROWS, len(triplets))))
    layout = [
        Column("reference"),
        Column("modification text", TEXT_WIDTH),
        Column("target"),
        Column("caption of the reference", TEXT_WIDTH),
        Column("caption of the target", TEXT_WIDTH),
    ]
    lines: list[list[Cell]] = []
    for triplet in map(triplets.__getitem__, chosen):
        reference, target = (
            Picture(images / captions.names[image], upright=True) for image in (triplet.edit.image, triplet.target)
        )
        text = Words(triplet.edit.text, foot=f"similarity {triplet.similarity:.2f}")
        own, others = (Words(captions.texts[row]) for row in (triplet.edit.row, triplet.target_row))
        lines.append([reference, text, target, own, others])
    note = f"{len(chosen)} of {len(triplets):,}, chosen at random with seed {seed}"
    return draw_sheet("Synthetic triplets", [note], layout, lines)
