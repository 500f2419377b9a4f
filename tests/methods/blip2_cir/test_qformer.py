"""The packed Q-Former equals LAVIS's own encoder on each kind of sequences, in values and in gradients."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.Qformer import BertConfig, BertModel
from torch import nn

from lavis_cir_plugin.methods.blip2_cir import qformer
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

    return [
        Sequences(states(2, QUERIES, HIDDEN), states(2, 0, HIDDEN), "queries", ImageTokens(states(2, 7, WIDTH), norm)),
        Sequences(states(3, QUERIES, HIDDEN), states(3, 4, HIDDEN), [0, 1, 2],
                  ImageTokens(states(3, 7, WIDTH), norm), [4, 2, 3]),
        Sequences(states(2, 0, HIDDEN), states(2, 4, HIDDEN), [3, 0], None, [4, 3]),
    ]  # fmt: skip


def stock(encoder, kind):
    """Run LAVIS's encoder on one kind and return what is read."""
    count = kind.queries.shape[1]
    states = torch.cat([kind.queries, kind.text], dim=1)
    ends = count + torch.tensor(kind.lengths or [kind.text.shape[1]] * len(states))
    seen = (torch.arange(states.shape[1]) < ends[:, None]).float()
    images = kind.images and kind.images.norm(kind.images.tokens.float())
    mask = (1 - seen[:, None, None, :]) * -10000.0
    out = encoder(states, mask, encoder_hidden_states=images, query_length=count).last_hidden_state
    return (
        out[:, :count] if isinstance(kind.read, str) else out[torch.arange(len(out)), count + torch.tensor(kind.read)]
    )


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
    results, calls = [], []
    for is_recomputing in (False, True):
        encoder, norm = make_encoder()
        encoder.config.gradient_checkpointing = is_recomputing
        encoder.layer[0].attention.self.query.register_forward_hook(lambda *_, now=is_recomputing: calls.append(now))
        kinds = make_kinds(norm)
        for images in (kind.images for kind in kinds if kind.images is not None):
            images.tokens.requires_grad_(is_tower_trained)
        with mock.patch.object(qformer, "checkpoint", wraps=qformer.checkpoint) as recomputing:
            results.append(gradients(encode(encoder, kinds), [norm.weight, *encoder.layer[0].parameters()]))
        assert recomputing.call_count == 2 * is_recomputing
        # Of a GPU torch restores the random numbers if it finds a tensor on it among the arguments.
        assert all(any(isinstance(own, torch.Tensor) for own in call.args) for call in recomputing.call_args_list)
    assert calls == [False, True, True]
    for plain, recomputed in zip(*results):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("part", ["attention", "crossattention"])
@pytest.mark.parametrize("is_norm_trained", [False, True])
def test_dropout_of_each_attention_is_drawn_in_training_alone(part, is_norm_trained):
    """A frozen norm takes another way to the images than a trained one."""
    encoder, norm = make_encoder()
    norm.requires_grad_(is_norm_trained)
    getattr(encoder.layer[0], part).self.dropout.p = 0.5
    kinds = make_kinds(norm)
    assert not torch.equal(encode(encoder, kinds)[0], encode(encoder, kinds)[0])
    encoder.eval()
    assert torch.equal(encode(encoder, kinds)[0], encode(encoder, kinds)[0])


def test_dropout_of_all_other_parts_is_drawn_in_training_alone():
    encoder, norm = make_encoder()
    for part in encoder.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.5
    for layer in encoder.layer:
        layer.attention.self.dropout.p = 0.0
    for layer in encoder.layer[::2]:
        layer.crossattention.self.dropout.p = 0.0
    kinds = make_kinds(norm)
    assert not torch.equal(encode(encoder, kinds)[0], encode(encoder, kinds)[0])
    encoder.eval()
    assert torch.equal(encode(encoder, kinds)[0], encode(encoder, kinds)[0])


def test_tokens_without_gradient_are_not_projected_where_the_norm_is_trained():
    encoder, norm = make_encoder()
    with mock.patch.object(qformer, "attend_to_tokens", wraps=qformer.attend_to_tokens) as unprojected:
        encode(encoder, make_kinds(norm))
        # Of three layers the first and the last see images, of two kinds; of one kind the last layer's text is read.
        assert unprojected.call_count == 3
        norm.requires_grad_(False)
        encode(encoder, make_kinds(norm))
        assert unprojected.call_count == 3


class Doubled(nn.Linear):
    """A layer that does more than its product, as one with an adapter does."""

    def forward(self, x):
        return 2 * super().forward(x)


class DoubledNorm(LayerNorm):
    """A layer norm that does more than its equation."""

    def forward(self, x):
        return 2 * super().forward(x)


def halve_gradients(module, gradients, *_):
    return tuple(gradient if gradient is None else gradient / 2 for gradient in gradients)


# What is done to a key, a value or the norm. The last two hooks change gradients alone.
ADDITIONS = {
    "nothing": lambda module: None,
    "forward hook": lambda module: module.register_forward_hook(lambda module, inputs, output: 2 * output),
    "hook before": lambda module: module.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "own forward": lambda module: setattr(module, "forward", lambda x: 2 * type(module).forward(module, x)),
    "gradient hook": lambda module: module.register_full_backward_hook(halve_gradients),
    "gradient hook before": lambda module: module.register_full_backward_pre_hook(halve_gradients),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", ["norm alone", "trained tower", "trained tower of one kind", "frozen norm", "half tokens", "eps"]
)
@pytest.mark.parametrize("addition", ["replaced", *ADDITIONS])
@pytest.mark.parametrize("name", ["key", "value", "norm"])
def test_what_is_trained_or_added_to_a_layer_changes_the_way_and_not_the_result(case, addition, name):
    encoder, norm = make_encoder(cross_every=1)
    attention = encoder.layer[0].crossattention.self
    module = norm if name == "norm" else getattr(attention, name)
    if addition == "replaced":
        module.__class__ = DoubledNorm if name == "norm" else Doubled
    else:
        ADDITIONS[addition](module)
    norm.eps = 0.3 if case == "eps" else norm.eps
    norm.requires_grad_(case != "frozen norm")
    kinds = make_kinds(norm)
    images = [kind.images for kind in kinds if kind.images is not None]
    if case == "half tokens":
        for own in images:
            own.tokens = own.tokens.half()
    trained = {"trained tower": 2, "trained tower of one kind": 1}.get(case, 0)
    tokens = [own.tokens.requires_grad_(place < trained) for place, own in enumerate(images)]
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
