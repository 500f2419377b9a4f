"""Adversarial weight perturbation: the maths, the optimizer that owns it, and the model call that applies it.

Nothing in this file ever writes into a weight. The perturbed tensors exist only inside one
:func:`torch.func.functional_call`, so a checkpoint, an evaluation or an exception can only see clean weights.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

SCOPES = ("tensor", "global")
TENSORS = ("no_1d", "all", "norm")
EMBEDDINGS = ("exclude", "row", "tensor")

# Of LAVIS's EVA tower, of transformers, and of timm and open_clip.
_RECOMPUTING_FLAGS = ("use_checkpoint", "gradient_checkpointing", "grad_checkpointing")


@dataclass(frozen=True)
class WeightPerturbation:
    """Settings of the perturbation, as they stand under ``run.wrf``.

    Attributes:
        gamma: Radius relative to the norm of the weights, >= 0; 0 switches the perturbation off. The paper uses 0.001.
        scope: ``tensor`` (each tensor has its own ratio, as in AWP's code) or ``global`` (one ratio for all).
        warmup_epochs: Epochs at the start that are trained without perturbation, >= 0.
        tensors: Which trainable tensors are perturbed: ``no_1d`` (no biases, norms or scalars), ``all``, ``norm``
            (only the weights and biases of normalisation layers), or a regular expression searched in the names.
        embeddings: Tables of ``nn.Embedding``: ``exclude`` them, perturb each ``row`` relative to its own norm, or
            treat them as any other ``tensor``. A batch touches few rows of a table, so with ``tensor`` those few
            take the radius of the whole table.
        eps: Added to the norm of the gradient, > 0.
    """

    gamma: float = 0.001
    scope: str = "tensor"
    warmup_epochs: int = 0
    tensors: str = "no_1d"
    embeddings: str = "exclude"
    eps: float = 1e-12

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            ValueError: One sentence per impossible value, all at once.
        """
        problems = [
            f"run.wrf.{field}: {getattr(self, field)!r} is not one of {', '.join(allowed)}"
            for field, allowed in (("scope", SCOPES), ("embeddings", EMBEDDINGS))
            if getattr(self, field) not in allowed
        ]
        numbers = {
            "gamma": (float, lambda value: 0 <= value < 1, ">= 0 and < 1"),
            "warmup_epochs": (int, lambda value: value >= 0, "a whole number >= 0"),
            "eps": (float, lambda value: value > 0, "> 0"),
        }
        for field, (kind, is_allowed, wording) in numbers.items():
            value = getattr(self, field)
            is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not is_number or not is_allowed(value):
                problems.append(f"run.wrf.{field} must be {wording}, got {value!r}")
        if self.tensors not in TENSORS:
            try:
                re.compile(self.tensors)
            except (re.error, TypeError):
                problems.append(
                    f"run.wrf.tensors: {self.tensors!r} is neither one of {', '.join(TENSORS)} nor a regular expression"
                )
        if problems:
            raise ValueError("; ".join(problems) + ".")


def ascent_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    gamma: float,
    scope: str = "tensor",
    eps: float = 1e-12,
    by_row: Sequence[bool] = (),
) -> list[Tensor]:
    r"""Return the perturbation of each weight that climbs the loss, of a length relative to the weight.

    .. math:: \delta = +\gamma \,\lVert\theta\rVert_2 \; \frac{g}{\lVert g\rVert_2 + \epsilon}

    with norms over one tensor (``scope="tensor"``), over all tensors together (``scope="global"``), or over one row
    (``by_row``, whatever the scope). The sign is ascent: the paper's printed update has a minus that its own text
    contradicts.

    Args:
        weights: Tensors of any shape; not modified.
        gradients: One per weight, same shapes.
        gamma: Relative radius, >= 0. ``0`` gives zeros.
        scope: ``tensor`` or ``global``.
        eps: Keeps an all-zero gradient at a zero perturbation.
        by_row: For each weight, whether each slice along dim 0 has its own norm; none by default.

    Returns:
        One tensor per weight, in the weight's dtype. Norms are taken in float32, where 1e-12 does not underflow.

    Source: WRF4CIR (arXiv 2604.05583), perturbation step; the norms per tensor follow AWP (arXiv 2004.05884). With
    ``gamma * ||theta|| = rho`` the global scope is SAM's step (arXiv 2010.01412, equation 2).
    """
    rows = list(by_row) or [False] * len(weights)
    if scope == "global":
        shared = [not row for row in rows]
        weight_norm = _norm_of_all([w for w, use in zip(weights, shared) if use])
        gradient_norm = _norm_of_all([g for g, use in zip(gradients, shared) if use])
    steps = []
    for weight, gradient, row in zip(weights, gradients, rows):
        if row:
            ratio = _row_norms(weight) / (_row_norms(gradient) + eps)
        elif scope == "global":
            ratio = weight_norm / (gradient_norm + eps)
        else:
            ratio = _norm_of_all([weight]) / (_norm_of_all([gradient]) + eps)
        steps.append((gamma * ratio * gradient.float()).to(weight.dtype))
    return steps


def _norm_of_all(tensors: Sequence[Tensor]) -> Tensor:
    if not tensors:
        return torch.zeros(())
    norm: Tensor = torch.stack([t.detach().float().norm() for t in tensors]).norm()
    return norm


def _row_norms(tensor: Tensor) -> Tensor:
    norms: Tensor = tensor.detach().float().flatten(1).norm(dim=1)
    return norms.view(-1, *[1] * (tensor.dim() - 1))


def select_tensors(model: nn.Module, settings: WeightPerturbation) -> dict[str, nn.Parameter]:
    """Return the trainable tensors that the settings choose, by name, in the order of the model.

    Raises:
        ValueError: If nothing is chosen, if a chosen tensor is stored in half precision (a perturbation of a
            thousandth of the weight is lost to rounding there), or if a chosen tensor sits in a module that recomputes
            its activations (the recomputation would use the clean weights).
    """
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    tables = {
        id(weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
    }
    chosen = {
        name: weight
        for name, weight in trainable.items()
        if _is_chosen(name, weight, model, settings.tensors)
        and not (settings.embeddings == "exclude" and id(weight) in tables)
    }
    if not chosen:
        raise ValueError(
            f"run.wrf.tensors: {settings.tensors!r} chooses none of the {len(trainable)} trainable tensors; "
            f"use one of {', '.join(TENSORS)} or a regular expression that some name contains "
            f"(first names: {', '.join(list(trainable)[:3])})."
        )
    half = [name for name, weight in chosen.items() if weight.dtype in (torch.bfloat16, torch.float16)]
    if half:
        raise ValueError(
            f"run.wrf: {len(half)} trainable tensors are {str(chosen[half[0]].dtype)[6:]} (first: {half[0]}); at "
            f"gamma={settings.gamma:g} most of the perturbation is lost to rounding. Keep trainable weights in float32."
        )
    for prefix in _recomputing_modules(model):
        inside = [name for name in chosen if name.startswith(prefix)]
        if inside:
            raise ValueError(
                f"run.wrf perturbs {len(inside)} tensors (first: {inside[0]}) inside '{prefix.rstrip('.')}', which "
                "recomputes its activations in the backward pass with unperturbed weights. Set "
                "model.use_grad_checkpoint: false, freeze that module, or leave it out through run.wrf.tensors."
            )
    return chosen


def _is_chosen(name: str, weight: Tensor, model: nn.Module, tensors: str) -> bool:
    if tensors == "all":
        return True
    if tensors == "no_1d":
        return weight.dim() > 1
    if tensors == "norm":
        return _is_normalisation(model.get_submodule(name.rpartition(".")[0]))
    return re.search(tensors, name) is not None


def _is_normalisation(module: nn.Module) -> bool:
    # Repositories define their own LayerNorm and RMSNorm, so the name decides besides torch's own classes.
    batch_norm = nn.modules.batchnorm._NormBase
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm, batch_norm)) or type(module).__name__.endswith("Norm")


def _recomputing_modules(model: nn.Module) -> Iterator[str]:
    """Yield the name prefixes of modules with activation checkpointing, by the marks that LAVIS's models leave."""
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        by_flag = any(getattr(module, flag, False) is True for flag in _RECOMPUTING_FLAGS)
        by_config = getattr(config, "gradient_checkpointing", False) is True
        by_wrapper = isinstance(module.forward, functools.partial) and "checkpoint" in module.forward.func.__name__
        if by_flag or by_config or by_wrapper:
            yield f"{name}." if name else ""


class PerturbingOptimizer(torch.optim.Optimizer):
    """An optimizer that also owns the weight perturbation: its settings, its counters, and the perturbed model call.

    It *is* the wrapped optimizer to everything else: GradScaler, LAVIS's schedulers and its checkpoints see the same
    ``param_groups`` and ``state``. ``state_dict`` carries the settings and counters under the key ``"wrf"``.

    Args:
        optimizer: The optimizer that makes the step; untouched.
        model: The model whose tensors the settings choose, bare or inside DistributedDataParallel.
        settings: What to perturb, how far, and from when.

    Raises:
        ValueError: See :func:`select_tensors`; not raised at ``gamma=0``.
    """

    # A fused optimizer unscales gradients itself from attributes that GradScaler would set on this wrapper instead;
    # without this mark GradScaler unscales, and skips a step after an overflow, as for any other optimizer.
    _step_supports_amp_scaling = False

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, settings: WeightPerturbation) -> None:
        # Optimizer.__init__ would make parameter groups of its own; they must stay the wrapped optimizer's.
        self.optimizer = optimizer
        self.settings = settings
        self.steps = {"perturbed": 0, "skipped": 0}
        self.weights = select_tensors(_unwrap(model), settings) if settings.gamma > 0 else {}
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.by_row = [settings.embeddings == "row" and id(weight) in tables for weight in self.weights.values()]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Mapping[Tensor, Any]:  # type: ignore[override]
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        """Everything else, such as hooks, is the wrapped optimizer's."""
        if "optimizer" not in self.__dict__:  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle this wrapper whole; torch's own keeps only groups and state, which are not stored here."""
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`__getstate__` gave."""
        self.__dict__.update(state)

    def __repr__(self) -> str:
        """Show the settings and the wrapped optimizer."""
        return f"{type(self).__name__}({self.settings}, {self.optimizer!r})"

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the weights with the gradients that the perturbed pass left in them."""
        return self.optimizer.step(closure) if closure is not None else self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the wrapped optimizer's groups."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state plus settings and counters, all plain types."""
        return {
            **self.optimizer.state_dict(),
            "wrf": {"settings": dataclasses.asdict(self.settings), "steps": dict(self.steps)},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both. A state without ``"wrf"`` (of LAVIS's own runner) is taken too; the settings stay those given.

        A checkpoint that was written under other settings is worth a warning, not an error: continuing a run with
        another gamma is a legitimate experiment.
        """
        state = dict(state_dict)
        saved = state.pop("wrf", None)
        self.optimizer.load_state_dict(state)
        if saved is None:
            return
        self.steps = dict(saved["steps"])
        if saved["settings"] != dataclasses.asdict(self.settings):
            logging.warning("run.wrf differs from the checkpoint's: was %s, is %s", saved["settings"], self.settings)

    def perturb(self, model: nn.Module, loss_scale: Callable[[], float] = lambda: 1.0) -> PerturbedModel:
        """Return the callable that stands in for ``model`` in a training loop."""
        return PerturbedModel(model, self, loss_scale)


class PerturbedModel:
    r"""A model whose call runs :math:`L(\theta + \delta)` with gradients that land in the clean :math:`\theta`.

    1. :math:`g = \nabla L(\theta; B)`, only to find the direction; ``.grad`` is not touched.
    2. :math:`\delta` from :func:`ascent_step`.
    3. The output of the model at :math:`\theta + \delta` on the same batch with the same dropout mask. Its backward
       pass gives :math:`\nabla L(\theta + \delta; B)`, which the optimizer applies to :math:`\theta`.

    Buffers (batch-norm statistics, queues) and momentum copies are updated by the clean pass alone.

    Under DistributedDataParallel the direction
    is the gradient averaged over processes, so all share one. Where the first gradient is not finite (a loss-scale
    overflow) the step is made without perturbation and counted in ``optimizer.steps["skipped"]``.

    Args:
        model: Takes LAVIS's ``samples`` dictionary and returns a mapping or object with ``["loss"]``.
        optimizer: Owns settings, chosen tensors and counters.
        loss_scale: Factor on the loss in the first pass (GradScaler's), so that fp16 gradients do not underflow.
    """

    def __init__(self, model: nn.Module, optimizer: PerturbingOptimizer, loss_scale: Callable[[], float]) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_scale = loss_scale

    def __getattr__(self, name: str) -> Any:
        """Anything but the call is the model's own."""
        if "model" not in self.__dict__:  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.model, name)

    def __call__(self, samples: dict[str, Any]) -> Any:
        """Return the model's output for ``samples`` at the perturbed weights; see the class.

        ``samples["epoch"]`` (put there by LAVIS's loop) decides whether the warm-up is over.
        """
        settings = self.optimizer.settings
        if settings.gamma == 0 or samples.get("epoch", settings.warmup_epochs) < settings.warmup_epochs:
            return self.model(samples)
        random_state = _random_state()
        # What the second pass reads and may overwrite is a stand-in with the values from before the first: buffers
        # (statistics, queues), and frozen weights (momentum copies, which LAVIS's models move by assigning to .data).
        new = {id(buffer): buffer.clone() for buffer in self.model.buffers()}
        new.update({id(weight): weight.detach() for weight in self.model.parameters() if not weight.requires_grad})
        gradients = self._direction(dict(samples))
        _restore_random_state(random_state)
        is_finite = bool(torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients]).isfinite().all())
        self.optimizer.steps["perturbed" if is_finite else "skipped"] += 1
        if is_finite:
            weights = list(self.optimizer.weights.values())
            steps = ascent_step(weights, gradients, settings.gamma, settings.scope, settings.eps, self.optimizer.by_row)
            new.update({id(weight): weight + step for weight, step in zip(weights, steps)})
        replaced = {name: new[id(tensor)] for name, tensor in _places(self.model) if id(tensor) in new}
        # tie_weights would swap a module that is registered twice a second time, and then restore the wrong tensor.
        return functional_call(self.model, replaced, (samples,), tie_weights=False)

    def _direction(self, samples: dict[str, Any]) -> list[Tensor]:
        # The bare module: DistributedDataParallel would wait for a backward pass that never comes.
        loss = _unwrap(self.model)(samples)["loss"] * self.loss_scale()
        weights = list(self.optimizer.weights.values())
        gradients = list(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))
        if isinstance(self.model, DistributedDataParallel):
            gradients = [gradient.contiguous() for gradient in gradients]  # an expanded one cannot be reduced in place
            for gradient in gradients:
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
        return gradients


def _places(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield each place that holds a tensor once: a tied tensor by all its places, a shared module by its first name."""
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}" if prefix else name, tensor


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _restore_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
