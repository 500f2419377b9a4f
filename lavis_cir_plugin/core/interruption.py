"""End a command after SIGINT or SIGTERM with one line, the exit code that shells expect, and no traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import Any

__all__ = ["interruptible", "report_main_thread_alone"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible(command: str, remark: Callable[[], str | None]) -> Iterator[None]:
    """Let SIGINT or SIGTERM stop the block like Ctrl-C; the process then exits with 128 plus the signal's number.

    A second signal ends the process at once. Nothing changes outside the main thread, because Python allows signal
    handlers only there. A signal that the process ignores (nohup) stays ignored.

    Args:
        command: Name of the command, which begins the printed line.
        remark: Function that returns the rest of the line: what is kept and how to continue. It returns None if
            another process prints the line.

    Raises:
        SystemExit: If a signal stopped the block. The code is 130 after SIGINT and 143 after SIGTERM.
    """
    stopped_by: list[signal.Signals] = []
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # this is a forked worker; its parent prints the line
            os._exit(128 + number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        stopped_by.append(signal.Signals(number))
        report_main_thread_alone()
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {each: signal.getsignal(each) for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield
    except BaseException:
        # Other errors on the way out, such as a worker that the same signal has ended, tell the user nothing new.
        if not stopped_by:
            raise
        line = remark()
        if line is not None:
            print(f"{command}: stopped by {stopped_by[0].name}; {line}", file=sys.stderr, flush=True)
        raise SystemExit(128 + stopped_by[0]) from None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def report_main_thread_alone() -> None:
    """Let ``sys.excepthook`` report errors of the main thread and of no other.

    Python's thread that hands tensors to another process reports there that the other one has gone away. That is no
    news in a process that ends, nor in a worker, which ends with its parent.
    """
    sys.excepthook = partial(_of_main_thread, sys.excepthook)


def _of_main_thread(
    hook: Callable[..., Any], kind: type[BaseException], error: BaseException, place: TracebackType
) -> None:
    if threading.current_thread() is threading.main_thread():
        hook(kind, error, place)
