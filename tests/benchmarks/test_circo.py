"""CIRCO: layouts, broken files, mAP by hand and against a naive loop, counts of the real annotation files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_cir_plugin.benchmarks import circo
from lavis_cir_plugin.benchmarks.circo import CIRCOConfig, read_benchmark, read_train, training_text
from lavis_cir_plugin.ranking.ranks import Ranking, rank

IDS = [900, 17, 42, 5, 243611, 8]  # unordered, as in COCO's list
NAMES = [f"{image:012d}" for image in IDS]


def records(split: str) -> list[dict[str, Any]]:
    """Write two queries in the official shape."""
    official: list[dict[str, Any]] = [
        {
            "reference_img_id": 900,
            "target_img_id": 42,
            "relative_caption": " shows two dogs ",
            "shared_concept": "a dog",
            "gt_img_ids": [42, 17, 8],
            "id": 0,
            "semantic_aspects": ["cardinality", "viewpoint"],
        },
        {
            "reference_img_id": 17,
            "target_img_id": 5,
            "relative_caption": "is red",
            "shared_concept": "a car",
            "gt_img_ids": [5],
            "id": 1,
            "semantic_aspects": ["viewpoint"],
        },
    ]
    if split == "test":
        for record in official:
            del record["target_img_id"], record["gt_img_ids"], record["semantic_aspects"]
    return official


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_world(
    root: Path,
    changed: dict[str, Any] | None = None,
    *,
    coco: str = "COCO2017_unlabeled/",
    images: str = "COCO2017_unlabeled/unlabeled2017",
    suffix: str = ".jpg",
) -> dict[str, Any]:
    changed = changed or {}
    for split in ("val", "test"):
        write_json(root / "annotations" / f"{split}.json", changed.get(split, records(split)))
    listing = [{"id": image, "file_name": f"{name}.jpg", "height": 4} for image, name in zip(IDS, NAMES)]
    write_json(
        root / f"{coco}annotations" / "image_info_unlabeled2017.json",
        changed.get("gallery", {"info": {}, "images": listing, "licenses": []}),
    )
    (root / images).mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (root / images / f"{name}{suffix}").touch()
    return {"root": str(root)}


def change(number: int, split: str = "val", **fields: Any) -> dict[str, Any]:
    changed = records(split)
    changed[number].update(fields)
    return {split: changed}


def ranking(ranks: list[int], relevant: list[list[int]]) -> dict[str, Ranking]:
    empty = torch.empty(len(ranks), 0, dtype=torch.long)
    return {"circo": Ranking(torch.tensor(ranks), empty, torch.tensor(ranks), torch.tensor(relevant))}


def test_validation(tmp_path: Path):
    benchmark = read_benchmark(write_world(tmp_path), "val")
    (group,) = benchmark.groups
    assert (benchmark.name, benchmark.split, benchmark.selection_metric) == ("circo", "val", "mAP@5")
    assert (group.name, group.gallery, group.reference_removed) == ("circo", tuple(NAMES), False)
    first, second = group.queries
    assert (first.reference, first.texts, first.target) == (NAMES[0], ("shows two dogs",), NAMES[2])
    assert first.relevance == ((NAMES[2], 1.0), (NAMES[1], 1.0), (NAMES[5], 1.0))
    assert (first.identifier, second.identifier, second.members) == ("0", "1", ())
    folder = tmp_path / "COCO2017_unlabeled" / "unlabeled2017"
    assert benchmark.image_paths == {name: folder / f"{name}.jpg" for name in NAMES}
    assert benchmark.protocol == (
        "CIRCO val, gallery of 6 images, reference kept, relative captions, 2 queries, "
        "mAP@K over min(K, ground truths), ties by gallery order"
    )


def test_the_shared_concept_and_the_removed_reference(tmp_path: Path):
    config = {**write_world(tmp_path), "text": "shared_and_relative", "reference": "removed"}
    benchmark = read_benchmark(config, "val")
    (group,) = benchmark.groups
    assert [query.texts for query in group.queries] == [
        ("find a dog but shows two dogs",),
        ("find a car but is red",),
    ]
    assert group.reference_removed
    assert "reference removed, texts 'find <shared concept> but <relative caption>'" in benchmark.protocol


def test_test_has_no_metrics_and_there_is_no_training(tmp_path: Path):
    config = write_world(tmp_path)
    benchmark = read_benchmark(config, "test")
    assert [(query.target, query.relevance) for query in benchmark.groups[0].queries] == [(None, ()), (None, ())]
    assert benchmark.metrics({}) == {}
    with pytest.raises(ValueError, match=r"CIRCO has no training split; train on another data set"):
        read_train(config)
    with pytest.raises(ValueError, match="no training split"):
        training_text(("a",), random.Random(0))
    with pytest.raises(ValueError, match=r"circo has the evaluation splits val and test, got 'seen'"):
        read_benchmark(config, "seen")


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_by_hand(tmp_path: Path):
    """Query 0 has 3 ground truths at ranks 1, 3 and 9 (its target), query 1 has one at rank 5.

    AP@5 = (1/2 + 2/4) / 3 = 1/3 and 0. AP@10 = (1/2 + 2/4 + 3/10) / 3 = 1.3 / 3 and 1/6, as at 25 and 50.
    """
    benchmark = read_benchmark(write_world(tmp_path), "val")
    metrics = benchmark.metrics(ranking([9, 5], [[9, 1, 3], [5, -1, -1]]))
    ten = 100 * (1.3 / 3 + 1 / 6) / 2
    assert metrics == pytest.approx(
        {
            "mAP@5": 100 / 6,
            "mAP@10": ten,
            "mAP@25": ten,
            "mAP@50": ten,
            "Recall@5": 0.0,
            "Recall@10": 100.0,
            "Recall@25": 100.0,
            "Recall@50": 100.0,
            "mAP@10_cardinality": 130 / 3,
            "mAP@10_viewpoint": ten,
        }
    )


def test_more_ground_truths_than_places_can_reach_100():
    """Seven ground truths at ranks 0 to 6 give AP@5 = 5 / min(5, 7) = 1 and AP@10 = 7 / 7 = 1."""
    metrics = circo._metrics(ranking([0], [list(range(7))]), ["0"], {"0": ["negation"]})
    assert set(metrics.values()) == {100.0}
    assert [name for name in metrics if "_" in name] == ["mAP@10_negation"]


def naive_metrics(scores: list[list[float]], truths: list[list[int]], aspects: list[list[str]]) -> dict[str, float]:
    """Compute the metrics down every sorted list, one query at a time."""
    values: dict[str, list[float]] = {}
    for row, relevant, carried in zip(scores, truths, aspects):
        order = sorted(range(len(row)), key=lambda image: -row[image])  # a stable sort orders equal scores by index
        for k in (5, 10, 25, 50):
            found, total = 0, 0.0
            for position, image in enumerate(order[:k], start=1):
                if image in relevant:
                    found += 1
                    total += found / position
            values.setdefault(f"mAP@{k}", []).append(total / min(k, len(relevant)))
            values.setdefault(f"Recall@{k}", []).append(float(relevant[0] in order[:k]))
        for aspect in carried:
            values.setdefault(f"mAP@10_{aspect}", []).append(values["mAP@10"][-1])
    return {name: 100 * sum(some) / len(some) for name, some in values.items()}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_a_naive_implementation(data: st.DataObject):
    """The cases have few, small, negative and equal features with ties, a single query, and uneven chunks."""
    size, count = data.draw(st.integers(6, 30)), data.draw(st.integers(1, 4))
    vectors = st.lists(st.integers(-2, 1), min_size=2, max_size=2)
    gallery = data.draw(st.lists(vectors, min_size=size, max_size=size))
    queries = data.draw(st.lists(vectors, min_size=count, max_size=count))
    truths = [data.draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True)) for _ in range(count)]
    aspects = [data.draw(st.lists(st.sampled_from(circo.ASPECTS), unique=True)) for _ in range(count)]
    width = max(map(len, truths))
    result = rank(
        torch.tensor(queries).float(),
        torch.tensor(gallery).float(),
        torch.tensor([row[0] for row in truths]),
        relevant=torch.tensor([row + [-1] * (width - len(row)) for row in truths]),
        chunk=data.draw(st.integers(1, 3)),
    )
    scores = [[float(sum(a * b for a, b in zip(query, image))) for image in gallery] for query in queries]
    identifiers = [str(number) for number in range(count)]
    metrics = circo._metrics({"circo": result}, identifiers, dict(zip(identifiers, aspects)))
    assert metrics == pytest.approx(naive_metrics(scores, truths, aspects))
    order = [name.split("_", 1)[1] for name in metrics if "_" in name]
    assert order == [aspect for aspect in circo.ASPECTS if aspect in order]


# -- submission ------------------------------------------------------------------------------------------------------


def test_the_servers_file(tmp_path: Path):
    """Both queries point along the gallery's line, so the order is that of the list. Ids are integers."""
    config = write_world(tmp_path)
    result = rank(torch.ones(2, 1), torch.arange(6, 0, -1).unsqueeze(1).float(), torch.tensor([-1, -1]))
    submissions = read_benchmark(config, "test").submissions({"circo": result})
    assert submissions == {"circo_test.json": {"0": IDS, "1": IDS}}
    review = circo.check_submission(submissions["circo_test.json"], 0, tmp_path / "annotations" / "test.json", None)
    assert (review.problems, list(review.rows.values())) == ({}, [IDS, IDS])
    assert read_benchmark(config, "val").submissions({"circo": result}) == {}
    removed = rank(
        torch.ones(2, 1),
        torch.arange(6, 0, -1).unsqueeze(1).float(),
        torch.tensor([-1, -1]),
        excluded=torch.tensor([0, 1]),
    )
    submissions = read_benchmark({**config, "reference": "removed"}, "test").submissions({"circo": removed})
    assert submissions == {"circo_test.json": {"0": IDS[1:], "1": [IDS[0], *IDS[2:]]}}


# -- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "CIRCO", "circo"])
@pytest.mark.parametrize(
    ("coco", "images", "suffix"),
    [
        ("COCO2017_unlabeled/", "COCO2017_unlabeled/unlabeled2017", ".jpg"),
        ("", "unlabeled2017", ".png"),
        ("COCO2017_unlabeled/", "COCO2017_unlabeled", ".jpeg"),
    ],
)
def test_layouts(tmp_path: Path, folder: str, coco: str, images: str, suffix: str):
    write_world(tmp_path / folder, coco=coco, images=images, suffix=suffix)
    benchmark = read_benchmark({"root": str(tmp_path)}, "val")
    assert benchmark.image_paths == {name: tmp_path / folder / images / f"{name}{suffix}" for name in NAMES}


@pytest.mark.parametrize("images", ["coco", "coco/unlabeled2017"])
def test_annotations_and_images_apart(tmp_path: Path, images: str):
    """COCO's list is found beside the images if ``images`` is their folder or the folder above."""
    write_world(tmp_path, coco="coco/", images="coco/unlabeled2017")
    config = {
        "root": str(tmp_path / "nowhere"),
        "annotations": str(tmp_path / "annotations"),
        "images": str(tmp_path / images),
    }
    assert len(read_benchmark(config, "test").image_paths) == 6


# -- missing and broken ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "left"),
    [(4, ["0", "1"]), (0, ["1"]), (2, ["1"]), (5, ["1"]), (3, ["0"])],
    ids=["only in the gallery", "a reference", "a target", "another ground truth", "the other target"],
)
def test_missing_images(tmp_path: Path, number: int, left: list[str]):
    """Queries that are left out do not shift the aspects of others, which are found by identifier."""
    config = write_world(tmp_path)
    (tmp_path / "COCO2017_unlabeled" / "unlabeled2017" / f"{NAMES[number]}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=rf"circo: 1 of 6 images are missing .*\(first: {NAMES[number]}\)"):
        read_benchmark(config, "val")
    benchmark = read_benchmark({**config, "missing_images": "skip"}, "val")
    (group,) = benchmark.groups
    assert [query.identifier for query in group.queries] == left
    assert benchmark.protocol.endswith(
        f"; incomplete: 1 of 6 gallery images missing, {2 - len(left)} of 2 queries left out"
    )
    metrics = benchmark.metrics(ranking([0] * len(left), [[0]] * len(left)))
    assert ("mAP@10_cardinality" in metrics) == ("0" in left)


def test_missing_files_name_the_key(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"val.json is in none of .*datasets.circo.build_info.root"):
        read_benchmark({"root": str(tmp_path)}, "val")
    config = write_world(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no image folder; looked for .*datasets.circo.build_info.images"):
        read_benchmark({**config, "images": str(tmp_path / "nowhere")}, "val")
    (tmp_path / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"image_info_unlabeled2017.json is in none of"):
        read_benchmark(config, "val")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": "1"}, 'has id = "1"; it must be a whole number'),
        ({"id": 0}, "has id = 0 like record 0"),
        ({"reference_img_id": True}, "has reference_img_id = true; it must be a whole number"),
        ({"reference_img_id": "../900"}, "has reference_img_id = .*; it must be a whole number"),
        ({"reference_img_id": None}, "has reference_img_id = null"),
        ({"target_img_id": None}, "has target_img_id = null; it must be a whole number"),
        ({"gt_img_ids": None}, "needs 'gt_img_ids', a list of whole numbers"),
        ({"gt_img_ids": [5, "8"]}, "needs 'gt_img_ids', a list of whole numbers"),
        ({"gt_img_ids": []}, "needs distinct 'gt_img_ids' with the target and without the reference"),
        ({"gt_img_ids": [5, 5]}, "needs distinct 'gt_img_ids'"),
        ({"gt_img_ids": [8]}, "needs distinct 'gt_img_ids' with the target"),
        ({"gt_img_ids": [5, 17]}, "needs distinct 'gt_img_ids' with the target and without the reference"),
        ({"relative_caption": 5}, "has relative_caption = 5; it must be text"),
        ({"relative_caption": "  "}, "has an empty relative_caption"),
        ({"shared_concept": ["a"]}, "has shared_concept = .*; it must be text"),
        ({"semantic_aspects": "viewpoint"}, "needs 'semantic_aspects', a list of some of cardinality, addition"),
        ({"semantic_aspects": ["view"]}, "needs 'semantic_aspects', a list of some of"),
        ({"semantic_aspects": [["viewpoint"]]}, "needs 'semantic_aspects', a list of some of"),
    ],
)
def test_a_broken_record_is_named(tmp_path: Path, fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        read_benchmark(write_world(tmp_path, change(1, **fields)), "val")
    assert "val.json: record 1 (counting from 0)" in str(error.value)


def test_optional_fields_are_optional(tmp_path: Path):
    changed = records("val")
    for record in changed:
        del record["semantic_aspects"], record["shared_concept"]
    config = write_world(tmp_path, {"val": changed})
    assert len(read_benchmark(config, "val").metrics(ranking([0, 0], [[0], [0]]))) == 8
    with pytest.raises(ValueError, match=r"record 0 .* has no 'shared_concept'"):
        read_benchmark({**config, "text": "shared_and_relative"}, "val")
    config = write_world(tmp_path, change(0, shared_concept=" "))
    with pytest.raises(ValueError, match=r"record 0 .* empty shared_concept, which .*text = shared_and_relative needs"):
        read_benchmark({**config, "text": "shared_and_relative"}, "val")


def test_a_blank_caption_of_test_stays_a_query(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = write_world(tmp_path, change(1, "test", relative_caption=" "))
    assert [query.texts for query in read_benchmark(config, "test").groups[0].queries] == [("shows two dogs",), ("",)]
    assert "1 of 2 captions are blank (id, first: 1)" in caplog.text


def test_images_that_the_gallery_does_not_list(tmp_path: Path):
    with pytest.raises(
        ValueError,
        match=r"uses 1 images .*unlabeled2017.json does not list \(first: record .* gt_img_ids = 777\)",
    ):
        read_benchmark(write_world(tmp_path, change(0, gt_img_ids=[42, 777])), "val")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "must hold 'images', a non-empty list of objects"),
        ([], "must hold 'images', a non-empty list of objects"),
        ([5], "record 0 .* of 'images' must be an object, got 5"),
        ([{"id": "5", "file_name": "5.jpg"}], 'record 0 .* has id = "5"; it must be a whole number'),
        ([{"id": 5}], "record 0 .* has no 'file_name'; it must be text"),
        ([{"id": 5, "file_name": ["5.jpg"]}], "record 0 .* has file_name = .*; it must be text"),
        ([{"id": 5, "file_name": "../5.jpg"}], "record 0 .* has file_name = .*; it must be an image name"),
        ([{"id": 5, "file_name": "5.jpg"}, {"id": 5, "file_name": "6.jpg"}], "record 1 .* has id = 5 like record 0"),
        ([{"id": 5, "file_name": "5.jpg"}, {"id": 6, "file_name": "5.png"}], "lists 1 files twice"),
    ],
)
def test_a_broken_gallery_is_named(tmp_path: Path, images: Any, message: str):
    config = write_world(tmp_path, {"gallery": {"images": images}})
    with pytest.raises(ValueError, match=message) as error:
        read_benchmark(config, "val")
    assert "image_info_unlabeled2017.json" in str(error.value)


def test_configuration():
    assert CIRCOConfig.from_mapping({"root": "x"}) == CIRCOConfig("x", text="relative", reference="kept")
    assert CIRCOConfig("x").selection_metric == "mAP@5"
    with pytest.raises(ValueError, match=r"datasets.circo.build_info.caption is not a known key") as error:
        CIRCOConfig.from_mapping({"root": "x", "caption": "a", "selection_metric": "mAP@1"})
    assert "selection_metric must be one of mAP@5, mAP@10, mAP@25, mAP@50, Recall@5" in str(error.value)


# -- the real annotation files ---------------------------------------------------------------------------------------


@pytest.fixture
def real(real_annotations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the official layout with a list of COCO's ids; the image files are assumed to exist."""
    ids = json.loads((real_annotations / "derived" / "circo" / "gallery_ids.json").read_text())
    images = [{"id": image, "file_name": f"{image:012d}.jpg"} for image in ids]
    write_json(tmp_path / "annotations" / "image_info_unlabeled2017.json", {"images": images})
    monkeypatch.setattr(circo, "_find_images", lambda _, names: ({name: Path(f"{name}.jpg") for name in names}, []))
    return {"root": str(tmp_path), "annotations": str(real_annotations / "CIRCO" / "annotations")}


def test_real_counts(real: dict[str, str]):
    benchmark = read_benchmark(real, "val")
    (group,) = benchmark.groups
    assert (len(group.gallery), group.gallery[0], len(set(group.gallery))) == (123_403, "000000533083", 123_403)
    counts = [len(query.relevance) for query in group.queries]
    assert (len(counts), sum(counts), min(counts), max(counts)) == (220, 916, 1, 14)
    assert (sum(count > 5 for count in counts), sum(count > 10 for count in counts)) == (57, 9)
    assert len({name for query in group.queries for name, _ in query.relevance}) == 909
    assert len({query.reference for query in group.queries}) == 220
    assert [query.identifier for query in group.queries] == [str(number) for number in range(220)]
    carried = benchmark.metrics.keywords["aspects"].values()  # type: ignore[attr-defined]
    assert {aspect: sum(aspect in some for some in carried) for aspect in circo.ASPECTS} == {
        "cardinality": 37,
        "addition": 80,
        "negation": 21,
        "direct_addressing": 119,
        "compare_change": 86,
        "comparative_statement": 50,
        "statement_with_conjunction": 164,
        "spatial_relations_background": 100,
        "viewpoint": 54,
    }
    (group,) = read_benchmark(real, "test").groups
    assert (len(group.queries), len({query.reference for query in group.queries})) == (800, 798)
