"""Lock files between processes: a lock ends with its holder, and a waiting process logs who holds it.

A lock is a file that `flock` locks. The system releases it when the last process that has the file open ends. Forked
children also have the file open, so every child closes it first: a killed holder leaves no lock behind, whatever its
children do. Nothing is locked on a system without `flock` (Windows) or on a file system without locks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

__all__ = ["SYSTEM_HAS_LOCKS", "FileLock", "Holder", "hold_lock", "holder_of"]

SYSTEM_HAS_LOCKS = fcntl is not None
"""Whether this system has file locks. Without them two processes may hold one lock at once."""

_POLL, _SILENT, _REPEAT = 0.1, 1.0, 60.0  # seconds


@dataclass(frozen=True)
class Holder:
    """Holder of a lock, as the lock file records it: process id, machine, local time of the start, and purpose."""

    pid: int
    host: str
    since: str
    purpose: str

    def __str__(self) -> str:
        """Return a phrase such as "process 7 on atlas, which has been drawing /world since 2026-01-31 12:00:00"."""
        return f"process {self.pid} on {self.host}, which has been {self.purpose} since {self.since}"


class FileLock:
    """A lock of this process alone. It lasts until `release` or the end of the process; no child inherits it.

    Args:
        path: Path of the lock file in an existing folder. The file exists only while a process holds the lock, or
            after a holder was killed.
        purpose: What the holder is doing. It completes the phrase "which has been ...".
    """

    def __init__(self, path: Path, purpose: str) -> None:
        self.path = path
        self.purpose = purpose
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Take the lock if no other process and no other object of this process holds it.

        Returns:
            Whether this object holds the lock now.

        Raises:
            OSError: If the file cannot be opened for writing.
        """
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            self._keep(descriptor)
            if not _flock(descriptor, exclusive=True):
                self._close()
                return False
            if _is_at(self.path, descriptor):
                break
            self._close()  # the previous holder removed this file; its successor is a new file
        with contextlib.suppress(OSError):  # the disk is full, but the lock holds
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(asdict(self._myself())).encode())
        return True

    def release(self) -> None:
        """Release the lock and remove its file; do nothing if this object does not hold the lock."""
        if self._descriptor is None:
            return
        if fcntl is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._close()

    def __enter__(self) -> FileLock:
        """Return this object; the end of the block releases the lock."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self.release()

    def _myself(self) -> Holder:
        return Holder(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S"), self.purpose)

    def _keep(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _HELD.add(self)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        _HELD.discard(self)
        if descriptor is not None:
            os.close(descriptor)


_HELD: set[FileLock] = set()


def _close_inherited() -> None:
    for lock in list(_HELD):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


@contextlib.contextmanager
def hold_lock(path: Path, purpose: str) -> Iterator[None]:
    """Hold a lock during the block. While waiting for it, log every minute who holds it, for what and since when.

    Ctrl-C interrupts the wait.

    Args:
        path: Path of the lock file in an existing folder.
        purpose: What this process will be doing. It completes the phrase "which has been ...".

    Raises:
        OSError: If the file cannot be opened for writing.
    """
    lock = FileLock(path, purpose)
    begin, told_at = time.monotonic(), _SILENT
    while not lock.take():
        waited = time.monotonic() - begin
        if waited >= told_at:
            told_at = waited + _REPEAT
            holder = holder_of(path)
            logging.warning(
                "waiting for %s, for %.0f s so far; interrupt (Ctrl-C) to stop waiting",
                holder or f"the holder of {path}",
                waited,
            )
        time.sleep(_POLL)
    try:
        yield
    finally:
        lock.release()


def holder_of(path: Path) -> Holder | None:
    """Return the holder of a lock, or None if nobody holds it; an unknown holder has the pid 0 and the host "?"."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return None
    try:
        if fcntl is None or _flock(descriptor, exclusive=False):
            return None
        try:
            return Holder(**json.loads(os.read(descriptor, 65536)))
        except (ValueError, TypeError):
            return Holder(0, "?", "an unknown time", "holding it")
    finally:
        os.close(descriptor)


def _flock(descriptor: int, exclusive: bool) -> bool:
    """Lock an open file and return whether that worked; a file system without locks counts as locked."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logging.warning("this file system has no locks (%s): two processes may write the same there", error.strerror)
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Return whether a path still names an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
