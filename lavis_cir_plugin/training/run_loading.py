"""What a run wrote, as a model again: ``load_run`` builds it by the config inside the run's checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from lavis.common.registry import registry
from lavis.models import load_preprocess
from lavis.tasks.base_task import BaseTask
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lavis_cir_plugin.core.checkpoints import load_strictly, read_checkpoint
from lavis_cir_plugin.core.model_parts import frozen_names
from lavis_cir_plugin.core.sentences import unknown_key
from lavis_cir_plugin.training import lora
from lavis_cir_plugin.training.config import plain_split_name

CHECKPOINTS = ("checkpoint_best.pth", "checkpoint_last.pth", "checkpoint_previous.pth")
"""Which file of a run's folder is taken: the first that is there."""


class LoadedRun(NamedTuple):
    """A trained model and what belongs to it.

    Attributes:
        model: In evaluation mode, on the device asked for.
        vis_processors: Of pictures, by stage, as LAVIS's ``load_model_and_preprocess`` returns them: ``eval`` as the
            run evaluated, ``train`` as it trained.
        txt_processors: Of texts, likewise.
        config: The run's, complete with all defaults.
    """

    model: Any
    vis_processors: dict[str, Any]
    txt_processors: dict[str, Any]
    config: DictConfig


def load_run(
    run: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    changes: Mapping[str, Any] | None = None,
) -> LoadedRun:
    """Return the model of a run with every setting that it was trained with, its adapters (``run.lora``) included.

    A checkpoint leaves out what was frozen: that is loaded from where the run had it (``model.pretrained``, or the
    ``model.finetuned`` that it started from), so these files must be where they were, or named by ``changes``.

    Args:
        run: Folder of a run, for its best checkpoint or else its last one; or one of its checkpoints.
        device: Where the model shall be. On a CPU a tower stored in half precision is loaded in single precision.
        changes: Keys of the run's ``model`` section and what they are now: ``{"pretrained": "/new/place.pth"}``, say.

    Raises:
        FileNotFoundError: If there is no checkpoint, or a file that the model stands on is missing.
        ValueError: If the checkpoint holds no run's config, a change is of an unknown key, or weights do not fit.
    """
    path = checkpoint_in(Path(os.path.expanduser(run)))
    content = read_checkpoint(str(path))
    config = _config_of(content, path)
    model = _build_trained(config, content["model"], str(path), torch.device(device), dict(changes or {}))
    vis_processors, txt_processors = load_preprocess(_preprocessing(config))
    return LoadedRun(model.to(device).eval(), vis_processors, txt_processors, config)


def checkpoint_in(run: Path) -> Path:
    """Return a checkpoint itself, or the one of a run's folder that `load_run` takes.

    Raises:
        FileNotFoundError: If there is none.
    """
    if run.is_file():
        return run
    for name in CHECKPOINTS:
        if (run / name).is_file():
            return run / name
    raise FileNotFoundError(
        f"{run} is neither a checkpoint nor the folder of a run with one ({', '.join(CHECKPOINTS)}); name either."
    )


def _config_of(content: Any, path: Path) -> DictConfig:
    config = content.get("config") if isinstance(content, Mapping) else None
    if not isinstance(config, Mapping) or not isinstance(content.get("model"), Mapping) or "model" not in config:
        raise ValueError(
            f"checkpoint {path} holds no weights with the config of a run; load it into a model by "
            "model.load_checkpoint, or name a file that a run wrote."
        )
    complete: DictConfig = OmegaConf.create({"run": {}, "datasets": {}, **config})
    return complete


def _build_trained(
    config: DictConfig, state: Mapping[str, Any], path: str, device: torch.device, changes: Mapping[str, Any]
) -> nn.Module:
    model_class = registry.get_model_class(config.model.get("arch"))
    if model_class is None:
        raise ValueError(f"checkpoint {path} is of model.arch: {config.model.get('arch')!r}, which is not registered.")
    known = sorted({*map(str, config.model), *(model_class.__init__.__kwdefaults__ or {})})
    unknown = [key for key in changes if key not in known]
    if unknown:
        raise ValueError(unknown_key("changes", unknown[0], known))
    model = OmegaConf.merge(config.model, changes)
    if device.type == "cpu" and model.get("vit_precision") == "fp16":
        model.vit_precision = "fp32"
    # Their content is in the checkpoint, so that the files need not be there any more.
    model.update({key: None for key in getattr(model_class, "kept_in_checkpoints", ()) if key in model})
    starts_elsewhere = bool(model.get("load_finetuned")) and bool(model.get("finetuned"))
    if not config.run.get("lora") and (starts_elsewhere or not model.get("pretrained")):
        found = _build_from_sections(model, config.run)
        _load_trained(found, state, path, starts_elsewhere)
        return found
    return _build_from_sections(OmegaConf.merge(model, {"load_finetuned": True, "finetuned": path}), config.run)


def _build_from_sections(model: DictConfig, run: DictConfig) -> nn.Module:
    """Build as the run did; frozen weights of no file are drawn from the run's seed, as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(run.get("seed", 42)))
        return lora.build_model(BaseTask(), SimpleNamespace(model_cfg=model, run_cfg=run))


def _load_trained(model: nn.Module, state: Mapping[str, Any], path: str, has_start: bool) -> None:
    """Load what a run trained over what it started from."""
    frozen = frozen_names(model)
    load_strictly(model, state, path, may_lack=frozen)
    drawn = [name for name in frozen if name not in state]
    if drawn and not has_start:
        logging.warning(
            "%d frozen tensors are in no file and were drawn again from run.seed (first: %s)", len(drawn), drawn[0]
        )


def _preprocessing(config: DictConfig) -> DictConfig:
    """Return the processors by stage: of the benchmark that the run evaluated and of the data that it trained on.

    Where it evaluated none, those of the model's type in the model's picture size.
    """
    path = registry.get_model_class(config.model.arch).default_config_path(config.model.model_type)
    defaults = OmegaConf.load(path).get("preprocess") or OmegaConf.create()
    chosen = {kind: dict(defaults.get(kind) or {}) for kind in ("vis_processor", "text_processor")}
    size = config.model.get("image_size")
    for stage, processor in chosen["vis_processor"].items():
        if size is not None and processor is not None and "image_size" in processor:
            chosen["vis_processor"][stage] = OmegaConf.merge(processor, {"image_size": size})
    for stage, section in (("train", _training_section(config)), ("eval", _evaluation_section(config))):
        for kind in chosen:
            own = ((section or {}).get(kind) or {}).get(stage)
            if own is not None:
                chosen[kind][stage] = own
    return OmegaConf.create(chosen)


def _training_section(config: DictConfig) -> Mapping[str, Any] | None:
    sections = config.datasets.values()
    return next((section for section in sections if "train" in (section.get("splits") or ["train"])), None)


def _evaluation_section(config: DictConfig) -> Mapping[str, Any] | None:
    """Return the section of the first benchmark that the run evaluated, or else read."""
    sections = [
        section
        for name, section in config.datasets.items()
        if hasattr(registry.get_builder_class(name), "benchmark_module")
    ]
    evaluated = [s for s in sections if any(plain_split_name(split) != "train" for split in s.get("splits") or ())]
    return next(iter([*evaluated, *sections]), None)
