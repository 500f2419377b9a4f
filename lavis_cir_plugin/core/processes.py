"""What the processes of one run do together: share work out, exchange results, and stop together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


def rank_and_world() -> tuple[int, int]:
    """Return this process's number and the number of processes: (0, 1) outside a process group."""
    is_distributed = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if is_distributed else (0, 1)


def share(total: int) -> range:
    """Return this process's part of ``range(total)``; the parts are contiguous and differ in length by at most one."""
    rank, world = rank_and_world()
    return range(total * rank // world, total * (rank + 1) // world)


def gather(value: Any) -> list[Any]:
    """Return the value of every process, by rank; none goes on before all have come."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


@contextmanager
def fail_together() -> Iterator[None]:
    """Let what fails in one process end the block in all, instead of leaving the others waiting.

    Raises:
        ValueError: another process stopped; with its last sentence.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    others = [message for message in gather(str(failure) if failure else "") if message]
    if failure is not None:
        raise failure
    if others:
        raise ValueError(f"another process stopped: {others[0].splitlines()[-1]}")
