"""benchmarks/serve_load.py in small: what it asks is answered as it expects, and its verdict is that of its numbers."""

from __future__ import annotations

import importlib
import os
import random
from pathlib import Path

import pytest
import requests

pytest_plugins = ["serving_world"]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("serve_load")


def test_every_kind_of_request_is_answered_as_it_should_be(script, running, world):
    place = running()
    kinds = script.requests_of(f"http://{place.host}:{place.port}", random.Random(0), world.paths)
    assert len(kinds) == 10
    with requests.Session() as session:
        for name, (_, ask, expected) in kinds.items():
            assert (name, ask(session)) == (name, expected)


def test_growth_is_that_of_the_last_fifth_beside_the_second(script):
    """Of ten seconds the second fifth is 10 and 30, the last 22 and 22: 22 / 20 is a tenth more."""
    assert script.growth([900, 900, 10, 30, 5, 5, 5, 5, 22, 22]) == pytest.approx(0.1)
    assert script.growth([7.0]) == 0


def test_the_report_counts_what_was_wrong_and_what_had_to_wait(script):
    load = script.Load(memory=[100.0] * 10)
    load.seconds["file"] += [0.1, 0.2, 0.3]
    load.statuses.update({("file", 200): 2, ("file", 503): 1})
    load.wrong["file: 500 in place of 200"] += 2
    lines = script.report(load)
    assert lines[1].split() == ["file", "3", "200", "ms", "200", "ms", "300", "ms", "1"]
    assert "3 requests in all, 2 wrong" in lines
    assert "  2 x file: 500 in place of 200" in lines
    assert lines[-1].endswith("+0.0 %")


def test_the_memory_of_a_process_is_read(script):
    assert script.memory_of(os.getpid()) > 10
