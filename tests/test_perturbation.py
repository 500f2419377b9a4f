"""Weight perturbation: hand-derived steps, reductions, and the model call against a naive in-place reference."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from fairscale.nn.checkpoint.checkpoint_activations import checkpoint_wrapper
from torch import nn

from lavis_cir_plugin.perturbation import WeightPerturbation, ascent_step
from lavis_cir_plugin.perturbed_model import PerturbingOptimizer, select_tensors


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


class Net(nn.Module):
    """Embedding, linear with dropout, layer norm, batch norm: the kinds of tensor that the settings tell apart."""

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
    """The textbook way: write theta + delta into the weights, run again, copy the weights back."""
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
    """Both passes use the same dropout mask, and what comes after a perturbed step draws what it would have drawn."""
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
    """GradScaler hands a fused optimizer its scale through attributes, which a wrapper would swallow."""

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
    """A frozen moving copy and a counter, both written in forward, as LAVIS's ALBEF and BLIP do."""

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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gamma": -0.1}, r"run\.wrf\.gamma must be >= 0 and < 1, got -0\.1"),
        ({"gamma": "big"}, r"run\.wrf\.gamma must be >= 0 and < 1, got 'big'"),
        ({"gamma": float("nan")}, r"run\.wrf\.gamma must be"),
        ({"scope": "layer"}, r"run\.wrf\.scope: 'layer' is not one of tensor, global"),
        ({"warmup_epochs": 1.5}, r"run\.wrf\.warmup_epochs must be a whole number >= 0, got 1\.5"),
        ({"embeddings": "none"}, r"run\.wrf\.embeddings: 'none' is not one of exclude, row, tensor"),
        ({"eps": 0}, r"run\.wrf\.eps must be > 0, got 0"),
        ({"tensors": "("}, r"run\.wrf\.tensors: '\(' is neither one of .* nor a regular expression"),
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
