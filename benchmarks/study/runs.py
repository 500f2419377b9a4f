"""Run one training of the study in this process, by the package's own launcher, and measure it."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf
from torch import Tensor

from lavis_cir_plugin.core.atomic_files import replacing
from lavis_cir_plugin.core.checkpoints import load_strictly, read_checkpoint
from lavis_cir_plugin.core.locks import hold_lock
from lavis_cir_plugin.core.model_parts import frozen_names
from lavis_cir_plugin.core.random_state import get_random_state, seed_all, set_random_state
from lavis_cir_plugin.data.benchmark_datasets import cache_root
from lavis_cir_plugin.data.feature_cache import fingerprint
from lavis_cir_plugin.garments import fashioniq, questions
from lavis_cir_plugin.garments.attributes import CATEGORIES
from lavis_cir_plugin.garments.world import digest, make_once, write_json
from lavis_cir_plugin.methods.wrf4cir.generalisation_gap import loss_along
from lavis_cir_plugin.methods.wrf4cir.optimizer import select_tensors
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.report.run_log import EPOCHS, STEPS, read_epochs, read_steps
from lavis_cir_plugin.report.run_record import commit, hardware, software
from lavis_cir_plugin.training import launcher
from study.design import ASAM, CAPTION_WORLD, VERSION, Design, Run, Start
from study.results import pack_hits

WIDTH, HEIGHT = 64, 80  # of the drawn pictures
CUTOFFS = (10, 50)
MEASURED_BATCHES = 8
PROCESSORS = {stage: {"name": "target_pad", "image_size": 64} for stage in ("train", "eval")}


# -- data ------------------------------------------------------------------------------------------------------------


def world(design: Design, seed: int) -> Path:
    """Return the folder of a drawn world in FashionIQ's files; the first call draws it."""
    settings = fashioniq.FashionIQGarments(
        seed=seed, train_triplets=design.world_triplets, train_images=design.world_images, test_queries=1,
        test_images=40, image_width=WIDTH, image_height=HEIGHT,
    )  # fmt: skip
    return fashioniq.WORLD.make(cache_root(), settings)


def training_annotations(design: Design, run: Run, work: Path) -> Path:
    """Return FashionIQ's annotations of the world with so many training triplets, which the run's seed draws.

    For one seed, the triplets of a smaller amount are among those of a larger one. Each category has a third.
    """
    root = world(design, run.world)
    place = work / "annotations" / f"{root.name}_{run.triplets}_{run.seed}"

    def write(folder: Path) -> None:
        shutil.copytree(root / "image_splits", folder / "image_splits")
        shutil.copytree(root / "captions", folder / "captions")
        for number, category in enumerate(CATEGORIES):
            path = folder / "captions" / f"cap.{category}.train.json"
            records = json.loads(path.read_text(encoding="utf-8"))
            random.Random(f"{run.seed} {category}").shuffle(records)
            count = (run.triplets + number) // len(CATEGORIES)
            if count > len(records):
                raise ValueError(f"the world has {len(records)} triplets of {category}, and {count} are asked for")
            write_json(path, records[:count])

    return make_once(place, {"triplets": run.triplets, "seed": run.seed}, write)


def caption_world(design: Design) -> Path:
    """Return the folder of a drawn world of captioned pictures; the first call draws it."""
    settings = questions.QuestionGarments(
        seed=CAPTION_WORLD, train_images=design.caption_pictures, val_images=40, captions="full",
        image_width=WIDTH, image_height=HEIGHT,
    )  # fmt: skip
    return questions.WORLD.make(cache_root(), settings, section="garments_caption")


def caption_triplets(root: Path, work: Path) -> Path:
    """Return a folder of triplets made of captioned pictures: the text describes the target, the reference is any."""

    def write(folder: Path) -> None:
        records = json.loads((root / "caption_train.json").read_text(encoding="utf-8"))
        names = sorted({record["image"] for record in records})
        rng = random.Random(CAPTION_WORLD)
        lines = []
        for record in records:
            target = record["image"]
            reference = next(name for name in rng.sample(names, 2) if name != target)
            lines.append(json.dumps({"reference": reference, "text": record["caption"], "target": target}))
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return make_once(work / "captions" / root.name, {"world": root.name}, write)


# -- what runs start from --------------------------------------------------------------------------------------------


def start_checkpoint(design: Design, start: Start, work: Path) -> Path:
    """Return the checkpoint that runs start from; the first call trains it on captions."""
    path = _start_file(design, start, work)
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(path.with_suffix(".lock"), f"training {path.name}"):
        if not path.is_file():
            state = _make_start(design, start, work)
            with replacing(path) as file:
                torch.save({"model": state}, file)
    return path


def _start_file(design: Design, start: Start, work: Path, suffix: str = ".pth") -> Path:
    settings = [VERSION, design.caption_pictures, design.caption_steps, design.batch]
    return work / "starts" / f"{start.name}_{digest(settings)[:8]}{suffix}"


def _make_start(design: Design, start: Start, work: Path) -> Mapping[str, Tensor]:
    if start == Start():
        return _train_on_captions(design, start, work, None)
    # Another Q-Former stands on a tower that is finished and frozen.
    untrained = _start_file(design, start, work, "_untrained.pth")
    if start.share == 1:
        tower = read_checkpoint(str(start_checkpoint(design, Start(), work)))["model"]
    else:
        tower = _train_on_captions(design, Start(share=start.share), work, None)
    with replacing(untrained) as file:
        torch.save({"model": _with_tower(start, tower)}, file)
    if start.fresh:
        return dict(read_checkpoint(str(untrained))["model"])
    return _train_on_captions(design, start, work, untrained)


def _with_tower(start: Start, source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the weights of a model with a new Q-Former of the start's width, and the tower of other weights."""
    seed_all(0)
    model_class = registry.get_model_class("blip2_cir")
    defaults = OmegaConf.load(model_class.default_config_path("tiny"))
    model = model_class.from_config(OmegaConf.merge(defaults, {"model": model_section(start, None)}).model)
    tower = {name: tensor for name, tensor in source.items() if name.startswith("visual_encoder.")}
    return {**model.state_dict(), **tower}


def _train_on_captions(design: Design, start: Start, work: Path, untrained: Path | None) -> Mapping[str, Tensor]:
    root = caption_world(design)
    folder = caption_triplets(root, work)
    # A tower is trained together with its Q-Former; a Q-Former on a frozen tower always has all steps.
    steps = round((start.share if untrained is None else 1) * design.caption_steps)
    config = {
        "model": {**model_section(start, untrained), "freeze_vit": untrained is not None},
        "datasets": {
            "triplets": {"build_info": {"root": str(folder), "images": str(root / "images")},
                         "vis_processor": PROCESSORS, "splits": ["train"], "preload": untrained is None},
        },
        "run": {**run_section(design, work), "runner": "runner_iter", "max_iters": steps,
                "iters_per_inner_epoch": max(steps // 10, 1), "valid_splits": [], "init_lr": 5.0e-4, "seed": 0,
                "feature_cache": str(work / "features") if untrained is not None else False},
    }  # fmt: skip
    runners: list[Any] = []
    output = _start_file(design, start, work, "_run")
    _launch(config, output, runners.append)
    model = runners[0].unwrap_dist_model(runners[0].model)
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    shutil.rmtree(output)
    return state


# -- one run ---------------------------------------------------------------------------------------------------------


def model_section(start: Start, finetuned: Path | None) -> dict[str, Any]:
    weights = {} if finetuned is None else {"load_finetuned": True, "finetuned": str(finetuned)}
    sizes = {"hidden_size": start.width, "intermediate_size": 4 * start.width}
    return {"arch": "blip2_cir", "model_type": "tiny", "qformer_config": sizes, **weights}


def run_section(design: Design, work: Path) -> dict[str, Any]:
    return {
        "task": "composed_retrieval", "batch_size_train": design.batch, "batch_size_eval": 256, "min_lr": 1.0e-5,
        "warmup_lr": 1.0e-5, "warmup_steps": 20, "beta2": 0.98, "num_workers": 0, "device": "cpu", "log_freq": 5,
        "train_splits": ["train"], "test_splits": [], "feature_cache": str(work / "features"),
    }  # fmt: skip


def run_config(design: Design, run: Run, work: Path) -> dict[str, Any]:
    """Return the project of a run, without its row's options."""
    start = start_checkpoint(design, run.row.start, work)
    return {
        "model": {**model_section(run.row.start, start), "freeze_vit": True},
        "datasets": {
            "fashioniq": {
                "build_info": {"root": str(world(design, run.world)), "verify_images": False,
                               "annotations": str(training_annotations(design, run, work))},
                "vis_processor": PROCESSORS,
                "noise_seed": run.seed,
            },
        },
        "run": {**run_section(design, work), "runner": "runner_wrf4cir_iter", "wrf": {"gamma": 0.0},
                "max_iters": design.steps, "iters_per_inner_epoch": design.steps // design.validations,
                "valid_splits": ["val", "seen"], "seed": run.seed},
    }  # fmt: skip


def execute(design: Design, run: Run, work: Path) -> dict[str, str]:
    """Train and measure, and return the row of the CSV. Nothing of the run's folder is left."""
    torch.set_num_threads(1)
    watch = Watch(run)
    output = work / "runs" / run.digest
    config = OmegaConf.merge(run_config(design, run, work), OmegaConf.from_dotlist(list(run.row.options)))
    began = time.process_time()
    _launch(OmegaConf.to_container(config), output, watch.begin)
    folder = Path(watch.runner.output_dir)
    row = {
        "part": run.part, "row": run.name, "world": run.world, "triplets": run.triplets, "seed": run.seed,
        "digest": run.digest, **watch.numbers(folder), "run_seconds": f"{time.process_time() - began:.1f}",
        "settings": " ".join(watch.settings),
        "start": fingerprint(read_checkpoint(config.model.finetuned)["model"])[:8], "commit": short_commit(),
        "cpu": hardware()["cpu"], "torch": software().get("torch", ""), "python": software()["python"],
    }  # fmt: skip
    shutil.rmtree(output)
    return {name: str(value) for name, value in row.items()}


def short_commit() -> str:
    """Return the first digits of the commit, with ``+`` where files were changed."""
    found = commit() or "unknown"
    return found[:7] + ("+" if found.endswith("+") else "")


def _launch(config: Any, output: Path, announce: Callable[[Any], None]) -> None:
    shutil.rmtree(output, ignore_errors=True)  # what an interrupted run has left
    output.mkdir(parents=True)
    config["run"]["output_dir"] = str(output / "out")
    OmegaConf.save(OmegaConf.create(config), output / "project.yaml")
    logging.disable(logging.INFO)
    with (output / "printed.txt").open("w", encoding="utf-8") as printed, contextlib.redirect_stdout(printed):
        launcher.run("train", argparse.Namespace(cfg_path=str(output / "project.yaml"), options=[]), announce)


class Watch:
    """Measures a run from outside: time of its steps, ranks of its validations, and its weights."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.settings = list(run.row.options)
        self.seconds = 0.0
        self.ranks: list[Tensor] = []

    def begin(self, runner: Any) -> None:
        """Take the runner before it starts."""
        self.runner, self.triplets = runner, runner.datasets["fashioniq"]["train"]
        self.model = runner.unwrap_dist_model(runner.model)
        self.norm_start = weights_norm(self.model)
        if self.run.row.matched:
            self._match_radius(runner.config.run_cfg.wrf)
        runner.train_iters = partial(self._timed, runner.train_iters)
        runner.task.after_evaluation = partial(self._ranked, runner.task.after_evaluation)

    def _match_radius(self, wrf: Any) -> None:
        r"""Turn a relative radius into SAM's or ASAM's :math:`\rho` with a perturbation of equal norm at the start."""
        wrf.gamma = float(wrf.gamma) * self.norm_start
        if self.run.row.matched == ASAM:
            weights = list(select_tensors(self.model, WeightPerturbation()).values())
            state = get_random_state()  # the run's own draws stay those of a plain run
            losses = [self.model(dict(batch))["loss"] for batch in self._batches()]
            gradients = torch.autograd.grad(torch.stack(losses).mean(), weights)
            set_random_state(state)
            lengths = [
                float(torch.stack([(w.detach().abs() ** power * g).norm() for w, g in zip(weights, gradients)]).norm())
                for power in (1, 2)
            ]
            wrf.gamma *= lengths[0] / lengths[1]
        self.settings = [f"{option} (matched: {wrf.gamma:.6g})" if option.startswith("run.wrf.gamma") else option
                         for option in self.settings]  # fmt: skip

    def _timed(self, train: Callable[..., Any], *arguments: Any) -> Any:
        began = time.process_time()
        result = train(*arguments)
        self.seconds += time.process_time() - began
        return result

    def _ranked(self, stock: Callable[..., Any], val_result: Any, split_name: str, **named: Any) -> Any:
        rankings = val_result.rankings()
        val_result.rankings = lambda *_, **__: rankings  # they are computed once
        if split_name == "val":
            self.ranks.append(torch.cat([ranking.ranks for ranking in rankings.values()]))
        return stock(val_result=val_result, split_name=split_name, **named)

    def _batches(self) -> list[dict[str, Any]]:
        """Return fixed batches of training triplets."""
        seed_all(0)
        dataset = self.triplets
        size = int(self.runner.config.run_cfg.batch_size_train)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        parts = [order[at : at + size] for at in range(0, len(order) - size + 1, size)][:MEASURED_BATCHES]
        return [dataset.collater([dataset[index] for index in part]) for part in parts]

    def numbers(self, folder: Path) -> dict[str, Any]:
        """Return the measured columns of a finished run."""
        epochs, steps = read_epochs(folder / EPOCHS), read_steps(folder / STEPS)
        curves = {split: list(epochs[split]["mean"].values()) for split in ("val", "seen")}
        best = max(range(len(curves["val"])), key=lambda epoch: curves["val"][epoch])
        hits = torch.stack([torch.stack([(ranks >= 0) & (ranks < k) for k in CUTOFFS]) for ranks in self.ranks])
        stopped = stopped_hits(hits)
        radii = [value for value in steps.get("perturbation_norm", []) if value == value]
        saved = read_checkpoint(str(folder / "checkpoint_last.pth"))
        load_strictly(self.model, saved["model"], "checkpoint_last.pth", may_lack=frozen_names(self.model))
        self.model.eval()
        self.model.label_smoothing = 0.0
        losses = loss_along(self.model, self._batches(), multiples=(0, 1))
        return {
            "train_last": f"{curves['seen'][-1]:.3f}", "val_last": f"{curves['val'][-1]:.3f}",
            "train_best": f"{curves['seen'][best]:.3f}", "val_best": f"{curves['val'][best]:.3f}", "epoch_best": best,
            "val_stopped": f"{100 * float(stopped.double().mean()):.3f}",
            "loss": f"{losses['gradient'][0]:.6f}",
            "rise_gradient": f"{losses['gradient'][1] - losses['gradient'][0]:.6f}",
            "rise_random": f"{losses['random'][1] - losses['random'][0]:.6f}",
            "radius": f"{sum(radii) / len(radii):.6g}" if radii else "", "norm_start": f"{self.norm_start:.6g}",
            "norm_end": f"{weights_norm(self.model):.6g}", "step_seconds": f"{self.seconds / len(steps['step']):.5f}",
            "val_curve": " ".join(f"{value:.2f}" for value in curves["val"]),
            "train_curve": " ".join(f"{value:.2f}" for value in curves["seen"]),
            "hits_last": pack_hits(hits[-1].tolist()), "hits_stopped": pack_hits(stopped.tolist()),
        }  # fmt: skip


def weights_norm(model: Any) -> float:
    """Return the norm of all tensors that a perturbation moves by default."""
    weights = select_tensors(model, WeightPerturbation()).values()
    return float(torch.stack([weight.detach().float().norm() for weight in weights]).norm())


def stopped_hits(hits: Tensor) -> Tensor:
    """Return each query's hits in the epoch that the other half of the queries chooses.

    A best epoch that the reported queries chose themselves would flatter the recall. So the queries with even places
    choose for those with odd places, and the reverse, each by the mean of their hits; the first of equal epochs counts.

    Args:
        hits: Whether the target is among the first K, ``(epochs, cutoffs, queries)``.

    Returns:
        ``(cutoffs, queries)``.
    """
    found = torch.empty_like(hits[0])
    for own, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        epoch = int(hits[:, :, other].double().mean(dim=(1, 2)).argmax())
        found[:, own] = hits[epoch][:, own]
    return found


def prepare(design: Design, runs: list[Run], work: Path) -> None:
    """Draw the worlds and train the starts of these runs, before several processes need them at once."""
    for seed in sorted({run.world for run in runs}):
        world(design, seed)
    for start in sorted({run.row.start for run in runs}, key=lambda start: start.name):
        start_checkpoint(design, start, work)
