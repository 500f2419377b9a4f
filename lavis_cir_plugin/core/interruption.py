"""SIGINT and SIGTERM end a command with one line, the exit code that shells expect, and no traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["interruptible"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interruptible(command: str, remark: Callable[[], str | None]) -> Iterator[None]:
    """Let a signal stop the block as Ctrl-C does, and then end the process with 128 plus the signal's number.

    A second signal ends the process at once. Outside the main thread, where Python lets nobody handle signals, and
    where the process ignores a signal (nohup), nothing is changed.

    Args:
        command: Its name, with which the line begins.
        remark: Returns the rest of the line, what is kept and how to go on; None where another process says it.

    Raises:
        SystemExit: the block was stopped: 130 after SIGINT, 143 after SIGTERM.
    """
    stopped_by: list[signal.Signals] = []
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker, whose parent says what there is to say
            os._exit(128 + number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        stopped_by.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {each: signal.getsignal(each) for each in _SIGNALS if signal.getsignal(each) is not signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield
    except BaseException:
        # Whatever else went wrong on the way out, such as a worker that the same signal has ended, is no news.
        if not stopped_by:
            raise
        line = remark()
        if line is not None:
            print(f"{command}: stopped by {stopped_by[0].name}; {line}", file=sys.stderr, flush=True)
        raise SystemExit(128 + stopped_by[0]) from None
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
