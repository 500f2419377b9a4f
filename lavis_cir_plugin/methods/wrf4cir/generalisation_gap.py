"""How far runs overfit (recall on seen and unseen queries) and how flat their minima are, for ``lavis-cir gap``."""

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

from lavis_cir_plugin.core.checkpoints import load_strictly, read_checkpoint
from lavis_cir_plugin.core.model_parts import frozen_names, places
from lavis_cir_plugin.core.random_state import seed_all
from lavis_cir_plugin.methods.wrf4cir.frozen_memo import FrozenMemo
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.report.curves import Curve, best_epoch, draw_curves, save_figure, shade_gap
from lavis_cir_plugin.report.run_log import EPOCHS, progress, read_epochs
from lavis_cir_plugin.report.sheet_layout import BLUE, GREEN, GREY, ORANGE
from lavis_cir_plugin.training import launcher, lora
from lavis_cir_plugin.training.config import choose_splits
from lavis_cir_plugin.training.portable_runner import join_single_process
from lavis_cir_plugin.training.resumable_runner import LAST

GAMMA = 0.001
"""The paper's radius, relative to the weights; every run is probed in units of it, whatever it was trained with."""

MULTIPLES = range(-10, 11)
"""Where the loss is computed, in units of GAMMA."""

COLOURS = (GREY, BLUE, ORANGE, GREEN, "#8a3ea8", "#b8223b", "#0e8f9c", "#8c6239")
SEED = 0  # of the batches and the random direction, the same for every run


@dataclass(frozen=True)
class RunCurves:
    """What is drawn of one run.

    Attributes:
        label: Its perturbation settings and its folder.
        val: Metric by epoch, counted from 0.
        seen: The same on training queries; empty where the run did not list ``seen`` in ``run.valid_splits``.
        best: The epoch of ``checkpoint_best``.
        losses: Mean loss by multiple of GAMMA, for the directions ``gradient`` and ``random``; empty where they could
            not be computed.
        notes: What is missing and why, one sentence each.
    """

    label: str
    val: Mapping[int, float]
    seen: Mapping[int, float]
    best: int
    losses: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def rise(self, direction: str) -> float:
        """Return how much the loss rises at GAMMA along a direction; nan where it was not computed."""
        losses = self.losses.get(direction)
        return losses[1] - losses[0] if losses else float("nan")


# -- what a run logged -----------------------------------------------------------------------------------------------


def read_run(folder: Path, metric: str) -> RunCurves:
    """Read a run's validation.

    Raises:
        FileNotFoundError: It has no ``epochs.csv``.
        ValueError: It has no validation, or none with this metric.
    """
    epochs = logged_epochs(folder)
    if metric not in epochs["val"]:
        known = ", ".join(sorted(epochs["val"]))
        raise ValueError(f"{folder / EPOCHS} has no validation metric {metric!r}; set --metric to one of: {known}.")
    seen = epochs.get("seen", {}).get(metric, {})
    note = f"no {metric} on seen training queries was logged; train with run.valid_splits: [val, seen]."
    return RunCurves(
        label=folder.resolve().name,
        val=epochs["val"][metric],
        seen=seen,
        best=best_epoch(epochs["val"], metric),
        notes=() if seen else (note,),
    )


def logged_epochs(folder: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Read a run's ``epochs.csv`` as ``{split: {metric: {epoch: value}}}``.

    Raises:
        FileNotFoundError: It has none.
        ValueError: It has no validation.
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
    """Return the name of the metric that ``agg_metrics``, by which LAVIS chooses its checkpoint, repeats."""
    chosen = val.get("agg_metrics")
    names = [name for name, values in val.items() if name != "agg_metrics" and values == chosen]
    return names[-1] if names else "agg_metrics"  # means follow what they are made of


# -- the loss around the weights -------------------------------------------------------------------------------------


def with_losses(run: RunCurves, folder: Path, batches: int) -> RunCurves:
    """Add to a run the loss around the weights of its best (else last) checkpoint.

    Model and training data are built again as the checkpoint's own config says. Whatever stands against it (moved
    images, no checkpoint) becomes a note: the other runs are drawn all the same.
    """
    path = next((folder / name for name in ("checkpoint_best.pth", LAST) if (folder / name).is_file()), None)
    if path is None:
        note = f"the loss is not drawn: there is neither checkpoint_best.pth nor {LAST}."
        return dataclasses.replace(run, notes=(*run.notes, note))
    try:
        saved = read_checkpoint(str(path))
        config = saved.get("config") if isinstance(saved, Mapping) else None
        if not isinstance(config, Mapping) or not isinstance(config.get("run"), Mapping) or "model" not in saved:
            raise ValueError(f"{path} holds no weights with a run's config; name a folder that a run wrote.")
        label = f"{_settings(saved['config'])} ({run.label})"
        run = dataclasses.replace(run, label=label)
        with _one_process():
            model, samples, is_mixed = _rebuild(saved, str(path), batches)
            losses = loss_along(model, samples, is_mixed, label)
    except (ValueError, OSError) as error:
        return dataclasses.replace(run, notes=(*run.notes, f"the loss is not drawn: {error}"))
    return dataclasses.replace(run, losses=losses)


def _settings(config: Mapping[str, Any]) -> str:
    """Write ``run.wrf`` in short: the radius, and what differs from the defaults."""
    given = dict(config["run"].get("wrf") or {})
    if not str(config["run"].get("runner")).startswith("runner_wrf4cir") or given.get("gamma") == 0:
        return "no perturbation"
    defaults = dataclasses.asdict(WeightPerturbation())
    gamma = given.pop("gamma", defaults["gamma"])
    others = (f", {name} {value}" for name, value in given.items() if value != defaults.get(name))
    return f"γ = {gamma:g}" + "".join(others)


@contextmanager
def _one_process() -> Iterator[None]:
    """Open the process group that losses and loaders ask for, unless there is one."""
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
    # Of our own data sets: read nothing but the training split, and of its pictures only what is needed.
    config.run.update({"train_splits": ["train"], "valid_splits": [], "test_splits": []})
    for section in config.datasets.values():
        section.update({"preload": False} if "preload" in section else {})
        if "verify_images" in (section.get("build_info") or {}):
            section.build_info.verify_images = False
    cfg = launcher.with_lavis_defaults(config)
    choose_splits(cfg, "train")
    seed_all(int(cfg.run_cfg.seed))  # frozen tensors without a checkpoint are drawn again
    task = tasks.setup_task(cfg)
    datasets = concat_datasets(reorg_datasets_by_split(task.build_datasets(cfg)))
    model = lora.build_model(task, cfg)
    load_strictly(model, saved["model"], path, may_lack=frozen_names(model))
    model = model.to(cfg.run_cfg.device).eval()
    seed_all(SEED)
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
    model: nn.Module, samples: Sequence[dict[str, Any]], is_mixed: bool = False, description: str = ""
) -> dict[str, dict[int, float]]:
    r"""Return the mean loss of fixed batches at :math:`\theta + m\,\delta`, for each m in `MULTIPLES`.

    .. math:: \delta = \gamma \,\lVert\theta\rVert \; d \,/\, \lVert d\rVert

    per tensor with more than one dimension (no embedding tables), :math:`\gamma` = `GAMMA`; *gradient*: d is the
    gradient of the loss of each batch, the direction in which WRF4CIR perturbs; *random*: one normal draw.
    The weights are not written to. Frozen sub-modules run once per batch.

    Args:
        model: In evaluation mode, so that dropout does not blur the curve; takes LAVIS's samples.
        samples: Batches on the model's device.
        is_mixed: Compute under fp16 autocast, as a run with ``run.amp`` did.
        description: Of the progress bar.

    Returns:
        ``{"gradient": {multiple: loss}, "random": {multiple: loss}}``
    """
    perturbation = PerturbingOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, WeightPerturbation(GAMMA))
    weights = list(perturbation.weights.values())
    device = weights[0].device
    generator = torch.Generator().manual_seed(SEED)
    random_steps = perturbation.perturbations([torch.randn(w.shape, generator=generator).to(device) for w in weights])
    losses = {direction: dict.fromkeys(MULTIPLES, 0.0) for direction in ("gradient", "random")}

    memo = FrozenMemo(model, device)

    def loss_at(batch: dict[str, Any], new: Mapping[int, Tensor]) -> float:
        seed_all(SEED)
        memo.position.clear()
        tensors = {name: new[id(holder[key])] for name, holder, key in places(model) if id(holder[key]) in new}
        with torch.autocast(device.type, enabled=is_mixed):
            output = functional_call(model, tensors, (dict(batch),), tie_weights=False)
        return float(output["loss"])

    total = len(samples) * len(losses) * len(MULTIPLES)
    with progress((), total, description=description) as bar:
        for batch in samples:
            buffers = {id(buffer): buffer.clone() for buffer in model.buffers()}
            # LAVIS's models move frozen copies of their weights by assigning to .data, here to that of a stand-in.
            frozen = {id(weight): weight.detach() for weight in model.parameters() if not weight.requires_grad}
            seed_all(SEED)  # whatever the loss draws (masks, negatives), it draws the same at every place
            with memo.recording(), torch.autocast(device.type, enabled=is_mixed):
                loss = model(dict(batch))["loss"]
            scale = 2.0**10 if is_mixed else 1.0  # small fp16 gradients would underflow; their length does not matter
            gradients = torch.autograd.grad(scale * loss, weights, allow_unused=True, materialize_grads=True)
            steps = {"gradient": perturbation.perturbations(list(gradients)), "random": random_steps}
            with torch.no_grad(), memo.replaying():
                for direction, multiple in ((d, m) for d in losses for m in MULTIPLES):
                    new = {id(w): w + multiple * step for w, step in zip(weights, steps[direction])}
                    new.update({**{name: buffer.clone() for name, buffer in buffers.items()}, **frozen})
                    losses[direction][multiple] += loss_at(batch, new) / len(samples)
                    bar.update()
    return losses


# -- picture, table, points ------------------------------------------------------------------------------------------


def draw_gap(runs: Sequence[RunCurves], metric: str, path: Path) -> None:
    """Draw validation and seen metric over epochs, and where computed the loss around the weights, as a PNG.

    Raises:
        OSError: The PNG cannot be written.
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
    """Lay out one line per run: metric on seen and validation queries at the best epoch, their gap, and the loss.

    ``rise`` is that of the loss at GAMMA, along the gradient and along a random direction. What a run lacks is ``-``.
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


def points_csv(runs: Sequence[RunCurves], metric: str) -> str:
    """Return every point of the picture as CSV: run, series, x (epoch or relative radius), value (metric or loss)."""
    rows: list[tuple[Any, ...]] = [("run", "series", "x", "value")]
    for run in runs:
        for name, values in (("val", run.val), ("seen", run.seen)):
            rows += [(run.label, f"{name} {metric}", epoch, value) for epoch, value in values.items()]
        for direction, losses in run.losses.items():
            series = f"loss along {direction}"
            rows += [(run.label, series, f"{GAMMA * multiple:g}", loss) for multiple, loss in losses.items()]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
