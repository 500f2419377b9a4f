"""Compute what a random ranking scores."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch

from lavis_cir_plugin.benchmarks.types import Benchmark, Group, Query
from lavis_cir_plugin.ranking.ranks import Ranking, padded

RANDOM_QUERIES = 20_000  # ranked in all to find a mean: it is then known to a few hundredths of its value


def expected_random(benchmark: Benchmark) -> dict[str, float]:
    r"""Compute what a uniformly random ranking scores on average, in percent.

    .. math:: \mathbb{E}[\mathrm{R@}K] = 100 \cdot \min(K, n) / n

    for a target among :math:`n` candidates (the gallery, less the reference where the group removes it; for
    ``R_subset@K`` the members of the image set). The formula is not restated per metric: a recall is an average over
    queries, so its expectation depends only on how often every rank occurs, and a random ranking gives every rank 0 to
    n-1 equally often. Handing ``benchmark.metrics`` a :class:`Ranking` in which each rank occurs equally often
    therefore yields the expectation itself, for any K and for any sum or mean of recalls over groups.

    A metric of several labelled images (mAP, soft labels) depends on their ranks together, and on those of the members.
    Where a query has such labels, the value is the mean of rankings drawn with a fixed seed, `RANDOM_QUERIES` queries
    in all.

    Queries of a group that differ in :math:`n` are weighted by their number. A query whose target is unknown, removed
    or not in the gallery keeps rank -1. ``top`` is empty.
    """
    if any(query.relevance for group in benchmark.groups for query in group.queries):
        return _mean_of_drawn(benchmark)
    chances = {group.name: sorted(_candidates(group)) or [(0, 0)] for group in benchmark.groups}
    # Usually every query of a group has the same chances, the cuts are 0 and 1, and metrics is called once.
    cuts = {Fraction(1)}
    for pairs in chances.values():
        cuts |= {Fraction(i, len(pairs)) for i in range(len(pairs)) if i == 0 or pairs[i] != pairs[i - 1]}
    edges = sorted(cuts)
    expected: defaultdict[str, float] = defaultdict(float)
    for low, high in zip(edges, edges[1:]):
        rankings = {name: _every_rank(*pairs[int(low * len(pairs))]) for name, pairs in chances.items()}
        for metric, percent in benchmark.metrics(rankings).items():
            expected[metric] += float(high - low) * percent
    return dict(expected)


def _mean_of_drawn(benchmark: Benchmark) -> dict[str, float]:
    rng = random.Random(0)
    known = [
        (group, {name: number for number, name in enumerate(group.gallery)}, _candidates(group))
        for group in benchmark.groups
    ]
    rounds = [
        benchmark.metrics({group.name: _drawn(group, gallery, candidates, rng) for group, gallery, candidates in known})
        for _ in range(math.ceil(RANDOM_QUERIES / sum(len(group.queries) for group in benchmark.groups)))
    ]
    return {metric: sum(values[metric] for values in rounds) / len(rounds) for metric in rounds[0]}


def _drawn(
    group: Group, gallery: Mapping[str, int], candidates: Sequence[tuple[int, int]], rng: random.Random
) -> Ranking:
    """Draw different ranks for the labelled images and the members of each query, the target among them."""
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
    """Count, per query, among how many gallery images and how many members its target is ranked; 0 = never found."""
    gallery = set(group.gallery)

    def among(query: Query) -> tuple[int, int]:
        removed = {query.reference} if group.reference_removed else set()
        found = query.target in gallery and query.target not in removed
        members = gallery.intersection(query.members) - removed
        return found * (len(gallery) - len(removed & gallery)), (query.target in members) * len(members)

    return [among(query) for query in group.queries]


def _every_rank(candidates: int, members: int) -> Ranking:
    """Make a ranking with all ranks below candidates, and subset ranks below members, equally often (0: all -1)."""
    order = torch.arange(math.lcm(candidates or 1, members or 1))
    missing = torch.full_like(order, -1)
    return Ranking(
        ranks=order % candidates if candidates else missing,
        top=order.new_empty((len(order), 0)),
        subset_ranks=order % members if members else missing,
    )
