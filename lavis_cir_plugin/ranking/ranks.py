"""Rank a gallery for composed queries exactly, reproducibly and in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin.ranking import scoring
from lavis_cir_plugin.ranking.scoring import Scores

QUERIES_AT_ONCE = 512
"""Enough queries for matrix products at full speed, and few enough for the product to stay in a processor's cache."""

SPARE = 64
"""Number of candidates beyond the best k that the fast scores may be unable to separate from the k-th best."""

DENSE = 32
"""If more than one in `DENSE` images is too close to a labelled one, all exact scores of the query are computed."""

_INDEX_TYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Ranking:
    """Result of ranking a gallery for Q queries.

    Attributes:
        ranks: ``(Q,)`` int64, 0-based rank of the target; -1 if a query has none or it is not among the candidates.
        top: ``(Q, k)`` int64, gallery indices, best first, without the excluded image; -1 pads short rankings.
        subset_ranks: ``(Q,)`` int64, 0-based rank of the target among the query's members; -1 if it is not a member.
        relevant_ranks: ``(Q, T)`` int64, 0-based rank of every labelled image; -1 as in `ranks`, and as padding.
        subset_top: ``(Q, M)`` int64, members of the query, best first, without the excluded image; -1 pads.
    """

    ranks: Tensor
    top: Tensor
    subset_ranks: Tensor
    relevant_ranks: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    subset_top: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))


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
    r"""Rank the gallery for every query. Equal scores are ordered by gallery index.

    .. math:: \mathrm{rank}(t) = |\{j : s_j > s_t\}| + |\{j < t : s_j = s_t\}|

    The function ranks by the exact scores of `Scores`. Equal features tie, and no result depends on `chunk`, on other
    queries, on the device or on the number of threads. A float32 product with an error bound decides most pairs. Exact
    scores are computed only for the pairs that it leaves undecided. If these are many (a collapsed model, whose
    features are nearly equal), exact scores are computed for the whole gallery.

    Memory is O(chunk x G + Q x (T + M)) for any number K of features per image. The gallery is read in blocks.

    Args:
        query: Features ``(Q, D)``.
        gallery: Features ``(G, K, D)`` or ``(G, D)`` on any device; blocks are moved to the query's device.
        targets: ``(Q,)`` gallery index of the target, -1 for none. All indices may have any type of whole numbers.
        excluded: ``(Q,)`` gallery index that the query's ranking leaves out (its reference), -1 for none.
        members: ``(Q, M)`` distinct gallery indices of the query's image set, padded with -1.
        relevant: ``(Q, T)`` gallery indices of the query's labelled images, padded with -1.
        top_k: Number of best images to return (fewer if the gallery is smaller); 0 returns ranks alone.
        chunk: Number of queries per block; the default is as many as `WORKING_BYTES` allows.

    Returns:
        The ranking on the device of `query`.

    Raises:
        ValueError: If shapes do not fit, an index is outside the gallery, or a feature is not finite.

    Examples:
        Pictures 1 and 2 score the same, so the gallery's order decides. Without its reference, picture 0, the query
        finds its target, picture 2, one rank earlier.

        >>> query, target = torch.tensor([[1.0, 0.0]]), torch.tensor([2])
        >>> gallery = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
        >>> rank(query, gallery, target).ranks
        tensor([2])
        >>> without = rank(query, gallery, target, excluded=torch.tensor([0]), top_k=2)
        >>> without.ranks, without.top
        (tensor([1]), tensor([[1, 2]]))
    """
    _check(query, gallery, targets, excluded, members, relevant, top_k, chunk)
    targets = targets.to(query.device, torch.int64)
    none = targets.new_empty(len(targets), 0)
    excluded = torch.full_like(targets, -1) if excluded is None else excluded.to(targets)
    members = none if members is None else members.to(targets)
    labels = torch.cat([targets.unsqueeze(1), none if relevant is None else relevant.to(targets)], dim=1)

    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        scores = Scores(query, gallery)
        top_k = min(top_k, scores.size)
        all_rows = torch.arange(len(query), device=query.device)
        labels = labels.masked_fill(labels == excluded.unsqueeze(1), -1)
        own = _exact_scores_at(scores, labels, math.inf)
        ranks, member_scores = torch.full_like(labels, -1), torch.empty_like(members, dtype=torch.float32)
        top = targets.new_full((len(targets), top_k), -1)
        is_open = torch.zeros_like(targets, dtype=torch.bool)
        for rows in all_rows.split(chunk or _queries_at_once(scores.size, top_k)):
            approximate = _exclude(scores.approximate(rows), excluded[rows])
            member_scores[rows] = _scores_at(approximate, members[rows])
            ranks[rows], open_ranks = _fast_ranks(scores, rows, labels[rows], own[rows], approximate)
            top[rows], open_top = _fast_top(scores, rows, top_k, approximate)
            is_open[rows] = open_ranks | open_top
        subset_top = torch.full_like(members, -1)
        for rows in all_rows.split(max(1, scoring.WORKING_BYTES // (8 * max(1, members.shape[1])))):
            subset_top[rows] = _sorted_by_exact_score(scores, rows, members[rows], member_scores[rows])
        for rows in _batches_of_true(is_open, _exact_at_once(scores.size)):
            exact = _exclude(scores.exact(rows), excluded[rows])
            ranks[rows] = _exact_ranks(exact, labels[rows])
            top[rows] = _exact_top(exact, top_k)
    return Ranking(ranks[:, 0], top, _position_of_target(subset_top, targets), ranks[:, 1:], subset_top)


def rerank(
    query: Tensor, gallery: Tensor, candidates: Tensor, k: int, *, longest: float | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return the best k of the given candidates by the scores and the tie rule of `rank`.

    Args:
        query: Features ``(Q, D)``.
        gallery: Features ``(G, K, D)`` or ``(G, D)``. Only the candidates are read.
        candidates: ``(Q, C)`` gallery indices, distinct in each row except for -1.
        k: Number of images to return, at most C.
        longest: Length of the longest gallery feature if it is known.

    Returns:
        Scores ``(Q, k)``, float64 (:math:`q^\top v`, exact except that features are rounded to fixed point), and
        gallery indices ``(Q, k)``, best first. If there are fewer candidates, -inf and -1 pad.

    Raises:
        ValueError: If a query is not finite.

    Examples:
        >>> query, gallery = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
        >>> scores, best = rerank(query, gallery, torch.tensor([[2, 0, -1]]), k=3)
        >>> scores, best
        (tensor([[0.5000, 0.0000,   -inf]], dtype=torch.float64), tensor([[ 2,  0, -1]]))
    """
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        scores = Scores(query, gallery, longest)
        columns = candidates.sort(dim=1).values  # so a stable sort by score orders equal scores by index
        exact = _exact_scores_at(scores, columns, -math.inf)
        best, order = exact.sort(dim=1, descending=True, stable=True)
        top = columns.gather(1, order[:, :k]).masked_fill_(best[:, :k] == -math.inf, -1)
        return best[:, :k] * scores.unit, top


def padded(rows: Iterable[Sequence[int]], width: int = 0) -> Tensor:
    """Return rows of different lengths as one int64 tensor, padded with -1 to the longest row or to ``width``.

    Examples:
        >>> padded([[5], [7, 8]])
        tensor([[ 5, -1],
                [ 7,  8]])
    """
    rows = list(rows)
    width = max([width, *map(len, rows)])
    filled = [[*row, *[-1] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64).reshape(len(rows), width)


def _queries_at_once(size: int, top_k: int) -> int:
    return max(1, min(QUERIES_AT_ONCE, scoring.WORKING_BYTES // max(4 * size, 8 * (top_k + SPARE))))


def _exact_at_once(size: int) -> int:
    return max(1, scoring.WORKING_BYTES // (8 * size))


def _near_at_once(size: int) -> int:
    return max(1, scoring.CACHE_BYTES // (4 * size))


def _batches_of_true(flags: Tensor, at_once: int) -> tuple[Tensor, ...]:
    """Return the indices of the true entries of a vector in batches of at most `at_once`."""
    places = flags.nonzero().squeeze(1)
    return places.split(at_once) if len(places) else ()


def _sparse_places(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns of the few true entries, faster than `nonzero`: it reads eight entries as one integer."""
    flat = F.pad(flags.flatten(), (0, -flags.numel() % 8))
    places = flat.view(torch.int64).nonzero() * 8 + torch.arange(8, device=flags.device)
    places = places[flat[places]]
    return places // flags.shape[1], places % flags.shape[1]


def _exclude(scores: Tensor, excluded: Tensor) -> Tensor:
    rows = (excluded >= 0).nonzero().squeeze(1)
    scores[rows, excluded[rows]] = -math.inf
    return scores


def _scores_at(scores: Tensor, columns: Tensor) -> Tensor:
    """Return the scores in the given columns of each row, and -inf for column -1."""
    return scores.gather(1, columns.clamp(min=0)).masked_fill_(columns < 0, -math.inf)


def _exact_scores_at(scores: Scores, columns: Tensor, missing: float) -> Tensor:
    """Return the exact scores in the given columns of each query, and ``missing`` for column -1."""
    exact = torch.full(columns.shape, missing, dtype=torch.float64, device=scores.device)
    row, place = (columns >= 0).nonzero(as_tuple=True)
    exact[row, place] = scores.exact_pairs(row, columns[row, place])
    return exact


def _fast_ranks(
    scores: Scores, rows: Tensor, labels: Tensor, exact: Tensor, approximate: Tensor
) -> tuple[Tensor, Tensor]:
    """Rank labelled images by counting the images with better scores.

    Args:
        scores: Scores of all queries.
        rows: ``(n,)`` indices of the queries to rank.
        labels: ``(n, T)`` gallery indices, padded with -1.
        exact: ``(n, T)`` exact scores of the labelled images.
        approximate: ``(n, G)`` all approximate scores, -inf for excluded images.

    Returns:
        The ranks ``(n, T)``, and ``(n,)`` bool: whether the ranks of a query stay undecided.
    """
    ranks, open_rows = torch.full_like(labels, -1), torch.zeros_like(rows, dtype=torch.bool)
    flags = torch.empty_like(approximate)  # 0 or 1, because the sum of floats is the fastest count
    bound = scores.bound[rows].squeeze(1)
    for column in range(labels.shape[1]):
        label, own = labels[:, column], exact[:, column]
        low, high = (own - bound).float().unsqueeze(1), (own + bound).float().unsqueeze(1)
        better = torch.gt(approximate, high, out=flags).sum(dim=1).long()
        near = torch.ge(approximate, low, out=flags).sum(dim=1).long() - better  # includes the labelled image itself
        is_open = near > 1 + scores.size // DENSE
        for batch in _batches_of_true(~is_open & (near > 1), _near_at_once(scores.size)):
            values = approximate[batch]
            row, candidate = _sparse_places((values >= low[batch]) & (values <= high[batch]))
            row = batch[row]
            other = scores.exact_pairs(rows[row], candidate)
            before = (other > own[row]) | ((other == own[row]) & (candidate < label[row]))
            better.index_add_(0, row, before.long())
        ranks[:, column] = torch.where(label >= 0, better, -1)
        open_rows |= is_open
    return ranks, open_rows


def _fast_top(scores: Scores, rows: Tensor, k: int, approximate: Tensor) -> tuple[Tensor, Tensor]:
    """Return the k best columns per row (-1 for excluded ones), and per row whether they stay undecided."""
    if k == 0:
        return rows.new_empty(len(rows), 0), torch.zeros_like(rows, dtype=torch.bool)
    values, columns = approximate.topk(min(k + SPARE, scores.size), dim=1)
    least = values[:, k - 1 : k].double() - 2 * scores.bound[rows]
    possible = values >= least
    is_open = possible[:, -1] if columns.shape[1] < scores.size else torch.zeros_like(rows, dtype=torch.bool)
    values = values.masked_fill_(~possible | is_open.unsqueeze(1), -math.inf)
    return _sorted_by_exact_score(scores, rows, columns, values)[:, :k], is_open


def _sorted_by_exact_score(scores: Scores, rows: Tensor, columns: Tensor, approximate: Tensor) -> Tensor:
    """Sort each row's columns by exact score and then by index, and compute few exact scores.

    Two approximate scores that differ by more than twice their bound are in the right order. So exact scores are
    computed only for columns with a closer neighbour.

    Args:
        scores: Scores of all queries.
        rows: ``(n,)`` indices of the queries.
        columns: ``(n, C)`` gallery indices, distinct in each row except for -1.
        approximate: ``(n, C)`` approximate scores of the columns; -inf removes a column.

    Returns:
        The columns ``(n, C)``, best first and padded with -1.
    """
    values, order = approximate.double().sort(dim=1, descending=True)
    columns = columns.gather(1, order).masked_fill_(values == -math.inf, -1)
    close = values[:, :-1] - values[:, 1:] <= 2 * scores.bound[rows]  # False between two -inf
    inexact = close.any(dim=1).nonzero().squeeze(1)
    values, close, found = values[inexact], close[inexact], columns[inexact]
    row, place = (F.pad(close, (1, 0)) | F.pad(close, (0, 1))).nonzero(as_tuple=True)
    values[row, place] = scores.exact_pairs(rows[inexact[row]], found[row, place])
    found, order = found.sort(dim=1)
    _, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns[inexact] = found.gather(1, order)
    return columns


def _exact_ranks(exact: Tensor, labels: Tensor) -> Tensor:
    """Rank labelled images ``(n, T)`` among all columns of the exact scores ``(n, G)``; return -1 for label -1.

    Most labels are padding, and one row of scores fits into a processor's cache, so each label is counted by itself.
    """
    ranks = torch.full_like(labels, -1)
    for row, place in (labels >= 0).nonzero().tolist():
        scores, label = exact[row], labels[row, place]
        own = scores[label]
        ranks[row, place] = torch.count_nonzero(scores > own) + torch.count_nonzero(scores[:label] == own)
    return ranks


def _exact_top(exact: Tensor, k: int) -> Tensor:
    """Return the indices of the k best columns per row, lowest index first among ties, unlike `topk`."""
    if k == 0:
        return torch.empty(len(exact), 0, dtype=torch.int64, device=exact.device)
    least = exact.topk(k, dim=1).values[:, -1:]
    above, equal = exact > least, exact == least
    chosen = above | (equal & (equal.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)))
    columns = chosen.nonzero()[:, 1].reshape(len(exact), k)
    best, order = exact.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, order).masked_fill_(best == -math.inf, -1)


def _position_of_target(order: Tensor, targets: Tensor) -> Tensor:
    """Return the position of the target in each row, or -1 if the row does not hold it."""
    found = (order == targets.unsqueeze(1)) & (targets.unsqueeze(1) >= 0)
    return torch.where(found.any(dim=1), found.long().argmax(dim=1), -1) if order.shape[1] else targets * 0 - 1


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
    if not isinstance(query, Tensor) or not isinstance(gallery, Tensor):
        kinds = f"{type(query).__name__} and {type(gallery).__name__}"
        raise ValueError(f"query and gallery must be tensors, got {kinds}; torch.as_tensor makes them of arrays.")
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
        if not isinstance(indices, Tensor) or indices.dtype not in _INDEX_TYPES:
            kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise ValueError(f"{name} must be a tensor of gallery indices, such as torch.tensor([0, -1]), got {kind}.")
        if indices.dim() != dim or len(indices) != len(query):
            raise ValueError(f"{name} must have {dim} dimension(s) and {len(query)} rows, got {tuple(indices.shape)}.")
        if indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < len(gallery):
            raise ValueError(
                f"{name} must be -1 or gallery indices under {len(gallery)}, "
                f"got {int(indices.min())} to {int(indices.max())}."
            )
