"""Run work on a few threads with a bounded queue."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lavis_cir_plugin.serving.refusals import refusal

T = TypeVar("T")


class Turns:
    """A few threads for one kind of work.

    Args:
        threads: Number of threads.
        waiting: Number of calls that may wait for a thread. Later calls are refused.
        name: Name of the threads.
    """

    def __init__(self, threads: int, waiting: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._most = threads + waiting
        self._present = 0

    async def run(self, function: Callable[[], T]) -> T:
        """Return what a function returns, when its turn has come.

        Raises:
            HTTPException: 503, too many are waiting.
        """
        if self._present >= self._most:
            raise refusal(503, "too many people are asking at this moment; try again in a second.")
        self._present += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function)
        finally:
            self._present -= 1
