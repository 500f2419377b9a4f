"""Processes of tests: a fork server has imported torch and LAVIS for them, so that each starts in milliseconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
import torch.multiprocessing as mp
from conftest import add_small_towers
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lavis_cir_plugin.core.atomic_files import replace_file
from lavis_cir_plugin.data import benchmark_datasets
from lavis_cir_plugin.methods.retrieval_dpo import negatives_sheet
from lavis_cir_plugin.report import chance, contact_sheets, curves
from lavis_cir_plugin.training import launcher

# The server's own path leads to no module of the tests, so it imports what these import.
PRELOADED = ["lavis_cir_plugin.training.launcher", "open_clip", "pytest", "webdataset"]


def in_two_processes(work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work(rank, *arguments)`` in two processes at once; an error in one of them is raised here."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(work, arguments, nprocs=2, start_method="forkserver")


def start_launcher(
    command: str,
    arguments: Sequence[str],
    log: Path,
    world_size: int = 1,
    random_queries: int = chance.RANDOM_QUERIES,
    **environment: str,
) -> list[BaseProcess]:
    """Start the processes of a run with the variables that torchrun would give them, and return them.

    Its reports draw no pictures, and the features that it caches by default lie beside the log.

    Args:
        command: ``train`` or ``evaluate``.
        arguments: Of its command line.
        log: File to which all processes append what they print.
        world_size: Number of processes; a single one belongs to no group.
        random_queries: Number of rankings to find chance from.
        environment: More variables. What a test has set in its own process does not reach these.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes: list[BaseProcess] = []
    for rank in range(world_size):
        group = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": port}
        given = {name: str(value) for name, value in group.items()} if world_size > 1 else {}
        given = {**given, "MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1", **environment}
        own = (command, list(arguments), str(log), random_queries, given)
        processes.append(context.Process(target=_launch, args=own))
        processes[-1].start()
    return processes


def run_by_torchrun(command: str, arguments: Sequence[str], log: Path, world_size: int) -> None:
    """Let torchrun's own agent start the processes of a run, which must succeed, from the fork server.

    The agent sets the variables of each process as behind ``torchrun --standalone``.

    Args:
        command: ``train`` or ``evaluate``.
        arguments: Of its command line.
        log: File to which all processes append what they print.
        world_size: Number of processes.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    standalone = {
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "max_restarts": 0,
        "start_method": "forkserver",
    }
    agent = LaunchConfig(1, 1, world_size, **standalone)
    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    }
    try:
        elastic_launch(agent, _launch)(command, list(arguments), str(log), chance.RANDOM_QUERIES, {})
    finally:
        for number, handler in before.items():  # the agent leaves its own
            signal.signal(number, handler)


def finish(processes: Sequence[BaseProcess], log: Path) -> None:
    """Wait for the processes of a run, which must succeed."""
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0] * len(processes), log.read_text()[-3000:]


def leave_pictures_blank(patch: pytest.MonkeyPatch) -> None:
    """Let the reports of runs write empty files in place of pictures, which take longer than a small run's training."""
    patch.setattr(contact_sheets, "contact_sheet", lambda benchmark, group, ranking, path: replace_file(path, b""))
    patch.setattr(curves, "training_curve", lambda folder, path, metric, panels: replace_file(path, b""))
    patch.setattr(negatives_sheet, "negatives_sheet", lambda sets, path: replace_file(path, b""))


def _launch(command: str, arguments: list[str], log: str, random_queries: int, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # workers start as in any run, not from one more fork server
    torch.set_num_threads(1)
    add_small_towers()
    file = open(log, "a")  # noqa: SIM115 (open as long as the process)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    patch = pytest.MonkeyPatch()
    leave_pictures_blank(patch)
    patch.setattr(chance, "RANDOM_QUERIES", random_queries)
    if "XDG_CACHE_HOME" not in environment:
        patch.setattr(benchmark_datasets, "features_root", lambda: Path(log).parent / "features")
    launcher.main(command, arguments)
