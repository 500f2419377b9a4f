"""LAVIS's runners made resumable: a run that was stopped anywhere goes on as if nothing had happened."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Optional

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process, main_process
from torch import Tensor

from lavis_cir_plugin.core.checkpoints import load_strictly, read_checkpoint, verify_checkpoint, write_checkpoint
from lavis_cir_plugin.core.error_messages import printable
from lavis_cir_plugin.core.locks import FileLock, holder_of
from lavis_cir_plugin.core.model_parts import frozen_names, momentum_copies
from lavis_cir_plugin.core.processes import gather
from lavis_cir_plugin.core.random_state import get_random_state, set_random_state
from lavis_cir_plugin.core.settings import Limits, Positive, Section
from lavis_cir_plugin.data.resumable_loader import EpochLoader
from lavis_cir_plugin.report.run_log import RunLog, progress
from lavis_cir_plugin.training.portable_runner import BEST, PortableRunner
from lavis_cir_plugin.training.weight_average import WeightAverage

LAST, PREVIOUS = "checkpoint_last.pth", "checkpoint_previous.pth"
_LOCK, _PATIENCE = ".running.lock", 0.5  # seconds to wait for processes that hold the lock only to read its holder
_LOGS = ("log.txt", "steps.csv", "epochs.csv", "evaluate.txt")
_FINISHED = {"run_finished": True}
# A gradient scaler skips a step after an overflow, so that many such losses in a row are tolerated.
_NOT_FINITE_WITH_SCALER = 20
# A resumed run takes these keys of the optimizer's groups from its config, and the learning rate from the schedule.
_GROUP_KEYS = ("weight_decay", "eps", "betas")

# The order of the data, and hence the position to go on from, depends on these keys.
_MUST_AGREE = ("seed", "batch_size_train", "accum_grad_iters", "iters_per_inner_epoch")
_MAY_DIFFER = ("resume_ckpt_path", "output_dir", "num_workers", "log_freq", "save_every", "distributed", "rank", "gpu",
               "world_size", "dist_url", "dist_backend", "device", "feature_cache")  # fmt: skip


@dataclass(frozen=True)
class CheckpointSettings(Section):
    """The keys of ``run`` that every runner reads here.

    Attributes:
        save_every: Batches of an epoch between two ``checkpoint_last.pth``, besides those at the end of the epoch.
        ema_decay: Decay of an exponential moving average of the weights, such as 0.999. The average is what is
            evaluated and saved; ``checkpoint_last.pth`` also holds the weights themselves, to go on from.
    """

    WHERE = "run"

    save_every: Optional[Positive] = None
    ema_decay: Optional[Annotated[float, Limits(gt=0, lt=1)]] = None


class ResumableRunner(PortableRunner):
    """Mix-in before an epoch-based or iteration-based runner of LAVIS; it copies no loop of theirs.

    * ``checkpoint_last.pth`` is written after each epoch before its validation, again after the validation, and every
      ``run.save_every`` batches. It holds weights, optimizer, scaler, left-over gradients, the random state of every
      process, the position in the data, the best metric so far, and the sizes of the logs.
    * A checkpoint is written to a temporary file and then renamed. The one before it stays as
      ``checkpoint_previous.pth``, from which a run goes on if the last one is damaged.
    * A run that is resumed from such a checkpoint goes on in its own folder and ends with the weights, metrics and logs
      of an uninterrupted run, bit for bit on a CPU. Other checkpoints of LAVIS start a new folder with their weights,
      optimizer and epoch.
    * ``steps.csv``, ``epochs.csv`` and TensorBoard's files are written beside LAVIS's ``log.txt``.
    * With ``run.ema_decay``, every checkpoint's ``model`` and every evaluation has the average of the weights
      (:class:`~lavis_cir_plugin.training.weight_average.WeightAverage`).
    """

    RUN_SETTINGS: type[Section] = CheckpointSettings
    """Section of the keys of ``run`` that the runner reads beside LAVIS's."""
    LOG_COLUMNS: ClassVar[Mapping[str, str]] = {}
    """Numbers that a method measures in each step: the tag in TensorBoard by the column of ``steps.csv``."""

    def __init__(self, cfg: Any, task: Any, model: Any, datasets: Any, job_id: str) -> None:
        super().__init__(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id)
        self.best: dict[str, Any] = {"epoch": 0, "metric": 0.0}
        self._resumed: dict[str, Any] | None = None  # a resumed checkpoint's progress, until the first batch
        self._continues = False
        self._validation_metric = 0.0
        self._has_trained = False
        self._run_log: RunLog | None = None  # open on the main process alone
        self._train_means: dict[str, float] = {}  # averages of the last epoch
        self._epoch = 0  # the epoch that was trained last
        self._batches_done = 0  # since the beginning of the run
        self._next_place = 0  # the epoch or iteration that comes after the one in training
        self._kept: str | None = None  # the moment up to which this process has saved or resumed the run
        self._average: WeightAverage | None = None  # of the weights, in a training with run.ema_decay

    # LAVIS's two loops differ in the unit that they count and in the attribute where a resumed run begins.

    @property
    def _counts_iterations(self) -> bool:
        return hasattr(self, "iters_per_inner_epoch")

    @property
    def _begin(self) -> int:
        return self.start_iters if self._counts_iterations else self.start_epoch

    @property
    def _end(self) -> int:
        return self.max_iters if self._counts_iterations else self.max_epoch

    def _moment(self, place: int, batches: int) -> str:
        """Return words for the moment at which so many epochs or iterations, and so many batches, are done."""
        return f"iteration {place + batches}" if self._counts_iterations else f"epoch {place}, batch {batches}"

    def _start_at(self, place: int) -> None:
        setattr(self, "start_iters" if self._counts_iterations else "start_epoch", place)

    @property
    def resume_ckpt_path(self) -> None:
        """None, so that LAVIS's loop resumes nothing: :meth:`train` has done it before the loop begins."""

    def train(self) -> None:
        """Run LAVIS's loop, from the moment of the checkpoint in ``run.resume_ckpt_path`` on.

        Raises:
            ValueError: If the data give no batch, which LAVIS would notice as a division by zero, or too few batches
                for one step of the optimizer, or if the checkpoint does not fit this run.
        """
        if not self.evaluate_only:
            self._check_counts()
        is_writing = is_main_process() and not self.evaluate_only
        with lock_run(Path(self.output_dir)) if is_writing else nullcontext():
            self._train()

    def _check_counts(self) -> None:
        """Refuse data without a batch and an accumulation that never ends; announce an incomplete last inner epoch."""
        if any(len(loader) == 0 for loader in self._epoch_loaders()):
            raise ValueError(
                f"the training data gives no batch of run.batch_size_train: {self.config.run_cfg.batch_size_train} in "
                "each process (LAVIS drops an incomplete one); choose a smaller batch."
            )
        total = self.iters_per_inner_epoch if self._counts_iterations else len(self.train_loader)
        if self.accum_grad_iters > total:  # LAVIS counts batches anew in each epoch
            epoch = f"run.iters_per_inner_epoch: {total}" if self._counts_iterations else f"the {total} of an epoch"
            raise ValueError(
                f"run.accum_grad_iters: {self.accum_grad_iters} is more batches than {epoch}, so no step would ever "
                "be made; choose a smaller one."
            )
        if self._counts_iterations and self.max_iters % total:
            logging.warning(
                "run.max_iters: %d is no multiple of run.iters_per_inner_epoch: %d; LAVIS trains inner epochs whole, "
                "%d batches in all%s",
                self.max_iters,
                total,
                math.ceil(self.max_iters / total) * total,
                ", and linear_warmup_cosine_lr is at run.min_lr in the last of them" if self.max_iters > total else "",
            )

    def _train(self) -> None:
        path, decay = (self.config.run_cfg.get(key) for key in ("resume_ckpt_path", "ema_decay"))
        if decay is not None and not self.evaluate_only:
            average = self._average = WeightAverage(self.unwrap_dist_model(self.model), decay)
            self.optimizer.register_step_post_hook(lambda *_: average.update())
        if path is not None and not self.evaluate_only:
            self._load_checkpoint(path)
        if self._resumed is not None and self._begin >= self._end:
            set_random_state(self._state_of_this_process(self._resumed)["random_state"], self.device)
            self.evaluate()
        else:
            super().train()
        self._append_to_log(_FINISHED)
        if self._run_log is not None:
            self._run_log.close()

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch of LAVIS's loop, or the remaining batches of an interrupted one."""
        return self._train_remaining("train_epoch", epoch, len(self.train_loader), partial(super().train_epoch, epoch))

    def train_iters(self, epoch: int, start_iters: int) -> dict[str, Any]:
        """Train one inner epoch of LAVIS's iteration-based loop, or the remaining batches of an interrupted one."""
        total = self.iters_per_inner_epoch
        return self._train_remaining(
            "train_iters", start_iters, total, partial(super().train_iters, epoch, start_iters)
        )

    def training_model(self, model: Any, scaler: Any) -> Callable[[dict[str, Any]], Any]:
        """Return the callable that LAVIS's loop calls as the model.

        A runner that changes the training step overrides this method.
        """
        return model

    def evaluate(self, cur_epoch: Any = "best", skip_reload: bool = False) -> Any:
        """Save the trained state, then evaluate as :class:`PortableRunner` does."""
        if self._has_trained:
            self._save_last(self._next_place, 0, {})
        return super().evaluate(cur_epoch, skip_reload)

    def what_is_kept(self) -> str:
        """Return what an interrupted run has saved and how to go on, as the end of a sentence."""
        if self.evaluate_only:
            return "an evaluation keeps nothing until it is done, so start it again."
        if self._kept is None:
            return (
                f"nothing was trained or saved yet (the first {LAST} comes after an epoch, or with run.save_every), so "
                "start it again."
            )
        return (
            f"{Path(self.output_dir) / LAST} holds the run up to {self._kept}; add --options "
            f"run.resume_ckpt_path={shlex.quote(str(Path(self.output_dir)))} to the same command to go on from there."
        )

    def eval_epoch(self, split_name: str, cur_epoch: Any, skip_reload: bool = False) -> Any:
        """Evaluate a split and remember the metric that chooses the best checkpoint."""
        with self._averaged():
            result = super().eval_epoch(split_name, cur_epoch, skip_reload)
        if split_name == "val" and isinstance(result, Mapping):
            self._validation_metric = float(result.get("agg_metrics", 0.0))
        return result

    def log_stats(self, stats: Any, split_name: str) -> None:
        """Write the numbers to LAVIS's log, to CSV and to TensorBoard."""
        for key in ("best_epoch", "best_iters"):
            if isinstance(stats, dict) and key in stats:
                stats[key] = self.best["epoch"]
        with _log_explained(self.output_dir):
            super().log_stats(stats, split_name)
        if self._run_log is not None and isinstance(stats, dict):
            values = {key: value for key, value in stats.items() if not key.startswith("best_")}
            if split_name == "train":
                values.update(self._train_means)  # LAVIS rounds to three decimals, too few for a learning rate
            self._run_log.log_epoch(max(self._batches_done - 1, 0), self._epoch, split_name, values)

    def log_config(self) -> None:
        """Log the config at the start of a run, but not when the run is resumed."""
        if not self._continues:
            with _log_explained(self.output_dir):
                super().log_config()

    # Training, interrupted or not.

    def _train_remaining(self, name: str, place: int, total: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Train the remaining batches of an epoch by LAVIS's own loop.

        Args:
            name: Name of the task's method with the loop, ``train_epoch`` or ``train_iters``.
            place: Epoch or iteration at which the epoch begins.
            total: Number of batches of the whole epoch.
            run: LAVIS's function that calls that method.
        """
        resumed, self._resumed = self._resumed, None
        part = _RemainingEpoch(self, place, total, resumed)
        self._epoch, self._batches_done = part.epoch, part.first + part.done
        if self._run_log is None and is_main_process():
            self._run_log = RunLog(Path(self.output_dir), first_step=self._batches_done, columns=self.LOG_COLUMNS)
        if resumed is None and place != self._begin:
            self._save_last(place, 0, {})
        self._has_trained = True
        self._next_place = place + (total if self._counts_iterations else 1)
        stock = getattr(self.task, name)
        setattr(self.task, name, lambda **arguments: stock(**part.arguments(arguments)))
        try:
            stats = part.skip_all() if part.skipped == total else run()
            part.finish()
            self._train_means = part.means
        finally:
            delattr(self.task, name)
            part.bar.close()
        if self.valid_splits and part.skipped < total:  # an interrupted validation must not lose the epoch
            self._save_last(place, total, part.meters)
        return {**stats, **part.stats()} if part.skipped or part.has_outputs else stats

    def _state_of_this_process(self, resumed: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of a checkpoint's progress that belongs to this process."""
        own: dict[str, Any] = resumed["processes"][get_rank()]
        return own

    def _averaged(self) -> AbstractContextManager[None]:
        """Return a block in which the model has the weights that are evaluated and saved."""
        return nullcontext() if self._average is None else self._average.in_model()

    def _epoch_loaders(self) -> list[EpochLoader]:
        # Streams (webdataset) have no position to return to; they start anew.
        loaders = getattr(self.train_loader, "loaders", [self.train_loader])
        return [loader for loader in loaders if isinstance(loader, EpochLoader)]

    # Checkpoints.

    @main_process
    def _save_checkpoint(self, cur_epoch: Any, is_best: bool = False) -> None:
        """Save a checkpoint as LAVIS does, whole or not at all.

        A resumed run replaces the best checkpoint only if its metric is better than the best one before the resume.
        """
        if self.evaluate_only:
            return  # LAVIS's loop would also save a model that it has only evaluated
        if is_best:
            if self._validation_metric <= self.best["metric"]:
                return
            self.best = {"epoch": cur_epoch, "metric": self._validation_metric}
        self._write(self._checkpoint(cur_epoch), BEST if is_best else f"checkpoint_{cur_epoch}.pth")

    def _save_last(self, place: int, batches: int, meters: dict[str, tuple[int, float]]) -> None:
        """Write ``checkpoint_last.pth`` after ``batches`` batches of the epoch that begins at ``place``."""
        processes = gather({"random_state": get_random_state(self.device), "meters": meters})
        if not is_main_process():
            return
        weights = self.unwrap_dist_model(self.model).named_parameters()
        folder = Path(self.output_dir)
        progress = {
            "place": place,
            "batches": batches,
            "taken": [loader.taken for loader in self._epoch_loaders()],
            "lengths": [len(loader) for loader in self._epoch_loaders()],
            "processes": processes,
            "gradients": {name: weight.grad for name, weight in weights if weight.grad is not None},
            "best": self.best,
            "logs": {name: (folder / name).stat().st_size for name in _LOGS if (folder / name).is_file()},
        }
        if self._average is not None:
            progress.update(trained=self._average.trained(), averaged=self._average.updates)
        # LAVIS's own runners count finished iterations, or the number of the last finished epoch.
        done = place if self._counts_iterations else place - 1
        self._write({**self._checkpoint(done), "progress": progress}, LAST, PREVIOUS)
        self._kept = self._moment(place, batches)

    def _checkpoint(self, done: Any) -> dict[str, Any]:
        """Return the content of a LAVIS checkpoint, without frozen weights unless training moves them.

        Raises:
            ValueError: If trained weights are not finite, so that nobody could go on from the checkpoint.
        """
        model = self.unwrap_dist_model(self.model)
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        broken = [name for name, weight in trained if not weight.isfinite().all()]
        if broken:
            raise ValueError(
                f"{len(broken)} of {len(trained)} trained tensors are not finite any more (first: {broken[0]}): "
                f"a gradient was not, while the loss was; lower run.init_lr, or look for the model's operation with "
                f"such a gradient (torch.autograd.set_detect_anomaly). {self._last_good()}."
            )
        left_out = set(frozen_names(model)) - set(momentum_copies(model))
        with self._averaged():
            state = model.state_dict()
        return {
            "model": {name: tensor for name, tensor in state.items() if name not in left_out},
            "optimizer": self.optimizer.state_dict(),
            "config": self.config.to_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "iters" if self._counts_iterations else "epoch": done,
        }

    def _last_good(self) -> str:
        """Return which checkpoint is from before an error, as a sentence without its stop."""
        folder = Path(self.output_dir)
        has_last = (folder / LAST).is_file()
        return f"{LAST} in {folder} is from before" if has_last else "No checkpoint had been written yet"

    def _write(self, content: dict[str, Any], name: str, previous: str | None = None) -> None:
        folder = Path(self.output_dir)
        try:
            write_checkpoint(content, folder, name, previous)
        except (OSError, RuntimeError) as error:
            # torch's writer reports a failed write as a RuntimeError; other RuntimeErrors have other causes.
            origin = traceback.extract_tb(error.__traceback__)[-1].filename
            if isinstance(error, RuntimeError) and Path(origin).name != "serialization.py":
                raise
            reason = getattr(error, "strerror", None) or "the file could not be finished"
            has_earlier = any(folder.glob("checkpoint_*.pth"))
            kept = "Earlier checkpoints there are untouched" if has_earlier else "There was none before"
            raise OSError(
                f"no checkpoint could be written to {folder} ({reason}). {kept}; free some space or set run.output_dir "
                "to another disk."
            ) from error
        logging.info("checkpoint complete: %s", folder / name)

    def _load_checkpoint(self, path: str) -> None:
        """Resume from ``checkpoint_last.pth`` or from a checkpoint of LAVIS, which may lack frozen tensors."""
        saved = read_checkpoint(path)
        counts = "iters" if self._counts_iterations else "epoch"
        check_saved_run(saved, path, counts, self.config.run_cfg.get("runner"))
        model = self.unwrap_dist_model(self.model)
        load_strictly(model, saved["model"], path, may_lack=frozen_names(model))
        if self._average is not None:
            self._average.restart(saved.get("progress", {}).get("averaged", 0))
        self._check_optimizer(saved["optimizer"], path)
        asked = [{key: group[key] for key in _GROUP_KEYS if key in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, own in zip(self.optimizer.param_groups, asked):
            group.update(own)
        if self.scaler and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        if "progress" in saved:
            self._continue(saved, path)
            return
        # LAVIS's epoch-based runner saves the last finished epoch, its other runner the number of finished iterations.
        self._start_at(saved[counts] + (0 if self._counts_iterations else 1))
        if self._begin >= self._end:
            raise ValueError(
                f"run.resume_ckpt_path: {path} was written after {counts} {saved[counts]} (counted from "
                f"0), so nothing is left of run.max_{counts}: {self._end}; choose a larger one."
            )

    def _check_optimizer(self, saved: Mapping[str, Any], path: str) -> None:
        """Refuse the state of an optimizer that trained another number of weights, which torch reports less clearly."""
        before, now = (
            [len(group["params"]) for group in groups]
            for groups in (saved["param_groups"], self.optimizer.param_groups)
        )
        if before != now:
            raise ValueError(
                f"run.resume_ckpt_path: {path} was written by a run that trained {sum(before)} weights and biases, and "
                f"this one trains {sum(now)}; set back what decides about that (model, run.lora, run.dpo.anchor), or "
                "start a new run from these weights (model.finetuned)."
            )

    def _continue(self, saved: Mapping[str, Any], path: str) -> None:
        """Restore everything but weights and optimizer."""
        self._check_same_data(saved, path)
        state, loaders = saved["progress"], self._epoch_loaders()
        for loader, taken in zip(loaders, state["taken"]):
            loader.seek(taken)
        if not loaders:
            logging.warning("the training data is a stream, which begins anew")
        weights = dict(self.unwrap_dist_model(self.model).named_parameters())
        trained: Mapping[str, Tensor] = state.get("trained", {})
        for key, tensors in (("gradients", state["gradients"]), ("trained", trained)):
            unknown = [name for name in tensors if name not in weights]
            if unknown:
                raise _unusable(path, f"progress.{key}", unknown[0], "of a tensor that this model has")
        for name, tensor in trained.items():
            weights[name].data.copy_(tensor)
        for name, gradient in state["gradients"].items():
            weights[name].grad = gradient.to(weights[name].device)
        self._start_at(state["place"])
        self._resumed = state
        self._continues = Path(self.output_dir).resolve() == Path(path).resolve().parent
        if self._continues:
            self._go_on_in_folder(state, path)
        else:
            logging.warning("%s is another run's; this one begins a folder and a best epoch of its own", path)

    def _check_same_data(self, saved: Mapping[str, Any], path: str) -> None:
        """Refuse a checkpoint of a run that read its data in another order, and warn of other differences."""
        state = saved["progress"]
        if len(state["processes"]) != get_world_size():
            raise ValueError(
                f"run.resume_ckpt_path: {path} was written by {len(state['processes'])} processes and this run has "
                f"{get_world_size()}; start as many (torchrun --nproc_per_node)."
            )
        for key, before, now in _differences(saved["config"].get("run", {}), self.config.to_dict().get("run", {})):
            if key in _MUST_AGREE:
                raise ValueError(
                    f"run.{key}: {now!r} differs from {before!r} in {path}, and the order of the data follows from it; "
                    "set it back, or start a new run from these weights (model.finetuned)."
                )
            logging.warning("run.%s is %r now and was %r when %s was written", key, now, before, path)
        for section in ("model", "datasets"):
            if saved["config"].get(section) != self.config.to_dict().get(section):
                logging.warning("section %s differs from that of %s", section, path)
        lengths = [len(loader) for loader in self._epoch_loaders()]
        if state["lengths"] != lengths:
            raise ValueError(
                f"run.resume_ckpt_path: {path} was written with {state['lengths']} training batches an epoch and there "
                f"are {lengths} now; restore the data, or start a new run from these weights (model.finetuned)."
            )

    def _go_on_in_folder(self, state: Mapping[str, Any], path: str) -> None:
        """Take the best epoch over, and cut the folder's logs back to the moment of the checkpoint."""
        folder = Path(self.output_dir)
        if (folder / BEST).is_file():
            self.best = dict(state["best"])
        elif state["best"]["metric"] > 0:
            logging.warning(
                "%s lacks the %s of epoch %s, so the best epoch is chosen among those that follow",
                folder, BEST, state["best"]["epoch"],
            )  # fmt: skip
        if is_main_process():
            for log in (folder / name for name in _LOGS):
                if log.is_file():  # a log that the checkpoint does not know was begun later
                    # A log that lost lines in a crash of the machine is shorter, and would be filled up with zeros.
                    os.truncate(log, min(state["logs"].get(log.name, 0), log.stat().st_size))
            if Path(path).name == PREVIOUS:  # the last checkpoint is damaged and must not become the previous one
                (folder / LAST).unlink(missing_ok=True)
        self._kept = self._moment(state["place"], state["batches"])
        logging.info("resumed from %s: %s batches after %s", path, state["batches"], state["place"])

    def _append_to_log(self, record: Mapping[str, Any]) -> None:
        if is_main_process() and not self.evaluate_only:
            with _log_explained(self.output_dir), open(os.path.join(self.output_dir, "log.txt"), "a") as file:
                file.write(json.dumps(record) + "\n")


class _RemainingEpoch:
    """The batches of an epoch (or inner epoch) that are left to train: it counts, logs and saves them for LAVIS's loop.

    LAVIS's loop always counts batches from 0. After a resume within an epoch the loop gets the remaining batches, a
    schedule that goes on counting, and a model that writes the true number into each batch.
    """

    def __init__(self, runner: ResumableRunner, place: int, total: int, resumed: Mapping[str, Any] | None) -> None:
        self.runner = runner
        self.place = place
        self.total = total
        self.skipped = resumed["batches"] if resumed is not None else 0
        self.done = self.skipped
        self.epoch = place // total if runner._counts_iterations else place
        self.first = self.epoch * total  # number of the run's batches before this epoch
        self.bar = progress((), total, self.skipped, f"epoch {self.epoch}")
        self.random_state = None
        self.meters = {"lr": (0, 0.0), "loss": (0, 0.0)}
        if resumed is not None:
            own = runner._state_of_this_process(resumed)
            self.random_state = own["random_state"]
            self.meters.update({name: tuple(meter) for name, meter in own["meters"].items()})
        self.loss: Tensor | None = None
        self.outputs: dict[str, Tensor] = {}  # numbers that the model returned beside the loss
        self.not_finite = 0  # number of successive losses that were not finite

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
        if self.random_state is not None:
            set_random_state(self.random_state, self.runner.device)
        own.update(
            data_loader=_CountedBatches(self, rest),
            model=_CountedModel(self),
            lr_scheduler=_ContinuedSchedule(self, stock),
        )
        return own

    def skip_all(self) -> dict[str, Any]:
        """Begin an epoch whose batches were all done before the resume; LAVIS's loop cannot run without a batch."""
        if self.random_state is not None:
            set_random_state(self.random_state, self.runner.device)
        if hasattr(self.runner.task, "begin_epoch"):
            self.runner.task.begin_epoch(self.epoch, _CountedBatches(self, 0))
        return {}

    def before_batch(self) -> None:
        """Finish the previous batch: log it, and save a checkpoint if one is due."""
        if self.loss is None:
            self._measure()
            return
        self._finish_batch(self.loss)
        every, accumulated = self.runner.config.run_cfg.get("save_every"), self.runner.accum_grad_iters
        is_due = every and self.done // every > (self.done - accumulated) // every
        if is_due and self.done % accumulated == 0:  # gradients that are summed up are not saved in between
            self.runner._save_last(self.place, self.done, self.meters)
        self._measure()

    def finish(self) -> None:
        """Finish the last batch.

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

    @property
    def has_outputs(self) -> bool:
        """Whether the model returned numbers beside the loss, which LAVIS's loop drops."""
        return len(self.meters) > 2

    def stats(self) -> dict[str, str]:
        """Return the averages in LAVIS's format."""
        decimals = {"lr": 3, "loss": 3}
        return {name: f"{mean:.{decimals.get(name, 5)}f}" for name, mean in self.means.items()}

    @cached_property
    def means(self) -> dict[str, float]:
        """Averages over the epoch's batches on all processes, once all batches are done."""
        sums = torch.tensor(list(self.meters.values()), dtype=torch.float64, device=self.runner.device)
        if get_world_size() > 1:
            dist.all_reduce(sums)
        return {name: total / count for name, (count, total) in zip(self.meters, sums.tolist()) if count}

    def _finish_batch(self, loss: Tensor) -> None:
        numbers = torch.stack([loss.float(), *(value.float() for value in self.outputs.values())]).tolist()
        values = {"lr": self.optimizer.param_groups[0]["lr"], "loss": numbers[0]}
        self.not_finite = 0 if math.isfinite(values["loss"]) else self.not_finite + 1
        if self.not_finite > (_NOT_FINITE_WITH_SCALER if self.runner.scaler else 0):
            raise ValueError(
                f"the training loss is {values['loss']} in epoch {self.epoch}, batch {self.done}; lower run.init_lr, "
                f"or set run.amp: false. {self.runner._last_good()}."
            )
        for name, value in {**values, **dict(zip(self.outputs, numbers[1:]))}.items():
            count, total = self.meters.get(name, (0, 0.0))
            # A share among no samples is nan and is left out; a loss that is not finite counts in the average.
            is_counted = name in values or math.isfinite(value)
            self.meters[name] = (count + 1, total + value) if is_counted else (count, total)
        if self.runner._run_log is not None:
            measured = getattr(self.optimizer, "measured", {})
            self.runner._run_log.log_step(self.first + self.done, self.epoch, {**values, **measured})
        self.loss = None
        self.done += 1
        self.runner._batches_done = self.first + self.done
        self.bar.update()
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    def _measure(self) -> None:
        """Tell the optimizer whether it shall measure more than loss and learning rate in the next batch."""
        if hasattr(self.optimizer, "is_measuring"):
            self.optimizer.is_measuring = self.done % self.runner.log_freq == 0
            self.optimizer.measured = {}
            if self.done == self.skipped:
                self.optimizer.drop_measurement()  # checkpoints do not hold measurements of left-over gradients


class _CountedBatches:
    """The remaining batches of an epoch, for LAVIS's loop."""

    def __init__(self, part: _RemainingEpoch, rest: int) -> None:
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
        for loader in self.part.runner._epoch_loaders():
            loader.seek(loader.taken)


class _CountedModel:
    """The model for LAVIS's loop: it remembers its outputs and corrects the batch's number after a resume."""

    def __init__(self, part: _RemainingEpoch) -> None:
        self.part = part

    def __call__(self, samples: dict[str, Any]) -> Any:
        part = self.part
        if part.skipped:
            samples["iters"] += part.skipped
            samples["num_iters_per_epoch"] = part.total
        output = part.model(samples)
        part.loss = output["loss"].detach()
        items = output.items() if isinstance(output, Mapping) else ()
        part.outputs = {
            name: value.detach()
            for name, value in items
            if name != "loss" and isinstance(value, Tensor) and value.dim() == 0
        }
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part.model, name)


class _ContinuedSchedule:
    """The learning-rate schedule for LAVIS's loop: it adds the batches that were done before a resume."""

    def __init__(self, part: _RemainingEpoch, stock: Mapping[str, Any]) -> None:
        self.part = part
        self.schedule = stock["lr_scheduler"]

    def step(self, cur_epoch: int, cur_step: int) -> None:
        self.schedule.step(cur_epoch=cur_epoch, cur_step=cur_step + self.part.skipped)


def resumable(runner: type) -> type:
    """Return a runner class with :class:`ResumableRunner` mixed in, or the class itself if it is resumable already."""
    if issubclass(runner, ResumableRunner):
        return runner
    attributes = {"__module__": runner.__module__, "__doc__": runner.__doc__}
    return type(runner.__name__, (ResumableRunner, runner), attributes)


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
    for log in sorted(Path(output_dir).glob("*/log.txt"), key=os.path.getmtime, reverse=True):
        if not _is_unfinished(log, config):
            continue
        reason = _reason_to_pass_by(log.parent, asked)
        if reason is None:
            return _last_whole(log.parent)
        left.append(f"{log.parent} ({reason})")
    if left:
        others = f", and {len(left) - 1} more" if len(left) > 1 else ""
        logging.warning("a new run starts beside an unfinished one of the same config: %s%s", left[0], others)
    return None


def check_saved_run(saved: Any, path: str, counts: str, runner: Any) -> None:
    """Check that a file has the content of a run's checkpoint, before any of it is loaded.

    Args:
        saved: Content of the file.
        path: Path of the file, for the messages.
        counts: Unit that this run counts, ``epoch`` or ``iters``.
        runner: Value of ``run.runner``.

    Raises:
        ValueError: If a part is missing or cannot be used; the message names the first one.
    """
    missing = [key for key in ("model", "optimizer") if not isinstance(saved, Mapping) or key not in saved]
    if missing:
        raise ValueError(
            f"run.resume_ckpt_path: {path} holds no {' and no '.join(missing)}, so it is no "
            "checkpoint of a LAVIS run; to start from its weights set model.finetuned and model.load_finetuned."
        )
    if counts not in saved:
        raise ValueError(
            f"run.resume_ckpt_path: {path} counts no {counts}, so it was written by another kind of "
            f"runner than run.runner: {runner}; choose that runner."
        )
    if "progress" in saved and "config" not in saved:
        raise ValueError(
            f"run.resume_ckpt_path: {path} holds progress and no config, so that nothing tells whether the order of "
            "the data is the same; resume from another checkpoint of that run, or start a new one from these weights "
            "(model.finetuned)."
        )
    is_state = _is_mapping_of(saved["model"], str, Tensor) and saved["model"]
    groups = saved["optimizer"].get("param_groups") if isinstance(saved["optimizer"], Mapping) else None
    is_optimizer = (
        isinstance(groups, list)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups)
        and isinstance(saved["optimizer"].get("state"), Mapping)
    )
    checks = [
        ("model", saved["model"], is_state, "tensors by name"),
        ("optimizer", saved["optimizer"], is_optimizer, "an optimizer's state and param_groups"),
        (counts, saved[counts], _is_whole(saved[counts], -1), "a whole number"),
        ("scaler", saved.get("scaler"), isinstance(saved.get("scaler"), (Mapping, type(None))), "a mapping or null"),
    ]
    if "progress" in saved:
        checks += _progress_checks(saved)
    for key, value, is_right, what in checks:
        if not is_right:
            raise _unusable(path, key, value, what)


def _progress_checks(saved: Mapping[str, Any]) -> list[tuple[str, Any, Any, str]]:
    """Return key, value, validity and a description of valid values for each part of a checkpoint's progress."""
    config, progress = saved["config"], saved["progress"]
    is_config = isinstance(config, Mapping) and isinstance(config.get("run", {}), Mapping)
    is_mapping = isinstance(progress, Mapping)
    state: Mapping[str, Any] = progress if is_mapping else {}
    processes, best = state.get("processes"), state.get("best")
    is_own = isinstance(processes, list) and all(
        isinstance(own, Mapping) and all(isinstance(own.get(key), Mapping) for key in ("random_state", "meters"))
        for own in processes
    )
    parts: dict[str, tuple[Any, str]] = {
        "place": (_is_whole(state.get("place")), "a whole number >= 0"),
        "batches": (_is_whole(state.get("batches")), "a whole number >= 0"),
        "taken": (_is_whole_list(state.get("taken")), "a list of whole numbers"),
        "lengths": (_is_whole_list(state.get("lengths")), "a list of whole numbers"),
        "processes": (is_own, "a list of each process's random_state and meters"),
        "gradients": (_is_mapping_of(state.get("gradients"), str, Tensor), "tensors by name"),
        "best": (isinstance(best, Mapping) and {"epoch", "metric"} <= best.keys(), "an epoch and a metric"),
        "logs": (_is_mapping_of(state.get("logs"), str, int), "sizes by the name of the log"),
    }
    if "trained" in state:
        parts["trained"] = (_is_mapping_of(state["trained"], str, Tensor), "tensors by name")
        parts["averaged"] = (_is_whole(state.get("averaged")), "a whole number >= 0")
    return [
        ("config", config, is_config, "a run's config"),
        ("progress", progress, is_mapping, "a mapping"),
        *((f"progress.{key}", state.get(key), is_right, what) for key, (is_right, what) in parts.items()),
    ]


def _unusable(path: str, key: str, value: Any, what: str) -> ValueError:
    """Return an error that names a key of a checkpoint with its value, or with its type if the value is long."""
    is_plain = value is None or isinstance(value, (bool, int, float, str)) or value in ({}, [])
    written = printable(repr(value))[:80] if is_plain else f"a {type(value).__name__}"
    return ValueError(
        f"run.resume_ckpt_path: {path} has {key}: {written}, and it must be {what}; resume from another checkpoint of "
        "that run, or start a new one from its weights (model.finetuned)."
    )


def _is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_whole_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _is_mapping_of(value: Any, key: type, item: type) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, key) and isinstance(v, item) for k, v in value.items())


def _reason_to_pass_by(folder: Path, asked: str | None) -> str | None:
    """Return why an unfinished run of the same config is not continued, or None if it can be."""
    holder = holder_of(folder / _LOCK)
    if holder is not None:
        return f"it is still going on in {holder}"
    if not any((folder / name).is_file() for name in (LAST, PREVIOUS)):
        return f"it was stopped before its first {LAST}; run.save_every writes it sooner"
    return None if asked == "auto" else "run.resume_ckpt_path=auto would go on with it"


def lock_run(folder: Path) -> FileLock:
    """Lock a run's folder until the returned lock is released or the process ends in any way.

    Raises:
        ValueError: If another process trains in the folder.
        OSError: If the folder cannot be written.
    """
    lock, begin = FileLock(folder / _LOCK, f"training in {folder}"), time.monotonic()
    while not lock.take():
        if time.monotonic() - begin > _PATIENCE:
            raise ValueError(
                f"run.resume_ckpt_path: the run in {folder} is still going on in "
                f"{holder_of(lock.path) or 'another process'}; wait for its end, or end that process."
            )
        time.sleep(_PATIENCE / 10)
    return lock


def _is_unfinished(log: Path, config: Mapping[str, Any]) -> bool:
    text = log.read_text(encoding="utf-8")
    try:
        logged, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return False
    differs = [
        *_differences(logged.get("run", {}), config.get("run", {})),
        *(name for name in ("model", "datasets") if logged.get(name) != config.get(name)),
    ]
    return not differs and json.dumps(_FINISHED) not in text


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


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = [key for key in {**before, **now} if key not in _MAY_DIFFER]
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


@contextmanager
def _log_explained(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{Path(folder) / 'log.txt'} cannot be written ({error.strerror or error}); checkpoints there are "
            "untouched. Free some space, or set run.output_dir to a folder on another disk."
        ) from error
