"""EXIF orientation turns people's own photographs upright everywhere, and leaves benchmark images as stored."""

from __future__ import annotations

import importlib
import io
import json
import pkgutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from PIL import Image
from torch import nn

from lavis_cir_plugin import benchmarks
from lavis_cir_plugin.benchmarks.images import decode_rgb, image_problems, open_rgb
from lavis_cir_plugin.benchmarks.types import Benchmark, Group, Query, no_metrics
from lavis_cir_plugin.data.benchmark_datasets import BenchmarkDataset
from lavis_cir_plugin.data.feature_cache import FeatureCache, collate_images, with_features
from lavis_cir_plugin.data.negatives import NegativeSets
from lavis_cir_plugin.methods.retrieval_dpo import negatives_sheet
from lavis_cir_plugin.methods.retrieval_dpo.miner import training_benchmark
from lavis_cir_plugin.ranking.ranks import Ranking
from lavis_cir_plugin.report import contact_sheets, sheet_layout

HEIGHT, WIDTH = 2, 3
UPRIGHT = np.arange(1, 7, dtype=np.uint8).reshape(HEIGHT, WIDTH) * 40
# The origin of the stored row r and column c by orientation. EXIF 2.32, tag 274: "6: the 0th row is the visual
# right-hand side of the image, and the 0th column is the visual top".
SOURCES = {
    1: lambda r, c: (r, c),
    2: lambda r, c: (r, WIDTH - 1 - c),
    3: lambda r, c: (HEIGHT - 1 - r, WIDTH - 1 - c),
    4: lambda r, c: (HEIGHT - 1 - r, c),
    5: lambda r, c: (c, r),
    6: lambda r, c: (c, WIDTH - 1 - r),
    7: lambda r, c: (HEIGHT - 1 - c, WIDTH - 1 - r),
    8: lambda r, c: (HEIGHT - 1 - c, r),
}


def stored(orientation: int) -> np.ndarray:
    """Return the pixels as a camera held in this orientation stores them."""
    rows, columns = (HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT)
    places = [[SOURCES[orientation](r, c) for c in range(columns)] for r in range(rows)]
    return np.array([[UPRIGHT[place] for place in row] for row in places], dtype=np.uint8)


def saved(path: Path, orientation: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored(orientation if orientation in SOURCES else 1)).convert("RGB").save(
        path, exif=exif, **options
    )
    return path


def grey(picture: Image.Image) -> list[list[int]]:
    return np.asarray(picture)[:, :, 0].tolist()


@pytest.mark.parametrize("orientation", SOURCES)
def test_every_orientation_is_turned_upright_on_request_alone(tmp_path: Path, orientation: int):
    path = saved(tmp_path / "a.png", orientation)
    assert grey(open_rgb(path, upright=True)) == UPRIGHT.tolist()
    assert grey(open_rgb(path)) == stored(orientation).tolist()
    assert grey(decode_rgb(path.read_bytes(), "a", upright=True)) == UPRIGHT.tolist()
    assert grey(decode_rgb(path.read_bytes(), "a")) == stored(orientation).tolist()


@pytest.mark.parametrize("suffix", [".webp", ".tif", ".jpg"])
def test_every_format_with_exif_is_turned_once(tmp_path: Path, suffix: str):
    """Pillow itself turns some formats when it loads them. A second turn would lay them on the other side."""
    options = {".webp": {"lossless": True}, ".tif": {}, ".jpg": {"quality": 100}}[suffix]
    picture = open_rgb(saved(tmp_path / f"a{suffix}", 6, **options), upright=True)
    difference = np.abs(np.asarray(picture)[:, :, 0].astype(int) - UPRIGHT)
    assert picture.size == (WIDTH, HEIGHT)
    assert difference.max() <= (3 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_changes_nothing(tmp_path: Path, orientation: int):
    assert grey(open_rgb(saved(tmp_path / "a.png", orientation), upright=True)) == UPRIGHT.tolist()


def test_damaged_exif_data_do_not_lose_the_picture(tmp_path: Path):
    for number, exif in enumerate(
        [b"Exif\0\0MM\0*", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"\xff" * 40]
    ):
        path = tmp_path / f"{number}.png"
        Image.fromarray(UPRIGHT).save(path, exif=exif)
        assert grey(open_rgb(path, upright=True)) == UPRIGHT.tolist()


def test_deep_grey_is_turned_too(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored(6).astype(np.uint16) * 257).save(tmp_path / "deep.png", exif=exif)
    assert grey(open_rgb(tmp_path / "deep.png", upright=True)) == UPRIGHT.tolist()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0.0, 0.5, 1.0]], dtype=np.float32), "grey of floating point, which says nowhere what is black"),
        (np.array([[0, 70_000, 2**30]], dtype=np.int32), "grey of 32 bits, which says nowhere what is black"),
    ],
)
def test_grey_without_a_range_is_refused_and_not_clipped(tmp_path: Path, values: np.ndarray, reason: str):
    path = tmp_path / "deep.tif"
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match=rf"deep\.tif cannot be read as an image: it is {reason}"):
        open_rgb(path)
    assert reason in image_problems([path])[0]


def test_16_bit_grey_of_a_tiff_is_scaled(tmp_path: Path):
    path = tmp_path / "deep.tif"
    Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16)).save(path)
    assert grey(open_rgb(path)) == [[0, 1, 128, 255]]
    assert image_problems([path]) == [""]


# -- who turns and who does not --------------------------------------------------------------------------------------


def size(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(picture.size)


LYING, STANDING = [HEIGHT, WIDTH], [WIDTH, HEIGHT]


def build(name: str, split: str, root: Path) -> Any:
    builder = object.__new__(registry.get_builder_class(name))
    return builder.build_split(split, {"root": str(root)}, size, str)


def test_triplets_and_captions_of_ones_own_stand_upright(tmp_path: Path):
    for name in ("a.png", "b.png"):
        saved(tmp_path / "images" / name, 6)
    line = json.dumps({"reference": "a.png", "text": "is red", "target": "b.png"}) + "\n"
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(line)
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": "a.png", "caption": "a boot"}) + "\n")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, content in {"0.png": (tmp_path / "images" / "a.png").read_bytes(), "0.txt": b"a boot"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    training = build("triplets", "train", tmp_path)
    validation = build("triplets", "val", tmp_path)
    assert training[0]["image"].tolist() == training[0]["target"].tolist() == STANDING
    assert validation[0]["image"].tolist() == validation.queries[0]["image"].tolist() == STANDING
    assert validation.picture("a.png").size == (WIDTH, HEIGHT)
    assert training_benchmark("triplets", training, 0, 0).upright
    assert build("image_captions", "train", tmp_path)[0]["image"].tolist() == STANDING
    assert build("caption_shards", "train", tmp_path)[0]["image"].tolist() == STANDING


def test_no_published_data_set_is_turned():
    modules = [
        importlib.import_module(f"{benchmarks.__name__}.{m.name}") for m in pkgutil.iter_modules(benchmarks.__path__)
    ]
    assert [m.__name__.rpartition(".")[2] for m in modules if getattr(m, "UPRIGHT", False)] == ["triplets"]


def benchmark_of(path: Path, upright: bool) -> tuple[Benchmark, Group]:
    group = Group("dress", ("A",), (Query("A", ("is red",), "A"),), False)
    return Benchmark("x", "val", (group,), {"A": path}, "x val", no_metrics, "R@1", upright=upright), group


@pytest.mark.parametrize("upright", [False, True])
def test_a_benchmark_says_whether_its_pictures_are_turned(tmp_path: Path, upright: bool):
    dataset = BenchmarkDataset(benchmark_of(saved(tmp_path / "A.png", 6), upright)[0], size, str)
    expected = STANDING if upright else LYING
    assert dataset[0]["image"].tolist() == dataset.queries[0]["image"].tolist() == expected


class Tower(nn.Module):
    """Return the mean of each of three pixels of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.image_tower = nn.Linear(1, 1)

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        return images.float()


def test_cached_features_are_of_the_pictures_that_a_data_set_shows(tmp_path: Path):
    """One file in a benchmark and in a catalogue has two rows in separate folders."""
    path, model = saved(tmp_path / "A.png", 6), Tower()
    caches = {upright: FeatureCache(tmp_path / "cache", model, size, upright) for upright in (False, True)}
    for upright, cache in caches.items():
        with_features({"image": collate_images([cache.picture(path)])}, model, [cache])
        assert cache.picture(path).tolist() == (STANDING if upright else LYING)
    assert caches[False].folder != caches[True].folder
    assert FeatureCache(tmp_path / "cache", model, size).folder == caches[False].folder


@pytest.mark.parametrize("upright", [False, True])
def test_sheets_show_what_the_model_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upright: bool):
    path = saved(tmp_path / "A.png", 6)
    opened = []
    monkeypatch.setattr(sheet_layout, "open_rgb", lambda *arguments: opened.append(arguments) or open_rgb(*arguments))
    benchmark, group = benchmark_of(path, upright)
    ranking = Ranking(torch.tensor([0]), torch.tensor([[0]]), torch.tensor([-1]))
    contact_sheets.contact_sheet(benchmark, group, ranking, tmp_path / "sheet.png")
    assert opened == [(path, upright)] * 2

    opened.clear()
    one = np.zeros(1, dtype=np.int32)
    scores = np.zeros((1, 1), dtype=np.float32)
    sets = NegativeSets(
        names=["A"], references=one, targets=one, texts=["is red"], negatives=one[None], scores=scores,
        target_scores=scores[0], ranks=one[None], target_ranks=one, paths=[str(path)], about={"upright": upright},
    )  # fmt: skip
    negatives_sheet.negatives_sheet(sets, tmp_path / "negatives.png")
    assert opened == [(path, upright)] * 3
