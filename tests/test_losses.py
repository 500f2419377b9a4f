"""Losses: hand-derived numbers, the duplicate-target mask, invariances."""

from __future__ import annotations

import math

import pytest
import torch

from lavis_cir_plugin.losses import alignment_loss, contrastive_loss


def unit(*rows):
    return torch.nn.functional.normalize(torch.tensor(rows), dim=-1)


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
    """Means (1, 1) against (0, 2): mean square (1 + 1) / 2 = 1; gradient reaches Z and not P."""
    sentence = torch.tensor([[[0.0, 2.0], [2.0, 0.0]]], requires_grad=True)
    prompt = torch.tensor([[[0.0, 1.0], [0.0, 3.0]]], requires_grad=True)
    loss = alignment_loss(sentence, prompt)
    loss.backward()
    assert float(loss) == pytest.approx(1.0)
    assert sentence.grad is not None
    assert prompt.grad is None
