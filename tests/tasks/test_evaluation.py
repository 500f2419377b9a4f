"""An evaluation applies a group's rules to encoded rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from lavis_cir_plugin.benchmarks.types import Group, Query
from lavis_cir_plugin.tasks.evaluation import rank_queries

CPU = torch.device("cpu")
GALLERY = tuple("abcdefg")


def rank_group(whole, rows, features):
    return rank_queries(whole.queries, rows, features, whole, CPU)


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(2)
    return F.normalize(torch.randn(len(GALLERY), 3, 5, generator=generator), dim=-1)


def group(*queries, reference_removed=False):
    return Group("g", GALLERY, queries, reference_removed)


def naive_rank(query, features, target, candidates):
    """Count the candidates whose best token beats the target's, one by one."""
    score = {name: max(float(query @ token) for token in features[GALLERY.index(name)]) for name in candidates}
    return sum(score[name] > score[target] for name in candidates)


def test_several_texts_are_the_normalised_mean_of_their_features(features):
    rows = F.normalize(torch.randn(3, 5, generator=torch.Generator().manual_seed(3)), dim=-1)
    both, one = Query("a", ("x and y", "y and x"), "c"), Query("b", ("z",), "d")
    ranking = rank_group(group(both, one), rows, features)
    mean = F.normalize(rows[0] + rows[1], dim=-1)
    expected = [naive_rank(mean, features, "c", GALLERY), naive_rank(rows[2], features, "d", GALLERY)]
    assert ranking.ranks.tolist() == expected
    assert ranking.subset_ranks.tolist() == [-1, -1]


def test_the_reference_is_removed_and_the_image_set_ranked_among_itself(features):
    """The group has sets of different sizes, and the reference itself would be the best answer."""
    queries = (Query("a", ("x",), "c", ("b", "c", "d", "e")), Query("b", ("y",), "g", ("f", "g")))
    rows = torch.stack([features[0, 1], features[1, 2]])
    removed = rank_group(group(*queries, reference_removed=True), rows, features)
    kept = rank_group(group(*queries), rows, features)
    for index, query in enumerate(queries):
        others = [name for name in GALLERY if name != query.reference]
        assert int(removed.ranks[index]) == naive_rank(rows[index], features, query.target, others)
        assert int(kept.ranks[index]) == naive_rank(rows[index], features, query.target, GALLERY)
        assert int(removed.subset_ranks[index]) == naive_rank(rows[index], features, query.target, query.members)
        assert GALLERY[kept.top[index, 0]] == query.reference
        assert query.reference not in [GALLERY[i] for i in removed.top[index] if i >= 0]


def test_a_query_without_a_public_target_has_no_rank(features):
    ranking = rank_group(group(Query("a", ("x",), None)), features[:1, 0], features)
    assert ranking.ranks.tolist() == [-1]
    assert ranking.top[0, 0] == 0
