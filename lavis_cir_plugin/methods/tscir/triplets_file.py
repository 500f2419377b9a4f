"""Files of synthetic triplets: captions are read, triplets are written, summed up in words and drawn on a sheet."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

from lavis_cir_plugin.benchmarks.captions import caption_records
from lavis_cir_plugin.methods.tscir.synthetic_triplets import ImageCaptions, MadeTriplets, SyntheticTriplet
from lavis_cir_plugin.report import sheet_layout

SHEET_ROWS, _CAPTION_WIDTH = 12, 330
"""Number of triplets on a contact sheet, and width of the captions in pixels."""


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
    from PIL import Image, ImageDraw

    chosen = sorted(random.Random(seed).sample(range(len(triplets)), min(SHEET_ROWS, len(triplets))))
    target_left = sheet_layout.MARGIN + sheet_layout.PICTURE[0] + 2 * sheet_layout.GAP + sheet_layout.TEXT_WIDTH
    caption_left = target_left + sheet_layout.PICTURE[0] + sheet_layout.GAP
    row_height = sheet_layout.PICTURE[1] + sheet_layout.LABEL_HEIGHT + sheet_layout.GAP
    width = caption_left + _CAPTION_WIDTH + sheet_layout.MARGIN
    top = sheet_layout.MARGIN + 72 + sheet_layout.LABEL_HEIGHT
    sheet = Image.new("RGB", (width, top + len(chosen) * row_height + sheet_layout.MARGIN), sheet_layout.WHITE)
    draw = ImageDraw.Draw(sheet)
    note = f"{len(chosen)} of {len(triplets):,}, chosen at random with seed {seed}"
    draw.text(
        (sheet_layout.MARGIN, sheet_layout.MARGIN), "Synthetic triplets", sheet_layout.BLACK, sheet_layout.font(26)
    )
    draw.text((sheet_layout.MARGIN, sheet_layout.MARGIN + 40), note, sheet_layout.GREY, sheet_layout.font(15))
    text_left = sheet_layout.MARGIN + sheet_layout.PICTURE[0] + sheet_layout.GAP
    titles = {sheet_layout.MARGIN: "reference", text_left: "modification text", target_left: "target"}
    for x, title in {**titles, caption_left: "captions of reference and target"}.items():
        draw.text((x, top - sheet_layout.LABEL_HEIGHT), title, sheet_layout.GREY, sheet_layout.font(13))
    for number, index in enumerate(chosen):
        triplet, y = triplets[index], top + number * row_height
        for left, image in ((sheet_layout.MARGIN, triplet.edit.image), (target_left, triplet.target)):
            path = images / captions.names[image]
            sheet_layout.draw_picture(sheet, (left, y), path, "", "", True)
        sheet_layout.draw_text(draw, (text_left, y), triplet.edit.text)
        for step, row in enumerate((triplet.edit.row, triplet.target_row)):
            lines = sheet_layout.wrapped(captions.texts[row], 14, _CAPTION_WIDTH)[:3]
            place = (caption_left, y + step * sheet_layout.PICTURE[1] // 2)
            draw.text(place, "\n".join(lines), sheet_layout.GREY, sheet_layout.font(14), spacing=4)
        draw.text(
            (text_left, y + sheet_layout.PICTURE[1]),
            f"similarity {triplet.similarity:.2f}",
            sheet_layout.GREY,
            sheet_layout.font(13),
            anchor="ls",
        )
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
