"""Two gloo processes with half a batch each give the results of one process with the whole batch."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, make_triplets
from evaluation_world import NAMES, OUTSIDE, make_evaluation
from launched import in_two_processes
from lavis.runners.runner_base import RunnerBase
from omegaconf import OmegaConf
from torch.nn.parallel import DistributedDataParallel

from lavis_cir_plugin.core.processes import fail_in_all_processes, gather, share
from lavis_cir_plugin.core.shared_rows import SharedRows
from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.models.contrastive_losses import gather_with_gradient
from lavis_cir_plugin.ranking.gallery_features import check_folder, store_gallery
from lavis_cir_plugin.training.resumable_runner import resumable
from lavis_cir_plugin.training.run_folders import BEST, lock_run

FUSIONS = ("joint", "sentence_prompt")
SETTINGS = {
    "plain": {"gamma": 0.0},
    "gradient": {"gamma": 0.05},
    "random": {"gamma": 0.05, "direction": "random"},
    "momentum": {"gamma": 0.05, "direction": "momentum"},
    "every second step": {"gamma": 0.05, "every": 2},
}


class Flat(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 2))

    def forward(self, samples):
        return {"loss": self.weight.sum()}


def second_gradients(fusion, kind, batch, wrap=lambda model: model):
    """Return the gradients of a second step, in which a kept direction is used again and momentum has begun."""
    torch.manual_seed(0)
    model = Blip2Cir(**{**SMALL, "fusion": fusion, "freeze_vit": kind == "every second step"})
    wrapped = wrap(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    # A large epsilon keeps AdamW from blowing rounding errors up to whole steps.
    stock = torch.optim.AdamW(trained, lr=1e-3, eps=1e-2)
    optimizer = PerturbingOptimizer(stock, wrapped, WeightPerturbation(tensors="all", **SETTINGS[kind]), seed=3)
    call = optimizer.perturb(wrapped)
    for _ in range(2):
        optimizer.zero_grad()
        call(dict(batch))["loss"].backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        optimizer.step()
    return gradients


def whole_batch():
    """Return eight triplets, of which rows 1 and 6, on different processes, have the same target image."""
    batch = make_triplets(8)
    batch["target"][6] = batch["target"][1]
    batch["target_id"][6] = batch["target_id"][1]
    return batch


def statistics(kind, rank):
    """Return the running means before and after a third step with learning rate 0."""
    torch.manual_seed(0)
    wrapped = DistributedDataParallel(Normalised())
    stock = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    call = PerturbingOptimizer(stock, wrapped, WeightPerturbation(**SETTINGS[kind])).perturb(wrapped)
    seen = []
    wrapped.module.layer.register_forward_pre_hook(lambda *_: seen.append(wrapped.module.norm.running_mean.clone()))
    for step in range(3):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(10 * step + rank))
        seen.clear()
        call({"x": x, "epoch": 0})["loss"].backward()
    return seen[0], wrapped.module.norm.running_mean.clone()


def encoded(path, total):
    """Write the numbers of this process's rows, in batches of two, and return those of all processes."""
    numbers = torch.arange(float(total))[:, None].expand(total, 3)[list(share(total))]
    return store_gallery(path, total, numbers.split(2) if len(numbers) else [], torch.float16).clone()


def refuse(file, row, others=0):
    if others:  # only the references' features may lack room
        raise OSError("no room")


def evaluated(folder, keeps_features=False):
    """Return the passes of this process's tower, the gallery's features, and the ranks by mode and group."""
    evaluation, seen = make_evaluation("joint", folder)
    evaluation.dataset.keeps_features = keeps_features
    ranks = {
        (mode, name): ranking.ranks
        for mode in ("multimodal", "image", "text")
        for name, ranking in evaluation.rankings(mode).items()
    }
    return dict(seen), evaluation.gallery.clone(), ranks


def make_runner(model):
    """Return a runner of two processes, without data and folder."""
    kind = resumable(RunnerBase)
    runner = kind.__new__(kind)
    runner.config = SimpleNamespace(run_cfg=OmegaConf.create({"distributed": True, "device": "cpu", "evaluate": False}))
    runner._device = runner._wrapped_model = runner._average = runner._trained = None
    runner._model = model
    return runner


def evaluated_by_runner(model, train=lambda wrapped: None):
    """Return the tensors of the model that a runner evaluates after a training."""
    runner = make_runner(model)
    train(runner.model)
    runner._dataloaders, runner.datasets = {"test": [0]}, {"test": None}
    runner.task = SimpleNamespace(
        before_evaluation=lambda **_: None,
        evaluation=lambda model, loader: {name: tensor.clone() for name, tensor in model.state_dict().items()},
        after_evaluation=lambda val_result, **_: val_result,
    )
    return runner.eval_epoch("test", 0)


def validated(rank):
    """Return the tensors that are evaluated after a step with other pictures on each process."""
    torch.manual_seed(0)
    return evaluated_by_runner(Normalised(), lambda wrapped: wrapped({"x": torch.eye(3) * rank})["loss"].backward())


def reloaded(rank, folder):
    """Return whether the present weights are evaluated, where the second process alone sees a file."""
    runner, model = make_runner(None), torch.nn.Linear(2, 2)
    runner.output_dir = folder / f"run of {rank}"
    runner.output_dir.mkdir()
    if rank == 1:
        torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, runner.output_dir / BEST)
    before = model.weight.clone()
    return torch.equal(runner._reload_best_model(model).weight, before)


def refused(rank, folder):
    """Return what each process says of what only one of them lacks: a folder, a checkpoint, the lock of the run."""
    runner = make_runner(None)
    runner.output_dir, runner._check_counts = str(folder), lambda: None
    machines = [folder / f"machine {number}" for number in range(2)]
    machines[rank].mkdir()
    if rank == 0:
        torch.save({"model": {}}, machines[0] / "checkpoint.pth")
    else:
        lock = lock_run(folder)
    sentences = []
    for work in (
        lambda: check_folder(machines[rank]),
        lambda: runner._load_checkpoint(str(machines[rank] / "checkpoint.pth")),
        runner.train,
    ):
        with pytest.raises((OSError, ValueError)) as caught:
            work()
        sentences.append(str(caught.value))
    if rank == 1:
        lock.release()
    return sentences


def nested(rank, is_inner, hint=""):
    """Return what ends this process if the second one fails outside or inside an inner block, and who goes on.

    With a hint the second process alone turns its error into another one.
    """
    try:
        with fail_in_all_processes():
            if rank == 1 and not is_inner:
                raise OSError("no weights")
            try:
                with fail_in_all_processes():
                    if rank == 1:
                        raise OSError("no weights")
            except OSError as error:
                if not hint:
                    raise
                raise FileNotFoundError(f"{error}{hint}") from error
    except (ValueError, OSError) as error:
        return str(error), gather(rank)


def stopped(rank, *message):
    """Return type and text of what ends this process if the second one fails with a message or without any."""
    try:
        with fail_in_all_processes():
            if rank == 1:
                raise MemoryError(*message)
    except (ValueError, MemoryError) as error:
        return type(error).__name__, str(error)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    half = {key: values[rank * 4 : rank * 4 + 4] for key, values in whole_batch().items()}
    found = {}
    for fusion in FUSIONS:
        for kind in SETTINGS:
            found[fusion, kind] = second_gradients(fusion, kind, half, DistributedDataParallel)
    for kind in ("plain", "gradient"):
        found["statistics", kind] = statistics(kind, rank)
    # A sum over a weight has an expanded gradient, which cannot be reduced in place.
    flat = Flat()
    wrapped = DistributedDataParallel(flat)
    optimizer = PerturbingOptimizer(torch.optim.SGD(flat.parameters(), lr=0.1), wrapped, WeightPerturbation(gamma=0.1))
    optimizer.perturb(wrapped)({"epoch": 0})["loss"].backward()
    found["expanded"] = flat.weight.grad
    found["gathered"] = gather_with_gradient(torch.tensor([rank]))
    found["rows"] = [encoded(Path(folder) / "rows.tmp", n) for n in (1, 4, 5)]
    found["evaluated"] = evaluated(Path(folder))
    with mock.patch.object(SharedRows, "check_room", refuse) if rank == 1 else nullcontext():
        found["evaluated without room"] = evaluated(Path(folder))
    found["evaluated with two caches"] = evaluated(Path(folder), keeps_features=rank == 1)
    found["validated"] = validated(rank)
    found["frozen"] = evaluated_by_runner(torch.nn.Linear(2, 2).requires_grad_(False))
    found["best"] = reloaded(rank, Path(folder))
    found["refused"] = refused(rank, Path(folder))
    found["nested"] = [nested(rank, *where) for where in ((False,), (True,), (True, "; set model.pretrained"))]
    found["stopped"] = [stopped(rank, *message) for message in (("no picture\nthis process has failed",), ())]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(work, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("kind", SETTINGS)
def test_gradients_equal_those_of_one_process(fusion, kind, found):
    """Negatives and duplicate targets reach across processes, and both share one perturbation."""
    expected = second_gradients(fusion, kind, whole_batch())
    for rank in range(2):
        assert found[rank][fusion, kind].keys() == expected.keys()
        for name, gradient in found[rank][fusion, kind].items():
            torch.testing.assert_close(gradient, expected[name], atol=5e-5, rtol=1e-3, msg=name)


def test_processes_share_rows_with_exact_counts_and_stop_together(found):
    """The first of two processes has no share of a single row; the file is unlinked at once."""
    for rank in range(2):
        assert torch.equal(found[rank]["expanded"], torch.ones(2, 2))
        assert found[rank]["gathered"].tolist() == [0, 1]
        assert [rows.tolist() for rows in found[rank]["rows"]] == [[[i] * 3 for i in range(n)] for n in (1, 4, 5)]
    assert found[0]["stopped"] == [
        ("ValueError", "another process stopped: this process has failed"),
        ("ValueError", "another process stopped: MemoryError"),
    ]
    for rank, sentence in enumerate(("another process stopped: no weights", "no weights")):
        hint = "; set model.pretrained" if rank == 1 else ""
        assert found[rank]["nested"] == [(sentence, [0, 1]), (sentence, [0, 1]), (sentence + hint, [0, 1])]
    assert found[1]["stopped"] == [("MemoryError", "no picture\nthis process has failed"), ("MemoryError", "")]


class Normalised(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm = torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)

    def forward(self, samples):
        return {"loss": self.norm(self.layer(samples["x"])).pow(4).mean()}


def test_batch_norm_statistics_stay_together(found):
    """Every step begins with the first process's statistics, also when perturbed, as in plain DistributedDataParallel.

    After a step the processes' statistics differ by one batch's part (momentum 0.1), not by the sum of all.
    """
    plain, perturbed = ([found[rank]["statistics", kind] for rank in range(2)] for kind in ("plain", "gradient"))
    assert torch.equal(plain[0][1], perturbed[0][1]), "the clean pass alone counts, and it is the plain one"
    for both in (plain, perturbed):
        assert torch.equal(both[0][0], both[1][0]), "before a step"
        assert not torch.equal(both[0][1], both[1][1]), "after it"


def test_processes_evaluate_one_model(found):
    """The statistics are the first process's, which its checkpoint has, and so is the choice of the weights."""
    first, second = (found[rank]["validated"] for rank in range(2))
    assert not first["norm.running_var"].equal(torch.ones(3))
    assert all(first[name].equal(second[name]) for name in first)
    assert [found[rank]["best"] for rank in range(2)] == [True, True]


def test_a_model_without_a_trained_weight_is_evaluated(found):
    """DistributedDataParallel refuses it, such as clip_cir with both towers frozen."""
    assert found[0]["frozen"].keys() == {"weight", "bias"}


def test_what_one_process_lacks_ends_all(found):
    """Otherwise the processes of other machines would wait for it for an hour."""
    folder, checkpoint, lock = zip(*(found[rank]["refused"] for rank in range(2)))
    assert re.fullmatch(r"the gallery's features cannot be written to .*machine 1.*all processes see.*", folder[1])
    assert folder[0] == f"another process stopped: {folder[1]}"
    assert "machine 1/checkpoint.pth does not exist" in checkpoint[1]
    assert checkpoint[0] == f"another process stopped: {checkpoint[1]}"
    assert "is still going on in process" in lock[0]
    assert lock[1] == f"another process stopped: {lock[0]}"


@pytest.mark.parametrize("kind", ["evaluated", "evaluated without room", "evaluated with two caches"])
def test_two_processes_together_encode_each_picture_once(kind, found, tmp_path):
    """If one process has no room for the references' features, both encode references again, with equal ranks.

    If only one has a cache that keeps features, as on a machine with a cache of its own, both write them to the file.
    """
    passes, gallery, ranks = evaluated(tmp_path)
    assert passes == dict.fromkeys([*NAMES, *OUTSIDE], 1)
    together = sum((Counter(of_process[kind][0]) for of_process in found), Counter())
    assert (together == Counter(passes)) == (kind != "evaluated without room")
    for _, their_gallery, their_ranks in (of_process[kind] for of_process in found):
        torch.testing.assert_close(their_gallery, gallery, atol=1e-6, rtol=1e-5)
        assert {key: own.tolist() for key, own in their_ranks.items()} == {key: o.tolist() for key, o in ranks.items()}
