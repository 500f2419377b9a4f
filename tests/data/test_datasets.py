"""LAVIS's data sets and builders over a small drawn world, and the preprocessing of pictures."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from torchvision.transforms import InterpolationMode

from lavis_cir_plugin.benchmarks import fashioniq
from lavis_cir_plugin.benchmarks.types import Triplet
from lavis_cir_plugin.data.benchmark_datasets import BenchmarkDataset, TripletDataset, image_id
from lavis_cir_plugin.data.negatives import NegativeSets
from lavis_cir_plugin.processors import TargetPadProcessor, pad_to_ratio

SIZES = {"train_triplets": 8, "train_images": 12, "val_queries": 4, "val_images": 8, "test_queries": 2}
WORLD = {**SIZES, "test_images": 4, "image_width": 48, "image_height": 60}


def build(tmp_path, monkeypatch, **changes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    builder = registry.get_builder_class("fashioniq")
    cfg = OmegaConf.load(builder.default_config_path("garments")).datasets.fashioniq
    return builder(OmegaConf.merge(cfg, {"garments": WORLD}, changes)).build_datasets()


def test_the_embedded_world_is_drawn_where_a_download_would_be(tmp_path, monkeypatch):
    datasets = build(tmp_path, monkeypatch)
    assert set(datasets) == {"train", "val"}
    train, val = datasets["train"], datasets["val"]
    assert isinstance(train, TripletDataset)
    assert isinstance(val, BenchmarkDataset)
    assert (len(train), len(val), len(val.queries)) == (3 * 8, 3 * 8, 3 * 4)
    assert repr(val) == "BenchmarkDataset(24 samples, 24 pictures)"
    assert "groups" not in repr(val.benchmark)
    assert repr(val.benchmark).startswith("Benchmark(name='fashioniq', split='val', protocol=\"FashionIQ val, ")
    assert val.contents == "24 gallery pictures, 12 queries"
    assert (
        train.contents == f"24 triplets of {len({n for t in train.triplets for n in (t.reference, t.target)})} pictures"
    )
    sample = train.collater([train[0], train[1]])
    assert sample["image"].shape == sample["target"].shape == (2, 3, 64, 64)
    assert sample["text_input"][0] == sample["text_input"][0].lower()
    assert sample["target_id"].tolist() == [image_id(train.triplets[i].target) for i in (0, 1)]
    assert sample["image_id"].tolist() == [image_id(train.triplets[i].reference) for i in (0, 1)]
    assert (tmp_path / "lavis_cir_plugin").is_dir()


def test_preloaded_pictures_are_the_same_pictures(tmp_path, monkeypatch):
    kept, read = (build(tmp_path, monkeypatch, preload=preload) for preload in (True, False))
    assert kept["train"].preloaded
    assert not read["train"].preloaded
    for split in ("train", "val"):
        assert torch.equal(kept[split][3]["image"], read[split][3]["image"])
    assert torch.equal(kept["val"].queries[5]["image"], read["val"].queries[5]["image"])


def test_random_crops_are_not_preloaded(tmp_path, monkeypatch):
    processors = {"train": {"name": "blip_image_train", "image_size": 32}}
    with pytest.raises(ValueError, match=r"preload: true needs a processor without randomness, got BlipImageTrain"):
        build(tmp_path, monkeypatch, vis_processor=processors)


def test_the_text_of_a_triplet_is_drawn_from_pythons_generator(tmp_path, monkeypatch):
    """LAVIS seeds this generator, and torch seeds it in workers, so a run's texts follow from its seed."""
    train = build(tmp_path, monkeypatch)["train"]
    texts = []
    for seed in (1, 1, 2):
        random.seed(seed)
        texts.append([train[index]["text_input"] for index in range(len(train))])
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_a_reference_caption_goes_through_the_text_processor(tmp_path):
    """If no triplet has a reference caption, samples have no such key."""
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    for caption, keys in (("A Shoe", {"reference_caption"}), ("", set())):
        triplet = Triplet("a", "a", ("in red",), reference_caption=caption)
        dataset = TripletDataset([triplet], {"a": path}, np.asarray, str.lower, lambda texts, rng: texts[0])
        assert set(dataset[0]) - {"image", "image_id", "target", "text_input", "target_id"} == keys
        assert dataset[0].get("reference_caption") == (caption.lower() or None)


@pytest.fixture
def with_negatives(tmp_path):
    """Return three triplets with the negatives (2, 3, 4), (5) and none; every pixel of a picture is its number."""
    paths = {}
    for number in range(6):
        paths[str(number)] = tmp_path / f"{number}.png"
        Image.new("L", (2, 2), number).convert("RGB").save(paths[str(number)])
    triplets = [Triplet("0", "1", ("red", "blue")), Triplet("1", "2", ("red",)), Triplet("2", "3", ("red",))]

    def picture(image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    dataset = TripletDataset(triplets, paths, picture, str.upper, lambda texts, rng: rng.choice(texts))
    nan = float("nan")
    sets = NegativeSets(
        names=list(paths),
        references=np.array([0, 1, 2]),
        targets=np.array([1, 2, 3]),
        texts=["mined text", "red", "red"],
        negatives=np.array([[2, 3, 4], [5, -1, -1], [-1, -1, -1]]),
        scores=np.array([[0.5, 0.25, 0.125], [0.75, nan, nan], [nan] * 3], dtype=np.float32),
        target_scores=np.array([0.875, 0.625, 0.375], dtype=np.float32),
        ranks=np.array([[0, 1, 2], [0, -1, -1], [-1] * 3]),
        target_ranks=np.array([3, 1, 0]),
    )
    return dataset, sets


def numbers(pictures):
    assert (pictures == pictures[:, :1, :1, :1]).all()
    return pictures[:, 0, 0, 0].int().tolist()


def test_negatives_are_drawn_without_repetition_and_the_target_stands_in(with_negatives):
    dataset, sets = with_negatives
    assert "negatives" not in dataset[0]
    dataset.use_negatives(sets, 2)
    random.seed(0)
    drawn = [numbers(dataset[0]["negatives"]) for _ in range(60)]
    assert {tuple(row) for row in drawn} == {(2, 3), (2, 4), (3, 4)}
    assert dataset[0]["negatives_present"].tolist() == [True, True]
    assert numbers(dataset[1]["negatives"]) == [5, 2]
    assert dataset[1]["negatives_present"].tolist() == [True, False]
    assert numbers(dataset[2]["negatives"]) == [3, 3]
    assert dataset[2]["negatives_present"].tolist() == [False, False]
    batch = dataset.collater([dataset[index] for index in range(3)])
    assert batch["negatives"].shape == (3, 2, 3, 2, 2)
    assert batch["negatives_present"].shape == (3, 2)
    assert "reference_scores" not in batch
    assert {dataset[0]["text_input"] for _ in range(30)} == {"RED", "BLUE"}


def test_the_scores_of_negatives_come_with_the_text_that_they_belong_to(with_negatives):
    """The right image's score comes first, then those of the negatives; a missing one has the right image's score."""
    dataset, sets = with_negatives
    dataset.use_negatives(sets, 2, with_scores=True)
    score_of = {2: 0.5, 3: 0.25, 4: 0.125}
    for _ in range(10):
        sample = dataset[0]
        assert sample["text_input"] == "MINED TEXT"
        expected = [0.875, *(score_of[number] for number in numbers(sample["negatives"]))]
        assert sample["reference_scores"].tolist() == expected
    assert dataset[1]["reference_scores"].tolist() == [0.625, 0.75, 0.625]
    assert dataset[2]["reference_scores"].tolist() == [0.375, 0.375, 0.375]
    assert dataset[2]["reference_scores"].dtype == torch.float32


def test_image_ids_are_stable_and_fit_a_signed_integer():
    """An id is equal in every process and on every platform: the first one is compared with a constant."""
    assert image_id("B000000001") == 7557791385062964943 != image_id("B000000002")
    assert all(0 <= image_id(str(n)) < 2**63 for n in range(1000))


def test_each_benchmark_module_is_a_builder():
    assert {"fashioniq", "cirr"} <= set(registry.list_datasets())
    assert registry.get_builder_class("fashioniq").benchmark_module is fashioniq


@pytest.mark.parametrize(
    ("size", "padded"),
    [
        ((100, 100), (100, 100)),  # ratio 1 <= 1.25
        ((125, 100), (125, 100)),  # exactly 1.25: untouched
        ((200, 100), (200, 160)),  # 200 / 1.25 = 160: 60 black rows, 30 above and 30 below
        ((100, 203), (162, 203)),  # 203 / 1.25 = 162.4 -> 162: 62 black columns
    ],
)
def test_target_padding_worked_by_hand(size, padded):
    image = pad_to_ratio(Image.new("RGB", size, "white"), 1.25)
    assert image.size == padded
    pixels = np.asarray(image)
    assert (pixels == 255).all(axis=-1).sum() == size[0] * size[1]
    if size == (200, 100):
        assert (pixels[:30] == 0).all()
        assert (pixels[30:130] == 255).all()


def test_the_processor_normalises_like_clip():
    """A white picture has 1.0 in each channel, which becomes (1 - mean) / std with CLIP's numbers."""
    pixel = TargetPadProcessor(image_size=8)(Image.new("RGB", (20, 20), "white"))[:, 4, 4]
    expected = [(1 - m) / s for m, s in zip((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))]
    torch.testing.assert_close(pixel, torch.tensor(expected), atol=1e-5, rtol=0)


def two_views(**changes):
    return registry.get_processor_class("clip_two_views").from_config(OmegaConf.create({"image_size": 16, **changes}))


def gradient():
    """Return a picture whose red channel is the column and whose green channel is the row, in steps of 2."""
    rows, columns = np.mgrid[0:100, 0:100].astype(np.uint8) * 2
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 100)], axis=-1))


def pixels(view):
    """Return the picture's columns and rows that a view's pixels show."""
    means, stds = torch.tensor((0.48145466, 0.4578275)), torch.tensor((0.26862954, 0.26130258))
    return (view[:2] * stds[:, None, None] + means[:, None, None]) * 255 / 2


def test_two_views_are_two_crops_of_the_same_picture():
    """Both shares of the area are in range up to a pixel; half of the first views are mirrored, no second view is."""
    torch.manual_seed(0)
    processor = two_views(weak_scale=[0.3, 0.5], scale=[0.8, 0.9])
    mirrored = []
    for _ in range(40):
        views = processor(gradient())
        assert views.shape == (2, 3, 16, 16)
        areas = []
        for columns, rows in map(pixels, views):
            width, height = (columns[0, -1] - columns[0, 0]).item(), (rows[-1, 0] - rows[0, 0]).item()
            areas.append(abs(width) * height * (16 / 15) ** 2 / 100**2)
            mirrored.append(width < 0)
        assert 0.29 <= areas[0] <= 0.51
        assert 0.79 <= areas[1] <= 0.91
    assert not any(mirrored[1::2])
    assert 8 <= sum(mirrored[::2]) <= 32


def test_the_defaults_of_two_views_are_tscirs():
    crops = [view.transforms[0] for view in two_views().views]
    assert [tuple(crop.scale) for crop in crops] == [(0.8, 1.0), (0.9, 1.0)]
    assert {crop.interpolation for crop in crops} == {InterpolationMode.BICUBIC}


def test_two_views_of_one_seed_are_the_same_and_cannot_be_preloaded(tmp_path, monkeypatch):
    processor, views = two_views(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(processor(gradient()))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    with pytest.raises(ValueError, match=r"preload: true needs a processor without randomness, got ClipTwoViews"):
        build(tmp_path, monkeypatch, vis_processor={"train": {"name": "clip_two_views", "image_size": 16}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weak_scale": [0, 1]}, r"weak_scale must be two numbers \[least, largest\] with 0 < least .*got \[0, 1\]"),
        ({"scale": [0.9, 0.8]}, r"vis_processor.scale must be two numbers"),
        ({"scale": [0.9, 1.1]}, r"scale must be two numbers"),
        ({"scale": 0.9}, r"scale must be two numbers .*got 0\.9"),
        ({"scale": [True, 1]}, r"scale must be two numbers"),
        ({"scale": "ab"}, r"scale must be two numbers"),
        ({"image_size": 0}, r"image_size must be a whole number >= 1, got 0"),
    ],
)
def test_impossible_views_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        two_views(**changes)


def test_an_impossible_padding_is_refused():
    with pytest.raises(
        ValueError, match=r"datasets\.<name>\.vis_processor\.target_ratio must be a number >= 1, got 0\.5"
    ):
        TargetPadProcessor(target_ratio=0.5)


def test_a_null_text_processor_leaves_texts_as_they_are(tmp_path, monkeypatch):
    """LAVIS's builders would call None; the other stage keeps its processor, which drops full stops."""
    built = build(tmp_path, monkeypatch, text_processor={"eval": None})
    query = built["val"].benchmark.groups[0].queries[0]
    built["val"].texts.rows[0] = (query.reference, 'Show "two" dogs. (Now)')
    assert built["val"].texts[0]["text_input"] == 'Show "two" dogs. (Now)'
    assert "." not in built["train"].text_processor("Is red.")
    assert pickle.loads(pickle.dumps(built["val"].text_processor)) is built["val"].text_processor  # spawned workers


def test_it_leaves_the_texts_of_drawn_captions_too():
    builder = registry.get_builder_class("garments_caption")
    section = OmegaConf.load(builder.default_config_path()).datasets.garments_caption
    built = builder(OmegaConf.merge(section, {"text_processor": {"eval": None}}))
    built.build_processors()
    assert built.text_processors["eval"]("A dress. Red") == "A dress. Red"
