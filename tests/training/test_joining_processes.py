"""What the launcher makes of the variables of torchrun and other launchers, and how a process leaves its group."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from lavis_cir_plugin.training import launcher

OTHERS = (*launcher._TORCHRUN, *launcher._OTHER_LAUNCHERS)


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets variables of launchers; none is set besides."""
    for name in OTHERS:
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def refused(device="cpu"):
    with pytest.raises(ValueError, match=r"process") as caught:
        launcher._join_processes(OmegaConf.create({"device": device}))
    return str(caught.value)


@pytest.mark.parametrize(
    ("backend", "world", "fails", "is_closed"),
    [("nccl", 2, True, False), ("nccl", 2, False, True), ("nccl", 1, True, True), ("gloo", 2, True, True)],
)
def test_a_process_that_failed_does_not_wait_for_the_others(backend, world, fails, is_closed, monkeypatch):
    """NCCL closes a group by waiting for all processes, which may wait for this one; the error would not be seen."""
    closed = []

    def run(*_):
        if fails:
            raise RuntimeError("one process failed")

    monkeypatch.setattr(launcher, "run", run)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: closed.append(True))
    try:
        launcher.main("train", ["--cfg-path", "any.yaml"])
    except RuntimeError:
        assert fails
    assert bool(closed) == is_closed


def test_a_group_whose_launcher_names_no_local_rank_is_refused(environment):
    """Kubernetes' operators set RANK and WORLD_SIZE; four whole runs in place of one would look alike."""
    environment(RANK="3", WORLD_SIZE="4")
    assert refused().startswith("the environment has WORLD_SIZE: 4 and no LOCAL_RANK, so each of these processes would")


def test_a_process_without_a_gpu_of_its_own_is_refused(environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    environment(RANK="2", WORLD_SIZE="3", LOCAL_RANK="2", CUDA_VISIBLE_DEVICES="0,1")
    assert "LOCAL_RANK 2 needs a GPU of its own, and torch sees 2 (CUDA_VISIBLE_DEVICES: 0,1)" in refused("cuda")


def test_lone_processes_of_another_launcher_are_told(environment, caplog):
    """A batch script has the number of the job's tasks, but only a step of srun that of processes side by side."""
    environment(SLURM_NTASKS="8")
    launcher._warn_of_other_launchers(OmegaConf.create({"distributed": False}))
    environment(SLURM_STEP_NUM_TASKS="8")
    launcher._warn_of_other_launchers(OmegaConf.create({"distributed": True}))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        launcher._warn_of_other_launchers(OmegaConf.create({"distributed": False}))
    assert caplog.messages[0].startswith("srun has started 8 processes, and each of them trains or evaluates alone")
