"""The WRF4CIR runner: LAVIS's training with adversarial weight perturbation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase

from lavis_cir_plugin.benchmarks.benchmark import did_you_mean
from lavis_cir_plugin.perturbation import PerturbingOptimizer, WeightPerturbation
from lavis_cir_plugin.runners.portable import PortableRunner


@registry.register_runner("runner_wrf4cir")
class RunnerWrf4Cir(PortableRunner, RunnerBase):
    """LAVIS's epoch runner whose training steps minimise the loss at adversarially perturbed weights.

    min over theta, max over delta of L(theta + delta), delta bounded relative to theta (WRF4CIR, arXiv 2604.05583).
    ``run.wrf`` holds the fields of :class:`~lavis_cir_plugin.perturbation.WeightPerturbation`. The task gets, in place
    of the model, a callable that perturbs; LAVIS's loop is not copied. ``run.wrf.gamma: 0`` is LAVIS's own training,
    bit for bit. ``run.adam_eps`` sets AdamW's epsilon, which LAVIS leaves at 1e-8.
    """

    RUN_KEYS = ("wrf", "adam_eps")

    @staticmethod
    def run_problems(run: Mapping[str, Any]) -> Iterator[str]:
        """Yield what is wrong with ``run.wrf`` and ``run.adam_eps``, one sentence each."""
        known = [field.name for field in dataclasses.fields(WeightPerturbation)]
        wrf = run.get("wrf", {})
        if not isinstance(wrf, Mapping):
            yield f"run.wrf must be a mapping such as {{gamma: 0.001}}, got {wrf!r}."
            return
        unknown = [key for key in wrf if key not in known]
        yield from (f"run.wrf.{key} is not a known key{did_you_mean(key, known)}" for key in unknown)
        try:
            WeightPerturbation(**{key: value for key, value in wrf.items() if key in known})
        except ValueError as error:
            yield str(error)
        adam_eps = run.get("adam_eps")
        is_positive = isinstance(adam_eps, (int, float)) and not isinstance(adam_eps, bool) and adam_eps > 0
        if adam_eps is not None and not is_positive:
            yield f"run.adam_eps must be a number > 0, got {adam_eps!r}."

    @property
    def optimizer(self) -> PerturbingOptimizer:
        """LAVIS's AdamW inside the wrapper that owns the perturbation."""
        if self._optimizer is None:
            stock = super().optimizer
            self._optimizer = None  # should the wrapper refuse, the bare optimizer must not pass for it
            adam_eps = self.config.run_cfg.get("adam_eps")
            for group in stock.param_groups if adam_eps is not None else ():
                group["eps"] = float(adam_eps)
            settings = WeightPerturbation(**self.config.run_cfg.get("wrf", {}))
            self._optimizer = PerturbingOptimizer(stock, self.model, settings)
        return self._optimizer

    def train_epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch of LAVIS's loop on the perturbed model."""
        with self._perturbed_training():
            return super().train_epoch(epoch)

    @contextmanager
    def _perturbed_training(self) -> Iterator[None]:
        stock = self.task.train_epoch

        def train_epoch(**arguments: Any) -> dict[str, Any]:
            scaler = arguments.get("scaler")
            scale = scaler.get_scale if scaler is not None else lambda: 1.0
            return stock(**{**arguments, "model": self.optimizer.perturb(arguments["model"], scale)})

        self.task.train_epoch = train_epoch
        try:
            yield
        finally:
            del self.task.train_epoch
