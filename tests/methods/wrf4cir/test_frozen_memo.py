"""Frozen sub-modules run once per step, and the results are bit-equal to those of two full passes."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import make_triplets
from fairscale.nn.checkpoint.checkpoint_activations import checkpoint_wrapper
from torch import nn

from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation


class Tower(nn.Module):
    """Tower that counts how often it runs."""

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
    """Model with a frozen tower before a trained head; subclasses use the tower in other ways."""

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
    """The model calls the modules inside the tower but never the tower itself, as LAVIS's BLIP does with its ViT."""

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
    """Two steps take two runs of a remembered tower, and four of a tower that must run again; weights, statistics and
    the following random numbers are bit-equal in both cases."""
    samples = {"x": torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), "epoch": 0}
    remembered, values = runs_and_gradients(model, True, samples)
    twice, expected = runs_and_gradients(model, False, samples)
    assert all(torch.equal(left, right) for left, right in zip(values, expected))
    assert remembered == runs
    assert twice == (8 if isinstance(model, Twice) else 4)


def step_with_and_without_memory(model, steps=1):
    """Return the gradients with and without memory, which must be bit-equal."""
    gradients = []
    for is_remembering in (True, False):
        net = copy.deepcopy(model).train()
        optimizer = PerturbingOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, WeightPerturbation(gamma=0.3))
        call = optimizer.perturb(net)
        if not is_remembering:
            call.memo.modules = []
        torch.manual_seed(9)
        random.seed(9)
        for _ in range(steps):
            optimizer.zero_grad()
            call({"x": torch.linspace(0, 1, 20).view(5, 4), "epoch": 0})["loss"].backward()
        gradients.append([weight.grad for weight in net.parameters() if weight.grad is not None])
        assert max(float(gradient.abs().max()) for gradient in gradients[-1]) > 0
    assert all(torch.equal(left, right) for left, right in zip(*gradients))
    return net


class Container(nn.Module):
    """Returns a dictionary, or an object that torch cannot take apart."""

    def __init__(self, inner, kind):
        super().__init__()
        self.inner = inner
        self.kind = kind

    def forward(self, x):
        return self.kind(hidden=self.inner(x))


class EditsTheContainer(Model):
    def features(self, x):
        output = self.tower(x)
        output["hidden"] = output["hidden"][:3] * 2
        return output["hidden"]


class ReadsAnObject(Model):
    def features(self, x):
        return self.tower(x).hidden


class DrawsFromPython(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * random.random()


class DrawsAfterTheTower(Model):
    def features(self, x):
        return self.tower(x) + random.random()


class ReadsThroughAHook(Model):
    """Model that takes the tower's features from inside, by a forward hook, as feature extractors do."""

    def features(self, x):
        seen = []
        handle = self.tower.inner[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
        self.tower(x)
        handle.remove()
        return sum(seen)


def test_an_output_that_the_model_edits_is_handed_out_as_it_was():
    model = EditsTheContainer()
    model.tower.inner = Container(model.tower.inner, dict)
    step_with_and_without_memory(model)


def test_what_is_inside_a_module_with_an_opaque_output_is_remembered_from_the_second_step_on():
    model = ReadsAnObject()
    inner = Tower(model.tower.inner)
    model.tower.inner = Container(inner, SimpleNamespace)
    step_with_and_without_memory(model)
    net = copy.deepcopy(model)
    optimizer = PerturbingOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, WeightPerturbation(gamma=0.3))
    call = optimizer.perturb(net)
    for _ in range(3):
        call({"x": torch.ones(5, 4), "epoch": 0})
    assert net.tower.inner.inner.runs == 2 + 2 + 1, "the tower was tried first, then what it holds, then that"


def test_a_module_that_draws_from_python_runs_in_both_passes():
    model = DrawsAfterTheTower()
    model.tower.inner = DrawsFromPython(model.tower.inner)
    step_with_and_without_memory(model, steps=2)


def test_a_hook_inside_a_frozen_module_is_called_in_both_passes():
    step_with_and_without_memory(ReadsThroughAHook())


def test_what_the_tower_is_made_of_is_remembered_where_the_tower_is_never_called():
    net = InsideTheTower()
    net.tower.inner[0] = Tower(net.tower.inner[0])
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
    forward = model.visual_encoder.forward
    model.visual_encoder.forward = lambda images: runs.append(1) or forward(images)
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
