"""The launcher behind ``python -m lavis.train`` and ``python -m lavis.evaluate``: LAVIS's steps with checks."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import random
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lavis import tasks
from lavis.common.config import Config
from lavis.common.dist_utils import get_rank, is_main_process, setup_for_distributed
from lavis.common.logger import setup_logger
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf
from torch import nn

import lavis_cir_plugin
from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.benchmarks.images import refuse_output_inside
from lavis_cir_plugin.core.interruption import interruptible
from lavis_cir_plugin.core.processes import fail_in_all_processes
from lavis_cir_plugin.core.random_state import get_random_state, set_random_state
from lavis_cir_plugin.data.label_noise import write_noise
from lavis_cir_plugin.report import run_record
from lavis_cir_plugin.training import config, lora
from lavis_cir_plugin.training.portable_runner import join_single_process
from lavis_cir_plugin.training.resumable_runner import resumable
from lavis_cir_plugin.training.run_folders import find_checkpoint, folder_to_go_on_in, output_folder

# The other processes wait this long while one downloads a checkpoint; a dead process is noticed after that time.
_PROCESS_TIMEOUT = timedelta(minutes=60)

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_OTHER_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec"}
"""Variables with the number of processes, by which launchers other than torchrun are recognised."""

# Error numbers of disks and folders that refuse a file, which LAVIS or another library may have tried to write.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO)


def main(command: str, arguments: Sequence[str] | None = None) -> None:
    """Train or evaluate by a config file.

    Args:
        command: ``train`` or ``evaluate``.
        arguments: Arguments of the command line; by default those of ``sys.argv``.
    """
    parser = argparse.ArgumentParser(prog=f"python -m lavis.{command}")
    parser.add_argument("--cfg-path", required=True, help="YAML file; projects/... is also found where none is local")
    parser.add_argument("--options", nargs="+", action="extend", default=[], help="run.seed=1 and the like")
    args = parser.parse_args(arguments)
    runners: list[Any] = []
    is_done = False
    with interruptible(f"lavis.{command}", lambda: _kept_by_interrupted(command, runners)):
        try:
            run(command, args, runners.append)
            is_done = True
        except (ValueError, OSError) as error:
            sentence = _sentence_for_user(error)
            if sentence is None:
                raise
            sys.exit(f"lavis.{command}: {sentence}")
        finally:
            if dist.is_initialized() and (is_done or not _leaving_waits()):
                dist.destroy_process_group()


def run(command: str, args: argparse.Namespace, announce: Callable[[Any], None] = lambda runner: None) -> None:
    """Build config, task, data sets, model and runner as LAVIS's scripts do, then train or evaluate.

    Args:
        command: ``train`` or ``evaluate``.
        args: Parsed arguments with ``cfg_path`` and ``options``.
        announce: Function that is called with the runner before the runner starts.
    """
    project = find_config(args.cfg_path)
    cfg = config.with_lavis_defaults(config.read_config(str(project), args.options))
    config.check_values(cfg, command)
    config.choose_splits(cfg, command)
    cfg.run_cfg.output_dir = str(output_folder(cfg.run_cfg.output_dir))
    _join_processes(cfg.run_cfg)
    job_id = _job_id(cfg)
    _seed(int(cfg.run_cfg.seed) + get_rank())
    setup_logger()
    _warn_of_other_launchers(cfg.run_cfg)
    cfg.pretty_print()

    task = tasks.setup_task(cfg)
    datasets = task.build_datasets(cfg)
    _refuse_output_among_images(Path(cfg.run_cfg.output_dir), datasets)
    model = _build_model(task, cfg)
    if command == "train" and not cfg.run_cfg.get("evaluate"):
        lora.check_loss_scale(model, bool(cfg.run_cfg.get("amp")))
    if hasattr(task, "prepare"):
        task.prepare(model, datasets, cfg)
    runner_class = resumable(registry.get_runner_class(cfg.run_cfg.get("runner", "runner_base")))
    runner = runner_class(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)
    announce(runner)
    if is_main_process():
        _record_start(command, args, project, cfg, Path(runner.output_dir))
        write_noise(Path(runner.output_dir), datasets)
    if command == "train":
        runner.train()
    else:
        runner.evaluate(skip_reload=True)
    if is_main_process():
        run_record.end(Path(runner.output_dir))
        logging.info("output: %s", runner.output_dir)


def _record_start(command: str, args: argparse.Namespace, project: Path, cfg: Config, folder: Path) -> None:
    """Keep in the run's folder what it was started with."""
    values = run_record.flat(cfg.to_dict())
    origins = config.origins(args.cfg_path, OmegaConf.load(project), args.options, values)
    options = ["--options", *args.options] if args.options else []
    words = ["python", "-m", f"lavis.{command}", "--cfg-path", args.cfg_path, *options]
    run_record.begin(folder, words, values, origins, dist.get_world_size())


def _kept_by_interrupted(command: str, runners: Sequence[Any]) -> str | None:
    """Return what an interrupted command has kept and how to go on; only the main process says so."""
    if int(os.environ.get("RANK", "0")) != 0:
        return None
    if not runners:
        return "it had not begun, so start it again; drawn pictures and computed features that are whole are kept."
    return str(runners[0].what_is_kept(command))


def _leaving_waits() -> bool:
    """Return whether a process that leaves its group waits for the others there.

    After an error they may wait for this process, and nobody would read its message. When it has ended without leaving,
    torchrun ends the others.
    """
    return dist.get_backend() == "nccl" and dist.get_world_size() > 1


def find_config(path: str) -> Path:
    """Return the path of the config file; a relative ``projects/...`` may also be one of the shipped projects."""
    local = Path(os.path.expanduser(path))
    if local.is_file():
        return local
    shipped = PROJECTS.joinpath(*local.parts[1:]) if local.parts[:1] == ("projects",) else local
    if shipped.is_file():
        return shipped
    available = ", ".join(sorted(f"projects/{found.relative_to(PROJECTS)}" for found in PROJECTS.rglob("*.yaml")))
    if local.is_dir():
        raise ValueError(f"--cfg-path {path} names a folder; name a YAML file. Shipped: {available}.")
    raise FileNotFoundError(f"--cfg-path {path} does not exist (looked from {os.getcwd()}). Shipped: {available}.")


def _refuse_output_among_images(output: Path, datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse an output folder below a folder with images of a data set."""
    for name, splits in datasets.items():
        folders = {path.parent for data in splits.values() for path in getattr(data, "image_paths", {}).values()}
        for folder in sorted(folders):
            refuse_output_inside(output, folder, f"of datasets.{name}")


def _join_processes(run_cfg: DictConfig) -> None:
    """Open torchrun's process group, or a group of one process; gloo serves a CPU and NCCL serves GPUs.

    Raises:
        ValueError: If the environment has only a part of torchrun's variables, or no GPU for this process.
    """
    lacking = [name for name in _TORCHRUN if name not in os.environ]
    run_cfg.distributed = not lacking
    if lacking:
        size = os.environ.get("WORLD_SIZE", "1")
        if size != "1":
            raise ValueError(
                f"the environment has WORLD_SIZE: {size} and no {' and no '.join(lacking)}, so each of these processes "
                "would train alone; start them by torchrun, which sets all three, or unset WORLD_SIZE."
            )
        join_single_process(run_cfg.device)
        return
    run_cfg.rank, run_cfg.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    run_cfg.gpu = int(os.environ["LOCAL_RANK"])
    on_gpu = run_cfg.device == "cuda"
    if on_gpu:
        _refuse_lack_of_gpus(run_cfg.gpu)
        torch.cuda.set_device(run_cfg.gpu)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PROCESS_TIMEOUT)
    setup_for_distributed(get_rank() == 0)


def _refuse_lack_of_gpus(local_rank: int) -> None:
    visible = torch.cuda.device_count()
    if local_rank >= visible:
        raise ValueError(
            f"run.device: cuda: the process with LOCAL_RANK {local_rank} needs a GPU of its own, and torch sees "
            f"{visible} (CUDA_VISIBLE_DEVICES: {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start "
            f"torchrun with --nproc_per_node={visible}, or make more GPUs visible."
        )


def _warn_of_other_launchers(run_cfg: DictConfig) -> None:
    """Warn if srun or mpirun has started several processes, which form no group without torchrun."""
    if run_cfg.distributed:
        return
    for name, command in _OTHER_LAUNCHERS.items():
        size = os.environ.get(name, "1")
        if size != "1":
            logging.warning(
                "%s has started %s processes, and each of them trains or evaluates alone: only torchrun joins "
                "processes to one run (%s starts one torchrun per machine, with --nnodes and --nproc_per_node)",
                command, size, command,
            )  # fmt: skip
            return


def _build_model(task: Any, cfg: Any) -> nn.Module:
    """Build the model from equal random numbers on every process, then give each process its own random numbers.

    Thus frozen weights that come from no file are equal on all processes, and so are the features cached from them.
    """
    if dist.get_world_size() == 1:
        return lora.build_model(task, cfg)
    state: list[Any] = [get_random_state()]
    dist.broadcast_object_list(state)
    set_random_state(state[0])
    with fail_in_all_processes():  # a machine may lack a file of weights
        model = lora.build_model(task, cfg)
    if get_rank() > 0:
        _seed(int(cfg.run_cfg.seed) + get_rank())
    return model


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # the largest seed and a rank exceed what NumPy takes
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


def _job_id(cfg: Config) -> str:
    """Return the folder of the run, a new one or that of a resumed run; all processes get the same answer."""
    chosen: list[Any] = [None, None, None]
    if is_main_process():
        try:
            checkpoint = find_checkpoint(cfg.run_cfg.resume_ckpt_path, cfg.run_cfg.output_dir, cfg.to_dict())
            chosen = [folder_to_go_on_in(checkpoint), None if checkpoint is None else str(checkpoint), None]
        except (ValueError, OSError) as error:
            chosen[2] = error
    dist.broadcast_object_list(chosen)
    if chosen[2] is not None:
        raise chosen[2]
    cfg.run_cfg.resume_ckpt_path = chosen[1]
    return str(chosen[0])


def _sentence_for_user(error: BaseException) -> str | None:
    """Return the message of an error that a user understands without a traceback, or None for any other error.

    Such errors are those that this package raised, and refusals of a disk or folder.
    """
    package = str(Path(lavis_cir_plugin.__file__).parent)
    if "in DataLoader worker process" in str(error):  # torch's new error has the worker's traceback as its message
        *trace, message = str(error).strip().splitlines()
        origins = [line for line in trace if line.lstrip().startswith("File ")]
        return message.partition(": ")[2] if origins and package in origins[-1] else None
    is_ours = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(package)
    if isinstance(error, OSError) and error.errno is not None:
        if is_ours and error.strerror != os.strerror(error.errno):
            return str(error.strerror)
        if error.errno in _REFUSALS:
            return (
                f"{error.filename or 'a file'} cannot be written or read ({os.strerror(error.errno)}); free some space "
                "there, or choose another folder (runs are below run.output_dir, the cache below XDG_CACHE_HOME, and "
                "LAVIS's downloads below env.cache_root of LAVIS's own configs/default.yaml)."
            )
    return str(error) if is_ours else None
