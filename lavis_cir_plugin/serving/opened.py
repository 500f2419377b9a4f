"""Keep indexes open while requests use them, and follow their writers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavis_cir_plugin.core.error_messages import first_line
from lavis_cir_plugin.search import open_index

logger = logging.getLogger(__name__)

RETRY_SECONDS = 10.0
"""Seconds until a state that could not be opened is tried again."""


class Opened:
    """One index under a name.

    Args:
        name: Name that clients use.
        index: A `SearchIndex`.
    """

    def __init__(self, name: str, index: Any) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._opening = threading.Lock()  # of the request that opens a new state; the others see the one before
        self._index = index
        self._users: dict[int, int] = {}  # requests by the state that they see
        self._last_problem = ""
        self._next_try = 0.0

    @contextmanager
    def in_use(self) -> Iterator[Any]:
        """Return the newest opened state of the index, which stays open until the block ends."""
        self._refresh()
        with self._lock:
            index = self._index
            self._users[id(index)] = self._users.get(id(index), 0) + 1
        try:
            yield index
        finally:
            with self._lock:
                self._users[id(index)] -= 1
                if not self._users[id(index)]:
                    del self._users[id(index)]
                    if index is not self._index:
                        index.close()

    def _refresh(self) -> None:
        """Open what a writer has made.

        What cannot be opened, such as another model that is too large, is said once. The state before is kept, and the
        new one is tried again after `RETRY_SECONDS`.
        """
        if time.monotonic() < self._next_try or not self._opening.acquire(blocking=False):
            return
        try:
            fresh = self._index.refreshed()
            self._last_problem = ""
        except Exception as error:  # whatever it is, requests can still be answered
            if str(error) != self._last_problem:
                logger.warning("%s stays as it was: %s", self.name, first_line(error))
                self._last_problem = str(error)
            self._next_try = time.monotonic() + RETRY_SECONDS
        else:
            self._take(fresh)
        finally:
            self._opening.release()

    def _take(self, fresh: Any) -> None:
        with self._lock:
            if fresh is not self._index:
                if id(self._index) not in self._users:
                    self._index.close()
                self._index = fresh


def open_indexes(paths: Sequence[str], model: str | None, device: str) -> dict[str, Opened]:
    """Open indexes under the names of their folders, and load their models.

    Two indexes of one model share it. Of two folders with the same name the later one is numbered.

    Args:
        paths: Folders of the indexes.
        model: Model in place of the ones that the indexes name.
        device: ``cpu`` or ``cuda``.

    Raises:
        FileNotFoundError, ValueError, OSError: an index or its model cannot be opened; one sentence says why.
    """
    found: dict[str, Opened] = {}
    encoders: list[Any] = []
    given = None
    if model is not None:
        from lavis_cir_plugin.search import load_encoder

        given = load_encoder(model, device)
    for path in paths:
        index = open_index(path, given, device)
        if given is None:
            _share_encoder(index, encoders)
        name = free_name(Path(path).expanduser().absolute().name or "index", found)
        found[name] = Opened(name, index)
    return found


def _share_encoder(index: Any, encoders: list[Any]) -> None:
    for encoder in encoders:
        if index.manifest.name == encoder.name and not encoder.differing(index.manifest.identity):
            index.encoder = encoder
            return
    encoders.append(index.encoder)


def free_name(name: str, taken: Mapping[str, Any]) -> str:
    """Return a name that is not taken yet."""
    number = 1
    chosen = name
    while chosen in taken:
        number += 1
        chosen = f"{name}-{number}"
    return chosen
