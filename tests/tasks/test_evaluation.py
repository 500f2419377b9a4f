"""An evaluation encodes each picture once without a change of any number, and applies a group's rules to the rows."""

from __future__ import annotations

import re
import resource
import shutil
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import SCORING_MODELS
from evaluation_world import GROUPS, NAMES, OUTSIDE, REFERENCES, make_evaluation

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


# --- each picture through the tower once ---------------------------------------------------------------------------


def modes_of(model):
    return ("multimodal", *getattr(model, "baselines", ("image", "text")))


def all_queries(evaluation, mode):
    return evaluation.encode_queries(mode, [group.queries for group in GROUPS])


def batches(items, size=3):
    return [items[start : start + size] for start in range(0, len(items), size)]


@pytest.mark.parametrize("kind", SCORING_MODELS)
def test_the_tower_sees_each_picture_once_and_no_number_changes(kind, tmp_path):
    """The expected vectors are those of encode_target and encode_query themselves, in the same batches."""
    evaluation, seen = make_evaluation(kind, tmp_path)
    model, dataset = evaluation.model, evaluation.dataset
    gallery = evaluation.encode_gallery()
    assert seen == Counter([*NAMES, *OUTSIDE])
    found = {mode: all_queries(evaluation, mode) for mode in modes_of(model)}
    assert seen == Counter([*NAMES, *OUTSIDE])
    assert list(tmp_path.iterdir()) == []

    pictures = {name: dataset.load_image(name) for name in (*NAMES, *OUTSIDE)}
    stack = [torch.stack([pictures[name] for name in batch]) for batch in batches(NAMES)]
    assert torch.equal(gallery, torch.cat([model.encode_target(images).float() for images in stack]))
    outside = torch.stack([pictures[name] for name in ("outside 2", "outside 1", "outside 3")])
    with torch.no_grad():
        tokens = torch.cat([model.image_features(images) for images in [*stack, outside]])
    tokens_of = dict(zip([*NAMES, "outside 2", "outside 1", "outside 3"], tokens))
    rows = [(query.reference, text) for group in GROUPS for query in group.queries for text in query.texts]
    for mode, vectors in found.items():
        for kept, is_exact in ((tokens_of, True), (pictures, False)):
            samples = [
                {"image": torch.stack([kept[name] for name, _ in batch]), "text_input": [text for _, text in batch]}
                for batch in batches(rows)
            ]
            expected = torch.cat([model.encode_query(batch, mode).float() for batch in samples])
            # The tower's last bits may depend on the other pictures of its batch.
            torch.testing.assert_close(vectors, expected, atol=0 if is_exact else 1e-6, rtol=0 if is_exact else 1e-5)


def test_the_features_that_a_query_reads_are_those_that_the_tower_returned(tmp_path):
    evaluation, _ = make_evaluation("joint", tmp_path)
    returned, read = [], []
    model = evaluation.model
    tower, encode = model.image_features, model.encode_query
    model.image_features = lambda images: returned.append(tower(images)) or returned[-1]
    model.encode_query = lambda samples, mode: read.append(samples["image"]) or encode(samples, mode)
    evaluation.rankings("image")
    names = [query.reference for group in GROUPS for query in group.queries for _ in query.texts]
    order = [*NAMES, "outside 2", "outside 1", "outside 3"]
    sizes = [len(batch) for batch in [*batches(NAMES), OUTSIDE]]  # the tower's calls are filled up
    rows = torch.cat([rows[:size] for size, rows in zip(sizes, returned)])
    assert torch.equal(torch.cat(read), rows[[order.index(name) for name in names]])


def test_the_room_is_said_before_the_file_is_written(tmp_path, caplog):
    """The tower of the small model returns 5 x 12 float32 of 240 bytes; 7 distinct pictures are references."""
    with caplog.at_level("INFO"):
        evaluation, _ = make_evaluation("joint", tmp_path)
        evaluation.encode_gallery()
    assert len(REFERENCES) == 7
    (line,) = (record.getMessage() for record in caplog.records)
    assert line == (
        "each picture is encoded once: the image features of 7 references take 1.7 kB in "
        f"{tmp_path} until the evaluation ends"
    )


@contextmanager
def free_space(count):
    with mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=count)):
        yield


@contextmanager
def largest_file(count):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    ("disk", "passes_outside", "reason"),
    [
        # The gallery's 13 x 3 x 6 float32 take 936 bytes, and the references' 7 x 5 x 12 float32 take 1,680.
        (free_space(2_615), 0, r"it needs 1\.7 kB beside 936 bytes for other files and 2\.6 kB are free"),
        (largest_file(1_000), 1, "File too large"),  # the last batch, of the pictures outside the gallery
    ],
    ids=["no room", "full in mid-write"],
)
def test_without_room_each_query_encodes_its_reference_again(disk, passes_outside, reason, tmp_path, caplog):
    kept, _ = make_evaluation("joint", tmp_path)
    expected = {mode: kept.rankings(mode) for mode in modes_of(kept.model)}
    caplog.clear()
    evaluation, seen = make_evaluation("joint", tmp_path)
    with caplog.at_level("INFO"), disk:
        found = {mode: evaluation.rankings(mode) for mode in modes_of(evaluation.model)}
    for mode, rankings in expected.items():
        for name, ranking in rankings.items():
            assert torch.equal(found[mode][name].ranks, ranking.ranks)
    once = Counter([*NAMES, *OUTSIDE * passes_outside])
    rows = Counter(query.reference for group in GROUPS for query in group.queries for _ in query.texts)
    assert seen == once + rows + rows  # for the modes multimodal and image
    lines = [record.getMessage() for record in caplog.records if "encoded once" not in record.getMessage()]
    assert len(lines) == 1
    assert re.fullmatch(
        rf"the references' image features cannot be written to .*/reference_features\.tmp \({reason}\); each query "
        r"encodes its reference again\.",
        lines[0],
    )
    assert list(tmp_path.iterdir()) == []


def test_with_room_to_the_byte_they_are_kept(tmp_path):
    with free_space(2_616):
        evaluation, seen = make_evaluation("joint", tmp_path)
        evaluation.rankings()
    assert seen == Counter([*NAMES, *OUTSIDE])


def test_nothing_is_kept_that_is_read_from_a_cache_or_that_no_query_will_read(tmp_path, caplog):
    evaluation, seen = make_evaluation("joint", tmp_path)
    model, dataset = evaluation.model, evaluation.dataset
    rows = {path: model.image_features(dataset.preloaded[name][None])[0] for name, path in dataset.image_paths.items()}
    dataset.features, dataset.keeps_features = SimpleNamespace(picture=lambda path, is_kept: rows[path]), True
    seen.clear()
    with torch.no_grad(), caplog.at_level("INFO"):
        evaluation.rankings()
        assert not seen
        dataset.features, dataset.keeps_features = None, False
        evaluation.encode_gallery(keeps_references=False)
    assert seen == Counter(NAMES)
    assert caplog.records == []


def test_a_trained_tower_gets_no_graph(tmp_path):
    """Mining encodes outside torch.no_grad; a graph of the whole gallery would fill the memory."""
    evaluation, _ = make_evaluation("joint", tmp_path)
    assert any(weight.requires_grad for weight in evaluation.model.image_tower.parameters())
    assert torch.is_grad_enabled()
    returned = []
    tower = evaluation.model.image_features
    evaluation.model.image_features = lambda images: returned.append(tower(images)) or returned[-1]
    evaluation.encode_gallery()
    assert not any(tokens.requires_grad for tokens in returned)
    assert torch.is_grad_enabled()
