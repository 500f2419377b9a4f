"""The command ``lavis-cir triplets``: makes synthetic triplets from captions, and draws some of them."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import Any

from lavis_cir_plugin.core.atomic_files import check_writable, replace_file
from lavis_cir_plugin.core.error_messages import option


def add_command(subparsers: Any) -> None:
    """Add ``lavis-cir triplets`` to the sub-commands."""
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
    parser.add_argument("--count", type=int, default=10_000, help="triplets to make, at most (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same file (default: 0)")
    parser.add_argument(
        "--similarity",
        type=float,
        help="least cosine of an edited and a target's caption (default 0.7, CLIP: 0.9)",
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
    _check(args, path, output, images, sheet)

    from lavis_cir_plugin.methods.tscir.synthetic_triplets import ClipTextFeatures, make_triplets
    from lavis_cir_plugin.methods.tscir.triplets_file import (
        as_json_lines,
        read_image_captions,
        triplets_sheet,
        triplets_summary,
    )

    captions = read_image_captions(path)
    features = ClipTextFeatures(args.clip_model, args.pretrained) if args.clip_model else None
    made = make_triplets(captions, features, args.count, args.seed, args.similarity)
    print(triplets_summary(captions, made, args.count))
    if not made.triplets:
        raise ValueError(
            f"no triplet was made of {path}: give more captions, or several per image, or lower --similarity."
        )
    picture = triplets_sheet(captions, made.triplets, images, args.seed) if sheet and images else b""
    replace_file(output, as_json_lines(captions, made.triplets).encode())
    if sheet:
        replace_file(sheet, picture)
    print(f"Written: {output}{f' and {sheet}' if sheet else ''}")
    if images is None:
        print("Train with these options, in place of IMAGES the folder of the images:")
    else:
        print("Train with these options:")
    section = "datasets.triplets.build_info"
    options = [option(f"{section}.root", os.path.abspath(output.parent))]
    if images is None:
        options.append(f"{section}.images=IMAGES")
    elif images.resolve() != (output.parent / "images").resolve():
        options.append(option(f"{section}.images", os.path.abspath(images)))
    print(shlex.join(["--options", *options]))


def _check(args: argparse.Namespace, captions: Path, output: Path, images: Path | None, sheet: Path | None) -> None:
    if args.count < 1:
        raise ValueError(f"--count must be a whole number >= 1, got {args.count}.")
    if args.similarity is not None and not -1 <= args.similarity <= 1:
        raise ValueError(f"--similarity must lie in [-1, 1], got {args.similarity}.")
    if bool(args.pretrained) != bool(args.clip_model):
        raise ValueError("--clip-model and --pretrained need each other: a model of open_clip, and its tag or file.")
    if output.exists() and not args.overwrite:
        raise ValueError(f"{output} exists; choose another --output, or give --overwrite.")
    if output.resolve() == captions.resolve():
        raise ValueError(f"{output} is the file of captions itself, which would be lost; take another --output.")
    if images is not None and not images.is_dir():
        raise ValueError(f"--images {images} is no folder; give the folder of the images.")
    if sheet is not None and images is None:
        raise ValueError("--contact-sheet needs --images, the folder of the images.")
    if sheet is not None and sheet.suffix != ".png":
        raise ValueError(f"--contact-sheet {sheet}: the picture is a PNG; choose a name that ends in .png.")
    if sheet is not None and images is not None and images.resolve() in sheet.resolve().parents:
        raise ValueError(f"--contact-sheet {sheet} lies inside --images {images}, as one more image; choose another.")
    for place in filter(None, (output, sheet)):
        check_writable(place)
