"""LoRA adapters: adding them to a model, saving, loading and merging them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Optional, Union
from urllib.parse import urlparse

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from lavis_cir_plugin.core.checkpoints import config_in, load_strictly, mapped_checkpoint, verify_checkpoint
from lavis_cir_plugin.core.model_parts import frozen_names, recomputing_modules
from lavis_cir_plugin.core.settings import (
    Limits,
    Pattern,
    Positive,
    PositiveNumber,
    Probability,
    Section,
    check_pattern,
)

_ADAPTABLE = (nn.Linear, nn.Conv2d, nn.Embedding)
_ADAPTER = "default"  # peft's own name of a model's first adapter
# These settings matter in training alone, so they may differ from those of a checkpoint.
_TRAINING_ONLY = ("lora_dropout", "init_lora_weights")
_REFUSED: Mapping[str, str] = {
    "modules_to_save": "copies whole modules; name what is trained beside the adapters in run.lora.also_train",
    "bias": "is peft's; name the biases to train in run.lora.also_train",
    "use_dora": "makes a merged weight that is not W + scaling * B A, by which a perturbation is scaled; leave it out",
}


def _check_targets(targets: str | tuple[str, ...]) -> None:
    if isinstance(targets, str):
        check_pattern(targets)
    elif not targets or not all(targets):
        raise ValueError("")


@dataclass(frozen=True)
class LoraSettings(Section):
    r"""Settings under ``run.lora`` of the adapters, which turn a weight :math:`W` into :math:`W + s B A`.

    All fields but ``also_train`` have the name and meaning of a field of ``peft.LoraConfig``.

    Attributes:
        target_modules: Modules that get an adapter (Linear, Conv2d or Embedding): a regular expression that matches
            the whole module name, or a list of names or last parts of names.
        r: Rank, the number of rows of A, >= 1.
        lora_alpha: Number > 0; the scaling s is lora_alpha / r.
        lora_dropout: Dropout probability on the input of A, >= 0 and < 1.
        use_rslora: Whether s is lora_alpha / sqrt(r) instead (arXiv 2312.03732).
        init_lora_weights: ``true`` (A is random and B zero; for an Embedding A is zero and B random), ``gaussian``
            (the random factor is normally distributed) or ``false`` (both factors are random).
        also_train: Regular expression that is searched in parameter names. Matching parameters are trained whole
            beside the adapters; all others are frozen.

    Raises:
        ValueError: If values are impossible; the message has one sentence for each.
    """

    WHERE = "run.lora"
    EXAMPLE = " such as {target_modules: [query, value]}"
    REFUSED = _REFUSED

    target_modules: Annotated[
        Union[str, tuple[str, ...]],
        Limits(
            words="a regular expression of module names or a list of their last parts such as [query, value]",
            check=_check_targets,
        ),
    ]
    r: Positive = 8
    lora_alpha: PositiveNumber = 8
    lora_dropout: Probability = 0.0
    use_rslora: bool = False
    init_lora_weights: Annotated[
        Union[bool, Literal["gaussian"]],
        Limits(
            words="true, false or gaussian (peft's others change the frozen weights, which a checkpoint leaves out)"
        ),
    ] = True
    also_train: Optional[Pattern] = None

    def matches(self, module_name: str) -> bool:
        """Return whether the module of this name gets an adapter, by peft's rules."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module_name) is not None
        return any(_is_last_part(part, module_name) for part in self.target_modules)

    def peft_fields(self) -> dict[str, Any]:
        """Return the fields of ``peft.LoraConfig``."""
        fields = dataclasses.asdict(self)
        del fields["also_train"]
        targets = self.target_modules
        return {**fields, "target_modules": targets if isinstance(targets, str) else list(targets)}


@dataclass(frozen=True)
class LoraRun(Section):
    """The key of ``run`` that this module reads.

    Attributes:
        lora: Adapters, which are trained in place of the whole model.
    """

    WHERE = "run"

    lora: Optional[LoraSettings] = None


def build_model(task: Any, cfg: Any, base: str | None = None) -> nn.Module:
    """Build the model of a config as its task does, and add adapters to it if ``run.lora`` is set.

    With ``run.lora``, ``model.finetuned`` may be a checkpoint of a LoRA run with the same ``run.lora``. The model is
    then built as for that run, and its adapters are loaded from the checkpoint. Random weights depend on that run's
    ``run.seed`` alone, so that a base model that came from no checkpoint is built again with equal weights.

    Args:
        task: Task of LAVIS.
        cfg: LAVIS's config, or an object with its attributes ``model_cfg`` and ``run_cfg``.
        base: Checkpoint that the LoRA run started from, if it lies elsewhere now.

    Raises:
        ValueError: If ``run.lora`` does not fit the model or the checkpoint, or if a checkpoint with adapters is given
            without ``run.lora``.
    """
    from lavis.common.registry import registry

    path = _finetuned(cfg.model_cfg)
    saved = read_lora_checkpoint(path) if path else None
    if cfg.run_cfg.get("lora") is None:
        if saved is not None:
            raise ValueError(
                f"model.finetuned: {path} holds LoRA adapters; set run.lora as in the run that trained them, "
                f"{json.dumps(saved['config']['run']['lora'])}, or merge them by this command: lavis-cir "
                f"lora {shlex.quote(str(path))} --merge --output merged"
            )
        stock: nn.Module = task.build_model(cfg)
        return stock
    lora = LoraSettings(**OmegaConf.to_container(cfg.run_cfg.lora, resolve=True))
    seed = int(cfg.run_cfg.seed)
    if saved is not None:
        _check_settings(lora, saved, str(path))
        first = _first_run(saved)
        seed = int(first["run"].get("seed", seed))
        base = base or _finetuned(first["model"])
        # The checkpoint holds the content of these files, so the files need not exist any more.
        kept = getattr(registry.get_model_class(cfg.model_cfg.get("arch")), "kept_in_checkpoints", ())
        start = {"load_finetuned": base is not None, "finetuned": base, **{key: None for key in kept}}
        below = OmegaConf.merge(cfg.model_cfg, start)
        _warn_of_other_frozen_weights(below, first["model"])
        cfg = SimpleNamespace(model_cfg=below, run_cfg=cfg.run_cfg)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # models are built on the CPU; torch.manual_seed reseeds GPUs too
        model: nn.Module = task.build_model(cfg)
        add_adapters(model, lora)
    if saved is not None:
        _load_adapters(model, saved["model"], str(path))
    return model


def check_loss_scale(model: nn.Module, amp: bool) -> None:
    """Check that gradients reach the adapters.

    Args:
        model: Model with or without adapters.
        amp: Whether GradScaler multiplies the loss, as ``run.amp`` says.

    Raises:
        ValueError: If adapters are in float16 modules and the loss is not scaled.
    """
    if amp:
        return
    half = [name for name, layer in _adapted(model) if layer.get_base_layer().weight.dtype == torch.float16]
    if half:
        raise ValueError(
            f"run.lora.target_modules matches modules that are stored in float16 (first of {len(half)}: {half[0]}), "
            "through which small gradients are lost without a loss scale; set run.amp: true, or "
            "model.vit_precision: fp32."
        )


def add_adapters(model: nn.Module, lora: LoraSettings) -> None:
    """Add adapters to a model, in place, and freeze all weights but the adapters and ``also_train``.

    Names and attributes of the model stay, except that the weight of an adapted module ``m`` moves to
    ``m.base_layer``. Adapters are float32, whatever the type of the frozen weights. Code that reads ``m.weight``
    instead of calling ``m``, as LAVIS's EVA tower does, gets :math:`W + s B A`.

    Raises:
        ValueError: If a pattern matches nothing, or a module that cannot have an adapter; or if adapters could not be
            trained because of tied weights, momentum copies, activation checkpointing, or dropout that the model
            holds in one mode.
    """
    targets = _targets(model, lora)
    also = _also_trained(model, lora)
    _refuse_unadaptable(model, targets)

    from peft.mapping import inject_adapter_in_model
    from peft.tuners.lora.config import LoraConfig

    inject_adapter_in_model(LoraConfig(**lora.peft_fields()), model, _ADAPTER)
    for weight in model.parameters():
        weight.requires_grad_(False)
    for _, layer in _adapted(model):
        layer.__class__ = _with_merged_weight(layer.__class__)
        layer.train(layer.get_base_layer().training)
        for name, weight in layer.named_parameters():
            if name.startswith("lora_"):
                # peft gives adapters the frozen weight's type, and half precision cannot be trained.
                weight.data = weight.data.float()
                weight.requires_grad_(True)
    for weight in also:
        weight.requires_grad_(True)
    if lora.lora_dropout > 0:
        _check_dropout(model)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    logging.info("LoRA on %d modules: %d of %d parameters are trained.", len(targets), trained, total)


@dataclass(frozen=True)
class LoraPair:
    r"""The two factors of an adapter, which turn a weight :math:`W` into :math:`W + s B A`.

    Attributes:
        a_name: Name of A among the model's parameters.
        b_name: Name of B among the model's parameters.
        a: Factor A, ``(rank, in)``, or ``(rank, in, height, width)`` for a Conv2d. For an Embedding ``(rows, width)``,
            which is stored transposed, ``in`` is the number of rows.
        b: Factor B, ``(out, rank)``, or ``(out, rank, 1, 1)`` for a Conv2d.
        scaling: Scaling s.
        merged_norm: Function that returns the Frobenius norm :math:`\lVert W + s B A \rVert` at the present weights, a
            float32 scalar without gradient.
    """

    a_name: str
    b_name: str
    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    merged_norm: Callable[[], Tensor]


def lora_pairs(model: nn.Module) -> list[LoraPair]:
    """Return the active adapters of a model, in the order of its modules, without importing peft if it has none."""
    pairs = []
    for name, layer in _adapted(model):
        for adapter in layer.active_adapters:
            if adapter in layer.scaling:
                (a_name, a), (b_name, b) = (_factor(layer, letter, adapter) for letter in "AB")
                norm = functools.partial(_merged_norm, layer)
                pairs.append(
                    LoraPair(f"{name}.{a_name}", f"{name}.{b_name}", a, b, float(layer.scaling[adapter]), norm)
                )
    return pairs


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dictionary of a model with merged adapters, under the names of the model without adapters."""
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    for prefix, layer in _adapted(model):
        for name in [name for name in state if name.startswith(f"{prefix}.base_layer.")]:
            state[name.replace(f"{prefix}.base_layer.", f"{prefix}.", 1)] = state.pop(name)
        state[f"{prefix}.weight"] = layer.weight.detach()
    return state


def write_peft_folder(model: nn.Module, lora: LoraSettings, folder: Path) -> None:
    """Write the adapters to a folder that plain peft can load.

    Raises:
        ValueError: If the model reads adapted weights without calling their modules, so that peft would ignore them.
    """
    ignored = [name for name, _ in _adapted(model) if _is_read_without_call(model, name)]
    if ignored:
        raise ValueError(
            f"plain peft would ignore {len(ignored)} of the adapters (first: {ignored[0]}), because the model reads "
            "these weights without calling their modules; export with --merge."
        )
    from peft.tuners.lora.config import LoraConfig
    from peft.utils.save_and_load import get_peft_model_state_dict
    from safetensors.torch import save_file

    # "auto" would ask the hub whether an embedding was changed.
    state = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    # Buffers and what run.lora.also_train names are in no adapter, and peft loads them by their own names.
    frozen = set(frozen_names(model))
    outside = model.state_dict().items()
    state.update({name: tensor for name, tensor in outside if name not in frozen and ".lora_" not in name})
    # safetensors refuses tensors that share memory, as the names of a tied one do.
    tensors = {f"base_model.model.{name}": tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(**lora.peft_fields(), inference_mode=True).save_pretrained(str(folder))


def _targets(model: nn.Module, lora: LoraSettings) -> list[str]:
    """Return the names of the modules that get an adapter; refuse patterns without a match."""
    modules = dict(model.named_modules())
    adaptable = [name for name, module in modules.items() if isinstance(module, _ADAPTABLE)]
    patterns = lora.target_modules
    parts = () if isinstance(patterns, str) else patterns
    missed = [part for part in parts if not any(_is_last_part(part, name) for name in modules)]
    chosen = [name for name in modules if name and lora.matches(name)]
    if missed or not chosen:
        pattern = missed[0] if missed else str(patterns)
        raise ValueError(
            f"run.lora.target_modules: {pattern!r} matches no module of {type(model).__name__}; modules that can have "
            f"adapters: {_nearest(pattern, adaptable)}."
        )
    unfit = [name for name in chosen if name not in adaptable]
    if unfit:
        kind = type(modules[unfit[0]]).__name__
        raise ValueError(
            f"run.lora.target_modules matches {len(unfit)} modules that can have no adapter (first: {unfit[0]}, a "
            f"{kind}); it may match Linear, Conv2d and Embedding, such as {_nearest(unfit[0], adaptable)}."
        )
    return chosen


def _also_trained(model: nn.Module, lora: LoraSettings) -> list[nn.Parameter]:
    """Return the parameters that ``also_train`` names; refuse half precision, which cannot be trained."""
    if lora.also_train is None:
        return []
    chosen = {name: weight for name, weight in model.named_parameters() if re.search(lora.also_train, name)}
    if not chosen:
        names = [name for name, _ in model.named_parameters()]
        raise ValueError(
            f"run.lora.also_train: {lora.also_train!r} matches no parameter of {type(model).__name__}; nearest: "
            f"{_nearest(lora.also_train, names)}."
        )
    half = [name for name, weight in chosen.items() if weight.dtype != torch.float32]
    if half:
        kind = str(chosen[half[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"run.lora.also_train matches {len(half)} parameters that are not float32 (first: {half[0]}, {kind}), "
            "which cannot be trained; leave them out, or store the model in float32."
        )
    return list(chosen.values())


def _refuse_unadaptable(model: nn.Module, targets: list[str]) -> None:
    """Refuse a model that peft would adapt wrongly without an error."""
    if getattr(model, "model_pairs", None):
        raise ValueError(
            f"run.lora: {type(model).__name__} keeps momentum copies of its weights, paired one by one, which adapters "
            "would break; choose a model without, or switch its distillation off where model.use_distill does."
        )
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    for target in targets:
        places = names[id(model.get_submodule(target).weight)]
        if len(places) > 1:
            raise ValueError(
                f"run.lora.target_modules: the weight of {target} is tied ({' and '.join(places)} are one tensor), and "
                "an adapter would part them; leave it out."
            )
    for prefix in recomputing_modules(model):
        inside = [target for target in targets if target.startswith(prefix)]
        if inside:
            raise ValueError(
                f"run.lora.target_modules: {inside[0]} is inside '{prefix.rstrip('.')}', which recomputes its "
                "activations in the backward pass; its adapters could stay untrained without an error. Set "
                "model.use_grad_checkpoint: false, or leave it out."
            )


def _check_dropout(model: nn.Module) -> None:
    """Refuse dropout that would always be on or off, as in a tower that the model holds in evaluation mode."""
    names = [name for name, _ in _adapted(model) if _is_read_without_call(model, name)]
    modes = [(module, module.training) for module in model.modules()]
    for mode in (True, False):
        model.train(mode)
        names += [name for name, layer in _adapted(model) if layer.lora_dropout[_ADAPTER].training is not mode]
    for module, mode in modes:
        module.training = mode
    if names:
        raise ValueError(
            f"run.lora.lora_dropout has no effect on {names[0]}, because the model holds it in one mode or reads its "
            "weight without calling it; set run.lora.lora_dropout: 0, or leave it out of run.lora.target_modules."
        )


def _is_read_without_call(model: nn.Module, name: str) -> bool:
    """Return whether the parent module reads a module's weight instead of calling the module."""
    from lavis.models.eva_vit import Attention

    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    return isinstance(module, nn.MultiheadAttention) or (isinstance(module, Attention) and last == "qkv")


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield name and peft layer of each adapted module."""
    lora = sys.modules.get("peft.tuners.lora")  # if peft was never imported, no module is adapted
    if lora is not None:
        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, lora.LoraLayer))


@functools.cache
def _with_merged_weight(layer_class: type) -> type:
    namespace = {"weight": property(_merged_weight), "__module__": layer_class.__module__, "__doc__": None}
    return type(layer_class.__name__, (layer_class,), namespace)


def _merged_weight(layer: Any) -> Tensor:
    """Return W + s B A in the type of W, with gradients to A and B."""
    weight: Tensor = layer.get_base_layer().weight
    if layer.merged or layer.disable_adapters:
        return weight
    merged: Tensor = weight.float()
    for name in layer.active_adapters:
        if name in layer.scaling:
            merged = merged + layer.get_delta_weight(name).float()
    return merged.to(weight.dtype)


def _factor(layer: Any, letter: str, adapter: str) -> tuple[str, nn.Parameter]:
    of_embedding = getattr(layer, f"lora_embedding_{letter}")
    if adapter in of_embedding:
        return f"lora_embedding_{letter}.{adapter}", of_embedding[adapter]
    return f"lora_{letter}.{adapter}.weight", getattr(layer, f"lora_{letter}")[adapter].weight


@torch.no_grad()
def _merged_norm(layer: Any) -> Tensor:
    norm: Tensor = _merged_weight(layer).float().norm()
    return norm


def _finetuned(model_cfg: Mapping[str, Any]) -> str | None:
    # Without the key load_finetuned, LAVIS's models load the finetuned weights.
    return model_cfg.get("finetuned") or None if model_cfg.get("load_finetuned", True) else None


def read_lora_checkpoint(path: str) -> dict[str, Any] | None:
    """Return the content of a LAVIS checkpoint with adapters, or None for any other file, which the model will read.

    Raises:
        ValueError: If the file is damaged, or holds adapters without the run's config.
    """
    if urlparse(path).scheme in ("http", "https"):
        return None
    content = mapped_checkpoint(Path(os.path.expanduser(path)))
    state = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not any(".lora_" in str(name) for name in state):
        return None
    verify_checkpoint(Path(os.path.expanduser(path)))
    config = config_in(content)
    sections = [config.get(key) for key in ("model", "run")]
    if not all(isinstance(section, Mapping) for section in sections) or not config["run"].get("lora"):
        raise ValueError(
            f"checkpoint {path} holds LoRA adapters without the run's config; use a file that the run wrote."
        )
    return dict(content)


def _first_run(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of the run that added the adapters, which later runs may have continued."""
    path = _finetuned(saved["config"]["model"])
    earlier = read_lora_checkpoint(path) if path else None
    config: Mapping[str, Any] = saved["config"]
    return config if earlier is None else _first_run(earlier)


def _warn_of_other_frozen_weights(now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    """Warn if a key that names frozen weights has changed, because the checkpoint does not hold these weights.

    This is no error, because the other path may lead to the same file.
    """
    for key in ("model_type", "pretrained", "vit_pretrained"):
        if now.get(key) != then.get(key):
            logging.warning("adapters were trained on model.%s: %s, now: %s", key, then.get(key), now.get(key))


def _check_settings(lora: LoraSettings, saved: Mapping[str, Any], path: str) -> None:
    """Refuse other settings than the checkpoint's: a different scaling, which no tensor shows, would load unnoticed."""
    theirs = LoraSettings(**saved["config"]["run"]["lora"])
    for field in dataclasses.fields(LoraSettings):
        here, there = getattr(lora, field.name), getattr(theirs, field.name)
        if here != there and field.name not in _TRAINING_ONLY:
            raise ValueError(
                f"run.lora.{field.name}: {here!r} differs from {there!r}, with which model.finetuned: {path} was "
                "trained; set it to that."
            )


def _load_adapters(model: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    missing = [name for name in trained if name not in state]
    if missing:
        raise ValueError(
            f"checkpoint {path}: {len(missing)} trained tensors are missing (first: {missing[0]}); it belongs to "
            "another run.lora or model."
        )
    load_strictly(model, state, path, may_lack=frozen_names(model))


def _is_last_part(part: str, name: str) -> bool:
    return name == part or name.endswith(f".{part}")


def _nearest(pattern: str, names: list[str]) -> str:
    """Return up to four names that resemble a pattern, or the first names if none does."""
    words = [word for word in re.split(r"\W+", pattern) if word]
    ends = {name.rpartition(".")[2] for name in names}
    close = {end for word in words for end in difflib.get_close_matches(word, list(ends), n=2)}
    alike = [name for name in names if name.rpartition(".")[2] in close or any(word in name for word in words)]
    return ", ".join((alike or names)[:4])
