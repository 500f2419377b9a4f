"""LAVIS's runners on any machine: without a GPU, without torchrun, and several in one process."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from lavis.common import logger as lavis_logger
from lavis.common.registry import registry
from lavis.datasets.datasets import dataloader_utils
from lavis.runners import runner_base
from lavis.runners.runner_iter import RunnerIter
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from lavis_cir_plugin.core.checkpoints import load_strictly, read_checkpoint
from lavis_cir_plugin.core.model_parts import equalise_buffers, frozen_names, without_ddp
from lavis_cir_plugin.core.processes import gather, rank_and_world
from lavis_cir_plugin.core.workers import worker_setup
from lavis_cir_plugin.data.resumable_loader import EpochLoader, training_loader
from lavis_cir_plugin.training.run_folders import BEST


class PortableRunner:
    """Mix-in before a runner of LAVIS; it overrides no loop and changes no arithmetic.

    * It trains and evaluates on a CPU, in one process or several.
    * Several runners may exist in one process.
    * Order and augmentation of the training data depend on seed and epoch alone
      (:mod:`~lavis_cir_plugin.data.resumable_loader`).
    * It reads the best checkpoint without unpickling objects, and the checkpoint must match the trained tensors.
    """

    def __init__(self, cfg: Any, task: Any, model: nn.Module, datasets: Any, job_id: str) -> None:
        join_single_process(cfg.run_cfg.device)
        for name in ("result_dir", "output_dir"):
            registry.mapping["paths"].pop(name, None)
        super().__init__(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id)
        if not self.cuda_enabled:
            # By default LAVIS's tasks move evaluation batches to a GPU, and its meters sum on a GPU.
            # LAVIS's runner does not ask for the argument, so a user's task may lack it.
            if _takes(task.evaluation, "cuda_enabled"):
                task.evaluation = partial(task.evaluation, cuda_enabled=False)
            lavis_logger.SmoothedValue.synchronize_between_processes = _synchronize_meter
            # LAVIS's loader sleeps for two seconds before each epoch, for CUDA prefetching; it uses `time` for no more.
            dataloader_utils.time = SimpleNamespace(sleep=lambda seconds: None)

    @property
    def model(self) -> nn.Module:
        """The model on its device; in a distributed run DistributedDataParallel wraps it if some weight is trained."""
        wrapped: nn.Module | None = self._wrapped_model
        if wrapped is None:
            wrapped = self._model = self._model.to(self.device)
            if self.use_distributed and any(weight.requires_grad for weight in self._model.parameters()):
                devices = [self.config.run_cfg.gpu] if self.cuda_enabled else None
                wrapped = DistributedDataParallel(self._model, device_ids=devices)
            self._wrapped_model = wrapped
        return wrapped

    def unwrap_dist_model(self, model: nn.Module) -> nn.Module:
        """Return the model inside DistributedDataParallel, or the model itself if nothing wraps it."""
        return without_ddp(model)

    @property
    def dataloaders(self) -> Any:
        """LAVIS's loaders by split; the log names the contents of each split in place of a number of "records".

        Raises:
            ValueError: If an epoch-based runner gets a stream, which has no end.
        """
        self._refuse_streams_in_epochs()
        root, words = logging.getLogger(), _SplitContents(self)
        root.addFilter(words)
        try:
            return super().dataloaders
        finally:
            root.removeFilter(words)

    def _refuse_streams_in_epochs(self) -> None:
        if self._dataloaders is not None or isinstance(self, RunnerIter):
            return
        streams = [name for name, splits in self.datasets.items() if isinstance(splits.get("train"), IterableDataset)]
        if streams:
            raise ValueError(
                f"run.runner: {self.config.run_cfg.get('runner')} counts epochs, and datasets.{streams[0]} is a stream "
                "without an end; choose runner_wrf4cir_iter or runner_iter, with run.max_iters and "
                "run.iters_per_inner_epoch."
            )

    def create_loaders(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return LAVIS's loaders with a resumable order of the data, on a CPU without LAVIS's CUDA prefetcher."""
        seed = int(self.config.run_cfg.get("seed", 42))

        def loader(dataset: Any, drop_last: bool = False, **options: Any) -> DataLoader[Any]:
            if not drop_last:  # LAVIS sets drop_last only for training on data of known length
                return DataLoader(dataset, worker_init_fn=worker_setup(), **options)
            del options["sampler"], options["shuffle"]
            return training_loader(dataset, seed, drop_last=True, **options)

        prefetcher = runner_base.PrefetchLoader if self.cuda_enabled else lambda loader: loader
        names = {
            "DataLoader": loader,
            "PrefetchLoader": prefetcher,
            "IterLoader": lambda loader, use_distributed: EpochLoader(loader),
        }
        with replaced(runner_base, names):
            return super().create_loaders(*args, **kwargs)

    def evaluate(self, cur_epoch: Any = "best", skip_reload: bool = False) -> Any:
        """Evaluate the test splits with the best checkpoint, or with the present weights if nothing was validated."""
        # LAVIS's iteration-based loop would look for a best checkpoint after a pure evaluation too.
        is_trained = not self.evaluate_only and bool(self.valid_splits)
        return super().evaluate(cur_epoch="best", skip_reload=skip_reload or not is_trained)

    def eval_epoch(self, split_name: str, cur_epoch: Any, skip_reload: bool = False) -> Any:
        """Evaluate a split; all processes have the first one's buffers, which checkpoints hold."""
        equalise_buffers(self.model)
        return super().eval_epoch(split_name, cur_epoch, skip_reload)

    def _reload_best_model(self, model: nn.Module) -> nn.Module:
        path = os.path.join(self.output_dir, BEST)
        if not gather(os.path.isfile(path))[0]:  # all processes evaluate the same weights, or one of them fails
            logging.warning(
                "%s is not there: no epoch had a metric above 0 on val, or the file was lost. The last weights are "
                "evaluated.",
                path,
            )
            return model
        # The runner wrote the file with the model's own names, so no prefix has to be removed.
        load_strictly(model, read_checkpoint(path)["model"], path, may_lack=frozen_names(model))
        return model


@contextmanager
def replaced(owner: Any, names: Mapping[str, Any]) -> Iterator[None]:
    """Replace attributes of a module or an object while the context lasts; an object keeps those of its own."""
    own = vars(owner)
    stock = {name: own[name] for name in names if name in own}
    own.update(names)
    try:
        yield
    finally:
        for name in names:
            del own[name]
        own.update(stock)


class _SplitContents(logging.Filter):
    """Replaces LAVIS's log line "Loaded 60 records for val split from the dataset." by the contents of the split."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.runner = runner  # LAVIS arranges its data sets by split just before it writes the line

    def filter(self, record: logging.LogRecord) -> bool:
        found = re.fullmatch(r"Loaded (\d+) records for (\w+) split from the dataset\.", record.getMessage())
        if found:
            record.msg, record.args = f"{found[2]}: {_contents(self.runner.datasets[found[2]])}", ()
        return True


def _takes(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == name or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _contents(dataset: Any) -> str:
    """Return the contents of a data set, or of each data set that LAVIS has concatenated, in words."""
    parts = dataset if isinstance(dataset, (list, tuple)) else getattr(dataset, "datasets", None)
    if parts is not None:
        return ", ".join(map(_contents, parts))
    samples = f"{len(dataset):,} samples" if hasattr(dataset, "__len__") else "a stream"
    return str(getattr(dataset, "contents", samples))


def _synchronize_meter(meter: lavis_logger.SmoothedValue) -> None:
    """Sum a meter over all processes on the CPU; LAVIS's own method sums on a GPU."""
    if rank_and_world()[1] == 1:
        return
    total = torch.tensor([meter.count, meter.total], dtype=torch.float64)
    dist.all_reduce(total)
    count, meter.total = total.tolist()
    meter.count = int(count)


def join_single_process(device: str) -> None:
    """Open a process group of this process alone if none is open, because LAVIS ends each epoch with a barrier."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
