"""``lavis-cir submission`` refuses what a server refuses, accepts the official examples, and scores files of val."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lavis_cir_plugin.commands import main
from lavis_cir_plugin.commands.submission import check

IMAGES = [f"img{number}" for number in range(60)]
IDS = list(range(1000, 1060))


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")))
    return path


# -- CIRR ------------------------------------------------------------------------------------------------------------


def cirr_files(root: Path, with_targets: bool = False) -> Path:
    """Write three queries: the references are images 0, 1, 2, the sets images 0 to 5, the targets 1, 2, 3."""
    records: list[dict[str, Any]] = [
        {"pairid": 7 * q, "reference": IMAGES[q], "caption": "is red", "img_set": {"id": 0, "members": IMAGES[:6]}}
        for q in range(3)
    ]
    if with_targets:
        for q, record in enumerate(records):
            record.update(target_hard=IMAGES[q + 1], target_soft={IMAGES[q + 1]: 1.0})
    name = "val" if with_targets else "test1"
    write(root / "image_splits" / f"split.rc2.{name}.json", {image: f"./dev/{image}.png" for image in IMAGES})
    return write(root / "captions" / f"cap.rc2.{name}.json", records)


def cirr_content(metric: str) -> dict[str, Any]:
    """Return rankings of the gallery and of each set, in the order of the images and without the reference."""
    count, pool = (50, IMAGES) if metric == "recall" else (3, IMAGES[:6])
    rows = {str(7 * q): [image for image in pool if image != IMAGES[q]][:count] for q in range(3)}
    return {"version": "rc2", "metric": metric, **rows}


@pytest.mark.parametrize("metric", ["recall", "recall_subset"])
def test_a_right_cirr_file_has_no_problem(tmp_path: Path, metric: str):
    review = check(write(tmp_path / "file.json", cirr_content(metric)), cirr_files(tmp_path))
    assert (review.problems, review.notes, review.metrics) == ({}, [], {})
    assert list(review.rows) == ["0", "7", "14"]


def drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.pop(key)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update({key: value})


NO_REFERENCE = IMAGES[2:]  # of query 7, whose reference is image 1


@pytest.mark.parametrize(
    ("metric", "harm", "problems"),
    [
        ("recall", drop("version"), {"wrong 'version', which must be 'rc2'": ["null"]}),
        ("recall", put("version", 2), {"wrong 'version', which must be 'rc2'": ["2"]}),
        (
            "recall",
            put("metric", ["recall"]),
            {"wrong 'metric', which must be 'recall' or 'recall_subset'": ['["recall"]']},
        ),
        ("recall", drop("7"), {"queries missing": ["7"]}),
        ("recall", put("8", NO_REFERENCE[:50]), {"unknown queries": ['"8"']}),
        ("recall", put("7", "img2"), {"queries with a value that is no image's name": ['7 has "img2"']}),
        ("recall", put("7", [5, *NO_REFERENCE[:49]]), {"queries with a value that is no image's name": ["7 has 5"]}),
        ("recall", put("7", NO_REFERENCE[:49]), {"queries without exactly 50 images": ["7 has 49"]}),
        ("recall", put("7", NO_REFERENCE[:51]), {"queries without exactly 50 images": ["7 has 51"]}),
        ("recall", put("7", []), {"queries without exactly 50 images": ["7 has 0"]}),
        ("recall", put("7", [*NO_REFERENCE[:49], "img2"]), {"queries with an image twice": ['7 has "img2"']}),
        ("recall", put("7", [*NO_REFERENCE[:49], "img1"]), {"queries with their own reference": ["7"]}),
        (
            "recall",
            put("7", [*NO_REFERENCE[:49], "img2.png"]),
            {"queries with an image that is not in the gallery": ['7 has "img2.png"']},
        ),
        ("recall_subset", put("7", ["img2", "img3"]), {"queries without exactly 3 images": ["7 has 2"]}),
        ("recall_subset", put("7", ["img2", "img3", "img1"]), {"queries with their own reference": ["7"]}),
        (
            "recall_subset",
            put("7", ["img2", "img3", "img6"]),
            {"queries with an image that is not in their set": ['7 has "img6"']},
        ),
        ("recall_subset", put("7", ["img2", "img3", "img3"]), {"queries with an image twice": ['7 has "img3"']}),
    ],
)
def test_what_is_refused_of_cirr(
    tmp_path: Path, metric: str, harm: Callable[[dict[str, Any]], None], problems: dict[str, list[str]]
):
    content = cirr_content(metric)
    harm(content)
    assert check(write(tmp_path / "file.json", content), cirr_files(tmp_path)).problems == problems


def test_a_cirr_file_of_5_mb_is_refused(tmp_path: Path):
    path = write(tmp_path / "file.json", cirr_content("recall"))
    path.write_text(path.read_text() + " " * (4_999_999 - path.stat().st_size))
    assert check(path, cirr_files(tmp_path)).problems == {}
    path.write_text(path.read_text() + " ")
    (kind, offenders) = check(path, cirr_files(tmp_path)).problems.popitem()
    assert kind.startswith("file of 5,000,000 bytes or more")
    assert offenders == ["5,000,000"]


def test_metrics_of_cirr_files_of_val(tmp_path: Path):
    """Targets 1, 2, 3 stand behind 0, 1 and 2 images (the reference is none): ranks 0, 1, 2 in both files."""
    annotation = cirr_files(tmp_path, with_targets=True)
    recall = check(write(tmp_path / "a.json", cirr_content("recall")), annotation)
    assert recall.metrics == pytest.approx({"R@1": 100 / 3, "R@5": 100, "R@10": 100, "R@50": 100})
    subset = check(write(tmp_path / "b.json", cirr_content("recall_subset")), annotation)
    assert subset.metrics == pytest.approx({"R_subset@1": 100 / 3, "R_subset@2": 200 / 3, "R_subset@3": 100})
    wrong = cirr_content("recall")
    del wrong["7"]
    assert check(write(tmp_path / "c.json", wrong), annotation).metrics == {}


# -- CIRCO -----------------------------------------------------------------------------------------------------------


def circo_files(root: Path, with_targets: bool = False) -> Path:
    """Write two queries; the references are 1000 and 1001, the ground truths 1002 and 1004, and 1059."""
    records: list[dict[str, Any]] = [
        {"id": q, "reference_img_id": IDS[q], "relative_caption": "is red", "shared_concept": "a car"} for q in range(2)
    ]
    if with_targets:
        records[0].update(target_img_id=1004, gt_img_ids=[1004, 1002], semantic_aspects=["negation"])
        records[1].update(target_img_id=1059, gt_img_ids=[1059], semantic_aspects=[])
    images = [{"id": image, "file_name": f"{image:012d}.jpg"} for image in IDS]
    folder = root / "COCO2017_unlabeled" / "annotations"
    write(folder / "image_info_unlabeled2017.json", {"images": images})
    return write(root / "annotations" / f"{'val' if with_targets else 'test'}.json", records)


def circo_content() -> dict[str, Any]:
    return {str(q): IDS[2:52] for q in range(2)}


def test_a_right_circo_file_holds_numbers_or_their_digits(tmp_path: Path):
    annotation = circo_files(tmp_path)
    content = circo_content()
    content["1"] = [f"{image:012d}" if image % 2 else str(image) for image in content["1"]]
    review = check(write(tmp_path / "file.json", content), annotation)
    assert (review.problems, review.notes) == ({}, [])
    assert review.rows["1"] == IDS[2:52]


@pytest.mark.parametrize(
    ("harm", "problems"),
    [
        (drop("1"), {"queries missing": ["1"]}),
        (put("2", IDS[2:52]), {"unknown queries": ['"2"']}),
        (put("version", "rc2"), {"unknown queries": ['"version"']}),
        (put("1", IDS[2:51]), {"queries without exactly 50 images": ["1 has 49"]}),
        (put("1", IDS[2:53]), {"queries without exactly 50 images": ["1 has 51"]}),
        (put("1", [*IDS[2:51], 1002]), {"queries with an image twice": ["1 has 1002"]}),
        (put("1", [*IDS[2:51], "1002"]), {"queries with an image twice": ["1 has 1002"]}),
        (put("1", [*IDS[2:51], 5]), {"queries with an image that is not in the gallery": ["1 has 5"]}),
        (put("1", [*IDS[2:51], 1051.0]), {"queries with a value that is no image's name": ["1 has 1051.0"]}),
        (put("1", [*IDS[2:51], True]), {"queries with a value that is no image's name": ["1 has true"]}),
        (put("1", [*IDS[2:51], "1051.jpg"]), {"queries with a value that is no image's name": ['1 has "1051.jpg"']}),
        (put("1", [*IDS[2:51], "²"]), {"queries with a value that is no image's name": ['1 has "²"']}),
        (put("1", None), {"queries with a value that is no image's name": ["1 has null"]}),
    ],
)
def test_what_is_refused_of_circo(
    tmp_path: Path, harm: Callable[[dict[str, Any]], None], problems: dict[str, list[str]]
):
    content = circo_content()
    harm(content)
    assert check(write(tmp_path / "file.json", content), circo_files(tmp_path)).problems == problems


def test_the_reference_in_a_circo_file_is_noted(tmp_path: Path):
    content = {"0": IDS[2:52], "1": [*IDS[1:51]]}
    review = check(write(tmp_path / "file.json", content), circo_files(tmp_path))
    assert review.problems == {}
    assert review.notes == ["queries with their own reference, which is never right: 1 (first: 1)"]


def test_metrics_of_a_circo_file_of_val(tmp_path: Path):
    """Query 0: 1002 at rank 0, 1004 at 2: AP = (1 + 2/3) / 2 = 5/6 at every K. Query 1: not listed, 0."""
    review = check(write(tmp_path / "file.json", circo_content()), circo_files(tmp_path, with_targets=True))
    cutoffs = (5, 10, 25, 50)
    expected = {f"mAP@{k}": 500 / 12 for k in cutoffs}
    expected.update({f"Recall@{k}": 50.0 for k in cutoffs}, **{"mAP@10_negation": 500 / 6})
    assert review.metrics == pytest.approx(expected)


# -- FashionIQ -------------------------------------------------------------------------------------------------------


def fashioniq_files(root: Path, with_targets: bool = False) -> Path:
    """Write two records of a category; the candidates are images 0 and 1, the targets images 20 and 4."""
    records: list[dict[str, Any]] = [{"candidate": IMAGES[q], "captions": ["is red", f"is {q}"]} for q in range(2)]
    if with_targets:
        records[0]["target"], records[1]["target"] = IMAGES[20], IMAGES[4]
    name = "val" if with_targets else "test"
    write(root / "image_splits" / f"split.dress.{name}.json", IMAGES)
    return write(root / "captions" / f"cap.dress.{name}.json", records)


def fashioniq_content(annotation: Path) -> list[dict[str, Any]]:
    """Add the first 50 images to every record; the candidate may be among them."""
    return [{**record, "ranking": IMAGES[:50]} for record in json.loads(annotation.read_text())]


def test_a_right_fashioniq_file_and_its_score(tmp_path: Path):
    """Targets at ranks 20 and 4: R@10 is 50 %, R@50 100 %."""
    for with_targets, metrics in ((False, {}), (True, {"R@10": 50.0, "R@50": 100.0})):
        annotation = fashioniq_files(tmp_path, with_targets)
        review = check(write(tmp_path / "dress.pred.json", fashioniq_content(annotation)), annotation)
        assert (review.problems, review.notes, review.metrics) == ({}, [], metrics)


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({"ranking": IMAGES[:49]}, ["queries without exactly 50 images"]),
        ({"ranking": [*IMAGES[:49], "img0"]}, ["queries with an image twice"]),
        ({"ranking": [*IMAGES[:49], "stranger"]}, ["queries with an image that is not in the gallery"]),
        ({"ranking": None}, ["queries with a value that is no image's name"]),
        ({"ranking": [5] * 50}, ["queries with a value that is no image's name"]),
        ({"candidate": "img3"}, ["records with another candidate or other captions than the annotation's"]),
        ({"captions": ["is 1", "is red"]}, ["records with another candidate or other captions than the annotation's"]),
    ],
)
def test_what_is_refused_of_fashioniq(tmp_path: Path, fields: dict[str, Any], kinds: list[str]):
    annotation = fashioniq_files(tmp_path)
    content = fashioniq_content(annotation)
    content[1].update(fields)
    problems = check(write(tmp_path / "dress.pred.json", content), annotation).problems
    assert list(problems) == kinds
    assert all(offender.split()[0] == "1" for offender in problems[kinds[0]])


def test_fashioniq_records_missing_or_too_many(tmp_path: Path):
    annotation = fashioniq_files(tmp_path)
    content = fashioniq_content(annotation)
    assert check(write(tmp_path / "a.json", content[:1]), annotation).problems == {"queries missing": ["1"]}
    assert check(write(tmp_path / "b.json", [*content, content[0]]), annotation).problems == {
        "unknown queries": ['"2"']
    }


# -- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [cirr_files, circo_files])
@pytest.mark.parametrize("content", [[], None, 5, "a", [{}]])
def test_a_file_that_is_no_object(tmp_path: Path, files: Callable[[Path], Path], content: Any):
    review = check(write(tmp_path / "file.json", content), files(tmp_path))
    assert review.problems == {"file that is no object": [json.dumps(content)]}


def test_without_a_gallery_names_are_not_checked_and_a_note_says_so(tmp_path: Path):
    cirr, circo = cirr_files(tmp_path), circo_files(tmp_path)
    split = tmp_path / "image_splits" / "split.rc2.test1.json"
    split = split.rename(tmp_path / "moved.json")
    listing = tmp_path / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json"
    listing = listing.rename(tmp_path / "also_moved.json")
    strange = {**cirr_content("recall"), "7": [*NO_REFERENCE[:49], "stranger"]}
    for path, annotation, gallery in (
        (write(tmp_path / "a.json", strange), cirr, split),
        (write(tmp_path / "b.json", {**circo_content(), "1": [*IDS[2:51], 5]}), circo, listing),
    ):
        review = check(path, annotation)
        assert review.problems == {}
        (unchecked,) = review.unchecked
        assert unchecked.startswith("the images' names, because ")
        assert unchecked.endswith(" is not beside the annotation: give it by --gallery")
        assert f"not checked: {unchecked}" in str(review)
        review = check(path, annotation, gallery)
        assert list(review.problems) == ["queries with an image that is not in the gallery"]
        assert review.notes == review.unchecked == []
        assert f"the images' names (by the 60 of {gallery})" in review.checked


@pytest.mark.parametrize(
    "records", [[{"a": 1}], [{"pairid": 1, "reference": "a", "caption_extend": {}}], [{"name": "x", "caption": "y"}]]
)
def test_an_annotation_of_no_benchmark_is_refused(tmp_path: Path, records: Any):
    file, annotation = write(tmp_path / "file.json", {}), write(tmp_path / "annotation.json", records)
    with pytest.raises(ValueError, match=r"annotation.json is no annotation file .*circo: reference_img_id.*cirr: "):
        check(file, annotation)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(IMAGES[:4]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["version", "metric", "0", "7", "14", "1"]) | st.text(max_size=3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(keys, json_values | st.sampled_from(["rc2", "recall", "recall_subset"])) | json_values)
def test_whatever_a_file_holds_is_refused_and_printed(tmp_path: Path, content: Any):
    for files in (cirr_files, circo_files, fashioniq_files):
        review = check(write(tmp_path / "file.json", content), files(tmp_path))
        assert review.problems
        assert "refused: " in str(review)


# -- the command -----------------------------------------------------------------------------------------------------


def checked_by(annotation: Path) -> str:
    split = annotation.parent / "../image_splits" / annotation.name.replace("cap.", "split.")
    return (
        "checked: queries missing or unknown, version, metric, the file's size, queries with their own reference, "
        f"exactly 50 images for each query, images twice, the images' names (by the 60 of {split})"
    )


def test_the_command_says_what_was_not_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, annotation = write(tmp_path / "file.json", circo_content()), circo_files(tmp_path)
    (tmp_path / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json").unlink()
    main.main(["submission", str(path), "--annotations", str(annotation)])
    assert capsys.readouterr().out.splitlines() == [
        "CIRCO, 2 queries of test.json",
        "checked: queries missing or unknown, exactly 50 images for each query, images twice",
        "not checked: the images' names, because image_info_unlabeled2017.json is not beside the annotation: give it "
        "by --gallery",
        f"ok as far as it was checked: {path}, {path.stat().st_size:,} bytes, 2 queries with 50 images each",
    ]


@pytest.mark.parametrize("wrong", [-5, -1051, 10**12, "-1051", "1" * 13])
def test_numbers_that_cannot_be_cocos_are_refused_without_the_list(tmp_path: Path, wrong: Any):
    annotation = circo_files(tmp_path)
    (tmp_path / "COCO2017_unlabeled" / "annotations" / "image_info_unlabeled2017.json").unlink()
    content = {**circo_content(), "1": [*IDS[2:51], wrong]}
    problems = check(write(tmp_path / "file.json", content), annotation).problems
    assert problems == {"queries with a value that is no image's name": [f"1 has {json.dumps(wrong)}"]}


def test_linked_annotations_find_the_list_beside_the_link_or_its_target(tmp_path: Path):
    """The parent (..) of a linked folder is the parent of the folder that the link points to."""
    annotation = circo_files(tmp_path / "data")
    content = write(tmp_path / "file.json", {**circo_content(), "1": [*IDS[2:51], 5]})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "annotations").symlink_to(annotation.parent)
    (tmp_path / "test.json").symlink_to(annotation)
    for place in (tmp_path / "mine" / "annotations" / "test.json", tmp_path / "test.json"):
        assert list(check(content, place).problems) == ["queries with an image that is not in the gallery"]
    (tmp_path / "data" / "COCO2017_unlabeled").rename(tmp_path / "mine" / "COCO2017_unlabeled")
    for place in (tmp_path / "mine" / "annotations" / "test.json",):
        assert list(check(content, place).problems) == ["queries with an image that is not in the gallery"]
    assert check(content, annotation).unchecked


def test_the_command_says_ok(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, annotation = write(tmp_path / "file.json", cirr_content("recall")), cirr_files(tmp_path, with_targets=True)
    main.main(["submission", str(path), "--annotations", str(annotation)])
    assert capsys.readouterr().out.splitlines() == [
        'CIRR, 3 queries of cap.rc2.val.json, metric "recall"',
        checked_by(annotation),
        "R@1: 33.33",
        "R@5: 100.00",
        "R@10: 100.00",
        "R@50: 100.00",
        f"ok: {path}, {path.stat().st_size:,} bytes, 3 queries with 50 images each",
    ]


def test_the_command_names_every_problem_and_ends_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    content = {**cirr_content("recall"), "8": [], "7": NO_REFERENCE[:49], "14": ["a", "a"]}
    path, annotation = write(tmp_path / "file.json", content), cirr_files(tmp_path)
    with pytest.raises(SystemExit) as error:
        main.main(["submission", str(path), "--annotations", str(annotation)])
    assert error.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        'CIRR, 3 queries of cap.rc2.test1.json, metric "recall"',
        checked_by(annotation),
        'refused: unknown queries: 1 (first: "8")',
        "refused: queries without exactly 50 images: 2 (first: 7 has 49, 14 has 2)",
        'refused: queries with an image twice: 1 (first: 14 has "a")',
        'refused: queries with an image that is not in the gallery: 1 (first: 14 has "a")',
        f"refused: {path}, {path.stat().st_size:,} bytes",
    ]


def test_the_command_on_a_file_that_cannot_be_read(tmp_path: Path):
    annotation = cirr_files(tmp_path)
    (tmp_path / "file.json").write_text('{"version": "rc2", "7": [')
    for name, message in (("file.json", "is not valid JSON"), ("nothing.json", "does not exist")):
        with pytest.raises(SystemExit) as error:
            main.main(["submission", str(tmp_path / name), "--annotations", str(annotation)])
        assert f"lavis-cir: {tmp_path / name} {message}" in str(error.value.code)


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_fashioniq_file_made_of_the_real_annotation(real_annotations: Path, tmp_path: Path, split: str):
    """Every query gets the split's first 50 images: recall is the share of targets among them."""
    root = real_annotations / "fashionIQ_dataset"
    annotation = root / "captions" / f"cap.dress.{split}.json"
    images = json.loads((root / "image_splits" / f"split.dress.{split}.json").read_text())
    records = json.loads(annotation.read_text())
    content = [{**record, "ranking": images[:50]} for record in records]
    review = check(write(tmp_path / f"dress.{split}.pred.json", content), annotation)
    assert review.problems == {}
    if split == "val":
        found = [record["target"] in images[:50] for record in records]
        assert review.metrics["R@50"] == pytest.approx(100 * sum(found) / 2017)
    assert len(review.rows) == (2017 if split == "val" else 2024)


# -- the official example files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["recall", "recall_subset"])
def test_the_official_cirr_examples_are_right(real_annotations: Path, metric: str):
    root = real_annotations / "cirr_dataset" / "cirr"
    path, annotation = root / "demo_files" / f"test1_pred_ranks_{metric}.json", root / "captions" / "cap.rc2.test1.json"
    review = check(path, annotation)
    assert (review.problems, review.notes, len(review.rows)) == ({}, [], 4_148)


def test_the_official_cirr_example_with_line_breaks_is_too_large(real_annotations: Path, tmp_path: Path):
    """With ``indent=2`` it has 5,046,907 bytes."""
    root = real_annotations / "cirr_dataset" / "cirr"
    content = json.loads((root / "demo_files" / "test1_pred_ranks_recall.json").read_text())
    (tmp_path / "file.json").write_text(json.dumps(content, indent=2))
    review = check(tmp_path / "file.json", root / "captions" / "cap.rc2.test1.json")
    assert list(review.problems.values()) == [["5,046,907"]]


def naive_average_precision(predicted: list[int], relevant: list[int], k: int) -> float:
    found, total = 0, 0.0
    for position, image in enumerate(predicted[:k], start=1):
        if image in relevant:
            found += 1
            total += found / position
    return total / min(k, len(relevant))


def test_the_official_circo_examples(real_annotations: Path):
    """The reference occurs in 1 of 220 and 10 of 800 lists; val's scores equal an independent computation."""
    root = real_annotations / "CIRCO"
    test = check(root / "submission_examples" / "submission_test.json", root / "annotations" / "test.json")
    assert (test.problems, len(test.rows), test.metrics) == ({}, 800, {})
    assert any("never right: 10 (" in note for note in test.notes)

    path = root / "submission_examples" / "submission_val.json"
    val = check(path, root / "annotations" / "val.json")
    assert (val.problems, len(val.rows)) == ({}, 220)
    assert any("never right: 1 (" in note for note in val.notes)
    predicted = json.loads(path.read_text())
    queries = json.loads((root / "annotations" / "val.json").read_text())
    for k in (5, 10, 25, 50):
        precisions = [naive_average_precision(predicted[str(q["id"])], q["gt_img_ids"], k) for q in queries]
        found = [q["target_img_id"] in predicted[str(q["id"])][:k] for q in queries]
        assert val.metrics[f"mAP@{k}"] == pytest.approx(100 * sum(precisions) / 220)
        assert val.metrics[f"Recall@{k}"] == pytest.approx(100 * sum(found) / 220)
    seen_from = [q for q in queries if "viewpoint" in q["semantic_aspects"]]
    precisions = [naive_average_precision(predicted[str(q["id"])], q["gt_img_ids"], 10) for q in seen_from]
    assert val.metrics["mAP@10_viewpoint"] == pytest.approx(100 * sum(precisions) / 54)
    assert 0 < val.metrics["mAP@50"] < 1


def test_the_official_circo_example_of_another_split_is_refused(real_annotations: Path):
    root = real_annotations / "CIRCO"
    review = check(root / "submission_examples" / "submission_val.json", root / "annotations" / "test.json")
    assert {kind: len(some) for kind, some in review.problems.items()} == {"queries missing": 580}


# -- files that Python alone would take ------------------------------------------------------------------------------


def test_a_query_given_twice_is_refused(tmp_path: Path):
    """Python's parser would keep the second list without an error."""
    text = json.dumps(cirr_content("recall"))
    (tmp_path / "file.json").write_text(text[:-1] + ', "7": ["img2"]}')
    with pytest.raises(
        ValueError, match=r'file\.json cannot be read as JSON: an object has the key "7" twice; correct'
    ):
        check(tmp_path / "file.json", cirr_files(tmp_path))


def test_a_byte_order_mark_is_refused(tmp_path: Path):
    """``json.load`` of a text file refuses it, and so would a server."""
    path = write(tmp_path / "file.json", cirr_content("recall"))
    path.write_text(path.read_text(), encoding="utf-8-sig")
    with pytest.raises(ValueError, match=r"file\.json begins with a byte order mark, which strict JSON readers refuse"):
        check(path, cirr_files(tmp_path))


@pytest.mark.parametrize("place", ["file", "annotations"])
def test_a_folder_is_no_file(tmp_path: Path, place: str):
    files = {"file": write(tmp_path / "file.json", cirr_content("recall")), "annotations": cirr_files(tmp_path)}
    files[place] = tmp_path
    with pytest.raises(
        SystemExit, match=rf"lavis-cir: {tmp_path} cannot be read: Is a directory; name a JSON file that can"
    ):
        main.main(["submission", str(files["file"]), "--annotations", str(files["annotations"])])


def test_a_file_of_a_million_names_is_refused_soon(tmp_path: Path):
    """Work that grows with the square of the longest list would take hours here."""
    content = circo_content()
    content["0"] = [*range(1_000_000), 999_999]
    review = check(write(tmp_path / "file.json", content), circo_files(tmp_path))
    assert review.problems["queries without exactly 50 images"] == ["0 has 1000001"]
    assert review.problems["queries with an image twice"] == ["0 has 999999"]


def test_some_targets_are_no_answers(tmp_path: Path):
    """A split is scored only if all its targets are known, as in the benchmark."""
    annotation = cirr_files(tmp_path)
    records = json.loads(annotation.read_text())
    records[0]["target_hard"] = IMAGES[1]
    review = check(write(tmp_path / "file.json", cirr_content("recall")), write(annotation, records))
    assert (review.problems, review.metrics) == ({}, {})
