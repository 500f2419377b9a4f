"""Log the numbers of a training run to two CSV files, TensorBoard and a progress bar.

``steps.csv`` has one row per training batch, ``epochs.csv`` one per epoch, split and metric. Both grow only by whole
lines. A checkpoint records their sizes, and a resumed run cuts them to these sizes before it repeats batches.
"""

from __future__ import annotations

import csv
import functools
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist
from tqdm import tqdm  # type: ignore[import-untyped]

LOG = "log.txt"  # which LAVIS writes
STEPS, EPOCHS = "steps.csv", "epochs.csv"

_TAGS = {"loss": "train/loss", "lr": "train/lr"}
"""TensorBoard tag of each number that every training step has."""
_COLUMNS = {STEPS: ("step", "epoch", *_TAGS), EPOCHS: ("epoch", "split", "metric", "value")}
"""Beginning of each file's header. In steps.csv the columns of the method follow."""
_LONGEST_LINE = 2**16
"""More bytes than any line has."""

logger = logging.getLogger(__name__)


def _while_writable(method: Callable[..., None]) -> Callable[..., None]:
    """Make a method of :class:`RunLog` do nothing after a file could not be written."""

    @functools.wraps(method)
    def guarded(self: RunLog, *arguments: Any, **named: Any) -> None:
        if self.is_open:
            try:
                method(self, *arguments, **named)
            except OSError as error:
                self._give_up(error)

    return guarded


class RunLog:
    """The log files of one run. Only the main process uses it.

    A *step* is one training batch, counted from 0 over the whole run, whether or not the optimizer moves after it
    (gradient accumulation).

    Logging never ends a run. If a file cannot be written (a full disk), the log warns once and stops, and training goes
    on; the next checkpoint needs the space and raises an error about it. Without the ``tensorboard`` package only the
    CSV files are written.

    Args:
        folder: Folder of the run. Existing files are continued; what a full disk has left of a row is cut off first.
        first_step: First step of a resumed run. TensorBoard then hides what an earlier process logged for this step and
            later ones. The caller must cut the CSV files to their sizes at the checkpoint before.
        columns: What the run's method measures besides loss and learning rate: TensorBoard tags by column. An existing
            ``steps.csv`` keeps its columns.

    Attributes:
        is_open: Whether rows are still written.
    """

    def __init__(self, folder: Path, first_step: int = 0, columns: Mapping[str, str] | None = None) -> None:
        self.is_open = True
        self._tags = {**_TAGS, **(columns or {})}
        self._columns = {**_COLUMNS, STEPS: ("step", "epoch", *self._tags)}
        self._files: dict[str, TextIO] = {}
        self._tensorboard: Any = None
        self._open(folder, first_step)

    @_while_writable
    def _open(self, folder: Path, first_step: int) -> None:
        for name, columns in self._columns.items():
            _cut_torn_line(folder / name)
            # Line buffering keeps the sizes on disk at whole rows, and a killed process loses no row.
            self._files[name] = (folder / name).open("a+", encoding="utf-8", newline="", buffering=1)
            if self._files[name].tell() == 0:
                self._append(name, columns)
            else:
                self._files[name].seek(0)
                self._columns[name] = tuple(self._files[name].readline().rstrip("\n").split(","))
                self._files[name].seek(0, os.SEEK_END)
        self._tensorboard = _open_tensorboard(folder, first_step)

    @_while_writable
    def log_step(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Append one training batch.

        Args:
            step: Number of training batches before this one since the start of the run.
            epoch: Number of the epoch, counted from 0.
            values: Any of ``loss``, ``lr`` and the method's columns. A missing value leaves its cell empty.
        """
        measured = self._columns[STEPS][2:]
        self._append(STEPS, (step, epoch, *(_as_text(values[name]) if name in values else "" for name in measured)))
        for name, value in values.items():
            self._add_scalar(self._tags[name], value, step)

    @_while_writable
    def log_epoch(self, step: int, epoch: int, split: str, values: Mapping[str, Any]) -> None:
        """Append the metrics of one split after one epoch.

        Args:
            step: Number of the last training batch before, for TensorBoard's axis.
            epoch: Number of the epoch, counted from 0.
            split: Name of the split: ``train``, ``val``, ``seen`` ... Values of ``train`` go only to the CSV file,
                because TensorBoard has them step by step.
            values: Values by metric. Numbers written as text (LAVIS's style) count; everything else is left out.
        """
        for metric, value in values.items():
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue  # LAVIS's VQA metric holds tables
            self._append(EPOCHS, (epoch, split, metric, _as_text(number)))
            if split != "train":
                self._add_scalar(f"{split}/{metric}", number, step)

    @_while_writable
    def close(self) -> None:
        """Write what TensorBoard still buffers and close the files. Later calls of any method do nothing."""
        self.is_open = False
        self._release()

    def _append(self, name: str, row: Iterable[Any]) -> None:
        csv.writer(self._files[name], lineterminator="\n").writerow(row)

    def _add_scalar(self, tag: str, value: float, step: int) -> None:
        if self._tensorboard is not None:
            self._tensorboard.add_scalar(tag, value, step)

    def _give_up(self, error: OSError) -> None:
        self.is_open = False
        logger.warning(
            "the run's log files cannot be written (%s): nothing more is added to %s, %s and TensorBoard, and training "
            "goes on; free some space before the next checkpoint.",
            error.strerror or error,
            STEPS,
            EPOCHS,
        )
        self._release()

    def _release(self) -> None:
        writers = [*self._files.values(), *([self._tensorboard] if self._tensorboard is not None else [])]
        self._files, self._tensorboard = {}, None
        for writer in writers:
            with suppress(OSError):  # bytes that did not fit before do not fit now
                writer.close()


def _cut_torn_line(path: Path) -> None:
    """Cut off what follows the last line end of a log file; the next row would otherwise join it."""
    with suppress(FileNotFoundError), path.open("rb+") as file:
        begin = max(0, file.seek(0, os.SEEK_END) - _LONGEST_LINE)
        file.seek(begin)
        file.truncate(begin + file.read().rfind(b"\n") + 1)


def _open_tensorboard(folder: Path, first_step: int) -> Any:
    """Return torch's writer, or None if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # here because readers of the CSV files do not need it
    except ImportError:
        logger.warning(
            "tensorboard is not installed, so %s and %s are this run's only logs; pip install tensorboard.",
            STEPS,
            EPOCHS,
        )
        return None
    return SummaryWriter(str(folder), purge_step=first_step or None, flush_secs=30)


def _as_text(number: float) -> str:
    """Return a number as text from which float32 gives the same number."""
    return f"{number:.9g}"


def read_steps(path: str | Path) -> dict[str, list[float]]:
    """Return the columns of ``steps.csv``: ``step``, ``epoch``, ``loss``, ``lr`` and what the run's method measures.

    All columns have one entry per training batch, which is nan if it was not logged. A last line that is still being
    written, or that a crash cut off, is left out, be it the header.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a steps.csv, or a line before the last is damaged.
    """
    header, rows = _read_rows(Path(path), STEPS, lambda row: [float(cell) if cell else math.nan for cell in row])
    return {name: [row[index] for row in rows] for index, name in enumerate(header)}


def read_epochs(path: str | Path) -> dict[str, dict[str, dict[int, float]]]:
    """Return ``epochs.csv`` as ``{split: {metric: {epoch: value}}}``; the later row of an epoch logged twice counts.

    A last line that is still being written, or that a crash cut off, is left out, be it the header.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not an epochs.csv, or a line before the last is damaged.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    _, rows = _read_rows(Path(path), EPOCHS, lambda row: (int(row[0]), *row[1:3], float(row[3])))
    for epoch, split, metric, value in rows:
        found.setdefault(split, {}).setdefault(metric, {})[epoch] = value
    return found


def _read_rows(path: Path, name: str, parse: Callable[[list[str]], Any]) -> tuple[list[str], list[Any]]:
    """Return the header of a log file and its parsed rows."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a training run writes it into its folder.")
    content = path.read_bytes()
    try:
        text = content[: content.rfind(b"\n") + 1].decode()  # what follows is a line that was cut off, or nothing
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged or no {name} of a run: byte {error.start} is no text.") from error
    lines = text.split("\n")[:-1]
    known = _COLUMNS[name]
    header, *rows = csv.reader(lines) if lines else [list(known)]
    if tuple(header[: len(known)]) != known:
        raise ValueError(f"{path} must start with the columns {','.join(known)}; it is no {name} of a run.")

    def parsed(number: int, row: list[str]) -> Any:
        try:
            if len(row) != len(header):
                raise ValueError(f"{len(row)} cells")
            return parse(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is damaged ({error}); repair or remove it.") from error

    return header, [parsed(number, row) for number, row in enumerate(rows, start=2)]


def progress(batches: Iterable[Any], total: int, initial: int = 0, description: str = "") -> Any:
    """Return the batches with a progress bar, which shows only on the main process and on a terminal.

    Args:
        batches: Iterable of batches. It may be endless, or offer only ``next`` (LAVIS's mixed loaders).
        total: Number of batches of the whole bar.
        initial: Number of batches that were done before (in a resumed epoch).
        description: Text in front of the bar.

    Returns:
        A tqdm bar with the time left. ``set_postfix(loss=..., refresh=False)`` shows numbers beside it. The bar clears
        itself at the end.
    """
    if not hasattr(batches, "__iter__"):
        batches = iter(functools.partial(next, batches), object())
    is_other = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
    hidden = True if is_other else None  # None hides it unless standard error is a terminal
    return tqdm(
        batches, description, total, leave=False, initial=initial, unit="batch", dynamic_ncols=True, disable=hidden
    )
