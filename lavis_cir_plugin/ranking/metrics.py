"""Compute recall and mean average precision from ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def recall_at(ranks: Tensor, k: int) -> float:
    """Compute Recall@K in percent: the share of queries whose target is among the first K.

    Args:
        ranks: ``(Q,)`` 0-based; -1 (target not in the gallery) counts as a miss.
        k: At least 1.

    Raises:
        ValueError: there is no query.
    """
    if ranks.numel() == 0:
        raise ValueError("recall of zero queries is undefined; the split or group holds no query.")
    return 100.0 * int(((ranks >= 0) & (ranks < k)).sum()) / ranks.numel()


def average_precision_at(relevant_ranks: Tensor, k: int) -> float:
    r"""Compute mAP@K in percent: average precision over several labelled images, the mean over queries.

    .. math:: \mathrm{AP@}K = \frac{1}{\min(K, |G|)} \sum_{g \in G,\; r_g < K}
              \frac{|\{h \in G : r_h \le r_g\}|}{r_g + 1}

    Dividing by :math:`\min(K, |G|)` lets a query with more than K labelled images reach 100. Of one labelled image at
    rank r it is 1 / (r + 1), or 0 from r = K on.

    Args:
        relevant_ranks: ``(Q, T)`` 0-based, distinct within a query; -1 pads and does not count in :math:`|G|`.
        k: At least 1.

    Raises:
        ValueError: there is no query, or one without a labelled image. Source: CIRCO (Baldrati et al., ICCV 2023).
    """
    if len(relevant_ranks) == 0:
        raise ValueError("average precision of zero queries is undefined; the split or group holds no query.")
    counts = (relevant_ranks >= 0).sum(dim=1)
    if not bool(counts.all()):
        raise ValueError(
            f"average precision is undefined for {int((counts == 0).sum()):,} of {len(counts):,} queries: they have no "
            f"labelled image in the gallery."
        )
    ranks = relevant_ranks.double().masked_fill(relevant_ranks < 0, math.inf).sort(dim=1).values
    hits = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)
    precision = (hits / (ranks + 1)).masked_fill(ranks >= k, 0.0)
    return 100.0 * float((precision.sum(dim=1) / counts.clamp(max=k)).mean())
