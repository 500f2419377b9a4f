"""A training step on cores that are idle, and on cores that do other work, with OpenMP's threads spinning or sleeping.

OpenMP reads how its threads wait when torch is loaded, so every measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time

POLICIES = ("ACTIVE", "PASSIVE")


def step_times(steps: int, width: int, layers: int) -> list[float]:
    """Return the seconds of each training step of a stack of small matrices, whose many short parts wait often."""
    import torch

    torch.manual_seed(0)
    blocks = [torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.GELU()) for _ in range(layers)]
    model = torch.nn.Sequential(*blocks)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(256, width)
    times = []
    for _ in range(steps + 2):
        begin = time.perf_counter()
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    return times[2:]  # the first ones allocate


def spin() -> None:
    """Keep a core busy until the process is ended."""
    while True:
        pass


def measure(policy: str, busy: int, arguments: argparse.Namespace) -> float:
    """Return the median seconds of a step in a new process beside so many busy loops."""
    others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(busy)]
    for other in others:
        other.start()
    try:
        sizes = ["--steps", arguments.steps, "--width", arguments.width, "--layers", arguments.layers]
        command = [sys.executable, __file__, "--measure", *map(str, sizes)]
        environment = {**os.environ, "OMP_WAIT_POLICY": policy, "OMP_NUM_THREADS": str(arguments.threads)}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(result.stdout)
    finally:
        for other in others:
            other.terminate()
            other.join()


def main() -> None:
    """Print a table: the median of a step idle and busy, and their ratio, for both ways of waiting."""
    parser = argparse.ArgumentParser(description=__doc__)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--steps", type=int, default=20, help="of each measurement (default: 20)")
    parser.add_argument("--width", type=int, default=256, help="of the matrices (default: 256)")
    parser.add_argument("--layers", type=int, default=24, help="of the model (default: 24)")
    parser.add_argument("--threads", type=int, default=cores, help="of torch (default: one per core)")
    parser.add_argument("--busy", type=int, default=cores, help="busy loops beside it (default: one per core)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(statistics.median(step_times(arguments.steps, arguments.width, arguments.layers)))
        return
    print(f"a step's median in ms, {arguments.threads} threads, idle and beside {arguments.busy} busy loops")
    print(f"{'waiting':<10}{'idle':>10}{'busy':>10}{'ratio':>8}")
    for policy in POLICIES:
        idle, busy = (measure(policy, count, arguments) for count in (0, arguments.busy))
        print(f"{policy:<10}{1000 * idle:10.1f}{1000 * busy:10.1f}{busy / idle:8.1f}")


if __name__ == "__main__":
    main()
