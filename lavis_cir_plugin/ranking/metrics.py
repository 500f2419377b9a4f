"""Compute recall and mean average precision from ranks.

Ranks are a tensor or plain lists. Both give the same result to the last bit, because integers are counted and sums are
rounded once (`math.fsum`), in whatever order. So ranks in a file can be scored without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, Union

if TYPE_CHECKING:
    from torch import Tensor

Ranks = Union["Tensor", Sequence[int]]
"""Ranks ``(Q,)``, one per query."""

LabelledRanks = Union["Tensor", Sequence[Sequence[int]]]
"""Ranks ``(Q, T)``, one per labelled image of each query. Lists may differ in length."""


class HasRanks(Protocol):
    """What metrics read: a `Ranking`, or the ranks from a file."""

    @property
    def ranks(self) -> Ranks:
        """Return ``(Q,)``: the 0-based rank of each target, or -1 for none."""

    @property
    def subset_ranks(self) -> Ranks:
        """Return ``(Q,)``: the 0-based rank of each target among the query's members, or -1 for none."""

    @property
    def relevant_ranks(self) -> LabelledRanks:
        """Return ``(Q, T)``: the 0-based rank of every labelled image; -1 pads."""


def as_lists(values: Any) -> Any:
    """Return the numbers of a tensor as lists, and lists unchanged."""
    return values.tolist() if hasattr(values, "tolist") else values


def recall_at(ranks: Ranks, k: int) -> float:
    """Compute Recall@K in percent: the share of queries whose target is among the first K images.

    Args:
        ranks: ``(Q,)`` 0-based; -1 (target not in the gallery) counts as a miss.
        k: Number K of images, at least 1.

    Raises:
        ValueError: If there is no query, or k is below 1.

    Examples:
        Four queries; the target of one is not in the gallery.

        >>> recall_at([0, 12, 9, -1], 10)
        50.0
    """
    _check_cutoff(k)
    if len(ranks) == 0:
        raise ValueError("recall of zero queries is undefined; the split or group holds no query.")
    found: int = sum(0 <= rank < k for rank in as_lists(ranks))
    return 100.0 * found / len(ranks)


def average_precision_at(relevant_ranks: LabelledRanks, k: int) -> float:
    r"""Compute mAP@K in percent: the mean over queries of the average precision over several labelled images.

    .. math:: \mathrm{AP@}K = \frac{1}{\min(K, |G|)} \sum_{g \in G,\; r_g < K}
              \frac{|\{h \in G : r_h \le r_g\}|}{r_g + 1}

    The divisor :math:`\min(K, |G|)` lets a query with more than K labelled images reach 100. For one labelled image at
    rank r, AP is 1 / (r + 1), or 0 if r >= K. Source: CIRCO (Baldrati et al., ICCV 2023).

    Args:
        relevant_ranks: ``(Q, T)`` 0-based, distinct within a query; -1 pads and does not count in :math:`|G|`.
        k: Number K of images, at least 1.

    Raises:
        ValueError: If there is no query, a query has no labelled image or has two at one rank, or k is below 1.

    Examples:
        Both right images are among the first three, at the ranks 0 and 2: (1/1 + 2/3) / 2.

        >>> round(average_precision_at([[0, 2]], 3), 2)
        83.33

        A second query has one of its two right images at rank 1: (1/2) / 2, and the mean of both queries.

        >>> round(average_precision_at([[0, 2], [1, 7]], 3), 2)
        54.17
    """
    _check_cutoff(k)
    if len(relevant_ranks) == 0:
        raise ValueError("average precision of zero queries is undefined; the split or group holds no query.")
    rows = [sorted(rank for rank in row if rank >= 0) for row in as_lists(relevant_ranks)]
    if not all(rows):
        raise ValueError(
            f"average precision is undefined for {rows.count([]):,} of {len(rows):,} queries: they have no "
            f"labelled image in the gallery."
        )
    repeated = sum(len(set(row)) < len(row) for row in rows)
    if repeated:
        raise ValueError(
            f"{repeated:,} of {len(rows):,} queries have two labelled images at one rank; give each image once, by its "
            "place in the query's ranking."
        )
    precisions = (
        math.fsum(hits / (rank + 1) for hits, rank in enumerate(row, start=1) if rank < k) / min(k, len(row))
        for row in rows
    )
    return 100.0 * (math.fsum(precisions) / len(rows))


def _check_cutoff(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be a number of images, at least 1, got {k}.")
