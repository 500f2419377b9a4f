"""CIRR: layouts, broken files, metrics on small files; counts and chance level of the real annotation files."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REAL, real_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_cir_plugin.benchmarks import cirr
from lavis_cir_plugin.benchmarks.cirr import CIRRConfig, read_benchmark, read_train, training_text
from lavis_cir_plugin.benchmarks.types import Group, Query
from lavis_cir_plugin.ranking.ranks import Ranking, rank

FOLDERS = {"train": "train/34", "val": "dev", "test1": "test1"}


def names(split: str) -> list[str]:
    prefix = FOLDERS[split].split("/")[0]
    return [f"{prefix}-{number}-img0" for number in range(8)]


def records(split: str) -> list[dict[str, Any]]:
    """Write two queries in the official form, with the targets 1 and 2 and the set of images 0 to 5."""
    images = names(split)
    official: list[dict[str, Any]] = [
        {
            "pairid": 10 * number,
            "reference": images[number],
            "target_hard": images[number + 1],
            "target_soft": {images[number + 1]: 1.0},
            "caption": f" caption {number}. ",
            "img_set": {"id": 3, "members": images[:6], "reference_rank": 4, "target_rank": 5},
        }
        for number in range(2)
    ]
    if split == "test1":
        for record in official:
            del record["target_hard"], record["target_soft"], record["img_set"]["target_rank"]
    return official


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_world(
    root: Path,
    changed: dict[str, Any] | None = None,
    *,
    annotations: str = "cirr",
    images: str = "",
    suffix: str = ".png",
) -> dict[str, Any]:
    for split, folder in FOLDERS.items():
        content = (changed or {}).get(split, records(split))
        write_json(root / annotations / "captions" / f"cap.rc2.{split}.json", content)
        paths = {name: f"./{folder}/{name}.png" for name in names(split)}
        write_json(root / annotations / "image_splits" / f"split.rc2.{split}.json", paths)
        (root / images / folder).mkdir(parents=True, exist_ok=True)
        for name in names(split):
            (root / images / folder / f"{name}{suffix}").touch()
    return {"root": str(root)}


def test_validation(tmp_path: Path):
    benchmark = read_benchmark(write_world(tmp_path), "val")
    (group,) = benchmark.groups
    images = names("val")
    assert (benchmark.name, benchmark.split, benchmark.selection_metric) == ("cirr", "val", "mean")
    assert (group.gallery, group.reference_removed) == (tuple(images), True)
    assert [(q.reference, q.target, q.texts) for q in group.queries] == [
        (images[0], images[1], ("caption 0.",)),
        (images[1], images[2], ("caption 1.",)),
    ]
    assert group.queries[1].members == (images[0], *images[2:6])
    assert benchmark.image_paths == {name: tmp_path / "dev" / f"{name}.png" for name in images}
    assert benchmark.protocol == (
        "CIRR val, gallery of 8 images, reference removed, 2 queries, hard targets, "
        "R_subset among the 5 other members of the image set, ties by gallery order"
    )


def test_test_means_test1_without_targets(tmp_path: Path):
    changed = records("test1")
    changed[0]["caption"] = " "
    benchmark = read_benchmark(write_world(tmp_path, {"test1": changed}), "test")
    (group,) = benchmark.groups
    assert group.gallery == tuple(names("test1"))
    assert [query.target for query in group.queries] == [None, None]
    assert [query.texts for query in group.queries] == [("",), ("caption 1.",)]
    assert len(group.queries[0].members) == 5
    assert benchmark.metrics({}) == {}
    assert benchmark.protocol.startswith("CIRR test1, ")
    with pytest.raises(ValueError, match=r"val, test and seen, got 'test1'; change datasets.cirr.splits"):
        read_benchmark({"root": str(tmp_path)}, "test1")


@pytest.mark.parametrize("shape", ["official", "reduced"])
def test_training(tmp_path: Path, shape: str):
    """The reduced form has neither pairid nor target_soft nor img_set."""
    kept = {"reference", "target_hard", "caption"}
    content = [{k: v for k, v in item.items() if shape == "official" or k in kept} for item in records("train")]
    triplets, paths = read_train(write_world(tmp_path, {"train": content}))
    images = names("train")
    assert [(t.reference, t.target, t.captions) for t in triplets] == [
        (images[0], images[1], ("caption 0.",)),
        (images[1], images[2], ("caption 1.",)),
    ]
    assert training_text(triplets[0].captions, random.Random(0)) == "caption 0."
    used = images[: 6 if shape == "official" else 3]
    assert paths == {name: tmp_path / "train" / "34" / f"{name}.png" for name in used}


def test_training_records_say_which_images_are_negatives(tmp_path: Path):
    """Images with a weight above 0 are also right. The rest of the set, here images 3 to 5, are negatives."""
    images = names("train")
    first, second = records("train")
    first["target_soft"] = {images[1]: 1.0, images[2]: 0.5, images[3]: -1.0, images[6]: 0, images[7]: 0.2}
    second["target_soft"] = {images[2]: 1.0, images[1]: 1.0}
    triplets, paths = read_train(write_world(tmp_path, {"train": [first, second]}))
    assert [t.also_right for t in triplets] == [(images[2], images[7]), (images[1],)]
    assert [t.members for t in triplets] == [tuple(images[1:6]), (images[0], *images[2:6])]
    assert set(paths) == set(images[:6])


@pytest.mark.parametrize(
    ("change", "also_right", "members"),
    [
        ({"target_soft": {1: "x"}, "img_set": None}, (), ()),
        ({"target_soft": {names("train")[5]: "1.0", names("train")[4]: True, "stranger": 1.0}, "img_set": {}}, (), ()),
        ({"target_soft": [1], "img_set": {"members": "abc"}}, (), ()),
        ({"target_soft": None, "img_set": {"members": [[1], None, "stranger", *names("train")[2:4] * 2]}}, (), (2, 3)),
    ],
)
def test_what_is_odd_in_the_optional_fields_of_training_records_is_left_out(
    tmp_path: Path, change: dict[str, Any], also_right: tuple[int, ...], members: tuple[int, ...]
):
    first, second = records("train")
    first.update(change)
    (triplet, _), _ = read_train(write_world(tmp_path, {"train": [first, second]}))
    assert triplet.also_right == also_right
    assert triplet.members == tuple(names("train")[number] for number in members)


def test_metrics_by_hand(tmp_path: Path):
    """Ranks 0, 4, 5 and none give R@K 25, 50, 75, 75; subset ranks 0, 1, 2, 4 give 25, 50, 75; mean (50 + 25) / 2."""
    benchmark = read_benchmark(write_world(tmp_path), "val")
    empty = torch.empty(4, 0, dtype=torch.long)
    metrics = benchmark.metrics({"cirr": Ranking(torch.tensor([0, 4, 5, -1]), empty, torch.tensor([0, 1, 2, 4]))})
    assert metrics == {
        "R@1": 25.0,
        "R@5": 50.0,
        "R@10": 75.0,
        "R@50": 75.0,
        "R_subset@1": 25.0,
        "R_subset@2": 50.0,
        "R_subset@3": 75.0,
        "mean": 37.5,
    }


def ranking(
    ranks: list[int],
    subset: list[int],
    relevant: list[list[int]] | None = None,
    subset_top: list[list[int]] | None = None,
) -> dict[str, Ranking]:
    empty = torch.empty(len(ranks), 0, dtype=torch.long)
    labelled = empty if relevant is None else torch.tensor(relevant)
    members = empty if subset_top is None else torch.tensor(subset_top)
    return {"cirr": Ranking(torch.tensor(ranks), empty, torch.tensor(subset), labelled, members)}


def with_soft_labels(*labels: dict[str, float]) -> dict[str, Any]:
    changed = records("val")
    for record, weights in zip(changed, labels):
        record["target_soft"] = weights
    return {"val": changed}


SOFT_R = {"R@1": 25, "R@5": 35, "R@10": 60, "R@50": 60}
HARD_R = {"R@1": 0, "R@5": 0, "R@10": 100, "R@50": 100}


@pytest.mark.parametrize(
    ("labels", "recalls", "subset", "said"),
    [
        ("soft", SOFT_R, (60, 60, 75), "soft labels (the best weight among the first K) in R@K and R_subset,"),
        ("cirplant", SOFT_R, (60, 60, 75), "soft labels (the best weight among the first K) in R@K and R_subset,"),
        ("artemis", SOFT_R, (60, 60, 60), "in R@K and R_subset, the latter among the best 50,"),
        ("covr", HARD_R, (60, 60, 75), "R@K of hard targets, R_subset of soft labels (the best weight among the firs"),
    ],
)
def test_soft_labels_by_hand(
    tmp_path: Path, labels: str, recalls: dict[str, float], subset: tuple[float, ...], said: str
):
    """The best weight (at least 0) among the first K counts, in the gallery and among the members.

    In the gallery, query 0 has weights 0.5 and 1.0 at ranks 0 and 6, so 0.5 at K = 1 and 5, and 1.0 at 10 and 50. In
    query 1, -1.0 at rank 0 counts as 0, 0.2 at rank 4 counts from K = 5 on, and 0.5 at rank 50 never counts. The means
    are 25, 35, 60 and 60 %.

    Among the members, query 0 has 1.0 first, and query 1 has 0.2, -1.0, 0.5, so 0.2, 0.2, 0.5. The means are 60, 60 and
    75 %. The third member of query 1 is not among the best 50 of the gallery, so ARTEMIS has 60 % at K = 3 too.
    """
    a, b, c, d, e = names("val")[1:6]
    world = write_world(tmp_path, with_soft_labels({a: 0.5, b: 1.0}, {c: -1, d: 0.2, e: 0.5}))
    benchmark = read_benchmark({**world, "labels": labels}, "val")
    (group,) = benchmark.groups
    assert [query.relevance for query in group.queries] == [((a, 0.5), (b, 1.0)), ((c, -1.0), (d, 0.2), (e, 0.5))]
    place = {name: group.gallery.index(name) for name in (a, b, c, d, e)}
    best = [[place[b], place[a], -1, -1, -1], [place[d], place[c], place[e], place[a], place[b]]]
    found = benchmark.metrics(ranking([6, 9], [0, 2], [[0, 6, -1], [0, 4, 50]], best))
    expected = {**recalls, **{f"R_subset@{k}": value for k, value in zip((1, 2, 3), subset)}}
    assert found == pytest.approx({**expected, "mean": (recalls["R@5"] + subset[0]) / 2})
    assert said in benchmark.protocol
    hard = read_benchmark(world, "val")
    assert [query.relevance for query in hard.groups[0].queries] == [(), ()]


def test_soft_labels_that_are_not_ranked_count_nothing():
    """37 queries of val give 1.0 to their own reference, which is removed and has rank -1."""
    ranks, weights = torch.tensor([[-1, 3]]), torch.tensor([[1.0, 0.5]])
    assert cirr._soft_recall_at(ranks, weights, 3) == 0.0
    assert cirr._soft_recall_at(ranks, weights, 4) == 50.0


@pytest.mark.parametrize(
    ("selected", "expected"),
    [("arithmetic_mean", 50.0), ("geometric_mean", 25 * 54 ** (1 / 7)), ("harmonic_mean", 38.8889)],
)
def test_means_of_the_seven_recalls(tmp_path: Path, selected: str, expected: float):
    """The arithmetic mean of 25, 50, 75, 75 and 25, 25, 75 is 350 / 7 = 50.

    The harmonic mean is 7 / (3 / 25 + 1 / 50 + 3 / 75) = 7 / 0.18 = 38.89, the geometric (25^3 * 50 * 75^3)^(1/7)
    = 25 * (2 * 3^3)^(1/7) = 25 * 54^(1/7).
    """
    benchmark = read_benchmark({**write_world(tmp_path), "selection_metric": selected}, "val")
    assert benchmark.selection_metric == selected
    metrics = benchmark.metrics(ranking([0, 4, 5, -1], [0, 2, 2, 4]))
    assert (list(metrics)[-1], len(metrics)) == (selected, 9)
    assert metrics[selected] == pytest.approx(expected, abs=1e-4)
    nothing = benchmark.metrics(ranking([0, 99], [4, 4]))
    assert nothing[selected] == (pytest.approx(200 / 7) if selected == "arithmetic_mean" else 0.0)


def test_selection_by_a_single_metric_adds_none(tmp_path: Path):
    benchmark = read_benchmark({**write_world(tmp_path), "selection_metric": "R_subset@1"}, "val")
    assert benchmark.selection_metric == "R_subset@1"
    assert len(benchmark.metrics(ranking([0], [0]))) == 8


def naive_metrics(
    scores: list[list[float]], sets: list[list[int]], weights: list[dict[int, float]]
) -> dict[str, float]:
    """Rank names one query at a time; sets[q] holds the reference, the target and the other members."""
    hits: dict[str, list[float]] = {}
    for row, members, labels in zip(scores, sets, weights):
        reference, target = members[:2]
        order = sorted(range(len(row)), key=lambda image: -row[image])  # a stable sort orders equal scores by index
        order.remove(reference)
        for k in (1, 5, 10, 50):
            hits.setdefault(f"R@{k}", []).append(float(target in order[:k]))
            hits.setdefault(f"soft R@{k}", []).append(max([0.0, *(labels.get(image, 0.0) for image in order[:k])]))
        subset = [image for image in order if image in members]
        for k in (1, 2, 3):
            hits.setdefault(f"R_subset@{k}", []).append(float(target in subset[:k]))
            weight = max([0.0, *(labels.get(image, 0.0) for image in subset[:k])])
            hits.setdefault(f"soft R_subset@{k}", []).append(weight)
    return {name: 100 * sum(values) / len(values) for name, values in hits.items()}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_a_naive_implementation(data: st.DataObject):
    """The cases have few, small, negative and equal features with ties, a single query, and uneven chunks."""
    size = data.draw(st.integers(7, 13))
    count = data.draw(st.integers(1, 5))
    vectors = st.lists(st.integers(-2, 1), min_size=2, max_size=2)
    gallery = data.draw(st.lists(vectors, min_size=size, max_size=size))
    queries = data.draw(st.lists(vectors, min_size=count, max_size=count))
    sets = [data.draw(st.permutations(range(size)))[:6] for _ in range(count)]
    labels = st.dictionaries(st.integers(0, size - 1), st.sampled_from([1.0, 0.5, 0.2, -1.0]), min_size=1, max_size=4)
    weights = [data.draw(labels) for _ in range(count)]
    indices = torch.tensor(sets)
    relevant = [list(row) + [-1] * (4 - len(row)) for row in weights]
    result = rank(
        torch.tensor(queries).float(),
        torch.tensor(gallery).float(),
        indices[:, 1],
        excluded=indices[:, 0],
        members=indices[:, 1:],
        relevant=torch.tensor(relevant),
        chunk=data.draw(st.integers(1, 3)),
    )
    names = [str(image) for image in range(size)]
    group = Group(
        "cirr",
        tuple(names),
        tuple(
            Query(
                names[r],
                ("",),
                names[t],
                tuple(names[m] for m in (t, *rest)),
                tuple((names[i], w) for i, w in row.items()),
            )
            for (r, t, *rest), row in zip(sets, weights)
        ),
        True,
    )
    scores = [[float(sum(a * b for a, b in zip(query, image))) for image in gallery] for query in queries]
    naive = naive_metrics(scores, sets, weights)
    hard = cirr._metrics({"cirr": result}, group, CIRRConfig("x"))
    soft = cirr._metrics({"cirr": result}, group, CIRRConfig("x", labels="soft"))
    mixed = cirr._metrics({"cirr": result}, group, CIRRConfig("x", labels="covr"))
    for name in hard.keys() - {"mean"}:
        assert hard[name] == pytest.approx(naive[name])
        assert soft[name] == pytest.approx(naive[f"soft {name}"])
        assert mixed[name] == pytest.approx(naive[f"soft {name}" if "subset" in name else name])
    assert hard["mean"] == pytest.approx((naive["R@5"] + naive["R_subset@1"]) / 2)


# -- submission ------------------------------------------------------------------------------------------------------


def test_the_servers_two_files(tmp_path: Path):
    """The gallery's images lie on a line and both queries point along it, so the order is that of the file.

    Query 0 has the reference 0, the best images 1 to 7 and the best members 1, 2, 3. Query 1 has the reference 1.
    """
    benchmark = read_benchmark(write_world(tmp_path), "test")
    (group,) = benchmark.groups
    members = torch.tensor([[group.gallery.index(name) for name in query.members] for query in group.queries])
    result = rank(
        torch.ones(2, 1),
        torch.arange(8, 0, -1).unsqueeze(1).float(),
        torch.tensor([-1, -1]),
        excluded=torch.tensor([0, 1]),
        members=members,
    )
    images = names("test1")
    files = benchmark.submissions({"cirr": result})
    assert files == {
        "cirr_test1_recall.json": {
            "version": "rc2",
            "metric": "recall",
            "0": images[1:],
            "10": [images[0], *images[2:]],
        },
        "cirr_test1_recall_subset.json": {
            "version": "rc2",
            "metric": "recall_subset",
            "0": images[1:4],
            "10": [images[0], *images[2:4]],
        },
    }
    for content in files.values():
        review = cirr.check_submission(content, 0, tmp_path / "cirr" / "captions" / "cap.rc2.test1.json", None)
        assert (review.problems, review.notes, list(review.rows)) == ({}, [], ["0", "10"])
    assert read_benchmark({"root": str(tmp_path)}, "val").submissions({"cirr": result}) == {}


# -- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "cirr_dataset", "CIRR", "cirr"])
@pytest.mark.parametrize(
    ("annotations", "images", "suffix"),
    [("cirr", "", ".png"), ("", "", ".jpg"), ("", "img_raw", ".png"), ("cirr", "img_raw", ".jpeg")],
)
def test_layouts(tmp_path: Path, folder: str, annotations: str, images: str, suffix: str):
    write_world(tmp_path / folder, annotations=annotations, images=images, suffix=suffix)
    config = {"root": str(tmp_path)}
    expected = {name: tmp_path / folder / images / "dev" / f"{name}{suffix}" for name in names("val")}
    assert read_benchmark(config, "val").image_paths == expected
    assert len(read_train(config)[0]) == 2


@pytest.mark.parametrize("root", ["data", "data/cirr"])
def test_the_layout_of_cirrs_own_readme(tmp_path: Path, root: str):
    """The layout is ``data/cirr/captions`` with ``data/img_raw/dev``, and root is the folder or its parent."""
    write_world(tmp_path / "elsewhere", annotations="", images="img_raw")
    (tmp_path / "data" / "cirr").mkdir(parents=True)
    for folder in ("captions", "image_splits"):
        (tmp_path / "elsewhere" / folder).rename(tmp_path / "data" / "cirr" / folder)
    (tmp_path / "elsewhere" / "img_raw").rename(tmp_path / "data" / "img_raw")
    config = {"root": str(tmp_path / root)}
    assert (
        read_benchmark(config, "val")
        .image_paths[names("val")[0]]
        .samefile(tmp_path / "data" / "img_raw" / "dev" / f"{names('val')[0]}.png")
    )
    assert len(read_train(config)[0]) == 2


def test_annotation_files_flat_in_one_folder(tmp_path: Path):
    """CoVR keeps ``annotation/cirr/cap.rc2.val.json`` apart from the images."""
    config = {**write_world(tmp_path), "annotations": str(tmp_path / "annotation" / "cirr")}
    (tmp_path / "annotation" / "cirr").mkdir(parents=True)
    for path in (tmp_path / "cirr").glob("*/*.json"):
        path.rename(tmp_path / "annotation" / "cirr" / path.name)
    assert len(read_benchmark(config, "val").groups[0].queries) == 2


def test_annotations_and_images_apart_and_train_images_without_sub_folders(tmp_path: Path):
    write_world(tmp_path / "annotation", annotations="")
    (tmp_path / "pictures" / "train").mkdir(parents=True)
    for name in names("train"):
        (tmp_path / "pictures" / "train" / f"{name}.jpg").touch()
    config = {
        "root": str(tmp_path / "nowhere"),
        "annotations": str(tmp_path / "annotation"),
        "images": str(tmp_path / "pictures"),
    }
    assert len(read_train(config)[1]) == 6


# -- missing and broken ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "queries"),
    [(7, 2), (0, 0), (4, 0), (6, 2)],
    ids=["only in the gallery", "a reference", "a member", "only in the gallery too"],
)
def test_missing_images(tmp_path: Path, number: int, queries: int):
    config = write_world(tmp_path)
    (tmp_path / "dev" / f"{names('val')[number]}.png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 8 images are missing under .*dev \(first: dev-{number}-img0\)"):
        read_benchmark(config, "val")
    config["missing_images"] = "skip"
    if queries == 0:
        with pytest.raises(ValueError, match="cirr: every query needs an image that is missing"):
            read_benchmark(config, "val")
        return
    benchmark = read_benchmark(config, "val")
    assert len(benchmark.groups[0].gallery) == 7
    assert benchmark.protocol.endswith("; incomplete: 1 of 8 gallery images missing, 0 of 2 queries left out")


def test_skipped_training_triplets_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = {**write_world(tmp_path), "missing_images": "skip"}
    (tmp_path / "train" / "34" / f"{names('train')[0]}.png").unlink()
    triplets, _ = read_train(config)
    assert [t.reference for t in triplets] == [names("train")[1]]
    assert "cirr train: 1 of 2 triplets left out" in caplog.text


def test_missing_files_name_the_key(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"cap.rc2.val.json is in none of .*datasets.cirr.build_info.root"):
        read_benchmark({"root": str(tmp_path)}, "val")
    config = {**write_world(tmp_path), "images": str(tmp_path / "nowhere")}
    with pytest.raises(
        FileNotFoundError, match=r"no image folder; looked for .*nowhere.*datasets.cirr.build_info.images"
    ):
        read_benchmark(config, "val")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": None}, "has reference = null; it must be text"),
        ({"caption": 5}, "has caption = 5; it must be text"),
        ({"target_hard": None}, "has target_hard = null; it must be text"),
        ({"img_set": None}, "needs 'img_set' with 'members'"),
        ({"img_set": {"id": 1}}, "needs 'img_set' with 'members'"),
        ({"img_set": {"members": [1, 2]}}, "needs 'img_set' with 'members'"),
        ({"img_set": {"members": names("val")[3:]}}, "that include the reference and the target"),
        ({"img_set": {"members": [*names("val")[:6], names("val")[0]]}}, "needs distinct 'members'"),
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, change: dict[str, Any], message: str):
    changed = copy.deepcopy(records("val"))
    changed[1].update(change)
    with pytest.raises(ValueError, match=message) as error:
        read_benchmark(write_world(tmp_path, {"val": changed}), "val")
    assert "cap.rc2.val.json: record 1 (counting from 0)" in str(error.value)


def test_images_that_the_split_does_not_list(tmp_path: Path):
    changed = records("train")
    changed[0]["target_hard"] = "stranger"
    with pytest.raises(
        ValueError,
        match=r"uses 1 images that .*split.rc2.train.json does not list \(first: record \d+, .* .stranger.\)",
    ):
        read_train(write_world(tmp_path, {"train": changed}))


@pytest.mark.parametrize("split", ["val", "test1"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairid": None}, "has pairid = null; it must be a whole number"),
        ({"pairid": "10"}, 'has pairid = "10"; it must be a whole number'),
        ({"pairid": True}, "has pairid = true; it must be a whole number"),
        ({"pairid": 0}, "has pairid = 0 like record 0"),
        ({"reference": "../dev-0-img0"}, r'has reference = "\.\./dev-0-img0"; it must be an image name'),
        ({"reference": "/dev-0-img0"}, 'has reference = "/dev-0-img0"; it must be an image name'),
        ({"reference": "a\\b"}, "has reference = .*; it must be an image name"),
        ({"reference": "a\0"}, "has reference = .*; it must be an image name"),
        ({"reference": "\ud800"}, "has reference = .*; it must be text"),
        ({"target_hard": ""}, 'has target_hard = ""; it must be an image name'),
        ({"caption": "half \ud800"}, "has caption = .*; it must be text"),
        ({"img_set": {"members": ["..", "a"]}}, r'has members = "\.\."; it must be an image name'),
    ],
)
def test_every_field_is_checked(tmp_path: Path, split: str, change: dict[str, Any], message: str):
    changed = records(split)
    changed[1].update(change)
    with pytest.raises(ValueError, match=message) as error:
        read_benchmark(write_world(tmp_path, {split: changed}), "val" if split == "val" else "test")
    assert f"cap.rc2.{split}.json: record 1 (counting from 0)" in str(error.value)


def test_pairids_name_the_queries_and_training_needs_none(tmp_path: Path):
    world = write_world(tmp_path)
    for split in ("val", "test", "seen"):
        (group,) = read_benchmark(world, split).groups
        assert [query.identifier for query in group.queries] == ["0", "10"]
    for change, message in (({"pairid": 0}, "has pairid = 0 like record 0"), ({"pairid": 1.5}, "has pairid = 1.5")):
        changed = records("train")
        changed[1].update(change)
        with pytest.raises(ValueError, match=message):
            read_train(write_world(tmp_path, {"train": changed}))


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_caption_is_refused_where_none_is_known(tmp_path: Path, split: str):
    changed = records(split)
    changed[1]["caption"] = " "
    world = write_world(tmp_path, {split: changed})
    with pytest.raises(ValueError, match=rf"cap.rc2.{split}.json: record 1 .* has an empty caption"):
        read_train(world) if split == "train" else read_benchmark(world, "val")


def test_a_blank_caption_of_test1_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    changed = records("test1")
    changed[1]["caption"] = " "
    assert len(read_benchmark(write_world(tmp_path, {"test1": changed}), "test").groups[0].queries) == 2
    assert "1 of 2 captions are blank (pairid, first: 10)" in caplog.text


@pytest.mark.parametrize(
    "labels", [None, {}, [], {"dev-1-img0": "1"}, {"dev-1-img0": 2}, {"dev-1-img0": True}, {"dev-1-img0": float("nan")}]
)
def test_soft_labels_of_another_shape_are_refused_where_they_are_used(tmp_path: Path, labels: Any):
    world = write_world(tmp_path, with_soft_labels({"dev-1-img0": 1.0}, labels))
    assert len(read_benchmark(world, "val").groups[0].queries) == 2
    with pytest.raises(
        ValueError, match=r"cap.rc2.val.json: record 1 .* needs 'target_soft'.*build_info.labels = soft"
    ):
        read_benchmark({**world, "labels": "soft"}, "val")


def test_soft_labels_name_images_of_the_split(tmp_path: Path):
    world = write_world(tmp_path, with_soft_labels({"stranger": 1.0}))
    with pytest.raises(ValueError, match=r"uses 1 images that .* does not list \(first: record \d+, .* .stranger.\)"):
        read_benchmark({**world, "labels": "soft"}, "val")


@pytest.mark.parametrize("place", ["../x.png", "dev/../../x.png", "/dev/x.png", "dev\\x.png", "dev/\0.png", "", "."])
def test_a_path_that_leads_out_of_the_image_folder_is_refused(tmp_path: Path, place: str):
    config = write_world(tmp_path)
    path = tmp_path / "cirr" / "image_splits" / "split.rc2.val.json"
    places = json.loads(path.read_text())
    places[names("val")[3]] = place
    write_json(path, places)
    with pytest.raises(
        ValueError, match=r"split.rc2.val.json: record 3 .* maps dev-3-img0 to .* below the image folder"
    ):
        read_benchmark(config, "val")


def test_a_name_that_leads_out_of_the_image_folder_is_refused(tmp_path: Path):
    config = write_world(tmp_path)
    write_json(tmp_path / "cirr" / "image_splits" / "split.rc2.val.json", {"../x": "dev/x.png"})
    with pytest.raises(ValueError, match=r'split.rc2.val.json: record 0 .* has name = "\.\./x"'):
        read_benchmark(config, "val")


@pytest.mark.parametrize("content", [[], {}, ["a"], {"a": 1}])
def test_a_broken_split_file_is_named(tmp_path: Path, content: Any):
    config = write_world(tmp_path)
    write_json(tmp_path / "cirr" / "image_splits" / "split.rc2.val.json", content)
    with pytest.raises(ValueError, match=r"split.rc2.val.json must map image names to paths"):
        read_benchmark(config, "val")


def test_configuration():
    assert CIRRConfig.from_mapping({"root": "x"}) == CIRRConfig(root="x")
    with pytest.raises(ValueError, match=r"datasets.cirr.build_info.gallery is not a known key") as error:
        CIRRConfig.from_mapping({"root": "x", "gallery": "val", "missing_images": "ignore"})
    assert "missing_images must be one of error, skip, got 'ignore'" in str(error.value)
    with pytest.raises(
        ValueError, match=r"selection_metric must be one of mean, R@1, .*; did you mean 'harmonic_mean'\?"
    ):
        CIRRConfig.from_mapping({"root": "x", "selection_metric": "harmonic"})
    with pytest.raises(ValueError, match=r"labels must be one of hard, soft, cirplant, artemis, covr, got"):
        CIRRConfig.from_mapping({"root": "x", "labels": "both"})


# -- the real annotation files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = real_folder("cirr_dataset")
    images = tmp_path_factory.mktemp("images")
    for path in root.glob("cirr/image_splits/split.*.json"):
        places = json.loads(path.read_text()).values()
        for folder in {str(Path(place).parent) for place in places}:
            (images / folder).mkdir(parents=True, exist_ok=True)
        for place in places:
            (images / place).touch()
    return {"root": str(REAL), "images": str(images)}


@pytest.mark.parametrize(("split", "queries", "gallery"), [("val", 4_181, 2_297), ("test", 4_148, 2_315)])
def test_real_evaluation_files(real: dict[str, str], split: str, queries: int, gallery: int):
    benchmark = read_benchmark(real, split)
    (group,) = benchmark.groups
    assert (len(group.queries), len(group.gallery), len(benchmark.image_paths)) == (queries, gallery, gallery)
    assert {len(query.members) for query in group.queries} == {5}
    never_a_reference = set(group.gallery) - {query.reference for query in group.queries}
    assert len(never_a_reference) == (132 if split == "val" else 137)


def differs(query: Query, among: str | None) -> bool:
    """Return whether other labels than the target with 1.0 can count."""
    allowed = query.members if among else [name for name, _ in query.relevance if name != query.reference]
    counting = {name: weight for name, weight in query.relevance if weight > 0 and name in allowed}
    return counting != {query.target: 1.0}


def test_real_labels(real: dict[str, str]):
    """645 queries have several soft labels. 37 lack their hard target and give 1.0 to the reference instead.

    The labels can change R@K of 100 queries and R_subset@K of 82.
    """
    (group,) = read_benchmark({**real, "labels": "soft"}, "val").groups
    assert sum(len(query.relevance) > 1 for query in group.queries) == 645
    without_target = [query for query in group.queries if query.target not in dict(query.relevance)]
    assert len(without_target) == 37
    assert all(dict(query.relevance)[query.reference] == 1.0 for query in without_target)
    assert [sum(differs(query, among) for query in group.queries) for among in (None, "members")] == [100, 82]
    identifiers = [int(query.identifier) for query in group.queries]
    assert (identifiers[0], identifiers[-1], len(set(identifiers))) == (12060, 38762, 4181)


def test_the_real_blank_caption(real: dict[str, str], caplog: pytest.LogCaptureFixture):
    (group,) = read_benchmark(real, "test").groups
    assert [query.identifier for query in group.queries if query.texts == ("",)] == ["27098"]
    assert "1 of 4148 captions are blank (pairid, first: 27098)" in caplog.text


def test_random_scores_reach_chance_level_on_the_real_queries(real: dict[str, str]):
    """Chance gives R_subset@1/2/3 = 20/40/60 % and R@K = 100 K / 2296 %.

    The standard deviation of a share p over 4,181 queries is at most 0.77 points. Queries of one set are correlated, so
    4 points are allowed, and 0.5 and 1.5 points for the shares of 0.4 and 2.2 %.
    """
    benchmark = read_benchmark({**real, "labels": "soft"}, "val")
    (group,) = benchmark.groups
    index = {name: position for position, name in enumerate(group.gallery)}
    generator = torch.Generator().manual_seed(0)
    width = max(len(query.relevance) for query in group.queries)
    relevant = [[index[name] for name, _ in q.relevance] + [-1] * (width - len(q.relevance)) for q in group.queries]
    result = rank(
        torch.randn(len(group.queries), 16, generator=generator),
        torch.randn(len(group.gallery), 16, generator=generator),
        torch.tensor([index[str(query.target)] for query in group.queries]),
        excluded=torch.tensor([index[query.reference] for query in group.queries]),
        members=torch.tensor([[index[name] for name in query.members] for query in group.queries]),
        relevant=torch.tensor(relevant),
    )
    hard = cirr._metrics({"cirr": result}, group, CIRRConfig("x"))
    for k in (1, 2, 3):
        assert hard[f"R_subset@{k}"] == pytest.approx(20 * k, abs=4)
    for k, allowed in ((1, 0.5), (5, 0.5), (10, 0.5), (50, 1.5)):
        assert hard[f"R@{k}"] == pytest.approx(100 * k / 2296, abs=allowed)
    soft = benchmark.metrics({"cirr": result})
    assert all(abs(soft[name] - hard[name]) <= 100 * (82 if "subset" in name else 100) / 4181 for name in soft)
    assert all(soft[name] != hard[name] for name in soft if "subset" in name)


def test_equal_features_are_ranked_in_the_gallerys_order_on_the_real_queries(real: dict[str, str]):
    """With one feature for all images the numbers are the documented ones, and a naive loop over the file agrees."""
    benchmark = read_benchmark(real, "val")
    (group,) = benchmark.groups
    index = {name: position for position, name in enumerate(group.gallery)}
    result = rank(
        torch.ones(len(group.queries), 1),
        torch.ones(len(group.gallery), 1),
        torch.tensor([index[str(query.target)] for query in group.queries]),
        excluded=torch.tensor([index[query.reference] for query in group.queries]),
        members=torch.tensor([[index[name] for name in query.members] for query in group.queries]),
    )
    metrics = benchmark.metrics({"cirr": result})
    assert (round(metrics["R@50"], 2), round(metrics["R_subset@3"], 2)) == (2.58, 56.30)
    places = [(index[str(q.target)], index[q.reference], [index[name] for name in q.members]) for q in group.queries]
    found = sum(target - (reference < target) < 50 for target, reference, _ in places)
    assert metrics["R@50"] == pytest.approx(100 * found / len(places))
    found = sum(sorted(members).index(target) < 3 for target, _, members in places)
    assert metrics["R_subset@3"] == pytest.approx(100 * found / len(places))


def test_real_training_files(real: dict[str, str], tmp_path: Path):
    """Return the official file in its reduced form (all rows) and an excerpt of its full form."""
    split = REAL / "cirr_dataset" / "cirr" / "image_splits" / "split.rc2.train.json"
    (tmp_path / split.name).symlink_to(split)
    assert len(json.loads(split.read_text())) == 16_939
    captions = tmp_path / "cap.rc2.train.json"
    read = {}
    for shape in ("reconstructed", "excerpt"):
        captions.symlink_to(REAL / "derived" / "cirr" / f"cap.rc2.train.{shape}.json")
        read[shape], paths = read_train({**real, "annotations": str(tmp_path)})
        assert set(paths) == {name for t in read[shape] for name in (t.reference, t.target, *t.members)}
        captions.unlink()
    assert (len(read["reconstructed"]), len(read["excerpt"])) == (28_225, 12)
    assert len({t.reference for t in read["reconstructed"]}) == 16_080
    plain = {replace(triplet, also_right=(), members=()) for triplet in read["excerpt"]}
    assert plain <= set(read["reconstructed"])


def test_real_training_records_say_which_images_are_negatives(real: dict[str, str], tmp_path: Path):
    """The excerpt's 12 records have whole image sets and, as reading shows, one soft label above 0, with 0.5."""
    split = REAL / "cirr_dataset" / "cirr" / "image_splits" / "split.rc2.train.json"
    (tmp_path / split.name).symlink_to(split)
    (tmp_path / "cap.rc2.train.json").symlink_to(REAL / "derived" / "cirr" / "cap.rc2.train.excerpt.json")
    triplets, paths = read_train({**real, "annotations": str(tmp_path)})
    assert [len(t.members) for t in triplets] == [5] * 12
    assert all(t.target in t.members and t.reference not in t.members for t in triplets)
    assert [(t.target, t.also_right) for t in triplets if t.also_right] == [
        ("train-12423-2-img1", ("train-8649-1-img0",))
    ]
    assert set(paths) == {name for t in triplets for name in (t.reference, *t.members)}


def test_real_records_of_val_in_the_place_of_train(real: dict[str, str], tmp_path: Path):
    """In the full form of val, 96 of 4,181 records list 143 right images. The full training file is not here.

    In 37 of these records one right image is the reference. 4, 3 or 2 members remain as negatives.
    """
    folder = REAL / "cirr_dataset" / "cirr"
    (tmp_path / "split.rc2.train.json").symlink_to(folder / "image_splits" / "split.rc2.val.json")
    (tmp_path / "cap.rc2.train.json").symlink_to(folder / "captions" / "cap.rc2.val.json")
    triplets, paths = read_train({**real, "annotations": str(tmp_path)})
    assert (len(triplets), len(paths)) == (4_181, 2_297)
    assert sum(bool(t.also_right) for t in triplets) == 96
    assert sum(len(t.also_right) for t in triplets) == 143
    assert sum(t.reference in t.also_right for t in triplets) == 37
    left = Counter(len({*t.members} - {t.target, *t.also_right}) for t in triplets)
    assert left == {4: 4_118, 3: 57, 2: 6}


def test_random_scores_reach_chance_level():
    """3,000 queries with sets of six in a gallery of 600 give R_subset@1/2/3 = 20/40/60 % and R@K = 100 K / 599 %.

    A share over 3,000 queries has a standard deviation of at most sqrt(0.25 / 3000) = 0.91 points; 3.7 is four of it.
    """
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3000, 32, generator=generator)
    gallery = torch.randn(600, 32, generator=generator)
    sets = torch.stack([torch.randperm(600, generator=generator)[:6] for _ in range(3000)])
    result = rank(query, gallery, sets[:, 1], excluded=sets[:, 0], members=sets[:, 1:])
    for k, expected in ((1, 20), (2, 40), (3, 60)):
        assert 100 * (result.subset_ranks < k).float().mean().item() == pytest.approx(expected, abs=3.7)
    for k in (10, 50):
        assert 100 * (result.ranks < k).float().mean().item() == pytest.approx(100 * k / 599, abs=3.7)
    assert int(result.subset_ranks.max()) == 4
    assert not (result.top == sets[:, :1]).any()


def test_a_test_split_with_some_targets_is_submitted_and_not_scored(tmp_path: Path):
    content = records("test1")
    content[0]["target_hard"] = names("test1")[1]
    benchmark = read_benchmark(write_world(tmp_path, {"test1": content}), "test")
    assert not benchmark.has_targets
    ranking = Ranking(torch.tensor([0, 1]), torch.tensor([[1], [2]]), torch.tensor([0, 1]))
    assert benchmark.metrics({"cirr": ranking}) == {}


def test_the_protocol_line_says_what_was_read(tmp_path: Path):
    """The line counts sets of other sizes. The server's labels are hard, whatever a config says about val."""
    content = records("val")
    content[0]["img_set"]["members"] = names("val")[:4]
    config = {**write_world(tmp_path, {"val": content}), "labels": "soft"}
    val, test = read_benchmark(config, "val").protocol, read_benchmark(config, "test").protocol
    assert "soft labels (the best weight among the first K) in R@K and R_subset" in val
    assert "R_subset among the 3 or 5 other members" in val
    assert "queries, hard targets, R_subset among the 5 other members" in test
