"""What a worker process does first: it takes one thread, leaves interrupts to its parent, and ends when that does."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

__all__ = ["worker_setup"]

_PR_SET_PDEATHSIG = 1
_POLL = 0.5  # seconds


def worker_setup() -> Callable[..., None]:
    """Return what every worker of this process calls first, as an ``initializer`` or a DataLoader's ``worker_init_fn``.

    A worker whose parent is killed would otherwise live on: it waits for work for ever, or for the seconds between
    torch's looks at its parent, and keeps what it has open. On Linux the kernel ends it in the same moment; it does so
    too when the thread that started the worker ends, so that a thread that starts workers must outlive them.
    """
    return partial(_begin, os.getpid())


def _begin(parent: int, *_: object) -> None:
    # Ctrl-C reaches all processes of a terminal; the parent stops its workers, without a traceback of each.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if "torch" in sys.modules:  # several workers with a thread for each core each would wait for each other
        sys.modules["torch"].set_num_threads(1)
    if not (os.getppid() == parent and _killed_with_parent() and os.getppid() == parent):
        # Another system, a fork server between the two, or a parent that is gone already.
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _killed_with_parent() -> bool:
    """Ask the kernel to kill this process when its parent ends; return whether it will."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def _watch(parent: int) -> None:
    """End this process once it has another parent, or the process that asked for it is gone."""
    asked = multiprocessing.parent_process()
    while os.getppid() == parent and (asked is None or asked.is_alive()):
        time.sleep(_POLL)
    os._exit(1)
