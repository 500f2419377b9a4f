"""Keep the numbers of a training run: two CSV files and TensorBoard, and a progress bar for who watches.

``steps.csv`` has one row per training batch, ``epochs.csv`` one per epoch, split and metric. Both only grow, by whole
lines, so that their sizes at a checkpoint are where a resumed run cuts off what it is about to repeat.
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

STEPS, EPOCHS = "steps.csv", "epochs.csv"

_TAGS = {"loss": "train/loss", "lr": "train/lr"}
"""Tag in TensorBoard of each number that every training step has."""
_COLUMNS = {STEPS: ("step", "epoch", *_TAGS), EPOCHS: ("epoch", "split", "metric", "value")}
"""How each file's header begins; steps.csv goes on with the columns of the method."""

logger = logging.getLogger(__name__)


def _while_writable(method: Callable[..., None]) -> Callable[..., None]:
    """Let a method of :class:`RunLog` do nothing once a file could not be written."""

    @functools.wraps(method)
    def guarded(self: RunLog, *arguments: Any, **named: Any) -> None:
        if self.is_open:
            try:
                method(self, *arguments, **named)
            except OSError as error:
                self._give_up(error)

    return guarded


class RunLog:
    """The log files of one run; for the main process alone.

    A *step* is one training batch, counted from 0 over the whole run, whether or not the optimizer moves after it
    (gradient accumulation).

    Logging never ends a run: where a file cannot be written (a full disk), one warning is logged, logging stops, and
    training goes on; the next checkpoint is what needs the space, and its error says so. Without the ``tensorboard``
    package the CSV files are written alone.

    Args:
        folder: Of the run. Files that exist are continued.
        first_step: The step that a resumed run goes on with. TensorBoard then hides what an earlier process logged for
            this step and later ones. The CSV files are to be cut to their sizes at the checkpoint before this call.
        columns: What the run's method measures besides loss and learning rate: tag in TensorBoard by column. A
            ``steps.csv`` that exists keeps the columns that it began with.

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
            # Line by line: the size on disk is always that of whole rows, and a killed process loses none.
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
            step: Number of training batches before this one, since the start of the run.
            epoch: Counted from 0.
            values: Any of ``loss``, ``lr`` and the method's columns; an absent one stays empty.
        """
        measured = self._columns[STEPS][2:]
        self._append(STEPS, (step, epoch, *(_written(values[name]) if name in values else "" for name in measured)))
        for name, value in values.items():
            self._add_scalar(self._tags[name], value, step)

    @_while_writable
    def log_epoch(self, step: int, epoch: int, split: str, values: Mapping[str, Any]) -> None:
        """Append the metrics of one split after one epoch.

        Args:
            step: Of the last training batch before, for TensorBoard's axis.
            epoch: Counted from 0.
            split: ``train``, ``val``, ``seen`` ... What belongs to ``train`` goes to the CSV file alone, since
                TensorBoard has that split step by step.
            values: By metric. A number written as text (LAVIS's own style) is taken, what is no number left out.
        """
        for metric, value in values.items():
            try:
                number = float(value)
            except (TypeError, ValueError):
                continue  # LAVIS's VQA metric holds tables
            self._append(EPOCHS, (epoch, split, metric, _written(number)))
            if split != "train":
                self._add_scalar(f"{split}/{metric}", number, step)

    @_while_writable
    def close(self) -> None:
        """Write what TensorBoard still buffers and close the files; later calls of any method do nothing."""
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
            with suppress(OSError):  # what did not fit before does not fit now
                writer.close()


def _open_tensorboard(folder: Path, first_step: int) -> Any:
    """Return torch's writer, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # here, because readers of the CSV files need not wait for it
    except ImportError:
        logger.warning(
            "tensorboard is not installed, so %s and %s are this run's only logs; pip install tensorboard.",
            STEPS,
            EPOCHS,
        )
        return None
    return SummaryWriter(str(folder), purge_step=first_step or None, flush_secs=30)


def _written(number: float) -> str:
    """Write a number so that a float32 reads back as the same."""
    return f"{number:.9g}"


def read_steps(path: str | Path) -> dict[str, list[float]]:
    """Read ``steps.csv`` column by column: ``step``, ``epoch``, ``loss``, ``lr``, and what the run's method measures.

    All columns have one entry per training batch; what was not logged is nan. A last line that is still being written,
    or was torn by a crash, is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not a steps.csv, or a line before the last is damaged.
    """
    header, rows = _rows(Path(path), STEPS, lambda row: [float(cell) if cell else math.nan for cell in row])
    return {name: [row[index] for row in rows] for index, name in enumerate(header)}


def read_epochs(path: str | Path) -> dict[str, dict[str, dict[int, float]]]:
    """Read ``epochs.csv`` as ``{split: {metric: {epoch: value}}}``; of an epoch logged twice, the later row counts.

    A last line that is still being written, or was torn by a crash, is left out.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not an epochs.csv, or a line before the last is damaged.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    _, rows = _rows(Path(path), EPOCHS, lambda row: (int(row[0]), *row[1:3], float(row[3])))
    for epoch, split, metric, value in rows:
        found.setdefault(split, {}).setdefault(metric, {})[epoch] = value
    return found


def _rows(path: Path, name: str, parse: Callable[[list[str]], Any]) -> tuple[list[str], list[Any]]:
    """Return the header of a log file and its parsed rows."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a training run writes it into run.output_dir/<job id>.")
    with path.open(encoding="utf-8", newline="") as file:
        lines = file.read().split("\n")[:-1]  # what follows the last line end is empty or torn
    header, *rows = csv.reader(lines) if lines else [[]]
    known = _COLUMNS[name]
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
    """Return the batches behind a progress bar with the time left, on the main process of a terminal; else silent.

    Args:
        batches: Anything to iterate over; it may be endless, or offer only ``next`` (LAVIS's mixed loaders).
        total: Batches of the whole bar.
        initial: Batches of it that were done before (a resumed epoch).
        description: In front of the bar.

    Returns:
        A tqdm bar; ``set_postfix(loss=..., refresh=False)`` shows numbers beside it, and it clears itself at the end.
    """
    if not hasattr(batches, "__iter__"):
        batches = iter(functools.partial(next, batches), object())
    is_other = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
    hidden = True if is_other else None  # None: hidden unless standard error is a terminal
    return tqdm(
        batches, description, total, leave=False, initial=initial, unit="batch", dynamic_ncols=True, disable=hidden
    )
