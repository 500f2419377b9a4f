"""Captioned images in files and in tar shards are read, broken ones are refused, and models train on them."""

from __future__ import annotations

import io
import json
import logging
import random
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import webdataset
from launched import finish, in_two_processes, start_launcher
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image

from lavis_cir_plugin.benchmarks.captions import CaptionedImage, CaptionsConfig, caption_records, read_captions
from lavis_cir_plugin.data.builders.captions import CaptionDataset, ShardDataset
from lavis_cir_plugin.data.resumable_loader import EpochLoader, training_loader
from lavis_cir_plugin.data.tar_shards import CaptionedShards
from lavis_cir_plugin.garments import GarmentsConfig, make_garments
from lavis_cir_plugin.processors import TargetPadProcessor
from lavis_cir_plugin.training import launcher

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("blank_pictures")
LINES = [{"image": "shoes/a.jpg", "caption": " a red shoe "}, {"image": "b.png", "caption": ["a boot", "a black boot"]}]


def picture(grey: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (grey, grey, grey)).save(buffer, kind)
    return buffer.getvalue()


def folder(root: Path, records: list[Any] | None = None, name: str = "captions.jsonl") -> dict[str, Any]:
    """Write captions and two pictures; return a configuration that reads them."""
    records = LINES if records is None else records
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (root / "images/shoes").mkdir(parents=True, exist_ok=True)
    (root / name).write_text("".join(f"{line}\n" for line in lines) if name.endswith("jsonl") else json.dumps(records))
    for path in ("shoes/a.jpg", "b.png"):
        (root / "images" / path).write_bytes(picture(50))
    return {"root": str(root)}


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.json"])
def test_captions_are_read_from_lines_and_from_lavis_own_list(tmp_path: Path, name: str):
    examples, paths = read_captions(folder(tmp_path, name=name))
    assert examples == [
        CaptionedImage("shoes/a.jpg", ("a red shoe",)), CaptionedImage("b.png", ("a boot", "a black boot")),
    ]  # fmt: skip
    assert paths == {name: tmp_path / "images" / name for name in ("shoes/a.jpg", "b.png")}


def test_file_and_images_may_lie_elsewhere(tmp_path: Path):
    folder(tmp_path, name="coco_karpathy_train.json")
    (tmp_path / "images").rename(tmp_path / "pictures")
    config = {"root": "x", "annotations": str(tmp_path / "coco_karpathy_train.json")}
    with pytest.raises(FileNotFoundError, match=r"no image folder; .*datasets.image_captions.build_info.images"):
        read_captions(config)
    assert len(read_captions({**config, "images": str(tmp_path / "pictures")})[0]) == 2


def test_fewer_captions_need_fewer_images(tmp_path: Path):
    config = folder(tmp_path)
    examples, paths = read_captions({**config, "max_images": 1})
    assert [example.image for example in examples] == list(paths) == ["shoes/a.jpg"]
    assert {read_captions({**config, "max_images": 1, "seed": s})[0][0].image for s in range(9)} == {
        "shoes/a.jpg", "b.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"image": "b.png", "capt', "is not valid JSON: "),
        ('{"image": "b.png", "image": "b.png"}', 'cannot be read as JSON: an object has the key "image" twice'),
        (["b.png"], "must be an object"),
        ({"image": "b.png"}, "has no 'caption'"),
        ({"caption": "x"}, "has no 'image'"),
        ({"image": "b.png", "caption": " "}, 'has caption = " "; it must be text, or a list of texts, none empty'),
        ({"image": "b.png", "caption": []}, r"has caption = \[\]"),
        ({"image": "b.png", "caption": 5}, "has caption = 5"),
        ({"image": "../b.png", "caption": "x"}, 'has image = "../b.png"; it must be the path of an image below'),
        ({"image": "/b.png", "caption": "x"}, 'has image = "/b.png"'),
        ({"image": 5, "caption": "x"}, "has image = 5"),
    ],
)
@pytest.mark.parametrize("name", ["captions.jsonl", "captions.json"])
def test_a_wrong_record_is_named(tmp_path: Path, record: Any, message: str, name: str):
    if name == "captions.json" and isinstance(record, str):
        pytest.skip("broken JSON has no records")
    config = folder(tmp_path, [LINES[0], record], name)
    place = "line 2" if name == "captions.jsonl" else r"record 1 \(counting from 0\)"
    with pytest.raises(ValueError, match=rf"{name}.*{place} {message}"):
        read_captions(config)


def test_files_that_are_absent_or_cut_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"captions\.jsonl does not exist; set datasets\.image_captions\.build"):
        read_captions({"root": str(tmp_path)})
    config = folder(tmp_path, name="captions.json")
    (tmp_path / "captions.json").write_text((tmp_path / "captions.json").read_text()[:-20])
    with pytest.raises(ValueError, match=r"captions\.json is not valid JSON: .* at line 1, column"):
        read_captions(config)
    for content, message in ((b"", "is empty"), (b"\xff\xfe", r"is not UTF-8 text \(byte 0\)")):
        (tmp_path / "captions.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=rf"captions\.jsonl {message}"):
            read_captions(config)
    with pytest.raises(ValueError, match=r"max_images must be a whole number >= 1, or null, got 0"):
        CaptionsConfig.from_mapping({"root": "x", "max_images": 0})


def test_missing_and_broken_images_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = folder(tmp_path)
    (tmp_path / "images/b.png").write_bytes(picture(50)[:-20])
    with pytest.raises(ValueError, match=r"1 of 2 image files cannot be read; .*b\.png"):
        read_captions({**config, "verify_images": True})
    (tmp_path / "images/b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"image_captions: 1 of 2 images are missing .*first: b\.png"):
        read_captions(config)
    assert len(read_captions({**config, "missing_images": "skip"})[0]) == 1
    assert "image_captions train: 1 of 2 captions left out, images missing." in caplog.text


def test_of_several_captions_one_is_drawn_each_time(tmp_path: Path):
    dataset = CaptionDataset(*read_captions(folder(tmp_path)), TargetPadProcessor(8), str.upper)
    random.seed(0)
    samples = [dataset[1] for _ in range(20)]
    assert {sample["text_input"] for sample in samples} == {"A BOOT", "A BLACK BOOT"}
    batch = dataset.collater([dataset[0], dataset[1]])
    assert set(batch) == {"image", "image_id", "text_input"}
    assert batch["image"].shape == (2, 3, 8, 8)


def test_examples_of_one_image_have_one_id(tmp_path: Path):
    """COCO has five captions per image; without equal ids a contrastive loss takes an image for its own negative."""
    picture_file = folder(tmp_path)
    examples, paths = read_captions(picture_file)
    dataset = CaptionDataset([*examples, examples[0]], paths, TargetPadProcessor(8), str.upper)
    first, second, again = (dataset[index]["image_id"] for index in range(3))
    assert first == again != second


def test_the_examples_of_the_docstring_are_read(tmp_path: Path):
    from lavis_cir_plugin.benchmarks import captions

    lines = [line.strip() for line in str(captions.__doc__).splitlines() if line.strip().startswith("{")]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    assert [len(example.captions) for example in caption_records(tmp_path / "x.jsonl")] == [1, 2]


# -- shards ----------------------------------------------------------------------------------------------------------


def shard(path: Path, files: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pairs(*numbers: int) -> dict[str, bytes | str]:
    return {
        name: content
        for number in numbers
        for name, content in {f"{number:09d}.png": picture(number), f"{number:09d}.txt": f"grey {number}"}.items()
    }


def test_every_kind_of_sample_is_read(tmp_path: Path):
    files = {
        "__index__": "webdataset's own",
        "a/1.JPG": picture(10, "JPEG"),
        "a/1.json": json.dumps({"caption": ["one", "1"], "key": "1"}),
        "2.webp": picture(20, "WEBP"),
        "2.txt": " two \n",
        "2.json": json.dumps({"caption": "not this one"}),
        "2.cls": "7",
        ".hidden": "x",
    }
    shard(tmp_path / "0.tar", files)
    samples = CaptionedShards({"root": str(tmp_path)})
    assert [texts for _, texts in (samples[0], samples[1])] == [("one", "1"), ("two",)]
    assert [round(np.asarray(image).mean() / 10) for image, _ in (samples[0], samples[1])] == [1, 2]
    dataset = ShardDataset(samples, TargetPadProcessor(8), str.upper)
    assert {dataset[0]["text_input"] for _ in range(20)} == {"ONE", "1"}
    assert dataset.collater([dataset[0], dataset[1]])["image"].shape == (2, 3, 8, 8)
    assert dataset.contents == "2 captioned pictures"


@pytest.mark.parametrize(
    ("shards", "numbers"),
    [
        (None, [1, 2, 3, 4, 5]),
        ("{00000..00001}.tar", [1, 2, 3, 4]),
        (["00002.tar", "0000{0,1}.tar"], [5, 1, 2, 3, 4]),
    ],
)
def test_shards_are_named_by_patterns(tmp_path: Path, shards: Any, numbers: list[int]):
    for index, part in enumerate([(1, 2), (3, 4), (5,)]):
        shard(tmp_path / f"{index:05d}.tar", pairs(*part))
    samples = CaptionedShards({"root": str(tmp_path), "shards": shards})
    assert [int(texts[0].split()[1]) for _, texts in (samples[i] for i in range(len(samples)))] == numbers


def test_webdataset_reads_the_same_samples(tmp_path: Path):
    for index in range(2):
        shard(tmp_path / f"{index}.tar", pairs(*range(index * 5, index * 5 + 5)))
    theirs = webdataset.WebDataset([str(path) for path in sorted(tmp_path.glob("*.tar"))], shardshuffle=False)
    theirs = list(theirs.decode("pil").to_tuple("png", "txt"))
    ours = CaptionedShards({"root": str(tmp_path)})
    assert len(ours) == len(theirs) == 10
    for index, (image, text) in enumerate(theirs):
        assert ours[index][1] == (text,)
        assert np.array_equal(np.asarray(ours[index][0]), np.asarray(image))


def test_a_shard_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A shard is listed again only if it has changed, if it was broken, or if the cached listing is damaged."""
    for index, numbers in enumerate([(1, 2), (3, 4)]):
        shard(tmp_path / f"{index}.tar", pairs(*numbers))
    opened = []
    tar_open = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda path, mode: opened.append(path.name) or tar_open(path, mode))
    config = {"root": str(tmp_path), "skip_broken": True}

    def texts() -> list[str]:
        opened.clear()
        samples = CaptionedShards(config, tmp_path / "cache")
        return [samples[index][1][0] for index in range(len(samples))]

    assert texts() == [f"grey {number}" for number in (1, 2, 3, 4)]
    assert opened == ["0.tar", "1.tar"]
    assert texts() == [f"grey {number}" for number in (1, 2, 3, 4)]
    assert opened == []
    monkeypatch.setattr(tarfile, "open", tar_open)
    shard(tmp_path / "1.tar", {**pairs(7, 8), "9.txt": "x"})
    monkeypatch.setattr(tarfile, "open", lambda path, mode: opened.append(path.name) or tar_open(path, mode))
    for _ in range(2):
        assert texts() == [f"grey {number}" for number in (1, 2, 7, 8)]
        assert opened == ["1.tar"]
    for kept in (tmp_path / "cache").iterdir():
        kept.write_bytes(b"x")
    assert len(texts()) == 4
    assert opened == ["0.tar", "1.tar"]


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for index in range(2):
        shard(tmp_path / f"{index}.tar", pairs(index))
    (tmp_path / "file").write_text("x")
    assert len(CaptionedShards({"root": str(tmp_path)}, tmp_path / "file/shards")) == 2
    (record,) = caplog.records
    assert "2 listings are made again by the next run: " in record.getMessage()
    assert "could not be written: Not a directory" in record.getMessage()


def test_fewer_samples_of_one_seed_are_among_more(tmp_path: Path):
    shard(tmp_path / "0.tar", pairs(*range(9)))
    drawn = []
    for count in (3, 5):
        samples = CaptionedShards({"root": str(tmp_path), "max_images": count, "seed": 1})
        drawn.append([samples[index][1] for index in range(len(samples))])
    assert [len(texts) for texts in drawn] == [3, 5]
    assert set(drawn[0]) < set(drawn[1])


WRONG: dict[str, tuple[dict[str, bytes | str], str]] = {
    "no caption": ({"7.png": picture(7)}, 'sample "7" has no caption, neither .txt nor .json'),
    "no picture": ({"7.txt": "x"}, 'sample "7" has 0 pictures; it must have one'),
    "two pictures": ({**pairs(7), "000000007.jpg": b"x"}, 'sample "000000007" has 2 pictures'),
    "empty caption": ({"7.png": picture(7), "7.txt": " \n"}, 'sample "7" has caption = .* it must be text, not empty'),
    "not UTF-8": ({"7.png": picture(7), "7.txt": b"\xff"}, r'sample "7" has a caption that is not UTF-8 text \(byte 0'),
    "broken JSON": ({"7.png": picture(7), "7.json": "{"}, 'sample "7" has a .json file that is not valid JSON'),
    "JSON twice": (
        {"7.png": picture(7), "7.json": '{"a": 1, "a": 2}'},
        "cannot be read as JSON: an object has the key",
    ),
    "JSON without": (
        {"7.png": picture(7), "7.json": '{"text": "x"}'},
        "has no 'caption' in its .json file, which holds",
    ),
    "JSON list": ({"7.png": picture(7), "7.json": '["caption"]'}, "has no 'caption' in its .json file"),
    "JSON type": ({"7.png": picture(7), "7.json": '{"caption": 5}'}, "has caption = 5; it must be text, or a list"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_sample_is_named_or_counted(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture):
    files, message = WRONG[kind]
    shard(tmp_path / "00.tar", {**pairs(1), **files, **pairs(9)})
    config = {"root": str(tmp_path)}
    with pytest.raises(
        ValueError, match=rf"1 samples or shards are broken and 2 samples whole; .*00\.tar, .*{message}"
    ):
        CaptionedShards(config)
    samples = CaptionedShards({**config, "skip_broken": True})
    assert [samples[index][1] for index in (0, 1)] == [("grey 1",), ("grey 9",)]
    assert len(samples) == 2
    assert "caption_shards: 1 broken, left out." in caplog.text
    assert "00.tar" in caplog.text


def test_a_file_that_a_sample_has_twice_is_named(tmp_path: Path):
    """A tar file may hold a name twice; webdataset refuses such a sample too."""
    path = shard(tmp_path / "00.tar", pairs(1, 2))
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("000000001.txt"))
    with pytest.raises(ValueError, match=r'sample "000000001" has two files \.txt'):
        CaptionedShards({"root": str(tmp_path)})
    assert len(CaptionedShards({"root": str(tmp_path), "skip_broken": True})) == 1


def test_names_with_dots_are_told_the_rule(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    dotted = {f"heel 5.{size} cm.{end}": content for size in (1, 2) for end, content in (("jpg", b"x"), ("txt", "x"))}
    shard(tmp_path / "0.tar", dotted)
    rule = (
        "a sample's name ends at the first dot of its files' names, so 2 pairs such as \"heel 5.1 cm\" are none of "
        "their own; write these dots otherwise"
    )
    message = f'sample "heel 5" has 0 pictures; it must have one ({rule}).'
    with pytest.raises(ValueError, match=re.escape(message)):
        CaptionedShards({"root": str(tmp_path)})
    # Beside a whole sample of that name such files are no part of the data, and a warning says so.
    shard(tmp_path / "0.tar", {"heel 5.png": picture(7), "heel 5.txt": "seven", **dotted})
    samples = CaptionedShards({"root": str(tmp_path)})
    assert [samples[index][1] for index in range(len(samples))] == [("seven",)]
    assert f"0.tar: {rule}" in caplog.text


def test_other_files_of_a_sample_are_no_matter(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    shard(tmp_path / "0.tar", {**pairs(1), "000000001.mask.png": b"x", "000000001.meta.json": "{}"})
    assert len(CaptionedShards({"root": str(tmp_path)})) == 1
    assert not caplog.records


@pytest.mark.parametrize("zeros", [0, 512 * 7, 2**21])
def test_shards_joined_end_to_end_are_read_to_the_last(tmp_path: Path, zeros: int):
    """The archives may use the same sample numbers, and more zeros than tar writes may lie between them."""
    parts = [pairs(1, 2), pairs(1), {"000000001.png": picture(3), "000000001.txt": "last"}]
    contents = [shard(tmp_path / "part", files).read_bytes() for files in parts]
    (tmp_path / "0.tar").write_bytes(bytes(zeros).join(contents))
    samples = CaptionedShards({"root": str(tmp_path)})
    texts = [samples[index][1][0] for index in range(len(samples))]
    assert texts == ["grey 1", "grey 2", "grey 1", "last"]
    assert [round(np.asarray(samples[index][0]).mean()) for index in range(4)] == [1, 2, 1, 3]


def test_what_follows_a_shard_and_is_none_is_named(tmp_path: Path):
    path = shard(tmp_path / "0.tar", pairs(1, 2))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"x" * 600)
    message = rf"after 2 samples: after its end, at byte {size:,}, it goes on with no tar file"
    with pytest.raises(ValueError, match=message):
        CaptionedShards({"root": str(tmp_path)})
    assert len(CaptionedShards({"root": str(tmp_path), "skip_broken": True})) == 2


@pytest.mark.parametrize("cut", [300, 512 + 100, 512 * 5])
def test_a_cut_shard_is_named_and_its_whole_samples_can_be_used(tmp_path: Path, cut: int, caplog):
    path = shard(tmp_path / "00.tar", pairs(1, 2, 3))
    whole = path.read_bytes().rstrip(b"\0")
    path.write_bytes(whole[:-cut])
    with pytest.raises(ValueError, match=r"00\.tar cannot be read as a tar file after \d samples: .*unpacked to \.tar"):
        CaptionedShards({"root": str(tmp_path)})
    samples = CaptionedShards({"root": str(tmp_path), "skip_broken": True})
    assert 1 <= len(samples) < 3
    assert [samples[index][1] for index in range(len(samples))] == [(f"grey {i + 1}",) for i in range(len(samples))]
    assert "1 broken, left out" in caplog.text


def test_of_a_cut_shard_the_cut_file_is_left_out_whichever_sample_has_it(tmp_path: Path):
    """Sample 1 began before sample 2, and its caption is the file that is cut."""
    files = {"1.png": picture(1), **pairs(2), "1.txt": "long " * 300}
    path = shard(tmp_path / "00.tar", files)
    path.write_bytes(path.read_bytes().rstrip(b"\0")[:-600])
    samples = CaptionedShards({"root": str(tmp_path), "skip_broken": True})
    assert [samples[index][1] for index in range(len(samples))] == [("grey 2",)]


def test_what_is_called_a_shard_and_is_no_file_is_told_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shard(tmp_path / "0.tar", pairs(1))
    (tmp_path / "0_unpacked.tar").mkdir()
    assert len(CaptionedShards({"root": str(tmp_path)})) == 1
    (tmp_path / "1.tar").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 shards do not exist \(first: .*1\.tar\)"):
        CaptionedShards({"root": str(tmp_path)})
    (tmp_path / "1.tar").unlink()
    shard(tmp_path / "1.tar", pairs(2))
    path_open, tar_open = Path.open, tarfile.open

    def refuses(opens: Any) -> Any:
        def opened(path: Path, *arguments: Any) -> Any:
            if path.name == "1.tar":
                raise PermissionError(13, "Permission denied", str(path))
            return opens(path, *arguments)

        return opened

    monkeypatch.setattr(Path, "open", refuses(path_open))
    monkeypatch.setattr(tarfile, "open", refuses(tar_open))
    with pytest.raises(ValueError, match=r"1 samples or shards are broken and 1 samples whole.* Permission denied"):
        CaptionedShards({"root": str(tmp_path)})
    assert len(CaptionedShards({"root": str(tmp_path), "skip_broken": True})) == 1


def test_a_shard_that_has_changed_since_it_was_listed_is_named(tmp_path: Path):
    path = shard(tmp_path / "00.tar", pairs(1))
    samples = CaptionedShards({"root": str(tmp_path)})
    shard(path, {"other.png": b"x" * 2000})
    with pytest.raises(ValueError, match=r"00\.tar, sample with the picture at byte 512: the picture cannot be read"):
        samples[0]
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=r"00\.tar, sample with the picture at byte 512: the picture cannot be read"):
        samples[0]


@pytest.mark.parametrize("content", [b"", b"404 Not Found", b"\x1f\x8b\x08\x00 gzip"])
def test_a_file_that_is_no_shard_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "00.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"00\.tar cannot be read as a tar file after 0 samples"):
        CaptionedShards({"root": str(tmp_path)})
    with pytest.raises(ValueError, match=r"1 shards \(first: .*00\.tar\) hold no whole pair such as 000000000\.jpg"):
        CaptionedShards({"root": str(tmp_path), "skip_broken": True})


def test_a_shard_without_pairs_or_that_is_missing_is_told(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has no \.tar file; set datasets\.caption_shards\.build_info\.root"):
        CaptionedShards({"root": str(tmp_path)})
    shard(tmp_path / "0.tar", {"README": "x"})
    with pytest.raises(ValueError, match=r"hold no whole pair such as"):
        CaptionedShards({"root": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"1 of 2 shards do not exist \(first: .*1\.tar\)"):
        CaptionedShards({"root": str(tmp_path), "shards": "{0..1}.tar"})
    with pytest.raises(ValueError, match=r'shards: "\{0\.\.1\.tar" has unbalanced braces'):
        CaptionedShards({"root": str(tmp_path), "shards": "{0..1.tar"})
    for value in ([], "", 5, ["a", 5]):
        with pytest.raises(ValueError, match=r"build_info\.shards must be a path or a list of paths, or null, got"):
            CaptionedShards({"root": str(tmp_path), "shards": value})


def test_a_broken_picture_is_named_or_counted_and_the_next_one_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    files = {**pairs(1, 2, 3), "000000002.png": picture(2)[:60]}
    shard(tmp_path / "00.tar", files)
    samples = CaptionedShards({"root": str(tmp_path)})
    with pytest.raises(
        ValueError, match=r'00\.tar, sample "000000002": the picture cannot be read as an image: .*skip_br'
    ):
        samples[1]
    samples = CaptionedShards({"root": str(tmp_path), "skip_broken": True})
    with caplog.at_level(logging.WARNING):
        assert [samples[index][1] for index in range(3)] == [("grey 1",), ("grey 3",), ("grey 3",)]
    assert samples.broken_pictures == 1
    assert 'sample "000000002": the picture cannot be read' in caplog.text
    shard(tmp_path / "00.tar", {"1.png": b"x", "1.txt": "x"})
    with pytest.raises(ValueError, match="no picture of 1 shards can be read"):
        CaptionedShards({"root": str(tmp_path), "skip_broken": True})[0]


@pytest.mark.parametrize("name", ["image_captions", "caption_shards"])
def test_drawn_garments_are_refused_because_no_world_has_captions_in_these_files(name: str):
    section = OmegaConf.create({"garments": {"seed": 1}, "build_info": {"root": "x"}})
    problems = list(registry.get_builder_class(name).section_problems(name, section))
    assert problems[0] == f"datasets.{name}.garments has no effect: no world is drawn in {name}'s files."


def test_preloading_shards_is_refused():
    builder = registry.get_builder_class("caption_shards")
    section = OmegaConf.create({"preload": True, "build_info": {"root": "x"}})
    (problem,) = builder.section_problems("caption_shards", section)
    assert "datasets.caption_shards.preload is for small data sets of image files" in problem


# -- training --------------------------------------------------------------------------------------------------------


def shares(rank: int, root: str) -> None:
    """Write to a file the texts that one of two processes sees in two epochs."""
    dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2)
    dataset = ShardDataset(CaptionedShards({"root": root}), TargetPadProcessor(8), str)
    loader = EpochLoader(training_loader(dataset, 3, batch_size=2, drop_last=True, collate_fn=dataset.collater))
    batches = [next(loader)["text_input"] for _ in range(2 * len(loader))]
    Path(root, f"{rank}.json").write_text(json.dumps(batches))
    dist.destroy_process_group()


def test_two_processes_see_each_sample_once_an_epoch(tmp_path: Path):
    shard(tmp_path / "0.tar", pairs(*range(5)))
    shard(tmp_path / "1.tar", pairs(*range(5, 12)))
    in_two_processes(shares, str(tmp_path))
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for epoch in (slice(0, 3), slice(3, 6)):
        texts = [text for rank in seen for batch in rank[epoch] for text in batch]
        assert sorted(texts) == sorted(f"grey {number}" for number in range(12))
    assert seen[0][:3] != seen[0][3:]


SIDE = 16
WORLD = {
    "train_triplets": 4, "train_images": 8, "val_queries": 3, "val_images": 6, "test_queries": 2, "test_images": 4,
    "image_width": 48, "image_height": 60,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Draw FashionIQ's files, and write its pictures with captions to files and to shards."""
    root = tmp_path_factory.mktemp("world")
    fashioniq = make_garments(root, GarmentsConfig(**WORLD))
    pictures = sorted((fashioniq / "images").iterdir())
    records = [{"image": path.name, "caption": f"garment {index}"} for index, path in enumerate(pictures)]
    (root / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = {}
    for index, path in enumerate(pictures):
        files.update({f"{index}{path.suffix}": path.read_bytes(), f"{index}.txt": f"garment {index}"})
    shard(root / "0.tar", files)
    return root, fashioniq, len(pictures)


def project(tmp_path: Path, world: Any, names: tuple[str, ...], processor: str = "target_pad") -> str:
    """Write a project that trains a small CLIP from scratch on captions and validates it on FashionIQ."""
    root, fashioniq, _ = world
    infos = {
        "image_captions": {"root": str(root), "images": str(fashioniq / "images")},
        "caption_shards": {"root": str(root)},
    }
    garments = {"garments": {"train_images": 12, "val_images": 4, "image_width": 48, "image_height": 60}}
    plain = {"name": "target_pad", "image_size": SIDE}
    vis = {"train": {"name": processor, "image_size": SIDE}, "eval": plain}
    sections = {
        name: {"vis_processor": vis, **({"build_info": infos[name]} if name in infos else garments)} for name in names
    }
    for section in sections.values():
        section["splits"] = ["train"]
    evaluated = {
        "splits": ["val"],
        "build_info": {"root": str(fashioniq), "categories": ["dress"]},
        "vis_processor": {"train": plain, "eval": plain},
    }
    run = {
        "task": "composed_retrieval", "max_epoch": 1, "batch_size_train": 4, "init_lr": 1e-4, "num_workers": 0,
        "device": "cpu", "output_dir": str(tmp_path / "out"), "train_splits": ["train"], "valid_splits": ["val"],
    }  # fmt: skip
    content = {
        "model": {
            "arch": "clip_cir",
            "model_type": "tiny",
            "freeze_vit": False,
            "clip_model": "small_clip",
            "image_size": SIDE,
        },
        "datasets": {**sections, "fashioniq": evaluated},
        "run": run,
    }
    OmegaConf.save(OmegaConf.create(content), tmp_path / "project.yaml")
    return str(tmp_path / "project.yaml")


def logged(tmp_path: Path) -> list[dict[str, Any]]:
    (log,) = (tmp_path / "out").rglob("log.txt")
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"')]


@pytest.mark.parametrize(
    "names",
    [("image_captions",), ("caption_shards",), ("image_captions", "caption_shards", "garments_caption")],
    ids=lambda names: "+".join(names),
)
def test_a_model_trains_on_captions_beside_a_benchmark(names, world, tmp_path, monkeypatch):
    """Several caption data sets, one of them LAVIS's own, are concatenated; validation reads FashionIQ."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    launcher.main("train", ["--cfg-path", project(tmp_path, world, names)])
    rows = logged(tmp_path)
    assert any("train_loss" in row for row in rows)
    assert any("val_agg_metrics" in row or "val_mean" in row for row in rows)


def test_two_processes_train_on_shards_together(world, tmp_path):
    arguments = ["--cfg-path", project(tmp_path, world, ("caption_shards", "image_captions"))]
    log = tmp_path / "printed.txt"
    finish(start_launcher("train", arguments, log, world_size=2, XDG_CACHE_HOME=str(tmp_path / "cache")), log)
    assert any("train_loss" in row for row in logged(tmp_path))


def test_two_views_reach_the_model_as_five_dimensions(world, tmp_path):
    path = project(tmp_path, world, ("image_captions",), "clip_two_views")
    builder = registry.get_builder_class("image_captions")
    section = OmegaConf.load(builder.default_config_path("default")).datasets.image_captions
    dataset = builder(OmegaConf.merge(section, OmegaConf.load(path).datasets.image_captions)).build_datasets()["train"]
    assert dataset.collater([dataset[0], dataset[1]])["image"].shape == (2, 2, 3, SIDE, SIDE)
    assert isinstance(dataset[0]["image"], torch.Tensor)
