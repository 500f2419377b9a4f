"""The command ``lavis-cir check``: says which data sets a folder holds, what is missing, and what can be run."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import shlex
import sys
import time
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lavis_cir_plugin import benchmarks
from lavis_cir_plugin.benchmarks.images import image_problems
from lavis_cir_plugin.benchmarks.survey import Checklist, Usage, surveying
from lavis_cir_plugin.benchmarks.types import Group, without_missing
from lavis_cir_plugin.core.error_messages import listed, option

MANY_FOLDERS = 4

EVALUATION = "projects/clip_cir/eval_all.yaml"
"""Project that evaluates the validation splits of several data sets with downloaded weights."""

DEMO = "python -m lavis.train --cfg-path projects/wrf4cir/demo.yaml"
"""Command that needs no data set."""

EXIT_CODES = (
    "The exit code is 0 if anything here can be run, be it with missing images left out; 1 if nothing can, or an image "
    "that --verify opens is broken, or ROOT is no folder; 2 if the command line itself is wrong."
)


@cache
def data_sets() -> dict[str, ModuleType]:
    """Return the modules below ``benchmarks`` with a ``CHECKLIST`` by registered name, published data sets first."""
    names = [found.name for found in pkgutil.iter_modules(benchmarks.__path__)]
    modules = [importlib.import_module(f"{benchmarks.__name__}.{name}") for name in names]
    found = {m.CHECKLIST.name or name: m for name, m in zip(names, modules) if hasattr(m, "CHECKLIST")}

    def place(name: str) -> tuple[int, bool, str]:
        checklist = found[name].CHECKLIST
        return -len(checklist.published), checklist.unit != "triplets", name

    return {name: found[name] for name in sorted(found, key=place)}


def checklist_of(name: str) -> Checklist:
    """Return the checklist of a data set: the files and uses that are looked for."""
    checklist: Checklist = data_sets()[name].CHECKLIST
    return checklist


@dataclass(frozen=True)
class Reading:
    """Result of reading one part of a data set, such as a category, for one use, such as training.

    Attributes:
        count: Number of triplets or queries.
        usable: Number of triplets or queries with all their images.
        is_complete: Whether no image is missing, including the gallery's images.
        problem: Reason why the part could not be read; empty if it could.
        absent: Names of missing annotation files.
    """

    count: int = 0
    usable: int = 0
    is_complete: bool = False
    problem: str = ""
    absent: tuple[str, ...] = ()


@dataclass
class Findings:
    """The files and images of one data set that a folder holds.

    Attributes:
        readings: Results by use and part.
        files: Annotation files that were read.
        paths: Paths of the images by name.
        missing: Names of missing images that an annotation file needs.
        left_out: Words on files that are no pictures, by image folder.
    """

    readings: dict[tuple[str, str], Reading] = field(default_factory=dict)
    files: dict[Path, None] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    missing: dict[str, None] = field(default_factory=dict)
    left_out: dict[Path, str] = field(default_factory=dict)

    @property
    def is_usable(self) -> bool:
        """Whether anything can be run, possibly without triplets or queries with missing images."""
        return any(reading.usable for reading in self.readings.values())


def add_command(subparsers: Any) -> None:
    """Add ``lavis-cir check`` to the sub-commands."""
    parser = subparsers.add_parser(
        "check",
        help="say what of the data sets is in a folder and what can be run with it",
        description="Say what of the data sets is in a folder, and what can be run with it. Nothing is written.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("root", metavar="ROOT", help="folder of a data set, or of several; nothing is written")
    parser.add_argument("--verify", action="store_true", help="open every image that is needed and found")
    parser.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> None:
    root = Path(os.path.expanduser(args.root))
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; give the folder of a data set, or the one that holds several.")
    start = time.perf_counter()
    found = {name: survey(name, root) for name in data_sets()}
    for name in sorted(found, key=lambda name: not found[name].files):  # data sets with files come first
        print("\n".join(report(name, found[name], root)) + "\n")
    broken = _verify(found.values()) if args.verify else []
    print(f"{root}: {time.perf_counter() - start:.1f} s" + ("" if args.verify else ", no image opened (--verify)"))
    print("\n".join(next_step(found, root, has_broken=bool(broken))))
    if broken or not any(findings.is_usable for findings in found.values()):
        sys.exit(1)


def _verify(found: Iterable[Findings]) -> list[str]:
    """Open every image, print the problems of the first ten broken ones, and return all problems."""
    paths = sorted({path for findings in found for path in findings.paths.values()})
    problems = [problem for problem in image_problems(paths) if problem]
    print(f"verified: {len(paths) - len(problems):,} of {len(paths):,} images can be read")
    print("".join(f"  {problem}\n" for problem in problems[:10]), end="")
    return problems


# -- reading ---------------------------------------------------------------------------------------------------------


def survey(name: str, root: Path) -> Findings:
    """Read a data set for each of its uses, with the reader that a run would use; write nothing."""
    module, checklist = data_sets()[name], checklist_of(name)
    findings = Findings()
    scans: dict[Hashable, Any] = {}
    for way in checklist.usages:
        for part, settings in checklist.parts.items():
            config = {"root": str(root), **way.settings, **settings}
            with surveying(scans) as seen:
                reading = _read(module, config, way.split, seen.paths)
            findings.readings[way.label, part] = replace(reading, absent=tuple(seen.absent))
            findings.files.update(dict.fromkeys(seen.files))
            findings.paths.update(seen.paths)
            findings.missing.update(seen.missing)
            findings.left_out.update(seen.left_out)
    return findings


def _read(module: ModuleType, config: Mapping[str, Any], split: str, found: Mapping[str, Path]) -> Reading:
    """Read a split; the reader fills ``found`` with the images that exist."""
    try:
        if hasattr(module, "read_captions"):
            examples, _ = module.read_captions(config)
            usable = sum(example.image in found for example in examples)
            return Reading(len(examples), usable, usable == len(examples))
        if split == "train":
            triplets, _ = module.read_train(config)
            usable = sum(triplet.reference in found and triplet.target in found for triplet in triplets)
            return Reading(len(triplets), usable, usable == len(triplets))
        groups = module.read_benchmark(config, split).groups
    except (ValueError, OSError) as error:
        return Reading(problem=str(error))
    count = sum(len(group.queries) for group in groups)
    usable = sum(_usable(group, found) for group in groups)
    has_gallery = all(image in found for group in groups for image in group.gallery)
    return Reading(count, usable, has_gallery and usable == count)


def _usable(group: Group, found: Mapping[str, Path]) -> int:
    try:
        return len(without_missing(group, found).queries)
    except ValueError:  # no query is left
        return 0


# -- report ----------------------------------------------------------------------------------------------------------


def report(name: str, findings: Findings, root: Path) -> list[str]:
    """Return the lines of the report on one data set."""
    data_set = checklist_of(name)
    absent = sorted({file for reading in findings.readings.values() for file in reading.absent})
    if not findings.files:
        return [f"{data_set.title}: nothing found", f"  note: {data_set.absent_files}"]
    lines = [data_set.title, f"  files    {_folders(findings.files, root)}"]
    splits: dict[str, Usage] = {}
    for way in data_set.usages:
        splits.setdefault(way.split, way)
    for split, way in splits.items():
        counts = [_count(data_set, split, part, findings.readings[way.label, part]) for part in data_set.parts]
        if any(counts):
            lines.append(f"  {split:<8} {', '.join(count for count in counts if count)} {_unit(data_set, split)}")
    needed = len(findings.paths) + len(findings.missing)
    if needed:
        where = f" in {_folders(findings.paths.values(), root)}" if findings.paths else ""
        lines.append(f"  images   {len(findings.paths):,} of {needed:,} that are needed{where}")
    lines += [f"  {sentence}" for sentence in findings.left_out.values()]
    lines += [f"  {_verdict(way, data_set, findings)}" for way in data_set.usages]
    if absent:
        lines += [f"  missing files: {', '.join(absent)}", f"    note: {data_set.absent_files}"]
    if findings.missing:
        lines.append(f"  missing images: {len(findings.missing):,} ({listed(list(findings.missing))})")
        lines.append(f"    note: {data_set.absent_images}")
    return lines


def next_step(found: Mapping[str, Findings], root: Path, has_broken: bool = False) -> list[str]:
    """Return a line on the next step and, as the last line, a command for it that can be pasted."""
    if has_broken:
        return [
            "next: replace the broken images, and look again:",
            f"lavis-cir check {shlex.quote(str(root))} --verify",
        ]
    for name, findings in found.items():
        options = _options(name, findings, root, ("train", "val"))
        if options is not None:
            return [
                f"next: train on {checklist_of(name).title}:",
                _command("train", *checklist_of(name).training, *options),
            ]
    for name, findings in found.items():
        options = _options(name, findings, root, ("val",))
        if options is not None:
            others = [f"datasets.{other}.splits=[]" for other in ("fashioniq", "cirr", "circo") if other != name]
            return [
                f"next: evaluate on {checklist_of(name).title}:",
                _command("evaluate", EVALUATION, *options, *others),
            ]
    return ["next: nothing here can be trained on or evaluated yet; this run draws its own pictures:", DEMO]


def _options(name: str, findings: Findings, root: Path, splits: Collection[str]) -> list[str] | None:
    """Return the options with which a run can read these splits of a data set, or None if it cannot."""
    data_set = checklist_of(name)
    trains = "train" in splits
    if not (data_set.training if trains else data_set.is_evaluated):
        return None
    # A project on a data set that is never evaluated needs the training split alone.
    needed = [split for split in splits if split == "train" or data_set.is_evaluated]
    ways = [next(way for way in data_set.usages if way.split == split) for split in needed]
    parts = [part for part in data_set.parts if all(findings.readings[way.label, part].usable for way in ways)]
    if not parts:
        return None
    keys = f"datasets.{name}.build_info"
    options = [option(f"{keys}.root", os.path.abspath(root))]
    if len(parts) < len(data_set.parts):
        options.append(f"{keys}.categories=[{','.join(parts)}]")
    if not all(findings.readings[way.label, part].is_complete for way in ways for part in parts):
        options.append(f"{keys}.missing_images=skip")
    return options


def _command(command: str, project: str, *options: str) -> str:
    return f"python -m lavis.{command} --cfg-path {project} --options {' '.join(map(shlex.quote, options))}"


def _unit(data_set: Checklist, split: str) -> str:
    return data_set.unit if split == "train" else "queries"


def _count(data_set: Checklist, split: str, part: str, reading: Reading) -> str:
    """Return words for a number of triplets or queries, with the published number if it differs."""
    if not reading.count:
        return ""
    published = data_set.published.get((split, part), reading.count)
    differs = f" (published: {published:,})" if published != reading.count else ""
    return f"{part} {reading.count:,}{differs}".strip()


def _verdict(way: Usage, data_set: Checklist, findings: Findings) -> str:
    """Return whether a data set is good for a use: ``yes``, or ``partly`` or ``no`` with the reasons."""
    readings = {part: findings.readings[way.label, part] for part in data_set.parts}
    if all(reading.is_complete for reading in readings.values()):
        return f"{way.label}: yes"
    reasons = [f"{file} is missing" for reading in readings.values() for file in reading.absent]
    reasons += [reading.problem.rstrip(".") for reading in readings.values() if reading.problem and not reading.absent]
    read = {part: reading for part, reading in readings.items() if not reading.problem}
    count, usable = (sum(getattr(reading, key) for reading in read.values()) for key in ("count", "usable"))
    if read and not all(reading.is_complete for reading in read.values()):
        unit = _unit(data_set, way.split)
        each = ", ".join(f"{part} {reading.usable:,}" for part, reading in read.items() if part)
        reasons.append(
            f"{usable:,} of {count:,} {unit} have their images{f' ({each})' if each else ''}"
            + (", the gallery lacks some" if usable == count else "")
            + (", needs missing_images: skip" if usable else "")
            + (", and a server refuses a file without all queries" if way.is_submission and 0 < usable < count else "")
        )
    elif read:
        reasons.append(f"yes with categories: [{', '.join(read)}]")
    return f"{way.label}: {'partly' if usable else 'no'}, {'; '.join(dict.fromkeys(reasons))}"


def _folders(paths: Collection[Path], root: Path) -> str:
    """Return words for the folders of files with counts by suffix; more than `MANY_FOLDERS` siblings become ``*``."""
    counts = Counter(os.path.split(path)[0] for path in paths)
    siblings = Counter(os.path.dirname(folder) for folder in counts)
    suffixes: dict[str, Counter[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        above = os.path.dirname(folder)
        place = os.path.join(above, "*") if siblings[above] > MANY_FOLDERS else folder or os.curdir
        suffixes.setdefault(place, Counter())[os.path.splitext(name)[1]] += 1
    written = [
        f"{os.path.relpath(place, root)}/ ({', '.join(f'{count:,} {suffix}' for suffix, count in found.most_common())})"
        for place, found in suffixes.items()
    ]
    more = len(written) - MANY_FOLDERS
    return ", ".join(written[:MANY_FOLDERS]) + (f" and {more:,} more folders" if more > 0 else "")
