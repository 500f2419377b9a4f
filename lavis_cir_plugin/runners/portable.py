"""LAVIS's runners, freed from what they take for granted: a GPU, torchrun, and writes that never fail."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lavis.common import logger as lavis_logger
from lavis.common.registry import registry
from lavis.datasets.datasets import dataloader_utils
from lavis.runners import runner_base
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lavis_cir_plugin.checkpoints import load_strictly, read_checkpoint, read_state


class PortableRunner:
    """Mix-in that goes before one of LAVIS's runners; it overrides no loop and changes no arithmetic.

    * Trains and evaluates on a CPU, in one process or several.
    * Several runners may live in one process.
    * A checkpoint is written beside its place and then moved there, so a half-written one never has its name.
    * The best checkpoint is read without unpickling objects and must match the trained tensors.
    """

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: Any, job_id: str) -> None:
        join_single_process(cfg.run_cfg.device)
        for name in ("result_dir", "output_dir"):
            registry.mapping["paths"].pop(name, None)
        super().__init__(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id)
        if not self.cuda_enabled:
            # LAVIS's tasks move evaluation batches to a GPU unless told otherwise, and its meters sum there.
            task.evaluation = partial(task.evaluation, cuda_enabled=False)
            lavis_logger.SmoothedValue.synchronize_between_processes = _synchronize_meter
            # Its loader sleeps two seconds before each epoch for the sake of CUDA prefetching, and uses no other clock.
            dataloader_utils.time = SimpleNamespace(sleep=lambda seconds: None)

    @property
    def model(self) -> nn.Module:
        """The model on its device, inside DistributedDataParallel in a distributed run."""
        wrapped: nn.Module | None = self._wrapped_model
        if wrapped is None:
            wrapped = self._model = self._model.to(self.device)
            if self.use_distributed:
                devices = [self.config.run_cfg.gpu] if self.cuda_enabled else None
                wrapped = DistributedDataParallel(self._model, device_ids=devices)
            self._wrapped_model = wrapped
        return wrapped

    def create_loaders(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return LAVIS's loaders; on a CPU without its prefetcher, which opens a CUDA stream."""
        if self.cuda_enabled:
            return super().create_loaders(*args, **kwargs)
        with mock.patch.object(runner_base, "PrefetchLoader", lambda loader: loader):
            return super().create_loaders(*args, **kwargs)

    def evaluate(self, cur_epoch: Any = "best", skip_reload: bool = False) -> Any:
        """Evaluate the test splits at the end; without any validation the last weights are the final ones."""
        if not self.valid_splits:
            cur_epoch, skip_reload = "best", True
        return super().evaluate(cur_epoch=cur_epoch, skip_reload=skip_reload)

    def train(self) -> None:
        """Run LAVIS's loop, unless there is not a single batch, which it would only notice in a division by zero."""
        if not self.evaluate_only and hasattr(self.train_loader, "__len__") and len(self.train_loader) == 0:
            raise ValueError(
                f"the training data gives no batch of run.batch_size_train: {self.config.run_cfg.batch_size_train} in "
                "each process (LAVIS drops an incomplete one); choose a smaller batch."
            )
        super().train()

    def _save_checkpoint(self, cur_epoch: Any, is_best: bool = False) -> None:
        with self._staged_output():
            super()._save_checkpoint(cur_epoch, is_best=is_best)

    @contextmanager
    def _staged_output(self) -> Iterator[None]:
        """Let the stock method write into a folder beside the checkpoints, then move what it wrote into place."""
        final = self.output_dir
        try:
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=final) as staging:
                self.output_dir = Path(staging)
                yield
                for name in os.listdir(staging):
                    os.replace(os.path.join(staging, name), os.path.join(final, name))
                    logging.info("checkpoint complete: %s", os.path.join(final, name))  # LAVIS logs the staging folder
        except (OSError, RuntimeError) as error:
            # torch reports a failed write as a RuntimeError of its zip writer; any other is no matter of space.
            if isinstance(error, RuntimeError) and "writ" not in str(error):
                raise
            raise OSError(
                f"no checkpoint could be written to {final} ({str(error).splitlines()[0]}). Earlier checkpoints there "
                "are untouched; free some space or set run.output_dir to another disk."
            ) from error
        finally:
            self.output_dir = final

    def _reload_best_model(self, model: nn.Module) -> nn.Module:
        path = os.path.join(self.output_dir, "checkpoint_best.pth")
        if not os.path.isfile(path):
            logging.warning("no epoch of this run had a validation metric above 0; the last weights are evaluated.")
            return model
        load_strictly(model, read_state(path), path, may_lack=_frozen(model))
        return model

    def _load_checkpoint(self, url_or_filename: str) -> None:
        """Resume from a checkpoint of LAVIS's, which leaves out the frozen tensors."""
        saved = read_checkpoint(url_or_filename)
        missing = {"model", "optimizer"} - set(saved)
        if missing:
            raise ValueError(
                f"run.resume_ckpt_path: {url_or_filename} holds no {' and no '.join(sorted(missing))}, so it is no "
                "checkpoint of a LAVIS run; to start from its weights set model.finetuned and model.load_finetuned."
            )
        model = self.unwrap_dist_model(self.model)
        load_strictly(model, saved["model"], url_or_filename, may_lack=_frozen(model))
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scaler and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if "iters" in saved:  # an iteration-based runner
            self.start_iters = saved["iters"] + 1
        else:
            self.start_epoch = saved["epoch"] + 1
            if self.start_epoch >= self.max_epoch:
                raise ValueError(
                    f"run.resume_ckpt_path: {url_or_filename} was written after epoch {saved['epoch']} (counted from "
                    f"0), so nothing is left of run.max_epoch: {self.max_epoch}; choose a larger one."
                )


def portable(runner: type) -> type:
    """Return a runner class of LAVIS with :class:`PortableRunner` before it, or the class itself if it is one."""
    if issubclass(runner, PortableRunner):
        return runner
    return type(runner.__name__, (PortableRunner, runner), {"__module__": runner.__module__, "__doc__": runner.__doc__})


def _frozen(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, weight in model.named_parameters() if not weight.requires_grad)


def _synchronize_meter(meter: lavis_logger.SmoothedValue) -> None:
    """Sum a meter over processes on the CPU; LAVIS's own sums on a GPU."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    total = torch.tensor([meter.count, meter.total], dtype=torch.float64)
    dist.all_reduce(total)
    count, meter.total = total.tolist()
    meter.count = int(count)


def join_single_process(device: str) -> None:
    """Open a process group of this process alone, unless one is open: LAVIS ends each epoch with a barrier."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
