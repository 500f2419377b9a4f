"""The command ``lavis-cir submission``: checks a file for a benchmark's test server, and scores a file of val."""

from __future__ import annotations

import argparse
import codecs
import importlib
import os
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lavis_cir_plugin import benchmarks
from lavis_cir_plugin.benchmarks.annotation_files import read_json, read_records
from lavis_cir_plugin.benchmarks.submissions import Review


def add_command(subparsers: Any) -> None:
    """Add ``lavis-cir submission`` to the sub-commands."""
    parser = subparsers.add_parser(
        "submission", help="check a file for a benchmark's test server, and score one of val"
    )
    parser.add_argument("file", metavar="FILE", help="JSON file of CIRR, CIRCO or FashionIQ, from this code or another")
    parser.add_argument(
        "--annotations",
        required=True,
        metavar="FILE",
        help="the split that it answers: cap.rc2.test1.json, CIRCO's test.json, cap.dress.test.json, or one of val",
    )
    parser.add_argument(
        "--gallery",
        metavar="FILE",
        help="the gallery's images: split.*.json, image_info_unlabeled2017.json; by default that beside the annotation",
    )
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> None:
    path, annotation = Path(os.path.expanduser(args.file)), Path(os.path.expanduser(args.annotations))
    review = check(path, annotation, Path(os.path.expanduser(args.gallery)) if args.gallery else None)
    print(review)
    if review.problems:
        print(f"refused: {path}, {path.stat().st_size:,} bytes")
        sys.exit(1)
    images = sorted({len(row) for row in review.rows.values()})
    verdict = "ok as far as it was checked" if review.unchecked else "ok"
    print(
        f"{verdict}: {path}, {path.stat().st_size:,} bytes, {len(review.rows):,} queries with {images[0]} images each"
    )


def check(path: Path, annotation: Path, gallery: Path | None = None) -> Review:
    """Check a submission file by the rules of the benchmark that the annotation belongs to.

    Args:
        path: Path of the submission file.
        annotation: Path of the annotation file of the split that it answers.
        gallery: Path of the list of the gallery's images; by default the list beside the annotation.

    Raises:
        ValueError: If no benchmark with a test server has such an annotation, or a file cannot be read as its kind.
        FileNotFoundError: If a file does not exist.
    """
    benchmark = _benchmark_of(annotation)
    content = read_json(path)
    if path.read_bytes().startswith(codecs.BOM_UTF8):
        raise ValueError(f"{path} begins with a byte order mark, which strict JSON readers refuse; save it without.")
    review: Review = benchmark.check_submission(content, path.stat().st_size, annotation, gallery)
    return review


def _benchmark_of(annotation: Path) -> ModuleType:
    names = [found.name for found in pkgutil.iter_modules(benchmarks.__path__)]
    modules = [importlib.import_module(f"{benchmarks.__name__}.{name}") for name in names]
    servers = {module.ANNOTATION_KEYS: module for module in modules if hasattr(module, "check_submission")}
    keys = read_records(annotation)[0].keys()
    for known, module in servers.items():
        if known <= keys:
            return module
    wanted = "; ".join(
        f"{module.__name__.split('.')[-1]}: {', '.join(sorted(known))}" for known, module in servers.items()
    )
    raise ValueError(
        f"{annotation} is no annotation file of a benchmark with a test server, its first record has the keys "
        f"{', '.join(map(str, keys))}; --annotations takes a list of objects with ({wanted})."
    )
