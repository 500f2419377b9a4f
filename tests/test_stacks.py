"""Every stack computes what LAVIS's own pins compute: losses, gradients, captions, checkpoints, and what is tied."""

from __future__ import annotations

import json
import math

import pytest
import stack_numbers
import torch

EXPECTED = json.loads(stack_numbers.FILE.read_text())


def test_the_file_has_every_model():
    assert set(EXPECTED) == set(stack_numbers.MODELS)


@pytest.mark.parametrize("name", stack_numbers.MODELS)
def test_numbers_are_those_of_lavis_own_pins(name):
    expected, measured = EXPECTED[name], stack_numbers.measure(name)
    assert measured["tied"] == expected["tied"]
    assert measured["keys"] == expected["keys"]
    assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    # A bias of keys has no gradient but for rounding.
    assert measured["gradients"] == pytest.approx(expected["gradients"], rel=1e-4, abs=1e-6)
    assert measured["said"] == expected["said"]
