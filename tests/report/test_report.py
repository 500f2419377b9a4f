"""Reports show the numbers of the rankings: tables, metrics.json, contact sheets, training curves."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image, ImageColor, ImageDraw

from lavis_cir_plugin.benchmarks.types import Benchmark, Group, Query
from lavis_cir_plugin.data.negatives import NegativeSets
from lavis_cir_plugin.methods.retrieval_dpo import negatives_sheet
from lavis_cir_plugin.methods.retrieval_dpo.task import RetrievalDpoTask
from lavis_cir_plugin.methods.wrf4cir.runner import RunnerWrf4Cir
from lavis_cir_plugin.ranking.metrics import average_precision_at, recall_at
from lavis_cir_plugin.ranking.ranks import Ranking
from lavis_cir_plugin.report import chance, contact_sheets, curves, result_files, sheet_layout, tables
from lavis_cir_plugin.report.run_log import RunLog

FASHIONIQ_SIZES = {"dress": (2017, 3817), "shirt": (2038, 6346), "toptee": (1961, 5373)}
FASHIONIQ_PROTOCOL = (
    "FashionIQ val, original-split gallery (3,817 / 6,346 / 5,373), reference kept, captions 'a and b', "
    "ties by gallery order"
)


def fashioniq_metrics(rankings):
    metrics = {f"{name}_R@{k}": recall_at(ranking.ranks, k) for name, ranking in rankings.items() for k in (10, 50)}
    for k in (10, 50):
        metrics[f"R@{k}"] = sum(metrics[f"{name}_R@{k}"] for name in rankings) / len(rankings)
    return {**metrics, "mean": (metrics["R@10"] + metrics["R@50"]) / 2}


def cirr_metrics(rankings):
    (ranking,) = rankings.values()
    metrics = {f"R@{k}": recall_at(ranking.ranks, k) for k in (1, 5, 10, 50)}
    metrics.update({f"R_subset@{k}": recall_at(ranking.subset_ranks, k) for k in (1, 2, 3)})
    return {**metrics, "mean": (metrics["R@5"] + metrics["R_subset@1"]) / 2}


def make_benchmark(groups, metrics=fashioniq_metrics, protocol=FASHIONIQ_PROTOCOL, image_paths=None):
    return Benchmark("fashioniq", "val", tuple(groups), image_paths or {}, protocol, metrics, "mean")


def make_group(name, num_queries, gallery_size, reference_removed=False):
    gallery = tuple(f"{name}{i}" for i in range(gallery_size))
    return Group(name, gallery, (Query(gallery[0], ("is red",), gallery[1]),) * num_queries, reference_removed)


@pytest.fixture(scope="module")
def fashioniq():
    return make_benchmark(make_group(name, *sizes) for name, sizes in FASHIONIQ_SIZES.items())


@pytest.fixture(scope="module")
def cirr():
    """Return CIRR val in outline: 2,297 images, the reference removed, image sets of 6 with the reference."""
    gallery = tuple(f"dev-{i}" for i in range(2297))
    query = Query(gallery[0], ("two dogs",), gallery[1], gallery[1:6])
    return make_benchmark([Group("cirr", gallery, (query,) * 3, reference_removed=True)], cirr_metrics, "CIRR val")


def cells(line):
    return line.replace("|", " ").split()


# -- the random row --------------------------------------------------------------------------------------------------


def test_expected_random_of_fashioniq(fashioniq):
    """The expectations are 10 of n and 50 of n. The overall numbers average the categories, then R@10 and R@50.

    R@10: 1000/3817 = 0.261986, 1000/6346 = 0.157580, 1000/5373 = 0.186116, mean 0.201894;
    R@50 is five times that, 1.009469; their mean is three times the first, 0.605682.
    """
    expected = chance.expected_random(fashioniq)
    by_hand = {"dress_R@10": 0.261986, "shirt_R@10": 0.157580, "toptee_R@10": 0.186116}
    by_hand.update({"R@10": 0.201894, "R@50": 1.009469, "mean": 0.605682})
    assert {metric: expected[metric] for metric in by_hand} == pytest.approx(by_hand, abs=1e-6)


def test_expected_random_of_cirr_counts_neither_the_reference_nor_strangers_to_the_set(cirr):
    """2,296 candidates give R@1 = 100/2296 = 0.043554 and R@50 = 2.177700; five members give 20, 40, 60 percent.

    mean = (R@5 + R_subset@1) / 2 = (0.217770 + 20) / 2 = 10.108885.
    """
    expected = chance.expected_random(cirr)
    by_hand = {"R@1": 0.043554, "R@5": 0.217770, "R@50": 2.177700, "mean": 10.108885}
    by_hand.update({"R_subset@1": 20.0, "R_subset@2": 40.0, "R_subset@3": 60.0})
    assert {metric: expected[metric] for metric in by_hand} == pytest.approx(by_hand, abs=1e-6)


def test_expected_random_is_drawn_where_equally_often_would_take_too_many_ranks(cirr, monkeypatch):
    """Ranks below 2,296 and places below five occur equally often in 11,480 rows; the mean of draws is near theirs."""
    expected = chance.expected_random(cirr)
    monkeypatch.setattr(chance, "_MOST_ROWS", 11479)
    drawn = chance.expected_random(cirr)
    assert drawn.keys() == expected.keys()
    assert drawn != expected
    assert all(drawn[metric] == pytest.approx(value, rel=0.05, abs=0.1) for metric, value in expected.items())


def test_expected_random_is_100_where_k_exceeds_the_gallery():
    expected = chance.expected_random(make_benchmark([make_group("dress", 2, 12)]))
    assert expected["dress_R@10"] == pytest.approx(100 * 10 / 12)
    assert expected["dress_R@50"] == 100.0


def test_expected_random_weighs_queries_with_different_chances():
    """The gallery has 20 images. Three queries have their reference in it (19 candidates), one has not (20), two have
    no target, and the target of two is the removed reference (0).

    R@10 = 100 * (3 * 10/19 + 1 * 10/20 + 0) / 8 = 25.986842.
    The second group, all alike, must not be disturbed: 100 * 10/40.
    """
    gallery = tuple(f"i{i}" for i in range(20))
    queries = (
        *(Query("i0", ("a",), "i1"),) * 3,
        Query("elsewhere", ("a",), "i1"),
        *(Query("i0", ("a",), None),) * 2,
        *(Query("i0", ("a",), "i0"),) * 2,
    )
    expected = chance.expected_random(make_benchmark([Group("a", gallery, queries, True), make_group("b", 5, 40)]))
    assert expected["a_R@10"] == pytest.approx(25.986842, abs=1e-6)
    assert expected["b_R@10"] == pytest.approx(25.0)
    assert expected["R@10"] == pytest.approx((25.986842 + 25.0) / 2, abs=1e-6)


def test_expected_random_is_the_mean_of_all_rankings():
    """A naive loop averages over every position of the target among 4 candidates and 3 members."""

    def metrics(rankings):
        return {"R@2": recall_at(rankings["g"].ranks, 2), "R_subset@2": recall_at(rankings["g"].subset_ranks, 2)}

    gallery = ("ref", "a", "b", "c", "d")
    benchmark = make_benchmark([Group("g", gallery, (Query("ref", ("x",), "b", ("a", "b", "c")),), True)], metrics)
    naive = {"R@2": 0.0, "R_subset@2": 0.0}
    for position in range(4):
        for subset_position in range(3):
            one = Ranking(torch.tensor([position]), torch.zeros(1, 0), torch.tensor([subset_position]))
            for metric, percent in metrics({"g": one}).items():
                naive[metric] += percent / 12
    assert chance.expected_random(benchmark) == pytest.approx(naive)


def test_random_ranks_of_members_agree_with_those_of_the_gallery():
    """One member of 5 has weight 1, one 0.5: E[R_subset@1] = (1 + 0.5) / 5 = 30 %, and 20 % for the target alone.

    In each drawn ranking the members have the same order as in the gallery.
    """
    gallery = ("ref", *(f"i{index}" for index in range(20)))
    members = gallery[1:6]
    group = Group("g", gallery, (Query("ref", ("x",), "i0", members, (("i0", 1.0), ("i3", 0.5))),) * 200, True)

    def metrics(rankings):
        ranking = rankings["g"]
        first = ranking.subset_top[:, 0]
        weights = torch.where(first == 1, 1.0, torch.where(first == 4, 0.5, 0.0))
        places = [(row == index).nonzero()[0] for row in ranking.subset_top for index in (1, 4)]
        before = torch.cat(places).view(-1, 2)
        assert torch.equal(before[:, 0] < before[:, 1], ranking.relevant_ranks[:, 0] < ranking.relevant_ranks[:, 1])
        assert torch.equal(before[:, 0], ranking.subset_ranks)
        assert torch.equal(ranking.relevant_ranks[:, 0], ranking.ranks)
        return {"soft": 100 * float(weights.mean()), "hard": recall_at(ranking.subset_ranks, 1)}

    expected = chance.expected_random(make_benchmark([group], metrics=metrics))
    assert expected == pytest.approx({"soft": 30, "hard": 20}, abs=1)


def test_random_mean_average_precision_is_near_its_expectation():
    r"""Of n candidates G = 3 are right: E[AP@K] = sum_{i<=K} G/n (1 + (i-1) (G-1)/(n-1)) / i / min(K, G)."""
    gallery = tuple(f"i{index}" for index in range(20))
    answers = tuple((name, 1.0) for name in gallery[1:4])
    group = Group("circo", gallery, (Query("i0", ("x",), "i1", relevance=answers),) * 100, True)

    def metrics(rankings):
        ranking = rankings["circo"]
        return {"mAP@5": average_precision_at(ranking.relevant_ranks, 5), "R@5": recall_at(ranking.ranks, 5)}

    expected = chance.expected_random(make_benchmark([group], metrics=metrics))
    n, right, k = 19, 3, 5
    by_hand = sum(right / n * (1 + (i - 1) * (right - 1) / (n - 1)) / i for i in range(1, k + 1)) / min(k, right)
    assert expected["mAP@5"] == pytest.approx(100 * by_hand, rel=0.03)
    assert expected["R@5"] == pytest.approx(100 * k / n, rel=0.03)
    assert chance.expected_random(make_benchmark([group], metrics=metrics)) == expected


def test_expected_random_of_a_split_without_public_targets_is_empty():
    benchmark = make_benchmark([Group("g", ("a", "b"), (Query("a", ("x",), None),), False)], lambda rankings: {})
    assert chance.expected_random(benchmark) == {}


# -- table -----------------------------------------------------------------------------------------------------------


def test_table_of_fashioniq(fashioniq):
    model = {f"{name}_R@{k}": i + k / 100 for i, name in enumerate(FASHIONIQ_SIZES) for k in (10, 50)}
    model.update({"R@10": 100.0, "R@50": 8.126, "mean": 9.0})
    rows = {"trained model": model, "random (expected)": chance.expected_random(fashioniq)}
    lines = tables.metrics_table(rows, fashioniq).split("\n")
    assert max(map(len, lines)) <= 120
    assert cells(lines[1]) == [*("dress", "dress", "shirt", "shirt", "toptee", "toptee"), *["overall"] * 3]
    assert cells(lines[2]) == ["percent", *["R@10", "R@50"] * 4, "mean"]
    values = ["0.10", "0.50", "1.10", "1.50", "2.10", "2.50", "100.00", "8.13", "9.00"]
    assert cells(lines[4]) == ["trained", "model", *values]
    assert cells(lines[5])[:4] == ["random", "(expected)", "0.26", "1.31"]
    assert lines[7] == "Queries / gallery images: dress 2,017 / 3,817, shirt 2,038 / 6,346, toptee 1,961 / 5,373"
    assert " ".join(lines[8:]) == f"Protocol: {FASHIONIQ_PROTOCOL}"


def test_table_columns_are_aligned(fashioniq):
    rows = {"a": chance.expected_random(fashioniq), "a much longer name": {"dress_R@10": 100.0}}
    body = tables.metrics_table(rows, fashioniq).split("\n")[:7]
    assert len(set(map(len, body))) == 1
    assert {tuple(i for i, sign in enumerate(line) if sign in "|+") for line in body} == {
        tuple(i for i, sign in enumerate(body[0]) if sign == "+")
    }
    assert set(body[0]) == {"+", "-"}
    assert cells(body[5])[4:] == ["100.00", *["-"] * 8]


def test_table_of_a_benchmark_with_overall_metrics_only_has_no_headings(cirr):
    lines = tables.metrics_table({"random (expected)": chance.expected_random(cirr)}, cirr).split("\n")
    assert cells(lines[1]) == ["percent", "R@1", "R@5", "R@10", "R@50", *(f"R_subset@{k}" for k in (1, 2, 3)), "mean"]
    assert cells(lines[3])[2:] == ["0.04", "0.22", "0.44", "2.18", "20.00", "40.00", "60.00", "10.11"]
    assert max(map(len, lines)) <= 120


def test_table_gives_a_metric_to_the_longest_group_name():
    benchmark = make_benchmark([make_group("top", 1, 5), make_group("top_tee", 1, 5)])
    lines = tables.metrics_table({"m": {"top_R@1": 1.0, "top_tee_R@1": 2.0}}, benchmark).split("\n")
    assert [cells(line) for line in lines[1:3]] == [["top", "top_tee"], ["percent", "R@1", "R@1"]]
    assert cells(lines[4]) == ["m", "1.00", "2.00"]


def test_table_without_metrics_still_names_the_protocol(cirr):
    assert tables.metrics_table({"trained model": {}}, cirr).endswith("Protocol: CIRR val")


# -- metrics.json ----------------------------------------------------------------------------------------------------


def test_metrics_file_holds_numbers_with_their_protocol(tmp_path, cirr):
    path = tmp_path / "new" / "folder" / "metrics.json"
    rows = {"trained model": {"R@1": 12.5, "mean": float("nan")}}
    result_files.write_metrics(path, rows, cirr, {"seed": 42, "checkpoint": Path("best.pth")})
    assert json.loads(path.read_text()) == {
        "benchmark": "fashioniq",
        "split": "val",
        "protocol": "CIRR val",
        "unit": "percent",
        "selection_metric": "mean",
        "groups": {"cirr": {"num_queries": 3, "gallery_size": 2297, "reference_removed": True}},
        "metrics": {"trained model": {"R@1": 12.5, "mean": None}},
        "extra": {"seed": 42, "checkpoint": "best.pth"},
    }
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("failing", ["open", "replace"])
def test_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, cirr, monkeypatch, failing):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def full_disk(*arguments):
        if failing == "open":
            with open(arguments[0], "wb") as file:  # a full disk takes the first bytes
                file.write(b"{\n")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*{"open": (Path, "open"), "replace": (os, "replace")}[failing], full_disk)
    with pytest.raises(OSError, match=r"metrics\.json could not be written: No space left on device; free") as caught:
        result_files.write_metrics(path, {}, cirr, {})
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# -- contact sheet ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Return 14 tall, wide and square pictures of one colour each, whose red value is 10 times the number."""
    paths = {}
    for i in range(14):
        paths[f"p{i}"] = tmp_path / f"p{i}.png"
        Image.new("RGB", [(60, 120), (120, 60), (80, 80)][i % 3], (10 * i, 0, 200)).save(paths[f"p{i}"])
    return paths


def sheet(pictures, queries, top, ranks, path, reference_removed=False, **options):
    group = Group("dress", tuple(pictures), tuple(queries), reference_removed)
    benchmark = make_benchmark([group], image_paths=pictures)
    ranking = Ranking(torch.tensor(ranks), torch.tensor(top), torch.tensor(ranks))
    contact_sheets.contact_sheet(benchmark, group, ranking, path, **options)
    return Image.open(path).convert("RGB")


def frames(image, colour, size=sheet_layout.PICTURE):
    """Return (left, top) of boxes with a border of this colour, which is 4 pixels thick."""
    matching = (np.asarray(image) == ImageColor.getrgb(colour)).all(axis=2)
    found = []
    for y, x in np.argwhere(matching).tolist():
        right, bottom = x + size[0] - 1, y + size[1] - 1
        if right < image.width and bottom < image.height and not (x and matching[y, x - 1]) and not matching[y - 1, x]:
            sides = (matching[y, x : right + 1], matching[bottom, x : right + 1])
            sides += (matching[y : bottom + 1, x], matching[y : bottom + 1, right], matching[y + 3, x : right + 1])
            if all(side.all() for side in sides):
                found.append((x, y))
    return found


def centre(image, left, top):
    return image.getpixel((left + sheet_layout.PICTURE[0] // 2, top + sheet_layout.PICTURE[1] // 2))


def test_sheet_frames_the_right_answers(tmp_path, pictures):
    """Query 0 finds p3 at rank 3. Query 1 finds p13 at rank 14, so p13 stands after the ten in orange."""
    queries = [Query("p0", ("is longer",), "p3"), Query("p1", ("is shorter",), "p13")]
    order = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]]
    image = sheet(pictures, queries, order, [2, 13], tmp_path / "sheet.png")
    ((green_x, green_y),) = frames(image, sheet_layout.GREEN)
    ((orange_x, orange_y),) = frames(image, sheet_layout.ORANGE)
    assert centre(image, green_x, green_y) == (30, 0, 200)
    assert centre(image, orange_x, orange_y) == (130, 0, 200)
    step = sheet_layout.PICTURE[0] + sheet_layout.GAP
    row = [centre(image, green_x + (i - 2) * step, green_y)[0] for i in range(10)]
    assert row == [10 * i for i in range(1, 11)]
    assert [centre(image, green_x + (i - 2) * step, orange_y)[0] for i in range(10)] == [10 * i for i in range(2, 12)]
    assert orange_x >= green_x + 8 * step + sheet_layout.SECTION_GAP - sheet_layout.GAP
    assert centre(image, sheet_layout.MARGIN, green_y) == (0, 0, 200)
    assert centre(image, sheet_layout.MARGIN, orange_y) == (10, 0, 200)


def test_sheet_keeps_the_aspect_ratio(tmp_path, pictures):
    """Inside a frame of 112 x 142, p3 (60 x 120) becomes 71 x 142, and p1 (120 x 60) becomes 112 x 56."""
    queries = [Query("p0", ("x",), "p3"), Query("p0", ("x",), "p1")]
    image = sheet(pictures, queries, [[3], [1]], [0, 0], tmp_path / "sheet.png")
    sizes = []
    for left, top in frames(image, sheet_layout.GREEN):
        box = image.crop((left, top, left + sheet_layout.PICTURE[0], top + sheet_layout.PICTURE[1]))
        ys, xs = np.nonzero((np.asarray(box) == centre(image, left, top)).all(axis=2))
        sizes.append((np.ptp(xs) + 1, np.ptp(ys) + 1))
    assert sizes == [(71, 142), (112, 56)]


@pytest.mark.parametrize("target", [None, "absent"])
def test_sheet_of_a_query_without_an_answer_has_no_frame(tmp_path, pictures, target):
    image = sheet(pictures, [Query("p0", ("x",), target)], [[1, 2]], [-1], tmp_path / "sheet.png")
    assert frames(image, sheet_layout.GREEN) == frames(image, sheet_layout.ORANGE) == []


def test_sheet_frames_every_right_answer_and_counts_them(tmp_path, pictures, monkeypatch):
    """p1 and p2 are right with a weight of 1, and p3 is wrong. The target p1 is not shown and stands apart."""
    frames, verdicts = {}, []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        sheet_layout, "draw_picture", lambda sheet, place, cell, box: frames.update({cell.image.stem: cell.frame})
    )
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *a, **k: verdicts.append(a[2]) or draw(*a, **k))
    query = Query("p0", ("x",), "p1", relevance=(("p1", 1.0), ("p2", 1.0), ("p3", 0.5)))
    sheet(pictures, [query], [[4, 2, 3]], [9], tmp_path / "sheet.png")
    assert frames == {"p0": "", "p4": "", "p2": sheet_layout.GREEN, "p3": "", "p1": sheet_layout.ORANGE}
    assert "1 of 2 right answers shown" in verdicts


def test_sheet_takes_no_reference_for_an_answer(tmp_path, pictures, monkeypatch):
    """CIRR's soft labels mark 37 references as right, but references are not ranked."""
    frames = {}
    monkeypatch.setattr(
        sheet_layout, "draw_picture", lambda sheet, place, cell, box: frames.update({cell.image.stem: cell.frame})
    )
    query = Query("p0", ("x",), "p1", relevance=(("p0", 1.0), ("p2", 0.5)))
    sheet(pictures, [query], [[0, 1, 2]], [1], tmp_path / "sheet.png")
    assert frames == {"p0": "", "p1": sheet_layout.GREEN, "p2": ""}


def test_a_table_that_would_be_too_wide_has_a_line_per_metric():
    """120 characters hold ten columns of 9 characters, but not 20."""
    benchmark = make_benchmark([Group("g", ("a", "b"), (Query("a", ("x",), "b"),), False)])
    rows = {"trained model": {f"mAP@10_{i:02}": float(i) for i in range(20)}, "image only": {"mAP@10_01": 50.0}}
    lines = tables.metrics_table(rows, benchmark).split("\n")
    assert lines[:5] == [
        "+-----------+---------------+------------+",
        "| percent   | trained model | image only |",
        "+-----------+---------------+------------+",
        "| mAP@10_00 |          0.00 |          - |",
        "| mAP@10_01 |          1.00 |      50.00 |",
    ]
    assert lines[3 + 20] == lines[0]


def test_a_split_without_public_answers_is_shown_without_any(tmp_path, pictures, monkeypatch):
    """Without rows there is no table, only sizes and protocol."""
    texts = []
    draw = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *a, **k: texts.append(a[2]) or draw(*a, **k))
    sheet(pictures, [Query("p0", ("x",), None)], [[4, 2, 3]], [-1], tmp_path / "sheet.png")
    assert not [text for text in texts if "right answer" in text and "public" not in text]
    benchmark = make_benchmark([Group("dress", ("p0", "p1"), (Query("p0", ("x",), None),), False)])
    assert tables.metrics_table({}, benchmark).startswith("Queries / gallery images: dress 1 / 2\nProtocol: ")


def test_a_submission_has_no_superfluous_byte(tmp_path):
    path = result_files.write_submission(tmp_path / "test" / "x.json", {"version": "rc2", "12": ["a", "b"]})
    assert path.read_text() == '{"version":"rc2","12":["a","b"]}'


def test_sheet_leaves_places_of_a_short_ranking_empty(tmp_path, pictures):
    """The padding -1 in top must not show the last image of the gallery."""
    image = sheet(pictures, [Query("p0", ("x",), "p1")], [[1, -1]], [0], tmp_path / "sheet.png")
    ((x, y),) = frames(image, sheet_layout.GREEN)
    assert centre(image, x + sheet_layout.PICTURE[0] + sheet_layout.GAP, y) == (255, 255, 255)


def test_sheet_says_where_the_reference_was_retrieved(tmp_path, pictures, monkeypatch):
    labels = []
    monkeypatch.setattr(sheet_layout, "draw_picture", lambda sheet, place, cell, box: labels.append(cell.label))
    sheet(pictures, [Query("p0", ("x",), "p9")], [[4, 0, 5]], [8], tmp_path / "sheet.png")
    assert labels == ["", "1", "2 (reference)", "3", "rank 9"]


def test_sheet_chooses_queries_by_seed(tmp_path, pictures):
    queries = [Query(f"p{i}", ("x",), "p13") for i in range(12)]
    top, ranks = [[13, 0]] * 12, [0] * 12

    def references(seed):
        image = sheet(pictures, queries, top, ranks, tmp_path / f"{seed}.png", rows=4, seed=seed)
        return [centre(image, sheet_layout.MARGIN, y)[0] // 10 for _, y in frames(image, sheet_layout.GREEN)]

    chosen = references(0)
    assert len(chosen) == 4
    assert chosen == sorted(chosen)
    first = (tmp_path / "0.png").read_bytes()
    assert references(0) == chosen
    assert (tmp_path / "0.png").read_bytes() == first
    assert any(references(seed) != chosen for seed in (1, 2, 3))


def test_sheet_takes_any_text(tmp_path, pictures):
    texts = ("", "w" * 300, "longer " * 200, "“ombré” 更长 \n two\tlines")
    queries = [Query("p0", (text, "and reverse"), "p1") for text in texts]
    image = sheet(pictures, queries, [[1]] * 4, [0] * 4, tmp_path / "sheet.png")
    assert len(frames(image, sheet_layout.GREEN)) == 4


def test_sheet_refuses_the_ranking_of_another_group(tmp_path, pictures):
    with pytest.raises(ValueError, match="'dress' has 1 queries, but top has 2 entries and ranks has 1"):
        sheet(pictures, [Query("p0", ("x",), "p1")], [[1], [2]], [0], tmp_path / "sheet.png")


def test_text_wraps_at_blanks_and_breaks_a_word_that_is_too_wide():
    font = sheet_layout.font(16)
    text = "is much longer and has a floral print"
    lines = sheet_layout.wrapped(text, 16, 120)
    assert " ".join(lines) == text
    assert len(lines) > 1
    broken = sheet_layout.wrapped("w" * 40, 16, 120)
    assert "".join(broken) == "w" * 40
    assert all(font.getlength(line) <= 120 for line in lines + broken)
    assert sheet_layout.wrapped("  ", 16, 120) == []


# -- negatives -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mined(tmp_path):
    """Return two triplets over six one-coloured pictures: one with the negatives 2 and 3, and one without negatives."""
    paths = []
    for number, colour in enumerate(("red", "lime", "blue", "yellow", "black", "white")):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (40, 50), colour).save(paths[-1])
    return NegativeSets(
        names=list("abcdef"),
        references=np.array([0, 4], dtype=np.int32),
        targets=np.array([1, 5], dtype=np.int32),
        texts=["is red", "is blue"],
        negatives=np.array([[2, 0, 3], [-1, -1, -1]], dtype=np.int32),
        scores=np.array([[0.75, 0.5, 0.25], [np.nan] * 3], dtype=np.float32),
        target_scores=np.array([0.875, 0.5], dtype=np.float32),
        ranks=np.array([[4, 5, 1200], [-1, -1, -1]], dtype=np.int32),
        target_ranks=np.array([0, -1], dtype=np.int32),
        about={"dataset": "cirr", "epoch": 3, "negatives": {"source": "query", "cap": None, "window": [0, 50]}},
        paths=paths,
    )


def colours_of(path, row):
    """Return the colours in the middle of the pictures of a line, from left to right."""
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGB"))
    lines = np.nonzero(
        (sheet == ImageColor.getrgb(sheet_layout.GREEN)).all(axis=2).sum(axis=1) >= sheet_layout.PICTURE[0]
    )[0]
    tops = lines[:: 2 * sheet_layout.FRAME]  # a frame has this many lines above and below
    y = tops[row] + sheet_layout.PICTURE[1] // 2
    first = (
        sheet_layout.MARGIN + sheet_layout.PICTURE[0] + sheet_layout.GAP + sheet_layout.TEXT_WIDTH + sheet_layout.GAP
    )
    after = first + sheet_layout.PICTURE[0] + sheet_layout.SECTION_GAP
    lefts = [
        sheet_layout.MARGIN,
        first,
        *range(after, sheet.shape[1] - sheet_layout.MARGIN, sheet_layout.PICTURE[0] + sheet_layout.GAP),
    ]
    return [tuple(int(value) for value in sheet[y, left + sheet_layout.PICTURE[0] // 2]) for left in lefts]


def test_the_sheet_of_negatives_shows_each_picture_in_its_place(tmp_path, mined):
    negatives_sheet.negatives_sheet(mined, tmp_path / "sheet.png")
    red, lime, blue, yellow = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))
    assert colours_of(tmp_path / "sheet.png", 0) == [red, lime, blue, red, yellow]
    assert colours_of(tmp_path / "sheet.png", 1)[:2] == [(0, 0, 0), (255, 255, 255)]
    negatives_sheet.negatives_sheet(mined, tmp_path / "narrow.png", columns=1)
    assert colours_of(tmp_path / "narrow.png", 0) == [red, lime, blue]


def test_the_sheet_of_negatives_tells_ranks_scores_and_settings(tmp_path, mined, monkeypatch):
    """Ranks count from 1, the reference is named, an empty row says so, and the sheet shows all two triplets."""
    written = []
    plain = ImageDraw.ImageDraw.text

    def recorded(self, place, text, *args, **kwargs):
        written.append(text)
        plain(self, place, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded)
    negatives_sheet.negatives_sheet(mined, tmp_path / "sheet.png")
    assert {"1, 0.875", "5, 0.750", "6, 0.500 (reference)", "1,201, 0.250", "0.500"} <= {*written}
    assert "none passes the rules" in " ".join(written)
    assert {"is red", "is blue", "Negatives of cirr, mined at the beginning of epoch 3"} <= {*written}
    assert "run.negatives: source query, cap null, window [0, 50]" in written
    lines = " ".join(written)
    assert "Shown: 2 of 2 triplets, chosen at random with seed 0, with the hardest 3 of up to 3 negatives" in lines
    assert "50.0 % without one" in lines


def test_the_sheet_of_negatives_draws_by_the_seed(tmp_path, mined):
    sheets = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", 2), ("e", 3)):
        negatives_sheet.negatives_sheet(mined, tmp_path / f"{name}.png", rows=1, seed=seed)
        sheets.append(colours_of(tmp_path / f"{name}.png", 0)[0])
    assert sheets[0] == sheets[1]
    assert set(sheets) == {(255, 0, 0), (0, 0, 0)}


def test_pictures_of_negatives_that_have_moved_are_named(tmp_path, mined):
    Path(mined.paths[3]).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 6 pictures are not where they were .*3.png\); put them back, or"
    ):
        negatives_sheet.negatives_sheet(mined, tmp_path / "sheet.png")
    negatives_sheet.negatives_sheet(mined, tmp_path / "sheet.png", columns=2)  # it is not shown then


# -- training curve --------------------------------------------------------------------------------------------------


class Log:
    """Write a run's log files with a loss per epoch and validations."""

    def __init__(self, folder):
        self.folder = folder
        self.log = RunLog(folder, columns=RunnerWrf4Cir.LOG_COLUMNS)
        self.epoch = -1

    def train(self, loss, batches=()):
        self.epoch += 1
        for index, values in enumerate(batches):
            self.log.log_step(self.epoch * len(batches) + index, self.epoch, values)
        self.log.log_epoch(0, self.epoch, "train", {"loss": loss, "lr": "0.000"})
        return self

    def preferences(self, **values):
        self.log.log_epoch(0, self.epoch, "train", values)
        return self

    def val(self, percent, agg=None, split="val"):
        self.epoch = max(self.epoch, 0)
        agg = percent if agg is None else agg
        self.log.log_epoch(0, self.epoch, split, {"R@10": percent, "mean": percent, "agg_metrics": agg})
        return self

    def captions(self, score):
        self.log.log_epoch(0, self.epoch, "val", {"CIDEr": score, "agg_metrics": score})
        return self


@pytest.fixture
def run(tmp_path):
    log = Log(tmp_path)
    yield log
    log.log.close()


@pytest.fixture
def figures(monkeypatch):
    """Return a list that collects the drawn figures."""
    made = []

    class Recorded(curves.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(curves, "Figure", Recorded)
    return made


def curve(run, metric="mean"):
    panels = (*RunnerWrf4Cir.CURVE_PANELS, *RetrievalDpoTask.CURVE_PANELS)
    curves.training_curve(run.folder, run.folder / "curve.png", metric, panels)
    with Image.open(run.folder / "curve.png") as image:
        assert image.format == "PNG"


def points(axes, line=0):
    return [(float(x), float(y)) for x, y in axes.lines[line].get_xydata()]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_curve_shows_loss_and_validation_and_the_best_epoch(run, figures):
    """The first epoch wins a tie, because LAVIS replaces its best checkpoint only for a larger value."""
    run.train("2.500").val(10.0).train("1.500").val(30.0).train("1.000").val(30.0)
    curve(run)
    ((loss, metric),) = (figure.axes for figure in figures)
    assert points(loss) == [(0, 2.5), (1, 1.5), (2, 1.0)]
    assert points(metric) == [(0, 10.0), (1, 30.0), (2, 30.0)]
    assert legend(loss) == ["mean of each epoch"]
    assert legend(metric) == ["validation mean", "best: epoch 1, mean 30.00 %"]


def test_curves_of_scores_that_are_no_percentages_have_no_unit(run):
    """LAVIS adds CIDEr and BLEU-4 of captions, whose sum is about 1."""
    run.train(2).captions(1.25)
    figure = curves.training_figure(run.folder, "agg_metrics")
    assert figure.axes[1].get_ylabel() == "agg_metrics"
    assert legend(figure.axes[1])[1] == "best: epoch 0, agg_metrics 1.25"
    both = curves.comparison_figure({"captions": (run.folder, "red")}, "agg_metrics")
    assert both.axes[1].get_ylabel() == "agg_metrics"
    run.val(30.0)
    assert curves.training_figure(run.folder, "mean").axes[1].get_ylabel() == "mean in percent"
    both = curves.comparison_figure({"retrieval": (run.folder, "red")}, "mean")
    assert both.axes[1].get_ylabel() == "mean in percent"


def test_curve_takes_the_best_epoch_from_what_chose_the_checkpoint(run, figures):
    curve(run.train(2).val(50.0, agg=1.0).train(1).val(40.0, agg=2.0))
    assert legend(figures[0].axes[1])[1] == "best: epoch 1, mean 40.00 %"


def test_curve_shows_the_gap_to_seen_queries(run, figures):
    """Two of three epochs were ranked on both splits, so the shaded area has corners at 10, 20, 30 and 15."""
    run.train(3).val(10.0).val(15.0, split="seen").train(2).val(20.0).val(30.0, split="seen").train(1).val(25.0)
    curve(run)
    metric = figures[0].axes[1]
    assert points(metric, 1) == [(0, 15.0), (1, 30.0)]
    assert legend(metric)[:2] == ["validation mean", "on training queries (seen)"]
    (area,) = metric.collections
    corners = {tuple(corner) for corner in area.get_paths()[0].vertices.tolist()}
    assert corners == {(0.0, 10.0), (1.0, 20.0), (1.0, 30.0), (0.0, 15.0)}


def test_curve_shows_every_batch_and_the_perturbation(run, figures):
    """With two batches per epoch, those of epoch 0 stand at -0.5 and 0, those of epoch 1 at 0.5 and 1."""
    measured = {"perturbation_norm": 0.5, "cosine": 0.9}
    run.train(2.5, [{"loss": 3.0, "lr": 1e-4}, {"loss": 2.0, "lr": 2e-4}])
    run.train(1.0, [{"loss": float("nan"), "lr": 3e-4, **measured}, {"loss": 1.0, "lr": 4e-4}]).val(5.0)
    curve(run)
    loss, metric, lr, norm, cosine = figures[0].axes
    assert points(loss) == [(-0.5, 3.0), (0, 2.0), (1, 1.0)]
    assert points(loss, 1) == [(0, 2.5), (1, 1.0)]
    assert points(metric) == [(1, 5.0)]
    assert points(lr) == [(-0.5, 1e-4), (0, 2e-4), (0.5, 3e-4), (1, 4e-4)]
    assert points(norm) == [(0.5, 0.5)]
    assert points(cosine) == [(0.5, 0.9)]
    assert [axes.get_ylabel() for axes in (lr, norm, cosine)] == ["learning rate", "‖δ‖", "cos(g, g')"]


def test_curve_of_a_run_without_perturbation_has_no_panel_for_it(run, figures):
    curve(run.train(2.5, [{"loss": 3.0, "lr": 1e-4}]))
    assert [axes.get_ylabel() for axes in figures[0].axes] == ["training loss", "learning rate"]


def test_curve_of_preferences_has_a_panel_of_shares_and_one_of_cosines(run, figures):
    for epoch in range(2):
        run.train(2.0 - epoch).preferences(
            reward_accuracy=0.5 + 0.2 * epoch, without_negative=0.1, reward_margin=0.02 * epoch, positive_drift=-0.01
        )
        run.val(30.0)
    curve(run)
    labels = [axes.get_ylabel() for axes in figures[0].axes]
    assert labels == ["training loss", "mean in percent", "share", "cosine"]
    share, cosine = figures[0].axes[2:4]
    assert legend(share) == ["h > 0 (reward accuracy)", "queries without a negative"]
    assert points(share) == [(0, 0.5), (1, 0.7)]
    assert points(share, 1) == [(0, 0.1), (1, 0.1)]
    assert legend(cosine) == ["h (reward margin)", "drift of the right image's score"]
    assert points(cosine) == [(0, 0.0), (1, 0.02)]
    assert points(cosine, 1) == [(0, -0.01), (1, -0.01)]


def test_curve_without_a_reference_policy_has_no_drift(run, figures):
    curve(run.train(2.0).preferences(reward_margin=0.1, reward_accuracy=1.0, without_negative=0.0).val(30.0))
    assert legend(figures[0].axes[3]) == ["h (reward margin)"]


def test_curve_of_an_evaluation_alone_has_one_panel(run, figures):
    curve(run.val(12.0))
    (metric,) = figures[0].axes
    assert points(metric) == [(0, 12.0)]


def test_curve_of_one_epoch_has_whole_epochs_on_its_axis(run, figures):
    curve(run.train(2.0).val(12.0))
    metric = figures[0].axes[1]
    low, high = metric.get_xlim()
    assert [tick for tick in metric.get_xticks() if low <= tick <= high] == [0]
    assert metric.lines[0].get_marker() == "o"


def test_curve_says_that_a_loss_is_not_finite(run, figures):
    curve(run.train(2.0).train("nan").train("inf"))
    assert legend(figures[0].axes[0]) == ["mean of each epoch (not finite in 2 of 3 epochs)"]


def test_curve_is_deterministic(run):
    run.train(2.0).val(12.0).train(1.0).val(13.0)
    curve(run)
    first = (run.folder / "curve.png").read_bytes()
    curve(run)
    assert (run.folder / "curve.png").read_bytes() == first


def test_curve_refuses_a_log_it_cannot_show(run):
    with pytest.raises(ValueError, match=r"epochs\.csv holds no finished epoch"):
        curve(run)
    run.train(1.0).val(3.0)
    with pytest.raises(ValueError, match=r"no validation metric 'R@1'; pass one of: R@10, agg_metrics, mean\."):
        curve(run, "R@1")
    assert not (run.folder / "curve.png").exists()


def test_curve_without_log(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"epochs\.csv does not exist; a training run writes it"):
        curves.training_curve(tmp_path, tmp_path / "curve.png", "mean")


# -- several benchmarks side by side ---------------------------------------------------------------------------------


def two_benchmarks():
    one = make_benchmark([make_group("dress", 2, 12)])
    other = make_benchmark([make_group("circo", 1, 9)], protocol="CIRCO val")
    rows = {"trained model": {"R@10": 5.0, "mean": 30.5}, "image only": {"R@10": 1.0, "mean": 7.25}}
    others = {"trained model": {"mean": float("nan")}, "random (expected)": {"mean": 100.0}}
    return {"fashioniq_val": (one, rows), "circo_val": (other, others)}


def test_the_summary_shows_of_each_benchmark_the_metric_that_chooses():
    """The first benchmark's rows come first, a missing row shows a dash, and only the chosen metric is shown."""
    lines = tables.summary_table(two_benchmarks()).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line for line in lines if set(line) <= set("+-")] == [lines[0], lines[3], lines[-1]]
    assert [cells(line) for line in lines[1:3]] == [["fashioniq_val", "circo_val"], ["percent", "mean", "mean"]]
    assert [cells(line) for line in lines[4:-1]] == [
        ["trained", "model", "30.50", "nan"],
        ["image", "only", "7.25", "-"],
        ["random", "(expected)", "-", "100.00"],
    ]


def test_the_summary_is_written_with_protocols_and_without_nan(tmp_path):
    path = result_files.write_summary(tmp_path / "run" / "summary.json", two_benchmarks())
    content = json.loads(path.read_text())
    assert content["unit"] == "percent"
    assert list(content["benchmarks"]) == ["fashioniq_val", "circo_val"]
    assert content["benchmarks"]["fashioniq_val"] == {
        "protocol": FASHIONIQ_PROTOCOL,
        "metric": "mean",
        "values": {"trained model": 30.5, "image only": 7.25},
    }
    assert content["benchmarks"]["circo_val"]["values"] == {"trained model": None, "random (expected)": 100.0}


# -- where a model looks ---------------------------------------------------------------------------------------------


def attention(tmp_path, maps, num_queries=3, labels=("block 3", "block 7")):
    """Draw maps over black pictures and return the pixels ``(height, width, 3)`` of the sheet."""
    benchmark = make_benchmark([make_group("dress", num_queries, 12)])
    black = -torch.tensor(OPENAI_DATASET_MEAN) / torch.tensor(OPENAI_DATASET_STD)
    pictures = black[:, None, None].expand(len(maps), 3, 48, 48)
    path = contact_sheets.attention_sheet(
        benchmark, benchmark.groups[0], pictures, maps, labels, tmp_path / "attention.png"
    )
    return np.asarray(Image.open(path)).astype(int)


def panels(sheet, rows, columns):
    """Return the pictures ``(side, side, 3)`` of a sheet by row and column; column 0 is the reference."""
    side, frame = contact_sheets.ATTENTION_SIDE, sheet_layout.FRAME
    box = side + 2 * frame
    height = box + sheet_layout.LABEL_HEIGHT + sheet_layout.GAP
    top = sheet.shape[0] - sheet_layout.MARGIN + sheet_layout.GAP - rows * height + frame
    first = sheet_layout.MARGIN + box + sheet_layout.GAP + sheet_layout.TEXT_WIDTH + sheet_layout.SECTION_GAP + frame
    lefts = [sheet_layout.MARGIN + frame, *(first + i * (box + sheet_layout.GAP) for i in range(columns))]
    return [[sheet[top + r * height :][:side, left:][:, :side] for left in lefts] for r in range(rows)]


def test_a_map_is_drawn_over_the_place_it_means(tmp_path):
    """A weight on the top right patch is bright there and black at the bottom left; an even map is even.

    The largest weight has 55 percent of inferno's last colour, (252, 255, 164), over black: (139, 140, 90).
    """
    corner = torch.zeros(4, 4)
    corner[0, -1] = 0.2
    maps = torch.stack([corner, torch.full((4, 4), 0.01)]).expand(3, 2, 4, 4)
    for picture, cornered, even in panels(attention(tmp_path, maps), 3, 2):
        assert picture.max() <= 1
        assert np.allclose(cornered[:10, -10:], [139, 140, 90], atol=2)
        assert cornered[-80:].max() <= 2
        assert cornered[:, :80].max() <= 2
        assert np.allclose(even, [139, 140, 90], atol=2)


def test_the_label_says_how_far_a_map_is_from_even(tmp_path, monkeypatch):
    """One patch of 16 holds all weight, 16 times the average. In an even map the largest weight is the average."""
    texts = []
    write = ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda draw, *args, **kw: (texts.append(args[1]), write(draw, *args, **kw))
    )
    corner = torch.zeros(1, 4, 4)
    corner[0, 0, 0] = 1
    attention(tmp_path, torch.stack([corner, torch.ones(1, 4, 4)], dim=1), num_queries=1)
    assert [text for text in texts if "average" in text][-2:] == ["block 3: 16.0 x average", "block 7: 1.0 x average"]


def test_grids_need_not_be_those_of_one_tower_and_the_same_input_gives_the_same_bytes(tmp_path):
    one, other = (
        attention(tmp_path, torch.rand(2, 2, 7, 5, generator=torch.Generator().manual_seed(1)), 2) for _ in "ab"
    )
    assert np.array_equal(one, other)
    assert attention(tmp_path, torch.rand(2, 1, 1, 1), 2, labels=["block 0"]).shape[2] == 3


@pytest.mark.parametrize("shape", [(3, 1, 4, 4), (2, 2, 4, 4), (3, 2, 16)])
def test_maps_of_another_number_are_refused(shape, tmp_path):
    benchmark = make_benchmark([make_group("dress", 5, 12)])
    with pytest.raises(ValueError, match=r"3 pictures and 2 labels need maps of the shape \(3, 2, h, w\), got \("):
        contact_sheets.attention_sheet(
            benchmark, benchmark.groups[0], torch.zeros(3, 3, 8, 8), torch.ones(shape), ["a", "b"], tmp_path / "x.png"
        )


@pytest.mark.parametrize("colour", [sheet_layout.BLACK, sheet_layout.GREY, sheet_layout.GREEN, sheet_layout.ORANGE])
def test_small_text_on_white_has_the_contrast_that_wcag_asks_for(colour):
    """WCAG 2: (1 + 0.05) / (L + 0.05) of at least 4.5, with L the relative luminance in linear light."""
    shares = [channel / 255 for channel in ImageColor.getrgb(colour)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    assert 1.05 / (np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05) >= 4.5
