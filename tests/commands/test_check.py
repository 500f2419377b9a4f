"""``lavis-cir check`` reports on whole, incomplete and broken folders, by the readers that a run uses."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import REAL, real_folder
from omegaconf import OmegaConf
from PIL import Image

from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.benchmarks import fashioniq
from lavis_cir_plugin.benchmarks.survey import current_survey
from lavis_cir_plugin.commands import check, main
from lavis_cir_plugin.training import config

CATEGORIES = ("dress", "shirt", "toptee")


def write_fashioniq(root: Path, suffix: str = ".png") -> None:
    """Write 2 triplets per category on images A, B, C; D is in the split files alone."""
    records = [
        {"candidate": "A", "target": "B", "captions": ["is red", "is long"]},
        {"candidate": "B", "target": "C", "captions": ["is blue", "is short"]},
    ]
    (root / "captions").mkdir(parents=True)
    (root / "image_splits").mkdir()
    (root / "images").mkdir()
    for category in CATEGORIES:
        for split in ("train", "val", "test"):
            without = [{key: item[key] for key in item if split != "test" or key != "target"} for item in records]
            (root / "captions" / f"cap.{category}.{split}.json").write_text(json.dumps(without))
            (root / "image_splits" / f"split.{category}.{split}.json").write_text(json.dumps(list("ABCD")))
    for name in "ABCD":
        Image.new("RGB", (4, 4)).save(root / "images" / f"{name}{suffix}")


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[str, int]:
    """Return what the command prints and its exit code."""
    try:
        main.main(["check", *map(str, arguments)])
        code = 0
    except SystemExit as end:
        code = 1 if isinstance(end.code, str) else int(end.code or 0)
    return capsys.readouterr().out, code


def part(output: str, title: str) -> list[str]:
    (found,) = (block.splitlines() for block in output.split("\n\n") if block.startswith(title))
    return [line.strip() for line in found]


def test_a_whole_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_fashioniq(tmp_path / "FashionIQ")
    output, code = run(capsys, tmp_path)
    assert code == 0
    assert part(output, "FashionIQ") == [
        "FashionIQ",
        "files    FashionIQ/captions/ (9 .json), FashionIQ/image_splits/ (9 .json)",
        "train    dress 2 (published: 5,985), shirt 2 (published: 5,988), toptee 2 (published: 6,027) triplets",
        "val      dress 2 (published: 2,017), shirt 2 (published: 2,038), toptee 2 (published: 1,961) queries",
        "test     dress 2 (published: 2,024), shirt 2 (published: 2,038), toptee 2 (published: 2,056) queries",
        "images   4 of 4 that are needed in FashionIQ/images/ (4 .png)",
        "training: yes",
        "val by clip4cir, searle, pic2word, covr, artemis: yes",
        "val by cosmo, val_split: yes",
        "test submission: yes",
    ]
    assert part(output, "CIRR")[0] == "CIRR: nothing found"
    assert "branch cirr_dataset" in part(output, "CIRR")[1]
    assert f"{tmp_path}: " in output
    assert "s, no image opened (--verify)" in output


def test_a_missing_gallery_image_leaves_the_smaller_gallery(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """No query has D: training and the VAL split are whole without it, the original gallery is not."""
    write_fashioniq(tmp_path)
    (tmp_path / "images" / "D.png").unlink()
    output, code = run(capsys, tmp_path)
    lines = part(output, "FashionIQ")
    assert code == 0
    assert "training: yes" in lines
    assert "val by cosmo, val_split: yes" in lines
    assert (
        "val by clip4cir, searle, pic2word, covr, artemis: partly, 6 of 6 queries have their images "
        "(dress 2, shirt 2, toptee 2), the gallery lacks some, needs missing_images: skip"
    ) in lines
    assert "missing images: 1 (first: D)" in lines
    assert any("74,381 distinct images" in line for line in lines)


def test_missing_images_are_counted_as_a_run_would_leave_them_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_fashioniq(tmp_path)
    (tmp_path / "images" / "C.png").unlink()
    lines = part(run(capsys, tmp_path)[0], "FashionIQ")
    assert "training: partly, 3 of 6 triplets have their images (dress 1, shirt 1, toptee 1), " in "".join(lines)
    config = {"root": str(tmp_path), "missing_images": "skip"}
    assert len(fashioniq.read_train(config)[0]) == 3
    assert sum(len(group.queries) for group in fashioniq.read_benchmark(config, "val").groups) == 3
    assert "val by clip4cir, searle, pic2word, covr, artemis: partly, 3 of 6 queries" in "".join(lines)


def test_no_images_at_all_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_fashioniq(tmp_path)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    (tmp_path / "images").rmdir()
    output, code = run(capsys, tmp_path)
    lines = part(output, "FashionIQ")
    assert code == 1
    assert "images   0 of 4 that are needed" in lines
    assert "training: no, 0 of 6 triplets have their images (dress 0, shirt 0, toptee 0)" in lines


def test_missing_and_broken_annotation_files_are_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_fashioniq(tmp_path)
    for category in CATEGORIES:
        (tmp_path / "captions" / f"cap.{category}.test.json").unlink()
    (tmp_path / "captions" / "cap.dress.val.json").unlink()
    (tmp_path / "captions" / "cap.shirt.train.json").write_text('[{"candidate": 3}]')
    lines = part(run(capsys, tmp_path)[0], "FashionIQ")
    assert (
        "test submission: no, cap.dress.test.json is missing; cap.shirt.test.json is missing; cap.toptee.test.json is "
        "missing"
    ) in lines
    assert (
        "val by cosmo, val_split: partly, cap.dress.val.json is missing; yes with categories: [shirt, toptee]" in lines
    )
    (training,) = (line for line in lines if line.startswith("training"))
    assert "cap.shirt.train.json: record 0 (counting from 0) needs 'captions', a list of 2 texts" in training
    missing = "cap.dress.test.json, cap.dress.val.json, cap.shirt.test.json, cap.toptee.test.json"
    assert f"missing files: {missing}" in lines
    assert "val      shirt 2 (published: 2,038), toptee 2 (published: 1,961) queries" in lines


def test_a_submission_needs_every_query(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Without A, one query of each category is left; a server takes no file of it. Without D, all of them are."""
    write_fashioniq(tmp_path)
    (tmp_path / "images" / "D.png").unlink()
    (line,) = (line for line in part(run(capsys, tmp_path)[0], "FashionIQ") if line.startswith("test submission"))
    assert line.endswith("the gallery lacks some, needs missing_images: skip")
    (tmp_path / "images" / "A.png").unlink()
    lines = part(run(capsys, tmp_path)[0], "FashionIQ")
    refusal = "needs missing_images: skip, and a server refuses a file without all queries"
    assert [line.split(":")[0] for line in lines if line.endswith(refusal)] == ["test submission"]


def test_triplets(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Six folders side by side are written as one; a broken line is named."""
    record = {"reference": "a0/x.jpg", "text": "in red", "target": "a5/x.webp"}
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    (tmp_path / "val.jsonl").write_text("{}")
    for number in range(6):
        (tmp_path / "images" / f"a{number}").mkdir(parents=True)
        (tmp_path / "images" / f"a{number}" / f"x.{'webp' if number == 5 else 'jpg'}").touch()
    output, code = run(capsys, tmp_path)
    assert code == 0
    assert part(output, "Triplets of your own") == [
        "Triplets of your own",
        "files    ./ (2 .jsonl)",
        "train    1 triplets",
        "images   2 of 2 that are needed in images/a0/ (1 .jpg), images/a5/ (1 .webp)",
        "training: yes",
        f"val: no, {tmp_path}/val.jsonl, line 1 has no 'reference'; correct the line",
        "test: no, test.jsonl is missing",
        "missing files: test.jsonl",
        "note: give the folder itself that has train.jsonl, val.jsonl or test.jsonl; only those that a run reads are "
        "needed",
    ]


def test_the_current_folder_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    (tmp_path / "train.jsonl").write_text(json.dumps({"reference": "x.jpg", "text": "in red", "target": "y.jpg"}))
    (tmp_path / "images").mkdir()
    for name in ("x.jpg", "y.jpg"):
        (tmp_path / "images" / name).touch()
    monkeypatch.chdir(tmp_path)
    output, code = run(capsys, ".")
    assert code == 0
    assert "files    ./ (1 .jsonl)" in part(output, "Triplets of your own")
    assert "training: yes" in part(output, "Triplets of your own")


def test_circo_before_its_pictures_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """COCO's list unpacks into the folder of the annotations."""
    (tmp_path / "annotations").mkdir()
    record = {"id": 0, "reference_img_id": 1, "target_img_id": 2, "gt_img_ids": [2], "relative_caption": "has two",
              "shared_concept": "a dog"}  # fmt: skip
    (tmp_path / "annotations/val.json").write_text(json.dumps([record]))
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in (1, 2)]
    (tmp_path / "annotations/image_info_unlabeled2017.json").write_text(json.dumps({"images": images}))
    output, _ = run(capsys, tmp_path)
    assert any(line.startswith("images   0 of 2 that are needed") for line in part(output, "CIRCO"))


def test_a_sample_with_one_picture_is_counted_as_incomplete(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number, sides in ((1, ("source", "target")), (2, ("target",))):
        for side in sides:
            Image.new("RGB", (4, 4)).save(tmp_path / f"00000000{number}.{side}_image.jpg")
        (tmp_path / f"00000000{number}.json").write_text(json.dumps({"target_caption": "a dog"}))
    output, code = run(capsys, tmp_path)
    assert code == 0
    lines = part(output, "SynthTriplets18M")
    assert "training: partly, 1 of 2 triplets have their images, needs missing_images: skip" in lines


def test_a_folder_of_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [{"image": "a/x.jpg", "caption": "one"}, {"image": "y.png", "caption": ["two", "2"]}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "x.jpg").touch()
    output, code = run(capsys, tmp_path)
    assert code == 0
    assert part(output, "Pictures with captions") == [
        "Pictures with captions",
        "files    ./ (1 .jsonl)",
        "train    2 captioned pictures",
        "images   1 of 2 that are needed in images/a/ (1 .jpg)",
        "training: partly, 1 of 2 captioned pictures have their images, needs missing_images: skip",
        "missing images: 1 (first: y.png)",
        "note: an image is named by its path below images/ with its suffix, such as shoes/a.jpg",
    ]
    assert output.startswith("Pictures with captions\n"), "what is there comes first"
    # LAVIS's own form of the file
    (tmp_path / "captions.jsonl").rename(tmp_path / "captions.json")
    (tmp_path / "captions.json").write_text(json.dumps(lines))
    assert "train    2 captioned pictures" in part(run(capsys, tmp_path)[0], "Pictures with captions")


def test_exit_codes_are_in_the_help(capsys: pytest.CaptureFixture[str]):
    assert run(capsys, "--help")[1] == 0
    command_line_help = " ".join(check.EXIT_CODES.split())
    with pytest.raises(SystemExit):
        main.main(["check", "--help"])
    assert command_line_help in " ".join(capsys.readouterr().out.split())


def pasted(output: str) -> tuple[str, list[str]]:
    """Return command and options of the last line, split as a shell does, after a check of the config."""
    words = shlex.split(output.splitlines()[-1])
    assert words[:2] == ["python", "-m"]
    assert words[3] == "--cfg-path"
    options = words[6:] if len(words) > 5 else []
    config.read_config(str(PROJECTS.parent / words[4]), options)
    return words[2], options


def test_the_last_line_trains_on_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = tmp_path / "my data"
    write_fashioniq(root)
    assert pasted(run(capsys, root)[0]) == ("lavis.train", [f"datasets.fashioniq.build_info.root={root}"])
    (root / "images" / "A.png").unlink()
    (root / "captions" / "cap.dress.val.json").unlink()
    command, options = pasted(run(capsys, root)[0])
    assert command == "lavis.train"
    assert options[1:] == [
        "datasets.fashioniq.build_info.categories=[shirt,toptee]",
        "datasets.fashioniq.build_info.missing_images=skip",
    ]
    for category in CATEGORIES:
        (root / "captions" / f"cap.{category}.train.json").unlink()
    command, options = pasted(run(capsys, root)[0])
    assert command == "lavis.evaluate"
    assert options[3:] == ["datasets.cirr.splits=[]", "datasets.circo.splits=[]"]
    (root / "images" / "B.png").write_bytes(b"")
    output, code = run(capsys, root, "--verify")
    assert (output.splitlines()[-1], code) == (f"lavis-cir check '{root}' --verify", 1)
    shutil.rmtree(root / "captions")
    assert pasted(run(capsys, root)[0]) == ("lavis.train", [])


def test_the_last_line_names_a_folder_that_yaml_would_read_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """YAML takes what follows ' #' for a comment, so that another folder would be trained on."""
    root = tmp_path / "data #2"
    write_fashioniq(root)
    _, (root_option,) = pasted(run(capsys, root)[0])
    read = OmegaConf.from_dotlist([root_option])
    assert read.datasets.fashioniq.build_info.root == str(root)


def test_every_data_set_has_a_command(tmp_path: Path):
    """The command trains on a data set if it can; CIRCO has no training split, so it is evaluated."""
    complete = check.Reading(count=1, usable=1, is_complete=True)
    for name in check.data_sets():
        data_set = check.checklist_of(name)
        readings = {(way.label, key): complete for way in data_set.usages for key in data_set.parts}
        lines = check.next_step({name: check.Findings(readings=readings)}, tmp_path)
        command, options = pasted("\n".join(lines))
        assert command == ("lavis.evaluate" if name == "circo" else "lavis.train")
        assert f"datasets.{name}.build_info.root={tmp_path}" in options
        assert data_set.title in lines[0]


def test_many_folders_are_written_as_one(tmp_path: Path):
    paths = [tmp_path / "train" / str(number) / f"x.{suffix}" for number in range(9) for suffix in ("png", "jpg")]
    assert check._folders([*paths, tmp_path / "dev" / "y.png"], tmp_path) == "train/*/ (9 .png, 9 .jpg), dev/ (1 .png)"
    apart = [tmp_path / f"{number}" / "below" / "x.png" for number in range(6)]
    assert check._folders(apart, tmp_path).endswith("3/below/ (1 .png) and 2 more folders")


def test_verification_names_broken_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_fashioniq(tmp_path, ".jpg")
    output, code = run(capsys, tmp_path, "--verify")
    assert "verified: 4 of 4 images can be read" in output
    assert code == 0
    (tmp_path / "images" / "B.jpg").write_bytes(b"")
    output, code = run(capsys, tmp_path, "--verify")
    assert "verified: 3 of 4 images can be read" in output
    assert f"{tmp_path}/images/B.jpg cannot be read as an image: the file is empty." in output
    assert code == 1


def test_a_folder_with_nothing_and_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output, code = run(capsys, tmp_path)
    assert code == 1
    assert output.count("nothing found") == len(check.data_sets()) == 8
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit, match=r"nowhere is no folder; give the folder of a data set"):
        main.main(["check", str(tmp_path / "nowhere")])


def test_every_benchmark_is_checked():
    """Every module with a reader, every split with files of its own, and each of FashionIQ's protocols occur once."""
    folder = Path(fashioniq.__file__).parent
    readers = {
        path.stem
        for path in folder.glob("*.py")
        if any(f"\ndef {name}(" in path.read_text() for name in ("read_train", "read_captions"))
    }
    assert {module.__name__.rpartition(".")[2] for module in check.data_sets().values()} == readers
    for name, module in check.data_sets().items():
        splits = {way.split for way in check.checklist_of(name).usages}
        assert splits == set(module.SPLITS) - {"seen"}
    labels = " ".join(way.label for way in check.checklist_of("fashioniq").usages)
    assert all(protocol in labels for protocol in fashioniq.PROTOCOLS)


def test_a_survey_ends(tmp_path: Path):
    """After a survey, missing images are errors again."""
    write_fashioniq(tmp_path)
    (tmp_path / "images" / "C.png").unlink()
    check.survey("fashioniq", tmp_path)
    assert current_survey() is None
    with pytest.raises(FileNotFoundError, match="1 of 4 images are missing"):
        fashioniq.read_benchmark({"root": str(tmp_path)}, "val")


def test_the_real_annotation_files(capsys: pytest.CaptureFixture[str]):
    """The counts are the published ones, hence none is remarked on; there are no images."""
    real_folder("fashionIQ_dataset")
    output, code = run(capsys, REAL)
    assert code == 1
    assert "published:" not in output
    assert "train    dress 5,985, shirt 5,988, toptee 6,027 triplets" in output
    assert "test     dress 2,024, shirt 2,038, toptee 2,056 queries" in output
    assert "images   0 of 54,885 that are needed" in output
    assert "val      4,181 queries" in output
    assert "test     4,148 queries" in output
