"""Scans folders for pictures, with the reason for every file that is left out."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lavis_cir_plugin.benchmarks.images import SUFFIXES, is_foreign

MANIFEST = "lavis_cir_index.json"
"""The file that makes a folder an index."""

WRITER = "writer"
"""Folder in an index of what only the writer reads: its own catalogue, its lock, and parts that are not in it yet."""

LARGEST_FILE = 512 * 2**20
"""Bytes; a larger file is not read, since it would be held in memory as a whole."""


class Signature(NamedTuple):
    """What tells without reading that a file may have changed: any write to it sets the last one.

    Attributes:
        bytes: Its size.
        modified_ns: When its content was changed, as it says itself.
        changed_ns: When the file system last changed anything about it.
    """

    bytes: int
    modified_ns: int
    changed_ns: int


@dataclass
class Scan:
    """What stands in some folders.

    Attributes:
        pictures: Signature by absolute path of every file that may be a picture, sorted by path.
        left_out: Reason by absolute path of every other file; hidden and system folders count as one entry.
        unread: Absolute paths of folders that could not be read, of which nobody knows what they hold.
    """

    pictures: dict[str, Signature] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)


def scan_folders(folders: Sequence[str | Path]) -> Scan:
    """Find every file that may be a picture below some folders; no file is opened.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: one is a file, or an index.
    """
    check_folders(folders)
    scan = Scan()
    for folder in folders:
        _descend(absolute(folder), scan)
    scan.pictures = dict(sorted(scan.pictures.items()))
    return scan


def check_folders(folders: Sequence[str | Path]) -> None:
    """Check that folders of pictures are such.

    Raises:
        FileNotFoundError, ValueError: as `scan_folders`.
    """
    for folder in folders:
        root = absolute(folder)
        if not os.path.exists(root):
            raise FileNotFoundError(
                f"{folder} does not exist; name a folder of pictures, or take it out of the index by --forget."
            )
        if not os.path.isdir(root):
            raise ValueError(f"{folder} is no folder; name the folder that holds the pictures.")
        if is_index(root):
            raise ValueError(f"{folder} is an index and holds no pictures of its own; name the folder of the pictures.")


def is_index(folder: str | Path) -> bool:
    """Return whether a folder is an index, perhaps a half-written one."""
    return any(
        os.path.isfile(os.path.join(folder, name)) for name in (MANIFEST, os.path.join(WRITER, "catalogue.sqlite"))
    )


def absolute(path: str | Path) -> str:
    """Return a path as the catalogue has it: absolute, without ``..``, links left as they are."""
    return os.path.abspath(os.path.expanduser(path))


def is_below(path: str, folder: str) -> bool:
    """Return whether an absolute path lies below an absolute folder."""
    return path.startswith(folder if folder.endswith(os.sep) else folder + os.sep)


def _descend(folder: str, scan: Scan) -> None:
    waiting = [folder]
    while waiting:
        for entry in _entries(waiting.pop(), scan):
            if entry.is_dir(follow_symlinks=False):
                _look_into(entry, waiting, scan)
            elif os.path.isdir(entry.path):
                scan.left_out[entry.path] = "it is a link to a folder; name the folder itself to index it"
            else:
                _take(entry, scan)


def _entries(folder: str, scan: Scan) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        scan.left_out[folder] = f"the folder cannot be read: {error.strerror}; what the index had of it stays"
        scan.unread.append(folder)


def _look_into(entry: os.DirEntry[str], waiting: list[str], scan: Scan) -> None:
    if is_foreign(entry.name):
        scan.left_out[entry.path] = "the folder is hidden or a system's"
    elif is_index(entry.path):
        scan.left_out[entry.path] = "the folder is an index"
    else:
        waiting.append(entry.path)


def _take(entry: os.DirEntry[str], scan: Scan) -> None:
    suffix = os.path.splitext(entry.name)[1].lower()
    if is_foreign(entry.name):
        scan.left_out[entry.path] = "it is hidden or a system's"
        return
    if suffix not in SUFFIXES:
        scan.left_out[entry.path] = f"its suffix {suffix!r} is none of {' '.join(SUFFIXES)}"
        return
    try:
        found = os.stat(entry.path)
    except OSError as error:
        is_loose = entry.is_symlink() and isinstance(error, FileNotFoundError)
        scan.left_out[entry.path] = "it is a link to no file" if is_loose else f"it cannot be read: {error.strerror}"
        return
    try:
        entry.path.encode()
    except UnicodeEncodeError:
        scan.left_out[entry.path] = "its name is no UTF-8; rename it"
        return
    if not stat.S_ISREG(found.st_mode):
        scan.left_out[entry.path] = "it is no regular file"
    elif found.st_size > LARGEST_FILE:
        scan.left_out[entry.path] = f"it has more than {LARGEST_FILE // 2**20} MiB"
    else:
        scan.pictures[entry.path] = Signature(found.st_size, found.st_mtime_ns, found.st_ctime_ns)
