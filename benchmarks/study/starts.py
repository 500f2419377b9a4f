"""What the runs start from: models that are trained on captions of other drawn garments, once for all runs."""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import Tensor

from lavis_cir_plugin.core.atomic_files import replace_file, replacing
from lavis_cir_plugin.core.checkpoints import read_checkpoint
from lavis_cir_plugin.core.locks import hold_lock
from lavis_cir_plugin.core.random_state import seed_cpu
from lavis_cir_plugin.garments.world import digest
from lavis_cir_plugin.training import launcher
from study import worlds
from study.design import VERSION, Design, Start

PROCESSORS = {stage: {"name": "target_pad", "image_size": 64} for stage in ("train", "eval")}


def start_checkpoint(design: Design, start: Start, work: Path) -> Path:
    """Return the checkpoint that runs start from; the first call trains it on captions."""

    def make(path: Path) -> None:
        state = _make_start(design, start, work)
        with replacing(path) as file:
            torch.save({"model": state}, file)

    return _once(_file(design, start.name, work), make)


def _once(path: Path, make: Callable[[Path], None]) -> Path:
    """Return a file, which the first of several processes makes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(path.with_suffix(".lock"), f"training {path.name}"):
        if not path.is_file():
            make(path)
    return path


def _file(design: Design, name: str, work: Path, suffix: str = ".pth") -> Path:
    settings = [VERSION, design.caption_pictures, design.caption_steps, design.batch]
    return work / "starts" / f"{name}_{digest(settings)[:8]}{suffix}"


def _make_start(design: Design, start: Start, work: Path) -> Mapping[str, Tensor]:
    if start == Start():
        return _train_on_captions(design, start, work, None)
    # Another Q-Former stands on a tower that is finished and frozen.
    untrained = _file(design, start.name, work, "_untrained.pth")
    if start.share == 1:
        tower = read_checkpoint(str(start_checkpoint(design, Start(), work)))["model"]
    else:
        tower = _train_on_captions(design, Start(share=start.share), work, None)
    with replacing(untrained) as file:
        torch.save({"model": _with_tower(start, tower)}, file)
    if start.fresh:
        return dict(read_checkpoint(str(untrained))["model"])
    return _train_on_captions(design, start, work, untrained)


def _with_tower(start: Start, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the weights of a model with a new Q-Former of the start's width, and the tower of other weights."""
    seed_cpu(0)
    model_class = registry.get_model_class("blip2_cir")
    defaults = OmegaConf.load(model_class.default_config_path("tiny"))
    model = model_class.from_config(OmegaConf.merge(defaults, {"model": model_section(start, None)}).model)
    tower = {name: tensor for name, tensor in source.items() if name.startswith("visual_encoder.")}
    return {**model.state_dict(), **tower}


def _train_on_captions(design: Design, start: Start, work: Path, untrained: Path | None) -> Mapping[str, Tensor]:
    root = worlds.caption_world(design)
    folder = worlds.caption_triplets(root, work)
    # A tower is trained together with its Q-Former; a Q-Former on a frozen tower always has all steps.
    steps = round((start.share if untrained is None else 1) * design.caption_steps)
    config = {
        "model": {**model_section(start, untrained), "freeze_vit": untrained is not None},
        "datasets": {
            "triplets": {"build_info": {"root": str(folder), "images": str(root / "images")},
                         "vis_processor": PROCESSORS, "splits": ["train"], "preload": untrained is None},
        },
        "run": {**_start_section(design, work, steps), "init_lr": 5.0e-4,
                "feature_cache": str(work / "features") if untrained is not None else False},
    }  # fmt: skip
    runners: list[Any] = []
    output = _file(design, start.name, work, "_run")
    launch(config, output, runners.append)
    model = runners[0].unwrap_dist_model(runners[0].model)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    shutil.rmtree(output)
    return state


def _start_section(design: Design, work: Path, steps: int) -> dict[str, Any]:
    return {**run_section(design, work), "runner": "runner_iter", "max_iters": steps,
            "iters_per_inner_epoch": max(steps // 10, 1), "valid_splits": [], "seed": 0}  # fmt: skip


def clip_checkpoint(design: Design, work: Path) -> Path:
    """Return the checkpoint of a small CLIP; the first call trains it on the captions."""
    model = {"arch": "clip_cir", "model_type": "tiny", "freeze_vit": False}
    return _trained_once(design, work, "clip", model, {"name": "target_pad"}, {"init_lr": 1.0e-3})


def mapping_checkpoint(design: Design, work: Path) -> Path:
    """Return the checkpoint of TSCIR's stage I on the small CLIP; the first call trains it on the captions."""
    clip = {"pretrained": str(clip_checkpoint(design, work))}
    model = {"arch": "tscir_mapping", "model_type": "tiny", **clip}
    return _trained_once(
        design, work, "mapping", model, {"name": "clip_two_views"}, {"init_lr": 1.0e-3, "weight_decay": 0.1}
    )


def _trained_once(
    design: Design, work: Path, name: str, model: Mapping[str, Any], pictures: Mapping[str, Any], run: Mapping[str, Any]
) -> Path:
    """Return the checkpoint of a model that learns from pictures with their captions, "a photo of ..."."""
    steps = design.caption_steps // 3  # with batches of twice the size, as in the demos of TSCIR
    config = {
        "model": dict(model),
        "datasets": {
            "garments_caption": {"splits": ["train"], "garments": asdict(worlds.caption_settings(design)),
                                 "vis_processor": {"train": dict(pictures)},
                                 "text_processor": {"train": {"prompt": "a photo of "}}},
        },
        "run": {**_start_section(design, work, steps), "batch_size_train": 2 * design.batch, "feature_cache": False,
                **run},
    }  # fmt: skip

    def make(path: Path) -> None:
        output = _file(design, name, work, "_run")
        runners: list[Any] = []
        launch(config, output, runners.append)
        last = Path(runners[0].output_dir) / "checkpoint_last.pth"
        # The checkpoint itself, because TSCIR's stages read the settings that stand in it.
        replace_file(path, last.read_bytes())
        shutil.rmtree(output)

    return _once(_file(design, name, work), make)


def model_section(start: Start, finetuned: Path | None) -> dict[str, Any]:
    """Return the ``model`` section of the study's ``blip2_cir``."""
    weights = {} if finetuned is None else {"load_finetuned": True, "finetuned": str(finetuned)}
    sizes = {"hidden_size": start.width, "intermediate_size": 4 * start.width}
    return {"arch": "blip2_cir", "model_type": "tiny", "qformer_config": sizes, **weights}


def run_section(design: Design, work: Path) -> dict[str, Any]:
    """Return what all trainings of the study have in their ``run`` section."""
    return {
        "task": "composed_retrieval", "batch_size_train": design.batch, "batch_size_eval": 256, "min_lr": 1.0e-5,
        "warmup_lr": 1.0e-5, "warmup_steps": 20, "beta2": 0.98, "num_workers": 0, "device": "cpu", "log_freq": 5,
        "train_splits": ["train"], "test_splits": [], "feature_cache": str(work / "features"),
    }  # fmt: skip


def launch(config: Any, output: Path, announce: Callable[[Any], None]) -> None:
    """Train by the package's launcher below ``output``; ``announce`` takes the runner before it starts."""
    shutil.rmtree(output, ignore_errors=True)  # what an interrupted run has left
    output.mkdir(parents=True)
    config["run"]["output_dir"] = str(output / "out")
    OmegaConf.save(OmegaConf.create(config), output / "project.yaml")
    logging.disable(logging.INFO)
    with (output / "printed.txt").open("w", encoding="utf-8") as printed, contextlib.redirect_stdout(printed):
        launcher.run("train", argparse.Namespace(cfg_path=str(output / "project.yaml"), options=[]), announce)
