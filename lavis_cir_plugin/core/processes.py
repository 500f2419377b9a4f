"""Share work among the processes of one run, exchange results, and stop all of them after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

_KNOWN = "_is_known_to_all_processes"
"""Attribute of an error that a block has raised in all processes, so that the one around it need not tell them."""


def rank_and_world() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, which is (0, 1) outside a process group."""
    is_distributed = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if is_distributed else (0, 1)


def share(total: int) -> range:
    """Return this process's part of ``range(total)``. The parts are contiguous; their lengths differ by at most one."""
    rank, world = rank_and_world()
    return range(total * rank // world, total * (rank + 1) // world)


def gather(value: Any) -> list[Any]:
    """Return the value of every process in the order of ranks; each process waits for all others."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


@contextmanager
def fail_in_all_processes() -> Iterator[None]:
    """Raise an error in all processes if one of them fails in the block, so that no process waits for ever.

    Blocks may be nested, even if a process fails before it comes to an inner one: the others hear of it there. An error
    of the inner block may leave the outer one as another error that is raised from it.

    Raises:
        ValueError: If another process failed. The message ends with the last line of that process's message.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if _is_known(error):
            raise
        failure = error
    told = None if failure is None else str(failure).strip() or type(failure).__name__  # some errors have no message
    others = [message for message in gather(told) if message is not None]
    if failure is None and others:
        failure = ValueError(f"another process stopped: {others[0].splitlines()[-1]}")
    if failure is not None:
        vars(failure)[_KNOWN] = True
        raise failure


def _is_known(error: BaseException | None) -> bool:
    """Return whether all processes know of an error, or of one from which it was raised."""
    while error is not None and not vars(error).get(_KNOWN):
        error = error.__cause__
    return error is not None
