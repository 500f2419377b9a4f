"""Weight perturbation: hand-derived steps, reductions, and the model call against a naive in-place reference."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from fairscale.nn.checkpoint.checkpoint_activations import checkpoint_wrapper
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer, select_tensors
from lavis_cir_plugin.methods.wrf4cir.perturbation import LowRank, WeightPerturbation, ascent_step
from lavis_cir_plugin.training.lora import LoraSettings, add_adapters


def test_tensor_scope_equals_the_formula_worked_by_hand():
    """theta = (3, 4), norm 5; g = (0, 2), norm 2; gamma 0.1: delta = 0.1 * 5 * (0, 1) = (0, 0.5), uphill."""
    (step,) = ascent_step([torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 2.0])], gamma=0.1)
    torch.testing.assert_close(step, torch.tensor([0.0, 0.5]))


def test_global_scope_uses_one_ratio_for_all_tensors():
    """Norms over both tensors: theta (3, 0) and (0, 4) give 5, g (1, 0) and (0, 2) give sqrt 5; ratio gamma sqrt 5."""
    weights = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    gradients = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])]
    steps = ascent_step(weights, gradients, gamma=0.1, scope="global")
    ratio = 0.1 * math.sqrt(5)
    torch.testing.assert_close(steps[0], torch.tensor([ratio, 0.0]))
    torch.testing.assert_close(steps[1], torch.tensor([0.0, 2 * ratio]))


def test_global_scope_is_sam_with_rho_gamma_times_norm():
    """SAM: rho g / ||g|| with rho = gamma ||theta||, so the whole perturbation has the length gamma ||theta||."""
    torch.manual_seed(0)
    weights, gradients = ([torch.randn(3, 2), torch.randn(5)] for _ in range(2))
    steps = ascent_step(weights, gradients, gamma=0.01, scope="global")
    length = math.sqrt(sum(float(step.square().sum()) for step in steps))
    assert length == pytest.approx(0.01 * math.sqrt(sum(float(w.square().sum()) for w in weights)), rel=1e-5)


def test_rows_have_their_own_radius_and_untouched_rows_stay():
    """Rows (3, 4) and (6, 8) with gradients (0, 1) and (0, 0): delta = 0.1 * 5 * (0, 1), and nothing."""
    step = ascent_step(
        [torch.tensor([[3.0, 4.0], [6.0, 8.0]])], [torch.tensor([[0.0, 1.0], [0.0, 0.0]])], gamma=0.1, by_row=[True]
    )[0]
    torch.testing.assert_close(step, torch.tensor([[0.0, 0.5], [0.0, 0.0]]))


def test_a_tiny_gradient_keeps_its_direction():
    """A gradient of 1e-9 in half precision would be zero; norms are taken in float32."""
    (step,) = ascent_step([torch.ones(4)], [torch.full((4,), 1e-9)], gamma=0.5)
    torch.testing.assert_close(step, torch.full((4,), 0.5), rtol=1e-2, atol=0)


def test_a_zero_gradient_gives_no_perturbation():
    (step,) = ascent_step([torch.ones(4)], [torch.zeros(4)], gamma=0.5)
    assert torch.equal(step, torch.zeros(4))


def test_absolute_radius_is_sam_worked_by_hand():
    """SAM, equation 2: rho g / ||g||; g = (3, 4) has norm 5, rho 0.5: (0.3, 0.4), whatever the weights."""
    for weight in (torch.tensor([1.0, 1.0]), torch.tensor([100.0, 0.0])):
        (step,) = ascent_step([weight], [torch.tensor([3.0, 4.0])], gamma=0.5, radius="absolute", scope="global")
        torch.testing.assert_close(step, torch.tensor([0.3, 0.4]))


def test_elementwise_radius_is_asam_worked_by_hand():
    """ASAM, equation 8: rho T^2 g / ||T g|| with T = |theta|; theta = (2, -1), g = (1, 2): T g = (2, 2), norm sqrt 8,
    T^2 g = (4, 2); rho 0.1 gives 0.1 * (4, 2) / sqrt 8."""
    (step,) = ascent_step(
        [torch.tensor([2.0, -1.0])], [torch.tensor([1.0, 2.0])], gamma=0.1, radius="elementwise", scope="global"
    )
    torch.testing.assert_close(step, 0.1 * torch.tensor([4.0, 2.0]) / math.sqrt(8))


def test_elementwise_radius_does_not_depend_on_how_neighbouring_layers_are_scaled():
    """ASAM's reason: theta1 -> 10 theta1, theta2 -> theta2 / 10 is the same function, with gradients / 10 and * 10;
    the perturbed function is the same too, so the perturbations scale as the weights do."""
    torch.manual_seed(0)
    weights, gradients = ([torch.randn(3, 3), torch.randn(3, 3)] for _ in range(2))
    scaled = [weights[0] * 10, weights[1] / 10]
    steps = ascent_step(weights, gradients, gamma=0.1, radius="elementwise", scope="global")
    gradients = [gradients[0] / 10, gradients[1] * 10]
    other = ascent_step(scaled, gradients, gamma=0.1, radius="elementwise", scope="global")
    torch.testing.assert_close(other, [steps[0] * 10, steps[1] / 10])


def test_lora_factors_take_the_radius_of_their_merged_weight_worked_by_hand():
    """W = (3, 4), norm 5; A = (1, 0), B = 0, s = 2; g_A = 0, g_B = 7: the merged weight moves by s g_B A = (14, 0) per
    unit, so the ratio is 0.1 * 5 / 14 and delta_B = 0.25, a merged change of 2 * 0.25 * (1, 0), of length 0.1 * 5."""
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0]])
    pair = LowRank(a=0, b=1, scaling=2.0, merged_norm=torch.tensor(5.0))
    steps = ascent_step([a, b], [torch.zeros(1, 2), torch.tensor([[7.0]])], gamma=0.1, low_rank=[pair])
    torch.testing.assert_close(steps, [torch.zeros(1, 2), torch.tensor([[0.25]])])


def test_the_first_order_change_of_a_merged_weight_has_the_relative_length():
    """This holds for random factors, also beside an ordinary tensor, in both scopes."""
    torch.manual_seed(0)
    base, a, b, other = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2), torch.randn(5)
    directions = [torch.randn(2, 4), torch.randn(6, 2), torch.randn(5)]
    merged = base + 0.5 * b @ a
    pair = LowRank(a=0, b=1, scaling=0.5, merged_norm=merged.norm())
    step_a, step_b, step = ascent_step([a, b, other], directions, gamma=0.01, low_rank=[pair])
    assert 0.5 * (step_b @ a + b @ step_a).norm() == pytest.approx(0.01 * float(merged.norm()), rel=1e-5)
    assert float(step.norm()) == pytest.approx(0.01 * float(other.norm()), rel=1e-5)
    step_a, step_b, step = ascent_step([a, b, other], directions, gamma=0.01, scope="global", low_rank=[pair])
    change = math.hypot(0.5 * float((step_b @ a + b @ step_a).norm()), float(step.norm()))
    assert change == pytest.approx(0.01 * math.hypot(float(merged.norm()), float(other.norm())), rel=1e-5)


@pytest.mark.parametrize(
    ("directions", "choices", "message"),
    [
        ([torch.ones(2)], {"radius": "relativ"}, "radius must be one of .*got 'relativ'; did you mean 'relative'"),
        ([torch.ones(2)], {"scope": "globl"}, "scope must be one of tensor, global, got 'globl'"),
        ([torch.ones(1)], {}, r"of its shape, got weights \[\(2,\)\] and directions \[\(1,\)\]"),
        ([torch.ones(2), torch.ones(2)], {}, "each weight needs a direction"),
    ],
)
def test_a_step_that_would_be_another_than_meant_is_refused(directions, choices, message):
    """An unknown radius was an absolute one, an unknown scope each tensor's own, and short directions were repeated."""
    with pytest.raises(ValueError, match=message):
        ascent_step([torch.ones(2)], directions, 0.1, **choices)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    radius=st.sampled_from(["relative", "absolute", "elementwise"]),
    scope=st.sampled_from(["tensor", "global"]),
    scale=st.floats(1e-6, 1e6),
)
def test_every_step_has_the_radius_whatever_the_scale_of_the_direction(shapes, seed, radius, scope, scale):
    """In its own measure (delta / |theta| for ASAM) the perturbation has length gamma, and it never points downhill."""
    generator = torch.Generator().manual_seed(seed)
    weights, directions = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    scaled = [scale * d for d in directions]
    steps = ascent_step(weights, scaled, 0.01, radius=radius, scope=scope, eps=1e-30)  # a larger one shortens tiny ones
    measured = [s / w.abs() if radius == "elementwise" else s for s, w in zip(steps, weights)]
    lengths = torch.stack([m.norm() for m in measured])
    sizes = torch.stack([w.norm() if radius == "relative" else torch.ones(()) for w in weights])
    if scope == "global":
        lengths = lengths.norm()
        sizes = sizes.norm() if radius == "relative" else torch.ones(())
    torch.testing.assert_close(lengths, 0.01 * sizes, rtol=1e-3, atol=1e-7)
    assert all(float((s * d).sum()) >= 0 for s, d in zip(steps, directions))


class Net(nn.Module):
    """Model with embedding, linear layer, dropout, layer norm and batch norm, which the settings distinguish."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, samples):
        hidden = self.batch_norm(self.norm(self.dropout(self.linear(self.table(samples["x"])))))
        return {"loss": nn.functional.cross_entropy(self.head(hidden), samples["y"])}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 7, (16,), generator=generator)
    return {"x": x, "y": x % 3, "epoch": 0}


def make(settings, net=None):
    torch.manual_seed(0)
    net = net or Net()
    optimizer = PerturbingOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, settings)
    return net, optimizer


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("embeddings", ["exclude", "row", "tensor"])
def test_gradients_equal_a_naive_in_place_step(scope, embeddings, batch):
    """The reference writes theta + delta into the weights, runs again, and copies the weights back."""
    settings = WeightPerturbation(gamma=0.1, scope=scope, embeddings=embeddings, tensors="all")
    net, optimizer = make(settings)
    naive = copy.deepcopy(net)

    torch.manual_seed(5)
    optimizer.perturb(net)(batch)["loss"].backward()

    torch.manual_seed(5)
    before = copy.deepcopy(naive.state_dict())
    naive(batch)["loss"].backward()
    names = list(select_tensors(net, settings))
    weights = [dict(naive.named_parameters())[name] for name in names]
    steps = ascent_step(
        weights,
        [w.grad for w in weights],
        0.1,
        scope=scope,
        by_row=[embeddings == "row" and n == "table.weight" for n in names],
    )
    naive.zero_grad()
    with torch.no_grad():
        for weight, step in zip(weights, steps):
            weight += step
    torch.manual_seed(5)
    naive(batch)["loss"].backward()
    for (name, weight), reference in zip(net.named_parameters(), naive.parameters()):
        torch.testing.assert_close(weight.grad, reference.grad, msg=name)
        assert torch.equal(weight, before[name]), f"{name} was written into"


def test_gamma_zero_is_the_plain_model_bit_for_bit(batch):
    net, optimizer = make(WeightPerturbation(gamma=0))
    plain = copy.deepcopy(net)
    for module, call in ((net, optimizer.perturb(net)), (plain, plain)):
        torch.manual_seed(1)
        call(batch)["loss"].backward()
        module.after = torch.rand(1)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), plain.parameters()))
    assert torch.equal(net.after, plain.after)


def test_random_numbers_advance_as_in_a_plain_step(batch):
    """Both passes use the same dropout mask, and code after a perturbed step draws the numbers of a plain step."""
    draws = []
    for gamma in (0, 0.05):
        net, optimizer = make(WeightPerturbation(gamma=gamma))
        torch.manual_seed(1)
        optimizer.perturb(net)(batch)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_batch_norm_statistics_are_those_of_the_clean_pass(batch):
    net, optimizer = make(WeightPerturbation(gamma=0.2))
    plain = copy.deepcopy(net)
    for call in (optimizer.perturb(net), plain):
        torch.manual_seed(1)
        call(batch)
    assert torch.equal(net.batch_norm.running_mean, plain.batch_norm.running_mean)
    assert net.batch_norm.num_batches_tracked == 1


def test_warm_up_epochs_are_not_perturbed(batch):
    net, optimizer = make(WeightPerturbation(gamma=0.1, warmup_epochs=2))
    call = optimizer.perturb(net)
    for epoch in range(4):
        call({**batch, "epoch": epoch})
    assert optimizer.steps == {"perturbed": 2, "skipped": 0}


@pytest.mark.parametrize(
    ("values", "total", "expected"),
    [
        ({}, None, [True, True, True, True]),
        ({"warmup_epochs": 1}, 4, [False, True, True, True]),
        ({"last_epochs": 1}, 4, [False, False, False, True]),
        ({"warmup_epochs": 3, "last_epochs": 2}, 4, [False, False, False, True]),
        ({"gamma": 0.0}, 4, [False] * 4),
    ],
)
def test_when_a_run_is_perturbed(values, total, expected):
    settings = WeightPerturbation(**values)
    assert [settings.is_active(epoch, total) for epoch in range(4)] == expected


def naive_gradients(net, weights, steps, batch, seed):
    """Return the gradients at weights + steps, which are written in place and restored."""
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, step in zip(weights, steps):
            weight += step
    torch.manual_seed(seed)
    net.zero_grad()
    net(batch)["loss"].backward()
    with torch.no_grad():
        for weight, clean in zip(weights, before):
            weight.copy_(clean)
    return [weight.grad.clone() for weight in weights]


def test_momentum_perturbs_against_the_first_moment_in_one_pass(batch):
    """MSAM's sign: delta = -gamma ||theta|| m / ||m|| with AdamW's exp_avg m; none before the first step."""
    torch.manual_seed(0)
    net = Net()
    settings = WeightPerturbation(gamma=0.05, direction="momentum")
    optimizer = PerturbingOptimizer(torch.optim.AdamW(net.parameters(), lr=0.01), net, settings)
    calls = []
    net.head.register_forward_hook(lambda *_: calls.append(1))
    call = optimizer.perturb(net)
    call(batch)["loss"].backward()
    assert optimizer.steps["perturbed"] == 0
    optimizer.step()
    optimizer.zero_grad()
    naive = copy.deepcopy(net)
    moments = [optimizer.state[weight]["exp_avg"] for weight in optimizer.weights.values()]
    steps = ascent_step(list(optimizer.weights.values()), [-moment for moment in moments], 0.05)
    torch.manual_seed(2)
    call(batch)["loss"].backward()
    assert len(calls) == 2, "one pass a step"
    weights = [dict(naive.named_parameters())[name] for name in optimizer.weights]
    expected = naive_gradients(naive, weights, steps, batch, seed=2)
    torch.testing.assert_close([weight.grad for weight in optimizer.weights.values()], expected)
    assert optimizer.steps["perturbed"] == 1


def test_a_random_direction_has_the_relative_length_and_leaves_dropout_alone(batch):
    net, optimizer = make(WeightPerturbation(gamma=0.05, direction="random"))
    optimizer.is_measuring = True
    torch.manual_seed(1)
    optimizer.perturb(net)(batch)
    after = torch.rand(1)
    expected = 0.05 * math.sqrt(sum(float(weight.square().sum()) for weight in optimizer.weights.values()))
    assert optimizer.measured["perturbation_norm"] == pytest.approx(expected, rel=1e-4)
    plain, stock = make(WeightPerturbation(gamma=0))
    torch.manual_seed(1)
    stock.perturb(plain)(batch)
    assert torch.equal(after, torch.rand(1))
    assert net.batch_norm.num_batches_tracked == 1, "a single pass keeps the statistics itself"


def test_random_directions_differ_by_step_and_repeat_by_seed():
    def draws(seed):
        _, optimizer = make(WeightPerturbation(direction="random"))
        optimizer.seed = seed
        found = []
        for _ in range(2):
            found.append(optimizer.known_direction())
            optimizer.steps["perturbed"] += 1
        return found

    first, again, other = draws(1), draws(1), draws(2)
    assert all(torch.equal(x, y) for x, y in zip(first[0] + first[1], again[0] + again[1]))
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(first[0][0], other[0][0])


def test_a_direction_is_used_again_for_every_k_steps(batch):
    """Passes with every = 3 over six steps: 2, 1, 1, 2, 1, 1; between them the kept gradient is the direction."""
    net, optimizer = make(WeightPerturbation(gamma=0.05, every=3))
    net.eval()
    calls = []
    net.head.register_forward_hook(lambda *_: calls.append(1))
    call, passes = optimizer.perturb(net), []
    kept = []
    for _ in range(6):
        calls.clear()
        call(batch)["loss"].backward()
        passes.append(len(calls))
        kept.append(optimizer.direction)
        optimizer.step()
        optimizer.zero_grad()
    assert passes == [2, 1, 1, 2, 1, 1]
    assert kept[0] is kept[2]
    assert kept[2] is not kept[3]

    restored = make(WeightPerturbation(gamma=0.05, every=3), copy.deepcopy(net))[1]
    calls_before = optimizer.uses
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert restored.uses == calls_before == 3
    assert all(torch.equal(x, y) for x, y in zip(restored.direction, optimizer.direction))


def test_cosine_and_norm_are_those_worked_by_hand():
    """L = w1^2 / 2 + w2: g = (w1, 1) = (3, 1); gamma 0.1: delta = 0.1 ||w|| g / ||g||, g' = (3 + delta1, 1)."""

    class Parabola(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[3.0, 4.0]]))

        def forward(self, samples):
            return {"loss": self.w[0, 0] ** 2 / 2 + self.w[0, 1]}

    net = Parabola()
    _, optimizer = make(WeightPerturbation(gamma=0.1), net)
    optimizer.is_measuring = True
    optimizer.perturb(net)({"epoch": 0})["loss"].backward()
    optimizer.step()
    shift = 0.1 * 5 * 3 / math.sqrt(10)
    dot, lengths = 3 * (3 + shift) + 1, math.sqrt(10) * math.hypot(3 + shift, 1)
    assert optimizer.measured == pytest.approx({"perturbation_norm": 0.5, "cosine": dot / lengths}, rel=1e-5)


def test_gradients_are_clipped_before_the_step(batch):
    net, _ = make(WeightPerturbation(gamma=0.1))
    optimizer = PerturbingOptimizer(
        torch.optim.SGD(net.parameters(), lr=1.0), net, WeightPerturbation(gamma=0.1), max_grad_norm=0.01
    )
    before = [weight.detach().clone() for weight in net.parameters()]
    optimizer.perturb(net)(batch)["loss"].backward()
    optimizer.step()
    moved = math.sqrt(sum(float((w - b).square().sum()) for w, b in zip(net.parameters(), before)))
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("direction", ["gradient", "random"])
def test_autocast_to_bfloat16_sees_the_perturbed_weights(direction, batch):
    """The cast cache of autocast would hide a weight that was changed in place; gradients equal those of a copy whose
    weights were perturbed outside."""
    net, optimizer = make(WeightPerturbation(gamma=0.3, direction=direction))
    net.eval()
    steps = []
    stock = optimizer.ascent
    optimizer.ascent = lambda d: steps.append(stock(d).steps()) or stock(d)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = optimizer.perturb(net)(batch)["loss"]
    loss.backward()
    naive = copy.deepcopy(net)
    naive.zero_grad()
    with torch.no_grad():
        for name, step in zip(optimizer.weights, steps[0]):
            dict(naive.named_parameters())[name].add_(step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = naive(batch)["loss"]
    expected.backward()
    assert torch.equal(loss, expected)
    for weight, other in zip(net.parameters(), naive.parameters()):
        torch.testing.assert_close(weight.grad, other.grad)


def test_the_step_of_adapters_is_computed_in_single_precision_under_autocast(batch):
    """Gradients near fp16's end, as GradScaler's factor makes them, have a product with the factors beyond it."""
    net = Net()
    add_adapters(net, LoraSettings(target_modules=["linear", "head"], r=2, init_lora_weights=False))
    _, optimizer = make(WeightPerturbation(gamma=0.1), net)
    direction = [torch.full_like(weight, 60_000.0) for weight in optimizer.weights.values()]
    expected = optimizer.ascent(direction)
    with torch.autocast("cpu", dtype=torch.float16):
        step = optimizer.ascent(direction)
    assert step.is_finite()
    assert all(map(torch.equal, step.steps(), expected.steps()))


def test_accumulated_gradients_are_the_sum_over_micro_batches(batch):
    """Each micro-batch is perturbed in its own direction, as a naive loop over them does."""
    net, optimizer = make(WeightPerturbation(gamma=0.1))
    net.eval()
    parts = [{**batch, "x": batch["x"][i : i + 8], "y": batch["y"][i : i + 8]} for i in (0, 8)]
    naive = copy.deepcopy(net)
    weights = [dict(naive.named_parameters())[name] for name in optimizer.weights]
    total = [torch.zeros_like(weight) for weight in weights]
    for part in parts:
        optimizer.perturb(net)(part)["loss"].backward()
        naive.zero_grad()
        naive(part)["loss"].backward()
        steps = ascent_step(weights, [weight.grad for weight in weights], 0.1)
        total = [t + g for t, g in zip(total, naive_gradients(naive, weights, steps, part, seed=0))]
    torch.testing.assert_close([weight.grad for weight in optimizer.weights.values()], total)


def test_a_scaler_skips_an_overflowing_step_and_the_weights_stay(batch):
    """If the perturbed pass has infinite gradients, GradScaler skips the step, and nothing of delta remains."""
    net, _ = make(WeightPerturbation(gamma=0.1))
    optimizer = PerturbingOptimizer(torch.optim.AdamW(net.parameters()), net, WeightPerturbation(gamma=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = copy.deepcopy(net.state_dict())
    net.eval()
    loss = optimizer.perturb(net, scaler.get_scale)(batch)["loss"]
    (scaler.scale(loss) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(weight, before[name]) for name, weight in net.named_parameters())
    assert scaler.get_scale() == 2.0**39
    optimizer.zero_grad()
    scaler.scale(optimizer.perturb(net, scaler.get_scale)(batch)["loss"]).backward()
    scaler.step(optimizer)
    assert not torch.equal(net.head.weight, before["head.weight"])


def test_directions_of_one_pass_are_refused_beside_momentum_copies():
    net = Momentum()
    net.model_pairs = [[net.net, net.copy]]
    for values in ({"direction": "random"}, {"every": 2}):
        with pytest.raises(ValueError, match=r"Momentum keeps momentum copies .*set direction: gradient and every: 1"):
            make(WeightPerturbation(**values), net)
    make(WeightPerturbation(), net)


def test_an_overflow_in_the_first_pass_means_no_perturbation(batch):
    """With a loss scale of infinity the direction is not finite; the output is that of the clean weights."""
    net, optimizer = make(WeightPerturbation(gamma=0.1))
    plain = copy.deepcopy(net)
    torch.manual_seed(1)
    loss = optimizer.perturb(net, lambda: math.inf)(batch)["loss"]
    torch.manual_seed(1)
    assert torch.equal(loss, plain(batch)["loss"])
    assert optimizer.steps == {"perturbed": 0, "skipped": 1}
    assert net.batch_norm.num_batches_tracked == 1


def test_an_exception_in_the_perturbed_pass_leaves_clean_weights(batch):
    net, optimizer = make(WeightPerturbation(gamma=0.1))
    before = copy.deepcopy(net.state_dict())
    calls = []

    def fail_the_second_time(module, inputs):
        calls.append(module.weight.clone())
        if len(calls) == 2:
            raise KeyboardInterrupt

    net.head.register_forward_pre_hook(fail_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        optimizer.perturb(net)(batch)
    assert not torch.equal(calls[0], calls[1]), "the second pass was to be perturbed"
    assert torch.equal(net.head.weight, before["head.weight"])


def test_the_perturbation_climbs_the_loss(batch):
    net, optimizer = make(WeightPerturbation(gamma=0.01, tensors="all"))
    net.eval()
    assert optimizer.perturb(net)(batch)["loss"] > net(batch)["loss"]


@pytest.mark.parametrize("kind", ["one tensor in two modules", "one module under two names"])
def test_sharing_survives_and_gradients_equal_the_naive_way(kind, batch):
    """Both uses of the shared weight see the same perturbation, and the clean tensor is back in both places."""

    class Sharing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 4) if kind == "one tensor in two modules" else self.linear
            self.other.weight = self.linear.weight

        def forward(self, samples):
            return {"loss": self.head(self.other(self.linear(self.table(samples["x"])))).square().mean()}

    net, optimizer = make(WeightPerturbation(gamma=0.1), Sharing())
    naive = copy.deepcopy(net)
    shared = net.linear.weight
    optimizer.perturb(net)(batch)["loss"].backward()
    assert net.linear.weight is shared
    assert net.other.weight is shared

    naive(batch)["loss"].backward()
    weights = [naive.linear.weight, naive.head.weight]
    steps = ascent_step(weights, [w.grad for w in weights], 0.1)
    naive.zero_grad()
    with torch.no_grad():
        for weight, step in zip(weights, steps):
            weight += step
    naive(batch)["loss"].backward()
    torch.testing.assert_close(shared.grad, naive.linear.weight.grad)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ("no_1d", {"linear.weight", "head.weight"}),
        ("norm", {"norm.weight", "norm.bias", "batch_norm.weight", "batch_norm.bias"}),
        ("^head", {"head.weight", "head.bias"}),
    ],
)
def test_the_config_chooses_the_tensors(tensors, expected):
    assert set(select_tensors(Net(), WeightPerturbation(tensors=tensors))) == expected


def test_frozen_tensors_are_never_chosen():
    net = Net()
    net.head.requires_grad_(False)
    assert not any(name.startswith("head") for name in select_tensors(net, WeightPerturbation(tensors="all")))


def test_settings_and_counters_travel_with_the_state(batch):
    net, optimizer = make(WeightPerturbation(gamma=0.1))
    optimizer.perturb(net)(batch)["loss"].backward()
    optimizer.step()
    other_net, other = make(WeightPerturbation(gamma=0.1))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.steps == {"perturbed": 1, "skipped": 0}
    assert other.state_dict()["wrf"]["settings"]["gamma"] == 0.1
    assert other.param_groups is other.optimizer.param_groups
    stock = torch.optim.SGD(other_net.parameters(), lr=0.1).state_dict()
    other.load_state_dict(stock)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_kept_direction_of_an_earlier_version_is_used_if_later_settings_have_their_defaults(share, batch):
    net, optimizer = make(WeightPerturbation(gamma=0.1, every=3))
    optimizer.perturb(net)(batch)["loss"].backward()
    state = copy.deepcopy(optimizer.state_dict())
    assert state["wrf"]["settings"].pop("direction_share") == 1
    _, other = make(WeightPerturbation(gamma=0.1, every=3))
    object.__setattr__(other.settings, "direction_share", share)  # this net has no loss of a share
    other.load_state_dict(state)
    assert (other.direction is not None) == (share == 1)


def test_the_wrapper_is_an_optimizer_to_schedulers_and_scalers(batch):
    net, optimizer = make(WeightPerturbation(gamma=0.1))
    assert isinstance(optimizer, torch.optim.Optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(net.state_dict())
    optimizer.perturb(net)(batch)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
    assert torch.equal(net.head.weight, before["head.weight"])
    assert net.head.weight.grad is None


def test_a_fused_optimizer_under_a_scaler_gets_true_gradients_and_skips_an_overflow():
    """GradScaler sets attributes on a fused optimizer, which a wrapper would keep from it."""

    def steps(wrap):
        torch.manual_seed(0)
        net = nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True)
        optimizer = PerturbingOptimizer(optimizer, net, WeightPerturbation(gamma=0)) if wrap else optimizer
        scaler = torch.amp.GradScaler("cpu")
        for factor in (1.0, math.inf, 1.0):
            scaler.scale(net(torch.ones(2, 3)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return net.weight

    torch.testing.assert_close(steps(wrap=True), steps(wrap=False))
    assert steps(wrap=True).isfinite().all()


class Momentum(nn.Module):
    """Model with a frozen momentum copy and a counter, both written in forward, as in LAVIS's ALBEF and BLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.copy = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("count", torch.zeros(()))
        self.seen = []

    def forward(self, samples):
        self.seen.append(float(self.count))
        self.count += 1
        for moving, weight in zip(self.copy.parameters(), self.net.parameters()):
            moving.data = moving.data * 0.5 + weight.data * 0.5
        return {"loss": (self.net(samples["x"]) - self.copy(samples["x"])).square().mean()}


def test_momentum_copies_and_queues_move_once_and_by_clean_weights():
    net, optimizer = make(WeightPerturbation(gamma=0.3), Momentum())
    plain = copy.deepcopy(net)
    samples = {"x": torch.randn(5, 4), "epoch": 0}
    for call in (optimizer.perturb(net), plain):
        call(samples)
        call(samples)
    torch.testing.assert_close(net.copy.weight, plain.copy.weight, rtol=0, atol=0)
    assert net.seen == [0, 0, 1, 1], "both passes start from the same state"
    assert float(net.count) == 2
    assert not net.copy.weight.requires_grad


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_the_optimizer_can_be_copied(way, batch):
    net, optimizer = make(WeightPerturbation(gamma=0.1))
    optimizer.perturb(net)(batch)["loss"].backward()
    optimizer.step()
    twin = way(optimizer)
    assert twin.steps == optimizer.steps
    assert twin.settings == optimizer.settings
    assert twin.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_beside_a_scheduler_steps_its_own_weights(way, batch):
    """A scheduler of torch replaces the optimizer's ``step`` by one that is bound to that optimizer."""
    net, optimizer = make(WeightPerturbation(gamma=0.1))
    torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    twin, copied = way((net, optimizer))
    copied.perturb(twin)(batch)["loss"].backward()
    before = [[weight.detach().clone() for weight in model.parameters()] for model in (net, twin)]
    copied.step()
    moved = [
        any(not torch.equal(weight, old) for weight, old in zip(model.parameters(), weights))
        for model, weights in zip((net, twin), before)
    ]
    assert moved == [False, True]


def test_gradients_of_a_closure_are_limited_too(batch):
    """SGD at rate 1 moves the weights by the gradient, which is limited to length 0.01."""
    settings = WeightPerturbation(gamma=0.1)
    net, _ = make(settings)
    optimizer = PerturbingOptimizer(torch.optim.SGD(net.parameters(), lr=1.0), net, settings, max_grad_norm=0.01)
    call = optimizer.perturb(net)

    def closure():
        optimizer.zero_grad()
        loss = call(batch)["loss"]
        loss.backward()
        return loss

    before = [weight.detach().clone() for weight in net.parameters()]
    assert float(optimizer.step(closure)) > 0
    moved = math.sqrt(sum(float((w - b).square().sum()) for w, b in zip(net.parameters(), before)))
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("values", [{"warmup_epochs": 2}, {"last_epochs": 2}])
def test_an_epoch_that_the_settings_count_must_be_named(values, batch):
    """Without it, the warm-up was left out, and nothing at all was perturbed with last_epochs."""
    net, _ = make(WeightPerturbation())
    optimizer = PerturbingOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1), net, WeightPerturbation(gamma=0.1, **values), total_epochs=5
    )
    with pytest.raises(
        ValueError, match=r"no 'epoch', from which run\.wrf\.(warmup|last)_epochs: 2 counts; set samples"
    ):
        optimizer.perturb(net)({"x": batch["x"], "y": batch["y"]})


def test_a_loop_of_ones_own_needs_no_epoch_for_settings_that_count_none(batch):
    net, optimizer = make(WeightPerturbation(gamma=0.1))
    optimizer.perturb(net)({"x": batch["x"], "y": batch["y"]})
    assert optimizer.steps == {"perturbed": 1, "skipped": 0}


def test_what_does_not_belong_together_is_refused(batch):
    net, optimizer = make(WeightPerturbation(gamma=0.1))
    with pytest.raises(ValueError, match=r"dictionary of samples.*got Tensor"):
        optimizer.perturb(net)(batch["x"])
    with pytest.raises(ValueError, match=r"has none of the 2 tensors of Net that are perturbed"):
        PerturbingOptimizer(torch.optim.SGD(Net().parameters(), lr=0.1), net, WeightPerturbation())
    with pytest.raises(ValueError, match=r"last_epochs: 2 counts from the end; give total_epochs"):
        PerturbingOptimizer(optimizer.optimizer, net, WeightPerturbation(last_epochs=2))


def test_the_perturbed_call_says_what_it_is():
    net, optimizer = make(WeightPerturbation(gamma=0.25))
    assert repr(optimizer.perturb(net)).startswith("PerturbedModel(Net, WeightPerturbation(gamma=0.25,")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gamma": -0.1}, r"run\.wrf\.gamma must be a number >= 0, got -0\.1"),
        ({"gamma": "big"}, r"run\.wrf\.gamma must be a number >= 0, got 'big'"),
        ({"gamma": float("nan")}, r"run\.wrf\.gamma must be"),
        ({"scope": "layer"}, r"run\.wrf\.scope must be one of tensor, global, got 'layer'"),
        ({"warmup_epochs": 1.5}, r"run\.wrf\.warmup_epochs must be a whole number >= 0, got 1\.5"),
        ({"embeddings": "none"}, r"run\.wrf\.embeddings must be one of exclude, row, tensor, got 'none'"),
        ({"radius": "round"}, r"run\.wrf\.radius must be one of relative, absolute, elementwise, got 'round'"),
        ({"direction": "down"}, r"run\.wrf\.direction must be one of gradient, random, momentum, got 'down'"),
        ({"gamma": -1, "radius": "absolute"}, r"run\.wrf\.gamma must be a number >= 0, got -1"),
        ({"gamma": float("inf"), "radius": "absolute"}, r"run\.wrf\.gamma must be a number >= 0, got Infinity"),
        ({"every": 0}, r"run\.wrf\.every must be a whole number >= 1, got 0"),
        ({"last_epochs": 0}, r"run\.wrf\.last_epochs must be a whole number >= 1, or null, got 0"),
        ({"radius": "elementwise", "direction": "random"}, r"elementwise is defined for direction: gradient"),
        ({"every": 2, "direction": "momentum"}, r"run\.wrf\.every: 2 spares passes of direction: gradient; momentum"),
        ({"embeddings": "row", "radius": "absolute"}, r"embeddings: row .* does not go with radius: absolute"),
        ({"eps": 0}, r"run\.wrf\.eps must be a number > 0, got 0"),
        ({"tensors": "("}, r"run\.wrf\.tensors must be one of .*, or a regular expression, got '\(' \(missing"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        WeightPerturbation(**values)


def test_half_precision_weights_are_refused():
    with pytest.raises(ValueError, match=r"2 trainable tensors are bfloat16 \(first: linear\.weight\).*float32"):
        make(WeightPerturbation(), Net().to(torch.bfloat16))


def test_recomputed_activations_are_refused():
    net = Net()
    net.linear.use_checkpoint = True
    with pytest.raises(ValueError, match=r"linear\.weight.*recomputes its activations.*use_grad_checkpoint: false"):
        make(WeightPerturbation(), net)
    net.linear.requires_grad_(False)
    make(WeightPerturbation(), net)
    net = Net()
    net.head = checkpoint_wrapper(net.head)  # what LAVIS's BLIP and CLIP towers use
    with pytest.raises(ValueError, match=r"inside 'head', which recomputes its activations"):
        make(WeightPerturbation(), net)


def test_a_choice_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"'nothing_here' chooses none of the 9 trainable tensors"):
        make(WeightPerturbation(tensors="nothing_here"))


def test_a_head_that_is_never_used_does_not_switch_momentum_off(batch):
    """AdamW keeps no moment for a tensor without gradient; the other tensors are still perturbed."""
    torch.manual_seed(0)
    net = Net()
    net.unused = nn.Linear(4, 4)
    settings = WeightPerturbation(gamma=0.05, direction="momentum")
    optimizer = PerturbingOptimizer(torch.optim.AdamW(net.parameters(), lr=0.01), net, settings)
    for _ in range(3):
        optimizer.perturb(net)(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.steps == {"perturbed": 2, "skipped": 0}


def test_momentum_copies_that_are_moved_in_place_move_once_and_by_clean_weights():
    """If a model names its momentum copies as LAVIS does (model_pairs), the second pass writes into copies of them."""

    class InPlace(Momentum):
        def __init__(self):
            super().__init__()
            self.model_pairs = [[self.net, self.copy]]

        def forward(self, samples):
            for moving, weight in zip(self.copy.parameters(), self.net.parameters()):
                moving.data.mul_(0.5).add_(weight.data, alpha=0.5)
            return {"loss": (self.net(samples["x"]) - self.copy(samples["x"])).square().mean()}

    net, optimizer = make(WeightPerturbation(gamma=0.3), InPlace())
    plain = copy.deepcopy(net)
    samples = {"x": torch.randn(5, 4), "epoch": 0}
    for call in (optimizer.perturb(net), plain):
        call(samples)
    torch.testing.assert_close(net.copy.weight, plain.copy.weight, rtol=0, atol=0)
