"""Mined negatives: every rule against a naive loop and by hand, their file, and the command that shows them."""

from __future__ import annotations

import errno
import io
import math
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lavis_cir_plugin.benchmarks.types import Triplet
from lavis_cir_plugin.commands import main
from lavis_cir_plugin.data import negatives
from lavis_cir_plugin.data.negatives import NegativeSets, load_negatives, negatives_path, rank_histogram
from lavis_cir_plugin.methods.retrieval_dpo import mining
from lavis_cir_plugin.methods.retrieval_dpo.mining import (
    TWIN,
    MinedNegatives,
    MiningSettings,
    between_drops,
    forbidden_images,
    in_order_of_triplets,
    mean_features,
    mine,
    mining_groups,
    mining_index,
    random_negatives,
)
from lavis_cir_plugin.ranking import scoring
from lavis_cir_plugin.ranking.index import build_index, recall_against_exact

QUERIES, IMAGES = 12, 90


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)


# -- mining against a naive loop -------------------------------------------------------------------------------------


def naive(
    query: Tensor, gallery: Tensor, targets: Tensor, banned: Tensor, rules: MiningSettings, candidates: Tensor | None
):
    """Yield the negatives of each query with their ranks, computed score by score."""
    features = (gallery if gallery.dim() == 3 else gallery.unsqueeze(1)).double()

    def is_twin(image: int, other: int) -> bool:
        return all(float(a @ b) >= TWIN for a, b in zip(features[image], features[other]))

    for row, target in enumerate(targets.tolist()):
        scores = [max(float(query[row].double() @ v) for v in image) for image in features]
        ranked = range(len(scores)) if candidates is None else [c for c in candidates[row].tolist() if c >= 0]
        order = sorted(ranked, key=lambda image: (-scores[image], image))
        own, never = scores[target], {target, *banned[row].tolist()}
        allowed = [
            image
            for image in order
            if image not in never
            and not is_twin(image, target)
            and (rules.cap is None or scores[image] < own - (1 - rules.cap) * abs(own))
            and (rules.margin is None or scores[image] < own - rules.margin)
            and (not rules.steep_drop or scores[image] < own)
        ]
        window = allowed[rules.window[0] : rules.window[1]]
        between = {window[place] for place in naive_between([scores[image] for image in window])}
        kept = [image for image in window if not rules.steep_drop or image in between]
        yield kept, [order.index(image) for image in kept], [scores[image] for image in kept], own


def naive_between(scores: list[float]) -> set[int]:
    drops = [a - b for a, b in zip(scores, scores[1:])]
    steepest = sorted(range(len(drops)), key=lambda place: (-drops[place], place))
    for one, other in zip(steepest, steepest[1:]):
        if abs(one - other) >= 2:
            return set(range(min(one, other) + 1, max(one, other) + 1))
    return set()


def world(tokens: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, gallery, targets and banned images; images 40 to 44 are twins of images 0 to 4.

    Queries 0 to 5 lie near their target, the others score low or below 0 with it.
    """
    gallery = draw(IMAGES, 3, 8, seed=1)
    gallery[40:45] = gallery[:5]
    gallery = gallery if tokens else gallery[:, 0].clone()
    targets = torch.arange(QUERIES)
    query = draw(QUERIES, 8, seed=2)
    first = gallery[:6, 0] if tokens else gallery[:6]
    query[:6] = torch.nn.functional.normalize(first + 0.7 * query[:6], dim=-1)
    if not tokens:
        query[6:9] = -gallery[6:9]  # the right image's score is -1
    banned = torch.stack(
        [torch.randperm(IMAGES, generator=torch.Generator().manual_seed(row))[:4] for row in range(12)]
    )
    banned[::3, 2:] = -1
    return query, gallery, targets, banned


RULES: dict[str, dict[str, Any]] = {
    "none": {"cap": None},
    "cap": {},
    "small cap": {"cap": 0.5},
    "margin": {"cap": None, "margin": 0.2},
    "both": {"margin": 0.1},
    "window": {"cap": None, "window": (3, 17)},
    "steep drop": {"cap": None, "steep_drop": True, "window": (0, 90)},
    "all": {"window": (2, 60), "cap": 0.9, "margin": 0.05, "steep_drop": True},
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("source", ["query", "positive", "image_set"])
@pytest.mark.parametrize("tokens", [True, False])
def test_mining_is_the_naive_loop(tokens, source, rules):
    query, gallery, targets, banned = world(tokens)
    mining = MiningSettings(source=source, **rules)
    candidates = None
    if source == "positive":
        query = mean_features(gallery)[targets]
    if source == "image_set":
        rows = [torch.randperm(IMAGES, generator=torch.Generator().manual_seed(9 + row))[:7] for row in range(QUERIES)]
        candidates = torch.stack(rows)
        candidates[::2, 5:] = -1
    mined = mine(query, build_index("exact", gallery), targets, banned, mining, candidates)
    found = 0
    for row, (images, ranks, scores, own) in enumerate(naive(query, gallery, targets, banned, mining, candidates)):
        count = len(images)
        padding = [-1] * (mining.width - count)
        assert mined.negatives[row].tolist() == images + padding
        assert mined.ranks[row].tolist() == ranks + padding
        assert mined.scores[row, :count].tolist() == pytest.approx(scores, abs=1e-6)
        assert mined.scores[row, count:].isnan().all()
        assert float(mined.target_scores[row]) == pytest.approx(own, abs=1e-6)
        found += count
    assert found or source == "image_set"


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_faiss_finds_what_the_exact_search_finds(kind, monkeypatch):
    """The inverted file searches every list of its half-precision vectors, and scores are computed again exactly."""
    monkeypatch.setattr(mining, "_PROBES", 1000)
    query, gallery, targets, banned = world()
    rules = MiningSettings(cap=None, window=(0, 30))
    exact = mine(query, mining_index(gallery, MiningSettings(index="exact")), targets, banned, rules)
    index = mining_index(gallery, MiningSettings(index=kind))
    assert index.kind == kind
    for a, b in zip(mine(query, index, targets, banned, rules), exact):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_graph_finds_nearly_what_the_exact_search_finds():
    query, gallery, targets, banned = world()
    rules = MiningSettings(cap=None, window=(0, 30))
    exact, found = (
        mine(query, mining_index(gallery, MiningSettings(index=kind)), targets, banned, rules).negatives
        for kind in ("exact", "hnsw")
    )
    assert recall_against_exact(found, exact) > 95


def test_the_index_is_exact_for_small_galleries_alone(monkeypatch):
    gallery = draw(50, 3, 8)
    assert mining_index(gallery, MiningSettings()).kind == "exact"
    monkeypatch.setattr(mining, "LARGE_GALLERY", 50)
    assert mining_index(gallery, MiningSettings()).kind == "ivf"
    assert mining_index(gallery, MiningSettings(index="flat")).kind == "flat"


def test_a_small_working_memory_and_shares_change_nothing(monkeypatch):
    query, gallery, targets, banned = world()
    index, rules = build_index("exact", gallery), MiningSettings(cap=None)
    whole = mine(query, index, targets, banned, rules)
    part = [mine(query[rows], index, targets[rows], banned[rows], rules) for rows in (slice(0, 5), slice(5, 12))]
    monkeypatch.setattr(scoring, "WORKING_BYTES", 4096)
    monkeypatch.setattr(scoring, "CACHE_BYTES", 1024)
    for mined in (mine(query, index, targets, banned, rules), in_order_of_triplets(part)):
        for a, b in zip(mined, whole):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# -- mining by hand --------------------------------------------------------------------------------------------------


def gallery_of(scores: list[float]) -> tuple[Tensor, Tensor]:
    """Return a query and images with these scores; the images are far from each other."""
    gallery = torch.zeros(len(scores), 1 + len(scores), dtype=torch.float64)
    gallery[:, 0] = torch.tensor(scores, dtype=torch.float64)
    for number, score in enumerate(scores):
        gallery[number, 1 + number] = math.sqrt(1 - score**2)
    query = torch.zeros(1, 1 + len(scores))
    query[0, 0] = 1
    return query, gallery.float()


def mined_by_hand(scores: list[float], target: int, banned: tuple[int, ...] = (-1,), **rules: Any) -> list[int]:
    query, gallery = gallery_of(scores)
    mined = mine(
        query, build_index("exact", gallery), torch.tensor([target]), torch.tensor([banned]), MiningSettings(**rules)
    )
    return [image for image in mined.negatives[0].tolist() if image >= 0]


FALLING = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"cap": None}, [0, 2, 3, 4, 5]),
        ({"cap": 1.0}, [2, 3, 4, 5]),  # below 0.8
        ({"cap": 0.95}, [2, 3, 4, 5]),  # below 0.76
        ({"cap": 0.85}, [3, 4, 5]),  # below 0.68
        ({"cap": None, "margin": 0.0}, [2, 3, 4, 5]),  # below 0.8
        ({"cap": None, "margin": 0.25}, [4, 5]),  # below 0.55
        ({"cap": None, "window": [0, 2]}, [0, 2]),
        ({"cap": None, "window": [1, 3]}, [2, 3]),
        ({"cap": 0.85, "window": [1, 3]}, [4, 5]),  # the second and third of those below 0.68
    ],
)
def test_rules_by_hand(rules, expected):
    """The second image, with the score 0.8, is the right one."""
    assert mined_by_hand(FALLING, 1, **rules) == expected


def test_the_cap_of_a_negative_score():
    """The limit is -0.40 - 0.05 * 0.40 = -0.42: the score -0.41 is not below it, and -0.43 is."""
    assert mined_by_hand([-0.40, -0.41, -0.43, 0.1], 0) == [2]


def test_a_right_image_far_down_has_the_negatives_below_it(monkeypatch):
    """The right image is the 400th of 600, the first search sees 60, and no search goes deeper than DEEPEST."""
    scores = [0.9 - 0.001 * number for number in range(600)]
    assert mined_by_hand(scores, 399, cap=1.0, window=[0, 3]) == [400, 401, 402]
    monkeypatch.setattr(mining, "DEEPEST", 401)
    assert mined_by_hand(scores, 399, cap=1.0, window=[0, 3]) == [400]


def test_the_window_counts_ranks_among_allowed_images():
    """Without the right image 2 and the banned 0 and 3 the images 1, 4, 5 remain; their ranks 0 and 1 are 1 and 4."""
    assert mined_by_hand(FALLING, 2, banned=(0, 3), cap=None, window=[0, 2]) == [1, 4]
    assert mined_by_hand(FALLING, 2, banned=(0, 3), cap=None, window=[1, 3]) == [4, 5]


def test_what_is_banned_does_not_shorten_the_window():
    """The window of 2 is searched deep enough for the 30 banned images before it."""
    scores = [0.99 - 0.01 * number for number in range(60)]
    banned = tuple(range(1, 31))
    assert mined_by_hand(scores, 0, banned=banned, cap=None, window=[0, 2]) == [31, 32]


def test_twins_are_no_negatives_and_do_not_count():
    """Image 4 is image 1 again, and image 5 is it but for one of its two features."""
    gallery = draw(30, 2, 16)
    gallery[4] = gallery[1]
    gallery[5, 0] = gallery[1, 0]
    query = gallery[1:2, 0].clone()
    mined = mine(
        query, build_index("exact", gallery), torch.tensor([1]), torch.tensor([[-1]]), MiningSettings(cap=None)
    )
    assert 4 not in mined.negatives
    assert mined.negatives[0, 0] == 5
    assert (mined.target_ranks[0], mined.ranks[0, 0]) == (0, 2)
    first = mine(
        query,
        build_index("exact", gallery),
        torch.tensor([1]),
        torch.tensor([[-1]]),
        MiningSettings(cap=None, window=[0, 1]),
    )
    assert first.negatives[0].tolist() == [5]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        # Drops 1 8 1 1 7 1 (in hundredths): the steepest are the 2nd and the 5th, between them images 2, 3 and 4.
        ([0.80, 0.79, 0.71, 0.70, 0.69, 0.62, 0.61], [2, 3, 4]),
        # Drops 9 8 1 7: the two steepest are neighbours; the 2nd and the 3rd steepest hold images 2 and 3.
        ([0.90, 0.81, 0.73, 0.72, 0.65], [2, 3]),
        # Drops 9 8 1 7 with the order of steepness 1st, 4th: images 1, 2 and 3.
        ([0.90, 0.81, 0.75, 0.74, 0.66], [1, 2, 3]),
        # Two drops are always neighbours.
        ([0.9, 0.8, 0.6], []),
        ([0.9], []),
        ([], []),
    ],
)
def test_steep_drops_by_hand(scores, expected):
    row = torch.tensor([scores], dtype=torch.float64)
    assert between_drops(row, torch.ones_like(row, dtype=torch.bool))[0].nonzero().flatten().tolist() == expected


def test_steep_drops_are_those_below_the_right_image_within_the_window():
    """Right image 0.85. Below it 0.80 0.79 | 0.71 0.70 | 0.62 0.61; the drop of 0.13 above it is none of them.

    Of 0.80 .79 .71 .70 .62 .61 the steepest drops are the 2nd and the 4th: images 4 and 5 (0.71, 0.70) are between.
    With the window's end after 0.70 drops are 1 8 1, and no two are apart but the 1st and the 3rd, neighbours of the
    2nd: 2nd (8) and 1st (1) are next to each other, then 1st and 3rd (1 and 1): images 3 and 4. Below a cap of 0.7055
    there are three images, and two drops are always neighbours.
    """
    scores = [0.98, 0.85, 0.80, 0.79, 0.71, 0.70, 0.62, 0.61]
    rules: dict[str, Any] = {"cap": None, "steep_drop": True}
    assert mined_by_hand(scores, 1, **rules) == [4, 5]
    assert mined_by_hand(scores, 1, window=[0, 4], **rules) == [3, 4]
    assert mined_by_hand(scores, 1, cap=0.83, steep_drop=True) == []
    assert mined_by_hand(scores, 7, **rules) == []  # nothing is below the right image


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 3),
    window=st.tuples(st.integers(0, 10), st.integers(14, 40)),
    cap=st.sampled_from([None, 0.5, 0.95, 1.0]),
    steep_drop=st.booleans(),
)
def test_nothing_banned_is_ever_mined(seed, tokens, window, cap, steep_drop):
    """Negatives are neither the right image nor copies of it nor banned; they are distinct, sorted, below the cap."""
    gallery = draw(30, tokens, 6, seed=seed)
    gallery[20:] = gallery[:10]
    targets = torch.arange(5) + seed % 5
    generator = torch.Generator().manual_seed(seed)
    banned = torch.randint(-1, 30, (5, 6), generator=generator)
    query = draw(5, 6, seed=seed + 1)
    rules = MiningSettings(cap=cap, window=window, steep_drop=steep_drop)
    mined = mine(query, build_index("exact", gallery), targets, banned, rules)
    assert mined.negatives.shape == mined.scores.shape == mined.ranks.shape == (5, rules.width)
    for row in range(5):
        images = [image for image in mined.negatives[row].tolist() if image >= 0]
        target = int(targets[row])
        assert not {target, target + 20, *banned[row].tolist()} & set(images)
        assert len(set(images)) == len(images) <= window[1] - window[0]
        scores, ranks = mined.scores[row, : len(images)], mined.ranks[row, : len(images)]
        assert (scores[1:] <= scores[:-1]).all()
        assert (ranks[1:] > ranks[:-1]).all()
        assert (mined.negatives[row, len(images) :] == -1).all()
        if cap is not None:
            own = mined.target_scores[row]
            assert (scores <= own - (1 - cap) * own.abs() + 1e-6).all()


def test_mean_features_by_hand():
    """(1, 0) and (0, 1) have the mean direction (1, 1) / sqrt 2; a single feature is its own mean."""
    half = math.sqrt(0.5)
    assert mean_features(torch.eye(2).half()[None]).tolist() == [pytest.approx([half, half])]
    assert mean_features(torch.eye(2)).tolist() == [[1.0, 0.0], [0.0, 1.0]]


# -- what may not be a negative; random negatives --------------------------------------------------------------------


def test_forbidden_by_hand():
    """Two triplets have the same reference and captions: each forbids both targets and what either lists as right."""
    triplets = [
        Triplet("a", "b", ("is red",), also_right=("x",)),
        Triplet("a", "c", ("is red",)),
        Triplet("a", "d", ("is blue",)),
        Triplet("e", "f", ("is red",), also_right=("y", "z")),
    ]
    assert forbidden_images(triplets) == [{"b", "c", "x"}, {"b", "c", "x"}, {"d"}, {"f", "y", "z"}]


def test_one_caption_in_common_forbids():
    """A training text may be one caption alone, which asks for the targets of both triplets that have it."""
    triplets = [
        Triplet("a", "b", ("is red", "has a belt")),
        Triplet("a", "c", ("has long sleeves", "is red")),
        Triplet("a", "d", ("has long sleeves", "has dots")),
        Triplet("a", "e", ("is blue", "has a zip")),
    ]
    assert forbidden_images(triplets) == [{"b", "c"}, {"b", "c", "d"}, {"c", "d"}, {"e"}]


def test_random_negatives_are_uniform_among_what_is_allowed():
    """Each of 600 triplets draws 2 of the images 2 to 5: an image is drawn 300 times, within 4 deviations of 12.2."""
    drawn = random_negatives(
        torch.zeros(600, dtype=torch.int64), torch.ones(600, 1, dtype=torch.int64), 6, 2, seed=0
    ).negatives
    assert drawn.shape == (600, 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    assert sorted(drawn.unique().tolist()) == [2, 3, 4, 5]
    assert all(abs(int((drawn == image).sum()) - 300) < 49 for image in range(2, 6))


def test_triplets_of_a_category_are_mined_among_its_images():
    """Image b belongs to both categories, image d to none."""
    place = {name: number for number, name in enumerate("abcde")}
    triplets = [Triplet("c", "b", (), "dress"), Triplet("a", "b", (), "shirt"), Triplet("b", "c", (), "dress")]
    dress, shirt = mining_groups(triplets, place, within_category=True)
    assert (dress.numbers, dress.images.tolist()) == ([0, 2], [1, 2])
    assert (shirt.numbers, shirt.images.tolist()) == ([1], [0, 1])
    assert dress.places(torch.tensor([[0, 1], [2, -1]])).tolist() == [[-1, 0], [1, -1]]
    assert dress.indices(torch.tensor([[1, -1], [0, 0]])).tolist() == [[2, -1], [1, 1]]
    whole = [(group.numbers, group.images.tolist()) for group in mining_groups(triplets, place, within_category=False)]
    assert whole == [([0, 1, 2], [0, 1, 2, 3, 4])]
    (alone,) = mining_groups(triplets[::2], place, within_category=True)
    assert alone.images.tolist() == [0, 1, 2, 3, 4]


def test_random_negatives_follow_from_the_seed_and_are_padded():
    targets, banned = torch.tensor([0, 1]), torch.tensor([[0, 1, 2], [-1, -1, -1]])
    first, again, other = (random_negatives(targets, banned, 5, 4, seed).negatives for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sorted(first[0].tolist()) == [-1, -1, 3, 4]
    assert sorted(first[1].tolist()) == [0, 2, 3, 4]


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "epochs"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"refresh": 0}, [0, 0, 0, 0, 0, 0]),
        ({"refresh": 3}, [0, 0, 0, 3, 3, 3]),
        ({"warmup_epochs": 2, "refresh": 3}, [0, 0, 2, 2, 2, 5]),
        ({"warmup_epochs": 2, "refresh": 0}, [0, 0, 2, 2, 2, 2]),
    ],
)
def test_when_negatives_are_mined(changes, epochs):
    assert [MiningSettings(**changes).mined_at(epoch) for epoch in range(6)] == epochs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "querry"}, "source must be one of query, positive, image_set, got 'querry'; did you mean 'query'"),
        ({"index": "faiss"}, "index must be one of auto, exact, flat, ivf, hnsw, got 'faiss'"),
        ({"count": 0}, "count must be a whole number >= 1, got 0"),
        ({"count": True}, "count must be a whole number >= 1, got true"),
        ({"count": 2.0}, "count must be a whole number >= 1, got 2.0"),
        ({"window": [3, 4], "count": 2}, r"count: 2 is more than run\.negatives\.window: \[3, 4\] has \(1\); widen"),
        ({"window": [5, 5]}, r"window must be two ranks \[first, last\] with 0 <= first < last, got \[5, 5\]"),
        ({"window": [-1, 5]}, r"got \[-1, 5\]"),
        ({"window": [0, 1001]}, r"window must span at most 1,000 ranks, got \[0, 1001\]"),
        (
            {"window": [2, 5], "steep_drop": True},
            r"window: \[2, 5\] has no image between two drops .* at least 4 ranks",
        ),
        ({"within_category": "yes"}, "within_category must be true or false, got 'yes'"),
        ({"window": "0,5"}, "got '0,5'"),
        ({"window": 50}, "got 50"),
        ({"cap": 0}, "cap must be a number > 0 and <= 1, or null, got 0"),
        ({"cap": 1.1}, "got 1.1"),
        ({"cap": math.nan}, "got NaN"),
        ({"margin": -0.1}, "margin must be a number >= 0 and <= 2, or null, got -0.1"),
        ({"margin": "0.1"}, "got '0.1'"),
        ({"steep_drop": 1}, "steep_drop must be true or false, got 1"),
        ({"warmup_epochs": -1}, "warmup_epochs must be a whole number >= 0, got -1"),
        ({"refresh": None}, "refresh must be a whole number >= 0, got null"),
        ({"file": ""}, "file must be the path of a file, or null, got ''"),
        ({"file": "x.npz"}, "file serves all epochs; set run.negatives.refresh and .warmup_epochs to 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=f"run.negatives.*{message}"):
        MiningSettings(**changes)


def test_all_problems_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)source.*count.*cap"):
        MiningSettings(source="x", count=0, cap=7)


# -- the sets and their file -----------------------------------------------------------------------------------------


def some_sets(paths: list[str] | None = None) -> NegativeSets:
    """Return three triplets over six images with two negatives, none, and three."""
    nan = math.nan
    return NegativeSets(
        names=["a", "é", "c d", "图", "e", "f"],
        references=np.array([0, 1, 2], dtype=np.int32),
        targets=np.array([1, 2, 3], dtype=np.int32),
        texts=["is red", "", 'says "🙂"\n'],
        negatives=np.array([[4, 0, -1], [-1, -1, -1], [5, 0, 1]], dtype=np.int32),
        scores=np.array([[0.5, 0.25, nan], [nan, nan, nan], [0.75, 0.5, 0.25]], dtype=np.float32),
        target_scores=np.array([0.75, 0.5, 0.875], dtype=np.float32),
        ranks=np.array([[0, 4, -1], [-1, -1, -1], [9, 10, 59]], dtype=np.int32),
        target_ranks=np.array([1, -1, 0], dtype=np.int32),
        about={"dataset": "fashioniq", "epoch": 2, "seed": 42, "negatives": {"cap": 0.95, "window": [0, 50]}},
        paths=paths or [f"/pictures/{number}\udcff.png" for number in range(6)],
    )


def assert_equal(one: NegativeSets, other: NegativeSets) -> None:
    for name, value in vars(one).items():
        found = getattr(other, name)
        if isinstance(value, np.ndarray):
            assert found.dtype == value.dtype
            np.testing.assert_array_equal(found, value)
        else:
            assert found == value


def test_what_is_saved_is_loaded(tmp_path):
    """This holds for any text, and for file names that are not UTF-8 (here with a byte of 255)."""
    sets = some_sets()
    path = negatives_path(tmp_path, "fashioniq", 2)
    assert path == tmp_path / "negatives" / "fashioniq_002.npz"
    assert sets.save(path) == path
    assert_equal(load_negatives(path), sets)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_negatives_are_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    path = some_sets().save(tmp_path / "x.npz")
    before = path.read_bytes()

    def full(file: Any, **content: Any) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match=rf"{path} could not be written: No space left on device; free some space"):
        some_sets().save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]
    assert path.read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"write elsewhere \(a run's folder is run\.output_dir"):
        some_sets().save(tmp_path / "file" / "x.npz")


def npz(**content: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **content)
    return buffer.getvalue()


def npy(content: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, content, allow_pickle=True)
    return buffer.getvalue()


class Trap:
    """Object whose unpickling would be noticed."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no zip",
        b"PK\x03\x04 but nothing follows",
        npz(a=np.zeros(3)),
        npz(texts=np.frombuffer(b"[1]", np.uint8)),
        npz(texts=np.frombuffer(b"no JSON", np.uint8)),
        npz(texts=np.array([Trap()], dtype=object)),
        npy(np.zeros(3)),
        npy(np.array([Trap()], dtype=object)),
        pickle.dumps(Trap()),
    ],
    ids=["empty", "text", "zip's start", "other", "list", "no json", "pickle inside", "npy", "object npy", "pickle"],
)
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"negatives .*x.npz is damaged or no file of negatives \(.*\); mine them again"
    ):
        load_negatives(path)


def test_a_file_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(negatives, "_FORMAT", 0)
    path = some_sets().save(tmp_path / "x.npz")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"\(another version's\); mine them again"):
        load_negatives(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; a retrieval_dpo run writes <run>/negatives/"):
        load_negatives(tmp_path / "x.npz")


def test_a_cut_file_is_refused(tmp_path):
    path = some_sets().save(tmp_path / "x.npz")
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is damaged"):
            load_negatives(path)


def test_a_changed_byte_is_noticed_or_changes_nothing(tmp_path):
    """A time stamp may change unnoticed, content may not; every kind of error ends in the same sentence."""
    sets = some_sets()
    path = sets.save(tmp_path / "x.npz")
    whole = path.read_bytes()
    rng, unnoticed = random.Random(0), 0
    for place in rng.sample(range(len(whole)), 400):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ rng.randrange(1, 256)]) + whole[place + 1 :])
        found = message = None
        try:
            found = load_negatives(path)
        except ValueError as error:
            message = str(error)
        if found is None:
            assert "is damaged" in str(message)
        else:
            assert_equal(found, sets)
            unnoticed += 1
    assert unnoticed < 200


def test_draws_are_distinct_and_follow_from_the_generator():
    sets = some_sets()
    assert sets.counts.tolist() == [2, 0, 3]
    assert [sets.draw(1, 2), sets.draw(0, 5)] == [[], [0, 1]]
    seen = set()
    for seed in range(50):
        drawn = sets.draw(2, 2, random.Random(seed))
        assert drawn == sets.draw(2, 2, random.Random(seed))
        assert len(set(drawn)) == 2
        seen.add(tuple(drawn))
    assert seen == {(0, 1), (0, 2), (1, 2)}


def test_the_histogram_and_the_summary_by_hand():
    """Of the ranks 0, 4, 9, 10, 59 two are among the first 5, then one in each range; the last range ends with 60."""
    sets = some_sets()
    assert rank_histogram(sets) == {"1-5": 40.0, "6-10": 20.0, "11-25": 20.0, "26-50": 0.0, "51-60": 20.0}
    assert sets.summary() == (
        "3 triplets, 1.7 negatives each, 33.3 % without one; ranks 1-5 40 %, 6-10 20 %, 11-25 20 %, 51-60 20 %"
    )
    sets.ranks[:] = -1
    assert rank_histogram(sets) == {}
    assert sets.summary().endswith("33.3 % without one")
    sets.target_scores[:] = math.nan
    assert sets.summary().endswith("33.3 % without one; drawn at random")
    sets.ranks[0, 0] = 0
    assert rank_histogram(sets) == {"1": 100.0}


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40))
def test_the_shares_of_all_ranks_are_100_percent(ranks):
    sets = some_sets()
    sets.ranks = np.array([ranks], dtype=np.int32)
    histogram = rank_histogram(sets)
    assert sum(histogram.values()) == pytest.approx(100)
    assert list(histogram)[-1].split("-")[-1] == str(max(ranks) + 1)


def test_joined_by_hand():
    parts = [MinedNegatives(*(torch.full((rows, 2), float(rows)) for _ in MinedNegatives._fields)) for rows in (1, 2)]
    assert all(field.tolist() == [[1, 1], [2, 2], [2, 2]] for field in in_order_of_triplets(parts))


# -- lavis-cir negatives ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """Make the folder of a run with negatives of epochs 0 and 2, and of another data set of epoch 0."""
    from PIL import Image

    paths = []
    for number in range(6):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (40, 50), (40 * number, 0, 200)).save(paths[-1])
    for name, epoch in (("fashioniq", 0), ("fashioniq", 2), ("my_own", 0)):
        sets = some_sets(paths)
        sets.about.update(dataset=name, epoch=epoch)
        sets.save(negatives_path(tmp_path / "run", name, epoch))
    return tmp_path / "run"


def show(*arguments: Any) -> None:
    main.main(["negatives", *map(str, arguments)])


def test_the_command_shows_the_last_negatives_of_each_data_set(run, capsys):
    show(run)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(str(run))] == [
        str(run / "negatives" / "fashioniq_002.npz"),
        str(run / "negatives" / "my_own_000.npz"),
    ]
    assert lines[1] == f"  {some_sets().summary()}"
    assert lines[2] == "  rank 1-5       40.0 %  ####################"
    assert lines[5] == "  rank 26-50      0.0 %"
    assert lines[7] == f"  written: {run / 'negatives' / 'fashioniq_002.png'}"
    assert (run / "negatives" / "my_own_000.png").is_file()


def test_an_epoch_or_a_file_can_be_named(run, tmp_path, capsys):
    show(run, "--epoch", 2, "--output", tmp_path / "x.png")
    assert (tmp_path / "x.png").is_file()
    show(run / "negatives" / "my_own_000.npz")
    assert "my_own_000.npz" in capsys.readouterr().out


def test_an_epoch_of_four_digits_comes_after_one_of_three(run, capsys):
    (run / "negatives" / "my_own_000.npz").rename(run / "negatives" / "fashioniq_1000.npz")
    show(run)
    assert "fashioniq_1000.npz" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}x"], "runx does not exist; name the output folder of a retrieval_dpo run"),
        (["{parent}"], r"has no negatives/\*.npz, which a run .* writes; name one of the runs in it that have \(run\)"),
        (["{run}/negatives"], r"negatives has no negatives/\*.npz, which a run of the task retrieval_dpo writes\.$"),
        (["{run}", "--epoch", "1"], "--epoch 1: .*run mined at the beginning of epochs 0, 2"),
        (["{file}", "--epoch", "0"], "--epoch 0 chooses among the files of a run, and .* is a file; leave it out"),
        (["{run}", "--rows", "0"], "--rows must be a whole number >= 1, got 0"),
        (["{run}", "--output", "x.jpg"], "--output x.jpg: the picture is a PNG; choose a name that ends in .png"),
        (["{run}", "--output", "x.png"], r"one picture, and .* 2 data sets; name one of .*fashioniq_002.npz, .*my_own"),
        (["{parent}/0.png"], "0.png is damaged or no file of negatives"),
    ],
)
def test_wrong_arguments_end_with_a_sentence(arguments, message, run):
    places = {"run": run, "parent": run.parent, "file": run / "negatives" / "my_own_000.npz"}
    with pytest.raises(SystemExit, match=f"^lavis-cir: .*{message}"):
        show(*(argument.format(**places) for argument in arguments))


def test_pictures_that_have_moved_end_with_a_sentence(run, tmp_path):
    """Image 4 is one of six images that are shown."""
    (tmp_path / "4.png").unlink()
    with pytest.raises(
        SystemExit, match=r"1 of 6 pictures are not where they were .* \(first: .*4.png\); put them back"
    ):
        show(run)
    assert list((run / "negatives").glob("*.png")) == []
