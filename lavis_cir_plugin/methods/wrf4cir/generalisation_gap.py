"""Overfitting (recall on seen and unseen queries) and flatness of the minima of runs, for ``lavis-cir gap``."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lavis import tasks
from lavis.datasets.data_utils import concat_datasets, prepare_sample, reorg_datasets_by_split
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from lavis_cir_plugin.core.checkpoints import config_in, load_strictly, read_checkpoint
from lavis_cir_plugin.core.model_parts import frozen_names, tensor_places
from lavis_cir_plugin.core.random_state import get_random_state, seed_cpu, set_random_state
from lavis_cir_plugin.methods.wrf4cir.frozen_memo import FrozenMemo
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.report.curves import Curve, best_epoch, draw_curves, save_figure, shade_gap
from lavis_cir_plugin.report.run_log import EPOCHS, progress, read_epochs
from lavis_cir_plugin.report.sheet_layout import BLUE, GREEN, GREY, ORANGE
from lavis_cir_plugin.training import lora
from lavis_cir_plugin.training.config import choose_splits, with_lavis_defaults
from lavis_cir_plugin.training.portable_runner import join_single_process
from lavis_cir_plugin.training.run_folders import BEST, LAST

GAMMA = 0.001
"""The paper's radius, relative to the weights; the loss of every run is computed in units of it."""

MULTIPLES = range(-10, 11)
"""Distances at which the loss is computed, in units of GAMMA."""

COLOURS = (GREY, BLUE, ORANGE, GREEN, "#8a3ea8", "#b8223b", "#0e8f9c", "#8c6239")
SEED = 0  # the seed of batches and random direction, equal for every run


@dataclass(frozen=True)
class RunCurves:
    """The curves of one run.

    Attributes:
        label: Perturbation settings and name of the run.
        val: Validation metric by epoch, from 0.
        seen: Metric on seen training queries by epoch; empty if ``run.valid_splits`` did not have ``seen``.
        best: Epoch of ``checkpoint_best``.
        losses: Mean loss by multiple of GAMMA, for the directions ``gradient`` and ``random``; empty if it could not be
            computed.
        notes: Sentences that say what is missing and why.
    """

    label: str
    val: Mapping[int, float]
    seen: Mapping[int, float]
    best: int
    losses: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def rise(self, direction: str) -> float:
        """Return the rise of the loss at GAMMA along a direction, or nan if it was not computed."""
        losses = self.losses.get(direction)
        return losses[1] - losses[0] if losses else float("nan")


# -- the log of a run ------------------------------------------------------------------------------------------------


def read_run(folder: Path, metric: str, label: str) -> RunCurves:
    """Read the validation metric of a run by epoch; the run gets this label.

    Raises:
        FileNotFoundError: If the run has no ``epochs.csv``.
        ValueError: If the run has no validation, or none with this metric.
    """
    epochs = logged_epochs(folder)
    if metric not in epochs["val"]:
        known = ", ".join(sorted(epochs["val"]))
        raise ValueError(f"{folder / EPOCHS} has no validation metric {metric!r}; set --metric to one of: {known}.")
    seen = epochs.get("seen", {}).get(metric, {})
    note = f"no {metric} on seen training queries was logged; train with run.valid_splits: [val, seen]."
    return RunCurves(
        label=label,
        val=epochs["val"][metric],
        seen=seen,
        best=best_epoch(epochs["val"], metric),
        notes=() if seen else (note,),
    )


def logged_epochs(folder: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Read a run's ``epochs.csv`` as ``{split: {metric: {epoch: value}}}``.

    Raises:
        FileNotFoundError: If the run has no ``epochs.csv``.
        ValueError: If the run has no validation.
    """
    if not (folder / EPOCHS).is_file():
        inside = sorted(path.parent.name for path in folder.glob(f"*/{EPOCHS}"))
        hint = f"; it holds the runs {', '.join(inside)}" if inside else ""
        raise FileNotFoundError(f"{folder} has no {EPOCHS}, so it is no folder of a training run{hint}.")
    epochs = read_epochs(folder / EPOCHS)
    if "val" not in epochs:
        raise ValueError(
            f"{folder / EPOCHS} has no validation yet; a run with run.valid_splits: [val] logs it per epoch."
        )
    return epochs


def selection_metric(val: Mapping[str, Mapping[int, float]]) -> str:
    """Return the name of the metric that is equal to ``agg_metrics``, by which LAVIS chooses the best checkpoint."""
    chosen = val.get("agg_metrics")
    names = [name for name, values in val.items() if name != "agg_metrics" and values == chosen]
    return names[-1] if names else "agg_metrics"  # a mean is logged after the metrics that it averages


# -- the loss around the weights -------------------------------------------------------------------------------------


def with_losses(run: RunCurves, folder: Path, batches: int) -> RunCurves:
    """Add to a run's curves the loss around the weights of its best (or else last) checkpoint.

    Model and training data are built again by the config in the checkpoint. If that fails, because of moved images or
    a missing checkpoint, the reason becomes a note, and the other runs can still be drawn.
    """
    path = next((folder / name for name in (BEST, LAST) if (folder / name).is_file()), None)
    if path is None:
        note = f"the loss is not drawn: there is neither {BEST} nor {LAST}."
        return dataclasses.replace(run, notes=(*run.notes, note))
    try:
        saved = read_checkpoint(str(path))
        if not isinstance(config_in(saved).get("run"), Mapping) or "model" not in saved:
            raise ValueError(f"{path} holds no weights with a run's config; name a folder that a run wrote.")
        label = f"{_settings(saved['config'])} ({run.label})"
        run = dataclasses.replace(run, label=label)
        with _one_process():
            model, samples, is_mixed = _rebuild(saved, str(path), batches)
            losses = loss_along(model, samples, is_mixed, label, MULTIPLES)
    except (ValueError, OSError) as error:
        return dataclasses.replace(run, notes=(*run.notes, f"the loss is not drawn: {error}"))
    return dataclasses.replace(run, losses=losses)


def _settings(config: Mapping[str, Any]) -> str:
    """Return ``run.wrf`` in short: the radius, and the settings that differ from the defaults."""
    given = dict(config["run"].get("wrf") or {})
    if not str(config["run"].get("runner")).startswith("runner_wrf4cir") or given.get("gamma") == 0:
        return "no perturbation"
    defaults = dataclasses.asdict(WeightPerturbation())
    gamma = given.pop("gamma", defaults["gamma"])
    others = (f", {name} {value}" for name, value in given.items() if value != defaults.get(name))
    return f"γ = {gamma:g}" + "".join(others)


@contextmanager
def _one_process() -> Iterator[None]:
    """Open the process group that losses and loaders need, unless one is open."""
    is_ours = not dist.is_initialized()
    join_single_process("cpu")
    try:
        yield
    finally:
        if is_ours:
            dist.destroy_process_group()


def _rebuild(saved: Mapping[str, Any], path: str, batches: int) -> tuple[nn.Module, list[dict[str, Any]], bool]:
    """Return the model in evaluation mode, fixed training batches on its device, and whether to compute under autocast.

    The batches are the same for every run over the same data with the same batch size.
    """
    config = OmegaConf.create(saved["config"])
    on_gpu = config.run.device == "cuda" and torch.cuda.is_available()
    config.run.device = "cuda" if on_gpu else "cpu"
    if not on_gpu and config.model.get("vit_precision") == "fp16":
        config.model.vit_precision = "fp32"
    # This package's data sets read only the training split, and of its pictures only the needed ones.
    config.run.update({"train_splits": ["train"], "valid_splits": [], "test_splits": []})
    for section in config.datasets.values():
        section.update({"preload": False} if "preload" in section else {})
        if "verify_images" in (section.get("build_info") or {}):
            section.build_info.verify_images = False
    cfg = with_lavis_defaults(config)
    choose_splits(cfg, "train")
    seed_cpu(int(cfg.run_cfg.seed))  # frozen tensors without a file are drawn again from the run's seed
    task = tasks.setup_task(cfg)
    if getattr(task, "replaces_loss", False):
        raise ValueError(f"run.task: {cfg.run_cfg.task} trains another loss than the model's own, of mined negatives.")
    datasets = concat_datasets(reorg_datasets_by_split(task.build_datasets(cfg)))
    model = lora.build_model(task, cfg)
    load_strictly(model, saved["model"], path, may_lack=frozen_names(model))
    model = model.to(cfg.run_cfg.device).eval()
    seed_cpu(SEED)
    loader = _loader(datasets["train"], int(cfg.run_cfg.batch_size_train))
    samples = [prepare_sample(batch, cuda_enabled=on_gpu) for _, batch in zip(range(batches), loader)]
    if not samples:
        raise ValueError(f"the training data give no batch of run.batch_size_train: {cfg.run_cfg.batch_size_train}.")
    place = {"epoch": max(int(saved.get("epoch", 0)), 0), "iters": 0, "num_iters_per_epoch": 1}
    return model, [{**batch, **place} for batch in samples], on_gpu and bool(cfg.run_cfg.amp)


def _loader(dataset: Any, batch_size: int) -> DataLoader[Any]:
    if not hasattr(dataset, "__len__"):
        raise ValueError("its training data are a stream, of which no fixed batches can be drawn.")
    parts = getattr(dataset, "datasets", [dataset])
    return DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=getattr(parts[0], "collater", None),
        generator=torch.Generator().manual_seed(SEED),
    )


def loss_along(
    model: nn.Module,
    samples: Sequence[dict[str, Any]],
    is_mixed: bool = False,
    description: str = "",
    multiples: Sequence[int] = MULTIPLES,
) -> dict[str, dict[int, float]]:
    r"""Return the mean loss of fixed batches at :math:`\theta + m\,\delta`, for each multiple m.

    .. math:: \delta = \gamma \,\lVert\theta\rVert \; d \,/\, \lVert d\rVert

    The perturbation is computed for each tensor with more than one dimension, except embedding tables, with
    :math:`\gamma` = `GAMMA`. For *gradient*, d is the gradient of each batch's loss, WRF4CIR's direction; for *random*
    it is one normal draw. The weights are not written to, and frozen sub-modules run once per batch.

    Args:
        model: Model in evaluation mode, so that dropout does not blur the curve; it takes LAVIS's samples.
        samples: Batches on the model's device.
        is_mixed: Whether to compute under fp16 autocast, as a run with ``run.amp`` did.
        description: Label of the progress bar.
        multiples: Distances m, in units of `GAMMA`.

    Returns:
        ``{"gradient": {multiple: loss}, "random": {multiple: loss}}``
    """
    perturbation = PerturbingOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, WeightPerturbation(GAMMA))
    weights = list(perturbation.weights.values())
    device = weights[0].device
    generator = torch.Generator().manual_seed(SEED)
    random_steps = perturbation.ascent([torch.randn(w.shape, generator=generator).to(device) for w in weights]).steps()
    losses = {direction: dict.fromkeys(multiples, 0.0) for direction in ("gradient", "random")}

    memo = FrozenMemo(model, device)
    seed_cpu(SEED)
    torch.cuda.manual_seed_all(SEED)  # losses that draw negatives draw them on the model's device
    drawn = get_random_state(device)

    def loss_at(batch: dict[str, Any], new: Mapping[int, Tensor]) -> float:
        set_random_state(drawn, device)
        memo.position.clear()
        tensors = {name: new[id(holder[key])] for name, holder, key in tensor_places(model) if id(holder[key]) in new}
        with torch.autocast(device.type, enabled=is_mixed):
            output = functional_call(model, tensors, (dict(batch),), tie_weights=False)
        return float(output["loss"])

    total = len(samples) * len(losses) * len(multiples)
    with progress((), total, description=description) as bar:
        for batch in samples:
            buffers = {id(buffer): buffer.clone() for buffer in model.buffers()}
            # LAVIS's models assign to .data of frozen momentum copies; these detached tensors take the assignment.
            frozen = {id(weight): weight.detach() for weight in model.parameters() if not weight.requires_grad}
            set_random_state(drawn, device)  # the loss draws the same masks and negatives at every distance
            with memo.recording(), torch.autocast(device.type, enabled=is_mixed):
                loss = model(dict(batch))["loss"]
            scale = 2.0**10 if is_mixed else 1.0  # small fp16 gradients would underflow, and only the direction matters
            gradients = torch.autograd.grad(scale * loss, weights, allow_unused=True, materialize_grads=True)
            steps = {"gradient": perturbation.ascent(list(gradients)).steps(), "random": random_steps}
            with torch.no_grad(), memo.replaying():
                for direction, multiple in ((d, m) for d in losses for m in multiples):
                    new = {id(w): w + multiple * step for w, step in zip(weights, steps[direction])}
                    new.update({**{name: buffer.clone() for name, buffer in buffers.items()}, **frozen})
                    losses[direction][multiple] += loss_at(batch, new) / len(samples)
                    bar.update()
    return losses


# -- picture, table, points ------------------------------------------------------------------------------------------


def draw_gap(runs: Sequence[RunCurves], metric: str, path: Path) -> None:
    """Draw a PNG of the metric on validation and seen queries over epochs and, if known, the loss around the weights.

    Raises:
        OSError: If the PNG cannot be written.
    """
    has_losses = any(run.losses for run in runs)
    figure = Figure(figsize=(13 if has_losses else 7, 4.6 + 0.25 * len(runs)), constrained_layout=True)
    panels = figure.subplots(1, 2 if has_losses else 1, squeeze=False)[0]
    figure.get_layout_engine().set(wspace=0.04)  # type: ignore[union-attr, call-arg]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(runs))]
    for run, colour in zip(runs, colours):
        val, seen = Curve(run.val, "", colour), Curve(run.seen, "", colour, style="--")
        draw_curves(panels[0], [val, seen] if run.seen else [val])
        shade_gap(panels[0], val, seen)
        panels[0].plot(run.best, run.val[run.best], marker="o", markersize=9, color=colour, markerfacecolor="white")
    panels[0].set_xlabel("epoch, counted from 0")
    panels[0].set_ylabel(metric)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    styles = {"validation": "-", "seen training queries": "--"}
    if not any(run.seen for run in runs):
        del styles["seen training queries"]
    _legend_of_styles(panels[0], styles, {"best epoch": "o"})
    if has_losses:
        _draw_losses(panels[1], runs, colours)
    handles = [Line2D([], [], color=colour, linewidth=3) for colour in colours]
    figure.legend(handles, [run.label for run in runs], loc="outside lower left", frameon=False)
    save_figure(figure, path)


def _draw_losses(panel: Any, runs: Sequence[RunCurves], colours: Sequence[str]) -> None:
    for run, colour in zip(runs, colours):
        for direction, style in (("gradient", "-"), ("random", ":")):
            losses = run.losses.get(direction, {})
            rises = {100 * GAMMA * multiple: loss - losses[0] for multiple, loss in losses.items()}
            draw_curves(panel, [Curve(rises, "", colour, has_marks=False, style=style, width=1.8)])
    for sign in (-1, 1):
        panel.axvline(100 * sign * GAMMA, color=GREY, linewidth=0.8, zorder=1)
    panel.set_xlabel(f"perturbation in percent of the weights' norm (thin lines: γ = {GAMMA:g})")
    panel.set_ylabel("rise of the training loss")
    _legend_of_styles(panel, {"along the gradient": "-", "along a random direction": ":"}, {})


def _legend_of_styles(panel: Any, lines: Mapping[str, Any], marks: Mapping[str, str]) -> None:
    handles = [Line2D([], [], color="black", linestyle=style, label=label) for label, style in lines.items()]
    handles += [
        Line2D([], [], color="black", linestyle="", marker=mark, markersize=9, markerfacecolor="white", label=label)
        for label, mark in marks.items()
    ]
    panel.legend(handles=handles, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncol=3, borderaxespad=0)


def gap_table(runs: Sequence[RunCurves], metric: str) -> str:
    """Return a table with a line per run: metric on seen and validation queries at the best epoch, gap, and loss.

    ``rise`` is the rise of the loss at GAMMA, along the gradient and along a random direction. A missing value is
    ``-``.
    """
    headings = ("run", "best epoch", f"seen {metric}", f"val {metric}", "gap", "loss", "rise at γ", "rise, random")
    rows: list[tuple[str, ...]] = [headings]
    for run in runs:
        val, seen = run.val[run.best], run.seen.get(run.best)
        losses = [run.losses[direction][0] for direction in list(run.losses)[:1]]
        loss = (
            [f"{losses[0]:.4f}", *(f"{run.rise(name):.5f}" for name in ("gradient", "random"))] if losses else ["-"] * 3
        )
        gap = ["-" if seen is None else f"{seen:.2f}", f"{val:.2f}", "-" if seen is None else f"{seen - val:.2f}"]
        rows.append((run.label, str(run.best), *gap, *loss))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


_POINTS = ("run", "series", "x", "value")
"""Columns of the file of a picture's points."""


def is_points_csv(path: Path) -> bool:
    """Return whether a file begins as those of `points_csv` do."""
    header = ",".join(_POINTS).encode()
    with path.open("rb") as file:
        return file.readline(len(header)) == header


def points_csv(runs: Sequence[RunCurves], metric: str) -> str:
    """Return the picture's points as CSV with the columns run, series, x (epoch or radius) and value."""
    rows: list[tuple[Any, ...]] = [_POINTS]
    for run in runs:
        for name, values in (("val", run.val), ("seen", run.seen)):
            rows += [(run.label, f"{name} {metric}", epoch, value) for epoch, value in values.items()]
        for direction, losses in run.losses.items():
            series = f"loss along {direction}"
            rows += [(run.label, series, f"{GAMMA * multiple:g}", loss) for multiple, loss in losses.items()]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
