"""Contrastive losses whose negatives come from the batches of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_with_grad
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin.core.processes import rank_and_world
from lavis_cir_plugin.ranking.scoring import similarity


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all processes along dim 0, in rank order, and let gradients flow to each of them.

    Args:
        tensor: ``(B, ...)``, with the same shape on every process.

    Returns:
        ``(world_size * B, ...)``; in a single process the tensor itself. If gradients are averaged over processes, as
        DistributedDataParallel does, they equal those of a single process with the whole batch.
    """
    world = rank_and_world()[1]
    if world == 1:
        return tensor
    if not tensor.requires_grad:
        parts = [torch.empty_like(tensor) for _ in range(world)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)
    return torch.cat(dist_with_grad.all_gather(tensor.contiguous()))


def contrastive_loss(
    query: Tensor,
    targets: Tensor,
    temperature: Tensor | float,
    target_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""In-batch contrastive loss from query to target over the batches of all processes.

    .. math:: L = -\frac1B \sum_i \log \frac{\exp(s_{ii}/\tau)}{\exp(s_{ii}/\tau) + \sum_{j \in N_i} \exp(s_{ij}/\tau)},
              \qquad s_{ij} = \max_k q_i \cdot v_{jk}

    :math:`N_i` holds every target of the global batch that shows another image than target i. CIRR repeats targets up
    to nine times; if a repetition counted as a negative, the loss would push the right answer away.

    With label smoothing :math:`\epsilon` the right target has the probability
    :math:`1 - \epsilon + \epsilon / (1 + |N_i|)` and each target of :math:`N_i` has :math:`\epsilon / (1 + |N_i|)`.

    Args:
        query: Unit-length queries, ``(R, D)`` with R <= B; the mean of the loss is over them.
        targets: Unit-length targets, ``(B, K, D)`` or ``(B, D)``; row i is the target of query i, and rows from R on
            are negatives alone.
        temperature: :math:`\tau > 0`, by which scores are divided.
        target_ids: ``(B,)`` int64, equal for the same image. Without ids all targets count as different images.
        label_smoothing: :math:`\epsilon`, >= 0 and < 1.

    Raises:
        ValueError: If the ids are no tensor of one id for each target.

    Returns:
        A scalar: ``log(world_size * B)`` if all scores are equal and no target repeats, 0 for a single target.

    Examples:
        If all scores are equal, each of four targets is as likely as the others, and the loss is log 4. With two
        pictures among them, each there twice, one wrong picture in two places is left: log 3.

        >>> same = torch.ones(4, 1)
        >>> torch.isclose(contrastive_loss(same, same, 0.07).exp(), torch.tensor(4.0))
        tensor(True)
        >>> torch.isclose(contrastive_loss(same, same, 0.07, torch.tensor([1, 1, 2, 2])).exp(), torch.tensor(3.0))
        tensor(True)

    Source: SPRC (arXiv 2310.05473) without the mask; BLIP-2 (arXiv 2301.12597) for the maximum over query tokens and
    for the label smoothing, of 0.1.
    """
    all_targets, positives, repeated = features_of_all_processes(targets, target_ids)
    # A cosine in half precision has an error of up to 5e-4; divided by the temperature, it changes a probability by
    # 0.7 %.
    with torch.autocast(query.device.type, enabled=False):
        logits = similarity(query.float(), all_targets.float()) / temperature
    if repeated is not None:
        repeated = repeated[: len(query)]
        logits = logits.masked_fill(repeated, -torch.inf)
    loss = F.cross_entropy(logits, positives[: len(query)])
    if label_smoothing == 0:
        return loss
    log_likelihood = F.log_softmax(logits, dim=1)
    if repeated is not None:  # torch's own smoothing would spread probability over the masked targets
        log_likelihood = log_likelihood.masked_fill(repeated, torch.nan)
    return (1 - label_smoothing) * loss - label_smoothing * log_likelihood.nanmean(dim=1).mean()


def with_gradient_of(rows: int, function: Callable[[Any], Tensor], batch: Any) -> Tensor:
    """Return ``function`` of a batch, computed without a gradient for all rows but the first ``rows``.

    Args:
        rows: Number of rows with a gradient, at least 1.
        function: Function of a batch that treats each row by itself.
        batch: Tensor or list of B rows.
    """
    trained = function(batch[:rows])
    if rows >= len(batch):
        return trained
    with torch.no_grad():
        others = function(batch[rows:])
    return torch.cat([trained, others])


def features_of_all_processes(targets: Tensor, target_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the targets of all processes, the positions of this process's targets, and where their images repeat.

    Raises:
        ValueError: If the ids are no tensor of one id for each target.

    Returns:
        The N targets of all processes; the position ``(B,)`` of each own target among them; and a mask ``(B, N)`` that
        is true where another target shows the same image. The mask is ``None`` if no ids are known.
    """
    if target_ids is not None and (not isinstance(target_ids, Tensor) or target_ids.shape != targets.shape[:1]):
        kind = tuple(target_ids.shape) if isinstance(target_ids, Tensor) else type(target_ids).__name__
        raise ValueError(f"target_ids must be a tensor ({len(targets)},), one id for each target, got {kind}.")
    everyone = gather_with_gradient(targets)
    count, device = targets.shape[0], targets.device
    own = torch.arange(count, device=device) + rank_and_world()[0] * count
    if target_ids is None:
        return everyone, own, None
    repeated = target_ids[:, None] == gather_with_gradient(target_ids)[None, :]
    repeated[torch.arange(count, device=device), own] = False
    return everyone, own, repeated


def symmetric_contrastive_loss(
    first: Tensor,
    second: Tensor,
    temperature: Tensor | float,
    ids: Tensor | None = None,
    rows: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""CLIP's contrastive loss: the mean of both directions of :func:`contrastive_loss`.

    .. math:: L_\mathrm{con}(a, b) = \tfrac12 \left( L(a \to b) + L(b \to a) \right)

    Args:
        first: Unit-length features, ``(B, D)``.
        second: Unit-length features, ``(B, D)``; row i belongs to row i of ``first``.
        temperature: Number > 0 by which scores are divided.
        ids: ``(B,)`` int64; rows with equal ids are not negatives of each other.
        rows: Number of first rows whose loss counts, against all B rows of the other side; all by default.
        label_smoothing: Label smoothing of both directions, >= 0 and < 1.

    Examples:
        >>> first, second = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> there, back = contrastive_loss(first, second, 1.0), contrastive_loss(second, first, 1.0)
        >>> torch.equal(symmetric_contrastive_loss(first, second, 1.0), (there + back) / 2)
        True

    Source: CLIP (arXiv 2103.00020).
    """
    there = contrastive_loss(first[:rows], second, temperature, ids, label_smoothing)
    return (there + contrastive_loss(second[:rows], first, temperature, ids, label_smoothing)) / 2
