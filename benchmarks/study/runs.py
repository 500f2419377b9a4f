"""Run one training of the study in this process, by the package's own launcher, and measure it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from lavis_cir_plugin.core.checkpoints import load_strictly, read_checkpoint
from lavis_cir_plugin.core.model_parts import frozen_names
from lavis_cir_plugin.core.random_state import get_random_state, seed_cpu, set_random_state
from lavis_cir_plugin.data.feature_cache import fingerprint, with_features
from lavis_cir_plugin.methods.wrf4cir.generalisation_gap import loss_along
from lavis_cir_plugin.methods.wrf4cir.optimizer import select_tensors
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.report.run_log import STEPS, read_steps
from lavis_cir_plugin.report.run_record import hardware, software
from study import worlds
from study.design import ASAM, Design, Run
from study.projects import PROJECTS, project
from study.results import pack_scores
from study.scores import scores_of, stopped_scores
from study.starts import launch, start_checkpoint

MEASURED_BATCHES = 8


def execute(design: Design, run: Run, work: Path, commit: str) -> dict[str, str]:
    """Train and measure, and return the row of the CSV, which names the commit. Nothing of the run's folder is left."""
    torch.set_num_threads(1)
    watch = Watch(run)
    output = work / "runs" / f"{run.part}_{run.digest}"
    config = OmegaConf.merge(project(design, run, work), OmegaConf.from_dotlist(list(run.row.options)))
    began = time.process_time()
    launch(OmegaConf.to_container(config), output, watch.begin)
    folder = Path(watch.runner.output_dir)
    row = {
        "part": run.part, "row": run.name, "world": run.world, "triplets": run.triplets, "seed": run.seed,
        "digest": run.digest, **watch.numbers(folder), "run_seconds": f"{time.process_time() - began:.1f}",
        "settings": " ".join(watch.settings),
        "start": start_of(config.model), "commit": commit,
        "cpu": hardware()["cpu"], "torch": software().get("torch", ""), "python": software()["python"],
    }  # fmt: skip
    shutil.rmtree(output)
    return {name: str(value) for name, value in row.items()}


def start_of(model: Any) -> str:
    """Return the first digits of the fingerprint of the weights that a run starts from; nothing if it has none."""
    path = model.get("mapping_checkpoint") or model.get("finetuned") or model.get("pretrained")
    return fingerprint(read_checkpoint(path)["model"])[:8] if path else ""


class Watch:
    """Measures a run from outside: time of its steps, scores of its validations, and its weights."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.settings = list(run.row.options)
        self.seconds = 0.0
        self.scores: dict[str, list[Tensor]] = {"val": [], "seen": []}

    def begin(self, runner: Any) -> None:
        """Take the runner before it starts."""
        self.runner = runner
        self.datasets = {split: data for splits in runner.datasets.values() for split, data in splits.items()}
        self.model = runner.unwrap_dist_model(runner.model)
        self.norm_start = weights_norm(self.model)
        if self.run.row.matched:
            self._match_radius(runner.config.run_cfg.wrf)
        runner.train_iters = partial(self._timed, runner.train_iters)
        runner.task.after_evaluation = partial(self._scored, runner.task.after_evaluation)

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

    def _scored(self, stock: Callable[..., Any], val_result: Any, split_name: str, **named: Any) -> Any:
        kind = "val" if split_name == "val" else "seen"  # LAVIS's data sets know a third split as "test" alone
        self.scores[kind].append(scores_of(val_result, self.datasets[split_name]))
        return stock(val_result=val_result, split_name=split_name, **named)

    def _batches(self) -> list[dict[str, Any]]:
        """Return fixed batches of training examples."""
        seed_cpu(0)
        dataset = self.datasets["train"]
        size = int(self.runner.config.run_cfg.batch_size_train)
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        parts = [order[at : at + size] for at in range(0, len(order) - size + 1, size)][:MEASURED_BATCHES]
        batches = [dataset.collater([dataset[index] for index in part]) for part in parts]
        caches = getattr(self.runner.task, "caches", [])
        return [with_features(batch, self.model, caches) if caches else batch for batch in batches]

    def numbers(self, folder: Path) -> dict[str, Any]:
        """Return the measured columns of a finished run."""
        steps, val = read_steps(folder / STEPS), torch.stack(self.scores["val"])
        curves = {split: [100 * float(each.double().mean()) for each in own] for split, own in self.scores.items()}
        best = max(range(len(curves["val"])), key=lambda epoch: curves["val"][epoch])
        stopped = stopped_scores(val)
        radii = [value for value in steps.get("perturbation_norm", []) if value == value]
        saved = read_checkpoint(str(folder / "checkpoint_last.pth"))
        load_strictly(self.model, saved["model"], "checkpoint_last.pth", may_lack=frozen_names(self.model))
        self.model.eval()
        if self.run.part not in PROJECTS:
            self.model.label_smoothing = 0.0  # a setting of some rows
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
            "hits_last": pack_scores(val[-1].numpy()), "hits_stopped": pack_scores(stopped.numpy()),
        }  # fmt: skip


def weights_norm(model: Any) -> float:
    """Return the norm of all tensors that a perturbation moves by default."""
    weights = select_tensors(model, WeightPerturbation()).values()
    return float(torch.stack([weight.detach().float().norm() for weight in weights]).norm())


def prepare(design: Design, runs: list[Run], work: Path) -> None:
    """Draw the worlds and train the starts of these runs, before several processes need them at once."""
    for seed in sorted({run.world for run in runs}):
        worlds.world(design, seed)
    for start in sorted({run.row.start for run in runs if run.part not in PROJECTS}, key=lambda start: start.name):
        start_checkpoint(design, start, work)
    for run in {run.part: run for run in runs if run.part in PROJECTS}.values():
        project(design, run, work)
