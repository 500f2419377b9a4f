"""The family of weight perturbations (WRF4CIR, AWP, SAM, ASAM): settings, and the step along a direction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Optional

import torch
from torch import Tensor

from lavis_cir_plugin.core.settings import (
    Limits,
    NotNegative,
    NotNegativeNumber,
    Positive,
    PositiveNumber,
    Section,
    check_argument,
    check_pattern,
    one_of,
)

DIRECTIONS = ("gradient", "random", "momentum")
RADII = ("relative", "absolute", "elementwise")
SCOPES = ("tensor", "global")
TENSORS = ("no_1d", "all", "norm")
EMBEDDINGS = ("exclude", "row", "tensor")


@dataclass(frozen=True)
class WeightPerturbation(Section):
    r"""Settings of the perturbation under ``run.wrf``.

    Attributes:
        gamma: Radius; 0 switches the perturbation off. With ``radius: relative`` it is relative to the norm of the
            weights, >= 0 and < 1 (the paper uses 0.001); otherwise it is SAM's and ASAM's :math:`\rho`, >= 0.
        direction: ``gradient`` goes up the loss of the batch, for which a second pass is needed; ``random`` is a normal
            draw; ``momentum`` goes against AdamW's first moment (MSAM, arXiv 2401.12033, with the opposite sign of the
            gradient, about 15 times the radius, and only after the learning rate's warm-up). The last two need one
            pass.
        radius: ``relative`` to the weights (WRF, AWP), ``absolute`` (SAM) or ``elementwise`` (ASAM).
        scope: ``tensor`` (each tensor has its own ratio, as in AWP's code) or ``global`` (one ratio for all).
        every: Number of batches, >= 1, that use one computed gradient as their direction. A step then costs
            1 + 1 / every passes on average.
        direction_share: Share of the batch, > 0 and <= 1, whose loss gives the gradient of the direction: that of its
            first rows, with the targets of the whole batch as negatives. Below 1 the direction is an approximation,
            and the model must offer ``loss_of_share``, as ``blip2_cir`` and ``clip_cir`` do.
        warmup_epochs: Number of epochs at the start without perturbation, >= 0.
        last_epochs: Number of epochs at the end with perturbation, >= 1; ``null`` perturbs all after the warm-up.
        tensors: Trainable tensors that are perturbed: ``no_1d`` (no biases, norms or scalars), ``all``, ``norm`` (only
            weights and biases of normalisation layers), or a regular expression that is searched in the names.
        embeddings: Treatment of ``nn.Embedding`` tables: ``exclude`` them, perturb each ``row`` relative to its own
            norm, or treat a table like any other ``tensor``. With ``tensor``, the few rows that a batch uses take the
            radius of the whole table.
        eps: Number > 0 that is added to the norm of the direction.
    """

    WHERE = "run.wrf"
    EXAMPLE = " such as {gamma: 0.001}"

    gamma: NotNegativeNumber = 0.001
    direction: Annotated[str, one_of(DIRECTIONS)] = "gradient"
    radius: Annotated[str, one_of(RADII)] = "relative"
    scope: Annotated[str, one_of(SCOPES)] = "tensor"
    every: Positive = 1
    direction_share: Annotated[float, Limits(gt=0, le=1)] = 1.0
    warmup_epochs: NotNegative = 0
    last_epochs: Optional[Positive] = None
    tensors: Annotated[
        str, Limits(words=f"one of {', '.join(TENSORS)}, or a regular expression", check=check_pattern)
    ] = "no_1d"
    embeddings: Annotated[str, one_of(EMBEDDINGS)] = "exclude"
    eps: PositiveNumber = 1e-12

    def is_active(self, epoch: int, total_epochs: int | None) -> bool:
        """Return whether ``epoch`` (from 0) of ``total_epochs`` is perturbed.

        Examples:
            >>> settings = WeightPerturbation(warmup_epochs=1, last_epochs=3)
            >>> [settings.is_active(epoch, total_epochs=5) for epoch in range(5)]
            [False, False, True, True, True]
        """
        first = self.warmup_epochs
        if self.last_epochs is not None and total_epochs is not None:
            first = max(first, total_epochs - self.last_epochs)
        return self.gamma > 0 and epoch >= first

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence per combination of values that is impossible."""
        combinations = {
            f"run.wrf.gamma must be >= 0 and < 1 under run.wrf.radius: relative, got {self.gamma}": (
                self.radius == "relative" and self.gamma >= 1
            ),
            "run.wrf.radius: elementwise is defined for direction: gradient": self.radius == "elementwise"
            and self.direction != "gradient",
            f"run.wrf.every: {self.every} spares passes of direction: gradient; {self.direction} needs none, set 1": (
                self.direction != "gradient" and self.every != 1
            ),
            f"run.wrf.direction_share: {self.direction_share:g} spares work of direction: gradient; {self.direction} "
            "needs none, set 1": self.direction != "gradient" and self.direction_share < 1,
            f"run.wrf.embeddings: row is relative to the row's norm and does not go with radius: {self.radius}": (
                self.embeddings == "row" and self.radius != "relative"
            ),
        }
        yield from (f"{sentence}." for sentence, is_problem in combinations.items() if is_problem)


@dataclass(frozen=True)
class LowRank:
    r"""A pair of LoRA factors among the perturbed tensors, which have an effect only as :math:`W + s B A`.

    Attributes:
        a: Position of A ``(rank, in)`` among the weights; further dimensions belong to ``in``.
        b: Position of B ``(out, rank)`` among the weights.
        scaling: Scaling s.
        merged_norm: Norm :math:`\lVert W + s B A \rVert_2`, a scalar.
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

    The norms are over one tensor (``scope="tensor"``), over all tensors (``scope="global"``), or, for weights in
    ``by_row`` and any scope, over one row. The perturbation has the sign of the direction, so that a gradient gives
    ascent. (The update in the paper has a minus sign that the paper's text contradicts.)

    A pair of LoRA factors takes the radius of its merged weight: :math:`\lVert\theta\rVert` is the norm of
    :math:`W + s B A`, and :math:`\lVert d\rVert` is the norm of the merged weight's first-order change
    :math:`s (d_B A + B d_A)`. Thus adapters are perturbed also at B = 0, their initial value.

    Args:
        weights: Tensors of any shape, which are not modified.
        directions: One direction per weight, of the same shape.
        gamma: Radius, >= 0; 0 gives zeros.
        radius: ``relative``, ``absolute`` or ``elementwise`` (not for LoRA factors).
        scope: ``tensor`` or ``global``.
        eps: Number added to the norm of the direction, so that an all-zero direction gives a zero perturbation.
        by_row: For each weight, whether each slice along dim 0 has its own norm; by default none has.
        low_rank: Pairs of LoRA factors among the weights.

    Returns:
        One tensor per weight, in the weight's dtype. Norms are computed in float32, in which 1e-12 does not underflow.

    Raises:
        ValueError: If radius or scope is unknown, or the directions do not fit the weights.

    Examples:
        The weight has norm 5, so a relative radius of 0.1 is a step of length 0.5 along the direction.

        >>> weight, direction = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
        >>> ascent_step([weight], [direction], 0.1)
        [tensor([0.0000, 0.5000])]
        >>> ascent_step([weight], [direction], 0.1, radius="absolute")
        [tensor([0.0000, 0.1000])]

    Source: relative: WRF4CIR (arXiv 2604.05583), perturbation step, norms per tensor as AWP (arXiv 2004.05884);
    absolute, global: SAM (arXiv 2010.01412, equation 2); elementwise, global: ASAM (arXiv 2102.11600, equation 8).
    """
    check_argument("radius", Annotated[str, one_of(RADII)], radius)
    check_argument("scope", Annotated[str, one_of(SCOPES)], scope)
    shapes, others = ([tuple(tensor.shape) for tensor in tensors] for tensors in (weights, directions))
    if shapes != others:
        raise ValueError(f"each weight needs a direction of its shape, got weights {shapes} and directions {others}.")
    return ascent(
        weights, directions, gamma, radius=radius, scope=scope, eps=eps, by_row=by_row, low_rank=low_rank
    ).steps()


@dataclass(frozen=True)
class Ascent:
    """The perturbation of each weight as a factor times a move, before the product is computed.

    Attributes:
        weights: The weights.
        moves: A tensor of each weight's shape, which may be the direction itself.
        factors: A scalar for each weight, or one number per row.
        lengths: The norms by which the moves are divided.
    """

    weights: Sequence[Tensor]
    moves: list[Tensor]
    factors: Sequence[Tensor]
    lengths: Sequence[Tensor]

    def is_finite(self) -> Tensor:
        """Return whether all directions are finite, a bool scalar on the device of the first weight."""
        device = self.lengths[0].device
        return torch.stack([length.isfinite().all().to(device) for length in self.lengths]).all()

    def steps(self) -> list[Tensor]:
        """Return the perturbations, as :func:`ascent_step` does."""
        return [
            (factor * move).to(weight.dtype) for weight, factor, move in zip(self.weights, self.factors, self.moves)
        ]

    def perturbed(self) -> list[Tensor]:
        """Return the perturbed weights, whose gradients flow to the weights, and drop each move after its use.

        Thus the memory of moves and perturbed weights together is little more than that of one of them.
        """
        perturbed = []
        for weight, factor in zip(self.weights, self.factors):
            move = self.moves.pop(0).to(weight.dtype)
            perturbed.append(torch.addcmul(weight, move, factor.to(weight.dtype)))
        return perturbed


def ascent(
    weights: Sequence[Tensor],
    directions: Sequence[Tensor],
    gamma: float,
    *,
    radius: str = "relative",
    scope: str = "tensor",
    eps: float = 1e-12,
    by_row: Sequence[bool] = (),
    low_rank: Sequence[LowRank] = (),
) -> Ascent:
    """Return the perturbation that :func:`ascent_step` describes, as factors and moves."""
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
        # A pair has one entry, at A's position; B takes the same ratio.
        lengths[pair.a] = _merged_change(weights, moves, pair)
        sizes[pair.a] = pair.merged_norm
    if scope == "global" and lengths:
        length, size = (torch.stack(list(norms.values())).norm() for norms in (lengths, sizes))
        lengths, sizes = dict.fromkeys(lengths, length), dict.fromkeys(sizes, size)
    ratios = {i: gamma * (sizes[i] if radius == "relative" else 1.0) / (lengths[i] + eps) for i in lengths}
    ratios.update({pair.b: ratios[pair.a] for pair in low_rank})
    for i, row in enumerate(rows):
        if row:
            lengths[i] = _row_norms(moves[i])
            ratios[i] = gamma * _row_norms(weights[i]) / (lengths[i] + eps)
    return Ascent(weights, moves, [ratios[i] for i in range(len(weights))], list(lengths.values()))


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    # A model has hundreds of mostly small tensors; some devices have one kernel for all of them.
    return list(torch._foreach_norm([t.detach().float() for t in tensors])) if tensors else []


def _row_norms(tensor: Tensor) -> Tensor:
    norms: Tensor = tensor.detach().float().flatten(1).norm(dim=1)
    return norms.view(-1, *[1] * (tensor.dim() - 1))


def _merged_change(weights: Sequence[Tensor], moves: Sequence[Tensor], pair: LowRank) -> Tensor:
    a, b = (weights[i].detach().float().flatten(1) for i in (pair.a, pair.b))
    a_move, b_move = (moves[i].flatten(1) for i in (pair.a, pair.b))
    change: Tensor = (pair.scaling * (b_move @ a + b @ a_move)).norm()
    return change
