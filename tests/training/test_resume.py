"""Killed and resumed runs end with the weights, metrics and logs of uninterrupted ones, bit for bit; refusals.

``CIR_KILLS=20 python -m pytest tests/training/test_resume.py`` kills each kind of run at 20 random moments.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from launched import finish, start_launcher
from omegaconf import OmegaConf

from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.core import checkpoints
from lavis_cir_plugin.core.checkpoints import read_checkpoint, verify_checkpoint
from lavis_cir_plugin.garments import GarmentsConfig, make_garments
from lavis_cir_plugin.report.run_log import read_steps
from lavis_cir_plugin.training import launcher, run_folders
from lavis_cir_plugin.training.remaining_epoch import is_save_due
from lavis_cir_plugin.training.resumable_runner import ResumableRunner
from lavis_cir_plugin.training.resume_checks import check_saved_run
from lavis_cir_plugin.training.run_folders import BEST, LAST, lock_run

pytestmark = pytest.mark.usefixtures("blank_pictures")
KILLS = int(os.environ.get("CIR_KILLS", "2"))
WORLD = {
    "train_triplets": 12, "train_images": 20, "val_queries": 6, "val_images": 10, "test_queries": 3, "test_images": 6,
    "image_width": 48, "image_height": 60,
}  # fmt: skip

# Every kind of state: dropout, a kept direction, accumulated gradients left over at the end of an epoch, best-so-far,
# the average of the weights.
CHANGES = {
    "datasets": {"fashioniq": {"noise_ratio": 0.25, "noise_seed": 1}},
    "model": {
        "vit_config": {"patch_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2},
        "qformer_config": {
            "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64,
            "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
        },
    },
    "run": {
        "wrf": {"gamma": 0.05, "every": 2, "warmup_epochs": 0}, "max_epoch": 3, "batch_size_train": 4,
        "accum_grad_iters": 2, "save_every": 2, "log_freq": 2, "resume_ckpt_path": "auto", "warmup_steps": 3,
        "ema_decay": 0.9,
    },
}  # fmt: skip
ITERATIONS = {"runner": "runner_wrf4cir_iter", "max_iters": 16, "iters_per_inner_epoch": 5, "max_epoch": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_garments(tmp_path_factory.mktemp("cache"), GarmentsConfig(**WORLD))


def write_project(folder, world, **run):
    cfg = OmegaConf.load(PROJECTS / "wrf4cir/demo.yaml")
    cfg.datasets.fashioniq = {
        "build_info": {"root": str(world)},
        "vis_processor": {stage: {"name": "target_pad", "image_size": 64} for stage in ("train", "eval")},
    }
    path = folder / f"{len(list(folder.glob('*.yaml')))}.yaml"
    OmegaConf.save(OmegaConf.merge(cfg, CHANGES, {"run": run}), path)
    return str(path)


@pytest.fixture
def project(tmp_path, world):
    """Return a factory of project files; each call may change keys of ``run``."""
    return lambda **run: write_project(tmp_path, world, **run)


def start(project, output, world_size=1):
    """Start the processes of a run."""
    arguments = ["--cfg-path", project, "--options", f"run.output_dir={output}"]
    return start_launcher("train", arguments, log_of(output), world_size)


def log_of(output):
    return Path(f"{output}.log")


def is_finished(output, folder="*"):
    return any("run_finished" in log.read_text() for log in output.glob(f"{folder}/log.txt"))


def outcome(output):
    """Return everything that a run leaves and that must not depend on when it was killed."""
    folders = sorted(output.iterdir())
    left = []
    for folder in folders:
        log = (folder / "log.txt").read_text()
        _, end = json.JSONDecoder().raw_decode(log)  # the config, which names the folder
        names = ("steps.csv", "epochs.csv", "noise.json", "val/metrics.json")
        files = {name: (folder / name).read_text() for name in names}
        states = {}
        for name in ("checkpoint_last.pth", "checkpoint_best.pth"):
            saved = read_checkpoint(str(folder / name))
            del saved["config"]
            states[name] = saved
        states["checkpoint_last.pth"]["progress"].pop("logs")
        left.append((log[end:], files, states))
    return left


def assert_same(left, right):
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right):
            assert_same(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


@pytest.mark.parametrize("style", ["epochs", "iterations"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_run_ends_as_if_it_had_not_been(world_size, style, project, tmp_path):
    """SIGKILL ends all processes at random moments, also while a checkpoint is written."""
    path = project(**(ITERATIONS if style == "iterations" else {}))
    begin = time.monotonic()
    finish(start(path, tmp_path / "whole", world_size), log_of(tmp_path / "whole"))
    duration = time.monotonic() - begin
    expected = outcome(tmp_path / "whole")
    moments = random.Random(f"{world_size}/{style}")
    for kill in range(KILLS):
        output = tmp_path / f"killed_{kill}"
        processes = start(path, output, world_size)
        time.sleep(moments.uniform(0.2, 1) * duration)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        if not is_finished(output):
            finish(start(path, output, world_size), log_of(output))
        for folder in output.iterdir():
            if not (folder / "log.txt").is_file() or not is_finished(folder.parent, folder.name):
                shutil.rmtree(folder)  # killed before there was anything to go on from
        assert_same(outcome(output), expected)


@pytest.fixture(scope="module")
def stopped_once(world, tmp_path_factory):
    """Return the folder of a run that stopped after its fourth checkpoint."""
    saved = []

    def stop_after_four(*arguments, **named):
        checkpoints.write_checkpoint(*arguments, **named)
        saved.append(1)
        if len(saved) == 4:
            raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folders, "write_checkpoint", stop_after_four)
        path = write_project(folder, world)
        with pytest.raises(KeyboardInterrupt):
            launcher.main("train", ["--cfg-path", path, "--options", f"run.output_dir={folder / 'out'}"])
    return next((folder / "out").iterdir())


@pytest.fixture
def stopped(stopped_once, project, tmp_path):
    """Return a copy of that run, and a function that goes on with it."""
    folder = tmp_path / "out/run"
    shutil.copytree(stopped_once, folder)

    def go_on(*options, asked=folder, **run):
        options = [*options, f"run.output_dir={tmp_path / 'out'}", f"run.resume_ckpt_path={asked}"]
        launcher.main("train", ["--cfg-path", project(**run), "--options", *options])

    return folder, go_on


def damage(path):
    """Flip one byte in the middle of a tensor, which torch would load without an error."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", [damage, lambda path: path.write_bytes(path.read_bytes()[:-1000]), Path.unlink])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(harm, stopped, caplog):
    folder, go_on = stopped
    harm(folder / "checkpoint_last.pth")
    with caplog.at_level("WARNING"):
        go_on("run.max_epoch=2")
    assert is_finished(folder.parent)
    if harm is not Path.unlink:
        assert re.search(r"last\.pth is damaged or was only half written .* checkpoint_previous", caplog.text)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "the run goes on in its own folder"


def test_two_damaged_checkpoints_are_an_error_that_names_both(stopped):
    folder, go_on = stopped
    for name in ("checkpoint_last.pth", "checkpoint_previous.pth"):
        damage(folder / name)
    with pytest.raises(SystemExit, match=r"no checkpoint in .* is whole: .*last\.pth is dam.*previous\.pth is dam"):
        go_on()


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"batch_size_train": 3}, r"run\.batch_size_train: 3 differs from 4 in .*the order of the data follows"),
        ({"seed": 1}, r"run\.seed: 1 differs from 42"),
        ({"runner": "runner_wrf4cir_iter", "max_iters": 9, "iters_per_inner_epoch": 3, "max_epoch": None},
         r"counts no iters, so it was written by another kind of runner than run\.runner: runner_wrf4cir_iter"),
    ],
)  # fmt: skip
def test_what_cannot_go_on_is_refused(run, message, stopped):
    _, go_on = stopped
    with pytest.raises(SystemExit, match=message):
        go_on(**run)


def saved_content():
    """Return made-up content with the structure of a run's checkpoint, progress included."""
    own = {"random_state": {"python": [3]}, "meters": {}}
    return {
        "model": {"weight": torch.zeros(2)},
        "optimizer": {"state": {}, "param_groups": [{"params": [0]}]},
        "config": {"run": {}},
        "scaler": None,
        "epoch": 0,
        "progress": {
            "place": 1, "batches": 0, "taken": [3], "lengths": [3], "processes": [own], "gradients": {},
            "best": {"epoch": 0, "metric": 0.0}, "logs": {"log.txt": 7},
        },
    }  # fmt: skip


def test_what_a_run_saves_can_be_gone_on_from(stopped_once):
    check_saved_run(saved_content(), "x.pth", "epoch", "runner_base")
    check_saved_run(read_checkpoint(str(stopped_once / "checkpoint_last.pth")), "x.pth", "epoch", "runner_base")
    plain = {key: value for key, value in saved_content().items() if key in ("model", "optimizer", "epoch")}
    check_saved_run(plain, "x.pth", "epoch", "runner_base")  # LAVIS's own, without a scaler


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ("model", None, "has model: None, and it must be tensors by name;"),
        ("model", {}, "has model: {}, and it must be tensors by name;"),
        ("model", {"weight": 3}, "has model: a dict, and it must be tensors by name;"),
        ("optimizer", {}, "has optimizer: {}, and it must be an optimizer's state and param_groups;"),
        ("optimizer", [], r"has optimizer: \[\], and it must be an optimizer's"),
        ("optimizer param_groups", [{}], "has optimizer: a dict, and it must be an optimizer's"),
        ("epoch", "3", "has epoch: '3', and it must be a whole number;"),
        ("epoch", True, "has epoch: True, and it must be a whole number;"),
        ("scaler", 1, "has scaler: 1, and it must be a mapping or null;"),
        ("config", None, "has config: None, and it must be a run's config;"),
        ("config run", "x", "has config: a dict, and it must be a run's config;"),
        ("progress", None, "has progress: None, and it must be a mapping;"),
        ("progress", {}, r"has progress\.place: None, and it must be a whole number >= 0;"),
        ("progress batches", -1, r"has progress\.batches: -1, and it must be a whole number >= 0;"),
        ("progress taken", [1.5], r"has progress\.taken: a list, and it must be a list of whole numbers;"),
        ("progress processes", [{}], r"has progress\.processes: a list, and it must be a list of each process's"),
        ("progress gradients", {"weight": 1}, r"has progress\.gradients: a dict, and it must be tensors by name;"),
        ("progress best", {}, r"has progress\.best: {}, and it must be an epoch and a metric;"),
        ("progress logs", {"log.txt": "7"}, r"has progress\.logs: a dict, and it must be sizes by the name"),
    ],
)
def test_what_nobody_can_go_on_from_gets_a_sentence(keys, value, message):
    saved = saved_content()
    *parents, last = keys.split()
    inner = saved[parents[0]] if parents else saved
    inner[last] = value
    with pytest.raises(ValueError, match=rf"run\.resume_ckpt_path: x\.pth {message}"):
        check_saved_run(saved, "x.pth", "epoch", "runner_base")


@pytest.mark.parametrize("content", [[1], None, {"model": {}}, {"a": torch.zeros(1)}])
def test_what_is_no_checkpoint_of_a_run_gets_a_sentence(content):
    with pytest.raises(ValueError, match=r"x\.pth holds no .*optimizer, so it is no checkpoint of a LAVIS run"):
        check_saved_run(content, "x.pth", "epoch", "runner_base")


def test_progress_without_a_config_is_refused_by_the_run(stopped):
    folder, go_on = stopped
    saved = read_checkpoint(str(folder / "checkpoint_last.pth"))
    torch.save({key: value for key, value in saved.items() if key != "config"}, folder / "checkpoint_last.pth")
    with pytest.raises(SystemExit, match=r"holds progress and no config, so that nothing tells whether the order"):
        go_on()
    stranger = {**saved["progress"], "gradients": {"no.such": torch.zeros(1)}}
    torch.save({**saved, "progress": stranger}, folder / "checkpoint_last.pth")
    with pytest.raises(SystemExit, match=r"has progress\.gradients: 'no\.such', and it must be of a tensor that this"):
        go_on()


def test_another_number_of_processes_is_refused(stopped):
    folder, go_on = stopped
    saved = read_checkpoint(str(folder / "checkpoint_last.pth"))
    saved["progress"]["processes"] *= 2
    torch.save(saved, folder / "checkpoint_last.pth")
    with pytest.raises(SystemExit, match=r"was written by 2 processes and this run has 1; start as many"):
        go_on()


def test_a_run_that_goes_on_keeps_what_the_checkpoint_was_trained_on(stopped):
    folder, go_on = stopped
    run_folders.write_run_checkpoint(folder, {**read_checkpoint(str(folder / LAST)), "trained_on": ["cirr"]}, LAST)
    go_on("run.max_epoch=2")
    assert read_checkpoint(str(folder / LAST))["trained_on"] == ["cirr", "fashioniq"]


def test_a_run_whose_checkpoint_is_a_link_goes_on_in_its_folder(stopped, tmp_path):
    """Somebody has moved it to a larger disk."""
    folder, go_on = stopped
    (folder / LAST).rename(tmp_path / "moved.pth")
    (folder / LAST).symlink_to(tmp_path / "moved.pth")
    go_on("run.max_epoch=2", asked=folder / LAST)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [folder.name]
    assert is_finished(tmp_path / "out")


def test_another_radius_is_a_warning(stopped, caplog):
    _, go_on = stopped
    with caplog.at_level("WARNING"):
        go_on("run.wrf.gamma=0.01", "run.max_epoch=2")
    assert "run.wrf is {'gamma': 0.01" in caplog.text


def test_a_folder_without_a_checkpoint_is_refused(stopped, tmp_path):
    _, go_on = stopped
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"holds no checkpoint_last\.pth; a run writes it after its first epoch"):
        go_on(asked=tmp_path / "empty")


def test_auto_leaves_a_run_of_another_config_alone(stopped):
    folder, go_on = stopped
    go_on("run.init_lr=0.001", "run.max_epoch=1", asked="auto")
    assert len(list(folder.parent.iterdir())) == 2
    assert not is_finished(folder.parent, folder.name)


def test_a_damaged_checkpoint_never_replaces_the_good_one_before(stopped, monkeypatch):
    """After a resume from the previous checkpoint, the next save must not replace it by the damaged file."""
    folder, go_on = stopped
    damage(folder / "checkpoint_last.pth")
    saved = []

    def stop_after_one(*arguments, **named):
        checkpoints.write_checkpoint(*arguments, **named)
        saved.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folders, "write_checkpoint", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        go_on()
    for name in ("checkpoint_last.pth", "checkpoint_previous.pth"):
        verify_checkpoint(folder / name)


def test_a_run_that_is_still_going_on_is_left_alone(stopped):
    """auto starts another run, and a resume by name is refused; the lock ends with its process in any case."""
    folder, go_on = stopped
    lock = lock_run(folder)
    with pytest.raises(SystemExit, match=r"is still going on in process \d+ on .* wait for its end"):
        go_on()
    go_on("run.max_epoch=1", asked="auto")
    assert len(list(folder.parent.iterdir())) == 2
    lock.release()


def test_a_log_that_is_younger_than_the_checkpoint_is_cut(stopped):
    folder, go_on = stopped
    (folder / "evaluate.txt").write_text("a line of the time after the checkpoint\n")
    go_on()
    assert (folder / "evaluate.txt").read_text() == ""


def test_a_log_that_has_lost_lines_is_not_filled_up(stopped):
    """After a crash of the machine a log can be shorter than the checkpoint says; zeros would damage it for good."""
    folder, go_on = stopped
    steps = folder / "steps.csv"
    steps.write_text("".join(steps.read_text().splitlines(keepends=True)[:-1]))
    go_on()
    assert "\0" not in steps.read_text()
    read_steps(steps)


def test_a_copied_checkpoint_begins_a_run_of_its_own(stopped, tmp_path, caplog):
    folder, go_on = stopped
    shutil.copy(folder / "checkpoint_last.pth", tmp_path / "copy.pth")
    go_on(asked=tmp_path / "copy.pth")
    (other,) = (path for path in folder.parent.iterdir() if path != folder)
    assert "is another run's; this one begins a folder and a best epoch of its own" in caplog.text
    assert (other / "log.txt").read_text().startswith("{\n")
    assert (other / "checkpoint_best.pth").is_file()


def test_other_training_data_are_refused(stopped, tmp_path_factory):
    _, go_on = stopped
    other = make_garments(tmp_path_factory.mktemp("other"), GarmentsConfig(**{**WORLD, "train_triplets": 16}))
    with pytest.raises(SystemExit, match=r"was written with \[9\] training batches an epoch and there are \[12\] now"):
        go_on(f"datasets.fashioniq.build_info.root={other}")


def test_the_config_decides_about_weight_decay_and_the_radius_of_adam(stopped):
    folder, go_on = stopped
    go_on("run.weight_decay=0.5", "run.adam_eps=1e-3", "run.max_epoch=1")
    groups = read_checkpoint(str(folder / LAST))["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5, 0}
    assert {group["eps"] for group in groups} == {1e-3}


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_evaluation_does_not_touch_the_run(command, stopped, project, tmp_path):
    folder, _ = stopped
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    options = ["run.evaluate=true", f"run.output_dir={tmp_path / 'out'}", f"run.resume_ckpt_path={folder}"]
    with pytest.raises(SystemExit, match=r"resume_ckpt_path goes on with a training run; to evaluate one set model"):
        launcher.main(command, ["--cfg-path", project(), "--options", *options])
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before


def test_a_finished_run_only_evaluates_again(stopped):
    folder, go_on = stopped
    go_on()
    steps = (folder / "steps.csv").read_text()
    (folder / "val" / "metrics.json").unlink()
    go_on()
    assert (folder / "val" / "metrics.json").is_file()
    assert (folder / "steps.csv").read_text() == steps


def test_a_run_that_has_lost_its_best_checkpoint_chooses_among_the_epochs_that_follow(stopped, caplog):
    folder, go_on = stopped
    go_on()
    (folder / BEST).unlink()
    with caplog.at_level(logging.WARNING):
        go_on("run.max_epoch=4")
    assert f"{folder} lacks the checkpoint_best.pth of epoch " in caplog.text
    assert read_checkpoint(str(folder / BEST))["epoch"] == 3


def test_checkpoints_are_saved_at_the_next_batch_that_ends_an_accumulation():
    """Every fifth batch is due; with two batches a step that is the sixth, and then the tenth."""
    assert [done for done in range(1, 13) if is_save_due(done, every=5, accumulated=2)] == [6, 10]
    assert not any(is_save_due(done, every=None, accumulated=1) for done in range(1, 13))


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_malicious_checkpoint_does_not_run(stopped, tmp_path, monkeypatch):
    folder, go_on = stopped
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint_last.pth", "checkpoint_previous.pth"):
        torch.save({"model": Evil(), "optimizer": {}}, folder / name)
    with pytest.raises(SystemExit, match=r"an object of (posix|nt)\.system beside its tensors, and such objects"):
        go_on()
    assert not (tmp_path / "pwned").exists()
    pickle.loads(pickle.dumps(Evil()))  # what would have happened
    assert (tmp_path / "pwned").exists()


def test_a_full_disk_stops_the_run_and_keeps_the_last_good_checkpoint(stopped):
    """To the writer, a limit on the size of files looks like a full disk."""
    folder, go_on = stopped
    before = {name: (folder / name).read_bytes() for name in ("checkpoint_last.pth", "checkpoint_previous.pth")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["checkpoint_last.pth"]) // 2, limits[1]))
    try:
        with pytest.raises(SystemExit, match=r"no checkpoint could be written to .*untouched; free some space"):
            go_on()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not list(folder.glob(".*"))
    go_on()
    assert is_finished(folder.parent)


def test_a_loss_that_is_not_a_number_stops_the_run(stopped):
    folder, go_on = stopped
    with pytest.raises(SystemExit, match=r"training loss is (nan|inf) in epoch 1, batch \d+; lower run\.init_lr"):
        go_on("run.init_lr=1e30")
    verify_checkpoint(folder / "checkpoint_last.pth")


@pytest.mark.parametrize("style", ["epochs", "iterations"])
def test_what_ends_the_first_validation_loses_nothing_of_the_epoch(style, project, tmp_path, monkeypatch, capsys):
    """SIGTERM at the first validation gives one line and exit code 143; the resumed run loses nothing."""
    changes = {"max_epoch": 2, "save_every": None} if style == "epochs" else {**ITERATIONS, "save_every": None}
    path = project(**changes)

    def train(name):
        launcher.main("train", ["--cfg-path", path, "--options", f"run.output_dir={tmp_path / name}"])

    train("whole")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(ResumableRunner, "eval_epoch", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            train("stopped")
    assert stopped.value.code == 143
    (folder,) = (tmp_path / "stopped").iterdir()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lavis.train: stopped")]
    place = "epoch 0, batch 9" if style == "epochs" else "iteration 5"
    assert lines == [
        f"lavis.train: stopped by SIGTERM; {folder}/checkpoint_last.pth holds the run up to {place}; add --options "
        f"run.resume_ckpt_path={folder} to the same command to go on from there."
    ]
    steps = (folder / "steps.csv").read_text()
    train("stopped")
    assert (folder / "steps.csv").read_text().startswith(steps), "no batch is trained twice"
    assert_same(outcome(tmp_path / "stopped"), outcome(tmp_path / "whole"))


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_at_a_run_with_workers_ends_it_with_one_line(signum, code, project, tmp_path):
    path = project(num_workers=2, max_epoch=50)
    output = tmp_path / "out"
    (process,) = start(path, output)
    end = time.monotonic() + 300
    while not list(output.glob("*/checkpoint_last.pth")):
        assert time.monotonic() < end
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signum)
    process.join(120)
    assert process.exitcode == code
    said = Path(f"{output}.log").read_text()
    assert said.count(f"lavis.train: stopped by {signal.Signals(signum).name}; ") == 1
    assert "Traceback" not in said
