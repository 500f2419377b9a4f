"""Published training triplets: the content of each layout, the number of triplets, and refused files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_cir_plugin.benchmarks import laion_cir, lasco, synthtriplets18m
from lavis_cir_plugin.ranking.ranks import rank
from lavis_cir_plugin.report.chance import expected_random

MODULES = {"laion_cir": laion_cir, "lasco": lasco, "synthtriplets18m": synthtriplets18m}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


# -- Laion-CIR -------------------------------------------------------------------------------------------------------

TEMPLATE = [
    {"ref_image_id": "306448", "relative_cap": " beds has been newly placed. ", "tgt_image_id": "347794"},
    {"ref_image_id": 20, "relative_cap": "add parking.", "tgt_image_id": 306448, "type": "template"},
]
LLM = {"20": {"tgt_image_id": "29529", "relative_cap": "Add a vase.", "tgt_cap": "A table with a vase."}}
LAION_IMAGES = [f"{number:07d}.png" for number in (306448, 347794, 20, 29529)]


def laion(root: Path, annotations: str = "", images: str = "") -> dict[str, Any]:
    for name, content in {"combined": TEMPLATE, "template": TEMPLATE, "llm": LLM}.items():
        write(root / annotations / f"laion_{name}_info.json", content)
    touch(root / images, *LAION_IMAGES)
    return {"root": str(root)}


def test_laion_cir_is_read_as_a_list_and_as_an_object(tmp_path: Path):
    config = laion(tmp_path)
    found, paths = laion_cir.read_train(config)
    assert [(t.reference, t.target, t.captions, t.reference_caption) for t in found] == [
        ("0306448", "0347794", ("beds has been newly placed.",), ""),
        ("0000020", "0306448", ("add parking.",), ""),
    ]
    assert {path.name for path in paths.values()} == set(LAION_IMAGES[:3])
    ((triplet,), _) = laion_cir.read_train({**config, "variant": "llm"})
    assert (triplet.reference, triplet.target, triplet.captions) == ("0000020", "0029529", ("Add a vase.",))
    assert laion_cir.training_text(triplet.captions, random.Random(0)) == "Add a vase."


@pytest.mark.parametrize(
    ("annotations", "images"), [("files", "laion_cir_combined"), ("data/files", "images"), ("", "images/combined")]
)
def test_laion_cir_is_found_where_people_keep_it(tmp_path: Path, annotations: str, images: str):
    assert len(laion_cir.read_train(laion(tmp_path, annotations, images))[0]) == 2


def test_laion_cir_may_be_spread_over_folders(tmp_path: Path):
    """The pictures of both variants and the annotations lie in separate folders outside root."""
    laion(tmp_path / "a", images="../pictures/laion_cir_template")
    (tmp_path / "pictures/llm").mkdir()
    (tmp_path / "pictures/laion_cir_template/0000020.png").rename(tmp_path / "pictures/llm/0000020.png")
    config = {"root": "nowhere", "annotations": str(tmp_path / "a"), "images": str(tmp_path / "pictures")}
    assert len(laion_cir.read_train(config)[1]) == 3


def test_the_reference_s_caption_is_the_first_sentence(tmp_path: Path):
    config = {**laion(tmp_path), "reference_captions": str(tmp_path / "captions.json")}
    captions = {"0306448.png": " A bed. It is white.", "0000020.png": "a road"}
    write(tmp_path / "captions.json", captions)
    assert [triplet.reference_caption for triplet in laion_cir.read_train(config)[0]] == ["A bed", "a road"]
    write(tmp_path / "captions.json", {"0306448.png": "A bed"})
    with pytest.raises(ValueError, match=r"captions.json has no caption of 1 reference images \(first: 0000020\)"):
        laion_cir.read_train(config)
    assert len(laion_cir.read_train({**config, "max_triplets": 1})[0]) == 1
    for broken in (". x", 5, None):
        write(tmp_path / "captions.json", {**captions, "0000020.png": broken})
        with pytest.raises(ValueError, match=r"captions.json: record 1 .* has \"0000020.png\" = .*must be a caption"):
            laion_cir.read_train(config)
    write(tmp_path / "captions.json", ["x"])
    with pytest.raises(ValueError, match=r"captions.json must hold an object of image file to caption"):
        laion_cir.read_train(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_image_id": "../x"}, r'has ref_image_id = "../x"; it must be the number of an image'),
        ({"tgt_image_id": True}, "has tgt_image_id = true; it must be the number"),
        ({"tgt_image_id": None}, "has no 'tgt_image_id'"),
        ({"relative_cap": " "}, "has relative_cap = .*must be text, not empty"),
        ({"relative_cap": ["x"]}, "has relative_cap = .*must be text, not empty"),
    ],
)
def test_a_wrong_record_of_laion_cir_is_named(tmp_path: Path, change: dict[str, Any], message: str):
    config = laion(tmp_path)
    write(tmp_path / "laion_combined_info.json", [TEMPLATE[0], {**TEMPLATE[1], **change}])
    with pytest.raises(ValueError, match=rf"laion_combined_info.json: record 1 \(counting from 0\) {message}"):
        laion_cir.read_train(config)


@pytest.mark.parametrize("content", [5, [], {}])
def test_a_file_of_laion_cir_without_triplets_is_refused(tmp_path: Path, content: Any):
    config = laion(tmp_path)
    write(tmp_path / "laion_combined_info.json", content)
    with pytest.raises(ValueError, match=r"laion_combined_info.json must hold a list or an object of triplets"):
        laion_cir.read_train(config)


# -- LaSCo -----------------------------------------------------------------------------------------------------------


def coco(number: int, split: str = "val") -> str:
    return f"COCO_{split}2014_{number:012d}"


def query(reference: int, target: int, split: str = "val") -> dict[str, Any]:
    return {
        "qid": reference * 1000,
        "query-image": [reference, f"{split}2014/{coco(reference, split)}.jpg"],
        "query-text": "The person is riding the bike",
        "target-image": [target, f"{split}2014/{coco(target, split)}.jpg"],
    }


def lasco_files(root: Path, annotations: str = "", images: str = "") -> dict[str, Any]:
    """Write two triplets and two val queries; the second reference is outside the gallery of 3."""
    write(root / annotations / "lasco_train.json", [query(1, 2, "train"), query(2, 3, "train")])
    write(root / annotations / "lasco_val.json", [query(42, 73), query(99, 74)])
    corpus = [{"id": number, "path": f"val/val2014/{coco(number)}.jpg"} for number in (42, 73, 74)]
    write(root / annotations / "lasco_val_corpus.json", corpus)
    touch(root / images / "train2014", *(f"{coco(number, 'train')}.jpg" for number in (1, 2, 3)))
    touch(root / images / "val2014", *(f"{coco(number)}.jpg" for number in (42, 73, 74, 99)))
    return {"root": str(root)}


@pytest.mark.parametrize(
    ("annotations", "images"), [("", ""), ("downloads", "images"), ("captions", "coco"), ("metadata", "val")]
)
def test_lasco_is_found_where_people_keep_it(tmp_path: Path, annotations: str, images: str):
    for root in (tmp_path, tmp_path / "LaSCo"):
        config = {**lasco_files(root, annotations, images), "root": str(tmp_path)}
        triplets, paths = lasco.read_train(config)
        assert [(t.reference, t.target) for t in triplets] == [
            (coco(1, "train"), coco(2, "train")),
            (coco(2, "train"), coco(3, "train")),
        ]
        assert len(paths) == 3
        assert len(lasco.read_benchmark(config, "val").image_paths) == 4


def test_the_gallery_of_lasco_is_the_published_corpus(tmp_path: Path):
    """The reference of the second query is no candidate. The ranks are 0 and 1, so R@1 is 50 and R@5 100."""
    benchmark = lasco.read_benchmark(lasco_files(tmp_path), "val")
    (group,) = benchmark.groups
    assert group.gallery == (coco(42), coco(73), coco(74))
    assert [(q.reference, q.target, q.identifier) for q in group.queries] == [
        (coco(42), coco(73), "42000"), (coco(99), coco(74), "99000"),
    ]  # fmt: skip
    expected = "LaSCo val, gallery of 3 images, reference removed, 2 queries, ties by gallery order"
    assert benchmark.protocol == expected
    gallery = torch.eye(3)
    rows = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.9, 0.8]])
    ranking = rank(rows, gallery, torch.tensor([1, 2]), excluded=torch.tensor([0, -1]))
    assert benchmark.metrics({"lasco": ranking}) == {"R@1": 50.0, "R@5": 100.0, "R@10": 100.0, "R@50": 100.0}
    assert benchmark.selection_metric in benchmark.metrics({"lasco": ranking})
    assert expected_random(benchmark)["R@1"] == pytest.approx(100 * (1 / 2 + 1 / 3) / 2)


def test_a_missing_image_of_lasco_can_be_skipped(tmp_path: Path):
    config = lasco_files(tmp_path)
    (tmp_path / "val2014" / f"{coco(99)}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=rf"lasco: 1 of 4 images are missing .*first: {coco(99)}"):
        lasco.read_benchmark(config, "val")
    benchmark = lasco.read_benchmark({**config, "missing_images": "skip"}, "val")
    assert benchmark.protocol.endswith("incomplete: 0 of 3 gallery images missing, 1 of 2 queries left out")


def test_a_target_of_lasco_outside_of_the_gallery_is_named(tmp_path: Path):
    config = lasco_files(tmp_path)
    write(tmp_path / "lasco_val.json", [query(42, 99)])
    with pytest.raises(
        ValueError, match=rf"lasco_val.json uses 1 images that .*corpus.json does not list .*{coco(99)}"
    ):
        lasco.read_benchmark(config, "val")
    with pytest.raises(ValueError, match="lasco has the evaluation splits val, got 'test'"):
        lasco.read_benchmark(config, "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query-text": ""}, "has query-text = .*must be text, not empty"),
        ({"query-image": "x.jpg"}, 'has query-image = "x.jpg"; it must be a list of an image\'s id and its path'),
        ({"target-image": [1, ".."]}, 'has target-image = "..*must be an image name'),
        ({"qid": "x"}, 'has qid = "x"; it must be a whole number'),
    ],
)
def test_a_wrong_record_of_lasco_is_named(tmp_path: Path, change: dict[str, Any], message: str):
    config = lasco_files(tmp_path)
    write(tmp_path / "lasco_train.json", [query(1, 2, "train"), {**query(2, 3, "train"), **change}])
    with pytest.raises(ValueError, match=rf"lasco_train.json: record 1 \(counting from 0\) {message}"):
        lasco.read_train(config)


# -- SynthTriplets18M ------------------------------------------------------------------------------------------------


def synth(root: Path, *samples: str, **changes: Any) -> dict[str, Any]:
    for sample in samples or ("00000/000010024", "000010023"):
        touch(root, f"{sample}.source_image.jpg", f"{sample}.target_image.jpg")
        captions = {"source_caption": f"a cat {sample[-2:]}", "target_caption": f"a dog {sample[-2:]}", **changes}
        write(root / f"{sample}.json", captions)
    return {"root": str(root)}


def test_synthtriplets_are_sorted_samples_with_both_captions(tmp_path: Path):
    found, paths = synthtriplets18m.read_train(synth(tmp_path))
    assert [(t.reference, t.target, t.captions, t.reference_caption) for t in found] == [
        ("000010023.source_image", "000010023.target_image", ("a dog 23",), "a cat 23"),
        ("000010024.source_image", "000010024.target_image", ("a dog 24",), "a cat 24"),
    ]
    assert paths["000010024.target_image"] == tmp_path / "00000/000010024.target_image.jpg"


def test_synthtriplets_may_be_named_by_a_file(tmp_path: Path):
    config = {**synth(tmp_path), "ids": str(tmp_path / "ids.txt")}
    (tmp_path / "ids.txt").write_text("00000/000010024\n\n000010023\n")
    assert [t.captions for t in synthtriplets18m.read_train(config)[0]] == [("a dog 24",), ("a dog 23",)]
    (tmp_path / "ids.txt").write_text("000010023\n000010025\n")
    with pytest.raises(
        FileNotFoundError, match=r"synthtriplets18m: 2 of 4 images are missing .*000010025.source_image"
    ):
        synthtriplets18m.read_train(config)
    assert len(synthtriplets18m.read_train({**config, "missing_images": "skip"})[0]) == 1
    for line, message in {"../x": 'has id = "../x"', "000010023": 'has the id "000010023" like line 1'}.items():
        (tmp_path / "ids.txt").write_text(f"000010023\n{line}\n")
        with pytest.raises(ValueError, match=rf"ids.txt, line 2 {message}"):
            synthtriplets18m.read_train(config)


def test_only_the_captions_of_the_chosen_synthtriplets_are_read(tmp_path: Path):
    config = synth(tmp_path)
    (tmp_path / "00000/000010024.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"000010024\.json does not exist"):
        synthtriplets18m.read_train(config)
    assert len(synthtriplets18m.read_train({**config, "max_triplets": 1})[0]) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_caption": None}, "has no 'target_caption'"),
        ({"target_caption": " "}, "has target_caption = .*must be text, not empty"),
        ({"source_caption": 5}, "has source_caption = 5; it must be text"),
        ({"source_caption": None}, "has no 'source_caption' and 2 of 3 samples have one"),
    ],
)
def test_a_wrong_synthtriplet_is_named(tmp_path: Path, changes: dict[str, Any], message: str):
    config = synth(tmp_path)
    synth(tmp_path, "000010025", **changes)
    with pytest.raises(ValueError, match=rf"000010025\.json {message}"):
        synthtriplets18m.read_train(config)


def test_synthtriplets_without_reference_captions_are_triplets(tmp_path: Path):
    (triplet,) = synthtriplets18m.read_train(synth(tmp_path, "000010025", source_caption=None))[0]
    assert triplet.reference_caption == ""


def test_shards_that_are_not_unpacked_are_no_synthtriplets(tmp_path: Path):
    touch(tmp_path, "00000.tar")
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=r"has no image such as 000010023.source_image.jpg.*tar -xf"):
            synthtriplets18m.read_train({"root": str(root)})


# -- all -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=sorted(MODULES))
def training_set(request, tmp_path):
    """Return the name, the module and the config of each data set with its small files."""
    makers = {"laion_cir": laion, "lasco": lasco_files, "synthtriplets18m": synth}
    return request.param, MODULES[request.param], makers[request.param](tmp_path)


def test_fewer_triplets_need_fewer_images(training_set, tmp_path):
    _, module, config = training_set
    everything, paths = module.read_train(config)
    one, some_paths = module.read_train({**config, "max_triplets": 1})
    assert one == everything[:1]
    assert len(some_paths) == 2 <= len(paths)
    drawn = {module.read_train({**config, "max_triplets": 1, "seed": seed})[0][0].reference for seed in range(9)}
    assert drawn == {triplet.reference for triplet in everything}


def test_missing_images_are_an_error_or_left_out(training_set, tmp_path, caplog):
    name, module, config = training_set
    triplets, paths = module.read_train(config)
    first, second = ({triplet.reference, triplet.target} for triplet in triplets)
    lost = min(second - first)
    paths[lost].unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: 1 of \d images are missing .*{lost}.*skip"):
        module.read_train(config)
    kept, _ = module.read_train({**config, "missing_images": "skip"})
    assert kept == triplets[:1]
    assert f"{name} train: 1 of 2 triplets left out, images missing." in caplog.text
    for path in paths.values():
        path.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match=name):
        module.read_train({**config, "missing_images": "skip"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_triplets", 0, r"max_triplets must be a whole number >= 1, or null, got 0"),
        ("max_triplets", True, r"max_triplets must be a whole number >= 1, or null, got true"),
        ("max_triplets", "10", r"max_triplets must be a whole number >= 1, or null"),
        ("seed", -1, r"seed must be a whole number >= 0, or null, got -1"),
        ("max_tripletts", 5, r"max_tripletts is not a known key; did you mean 'max_triplets'\?"),
        ("missing_images", "no", r"missing_images must be one of error, skip"),
    ],
)
def test_wrong_configurations_are_refused(training_set, key, value, message):
    name, module, config = training_set
    module.CONFIG.from_mapping({**config, "max_triplets": None, "seed": 5})
    with pytest.raises(ValueError, match=rf"datasets\.{name}\.build_info\.{message}"):
        module.CONFIG.from_mapping({**config, key: value})


def test_they_are_builders_of_their_splits(training_set, tmp_path):
    """The shipped config names the folder, and every key in it is known."""
    name, module, config = training_set
    builder = registry.get_builder_class(name)
    section = OmegaConf.load(builder.default_config_path("default")).datasets[name]
    assert builder.known_splits() == module.SPLITS
    assert list(builder.section_problems(name, section)) == []
    assert len(list(builder.section_problems(name, OmegaConf.merge(section, {"splits": ["test"]})))) == 1
    assert len(list(builder.section_problems(name, OmegaConf.merge(section, {"garments": {}})))) == 1
    verify_none = {"build_info": {**config, "verify_images": False}, "splits": ["train"]}
    datasets = builder(OmegaConf.merge(section, verify_none)).build_datasets()
    assert list(datasets) == ["train"]
    assert len(datasets["train"]) == 2


def test_the_whole_folder_is_found_by_name_from_home(training_set, tmp_path, monkeypatch):
    _, module, config = training_set
    shutil.copytree(config["root"], tmp_path / "home/data", ignore=shutil.ignore_patterns("home"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert module.read_train({"root": "~/data"})[0] == module.read_train(config)[0]
