"""Damaged data: either the data load, or one sentence names the file and the record that are wrong."""

from __future__ import annotations

import importlib
import io
import json
import os
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lavis_cir_plugin.tasks.evaluation import rank_queries

BENCHMARKS = ("fashioniq", "cirr", "circo", "triplets", "lasco")
DATA_SETS = (*BENCHMARKS, "laion_cir", "synthtriplets18m")
EXAMPLES = int(os.environ.get("CIR_EXAMPLES", "200"))
SPLIT_NAMES = ("train", "val", "test")


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_fashioniq(root: Path) -> None:
    for split in SPLIT_NAMES:
        names = [f"B{split.upper()}{index}" for index in range(5)]
        rows = [{"target": b, "candidate": a, "captions": ["is red", "is long"]} for a, b in zip(names, names[1:])]
        if split == "test":
            for row in rows:
                del row["target"]
        write(root / "captions" / f"cap.dress.{split}.json", rows)
        write(root / "image_splits" / f"split.dress.{split}.json", names)
        touch(root / "images", *(f"{name}.jpg" for name in names))


def write_cirr(root: Path) -> None:
    for folder, split in (("train/3", "train"), ("dev", "val"), ("test1", "test1")):
        names = [f"{split}-{index}-img0" for index in range(7)]
        rows: list[dict[str, Any]] = []
        for number in range(4):
            row: dict[str, Any] = {
                "pairid": 10 * number,
                "reference": names[number],
                "target_hard": names[number + 1],
                "target_soft": {names[number + 1]: 1.0, names[(number + 3) % 6]: 0.5},
                "caption": "has two dogs",
                "img_set": {"id": 1, "members": names[:6], "reference_rank": 0, "target_rank": 1},
            }
            if split == "test1":
                del row["target_hard"], row["target_soft"]
            rows.append(row)
        write(root / "cirr" / "captions" / f"cap.rc2.{split}.json", rows)
        write(root / "cirr" / "image_splits" / f"split.rc2.{split}.json", {n: f"./{folder}/{n}.png" for n in names})
        touch(root / folder, *(f"{name}.png" for name in names))


def write_circo(root: Path) -> None:
    ids = [100 + index for index in range(8)]
    for split in ("val", "test"):
        rows: list[dict[str, Any]] = []
        for number in range(3):
            row: dict[str, Any] = {
                "id": number,
                "reference_img_id": ids[number],
                "relative_caption": "is held by a girl",
                "shared_concept": "a cat",
                "target_img_id": ids[number + 1],
                "gt_img_ids": [ids[number + 1], ids[number + 3]],
                "semantic_aspects": ["addition", "negation"],
            }
            if split == "test":
                del row["target_img_id"], row["gt_img_ids"], row["semantic_aspects"]
            rows.append(row)
        write(root / "annotations" / f"{split}.json", rows)
    images = [{"id": image, "file_name": f"{image:012d}.jpg", "height": 4} for image in ids]
    write(root / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json", {"images": images})
    touch(root / "COCO2017_unlabeled" / "unlabeled2017", *(image["file_name"] for image in images))


def write_triplets(root: Path) -> None:
    names = [f"shoes/{index}.jpg" for index in range(8)]
    for split in SPLIT_NAMES:
        rows: list[dict[str, Any]] = []
        for number in range(4):
            row: dict[str, Any] = {"id": str(number), "reference": names[number], "text": "in red"}
            extra = {
                "train": {"target": names[number + 1]},
                "val": {"target": [names[number + 1], names[number + 3]], "text": ["in red", "red"]},
                "test": {"members": names[:6]},
            }
            rows.append({**row, **extra[split]})
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    touch(root / "images", *names)


def write_lasco(root: Path) -> None:
    for split in ("train", "val"):
        images = [[index, f"{split}2014/COCO_{split}2014_{index:012d}.jpg"] for index in range(8)]
        rows = [
            {"qid": 1000 * number, "query-image": a, "query-text": "The cat is black", "target-image": b}
            for number, (a, b) in enumerate(zip(images[:4], images[1:]))
        ]
        write(root / f"lasco_{split}.json", rows)
        touch(root, *(path for _, path in images))
    write(root / "lasco_val_corpus.json", [{"id": number, "path": f"val/{path}"} for number, path in images])


def write_laion_cir(root: Path) -> None:
    rows = [{"ref_image_id": str(n), "relative_cap": "add parking.", "tgt_image_id": str(n + 1)} for n in range(4)]
    write(root / "laion_combined_info.json", rows)
    touch(root / "images", *(f"{number:07d}.png" for number in range(5)))


def write_synthtriplets18m(root: Path) -> None:
    for number in range(3):
        sample = f"{number:09d}"
        write(root / f"{sample}.json", {"source_caption": "a cat", "target_caption": "a dog"})
        touch(root, f"{sample}.source_image.jpg", f"{sample}.target_image.jpg")


CONFIGS: dict[str, dict[str, Any]] = {
    "fashioniq": {"categories": ["dress"], "protocol": "clip4cir"},
    "cirr": {"labels": "soft"},
    "circo": {"text": "shared_and_relative"},
    "triplets": {},
    "lasco": {},
    "laion_cir": {},
    "synthtriplets18m": {},
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Return the folder of each benchmark's undamaged files."""
    roots = {name: tmp_path_factory.mktemp(name) for name in DATA_SETS}
    for name, root in roots.items():
        globals()[f"write_{name}"](root)
    return roots


def load(name: str, folder: Path, root: str = "") -> None:
    """Read every split and use everything in it: texts, rankings, metrics, submissions."""
    module = importlib.import_module(f"lavis_cir_plugin.benchmarks.{name}")
    config = {"root": root or str(folder), **CONFIGS[name]}
    for split in module.SPLITS:
        if split == "train":
            triplets, paths = module.read_train(config)
            assert all(path.is_relative_to(folder) for path in paths.values())
            for triplet in triplets:
                assert module.training_text(triplet.captions, random).encode()
            continue
        benchmark = module.read_benchmark(config, split)
        assert all(path.is_relative_to(folder) for path in benchmark.image_paths.values())
        rankings = {}
        for group in benchmark.groups:
            count = sum(len(query.texts) for query in group.queries)
            rows = F.normalize(torch.randn(count, 4), dim=-1)
            gallery = F.normalize(torch.randn(len(group.gallery), 4), dim=-1)
            rankings[group.name] = rank_queries(group.queries, rows, gallery, group, torch.device("cpu"))
        assert benchmark.protocol.isprintable()
        if benchmark.has_targets:
            assert benchmark.selection_metric in benchmark.metrics(rankings)
        json.dumps(benchmark.submissions(rankings)).encode()


@pytest.mark.parametrize("name", DATA_SETS)
def test_whole_files_load(worlds, name):
    load(name, worlds[name])


NASTY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["", " ", ".", "..", "../x", "/etc/passwd", "..\\x", "a/../../b", "x\x00y", "\ud800", "nobody", 10**30]
    ),
    st.lists(st.one_of(st.none(), st.text(max_size=3), st.integers()), max_size=3),
    st.dictionaries(st.text(max_size=3), st.one_of(st.none(), st.integers(), st.text(max_size=3)), max_size=3),
)


def damaged(draw: Any, content: Any) -> list[Any]:
    """Change one value inside a JSON content, in place, and return the path to it."""
    way: list[Any] = []
    place = content
    while True:
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        way.append(key)
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or draw(st.integers(0, 3)) == 0:
            break
        place = inner
    action = draw(st.sampled_from(["delete", "replace", "replace", "copy another"]))
    if action == "delete":
        del place[key]
    elif action == "replace":
        place[key] = draw(NASTY)
    else:
        place[key] = place[draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))]
    return way


def check(name: str, root: Path, path: Path, way: list[Any] | None) -> None:
    """Load a damaged world; an error must be one printable sentence with the file and any record in it."""
    message = failure(name, root)
    if message is None:
        return
    assert message.isprintable(), message
    message.encode()
    if "images are missing under" in message:  # this message names the image and its folder
        return
    if way is None or len(way) > 1:
        assert path.name in message, message
    if way is not None and len(way) > 1 and "split" not in path.name:
        assert "record " in message or "line " in message, message


def failure(name: str, root: Path) -> str | None:
    """Return the message of an error for users. Any other error would be a traceback and is raised."""
    try:
        load(name, root)
    except (ValueError, FileNotFoundError) as error:
        if type(error) in (ValueError, FileNotFoundError):
            return str(error)
        raise
    return None


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.json*"))


@pytest.mark.parametrize("name", DATA_SETS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_field_is_named_or_harmless(worlds, name, data):
    root = worlds[name]
    path = data.draw(st.sampled_from(files(root)))
    whole = path.read_bytes()
    is_lines = path.suffix == ".jsonl"
    content = [json.loads(line) for line in whole.splitlines()] if is_lines else json.loads(whole)
    way = damaged(data.draw, content)
    text = "".join(json.dumps(row) + "\n" for row in content) if is_lines else json.dumps(content)
    path.write_text(text)
    try:
        check(name, root, path, way)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", DATA_SETS)
@settings(max_examples=EXAMPLES // 2, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_truncated_or_scribbled_file_is_named_or_harmless(worlds, name, data):
    root = worlds[name]
    path = data.draw(st.sampled_from(files(root)))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    rest = data.draw(st.sampled_from([b"", whole[at + 1 :]]))
    path.write_bytes(whole[:at] + data.draw(st.binary(max_size=4)) + rest)
    try:
        check(name, root, path, [] if rest else None)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_lost_file_is_named(worlds, name):
    for path in files(worlds[name]):
        whole = path.read_bytes()
        path.unlink()
        try:
            with pytest.raises(FileNotFoundError, match=path.name):
                load(name, worlds[name])
        finally:
            path.write_bytes(whole)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG claims to have 30,000 x 30,000 pixels."""
    head = (30_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")


BROKEN = {
    "empty": b"",
    "text": b"404 Not Found",
    "truncated JPEG": encoded("JPEG")[:-200],
    "truncated PNG": encoded("PNG")[:-200],
    "bomb": bomb(),
}


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_named_before_a_run(worlds, name, kind):
    """All images except one are undamaged."""
    root = worlds[name]
    images = sorted(path for path in root.rglob("*") if path.suffix in (".jpg", ".png"))
    for path in images:
        path.write_bytes(encoded("PNG"))
    module = importlib.import_module(f"lavis_cir_plugin.benchmarks.{name}")
    config = {"root": str(root), **CONFIGS[name], "verify_images": True}
    module.read_benchmark(config, "val")
    broken = next(iter(module.read_benchmark(config, "val").image_paths.values()))
    broken.write_bytes(BROKEN[kind])
    with pytest.raises(ValueError, match=rf"1 of [\d,]+ image files cannot be read; .*{broken.name}"):
        module.read_benchmark(config, "val")


def test_a_folder_in_a_file_s_place_is_named(worlds, tmp_path):
    """A file of `triplets` exists but cannot be opened, which the reader notices only when it opens the file."""
    root = tmp_path / "copy"
    shutil.copytree(worlds["triplets"], root)
    (root / "val.jsonl").unlink()
    (root / "val.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"val\.jsonl cannot be read: Is a directory; put a JSON-lines file there"):
        load("triplets", root)


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_home_folder_is_found_and_nobody_s_is_none(worlds, monkeypatch, name):
    monkeypatch.setenv("HOME", str(worlds[name].parent))
    load(name, worlds[name], root=f"~/{worlds[name].name}")
    with pytest.raises(FileNotFoundError, match="~nobody-has-this-name/data"):
        load(name, worlds[name], root="~nobody-has-this-name/data")
