"""Sheets of answers: a picture stands there only if it is the one that was scored."""

from __future__ import annotations

import os

import pytest
from PIL import Image
from search_world import draw_some, index, make_encoder

from lavis_cir_plugin.report.sheet_layout import Picture, Words
from lavis_cir_plugin.search import open_index, sheet


@pytest.mark.parametrize("happens", [os.remove, lambda path: Image.new("RGB", (40, 40), "red").save(path)])
def test_a_file_that_is_not_the_scored_picture_any_more_is_not_shown(tmp_path, happens):
    draw_some(tmp_path / "p", 3)
    encoder = make_encoder()
    index(tmp_path / "p", tmp_path / "i", encoder)
    first, second, _ = open_index(tmp_path / "i", encoder).search(text="is red", k=3, fold=False).hits
    happens(first.path)
    cell, kept = sheet._result(first, 1), sheet._result(second, 2)
    assert isinstance(cell, Words)
    assert cell.text == "the file is gone or has changed"
    assert isinstance(kept, Picture)
    assert kept.image.size == (second.picture.width, second.picture.height)
