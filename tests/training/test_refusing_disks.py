"""Read-only caches and full disks end a run with one sentence; processes have equal frozen weights."""

from __future__ import annotations

import builtins
import errno
import os
import tempfile
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launched import in_two_processes
from lavis.runners import runner_base
from omegaconf import OmegaConf

from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.garments import world
from lavis_cir_plugin.training import config, launcher, resumable_runner

DEMO = ["--cfg-path", str(PROJECTS / "wrf4cir/demo.yaml"), "--options"]


def refuse(number):
    def raise_error(*_, **__):
        raise OSError(number, os.strerror(number))

    return raise_error


def test_a_cache_folder_that_cannot_be_made_is_one_sentence(tmp_path, monkeypatch):
    """A file in place of the folder refuses every user, root included."""
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        SystemExit, match=r"^lavis\.train: garments: .*cannot be drawn \(Not a directory\); .* XDG_CACHE"
    ):
        launcher.main("train", [*DEMO, f"run.output_dir={tmp_path / 'out'}"])


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["mkdtemp", "open"])
def test_a_read_only_cache_is_one_sentence(tmp_path, monkeypatch, number, call):
    monkeypatch.setattr(tempfile if call == "mkdtemp" else os, call, refuse(number))
    with pytest.raises(OSError, match=r"garments: .* cannot be drawn") as caught:
        world.make_once(tmp_path / "w", {}, lambda part: None)
    assert launcher._sentence_for_user(caught.value) == (
        f"garments: {tmp_path / 'w'} cannot be drawn ({os.strerror(number)}); free some space there, or set "
        "XDG_CACHE_HOME to a folder that can be written."
    )


def test_a_world_that_is_whole_is_read_from_a_read_only_cache(tmp_path, monkeypatch):
    place = world.make_once(tmp_path / "w", {}, lambda part: None)
    monkeypatch.setattr(os, "open", refuse(errno.EROFS))
    assert world.make_once(tmp_path / "w", {}, lambda part: None) == place


def test_no_message_names_the_unfinished_folder(tmp_path):
    def write(part):
        with world.explain_full_disk(part, 30, (40, 50)):
            refuse(errno.ENOSPC)()

    with pytest.raises(OSError, match=r"no space left") as caught:
        world.make_once(tmp_path / "w", {}, write)
    assert ".part-" not in str(caught.value)
    assert f"garments: no space left on the disk of {tmp_path / 'w'} while" in str(caught.value)


class FullFile:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    write = staticmethod(refuse(errno.ENOSPC))


def test_a_disk_with_no_byte_left_for_the_config_is_one_sentence(tmp_path, monkeypatch):
    """As on a full disk, the file is created but cannot be written; LAVIS's log_config writes first."""
    stock = builtins.open
    monkeypatch.setattr(
        runner_base,
        "open",
        lambda path, *mode: FullFile() if path.endswith("log.txt") else stock(path, *mode),
        raising=False,
    )
    runner = resumable_runner.resumable(runner_base.RunnerBase).__new__(
        resumable_runner.resumable(runner_base.RunnerBase)
    )
    runner._continues, runner.output_dir = False, str(tmp_path)
    runner.config = SimpleNamespace(to_dict=dict)
    runner.best, runner.run_log = {"epoch": 0}, None
    for write in (runner.log_config, lambda: runner.log_stats({"loss": 1}, "train")):
        with pytest.raises(OSError, match="cannot be written") as caught:
            write()
        assert launcher._sentence_for_user(caught.value).startswith(
            f"{tmp_path}/log.txt cannot be written (No space left on"
        )


def test_a_refusal_in_any_library_is_one_sentence(tmp_path):
    """The last frames of the traceback are torch's."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as caught:  # noqa: PT011 (any message)
        os.makedirs(tmp_path / "file" / "folder")
    assert launcher._sentence_for_user(caught.value) == (
        f"{tmp_path}/file/folder cannot be written or read (Not a directory); free some space there, or choose another "
        "folder (runs are below run.output_dir, the cache below XDG_CACHE_HOME, and LAVIS's downloads below "
        "env.cache_root of LAVIS's own configs/default.yaml)."
    )


def test_a_config_needs_no_room_on_a_disk(monkeypatch):
    monkeypatch.setattr(tempfile, "mkdtemp", refuse(errno.ENOSPC))
    cfg = config.with_lavis_defaults(config.read_config(str(PROJECTS / "wrf4cir/demo.yaml"), ["run.seed=7"]))
    assert cfg.run_cfg.seed == 7
    assert "fashioniq" in cfg.datasets_cfg


def build(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    cfg = SimpleNamespace(
        run_cfg=OmegaConf.create({"seed": 5}), model_cfg=OmegaConf.create({"arch": "any", "load_finetuned": False})
    )
    launcher._seed(5 + rank)
    task = SimpleNamespace(build_model=lambda cfg: torch.nn.Linear(4, 4))
    weights = launcher._build_model(task, cfg).weight.detach().clone()
    torch.save((weights, torch.rand(3)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_what_is_built_is_the_same_on_every_rank_and_what_follows_is_not(tmp_path):
    in_two_processes(build, str(tmp_path))
    (first, drawn), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(drawn, other)
    torch.manual_seed(5)  # the first rank's numbers are those of a process alone
    assert torch.equal(torch.nn.Linear(4, 4).weight, first)
    assert torch.equal(torch.rand(3), drawn)
