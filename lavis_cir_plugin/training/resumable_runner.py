"""LAVIS's runners made resumable: a run that was stopped anywhere goes on as if nothing had happened."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Optional

from lavis.common.dist_utils import get_rank, is_main_process, main_process
from torch import Tensor, nn

from lavis_cir_plugin.core.checkpoints import load_strictly, read_checkpoint
from lavis_cir_plugin.core.error_messages import option
from lavis_cir_plugin.core.model_parts import frozen_names, momentum_copies
from lavis_cir_plugin.core.processes import fail_in_all_processes, gather
from lavis_cir_plugin.core.random_state import get_random_state, set_random_state
from lavis_cir_plugin.core.settings import Limits, Positive, Section
from lavis_cir_plugin.data.resumable_loader import epoch_loaders
from lavis_cir_plugin.report.run_log import RunLog
from lavis_cir_plugin.training import resume_checks, run_folders
from lavis_cir_plugin.training.portable_runner import PortableRunner, replaced
from lavis_cir_plugin.training.remaining_epoch import Meters, RemainingEpoch
from lavis_cir_plugin.training.run_folders import BEST, LAST, PREVIOUS
from lavis_cir_plugin.training.training_history import trained_on_by
from lavis_cir_plugin.training.weight_average import WeightAverage

# A resumed run takes these keys of the optimizer's groups from its config, and the learning rate from the schedule.
_GROUP_KEYS = ("weight_decay", "eps", "betas")


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
        self.run_log: RunLog | None = None  # open on the main process alone
        self._resumed: dict[str, Any] | None = None  # a resumed checkpoint's progress, until the first batch
        self._continues = False  # in the folder of the resumed checkpoint
        self._validation_metric = 0.0
        self._trained: RemainingEpoch | None = None  # the epoch that was trained last
        self._kept: str | None = None  # the moment up to which this process has saved or resumed the run
        self._average: WeightAverage | None = None  # of the weights, in a training with run.ema_decay
        self._trained_on: set[str] = set()  # names of data sets, known to the main process, which writes checkpoints
        if is_main_process() and not self.evaluate_only:
            self._trained_on = trained_on_by({"config": self.config.to_dict()})

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.output_dir)

    # LAVIS's two loops differ in the unit that they count and in the attribute where a resumed run begins.

    @property
    def counts_iterations(self) -> bool:
        """Whether LAVIS's loop counts iterations; otherwise it counts epochs."""
        return hasattr(self, "iters_per_inner_epoch")

    @property
    def _unit(self) -> str:
        return "iters" if self.counts_iterations else "epoch"

    @property
    def _begin(self) -> int:
        return getattr(self, f"start_{self._unit}")

    @property
    def _end(self) -> int:
        return getattr(self, f"max_{self._unit}")

    def _start_at(self, place: int) -> None:
        setattr(self, f"start_{self._unit}", place)

    def _moment(self, place: int, batches: int) -> str:
        """Return words for the moment at which so many epochs or iterations, and so many batches, are done."""
        return f"iteration {place + batches}" if self.counts_iterations else f"epoch {place}, batch {batches}"

    # Training, interrupted or not.

    @property
    def resume_ckpt_path(self) -> None:
        """None, so that LAVIS's loop resumes nothing: :meth:`train` has done it before the loop begins."""

    def train(self) -> None:
        """Run LAVIS's loop, from the moment of the checkpoint in ``run.resume_ckpt_path`` on.

        Raises:
            ValueError: If the data give no batch, which LAVIS would notice as a division by zero, or too few batches
                for one step of the optimizer, or if the checkpoint does not fit this run.
        """
        if self.evaluate_only:
            super().train()
            return
        self._check_counts()
        with fail_in_all_processes():
            lock = run_folders.lock_run(self.folder) if is_main_process() else nullcontext()
        with lock:
            self._begin_average()
            path = self.config.run_cfg.get("resume_ckpt_path")
            if path is not None:
                self._load_checkpoint(path)
            if self._resumed is not None and self._begin >= self._end:
                set_random_state(self._resumed["processes"][get_rank()]["random_state"], self.device)
                self.evaluate()
            else:
                super().train()
            if is_main_process():
                run_folders.mark_finished(self.folder)
            if self.run_log is not None:
                self.run_log.close()

    def _check_counts(self) -> None:
        """Refuse data without a batch and an accumulation that never ends; announce an incomplete last inner epoch."""
        if any(length == 0 for length in self._lengths()):
            raise ValueError(
                f"the training data gives no batch of run.batch_size_train: {self.config.run_cfg.batch_size_train} in "
                "each process (LAVIS drops an incomplete one); choose a smaller batch."
            )
        total = self.iters_per_inner_epoch if self.counts_iterations else len(self.train_loader)
        if self.accum_grad_iters > total:  # LAVIS counts batches anew in each epoch
            epoch = f"run.iters_per_inner_epoch: {total}" if self.counts_iterations else f"the {total} of an epoch"
            raise ValueError(
                f"run.accum_grad_iters: {self.accum_grad_iters} is more batches than {epoch}, so no step would ever "
                "be made; choose a smaller one."
            )
        if self.counts_iterations and self.max_iters % total:
            logging.warning(
                "run.max_iters: %d is no multiple of run.iters_per_inner_epoch: %d; LAVIS trains inner epochs whole, "
                "%d batches in all%s",
                self.max_iters,
                total,
                math.ceil(self.max_iters / total) * total,
                ", and linear_warmup_cosine_lr is at run.min_lr in the last of them" if self.max_iters > total else "",
            )

    def _lengths(self) -> list[int]:
        """Return the batches of an epoch of each training loader that has a position to return to."""
        return [len(loader) for loader in epoch_loaders(self.train_loader)]

    def _begin_average(self) -> None:
        decay = self.config.run_cfg.get("ema_decay")
        if decay is not None:
            average = self._average = WeightAverage(self.unwrap_dist_model(self.model), decay)
            self.optimizer.register_step_post_hook(lambda *_: average.update())

    def _averaged(self) -> AbstractContextManager[None]:
        """Return a block in which the model has the weights that are evaluated and saved."""
        return nullcontext() if self._average is None else self._average.in_model()

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch of LAVIS's loop, or the remaining batches of an interrupted one."""
        return self._train_remaining("train_epoch", epoch, len(self.train_loader), partial(super().train_epoch, epoch))

    def train_iters(self, epoch: int, start_iters: int) -> dict[str, Any]:
        """Train one inner epoch of LAVIS's iteration-based loop, or the remaining batches of an interrupted one."""
        total = self.iters_per_inner_epoch
        return self._train_remaining(
            "train_iters", start_iters, total, partial(super().train_iters, epoch, start_iters)
        )

    def _train_remaining(self, name: str, place: int, total: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Train the remaining batches of the epoch at ``place`` by LAVIS's own loop.

        LAVIS's function ``run`` calls the task's method ``name``, ``train_epoch`` or ``train_iters``, with the loop.
        """
        resumed, self._resumed = self._resumed, None
        part = RemainingEpoch(self, place, total, resumed)
        if self.run_log is None and is_main_process():
            self.run_log = RunLog(self.folder, first_step=part.batches_done, columns=self.LOG_COLUMNS)
        if resumed is None and place != self._begin:
            self.save_last(place, 0, {})
        self._trained = part
        stock, step = getattr(self.task, name), self.task.train_step
        own = {
            name: lambda **arguments: stock(**part.arguments(arguments)),
            "train_step": partial(self.train_step, part, step),
        }
        with replaced(self.task, own), closing(part.bar):
            stats = part.skip_all() if part.skipped == total else run()
            part.finish()
        if self.valid_splits and part.skipped < total:  # an interrupted validation must not lose the epoch
            self.save_last(place, total, part.meters)
        return part.completed(stats)

    def train_step(self, part: RemainingEpoch, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the task's own step, in whose place LAVIS's loop calls this one, and log the loss that it returns.

        A task with a loop of its own may have a step that returns more; the model's loss is then logged.
        """
        loss = stock(*args, **kwargs)
        if part.is_called and isinstance(loss, Tensor):  # it may have a factor before model(samples)["loss"]
            part.loss = loss.detach()
        return loss

    def training_model(self, model: Any, scaler: Any) -> Callable[[dict[str, Any]], Any]:
        """Return the callable that LAVIS's loop calls as the model.

        A runner that changes the training step overrides this method.
        """
        return model

    # Evaluation and logs.

    def evaluate(self, cur_epoch: Any = "best", skip_reload: bool = False) -> Any:
        """Save the trained state, then evaluate as :class:`PortableRunner` does."""
        if self._trained is not None:
            self.save_last(self._trained.next_place, 0, {})
        return super().evaluate(cur_epoch, skip_reload)

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
        with run_folders.log_explained(self.folder):
            super().log_stats(stats, split_name)
        if self.run_log is not None and self._trained is not None and isinstance(stats, dict):
            values = {key: value for key, value in stats.items() if not key.startswith("best_")}
            if split_name == "train":
                values.update(self._trained.means)  # LAVIS rounds to three decimals, too few for a learning rate
            step = max(self._trained.batches_done - 1, 0)
            self.run_log.log_epoch(step, self._trained.epoch, split_name, values)

    def log_config(self) -> None:
        """Log the config at the start of a run, but not when the run is resumed."""
        if not self._continues:
            with run_folders.log_explained(self.folder):
                super().log_config()

    def what_is_kept(self, command: str) -> str:
        """Return what an interrupted ``train`` or ``evaluate`` has saved and how to go on, as the end of a sentence."""
        if command == "evaluate" or self.evaluate_only:
            return "an evaluation keeps nothing until it is done, so start it again."
        if self._kept is None:
            return (
                f"nothing was trained or saved yet (the first {LAST} comes after an epoch, or with run.save_every), so "
                "start it again."
            )
        go_on = shlex.quote(option("run.resume_ckpt_path", self.folder))
        return (
            f"{self.folder / LAST} holds the run up to {self._kept}; add --options {go_on} to the same command to go "
            "on from there."
        )

    # Checkpoints are written.

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
        name = BEST if is_best else f"checkpoint_{cur_epoch}.pth"
        run_folders.write_run_checkpoint(self.folder, self._checkpoint(cur_epoch), name)

    def save_last(self, place: int, batches: int, meters: Meters) -> None:
        """Write ``checkpoint_last.pth`` after ``batches`` batches of the epoch that begins at ``place``."""
        processes = gather({"random_state": get_random_state(self.device), "meters": meters})
        if not is_main_process():
            return
        weights = self.unwrap_dist_model(self.model).named_parameters()
        progress = {
            "place": place,
            "batches": batches,
            "taken": [loader.taken for loader in epoch_loaders(self.train_loader)],
            "lengths": self._lengths(),
            "processes": processes,
            "gradients": {name: weight.grad for name, weight in weights if weight.grad is not None},
            "best": self.best,
            "logs": run_folders.log_sizes(self.folder),
        }
        if self._average is not None:
            progress.update(trained=self._average.trained(), averaged=self._average.updates)
        # LAVIS's own runners count finished iterations, or the number of the last finished epoch.
        done = place if self.counts_iterations else place - 1
        run_folders.write_run_checkpoint(self.folder, {**self._checkpoint(done), "progress": progress}, LAST, PREVIOUS)
        self._kept = self._moment(place, batches)

    def _checkpoint(self, done: Any) -> dict[str, Any]:
        """Return the content of a LAVIS checkpoint, without frozen weights unless training moves them."""
        model = self.unwrap_dist_model(self.model)
        self._check_finite(model)
        left_out = set(frozen_names(model)) - set(momentum_copies(model))
        with self._averaged():
            state = model.state_dict()
        return {
            "model": {name: tensor for name, tensor in state.items() if name not in left_out},
            "optimizer": self.optimizer.state_dict(),
            "config": self.config.to_dict(),
            "trained_on": sorted(self._trained_on),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            self._unit: done,
        }

    def _check_finite(self, model: nn.Module) -> None:
        """Raise ValueError if trained weights are not finite, so that nobody could go on from a checkpoint of them."""
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        broken = [name for name, weight in trained if not weight.isfinite().all()]
        if broken:
            raise ValueError(
                f"{len(broken)} of {len(trained)} trained tensors are not finite any more (first: {broken[0]}): "
                f"a gradient was not, while the loss was; lower run.init_lr, or look for the model's operation with "
                f"such a gradient (torch.autograd.set_detect_anomaly). {run_folders.last_good(self.folder)}."
            )

    # Checkpoints are gone on from.

    def _load_checkpoint(self, path: str) -> None:
        """Resume from ``checkpoint_last.pth`` or from a checkpoint of LAVIS, which may lack frozen tensors."""
        with fail_in_all_processes():  # a machine may not see the file
            saved = read_checkpoint(path)
        resume_checks.check_saved_run(saved, path, self._unit, self.config.run_cfg.get("runner"))
        model = self.unwrap_dist_model(self.model)
        load_strictly(model, saved["model"], path, may_lack=frozen_names(model))
        if self._average is not None:
            self._average.restart(saved.get("progress", {}).get("averaged", 0))
        self._load_optimizer(saved, path)
        self._trained_on |= trained_on_by(saved)
        if "progress" in saved:
            self._continue(saved, path)
        else:
            self._start_after(saved[self._unit], path)

    def _load_optimizer(self, saved: Mapping[str, Any], path: str) -> None:
        groups = self.optimizer.param_groups
        resume_checks.check_optimizer(saved["optimizer"], groups, path)
        asked = [{key: group[key] for key in _GROUP_KEYS if key in group} for group in groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, own in zip(self.optimizer.param_groups, asked):
            group.update(own)
        if self.scaler and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])

    def _start_after(self, done: int, path: str) -> None:
        """Begin after a checkpoint of LAVIS, which counts finished iterations or names the last finished epoch."""
        self._start_at(done + (0 if self.counts_iterations else 1))
        if self._begin >= self._end:
            raise ValueError(
                f"run.resume_ckpt_path: {path} was written after {self._unit} {done} (counted from "
                f"0), so nothing is left of run.max_{self._unit}: {self._end}; choose a larger one."
            )

    def _continue(self, saved: Mapping[str, Any], path: str) -> None:
        """Restore everything but weights and optimizer."""
        resume_checks.check_same_data(saved, path, self.config.to_dict(), self._lengths())
        progress, loaders = saved["progress"], epoch_loaders(self.train_loader)
        for loader, taken in zip(loaders, progress["taken"]):
            loader.seek(taken)
        if not loaders:
            logging.warning("the training data is a stream, which begins anew")
        self._restore_tensors(progress, path)
        self._start_at(progress["place"])
        self._resumed = progress
        self._continues = self.folder.resolve() == Path(path).parent.resolve()  # the checkpoint itself may be a link
        if self._continues:
            self._go_on_in_folder(progress, path)
        else:
            logging.warning("%s is another run's; this one begins a folder and a best epoch of its own", path)

    def _restore_tensors(self, progress: Mapping[str, Any], path: str) -> None:
        """Restore the weights that the optimizer moves if the model has their averages, and left-over gradients."""
        weights = dict(self.unwrap_dist_model(self.model).named_parameters())
        resume_checks.check_tensor_names(progress, weights, path)
        for name, tensor in progress.get("trained", {}).items():
            weights[name].data.copy_(tensor)
        for name, gradient in progress["gradients"].items():
            weights[name].grad = gradient.to(weights[name].device)

    def _go_on_in_folder(self, progress: Mapping[str, Any], path: str) -> None:
        """Take the best epoch over, and cut the folder's logs back to the moment of the checkpoint."""
        if (self.folder / BEST).is_file():
            self.best = dict(progress["best"])
        elif progress["best"]["metric"] > 0:
            logging.warning(
                "%s lacks the %s of epoch %s, so the best epoch is chosen among those that follow",
                self.folder, BEST, progress["best"]["epoch"],
            )  # fmt: skip
        if is_main_process():
            run_folders.cut_logs(self.folder, progress["logs"])
            if Path(path).name == PREVIOUS:  # the last checkpoint is damaged and must not become the previous one
                (self.folder / LAST).unlink(missing_ok=True)
        self._kept = self._moment(progress["place"], progress["batches"])
        logging.info("resumed from %s: %s batches after %s", path, progress["batches"], progress["place"])


def resumable(runner: type) -> type:
    """Return a runner class with :class:`ResumableRunner` mixed in, or the class itself if it is resumable already."""
    if issubclass(runner, ResumableRunner):
        return runner
    attributes = {"__module__": runner.__module__, "__doc__": runner.__doc__}
    return type(runner.__name__, (ResumableRunner, runner), attributes)
