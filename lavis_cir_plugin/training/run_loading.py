"""Loads the trained model of a run: ``load_run`` builds it by the config inside the run's checkpoint."""

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

from lavis_cir_plugin.core.checkpoints import config_in, load_strictly, read_checkpoint
from lavis_cir_plugin.core.error_messages import unknown_key
from lavis_cir_plugin.core.model_parts import frozen_names
from lavis_cir_plugin.training import lora
from lavis_cir_plugin.training.config import plain_split_name
from lavis_cir_plugin.training.run_folders import checkpoint_in


class LoadedRun(NamedTuple):
    """A trained model with its processors and its config.

    Attributes:
        model: The model in evaluation mode, on the requested device.
        vis_processors: Processors of pictures by stage, as LAVIS's ``load_model_and_preprocess`` returns them: the run
            evaluated with ``eval`` and trained with ``train``.
        txt_processors: Processors of texts by stage.
        config: The run's config with all defaults.
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
    """Return the model of a run with all settings of its training, adapters (``run.lora``) included.

    A checkpoint lacks frozen weights. They are loaded from the run's own source (``model.pretrained``, or the
    ``model.finetuned`` that it started from), so these files must still be there, or ``changes`` must name new ones.

    Args:
        run: Folder of a run, whose best checkpoint (or else last checkpoint) is loaded, or one of its checkpoints.
        device: Device of the model. On a CPU a tower that is stored in half precision is loaded in single precision.
        changes: New values for keys of the run's ``model`` section, such as ``{"pretrained": "/new/place.pth"}``.

    Raises:
        FileNotFoundError: If there is no checkpoint, or a file with frozen weights is missing.
        ValueError: If the checkpoint holds no run's config, a changed key is unknown, or weights do not fit.
    """
    path = checkpoint_in(Path(os.path.expanduser(run)))
    content = read_checkpoint(str(path))
    config = _config_of(content, path)
    model = _build_trained(config, content["model"], str(path), torch.device(device), dict(changes or {}))
    vis_processors, txt_processors = load_preprocess(_preprocessing(config))
    return LoadedRun(model.to(device).eval(), vis_processors, txt_processors, config)


def _config_of(content: Any, path: Path) -> DictConfig:
    config = config_in(content)
    if "model" not in config or not isinstance(content.get("model"), Mapping):
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
    # The checkpoint holds the content of these files, so the files need not exist any more.
    model.update({key: None for key in getattr(model_class, "kept_in_checkpoints", ()) if key in model})
    starts_elsewhere = bool(model.get("load_finetuned")) and bool(model.get("finetuned"))
    if not config.run.get("lora") and (starts_elsewhere or not model.get("pretrained")):
        found = _build_from_sections(model, config.run)
        _load_trained(found, state, path, starts_elsewhere)
        return found
    trained = OmegaConf.merge(model, {"load_finetuned": True, "finetuned": path})
    return _build_from_sections(trained, config.run, changes.get("finetuned"))


def _build_from_sections(model: DictConfig, run: DictConfig, base: str | None = None) -> nn.Module:
    """Build the model as the run did; frozen weights without a file are drawn again from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(run.get("seed", 42)))  # torch.manual_seed reseeds GPUs too
        return lora.build_model(BaseTask(), SimpleNamespace(model_cfg=model, run_cfg=run), base)


def _load_trained(model: nn.Module, state: Mapping[str, Any], path: str, has_start: bool) -> None:
    """Load the weights that a run trained into the model that it started from."""
    frozen = frozen_names(model)
    load_strictly(model, state, path, may_lack=frozen)
    drawn = [name for name in frozen if name not in state]
    if drawn and not has_start:
        logging.warning(
            "%d frozen tensors are in no file and were drawn again from run.seed (first: %s)", len(drawn), drawn[0]
        )


def _preprocessing(config: DictConfig) -> DictConfig:
    """Return the config of the processors: ``train`` of the training data, ``eval`` of the evaluated benchmark.

    Without such a section, the processors are those of the model's type, in the model's picture size.
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
            own = (section or {}).get(kind) or {}
            if stage in own:  # null leaves texts as they are
                chosen[kind][stage] = own[stage]
    return OmegaConf.create(chosen)


def _training_section(config: DictConfig) -> Mapping[str, Any] | None:
    sections = config.datasets.values()
    return next((section for section in sections if "train" in (section.get("splits") or ["train"])), None)


def _evaluation_section(config: DictConfig) -> Mapping[str, Any] | None:
    """Return the section of the first benchmark that the run evaluated, or else of the first one that it has."""
    sections = [
        section
        for name, section in config.datasets.items()
        if hasattr(registry.get_builder_class(name), "benchmark_module")
    ]
    evaluated = [s for s in sections if any(plain_split_name(split) != "train" for split in s.get("splits") or ())]
    return next(iter([*evaluated, *sections]), None)
