"""Set up worker processes: one thread each, no reaction to Ctrl-C, and an end when the parent ends."""

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

from lavis_cir_plugin.core.interruption import report_main_thread_alone

__all__ = ["worker_setup"]

_PR_SET_PDEATHSIG = 1
_POLL = 0.5  # seconds


def worker_setup() -> Callable[..., None]:
    """Return the function that each worker calls first: an ``initializer`` or a DataLoader's ``worker_init_fn``.

    Without it a worker whose parent is killed would live on and keep its files open: it would wait for work for ever,
    or until torch looks for its parent seconds later. On Linux the kernel ends the worker with its parent. The kernel
    also ends it with the thread that started it, so a thread that starts workers must outlive them.
    """
    return partial(_begin, os.getpid())


def _begin(parent: int, *_: object) -> None:
    # Ctrl-C reaches all processes of a terminal. The parent stops its workers, so no worker prints a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    report_main_thread_alone()
    if "torch" in sys.modules:  # workers with one thread per core each would wait for each other
        sys.modules["torch"].set_num_threads(1)
    if not (os.getppid() == parent and _killed_with_parent() and os.getppid() == parent):
        # The system is not Linux, a fork server stands between the two, or the parent has already ended.
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _killed_with_parent() -> bool:
    """Ask the kernel to kill this process when its parent ends, and return whether the kernel will do so."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def _watch(parent: int) -> None:
    """End this process once it has another parent, or once the process that started it has ended."""
    asked = multiprocessing.parent_process()
    while os.getppid() == parent and (asked is None or asked.is_alive()):
        time.sleep(_POLL)
    os._exit(1)
