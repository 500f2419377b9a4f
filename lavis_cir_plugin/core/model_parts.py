"""Find the parts of a model: its tensors, frozen weights, momentum copies and recomputing modules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def tensor_places(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the name of each tensor, the dictionary of its module that holds it, and its key in that dictionary.

    A tied tensor appears under each of its names. A module that is registered twice appears under its first name.
    """
    for prefix, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            for key in holder:
                yield f"{prefix}.{key}" if prefix else key, holder, key  # type: ignore[misc]


def momentum_copies(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights by name that follow others by momentum: those of each second module in ``model_pairs``."""
    pairs = getattr(model, "model_pairs", None) or []
    moving = {id(weight) for pair in pairs for weight in pair[1].parameters()}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in moving}


def without_ddp(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, or the model itself if nothing wraps it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def equalise_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers, as DistributedDataParallel does before a training step.

    After a step the processes differ in buffers such as the statistics of a batch norm. Checkpoints hold the first
    one's. Every process must call this function. Nothing happens if nothing wraps the model.
    """
    if isinstance(model, DistributedDataParallel) and model.will_sync_module_buffers():
        model._sync_buffers()


def frozen_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of all frozen parameters, which LAVIS's checkpoints lack; a tied one has several names."""
    named = model.named_parameters(remove_duplicate=False)
    return tuple(name for name, weight in named if not weight.requires_grad)


# The flags of LAVIS's EVA tower, of transformers, and of timm and open_clip.
_RECOMPUTING_FLAGS = ("use_checkpoint", "gradient_checkpointing", "grad_checkpointing")


def recomputing_modules(model: nn.Module) -> Iterator[str]:
    """Yield the name prefixes of modules with activation checkpointing, which LAVIS's models mark by flags."""
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        by_flag = any(getattr(module, flag, False) is True for flag in _RECOMPUTING_FLAGS)
        by_config = getattr(config, "gradient_checkpointing", False) is True
        by_wrapper = isinstance(module.forward, functools.partial) and "checkpoint" in module.forward.func.__name__
        if by_flag or by_config or by_wrapper:
            yield f"{name}." if name else ""


def keep_as_buffers(module: nn.Module, is_chosen: Callable[[nn.Parameter], bool] = lambda weight: True) -> nn.Module:
    """Turn the chosen weights of a module into buffers, in place: they stay frozen and LAVIS's checkpoints keep them.

    LAVIS omits frozen parameters from its checkpoints. That suits a tower that can be loaded again, but not the
    result of an earlier training.
    """
    for child in module.modules():
        for name, weight in list(child.named_parameters(recurse=False)):
            if is_chosen(weight):
                del child._parameters[name]
                child.register_buffer(name, weight.detach())
    return module
