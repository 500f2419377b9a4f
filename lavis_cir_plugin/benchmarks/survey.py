"""Reading annotation files without their images: what `lavis-cir check` needs to know of the readers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

Scan = TypeVar("Scan")


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
