"""A run's log files: their content, how they survive a crash, a resume and a full disk, and the progress bar."""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lavis_cir_plugin.methods.wrf4cir.runner import RunnerWrf4Cir
from lavis_cir_plugin.report.run_log import RunLog, progress, read_epochs, read_steps

FULL = {"loss": 2.5, "lr": 1e-5, "perturbation_norm": 0.25, "cosine": 0.75}


WRF = RunnerWrf4Cir.LOG_COLUMNS


def scalars(folder, tag):
    """Return ``{step: value}`` as TensorBoard shows it."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_steps_are_rows_with_fixed_columns(tmp_path):
    log = RunLog(tmp_path, columns=WRF)
    log.log_step(0, 0, FULL)
    log.log_step(1, 0, {"lr": 2e-5, "loss": float("nan")})
    assert (tmp_path / "steps.csv").read_text() == (  # the log is still open, because a killed run must lose no row
        "step,epoch,loss,lr,perturbation_norm,cosine\n0,0,2.5,1e-05,0.25,0.75\n1,0,nan,2e-05,,\n"
    )
    steps = read_steps(tmp_path / "steps.csv")
    assert steps["step"] == [0, 1]
    assert steps["lr"] == [1e-5, 2e-5]
    assert steps["cosine"][0] == 0.75
    assert all(math.isnan(steps[name][1]) for name in ("loss", "perturbation_norm", "cosine"))
    log.close()


def test_epochs_are_long_rows_of_what_is_a_number(tmp_path):
    """LAVIS returns training means as text, and its VQA metric holds a table per answer type."""
    log = RunLog(tmp_path, columns=WRF)
    log.log_epoch(9, 0, "train", {"loss": "1.250", "lr": "0.000"})
    log.log_epoch(9, 0, "val", {"mean": 12.5, "perAnswerType": {"other": 1.0}, "note": "text", "best_epoch": 0})
    log.log_epoch(19, 1, "val", {"mean": 25})
    log.close()
    assert read_epochs(tmp_path / "epochs.csv") == {
        "train": {"loss": {0: 1.25}, "lr": {0: 0.0}},
        "val": {"mean": {0: 12.5, 1: 25.0}, "best_epoch": {0: 0.0}},
    }
    assert (tmp_path / "epochs.csv").read_text().splitlines()[:2] == ["epoch,split,metric,value", "0,train,loss,1.25"]


def test_float32_survives_the_file(tmp_path):
    """0.1 in float32 is 0.100000001490116..., and nine digits distinguish it from its neighbours 7.5e-9 away."""
    value = 0.10000000149011612
    log = RunLog(tmp_path, columns=WRF)
    log.log_step(0, 0, {"loss": value})
    (read,) = read_steps(tmp_path / "steps.csv")["loss"]
    assert abs(read - value) < 3.7e-9
    log.close()


def test_tensorboard_has_the_same_numbers(tmp_path):
    log = RunLog(tmp_path, columns=WRF)
    log.log_step(0, 0, FULL)
    log.log_step(1, 0, {"loss": 2.0, "lr": 1e-5})
    log.log_epoch(1, 0, "train", {"loss": 2.25})
    log.log_epoch(1, 0, "seen", {"R@10": 50.0})
    log.close()
    assert scalars(tmp_path, "train/loss") == {0: 2.5, 1: 2.0}  # without the mean of the epoch
    assert scalars(tmp_path, "wrf/perturbation_norm") == {0: 0.25}
    assert scalars(tmp_path, "wrf/cosine") == {0: 0.75}
    assert scalars(tmp_path, "seen/R@10") == {1: 50.0}


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    """The run is killed after step 3 and resumed at step 2 with the files as they were after step 1."""
    log = RunLog(tmp_path, columns=WRF)
    sizes = {}
    for step in range(4):
        if step == 2:
            sizes = {path: path.stat().st_size for path in tmp_path.glob("*.csv")}
        log.log_step(step, 0, {"loss": 10.0 + step})
    log.close()
    for path, size in sizes.items():
        os.truncate(path, size)
    time.sleep(1.1)  # TensorBoard sorts its files by name: the second, then an unpadded number within it
    again = RunLog(tmp_path, 2, WRF)
    again.log_step(2, 0, {"loss": 20.0})
    again.log_epoch(2, 0, "val", {"mean": 5.0})
    again.close()
    assert read_steps(tmp_path / "steps.csv")["loss"] == [10.0, 11.0, 20.0]
    assert read_epochs(tmp_path / "epochs.csv") == {"val": {"mean": {0: 5.0}}}
    assert scalars(tmp_path, "train/loss") == {0: 10.0, 1: 11.0, 2: 20.0}


@pytest.mark.parametrize("failing", ["steps.csv", "epochs.csv", "tensorboard"])
def test_a_full_disk_is_one_warning_and_training_goes_on(tmp_path, caplog, failing):
    log = RunLog(tmp_path, columns=WRF)
    log.log_step(0, 0, FULL)

    class Full:
        def __init__(self, inner):
            self.inner = inner

        def write(self, *_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        add_scalar = close = write

    if failing == "tensorboard":
        log._tensorboard = Full(log._tensorboard)
    else:
        log._files[failing] = Full(log._files[failing])
    with caplog.at_level(logging.WARNING):
        for step in range(1, 4):
            log.log_step(step, 0, {"loss": 1.0})
            log.log_epoch(step, 0, "val", {"mean": 1.0})
        log.close()
    (record,) = caplog.records
    assert "cannot be written (No space left on device)" in record.getMessage()
    assert not log.is_open


@pytest.mark.parametrize(("torn", "steps"), [("0,0,1.0,0.1,,\n1", [0, 2]), ("", [2])])
def test_a_resumed_run_cuts_off_what_a_full_disk_has_left_of_a_row(tmp_path, torn, steps):
    """Joined to the next row, the torn "1" would make a row of step 12. The header may be torn, too."""
    header = ",".join(("step", "epoch", "loss", "lr", *WRF))
    (tmp_path / "steps.csv").write_text(f"{header}\n{torn}" if torn else header[:8])
    log = RunLog(tmp_path, 2, WRF)
    log.log_step(2, 0, {"loss": 3.0})
    log.close()
    assert read_steps(tmp_path / "steps.csv")["step"] == steps


@pytest.mark.parametrize("begun", ["", "epoch,sp"])
def test_a_log_without_a_whole_header_has_no_rows(tmp_path, begun):
    """So a full disk, or a run that has just begun, leaves it."""
    (tmp_path / "epochs.csv").write_text(begun)
    (tmp_path / "steps.csv").write_text(begun)
    assert read_epochs(tmp_path / "epochs.csv") == {}
    assert read_steps(tmp_path / "steps.csv") == {"step": [], "epoch": [], "loss": [], "lr": []}


def test_a_folder_that_is_gone_is_a_warning_as_well(tmp_path, caplog):
    log = RunLog(tmp_path / "gone", columns=WRF)
    log.log_step(0, 0, FULL)
    log.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_without_tensorboard_the_csv_files_are_written(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = RunLog(tmp_path, columns=WRF)
    log.log_step(0, 0, FULL)
    log.log_epoch(0, 0, "val", {"mean": 1.0})
    log.close()
    assert "pip install tensorboard" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epochs.csv", "steps.csv"]
    assert read_steps(tmp_path / "steps.csv")["loss"] == [2.5]


def test_nothing_is_written_after_close(tmp_path):
    log = RunLog(tmp_path, columns=WRF)
    log.close()
    log.log_step(0, 0, FULL)
    log.close()
    assert read_steps(tmp_path / "steps.csv")["loss"] == []


@pytest.mark.parametrize("torn", ["1,0,1", "1,0,1.0,1.0,1.0,1.0", "1"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    """A line without its line end may lack digits even if it looks whole."""
    log = RunLog(tmp_path, columns=WRF)
    log.log_step(0, 0, FULL)
    log.close()
    with (tmp_path / "steps.csv").open("a") as file:
        file.write(torn)
    assert read_steps(tmp_path / "steps.csv")["step"] == [0]


@pytest.mark.parametrize("damaged", ["1,0,1", "1,0,x,1,1,1"])
def test_a_damaged_line_inside_is_named(tmp_path, damaged):
    log = RunLog(tmp_path, columns=WRF)
    log.close()
    with (tmp_path / "steps.csv").open("a") as file:
        file.write(f"{damaged}\n1,0,1,1,1,1\n")
    with pytest.raises(ValueError, match=r"steps\.csv, line 2 is damaged"):
        read_steps(tmp_path / "steps.csv")


def test_what_is_no_log_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"steps\.csv does not exist; a training run writes it"):
        read_steps(tmp_path / "steps.csv")
    (tmp_path / "epochs.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="must start with the columns epoch,split,metric,value"):
        read_epochs(tmp_path / "epochs.csv")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class OnlyNext:
    """Stand in for LAVIS's endless loader of several data sets, which has only ``next``."""

    def __next__(self):
        return 7


@pytest.mark.parametrize("batches", [OnlyNext(), [7, 7, 7]])
def test_a_terminal_shows_a_bar_with_the_time_left(monkeypatch, batches):
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = iter(progress(batches, total=5, initial=2, description="epoch 3"))
    assert [next(bar) for _ in range(3)] == [7, 7, 7]
    del bar
    assert "epoch 3:  40%" in sys.stderr.getvalue()
    assert "2/5 [00:00<" in sys.stderr.getvalue()
    assert sys.stderr.getvalue().endswith("\r")  # the bar was cleared


def test_a_log_file_shows_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress([1, 2], total=2)) == [1, 2]
    assert sys.stderr.getvalue() == ""


def test_other_processes_show_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    assert list(progress([1, 2], total=2)) == [1, 2]
    assert sys.stderr.getvalue() == ""


def test_a_file_keeps_the_columns_that_it_began_with(tmp_path):
    """Version 0.4 gave every run the perturbation's columns. A resumed plain run keeps them and leaves them empty."""
    (tmp_path / "steps.csv").write_text("step,epoch,loss,lr,perturbation_norm,cosine\n0,0,2.5,1e-05,,\n")
    log = RunLog(tmp_path, first_step=1)
    log.log_step(1, 0, {"loss": 2.0, "lr": 1e-5})
    log.close()
    assert (tmp_path / "steps.csv").read_text().splitlines()[-1] == "1,0,2,1e-05,,"
    assert read_steps(tmp_path / "steps.csv")["loss"] == [2.5, 2.0]


def test_a_plain_run_has_no_column_of_a_method(tmp_path):
    log = RunLog(tmp_path)
    log.log_step(0, 0, {"loss": 2.0, "lr": 1e-5})
    log.close()
    assert (tmp_path / "steps.csv").read_text() == "step,epoch,loss,lr\n0,0,2,1e-05\n"


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "epochs.csv").write_bytes(b"epoch,split,metric,value\n\xff\n")
    with pytest.raises(ValueError, match=r"epochs\.csv is damaged or no epochs\.csv of a run: byte 25 is no text"):
        read_epochs(tmp_path / "epochs.csv")


def test_a_line_that_is_cut_within_a_letter_is_left_out(tmp_path):
    (tmp_path / "epochs.csv").write_bytes(b"epoch,split,metric,value\n0,val,mean,5\n1,val,\xc3")
    assert read_epochs(tmp_path / "epochs.csv") == {"val": {"mean": {0: 5.0}}}
