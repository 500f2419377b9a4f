"""Compute recall and mean average precision from ranks.

Ranks are a tensor or plain lists, with the same result to the last bit: whole numbers are counted and sums are rounded
once (`math.fsum`), whatever the order. So ranks in a file are scored without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, Union

if TYPE_CHECKING:
    from torch import Tensor

Ranks = Union["Tensor", Sequence[int]]
"""``(Q,)``, one rank per query."""

LabelledRanks = Union["Tensor", Sequence[Sequence[int]]]
"""``(Q, T)``, one rank per labelled image of each query; lists may differ in length."""


class HasRanks(Protocol):
    """What metrics read: a `Ranking`, or the ranks that a file gives."""

    @property
    def ranks(self) -> Ranks:
        """``(Q,)``: 0-based rank of the target; -1 for none."""

    @property
    def subset_ranks(self) -> Ranks:
        """``(Q,)``: the same among the query's members."""

    @property
    def relevant_ranks(self) -> LabelledRanks:
        """``(Q, T)``: 0-based rank of every labelled image; -1 pads."""


def as_lists(values: Any) -> Any:
    """Return the numbers of a tensor as lists, and lists as they are."""
    return values.tolist() if hasattr(values, "tolist") else values


def recall_at(ranks: Ranks, k: int) -> float:
    """Compute Recall@K in percent: the share of queries whose target is among the first K.

    Args:
        ranks: ``(Q,)`` 0-based; -1 (target not in the gallery) counts as a miss.
        k: At least 1.

    Raises:
        ValueError: there is no query.
    """
    if len(ranks) == 0:
        raise ValueError("recall of zero queries is undefined; the split or group holds no query.")
    found: int = sum(0 <= rank < k for rank in as_lists(ranks))
    return 100.0 * found / len(ranks)


def average_precision_at(relevant_ranks: LabelledRanks, k: int) -> float:
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
    rows = [sorted(rank for rank in row if rank >= 0) for row in as_lists(relevant_ranks)]
    if not all(rows):
        raise ValueError(
            f"average precision is undefined for {rows.count([]):,} of {len(rows):,} queries: they have no "
            f"labelled image in the gallery."
        )
    precisions = (
        math.fsum(hits / (rank + 1) for hits, rank in enumerate(row, start=1) if rank < k) / min(k, len(row))
        for row in rows
    )
    return 100.0 * (math.fsum(precisions) / len(rows))
