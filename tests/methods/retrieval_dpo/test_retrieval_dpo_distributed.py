"""Retrieval-DPO on two gloo processes gives the gradients and mined negatives of one process."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import make_preferences, make_scoring_model
from launched import in_two_processes
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from lavis_cir_plugin.benchmarks.types import Triplet
from lavis_cir_plugin.data.benchmark_datasets import TripletDataset
from lavis_cir_plugin.methods.retrieval_dpo.losses import PreferenceSettings
from lavis_cir_plugin.methods.retrieval_dpo.mining import MiningSettings
from lavis_cir_plugin.methods.retrieval_dpo.preference_model import (
    ReferencePolicy,
    keep_unread_as_buffers,
    learn_preferences,
)
from lavis_cir_plugin.methods.retrieval_dpo.task import RetrievalDpoTask
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.processors import TargetPadProcessor
from lavis_cir_plugin.training.remaining_epoch import add_batch, in_lavis_format, means_over_processes

KINDS = {
    "joint": {"anchor": 2.0},
    "sentence_prompt": {"anchor": 0.0},  # no score reads its prompt, and no loss the temperature
    "clip": {"variant": "sdpo", "anchor": 1.0},
    "clip text": {"positive": "image", "anchor": 0.0, "reference": "none"},
    "mapping": {"variant": "listwise", "anchor": 1.0},
}
CASES = [*((kind, 0.0) for kind in KINDS), ("sentence_prompt", 0.05), ("mapping", 0.05)]
"""Kind, and radius of weight perturbation."""
SOURCES = ("query", "positive", "image_set")


def whole_batch():
    """Return eight triplets with up to two negatives; four of the first process have some, one of the second."""
    batch = make_preferences(8, 2)
    batch["negatives_present"] = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1], [0, 0], [1, 1], [0, 0], [0, 0]]).bool()
    batch["target"][6], batch["target_id"][6] = batch["target"][1], batch["target_id"][1]
    return batch


def second_gradients(kind, gamma, batch, wrap=lambda model: model):
    """Return the gradients and numbers of a second step, in which policy and reference differ."""
    settings = PreferenceSettings(**KINDS[kind])
    model = make_scoring_model(kind)
    learn_preferences(model, settings)
    keep_unread_as_buffers(model, make_preferences(2))
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


def draw(folder):
    for number in range(13):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")


def mined(folder, source):
    """Return the negatives that the processes mine for 11 triplets over 13 pictures, which they share unevenly."""
    paths = {f"{number:02}": folder / f"{number:02}.png" for number in range(13)}
    names = list(paths)
    triplets = [
        Triplet(names[i], names[i + 1], (f"is {'red' * (i % 3)}",), ("dress", "shirt")[i % 2], members=tuple(names[:6]))
        for i in range(11)
    ]
    processor = TargetPadProcessor(16)
    dataset = TripletDataset(triplets, paths, processor, lambda text: text, lambda captions, rng: captions[0])
    run = {"device": "cpu", "seed": 1, "batch_size_eval": 2, "num_workers": 0}
    registry.mapping["paths"].pop("output_dir", None)
    registry.register_path("output_dir", str(folder))
    task = RetrievalDpoTask()
    task.preference, task.mining = PreferenceSettings(), MiningSettings(source=source, window=(0, 6), cap=None)
    cfg = SimpleNamespace(run_cfg=OmegaConf.create(run))
    task.prepare(make_scoring_model("joint"), {"drawn": {"train": dataset}}, cfg)
    sets = task.miner.mine("drawn", dataset, 0)
    return {field.name: getattr(sets, field.name) for field in dataclasses.fields(sets)}


def averaged(rank):
    """Return the logged averages of two batches per process, of which the first process's first has no negative."""
    meters = {}
    for accuracy, drift in [[(math.nan, 0.2), (1.0, 0.4)], [(0.5, 0.6), (0.0, 0.8)]][rank]:
        numbers = {"reward_accuracy": accuracy, "positive_drift": drift, "reward_margin": math.nan}
        add_batch(meters, {"lr": 1.0, "loss": 3.0}, numbers)
    # Two kinds of batches: the first process meets both, in another order, and the second one only the second kind.
    for kind, number in [[("loss_b", 0.5), ("loss_a", 7.0)], [("loss_a", 1.0), ("loss_a", 1.0)]][rank]:
        add_batch(meters, {}, {kind: number})
    return in_lavis_format(means_over_processes(meters, torch.device("cpu")))


def half_of(batch, rank):
    return {key: values[rank * 4 : rank * 4 + 4] for key, values in batch.items()}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    for kind, gamma in CASES:
        found[kind, gamma] = second_gradients(kind, gamma, half_of(whole_batch(), rank), DistributedDataParallel)
    nobody = whole_batch()
    nobody["negatives_present"][:] = False
    found["nobody"] = second_gradients("sentence_prompt", 0.0, half_of(nobody, rank), DistributedDataParallel)
    for source in SOURCES:
        found["mined", source] = mined(Path(folder), source)
    found["averaged"] = averaged(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    draw(folder)
    in_two_processes(work, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(("kind", "gamma"), CASES)
def test_gradients_and_losses_equal_those_of_one_process(kind, gamma, found):
    """Of five queries with a negative the first process has four, so a mean of means would differ."""
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


@pytest.mark.parametrize("source", SOURCES)
def test_both_processes_mine_what_one_does(source, found, tmp_path):
    draw(tmp_path)
    expected = mined(tmp_path, source)
    assert (expected["negatives"] >= 0).any()
    for rank in range(2):
        theirs = found[rank]["mined", source]
        for name in ("names", "texts", "about"):
            assert theirs[name] == expected[name]
        for name in ("references", "targets", "negatives", "ranks", "target_ranks"):
            assert (theirs[name] == expected[name]).all(), name
        for name in ("scores", "target_scores"):
            np.testing.assert_allclose(theirs[name], expected[name], atol=1e-5)


def test_averages_of_what_some_batches_lack_agree(found):
    """The averages are computed by hand; a number that no batch had is not logged."""
    expected = {"lr": "1.000", "loss": "3.000", "reward_accuracy": "0.50000", "positive_drift": "0.50000"}
    expected.update(loss_b="0.50000", loss_a="3.00000")
    assert [found[rank]["averaged"] for rank in range(2)] == [expected] * 2
