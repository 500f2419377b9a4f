"""The folder of a run: its checkpoints, its logs, its lock, and the search for the run that goes on."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavis_cir_plugin.core.atomic_files import is_refused_write
from lavis_cir_plugin.core.checkpoints import verify_checkpoint, write_checkpoint
from lavis_cir_plugin.core.locks import FileLock, holder_of
from lavis_cir_plugin.report.run_log import EPOCHS, LOG, STEPS
from lavis_cir_plugin.training.resume_checks import differing_sections, run_differences

BEST, LAST, PREVIOUS = "checkpoint_best.pth", "checkpoint_last.pth", "checkpoint_previous.pth"
CHECKPOINTS = (BEST, LAST, PREVIOUS)
"""Names of a run's checkpoints, in the order in which one is looked for to load its model."""
LOCK = ".running.lock"

_PATIENCE = 0.5  # seconds to wait for processes that hold the lock only to read its holder
_LOGS = (LOG, STEPS, EPOCHS, "evaluate.txt")
_FINISHED = json.dumps({"run_finished": True})


def output_folder(path: str) -> Path:
    """Return the absolute path of the folder of all runs, after a test that it can be written."""
    folder = Path(os.path.expanduser(path)).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise OSError(
            f"run.output_dir: {folder} cannot be written ({error.strerror}); choose another folder."
        ) from error


def find_checkpoint(asked: str | None, output_dir: str, config: Mapping[str, Any]) -> Path | None:
    """Return the checkpoint that ``run.resume_ckpt_path`` means, after its check sums were verified.

    Args:
        asked: Path of a checkpoint; folder of a run, whose last checkpoint is meant; ``auto``, which means the newest
            unfinished run of the same config below ``output_dir``; or None.
        output_dir: Folder of all runs of the project.
        config: Config of this run, as LAVIS logs it.

    Returns:
        The path of the checkpoint; if the last one is damaged, that of the previous one. None means a new run, because
        nothing was asked for or ``auto`` found nothing. If an unfinished run of the same config exists, a warning says
        why it is not continued.

    Raises:
        FileNotFoundError: If the file does not exist, or the folder holds no checkpoint.
        ValueError: If every checkpoint of the run is damaged.
    """
    if asked is not None and asked != "auto":
        path = Path(os.path.expanduser(asked)).absolute()
        if path.is_dir():
            return _last_whole(path)
        return _last_whole(path.parent) if path.name == LAST else path
    left: list[str] = []
    unfinished = [log for log in Path(output_dir).glob(f"*/{LOG}") if _is_unfinished(log, config)]
    for log in sorted(unfinished, key=os.path.getmtime, reverse=True):
        reason = _reason_to_pass_by(log.parent, asked)
        if reason is None:
            return _last_whole(log.parent)
        left.append(f"{log.parent} ({reason})")
    if left:
        others = f", and {len(left) - 1} more" if len(left) > 1 else ""
        logging.warning("a new run starts beside an unfinished one of the same config: %s%s", left[0], others)
    return None


def _is_unfinished(log: Path, config: Mapping[str, Any]) -> bool:
    """Return whether a log is that of an unfinished run of the config; a file of another kind is not."""
    try:
        text = log.read_text(encoding="utf-8")
        logged, _ = json.JSONDecoder().raw_decode(text)
    except (OSError, ValueError):
        return False
    if not isinstance(logged, dict) or not all(isinstance(section, dict) for section in logged.values()):
        return False
    differs = run_differences(logged, config) or differing_sections(logged, config)
    return not differs and _FINISHED not in text


def _reason_to_pass_by(folder: Path, asked: str | None) -> str | None:
    """Return why an unfinished run of the same config is not continued, or None if it can be."""
    holder = holder_of(folder / LOCK)
    if holder is not None:
        return f"it is still going on in {holder}"
    if not any((folder / name).is_file() for name in (LAST, PREVIOUS)):
        return f"it was stopped before its first {LAST}; run.save_every writes it sooner"
    return None if asked == "auto" else "run.resume_ckpt_path=auto would go on with it"


def _last_whole(folder: Path) -> Path:
    damaged = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            verify_checkpoint(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        if damaged:
            logging.warning("%s The one before it, %s, is used.", " ".join(damaged), path.name)
        return path
    if damaged:
        raise ValueError(f"run.resume_ckpt_path: no checkpoint in {folder} is whole: {' '.join(damaged)}")
    raise FileNotFoundError(
        f"run.resume_ckpt_path: {folder} holds no {LAST}; a run writes it after its first epoch, or sooner with "
        "run.save_every. Leave run.resume_ckpt_path out to start anew."
    )


def folder_to_go_on_in(checkpoint: Path | None) -> str:
    """Return the folder of the run that wrote a checkpoint to go on from, or else the name of a new folder."""
    if checkpoint is not None and checkpoint.name in (LAST, PREVIOUS):
        return str(checkpoint.parent)
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def checkpoint_in(run: Path) -> Path:
    """Return the checkpoint whose model is loaded from a run's folder; the path of a checkpoint is returned itself.

    Raises:
        FileNotFoundError: If there is no checkpoint.
    """
    if run.is_file():
        return run
    for name in CHECKPOINTS:
        if (run / name).is_file():
            return run / name
    raise FileNotFoundError(
        f"{run} is neither a checkpoint nor the folder of a run with one ({', '.join(CHECKPOINTS)}); name either."
    )


def lock_run(folder: Path) -> FileLock:
    """Lock a run's folder until the returned lock is released or the process ends in any way.

    Raises:
        ValueError: If another process trains in the folder.
        OSError: If the folder cannot be written.
    """
    lock, begin = FileLock(folder / LOCK, f"training in {folder}"), time.monotonic()
    while not lock.take():
        if time.monotonic() - begin > _PATIENCE:
            raise ValueError(
                f"run.resume_ckpt_path: the run in {folder} is still going on in "
                f"{holder_of(lock.path) or 'another process'}; wait for its end, or end that process."
            )
        time.sleep(_PATIENCE / 10)
    return lock


def write_run_checkpoint(folder: Path, content: Mapping[str, Any], name: str, previous: str | None = None) -> None:
    """Write a checkpoint into a run's folder, as :func:`~lavis_cir_plugin.core.checkpoints.write_checkpoint` does.

    Raises:
        OSError: If it cannot be written; the message says what became of the earlier ones.
    """
    try:
        write_checkpoint(content, folder, name, previous)
    except (OSError, RuntimeError) as error:
        if not is_refused_write(error):
            raise
        reason = getattr(error, "strerror", None) or "the file could not be finished"
        has_earlier = any(folder.glob("checkpoint_*.pth"))
        kept = "Earlier checkpoints there are untouched" if has_earlier else "There was none before"
        raise OSError(
            f"no checkpoint could be written to {folder} ({reason}). {kept}; free some space or set run.output_dir "
            "to another disk."
        ) from error
    logging.info("checkpoint complete: %s", folder / name)


def last_good(folder: Path) -> str:
    """Return which checkpoint is from before an error, as a sentence without its stop."""
    has_last = (folder / LAST).is_file()
    return f"{LAST} in {folder} is from before" if has_last else "No checkpoint had been written yet"


def log_sizes(folder: Path) -> dict[str, int]:
    """Return the sizes in bytes of the logs that the folder has, by name."""
    return {name: (folder / name).stat().st_size for name in _LOGS if (folder / name).is_file()}


def cut_logs(folder: Path, sizes: Mapping[str, int]) -> None:
    """Cut the logs back to the sizes that a checkpoint knows; empty those that were begun after it."""
    for name, now in log_sizes(folder).items():
        # A log that lost lines in a crash of the machine is shorter, and would be filled up with zeros.
        os.truncate(folder / name, min(sizes.get(name, 0), now))


def mark_finished(folder: Path) -> None:
    """Write into the log that the run has come to its end."""
    with log_explained(folder), open(folder / LOG, "a") as file:
        file.write(_FINISHED + "\n")


@contextmanager
def log_explained(folder: Path) -> Iterator[None]:
    """Say what can be done about the disk if the block cannot write LAVIS's log.

    Raises:
        OSError: If the block raises one.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{folder / LOG} cannot be written ({error.strerror or error}); checkpoints there are "
            "untouched. Free some space, or set run.output_dir to a folder on another disk."
        ) from error
