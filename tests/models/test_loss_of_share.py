"""The loss of a share of the batch: clip_cir's equals a naive loop, and the perturbation takes its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import make_scoring_model

from lavis_cir_plugin.methods.retrieval_dpo.losses import PreferenceSettings
from lavis_cir_plugin.methods.retrieval_dpo.preference_model import learn_preferences
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation, ascent_step
from lavis_cir_plugin.models.contrastive_losses import with_gradient_of


def gradients(loss, model):
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)


def assert_same_gradients(ours, theirs, model):
    for own, other in zip(gradients(ours, model), gradients(theirs, model)):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"freeze_vit": True, "freeze_text": False}], ids=["trained", "frozen tower"])
@pytest.mark.parametrize("fusion", ["sum", "text"])
def test_clip_cir_on_triplets(fusion, changes, triplets):
    model, batch = make_scoring_model("clip", **changes, fusion=fusion).train(), triplets(4)
    assert torch.equal(model.loss_of_share(batch, 1)["loss"], model(batch)["loss"])
    first = {key: value[:2] for key, value in batch.items()}
    targets = torch.cat([model.target_features(batch["target"][:2]), model.encode_target(batch["target"][2:])])
    expected = F.cross_entropy(model.query_features(first) @ targets.T / model.temperature, torch.arange(2))
    ours = model.loss_of_share(batch, 0.5)["loss"]
    torch.testing.assert_close(ours, expected)
    assert_same_gradients(ours, expected, model)


def test_clip_cir_on_captions(triplets):
    """One row of four, in both directions; the other pictures and captions are constants."""
    model = make_scoring_model("clip").train()
    batch = {key: value for key, value in triplets(4).items() if key in ("image", "text_input")}
    images = torch.cat([model.target_features(batch["image"][:1]), model.encode_target(batch["image"][1:])])
    texts = [model.text_tower(model.text_tower.tokenize([text])) for text in batch["text_input"]]
    texts = F.normalize(torch.cat([texts[0], *(text.detach() for text in texts[1:])]), dim=-1)
    scores = images @ texts.T / model.temperature
    expected = (F.cross_entropy(scores[:1], torch.tensor([0])) + F.cross_entropy(scores.T[:1], torch.tensor([0]))) / 2
    ours = model.loss_of_share(batch, 0.25)["loss"]
    torch.testing.assert_close(ours, expected)
    assert_same_gradients(ours, expected, model)


def test_rows_without_a_gradient_keep_their_values():
    weight = torch.tensor(3.0, requires_grad=True)
    out = with_gradient_of(1, lambda rows: weight * rows, torch.tensor([1.0, 10.0]))
    assert out.tolist() == [3.0, 30.0]
    assert torch.autograd.grad(out.sum(), weight) == (torch.tensor(1.0),)


@pytest.mark.parametrize("name", ["clip", "joint", "sentence_prompt", "frozen tower"])
def test_the_perturbation_follows_the_gradient_of_the_share(name, triplets):
    model, batch = make_scoring_model(name).train(), triplets(4)
    optimizer = PerturbingOptimizer(
        torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1), model,
        WeightPerturbation(gamma=0.05, direction_share=0.5),
    )  # fmt: skip
    weights = list(optimizer.weights.values())
    direction = torch.autograd.grad(
        model.loss_of_share(batch, 0.5)["loss"], weights, allow_unused=True, materialize_grads=True
    )
    steps = ascent_step(weights, direction, 0.05)
    loss = optimizer.perturb(model)({**batch, "epoch": 0})["loss"]
    with torch.no_grad():
        for weight, step in zip(weights, steps):
            weight.add_(step)
    torch.testing.assert_close(loss, model(batch)["loss"])


def test_the_direction_of_a_share_is_no_longer_than_that_of_the_batch(triplets):
    """GradScaler's factor was found for the mean over all rows: half of them give half of their mean's gradient."""
    model, batch = make_scoring_model("joint").train(), triplets(4)
    optimizer = PerturbingOptimizer(
        torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1), model,
        WeightPerturbation(gamma=0.05, direction_share=0.5, every=2),
    )  # fmt: skip
    mean = torch.autograd.grad(
        model.loss_of_share(batch, 0.5)["loss"], list(optimizer.weights.values()), materialize_grads=True,
        allow_unused=True,
    )  # fmt: skip
    optimizer.perturb(model, loss_scale=lambda: 64.0)({**batch, "epoch": 0})
    torch.testing.assert_close(optimizer.direction, [32 * gradient for gradient in mean])


def test_a_frozen_tower_runs_once_for_both_passes(triplets):
    """The first pass shows the whole batch to a frozen tower, so that the second one finds its outputs."""
    model, batch, calls = make_scoring_model("frozen tower").train(), triplets(4), []
    stock = model.visual_encoder.forward_features
    model.visual_encoder.forward_features = lambda pictures: calls.append(len(pictures)) or stock(pictures)
    optimizer = PerturbingOptimizer(
        torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1), model,
        WeightPerturbation(gamma=0.05, direction_share=0.25),
    )  # fmt: skip
    optimizer.perturb(model)({**batch, "epoch": 0})
    assert calls == [8]


def test_models_without_such_a_loss_are_refused():
    model, settings = torch.nn.Linear(2, 2), WeightPerturbation(direction_share=0.25)
    with pytest.raises(ValueError, match=r"run\.wrf\.direction_share: 0\.25 needs a model .* Linear does not; set 1"):
        PerturbingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, settings)


@pytest.mark.parametrize("name", ["composing", "mapping", "preferences"])
def test_models_that_inherit_such_a_loss_and_compute_another_are_refused(name):
    """TSCIR's models and Retrieval-DPO replace `forward` and inherit clip_cir's or blip2_cir's `loss_of_share`."""
    model = make_scoring_model("joint" if name == "preferences" else name)
    if name == "preferences":
        learn_preferences(model, PreferenceSettings())
    trained = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="needs a model that offers loss_of_share for its own loss"):
        PerturbingOptimizer(trained, model, WeightPerturbation(direction_share=0.25))
