"""Files among a catalogue's images that are not its pictures are left out and counted, and never block."""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import lavis_cir_plugin
from lavis_cir_plugin.benchmarks import images as images_module
from lavis_cir_plugin.benchmarks.annotation_files import read_json
from lavis_cir_plugin.benchmarks.captions import read_captions
from lavis_cir_plugin.benchmarks.images import image_problems, open_rgb, refuse_output_inside, scan_images, scan_tree
from lavis_cir_plugin.benchmarks.json_lines import read_lines
from lavis_cir_plugin.benchmarks.triplets import read_benchmark
from lavis_cir_plugin.commands.check import report, survey
from lavis_cir_plugin.commands.triplets import _check
from lavis_cir_plugin.data.tar_shards import CaptionedShards, ShardsConfig
from lavis_cir_plugin.training import launcher
from lavis_cir_plugin.training.config import ConfigError, check_values, read_config, with_lavis_defaults

FOREIGN = (
    ".ipynb_checkpoints/a-checkpoint.jpg",
    "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg",
    "shoes/@eaDir/b.jpg/SYNOPHOTO_THUMB_M.jpg",
    ".@__thumb/default.jpg",
    "__MACOSX/images/a.jpg",
    "#recycle/old.png",
    "$RECYCLE.BIN/old.png",
    "lost+found/x.bmp",
)
HIDDEN = ("._a.jpg", "shoes/._b.jpg")


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)
    return path


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """Return a catalogue of two pictures and one query."""
    for name in ("a.jpg", "shoes/b.jpg"):
        picture(tmp_path / "shop" / "images" / name)
    line = json.dumps({"reference": "a.jpg", "text": "in red", "target": "shoes/b.jpg"})
    (tmp_path / "shop" / "val.jsonl").write_text(line + "\n")
    (tmp_path / "shop" / "captions.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": "a"}) + "\n")
    return tmp_path / "shop"


def gallery(root: Path) -> tuple[str, ...]:
    (group,) = read_benchmark({"root": str(root), "verify_images": True}, "val").groups
    return group.gallery


@pytest.mark.parametrize("name", [*FOREIGN, *HIDDEN])
def test_foreign_files_are_no_gallery_images(shop: Path, name: str):
    picture(shop / "images" / name)
    assert gallery(shop) == ("a.jpg", "shoes/b.jpg")


def test_what_is_left_out_is_counted_and_named_once(shop: Path, caplog: pytest.LogCaptureFixture):
    for name in (*FOREIGN, *HIDDEN):
        picture(shop / "images" / name)
    (shop / "images" / "@eaDir" / "notes.txt").touch()  # has no suffix of a picture
    images_module._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        gallery(shop)
        gallery(shop)
    (message,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert message.startswith(f"10 left out of {shop / 'images'}: ")
    assert "8 in hidden or system folders (first: " in message
    assert "2 hidden (first: " in message
    assert message.endswith(").")


def test_nothing_is_said_where_nothing_is_left_out(shop: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        assert gallery(shop) == ("a.jpg", "shoes/b.jpg")
    assert not caplog.records


def test_the_check_says_what_is_left_out(shop: Path):
    picture(shop / "images" / "@eaDir" / "a.jpg")
    lines = report("triplets", survey("triplets", shop), shop)
    (line,) = [line for line in lines if "left out" in line]
    assert "1 left out of " in line
    assert "1 in hidden or system folders (first: @eaDir/a.jpg)" in line


def test_a_hidden_place_of_the_whole_catalogue_hides_nothing(tmp_path: Path):
    picture(tmp_path / ".data" / "@eaDir" / "images" / "a.jpg")
    assert list(scan_tree(tmp_path / ".data" / "@eaDir" / "images")) == ["a.jpg"]


def test_hidden_files_of_a_benchmark_are_not_found_either(tmp_path: Path):
    for name in ("A.jpg", "._A.jpg", "@eaDir/B.jpg", ".thumbnails/C.jpg", "dress/D.jpg"):
        picture(tmp_path / name)
    assert list(scan_images([tmp_path])) == ["A", "D"]


# -- a run's own output ----------------------------------------------------------------------------------------------


def test_an_old_run_below_the_images_is_left_out(shop: Path):
    """A folder whose log begins with a run's config is a run. A folder with another log is not."""
    run = shop / "images" / "output" / "20240101-120000-7"
    picture(run / "curves.png")
    picture(run / "val" / "contact_sheet_triplets.png")
    (run / "log.txt").write_text('{\n  "run": {}\n}')
    picture(shop / "images" / "boots" / "c.jpg")
    (shop / "images" / "boots" / "log.txt").write_text("photographed in May\n")
    assert gallery(shop) == ("a.jpg", "boots/c.jpg", "shoes/b.jpg")


@pytest.mark.parametrize("output", ["images", "images/out", "images/shoes/x/y", "link/out"])
def test_an_output_folder_inside_the_images_is_refused(shop: Path, output: str):
    (shop / "link").symlink_to(shop / "images")
    with pytest.raises(ValueError, match=r"run\.output_dir: .* lies inside the image folder .*images"):
        refuse_output_inside(shop / output, shop / "images", "datasets.triplets.build_info")


@pytest.mark.parametrize("output", [".", "images_out", "out", "../out"])
def test_an_output_folder_elsewhere_is_taken(shop: Path, output: str):
    refuse_output_inside(shop / output, shop / "images", "datasets.triplets.build_info")


def resolved(shop: Path, *options: str) -> Any:
    path = lavis_cir_plugin.PROJECTS / "wrf4cir" / "triplets_tiny.yaml"
    return with_lavis_defaults(read_config(str(path), [f"datasets.triplets.build_info.root={shop}", *options]))


def test_a_run_with_such_an_output_folder_does_not_start(shop: Path):
    check_values(resolved(shop, f"run.output_dir={shop / 'out'}"), "train")
    with pytest.raises(ConfigError, match=r"lies inside the image folder .*datasets\.triplets\.build_info"):
        check_values(resolved(shop, f"run.output_dir={shop / 'images' / 'out'}"), "train")
    elsewhere = [f"datasets.triplets.build_info.images={shop}", f"run.output_dir={shop / 'out'}"]
    with pytest.raises(ConfigError, match="lies inside the image folder"):
        check_values(resolved(shop, *elsewhere), "train")
    assert not (shop / "out").exists()


def test_an_output_folder_among_the_images_of_any_data_set_is_refused(tmp_path: Path):
    class Data:
        image_paths = {"A": tmp_path / "images" / "dress" / "A.jpg"}  # noqa: RUF012

    datasets = {"fashioniq": {"train": Data(), "val": object()}}
    launcher._refuse_output_among_images(tmp_path / "images", datasets)
    with pytest.raises(ValueError, match=r"lies inside the image folder .*dress \(of datasets.fashioniq\)"):
        launcher._refuse_output_among_images(tmp_path / "images" / "dress" / "out", datasets)


def test_a_contact_sheet_of_synthetic_triplets_stays_out_of_the_images(shop: Path):
    args = argparse.Namespace(count=1, similarity=None, pretrained=None, clip_model=None, overwrite=False)
    files, images = (shop / "captions.jsonl", shop / "new.jsonl"), shop / "images"
    _check(args, *files, images, shop / "sheet.png")
    with pytest.raises(ValueError, match="lies inside --images"):
        _check(args, *files, images, images / "shoes" / "sheet.png")


# -- links -----------------------------------------------------------------------------------------------------------


def test_links_out_of_the_tree_and_up_it_are_not_followed(shop: Path, caplog: pytest.LogCaptureFixture):
    """Links to files count. A link to a neighbouring folder is followed, a link to a hidden one is not."""
    picture(shop.parent / "elsewhere" / "c.jpg")
    picture(shop / "images" / ".thumbs" / "a.jpg")
    for link, target in {
        "out": shop.parent / "elsewhere",
        "up": shop,
        "shoes/round": shop / "images",
        "self": shop / "images" / "self",
        "thumbs": shop / "images" / ".thumbs",
        "again": shop / "images" / "shoes",
        "c.jpg": shop.parent / "elsewhere" / "c.jpg",
    }.items():
        (shop / "images" / link).symlink_to(target)
    with caplog.at_level(logging.WARNING):
        assert gallery(shop) == ("a.jpg", "again/b.jpg", "c.jpg", "shoes/b.jpg")
    assert "links to folders out of the tree, up it or to what is left out (first: " in caplog.text


def test_the_image_folder_itself_may_be_a_link(shop: Path):
    (shop / "images").rename(shop.parent / "moved")
    (shop / "images").symlink_to(shop.parent / "moved")
    assert gallery(shop) == ("a.jpg", "shoes/b.jpg")


# -- what is no regular file -----------------------------------------------------------------------------------------


def test_a_named_pipe_called_like_a_picture_is_left_out(shop: Path, caplog: pytest.LogCaptureFixture):
    os.mkfifo(shop / "images" / "pipe.jpg")
    with caplog.at_level(logging.WARNING):
        assert gallery(shop) == ("a.jpg", "shoes/b.jpg")
    assert "1 that are no regular files (first: pipe.jpg)" in caplog.text
    assert list(scan_images([shop / "images"])) == ["a", "b"]


def test_no_reader_waits_at_a_named_pipe(tmp_path: Path):
    """Opening each of them would wait for ever until somebody writes."""
    for name in ("x.jpg", "train.jsonl", "val.json", "00000.tar"):
        os.mkfifo(tmp_path / name)
    refused = "is no regular file but a named pipe, socket or device"
    with pytest.raises(ValueError, match=refused):
        open_rgb(tmp_path / "x.jpg")
    assert refused in image_problems([tmp_path / "x.jpg"])[0]
    with pytest.raises(ValueError, match=refused):
        read_lines(tmp_path / "train.jsonl", "")
    with pytest.raises(ValueError, match=refused):
        read_json(tmp_path / "val.json")
    with pytest.raises(ValueError, match=refused):
        CaptionedShards({"root": str(tmp_path)})


def test_hidden_shards_are_left_out(tmp_path: Path):
    for name in ("00000.tar", "._00000.tar"):
        (tmp_path / name).touch()
    assert ShardsConfig(str(tmp_path)).paths() == [tmp_path / "00000.tar"]


def test_captions_that_ask_for_a_hidden_picture_miss_it(shop: Path):
    (shop / "captions.jsonl").write_text(json.dumps({"image": ".thumbs/a.jpg", "caption": "a"}) + "\n")
    picture(shop / "images" / ".thumbs" / "a.jpg")
    with pytest.raises(FileNotFoundError, match="1 of 1 images are missing"):
        read_captions({"root": str(shop)})
