"""Attention to tokens equals attention to their keys and values, in values and in gradients, for fewer products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch.utils.flop_counter import FlopCounterMode

from lavis_cir_plugin.methods.blip2_cir.attention import Projection, attend, attend_to_tokens

BATCH, QUERIES, TOKENS, WIDTH, HEADS, HIDDEN = 2, 3, 9, 7, 2, 8  # few queries, so that the tokens are not projected


def inputs(*sizes):
    """Return queries, tokens, and weight and bias of keys and of values, of which all but the tokens are trained."""
    batch, queries, tokens, width, hidden = sizes or (BATCH, QUERIES, TOKENS, WIDTH, HIDDEN)
    generator = torch.Generator().manual_seed(2)
    shapes = [(batch, queries, hidden), (batch, tokens, width), *[(hidden, width), (hidden,)] * 2]
    drawn = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.requires_grad_(place != 1) for place, tensor in enumerate(drawn)]


def to_tokens(queries, tokens, key, key_bias, value, value_bias, dropout=0.0, heads=HEADS):
    return attend_to_tokens(queries, tokens, Projection(key, key_bias), Projection(value, value_bias), heads, dropout)


def to_projected(queries, tokens, key, key_bias, value, value_bias, heads=HEADS):
    return attend(queries, F.linear(tokens, key, key_bias), F.linear(tokens, value, value_bias), heads)


def test_attention_equals_a_loop_over_plain_numbers():
    """One image, one query in each of two heads of width 1, two positions, then the second of them hidden."""
    queries, keys = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[0.0, 1.0], [3.0, -1.0]]])
    values = torch.tensor([[[10.0, 20.0], [30.0, 40.0]]])
    # The first head's scores are 0 and 3, the second's 2 and -2; these are the weights of the first position.
    first, second = 1 / (1 + torch.tensor(3.0).exp()), 1 / (1 + torch.tensor(-4.0).exp())
    expected = [10 * first + 30 * (1 - first), 20 * second + 40 * (1 - second)]
    torch.testing.assert_close(attend(queries, keys, values, 2), torch.stack(expected)[None, None])
    hidden = torch.tensor([True, False])[None, None, None]
    torch.testing.assert_close(attend(queries, keys, values, 2, hidden), torch.tensor([[[10.0, 20.0]]]))


def test_attention_to_tokens_equals_that_to_their_projections_with_all_gradients():
    own = inputs()
    trained = [tensor for tensor in own if tensor.requires_grad]
    ours, expected = to_tokens(*own), to_projected(*own)
    torch.testing.assert_close(ours, expected)
    for found, other in zip(*(torch.autograd.grad(out.square().sum(), trained) for out in (ours, expected))):
        torch.testing.assert_close(found, other)


@pytest.mark.parametrize("dropout", [0.0, 0.4, 1.0])
def test_the_gradient_equals_finite_differences(dropout):
    def seeded(*own):
        torch.manual_seed(1)
        return to_tokens(*own, dropout)

    assert torch.autograd.gradcheck(seeded, inputs())


def test_dropout_drops_weights_of_the_attention_and_enlarges_the_others():
    """With values of one, each query reads the sum of the weights that are left: a multiple of 1/(1-p)."""
    queries, tokens, key, key_bias, value, _ = inputs()
    same = [torch.zeros_like(key), key_bias, torch.zeros_like(value), torch.ones(HIDDEN, dtype=torch.float64)]
    torch.manual_seed(0)
    counts = to_tokens(queries, tokens, *same, 0.5) * TOKENS / 2
    torch.testing.assert_close(counts, counts.round())
    assert len(counts.unique()) > 1
    assert not to_tokens(queries, tokens, *same, 1.0).any()


def test_half_precision_of_the_tokens_is_what_is_multiplied():
    own = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in inputs()]
    trained = [tensor for tensor in own if tensor.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        output = to_tokens(own[0], own[1].bfloat16(), *own[2:])
    assert output.dtype == torch.bfloat16
    expected = to_projected(*own)
    torch.testing.assert_close(output.float(), expected, atol=0.05, rtol=0.05)
    found, others = (torch.autograd.grad(out.float().square().sum(), trained) for out in (output, expected))
    assert {gradient.dtype for gradient in found} == {torch.float32}
    for gradient, other in zip(found, others):
        torch.testing.assert_close(gradient, other, atol=0.05 * float(other.abs().max()) + 0.01, rtol=0.05)


@pytest.mark.parametrize(("queries", "most"), [(8, 0.7), (24, 1.0)])
def test_never_more_products_than_with_keys_and_values(queries, most):
    """12 heads, and BLIP-2's 257 tokens of width 1024, H = 768 and 32 queries, or three times as many, divided by 4."""
    own, counts = inputs(1, queries, 65, 256, 192), []
    for function in (to_tokens, to_projected):
        with FlopCounterMode(display=False) as counter:
            function(*own, heads=12).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] <= most * counts[1]
