"""Retrieval-DPO on two gloo processes against one with the whole batch: gradients, and the negatives they mine."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import make_preferences, make_scoring_model
from torch.nn.parallel import DistributedDataParallel

from lavis_cir_plugin.perturbation import WeightPerturbation
from lavis_cir_plugin.perturbed_model import PerturbingOptimizer
from lavis_cir_plugin.preference import Preference
from lavis_cir_plugin.preference_model import ReferencePolicy, hold_unread, learn_preferences

KINDS = {
    "joint": {"anchor": 2.0},
    "sentence_prompt": {"anchor": 0.0},  # no score reads its prompt, and no loss the temperature
    "clip": {"variant": "sdpo", "anchor": 1.0},
    "clip text": {"positive": "image", "anchor": 0.0, "reference": "none"},
    "mapping": {"variant": "listwise", "anchor": 1.0},
}
GAMMAS = (0.0, 0.05)


def whole_batch():
    """Eight triplets with up to two negatives: four of the first process have some, one of the second."""
    batch = make_preferences(8, 2)
    batch["negatives_present"] = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1], [0, 0], [1, 1], [0, 0], [0, 0]]).bool()
    batch["target"][6], batch["target_id"][6] = batch["target"][1], batch["target_id"][1]
    return batch


def second_gradients(kind, gamma, batch, wrap=lambda model: model):
    """Return the gradients and numbers of a second step, in which policy and reference differ."""
    settings = Preference(**KINDS[kind])
    model = make_scoring_model(kind)
    learn_preferences(model, settings)
    hold_unread(model, make_preferences(2))
    reference = ReferencePolicy(model)
    wrapped = wrap(model)
    wrapped.train()
    stock = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2, eps=1e-2)
    optimizer = PerturbingOptimizer(stock, wrapped, WeightPerturbation(gamma=gamma, tensors="all"), seed=3)
    call = optimizer.perturb(wrapped)
    scores = reference.scores(batch, settings.positive)
    for _ in range(2):
        optimizer.zero_grad()
        out = call({**batch, "reference_scores": scores, "epoch": 0})
        out["loss"].backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        optimizer.step()
    return gradients, {name: float(value) for name, value in out.items()}


def half_of(batch, rank):
    return {key: values[rank * 4 : rank * 4 + 4] for key, values in batch.items()}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    for kind in KINDS:
        for gamma in GAMMAS:
            found[kind, gamma] = second_gradients(kind, gamma, half_of(whole_batch(), rank), DistributedDataParallel)
    nobody = whole_batch()
    nobody["negatives_present"][:] = False
    found["nobody"] = second_gradients("sentence_prompt", 0.0, half_of(nobody, rank), DistributedDataParallel)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradients_and_losses_equal_those_of_one_process(kind, gamma, found):
    """Of five queries with a negative the first process has four, so a mean of means would be another one."""
    gradients, numbers = second_gradients(kind, gamma, whole_batch())
    theirs = [found[rank][kind, gamma] for rank in range(2)]
    for rank in range(2):
        assert theirs[rank][0].keys() == gradients.keys()
        for name, gradient in theirs[rank][0].items():
            torch.testing.assert_close(gradient, gradients[name], atol=5e-5, rtol=2e-3, msg=name)
    for name in ("loss", "loss_dpo", "without_negative"):
        mean = sum(values[name] for _, values in theirs) / 2
        assert mean == pytest.approx(numbers[name], rel=1e-3), name


def test_nobody_has_a_negative_and_nobody_waits(found):
    for rank in range(2):
        gradients, numbers = found[rank]["nobody"]
        assert numbers["loss"] == 0
        assert all(float(gradient.abs().max()) == 0 for gradient in gradients.values())
