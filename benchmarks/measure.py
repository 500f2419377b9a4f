"""Run a command and measure it from outside: wall time, processor time and peak memory by the operating system."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Usage:
    """What a command took: wall time, processor time of all its processes, and the resident memory of the largest."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def environment(build: Path) -> dict[str, str]:
    """Return the environment in which an interpreter imports the package of a checkout and computes on one core."""
    return {**os.environ, "PYTHONPATH": str(build), "OMP_NUM_THREADS": "1"}


def run(command: Sequence[str], on_line: Callable[[str], None], env: Mapping[str, str] | None = None) -> Usage:
    """Run a command, hand over each line of its standard output and error, and wait for its end.

    Linux counts the caller's own peak as the least peak of what it starts, so the caller has to stay the smaller one.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        for line in process.stdout or ():
            on_line(line.rstrip("\n"))
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    kilo = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes
    return Usage(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * kilo)


def run_ways(script: str, ways: Sequence[Sequence[str]], rounds: int) -> list[list[dict[str, Any]]]:
    """Run a script once per way and round, the ways in turn, each time in a process of its own.

    Args:
        script: Its last line of output is a JSON object.
        ways: The script's arguments for each.
        rounds: How often.

    Returns:
        For each way what its runs reported, with the ``peak_bytes`` of the process.
    """
    runs: list[list[dict[str, Any]]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, own in zip(ways, runs):
            lines: list[str] = []
            usage = run([sys.executable, "-W", "ignore", script, *way], lines.append)
            own.append({**json.loads(lines[-1]), "peak_bytes": usage.peak_bytes})
    return runs


def median(runs: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)
