"""The command ``lavis-cir report``: writes one HTML file over one run or several, which needs no network."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def add_command(subparsers: Any) -> None:
    """Add ``lavis-cir report``."""
    parser = subparsers.add_parser("report", help="write runs as one HTML file, several of them side by side")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, which it named at its end")
    parser.add_argument("--output", default="report.html", help="the file (default: report.html)")
    parser.add_argument(
        "--queries", type=int, default=4, help="queries of each kind and group that are shown (default: 4; 0: none)"
    )
    parser.add_argument("--images", type=int, default=8, help="images of each ranking, at most 10 (default: 8)")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    output = Path(os.path.expanduser(args.output))
    if output.suffix not in (".html", ".htm"):
        raise ValueError(f"--output {output}: the report is a page; choose a name that ends in .html.")
    if args.queries < 0:
        raise ValueError(f"--queries must be a whole number >= 0, got {args.queries}.")

    from lavis_cir_plugin.core.atomic_files import replace_file
    from lavis_cir_plugin.core.error_messages import size_text
    from lavis_cir_plugin.report.html_parts import Thumbnails
    from lavis_cir_plugin.report.query_results import TOP
    from lavis_cir_plugin.report.run_record import folders_of_runs
    from lavis_cir_plugin.report.run_report import read_run, report

    if not 1 <= args.images <= TOP:
        raise ValueError(f"--images must be a whole number from 1 to {TOP}, got {args.images}.")
    folders = folders_of_runs(args.runs)
    embed = Thumbnails()
    page = report([read_run(folder) for folder in folders], args.queries, args.images, embed)
    content = page.encode(errors="replace")  # the name of a folder may be no text
    replace_file(output, content)
    lacking = f"; {len(embed.missing)} pictures could not be read, which it says" if embed.missing else ""
    print(f"Written: {output} ({size_text(len(content))}){lacking}")
