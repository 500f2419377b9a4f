"""Compute contrastive losses over the negatives of all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_with_grad
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin.ranking.scoring import similarity


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all processes along dim 0, in rank order, keeping the gradient to each of them.

    Args:
        tensor: ``(B, ...)``, the same shape on every process.

    Returns:
        ``(world_size * B, ...)``; the tensor itself in a single process. With losses averaged over processes (as
        DistributedDataParallel does with gradients) the gradient equals the one of a single process that sees the
        whole batch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    if not tensor.requires_grad:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)
    return torch.cat(dist_with_grad.all_gather(tensor.contiguous()))


def contrastive_loss(
    query: Tensor, targets: Tensor, temperature: Tensor | float, target_ids: Tensor | None = None
) -> Tensor:
    r"""In-batch contrastive loss from query to target over the batches of all processes.

    .. math:: L = -\frac1B \sum_i \log \frac{\exp(s_{ii}/\tau)}{\exp(s_{ii}/\tau) + \sum_{j \in N_i} \exp(s_{ij}/\tau)},
              \qquad s_{ij} = \max_k q_i \cdot v_{jk}

    :math:`N_i` holds every target of the global batch that is another image than target i. CIRR repeats targets up to
    nine times; counting such a repetition as a negative would push the right answer away.

    Args:
        query: ``(B, D)``, unit length.
        targets: ``(B, K, D)`` or ``(B, D)``, unit length; row i is the target of query i.
        temperature: :math:`\tau > 0`, divides.
        target_ids: ``(B,)`` int64; equal ids mean the same image. ``None``: all targets are taken to differ.

    Returns:
        Scalar; ``log(world_size * B)`` when all scores are equal and no target repeats, 0 for a single target.

    Source: SPRC (arXiv 2310.05473) without the mask; BLIP-2 (arXiv 2301.12597) for the maximum over query tokens.
    """
    all_targets, positives, repeated = features_of_all_processes(targets, target_ids)
    # A cosine in half precision is off by up to 5e-4, which the temperature makes 0.7 % of a probability.
    with torch.autocast(query.device.type, enabled=False):
        logits = similarity(query.float(), all_targets.float()) / temperature
    if repeated is not None:
        logits = logits.masked_fill(repeated, -torch.inf)
    return F.cross_entropy(logits, positives)


def features_of_all_processes(targets: Tensor, target_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the targets of all processes, the place of each own one there, and where its image is repeated.

    The last is ``(B, N)``, false at the own place; ``None`` where no ids are known.
    """
    everyone = gather_with_gradient(targets)
    count, device = targets.shape[0], targets.device
    own = torch.arange(count, device=device) + (dist.get_rank() * count if everyone.shape[0] > count else 0)
    if target_ids is None:
        return everyone, own, None
    repeated = target_ids[:, None] == gather_with_gradient(target_ids)[None, :]
    repeated[torch.arange(count, device=device), own] = False
    return everyone, own, repeated


def symmetric_contrastive_loss(
    first: Tensor, second: Tensor, temperature: Tensor | float, ids: Tensor | None = None
) -> Tensor:
    r"""CLIP's contrastive loss: the mean of both directions of :func:`contrastive_loss`.

    .. math:: L_\mathrm{con}(a, b) = \tfrac12 \left( L(a \to b) + L(b \to a) \right)

    Args:
        first: ``(B, D)``, unit length.
        second: ``(B, D)``, unit length; row i belongs to row i of the first.
        temperature: > 0, divides.
        ids: ``(B,)`` int64; rows with equal ids are not negatives of each other.

    Source: CLIP (arXiv 2103.00020).
    """
    there = contrastive_loss(first, second, temperature, ids)
    return (there + contrastive_loss(second, first, temperature, ids)) / 2
