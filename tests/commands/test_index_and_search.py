"""``lavis-cir index`` and ``search``: from a folder and a run to answers, as a user types it."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import SMALL, make_scoring_model
from PIL import Image
from search_world import draw_some

from lavis_cir_plugin import load_run
from lavis_cir_plugin.commands import main
from lavis_cir_plugin.search import open_index


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder of a run as a runner leaves it."""
    folder = tmp_path_factory.mktemp("run")
    section = {**SMALL, "arch": "blip2_cir", "model_type": "tiny"}
    config = {"model": section, "run": {"seed": 42}, "datasets": {}}
    torch.save({"model": make_scoring_model("joint").state_dict(), "config": config}, folder / "checkpoint_best.pth")
    return folder


@pytest.fixture(scope="module")
def world(run, tmp_path_factory):
    """Return pictures and an index of them, made by the command."""
    folder = tmp_path_factory.mktemp("world")
    paths = draw_some(folder / "p", 8)
    (folder / "p" / "notes.txt").touch()
    rows = [f"{path.name},{number}" for number, path in enumerate(paths)]
    (folder / "m.csv").write_text("\n".join(["path,price", *rows]))
    lavis_cir("index", folder / "p", "--out", folder / "i", "--model", run, "--metadata", folder / "m.csv")
    return paths, folder / "i"


def lavis_cir(*arguments):
    main.main([str(argument) for argument in arguments])


def test_an_index_says_what_it_did_and_counts_what_it_left_out(run, tmp_path, capsys):
    draw_some(tmp_path / "p", 3)
    (tmp_path / "p" / "a.txt").touch()
    (tmp_path / "p" / "b.txt").touch()
    (tmp_path / "p" / "c.png").touch()
    lavis_cir("index", tmp_path / "p", "--out", tmp_path / "i", "--model", run)
    printed, progress = capsys.readouterr()
    assert "3 pictures. Encoded 3, read 4, forgot 0, in" in printed
    assert f"3 files are not indexed (all of them: {tmp_path / 'i' / 'not_indexed.tsv'}):" in printed
    assert "2  its suffix '.txt' is none of .jpg" in printed
    assert f"1  the file is empty (first: {tmp_path / 'p' / 'c.png'})" in printed
    assert "indexing" in progress
    assert "pictures/s" in progress
    lavis_cir("index", "--out", tmp_path / "i")  # it knows its folders and its model
    assert "3 pictures. Encoded 0" in capsys.readouterr().out


def test_the_ways_to_print_an_answer_agree(world, capsys):
    paths, index = world
    question = ("search", index, "--image", paths[2], "--text", "is red", "--where", "price < 6", "-k", 3)
    lavis_cir(*question, "--json")
    found = json.loads(capsys.readouterr().out)
    assert len(found["hits"]) == 3
    assert all(hit["columns"]["price"] < 6 for hit in found["hits"])
    names = [hit["path"] for hit in found["hits"]]
    lavis_cir(*question, "--paths")
    assert capsys.readouterr().out.splitlines() == names
    lavis_cir(*question)
    table, notes = capsys.readouterr()
    assert [line.split()[-1] for line in table.splitlines()[1:]] == names
    assert [float(line.split()[0]) for line in table.splitlines()[1:]] == [
        pytest.approx(hit["score"], abs=6e-5) for hit in found["hits"]
    ]
    assert "score: cosine of query and picture" in notes
    assert "The reference itself is left out" in notes


def test_three_lines_of_python_answer_as_the_command_does(world, run, capsys):
    paths, index = world
    opened = open_index(index, load_run(run))
    answer = opened.search(paths[2], "is red", k=3)
    lavis_cir("search", index, "--image", paths[2], "--text", "is red", "-k", 3, "--paths")
    assert capsys.readouterr().out.splitlines() == [hit.path for hit in answer.hits]


def test_a_sheet_shows_reference_and_results(world, tmp_path, capsys):
    paths, index = world
    lavis_cir("search", index, "--image", paths[2], "--text", "is red", "-k", 3, "--sheet", tmp_path / "out.png")
    shown = capsys.readouterr().out.splitlines()[1:]
    sheet = Image.open(tmp_path / "out.png")
    colours = set(sheet.getdata())
    for path in [paths[2], *(line.split()[-1] for line in shown)]:
        corner = Image.open(path).getpixel((16, 16))
        assert min(max(abs(a - b) for a, b in zip(corner, colour)) for colour in colours) <= 2, path


def test_a_sheet_says_that_a_file_is_gone_or_nothing_was_found(run, tmp_path, capsys):
    paths = draw_some(tmp_path / "p", 3)
    lavis_cir("index", tmp_path / "p", "--out", tmp_path / "i", "--model", run)
    paths[1].unlink()
    question = ("search", tmp_path / "i", "--text", "red", "--sheet", tmp_path / "out.png", "--where")
    lavis_cir(*question, "file_name = '001.png'")
    gone = Image.open(tmp_path / "out.png")
    assert gone.convert("HSV").getextrema()[1] == (0, 0)  # black, grey and white: no picture is in it
    lavis_cir(*question, "file_id < 0")
    assert "nothing found" in capsys.readouterr().out
    assert Image.open(tmp_path / "out.png").height < gone.height


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "INDEX"], "there is nothing to look for"),
        (["search", "INDEX", "--text", "x", "--where", "prise < 1"], "did you mean 'price'?"),
        (["search", "INDEX", "--image", "nowhere.png"], "nowhere.png does not exist; name a picture"),
        (["search", "nowhere", "--text", "x"], "is no index"),
        (["search", "INDEX", "--text", "x", "--sheet", "out.jpg"], "--sheet out.jpg: the picture is a PNG"),
        (["search", "INDEX", "--text", "x", "--device", "cuda"], "torch sees no GPU; use cpu"),
        (["index", "PICTURES", "--out", "new"], "new is a new index, so --model is needed"),
        (["index", "PICTURES", "--out", "INDEX", "--batch", "0"], "--batch must be a whole number >= 1, got 0"),
        (["index", "nowhere", "--out", "INDEX"], "nowhere does not exist; name a folder of pictures"),
        (["index", "PICTURES", "--out", "new", "--model", "nowhere"], "model 'nowhere' is no file or folder"),
        (["index", "PICTURES", "--out", "new", "--model", "ViT-B-23:openai"], "is no model of open_clip; did you mean"),
        (["index", "PICTURES", "--out", "new", "--model", "small_clip:"], "names no weights"),
        (["index", "PICTURES", "--out", "new", "--model", "blip2:pretrian"], "did you mean 'pretrain'?"),
        (["index", "PICTURES", "--out", "new", "--model", "blip2:coco:no.pth"], "no.pth does not exist; name a file"),
    ],
)
def test_a_mistake_ends_with_one_sentence(world, arguments, message, monkeypatch, tmp_path):
    paths, index = world
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    replaced = {"INDEX": index, "PICTURES": paths[0].parent}
    with pytest.raises(SystemExit) as stopped:
        lavis_cir(*(replaced.get(argument, argument) for argument in arguments))
    assert message in str(stopped.value)
    assert str(stopped.value).startswith("lavis-cir: ")
    assert "\n" not in str(stopped.value)


def test_a_model_of_open_clip_needs_its_weights_alone(tmp_path, capsys):
    clip = make_scoring_model("clip")
    torch.save(clip.state_dict(), tmp_path / "clip.pth")
    paths = draw_some(tmp_path / "p", 4)
    lavis_cir("index", tmp_path / "p", "--out", tmp_path / "i", "--model", f"small_clip:{tmp_path / 'clip.pth'}")
    lavis_cir("search", tmp_path / "i", "--image", paths[0], "--text", "is red", "--paths")
    assert set(capsys.readouterr().out.splitlines()[-3:]) == {str(path) for path in paths[1:]}


def test_every_byte_of_an_index_is_verified(world, capsys):
    lavis_cir("index", "--out", world[1], "--verify")
    assert "all 4 files of 8 pictures are as they were written" in capsys.readouterr().out


def test_a_reader_that_has_read_enough_is_no_error(world, monkeypatch):
    """``lavis-cir search ... --paths | head -1``."""
    paths, out = world
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        with pytest.raises(SystemExit) as end:
            lavis_cir("search", out, "--image", paths[0], "--paths")
        monkeypatch.undo()
    assert end.value.code == 141
