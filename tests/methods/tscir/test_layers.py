"""TSCIR's trained layers: published sizes, equations worked by hand, and the positions that an injection changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lavis_cir_plugin.core.model_parts import keep_as_buffers
from lavis_cir_plugin.methods.tscir.layers import ComposingAdapter, GatheredBatchNorm2d, MappingNetwork, VisualInjection


def count(module):
    return sum(weight.numel() for weight in module.parameters())


def test_sizes_are_the_published_ones_of_vit_l_14():
    assert count(MappingNetwork(768, 768)) == 1_640_960
    assert count(VisualInjection(768, 768)) == 6_543_104
    assert 6 * count(ComposingAdapter(768, 128)) == 1_179_648
    assert count(MappingNetwork(768, 768, with_patches=False)) == 1_050_368  # Pic2Word's


@pytest.fixture
def injection():
    torch.manual_seed(0)
    module = VisualInjection(word_width=6, patch_width=4, width=8, heads=2).eval()
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.5)
    return module


def inputs():
    torch.manual_seed(1)
    return torch.randn(3, 5, 6), torch.tensor([1, 2, 1]), torch.tensor([4, 4, 3]), torch.randn(3, 9, 4)


def naive_addition(module, word, end, patches):
    """Compute A for one sentence by the equations from the module's weights; 3 x 3 patches, 2 heads of width 4."""
    state = module.state_dict()

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def two(x, name):
        return linear(linear(x, f"{name}.0").relu(), f"{name}.2")

    grid = torch.zeros(5, 5, 4)  # padded by one
    grid[1:4, 1:4] = patches.reshape(3, 3, 4)
    rows = []
    for y in range(3):
        for x in range(3):
            value = torch.einsum("hwi,oihw->o", grid[y : y + 3, x : x + 3], state["conv.weight"])
            value = (value - state["norm.running_mean"]) / torch.sqrt(state["norm.running_var"] + 1e-5)
            rows.append((value * state["norm.weight"] + state["norm.bias"]).relu())
    keys = two(torch.stack(rows), "from_patches")
    query = two(word, "from_word") + two(end, "from_end")
    for layer in range(2):
        name = f"layers.{layer}"
        packed, bias = state[f"{name}.attention.in_proj_weight"], state[f"{name}.attention.in_proj_bias"]
        q, k, v = (x @ packed[i * 8 : i * 8 + 8].T + bias[i * 8 : i * 8 + 8] for i, x in enumerate((query, keys, keys)))
        heads = [(q[s] @ k[:, s].T / 2).softmax(0) for s in (slice(0, 4), slice(4, 8))]
        mixed = torch.cat([weights @ v[:, s] for weights, s in zip(heads, (slice(0, 4), slice(4, 8)))])
        found = linear(mixed, f"{name}.attention.out_proj")
        x = query + linear(nn.functional.gelu(linear(found, f"{name}.feed_forward.0")), f"{name}.feed_forward.2")
        query = (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-5)
        query = query * state[f"{name}.norm.weight"] + state[f"{name}.norm.bias"]
    return two(query, "to_word").relu(), torch.stack(heads).mean(0)


def test_injection_equals_the_equations(injection):
    hidden, place, read, patches = inputs()
    with torch.no_grad():
        changed, weights = injection(hidden, place, read, patches)
    for row in range(3):
        added, looked = naive_addition(injection, hidden[row, place[row]], hidden[row, read[row]], patches[row])
        torch.testing.assert_close(changed[row, place[row]], hidden[row, place[row]] + added, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights[row], looked, atol=1e-5, rtol=1e-4)


def test_injection_touches_the_pseudo_word_alone(injection):
    hidden, place, read, patches = inputs()
    before = hidden.clone()
    changed, weights = injection(hidden, place, read, patches)
    assert torch.equal(hidden, before), "not in place"
    is_same = (changed == hidden).all(dim=2)
    assert is_same.sum(dim=1).tolist() == [4, 4, 4]
    assert not is_same[torch.arange(3), place].any()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))


def test_an_adapter_adds_x_a_b():
    adapter = ComposingAdapter(2, 1)
    with torch.no_grad():
        adapter.down.copy_(torch.tensor([[1.0], [2.0]]))
        adapter.up.copy_(torch.tensor([[3.0, 0.5]]))
    # x A = 5 and 2, times B = (15, 2.5) and (6, 1).
    assert adapter(torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])).tolist() == [[[16.0, 4.5], [6.0, 2.0]]]


def test_a_fresh_adapter_hardly_changes_anything():
    torch.manual_seed(0)
    hidden = torch.randn(2, 3, 64)
    assert float((ComposingAdapter(64, 16)(hidden) - hidden).norm() / hidden.norm()) < 0.02


def test_batch_norm_is_torchs_in_one_process():
    torch.manual_seed(0)
    ours, stock = GatheredBatchNorm2d(4), nn.BatchNorm2d(4)
    values = torch.randn(3, 4, 2, 2)
    assert torch.equal(ours(values), stock(values))
    assert torch.equal(ours.running_var, stock.running_var)
    assert torch.equal(ours.eval()(values), stock.eval()(values))


def test_weights_kept_as_buffers_are_in_the_state_and_no_parameters(injection):
    hidden, place, read, patches = inputs()
    frozen = keep_as_buffers(copy.deepcopy(injection))
    assert list(frozen.parameters()) == []
    assert frozen.state_dict().keys() == injection.state_dict().keys()
    torch.testing.assert_close(frozen(hidden, place, read, patches)[0], injection(hidden, place, read, patches)[0])
    assert not frozen(hidden, place, read, patches)[0].requires_grad
