"""The packed Q-Former equals LAVIS's own encoder on each kind of sequences, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.Qformer import BertConfig, BertModel
from torch import nn

from lavis_cir_plugin.methods.blip2_cir.qformer import ImageTokens, Sequences, encode

QUERIES, WIDTH, HIDDEN = 3, 10, 8


def make_encoder(cross_every=2, **changes):
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=7, hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, encoder_width=WIDTH, add_cross_attention=True,
        cross_attention_freq=cross_every, query_length=QUERIES, initializer_range=0.5, **changes,
    )  # fmt: skip
    encoder = BertModel(config, add_pooling_layer=False).encoder.train()
    norm = LayerNorm(WIDTH)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return encoder, norm


def make_kinds(norm):
    """Return two pictures alone, three with a padded text, and two texts that are read at different positions."""
    generator = torch.Generator().manual_seed(5)

    def states(*shape):
        return torch.randn(*shape, generator=generator)

    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    return [
        Sequences(states(2, QUERIES, HIDDEN), states(2, 0, HIDDEN), "queries", ImageTokens(states(2, 6, WIDTH), norm)),
        Sequences(states(3, QUERIES, HIDDEN), states(3, 4, HIDDEN), torch.tensor([0, 1, 2]),
                  ImageTokens(states(3, 6, WIDTH), norm), mask),
        Sequences(states(2, 0, HIDDEN), states(2, 4, HIDDEN), torch.tensor([3, 0]), None, mask[[0, 2]]),
    ]  # fmt: skip


def stock(encoder, kind):
    """Run LAVIS's encoder on one kind and return what is read."""
    count = kind.queries.shape[1]
    seen = kind.states.new_ones(kind.states.shape[:2])
    if kind.text_mask is not None:
        seen[:, count:] = kind.text_mask
    images = kind.images and kind.images.norm(kind.images.tokens)
    mask = (1 - seen[:, None, None, :]) * -10000.0
    out = encoder(kind.states, mask, encoder_hidden_states=images, query_length=count).last_hidden_state
    return out[:, :count] if isinstance(kind.read, str) else out[torch.arange(len(out)), count + kind.read]


def gradients(outputs, weights):
    loss = sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outputs)
    return torch.autograd.grad(loss, weights, allow_unused=True)


@pytest.mark.parametrize("cross_every", [1, 2])
def test_values_and_gradients_equal_those_of_lavis_encoder_on_each_kind(cross_every):
    encoder, norm = make_encoder(cross_every)
    weights = {**dict(encoder.named_parameters()), "gain": norm.weight, "bias": norm.bias}
    kinds = make_kinds(norm)
    ours, theirs = encode(encoder, kinds), [stock(encoder, kind) for kind in kinds]
    for own, expected in zip(ours, theirs):
        torch.testing.assert_close(own, expected)
    both = zip(weights, gradients(ours, [*weights.values()]), gradients(theirs, [*weights.values()]))
    for name, own, expected in both:
        if name.endswith("key.bias"):  # it adds the same to all scores of a query, so that its gradient is rounding
            assert expected is None or expected.abs().max() < 1e-4
        elif expected is None:  # LAVIS computes the last layer's outputs that nobody reads
            assert own is None or not own.any(), name
        else:
            torch.testing.assert_close(
                own, expected, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("is_tower_trained", [False, True])
def test_recomputed_activations_change_nothing(is_tower_trained):
    """A Q-Former with gradient_checkpointing gives the same gradients; a trained tower's tokens take another way."""
    results = []
    for is_recomputing in (False, True):
        encoder, norm = make_encoder()
        encoder.config.gradient_checkpointing = is_recomputing
        kinds = make_kinds(norm)
        for images in (kind.images for kind in kinds if kind.images is not None):
            images.tokens.requires_grad_(is_tower_trained)
        results.append(gradients(encode(encoder, kinds), [norm.weight, *encoder.layer[0].parameters()]))
    for plain, recomputed in zip(*results):
        torch.testing.assert_close(plain, recomputed)


def test_dropout_is_drawn_in_training_alone():
    encoder, norm = make_encoder()
    for part in encoder.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    kinds = make_kinds(norm)
    assert not torch.equal(encode(encoder, kinds)[0], encode(encoder, kinds)[0])
    encoder.eval()
    assert torch.equal(encode(encoder, kinds)[0], encode(encoder, kinds)[0])


class Doubled(nn.Linear):
    """A layer that does more than its product, as one with an adapter does."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("case", ["norm alone", "replaced layer", "hooked layer", "trained tower", "frozen norm"])
@pytest.mark.parametrize("name", ["key", "value"])
def test_what_is_trained_or_added_to_a_projection_changes_the_way_and_not_the_result(case, name):
    encoder, norm = make_encoder(cross_every=1)
    attention = encoder.layer[0].crossattention.self
    if case == "replaced layer":
        replaced = Doubled(WIDTH, HIDDEN)
        replaced.load_state_dict(getattr(attention, name).state_dict())
        setattr(attention, name, replaced)
    if case == "hooked layer":
        getattr(attention, name).register_forward_hook(lambda module, inputs, output: 2 * output)
    norm.requires_grad_(case != "frozen norm")
    kinds = make_kinds(norm)
    tokens = [kind.images.tokens.requires_grad_(case == "trained tower") for kind in kinds if kind.images is not None]
    weights = [attention.key.weight, attention.value.weight, attention.value.bias, *norm.parameters(), *tokens]
    wanted = [weight for weight in weights if weight.requires_grad]
    ours, theirs = encode(encoder, kinds), [stock(encoder, kind) for kind in kinds]
    for own, expected in zip(ours, theirs):
        torch.testing.assert_close(own, expected)
    for own, expected in zip(gradients(ours, wanted), gradients(theirs, wanted)):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", ["affine", "normalised"])
def test_tokens_without_gradient_are_converted_once_under_autocast(form):
    """The projections are the same bits: autocast would convert the same tokens for every one."""
    norm, linear = LayerNorm(WIDTH), nn.Linear(WIDTH, 4)  # a new norm's gain is 1 and its bias 0
    images = ImageTokens(torch.randn(2, 6, WIDTH), norm)
    with torch.set_grad_enabled(form == "normalised"), torch.autocast("cpu", torch.bfloat16):
        tokens = getattr(images, form)
        assert tokens.dtype == torch.bfloat16
        assert getattr(images, form) is tokens
        assert torch.equal(linear(tokens), linear(norm(images.tokens)))


def test_tokens_with_gradient_stay_float32_under_autocast():
    norm = LayerNorm(WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert ImageTokens(torch.randn(2, 6, WIDTH, requires_grad=True), norm).affine.dtype == torch.float32


def test_autocast_changes_the_outputs_by_its_rounding_alone():
    encoder, norm = make_encoder()
    kinds = make_kinds(norm)
    expected = encode(encoder, kinds)
    with torch.autocast("cpu", torch.bfloat16):
        found = encode(encoder, make_kinds(norm))
    for own, other in zip(found, expected):
        torch.testing.assert_close(own.float(), other, atol=0.05, rtol=0.05)
