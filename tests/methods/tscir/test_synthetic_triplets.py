"""Synthetic triplets: hand-derived results for hand-made captions, properties, determinism, files, the command."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lavis_cir_plugin.benchmarks import triplets as reader
from lavis_cir_plugin.commands import main
from lavis_cir_plugin.methods.tscir import synthetic_triplets
from lavis_cir_plugin.methods.tscir.caption_edits import caption_words, normalised_caption
from lavis_cir_plugin.methods.tscir.synthetic_triplets import (
    ClipTextFeatures,
    HashedWordFeatures,
    ImageCaptions,
    make_triplets,
    nearest,
)
from lavis_cir_plugin.methods.tscir.triplets_file import as_json_lines, read_image_captions

COLOURS, NOUNS = ("red", "blue", "orange"), ("dress", "shirt", "top")
GRID = [(colour, noun) for colour in COLOURS for noun in NOUNS]


def gathered(*captions: list[str]) -> ImageCaptions:
    """Return captions of the images 0.png, 1.png, ..., which are given as a list for each."""
    texts = [text for own in captions for text in own]
    images = [number for number, own in enumerate(captions) for _ in own]
    return ImageCaptions([f"{number}.png" for number in range(len(captions))], texts, images)


@pytest.fixture
def grid() -> ImageCaptions:
    """Return captions of nine images, one for each colour and noun."""
    return gathered(*([f"A {colour} {noun} with long sleeves."] for colour, noun in GRID))


def test_all_exact_exchanges_are_found(grid):
    """Each of 9 images has 2 others with its noun and 2 with its colour, so there are 36 exact triplets."""
    made = make_triplets(grid, count=100, similarity=0.99)
    pairs = {(triplet.edit.image, triplet.target) for triplet in made.triplets}
    differences = {(i, j): sum(a != b for a, b in zip(GRID[i], GRID[j])) for i in range(9) for j in range(9)}
    expected = {pair for pair, number in differences.items() if number == 1}
    assert pairs == expected
    assert len(made.triplets) == 36
    for triplet in made.triplets:
        assert normalised_caption(grid.texts[triplet.target_row]) == triplet.edit.edited
        assert triplet.similarity == pytest.approx(1, abs=0.01)
        reference, target = set(GRID[triplet.edit.image]), set(GRID[triplet.target])
        (old,), (new,) = reference - target, target - reference
        assert new in triplet.edit.text
        assert triplet.edit.old.endswith(old)
    assert made.tried == len(made.triplets) + sum(made.refused.values())


def test_text_says_the_exchange(grid):
    said = {triplet.edit.text for triplet in make_triplets(grid, count=100, similarity=0.99).triplets}
    colours, nouns = "(red|blue|orange)", "an? (red|blue|orange) (dress|shirt|top)"
    for text in said:
        thing = nouns if re.search("dress|shirt|top", text) else colours
        wordings = f"{thing}|{thing} (instead of|rather than) {thing}|{thing}, not {thing}"
        assert re.fullmatch(f"(is |make it )?({wordings})|change {thing} to {thing}", text), text


def test_a_target_says_the_new_and_not_the_old():
    """The other caption of the only blue dress (2) calls it red, so it is no target of a red dress."""
    captions = gathered(*([f"a {colour} {noun} here"] for colour, noun in GRID))
    blue = GRID.index(("blue", "dress"))
    captions.texts.append("a red thing there")
    captions.images.append(blue)
    made = make_triplets(captions, count=100, similarity=0.99)
    assert made.triplets
    assert not any(t.target == blue and t.edit.old == "red" for t in made.triplets)
    assert not any(t.edit.image == blue and t.edit.new == "red" for t in made.triplets)
    assert any(t.target == blue and t.edit.old == "orange" for t in made.triplets)


def test_of_equally_near_captions_the_image_counts():
    """Images 9 and 10 both have the edited caption, and only 10 also has the reference's other caption."""
    captions = gathered(
        *([f"a {colour} {noun} here"] for colour, noun in GRID if (colour, noun) != ("blue", "dress")),
        ["a blue dress here", "worn by a tall person"],
        ["a blue dress here", "hanging on the wall"],
    )
    captions.texts.insert(1, "hanging on the wall")
    captions.images.insert(1, 0)
    made = make_triplets(captions, count=100, similarity=0.99)
    targets = [t.target for t in made.triplets if t.edit.image == 0 and t.edit.new == "blue"]
    assert targets[0] == 9


def test_no_exchange_no_triplet():
    made = make_triplets(gathered(["a red dress"], ["two cats sleep"]), count=5)
    assert made.triplets == []
    assert set(made.refused) == {"no exchangeable phrase was drawn"}


def test_one_image_is_too_few():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        make_triplets(gathered(["a red dress", "a blue dress"]))


def test_a_limit_is_kept(grid):
    made = make_triplets(grid, count=7, similarity=0.99)
    assert len(made.triplets) == 7
    assert made.tried == 7 + sum(made.refused.values())


@pytest.mark.parametrize("threads", [1, 3])
def test_neither_threads_nor_faiss_change_a_byte(grid, monkeypatch, threads):
    pytest.importorskip("faiss").omp_set_num_threads(threads)
    expected = as_json_lines(grid, make_triplets(grid, count=30, similarity=0.1).triplets)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr(synthetic_triplets, "LARGEST_EXACT", 0)
    try:
        assert as_json_lines(grid, make_triplets(grid, count=30, similarity=0.1).triplets) == expected
    finally:
        torch.set_num_threads(before)
    assert as_json_lines(grid, make_triplets(grid, count=30, seed=1, similarity=0.1).triplets) != expected


WORDS = st.sampled_from([*COLOURS, *NOUNS, "a", "the", "dark", "with", "and", "belt", "dots", ","])
SETS = st.lists(
    st.lists(st.lists(WORDS, min_size=1, max_size=7).map(" ".join), min_size=1, max_size=3), min_size=2, max_size=15
)


@settings(deadline=None, max_examples=60)
@given(SETS, st.floats(0.2, 1))
def test_triplets_of_any_captions_keep_what_is_promised(own, similarity):
    captions = gathered(*own)
    made = make_triplets(captions, count=8, similarity=similarity)
    assert len({(t.edit.image, t.target) for t in made.triplets}) == len(made.triplets)
    said = [f" {' | '.join(' '.join(caption_words(text)) for text in texts)} " for texts in own]
    for triplet in made.triplets:
        edit = triplet.edit
        assert edit.image == captions.images[edit.row] != triplet.target == captions.images[triplet.target_row]
        assert triplet.similarity >= similarity - 1e-6
        assert not edit.old or f" {edit.old} " not in said[triplet.target]
        assert not edit.new or f" {edit.new} " not in said[edit.image]
        assert not edit.new or f" {edit.new} " in said[triplet.target]
    again = make_triplets(captions, count=8, similarity=similarity)
    assert as_json_lines(captions, again.triplets) == as_json_lines(captions, made.triplets)


# -- features --------------------------------------------------------------------------------------------------------


def test_hashed_words_by_hand():
    """All 3 captions have "a" (weight 1), and one has "red" and "a red" (weights 1 + ln 2)."""
    features = HashedWordFeatures(["a red", "a blue", "a"], width=4096)
    found = features(["a red", "a", "green"]).double()
    weight = 1 + np.log(2)
    assert found[0] @ found[1] == pytest.approx(1 / np.sqrt(1 + 2 * weight**2), abs=2e-3)
    assert found[:2].norm(dim=1).tolist() == pytest.approx([1, 1], abs=2e-3)
    assert not found[2].any()
    assert torch.equal(found * 2048, (found * 2048).round())


def test_captions_without_a_word_have_zeros():
    assert torch.equal(HashedWordFeatures(["", ""], width=8)(["", ""]), torch.zeros(2, 8))
    assert make_triplets(gathered([","], [","]), count=2).triplets == []


def test_hashed_words_do_not_depend_on_the_company():
    captions = [f"a {colour} {noun}" for colour, noun in GRID]
    features = HashedWordFeatures(captions)
    assert torch.equal(features(captions)[4:5], features(captions[4:5]))
    assert features([]).shape == (0, 1024)


@pytest.mark.parametrize("size", [1, 5, 300])
def test_nearest_is_that_of_sorting(size, monkeypatch):
    gallery = HashedWordFeatures(["a b", "b c"], width=8)(["a b", "b", "c", "b c"]).repeat(size, 1)
    query = gallery[:3]
    exact = query.double() @ gallery.double().T
    order = exact.sort(dim=1, descending=True, stable=True)
    monkeypatch.setattr(synthetic_triplets, "_SCORES", 2 * len(gallery))
    scores, places = nearest(query, gallery, 4)
    assert torch.equal(places, order.indices[:, :4])
    assert torch.equal(scores, order.values[:, :4])


def test_clip_compares_captions(grid):
    torch.manual_seed(0)
    features = ClipTextFeatures("small_clip", None)
    found = features(["a red dress", "a blue dress", "a red dress"])
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1, 1], abs=0.01)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert make_triplets(grid, features, count=5, similarity=-1).triplets


# -- files -----------------------------------------------------------------------------------------------------------


def test_both_kinds_of_files_say_the_same(tmp_path):
    """Captions of an image may be a list, several records, or both; a repeated caption counts once."""
    records = [
        {"image": "x/b.jpg", "caption": ["a red dress", "red"], "image_id": 3},
        {"image": "a.jpg", "caption": " a blue dress "},
        {"image": "x/b.jpg", "caption": "a red dress"},
        {"image": "x/b.jpg", "caption": "ein Kleid für dich"},
    ]
    (tmp_path / "lavis.json").write_text(json.dumps(records))
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "lines.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    expected = ImageCaptions(
        ["x/b.jpg", "a.jpg"], ["a red dress", "red", "a blue dress", "ein Kleid für dich"], [0, 0, 1, 0]
    )
    assert read_image_captions(tmp_path / "lavis.json") == expected
    assert read_image_captions(tmp_path / "lines.jsonl") == expected


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is empty; it must hold"),
        ('{"image": "a.jpg"', "line 1 is not valid JSON"),
        ('{"image": "a.jpg", "caption": ["x", ""]}', r"line 1 has caption = \["),
        ('{"image": "a.jpg"}', "line 1 has no 'caption'"),
        ('{"image": "../a.jpg", "caption": "x"}', 'line 1 has image = "../a.jpg"; it must be the path'),
        (b"\xff", r"is not UTF-8 text \(byte 0\)"),
        (None, "does not exist; name a file of captions"),
    ],
)
def test_broken_files(tmp_path, content, problem):
    path = tmp_path / "captions.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        read_image_captions(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_image_captions(tmp_path)


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path, grid) -> Path:
    """Write the grid's captions.jsonl, and its images as large squares of their colour."""
    lines = (json.dumps({"image": grid.names[n], "caption": text}) for n, text in enumerate(grid.texts))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    (tmp_path / "images").mkdir()
    for name, (colour, _) in zip(grid.names, GRID):
        Image.new("RGB", (40, 50), colour).save(tmp_path / "images" / name)
    return tmp_path


def run(world: Path, *more: str) -> None:
    main.main(["triplets", str(world / "captions.jsonl"), "--output", str(world / "made"), *more])


def test_the_command_writes_what_training_reads(world, capsys):
    run(world, "--images", str(world / "images"), "--count", "20", "--similarity", "0.99")
    printed = capsys.readouterr().out
    assert "20 triplets of 20 wanted, from 9 captions of 9 images" in printed
    keys = "datasets.triplets.build_info"
    options = f"--options {keys}.root={world / 'made'} {keys}.images={world / 'images'}"
    assert printed.splitlines()[-2:] == ["Train with these options:", options]
    triplets, paths = reader.read_train({"root": str(world / "made"), "images": str(world / "images")})
    assert len(triplets) == 20
    assert all(t.reference_caption.startswith("A ") and len(t.captions) == 1 for t in triplets)
    assert set(paths) == {name for t in triplets for name in (t.reference, t.target)}


def test_the_last_line_can_be_pasted(world, capsys):
    made, keys = world / "my folder", "datasets.triplets.build_info"
    command = ["triplets", str(world / "captions.jsonl"), "--output", str(made), "--count", "5"]
    main.main(command)
    *_, said, options = capsys.readouterr().out.splitlines()
    assert said == "Train with these options, in place of IMAGES the folder of the images:"
    assert shlex.split(options) == ["--options", f"{keys}.root={made}", f"{keys}.images=IMAGES"]
    (world / "images").rename(made / "images")
    main.main([*command, "--images", str(made / "images"), "--overwrite"])
    assert shlex.split(capsys.readouterr().out.splitlines()[-1]) == ["--options", f"{keys}.root={made}"]


def test_the_same_seed_writes_the_same_bytes(world):
    content = []
    for seed in ("5", "5", "6"):
        run(world, "--seed", seed, "--count", "20", "--overwrite")
        content.append((world / "made" / "train.jsonl").read_bytes())
    assert content[0] == content[1] != content[2]


def test_contact_sheet(world, capsys):
    """The sheet has 12 rows of red, blue and orange squares, and is equal each time."""
    sheets = [world / "sheet.png", world / "again.png"]
    for sheet in sheets:
        run(world, "--images", str(world / "images"), "--contact-sheet", str(sheet), "--overwrite")
    assert sheets[0].read_bytes() == sheets[1].read_bytes()
    colours = {colour for _, colour in Image.open(sheets[0]).convert("RGB").getcolors(2**24)}
    assert {(255, 0, 0), (0, 0, 255), (255, 165, 0)} <= colours
    assert f"{sheets[1]}" in capsys.readouterr().out


def test_a_missing_picture_leaves_nothing(world):
    for path in (world / "images").iterdir():
        path.unlink()
    with pytest.raises(SystemExit, match=r"lavis-cir: .*\.png does not exist"):
        run(world, "--images", str(world / "images"), "--contact-sheet", str(world / "sheet.png"))
    assert not (world / "sheet.png").exists()
    assert not (world / "made" / "train.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--count", "0"], "--count must be a whole number >= 1, got 0"),
        (["--similarity", "1.5"], r"--similarity must lie in \[-1, 1\], got 1.5"),
        (["--similarity", "nan"], r"--similarity must lie in \[-1, 1\], got nan"),
        (["--pretrained", "openai"], "need each other"),
        (["--clip-model", "ViT-B-32"], "need each other"),
        (["--contact-sheet", "x.png"], "--contact-sheet needs --images"),
        (["--images", "nowhere"], "--images nowhere is no folder"),
        (["--images", ".", "--contact-sheet", "x.jpg"], "x.jpg: the picture is a PNG"),
    ],
)
def test_impossible_options(world, options, problem):
    with pytest.raises(SystemExit, match=problem):
        run(world, *options)


def test_an_older_file_is_kept(world):
    (world / "made").mkdir()
    (world / "made" / "train.jsonl").write_text("mine")
    with pytest.raises(SystemExit, match=r"train.jsonl exists; choose another --output, or give --overwrite"):
        run(world)
    assert (world / "made" / "train.jsonl").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_refused_before_triplets_are_made(world, monkeypatch):
    """With CLIP and a hundred thousand captions, making them takes hours."""
    monkeypatch.setattr(synthetic_triplets, "make_triplets", lambda *_: pytest.fail("triplets were made"))
    (world / "made").touch()
    with pytest.raises(SystemExit, match=r"train\.jsonl could not be written: Not a directory; free some space"):
        run(world)
    (world / "made").unlink()
    (world / "sheet.png").mkdir()
    with pytest.raises(SystemExit, match=r"sheet\.png could not be written: Is a directory; free some space"):
        run(world, "--images", str(world / "images"), "--contact-sheet", str(world / "sheet.png"))
    assert not (world / "made").exists()


def test_the_captions_are_not_replaced_by_triplets(world):
    captions = (world / "captions.jsonl").rename(world / "train.jsonl")
    before = captions.read_bytes()
    with pytest.raises(SystemExit, match=r"train\.jsonl is the file of captions itself, which would be lost; take"):
        main.main(["triplets", str(captions), "--output", str(world), "--overwrite"])
    assert captions.read_bytes() == before


def test_captions_that_share_nothing(world, capsys):
    (world / "captions.jsonl").write_text(
        '{"image": "a.jpg", "caption": "a red dress"}\n{"image": "b.jpg", "caption": "two cats"}\n'
    )
    with pytest.raises(SystemExit, match=r"no triplet was made of .*captions.jsonl: give more captions"):
        run(world)
    assert "0 triplets of 10,000 wanted" in capsys.readouterr().out
    assert not (world / "made" / "train.jsonl").exists()


def test_a_full_disk_is_named(world, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        SystemExit, match=r"train\.jsonl could not be written: No space left on device; free some space"
    ):
        run(world)
    monkeypatch.undo()
    assert list((world / "made").iterdir()) == []
