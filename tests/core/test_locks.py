"""Locks end with their holder, workers end with their parent, and a waiting process logs who holds the lock."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import lavis_cir_plugin
from lavis_cir_plugin.core import locks, workers
from lavis_cir_plugin.core.locks import FileLock, hold_lock, holder_of
from lavis_cir_plugin.data.resumable_loader import EpochLoader, training_loader
from lavis_cir_plugin.garments import world
from lavis_cir_plugin.tasks.evaluation import Evaluation
from lavis_cir_plugin.training.run_folders import LOCK, lock_run

FORK = multiprocessing.get_context("fork")


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def work_until_killed(folder):
    """Record the id of this worker process and work until it is killed."""
    (folder / f"{os.getpid()}.worker").touch()
    time.sleep(60)


class Slow:
    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return 8

    def __getitem__(self, index):
        work_until_killed(self.folder)


def draw_slowly(job):
    work_until_killed(Path(job[2]).parent)


def draw_world(folder):
    world._draw_job = draw_slowly
    jobs = [(None, (32, 32), str(folder / f"{number}.png")) for number in range(100)]
    world.make_once(folder / "world", {}, lambda part: list(world._draw_all(jobs, 2)))


def train(folder):
    with lock_run(folder):
        next(EpochLoader(training_loader(Slow(folder), seed=0, batch_size=2, num_workers=2)))


def encode(folder):
    """Encode as evaluation and mining do."""
    dataset = Slow(folder)
    dataset.collater = list
    evaluation = Evaluation(None, SimpleNamespace(dataset=dataset, batch_size=2, num_workers=2), cuda_enabled=False)
    with lock_run(folder):
        list(evaluation._loaded(dataset, [[0, 1], [2, 3], [4, 5], [6, 7]], ""))


LOCKS = {
    draw_world: ".world.lock",
    train: LOCK,
    encode: LOCK,
}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads from /proc which processes live")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("job", LOCKS, ids=lambda job: job.__name__)
def test_a_killed_process_leaves_neither_lock_nor_workers(tmp_path, job, signum):
    """Only the main process is killed, as by a scheduler, while both workers are at work."""
    main = FORK.Process(target=job, args=(tmp_path,))
    main.start()
    path = tmp_path / LOCKS[job]
    try:
        wait_for(lambda: len(list(tmp_path.glob("*.worker"))) == 2)
        assert holder_of(path).pid == main.pid
        os.kill(main.pid, signum)
    finally:
        main.join(5)
        main.kill()
    assert holder_of(path) is None
    assert FileLock(path, "going on").take()
    pids = [int(worker.stem) for worker in tmp_path.glob("*.worker")]
    wait_for(lambda: not any(map(is_alive, pids)), 3)


def test_no_lock_is_taken_elsewhere():
    """No other module imports fcntl. The test above covers two of the modules that use `core.locks`; the lock of an
    index's writer, in ``build.py``, is covered by the kills of ``tests/search/test_build.py``."""
    package = Path(lavis_cir_plugin.__file__).parent
    texts = {path.name: path.read_text() for path in package.rglob("*.py")}
    assert [name for name, text in texts.items() if "import fcntl" in text or "import filelock" in text] == ["locks.py"]
    assert {name for name, text in texts.items() if "core.locks import" in text} == {
        "build.py", "run_folders.py", "world.py",
    }  # fmt: skip


def hold_with_child(path, child_path):
    lock = FileLock(path, "holding")
    assert lock.take()
    child = FORK.Process(target=lambda: (child_path.touch(), time.sleep(60)))
    child.start()
    time.sleep(60)


def test_a_child_that_lives_on_does_not_hold_its_parents_lock(tmp_path):
    main = FORK.Process(target=hold_with_child, args=(tmp_path / "lock", tmp_path / "child"))
    main.start()
    wait_for((tmp_path / "child").exists)
    assert not FileLock(tmp_path / "lock", "too early").take()
    main.kill()
    main.join()
    assert FileLock(tmp_path / "lock", "in time").take()


def test_a_lock_names_its_holder_and_leaves_no_file(tmp_path):
    path = tmp_path / "lock"
    with FileLock(path, "drawing") as lock:
        assert lock.take()
        other = FileLock(path, "too")
        assert not other.take()
        other.release()  # it holds no lock, so nothing happens
        holder = holder_of(path)
        assert (holder.pid, holder.purpose) == (os.getpid(), "drawing")
        assert not FileLock(path, "a third").take()
    assert holder_of(path) is None
    assert not list(tmp_path.iterdir())


def test_a_lock_whose_file_is_removed_while_it_is_opened_is_taken_anew(tmp_path, monkeypatch):
    """The previous holder removes the file after we open it and before we lock it, so we lock the new file."""
    path, stock, calls = tmp_path / "lock", locks._flock, []

    def late(descriptor, exclusive):
        if not calls:
            path.unlink()
        calls.append(1)
        return stock(descriptor, exclusive)

    monkeypatch.setattr(locks, "_flock", late)
    lock = FileLock(path, "holding")
    assert lock.take()
    assert len(calls) == 2
    monkeypatch.undo()
    assert holder_of(path).pid == os.getpid()
    lock.release()


def test_a_waiting_process_logs_the_holder_its_purpose_and_since_when(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "_SILENT", 0.0)
    lock = FileLock(tmp_path / "lock", "drawing /the/world")
    assert lock.take()
    threading.Timer(0.3, lock.release).start()
    with caplog.at_level(logging.WARNING), hold_lock(tmp_path / "lock", "waiting"):
        pass
    (record,) = caplog.records  # logged once, not at every poll
    pattern = rf"waiting for process {os.getpid()} on \S+, which has been drawing /the/world since \d{{4}}-\d\d-\d\d "
    assert re.match(pattern, record.getMessage())


def test_a_wait_can_be_interrupted(tmp_path):
    lock = FileLock(tmp_path / "lock", "drawing")
    assert lock.take()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), hold_lock(tmp_path / "lock", "waiting"):
        pass
    lock.release()


def test_a_file_system_without_locks_is_logged_and_stops_nothing(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with hold_lock(tmp_path / "lock", "drawing"):
        pass
    assert "this file system has no locks (Function not implemented)" in caplog.text


def set_up_and_wait(folder, setup):
    setup(0)
    work_until_killed(folder)


def parent_of_one(folder):
    workers._killed_with_parent = lambda: False
    FORK.Process(target=set_up_and_wait, args=(folder, workers.worker_setup())).start()
    time.sleep(60)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads from /proc which processes live")
def test_without_the_kernels_help_a_worker_watches_its_parent(tmp_path):
    main = FORK.Process(target=parent_of_one, args=(tmp_path,))
    main.start()
    wait_for(lambda: list(tmp_path.glob("*.worker")))
    (worker,) = (int(path.stem) for path in tmp_path.glob("*.worker"))
    assert is_alive(worker)
    main.kill()
    main.join()
    wait_for(lambda: not is_alive(worker), 5)
