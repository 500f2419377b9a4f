"""``lavis-cir triplets``: synthetic triplets from captions, with a contact sheet of them."""

from __future__ import annotations

import argparse
import io
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavis_cir_plugin.benchmarks.captions import caption_records
from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.core.whole_or_nothing import replace_file
from lavis_cir_plugin.methods.tscir.synthetic_triplets import (
    CLIP_SIMILARITY,
    COUNT,
    WORDS_SIMILARITY,
    Captions,
    ClipWords,
    Made,
    SyntheticTriplet,
    make_triplets,
)
from lavis_cir_plugin.report import sheet_layout

SHEET_ROWS, _CAPTION_WIDTH = 12, 330
"""Triplets on a contact sheet, and pixels."""


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


# -- the command -----------------------------------------------------------------------------------------------------


def add_command(subparsers: Any) -> None:
    """Add ``lavis-cir triplets``."""
    parser = subparsers.add_parser("triplets", help="make training triplets from captioned images")
    parser.add_argument(
        "captions",
        metavar="CAPTIONS",
        help='JSON lines {"image": ..., "caption": ...}, or a caption annotation of LAVIS; a caption may be a list',
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where train.jsonl is written")
    parser.add_argument(
        "--images", metavar="FOLDER", help="the images; only the contact sheet and the closing line need it"
    )
    parser.add_argument("--count", type=int, default=COUNT, help=f"triplets to make, at most (default: {COUNT})")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same file (default: 0)")
    parser.add_argument(
        "--similarity",
        type=float,
        help=f"least cosine of an edited and a target's caption (default {WORDS_SIMILARITY}, CLIP: {CLIP_SIMILARITY})",
    )
    parser.add_argument(
        "--clip-model", metavar="NAME", help="compare captions by this open_clip model; default: by words"
    )
    parser.add_argument("--pretrained", metavar="TAG_OR_FILE", help="its weights")
    parser.add_argument("--contact-sheet", metavar="PNG", help="picture of some of the triplets; needs --images")
    parser.add_argument("--overwrite", action="store_true", help="replace a train.jsonl that is there")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    path, output = Path(os.path.expanduser(args.captions)), Path(os.path.expanduser(args.output)) / "train.jsonl"
    images = Path(os.path.expanduser(args.images)) if args.images else None
    sheet = Path(os.path.expanduser(args.contact_sheet)) if args.contact_sheet else None
    _check(args, output, images, sheet)
    captions = read_captions(path)
    features = ClipWords(args.clip_model, args.pretrained) if args.clip_model else None
    made = make_triplets(captions, features, args.count, args.seed, args.similarity)
    print(summary(captions, made, args.count))
    if not made.triplets:
        raise ValueError(
            f"no triplet was made of {path}: give more captions, or several per image, or lower --similarity."
        )
    picture = contact_sheet(captions, made.triplets, images, args.seed) if sheet and images else b""
    replace_file(output, as_lines(captions, made.triplets).encode())
    if sheet:
        replace_file(sheet, picture)
    keys = f"datasets.triplets.build_info.root={output.parent}"
    if images is None or images.resolve() != (output.parent / "images").resolve():
        keys += f" and .images={images or 'the folder of the images'}"
    print(f"Written: {output}{f' and {sheet}' if sheet else ''}; train with {keys}")


def _check(args: argparse.Namespace, output: Path, images: Path | None, sheet: Path | None) -> None:
    if args.count < 1:
        raise ValueError(f"--count must be a whole number >= 1, got {args.count}.")
    if args.similarity is not None and not -1 <= args.similarity <= 1:
        raise ValueError(f"--similarity must lie in [-1, 1], got {args.similarity}.")
    if bool(args.pretrained) != bool(args.clip_model):
        raise ValueError("--clip-model and --pretrained need each other: a model of open_clip, and its tag or file.")
    if output.exists() and not args.overwrite:
        raise ValueError(f"{output} exists; choose another --output, or give --overwrite.")
    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images} is no folder; give the folder of the images.")
    if sheet is not None and images is None:
        raise ValueError("--contact-sheet needs --images, the folder of the images.")
    if sheet is not None and sheet.suffix != ".png":
        raise ValueError(f"--contact-sheet {sheet}: the picture is a PNG; choose a name that ends in .png.")


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
            open_rgb(path)  # raises a sentence
            sheet_layout.draw_picture(sheet, (left, y), path)
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
