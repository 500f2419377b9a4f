"""The page in a browser, where there is one: it draws its samples and answers the question that its address holds."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from search_world import draw_some, index

from lavis_cir_plugin import serving
from lavis_cir_plugin.search import open_index
from lavis_cir_plugin.search.filters import Column, parse

pytest_plugins = ["serving_world"]
SCRIPT = Path(serving.__file__).parent / "static" / "app.js"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")


@pytest.fixture
def browsed(tmp_path):
    """Return what an address looks like once its script has run, as HTML."""

    def browse(address):
        words = [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--timeout=20000", "--virtual-time-budget=20000", "--dump-dom", address,
        ]  # fmt: skip
        return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout

    return browse


@pytest.fixture
def other(tmp_path, world):
    """An index without own columns; the file of its only picture is gone."""
    (picture,) = draw_some(tmp_path / "p", 1, start=90)
    index(tmp_path / "p", tmp_path / "i", world.encoder)
    picture.unlink()
    return open_index(tmp_path / "i", world.encoder)


@pytest.fixture
def drawn(running, browsed):
    """Return what the server's page of an address looks like."""
    place = running()
    return lambda address: browsed(f"http://{place.host}:{place.port}/{address}")


def test_the_page_begins_with_pictures_of_the_index(drawn):
    page = drawn("")
    assert page.count("as reference") == 12
    assert "/indexes/toys/pictures/" in page
    assert 'class="trouble"' not in page


def test_the_question_of_an_address_is_asked_and_answered(drawn, world):
    page = drawn("#text=is+red&where=price+%3C+6")
    hits = world.index.search(text="is red", k=24, where="price < 6").hits
    assert re.findall(r'data-id="(\d+)"', page) == [str(hit.picture.id) for hit in hits]
    assert f"{hits[0].score:.3f}" in page
    assert "6 different pictures searched" in page


def test_a_condition_that_cannot_be_read_is_said_on_the_page(drawn):
    page = drawn("#text=a&where=prize+%3C+6")
    assert "The condition names 'prize', which is no column of this index" in page
    assert 'aria-invalid="true"' in page


def test_of_two_indexes_the_one_that_refuses_a_condition_is_named(running, browsed, other):
    place = running(other=other)
    page = browsed(f"http://{place.host}:{place.port}/#index=toys&with=other&text=a&where=price+%3C+6")
    assert "other: The condition names 'price', which is no column of this index" in page


def test_a_picture_whose_file_is_gone_says_so_to_those_who_cannot_see_it(running, browsed, other):
    place = running(other=other)
    page = browsed(f"http://{place.host}:{place.port}/#index=other&text=a")
    (label,) = re.findall(r'data-id="\d+" aria-label="(.*?)"', page)
    assert re.fullmatch(r"1: 090\.png, score -?0\.\d+; The picture cannot be shown; .*", label)


COLUMNS = {"price": Column("p", True), "brand": Column("b", False)}


def test_a_condition_is_added_to_the_whole_of_what_is_there(browsed, tmp_path):
    """The page's own function runs in a page of the test's."""
    (both,) = re.findall(r"^const both = .*$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    before = ["price < 5", "price < 5 or brand = 'x'", "price = 1 OR price = 2 and brand = 'y'", "brand = 'a or b'"]
    asked = f"document.title = JSON.stringify({json.dumps(before)}.map((text) => both(text, 'price > 1')))"
    (tmp_path / "page.html").write_text(f"<title></title><script>{both}\n{asked}</script>", encoding="utf-8")
    (title,) = re.findall("<title>(.*?)</title>", browsed((tmp_path / "page.html").as_uri()))
    added = json.loads(html.unescape(title))
    assert added[0] == "price < 5 and price > 1"
    for text, found in zip(before, added):
        whole, expected = parse(found, COLUMNS), parse(f"({text}) and (price > 1)", COLUMNS)
        assert (whole.sql, whole.values) == (expected.sql, expected.values)


def test_what_an_address_holds_is_shown_as_text(drawn):
    page = drawn("#text=%3Cimg+src%3Dx+onerror%3Dalert(1)%3E&ref=[[%22toys%22,1,%22%3Cb%3Ex%22]]")
    assert "<img src=x" not in page
    assert "&lt;b&gt;x</span>" in page


def test_the_page_of_the_api_names_every_request_and_field(drawn):
    page = drawn("docs")
    for word in ("/api/v1/indexes/{index}/search", "picture_id", "image_weight", "min_score", "HitInfo", "share_below"):
        assert word in page
