"""Retrieval-DPO with real small models: first step, reference policy, checkpoints, adapters, half precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import SCORING_MODELS, make_preferences, make_scoring_model
from torch import nn

from lavis_cir_plugin.core.model_parts import frozen_names
from lavis_cir_plugin.methods.retrieval_dpo.losses import PreferenceSettings
from lavis_cir_plugin.methods.retrieval_dpo.preference_model import (
    PreferenceModel,
    ReferencePolicy,
    candidate_features,
    keep_unread_as_buffers,
    learn_preferences,
    paired_scores,
)
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.models.contrastive_losses import contrastive_loss
from lavis_cir_plugin.training.lora import LoraSettings, add_adapters

DROPOUT = {
    "blip2_cir": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "tscir": {"dropout": 0.5},
}


def trained_by(name, settings=None, **changes):
    """Return a model with Retrieval-DPO's loss and its reference policy."""
    model = make_scoring_model(name, **changes)
    return prepared(model, settings or PreferenceSettings(anchor=0.0))


def prepared(model, settings):
    learn_preferences(model, settings)
    keep_unread_as_buffers(model, make_preferences(2))
    return model, ReferencePolicy(model)


def with_reference(batch, reference, positive="target"):
    return {**batch, "reference_scores": reference.scores(batch, positive)}


def saved_names(model):
    """Return the names of the tensors in LAVIS's checkpoint of a model."""
    return set(model.state_dict()) - set(frozen_names(model))


def some_steps(model, reference):
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.02)
    for step in range(3):
        optimizer.zero_grad()
        model(with_reference(make_preferences(4, 2, seed=step), reference))["loss"].backward()
        optimizer.step()


# The first step.


@pytest.mark.parametrize("name", SCORING_MODELS)
def test_the_first_loss_is_log_2(name):
    model, reference = trained_by(name)
    model.train()  # as LAVIS's loop does
    out = model(with_reference(make_preferences(4), reference))
    assert float(out["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    assert float(out["reward_margin"]) == pytest.approx(0, abs=1e-6)
    assert float(out["positive_drift"]) == pytest.approx(0, abs=1e-6)


def test_of_several_negatives_the_first_loss_of_sdpo_is_their_number_and_one():
    model, reference = trained_by("joint", PreferenceSettings("sdpo", anchor=0.0))
    out = model(with_reference(make_preferences(4, 3), reference))
    assert float(out["loss"]) == pytest.approx(math.log(4), abs=1e-5)


@pytest.mark.parametrize("name", ["joint", "sentence_prompt", "mapping", "composing"])
def test_dropout_and_batch_statistics_do_not_part_policy_and_reference(name):
    """Both are in evaluation mode, and statistics of earlier batches differ much from those of this batch."""
    is_blip = SCORING_MODELS[name][0] == "blip2_cir"
    settings = SCORING_MODELS[name][1]
    changes = (
        {"qformer_config": {**settings["qformer_config"], **DROPOUT["blip2_cir"]}} if is_blip else {"dropout": 0.5}
    )
    model = make_scoring_model(name, **changes).train()
    for buffer_name, buffer in model.named_buffers():
        if "running" in buffer_name:
            buffer.fill_(2.0)
    batch = make_preferences(4)
    if name != "composing":  # whose dropout and statistics belong to stage I, which is frozen
        assert not torch.equal(model.query_features(batch), model.query_features(batch)), "dropout was at work"
    model, reference = prepared(model, PreferenceSettings(anchor=0.0))
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    samples = with_reference(batch, reference)
    assert float(model(samples)["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    assert torch.equal(model(samples)["loss"], model(samples)["loss"])
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())


# The reference policy.


@pytest.mark.parametrize("name", SCORING_MODELS)
def test_the_reference_shares_what_is_frozen_and_stays_as_it_was(name):
    model, reference = trained_by(name)
    trained = {key for key, weight in model.named_parameters() if weight.requires_grad}
    own = dict(model.named_parameters())
    for key, weight in reference.model.named_parameters():
        assert (weight is own[key]) == (key not in trained), key
        assert not weight.requires_grad
    batch = make_preferences(4, 2, seed=9)
    before, policy = reference.scores(batch), model(with_reference(batch, reference))
    some_steps(model, reference)
    assert torch.equal(reference.scores(batch), before)
    after = model(with_reference(batch, reference))
    assert abs(float(after["reward_margin"] - policy["reward_margin"])) > 1e-4
    assert not any(id(module) == id(reference.model) for module in model.modules())


def test_of_a_model_with_adapters_only_these_are_copied():
    model = make_scoring_model("frozen tower")
    add_adapters(model, LoraSettings(target_modules=["query", "value"], r=2))
    model, reference = prepared(model, PreferenceSettings(anchor=0.0))
    own = {id(weight) for weight in model.parameters()}
    copied = [weight for weight in reference.model.parameters() if id(weight) not in own]
    adapters = [weight for name, weight in model.named_parameters() if "lora_" in name]
    assert len(copied) == len(adapters) > 0
    samples = with_reference(make_preferences(4), reference)
    assert float(model(samples)["loss"]) == pytest.approx(math.log(2), abs=1e-5)
    some_steps(model, reference)
    assert any(float(weight.detach().abs().max()) > 0 for name, weight in model.named_parameters() if "lora_B" in name)
    assert torch.equal(reference.scores(samples), samples["reference_scores"])


def test_precomputed_features_of_a_frozen_tower_give_the_same():
    model, reference = trained_by("frozen tower")
    some_steps(model, reference)
    batch = make_preferences(4, 2)
    features = {**batch, **{key: model.image_features(batch[key]) for key in ("image", "target")}}
    features["negatives"] = model.image_features(batch["negatives"].flatten(0, 1)).unflatten(0, (4, 2))
    expected = model(with_reference(batch, reference))
    for key, value in model(with_reference(features, reference)).items():
        torch.testing.assert_close(value, expected[key], msg=key)


# All else is the model's own.


@pytest.mark.parametrize("anchor", [0.0, 1.0])
@pytest.mark.parametrize("name", SCORING_MODELS)
def test_a_checkpoint_is_that_of_the_plain_model(name, anchor, tmp_path):
    """This holds with anchor 0, where no score depends on the temperature, and for a prompt that no score uses."""
    plain = make_scoring_model(name)
    model, reference = trained_by(name, PreferenceSettings(anchor=anchor))
    some_steps(model, reference)
    assert saved_names(model) == saved_names(plain)
    assert set(model.state_dict()) == set(plain.state_dict())
    torch.save({"model": {key: model.state_dict()[key] for key in saved_names(model)}}, tmp_path / "last.pth")
    again = make_scoring_model(name)
    again.load_checkpoint(str(tmp_path / "last.pth"))
    batch = make_preferences(3)
    again.eval()
    assert torch.equal(again.encode_query(batch), model.encode_query(batch))
    assert torch.equal(again.encode_target(batch["target"]), model.encode_target(batch["target"]))
    assert not torch.equal(again.encode_query(batch), plain.eval().encode_query(batch)), "it has learnt"


def test_the_models_class_keeps_its_name_and_can_be_copied():
    plain = make_scoring_model("joint").eval()
    model, _ = trained_by("joint")
    assert type(model).__qualname__ == "Blip2Cir"
    assert isinstance(model, type(plain))
    assert isinstance(model, PreferenceModel)
    batch = make_preferences(3)
    for mode in ("multimodal", "text", "image"):
        assert torch.equal(model.encode_query(batch, mode), plain.encode_query(batch, mode))
    twin = copy.deepcopy(model)
    reference = ReferencePolicy(twin)
    assert torch.equal(twin(with_reference(batch, reference))["loss"], model(with_reference(batch, reference))["loss"])


@pytest.mark.parametrize("name", SCORING_MODELS)
@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_every_trained_weight_has_a_gradient(name, anchor):
    """DistributedDataParallel would wait for a weight without a gradient."""
    model, reference = trained_by(name, PreferenceSettings(anchor=anchor))
    batch = with_reference(make_preferences(4), reference)
    batch["negatives_present"][:] = False  # also where no query has a negative
    model(batch)["loss"].backward()
    trained = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    assert [key for key, weight in trained.items() if weight.grad is None] == []
    assert all(bool(weight.grad.isfinite().all()) for weight in trained.values())


def test_a_model_of_which_nothing_is_trained_is_refused():
    model = make_scoring_model("clip text", freeze_vit=True, freeze_text=True)
    learn_preferences(model, PreferenceSettings())
    with pytest.raises(ValueError, match=r"nothing to train: all weights of ClipCir are frozen; .*or add adapters"):
        keep_unread_as_buffers(model, make_preferences(2))


# The loss and its numbers.


class Table(nn.Module):
    """Model whose features are its samples, so that scores can be chosen by hand."""

    temperature = 0.5

    def query_features(self, samples):
        return samples["image"]

    def target_features(self, image):
        return image


def by_angle(cosines):
    """Return unit vectors that have these cosines with (1, 0)."""
    cosines = torch.as_tensor(cosines)
    return torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=-1)


def table_batch():
    """Return three queries with two negatives, one and none."""
    return {
        "image": torch.tensor([[1.0, 0.0]] * 3),
        "target": by_angle([0.9, 0.5, 0.6]),
        "negatives": by_angle([[0.8, 0.3], [0.7, 0.1], [0.2, 0.4]]),
        "negatives_present": torch.tensor([[True, True], [True, False], [False, False]]),
        "reference_scores": torch.tensor([[0.7, 0.5, 0.4], [0.6, 0.7, 0.6], [0.2, 0.2, 0.2]]),
    }


def table(**settings):
    model = Table()
    learn_preferences(model, PreferenceSettings(**{"beta": 1.0, "anchor": 0.0, **settings}))
    return model


def test_statistics_by_hand():
    """The margins are 0.1 - 0.2 and 0.6 - 0.3, then -0.2 + 0.1; the right images' scores moved by 0.2, -0.1, 0.4."""
    out = table()(table_batch())
    assert float(out["reward_accuracy"]) == pytest.approx(1 / 3)
    assert float(out["reward_margin"]) == pytest.approx((-0.1 + 0.3 - 0.1) / 3, abs=1e-6)
    assert float(out["positive_drift"]) == pytest.approx(0.5 / 3, abs=1e-6)
    assert float(out["without_negative"]) == pytest.approx(1 / 3)
    first = (math.log(1 + math.exp(0.1)) + math.log(1 + math.exp(-0.3))) / 2
    expected = (first + math.log(1 + math.exp(0.1))) / 2  # the third query has no part in it
    assert float(out["loss"]) == pytest.approx(expected, abs=1e-6)
    assert torch.equal(out["loss"], out["loss_dpo"])
    assert not out["reward_margin"].requires_grad


def test_without_any_negative_there_is_no_loss_and_nothing_to_measure():
    batch = table_batch()
    batch["negatives_present"][:] = False
    out = table()(batch)
    assert float(out["loss"]) == 0
    assert float(out["without_negative"]) == 1
    assert math.isnan(float(out["reward_accuracy"]))
    assert math.isnan(float(out["reward_margin"]))


def test_without_a_reference_margins_are_differences_of_scores():
    batch = table_batch()
    del batch["reference_scores"]
    out = table(reference="none")(batch)
    assert float(out["reward_margin"]) == pytest.approx((0.1 + 0.6 - 0.2) / 3, abs=1e-6)
    assert "positive_drift" not in out


def test_the_anchor_is_the_contrastive_loss_times_its_weight():
    batch = {**table_batch(), "target_id": torch.tensor([7, 8, 7])}
    out = table(anchor=2.5)(batch)
    itc = contrastive_loss(batch["image"], batch["target"], 0.5, batch["target_id"])
    torch.testing.assert_close(out["loss_itc"], itc)
    torch.testing.assert_close(out["loss"], out["loss_dpo"] + 2.5 * itc)
    torch.testing.assert_close(out["loss_dpo"], table()(batch)["loss"])


def test_the_released_codes_positive_is_the_reference_image():
    """Its cosine with itself is 1; in the anchor, equal references are no negatives of each other."""
    batch = {**table_batch(), "image_id": torch.tensor([4, 4, 4]), "target_id": torch.tensor([1, 2, 3])}
    out = table(positive="image", reference="none", anchor=1.0)(batch)
    assert float(out["reward_margin"]) == pytest.approx((0.2 + 0.7 + 0.3) / 3, abs=1e-6)
    assert float(out["loss_itc"]) == 0


def test_the_best_token_of_an_image_counts():
    query = torch.tensor([[1.0, 0.0]])
    features = by_angle([[[0.2, 0.6, -0.1], [0.3, 0.1, 0.2]]])
    torch.testing.assert_close(paired_scores(query, features), torch.tensor([[0.6, 0.3]]))


def test_scores_are_those_of_the_ranking():
    """Training uses the scores of the evaluation: encode_query times encode_target, with the best token."""
    model = make_scoring_model("joint").eval()
    batch = make_preferences(4, 2)
    scores = paired_scores(model.query_features(batch), candidate_features(model, batch))
    queries = model.encode_query(batch)
    for column, pictures in enumerate([batch["target"], *batch["negatives"].unbind(1)]):
        products = torch.einsum("bd,btd->bt", queries, model.encode_target(pictures))
        torch.testing.assert_close(scores[:, column], products.amax(dim=1))


@pytest.mark.parametrize("name", ["joint", "sentence_prompt", "clip", "mapping"])
def test_steps_raise_the_margin(name):
    model, reference = trained_by(name, PreferenceSettings(beta=15.0, anchor=0.0))
    batch = with_reference(make_preferences(4, 2), reference)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=5e-3)
    for _ in range(8):
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
    out = model(batch)
    assert float(out["loss"]) < math.log(2) - 0.05
    assert float(out["reward_margin"]) > 0
    assert float(out["reward_accuracy"]) > 0.5


# Together with other things.


@pytest.mark.parametrize("name", ["joint", "sentence_prompt", "clip", "mapping", "composing"])
def test_half_precision_starts_alike_and_trains(name):
    """Under bfloat16 autocast, as in LAVIS's loop on a GPU, both policies round alike, and scores are float32."""
    model, reference = trained_by(name, PreferenceSettings(beta=15.0, anchor=1.0))
    batch = make_preferences(4, 2)
    full = model(with_reference(batch, reference))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(with_reference(batch, reference))
    assert out["loss"].dtype == torch.float32
    assert float(out["loss_dpo"]) == pytest.approx(math.log(2), abs=1e-3)
    assert float(out["loss"]) == pytest.approx(float(full["loss"]), rel=0.1)
    out["loss"].backward()
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("name", ["sentence_prompt", "mapping"])
def test_weights_are_perturbed_and_the_reference_is_not(name):
    """The gradient is that of the loss at the perturbed weights, with the unperturbed reference's scores."""
    model, reference = trained_by(name, PreferenceSettings(beta=15.0, anchor=1.0))
    batch = with_reference(make_preferences(4, 2), reference)
    twin = copy.deepcopy(model)
    weights = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    settings = WeightPerturbation(gamma=0.05, tensors="all")
    optimizer = PerturbingOptimizer(torch.optim.SGD(weights.values(), lr=0.0), model, settings)
    out = optimizer.perturb(model)({**batch, "epoch": 0})
    assert float(out["loss_dpo"]) > math.log(2) + 1e-3, "h is no longer 0"
    torch.testing.assert_close(reference.scores(batch), batch["reference_scores"], atol=0, rtol=0)
    out["loss"].backward()
    moved = dict(twin.named_parameters())
    moved = {key: moved[key] for key in optimizer.weights}
    gradients = torch.autograd.grad(twin(batch)["loss"], list(moved.values()))
    with torch.no_grad():
        for weight, step in zip(moved.values(), optimizer.ascent(list(gradients)).steps()):
            weight += step
    expected = twin(batch)
    torch.testing.assert_close(out["loss"], expected["loss"])
    expected["loss"].backward()
    for key, weight in moved.items():
        torch.testing.assert_close(weights[key].grad, weight.grad, atol=1e-5, rtol=1e-4, msg=key)


def test_unit_vectors_are_what_the_models_return():
    for name in SCORING_MODELS:
        model = make_scoring_model(name).eval()
        batch = make_preferences(3)
        for features in (model.query_features(batch), model.target_features(batch["target"])):
            assert features.requires_grad or name in ("clip text", "mapping", "composing", "frozen tower")
            torch.testing.assert_close(features, F.normalize(features, dim=-1))


def test_the_anchor_is_smoothed_as_the_models_own_loss():
    batch = make_preferences(4, 2)
    losses = []
    for smoothing in (0.0, 0.3):
        model, reference = trained_by("joint", PreferenceSettings(anchor=1.0), label_smoothing=smoothing)
        losses.append(model.eval()(with_reference(batch, reference))["loss_itc"])
    query, features = model.query_features(batch), model.target_features(batch["target"])
    expected = contrastive_loss(query, features, model.temperature, batch.get("target_id"), 0.3)
    torch.testing.assert_close(losses[1], expected)
    assert not torch.allclose(losses[0], losses[1])
