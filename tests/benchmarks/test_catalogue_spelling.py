"""Names spelt differently from their files, files in another layout, and messages with the names in use."""

from __future__ import annotations

import json
import logging
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_cir_plugin.benchmarks import images
from lavis_cir_plugin.benchmarks.captions import caption_records, read_captions
from lavis_cir_plugin.benchmarks.images import Spelling
from lavis_cir_plugin.benchmarks.triplets import read_benchmark, read_train
from lavis_cir_plugin.commands.check import survey
from lavis_cir_plugin.ranking.scoring import longest_feature

NFC = "caf\u00e9.jpg"
NFD = "cafe\u0301.jpg"


def catalogue(root: Path, files: list[str], *records: dict[str, Any]) -> dict[str, Any]:
    for name in files:
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / name).touch()
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    for split in ("train", "val"):
        (root / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return {"root": str(root)}


def triplet(reference: str, target: Any, **more: Any) -> dict[str, Any]:
    return {"reference": reference, "text": "in red", "target": target, **more}


@pytest.mark.parametrize(("written", "file"), [(NFC, NFD), (NFD, NFC), ("a/b.jpg", "a/b.JPG"), ("B.Png", "B.pNG")])
def test_another_unicode_form_or_case_of_the_suffix_is_the_same_picture(tmp_path: Path, written: str, file: str):
    """The gallery has it once, under the file's name, and not a second time as missing."""
    config = catalogue(tmp_path, [file, "z.jpg"], triplet(written, "z.jpg"), triplet("z.jpg", written))
    triplets, paths = read_train(config)
    assert [(found.reference, found.target) for found in triplets] == [(file, "z.jpg"), ("z.jpg", file)]
    assert paths == {name: tmp_path / "images" / name for name in (file, "z.jpg")}
    (group,) = read_benchmark(config, "val").groups
    assert sorted(group.gallery) == sorted([file, "z.jpg"])
    assert [query.target for query in group.queries] == ["z.jpg", file]


def test_captions_find_them_too(tmp_path: Path):
    catalogue(tmp_path, [NFD])
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": NFC, "caption": "a cup"}) + "\n")
    (example,), paths = read_captions({"root": str(tmp_path)})
    assert example.image == NFD
    assert paths == {NFD: tmp_path / "images" / NFD}


def test_members_targets_and_the_gallery_file_are_spelt_as_the_files(tmp_path: Path):
    record = triplet("z.jpg", [NFC], members=[NFC, NFD, "b.jpg", "z.JPG"])
    config = catalogue(tmp_path, [NFD, "b.JPG", "z.jpg"], record)
    (tmp_path / "gallery.txt").write_text(f"b.jpg\n{NFC}\n", encoding="utf-8")
    (group,) = read_benchmark(config, "val").groups
    assert group.gallery == ("b.JPG", NFD)
    assert group.queries[0].members == (NFD, "b.JPG")


def test_a_gallery_line_in_two_spellings_is_one_image_twice(tmp_path: Path):
    config = catalogue(tmp_path, [NFD, "z.jpg"], triplet("z.jpg", NFC))
    (tmp_path / "gallery.txt").write_text(f"{NFC}\nz.jpg\n{NFD}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 3 lists .* like line 1"):
        read_benchmark(config, "val")


def test_a_reference_in_another_spelling_is_no_target(tmp_path: Path):
    config = catalogue(tmp_path, [NFD, "z.jpg"], triplet("z.jpg", NFC), triplet(NFC, NFD))
    with pytest.raises(ValueError, match=r"line 2 has the reference .* as a target in another spelling"):
        read_train(config)


def test_an_exact_name_means_its_file_and_an_ambiguous_one_none():
    both = {name: Path(name) for name in (NFC, NFD, "a.jpg", "a.JPG")}
    spelling = Spelling(both, "triplets")
    assert [spelling.file_name(name) for name in both] == list(both)
    assert spelling.file_name("a.Jpg") == "a.Jpg"
    assert spelling.file_name("A.jpg") == "A.jpg"  # the case of the stem distinguishes pictures


def test_it_is_said_how_many_names_were_matched(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = catalogue(tmp_path, [NFD, "b.JPG", "z.jpg"], triplet("z.jpg", NFC), triplet("z.jpg", ["b.jpg", NFC]))
    images._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        read_train(config)
    assert "triplets: 2 names mean files that are spelt in another Unicode form" in caplog.text
    assert r"(first: 'caf\xe9.jpg' is 'cafe\u0301.jpg')" in caplog.text


@pytest.mark.parametrize(
    ("file", "written"), [("A.jpg", "a.jpg"), ("a.png", "a.jpg"), ("shoes/a.jpg", "a.jpg"), ("a.jpg", "x/A.webp")]
)
def test_a_missing_name_is_named_with_what_is_near(tmp_path: Path, file: str, written: str):
    config = catalogue(tmp_path, [file, "z.jpg"], triplet("z.jpg", written))
    with pytest.raises(
        FileNotFoundError, match=rf"1 of 2 images are missing .*first: {written}; {written} may be {file}\)"
    ):
        read_train(config)


def test_nothing_is_near_where_nothing_is(tmp_path: Path):
    config = catalogue(tmp_path, ["z.jpg"], triplet("z.jpg", "a.jpg"))
    with pytest.raises(FileNotFoundError, match=r"\(first: a\.jpg\)"):
        read_train(config)


def test_the_check_finds_other_spellings(tmp_path: Path):
    catalogue(tmp_path, [NFD, "z.jpg"], triplet("z.jpg", NFC))
    assert not survey("triplets", tmp_path).missing


# -- the layout of JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{"indent": 1}, {}, {"indent": 0}])
def test_a_json_array_in_a_jsonl_is_called_so(tmp_path: Path, layout: dict[str, Any]):
    config = catalogue(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "train.jsonl").write_text(json.dumps([triplet("a.jpg", "b.jpg")], **layout))
    with pytest.raises(ValueError, match=r"train\.jsonl is one JSON array; it must hold one object per line"):
        read_train(config)
    (tmp_path / "captions.jsonl").write_text(json.dumps([{"image": "a.jpg", "caption": "x"}], **layout))
    with pytest.raises(ValueError, match=r"captions\.jsonl is one JSON array; .* or be called by a name .* \.json\."):
        read_captions(config)


def test_an_array_as_the_issue_has_it(tmp_path: Path):
    config = catalogue(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "train.jsonl").write_text(f"[\n{json.dumps(triplet('a.jpg', 'b.jpg'))}\n]\n")
    with pytest.raises(ValueError, match="is one JSON array"):
        read_train(config)


def test_objects_over_several_lines_and_commas_between_lines_are_called_so(tmp_path: Path):
    config = catalogue(tmp_path, ["a.jpg", "b.jpg"])
    record = triplet("a.jpg", "b.jpg")
    (tmp_path / "train.jsonl").write_text(json.dumps(record, indent=1))
    with pytest.raises(ValueError, match="spreads an object over several lines"):
        read_train(config)
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(record)},\n{json.dumps(record)}\n")
    with pytest.raises(ValueError, match=r"line 1 is not valid JSON: .* \(no comma belongs at its end\)"):
        read_train(config)


def test_json_lines_in_a_json_file_are_called_so(tmp_path: Path):
    path = tmp_path / "captions.json"
    line = json.dumps({"image": "a.jpg", "caption": "x"})
    path.write_text(f"{line}\n{line}\n")
    with pytest.raises(ValueError, match=r"captions\.json holds JSON lines and no list; .* ends in \.jsonl"):
        list(caption_records(path))
    path.write_text(f"[{line}] x")
    with pytest.raises(ValueError, match=r"captions\.json is not valid JSON: Extra data at line 1"):
        list(caption_records(path))


# -- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["garments_vqa", "garments_caption"])
def test_a_drawn_world_s_message_names_the_section_in_use(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    builder = object.__new__(registry.get_builder_class(name))
    builder.config = OmegaConf.create({"garments": {"train_images": 1, "val_images": 1}})
    with pytest.raises(ValueError, match=rf"raise datasets\.{name}\.garments\.train_images"):
        builder.build()


@pytest.mark.parametrize("name", ["garments_vqa", "garments_caption", "fashioniq", "cirr", "circo"])
def test_a_wrong_setting_of_a_drawn_world_names_its_section(name: str):
    section = OmegaConf.create({"garments": {"seed": "x"}})
    problems = list(registry.get_builder_class(name).section_problems(name, section))
    assert [problem for problem in problems if problem.startswith(f"datasets.{name}.garments.seed must be")]


def test_features_that_are_not_finite_send_nobody_to_a_checkpoint_that_is_not_there():
    with pytest.raises(ValueError, match="not finite") as error:
        longest_feature(torch.full((1, 2), float("nan")))
    assert "earlier" not in str(error.value)
    assert "run.amp: false" in str(error.value)


def test_names_in_both_forms_differ():
    """The tests above rely on these two forms being different."""
    assert NFC != NFD == unicodedata.normalize("NFD", NFC)
