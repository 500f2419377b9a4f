"""Find parts of a model: where its tensors stand, which are frozen, copied by momentum, or recomputed."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def places(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield each place of a tensor as its name in the model, the dictionary it stands in, and its key there.

    A tied tensor is named by all its places, a module that is registered twice by its first name.
    """
    for prefix, module in model.named_modules():
        for holder in (module._parameters, module._buffers):
            for key in holder:
                yield f"{prefix}.{key}" if prefix else key, holder, key  # type: ignore[misc]


def momentum_copies(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the frozen weights that training moves: of the second of each of LAVIS's ``model_pairs``."""
    pairs = getattr(model, "model_pairs", None) or []
    moving = {id(weight) for pair in pairs for weight in pair[1].parameters()}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in moving}


def without_ddp(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def frozen_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names, all of a tied one's, of the parameters that are not trained, which LAVIS's checkpoints lack."""
    named = model.named_parameters(remove_duplicate=False)
    return tuple(name for name, weight in named if not weight.requires_grad)


# Of LAVIS's EVA tower, of transformers, and of timm and open_clip.
_RECOMPUTING_FLAGS = ("use_checkpoint", "gradient_checkpointing", "grad_checkpointing")


def recomputing_modules(model: nn.Module) -> Iterator[str]:
    """Yield the name prefixes of modules with activation checkpointing, by the marks that LAVIS's models leave."""
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        by_flag = any(getattr(module, flag, False) is True for flag in _RECOMPUTING_FLAGS)
        by_config = getattr(config, "gradient_checkpointing", False) is True
        by_wrapper = isinstance(module.forward, functools.partial) and "checkpoint" in module.forward.func.__name__
        if by_flag or by_config or by_wrapper:
            yield f"{name}." if name else ""


def keep_as_buffers(module: nn.Module) -> nn.Module:
    """Turn a module's weights into buffers, in place: they are frozen for good, and LAVIS's checkpoints keep them.

    LAVIS leaves frozen parameters out of its checkpoints, which suits a tower that can be had elsewhere, not the
    result of an earlier training.
    """
    for child in module.modules():
        for name, weight in list(child.named_parameters(recurse=False)):
            del child._parameters[name]
            child.register_buffer(name, weight.detach())
    return module
