"""Triplets in JSON lines: their content, refused lines, metrics by hand and against a naive loop."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lavis_cir_plugin.benchmarks import triplets
from lavis_cir_plugin.benchmarks.triplets import TripletsConfig, read_benchmark, read_train, training_text
from lavis_cir_plugin.ranking.ranks import Ranking, rank
from lavis_cir_plugin.report.chance import expected_random

IMAGES = ("a.jpg", "b.png", "shoes/a.jpg", "shoes/red/c.webp", "z.jpg")
ONE: dict[str, Any] = {"reference": "a.jpg", "text": "in red", "target": "shoes/a.jpg"}
TWO: dict[str, Any] = {"reference": "shoes/a.jpg", "text": [" with laces ", "laced"], "target": "b.png", "id": "q7"}
SEVERAL = {**TWO, "target": ["b.png", "shoes/red/c.webp"]}


def write_lines(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))


def catalogue(root: Path, records: list[Any] | None = None, images: tuple[str, ...] = IMAGES) -> dict[str, Any]:
    """Write all three splits with equal lines and empty images, and return a config that reads them."""
    for split in ("train", "val", "test"):
        write_lines(root / f"{split}.jsonl", [ONE, TWO] if records is None else records)
    for name in images:
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / name).touch()
    return {"root": str(root)}


def ranking(ranks: list[int], labelled: list[list[int]] | None = None, subset: list[int] | None = None) -> Ranking:
    empty = torch.empty(len(ranks), 0, dtype=torch.long)
    missing = torch.full((len(ranks),), -1)
    return Ranking(
        torch.tensor(ranks),
        empty,
        missing if subset is None else torch.tensor(subset),
        empty if labelled is None else torch.tensor(labelled),
    )


# -- what is read ----------------------------------------------------------------------------------------------------


def test_validation(tmp_path: Path):
    benchmark = read_benchmark(catalogue(tmp_path / "shop"), "val")
    (group,) = benchmark.groups
    assert group.gallery == IMAGES
    assert group.reference_removed
    assert [(query.reference, query.texts, query.target, query.identifier) for query in group.queries] == [
        ("a.jpg", ("in red",), "shoes/a.jpg", "1"),
        ("shoes/a.jpg", ("with laces", "laced"), "b.png", "q7"),
    ]
    assert benchmark.image_paths == {name: tmp_path / "shop" / "images" / name for name in IMAGES}
    assert benchmark.selection_metric == "R@10"
    assert benchmark.protocol == (
        "Triplets val of shop, gallery of 5 images (all images of the folder), reference removed, 2 queries, "
        "features of a query's texts averaged, ties by gallery order"
    )


def test_training_makes_a_triplet_of_each_target(tmp_path: Path):
    """z.jpg is in no triplet, so its file is not needed."""
    found, paths = read_train(catalogue(tmp_path, [ONE, SEVERAL]))
    assert [(t.reference, t.target, t.captions) for t in found] == [
        ("a.jpg", "shoes/a.jpg", ("in red",)),
        ("shoes/a.jpg", "b.png", ("with laces", "laced")),
        ("shoes/a.jpg", "shoes/red/c.webp", ("with laces", "laced")),
    ]
    assert set(paths) == set(IMAGES) - {"z.jpg"}
    assert {training_text(found[1].captions, random.Random(seed)) for seed in range(20)} == {"with laces", "laced"}


def test_what_another_line_names_for_the_same_query_is_right_too(tmp_path: Path):
    """So no wrong label on purpose and no hard negative is one of these."""
    found, _ = read_train(catalogue(tmp_path, [ONE, SEVERAL, {**ONE, "target": "z.jpg"}]))
    assert [(t.target, t.also_right) for t in found] == [
        ("shoes/a.jpg", ("z.jpg",)),
        ("b.png", ("shoes/red/c.webp",)),
        ("shoes/red/c.webp", ("b.png",)),
        ("z.jpg", ("shoes/a.jpg",)),
    ]


def test_fewer_triplets_are_the_first_or_drawn_ones(tmp_path: Path):
    """Three lines hold four triplets. A line with two targets may keep only one, also in `seen`."""
    config = catalogue(tmp_path, [ONE, SEVERAL, {**TWO, "target": "z.jpg", "id": "q8"}])

    def targets(**changes: Any) -> list[str]:
        return [triplet.target for triplet in read_train({**config, **changes})[0]]

    everything = ["shoes/a.jpg", "b.png", "shoes/red/c.webp", "z.jpg"]
    assert targets() == targets(max_triplets=9, seed=1) == everything
    assert targets(max_triplets=2) == everything[:2]
    drawn = [targets(max_triplets=count, seed=1) for count in (1, 2, 3)]
    assert [len(found) for found in drawn] == [1, 2, 3]
    assert set(drawn[0]) < set(drawn[1]) < set(drawn[2])
    assert all(found == [name for name in everything if name in found] for found in drawn)
    assert len({tuple(targets(max_triplets=2, seed=seed)) for seed in range(9)}) > 2
    seen = read_benchmark({**config, "max_triplets": 2}, "seen").groups[0]
    assert [query.target for query in seen.queries] == ["shoes/a.jpg", "b.png"]
    assert len(read_benchmark({**config, "max_triplets": 2}, "val").groups[0].queries) == 3


def test_a_reference_caption_is_read_in_training_alone(tmp_path: Path):
    captioned = [{**ONE, "reference_caption": " a shoe "}, {**SEVERAL, "reference_caption": "a boot"}]
    config = catalogue(tmp_path, captioned)
    assert [triplet.reference_caption for triplet in read_train(config)[0]] == ["a shoe", "a boot", "a boot"]
    write_lines(tmp_path / "val.jsonl", [{**ONE, "reference_caption": 5}, TWO])
    assert len(read_benchmark(config, "val").groups[0].queries) == 2


@pytest.mark.parametrize("caption", ["", " ", 5, ["a shoe"], "\ud800"])
def test_an_impossible_reference_caption_is_refused(tmp_path: Path, caption: Any):
    config = catalogue(tmp_path, [{**ONE, "reference_caption": "a shoe"}, {**TWO, "reference_caption": caption}])
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2 has reference_caption = .*must be text, not empty"):
        read_train(config)


def test_reference_captions_are_on_every_line_or_on_none(tmp_path: Path):
    config = catalogue(tmp_path, [{**ONE, "reference_caption": "a shoe"}, TWO])
    with pytest.raises(ValueError, match="line 2 has no 'reference_caption' and others have; give it on every line"):
        read_train(config)


def test_the_gallery_file_gives_names_and_order(tmp_path: Path):
    """The second query's reference is not in the gallery, but its image must exist."""
    config = catalogue(tmp_path, [ONE, {**TWO, "reference": "z.jpg"}])
    (tmp_path / "gallery.txt").write_bytes(b"\xef\xbb\xbfshoes/a.jpg\r\n\r\nb.png\r\n")
    benchmark = read_benchmark({**config, "reference": "kept"}, "val")
    assert benchmark.groups[0].gallery == ("shoes/a.jpg", "b.png")
    assert not benchmark.groups[0].reference_removed
    assert set(benchmark.image_paths) == {"shoes/a.jpg", "b.png", "a.jpg", "z.jpg"}
    assert "gallery of 2 images (gallery.txt), reference kept" in benchmark.protocol

    (tmp_path / "images" / "z.jpg").unlink()
    benchmark = read_benchmark({**config, "missing_images": "skip"}, "val")
    assert benchmark.protocol.endswith("; incomplete: 0 of 2 gallery images missing, 1 of 2 queries left out")


def test_blank_lines_byte_order_mark_crlf_and_other_keys_are_fine(tmp_path: Path):
    config = catalogue(tmp_path)
    lines = ["", json.dumps({**ONE, "colour": "red", "text": "a\u2028b"}, ensure_ascii=False), "  ", json.dumps(TWO)]
    (tmp_path / "val.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    queries = read_benchmark(config, "val").groups[0].queries
    assert [(query.identifier, query.texts[0]) for query in queries] == [("2", "a\u2028b"), ("q7", "with laces")]


def test_images_may_lie_elsewhere(tmp_path: Path):
    config = catalogue(tmp_path)
    (tmp_path / "images").rename(tmp_path / "pictures")
    with pytest.raises(FileNotFoundError, match=r"no image folder; .*datasets.triplets.build_info.images"):
        read_benchmark(config, "val")
    assert len(read_benchmark({**config, "images": str(tmp_path / "pictures")}, "val").image_paths) == 5


def test_a_test_split_without_targets_is_answered_with_names(tmp_path: Path):
    records = [{key: value for key, value in record.items() if key != "target"} for record in (ONE, TWO)]
    benchmark = read_benchmark(catalogue(tmp_path, records), "test")
    assert not benchmark.has_targets
    empty = torch.empty(2, 0, dtype=torch.long)
    best = Ranking(torch.tensor([-1, -1]), torch.tensor([[4, 1], [3, -1]]), torch.tensor([-1, -1]), empty)
    assert benchmark.metrics({"triplets": best}) == {}
    files = benchmark.submissions({"triplets": best})
    assert files == {"triplets_test.json": {"1": ["z.jpg", "b.png"], "q7": ["shoes/red/c.webp"]}}


def test_a_test_split_with_targets_is_scored(tmp_path: Path):
    benchmark = read_benchmark(catalogue(tmp_path), "test")
    assert benchmark.metrics({"triplets": ranking([0, 1])})["R@1"] == 50.0
    assert benchmark.submissions({"triplets": ranking([0, 1])}) == {}


def test_seen_is_drawn_from_training(tmp_path: Path):
    config = catalogue(tmp_path, [ONE, SEVERAL])
    write_lines(tmp_path / "val.jsonl", [ONE])
    seen = read_benchmark(config, "seen")
    assert len(seen.groups[0].queries) == 1
    assert set(seen.groups[0].gallery) == set(IMAGES) - {"z.jpg"}
    assert set(seen.image_paths) == set(seen.groups[0].gallery)
    assert "gallery of 4 training images drawn up to the size of val's" in seen.protocol
    assert "1 of 2 training queries" in seen.protocol


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_recall_by_hand(tmp_path: Path):
    """Ranks 0, 4, 9 and 50 give one, two, three and three of four at 1, 5, 10 and 50."""
    metrics = read_benchmark(catalogue(tmp_path), "val").metrics({"triplets": ranking([0, 4, 9, 50])})
    assert metrics == {"R@1": 25.0, "R@5": 50.0, "R@10": 75.0, "R@50": 75.0}


def test_several_targets_by_hand(tmp_path: Path):
    """With ranks {6, 1} and {3}, both queries have a target within 5, and none has one within 1.

    AP@5 is (1/2) / 2 and 1/4 with the mean 25 %. AP@10 is (1/2 + 2/7) / 2 and 1/4 with the mean 9/28.
    """
    benchmark = read_benchmark(catalogue(tmp_path, [SEVERAL, ONE]), "val")
    assert [query.relevance for query in benchmark.groups[0].queries] == [
        (("b.png", 1.0), ("shoes/red/c.webp", 1.0)),
        (("shoes/a.jpg", 1.0),),
    ]
    metrics = benchmark.metrics({"triplets": ranking([6, 3], [[6, 1], [3, -1]])})
    assert {name: metrics[name] for name in ("R@1", "R@5", "mAP@5", "mAP@10")} == pytest.approx(
        {"R@1": 0.0, "R@5": 100.0, "mAP@5": 25.0, "mAP@10": 100 * (11 / 28 + 1 / 4) / 2}
    )
    assert "R@K of any target, mAP@K over min(K, targets)" in benchmark.protocol


def test_members_by_hand(tmp_path: Path):
    """The reference is not among its own members. The ranks among the members are 0 and 2."""
    records = [
        {**ONE, "members": ["a.jpg", "b.png", "shoes/a.jpg"]},
        {**TWO, "members": ["a.jpg", "b.png", "z.jpg"]},
    ]
    benchmark = read_benchmark(catalogue(tmp_path, records), "val")
    members = [query.members for query in benchmark.groups[0].queries]
    assert members == [("b.png", "shoes/a.jpg"), ("a.jpg", "b.png", "z.jpg")]
    metrics = benchmark.metrics({"triplets": ranking([0, 1], subset=[0, 2])})
    assert {name: metrics[f"R_subset@{name}"] for name in (1, 2, 3)} == {1: 50.0, 2: 50.0, 3: 100.0}
    assert "R_subset among the members without the reference" in benchmark.protocol


@pytest.mark.parametrize("records", [[ONE, TWO], [ONE, SEVERAL]])
def test_the_expectation_of_chance_has_the_same_metrics(tmp_path: Path, records: list[Any]):
    """Without the reference 4 of 5 images remain, so R@1 of one target is 1/4, and from K = 5 on it is 1."""
    chance = expected_random(read_benchmark(catalogue(tmp_path, records), "val"))
    assert chance["R@5"] == 100.0
    if records[1] is TWO:
        assert chance["R@1"] == pytest.approx(25.0)


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_metrics_equal_a_naive_walk_from_the_files(tmp_path_factory: pytest.TempPathFactory, rng: random.Random):
    """Features of -1, 0 and 1 give many ties and negative scores. The gallery is the sorted folder."""
    root = tmp_path_factory.mktemp("catalogue")
    names = sorted(f"{rng.choice('xyz')}/{number}.jpg" for number in range(rng.randint(8, 20)))
    drawn = [rng.sample(names, rng.randint(2, 6)) for _ in range(rng.randint(1, 5))]
    records = [{"reference": first, "text": "t", "target": others} for first, *others in drawn]
    config = {**catalogue(root, records, tuple(names)), "reference": rng.choice(["kept", "removed"])}
    benchmark = read_benchmark(config, "val")
    (group,) = benchmark.groups
    assert group.gallery == tuple(names)
    features = {name: [rng.choice([-1, 0, 1]) for _ in range(3)] for name in names}
    queries = [[rng.choice([-1, 0, 1]) for _ in range(3)] for _ in records]

    hits, precisions = [], []
    for record, query in zip(records, queries):
        gallery = [name for name in names if config["reference"] == "kept" or name != record["reference"]]
        order = sorted(gallery, key=lambda name, q=query: -sum(a * b for a, b in zip(q, features[name])))
        found = [name in record["target"] for name in order[:5]]
        hits.append(any(found))
        at_hits = [sum(found[: place + 1]) / (place + 1) for place in range(len(found)) if found[place]]
        precisions.append(sum(at_hits) / min(5, len(record["target"])))

    index = {name: place for place, name in enumerate(names)}
    width = max(len(query.relevance) for query in group.queries)
    labelled = [[index[name] for name, _ in query.relevance] for query in group.queries]
    ranked = rank(
        torch.tensor(queries).float(),
        torch.tensor([features[name] for name in names]).float(),
        torch.tensor([index[str(query.target)] for query in group.queries]),
        excluded=torch.tensor([index[query.reference] for query in group.queries]) if group.reference_removed else None,
        relevant=torch.tensor([row + [-1] * (width - len(row)) for row in labelled], dtype=torch.long),
    )
    metrics = benchmark.metrics({"triplets": ranked})
    assert metrics["R@5"] == pytest.approx(100 * sum(hits) / len(hits))
    if width:
        assert metrics["mAP@5"] == pytest.approx(100 * sum(precisions) / len(precisions))


# -- bad data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": None}, "has no 'reference'"),
        ({"reference": 3}, "has reference = 3; it must be the path of an image below the image folder"),
        ({"reference": ""}, 'has reference = ""'),
        ({"reference": "../a.jpg"}, r'has reference = "\.\./a.jpg"'),
        ({"reference": "/a.jpg"}, 'has reference = "/a.jpg"'),
        ({"reference": "x/../../a.jpg"}, "has reference = "),
        ({"reference": "x//a.jpg"}, "has reference = "),
        ({"reference": "./a.jpg"}, "has reference = "),
        ({"reference": "x\\a.jpg"}, "has reference = "),
        ({"reference": "a.jpg\0"}, "has reference = "),
        ({"reference": "\ud800.jpg"}, "has reference = "),
        ({"text": None}, "has no 'text'"),
        ({"text": " "}, 'has text = " "; it must be text, or a list of texts, none empty'),
        ({"text": []}, r"has text = \[\]"),
        ({"text": ["x", ""]}, "has text = "),
        ({"text": ["x", 1]}, "has text = "),
        ({"text": {"en": "x"}}, "has text = "),
        ({"text": "\ud800"}, "has text = "),
        ({"target": None}, "has no 'target'"),
        ({"target": []}, r"has target = \[\]; it must be an image, or a list of distinct ones"),
        ({"target": ["z.jpg", "z.jpg"]}, "has target = .* a list of distinct ones"),
        ({"target": ["z.jpg", None]}, "has target = null; it must be the path"),
        ({"target": "a.jpg"}, 'has the reference "a.jpg" as a target'),
        ({"id": ""}, 'has id = ""; it must be text or a whole number'),
        ({"id": 1.5}, "has id = 1.5"),
        ({"id": True}, "has id = true"),
        ({"id": 1}, 'has id = "1" like line 1'),
        ({"members": ["b.png"]}, "has 'members', which must include its target"),
        ({"members": ["b.png", "shoes/a.jpg"]}, "line 1 has no 'members' and others have"),
        ({"members": "b.png"}, "has 'members', which must include its target"),
        ({"members": ["b.png", 4]}, "has members = 4"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_broken_line_is_named(tmp_path: Path, change: dict[str, Any], message: str, split: str):
    config = catalogue(tmp_path, [ONE, "", {**ONE, **change}])
    with pytest.raises(ValueError, match=message) as error:
        read_train(config) if split == "train" else read_benchmark(config, split)
    assert f"{split}.jsonl, line " in str(error.value)
    assert "line 3" in str(error.value) or "line 1 has no 'members'" in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"reference": }', r"line 2 is not valid JSON: .* at column 15"),
        ('{"id": 1, "id": 2}', r'line 2 cannot be read as JSON: an object has the key "id" twice'),
        ('"a.jpg"', "line 2 must be an object"),
        ("[" * 100_000, "line 2 cannot be read as JSON"),
        ('{"id": ' + "9" * 5000 + "}", "line 2 (cannot be read as JSON|has no 'reference')"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_benchmark(catalogue(tmp_path, [ONE, line]), "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "val.jsonl is empty; it must hold one image or JSON object per line"),
        (b"\n \r\n", "val.jsonl is empty"),
        (b'{"text": "\xff"}', r"val.jsonl is not UTF-8 text \(byte 10\)"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, message: str):
    config = catalogue(tmp_path)
    (tmp_path / "val.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_benchmark(config, "val")


def test_a_missing_file_names_the_key(tmp_path: Path):
    config = catalogue(tmp_path)
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"val.jsonl does not exist; set datasets.triplets.build_info.root"):
        read_benchmark(config, "val")
    with pytest.raises(ValueError, match="val, test and seen, got 'dev'"):
        read_benchmark(config, "dev")


@pytest.mark.parametrize(
    ("gallery", "message"),
    [
        ("b.png\nshoes/a.jpg\nb.png\n", r'gallery.txt, line 3 lists "b.png" like line 1'),
        ("b.png\n../x.jpg\n", r"gallery.txt, line 2 has image name"),
        (
            "a.jpg\nb.png\n",
            r'val.jsonl, line 1 has the target or member "shoes/a.jpg", which .*gallery.txt does not list',
        ),
        ("\n", "gallery.txt is empty"),
    ],
)
def test_a_broken_gallery_is_named(tmp_path: Path, gallery: str, message: str):
    config = catalogue(tmp_path)
    (tmp_path / "gallery.txt").write_text(gallery)
    with pytest.raises(ValueError, match=message):
        read_benchmark(config, "val")


def test_targets_on_some_lines_of_a_test_split_are_refused(tmp_path: Path):
    config = catalogue(tmp_path, [ONE, {"reference": "a.jpg", "text": "x"}])
    with pytest.raises(ValueError, match="line 2 has no 'target' and others have; give it on every line or on none"):
        read_benchmark(config, "test")


def test_missing_images_are_an_error_or_reported(tmp_path: Path):
    config = catalogue(tmp_path, [ONE, TWO, {**ONE, "target": "gone"}])
    message = r"triplets: 1 of 6 images are missing under .*images \(first: gone\); add them \(.* with its suffix"
    with pytest.raises(FileNotFoundError, match=message):
        read_benchmark(config, "val")
    with pytest.raises(FileNotFoundError, match="1 of 4 images are missing"):
        read_train(config)
    benchmark = read_benchmark({**config, "missing_images": "skip"}, "val")
    assert benchmark.groups[0].gallery == IMAGES
    assert benchmark.protocol.endswith("; incomplete: 1 of 6 gallery images missing, 1 of 3 queries left out")
    assert len(read_train({**config, "missing_images": "skip"})[0]) == 2


def test_file_names_that_are_no_text_are_refused(tmp_path: Path):
    config = catalogue(tmp_path)
    try:
        (tmp_path / "images" / "\udcff.jpg").touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    with pytest.raises(ValueError, match="is not UTF-8; rename the file or its folder"):
        read_benchmark(config, "val")


def test_verification_on_demand(tmp_path: Path):
    config = {**catalogue(tmp_path), "verify_images": True}
    with pytest.raises(ValueError, match="5 of 5 image files cannot be read"):
        read_benchmark(config, "val")
    for name in IMAGES:
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    read_benchmark(config, "val")
    read_train(config)


# -- configuration ---------------------------------------------------------------------------------------------------


def test_defaults():
    expected = TripletsConfig("x", None, "removed", "R@10", None, None, "error", False)
    assert TripletsConfig.from_mapping({"root": "x"}) == expected


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"rot": "x"}, r"datasets.triplets.build_info.rot is not a known key; did you mean 'root'\?"),
        ({"reference": "gone"}, "reference must be one of removed, kept, got 'gone'"),
        ({"selection_metric": "R@2"}, r"selection_metric must be one of R@10, R@1, .*, got 'R@2'"),
        ({"images": 3}, "images must be the path of a folder, or null, got 3"),
    ],
)
def test_wrong_configurations_are_refused(mapping: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TripletsConfig.from_mapping({"root": "x", **mapping})


@pytest.mark.parametrize(("metric", "needed"), [("mAP@10", "queries with several targets"), ("R_subset@1", "members")])
def test_a_selection_metric_without_its_data_is_refused(tmp_path: Path, metric: str, needed: str):
    config = {**catalogue(tmp_path), "selection_metric": metric}
    with pytest.raises(ValueError, match=rf"{metric} needs {needed}, and .*val.jsonl has none; choose one of R@1, R@5"):
        read_benchmark(config, "val")
    assert read_benchmark(config, "test").selection_metric == "R@10"
    write_lines(tmp_path / "val.jsonl", [SEVERAL])
    if metric == "mAP@10":
        assert read_benchmark(config, "val").selection_metric == metric


def test_the_documented_examples_are_read(tmp_path: Path):
    """The reader takes the lines of the module's docstring on a folder with their images."""
    lines = [line.strip() for line in str(triplets.__doc__).splitlines() if line.strip().startswith('{"reference"')]
    assert len(lines) == 2
    config = catalogue(tmp_path, lines, ("shoes/a.jpg", "shoes/b.jpg", "c.png", "shoes/d.jpg"))
    assert len(read_train(config)[0]) == 3
    assert read_benchmark(config, "val").groups[0].queries[1].identifier == "q7"
