"""Weight perturbation in training: the perturbed tensors, the optimizer that owns them, the perturbed model call.

No code in this file writes into a weight. The perturbed tensors exist only inside one
:func:`torch.func.functional_call`, so checkpoints, evaluations and exceptions can only see clean weights.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from lavis_cir_plugin.core.model_parts import (
    equalise_buffers,
    momentum_copies,
    recomputing_modules,
    tensor_places,
    without_ddp,
)
from lavis_cir_plugin.core.random_state import get_random_state, set_random_state
from lavis_cir_plugin.methods.wrf4cir.frozen_memo import FrozenMemo
from lavis_cir_plugin.methods.wrf4cir.perturbation import TENSORS, Ascent, LowRank, WeightPerturbation, ascent
from lavis_cir_plugin.training.lora import lora_pairs


def select_tensors(model: nn.Module, settings: WeightPerturbation) -> dict[str, nn.Parameter]:
    """Return the trainable tensors that the settings choose, by name, in the order of the model.

    Raises:
        ValueError: If no tensor is chosen; if a chosen tensor is stored in half precision, in which a perturbation of a
            thousandth of the weight is lost to rounding; or if it belongs to a module that recomputes its activations,
            which would use the clean weights.
    """
    trainable = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    tables = _embedding_tables(model)
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
        kind = str(chosen[half[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"run.wrf: {len(half)} trainable tensors are {kind} (first: {half[0]}); at "
            f"gamma={settings.gamma:g} most of the perturbation is lost to rounding. Keep trainable weights in float32."
        )
    for prefix in recomputing_modules(model):
        inside = [name for name in chosen if name.startswith(prefix)]
        if inside:
            raise ValueError(
                f"run.wrf perturbs {len(inside)} tensors (first: {inside[0]}) inside '{prefix.rstrip('.')}', which "
                "recomputes its activations in the backward pass with unperturbed weights. Set "
                "model.use_grad_checkpoint: false (in LAVIS's BLIP and ALBEF model.vit_grad_ckpt), freeze that module, "
                "or leave it out through run.wrf.tensors."
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
    # Repositories define LayerNorm and RMSNorm themselves, so beside torch's classes the class name decides.
    batch_norm = nn.modules.batchnorm._NormBase
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm, batch_norm)) or type(module).__name__.endswith("Norm")


class PerturbingOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer and owns the weight perturbation: settings, counters, direction, and the perturbed model call.

    GradScaler, LAVIS's schedulers and its checkpoints see ``param_groups`` and ``state`` of the wrapped optimizer.
    ``state_dict`` also holds the state of the perturbation, under the key ``"wrf"``.

    Args:
        optimizer: Optimizer that makes the step; it stays unchanged.
        model: Model whose tensors the settings choose, bare or inside DistributedDataParallel.
        settings: Settings of the perturbation.
        total_epochs: Number of epochs of the run, from which ``settings.last_epochs`` counts.
        seed: Seed of random directions, equal on every process.
        max_grad_norm: Largest norm of the gradients, to which longer ones are shortened before the step; ``None`` sets
            no limit.

    Attributes:
        steps: Numbers of perturbed steps, and of steps without perturbation because the direction was not finite.
        measured: Numbers of the last step while ``is_measuring``: ``perturbation_norm``, the length of the
            perturbation, and ``cosine``, between its unscaled direction and the applied gradient.

    Raises:
        ValueError: If :func:`select_tensors` raises it, if the optimizer has none of the chosen tensors, if
            ``settings.last_epochs`` lacks ``total_epochs``, or if a direction without a pass of its own meets momentum
            copies of the weights, which would average perturbed weights. With ``gamma=0`` no tensor is chosen.
    """

    # A fused optimizer reads attributes that GradScaler sets, here on this wrapper, and unscales gradients itself.
    # With False, GradScaler unscales and skips a step after an overflow, as for any other optimizer.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        settings: WeightPerturbation,
        total_epochs: int | None = None,
        seed: int = 0,
        max_grad_norm: float | None = None,
    ) -> None:
        # Optimizer.__init__ is not called, because it would create other parameter groups than the wrapped optimizer's.
        self.optimizer = optimizer
        self.settings = settings
        self.total_epochs = total_epochs
        self.seed = seed
        self.max_grad_norm = max_grad_norm
        self.steps = {"perturbed": 0, "skipped": 0}
        self.direction: list[Tensor] | None = None  # a gradient that later steps use again
        self.uses = 0
        self.is_measuring = False
        self.measured: dict[str, float] = {}
        self._pending: list[Tensor] | None = None
        if settings.last_epochs is not None and total_epochs is None:
            raise ValueError(
                f"run.wrf.last_epochs: {settings.last_epochs} counts from the end; give total_epochs to "
                f"{type(self).__name__}."
            )
        bare = without_ddp(model)
        copies = momentum_copies(bare)
        self.weights = select_tensors(bare, settings) if settings.gamma > 0 else {}
        stepped = {id(weight) for group in self.param_groups for weight in group["params"]}
        if self.weights and stepped.isdisjoint(map(id, self.weights.values())):
            raise ValueError(
                f"the optimizer has none of the {len(self.weights)} tensors of {type(bare).__name__} that are "
                "perturbed; make it of this very model's parameters."
            )
        tables = _embedding_tables(bare)
        self.by_row = [settings.embeddings == "row" and id(weight) in tables for weight in self.weights.values()]
        self.pairs = _pairs(bare, self.weights, settings) if self.weights else []
        if self.weights and settings.direction_share < 1 and not _offers_loss_of_share(bare):
            raise ValueError(
                f"run.wrf.direction_share: {settings.direction_share:g} needs a model that offers loss_of_share for "
                f"its own loss, as blip2_cir and clip_cir do, and {type(bare).__name__} does not; set 1."
            )
        if self.weights and copies and (settings.direction != "gradient" or settings.every > 1):
            raise ValueError(
                f"run.wrf: {type(bare).__name__} keeps momentum copies of its weights, and with direction: "
                f"{settings.direction} and every: {settings.every} they would average perturbed ones; set direction: "
                "gradient and every: 1."
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Parameter groups of the wrapped optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Mapping[Tensor, Any]:  # type: ignore[override]
        """State of the wrapped optimizer."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Defaults of the wrapped optimizer."""
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute, such as hooks, of the wrapped optimizer."""
        if "optimizer" not in self.__dict__:  # a copy or unpickling asks before the attributes exist
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        """Return all attributes for a copy; torch's method returns groups and state, which this wrapper lacks.

        A scheduler of torch puts a method ``step`` among the attributes that steps this very object, which a copy's
        would do as well.
        """
        return {name: value for name, value in vars(self).items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the attributes of :meth:`__getstate__`."""
        self.__dict__.update(state)

    def __repr__(self) -> str:
        """Return a text with the settings and the wrapped optimizer."""
        return f"{type(self).__name__}({self.settings}, {self.optimizer!r})"

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the weights with the gradients of the perturbed pass, or with those that ``closure`` computes."""
        if self._pending is not None:
            self.measured["cosine"] = _cosine(self._pending, [weight.grad for weight in self.weights.values()])
            self._pending = None
        if closure is None:
            self._limit_gradients()
            return self.optimizer.step()

        def limited() -> float:
            loss = closure()
            self._limit_gradients()
            return loss

        return self.optimizer.step(limited)

    def _limit_gradients(self) -> None:
        if self.max_grad_norm is not None:
            weights = [weight for group in self.param_groups for weight in group["params"]]
            torch.nn.utils.clip_grad_norm_(weights, self.max_grad_norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the wrapped optimizer's groups."""
        self.drop_measurement()  # needed if GradScaler has skipped the step
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the wrapped optimizer and of the perturbation, as tensors and plain types."""
        own = {
            "settings": dataclasses.asdict(self.settings),
            "steps": dict(self.steps),
            "direction": self.direction,
            "uses": self.uses,
        }
        return {**self.optimizer.state_dict(), "wrf": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the states of the wrapped optimizer and of the perturbation; the settings stay unchanged.

        A state without ``"wrf"``, from LAVIS's own runner, is accepted too. A run may be continued with another gamma,
        so a state that was saved under other settings gives a warning, and its kept direction is dropped.
        """
        state = dict(state_dict)
        saved = state.pop("wrf", None)
        self.optimizer.load_state_dict(state)
        if saved is None:
            return
        self.steps = dict(saved["steps"])
        # A checkpoint of an earlier version lacks the settings that came later, which had their defaults' effect.
        earlier = {**dataclasses.asdict(WeightPerturbation()), **saved["settings"]}
        if earlier != dataclasses.asdict(self.settings):
            logging.warning("run.wrf differs from the checkpoint's: was %s, is %s", saved["settings"], self.settings)
        elif saved.get("direction") is not None:
            weights = self.weights.values()
            self.direction = [d.to(weight.device) for d, weight in zip(saved["direction"], weights)]
            self.uses = saved["uses"]

    def drop_measurement(self) -> None:
        """Forget the directions of the micro-batches since the last step, so that no cosine is computed from them."""
        self._pending = None

    def perturb(self, model: nn.Module, loss_scale: Callable[[], float] = lambda: 1.0) -> PerturbedModel:
        """Return the callable that replaces ``model`` in a training loop."""
        return PerturbedModel(model, self, loss_scale)

    def known_direction(self) -> list[Tensor] | None:
        """Return this step's direction if it is known without another pass, or ``None`` if a gradient is needed.

        An empty list means that no direction exists yet, which is the case for momentum before the first step.
        """
        if self.settings.direction == "random":
            return self._random_direction()
        if self.settings.direction == "momentum":
            weights = self.weights.values()
            moments = [self.state.get(weight, {}).get("exp_avg") for weight in weights]
            if all(moment is None for moment in moments):
                return []
            # A tensor that never got a gradient has no moment.
            return [torch.zeros_like(w) if moment is None else -moment for w, moment in zip(weights, moments)]
        if self.direction is None or self.uses >= self.settings.every:
            return None
        self.uses += 1
        return self.direction

    def keep(self, direction: list[Tensor]) -> None:
        """Keep a gradient as the direction of later steps if ``settings.every`` is more than 1."""
        if self.settings.every > 1:
            self.direction, self.uses = direction, 1

    def _random_direction(self) -> list[Tensor]:
        """Draw a direction from a separate generator.

        Thus dropout draws the same numbers, and all processes and a resumed run get the same direction.
        """
        draw = sum(self.steps.values())
        generators: dict[torch.device, torch.Generator] = {}
        directions = []
        for weight in self.weights.values():
            if weight.device not in generators:
                generators[weight.device] = torch.Generator(weight.device).manual_seed(self.seed * 1_000_003 + draw)
            directions.append(torch.randn(weight.shape, device=weight.device, generator=generators[weight.device]))
        return directions

    def ascent(self, direction: list[Tensor]) -> Ascent:
        """Return the perturbation of each chosen tensor along ``direction``, computed by :func:`ascent`."""
        settings, weights = self.settings, list(self.weights.values())
        # The step is part of LAVIS's forward pass under autocast, where the products of LoRA's factors would be fp16
        # and overflow for gradients that hold GradScaler's factor.
        with torch.autocast(weights[0].device.type, enabled=False):
            return ascent(
                weights,
                direction,
                settings.gamma,
                radius=settings.radius,
                scope=settings.scope,
                eps=settings.eps,
                by_row=self.by_row,
                low_rank=[LowRank(a, b, pair.scaling, pair.merged_norm()) for a, b, pair in self.pairs],
            )

    def measure(self, step: Ascent, direction: list[Tensor]) -> None:
        """Note the length of the perturbation, and the direction for the cosine with the gradient that comes."""
        norms = torch.stack([step.float().norm() for step in step.steps()])
        self.measured["perturbation_norm"] = float(norms.norm().detach())
        so_far = self._pending or [torch.zeros_like(d) for d in direction]  # accumulated over micro-batches
        self._pending = [total + d for total, d in zip(so_far, direction)]


class PerturbedModel:
    r"""Calls a model at perturbed weights, :math:`L(\theta + \delta)`, with gradients for the clean weights.

    1. The direction is :math:`g = \nabla L(\theta; B)`, from a separate pass that does not write ``.grad``; or it is
       known without a pass (random, momentum, the gradient of an earlier step). With ``direction_share`` below 1, L is
       the model's ``loss_of_share`` in this pass.
    2. :func:`ascent` gives :math:`\delta`.
    3. The call returns the model's output at :math:`\theta + \delta` on the same batch. Its backward pass gives
       :math:`\nabla L(\theta + \delta; B)`, which the optimizer applies to :math:`\theta`.

    If there are two passes, both draw the same random numbers (Python's, NumPy's, torch's), and hence the same dropout
    mask. The clean pass alone updates buffers (batch-norm statistics, queues) and momentum copies, and frozen
    sub-modules run once (:class:`~lavis_cir_plugin.methods.wrf4cir.frozen_memo.FrozenMemo`). A single pass updates the
    buffers itself.

    Under DistributedDataParallel the direction is the gradient averaged over processes, so that all processes share it.
    If it is not finite (a loss-scale overflow), the step is made without perturbation and counted in
    ``optimizer.steps["skipped"]``.

    Args:
        model: Model that takes LAVIS's ``samples`` dictionary and returns a mapping or object with ``["loss"]``.
        optimizer: Optimizer with settings, chosen tensors and counters.
        loss_scale: Function that returns GradScaler's factor of the loss, so that fp16 gradients of the first pass do
            not underflow.

    Raises:
        ValueError: In a call, if what the model returns holds no loss, or if the samples are no dictionary or lack an
            epoch that the settings count.
    """

    def __init__(self, model: nn.Module, optimizer: PerturbingOptimizer, loss_scale: Callable[[], float]) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.device = next(iter(optimizer.weights.values())).device if optimizer.weights else torch.device("cpu")
        self.memo = FrozenMemo(model, self.device)
        self.moving = {id(weight) for weight in momentum_copies(without_ddp(model)).values()}
        self.places = list(tensor_places(model))
        self.ascended: list[Tensor] | None = None  # losses of pairs of passes, if the step is checked

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the model."""
        if "model" not in self.__dict__:  # a copy or unpickling asks before the attributes exist
            raise AttributeError(name)
        return getattr(self.model, name)

    def __repr__(self) -> str:
        """Return a text with the settings and the name of the model's class."""
        return f"{type(self).__name__}({type(without_ddp(self.model)).__name__}, {self.optimizer.settings})"

    def __call__(self, samples: dict[str, Any]) -> Any:
        """Return the model's output for ``samples`` at the perturbed weights.

        ``samples["epoch"]``, which LAVIS's loop sets, decides whether the epoch is perturbed. A loop of one's own needs
        it only with ``warmup_epochs`` or ``last_epochs``.
        """
        optimizer = self.optimizer
        if not optimizer.settings.is_active(_epoch_in(samples, optimizer.settings), optimizer.total_epochs):
            return self.model(samples)
        direction = optimizer.known_direction()
        if direction is None:
            return self._in_two_passes(samples)
        if not direction:
            return self.model(samples)
        return functional_call(self.model, self._in_places(self._perturbed(direction)), (samples,), tie_weights=False)

    def checked_step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what a task's step returns, which may call this model any number of times.

        What is no tensor, as the step of a task with a loop of its own may return it, is not checked.

        Raises:
            ValueError: If a part of that loss comes from elsewhere than the model's ``["loss"]``, of which alone the
                direction is the gradient.
        """
        self.ascended = []
        try:
            loss = step(*args, **kwargs)
            if self.ascended and isinstance(loss, Tensor) and not _flows_through(loss, self.ascended):
                raise ValueError(
                    "run.task: train_step adds something to model(samples)['loss'], and the direction of run.wrf is "
                    f"the gradient of that loss alone; let {type(without_ddp(self.model)).__name__} return the whole "
                    "loss, or set run.wrf.direction: random."
                )
            return loss
        finally:
            self.ascended = None

    def _in_two_passes(self, samples: dict[str, Any]) -> Any:
        equalise_buffers(self.model)  # in the perturbed call, DDP would synchronise only the copies below
        # The second pass may overwrite buffers (statistics, queues) and frozen weights (momentum copies, which LAVIS's
        # models move by assigning to .data). It gets copies with the values from before the first pass.
        new = {id(buffer): buffer.clone() for buffer in self.model.buffers()}
        for weight in self.model.parameters():
            if not weight.requires_grad:
                new[id(weight)] = weight.detach().clone() if id(weight) in self.moving else weight.detach()
        random_state = get_random_state(self.device)
        with self.memo.recording():
            direction = self._gradient(dict(samples))
        # The half-precision copies of the clean weights serve no more: the second pass multiplies perturbed ones.
        torch.clear_autocast_cache()
        set_random_state(random_state, self.device)
        self.optimizer.keep(direction)
        new.update(self._perturbed(direction))
        with self.memo.replaying():
            # tie_weights would replace a module that is registered twice again, and restore the wrong tensor.
            output = functional_call(self.model, self._in_places(new), (samples,), tie_weights=False)
        if self.ascended is not None:
            self.ascended.append(output["loss"])
        return output

    def _perturbed(self, direction: list[Tensor]) -> dict[int, Tensor]:
        """Return the perturbed tensors by the ``id`` of the clean ones; none if the direction is not finite.

        The list is emptied unless the optimizer keeps it, so that a gradient's memory is free as soon as it was used.
        """
        optimizer = self.optimizer
        step = optimizer.ascent(direction)
        is_finite = bool(step.is_finite())
        optimizer.steps["perturbed" if is_finite else "skipped"] += 1
        if not is_finite:
            optimizer.direction = None
            return {}
        if optimizer.is_measuring:
            optimizer.measure(step, direction)
        if direction is not optimizer.direction:
            direction.clear()
        return {id(weight): new for weight, new in zip(optimizer.weights.values(), step.perturbed())}

    def _in_places(self, new: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return {name: new[id(holder[key])] for name, holder, key in self.places if id(holder[key]) in new}

    def _gradient(self, samples: dict[str, Any]) -> list[Tensor]:
        scale = self.loss_scale()  # read first: on a GPU the reading waits for all that is queued
        # The call goes to the bare module, because DistributedDataParallel would wait for a backward pass.
        model: Any = without_ddp(self.model)
        share = self.optimizer.settings.direction_share
        output = model(samples) if share == 1 else model.loss_of_share(samples, share)
        # The mean over a share of the rows gives a row 1 / share times the gradient for which the scale was found, and
        # fp16 would overflow. The length of the direction is of no account.
        loss = _loss_in(output, model) * (scale * share)
        weights = list(self.optimizer.weights.values())
        gradients = list(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))
        if isinstance(self.model, DistributedDataParallel):
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            parts = flat.split([gradient.numel() for gradient in gradients])
            gradients = [part.view(gradient.shape) for part, gradient in zip(parts, gradients)]
        return gradients


def _epoch_in(samples: Any, settings: WeightPerturbation) -> int:
    if not isinstance(samples, Mapping):
        raise ValueError(
            f"the perturbed model takes a dictionary of samples, as LAVIS's models do, got {type(samples).__name__}; "
            "wrap your model in one whose forward(samples) returns {'loss': ...}."
        )
    counted = [name for name in ("warmup_epochs", "last_epochs") if getattr(settings, name)]
    if counted and "epoch" not in samples:
        raise ValueError(
            f"samples have no 'epoch', from which run.wrf.{counted[0]}: {getattr(settings, counted[0])} counts; set "
            "samples['epoch'] to the number of the epoch, from 0."
        )
    epoch: int = samples.get("epoch", 0)
    return epoch


def _loss_in(output: Any, model: nn.Module) -> Tensor:
    try:
        loss: Tensor = output["loss"]
    except (KeyError, IndexError, TypeError) as error:
        held = f" with {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise ValueError(
            f"run.wrf perturbs along the gradient of model(samples)['loss'], and {type(model).__name__} returns a "
            f"{type(output).__name__}{held}; let it return the loss under that name, or choose another model.arch."
        ) from error
    return loss


def _flows_through(loss: Tensor, sources: list[Tensor]) -> bool:
    """Return whether every path from a loss to a leaf of its graph passes through a source."""
    seen = {source.grad_fn for source in sources}
    left = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if not node.next_functions:
            return False
        seen.add(node)
        left += [inner for inner, _ in node.next_functions]
    return True


def _offers_loss_of_share(model: nn.Module) -> bool:
    """Return whether ``loss_of_share`` belongs to the loss that ``forward`` computes.

    A class that inherits it and has another ``forward``, as TSCIR's models and Retrieval-DPO's, has another loss.
    """

    def owner(name: str) -> type | None:
        return next((base for base in type(model).__mro__ if name in vars(base)), None)

    return owner("loss_of_share") is not None and owner("loss_of_share") is owner("forward")


def _pairs(
    model: nn.Module, weights: Mapping[str, nn.Parameter], settings: WeightPerturbation
) -> list[tuple[int, int, Any]]:
    """Return the positions of the LoRA factors among the chosen tensors, pair by pair."""
    names = list(weights)
    pairs = []
    for pair in lora_pairs(model):
        chosen = [name in weights for name in (pair.a_name, pair.b_name)]
        if any(chosen) and not all(chosen):
            raise ValueError(
                f"run.wrf.tensors: {settings.tensors!r} chooses only one of {pair.a_name} and {pair.b_name}, which act "
                "as a product; choose both or neither."
            )
        if all(chosen) and settings.radius == "elementwise":
            raise ValueError(
                "run.wrf.radius: elementwise is not defined for LoRA's factors; use relative or absolute, or leave "
                "them out through run.wrf.tensors."
            )
        if all(chosen):
            pairs.append((names.index(pair.a_name), names.index(pair.b_name), pair))
    return pairs


def _cosine(direction: list[Tensor], gradients: list[Tensor | None]) -> float:
    both = [(d.float(), g.float()) for d, g in zip(direction, gradients) if g is not None]
    if not both:
        return 0.0
    dot = torch.stack([(d * g).sum() for d, g in both]).sum()
    norms = [torch.stack([vector.norm() for vector in vectors]).norm() for vectors in zip(*both)]
    return float(dot / (norms[0] * norms[1]).clamp_min(torch.finfo(torch.float32).tiny))


def _embedding_tables(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
