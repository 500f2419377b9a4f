"""Retrieval-DPO's losses: numbers by hand, special cases, invariances, and a naive loop."""

from __future__ import annotations

import math

import pytest
import torch

from lavis_cir_plugin.methods.retrieval_dpo.losses import (
    VARIANTS,
    PreferenceSettings,
    preference_losses,
    reward_margins,
)

PAIRED = [variant for variant in VARIANTS if variant != "sdpo"]
LOG_3 = math.log(3)


def losses(variant, margins, *, beta=1.0, epsilon=0.25, present=None, scores=None):
    """Return the loss of each query, whose margins are given as a row."""
    margins = torch.as_tensor(margins, dtype=torch.float64)
    present = torch.ones_like(margins, dtype=torch.bool) if present is None else torch.as_tensor(present)
    scores = torch.zeros(len(margins), 1 + margins.shape[1]) if scores is None else torch.as_tensor(scores)
    return preference_losses(margins, present, scores, PreferenceSettings(variant, beta=beta, epsilon=epsilon))


def draw(queries=6, count=4, seed=0):
    """Return scores of policy and reference ``(B, 1 + K)``, and which negatives there are; the last query has none."""
    generator = torch.Generator().manual_seed(seed)
    scores, reference = torch.rand(2, queries, 1 + count, dtype=torch.float64, generator=generator) * 2 - 1
    present = torch.rand(queries, count, generator=generator) < 0.6
    present[0], present[-1] = True, False
    return scores, reference, present


# Numbers by hand. With x = log 3: sigma(x) = 3/4, so -log sigma(x) = log 4/3 and -log sigma(-x) = log 4.


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("sigmoid", math.log(4 / 3)),
        ("label_smoothed", 0.75 * math.log(4 / 3) + 0.25 * math.log(4)),
        ("robust", 1.5 * math.log(4 / 3) - 0.5 * math.log(4)),
        ("hinge", 0.0),  # 1 - log 3 < 0
        ("ipo", (LOG_3 - 0.5) ** 2),
        ("sdpo", math.log(4 / 3)),
        ("listwise", math.log(4 / 3)),
    ],
)
def test_one_negative_by_hand(variant, expected):
    """With beta 5 and h = log 3 / 5, x is log 3."""
    assert losses(variant, [[LOG_3 / 5]], beta=5.0).tolist() == pytest.approx([expected])


def test_hinge_by_hand():
    """max(0, 1 - 2 h) is 0.4, 0 and 3 for h = 0.3, 0.5 and -1; the mean is 3.4 / 3."""
    assert losses("hinge", [[0.3, 0.5, -1.0]], beta=2.0).tolist() == pytest.approx([3.4 / 3])


def test_sdpo_by_hand():
    """-log sigma(-log sum e^-x) = log(1 + sum e^-x) is log(1 + 1/3 + 2/3) for x = log 3, log 3/2, and log 3 with 0."""
    x = [LOG_3, math.log(1.5), 0.0]
    found = losses("sdpo", [x, x, x], present=[[True, True, False], [True, True, True], [False, False, True]])
    assert found.tolist() == pytest.approx([math.log(2), LOG_3, math.log(2)])


def test_listwise_by_hand():
    """The right image is second of three: its gain is 1 / log2 3 = 0.6309, those of the others are 1 and 1 / log2 4.

    The weights 1 - 0.6309 and 0.6309 - 0.5 are together 0.5.
    """
    gain = 1 / math.log2(3)
    right, wrong = math.log(4 / 3), math.log(4)
    expected = 2 * ((1 - gain) * right + (gain - 0.5) * wrong)
    found = losses("listwise", [[LOG_3, -LOG_3]], scores=[[0.5, 0.9, 0.1]])
    assert found.tolist() == pytest.approx([expected])
    # Without the one that is ahead the right image is first, and the last counts alone.
    found = losses("listwise", [[LOG_3, -LOG_3]], scores=[[0.5, 0.9, 0.1]], present=[[False, True]])
    assert found.tolist() == pytest.approx([wrong])


def test_the_first_step_by_hand():
    """Policy and reference are equal, so h = 0 whatever the scores are."""
    scores, _, _ = draw(count=3)
    margins = reward_margins(scores, scores.clone())
    assert torch.equal(margins, torch.zeros_like(margins))
    expected = {"hinge": 1.0, "ipo": 0.25, "sdpo": math.log(1 + 3)}
    for variant in VARIANTS:
        found = losses(variant, margins, beta=15.0, scores=scores)
        assert found.tolist() == pytest.approx([expected.get(variant, math.log(2))] * len(scores), rel=1e-6)


def test_margins_by_hand():
    scores = torch.tensor([[0.5, 0.2, 0.6]])
    reference = torch.tensor([[0.4, 0.3, 0.1]])
    torch.testing.assert_close(reward_margins(scores), torch.tensor([[0.3, -0.1]]))
    torch.testing.assert_close(reward_margins(scores, reference), torch.tensor([[0.2, -0.4]]))


# Reductions.


@pytest.mark.parametrize("variant", ["sdpo", "listwise"])
def test_with_one_negative_they_are_sigmoid(variant):
    scores, reference, _ = draw(count=1)
    margins = reward_margins(scores, reference)
    torch.testing.assert_close(losses(variant, margins, beta=7.0, scores=scores), losses("sigmoid", margins, beta=7.0))


@pytest.mark.parametrize("variant", ["label_smoothed", "robust"])
def test_without_wrong_preferences_they_are_sigmoid(variant):
    scores, reference, present = draw()
    margins = reward_margins(scores, reference)
    found = losses(variant, margins, beta=7.0, epsilon=0.0, present=present)
    torch.testing.assert_close(found, losses("sigmoid", margins, beta=7.0, present=present))


def test_ipo_is_beta_squared_times_the_published():
    margins = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    published = (margins[:, 0] - 1 / (2 * 12.0)) ** 2
    torch.testing.assert_close(losses("ipo", margins, beta=12.0), 12.0**2 * published)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.45])
def test_robust_is_unbiased_under_flipped_preferences(epsilon):
    """If a share epsilon of pairs is reversed, the expected loss is that of the true pairs."""
    margins = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    told, flipped = (losses("robust", sign * margins, beta=3.0, epsilon=epsilon) for sign in (1, -1))
    mean = (1 - epsilon) * told + epsilon * flipped
    torch.testing.assert_close(mean, losses("sigmoid", margins, beta=3.0))
    if epsilon:
        smoothed = [losses("label_smoothed", sign * margins, beta=3.0, epsilon=epsilon) for sign in (1, -1)]
        assert not torch.allclose((1 - epsilon) * smoothed[0] + epsilon * smoothed[1], mean, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_beta_means_the_same_for_every_temperature(temperature):
    """The reference is DPO's beta * log pi / pi_ref for softmax policies over a gallery, with beta * temperature."""
    generator = torch.Generator().manual_seed(3)
    policy, reference = torch.rand(2, 5, 30, dtype=torch.float64, generator=generator)
    log_ratio = (policy / temperature).log_softmax(1) - (reference / temperature).log_softmax(1)
    x = 15.0 * temperature * (log_ratio[:, :1] - log_ratio[:, 1:4])
    expected = -torch.nn.functional.logsigmoid(x).mean(dim=1)
    found = losses("sigmoid", reward_margins(policy[:, :4], reference[:, :4]), beta=15.0)
    torch.testing.assert_close(found, expected)


# A naive loop, and what must not matter.


def naive(variant: str, policy: list[float], before: list[float], there: list[int], beta: float, epsilon: float):
    """Compute the loss of one query from the scores of its images, negative by negative in plain floats."""
    x = {n: beta * ((policy[0] - policy[n]) - (before[0] - before[n])) for n in there}
    log_sigma = {n: -math.log(1 + math.exp(-value)) for n, value in x.items()}
    log_not = {n: -math.log(1 + math.exp(value)) for n, value in x.items()}
    ranked = sorted([0, *there], key=lambda n: -policy[n])
    gain = {n: 1 / math.log2(2 + place) for place, n in enumerate(ranked)}
    weight = {n: abs(gain[0] - gain[n]) if variant == "listwise" else 1.0 for n in there}
    each = {
        "sigmoid": lambda n: -log_sigma[n],
        "listwise": lambda n: -log_sigma[n],
        "label_smoothed": lambda n: -(1 - epsilon) * log_sigma[n] - epsilon * log_not[n],
        "robust": lambda n: (-(1 - epsilon) * log_sigma[n] + epsilon * log_not[n]) / (1 - 2 * epsilon),
        "hinge": lambda n: max(0.0, 1 - x[n]),
        "ipo": lambda n: (x[n] - 0.5) ** 2,
    }
    if not there:
        return 0.0
    if variant == "sdpo":
        return math.log(1 + sum(math.exp(-x[n]) for n in there))
    return sum(weight[n] * each[variant](n) for n in there) / sum(weight.values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("with_reference", [True, False])
def test_parity_with_a_naive_loop(variant, with_reference):
    scores, reference, present = draw(queries=20)
    reference = reference if with_reference else None
    found = losses(variant, reward_margins(scores, reference), beta=4.0, epsilon=0.2, present=present, scores=scores)
    before = torch.zeros_like(scores) if reference is None else reference
    there = [[n + 1 for n in row.nonzero().flatten().tolist()] for row in present]
    rows = zip(scores.tolist(), before.tolist(), there)
    assert found.tolist() == pytest.approx([naive(variant, *row, 4.0, 0.2) for row in rows], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_constant_on_all_scores_of_a_query_changes_nothing(variant):
    scores, reference, present = draw()
    shift = torch.linspace(-3, 3, len(scores), dtype=torch.float64)[:, None]
    before = losses(variant, reward_margins(scores, reference), beta=4.0, present=present, scores=scores)
    moved = reward_margins(scores + shift, reference - 2 * shift)
    torch.testing.assert_close(losses(variant, moved, beta=4.0, present=present, scores=scores + shift), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_order_of_negatives_and_what_stands_in_for_missing_ones_change_nothing(variant):
    scores, reference, present = draw()
    expected = losses(variant, reward_margins(scores, reference), beta=4.0, present=present, scores=scores)
    other = scores.clone()
    other[:, 1:][~present] = torch.nan
    found = losses(variant, reward_margins(other, reference), beta=4.0, present=present, scores=other)
    torch.testing.assert_close(found, expected)
    order = [0, 3, 1, 4, 2]
    mixed = [tensor[:, order] for tensor in (scores, reference)]
    columns = [place - 1 for place in order[1:]]
    found = losses(variant, reward_margins(*mixed), beta=4.0, present=present[:, columns], scores=mixed[0])
    torch.testing.assert_close(found, expected)


# Gradients.


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_finite_differences(variant):
    scores, reference, present = draw()

    def total(policy):
        settings = PreferenceSettings(variant, beta=4.0, epsilon=0.2)
        return preference_losses(reward_margins(policy, reference), present, policy, settings)

    assert torch.autograd.gradcheck(total, (scores.requires_grad_(),))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [0.0, 1.0, 1e4])
def test_gradients_are_finite_also_without_a_negative(variant, size):
    """This holds also if the exponential of a margin exceeds float32; a query without negatives has gradient 0."""
    scores, reference, present = draw()
    policy = (size * scores).float().requires_grad_()
    found = preference_losses(reward_margins(policy, reference.float()), present, policy, PreferenceSettings(variant))
    found.sum().backward()
    assert found[-1] == 0
    assert bool(found.isfinite().all())
    assert bool(policy.grad.isfinite().all())
    assert torch.equal(policy.grad[-1], torch.zeros(5))
    assert torch.equal(policy.grad[:, 1:][~present], torch.zeros(int((~present).sum())))


@pytest.mark.parametrize("variant", PAIRED)
def test_the_right_image_rises_and_the_wrong_ones_fall(variant):
    """At h = 0 each variant's gradient has these signs and the sum 0, so that a constant shift changes nothing."""
    policy = torch.tensor([[0.5, 0.7, 0.3]], requires_grad=True)
    present = torch.ones(1, 2, dtype=torch.bool)
    preference_losses(
        reward_margins(policy, policy.detach()), present, policy, PreferenceSettings(variant)
    ).sum().backward()
    assert policy.grad[0, 0] < 0
    assert bool((policy.grad[0, 1:] > 0).all())
    assert float(policy.grad.sum()) == pytest.approx(0, abs=1e-6)


# Settings.


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"beta": 0}, r"run\.dpo\.beta must be a number > 0, got 0\."),
        ({"beta": -1.0}, "got -1.0"),
        ({"beta": float("inf")}, "beta must be a number > 0"),
        ({"beta": None}, "got null"),
        ({"beta": True}, "got true"),
        ({"epsilon": 0.5}, r"run\.dpo\.epsilon must be a number >= 0 and < 0\.5, got 0\.5\."),
        ({"epsilon": -0.1}, "got -0.1"),
        ({"epsilon": "0.1"}, "got '0.1'"),
        ({"anchor": -1}, r"run\.dpo\.anchor must be a number >= 0, got -1\."),
        ({"anchor": float("nan")}, "anchor must be a number >= 0, got NaN"),
        ({"variant": "sigmod"}, r"variant must be one of sigmoid, .*listwise, got 'sigmod'; did you mean 'sigmoid'\?"),
        ({"reference": False}, r"reference must be one of start, mined, none, got false\."),
        ({"positive": "images"}, r"positive must be one of target, image, got 'images'; did you mean 'image'\?"),
    ],
)
def test_impossible_values_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        PreferenceSettings(**settings)


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError, match=r"(?s)variant.*beta.*epsilon.*anchor"):
        PreferenceSettings(variant="dpo", beta=0, epsilon=1, anchor=-1)
