"""Paired differences of two rows with intervals: over seeds and queries, or over seeds alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student  # type: ignore[import-untyped]

DRAWS, SEED, LEVEL = 4000, 0, 95


@dataclass(frozen=True)
class Interval:
    """A mean with the limits of its interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f})"


def bootstrap(values: NDArray[np.float64], draws: int = DRAWS, level: float = LEVEL) -> Interval:
    r"""Return the mean of ``(seeds, queries)`` values, and its interval by the pigeonhole bootstrap.

    Seeds and queries are crossed: each seed's model answers the same queries. A draw takes as many seeds and as many
    queries with replacement, independently, and averages over both:

    .. math:: \bar x^* = \frac{1}{S Q} \sum_{s, q} w_s v_q x_{sq}

    with multinomial counts w and v. The limits are percentiles of the draws.

    Source: Owen, The pigeonhole bootstrap, 2007.
    """
    generator = np.random.default_rng(SEED)
    seeds, queries = values.shape
    seed_counts = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    query_counts = generator.multinomial(queries, np.full(queries, 1 / queries), size=draws)
    means = ((seed_counts @ values) * query_counts).sum(axis=1) / (seeds * queries)
    rest = (100 - level) / 2
    low, high = np.percentile(means, [rest, 100 - rest])
    return Interval(float(values.mean()), float(low), float(high))


def over_seeds(values: NDArray[np.float64], level: float = LEVEL) -> Interval:
    r"""Return the mean of n values, one per seed, and Student's interval.

    .. math:: \bar x \pm t_{n - 1} \, s / \sqrt n

    A bootstrap of so few values is too narrow: of five normal ones its 95 % interval holds the mean in 84 %.
    """
    mean, error = float(values.mean()), float(values.std(ddof=1)) / len(values) ** 0.5
    reach = float(student.ppf((1 + level / 100) / 2, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach)
