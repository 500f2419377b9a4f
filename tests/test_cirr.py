"""CIRR: layouts, broken files, metrics on small fixtures; counts and chance level on the real annotation files."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REAL, real_folder

from lavis_cir_plugin.benchmarks.cirr import CIRRConfig, read_benchmark, read_train, training_text
from lavis_cir_plugin.ranking import Ranking, rank

FOLDERS = {"train": "train/34", "val": "dev", "test1": "test1"}


def names(split: str) -> list[str]:
    prefix = FOLDERS[split].split("/")[0]
    return [f"{prefix}-{number}-img0" for number in range(8)]


def records(split: str) -> list[dict[str, Any]]:
    """Write two queries in the official shape; the targets are images 1 and 2, the set is images 0 to 5."""
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
    """The reduced shape has neither pairid nor target_soft nor img_set."""
    kept = {"reference", "target_hard", "caption"}
    content = [{k: v for k, v in item.items() if shape == "official" or k in kept} for item in records("train")]
    triplets, paths = read_train(write_world(tmp_path, {"train": content}))
    images = names("train")
    assert [(t.reference, t.target, t.captions) for t in triplets] == [
        (images[0], images[1], ("caption 0.",)),
        (images[1], images[2], ("caption 1.",)),
    ]
    assert training_text(triplets[0].captions, random.Random(0)) == "caption 0."
    assert paths == {name: tmp_path / "train" / "34" / f"{name}.png" for name in images[:3]}


def test_metrics_by_hand(tmp_path: Path):
    """Ranks 0, 4, 5, missing: R@1 25, R@5 50, R@10 75, R@50 75. Subset 0, 1, 2, 4: 25, 50, 75. Mean (50 + 25) / 2."""
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
    assert len(read_train(config)[1]) == 3


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
        ValueError, match=r"uses 1 images that .*split.rc2.train.json does not list \(first: stranger\)"
    ):
        read_train(write_world(tmp_path, {"train": changed}))


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
    assert 'missing_images must be one of error, skip, got "ignore"' in str(error.value)


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


def test_real_training_files(real: dict[str, str], tmp_path: Path):
    """The official file in its reduced shape (all rows) and in its full shape (an excerpt)."""
    split = REAL / "cirr_dataset" / "cirr" / "image_splits" / "split.rc2.train.json"
    (tmp_path / split.name).symlink_to(split)
    assert len(json.loads(split.read_text())) == 16_939
    captions = tmp_path / "cap.rc2.train.json"
    read = {}
    for shape in ("reconstructed", "excerpt"):
        captions.symlink_to(REAL / "derived" / "cirr" / f"cap.rc2.train.{shape}.json")
        read[shape], paths = read_train({**real, "annotations": str(tmp_path)})
        assert set(paths) == {name for t in read[shape] for name in (t.reference, t.target)}
        captions.unlink()
    assert (len(read["reconstructed"]), len(read["excerpt"])) == (28_225, 12)
    assert len({t.reference for t in read["reconstructed"]}) == 16_080
    assert set(read["excerpt"]) <= set(read["reconstructed"])


def test_random_scores_reach_chance_level():
    """3,000 queries, sets of six in a gallery of 600: R_subset@1/2/3 = 20/40/60 %, R@K = 100 K / 599 %.

    The standard deviation of a share p over 3,000 queries is at most sqrt(0.25 / 3000) = 0.91 points; 3.7 is four.
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
