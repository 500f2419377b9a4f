"""The command ``lavis-cir gap``: draws how far runs overfit and how flat their minima are."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def add_command(subparsers: Any) -> None:
    """Add ``lavis-cir gap`` to the sub-commands."""
    parser = subparsers.add_parser(
        "gap", help="draw recall on seen and unseen queries, and the loss around the weights"
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, which it named at its end")
    parser.add_argument("--output", default="gap.png", help="picture; its numbers go to a CSV file beside it")
    parser.add_argument("--metric", help="of validation; by default the one that chose the best checkpoint")
    parser.add_argument(
        "--batches",
        type=int,
        default=4,
        help="training batches for the loss along the perturbation; 0: without that panel, and without the checkpoints",
    )
    parser.set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> None:
    output = Path(os.path.expanduser(args.output))
    if output.suffix != ".png":
        raise ValueError(f"--output {output}: the picture is a PNG; choose a name that ends in .png.")
    if args.batches < 0:
        raise ValueError(f"--batches must be a whole number >= 0, got {args.batches}.")

    from lavis_cir_plugin.core.atomic_files import replace_file
    from lavis_cir_plugin.methods.wrf4cir.generalisation_gap import (
        draw_gap,
        gap_table,
        logged_epochs,
        points_csv,
        read_run,
        selection_metric,
        with_losses,
    )

    folders = [Path(os.path.expanduser(name)) for name in args.runs]
    metric = args.metric or selection_metric(logged_epochs(folders[0])["val"])
    runs = [read_run(folder, metric) for folder in folders]
    if args.batches:
        runs = [with_losses(run, folder, args.batches) for run, folder in zip(runs, folders)]
    draw_gap(runs, metric, output)
    replace_file(output.with_suffix(".csv"), points_csv(runs, metric).encode())
    notes = [f"{run.label}: {note}" for run in runs for note in run.notes]
    written = f"Written: {output} and {output.with_suffix('.csv').name}"
    print("\n".join([gap_table(runs, metric), *(["", *notes] if notes else []), "", written]))
