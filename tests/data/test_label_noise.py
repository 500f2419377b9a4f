"""Wrong labels: how many, which, from where, on every training set, and the file that names them."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image

from lavis_cir_plugin.benchmarks.captions import CaptionedImage
from lavis_cir_plugin.benchmarks.types import Triplet
from lavis_cir_plugin.core.settings import value_problems
from lavis_cir_plugin.data.benchmark_datasets import TripletDataset
from lavis_cir_plugin.data.builders.captions import CaptionDataset, ShardDataset
from lavis_cir_plugin.data.builders.garments_questions import GarmentsCaption, GarmentsVqa
from lavis_cir_plugin.data.label_noise import mixed_sources, write_noise
from lavis_cir_plugin.data.tar_shards import CaptionedShards
from lavis_cir_plugin.training.run_settings import DatasetSection


def differs(own, other):
    return own != other


@pytest.mark.parametrize(("ratio", "count"), [(0.2, 20), (0.505, 50), (0.8, 80), (1, 100)])
def test_so_many_examples_take_the_label_of_another_one_and_each_label_is_taken_once(ratio, count):
    sources = mixed_sources(100, ratio, 3, differs)
    assert len(sources) == count
    assert sorted(sources) == list(sources) == sorted(sources.values())
    assert all(own != other for own, other in sources.items())


def test_the_wrong_ones_depend_on_the_seed_alone_and_a_smaller_ratio_is_part_of_a_larger():
    few, many = (mixed_sources(50, ratio, 7, differs) for ratio in (0.2, 0.5))
    assert set(few) < set(many)
    assert mixed_sources(50, 0.5, 7, differs) == many
    assert set(mixed_sources(50, 0.5, 8, differs)) != set(many)


def test_equal_labels_are_exchanged_for_wrong_ones():
    """Of six labels three are equal, so each of the three takes one of the others, and the reverse."""
    labels = "aaabcd"
    for seed in range(20):
        sources = mixed_sources(6, 1, seed, lambda own, other: labels[own] != labels[other])
        assert Counter(labels[other] for other in sources.values()) == Counter(labels)
        assert all(labels[own] != labels[other] for own, other in sources.items())


@pytest.mark.parametrize(
    ("labels", "ratio", "message"),
    [
        ("abc", 0.1, "of 3 examples draws 0, and labels are exchanged among at least two"),
        ("abc", 0.3, "of 3 examples draws 1, and"),
        ("aaab", 1, "of 4 examples leaves one without a wrong label, as too many"),
    ],
)
def test_a_draw_without_a_wrong_label_is_refused(labels, ratio, message):
    with pytest.raises(ValueError, match=message):
        mixed_sources(len(labels), ratio, 0, lambda own, other: labels[own] != labels[other])


def triplet_set(triplets):
    names = {name for triplet in triplets for name in (triplet.reference, triplet.target)}
    return TripletDataset(triplets, dict.fromkeys(names), np.asarray, str, lambda texts, rng: texts[0])


def test_a_wrong_target_is_neither_the_reference_nor_an_answer_that_the_annotation_calls_right():
    """Triplet 0 finds two of eight targets wrong: four are soft-labelled, one is its own and one its reference."""
    names = "abcdefgh"
    triplets = [Triplet(names[n - 1], names[n], ("x",), also_right=tuple("cdef") if n == 0 else ()) for n in range(8)]
    found = set()
    for seed in range(30):
        dataset = triplet_set(triplets)
        dataset.mix_labels(1, seed)
        found.add(dataset.triplets[0].target)
        assert sorted(triplet.target for triplet in dataset.triplets) == sorted(names)
        assert all(t.target not in (t.reference, right.target) for t, right in zip(dataset.triplets, triplets))
    assert found == {"b", "g"}
    assert triplets[0].target == "a"
    assert dataset.contents == "8 triplets (8 with a wrong target) of 8 pictures"


def test_the_other_triplets_stay_and_the_file_names_the_wrong_ones(tmp_path):
    triplets = [Triplet(f"r{number}", f"t{number}", (f"text {number}",)) for number in range(10)]
    dataset = triplet_set(triplets)
    dataset.mix_labels(0.3, 5)
    assert write_noise(tmp_path, {"mine": {"train": dataset}, "other": {"val": object()}}) == tmp_path / "noise.json"
    content = json.loads((tmp_path / "noise.json").read_text())
    assert {key: value for key, value in content["mine"].items() if key != "wrong"} == {
        "noise_ratio": 0.3, "noise_seed": 5, "examples": 10,
    }  # fmt: skip
    named = {entry["index"]: entry for entry in content["mine"]["wrong"]}
    assert len(named) == 3
    for index, (now, right) in enumerate(zip(dataset.triplets, triplets)):
        if index in named:
            entry = {"index": index, "reference": f"r{index}", "target": now.target, "right_target": f"t{index}"}
            assert named[index] == entry
            assert now.captions == right.captions
        else:
            assert now == right


def test_no_file_is_written_where_every_label_is_right(tmp_path):
    dataset = triplet_set([Triplet("a", "b", ("x",))])
    assert write_noise(tmp_path, {"mine": {"train": dataset}}) is None
    assert list(tmp_path.iterdir()) == []


def test_a_picture_takes_the_captions_of_another_picture():
    """Two of the objects show one picture, as COCO has it; the other's caption is not wrong for it."""
    examples = [CaptionedImage(name, (f"caption {index}",)) for index, name in enumerate(["a", "a", "b", "c"])]
    dataset = CaptionDataset(examples, {}, np.asarray, str)
    dataset.mix_labels(1, 0)
    assert [example.image for example in dataset.examples] == ["a", "a", "b", "c"]
    assert {example.captions[0] for example in dataset.examples[:2]} == {"caption 2", "caption 3"}
    named = {entry["index"]: entry["captions_of"] for entry in dataset.noise.wrong}
    assert {named[0], named[1]} == {"b", "c"}
    assert named[2] == named[3] == "a"


def test_a_sample_of_a_shard_takes_the_captions_of_another_one(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key in range(4):
            picture = BytesIO()
            Image.new("RGB", (4, 4), (key, key, key)).save(picture, "PNG")
            for name, content in ((f"{key}.png", picture.getvalue()), (f"{key}.txt", f"caption {key}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, BytesIO(content))
    dataset = ShardDataset(CaptionedShards({"root": str(tmp_path)}), np.asarray, str)
    dataset.mix_labels(0.5, 1)
    source = {entry["index"]: entry["captions_of"] for entry in dataset.noise.wrong}
    assert len(source) == 2
    for index in range(4):
        assert dataset[index]["image"][0, 0, 0] == index
        assert dataset[index]["text_input"] == f"caption {source.get(index, index)}"


@pytest.mark.parametrize(("cls", "label"), [(GarmentsVqa, "answer"), (GarmentsCaption, "caption")])
def test_drawn_questions_and_captions_take_the_label_of_another_picture(tmp_path, cls, label):
    records = [{"image": f"{n}.png", "image_id": n, "question": "q", label: f"label {n}"} for n in range(10)]
    (tmp_path / "annotations.json").write_text(json.dumps(records))
    dataset = cls(None, None, str(tmp_path), [str(tmp_path / "annotations.json")])
    dataset.mix_labels(0.4, 0)
    wrong = {index for index, record in enumerate(dataset.annotation) if record[label] != f"label {index}"}
    assert wrong == {entry["index"] for entry in dataset.noise.wrong}
    assert len(wrong) == 4
    assert sorted(record[label] for record in dataset.annotation) == sorted(record[label] for record in records)


@pytest.mark.parametrize("name", ["fashioniq", "cirr", "garments_vqa", "garments_caption"])
def test_every_drawn_training_set_reads_the_two_keys_and_evaluates_on_right_labels(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    builder = registry.get_builder_class(name)
    kind = "garments" if "garments" in builder.DATASET_CONFIG_DICT else "default"
    small = {
        "fashioniq": {"train_triplets": 8, "train_images": 12, "val_queries": 4, "val_images": 8, "test_queries": 2,
                      "test_images": 4},
        "cirr": {"train_sets": 2, "val_sets": 1, "test_sets": 1},
        "garments_vqa": {"train_images": 40, "val_images": 40},
        "garments_caption": {"train_images": 10, "val_images": 10},
    }[name]  # fmt: skip
    cfg = OmegaConf.load(builder.default_config_path(kind)).datasets[name]
    changes = {"garments": {**small, "image_width": 32, "image_height": 32}, "preload": False}
    if name.startswith("garments"):
        del changes["preload"]
    built = [
        builder(OmegaConf.merge(cfg, changes, {"noise_ratio": ratio, "noise_seed": 2})).build_datasets()
        for ratio in (0, 0.5, 0.5)
    ]
    right, wrong, again = (datasets["train"] for datasets in built)
    assert right.noise is None
    assert wrong.noise == again.noise
    assert len(wrong.noise.wrong) == round(0.5 * len(wrong))
    assert not hasattr(built[1]["val"], "noise")


@pytest.mark.parametrize("value", [-0.1, 1.1, "half"])
def test_an_impossible_share_is_refused_with_its_key(value):
    assert value_problems(DatasetSection, "datasets.cirr", {"noise_ratio": value}) == [
        f"datasets.cirr.noise_ratio must be a number >= 0 and <= 1, got {value!r}."
    ]
