"""OpenMP's threads sleep while they wait in CPU runs, unless the user chose otherwise; workers take one thread each."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lavis_cir_hook import wait_passively
from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.core.workers import worker_setup


def policy(*arguments, **environment):
    wait_passively(arguments, environment)
    return environment.get("OMP_WAIT_POLICY")


@pytest.mark.parametrize("text", ["run:\n  device: cpu\n", "run: {device: 'cpu'}", 'run: {amp: false, device: "cpu"}'])
def test_a_cpu_run_by_its_project_waits_passively(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert policy("-m", "--cfg-path", str(path)) == "PASSIVE"
    assert policy("-m", f"--cfg-path={path}", "--options", "run.seed=1") == "PASSIVE"
    assert policy("-m", "--cfg-path", str(path), "--options", "run.device=cuda") is None


def test_the_last_option_decides():
    options = ("-m", "--cfg-path", "none.yaml", "--options", "run.device=cuda", "run.device=cpu")
    assert policy(*options) == "PASSIVE"
    assert policy(*options, "run.device=cuda") is None


def test_every_shipped_project_is_understood(monkeypatch, tmp_path):
    """The text search finds what a parser finds, also from a folder without projects/."""
    from omegaconf import OmegaConf

    monkeypatch.chdir(tmp_path)
    found = set()
    for path in PROJECTS.rglob("*.yaml"):
        device = OmegaConf.load(path).run.get("device")
        expected = "PASSIVE" if device == "cpu" else None
        assert policy("-m", "--cfg-path", f"projects/{path.relative_to(PROJECTS)}") == expected, path
        found.add(expected)
    assert found == {"PASSIVE", None}


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_the_users_choice_stays(name):
    environment = {name: "ACTIVE"}
    wait_passively(["-m", "--cfg-path", "x", "run.device=cpu"], environment)
    assert environment == {name: "ACTIVE"}


def test_other_programs_are_left_alone(tmp_path):
    for arguments in (
        [],
        ["-c"],
        ["-m", "pytest"],
        ["train.py", "--cfg-path", "x", "run.device=cpu"],
        ["-m", "--cfg-path"],
    ):
        assert policy(*arguments) is None
    (tmp_path / "a.yaml").write_text("run: {my_device: cpu}")
    assert policy("-m", "--cfg-path", str(tmp_path / "a.yaml")) is None


def test_lavis_cir_waits_passively():
    assert policy("/usr/bin/lavis-cir", "check", "/data") == "PASSIVE"
    assert policy("lavis-cir.exe", "check") == "PASSIVE"


def test_it_is_set_before_lavis_loads_torch(tmp_path):
    """A stand-in for LAVIS prints the variable when ``python -m lavis.train`` imports it."""
    (tmp_path / "lavis").mkdir()
    (tmp_path / "lavis/__init__.py").write_text(
        "import os, sys\nprint(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)\nsys.exit(0)\n"
    )
    (tmp_path / "sitecustomize.py").write_text("import lavis_cir_hook\nlavis_cir_hook.install()\n")
    checkout = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{checkout}"
    command = [sys.executable, "-m", "lavis.train", "--cfg-path", "projects/wrf4cir/demo.yaml"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert said.split()[0] == "PASSIVE"


def count_threads(queue, setup):
    setup(0)
    queue.put(torch.get_num_threads())


def test_a_worker_takes_one_thread():
    context, threads = multiprocessing.get_context("fork"), torch.get_num_threads()
    queue = context.Queue()
    torch.set_num_threads(2)
    try:
        worker = context.Process(target=count_threads, args=(queue, worker_setup()))
        worker.start()
        assert queue.get(timeout=120) == 1
        worker.join()
    finally:
        torch.set_num_threads(threads)
