"""The command ``lavis-cir search``: ranks the pictures of an index for pictures, a text, or both."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis_cir_plugin.search.questions import Answer

_EXAMPLE = """examples:
  lavis-cir search my_index --image shirt.jpg --text "with longer sleeves"
  lavis-cir search my_index --text "a red dress" --where "price < 50 and brand = 'x'" --sheet out.png
  lavis-cir search http://localhost:6333/photos --text "a red dress"
  lavis-cir search my_index --image a.jpg --paths -k 100 | xargs -d '\\n' cp -t found/
"""


def add_command(subparsers: Any) -> None:
    """Add the sub-command; what it needs is imported when it runs."""
    parser = subparsers.add_parser(
        "search",
        help="search an index by pictures and words",
        description="Search an index by pictures, words, or both.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("index", metavar="INDEX", help="the folder that lavis-cir index made, or the URL of its --to")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="reference; may be given again")
    parser.add_argument("--text", help="what to change, or what to look for where there is no picture")
    parser.add_argument("-k", type=int, default=10, help="how many results (%(default)s)")
    parser.add_argument(
        "--image-weight", type=float, default=0.5, metavar="W",
        help="0: the text alone, 0.5: what the model makes of both, 1: the pictures alone (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--weights", type=float, nargs="+", metavar="W", help="one for each --image (equal)")
    parser.add_argument("--without", metavar="TEXT", help="what results should not show")
    parser.add_argument("--without-weight", type=float, default=0.5, metavar="W", help="how strongly (%(default)s)")
    parser.add_argument("--where", metavar="CONDITION", help="on your columns, such as \"price < 50 and brand = 'x'\"")
    parser.add_argument("--min-score", type=float, metavar="COSINE", help="leave out what scores less")
    parser.add_argument("--all", action="store_true", help="show near-duplicates one by one")
    parser.add_argument("--keep-reference", action="store_true", help="also find the reference's own file")
    parser.add_argument("--exact", action="store_true", help="scan every picture, where candidates would be looked at")
    parser.add_argument("--model", help="what made the index, if it is not where it was")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--sheet", metavar="FILE.png", help="also draw the results")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print one JSON object")
    shown.add_argument("--paths", action="store_true", help="print the paths alone, best first")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.sheet and not args.sheet.lower().endswith(".png"):
        raise ValueError(f"--sheet {args.sheet}: the picture is a PNG; choose a name that ends in .png.")

    from lavis_cir_plugin.search.encoder import load_encoder
    from lavis_cir_plugin.search.engine import open_index
    from lavis_cir_plugin.search.qdrant_index import open_collection

    encoder = load_encoder(args.model, args.device) if args.model else None
    opens = open_collection if "://" in args.index else open_index
    index = opens(args.index, encoder, args.device)
    answer = index.search(
        args.image,
        args.text,
        args.k,
        image_weight=args.image_weight,
        weights=args.weights,
        without=args.without,
        without_weight=args.without_weight,
        where=args.where,
        min_score=args.min_score,
        fold=not args.all,
        keep_references=args.keep_reference,
        exact=args.exact,
    )
    if args.sheet:
        _draw(args, answer)
    if args.json:
        from lavis_cir_plugin.search.answers import as_json

        print(json.dumps(as_json(answer), ensure_ascii=False, indent=1))
    elif args.paths:
        for hit in answer.hits:
            print(hit.path)
    else:
        from lavis_cir_plugin.search.answers import as_lines

        lines, notes = as_lines(answer)
        print("\n".join(lines))
        print("\n".join(notes), file=sys.stderr)


def _draw(args: argparse.Namespace, answer: Answer) -> None:
    from pathlib import Path

    from lavis_cir_plugin.benchmarks.images import open_rgb
    from lavis_cir_plugin.core.atomic_files import replace_file
    from lavis_cir_plugin.search.answers import question
    from lavis_cir_plugin.search.sheet import draw_answer

    pictures = [open_rgb(Path(path).expanduser(), upright=True) for path in args.image]
    sheet = draw_answer(answer, pictures, question(args.text, args.without, args.where))
    replace_file(Path(args.sheet).expanduser(), sheet)
