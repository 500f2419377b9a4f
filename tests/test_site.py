"""The pages of docs/ as a site: it builds without a warning, asks no other host for anything, and loses no formula."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml")),
        reason="the extra docs is not installed",
    ),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "docs"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Loads(HTMLParser):
    """Collects the addresses that a browser asks for when it shows a page; a link waits for a click."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        loaded = [values.get("src"), values.get("srcset"), values.get("poster"), values.get("data")]
        if tag == "link" and not {"canonical", "next", "prev"} & set((values.get("rel") or "").split()):
            loaded.append(values.get("href"))
        self.addresses += [address for address in loaded if address]


def loads(page: str) -> list[str]:
    parser = Loads()
    parser.feed(page)
    return parser.addresses


def foreign(addresses: list[str]) -> list[str]:
    return [address for address in addresses if re.match(r"(?:[a-z]+:)?//", address)]


def test_a_load_from_another_host_is_seen():
    page = '<a href="https://a/"></a><link rel="icon" href="x.png"><img src="//b/x.png"><link rel="preconnect" href="https://c">'
    assert foreign(loads(page)) == ["//b/x.png", "https://c"]


def test_no_page_asks_another_host_for_anything(site):
    pages = list(site.rglob("*.html"))
    assert {page.stem for page in pages} >= {page.stem for page in PAGES}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert loads(text)
        assert foreign(loads(text)) == [], page
        # The theme's script loads this from elsewhere where a page has a diagram.
        assert 'class="mermaid"' not in text
        # And it asks GitHub for a repository's stars where a page names one.
        assert 'data-md-component="source"' not in text
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"(?:@import\s+|url\()[\"']?(?:https?:)?//[^\"')]*", styles) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "api"], ids=lambda page: page.stem)
def test_every_formula_is_drawn(site, page):
    text = page.read_text(encoding="utf-8")
    written = len(re.findall(r"^```math$", text, re.MULTILINE)) + len(re.findall(r"\$`[^`]+`\$", text))
    built = (site / f"{page.stem}.html").read_text(encoding="utf-8")
    assert built.count("<math ") == written
    assert "$<code>" not in built


def test_the_reference_has_the_docstrings(site):
    built = (site / "api.html").read_text(encoding="utf-8")
    for name in ("training.run_loading.load_run", "search.engine.open_index", "ranking.metrics.recall_at"):
        assert f'id="lavis_cir_plugin.{name}"' in built
    assert re.findall(r":func:|:math:|\.\. math::|={9}", built) == []
    losses = built.partition('id="lavis_cir_plugin.methods.retrieval_dpo.losses.preference_losses"')[2]
    assert re.search(r"<td><code>sdpo</code></td>\s*<td>.*<math", losses)
