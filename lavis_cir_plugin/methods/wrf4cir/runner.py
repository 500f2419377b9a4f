"""The runners ``runner_wrf4cir`` and ``runner_wrf4cir_iter``: LAVIS's training with adversarial weight perturbation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Optional

import torch
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from lavis.runners.runner_iter import RunnerIter

from lavis_cir_plugin.core.error_messages import first_line
from lavis_cir_plugin.core.settings import PositiveNumber, Section
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.report.curves import Panel
from lavis_cir_plugin.report.sheet_layout import GREY
from lavis_cir_plugin.training.remaining_epoch import RemainingEpoch
from lavis_cir_plugin.training.resumable_runner import ResumableRunner


@dataclass(frozen=True)
class PerturbationRun(Section):
    """Keys of ``run`` that the two perturbing runners read.

    Attributes:
        wrf: The perturbation of the weights.
        adam_eps: AdamW's epsilon, which is 1e-8 in LAVIS.
        max_grad_norm: Norm to which longer gradients are shortened before each step.
        fused_adamw: Whether torch's fused AdamW replaces LAVIS's, which computes the same in several passes over the
            weights; results differ by rounding. By default it does if torch has it for the weights' device and types.
            A resumed run keeps the kind that it began with.
    """

    WHERE = "run"

    wrf: WeightPerturbation = field(default_factory=WeightPerturbation)
    adam_eps: Optional[PositiveNumber] = None
    max_grad_norm: Optional[PositiveNumber] = None
    fused_adamw: Optional[bool] = None


class PerturbingRunner(ResumableRunner):
    r"""Mix-in before a runner of LAVIS whose steps minimise the loss at perturbed weights.

    .. math:: \min_\theta \max_{\lVert\delta\rVert \le \gamma \lVert\theta\rVert} L(\theta + \delta)

    ``run.wrf`` holds the fields of :class:`~lavis_cir_plugin.methods.wrf4cir.perturbation.WeightPerturbation`. LAVIS's
    loop is not copied: the task gets a callable that perturbs in place of the model. With ``run.wrf.gamma: 0`` and
    ``run.fused_adamw: false`` the training is LAVIS's own, bit for bit.

    Source: WRF4CIR (arXiv 2604.05583).
    """

    RUN_SETTINGS = PerturbationRun
    LOG_COLUMNS: ClassVar[dict[str, str]] = {
        "perturbation_norm": "wrf/perturbation_norm",
        "cosine": "wrf/cosine",
    }
    CURVE_PANELS = (
        Panel("‖δ‖", (("perturbation_norm", "", GREY),), by_batch=True),
        Panel("cos(g, g')", (("cosine", "", GREY),), by_batch=True),
    )

    @property
    def optimizer(self) -> PerturbingOptimizer:
        """LAVIS's AdamW inside the wrapper that owns the perturbation."""
        if self._optimizer is None:
            run = self.config.run_cfg
            stock = super().optimizer
            self._optimizer = None  # if the wrapper's constructor fails, the bare optimizer must not stay here
            for group in stock.param_groups if run.get("adam_eps") is not None else ():
                group["eps"] = float(run.adam_eps)
            stock = _fused(stock, run.get("fused_adamw"))
            settings = WeightPerturbation(**run.get("wrf", {}))
            # LAVIS completes the last inner epoch, even beyond max_iters.
            epochs = (
                math.ceil(self.max_iters / self.iters_per_inner_epoch) if self.counts_iterations else self.max_epoch
            )
            if settings.gamma > 0 and not settings.is_active(epochs - 1, epochs):
                logging.warning(
                    "nothing will be perturbed: run.wrf.warmup_epochs: %s of %s epochs", settings.warmup_epochs, epochs
                )
            self._optimizer = PerturbingOptimizer(
                stock,
                self.model,
                settings,
                total_epochs=epochs,
                seed=int(run.get("seed", 42)),
                max_grad_norm=run.get("max_grad_norm"),
            )
        return self._optimizer

    def training_model(self, model: Any, scaler: Any) -> Callable[[dict[str, Any]], Any]:
        """Return the callable that runs the model at perturbed weights."""
        return self.optimizer.perturb(model, scaler.get_scale if scaler is not None else lambda: 1.0)

    def train_step(self, part: RemainingEpoch, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the task's own step, whose loss must be the one that is perturbed."""
        return super().train_step(part, partial(part.model.checked_step, stock), *args, **kwargs)


def _fused(stock: torch.optim.AdamW, is_wanted: bool | None) -> torch.optim.AdamW:
    """Return torch's fused AdamW with the groups of LAVIS's, or LAVIS's own if that is wanted or nothing else exists.

    Raises:
        ValueError: If the fused kind is demanded and torch lacks it for some weight.
    """
    if is_wanted is False:
        return stock
    try:
        weights = (weight for group in stock.param_groups for weight in group["params"])
        # A slice has gaps in memory, and its copy has none. On a CPU, torch 2.14 overlooks the gaps: the numbers are
        # wrong, and what lies in the gaps is overwritten.
        if any(torch.empty_like(weight, device="meta").stride() != weight.stride() for weight in weights):
            raise RuntimeError("a weight is a slice of another tensor")
        return torch.optim.AdamW([dict(group, fused=True, foreach=None) for group in stock.param_groups], fused=True)
    except RuntimeError as error:
        if is_wanted:
            raise ValueError(
                f"run.fused_adamw: true is not available for these weights ({first_line(error)}); set false."
            ) from error
        return stock


@registry.register_runner("runner_wrf4cir")
class RunnerWrf4Cir(PerturbingRunner, RunnerBase):
    """LAVIS's epoch-based runner with weight perturbation."""


@registry.register_runner("runner_wrf4cir_iter")
class RunnerWrf4CirIter(PerturbingRunner, RunnerIter):
    """LAVIS's iteration-based runner with weight perturbation; an epoch has ``run.iters_per_inner_epoch`` batches."""
