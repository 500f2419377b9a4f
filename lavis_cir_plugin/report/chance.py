"""Compute the scores of a random ranking."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch

from lavis_cir_plugin.benchmarks.types import Benchmark, Group, Query
from lavis_cir_plugin.ranking.ranks import Ranking, padded

_MOST_ROWS = 2**20  # of a ranking in which each rank occurs equally often
RANDOM_QUERIES = 20_000  # random rankings in total; their mean is within a few hundredths of its value


def expected_random(benchmark: Benchmark) -> dict[str, float]:
    r"""Return the expected metrics of a uniformly random ranking, in percent.

    .. math:: \mathbb{E}[\mathrm{R@}K] = 100 \cdot \min(K, n) / n

    for a target among :math:`n` candidates. These are the gallery, without the reference if the group removes it, or
    the members of the image set for ``R_subset@K``. The code does not repeat this formula for each metric. A recall is
    an average over queries, so its expectation depends only on how often each rank occurs, and a random ranking gives
    every rank 0 to n-1 equally often. Therefore ``benchmark.metrics`` returns the expectation itself for a
    :class:`Ranking` in which each rank occurs equally often: for any K, and for any sum or mean of recalls over groups.

    A metric of several labelled images (mAP, soft labels) depends on their joint ranks and on those of the members. If
    a query has such labels, the value is the mean over rankings that are drawn with a fixed seed, `RANDOM_QUERIES`
    queries in total. So it is where equally often would take too many ranks, in a large gallery with many members.

    Queries of a group with different :math:`n` are weighted by their number. If a query's target is unknown, removed or
    not in the gallery, its rank is -1. ``top`` is empty.
    """
    if any(query.relevance for group in benchmark.groups for query in group.queries):
        return _mean_of_random_rankings(benchmark)
    chances = {group.name: sorted(_candidates(group)) or [(0, 0)] for group in benchmark.groups}
    if any(
        members and _rows(found, members) > _MOST_ROWS for pairs in chances.values() for found, members in set(pairs)
    ):
        return _mean_of_random_rankings(benchmark)
    # Usually all queries of a group have the same chances, so the cuts are 0 and 1 and metrics is called once.
    cuts = {Fraction(1)}
    for pairs in chances.values():
        cuts |= {Fraction(i, len(pairs)) for i in range(len(pairs)) if i == 0 or pairs[i] != pairs[i - 1]}
    edges = sorted(cuts)
    expected: defaultdict[str, float] = defaultdict(float)
    for low, high in zip(edges, edges[1:]):
        rankings = {name: _uniform_ranking(*pairs[int(low * len(pairs))]) for name, pairs in chances.items()}
        for metric, percent in benchmark.metrics(rankings).items():
            expected[metric] += float(high - low) * percent
    return dict(expected)


def _mean_of_random_rankings(benchmark: Benchmark) -> dict[str, float]:
    rng = random.Random(0)
    known = [
        (group, {name: number for number, name in enumerate(group.gallery)}, _candidates(group))
        for group in benchmark.groups
    ]
    rounds = [
        benchmark.metrics(
            {group.name: _random_ranking(group, gallery, candidates, rng) for group, gallery, candidates in known}
        )
        for _ in range(math.ceil(RANDOM_QUERIES / sum(len(group.queries) for group in benchmark.groups)))
    ]
    return {metric: sum(values[metric] for values in rounds) / len(rounds) for metric in rounds[0]}


def _random_ranking(
    group: Group, gallery: Mapping[str, int], candidates: Sequence[tuple[int, int]], rng: random.Random
) -> Ranking:
    """Draw distinct ranks for the labelled images, the target and the members of each query."""
    ranks, subset_ranks, relevant_ranks, subset_top = [], [], [], []
    for query, (found, members) in zip(group.queries, candidates):
        removed = {query.reference} if group.reference_removed else set()
        drawn = dict.fromkeys([*(name for name, _ in query.relevance), query.target or "", *query.members])
        ranked = [name for name in drawn if name in gallery and name not in removed]
        rank_of = dict(zip(ranked, rng.sample(range(len(gallery) - len(removed & gallery.keys())), len(ranked))))
        best = sorted((name for name in query.members if name in rank_of), key=rank_of.__getitem__)
        ranks.append(rank_of.get(query.target or "", -1) if found else -1)
        subset_ranks.append(best.index(str(query.target)) if members else -1)
        subset_top.append([gallery[name] for name in best])
        relevant_ranks.append([rank_of.get(name, -1) for name, _ in query.relevance])
    return Ranking(
        ranks=torch.tensor(ranks),
        top=torch.empty(len(ranks), 0, dtype=torch.int64),
        subset_ranks=torch.tensor(subset_ranks),
        relevant_ranks=padded(relevant_ranks),
        subset_top=padded(subset_top),
    )


def _candidates(group: Group) -> list[tuple[int, int]]:
    """Return per query the numbers of gallery images and of members among which its target is ranked, 0 for none."""
    gallery = set(group.gallery)

    def among(query: Query) -> tuple[int, int]:
        removed = {query.reference} if group.reference_removed else set()
        found = query.target in gallery and query.target not in removed
        members = gallery.intersection(query.members) - removed
        return found * (len(gallery) - len(removed & gallery)), (query.target in members) * len(members)

    return [among(query) for query in group.queries]


def _rows(candidates: int, members: int) -> int:
    """Return the least number of rows in which ranks and subset ranks can both occur equally often."""
    return math.lcm(candidates or 1, members or 1)


def _uniform_ranking(candidates: int, members: int) -> Ranking:
    """Return a ranking with equally frequent ranks below candidates and subset ranks below members; 0 makes all -1."""
    order = torch.arange(_rows(candidates, members))
    missing = torch.full_like(order, -1)
    return Ranking(
        ranks=order % candidates if candidates else missing,
        top=order.new_empty((len(order), 0)),
        subset_ranks=order % members if members else missing,
    )
