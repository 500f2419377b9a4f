"""SIGINT and SIGTERM end a command with one line and the code 130 or 143; a second signal ends it at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from functools import partial

import pytest

from lavis_cir_plugin.commands import main
from lavis_cir_plugin.core.interruption import interruptible
from lavis_cir_plugin.core.workers import worker_setup

FORK = multiprocessing.get_context("fork")


def raise_signal(signum):
    os.kill(os.getpid(), signum)
    time.sleep(1)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_block_with_one_line_and_its_code(signum, code, capsys):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as stopped, interruptible("a command", lambda: "all is kept."):
        raise_signal(signum)
    assert stopped.value.code == code
    assert capsys.readouterr().err == f"a command: stopped by {signal.Signals(signum).name}; all is kept.\n"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def break_when_stopped():
    try:
        raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.") from None


def test_what_breaks_on_the_way_out_is_no_news(capsys):
    with pytest.raises(SystemExit) as stopped, interruptible("a command", lambda: "all is kept."):
        break_when_stopped()
    assert stopped.value.code == 143
    assert capsys.readouterr().err.count("\n") == 1


def test_a_thread_whose_worker_went_away_says_nothing_once_the_process_ends(capsys, monkeypatch):
    """multiprocessing's own thread reports a broken connection by `sys.excepthook`."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    error = EOFError("a worker is gone")
    with pytest.raises(SystemExit), interruptible("a command", lambda: None):
        raise_signal(signal.SIGINT)
    thread = threading.Thread(target=lambda: sys.excepthook(EOFError, error, None))
    thread.start()
    thread.join()
    assert capsys.readouterr().err == ""
    sys.excepthook(EOFError, error, None)
    assert capsys.readouterr().err == "EOFError: a worker is gone\n"


def report_from_a_thread_and_from_the_main_one(setup):
    setup()
    report = partial(sys.excepthook, EOFError, EOFError("the parent is gone"), None)
    thread = threading.Thread(target=report)
    thread.start()
    thread.join()
    sys.stderr.write("then\n")
    report()


def test_a_worker_whose_parent_went_away_says_nothing_of_it(capfd, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    process = FORK.Process(target=report_from_a_thread_and_from_the_main_one, args=(worker_setup(),))
    process.start()
    process.join(60)
    assert capfd.readouterr().err == "then\nEOFError: the parent is gone\n"


def test_another_process_that_speaks_for_all_leaves_nothing_to_say(capsys):
    with pytest.raises(SystemExit), interruptible("a command", lambda: None):
        raise_signal(signal.SIGINT)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_what_no_signal_caused_passes_through(error):
    with pytest.raises(type(error)) as caught, interruptible("a command", lambda: "all is kept."):
        raise error
    assert caught.value is error


def stopped_slowly(started):
    with interruptible("a command", lambda: "all is kept."):
        try:
            started.set()
            sleep_in_steps()
        finally:
            started.clear()
            sleep_in_steps()


def sleep_in_steps():
    """Sleep for a minute. A signal just before one long sleep would be handled only after it."""
    for _ in range(6000):
        time.sleep(0.01)


def test_a_second_signal_ends_the_process_at_once():
    started = FORK.Event()
    process = FORK.Process(target=stopped_slowly, args=(started,))
    process.start()
    assert started.wait(10)
    os.kill(process.pid, signal.SIGTERM)
    end = time.monotonic() + 10
    while started.is_set():
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == -signal.SIGINT


def test_a_forked_worker_says_nothing(capfd):
    with interruptible("a command", lambda: "all is kept."):
        worker = FORK.Process(target=time.sleep, args=(60,))
        worker.start()
        time.sleep(0.1)
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(10)
    assert worker.exitcode == 143
    assert capfd.readouterr().err == ""


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible("a command", lambda: "all is kept."):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_handles_no_signals():
    done = []

    def work():
        with interruptible("a command", lambda: "all is kept."):
            done.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [before]


def test_lavis_cir_ends_with_one_line(monkeypatch, capsys):
    from lavis_cir_plugin.commands import check

    monkeypatch.setattr(check, "add_command", lambda parsers: parsers.add_parser("x").set_defaults(run=stop_it))
    with pytest.raises(SystemExit) as stopped:
        main.main(["x"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err == (
        "lavis-cir: stopped by SIGINT; what it writes is whole or not there, so start it again.\n"
    )


def stop_it(args):
    raise_signal(signal.SIGINT)
