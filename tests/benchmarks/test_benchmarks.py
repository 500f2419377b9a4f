"""The scripts in benchmarks/: their small parts, and the full-size script as a whole on a tiny FashionIQ."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Return a function that imports a script by its name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


@pytest.fixture
def annotations(tmp_path):
    """Write FashionIQ's files for 3 categories. A split has 8 images, each the target of the one before it."""
    for category in ("dress", "shirt", "toptee"):
        for split in ("train", "val"):
            names = [f"{category}-{split}-{index}" for index in range(8)]
            pairs = zip(names, names[1:])
            rows = [{"candidate": a, "target": b, "captions": ["is red", "is longer"]} for a, b in pairs]
            for folder, name, content in (("captions", "cap", rows), ("image_splits", "split", names)):
                path = tmp_path / "given" / folder / f"{name}.{category}.{split}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(content))
    return tmp_path / "given"


def test_needed_images_are_those_of_training_triplets_and_validation_galleries(script, annotations):
    """Each category has 8 training images in triplets and 8 gallery images. A shared image keeps its first category."""
    path = annotations / "image_splits" / "split.toptee.val.json"
    path.write_text(json.dumps([*json.loads(path.read_text()), "shirt-val-0"]))
    needed = script("fashioniq_full_size").needed_images(annotations)
    assert len(needed) == 3 * (8 + 8)
    assert needed["shirt-val-0"] == "shirt"


def test_needed_images_of_the_real_files(script, real_annotations):
    """Training triplets have 25,136 distinct images and validation galleries 15,415, with 400 in both."""
    needed = script("fashioniq_full_size").needed_images(real_annotations / "fashionIQ_dataset")
    assert len(needed) == 25_136 + 15_415 - 400


def test_drawing_is_resumed_and_leaves_whole_pictures_only(script, tmp_path):
    draw_missing = script("fashioniq_full_size").draw_missing
    assert draw_missing({"a": "dress", "b": "shirt"}, tmp_path, 32) == (2, 0)
    first = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(b"the user's own")
    (tmp_path / "b.jpg").unlink()
    assert draw_missing({"a": "dress", "b": "shirt", "c": "toptee"}, tmp_path, 32) == (2, 1)
    assert (tmp_path / "a.jpg").read_bytes() == b"the user's own"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "b.jpg", "c.jpg"]
    assert Image.open(tmp_path / "c.jpg").size == (32, 40)

    (tmp_path / "a.jpg").unlink()
    draw_missing({"a": "dress"}, tmp_path, 32)
    assert (tmp_path / "a.jpg").read_bytes() == first


def test_missing_annotations_are_named(script, annotations, tmp_path):
    (annotations / "captions" / "cap.shirt.val.json").unlink()
    with pytest.raises(SystemExit, match=r"1 of 12 annotation files are missing \(first: .*cap\.shirt\.val\.json\)"):
        script("fashioniq_full_size").copy_annotations(annotations, tmp_path / "root")


def test_stages_add_up_over_epochs(script):
    """The start takes 0-3, training 3-10 and 12-20, evaluation 10-12 and 20-25: 3, 15 and 7 seconds."""
    job = script("fashioniq_full_size").Job()
    job.changes = [(3.0, "training"), (10.0, "evaluation"), (12.0, "training"), (20.0, "evaluation")]
    assert job.stages(25.0) == {"start": 3.0, "training": 15.0, "evaluation": 7.0}


def test_usage_is_that_of_the_largest_process():
    """One process holds 300 MiB, the child of another does, and a third holds nothing; the peaks show it.

    A small process measures them, because on Linux a process begins with the peak of the one that started it.
    """
    code = """if True:
        import sys, measure
        block = [sys.executable, "-c", "bytearray(300 * 2**20)"]
        child = [sys.executable, "-c", f"import subprocess; subprocess.run({block})"]
        for command in (block, child, [sys.executable, "-c", ""]):
            print(measure.run(command, print).peak_bytes // 2**20)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True, check=True)
    own, of_child, none = map(int, done.stdout.split())
    assert 300 <= own < 400
    assert 300 <= of_child < 400
    assert none < 100


def test_lines_come_from_output_and_error(script):
    lines: list[str] = []
    script("measure").run([sys.executable, "-c", "import sys; print(1); print(2, file=sys.stderr)"], lines.append)
    assert sorted(lines) == ["1", "2"]


def test_a_failed_command_is_an_error(script):
    with pytest.raises(subprocess.CalledProcessError):
        script("measure").run([sys.executable, "-c", "raise SystemExit(3)"], print)


def test_ways_run_in_turn_and_their_last_line_counts(script, tmp_path):
    (tmp_path / "way.py").write_text("import json, sys; print('first'); print(json.dumps({'way': sys.argv[1]}))")
    runs = script("measure").run_ways(str(tmp_path / "way.py"), [["a"], ["b"]], 2)
    assert [[run["way"] for run in own] for own in runs] == [["a", "a"], ["b", "b"]]
    assert all(run["peak_bytes"] > 0 for own in runs for run in own)
    assert script("measure").median([{"x": 3}, {"x": 1}, {"x": 2}], "x") == 2


@pytest.mark.parametrize("num_features", [1, 3])
@pytest.mark.parametrize("dataset", ["cirr", "fashioniq"])
def test_validation_metrics_of_both_ways_agree(script, dataset, num_features):
    """90 queries among 600 images have equal recalls by string comparison and by ranking, with hits and misses."""
    import torch

    metrics = script("validation_metrics")
    group = metrics.group(num_features, 90, 600, torch.Generator().manual_seed(0))
    recalls = metrics.by_strings(dataset, *group)
    assert len(recalls) == (7 if dataset == "cirr" else 2)
    assert recalls == pytest.approx(metrics.by_ranks(dataset, *group))
    assert 0 < recalls[0] < 100


def test_validation_metrics_say_where_the_ways_differ(script):
    """10 s against 2 are 5 x the time, and 1 of the 2 is the product. 300 MB against 100 above the features are 3 x."""
    metrics = script("validation_metrics")
    floor = [{"seconds": 0.0, "peak_bytes": 100e6, "recalls": [], "threads": 1, "device": "CPU"}]
    strings = [{"seconds": 10.0, "peak_bytes": 400e6, "recalls": [50.0], "threads": 1}]
    ours = [{"seconds": 2.0, "peak_bytes": 200e6, "recalls": [50.0], "threads": 1, "device": "CPU"}]
    product = [{"seconds": 1.0, "peak_bytes": 150e6, "recalls": [], "threads": 1}]
    runs = dict(zip(("features only", "product alone", "string matrix", "ours"), (floor, product, strings, ours)))
    text = metrics.report("cirr", 1, runs)
    assert "5.0 x the time, 3.0 x the memory; the product alone takes 50 % of our time" in text
    assert "DIFFER" not in text
    assert "DIFFER" in metrics.report("cirr", 1, {**runs, "ours": [{**ours[0], "recalls": [51.0]}]})


def test_the_usual_product_is_told_apart_from_the_string_matrix(script):
    """101 s replace the 1 s of one product, so 10 + 100 s against 2 are 55 x. The larger of the two peaks counts."""
    metrics = script("validation_metrics")
    cost = {"features only": (0, 100e6), "product alone": (1, 150e6), "usual product": (101, 900e6)}
    cost.update({"string matrix": (10, 400e6), "ours": (2, 200e6)})
    runs = {
        name: [{"seconds": seconds, "peak_bytes": peak, "recalls": [], "threads": 1, "device": "CPU"}]
        for name, (seconds, peak) in cost.items()
    }
    text = metrics.report("fashioniq", 32, runs)
    assert "5.0 x the time, 3.0 x the memory" in text
    assert "with the usual product in place of one: 55 x the time, 8 x the memory" in text
    assert metrics.usual_share("cirr") == 512 / 4181  # the other queries are scaled


def test_circo_steps_on_a_small_gallery(script, tmp_path):
    """Random features are unit vectors in float16. Exact ranking and every index read them from the file."""
    circo = script("circo_full_size")
    assert circo.run_here("draw", tmp_path, 1500, 6)["GB"] == pytest.approx(1500 * 32 * 256 * 2 / 1e9)
    query, gallery = circo.read(tmp_path, 1500)
    assert query.shape == (6, 256)
    assert gallery.shape == (1500, 32, 256)
    assert (gallery.float().norm(dim=-1) - 1).abs().max() < 1e-3
    assert circo.run_here("rank", tmp_path, 1500, 6)["seconds"] > 0
    assert circo.run_here("flat", tmp_path, 1500, 6)["recall %"] == 100.0
    assert circo.run_here("ivf", tmp_path, 1500, 6)["recall %"] > 20.0
    assert circo.line("rank", {"seconds": 1.5, "peak_bytes": 2**30}) == "rank   seconds 1.50, peak 1.00 GiB"


@pytest.mark.slow
def test_circo_script_removes_its_features(script, tmp_path):
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / "circo_full_size.py"), "--images", "200", "--queries", "3"]
    command += ["--folder", str(tmp_path), "--kinds", "flat"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flat   build seconds" in done.stdout
    assert "within 6 GiB" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_full_size_script_from_annotations_to_report(script, annotations, tmp_path, monkeypatch, capsys):
    """The run has 3 x 7 triplets, 3 x 7 queries and 3 x 8 gallery images. Only the first run draws 3 x 16 pictures."""
    (tmp_path / "sitecustomize.py").write_text("import lavis_cir_hook\nlavis_cir_hook.install()\n")  # as installed
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--image-width", "32", "--annotations", str(annotations), "--work", str(tmp_path / "work")]
    arguments += ["--options", "run.batch_size_train=4", "run.num_workers=0"]
    full_size = script("fashioniq_full_size")
    monkeypatch.setattr(sys, "argv", [full_size.__file__, *arguments])
    full_size.main()
    table, report = capsys.readouterr().out.split("FashionIQ at full size")
    assert "trained model" in table
    assert "21 training triplets, 21 queries, 24 gallery images (NOT" in report
    assert "48 drawn, 0 already there" in report
    output = Path(report.split("output")[-1].strip())
    assert (output / "val" / "metrics.json").is_file()
    assert output.parent.parent == tmp_path / "work"


def test_check_is_timed_on_a_whole_circo(script, tmp_path, capsys):
    """The small folder that the script makes is complete for the checker."""
    from lavis_cir_plugin.commands import main

    script("check_full_size").write_circo(tmp_path, 30)
    main.main(["check", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "images   30 of 30 that are needed" in printed
    assert "val: yes" in printed
    assert "test submission: yes" in printed


def test_synthetic_triplets_are_timed(script, tmp_path, capsys):
    """The maker can use the captions that the script invents, because several share words and places."""
    from lavis_cir_plugin.commands import main

    path = tmp_path / "captions.jsonl"
    script("triplets_full_size").write_captions(path, 200, 3)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["image"] for record in records[::3]] == [f"{number:07d}.jpg" for number in range(200)]
    main.main(["triplets", str(path), "--output", str(tmp_path), "--count", "10"])
    assert "10 triplets of 10 wanted" in capsys.readouterr().out


# tscir_ladder


def test_a_finished_stage_is_not_run_again_and_a_failed_one_is(script, tmp_path):
    """The record is written last, so a failed stage has none. It names the run's folder that LAVIS logs."""
    stages, calls = script("stages"), []

    def run(command, on_line):
        calls.append(command)
        if len(calls) == 1:
            raise subprocess.CalledProcessError(3, command)
        on_line("2026-01-01 [INFO] output: /runs/20260101-1")
        return script("measure").Usage(seconds=7.0, cpu_seconds=9.0, peak_bytes=1)

    folder = tmp_path / "clip_seed0"
    with pytest.raises(SystemExit, match=": clip_seed0 ended with status 3"):
        stages.once(folder, ["train"], run)
    assert stages.once(folder, ["train"], run)["run"] == "/runs/20260101-1"
    assert stages.once(folder, ["train"], run)["seconds"] == 7.0
    assert len(calls) == 2


def test_stages_with_other_settings_or_seeds_have_folders_of_their_own(script, tmp_path):
    stage_folder = script("stages").stage_folder
    folders = {
        stage_folder(tmp_path, "clip", seed, [f"run.seed={seed}", *more]) for seed in (0, 1) for more in ([], ["a=1"])
    }
    assert len(folders) == 4
    assert stage_folder(tmp_path, "clip", 0, ["a"]) == stage_folder(tmp_path, "clip", 0, ["a"])


NAMES = ("image only", "text only", "image + text", "stage I alone", "stage I + II", "random (expected)")
LADDER = [{"circo": dict(zip(NAMES, values))} for values in ((4, 2, 9, 12, 15, 1), (6, 2, 14, 13, 14.5, 1))]


def test_the_ladder_shows_means_and_the_gain_within_a_seed(script):
    """The means are 5 and 14.75. The gains over the best other row of each seed are 15 - 12 = 3 and 14.5 - 14 = 0.5."""
    lines = script("tscir_ladder").ladder_table(LADDER, {"circo": "mAP@5"}).splitlines()
    assert lines[0].split() == ["circo", "mAP@5"]
    assert lines[1].split() == ["image", "only", "5.00", "(4.00", "-", "6.00)"]
    assert lines[5].split() == ["stage", "I", "+", "II", "14.75", "(14.50", "-", "15.00)"]
    assert lines[-1].split() == ["gain", "1.75", "(0.50", "-", "3.00)"]


def test_amounts_begin_with_stage_one_alone(script):
    """The first value is the mean of 12 and 13. The amounts follow in ascending order, in whatever order they came."""
    values = {1000: LADDER, 100: LADDER[:1]}
    lines = script("tscir_ladder").amounts_table(values, {"circo": "mAP@5"}).splitlines()
    assert lines[1].split() == ["0", "12.50", "(12.00", "-", "13.00)"]
    assert [line.split()[0] for line in lines[2:]] == ["100", "1,000"]


def test_the_ladders_pictures_are_drawn(script, tmp_path):
    ladder = script("tscir_ladder")
    ladder.draw_ladder(LADDER, {"circo": "mAP@5"}, tmp_path / "ladder.png")
    ladder.draw_amounts({100: LADDER, 1000: LADDER}, {"circo": "mAP@5"}, tmp_path / "amounts.png")
    for name in ("ladder", "amounts"):
        image = Image.open(tmp_path / f"{name}.png").convert("L")
        assert min(image.size) > 300
        assert len(set(image.getdata())) > 50
