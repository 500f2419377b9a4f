"""The command ``lavis-cir negatives``: shows the hard negatives that a run has mined, as a picture and in numbers."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any


def add_command(subparsers: Any) -> None:
    """Add ``lavis-cir negatives`` to the sub-commands."""
    parser = subparsers.add_parser("negatives", help="look at the negatives that a retrieval_dpo run has mined")
    parser.add_argument("of", metavar="RUN", help="output folder of a run, or one of its negatives/*.npz")
    parser.add_argument("--epoch", type=int, help="at whose beginning they were mined; by default the last")
    parser.add_argument("--rows", type=int, default=8, help="triplets on the sheet, drawn at random (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of that draw (default: 0)")
    parser.add_argument("--output", help="picture (PNG); by default beside the run's files")
    parser.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> None:
    if args.rows < 1:
        raise ValueError(f"--rows must be a whole number >= 1, got {args.rows}.")
    paths = _files_of(Path(os.path.expanduser(args.of)), args.epoch)
    output = args.output and Path(os.path.expanduser(args.output))
    if output and output.suffix != ".png":
        raise ValueError(f"--output {output}: the picture is a PNG; choose a name that ends in .png.")
    if output and len(paths) > 1:
        raise ValueError(
            f"--output {output} is one picture, and {args.of} has negatives of {len(paths)} data sets; name one of "
            f"{', '.join(map(str, paths))} in place of the run."
        )

    from lavis_cir_plugin.data.negatives import load_negatives, rank_histogram
    from lavis_cir_plugin.methods.retrieval_dpo.negatives_sheet import negatives_sheet

    for path in paths:
        sets = load_negatives(path)
        print(f"{path}\n  {sets.summary()}")
        for label, share in rank_histogram(sets).items():
            print(f"  {'rank ' + label:<13}{share:6.1f} %  {'#' * round(share / 2)}".rstrip())
        sheet = negatives_sheet(sets, output or path.with_suffix(".png"), args.rows, seed=args.seed)
        print(f"  written: {sheet}")


def _files_of(run: Path, epoch: int | None) -> list[Path]:
    """Return the file of negatives of each of a run's data sets; the path of a file is returned itself."""
    if run.is_file() and epoch is not None:
        raise ValueError(f"--epoch {epoch} chooses among the files of a run, and {run} is a file; leave it out.")
    if run.is_file():
        return [run]
    if not run.is_dir():
        raise FileNotFoundError(f"{run} does not exist; name the output folder of a retrieval_dpo run.")
    found: dict[str, dict[int, Path]] = {}
    for path in sorted((run / "negatives").glob("*.npz")):
        name = re.fullmatch(r"(.+)_(\d{3,})", path.stem)
        if name:
            found.setdefault(name[1], {})[int(name[2])] = path
    if not found:
        inside = sorted({path.parent.parent.name for path in run.glob("*/negatives/*.npz")})
        hint = f"; name one of the runs in it that have ({', '.join(inside)})" if inside else ""
        raise FileNotFoundError(f"{run} has no negatives/*.npz, which a run of the task retrieval_dpo writes{hint}.")
    if epoch is None:
        return [by_epoch[max(by_epoch)] for by_epoch in found.values()]
    known = sorted({number for by_epoch in found.values() for number in by_epoch})
    if epoch not in known:
        raise ValueError(f"--epoch {epoch}: {run} mined at the beginning of epochs {', '.join(map(str, known))}.")
    return [by_epoch[epoch] for by_epoch in found.values() if epoch in by_epoch]
