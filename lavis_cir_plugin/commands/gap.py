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

    from lavis_cir_plugin.core.atomic_files import check_writable, replace_file
    from lavis_cir_plugin.core.error_messages import printable
    from lavis_cir_plugin.methods.wrf4cir.generalisation_gap import (
        draw_gap,
        gap_table,
        is_points_csv,
        logged_epochs,
        points_csv,
        read_run,
        selection_metric,
        with_losses,
    )
    from lavis_cir_plugin.report.run_record import folders_of_runs, told_apart

    points = output.with_suffix(".csv")
    check_writable(output)
    check_writable(points)
    if points.exists() and not is_points_csv(points):
        raise ValueError(f"--output {output}: its numbers would replace {points}, another kind of file; take another.")
    folders = folders_of_runs(args.runs)
    labels = [printable(name) for name in told_apart(folders)]
    metric = args.metric or selection_metric(logged_epochs(folders[0])["val"])
    runs = [read_run(folder, metric, label) for folder, label in zip(folders, labels)]
    if args.batches:
        runs = [with_losses(run, folder, args.batches) for run, folder in zip(runs, folders)]
    draw_gap(runs, metric, output)
    replace_file(points, points_csv(runs, metric).encode())
    notes = [f"{run.label}: {note}" for run in runs for note in run.notes]
    written = f"Written: {output} and {points.name}"
    print("\n".join([gap_table(runs, metric), *(["", *notes] if notes else []), "", written]))
