"""The batches of an epoch that LAVIS's loop has left to train: they are counted, averaged, logged and saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size
from torch import Tensor

from lavis_cir_plugin.core.processes import gather
from lavis_cir_plugin.core.random_state import set_random_state
from lavis_cir_plugin.data.resumable_loader import epoch_loaders
from lavis_cir_plugin.report.run_log import progress
from lavis_cir_plugin.training.run_folders import last_good

Meters = dict[str, tuple[int, float]]
"""Count and sum of each number over the batches of an epoch, by name."""

# A gradient scaler skips a step after an overflow, so that many such losses in a row are tolerated.
_NOT_FINITE_WITH_SCALER = 20


class RemainingEpoch:
    """The batches of an epoch (or inner epoch) that are left to train: it counts, logs and saves them for LAVIS's loop.

    LAVIS's loop always counts batches from 0. After a resume within an epoch the loop gets the remaining batches, a
    schedule that goes on counting, and a model that writes the true number into each batch.

    Args:
        runner: The :class:`~lavis_cir_plugin.training.resumable_runner.ResumableRunner` that trains the epoch.
        place: Epoch or iteration at which the epoch begins.
        total: Number of batches of the whole epoch.
        resumed: Progress in the checkpoint from which the run goes on within this epoch, or None.

    Attributes:
        epoch: Number of the epoch, counted from 0.
        next_place: Epoch or iteration that comes after this epoch.
        skipped: Number of its batches that were done before the resume.
        meters: Counts and sums up to the last finished batch of this process.
        means: Means over the batches of all processes, once the epoch is finished.
    """

    def __init__(self, runner: Any, place: int, total: int, resumed: Mapping[str, Any] | None) -> None:
        self.runner = runner
        self.place = place
        self.total = total
        self.next_place = place + (total if runner.counts_iterations else 1)
        self.skipped = self.done = resumed["batches"] if resumed is not None else 0
        self.epoch = place // total if runner.counts_iterations else place
        self.bar = progress((), total, self.skipped, f"epoch {self.epoch}")
        self.random_state = None
        self.meters: Meters = {"lr": (0, 0.0), "loss": (0, 0.0)}
        self.means: dict[str, float] = {}
        if resumed is not None:
            own = resumed["processes"][get_rank()]
            self.random_state = own["random_state"]
            self.meters.update({name: tuple(meter) for name, meter in own["meters"].items()})
        self.loss: Tensor | None = None  # of the batch in training
        self.is_called = False  # whether the task has called the model with it
        self.outputs: dict[str, Tensor] = {}  # numbers that the model returned beside the loss
        self.not_finite = 0  # number of successive losses that were not finite

    @property
    def batches_done(self) -> int:
        """Number of batches that are done since the beginning of the run."""
        return self.epoch * self.total + self.done

    def arguments(self, stock: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments for LAVIS's loop, which replace those of the runner."""
        own = dict(stock)
        rest = self.total - self.skipped
        self.optimizer = stock["optimizer"]
        self.loader = stock["data_loader"]
        self.model = self.runner.training_model(stock["model"], stock.get("scaler"))
        if "start_iters" in stock:
            own.update(iters_per_inner_epoch=rest, start_iters=self.epoch * rest)  # LAVIS divides the two numbers
        if not self.bar.disable:
            own["log_freq"] = self.total + 1  # LAVIS's log lines would break the progress bar
        self._restore_random_state()
        own.update(
            data_loader=_CountedBatches(self, rest),
            model=_CountedModel(self),
            lr_scheduler=SimpleNamespace(step=partial(self._step_schedule, stock["lr_scheduler"])),
        )
        return own

    def skip_all(self) -> dict[str, Any]:
        """Begin an epoch whose batches were all done before the resume; LAVIS's loop cannot run without a batch."""
        self._restore_random_state()
        if hasattr(self.runner.task, "begin_epoch"):
            self.runner.task.begin_epoch(self.epoch, _CountedBatches(self, 0))
        return {}

    def before_batch(self) -> None:
        """Finish the previous batch: log it, and save a checkpoint if one is due."""
        if self.loss is not None:
            self._finish_batch(self.loss)
            if is_save_due(self.done, self.runner.config.run_cfg.get("save_every"), self.runner.accum_grad_iters):
                self.runner.save_last(self.place, self.done, self.meters)
        self._measure()

    def finish(self) -> None:
        """Finish the last batch, and compute the means.

        Raises:
            ValueError: If the task did not call the model that it was given, so that nothing was perturbed or logged.
        """
        if self.loss is not None:
            self._finish_batch(self.loss)
        if self.done != self.total:
            raise ValueError(
                f"run.task: {self.runner.config.run_cfg.get('task')} called its model for {self.done} of {self.total} "
                "training batches; this runner works with tasks whose train_step calls model(samples)."
            )
        self.means = means_over_processes(self.meters, self.runner.device)

    def completed(self, stats: Mapping[str, Any]) -> dict[str, Any]:
        """Return the averages of LAVIS's loop, and with them what the loop drops or has not seen."""
        has_outputs = len(self.meters) > 2  # the model returned numbers beside the loss
        return {**stats, **in_lavis_format(self.means)} if self.skipped or has_outputs else dict(stats)

    def _restore_random_state(self) -> None:
        if self.random_state is not None:
            set_random_state(self.random_state, self.runner.device)

    def _step_schedule(self, schedule: Any, cur_epoch: int, cur_step: int) -> None:
        schedule.step(cur_epoch=cur_epoch, cur_step=cur_step + self.skipped)

    def _finish_batch(self, loss: Tensor) -> None:
        tensors = [value.float().to(loss.device).reshape(()) for value in (loss, *self.outputs.values())]
        numbers = torch.stack(tensors).tolist()
        values = {"lr": self.optimizer.param_groups[0]["lr"], "loss": numbers[0]}
        self._check_finite(values["loss"])
        add_batch(self.meters, values, dict(zip(self.outputs, numbers[1:])))
        if self.runner.run_log is not None:
            measured = getattr(self.optimizer, "measured", {})
            self.runner.run_log.log_step(self.batches_done, self.epoch, {**values, **measured})
        self.loss, self.is_called = None, False
        self.done += 1
        self.bar.update()
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    def _check_finite(self, loss: float) -> None:
        """Refuse a loss that is not finite, or with a gradient scaler too many of them in a row."""
        self.not_finite = 0 if math.isfinite(loss) else self.not_finite + 1
        if self.not_finite > (_NOT_FINITE_WITH_SCALER if self.runner.scaler else 0):
            raise ValueError(
                f"the training loss is {loss} in epoch {self.epoch}, batch {self.done}; lower run.init_lr, "
                f"or set run.amp: false. {last_good(self.runner.folder)}."
            )

    def _measure(self) -> None:
        """Tell the optimizer whether it shall measure more than loss and learning rate in the next batch."""
        if hasattr(self.optimizer, "is_measuring"):
            self.optimizer.is_measuring = self.done % self.runner.log_freq == 0
            self.optimizer.measured = {}
            if self.done == self.skipped:
                self.optimizer.drop_measurement()  # checkpoints do not hold measurements of left-over gradients


def is_save_due(done: int, every: int | None, accumulated: int) -> bool:
    """Return whether ``done`` >= 1 batches end the first step of the optimizer after each ``every`` (None: never).

    A step takes ``accumulated`` batches; the gradients that it sums up are not saved in between.
    """
    is_passed = every is not None and done // every > (done - accumulated) // every
    return is_passed and done % accumulated == 0


def add_batch(meters: Meters, values: Mapping[str, float], outputs: Mapping[str, float]) -> None:
    """Add the numbers of a batch to the meters, in place.

    ``values`` such as the loss count even if they are not finite; ``outputs`` such as a share among no samples do not.
    """
    for name, value in {**values, **outputs}.items():
        count, total = meters.get(name, (0, 0.0))
        is_counted = name in values or math.isfinite(value)
        meters[name] = (count + 1, total + value) if is_counted else (count, total)


def means_over_processes(meters: Meters, device: torch.device) -> dict[str, float]:
    """Return the mean of each number over the batches of all processes; a number that nobody counted has none."""
    # A model may return other numbers for another kind of batch, so one process can lack a name or have another order.
    names = list(dict.fromkeys(name for own in gather(list(meters)) for name in own))
    sums = torch.tensor([meters.get(name, (0, 0.0)) for name in names], dtype=torch.float64, device=device)
    if get_world_size() > 1:
        dist.all_reduce(sums)
    return {name: total / count for name, (count, total) in zip(names, sums.tolist()) if count}


def in_lavis_format(means: Mapping[str, float]) -> dict[str, str]:
    """Return means as LAVIS's loop does, with three decimals of learning rate and loss, and five of other numbers."""
    decimals = {"lr": 3, "loss": 3}
    return {name: f"{mean:.{decimals.get(name, 5)}f}" for name, mean in means.items()}


class _CountedBatches:
    """The remaining batches of an epoch, for LAVIS's loop."""

    def __init__(self, part: RemainingEpoch, rest: int) -> None:
        self.part = part
        self.rest = rest

    def __len__(self) -> int:
        return self.rest

    def __iter__(self) -> _CountedBatches:
        return self

    def __next__(self) -> Any:
        self.part.before_batch()
        return next(self.part.loader)

    def renew(self) -> None:
        """Restart the loader's workers, so that they see the present data sets; the order of the data stays."""
        for loader in epoch_loaders(self.part.runner.train_loader):
            loader.seek(loader.taken)


class _CountedModel:
    """The model for LAVIS's loop: it remembers its outputs and corrects the batch's number after a resume."""

    def __init__(self, part: RemainingEpoch) -> None:
        self.part = part

    def __call__(self, samples: dict[str, Any]) -> Any:
        part = self.part
        if part.skipped:
            samples["iters"], samples["num_iters_per_epoch"] = part.done, part.total
        output = part.model(samples)
        part.is_called = True
        items = output.items() if isinstance(output, Mapping) else ()
        numbers = {name: value.detach() for name, value in items if isinstance(value, Tensor)}
        part.loss = numbers.pop("loss", None)
        part.outputs = {name: value for name, value in numbers.items() if value.dim() == 0}
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part.model, name)
