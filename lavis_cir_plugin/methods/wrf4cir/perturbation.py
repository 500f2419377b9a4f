"""The family of weight perturbations: settings and the length of a step along a direction, tensors in, tensors out."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DIRECTIONS = ("gradient", "random", "momentum")
RADII = ("relative", "absolute", "elementwise")
SCOPES = ("tensor", "global")
TENSORS = ("no_1d", "all", "norm")
EMBEDDINGS = ("exclude", "row", "tensor")


@dataclass(frozen=True)
class WeightPerturbation:
    r"""Settings of the perturbation, as they stand under ``run.wrf``.

    Attributes:
        gamma: Radius; 0 switches the perturbation off. Relative to the norm of the weights, >= 0 and < 1 (the paper
            uses 0.001), or SAM's and ASAM's :math:`\rho`, >= 0, with another ``radius``.
        direction: ``gradient``, the way up the loss of the batch (a second pass); ``random``, a normal draw; or
            ``momentum``, against AdamW's first moment (MSAM, arXiv 2401.12033: the opposite of the gradient's sign,
            about 15 times the radius, and not before the learning rate has warmed up). The last two need one pass.
        radius: ``relative`` to the weights (WRF, AWP), ``absolute`` (SAM) or ``elementwise`` (ASAM).
        scope: ``tensor`` (each tensor has its own ratio, as in AWP's code) or ``global`` (one ratio for all).
        every: The gradient's direction is computed for every so many batches and used again between them, >= 1. Costs
            1 + 1 / every passes.
        warmup_epochs: Epochs at the start that are trained without perturbation, >= 0.
        last_epochs: Only the last so many epochs are perturbed, >= 1; ``None``: all after the warm-up.
        tensors: Which trainable tensors are perturbed: ``no_1d`` (no biases, norms or scalars), ``all``, ``norm``
            (only the weights and biases of normalisation layers), or a regular expression searched in the names.
        embeddings: Tables of ``nn.Embedding``: ``exclude`` them, perturb each ``row`` relative to its own norm, or
            treat them as any other ``tensor``. A batch touches few rows of a table, so with ``tensor`` those few
            take the radius of the whole table.
        eps: Added to the norm of the direction, > 0.
    """

    gamma: float = 0.001
    direction: str = "gradient"
    radius: str = "relative"
    scope: str = "tensor"
    every: int = 1
    warmup_epochs: int = 0
    last_epochs: int | None = None
    tensors: str = "no_1d"
    embeddings: str = "exclude"
    eps: float = 1e-12

    def __post_init__(self) -> None:
        """Refuse impossible values and combinations.

        Raises:
            ValueError: One sentence per problem, all at once.
        """
        problems = [*self._impossible_values(), *self._impossible_combinations()]
        if problems:
            raise ValueError("; ".join(problems) + ".")

    def is_active(self, epoch: int, total_epochs: int | None) -> bool:
        """Return whether ``epoch``, counted from 0, of ``total_epochs`` is perturbed."""
        first = self.warmup_epochs
        if self.last_epochs is not None and total_epochs is not None:
            first = max(first, total_epochs - self.last_epochs)
        return self.gamma > 0 and epoch >= first

    def _impossible_values(self) -> list[str]:
        problems = [
            f"run.wrf.{field}: {getattr(self, field)!r} is not one of {', '.join(allowed)}"
            for field, allowed in (
                ("direction", DIRECTIONS),
                ("radius", RADII),
                ("scope", SCOPES),
                ("embeddings", EMBEDDINGS),
            )
            if getattr(self, field) not in allowed
        ]
        most = 1.0 if self.radius == "relative" else math.inf
        numbers = {
            "gamma": (float, lambda value: 0 <= value < most, ">= 0 and < 1" if most == 1 else ">= 0"),
            "every": (int, lambda value: value >= 1, "a whole number >= 1"),
            "warmup_epochs": (int, lambda value: value >= 0, "a whole number >= 0"),
            "last_epochs": (int, lambda value: value >= 1, "a whole number >= 1, or null"),
            "eps": (float, lambda value: value > 0, "> 0"),
        }
        for field, (kind, is_allowed, wording) in numbers.items():
            value = getattr(self, field)
            if field == "last_epochs" and value is None:
                continue
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
        return problems

    def _impossible_combinations(self) -> list[str]:
        combinations = {
            "run.wrf.radius: elementwise is defined for direction: gradient": self.radius == "elementwise"
            and self.direction != "gradient",
            f"run.wrf.every: {self.every} spares passes of direction: gradient; {self.direction} needs none, set 1": (
                self.direction != "gradient" and self.every != 1
            ),
            f"run.wrf.embeddings: row is relative to the row's norm and does not go with radius: {self.radius}": (
                self.embeddings == "row" and self.radius != "relative"
            ),
        }
        return [sentence for sentence, is_problem in combinations.items() if is_problem]


@dataclass(frozen=True)
class LowRank:
    r"""A pair of LoRA factors among the perturbed tensors, which act only as :math:`W + s B A`.

    Attributes:
        a: Position of A ``(rank, in)`` among the weights; further dimensions count as ``in``.
        b: Position of B ``(out, rank)``.
        scaling: s.
        merged_norm: :math:`\lVert W + s B A \rVert_2`, a scalar.
    """

    a: int
    b: int
    scaling: float
    merged_norm: Tensor


def ascent_step(
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    gamma: float,
    *,
    radius: str = "relative",
    scope: str = "tensor",
    eps: float = 1e-12,
    by_row: Sequence[bool] = (),
    low_rank: Sequence[LowRank] = (),
) -> list[Tensor]:
    r"""Return the perturbation of each weight along its direction.

    .. math::
        \text{relative:}\quad    \delta &= \gamma \,\lVert\theta\rVert_2 \; d \,/\, (\lVert d\rVert_2 + \epsilon) \\
        \text{absolute:}\quad    \delta &= \gamma \; d \,/\, (\lVert d\rVert_2 + \epsilon) \\
        \text{elementwise:}\quad \delta &= \gamma \; \theta^2 d \,/\, (\lVert\, |\theta|\, d\rVert_2 + \epsilon)

    with norms over one tensor (``scope="tensor"``), over all tensors together (``scope="global"``), or over one row
    (``by_row``, whatever the scope). The sign is that of the direction: a gradient gives ascent (the paper's printed
    update has a minus that its own text contradicts).

    A pair of LoRA factors takes the radius of its merged weight: :math:`\lVert\theta\rVert` is that of
    :math:`W + s B A`, and :math:`\lVert d\rVert` that of the merged weight's first-order change
    :math:`s (d_B A + B d_A)`. So B = 0, where every adapter starts, is not silently left unperturbed.

    Args:
        weights: Tensors of any shape; not modified.
        directions: One per weight, same shapes.
        gamma: Radius, >= 0. ``0`` gives zeros.
        radius: ``relative``, ``absolute`` or ``elementwise`` (the last not for LoRA factors).
        scope: ``tensor`` or ``global``.
        eps: Keeps an all-zero direction at a zero perturbation.
        by_row: For each weight, whether each slice along dim 0 has its own norm; none by default.
        low_rank: The pairs of LoRA factors among the weights.

    Returns:
        One tensor per weight, in the weight's dtype. Norms are taken in float32, where 1e-12 does not underflow.

    Source: relative: WRF4CIR (arXiv 2604.05583), perturbation step, norms per tensor as AWP (arXiv 2004.05884);
    absolute, global: SAM (arXiv 2010.01412, equation 2); elementwise, global: ASAM (arXiv 2102.11600, equation 8).
    """
    rows = list(by_row) or [False] * len(weights)
    paired = {position for pair in low_rank for position in (pair.a, pair.b)}
    single = [i for i, row in enumerate(rows) if not row and i not in paired]
    moves = [d.detach().float() for d in directions]
    lengths = dict(zip(single, _norms([moves[i] for i in single])))
    sizes = dict(zip(single, _norms([weights[i] for i in single])))
    if radius == "elementwise":
        lengths = {i: (weights[i].detach().float() * moves[i]).norm() for i in single}
        moves = [weight.detach().float().square() * move for weight, move in zip(weights, moves)]
    for pair in low_rank:
        # One entry per pair, under A's position; B takes the same ratio.
        lengths[pair.a] = _merged_change(weights, moves, pair)
        sizes[pair.a] = pair.merged_norm
    if scope == "global" and lengths:
        length, size = (torch.stack(list(norms.values())).norm() for norms in (lengths, sizes))
        lengths, sizes = dict.fromkeys(lengths, length), dict.fromkeys(sizes, size)
    ratios = {i: gamma * (sizes[i] if radius == "relative" else 1.0) / (lengths[i] + eps) for i in lengths}
    ratios.update({pair.b: ratios[pair.a] for pair in low_rank})
    for i, row in enumerate(rows):
        if row:
            ratios[i] = gamma * _row_norms(weights[i]) / (_row_norms(moves[i]) + eps)
    return [(ratios[i] * move).to(weight.dtype) for i, (weight, move) in enumerate(zip(weights, moves))]


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    # One kernel for all tensors where the device has it: a model has hundreds, and most are small.
    return list(torch._foreach_norm([t.detach().float() for t in tensors])) if tensors else []


def _row_norms(tensor: Tensor) -> Tensor:
    norms: Tensor = tensor.detach().float().flatten(1).norm(dim=1)
    return norms.view(-1, *[1] * (tensor.dim() - 1))


def _merged_change(weights: Sequence[Tensor], moves: Sequence[Tensor], pair: LowRank) -> Tensor:
    a, b = (weights[i].detach().float().flatten(1) for i in (pair.a, pair.b))
    a_move, b_move = (moves[i].flatten(1) for i in (pair.a, pair.b))
    change: Tensor = (pair.scaling * (b_move @ a + b @ a_move)).norm()
    return change
