"""The perturbing runners have LAVIS's arithmetic and checkpoints, apart from the additions of the mix-in."""

from __future__ import annotations

import copy
import errno
import itertools
import logging
import random
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import webdataset
from conftest import SMALL, TripletsInMemory, make_triplets
from cuda_rehearsal import off_cuda, rehearsal
from lavis.common.optims import LinearWarmupCosineLRScheduler
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from lavis.runners.runner_iter import RunnerIter
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf
from torch.utils.data import default_collate

from lavis_cir_plugin.data.resumable_loader import EpochLoader, training_loader
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.runner import RunnerWrf4Cir, RunnerWrf4CirIter
from lavis_cir_plugin.report.run_log import read_epochs, read_steps
from lavis_cir_plugin.training.resumable_runner import ResumableRunner, resumable


class Scored(BaseTask):
    """Task of LAVIS with given validation metrics, so that the chosen checkpoint is known."""

    def __init__(self, scores):
        super().__init__()
        self.scores = iter(scores)
        self.seen = []

    def evaluation(self, model, data_loader, cuda_enabled=True):
        assert not cuda_enabled
        self.seen.append(copy.deepcopy(model.state_dict()))
        return [0]

    def after_evaluation(self, **_):
        return {"agg_metrics": next(self.scores)}


@pytest.fixture
def make_runner(tmp_path, small_model, triplets):
    """Return a factory of runners that train the small model for two epochs of three steps."""

    def make(runner=RunnerWrf4Cir, task=None, model=None, splits=(), train=None, **run):
        data = {"train": train or TripletsInMemory(triplets(12))}
        data.update({split: TripletsInMemory(triplets(4)) for split in splits})
        torch.manual_seed(7)
        model = model or small_model()
        cfg = OmegaConf.create(
            {
                "run": {
                    "device": "cpu", "distributed": False, "evaluate": False, "output_dir": str(tmp_path / "out"),
                    "lr_sched": "linear_warmup_cosine_lr", "init_lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.05,
                    "max_epoch": 2, "batch_size_train": 4, "batch_size_eval": 4, "num_workers": 0,
                    "train_splits": ["train"], "valid_splits": list(splits), "test_splits": [], **run,
                }
            }
        )  # fmt: skip
        config = type("Config", (), {"run_cfg": cfg.run, "to_dict": lambda _: OmegaConf.to_container(cfg)})()
        return runner(cfg=config, task=task or BaseTask(), model=model, datasets={"triplets": data}, job_id="job")

    return make


def test_a_run_with_amp_on_a_gpu_computes_in_half_precision_and_goes_on_as_if_never_stopped(
    make_runner, small_model, tmp_path
):
    """``run.amp`` on a rehearsed GPU: LAVIS's loop, its prefetching loader and GradScaler, checkpoints and a resume."""
    seen, small = [], {"freeze_vit": True, "qformer_config": {**SMALL["qformer_config"], "num_hidden_layers": 1}}

    def trained(**run):
        model = small_model(**small)
        model.text_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        with rehearsal():
            runner = make_runner(model=model, device="cuda", amp=True, **run)
            # With its first factor, 65,536, the gradients of a model this small overflow for more than three steps.
            runner.scaler.load_state_dict({**runner.scaler.state_dict(), "scale": 2.0**8})
            torch.manual_seed(11)
            runner.train()
            return off_cuda(
                {name: weight.detach() for name, weight in model.named_parameters()}
            ), runner.optimizer.steps

    start = dict(small_model(**small).named_parameters())
    whole, steps = trained()
    assert steps == {"perturbed": 6, "skipped": 0}
    assert seen == [torch.float16] * 12
    moved = {name for name, weight in whole.items() if not torch.equal(weight, start[name])}
    assert moved == {name for name, weight in start.items() if weight.requires_grad}
    trained(max_epoch=1)
    last = next((tmp_path / "out").rglob("checkpoint_last.pth"))
    assert_same(trained(resume_ckpt_path=str(last))[0], whole)


def train(runner):
    torch.manual_seed(11)
    runner.train()
    return runner.unwrap_dist_model(runner.model).state_dict()


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_gamma_zero_equals_lavis_runner_bit_for_bit(make_runner, tmp_path):
    """Weights, optimizer state and checkpoint equal those of LAVIS's epoch loop, apart from the key "wrf"."""
    ours, stock = make_runner(wrf={"gamma": 0}, fused_adamw=False), make_runner(resumable(RunnerBase))
    assert_same(train(ours), train(stock))
    saved = ours.optimizer.state_dict()
    assert saved.pop("wrf")["steps"] == {"perturbed": 0, "skipped": 0}
    theirs = stock.optimizer.state_dict()
    assert saved["param_groups"] == theirs["param_groups"]
    for index, state in theirs["state"].items():
        assert_same(saved["state"][index], state)


def test_gamma_zero_equals_lavis_task_loop_without_any_runner(make_runner, small_model, triplets):
    """The reference trains two epochs through BaseTask.train_epoch with a bare AdamW."""
    weights = train(make_runner(wrf={"gamma": 0}, fused_adamw=False))
    torch.manual_seed(7)
    model = small_model().train()
    decayed, plain = [], []
    for name, p in model.named_parameters():
        (plain if p.ndim < 2 or "bias" in name or "ln" in name or "bn" in name else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999))
    schedule = LinearWarmupCosineLRScheduler(optimizer, max_epoch=2, min_lr=1e-3, init_lr=1e-2)
    data = TripletsInMemory(triplets(12))
    torch.manual_seed(11)
    loader = EpochLoader(training_loader(data, seed=42, batch_size=4, drop_last=True, collate_fn=data.collater))
    for epoch in range(2):
        BaseTask().train_epoch(epoch, model, loader, optimizer, schedule)
    assert_same(weights, model.state_dict())


def test_a_perturbed_run_differs_and_counts_its_steps(make_runner):
    perturbed = make_runner(wrf={"gamma": 0.05, "warmup_epochs": 1})
    weights, stock = train(perturbed), train(make_runner(resumable(RunnerBase)))
    assert any(not torch.equal(weights[name], stock[name]) for name in weights)
    assert isinstance(perturbed.optimizer, PerturbingOptimizer)
    assert perturbed.optimizer.steps == {"perturbed": 3, "skipped": 0}


def test_the_fused_optimizer_is_the_default_and_differs_by_rounding_alone(make_runner):
    fused, stock = make_runner(wrf={"gamma": 0.01}), make_runner(wrf={"gamma": 0.01}, fused_adamw=False)
    for (name, left), right in zip(train(fused).items(), train(stock).values()):
        # The gradient of a key's bias is rounding alone, which Adam makes as large as any other.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(left, right, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert [group.get("fused") for group in fused.optimizer.param_groups] == [True, True]
    assert [group.get("fused") for group in stock.optimizer.param_groups] == [None, None]
    for own, other in zip(fused.optimizer.param_groups, stock.optimizer.param_groups):
        kept = ("lr", "betas", "eps", "weight_decay")
        assert [own[key] for key in kept] == [other[key] for key in kept]


@pytest.mark.parametrize("began_fused", [True, False])
def test_a_resumed_run_keeps_the_kind_of_optimizer(began_fused, make_runner):
    """The next step of the resumed run is that of the run that goes on, bit for bit, whatever the config says now."""
    first = make_runner(wrf={"gamma": 0}, fused_adamw=began_fused)
    train(first)
    second = make_runner(wrf={"gamma": 0}, fused_adamw=not began_fused)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    for runner in (first, second):
        for weight in runner.model.parameters():
            weight.grad = torch.linspace(-1, 1, weight.numel()).view_as(weight)
        runner.optimizer.step()
    assert_same(second.model.state_dict(), first.model.state_dict())


def test_a_weight_that_is_a_slice_is_trained_by_lavis_own_optimizer(make_runner, small_model):
    """On a CPU, torch's fused one would write into the other half of the tensor."""

    def with_slice():
        model = small_model()
        wide = torch.cat([model.text_proj.weight.detach(), torch.ones_like(model.text_proj.weight)], dim=1)
        model.text_proj.weight = torch.nn.Parameter(wide[:, : model.text_proj.in_features])
        return model, wide

    model, wide = with_slice()
    trained = train(make_runner(model=model, wrf={"gamma": 0}))
    assert_same(trained, train(make_runner(model=with_slice()[0], wrf={"gamma": 0}, fused_adamw=False)))
    assert (wide[:, model.text_proj.in_features :] == 1).all()
    with pytest.raises(ValueError, match=r"fused_adamw: true .*\(a weight is a slice of another tensor\); set false"):
        _ = make_runner(model=with_slice()[0], fused_adamw=True).optimizer


def test_a_fused_optimizer_that_torch_lacks_is_refused_or_left_out(make_runner, monkeypatch):
    stock = torch.optim.AdamW

    def lacking(groups, fused=None, **options):
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return stock(groups, **options)

    monkeypatch.setattr(torch.optim, "AdamW", lacking)
    assert not make_runner().optimizer.param_groups[0].get("fused")
    with pytest.raises(ValueError, match=r"run\.fused_adamw: true is not available .*supported devices\); set false"):
        _ = make_runner(fused_adamw=True).optimizer


def test_accumulated_gradients_are_stepped_every_second_batch(make_runner):
    """LAVIS's loop decides when to step; gamma 0 stays bit-equal under accumulation, and perturbed steps all count."""
    ours = make_runner(wrf={"gamma": 0}, fused_adamw=False, accum_grad_iters=3)
    stock = make_runner(resumable(RunnerBase), accum_grad_iters=3)
    assert_same(train(ours), train(stock))
    perturbed = make_runner(wrf={"gamma": 0.05}, accum_grad_iters=3)
    train(perturbed)
    assert perturbed.optimizer.steps["perturbed"] == 6


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({}, r"run\.accum_grad_iters: 4 is more batches than the 3 of an epoch, so no step would ever be made"),
        ({"runner": RunnerWrf4CirIter, "max_iters": 9, "iters_per_inner_epoch": 2},
         r"accum_grad_iters: 4 is more batches than run\.iters_per_inner_epoch: 2, so no step"),
    ],
)  # fmt: skip
def test_an_accumulation_that_no_epoch_completes_is_refused(run, message, make_runner):
    """LAVIS's loop counts batches anew in each epoch, so it would train to the end without a step."""
    with pytest.raises(ValueError, match=message):
        train(make_runner(**run, accum_grad_iters=4))


@pytest.mark.parametrize("max_iters", [3, 5, 6])
def test_an_incomplete_last_inner_epoch_is_announced_with_its_learning_rate(max_iters, make_runner, caplog):
    """LAVIS's schedule has int(5 / 3) = 1 epoch, so the second one is at its end."""
    runner = make_runner(RunnerWrf4CirIter, max_iters=max_iters, iters_per_inner_epoch=3)
    train(runner)
    rate = runner.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx({3: 1e-2, 5: 1e-3, 6: 5.5e-3}[max_iters])
    announced = "6 batches in all, and linear_warmup_cosine_lr is at run.min_lr in the last of them" in caplog.text
    assert announced is (max_iters == 5)


def test_evaluations_and_checkpoints_see_clean_weights(make_runner, tmp_path):
    """At a radius of half the weights, validation and checkpoint see the weights that the optimizer holds."""
    task = Scored([10.0, 20.0])
    runner = make_runner(task=task, splits=("val",), wrf={"gamma": 0.5})
    weights = train(runner)
    assert_same(task.seen[-1], weights)
    saved = torch.load(tmp_path / "out/job/checkpoint_best.pth", weights_only=True)
    assert_same(saved["model"], {name: weights[name] for name in saved["model"]})
    assert saved["optimizer"]["wrf"]["settings"]["gamma"] == 0.5
    assert saved["optimizer"]["wrf"]["steps"] == {"perturbed": 6, "skipped": 0}


def test_the_best_epoch_is_kept_and_reloaded(make_runner, tmp_path):
    task = Scored([30.0, 20.0, 25.0])
    runner = make_runner(task=task, splits=("val",), test_splits=["val"])
    train(runner)
    assert torch.load(tmp_path / "out/job/checkpoint_best.pth", weights_only=True)["epoch"] == 0
    assert_same(task.seen[2], task.seen[0])


def test_without_validation_the_last_weights_are_tested_as_the_final_ones(make_runner):
    """LAVIS would give the task a number instead of "best", and no report would be written."""
    task = Scored([1.0])
    task.after_evaluation = lambda **arguments: epochs.append(arguments["epoch"])
    epochs = []
    data = make_runner(task=task, splits=("test",), valid_splits=[], test_splits=["test"])
    weights = train(data)
    assert epochs == ["best"]
    assert_same(task.seen[0], weights)


def test_without_any_score_above_zero_the_last_weights_are_evaluated(make_runner, caplog):
    task = Scored([0.0, 0.0, 0.0])
    runner = make_runner(task=task, splits=("val",), test_splits=["val"])
    with caplog.at_level(logging.WARNING):
        weights = train(runner)
    assert_same(task.seen[2], weights)
    assert "checkpoint_best.pth is not there: no epoch had a metric above 0 on val" in caplog.text


@pytest.mark.parametrize("freeze_vit", [False, True])
def test_a_saved_optimizer_state_resumes(freeze_vit, make_runner, small_model, tmp_path):
    """This holds also with a frozen tower, which LAVIS leaves out of its checkpoints and then fails to load."""
    train(make_runner(model=small_model(freeze_vit=freeze_vit), wrf={"gamma": 0.05}))
    path = str(tmp_path / "out/job/checkpoint_1.pth")
    resumed = make_runner(
        model=small_model(freeze_vit=freeze_vit), wrf={"gamma": 0.05}, max_epoch=3, resume_ckpt_path=path
    )
    train(resumed)
    assert resumed.optimizer.steps == {"perturbed": 9, "skipped": 0}


def test_no_earlier_checkpoint_is_named_where_there_is_none(make_runner, monkeypatch):
    """A first checkpoint that fails names none, nor does a loss that is not finite before it."""
    runner = make_runner(resumable(RunnerBase))
    forward = runner.model.forward

    def fail(content, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"no checkpoint could be written to .*There was none before; free some space"):
        runner.save_last(1, 0, {})
    monkeypatch.undo()
    monkeypatch.setattr(runner.model, "forward", lambda samples: {"loss": forward(samples)["loss"] * torch.nan})
    with pytest.raises(ValueError, match=r"training loss is nan in epoch 0, .*No checkpoint had been written yet\.$"):
        train(runner)


@pytest.mark.parametrize("splits", [(), ("val",)])
def test_weights_that_are_not_finite_are_never_saved(splits, make_runner, tmp_path):
    """The last gradient of the second epoch is nan and its loss is not; what the first epoch left stays."""
    runner, gradients = make_runner(task=Scored([1.0, 2.0]), splits=splits, wrf={"gamma": 0}), []
    weight = runner.model.temp
    weight.register_hook(lambda gradient: gradients.append(1) or gradient * (torch.nan if len(gradients) == 6 else 1))
    with pytest.raises(
        ValueError, match=r"1 of \d+ trained tensors are not finite any more \(first: temp\).*last\.pth in .* before"
    ):
        train(runner)
    for path in (tmp_path / "out/job").glob("*.pth"):
        assert torch.load(path, weights_only=True)["model"]["temp"].isfinite()


def test_no_space_left_keeps_the_earlier_checkpoint(make_runner, tmp_path, monkeypatch):
    runner = make_runner()
    train(runner)
    before = {path: path.read_bytes() for path in (tmp_path / "out/job").glob("*.pth")}

    def fail(content, file):
        Path(file.name).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"no checkpoint could be written to .*job .*untouched; free some space"):
        runner._save_checkpoint(1)
    with pytest.raises(OSError, match=r"no checkpoint could be written to .*job .*untouched; free some space"):
        runner.save_last(2, 0, {})
    assert {path: path.read_bytes() for path in (tmp_path / "out/job").glob("*.pth")} == before
    assert list((tmp_path / "out/job").glob(".*")) == []


@pytest.mark.parametrize("kind", [RunnerWrf4Cir, resumable(RunnerIter)])
def test_the_log_says_what_a_split_holds(kind, make_runner, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(TripletsInMemory, "contents", "what the data set says", raising=False)
    iterations = {"max_iters": 4, "iters_per_inner_epoch": 2} if kind is not RunnerWrf4Cir else {}
    assert make_runner(kind, splits=("val",), **iterations).dataloaders["train"]
    assert {"train: what the data set says", "val: what the data set says"} <= set(caplog.messages)
    caplog.clear()
    monkeypatch.delattr(TripletsInMemory, "contents")
    assert make_runner(kind, splits=("val",), **iterations).dataloaders["val"]
    assert {"train: 12 samples", "val: 4 samples"} <= set(caplog.messages)
    assert "records" not in caplog.text
    assert not logging.getLogger().filters, "other messages of LAVIS stay as they are"


def test_a_task_is_given_back_as_it_was(make_runner):
    runner = make_runner()
    runner.train_epoch(0)
    assert "train_epoch" not in vars(runner.task)


def test_gradient_checkpointing_on_perturbed_layers_is_refused(make_runner, small_model):
    with pytest.raises(ValueError, match=r"inside 'visual_encoder', which recomputes its activations"):
        make_runner(model=small_model(use_grad_checkpoint=True)).train()
    make_runner(model=small_model(use_grad_checkpoint=True, freeze_vit=True)).optimizer  # noqa: B018 (built on access)


def test_half_precision_trainable_weights_are_refused(make_runner, small_model):
    with pytest.raises(ValueError, match=r"trainable tensors are bfloat16 .*Keep trainable weights in float32"):
        make_runner(model=small_model().to(torch.bfloat16)).train()


def test_it_is_registered_and_leaves_lavis_classes_alone():
    assert "runner_wrf4cir" in registry.list_runners()
    assert resumable(RunnerWrf4Cir) is RunnerWrf4Cir
    assert issubclass(resumable(RunnerIter), (ResumableRunner, RunnerIter))
    assert not issubclass(RunnerBase, ResumableRunner)


class CallsAMethod(BaseTask):
    """Task that calls a method of the object that it gets in place of the model."""

    def train_step(self, model, samples):
        return model.forward(samples)["loss"]


def test_a_task_that_does_not_call_its_model_is_told(make_runner):
    """Such a task would train without perturbation, logs or checkpoints, and nobody would notice."""
    with pytest.raises(ValueError, match=r"called its model for 0 of 3 training batches; .*train_step calls model"):
        train(make_runner(task=CallsAMethod()))


class AddsALoss(BaseTask):
    """Task that trains the model's loss, halved, and something else beside it."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def train_step(self, model, samples):
        loss = 0.5 * (model(samples)["loss"] + model(samples)["loss"])
        if self.weight is None:
            return loss
        return loss + self.weight * torch.stack([p.square().sum() for p in model.parameters()]).sum()


def test_a_task_that_trains_more_than_the_models_loss_is_told(make_runner):
    """The direction would be that of another loss than the trained one. A factor and a second call change no direction,
    and where no gradient gives the direction, any loss is right."""
    with pytest.raises(ValueError, match=r"train_step adds something to model\(samples\)\['loss'\].*let Blip2Cir"):
        train(make_runner(task=AddsALoss(0.1)))
    for task, wrf in ((AddsALoss(None), {"gamma": 0.05}), (AddsALoss(0.1), {"gamma": 0.05, "direction": "random"})):
        runner = make_runner(task=task, max_epoch=1, wrf=wrf)
        train(runner)
        assert runner.optimizer.steps == {"perturbed": 6, "skipped": 0}


@pytest.mark.parametrize(
    ("returned", "words"), [({"total": 1.0, "aux": 2.0}, "a dict with total, aux;"), ((1.0,), "a tuple;")]
)
def test_a_model_without_a_loss_is_told(returned, words, make_runner, small_model):
    model = small_model()
    model.forward = lambda samples: returned
    with pytest.raises(ValueError, match=rf"gradient of model\(samples\)\['loss'\], and Blip2Cir returns {words}"):
        train(make_runner(model=model))


class OfAnotherKey(BaseTask):
    """Task that trains twice another number than ``["loss"]``, as a tensor of one dimension."""

    def train_step(self, model, samples):
        return 2 * model(samples)["total"][None]


@pytest.mark.parametrize("has_loss", [True, False])
def test_the_loss_that_a_task_trains_is_logged(has_loss, make_runner, small_model):
    """The model's number stands beside it under its own name."""
    model = small_model()
    stock = model.forward
    model.forward = lambda samples: {"total": stock(samples)["loss"], **({"loss": torch.zeros(1)} if has_loss else {})}
    runner = make_runner(resumable(RunnerBase), task=OfAnotherKey(), model=model, max_epoch=1)
    train(runner)
    log, totals = read_steps(runner.folder / "steps.csv"), read_epochs(runner.folder / "epochs.csv")["train"]["total"]
    assert sum(log["loss"]) / 3 == pytest.approx(2 * totals[0], rel=1e-4)
    assert "train_step" not in vars(runner.task)


class WithItsOwnLoop(BaseTask):
    """Task whose loop gives its step arguments by place and takes more than the loss from it."""

    def train_step(self, model, samples):
        return model(samples)["loss"], {}

    def _train_inner_loop(self, epoch, iters_per_epoch, model, data_loader, optimizer, **_):
        for _ in range(iters_per_epoch):
            loss, _ = self.train_step(model, {**next(data_loader), "epoch": epoch})
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {}


def test_a_step_of_a_tasks_own_loop_is_called_in_every_epoch(make_runner):
    """It may be an attribute of the task alone, such as a wrapped one."""
    task = WithItsOwnLoop()
    own = task.train_step = mock.Mock(wraps=task.train_step)
    runner = make_runner(task=task, max_epoch=2)
    train(runner)
    assert task.train_step is own
    assert own.call_count == len(read_steps(runner.folder / "steps.csv")["loss"]) == 6


class OfAUser(BaseTask):
    """Task that evaluates by the two arguments that LAVIS's runner gives, and no more."""

    def evaluation(self, model, data_loader):
        return [0]

    def after_evaluation(self, **_):
        return {"agg_metrics": 1.0}


def test_a_task_whose_evaluation_knows_no_gpu_is_evaluated(make_runner):
    runner = make_runner(task=OfAUser(), splits=("val",), max_epoch=1)
    train(runner)
    assert runner.best == {"epoch": 0, "metric": 1.0}


def test_a_stream_is_trained_in_iterations_alone(make_runner, triplets):
    """LAVIS's epochs end with an error about a length that no stream has."""
    rows = TripletsInMemory(triplets(12))
    stream = webdataset.DataPipeline(lambda: itertools.cycle(rows[index] for index in range(12)))
    with pytest.raises(ValueError, match=r"counts epochs, and datasets\.triplets is a stream .*runner_wrf4cir_iter"):
        train(make_runner(train=stream))
    counted = make_runner(RunnerWrf4CirIter, train=stream, max_iters=2, iters_per_inner_epoch=2)
    train(counted)
    assert counted.optimizer.steps == {"perturbed": 2, "skipped": 0}


@pytest.mark.parametrize("counted", [{}, {"runner": RunnerWrf4CirIter, "max_iters": 6, "iters_per_inner_epoch": 3}])
def test_an_evaluation_writes_no_checkpoint_and_looks_for_none(counted, make_runner, tmp_path, caplog):
    runner = make_runner(task=Scored([50.0, 50.0]), splits=("val",), test_splits=["val"], evaluate=True, **counted)
    train(runner)
    assert not list((tmp_path / "out/job").glob("*.pth"))
    assert "is not there" not in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_workers_or_on_where_a_run_began(num_workers, make_runner):
    """This includes augmentation: each sample draws a number while it is loaded."""

    class Drawing(TripletsInMemory):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "draw": torch.rand(1) + random.random() + np.random.rand()}

    def batches(workers, first):
        loader = EpochLoader(
            training_loader(
                Drawing(make_triplets(12)),
                seed=5,
                batch_size=4,
                num_workers=workers,
                drop_last=True,
                collate_fn=default_collate,
            )
        )
        loader.seek(first)
        return [next(loader) for _ in range(first, 6)]

    state = torch.get_rng_state()
    whole = batches(0, 0)
    assert torch.equal(state, torch.get_rng_state()), "the training's own numbers are left alone"
    assert not torch.equal(whole[0]["target_id"], whole[3]["target_id"]), "every epoch has an order of its own"
    for first in (0, 2, 3, 5):
        for batch, expected in zip(batches(num_workers, first), whole[first:]):
            assert torch.equal(batch["target_id"], expected["target_id"])
            assert torch.equal(batch["draw"], expected["draw"])
