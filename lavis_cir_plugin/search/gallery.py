"""The best rows of a gallery for one query: exactly, or exactly among candidates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_cir_plugin.ranking.ranks import rerank
from lavis_cir_plugin.ranking.scoring import Scores, memory_slices
from lavis_cir_plugin.search.candidates import Candidates

MOSTLY_ALLOWED = 0.25
"""From this share of allowed rows on, all rows are scanned and the others masked, which reads the file in order."""

FEW_ALLOWED = 200_000
"""Up to so many allowed feature vectors are scanned exactly, though there are candidates, who may miss most of few."""

SAMPLE = 2048
"""Rows that stand for all where the share of rows below a score is estimated."""

_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Best:
    """The best rows of a query, best first; equal scores in order of rows.

    Attributes:
        scores: float64, cosines.
        rows: int64.
        is_exact: Whether no better row can have been missed.
        total: How many rows there were to choose from.
    """

    scores: np.ndarray[Any, Any]
    rows: np.ndarray[Any, Any]
    is_exact: bool
    total: int


class Gallery:
    """Features of all rows.

    Args:
        features: ``(G, K, D)`` unit vectors in half precision, mapped from a file or on a GPU.
        longest: Length of the longest one.
        live: Sorted rows that pictures have; ``None`` where all have.
        candidates: Where the best are looked for first, in place of everywhere.
    """

    def __init__(
        self,
        features: Tensor,
        longest: float,
        live: np.ndarray[Any, Any] | None = None,
        candidates: Candidates | None = None,
    ) -> None:
        self.features, self.longest, self.live, self.candidates = features, longest, live, candidates

    def best(
        self, query: Tensor, count: int, allowed: np.ndarray[Any, Any] | None = None, must_be_exact: bool = False
    ) -> Best:
        """Return up to ``count`` best rows, fewer only where fewer are allowed.

        Args:
            query: ``(D,)`` of unit length.
            count: At least 1.
            allowed: Sorted rows to choose from; ``None`` for all that pictures have.
            must_be_exact: Whether to scan all rows though there are candidates.

        Raises:
            ValueError: the query is of another width or not finite.
        """
        if query.dim() != 1 or query.shape[0] != self.features.shape[-1]:
            raise ValueError(f"the query has shape {tuple(query.shape)}, the index takes ({self.features.shape[-1]},).")
        query = query.unsqueeze(0).to(self.features.device)
        allowed = self.live if allowed is None else allowed
        total = len(self.features) if allowed is None else len(allowed)
        if not total:
            return Best(np.empty(0), np.empty(0, np.int64), True, 0)
        chosen = None
        is_small = total * self.features.shape[1] <= FEW_ALLOWED or total <= 4 * count
        if self.candidates is not None and not must_be_exact and not is_small:
            chosen = self._candidates(query, count, allowed)
        is_exact = chosen is None
        if chosen is None:
            chosen = self._contenders(query, min(count, total), allowed)
        return Best(*self._ordered(query, chosen, min(count, len(chosen))), is_exact, total)

    def share_below(self, query: Tensor, scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Estimate which share of all rows scores less than each score, from `SAMPLE` rows or from all if fewer."""
        sampled = self._rough(query.unsqueeze(0).to(self.features.device), self._sample)[0]
        ordered = np.sort(sampled)
        # A row's own rough score may lie under its exact one by an error of the last bits.
        return np.searchsorted(ordered, scores - 1e-5, side="left") / len(ordered)

    @property
    def is_sampled(self) -> bool:
        """Whether shares are estimates."""
        return len(self.features) > SAMPLE

    @cached_property
    def _sample(self) -> Tensor:
        rows = np.arange(len(self.features)) if self.live is None else self.live
        if len(rows) > SAMPLE:
            rows = rows[np.linspace(0, len(rows) - 1, SAMPLE).astype(np.int64)]
        return self.features[torch.from_numpy(rows).to(self.features.device)].clone()

    def _candidates(
        self, query: Tensor, count: int, allowed: np.ndarray[Any, Any] | None
    ) -> np.ndarray[Any, Any] | None:
        assert self.candidates is not None
        covered = self.candidates.rows
        if allowed is not None and not (allowed < covered).any():
            return None
        found = self.candidates.find(query[0], count, allowed)
        if found is None:
            return None
        newer = np.arange(covered, len(self.features)) if allowed is None else allowed[allowed >= covered]
        both: np.ndarray[Any, Any] = np.concatenate([found, newer])
        return both

    def _contenders(self, query: Tensor, count: int, allowed: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
        """Return all rows that may be among the best ``count``, by scores of single precision with their bound."""
        if allowed is None or len(allowed) > MOSTLY_ALLOWED * len(self.features):
            rough = self._rough(query, self.features)[0]
            rows = np.arange(len(rough)) if allowed is None else allowed
            rough = rough if allowed is None else rough[allowed]
        else:
            rows = allowed
            parts = memory_slices(len(rows), _BLOCK_BYTES, 4 * self.features[0].numel())
            rough = np.concatenate([self._rough(query, self._taken(rows[part]))[0] for part in parts])
        bound = float(Scores(query, self.features[:1], self.longest).bound[0, 0]) * self._unit(query)
        least = np.partition(rough, len(rough) - count)[len(rough) - count]
        contenders: np.ndarray[Any, Any] = rows[rough >= least - 2 * bound - 1e-12]
        return contenders

    def _ordered(
        self, query: Tensor, rows: np.ndarray[Any, Any], count: int
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        columns = torch.from_numpy(rows).to(query.device).unsqueeze(0)
        scores, best = rerank(query, self.features, columns, count, longest=self.longest)
        return scores[0].cpu().numpy(), best[0].cpu().numpy()

    def _rough(self, query: Tensor, features: Tensor) -> np.ndarray[Any, Any]:
        """Return scores ``(1, n)`` of single precision."""
        scores = Scores(query, features, self.longest)
        every = torch.zeros(1, dtype=torch.int64, device=query.device)
        return (scores.approximate(every).double() * scores.unit).cpu().numpy()

    def _unit(self, query: Tensor) -> float:
        return float(Scores(query, self.features[:1], self.longest).unit[0, 0])

    def _taken(self, rows: np.ndarray[Any, Any]) -> Tensor:
        return self.features[torch.from_numpy(rows).to(self.features.device)]
