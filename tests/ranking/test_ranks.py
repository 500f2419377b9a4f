"""Ranking agrees with naive loops and hand-derived cases, and keeps its guarantees of exactness."""

from __future__ import annotations

import math
from fractions import Fraction
from operator import mul
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies
from torch import Tensor

from lavis_cir_plugin.ranking import ranks, scoring
from lavis_cir_plugin.ranking.metrics import average_precision_at, recall_at
from lavis_cir_plugin.ranking.ranks import padded, rank
from lavis_cir_plugin.ranking.scoring import Scores, similarity


def naive_rank(scores: list[float], target: int, candidates: list[int]) -> int:
    if target not in candidates:
        return -1
    return sorted(candidates, key=lambda j: (-scores[j], j)).index(target)


def small_integers(*shape: int, seed: int = 0) -> Tensor:
    """Return features from {-1, 0, 1}, with many ties, negative scores and products exact in any arithmetic."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_similarity_takes_the_best_of_k_features():
    """q = (1, 2). Image 0: (3, 0) -> 3, (0, 1) -> 2, best 3. Image 1: (-1, 0) -> -1, (0, -1) -> -2, best -1."""
    query = torch.tensor([[1.0, 2.0]])
    gallery = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])
    assert similarity(query, gallery).tolist() == [[3.0, -1.0]]
    assert similarity(query, gallery[:, 0]).tolist() == [[3.0, -1.0]]


def test_ties_are_broken_by_gallery_index():
    """Scores 0, 1, 1, 2, 1 give the order 3, 1, 2, 4, 0. Target 2 follows 3 (better) and 1 (equal, earlier)."""
    gallery = torch.tensor([[0.0], [1.0], [1.0], [2.0], [1.0]])
    result = rank(torch.ones(1, 1), gallery, torch.tensor([2]))
    assert result.ranks.tolist() == [2]
    assert result.top.tolist() == [[3, 1, 2, 4, 0]]
    assert rank(torch.ones(1, 1), gallery, torch.tensor([2]), top_k=2).top.tolist() == [[3, 1]]


@pytest.mark.parametrize("num_features", [None, 1, 3])
@pytest.mark.parametrize("chunk", [None, 1, 4, 7])
def test_agrees_with_a_naive_double_loop(num_features: int | None, chunk: int | None):
    """The case has ties, negative scores, targets -1, excluded images, padded members and an uneven last chunk."""
    num_queries, size = 13, 23
    generator = torch.Generator().manual_seed(1)
    query = small_integers(num_queries, 4)
    gallery = small_integers(size, 4, seed=2) if num_features is None else small_integers(size, num_features, 4, seed=2)
    targets = torch.randint(-1, size, (num_queries,), generator=generator)
    excluded = torch.randint(-1, size, (num_queries,), generator=generator)
    members = torch.stack([torch.randperm(size, generator=generator)[:5] for _ in range(num_queries)])
    members[(members == targets.unsqueeze(1)) & (torch.arange(5) > 0)] = -1  # distinct
    members[:, 0] = targets
    members[::3, 4] = -1
    members[5] = -1
    relevant = torch.randint(-1, size, (num_queries, 3), generator=generator)
    labels = {"excluded": excluded, "members": members, "relevant": relevant}

    result = rank(query, gallery, targets, **labels, top_k=30, chunk=chunk)

    for q in range(num_queries):
        scores = []
        for j in range(size):
            features = gallery[j].reshape(-1, 4)
            scores.append(max(sum(float(a) * float(b) for a, b in zip(query[q], vector)) for vector in features))
        candidates = [j for j in range(size) if j != excluded[q]]
        order = sorted(candidates, key=lambda j: (-scores[j], j))
        assert result.ranks[q] == naive_rank(scores, int(targets[q]), candidates)
        assert result.top[q].tolist() == order + [-1] * (size - len(order))
        assert result.relevant_ranks[q].tolist() == [naive_rank(scores, t, candidates) for t in relevant[q].tolist()]
        subset = [j for j in order if j in members[q].tolist()]
        assert result.subset_ranks[q] == naive_rank(scores, int(targets[q]), subset)
        assert result.subset_top[q].tolist() == subset + [-1] * (5 - len(subset))
    metrics_only = rank(query, gallery, targets, **labels, top_k=0, chunk=chunk)
    assert metrics_only.top.shape == (num_queries, 0)
    assert torch.equal(metrics_only.relevant_ranks, result.relevant_ranks)


def test_queries_may_be_ranked_in_parts_even_of_very_different_lengths():
    """Each query has its own fixed-point step, so a long query in the same call makes no short one coarser."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(20, 16, generator=generator) * 10.0 ** torch.arange(-10, 10).unsqueeze(1)
    gallery, targets = torch.randn(300, 16, generator=generator), torch.arange(20)
    whole = rank(query, gallery, targets, top_k=300)
    for part in (slice(0, 10), slice(10, 20), slice(3, 4)):
        assert torch.equal(rank(query[part], gallery, targets[part], top_k=300).top, whole.top[part])


def test_one_query_and_one_image():
    result = rank(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0]))
    assert (result.ranks.tolist(), result.top.tolist(), result.subset_ranks.tolist()) == ([0], [[0]], [-1])


def test_an_excluded_target_is_a_miss():
    result = rank(torch.ones(1, 1), torch.ones(3, 1), torch.tensor([1]), excluded=torch.tensor([1]))
    assert result.ranks.tolist() == [-1]
    assert result.top.tolist() == [[0, 2, -1]]


@pytest.mark.parametrize("dim", [16, 255])
def test_equal_features_tie_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, dim: int):
    """Every second of 500 images is a copy of its predecessor, so the copy's rank is always one more.

    A float32 product sometimes gives copies different last bits, which also depend on chunk and block size.
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(61, dim, generator=generator), dim=-1)
    gallery = torch.nn.functional.normalize(torch.randn(250, 2, dim, generator=generator), dim=-1)
    gallery = gallery.repeat_interleave(2, dim=0)
    first = 2 * torch.randint(250, (61,), generator=generator)

    whole = rank(query, gallery, first)
    assert torch.equal(rank(query, gallery, first + 1).ranks, whole.ranks + 1)
    assert torch.equal(whole.top[:, 1::2], whole.top[:, ::2] + 1)

    monkeypatch.setattr(scoring, "WORKING_BYTES", 200_000)
    for chunk in (None, 7, 60):
        parts = rank(query, gallery, first, chunk=chunk)
        assert torch.equal(parts.ranks, whole.ranks)
        assert torch.equal(parts.top, whole.top)


def test_scores_that_are_equal_on_paper_tie():
    """A query of equal entries scores every permutation of a vector equally, so ranks are gallery indices.

    A float32 product sums in another order for each permutation and spreads the scores over several last bits.
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.full((3, 200), 200**-0.5)
    vector = torch.nn.functional.normalize(torch.randn(200, generator=generator), dim=-1)
    gallery = torch.stack([vector[torch.randperm(200, generator=generator)] for _ in range(40)])
    assert len((query[0] @ gallery.T).unique()) > 1
    result = rank(query, gallery, torch.tensor([0, 20, 39]), top_k=40)
    assert result.ranks.tolist() == [0, 20, 39]
    assert result.top.tolist() == [list(range(40))] * 3


def test_ranks_agree_with_exact_arithmetic():
    """Scores in double precision without rounding give equal ranks, so the fixed-point step is fine enough."""
    generator = torch.Generator().manual_seed(3)
    query = torch.nn.functional.normalize(torch.randn(40, 64, generator=generator), dim=-1)
    gallery = torch.nn.functional.normalize(torch.randn(300, 64, generator=generator), dim=-1)
    targets = torch.randint(300, (40,), generator=generator)
    scores = query.double() @ gallery.double().T
    expected = (scores > scores.gather(1, targets[:, None])).sum(dim=1)
    assert torch.equal(rank(query, gallery, targets).ranks, expected)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_ranks_do_not_depend_on_the_scale_of_the_features(scale: float):
    query, gallery, targets = small_integers(9, 8), small_integers(30, 8, seed=4), torch.arange(9)
    assert torch.equal(rank(query * scale, gallery, targets).top, rank(query, gallery, targets).top)
    assert torch.equal(rank(query, gallery * scale, targets).ranks, rank(query, gallery, targets).ranks)


def test_a_constant_added_to_one_querys_scores_changes_no_rank():
    """Appending (c) to the query and (1) to every gallery vector adds c to all scores of that query."""
    query, gallery, targets = small_integers(6, 5), small_integers(20, 5, seed=5), torch.arange(6)
    shifted = torch.cat([query, torch.full((6, 1), 3.0)], dim=1), torch.cat([gallery, torch.ones(20, 1)], dim=1)
    assert torch.equal(rank(*shifted, targets).ranks, rank(query, gallery, targets).ranks)


def test_half_precision_features_are_accepted():
    query, gallery = small_integers(3, 4), small_integers(8, 2, 4, seed=6)
    expected = rank(query, gallery, torch.arange(3)).top
    assert torch.equal(rank(query.bfloat16(), gallery.half(), torch.arange(3)).top, expected)


@pytest.mark.parametrize("collapsed", [False, True])
def test_the_working_memory_bounds_every_product(monkeypatch: pytest.MonkeyPatch, collapsed: bool):
    """20 queries x 100 images x 8 features need 64,000 bytes of float32. No product exceeds the limit of 16,384.

    Equal features leave every float32 product undecided, so all 128,000 bytes of float64 are needed as well.
    """
    sizes, features = [], []

    def spy(query: Tensor, gallery: Tensor) -> Tensor:
        sizes.append(query.element_size() * len(query) * gallery.shape[0] * gallery.shape[1])
        features.append(gallery.element_size() * gallery.numel())
        return similarity(query, gallery)

    monkeypatch.setattr(scoring, "similarity", spy)
    monkeypatch.setattr(scoring, "WORKING_BYTES", 16_384)
    gallery = torch.ones(100, 8, 4) if collapsed else torch.rand(100, 8, 4)
    rank(torch.rand(20, 4), gallery, torch.arange(20), top_k=5)
    assert sum(sizes) == (192_000 if collapsed else 64_000)
    assert max(sizes + features) <= 16_384


def exact_scores(query: Tensor, gallery: Tensor) -> list[list[int]]:
    """Compute the definition in Python's integers, in steps of 2^-26 of the power of two above the length."""

    def fixed(vector: list[float], length: float) -> list[int]:
        _, exponent = math.frexp(length * (1 + 1e-5))
        return [round(Fraction(x) * Fraction(2) ** (26 - exponent)) for x in vector]

    images = gallery.double().reshape(len(gallery), -1, gallery.shape[-1])
    longest = float(images.norm(dim=-1).max())
    vectors = [[fixed(vector, longest) for vector in image] for image in images.tolist()]
    rows = [fixed(row, float(length)) for row, length in zip(query.double().tolist(), query.double().norm(dim=1))]
    return [[max(sum(map(mul, row, vector)) for vector in image) for image in vectors] for row in rows]


def features(generator: torch.Generator, kind: str, *shape: int) -> Tensor:
    if kind == "integers":
        return torch.randint(-2, 3, shape, generator=generator).float()
    if kind == "zeros":
        return torch.zeros(shape)
    drawn = torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)
    if kind == "duplicates":
        return drawn[torch.randint(max(1, shape[0] // 3), shape[:1], generator=generator)]
    if kind == "nearly equal":  # they differ by less than a float32 product can show
        return drawn[:1] + 1e-7 * torch.randn(shape, generator=generator)
    if kind == "one long":
        drawn[0] *= 1000
    return drawn


KINDS = ["unit", "integers", "duplicates", "nearly equal", "one long", "zeros"]


@settings(max_examples=150, deadline=None)
@given(
    seed=strategies.integers(0, 2**32),
    kinds=strategies.tuples(strategies.sampled_from(KINDS), strategies.sampled_from(KINDS)),
    sizes=strategies.tuples(strategies.integers(1, 9), strategies.integers(1, 40), strategies.integers(1, 9)),
    num_features=strategies.sampled_from([None, 1, 3]),
    scale=strategies.sampled_from([1.0, 1e-30, 3e-5, 1e30]),
    half=strategies.booleans(),
    chunk=strategies.sampled_from([None, 1, 2, 5]),
    limits=strategies.tuples(
        strategies.sampled_from([0, 1, 64]), strategies.sampled_from([1, 4, 32]), strategies.sampled_from([64, 2**28])
    ),
    top_k=strategies.sampled_from([0, 1, 3, 50]),
)
def test_every_result_is_that_of_exact_arithmetic(seed, kinds, sizes, num_features, scale, half, chunk, limits, top_k):
    """The cases have ties, duplicates, collapsed features, several scales and uneven chunks.

    The limits force one of two paths for undecided pairs: single exact scores, or exact scores of the whole gallery.
    """
    generator = torch.Generator().manual_seed(seed)
    num_queries, size, width = sizes
    query = features(generator, kinds[0], num_queries, width)
    gallery = features(generator, kinds[1], size, *([] if num_features is None else [num_features]), width)
    query, gallery = (query * scale, gallery.half()) if half else (query, gallery * scale)
    columns = torch.stack([torch.randperm(size + 3, generator=generator) for _ in range(num_queries)])
    columns = columns.where(columns < size, -1)
    targets, excluded, members, relevant = columns[:, 0], columns[:, 1], columns[:, :4], columns[:, 2:5]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "SPARE", limits[0])
        patch.setattr(ranks, "DENSE", limits[1])
        patch.setattr(scoring, "WORKING_BYTES", limits[2])
        arguments = {"excluded": excluded, "members": members, "relevant": relevant, "top_k": top_k, "chunk": chunk}
        result = rank(query, gallery, targets, **arguments)

    for q, scores in enumerate(exact_scores(query, gallery)):
        candidates = [j for j in range(size) if j != excluded[q]]
        order = sorted(candidates, key=lambda j: (-scores[j], j))
        assert result.ranks[q] == naive_rank(scores, int(targets[q]), candidates)
        assert result.relevant_ranks[q].tolist() == [naive_rank(scores, t, candidates) for t in relevant[q].tolist()]
        k = min(top_k, size)
        assert result.top[q].tolist() == [*order, -1][:k]
        subset = [j for j in order if j in members[q].tolist()]
        assert result.subset_top[q].tolist() == [*subset, -1, -1, -1, -1][:4]
        assert result.subset_ranks[q] == naive_rank(scores, int(targets[q]), subset)


@pytest.mark.parametrize("width", [1, 3, 64, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds(kind: str, width: int):
    generator = torch.Generator().manual_seed(width)
    query, gallery = features(generator, kind, 30, width), features(generator, kind, 200, width)
    scores, rows = Scores(query, gallery), torch.arange(30)
    error = (scores.approximate(rows).double() - scores.exact(rows)).abs()
    assert (error <= scores.bound).all()
    true = query.double() @ gallery.double().T
    assert ((scores.exact(rows) * scores.unit - true).abs() <= scores.bound * scores.unit).all()
    columns = torch.randint(200, (30, 7), generator=generator)
    pairs = scores.exact_pairs(rows.repeat_interleave(7), columns.flatten()).view(30, 7)
    assert torch.equal(pairs, scores.exact(rows).gather(1, columns))


@pytest.mark.parametrize("kind", KINDS)
def test_exact_scores_of_pairs_are_those_of_whole_rows(kind: str):
    """Images have several features, and approximate scores cannot tell the best because some are equal or close."""
    generator = torch.Generator().manual_seed(5)
    query, gallery = features(generator, kind, 20, 16), features(generator, kind, 200, 16).view(50, 4, 16)
    gallery[:, 1] = gallery[:, 0]
    gallery[:, 2] = gallery[:, 0] * (1 + 2.0**-22)
    scores = Scores(query, gallery)
    columns = torch.randint(50, (20, 9), generator=generator)
    pairs = scores.exact_pairs(torch.arange(20).repeat_interleave(9), columns.flatten()).view(20, 9)
    assert torch.equal(pairs, scores.exact(torch.arange(20)).gather(1, columns))


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_products_in_lower_precision_change_no_rank(monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None):
    """A product of bfloat16 operands, which users can allow in torch, is wrong by 1 %, so all pairs are checked."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = features(generator, "unit", 20, 32), features(generator, "unit", 300, 32)
    expected = rank(query, gallery, torch.arange(20))

    def coarse(query: Tensor, gallery: Tensor) -> Tensor:
        if query.dtype == torch.float32:
            query, gallery = query.bfloat16().float(), gallery.bfloat16().float()
        return similarity(query, gallery)

    monkeypatch.setattr(scoring, "similarity", coarse)
    assert not torch.equal(rank(query, gallery, torch.arange(20)).top, expected.top)  # the precision does matter

    def precision() -> str:  # newer torch raises if precision was set per backend
        if error:
            raise error
        return "medium"

    monkeypatch.setattr(torch, "get_float32_matmul_precision", precision)
    result = rank(query, gallery, torch.arange(20))
    assert torch.equal(result.top, expected.top)
    assert torch.equal(result.ranks, expected.ranks)


def test_autocast_changes_no_rank():
    generator = torch.Generator().manual_seed(0)
    query, gallery = features(generator, "unit", 20, 32), features(generator, "unit", 300, 32)
    expected = rank(query, gallery, torch.arange(20)).top
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rank(query, gallery, torch.arange(20)).top, expected)


def test_a_gallery_mapped_from_a_file_ranks_like_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    query, gallery = features(generator, "unit", 20, 16), features(generator, "unit", 300, 4, 16).half()
    gallery.numpy().tofile(tmp_path / "gallery.f16")
    mapped = np.memmap(tmp_path / "gallery.f16", dtype=np.float16, mode="c", shape=(300, 4, 16))
    expected = rank(query, gallery, torch.arange(20), top_k=300)
    monkeypatch.setattr(scoring, "WORKING_BYTES", 10_000)
    result = rank(query, torch.from_numpy(mapped), torch.arange(20), top_k=300)
    assert torch.equal(result.top, expected.top)
    assert torch.equal(rank(query, gallery.float(), torch.arange(20), top_k=300).top, expected.top)


def test_recall_is_monotone_in_k_and_complete_at_gallery_size():
    result = rank(torch.rand(30, 4), torch.rand(50, 4), torch.arange(30))
    recalls = [recall_at(result.ranks, k) for k in range(1, 51)]
    assert recalls == sorted(recalls)
    assert recalls[-1] == 100.0


def test_recall_by_hand():
    """Ranks are 0, 1, 2 and missing. R@1 counts one of four, R@2 two and R@3 three; the missing one never counts."""
    ranks = torch.tensor([0, 1, 2, -1])
    assert [recall_at(ranks, k) for k in (1, 2, 3, 1000)] == [25.0, 50.0, 75.0, 75.0]


def test_recall_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="zero queries"):
        recall_at(torch.tensor([], dtype=torch.long), 1)


def test_average_precision_by_hand():
    """Ranks 0 and 2 give (1/1 + 2/3) / 2, and rank 4 alone 1/5. Of ranks 0, 1 and 2, the first two fill AP@2.

    Three images with ranks 9, 0 and 5 give AP@5 = (1/1) / 3 in any order, because 9 and 5 are beyond the first five.
    """
    assert average_precision_at(torch.tensor([[2, 0, -1], [4, -1, -1]]), 5) == pytest.approx(100 * (5 / 6 + 1 / 5) / 2)
    assert average_precision_at(torch.tensor([[0, 1, 2]]), 2) == 100.0
    assert average_precision_at(torch.tensor([[9, 0, 5]]), 5) == pytest.approx(100 / 3)
    assert average_precision_at(torch.tensor([[5]]), 5) == 0.0


def naive_average_precision(ranks: list[int], k: int) -> float:
    """Compute average precision down the list of results, as an evaluation server does."""
    relevant = {rank for rank in ranks if rank >= 0}
    hits, total = 0, 0.0
    for place in range(k):
        if place in relevant:
            hits += 1
            total += hits / (place + 1)
    return total / min(k, len(relevant))


@pytest.mark.parametrize("k", [1, 5, 10, 50])
def test_average_precision_equals_a_walk_down_the_list(k: int):
    generator = torch.Generator().manual_seed(k)
    rows = torch.stack([torch.randperm(30, generator=generator)[:14] for _ in range(40)])
    counts = torch.randint(1, 15, (40, 1), generator=generator)
    rows[torch.arange(14) >= counts] = -1
    expected = [naive_average_precision(row, k) for row in rows.tolist()]
    assert average_precision_at(rows, k) == pytest.approx(100 * sum(expected) / 40)


def test_metrics_of_lists_and_of_tensors_are_the_same_whatever_the_order_of_queries():
    """Lists from a file and padded rows of a ranking give equal values to the last bit, as sums round once."""
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randperm(60, generator=generator)[: 1 + number % 14].tolist() for number in range(220)]
    order = torch.randperm(220, generator=generator).tolist()
    for k in (1, 5, 10, 50):
        assert average_precision_at(padded(lists), k) == average_precision_at(lists, k)
        assert average_precision_at([lists[row] for row in order], k) == average_precision_at(lists, k)
        firsts = [row[0] for row in lists]
        assert recall_at(torch.tensor(firsts), k) == recall_at(firsts, k)


@pytest.mark.parametrize("ranks", [torch.empty(0, 3, dtype=torch.long), torch.tensor([[0], [-1]])])
def test_average_precision_of_nothing_is_an_error(ranks: Tensor):
    with pytest.raises(ValueError, match=r"zero queries|1 of 2 queries: they have no labelled image"):
        average_precision_at(ranks, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_are_refused(value: float):
    good, bad = torch.ones(4, 3), torch.ones(4, 3)
    bad[2:, 1] = value
    with pytest.raises(ValueError, match=r"2 of 4 query features are not finite \(first: number 2\)"):
        rank(bad, good, torch.arange(4))
    with pytest.raises(ValueError, match=r"2 of 4 gallery features are not finite \(first: number 2\)"):
        rank(good, bad.unsqueeze(1), torch.arange(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(2, 5)}, "query must be"),
        ({"query": torch.ones(2)}, "query must be"),
        ({"query": torch.ones(0, 3)}, "nothing to rank"),
        ({"gallery": torch.ones(0, 3)}, "nothing to rank"),
        ({"targets": torch.tensor([0, 4])}, "targets must be -1 or gallery indices under 4, got 0 to 4"),
        ({"targets": torch.tensor([0])}, "targets must have 1 dimension"),
        ({"excluded": torch.tensor([0, -2])}, "excluded must be -1 or gallery indices"),
        ({"members": torch.tensor([0, 1])}, "members must have 2 dimension"),
        ({"relevant": torch.tensor([[0], [7]])}, "relevant must be -1 or gallery indices under 4, got 0 to 7"),
        ({"query": [[1.0] * 3] * 2}, "must be tensors, got list and Tensor"),
        ({"targets": [0, 1]}, "targets must be a tensor of gallery indices.*got list"),
        ({"targets": torch.tensor([True, False])}, r"targets must be a tensor of gallery indices.*got torch\.bool"),
        ({"excluded": torch.tensor([0.0, 1.0])}, r"excluded must be a tensor of gallery indices.*got torch\.float32"),
        ({"top_k": -1}, "top_k must be at least 0 and chunk at least 1, got -1"),
        ({"chunk": 0}, "top_k must be at least 0 and chunk at least 1, got 50 and 0"),
    ],
)
def test_wrong_arguments_are_refused(change: dict, message: str):
    arguments = {"query": torch.ones(2, 3), "gallery": torch.ones(4, 3), "targets": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        rank(**{**arguments, **change})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_indices_of_any_whole_type_give_the_same_ranks(dtype: torch.dtype):
    query, gallery = torch.rand(4, 5), torch.rand(9, 5)
    indices = {
        "targets": torch.tensor([0, 3, 8, -1]),
        "excluded": torch.tensor([1, -1, 2, 0]),
        "members": torch.tensor([[0, 1], [3, 4], [8, -1], [2, 5]]),
        "relevant": torch.tensor([[0, 1], [3, -1], [8, 7], [2, -1]]),
    }
    expected = vars(rank(query, gallery, **indices))
    found = vars(rank(query, gallery, **{name: value.to(dtype) for name, value in indices.items()}))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("k", [0, -1])
def test_a_cutoff_below_one_is_refused(k: int):
    for metric, found in ((recall_at, [0, 1]), (average_precision_at, [[0, 1]])):
        with pytest.raises(ValueError, match=f"k must be a number of images, at least 1, got {k}"):
            metric(found, k)


def test_two_labelled_images_at_one_rank_are_refused():
    """Two at rank 0 counted as 1/1 and 2/1, a precision of 150 %."""
    with pytest.raises(ValueError, match="1 of 2 queries have two labelled images at one rank"):
        average_precision_at([[0, 0], [1, 2]], 5)


def test_padding_fills_up_to_the_longest_row_or_the_width():
    assert padded([[1, 2], [], [3]]).tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert padded([[1]], width=3).tolist() == [[1, -1, -1]]
    empty = padded([[], []])
    assert (empty.shape, empty.dtype) == ((2, 0), torch.int64)
    assert padded([]).shape == (0, 0)
