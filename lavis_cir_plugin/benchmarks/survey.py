"""Read annotation files without their images, and say what there is to look for, for ``lavis-cir check``."""

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
    """One thing that a data set can be used for.

    Attributes:
        label: What it is called.
        split: The split that it reads.
        settings: Keys of ``build_info`` that make it.
        is_submission: Whether it makes a test server's file, which needs every query.
    """

    label: str
    split: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_submission: bool = False


@dataclass(frozen=True)
class Checklist:
    """What ``lavis-cir check`` looks for of a data set, which brings it as ``CHECKLIST``.

    Attributes:
        title: As its authors write it.
        ways: What it can be used for.
        published: Triplets or queries by split and part, of the published files; none for one's own data.
        absent_files: What to know when annotation files are missing.
        absent_images: What to know when images are missing.
        parts: Settings by name of the parts that are read by themselves, FashionIQ's categories.
        name: As it is registered, if its module is called otherwise.
        unit: What it trains on.
        training: Project file and options that train on it, without the folder.
        is_evaluated: Whether ``projects/clip_cir/eval_all.yaml`` takes it.
    """

    title: str
    ways: tuple[Usage, ...]
    published: Mapping[tuple[str, str], int]
    absent_files: str
    absent_images: str
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    name: str = ""
    unit: str = "triplets"
    training: tuple[str, ...] = ()
    is_evaluated: bool = False


def beside_cirr(name: str) -> tuple[str, ...]:
    """Return how to train on a data set without validation: CIRR's project, with this data set in CIRR's place."""
    options = (
        f"datasets.{name}.splits=[train]",
        "datasets.cirr.splits=[]",
        "run.valid_splits=[]",
        "run.test_splits=[]",
    )
    return ("projects/blip2_cir/cirr.yaml", *options)


@dataclass
class Survey:
    """What the readers found and missed since the survey began.

    Attributes:
        files: Annotation files that were found.
        absent: Names of those that were not.
        paths: Images that were found.
        missing: Names of those that were not.
        left_out: What is no picture among the images, a phrase by image folder.
        scans: Listings of folders, so that each folder is listed once however many splits are read.
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
    """Let every image that a reader asks for count as present, and note which of them are.

    Args:
        scans: Listings of folders from earlier surveys; those of this one are added.
    """
    survey = Survey(scans=scans)
    token = _current.set(survey)
    try:
        yield survey
    finally:
        _current.reset(token)


def current_survey() -> Survey | None:
    """Return the survey that is under way, if any."""
    return _current.get()


def listing(scan: Callable[..., Scan], *arguments: Hashable) -> Scan:
    """Return what a scan of folders finds; in a survey, scan each of them once."""
    survey = current_survey()
    if survey is None:
        return scan(*arguments)
    key = (scan, *arguments)
    if key not in survey.scans:
        survey.scans[key] = scan(*arguments)
    found: Scan = survey.scans[key]
    return found
