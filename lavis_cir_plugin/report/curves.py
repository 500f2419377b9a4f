"""Draw the training curve of a run, and other curves."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from lavis_cir_plugin.core.atomic_files import replace_file
from lavis_cir_plugin.report.run_log import EPOCHS, STEPS, read_epochs, read_steps
from lavis_cir_plugin.report.sheet_layout import BLUE, GREEN, GREY, LIGHT_GREY, ORANGE


@dataclass(frozen=True)
class Curve:
    """A line in a panel, with points ``{x: value}``; values that are not finite leave a gap."""

    points: Mapping[Any, float]
    label: str
    colour: str
    has_marks: bool = True
    style: str = "-"
    width: float = 1.8


@dataclass(frozen=True)
class Panel:
    """A panel of the training curve for what a method measures.

    Attributes:
        label: Label of the vertical axis.
        lines: Column, legend label and colour of each line. A column that a run has not logged gives no line.
        by_batch: Whether the columns are those of ``steps.csv``; otherwise they are training means in ``epochs.csv``.
    """

    label: str
    lines: tuple[tuple[str, str, str], ...]
    by_batch: bool = False


LEARNING_RATE = Panel("learning rate", (("lr", "", GREY),), by_batch=True)


def training_curve(folder: str | Path, png_path: str | Path, metric: str, methods: Sequence[Panel] = ()) -> Path:
    """Draw `training_figure` as a PNG and return the path of the PNG.

    Raises:
        FileNotFoundError, ValueError: As `training_figure`.
        OSError: If the PNG cannot be written.
    """
    return save_figure(training_figure(folder, metric, methods), png_path)


def training_figure(folder: str | Path, metric: str, methods: Sequence[Panel] = ()) -> Figure:
    r"""Draw the course of a run from its ``epochs.csv`` and ``steps.csv``.

    The panels show the loss per batch and its mean per epoch; ``metric`` on ``val`` and on ``seen``, with the gap
    between them shaded; what methods measure in each epoch; the learning rate; and what methods measure in each batch.
    A panel without data is left out.

    A dashed line marks the epoch that LAVIS keeps as ``checkpoint_best``: the first with the largest ``agg_metrics`` of
    ``val``. Epochs are counted from 0, as in the names of LAVIS's checkpoints. The batches of an epoch stand to the
    left of its mark. Losses that are not finite leave a gap, and the legend counts them.

    Args:
        folder: Folder of the run.
        metric: Key of ``benchmark.metrics``, in percent, or what another task of LAVIS has logged.
        methods: Panels of the methods that the run may have used. Panels without a logged column are left out.

    Raises:
        FileNotFoundError: If there is no ``epochs.csv``.
        ValueError: If it holds no finished epoch, a damaged line, or validations without this metric.
    """
    folder = Path(folder)
    epochs = read_epochs(folder / EPOCHS)
    steps = _by_position(read_steps(folder / STEPS)) if (folder / STEPS).is_file() else {}
    losses, val = epochs.get("train", {}).get("loss", {}), epochs.get("val", {})
    if not losses and not val:
        raise ValueError(f"{folder / EPOCHS} holds no finished epoch; draw the curve after the first one.")
    panels = {"training loss": _loss_curves(losses, steps.get("loss", {}))}
    if val:
        panels[_quantity(metric, val)] = _metric_curves(epochs, metric, folder / EPOCHS)
    in_epochs = [panel for panel in methods if not panel.by_batch]
    in_batches = [LEARNING_RATE, *(panel for panel in methods if panel.by_batch)]
    panels.update((panel.label, _measured_curves(panel, epochs.get("train", {}))) for panel in in_epochs)
    panels.update((panel.label, _measured_curves(panel, steps)) for panel in in_batches)
    panels = {label: curves for label, curves in panels.items() if any(curve.points for curve in curves)}
    heights = [1.4 if label in {panel.label for panel in in_batches} else 2.7 for label in panels]
    figure = Figure(figsize=(7.5, 0.6 + sum(heights)), constrained_layout=True)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    axes = dict(zip(panels, rows))
    for label, panel in axes.items():
        draw_curves(panel, panels[label])
        panel.set_ylabel(label)
        panel.ticklabel_format(axis="y", scilimits=(-3, 4))
    figure.align_ylabels()
    if val:
        panel = axes[_quantity(metric, val)]
        shade_gap(panel, *panels[_quantity(metric, val)])
        best = best_epoch(val, metric)
        _mark_best(list(axes.values()), panel, best, f"{metric} {val[metric][best]:.2f}{' %' * in_percent(val)}")
    for panel in axes.values():
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncol=3)
    last = max([*losses, *(epoch for values in val.values() for epoch in values)])
    bottom = list(axes.values())[-1]
    bottom.set_xlabel("epoch, counted from 0")
    bottom.set_xlim(-0.03 * last - (1 if steps else 0.3), 1.03 * last + 0.3)
    bottom.xaxis.set_major_locator(FixedLocator(MaxNLocator(integer=True, min_n_ticks=1).tick_values(0, last)))
    return figure


def logged_panels(folder: str | Path) -> list[Panel]:
    """Return a panel for each number that a run's method logged in its batches, named by its column."""
    path = Path(folder) / STEPS
    columns = list(read_steps(path)) if path.is_file() else []
    known = {"step", "epoch", "loss", "lr"}
    return [Panel(name.replace("_", " "), ((name, "", GREY),), by_batch=True) for name in columns if name not in known]


def comparison_figure(runs: Mapping[str, tuple[str | Path, str]], metric: str) -> Figure:
    """Draw the mean loss of each epoch, and a metric on ``val`` and dashed on ``seen``, of several runs.

    One legend stands below the panels, where it hides no line however many runs there are.

    runs: folder and colour by label. A run without finished epochs, or without this metric, has no line.

    Raises:
        ValueError: no run has a finished epoch, or a file has a damaged line.
    """
    paths = {label: Path(folder) / EPOCHS for label, (folder, _) in runs.items()}
    logged = {label: read_epochs(path) if path.is_file() else {} for label, path in paths.items()}
    quantity = _quantity(metric, *(epochs.get("val", {}) for epochs in logged.values()))
    panels: dict[str, list[Curve]] = {"training loss": [], quantity: []}
    for label, (_, colour) in runs.items():
        losses, val, seen = (
            logged[label].get(split, {}).get(name, {})
            for split, name in (("train", "loss"), ("val", metric), ("seen", metric))
        )
        panels["training loss"].append(Curve(losses, label, colour))
        panels[quantity] += [Curve(val, label, colour), Curve(seen, "", colour, style="--")]
    drawn = {name: [curve for curve in curves if curve.points] for name, curves in panels.items()}
    drawn = {name: curves for name, curves in drawn.items() if curves}
    if not drawn:
        raise ValueError(f"none of {', '.join(runs)} has a finished epoch; draw their curves after the first one.")
    curves = [curve for panel in drawn.values() for curve in panel]
    legend = [
        Line2D([], [], color=colour, marker="o", markersize=4, label=label)
        for label, (_, colour) in runs.items()
        if any(curve.label == label for curve in curves)
    ]
    if any(curve.style == "--" for curve in curves):
        legend.append(Line2D([], [], color=GREY, linestyle="--", label="on training queries (seen)"))
    figure = Figure(figsize=(7.5, 0.6 + 3.2 * len(drawn) + 0.17 * len(legend)), constrained_layout=True)
    rows = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, panel) in zip(rows, drawn.items()):
        draw_curves(axes, panel)
        axes.set_ylabel(name)
    figure.legend(handles=legend, loc="outside lower left", frameon=False, fontsize=8, handlelength=3.5)
    rows[-1].set_xlabel("epoch, counted from 0")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _measured_curves(panel: Panel, logged: Mapping[str, Mapping[Any, float]]) -> list[Curve]:
    """Return the lines of a panel whose columns were logged: thin for batches, with marks only if there are few."""
    curves = []
    for column, label, colour in panel.lines:
        values = logged.get(column, {})
        if values and panel.by_batch:
            curves.append(Curve(values, label, colour, has_marks=len(values) < 50, width=1.0))
        elif values:
            curves.append(Curve(values, label, colour))
    return curves


def best_epoch(val: Mapping[str, Mapping[int, float]], metric: str) -> int:
    """Return the epoch that LAVIS keeps as ``checkpoint_best``: the first with the largest ``agg_metrics``.

    val: ``{metric: {epoch: value}}``. If ``agg_metrics`` was not logged, ``metric`` decides.
    """
    deciding = val.get("agg_metrics", val[metric])
    return max(sorted(val[metric]), key=lambda epoch: deciding.get(epoch, -math.inf))


def in_percent(val: Mapping[str, Any]) -> bool:
    """Return whether validations with these metrics are in percent, as those of benchmarks are: R@K or mAP@K."""
    return any("@" in metric for metric in val)


def _quantity(metric: str, *vals: Mapping[str, Any]) -> str:
    """Return the label of a metric's axis, with the unit if it is known."""
    return f"{metric} in percent" if any(map(in_percent, vals)) else metric


def _by_position(steps: Mapping[str, Sequence[float]]) -> dict[str, dict[float, float]]:
    """Return the logged numbers of each column by position on an epoch axis, on which epoch e's batches end at e."""
    count = Counter(steps["epoch"])
    per_epoch = max(count.values(), default=1)
    first: dict[float, float] = {}
    for step, epoch in zip(steps["step"], steps["epoch"]):
        first.setdefault(epoch, step)
    places = [epoch - 1 + (step - first[epoch] + 1) / per_epoch for step, epoch in zip(steps["step"], steps["epoch"])]
    columns = {name: zip(places, column) for name, column in steps.items() if name not in ("step", "epoch")}
    return {name: {x: value for x, value in column if math.isfinite(value)} for name, column in columns.items()}


def _loss_curves(losses: Mapping[int, float], by_batch: Mapping[float, float]) -> list[Curve]:
    wrong = sum(not math.isfinite(loss) for loss in losses.values())
    label = "mean of each epoch" + (f" (not finite in {wrong} of {len(losses)} epochs)" if wrong else "")
    batches = [Curve(by_batch, "each batch", LIGHT_GREY, has_marks=False, width=1.0)] if by_batch else []
    return [*batches, Curve(losses, label, GREY)]


def _metric_curves(epochs: Mapping[str, Mapping[str, Mapping[int, float]]], metric: str, path: Path) -> list[Curve]:
    if metric not in epochs["val"]:
        raise ValueError(
            f"{path} has no validation metric {metric!r}; pass one of: {', '.join(sorted(epochs['val']))}."
        )
    seen = epochs.get("seen", {}).get(metric, {})
    return [
        Curve(epochs["val"][metric], f"validation {metric}", BLUE),
        *([Curve(seen, "on training queries (seen)", GREEN)] if seen else []),
    ]


def _mark_best(panels: Sequence[Axes], legend: Axes, best: int, value: str) -> None:
    style: dict[str, Any] = {"color": ORANGE, "linewidth": 1.2, "linestyle": (0, (4, 3))}
    for panel in panels:
        panel.axvline(best, zorder=1, **style)
    legend.plot([], [], label=f"best: epoch {best}, {value}", **style)


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw lines on axes without top and right borders, with a mark per point if the curve has marks."""
    for curve in curves:
        axes.plot(
            list(curve.points),
            list(curve.points.values()),
            color=curve.colour,
            linestyle=curve.style,
            linewidth=curve.width,
            marker="o" if curve.has_marks else "",
            markersize=4,
            label=curve.label or None,
        )
    axes.grid(axis="y", color=LIGHT_GREY, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def shade_gap(axes: Axes, val: Curve, seen: Curve | None = None) -> None:
    """Shade the area between two curves over the epochs that both have."""
    if seen is not None:
        both = [epoch for epoch in val.points if epoch in seen.points]
        low, high = ([curve.points[epoch] for epoch in both] for curve in (val, seen))
        axes.fill_between(both, low, high, color=seen.colour, alpha=0.1, linewidth=0)


def svg_of(figure: Figure) -> bytes:
    """Return a figure as SVG whose words are text and whose bytes depend on nothing but the figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "figure"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG in one step and return ``path``.

    Raises:
        OSError: If the file cannot be written. An old file then stays unchanged.
    """
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return replace_file(Path(path), buffer.getvalue())
