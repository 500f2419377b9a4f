"""The losses by hand-derived numbers, the mask of repeated targets, and invariances."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import make_scoring_model, make_triplets

from lavis_cir_plugin.methods.blip2_cir.losses import alignment_loss
from lavis_cir_plugin.methods.tscir.losses import mixed_negatives_loss, soft_text_alignment_loss
from lavis_cir_plugin.models.contrastive_losses import contrastive_loss, symmetric_contrastive_loss


def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


@pytest.mark.parametrize(("ids", "got"), [([1, 1, 2], "list"), (torch.tensor([1, 1]), r"\(2,\)")])
def test_ids_that_do_not_fit_the_targets_are_refused(ids, got):
    with pytest.raises(ValueError, match=rf"target_ids must be a tensor \(3,\), one id for each target, got {got}"):
        contrastive_loss(torch.eye(3), torch.eye(3), 0.07, ids)


def test_contrastive_loss_worked_by_hand():
    """Two orthogonal pairs, tau 1: each row has scores (1, 0), loss = log(1 + e^-1) = 0.313262."""
    query = unit([1.0, 0.0], [0.0, 1.0])
    assert float(contrastive_loss(query, query, 1.0)) == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)


def test_the_best_of_a_targets_tokens_scores():
    """Target 1 has tokens (0, 1) and (1, 0): its best against q = (1, 0) is 1, so both targets tie: log 2."""
    query = unit([1.0, 0.0])
    targets = torch.stack([unit([1.0, 0.0], [0.0, 1.0]), unit([0.0, 1.0], [1.0, 0.0])])
    both = contrastive_loss(query.repeat(2, 1), targets, 0.5)
    assert float(both) == pytest.approx(math.log(2), abs=1e-6)


def test_equal_scores_give_log_of_the_batch():
    query = unit([1.0, 0.0]).repeat(5, 1)
    assert float(contrastive_loss(query, query, 0.07)) == pytest.approx(math.log(5), abs=1e-5)


def test_a_repeated_target_is_no_negative():
    """Rows 0 and 1 have the same target image: masked, each has one negative of equal score left, row 2 has two.

    All scores are equal, so the losses are log 2, log 2 and log 3.
    """
    query = unit([1.0, 0.0]).repeat(3, 1)
    loss = contrastive_loss(query, query, 1.0, target_ids=torch.tensor([7, 7, 9]))
    assert float(loss) == pytest.approx((2 * math.log(2) + math.log(3)) / 3, abs=1e-6)


def test_label_smoothing_worked_by_hand():
    """The log probabilities are -.313262 and -1.313262: .8 * .313262 + .2 * (.313262 + 1.313262) / 2 = .413262."""
    query = unit([1.0, 0.0], [0.0, 1.0])
    assert float(contrastive_loss(query, query, 1.0, label_smoothing=0.2)) == pytest.approx(0.413262, abs=1e-6)
    both = symmetric_contrastive_loss(query, query, 1.0, label_smoothing=0.2)
    assert float(both) == pytest.approx(0.413262, abs=1e-6)


def test_label_smoothing_spreads_nothing_over_a_repeated_target():
    """Row by row the loss is torch's own over the targets that are left, and its gradient is finite."""
    torch.manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1).requires_grad_()
    targets, ids = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1), torch.tensor([5, 6, 5, 7])
    loss = contrastive_loss(query, targets, 0.3, ids, label_smoothing=0.1)
    kept = [[0, 1, 3], [0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3]]
    rows = [
        torch.nn.functional.cross_entropy(
            query[i] @ targets[own].T / 0.3, torch.tensor(own.index(i)), label_smoothing=0.1
        )
        for i, own in enumerate(kept)
    ]
    torch.testing.assert_close(loss, torch.stack(rows).mean())
    loss.backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("name", ["joint", "clip"])
def test_a_model_smooths_by_its_setting(name):
    batch = make_triplets(4)
    losses = [float(make_scoring_model(name, label_smoothing=share)(batch)["loss"]) for share in (0.0, 0.3)]
    model = make_scoring_model(name)
    query, targets = model.query_features(batch), model.target_features(batch["target"])
    expected = [contrastive_loss(query, targets, model.temperature, batch["target_id"], share) for share in (0.0, 0.3)]
    assert losses == pytest.approx([float(loss) for loss in expected], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_a_batch_of_one_has_no_loss():
    query = unit([0.6, 0.8]).requires_grad_()
    loss = contrastive_loss(query, query[:, None], 0.07, torch.tensor([1]))
    assert float(loss) == 0.0


def test_contrastive_loss_does_not_depend_on_the_order_of_the_batch():
    torch.manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    targets = torch.nn.functional.normalize(torch.randn(6, 3, 8), dim=-1)
    ids = torch.tensor([1, 2, 2, 3, 4, 5])
    order = torch.randperm(6)
    torch.testing.assert_close(
        contrastive_loss(query, targets, 0.1, ids), contrastive_loss(query[order], targets[order], 0.1, ids[order])
    )


def test_alignment_pulls_only_the_sentence_prompt():
    """The means (1, 1) and (0, 2) have the mean square (1 + 1) / 2 = 1; the gradient reaches Z and not P."""
    sentence = torch.tensor([[[0.0, 2.0], [2.0, 0.0]]], requires_grad=True)
    prompt = torch.tensor([[[0.0, 1.0], [0.0, 3.0]]], requires_grad=True)
    loss = alignment_loss(sentence, prompt)
    loss.backward()
    assert float(loss) == pytest.approx(1.0)
    assert sentence.grad is not None
    assert prompt.grad is None


# CLIP's and TSCIR's losses.


def random_units(count, seed, width=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)


def test_symmetric_loss_worked_by_hand():
    """q = (1, 0), (0, 1); v = (1, 0), (0.6, 0.8), tau 1. Scores ((1, .6), (0, .8)).

    Rows: log(1 + e^-.4) and log(1 + e^-.8); columns: log(1 + e^-1) and log(1 + e^-.2).
    """
    query, images = unit([1.0, 0.0], [0.0, 1.0]), unit([1.0, 0.0], [0.6, 0.8])
    expected = sum(math.log(1 + math.exp(-gap)) for gap in (0.4, 0.8, 1.0, 0.2)) / 4
    assert float(symmetric_contrastive_loss(query, images, 1.0)) == pytest.approx(expected, abs=1e-6)
    assert float(symmetric_contrastive_loss(images, query, 1.0)) == pytest.approx(expected, abs=1e-6)


def test_soft_text_alignment_worked_by_hand():
    """One caption per row sees images as (1, 0) and sentences as (0, 0), tau 1: q = (.7311, .2689), p = (.5, .5).

    KL(q || p) = log 2 - H(q) = 0.693147 - 0.582203; KL(p || q) would be 0.120114.
    """
    captions = unit([1.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    images = unit([1.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    sentences = unit([0.0, 0.0, 1.0], [0.0, 1.0, 0.0])
    q = 1 / (1 + math.exp(-1))
    expected = math.log(2) + q * math.log(q) + (1 - q) * math.log(1 - q)
    assert expected == pytest.approx(0.110944, abs=1e-6)
    assert float(soft_text_alignment_loss(captions, sentences, images, 1.0)) == pytest.approx(expected, abs=1e-6)


def test_soft_text_alignment_is_0_where_sentences_look_like_images():
    captions, images = random_units(5, 1), random_units(5, 2)
    assert float(soft_text_alignment_loss(captions, images, images, 0.07)) == pytest.approx(0, abs=1e-6)
    assert float(soft_text_alignment_loss(captions, random_units(5, 3), images, 0.07)) > 0.01


def naive_mixed(query, targets, temperature, ids, k, scaled):
    """Compute the equation row by row on plain numbers."""
    count = len(query)
    there = back = 0.0
    for i in range(count):
        others = [j for j in range(count) if ids[j] != ids[i]]
        score = {j: float(query[i] @ targets[j]) for j in (i, *others)}
        alike = [float(targets[i] @ targets[j]) for j in range(count)]
        least = min(alike)
        columns = [score[j] / temperature for j in others]
        for j in sorted(others, key=lambda j: -score[j])[:k]:
            a = (alike[j] - least) / (1 - least)
            mixture = a * targets[i] + (1 - a) * targets[j]
            columns.append(float(query[i] @ mixture) / (temperature if scaled else 1))
        own = score[i] / temperature
        there += math.log(sum(math.exp(c - own) for c in columns) + 1)
        back_scores = [float(query[j] @ targets[i]) / temperature for j in others]
        back += math.log(sum(math.exp(c - own) for c in back_scores) + 1)
    return (there + back) / 2 / count


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("k", [0, 2, 10])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0, 1, 1, 3, 0], [0, 0, 0, 0, 1]])
def test_mixed_negatives_equal_a_naive_loop(scaled, k, ids):
    query, targets = random_units(5, 1), random_units(5, 2)
    for i, name in enumerate(ids):
        targets[i] = targets[ids.index(name)]
    found = mixed_negatives_loss(query, targets, 0.2, torch.tensor(ids), k, scaled)
    assert float(found) == pytest.approx(naive_mixed(query, targets, 0.2, ids, k, scaled), abs=1e-5)


def test_without_mixtures_the_loss_is_the_symmetric_one():
    query, targets, ids = random_units(6, 1), random_units(6, 2), torch.tensor([0, 1, 2, 2, 4, 5])
    torch.testing.assert_close(
        mixed_negatives_loss(query, targets, 0.05, ids, negatives=0),
        symmetric_contrastive_loss(query, targets, 0.05, ids),
    )


def test_unscaled_mixtures_are_nearly_inert():
    """In the released code's form, at temperature 0.01, mixtures change the loss by less than a thousandth as much."""
    query = random_units(32, 1, 64)
    targets = torch.nn.functional.normalize(query + 3 * random_units(32, 2, 64), dim=-1)
    plain, scaled, unscaled = (
        float(mixed_negatives_loss(query, targets, 0.01, negatives=k, scaled=is_scaled))
        for k, is_scaled in ((0, True), (10, True), (10, False))
    )
    assert scaled - plain > 1000 * (unscaled - plain) >= 0


def test_gradients_stay_finite_where_a_row_has_no_wrong_target():
    query = random_units(3, 1).requires_grad_()
    loss = mixed_negatives_loss(query, random_units(1, 2).repeat(3, 1), 0.01, torch.tensor([5, 5, 5]))
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert bool(query.grad.isfinite().all())
    alone = mixed_negatives_loss(random_units(1, 1), random_units(1, 2), 0.01)
    assert float(alone) == pytest.approx(0, abs=1e-6)
