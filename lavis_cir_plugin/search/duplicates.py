"""Near-duplicates among pictures, whatever their size and compression."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

ALIKE_FEATURES = 0.98
"""Least cosine of every feature of a near-duplicate with the same feature of the other picture."""

ALIKE_LOOKS = 6
"""Levels of 255 by which the mean colours of a near-duplicate's 64 parts may differ from the other's, at most."""


class Kinds:
    """Pictures of which no two show the same.

    Two do where the model sees hardly a difference and no part of one differs in colour from that of the other. Either
    alone would not do: a model may not see what was changed, and colours do not tell small details.

    Args:
        features: ``(G, K, D)``.
        looks: ``(G, 8, 8, 3)`` uint8, as `features.look_of`.
    """

    def __init__(self, features: Tensor, looks: np.ndarray[Any, Any]) -> None:
        self.features, self.looks = features, looks
        self._rows: list[int] = []
        self._by_brightness: dict[int, list[int]] = {}

    def add(self, row: int) -> None:
        """Add a picture of a new kind; kinds count from 0."""
        self._by_brightness.setdefault(self._brightness(row), []).append(len(self._rows))
        self._rows.append(row)

    def find(self, row: int) -> int | None:
        """Return the first kind that a picture is of, if any."""
        brightness = self._brightness(row)
        # Of two pictures whose parts differ by so little, the means differ by no more.
        near = sorted(kind for step in (-1, 0, 1) for kind in self._by_brightness.get(brightness + step, ()))
        if not near:
            return None
        others = self.looks[[self._rows[kind] for kind in near]].astype(np.int16)
        differences = np.abs(others - self.looks[row]).reshape(len(near), -1).max(axis=1)
        for kind, difference in zip(near, differences):
            if difference <= ALIKE_LOOKS and self._cosine(self._rows[kind], row) >= ALIKE_FEATURES:
                return kind
        return None

    def _brightness(self, row: int) -> int:
        return int(self.looks[row].mean()) // (ALIKE_LOOKS + 1)

    def _cosine(self, one: int, other: int) -> float:
        pair = [F.normalize(self.features[row].float(), dim=-1) for row in (one, other)]
        return float((pair[0] * pair[1]).sum(dim=-1).min())
