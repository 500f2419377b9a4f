"""Locks between processes: they end with their holder, and who waits for one says for what, for whom and since when.

A lock is a file that `flock` holds. The system releases it when the last process that has it open is gone, and forked
children have it open too. So every child closes it before it does anything else: a killed holder leaves no lock behind,
whatever its children do. On a system without `flock` (Windows) and on file systems without locks nothing is held.
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

__all__ = ["LOCKS_HOLD", "FileLock", "Holder", "held", "holder_of"]

LOCKS_HOLD = fcntl is not None
"""Whether this system has such locks; otherwise two processes may hold one at once."""

_POLL, _SILENT, _REPEAT = 0.1, 1.0, 60.0  # seconds


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as the lock's file says: process, machine, local time of the beginning, and what for."""

    pid: int
    host: str
    since: str
    purpose: str

    def __str__(self) -> str:
        """Return a phrase such as "process 7 on atlas, which has been drawing /world since 2026-01-31 12:00:00"."""
        return f"process {self.pid} on {self.host}, which has been {self.purpose} since {self.since}"


class FileLock:
    """A lock that this process alone holds, until `release` or its end; no child inherits it.

    Args:
        path: Its file, in a folder that exists. The file is there only as long as someone holds the lock, or where a
            holder was killed.
        purpose: What the holder is doing, as the end of "which has been".
    """

    def __init__(self, path: Path, purpose: str) -> None:
        self.path = path
        self.purpose = purpose
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Take the lock unless another process, or another object of this one, holds it; return whether it is held.

        Raises:
            OSError: the file cannot be opened for writing.
        """
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            self._keep(descriptor)
            if not _flock(descriptor, exclusive=True):
                self._close()
                return False
            if _is_at(self.path, descriptor):
                break
            self._close()  # the holder before has removed this file; the next one's is a new file
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(asdict(self._myself())).encode())
        return True

    def release(self) -> None:
        """Give the lock back and remove its file; without effect where it is not held."""
        if self._descriptor is None:
            return
        if fcntl is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._close()

    def __enter__(self) -> FileLock:
        """Return itself; the lock is released at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release it."""
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
def held(path: Path, purpose: str) -> Iterator[None]:
    """Hold a lock during the block; wait for it, interruptibly, and say every minute for what, for whom and since when.

    Raises:
        OSError: the file cannot be opened for writing.
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
    """Return who holds a lock; None where nobody does. A process or host of 0 or "?" is not known."""
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
    """Lock an open file unless another holds it; a file system without locks counts as locked."""
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
    """Return whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
