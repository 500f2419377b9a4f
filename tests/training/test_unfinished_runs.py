"""A new run warns about unfinished runs of the same config: still going on, stopped too early, or not asked for."""

from __future__ import annotations

import json
import os

import pytest
import torch

from lavis_cir_plugin.training.run_folders import LAST, find_checkpoint, lock_run

CONFIG = {"run": {"seed": 1, "resume_ckpt_path": None}, "model": {"arch": "a"}, "datasets": {"d": {}}}


@pytest.fixture
def left(tmp_path):
    """Return a factory of folders of unfinished runs."""

    def leave(name, saved=True, config=CONFIG, age=0):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "log.txt").write_text(json.dumps(config) + "\n")
        os.utime(folder / "log.txt", (1e9 - age, 1e9 - age))
        if saved:
            torch.save({"model": {}}, folder / LAST)
        return folder

    return leave


def test_auto_goes_on_without_a_word(left, tmp_path, caplog):
    folder = left("a")
    assert find_checkpoint("auto", str(tmp_path), CONFIG) == folder / LAST
    assert not caplog.text


@pytest.mark.parametrize("asked", ["auto", None])
def test_a_run_that_is_going_on_is_named_with_its_process(left, tmp_path, caplog, asked):
    folder = left("a")
    with lock_run(folder):
        assert find_checkpoint(asked, str(tmp_path), CONFIG) is None
    begin = f"a new run starts beside an unfinished one of the same config: {folder} (it is still going on in process"
    assert f"{begin} {os.getpid()} on " in caplog.text


def test_a_run_without_a_checkpoint_is_named(left, tmp_path, caplog):
    folder = left("a", saved=False)
    assert find_checkpoint("auto", str(tmp_path), CONFIG) is None
    assert f"{folder} (it was stopped before its first {LAST}; run.save_every writes it sooner)" in caplog.text


def test_who_did_not_ask_learns_how_to_go_on(left, tmp_path, caplog):
    """If there are two such runs, the warning names the younger one."""
    left("old", age=100)
    folder = left("new")
    assert find_checkpoint(None, str(tmp_path), CONFIG) is None
    assert f"{folder} (run.resume_ckpt_path=auto would go on with it), and 1 more" in caplog.text


@pytest.mark.parametrize("content", [b"2024-05-01 12:00", b"[1, 2]", b'{"run": null}', b'{"run": "\xe9"}', None])
def test_files_of_others_that_are_called_like_a_log_are_no_matter(left, tmp_path, caplog, content):
    folder = tmp_path / "foreign"
    folder.mkdir()
    if content is None:
        (folder / "log.txt").symlink_to(tmp_path / "gone")
    else:
        (folder / "log.txt").write_bytes(content)
    (tmp_path / "odd" / "log.txt").mkdir(parents=True)
    assert find_checkpoint(None, str(tmp_path), CONFIG) is None
    assert find_checkpoint("auto", str(tmp_path), CONFIG) is None
    assert not caplog.text
    own = left("own")
    assert find_checkpoint("auto", str(tmp_path), CONFIG) == own / LAST


def test_runs_of_another_config_and_finished_ones_are_no_matter(left, tmp_path, caplog):
    left("other", config={**CONFIG, "model": {"arch": "b"}})
    with (left("finished") / "log.txt").open("a") as log:
        log.write('{"run_finished": true}\n')
    assert find_checkpoint("auto", str(tmp_path), CONFIG) is None
    assert not caplog.text
