"""Frozen sub-modules run once per step, and the result is bit for bit that of running everything twice."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_triplets
from fairscale.nn.checkpoint.checkpoint_activations import checkpoint_wrapper
from torch import nn

from lavis_cir_plugin.perturbation import WeightPerturbation
from lavis_cir_plugin.perturbed_model import PerturbingOptimizer


class Tower(nn.Module):
    """Counts how often it really runs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return self.inner(x)

    def forward_features(self, x):
        self.runs += 1
        return self.inner(x)


class Model(nn.Module):
    """A frozen tower before a trained head; subclasses use the tower in another way."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = Tower(nn.Sequential(nn.Linear(4, 4), *layers)).requires_grad_(False)
        self.before, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def features(self, x):
        return self.tower(x)

    def forward(self, samples):
        hidden = nn.functional.dropout(self.features(samples["x"]), 0.5, self.training)
        return {"loss": self.head(hidden).square().mean()}


class Twice(Model):
    def features(self, x):
        return self.tower(x) + self.tower(2 * x)


class ThroughFeatures(Model):
    def features(self, x):
        return self.tower.forward_features(x)


class WithoutGradient(Model):
    def features(self, x):
        with torch.no_grad():
            return self.tower(x)


class FedByTrained(Model):
    def features(self, x):
        return self.tower(self.before(x))


class FedByTrainedWithoutGradient(Model):
    def features(self, x):
        hidden = self.before(x)
        return self.tower(hidden.detach()) + hidden


class WritesIntoTheOutput(Model):
    def features(self, x):
        hidden = self.tower(x)
        hidden += 1
        return hidden


class WritesIntoTheInput(Model):
    def features(self, x):
        x = x * 1
        hidden = self.tower(x)
        x += 1
        return hidden + x


class OptionalInput(Model):
    def features(self, x):
        return self.tower(x=x)


class InsideTheTower(Model):
    """The tower itself is never called, only what it is made of, as LAVIS's BLIP does with its ViT."""

    def features(self, x):
        self.tower.runs += 1
        return self.tower.inner(x)


def runs_and_gradients(model, is_remembering, samples, steps=2):
    model = copy.deepcopy(model).train()
    optimizer = PerturbingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, WeightPerturbation(gamma=0.3))
    call = optimizer.perturb(model)
    if not is_remembering:
        call.memo.modules = []
    torch.manual_seed(9)
    for _ in range(steps):
        call(dict(samples))["loss"].backward()
        optimizer.step()
    assert "forward" not in vars(model.tower)
    assert "forward_features" not in vars(model.tower)
    return model.tower.runs, [*model.state_dict().values(), torch.rand(3)]


@pytest.mark.parametrize(
    ("model", "runs"),
    [
        (Model(), 2),
        (Model(nn.Dropout(0.5)), 2),
        (Model(nn.BatchNorm1d(4).eval()), 4),  # train() puts it into training mode, where it writes its statistics
        (Twice(), 4),
        (ThroughFeatures(), 2),
        (WithoutGradient(), 2),
        (OptionalInput(), 2),
        (FedByTrained(), 4),
        (FedByTrainedWithoutGradient(), 4),
        (WritesIntoTheOutput(), 4),
        (WritesIntoTheInput(), 4),
        (InsideTheTower(nn.Dropout(0.5)), 4),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_two_steps_equal_those_that_run_everything_twice(model, runs):
    """Two steps take two runs of a remembered tower, four of one that must run again; weights, statistics and the
    random numbers that follow are the same bits either way."""
    samples = {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), "epoch": 0}
    remembered, values = runs_and_gradients(model, True, samples)
    twice, expected = runs_and_gradients(model, False, samples)
    assert all(torch.equal(left, right) for left, right in zip(values, expected))
    assert remembered == runs
    assert twice == (8 if isinstance(model, Twice) else 4)


def test_what_the_tower_is_made_of_is_remembered_where_the_tower_is_never_called():
    model = InsideTheTower()
    inner = []
    model.tower.inner[0].register_forward_hook(lambda *_: inner.append(1))
    counted = Tower(model.tower.inner[0])
    model.tower.inner[0] = counted
    runs_and_gradients(model, True, {"x": torch.ones(5, 4), "epoch": 0}, steps=0)
    net = copy.deepcopy(model)
    optimizer = PerturbingOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, WeightPerturbation(gamma=0.3))
    optimizer.perturb(net)({"x": torch.ones(5, 4), "epoch": 0})
    assert net.tower.inner[0].runs == 1


def test_a_second_batch_is_not_answered_from_the_first():
    model = Model()
    optimizer = PerturbingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, WeightPerturbation(gamma=0.1))
    call = optimizer.perturb(model)
    model.eval()
    losses = [call({"x": torch.full((2, 4), value), "epoch": 0})["loss"] for value in (1.0, 5.0)]
    assert model.tower.runs == 2
    assert losses[1] > 2 * losses[0]
    assert not call.memo.calls, "nothing is kept after a step"


def test_an_exception_gives_the_modules_back():
    model = Model()
    optimizer = PerturbingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, WeightPerturbation(gamma=0.1))
    with pytest.raises(RuntimeError):
        optimizer.perturb(model)({"x": torch.ones(2, 3), "epoch": 0})
    assert not {"forward", "forward_features"} & set(vars(model.tower))
    assert not model.tower.inner[0].__dict__.keys() & {"forward"}


def test_a_module_with_a_forward_of_its_own_keeps_it():
    """fairscale's checkpoint wrapper replaces forward on the instance."""
    model = Model()
    model.tower.inner[0] = checkpoint_wrapper(model.tower.inner[0])
    own = vars(model.tower.inner[0])["forward"]
    optimizer = PerturbingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, WeightPerturbation(gamma=0.1))
    optimizer.perturb(model)({"x": torch.ones(2, 4), "epoch": 0})["loss"].backward()
    assert vars(model.tower.inner[0])["forward"] is own


@pytest.mark.parametrize("fusion", ["joint", "sentence_prompt"])
def test_the_frozen_tower_of_blip2_runs_once(fusion, small_model):
    model = small_model(freeze_vit=True, fusion=fusion).train()
    twin = copy.deepcopy(model)
    runs = []
    model.visual_encoder.patch_embed.proj.register_forward_hook(lambda *_: runs.append(1))
    gradients = []
    for net, is_remembering in ((model, True), (twin, False)):
        optimizer = PerturbingOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, WeightPerturbation(gamma=0.1))
        call = optimizer.perturb(net)
        if not is_remembering:
            call.memo.modules = []
        call({**make_triplets(3), "epoch": 0})["loss"].backward()
        gradients.append([weight.grad for weight in net.parameters() if weight.requires_grad])
    assert len(runs) == 1
    assert all(torch.equal(left, right) for left, right in zip(*gradients))
