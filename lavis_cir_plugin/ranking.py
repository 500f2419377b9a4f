"""Ranking of a gallery for composed queries: exact, reproducible, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

WORKING_BYTES = 256 * 2**20
"""Size that each temporary array of `rank` stays under (one query against the whole gallery is the least)."""

FIXED_POINT_BITS = 26
"""2 x 26 bits of product and a bit of rounding fit into the 53 bits of a float64: see `rank`."""


@dataclass(frozen=True)
class Ranking:
    """Result of ranking Q queries.

    Attributes:
        ranks: ``(Q,)`` int64, 0-based rank of the target; -1 where a query has none or it is not among the candidates.
        top: ``(Q, k)`` int64, gallery indices, best first, without the excluded image; -1 pads short rankings.
        subset_ranks: ``(Q,)`` int64, 0-based rank of the target among the query's members; -1 where it is not one.
        relevant_ranks: ``(Q, T)`` int64, 0-based rank of every labelled image; -1 pads, and as for `ranks`.
        subset_top: ``(Q, M)`` int64, the query's members, best first, without the excluded image; -1 pads.
    """

    ranks: Tensor
    top: Tensor
    subset_ranks: Tensor
    relevant_ranks: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    subset_top: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))


def similarity(query: Tensor, gallery: Tensor) -> Tensor:
    r"""Compare every query with every gallery image.

    .. math:: s(q, t) = \max_k \; q^\top v_{t,k}

    Args:
        query: ``(Q, D)``.
        gallery: ``(G, K, D)`` with K features per image, or ``(G, D)``.

    Returns:
        ``(Q, G)``, differentiable; in [-1, 1] for unit features. Source: BLIP-2 (Li et al., 2023), section 3.1.
    """
    if gallery.dim() == 2:
        return query @ gallery.T
    return (query @ gallery.flatten(0, 1).T).reshape(len(query), *gallery.shape[:2]).amax(dim=2)


def rank(
    query: Tensor,
    gallery: Tensor,
    targets: Tensor,
    *,
    excluded: Tensor | None = None,
    members: Tensor | None = None,
    relevant: Tensor | None = None,
    top_k: int = 50,
    chunk: int | None = None,
) -> Ranking:
    r"""Rank the gallery for every query; equal scores are ordered by gallery index.

    .. math:: \mathrm{rank}(t) = |\{j : s_j > s_t\}| + |\{j < t : s_j = s_t\}|

    Memory is O(chunk x G), however many features K an image has.

    Floating-point products depend in the last bit on the shape of the matrices and on the device, so that two equal
    features need not get equal scores. Features are therefore rounded to fixed point (a step of 2^-25 at unit length,
    finer than the error of a float32 product) and multiplied in float64, which is exact. Guaranteed: equal features
    tie, and no result depends on `chunk`, on the device or on the number of threads.

    Args:
        query: ``(Q, D)``.
        gallery: ``(G, K, D)`` or ``(G, D)``, on the query's device or on another one (moved block by block).
        targets: ``(Q,)`` gallery index of the target, -1 for none.
        excluded: ``(Q,)`` gallery index that is taken out of the query's ranking (its reference), -1 for none.
        members: ``(Q, M)`` distinct gallery indices of the query's image set, padded with -1.
        relevant: ``(Q, T)`` gallery indices of the query's labelled images, padded with -1.
        top_k: How many of the best to return (fewer where the gallery is smaller); 0 for ranks alone.
        chunk: Queries at a time; by default as many as `WORKING_BYTES` allows.

    Returns:
        The ranking, on the device of `query`.

    Raises:
        ValueError: shapes do not fit, an index is outside the gallery, or a feature is not finite.
    """
    _check(query, gallery, targets, excluded, members, relevant, top_k, chunk)
    device, size = query.device, len(gallery)
    targets = targets.to(device)
    excluded = torch.full_like(targets, -1) if excluded is None else excluded.to(device)
    members = targets.new_empty(len(targets), 0) if members is None else members.to(device)
    relevant = targets.new_empty(len(targets), 0) if relevant is None else relevant.to(device)

    features = gallery if gallery.dim() == 3 else gallery.unsqueeze(1)
    query_step, gallery_step = _step(query, "query"), _step(features, "gallery").max()
    rows = chunk or max(1, WORKING_BYTES // (32 * size))
    columns = max(1, WORKING_BYTES // (8 * features.shape[1] * max(min(rows, len(query)), features.shape[2])))

    ranks, top, subset_ranks, relevant_ranks, subset_top = [], [], [], [], []
    for start in range(0, len(query), rows):
        part = slice(start, start + rows)
        fixed_query = _fixed_point(query[part], query_step[part].unsqueeze(1))
        scores = torch.cat(
            [
                similarity(fixed_query, _fixed_point(features[first : first + columns].to(device), gallery_step))
                for first in range(0, size, columns)
            ],
            dim=1,
        )
        _mask(scores, excluded[part])
        ranks.append(_rank_among(scores, targets[part], None))
        subset_ranks.append(_rank_among(scores, targets[part], members[part]))
        top.append(_best(scores, min(top_k, size)))
        relevant_ranks.append(_rank_all(scores, relevant[part]))
        subset_top.append(_order_members(scores, members[part]))
    return Ranking(
        torch.cat(ranks), torch.cat(top), torch.cat(subset_ranks), torch.cat(relevant_ranks), torch.cat(subset_top)
    )


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


def _rank_among(scores: Tensor, targets: Tensor, members: Tensor | None) -> Tensor:
    """Rank the target among the candidates: all columns, or those that `members` names."""
    index = torch.arange(scores.shape[1], device=scores.device).unsqueeze(0) if members is None else members
    candidates = scores if members is None else scores.gather(1, members.clamp(min=0))
    target = targets.unsqueeze(1)
    own = scores.gather(1, target.clamp(min=0))
    better = (candidates > own) | ((candidates == own) & (index < target))
    is_candidate = (index == target).any(dim=1) & (targets >= 0) & (own.squeeze(1) > -math.inf)
    return torch.where(is_candidate, (better & (index >= 0)).sum(dim=1), -1)


def _rank_all(scores: Tensor, relevant: Tensor) -> Tensor:
    columns = [_rank_among(scores, column, None) for column in relevant.unbind(1)]
    return torch.stack(columns, dim=1) if columns else relevant


def _order_members(scores: Tensor, members: Tensor) -> Tensor:
    members = members.sort(dim=1).values  # the stable sort by score then breaks ties by gallery index
    own = scores.gather(1, members.clamp(min=0)).masked_fill(members < 0, -math.inf)
    best, order = own.sort(dim=1, descending=True, stable=True)
    return members.gather(1, order).masked_fill(best == -math.inf, -1)


def _best(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the k best columns per row; of equal scores the first, which `topk` does not promise."""
    if k == 0:
        return torch.empty(len(scores), 0, dtype=torch.int64, device=scores.device)
    least = scores.topk(k, dim=1).values[:, -1:]
    above, equal = scores > least, scores == least
    chosen = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
    columns = chosen.nonzero()[:, 1].reshape(len(scores), k)
    best, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, order).masked_fill(best == -math.inf, -1)


def _mask(scores: Tensor, excluded: Tensor) -> None:
    rows = (excluded >= 0).nonzero().squeeze(1)
    scores[rows, excluded[rows]] = -math.inf


def _step(features: Tensor, name: str) -> Tensor:
    """Return, per row, the power of two under which its feature vectors, counted in steps, are shorter than 2^26."""
    norms = torch.linalg.vector_norm(features, dim=-1, dtype=torch.promote_types(features.dtype, torch.float32))
    finite = norms.isfinite()
    if not finite.all():
        bad = (~finite).reshape(len(features), -1).any(dim=1).nonzero().squeeze(1)
        raise ValueError(
            f"{len(bad):,} of {len(features):,} {name} features are not finite (first: number {int(bad[0])}); "
            f"the model has diverged, or its half precision overflows: evaluate an earlier checkpoint or use float32."
        )
    # Unit vectors differ from 1 in the last bits, by device and thread count; a hair more puts all on one side.
    _, exponent = torch.frexp(norms.reshape(len(features), -1).amax(dim=1).double() * (1 + 1e-5))
    return torch.ldexp(norms.new_ones((), dtype=torch.float64), exponent - FIXED_POINT_BITS)


def _fixed_point(features: Tensor, step: Tensor) -> Tensor:
    return (features.double() / step).round_()


def _check(
    query: Tensor,
    gallery: Tensor,
    targets: Tensor,
    excluded: Tensor | None,
    members: Tensor | None,
    relevant: Tensor | None,
    top_k: int,
    chunk: int | None,
) -> None:
    if query.dim() != 2 or gallery.dim() not in (2, 3) or query.shape[-1] != gallery.shape[-1]:
        raise ValueError(
            f"query must be (Q, D) and gallery (G, D) or (G, K, D), got {tuple(query.shape)} "
            f"and {tuple(gallery.shape)}."
        )
    if 0 in query.shape or 0 in gallery.shape:
        raise ValueError(f"nothing to rank: query {tuple(query.shape)}, gallery {tuple(gallery.shape)}.")
    if top_k < 0 or (chunk is not None and chunk < 1):
        raise ValueError(f"top_k must be at least 0 and chunk at least 1, got {top_k} and {chunk}.")
    named = (("targets", targets, 1), ("excluded", excluded, 1), ("members", members, 2), ("relevant", relevant, 2))
    for name, indices, dim in named:
        if indices is None:
            continue
        if indices.dim() != dim or len(indices) != len(query):
            raise ValueError(f"{name} must have {dim} dimension(s) and {len(query)} rows, got {tuple(indices.shape)}.")
        if indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < len(gallery):
            raise ValueError(
                f"{name} must be -1 or gallery indices under {len(gallery)}, "
                f"got {int(indices.min())} to {int(indices.max())}."
            )
