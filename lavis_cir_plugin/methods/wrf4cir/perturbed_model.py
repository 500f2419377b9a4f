"""Call a model with perturbed weights, without writing into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from lavis_cir_plugin.core.model_parts import momentum_copies, places, without_ddp
from lavis_cir_plugin.core.random_state import get_random_state, set_random_state
from lavis_cir_plugin.methods.wrf4cir.frozen_memo import FrozenMemo
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer


class PerturbedModel:
    r"""A model whose call runs :math:`L(\theta + \delta)` with gradients that land in the clean :math:`\theta`.

    1. The direction: :math:`g = \nabla L(\theta; B)`, a pass of its own that leaves ``.grad`` alone; or one that is
       known without (random, momentum, the gradient of an earlier step).
    2. :math:`\delta` from :func:`ascent_step`.
    3. The output of the model at :math:`\theta + \delta` on the same batch. Its backward pass gives
       :math:`\nabla L(\theta + \delta; B)`, which the optimizer applies to :math:`\theta`.

    Where there are two passes, both draw the same random numbers (Python's, NumPy's, torch's), so the same dropout
    mask; buffers (batch-norm statistics, queues) and momentum copies are updated by the clean pass alone; and frozen
    sub-modules run once (:class:`~lavis_cir_plugin.recomputation.FrozenMemo`). A single pass updates buffers itself.

    Under DistributedDataParallel the direction is the gradient averaged over processes, so all share one. Where it is
    not finite (a loss-scale overflow) the step is made without perturbation and counted in
    ``optimizer.steps["skipped"]``.

    Args:
        model: Takes LAVIS's ``samples`` dictionary and returns a mapping or object with ``["loss"]``.
        optimizer: Owns settings, chosen tensors and counters.
        loss_scale: Factor on the loss in the first pass (GradScaler's), so that fp16 gradients do not underflow.
    """

    def __init__(self, model: nn.Module, optimizer: PerturbingOptimizer, loss_scale: Callable[[], float]) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_scale = loss_scale
        self.device = next(iter(optimizer.weights.values())).device if optimizer.weights else torch.device("cpu")
        self.memo = FrozenMemo(model, self.device)
        self.moving = {id(weight) for weight in momentum_copies(without_ddp(model)).values()}
        self.places = list(places(model))

    def __getattr__(self, name: str) -> Any:
        """Anything but the call is the model's own."""
        if "model" not in self.__dict__:  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.model, name)

    def __call__(self, samples: dict[str, Any]) -> Any:
        """Return the model's output for ``samples`` at the perturbed weights; see the class.

        ``samples["epoch"]`` (put there by LAVIS's loop) decides whether this epoch is perturbed.
        """
        optimizer = self.optimizer
        epoch = samples.get("epoch", optimizer.settings.warmup_epochs)
        if not optimizer.settings.is_active(epoch, optimizer.total_epochs):
            return self.model(samples)
        direction = optimizer.known_direction()
        if direction is None:
            return self._in_two_passes(samples)
        if not direction:
            return self.model(samples)
        return functional_call(self.model, self._in_places(self._perturbed(direction)), (samples,), tie_weights=False)

    def _in_two_passes(self, samples: dict[str, Any]) -> Any:
        if isinstance(self.model, DistributedDataParallel) and self.model.will_sync_module_buffers():
            self.model._sync_buffers()  # it would do so before its own call, which sees the stand-ins alone
        # What the second pass reads and may overwrite is a stand-in with the values from before the first: buffers
        # (statistics, queues), and frozen weights (momentum copies, which LAVIS's models move by assigning to .data).
        new = {id(buffer): buffer.clone() for buffer in self.model.buffers()}
        for weight in self.model.parameters():
            if not weight.requires_grad:
                new[id(weight)] = weight.detach().clone() if id(weight) in self.moving else weight.detach()
        random_state = get_random_state(self.device)
        with self.memo.recording():
            direction = self._gradient(dict(samples))
        set_random_state(random_state, self.device)
        self.optimizer.keep(direction)
        new.update(self._perturbed(direction))
        with self.memo.replaying():
            # tie_weights would swap a module that is registered twice a second time, and restore the wrong tensor.
            return functional_call(self.model, self._in_places(new), (samples,), tie_weights=False)

    def _perturbed(self, direction: list[Tensor]) -> dict[int, Tensor]:
        """Return the perturbed tensors by the identity of the clean ones; none if the direction is not finite."""
        is_finite = bool(torch.stack(torch._foreach_norm(direction)).isfinite().all())
        self.optimizer.steps["perturbed" if is_finite else "skipped"] += 1
        if not is_finite:
            self.optimizer.direction = None
            return {}
        steps = self.optimizer.perturbations(direction)
        return {id(weight): weight + step for weight, step in zip(self.optimizer.weights.values(), steps)}

    def _in_places(self, new: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return {name: new[id(holder[key])] for name, holder, key in self.places if id(holder[key]) in new}

    def _gradient(self, samples: dict[str, Any]) -> list[Tensor]:
        # The bare module: DistributedDataParallel would wait for a backward pass that never comes.
        loss = without_ddp(self.model)(samples)["loss"] * self.loss_scale()
        weights = list(self.optimizer.weights.values())
        gradients = list(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))
        if isinstance(self.model, DistributedDataParallel):
            together = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(together)
            together /= dist.get_world_size()
            parts = together.split([gradient.numel() for gradient in gradients])
            gradients = [part.view(gradient.shape) for part, gradient in zip(parts, gradients)]
        return gradients
