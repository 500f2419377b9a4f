"""Files of synthetic triplets: captions are read, triplets are written, summed up in words and drawn on a sheet."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from lavis_cir_plugin.benchmarks.captions import caption_records
from lavis_cir_plugin.methods.tscir.synthetic_triplets import ImageCaptions, MadeTriplets, SyntheticTriplet
from lavis_cir_plugin.report.sheet_layout import TEXT_WIDTH, Cell, Column, Picture, Words, draw_sheet

SHEET_ROWS = 12
"""Number of triplets on a contact sheet."""


# -- files -----------------------------------------------------------------------------------------------------------


def read_image_captions(path: Path) -> ImageCaptions:
    """Read captions from any file that the data set ``image_captions`` can read.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file cannot be read, holds no captions, or a record has no image or caption.
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
    return ImageCaptions(list(numbers), texts, images)


def as_json_lines(captions: ImageCaptions, triplets: Sequence[SyntheticTriplet]) -> str:
    """Return triplets as JSON lines, in the format of the data set ``triplets``."""
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


# -- summary and contact sheet ---------------------------------------------------------------------------------------


def triplets_summary(captions: ImageCaptions, made: MadeTriplets, count: int) -> str:
    """Return lines with the number of triplets, the numbers of refused edits by reason, and examples."""
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


def triplets_sheet(captions: ImageCaptions, triplets: Sequence[SyntheticTriplet], images: Path, seed: int) -> bytes:
    """Return a PNG of randomly chosen triplets: reference, modification text, target, and both captions.

    Raises:
        FileNotFoundError: If a picture is missing.
        ValueError: If a picture cannot be read.
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
