"""QuickGELU of frozen towers: the equation, one result per number wherever it stands, and who has which class."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import LAVIS_VIT_L, make_scoring_model
from lavis.models import clip_vit
from torch import nn

from lavis_cir_plugin.models.quick_gelu import QuickGelu, replace_quick_gelu


def test_it_is_the_equation_also_where_the_power_overflows():
    x = [-200.0, -60.0, -1.0, 0.0, 0.5, 3.0, 200.0, math.inf]
    expected = [-0.0, *(value / (1 + math.exp(-1.702 * value)) for value in x[1:-1]), math.inf]
    torch.testing.assert_close(QuickGelu()(torch.tensor(x)), torch.tensor(expected))


def test_its_argument_stays_and_a_gradient_is_that_of_lavis():
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    kept = x.clone()
    expected = clip_vit.QuickGELU()(x)
    torch.testing.assert_close(QuickGelu()(x), expected)
    assert torch.equal(x, kept)
    gradients = []
    for gelu in (QuickGelu(), clip_vit.QuickGELU()):
        own = x.clone().requires_grad_()
        gelu(own).square().sum().backward()
        gradients.append(own.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_small_results(dtype):
    """The power of 7 overflows in half precision, the result does not."""
    assert torch.equal(
        QuickGelu()(torch.tensor([-7.0], dtype=dtype)), clip_vit.QuickGELU()(torch.tensor([-7.0], dtype=dtype))
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_equal_numbers_have_equal_results_wherever_they_stand(threads, set_threads):
    set_threads(threads)
    values = torch.linspace(-6, 6, 200)
    for value, row in zip(values, QuickGelu()(values[:, None].expand(-1, 1009).contiguous())):
        assert len(row.unique()) == 1, value


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("frozen tower", LAVIS_VIT_L),
        ("clip", {"clip_model": "ViT-B-32-quickgelu", "freeze_text": True}),
    ],
)
def test_frozen_towers_have_it_and_trained_ones_keep_their_own(name, changes):
    for is_frozen in (True, False):
        model = make_scoring_model(name, **changes, freeze_vit=is_frozen)
        kinds = {type(part) for part in model.image_tower.modules() if "gelu" in type(part).__name__.lower()}
        assert kinds == {QuickGelu} if is_frozen else QuickGelu not in kinds


def test_other_activations_stay():
    tower = nn.Sequential(nn.GELU(), clip_vit.QuickGELU())
    replace_quick_gelu(tower)
    assert [type(part) for part in tower] == [nn.GELU, QuickGelu]
