"""The scripts about search in benchmarks/, in small: the figures' steps, their verdict, and the demo."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from PIL import Image
from search_world import make_encoder


@pytest.fixture
def script(monkeypatch):
    """Return a function that imports a script by its name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


def test_the_steps_of_the_figures_run_in_small(script, tmp_path, monkeypatch):
    figures = script("search_full_size")
    monkeypatch.setattr(figures, "SAME", 20)
    monkeypatch.setattr(figures, "OTHERS", 600)
    build, add, search, same = (figures.run_here(step, tmp_path, "700x2", "always") for step in figures.STEPS)
    assert build["disk"] > 700 * 2 * 256 * 3  # features of two bytes a number and candidates of one
    assert add["seconds"] > 0
    assert search["has_candidates"]
    assert 0.9 <= search["recall"] <= 1
    assert min(search[name] for name in ("open", "exact", "warm", "filtered")) > 0
    assert same["found"] == 20


@pytest.mark.parametrize(("warm", "missed"), [(0.09, 0), (0.11, 1)])
def test_a_missed_aim_is_said(script, capsys, warm, missed):
    """Of the first shape alone: 0.11 s are more than a tenth of 1 s."""
    figures = script("search_full_size")
    search = {"exact": 1.0, "warm": warm, "filtered": 0.01, "first": 1.0, "open": 0.1, "recall": 1.0}
    results = {
        "build": {"seconds": 100.0, "disk": 1e9, "peak_bytes": 2**30},
        "add": {"seconds": 1.0},
        "search": {**search, "anon_bytes": 2**29, "has_candidates": True},
        "same": {"found": 2000},
    }
    assert figures.report(figures.SHAPES[0], results) == missed
    assert capsys.readouterr().out.count("MISSED") == missed
    assert figures.report(figures.SHAPES[1], results) == 0


def test_the_demo_draws_indexes_and_shows_and_does_nothing_twice(script, tmp_path, capsys):
    demo = script("search_demo")
    encoder = make_encoder()
    sheet = demo.show(tmp_path, encoder, 12)
    assert capsys.readouterr().out.startswith("12 pictures, 12 encoded in ")
    assert Image.open(sheet).width > 1000
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()}
    demo.show(tmp_path, encoder, 12)
    assert encoder.encoded == 12
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()} == before


def test_the_demo_asks_for_a_run(script, tmp_path, monkeypatch):
    demo = script("search_demo")
    monkeypatch.setattr(demo, "RUNS", tmp_path)
    with pytest.raises(SystemExit, match="holds no finished run; start make demo first, or name a run by --run"):
        demo.newest_run()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint_best.pth").touch()
    assert demo.newest_run().parent == tmp_path
