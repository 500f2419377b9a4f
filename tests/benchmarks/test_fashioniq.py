"""FashionIQ: layouts, broken files, protocols and metrics on small files; counts of the real annotation files."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REAL, real_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lavis_cir_plugin.benchmarks import fashioniq
from lavis_cir_plugin.benchmarks.fashioniq import (
    FashionIQConfig,
    check_submission,
    metric_names,
    read_benchmark,
    read_train,
    training_text,
)
from lavis_cir_plugin.benchmarks.types import Benchmark
from lavis_cir_plugin.ranking.ranks import Ranking, rank

DRESS = [
    {"candidate": "A", "target": "B", "captions": ["is red.", " has sleeves, "]},
    {"candidate": "B", "target": "C", "captions": ["", "is longer"]},
]
SPLIT = ["C", "X", "A", "B"]


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_world(
    root: Path,
    records: Any = None,
    split: Any = None,
    *,
    captions: str = "captions",
    images: str = "images",
    suffix: str = ".jpg",
) -> dict[str, Any]:
    """Write the category dress (train, val, test) with empty images, and return a config that reads it."""
    records = DRESS if records is None else records
    split = SPLIT if split is None else split
    for name in ("train", "val", "test"):
        write_json(root / captions / f"cap.dress.{name}.json", records)
        write_json(root / "image_splits" / f"split.dress.{name}.json", split)
    (root / images).mkdir(parents=True, exist_ok=True)
    for name in SPLIT:
        (root / images / f"{name}{suffix}").touch()
    return {"root": str(root), "categories": ["dress"]}


def texts(benchmark: Benchmark) -> list[tuple[str, ...]]:
    return [query.texts for query in benchmark.groups[0].queries]


def ranking(ranks: list[int]) -> Ranking:
    empty = torch.empty(len(ranks), 0, dtype=torch.long)
    return Ranking(torch.tensor(ranks), empty, torch.full((len(ranks),), -1))


# -- protocols -------------------------------------------------------------------------------------------------------


def test_the_default_protocol(tmp_path: Path):
    benchmark = read_benchmark(write_world(tmp_path), "val")
    (group,) = benchmark.groups
    assert (benchmark.name, benchmark.split, benchmark.selection_metric) == ("fashioniq", "val", "mean")
    assert (group.name, group.gallery, group.reference_removed) == ("dress", ("C", "X", "A", "B"), False)
    assert [(query.reference, query.target) for query in group.queries] == [("A", "B"), ("B", "C")]
    assert texts(benchmark) == [("is red and has sleeves",), ("is longer",)]
    assert benchmark.image_paths == {name: tmp_path / "images" / f"{name}.jpg" for name in SPLIT}
    assert benchmark.protocol == (
        "FashionIQ val, original-split gallery (dress 4), reference kept, captions 'a and b', 2 queries, "
        "ties by gallery order; protocol clip4cir"
    )
    assert [query.identifier for query in group.queries] == ["0", "1"]


def test_a_program_may_name_the_folder_by_a_path_object(tmp_path: Path):
    config = write_world(tmp_path)
    assert read_benchmark({**config, "root": tmp_path}, "val").image_paths == read_benchmark(config, "val").image_paths


TEXTS = {
    "and": [("is red and has sleeves",), ("is longer",)],
    "both": [("is red and has sleeves", "has sleeves and is red"), ("is longer", "is longer")],
    "reversed": [(" has sleeves,  and is red.",), ("is longer",)],  # Pic2Word strips nothing
    "two": [("is red and has sleeves",), ("has sleeves and is red",), ("is longer",), ("is longer",)],
    "each": [("is red",), ("has sleeves",), ("is longer",)],
}


@pytest.mark.parametrize(
    ("protocol", "gallery", "removed", "queries"),
    [
        ("clip4cir", "CXAB", False, "and"),
        ("searle", "CXAB", False, "both"),
        ("pic2word", "CXAB", False, "reversed"),
        ("covr", "CXAB", True, "and"),
        ("artemis", "CXAB", True, "two"),
        ("cosmo", "CAB", True, "two"),
        ("val_split", "CAB", True, "each"),
    ],
)
def test_named_protocols(tmp_path: Path, protocol: str, gallery: str, removed: bool, queries: str):
    """X occurs in no query. Both queries of a record have its position in the file as their identifier."""
    benchmark = read_benchmark({**write_world(tmp_path), "protocol": protocol}, "val")
    (group,) = benchmark.groups
    assert ("".join(group.gallery), group.reference_removed) == (gallery, removed)
    assert texts(benchmark) == TEXTS[queries]
    assert benchmark.protocol.endswith(f"; protocol {protocol}")
    assert f"reference {'removed' if removed else 'kept'}" in benchmark.protocol
    assert {query.identifier: query.reference for query in group.queries} == {"0": "A", "1": "B"}


def test_keys_override_the_protocol_and_the_line_says_so(tmp_path: Path):
    config = {**write_world(tmp_path), "protocol": "cosmo"}
    same = read_benchmark({**config, "gallery": "val"}, "val")
    assert same.protocol.endswith("; protocol cosmo")
    other = read_benchmark({**config, "gallery": "original", "captions": "and"}, "val")
    assert other.groups[0].gallery == ("C", "X", "A", "B")
    assert other.groups[0].reference_removed
    assert "original-split gallery (dress 4), reference removed, captions 'a and b'" in other.protocol
    assert other.protocol.endswith("; protocol cosmo except gallery: original, captions: and")


def test_val_split_gallery_and_removed_reference(tmp_path: Path):
    """X occurs in no query. The gallery keeps the order of the split file."""
    benchmark = read_benchmark({**write_world(tmp_path), "gallery": "val", "reference": "removed"}, "val")
    assert benchmark.groups[0].gallery == ("C", "A", "B")
    assert benchmark.groups[0].reference_removed
    assert "VAL-split gallery (dress 3), reference removed" in benchmark.protocol


@pytest.mark.parametrize(
    ("mode", "expected", "words"),
    [
        (
            "both_orders_avg",
            [("is red and has sleeves", "has sleeves and is red"), ("is longer", "is longer")],
            "averaged, 2 queries",
        ),
        (
            "two_queries",
            [("is red and has sleeves",), ("has sleeves and is red",), ("is longer",), ("is longer",)],
            "two queries per triplet ('a and b', 'b and a'), 4 queries",
        ),
        ("per_caption", [("is red",), ("has sleeves",), ("is longer",)], "one query per caption, 3 queries"),
    ],
)
def test_caption_modes(tmp_path: Path, mode: str, expected: list, words: str):
    benchmark = read_benchmark({**write_world(tmp_path), "captions": mode}, "val")
    assert texts(benchmark) == expected
    assert words in benchmark.protocol


@pytest.mark.parametrize("captions", [[" . ", "?"], ["", " "]])
def test_captions_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture, captions: list[str]):
    """Splits that train or score refuse empty captions, but a test split must be answered as it is."""
    config = write_world(tmp_path, [DRESS[0], {"candidate": "A", "target": "B", "captions": captions}])
    for split in ("val", "seen"):
        with pytest.raises(ValueError, match=r"record 1 \(counting from 0\) has 'captions' without a word"):
            read_benchmark(config, split)
    with pytest.raises(ValueError, match=r"record 1 \(counting from 0\) has 'captions' without a word"):
        read_train(config)
    assert texts(read_benchmark(config, "test"))[1] == ("",)
    assert "cap.dress.test.json: record 1 (counting from 0) has captions without a word" in caplog.text
    assert training_text(tuple(captions), random.Random(0)) == ""


def test_the_test_split_has_no_targets_and_no_metrics(tmp_path: Path):
    records = [{"candidate": "A", "captions": ["is red", "is blue"]}]
    config = write_world(tmp_path, records)
    write_json(tmp_path / "captions" / "cap.dress.train.json", DRESS)
    benchmark = read_benchmark(config, "test")
    assert [query.target for query in benchmark.groups[0].queries] == [None]
    for captions in ("two_queries", "per_caption"):
        with pytest.raises(
            ValueError, match=f"captions: {captions} makes several; set it to and, reversed or both_orders_avg"
        ):
            read_benchmark({**config, "captions": captions}, "test")
    assert benchmark.metrics({"dress": ranking([-1])}) == {}
    with pytest.raises(ValueError, match="which test does not have"):
        read_benchmark({**config, "gallery": "val"}, "test")
    with pytest.raises(ValueError, match="has no 'target'"):
        read_benchmark(config, "val")


def test_an_unknown_split_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"val, test and seen, got 'dev'; change datasets.fashioniq.splits"):
        read_benchmark(write_world(tmp_path), "dev")


# -- training --------------------------------------------------------------------------------------------------------


def test_training_triplets(tmp_path: Path):
    """X is in the split file but in no triplet, so its image is not needed."""
    config = write_world(tmp_path)
    (tmp_path / "images" / "X.jpg").unlink()
    triplets, paths = read_train(config)
    assert [(t.reference, t.target, t.category) for t in triplets] == [("A", "B", "dress"), ("B", "C", "dress")]
    assert set(paths) == {"A", "B", "C"}
    assert training_text(triplets[1].captions, random.Random(0)) == "is longer"


def test_training_text_is_drawn_from_four_equally_likely_ways():
    """4,000 draws at 25 % give 1,000 each, with a standard deviation of 27.4; the limit of 137 is five of them."""
    rng = random.Random(0)
    counts = Counter(training_text(("is red.", " has sleeves, "), rng) for _ in range(4000))
    assert set(counts) == {"is red and has sleeves", "has sleeves and is red", "is red", "has sleeves"}
    assert all(abs(count - 1000) < 137 for count in counts.values())


def test_training_text_and_is_always_both(tmp_path: Path):
    triplets, _ = read_train({**write_world(tmp_path), "training_text": "and"})
    rng = random.Random(0)
    assert {training_text(triplets[0].captions, rng) for _ in range(20)} == {"is red and has sleeves"}


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_by_hand(tmp_path: Path):
    """dress has ranks 0, 9, 10, 49 and R@10 50, R@50 100; shirt 50, none and 0, 0; toptee 3 and 100, 100.

    For any numbers of queries R@10 = (50 + 0 + 100) / 3 = 50, R@50 = (100 + 0 + 100) / 3 = 66.67, and mean 58.33.
    """
    metrics = read_benchmark(write_world(tmp_path), "val").metrics(
        {"dress": ranking([0, 9, 10, 49]), "shirt": ranking([50, -1]), "toptee": ranking([3])}
    )
    assert metrics == pytest.approx(
        {
            "dress_R@10": 50.0,
            "shirt_R@10": 0.0,
            "toptee_R@10": 100.0,
            "dress_R@50": 100.0,
            "shirt_R@50": 0.0,
            "toptee_R@50": 100.0,
            "R@10": 50.0,
            "R@50": 200 / 3,
            "mean": 175 / 3,
        }
    )


def test_the_mean_per_query_by_hand(tmp_path: Path):
    """dress has 3 queries with R@10 100/3, R@50 200/3; shirt 1 with 100, 100. So (3 * 100/3 + 100) / 4 = 50, and 75.

    Their mean is 62.5. The weights are the numbers of queries, so repeated ranks, as for chance, change nothing.
    """
    config = {**write_world(tmp_path), "categories": ["dress", "shirt"], "protocol": "artemis"}
    for kind, content in {
        "captions/cap.{}.val.json": DRESS,
        "image_splits/split.{}.val.json": SPLIT,
    }.items():
        for category in ("dress", "shirt"):
            write_json(tmp_path / kind.format(category), content)
    three = [{**DRESS[0], "captions": [text, text]} for text in ("red", "blue", "green")]
    write_json(tmp_path / "captions/cap.dress.val.json", three)
    write_json(tmp_path / "captions/cap.shirt.val.json", DRESS[:1])
    benchmark = read_benchmark({**config, "captions": "and"}, "val")
    for times in (1, 4):
        metrics = benchmark.metrics({"dress": ranking([0, 20, 50] * times), "shirt": ranking([9])})
        assert list(metrics) == metric_names(("dress", "shirt"), "per_query")
        assert metrics["R@10"] == pytest.approx(200 / 3)
        assert [metrics[f"query_{name}"] for name in ("R@10", "R@50", "mean")] == pytest.approx([50, 75, 62.5])
    assert "means per category and per query" in benchmark.protocol
    assert list(read_benchmark(write_world(tmp_path), "val").metrics({"dress": ranking([0])})) == metric_names(
        ("dress",), "per_category"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection_metric": "R@5"}, r"selection_metric must be one of mean, dress_R@10, .*, got 'R@5'; did you mean"),
        ({"selection_metric": "shirt_R@10"}, "shirt_R@10 is not computed with categories dress and average per_categ"),
        ({"selection_metric": "query_mean"}, "query_mean is not computed .*; choose one of dress_R@10, dress_R@50, R@"),
        ({"categories": ["all", "dress"]}, "categories: all, dress would count triplets twice, because all is all of"),
    ],
)
def test_metrics_that_are_not_computed_or_would_count_twice_are_refused(tmp_path: Path, changes: Any, message: str):
    with pytest.raises(ValueError, match=message):
        FashionIQConfig.from_mapping({**write_world(tmp_path), **changes})


def test_the_selection_metric(tmp_path: Path):
    chosen = {"selection_metric": "query_mean", "protocol": "artemis"}
    assert read_benchmark({**write_world(tmp_path), **chosen}, "val").selection_metric == "query_mean"


# -- protocols against loops that know nothing but the protocols.md table --------------------------------------------


def naive_recall(protocol: str, records: list, split: list[str], scores: dict, k: int) -> list[int]:
    """Return a hit (1) or a miss (0) for every query of one category, by sorting per query.

    ``scores`` maps (reference, text) to the score of every image; several texts of one query add up.
    """
    used = {name for record in records for name in (record["candidate"], record["target"])}
    hits = []
    for record in records:
        first, second = record["captions"]
        both, reverse = f"{first} and {second}", f"{second} and {first}"
        queries = {
            "clip4cir": [[both]],
            "searle": [[both, reverse]],
            "pic2word": [[reverse]],
            "covr": [[both]],
            "artemis": [[both], [reverse]],
            "cosmo": [[both], [reverse]],
            "val_split": [[first], [second]],
        }[protocol]
        for query in queries:
            gallery = [name for name in split if protocol not in ("cosmo", "val_split") or name in used]
            if protocol not in ("clip4cir", "searle", "pic2word"):
                gallery.remove(record["candidate"])
            total = {name: sum(scores[record["candidate"], text][name] for text in query) for name in gallery}
            best = sorted(gallery, key=lambda name: (-total[name], gallery.index(name)))
            hits.append(int(record["target"] in best[:k]))
    return hits


@pytest.mark.parametrize("protocol", ["clip4cir", "searle", "pic2word", "covr", "artemis", "cosmo", "val_split"])
@settings(max_examples=12, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_protocol_equals_its_naive_implementation(
    tmp_path_factory: pytest.TempPathFactory, protocol: str, rng: random.Random
):
    """The test leads from the JSON files to R@10. Features of -1, 0 and 1 give many ties and negative scores."""
    root = tmp_path_factory.mktemp("world")
    hits, rankings = {}, {}
    worlds = {}
    for category in ("dress", "shirt"):
        split = [f"{category}{number}" for number in range(rng.randint(12, 30))]
        pairs = [rng.sample(split, 2) for _ in range(rng.randint(1, 5))]
        records = [
            {"candidate": a, "target": b, "captions": [f"x{number}", f"y{number}"]}
            for number, (a, b) in enumerate(pairs)
        ]
        write_json(root / "captions" / f"cap.{category}.val.json", records)
        write_json(root / "image_splits" / f"split.{category}.val.json", split)
        for name in split:
            (root / "images").mkdir(exist_ok=True)
            (root / "images" / f"{name}.jpg").touch()
        worlds[category] = records, split
    config = {"root": str(root), "categories": ["dress", "shirt"], "protocol": protocol}
    benchmark = read_benchmark(config, "val")
    for group in benchmark.groups:
        records, split = worlds[group.name]
        images = {name: [rng.choice([-1, 0, 1]) for _ in range(4)] for name in split}
        features: dict[tuple[str, str], list[int]] = {}
        for record in records:
            first, second = record["captions"]
            for text in (first, second, f"{first} and {second}", f"{second} and {first}"):
                features[record["candidate"], text] = [rng.choice([-1, 0, 1]) for _ in range(4)]
        scores = {
            key: {name: sum(a * b for a, b in zip(feature, image)) for name, image in images.items()}
            for key, feature in features.items()
        }
        hits[group.name] = naive_recall(protocol, records, split, scores, 10)
        index = {name: place for place, name in enumerate(group.gallery)}
        summed = [
            [sum(column) for column in zip(*(features[query.reference, text] for text in query.texts))]
            for query in group.queries
        ]
        rankings[group.name] = rank(
            torch.tensor(summed).float(),
            torch.tensor([images[name] for name in group.gallery]).float(),
            torch.tensor([index[str(query.target)] for query in group.queries]),
            excluded=torch.tensor([index[query.reference] for query in group.queries])
            if group.reference_removed
            else None,
        )
    metrics = benchmark.metrics(rankings)
    expected = {category: 100 * sum(found) / len(found) for category, found in hits.items()}
    assert {category: metrics[f"{category}_R@10"] for category in hits} == pytest.approx(expected)
    assert metrics["R@10"] == pytest.approx(sum(expected.values()) / 2)
    if protocol == "artemis":
        all_hits = [hit for found in hits.values() for hit in found]
        assert metrics["query_R@10"] == pytest.approx(100 * sum(all_hits) / len(all_hits))


# -- submissions -----------------------------------------------------------------------------------------------------


def test_the_submission_is_the_caption_file_with_a_ranking(tmp_path: Path):
    """The gallery is C, X, A, B. -1 pads a ranking without its reference. The file passes its own check."""
    records = [{"candidate": "A", "captions": ["is red", "is blue"], "extra": 1}]
    benchmark = read_benchmark({**write_world(tmp_path, records), "reference": "removed"}, "test")
    empty = torch.empty(1, 0, dtype=torch.long)
    best = Ranking(torch.tensor([-1]), torch.tensor([[3, 0, 1, -1]]), torch.tensor([-1]), empty)
    files = benchmark.submissions({"dress": best})
    assert files == {"dress.test.pred.json": [{**records[0], "ranking": ["B", "C", "X"]}]}
    assert read_benchmark(write_world(tmp_path), "val").submissions({"dress": best}) == {}


def review(tmp_path: Path, change: Any = None, records: Any = None, size: int = 60) -> Any:
    """Check a file with the whole gallery in order for every record, after ``change`` has modified it."""
    split = [f"I{number}" for number in range(size)]
    records = records or [
        {"candidate": "I0", "target": "I20", "captions": ["is red", "is blue"]},
        {"candidate": "I1", "target": "I3", "captions": ["is red", "is blue"]},
    ]
    write_json(tmp_path / "captions" / "cap.dress.val.json", records)
    write_json(tmp_path / "image_splits" / "split.dress.val.json", split)
    content = [{**record, "ranking": split[:50]} for record in copy.deepcopy(records)]
    content = content if change is None else change(content) or content
    return check_submission(content, 0, tmp_path / "captions" / "cap.dress.val.json", None)


def test_a_right_submission_of_val_is_scored(tmp_path: Path):
    """The targets are at 20 and 3, so one of two is within 10 and both are within 50."""
    found = review(tmp_path)
    assert found.problems == {}
    assert found.metrics == {"R@10": 50.0, "R@50": 100.0}


def set_ranking(value: Any):
    def change(content: list) -> None:
        content[1]["ranking"] = value(content[1]["ranking"])

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda content: {"0": []}, "file that is no list"),
        (lambda content: content[:1], "queries missing"),
        (lambda content: [*content, content[0]], "unknown queries"),
        (lambda content: content[::-1], "records with another candidate or other captions than the annotation's"),
        (lambda content: ["x", content[1]], "queries with a value that is no image's name"),
        (set_ranking(lambda names: names[:49]), "queries without exactly 50 images"),
        (set_ranking(lambda names: [*names[:49], names[0]]), "queries with an image twice"),
        (set_ranking(lambda names: [*names[:49], "unknown"]), "queries with an image that is not in the gallery"),
        (set_ranking(lambda names: [*names[:49], 3]), "queries with a value that is no image's name"),
        (set_ranking(lambda names: None), "queries with a value that is no image's name"),
    ],
)
def test_a_wrong_submission_is_refused(tmp_path: Path, change: Any, problem: str):
    found = review(tmp_path, change)
    assert problem in found.problems
    assert found.metrics == {}
    assert f"refused: {problem}" in str(found)


# -- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "fashionIQ_dataset", "FashionIQ", "fashion-iq"])
@pytest.mark.parametrize(
    ("captions", "images", "suffix"),
    [
        ("captions", "images", ".jpg"),
        ("json", "images", ".png"),
        ("captions", "resized_images/dress", ".jpg"),
        ("captions", "resized_image/dress", ".jpeg"),
        ("captions", "image_data/dress", ".jpg"),
    ],
)
def test_layouts(tmp_path: Path, folder: str, captions: str, images: str, suffix: str):
    write_world(tmp_path / folder, captions=captions, images=images, suffix=suffix)
    config = {"root": str(tmp_path), "categories": ["dress"]}
    expected = {name: tmp_path / folder / images / f"{name}{suffix}" for name in SPLIT}
    assert read_benchmark(config, "val").image_paths == expected
    assert len(read_train(config)[0]) == 2


def test_annotations_and_images_apart(tmp_path: Path):
    """All JSON files lie in one folder and the pictures in another, neither below root."""
    write_json(tmp_path / "annotation" / "cap.dress.val.json", DRESS)
    write_json(tmp_path / "annotation" / "split.dress.val.json", SPLIT)
    (tmp_path / "pictures").mkdir()
    for name in SPLIT:
        (tmp_path / "pictures" / f"{name}.png").touch()
    config = {
        "root": str(tmp_path / "nowhere"),
        "annotations": str(tmp_path / "annotation"),
        "images": str(tmp_path / "pictures"),
        "categories": ["dress"],
    }
    assert len(read_benchmark(config, "val").image_paths) == 4


def test_unknown_keys_of_records_and_a_byte_order_mark_are_tolerated(tmp_path: Path):
    config = write_world(tmp_path)
    path = tmp_path / "captions" / "cap.dress.val.json"
    content = json.dumps([{**record, "extra": 1} for record in DRESS])
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert len(read_benchmark(config, "val").groups[0].queries) == 2


# -- missing and broken ----------------------------------------------------------------------------------------------


def test_a_missing_image_is_an_error_or_reported(tmp_path: Path):
    config = write_world(tmp_path)
    (tmp_path / "images" / "C.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 images are missing under .*images \(first: C\)"):
        read_benchmark(config, "val")
    with pytest.raises(FileNotFoundError, match="1 of 3 images are missing"):
        read_train(config)

    benchmark = read_benchmark({**config, "missing_images": "skip"}, "val")
    assert benchmark.groups[0].gallery == ("X", "A", "B")
    assert [query.reference for query in benchmark.groups[0].queries] == ["A"]
    assert "gallery (dress 3)" in benchmark.protocol
    assert benchmark.protocol.endswith("; incomplete: 1 of 4 gallery images missing, 1 of 2 queries left out")


def test_skipped_training_triplets_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = {**write_world(tmp_path), "missing_images": "skip"}
    (tmp_path / "images" / "C.jpg").unlink()
    triplets, _ = read_train(config)
    assert [t.target for t in triplets] == ["B"]
    assert "fashioniq train: 1 of 2 triplets left out" in caplog.text


def test_nothing_left_is_an_error(tmp_path: Path):
    config = {**write_world(tmp_path), "missing_images": "skip"}
    (tmp_path / "images" / "B.jpg").unlink()
    with pytest.raises(ValueError, match="every triplet needs an image that is missing"):
        read_train(config)
    with pytest.raises(ValueError, match="dress: every query needs an image that is missing"):
        read_benchmark(config, "val")


def test_verification_on_demand(tmp_path: Path):
    config = write_world(tmp_path)
    with pytest.raises(ValueError, match="4 of 4 image files cannot be read"):
        read_benchmark({**config, "verify_images": True}, "val")
    for name in SPLIT:
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{name}.jpg")
    read_benchmark({**config, "verify_images": True}, "val")


def test_missing_annotations_name_the_places_and_the_key(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"cap.dress.val.json is in none of .*datasets.fashioniq.build_info.root"
    ):
        read_benchmark({"root": str(tmp_path)}, "val")
    config = write_world(tmp_path)
    (tmp_path / "image_splits" / "split.dress.val.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"split.dress.val.json is in none of"):
        read_benchmark(config, "val")


def test_a_missing_image_folder_names_the_key(tmp_path: Path):
    config = {**write_world(tmp_path), "images": str(tmp_path / "nowhere")}
    with pytest.raises(FileNotFoundError, match=r"no image folder; looked for .*nowhere.*build_info.images"):
        read_benchmark(config, "val")


MISSING = object()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("candidate", MISSING, "has no 'candidate'; it must be text"),
        ("candidate", 7, "has candidate = 7; it must be text"),
        ("candidate", "", 'has candidate = ""; it must be an image name'),
        ("candidate", "../A", r'has candidate = "\.\./A"; it must be an image name, that is text without /'),
        ("target", "a\\b", "it must be an image name"),
        ("target", "B\0", "it must be an image name"),
        ("captions", ["is red", "\ud800"], "needs 'captions'"),
        ("target", MISSING, "has no 'target'"),
        ("target", None, "has target = null"),
        ("target", ["B"], "has target = "),
        ("captions", MISSING, "needs 'captions', a list of 2 texts"),
        ("captions", "is red", "needs 'captions'"),
        ("captions", ["is red"], "needs 'captions'"),
        ("captions", ["a", "b", "c"], "needs 'captions'"),
        ("captions", ["is red", None], "needs 'captions'"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_record_is_named(tmp_path: Path, field: str, value: Any, message: str, split: str):
    records: list[dict[str, Any]] = copy.deepcopy(DRESS)
    records[1][field] = value
    if value is MISSING:
        del records[1][field]
    config = write_world(tmp_path, records)
    with pytest.raises(ValueError, match=message) as error:
        read_train(config) if split == "train" else read_benchmark(config, split)
    assert f"cap.dress.{split}.json: record 1 (counting from 0)" in str(error.value)


@pytest.mark.parametrize(
    ("records", "split", "message"),
    [
        ({}, None, "must hold a non-empty list of objects"),
        ([], None, "must hold a non-empty list of objects"),
        ([DRESS[0], "x"], None, r"record 1 \(counting from 0\) must be an object"),
        (None, {"A": "A.jpg"}, "must hold a non-empty list of image names"),
        (None, [], "must hold a non-empty list of image names"),
        (None, ["A", 1], "must hold a non-empty list of image names"),
        (None, ["A", "B", "C", "A"], "lists 1 images twice"),
        (None, ["A", "B", "C", "/etc/passwd"], r'record 3 .* has name = "/etc/passwd"; it must be an image name'),
        (
            None,
            ["A", "X"],
            r"uses 2 images that .*split.dress.val.json does not list \(first: record 0, .* target = .B.\)",
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, records: Any, split: Any, message: str):
    with pytest.raises(ValueError, match=message):
        read_benchmark(write_world(tmp_path, records, split), "val")


def test_broken_json_names_line_and_column(tmp_path: Path):
    config = write_world(tmp_path)
    path = tmp_path / "captions" / "cap.dress.val.json"
    path.write_text('[\n  {"candidate": }\n]')
    with pytest.raises(ValueError, match=r"cap.dress.val.json is not valid JSON: .* at line 2, column 17"):
        read_benchmark(config, "val")
    path.write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match=r"is not UTF-8 text \(byte 2\)"):
        read_benchmark(config, "val")


# -- configuration ---------------------------------------------------------------------------------------------------


def test_defaults():
    assert FashionIQConfig.from_mapping({"root": "x"}) == FashionIQConfig(
        root="x",
        categories=("dress", "shirt", "toptee"),
        gallery="original",
        reference="kept",
        captions="and",
        training_text="random4",
        missing_images="error",
    )


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"galery": "val"}, r"datasets.fashioniq.build_info.galery is not a known key; did you mean 'gallery'\?"),
        ({"xyz": 1}, "xyz is not a known key. Known: root, annotations"),
        ({"gallery": "VALL"}, "gallery must be one of original, val, got 'VALL'"),
        ({"captions": "two_querys"}, r"one of and, .*, got 'two_querys'; did you mean 'two_queries'\?"),
        ({"categories": []}, "categories must be a non-empty list of distinct names from dress, shirt, toptee"),
        ({"categories": "dress"}, "distinct names from dress, shirt, toptee, all, got 'dress'"),
        ({"categories": ["dress", "dress"]}, "distinct names"),
        ({"categories": ["pants"]}, "distinct names"),
        ({"categories": [["dress"]]}, "distinct names"),
        ({"root": 3}, "root must be the path of a folder, got 3"),
        ({"root": None}, "root must be the path of a folder, got null"),
        ({"images": ""}, "images must be the path of a folder, or null, got ''"),
        ({"verify_images": "yes"}, "verify_images must be true or false, got 'yes'"),
        ({"gallery": ["val"]}, "gallery must be one of original, val"),
    ],
)
def test_wrong_configurations_are_refused(mapping: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        FashionIQConfig.from_mapping({"root": "x", **mapping})


def test_all_errors_of_a_configuration_are_reported_at_once():
    with pytest.raises(ValueError, match="root is required") as error:
        FashionIQConfig.from_mapping({"galery": "val", "reference": "gone"})
    assert len(str(error.value).splitlines()) == 3


# -- the real annotation files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = real_folder("fashionIQ_dataset")
    images = tmp_path_factory.mktemp("images")
    for path in root.glob("image_splits/split.*.json"):
        if ".test." not in path.name:
            for name in json.loads(path.read_text()):
                (images / f"{name}.jpg").touch()
    return {"root": str(REAL), "images": str(images)}


def test_real_training_files(real: dict[str, str]):
    triplets, paths = read_train(real)
    assert len(triplets) == 18_000
    assert Counter(t.category for t in triplets) == {"dress": 5_985, "shirt": 5_988, "toptee": 6_027}
    assert set(paths) == {name for t in triplets for name in (t.reference, t.target)}
    assert any("ombré" in caption for t in triplets for caption in t.captions)
    rng = random.Random(0)
    incomplete = [t.captions for t in triplets if any(not caption.strip(".?, ") for caption in t.captions)]
    assert len(incomplete) == 13
    for captions in incomplete:
        assert training_text(captions, rng) == max(captions, key=len).strip(".?, ")


def test_real_validation_files(real: dict[str, str]):
    benchmark = read_benchmark(real, "val")
    sizes = [(group.name, len(group.queries), len(group.gallery)) for group in benchmark.groups]
    assert sizes == [("dress", 2_017, 3_817), ("shirt", 2_038, 6_346), ("toptee", 1_961, 5_373)]
    assert sum(queries for _, queries, _ in sizes) == 6_016
    assert len(benchmark.image_paths) == 15_415
    for group in benchmark.groups:
        assert {query.reference for query in group.queries} <= set(group.gallery)
        assert all(query.texts[0] for query in group.queries)


def test_what_is_odd_in_the_real_files(real_annotations: Path):
    """The files have val images in another category's train split, and empty captions; see docs/protocols.md."""
    root = real_annotations / "fashionIQ_dataset"

    def images(category: str, split: str) -> set[str]:
        return set(json.loads((root / "image_splits" / f"split.{category}.{split}.json").read_text()))

    names = ("dress", "shirt", "toptee")
    shared = {(a, b): len(images(a, "val") & images(b, "train")) for a in names for b in names}
    assert {pair: count for pair, count in shared.items() if count} == {
        ("toptee", "shirt"): 392,
        ("shirt", "toptee"): 419,
    }
    empty = {}
    for split, name in ((split, name) for split in ("train", "val") for name in names):
        records = json.loads((root / "captions" / f"cap.{name}.{split}.json").read_text())
        blank = [record["captions"] for record in records if not all(text.strip() for text in record["captions"])]
        assert split == "train" or all(second for _, second in blank)
        empty[split, name] = len(blank)
    assert {key: count for key, count in empty.items() if count} == {
        ("train", "toptee"): 12,
        ("val", "shirt"): 1,
        ("val", "toptee"): 2,
    }


def test_real_val_split_galleries(real: dict[str, str]):
    galleries = {group.name: group.gallery for group in read_benchmark({**real, "gallery": "val"}, "val").groups}
    assert {name: len(gallery) for name, gallery in galleries.items()} == {
        "dress": 2_628,
        "shirt": 3_089,
        "toptee": 2_902,
    }
    expected = json.loads((REAL / "derived" / "fashioniq" / "val_split_galleries.json").read_text())
    assert {name: list(gallery) for name, gallery in galleries.items()} == expected


def test_real_numbers_of_queries_are_those_of_the_table(real: dict[str, str]):
    """Three of the 12,032 captions of val are empty. The module's table has equal keys and numbers."""
    rows = [line.split() for line in str(fashioniq.__doc__).splitlines() if line.startswith("``")]
    table = {row[0].strip("`"): row[1:6] for row in rows if row[0].strip("`") in fashioniq.PROTOCOLS}
    assert {name: tuple(row[:4]) for name, row in table.items()} == fashioniq.PROTOCOLS
    counts = {
        name: sum(len(group.queries) for group in read_benchmark({**real, "protocol": name}, "val").groups)
        for name in fashioniq.PROTOCOLS
    }
    assert {name: int(row[4].replace(",", "")) for name, row in table.items()} == counts
    assert sorted(set(counts.values())) == [6_016, 12_029, 12_032]


def test_merged_files_of_all_categories(tmp_path: Path):
    """CoVR's layout has one file for the three categories, whose galleries share images."""
    config = {**write_world(tmp_path), "categories": ["all"]}
    for split in ("train", "val"):
        (tmp_path / "captions" / f"cap.dress.{split}.json").rename(tmp_path / "captions" / f"cap.all.{split}.json")
        write_json(tmp_path / "image_splits" / f"split.all.{split}.json", [*SPLIT, SPLIT[0]])
    assert len(read_train(config)[0]) == len(DRESS)
    (group,) = read_benchmark(config, "val").groups
    assert group.gallery == tuple(SPLIT)
    assert len(group.queries) == len(DRESS)
