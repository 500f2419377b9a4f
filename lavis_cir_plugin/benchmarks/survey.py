"""Read annotation files without their images, for ``lavis-cir check``, which reports what is there."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Scan = TypeVar("Scan")


@dataclass(frozen=True)
class Usage:
    """One use of a data set.

    Attributes:
        label: Name of the use.
        split: Split that it reads.
        settings: Keys of ``build_info`` that select it.
        is_submission: Whether it writes a test server's file, which needs every query.
    """

    label: str
    split: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_submission: bool = False


@dataclass(frozen=True)
class Checklist:
    """What ``lavis-cir check`` looks for in a data set. Its module defines it as ``CHECKLIST``.

    Attributes:
        title: Name in its authors' spelling.
        usages: Uses of the data set.
        published: Numbers of triplets or queries in the published files by split and part; empty for one's own data.
        absent_files: Advice if annotation files are missing.
        absent_images: Advice if images are missing.
        parts: Settings by the names of parts that can be read alone, such as FashionIQ's categories.
        name: Registered name if it differs from the module's name.
        unit: Word for the training examples.
        training: Project file and options of a training on it, without the folder.
        is_evaluated: Whether ``projects/clip_cir/eval_all.yaml`` can evaluate it.
    """

    title: str
    usages: tuple[Usage, ...]
    published: Mapping[tuple[str, str], int]
    absent_files: str
    absent_images: str
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    name: str = ""
    unit: str = "triplets"
    training: tuple[str, ...] = ()
    is_evaluated: bool = False


def train_in_cirr_project(name: str) -> tuple[str, ...]:
    """Return CIRR's project file and the options that train on another data set, which has no validation split."""
    options = (
        f"datasets.{name}.splits=[train]",
        "datasets.cirr.splits=[]",
        "run.valid_splits=[]",
        "run.test_splits=[]",
    )
    return ("projects/blip2_cir/cirr.yaml", *options)


@dataclass
class Survey:
    """What the readers have found and missed since the survey began.

    Attributes:
        files: Annotation files that were found.
        absent: Names of annotation files that are missing.
        paths: Images that were found.
        missing: Names of images that are missing.
        left_out: Phrase by image folder about files that are not among the pictures.
        scans: Contents of folders, so that each folder is scanned once for all splits.
    """

    files: list[Path] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    paths: dict[str, Path] = field(default_factory=dict)
    missing: dict[str, None] = field(default_factory=dict)
    left_out: dict[Path, str] = field(default_factory=dict)
    scans: dict[Hashable, Any] = field(default_factory=dict)


_current: ContextVar[Survey | None] = ContextVar("survey", default=None)


@contextmanager
def surveying(scans: dict[Hashable, Any]) -> Iterator[Survey]:
    """Run readers as if every image were present, and record which images are.

    Args:
        scans: Contents of folders from earlier surveys. This survey adds its own.
    """
    survey = Survey(scans=scans)
    token = _current.set(survey)
    try:
        yield survey
    finally:
        _current.reset(token)


def current_survey() -> Survey | None:
    """Return the running survey, or None."""
    return _current.get()


def scan_once(scan: Callable[..., Scan], *arguments: Hashable) -> Scan:
    """Return the result of a scan of folders. A survey scans each folder only once."""
    survey = current_survey()
    if survey is None:
        return scan(*arguments)
    key = (scan, *arguments)
    if key not in survey.scans:
        survey.scans[key] = scan(*arguments)
    found: Scan = survey.scans[key]
    return found
