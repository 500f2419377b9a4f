"""Plots of the study, made of the CSV alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stages import frame, save

from study.design import GAMMAS, GRID, PLAIN, RANDOM, wrf_name
from study.tables import Study, average, judged, paired_seeds, shared_seeds, with_seeds

COLOURS = {"a gain of a point": "#1f5fa8", "a gain under a point": "#7fa8d6", "a loss": "#c2571a"}
"""Colours of the verdicts; any other verdict is grey."""
GREY = "#9a9a9a"


def draw_differences(study: Study, path: Path) -> bool:
    """Draw what each row of the main table gains over plain training, with its interval; return whether any does."""
    found = {amount: differences for amount, differences in study.gains.items() if differences}
    if not found:
        return False
    names = [name for name in study.main_names if any(name in differences for differences in found.values())]
    size = (1.9 + 3.4 * len(found), 0.9 + 0.22 * len(names))
    figure = Figure(figsize=size, constrained_layout=True)
    for panel, (amount, differences) in zip(
        figure.subplots(1, len(found), squeeze=False, sharex=True, sharey=True)[0], found.items()
    ):
        for name, gain in differences.items():
            seeds = len(paired_seeds(study.of("main", name, amount), study.of("main", PLAIN, amount)))
            colour, place = COLOURS.get(judged(gain, seeds), GREY), names.index(name)
            panel.plot((gain.low, gain.high), (place, place), color=colour, linewidth=2)
            panel.plot(gain.mean, place, "o", color=colour, markersize=4)
        panel.axvline(0, color="#555555", linewidth=0.8)
        panel.set_xlabel("points over plain")
        frame(panel, f"{amount:,} triplets")
    figure.axes[0].set_yticks(range(len(names)), names, fontsize=8)
    figure.axes[0].set_ylim(len(names) - 0.5, -0.5)
    save(figure, path)
    return True


def draw_gammas(study: Study, path: Path) -> bool:
    """Draw the recall over gamma for each main amount; plain is a line. Return whether there are several gammas."""
    figure, panels = _panels(study)
    if not any(sum(bool(study.of("main", wrf_name(value), amount)) for value in GAMMAS) > 1 for amount in panels):
        return False
    for amount, panel in panels.items():
        names = [PLAIN, *(wrf_name(value, *place) for place in GRID for value in GAMMAS)]
        rows = {name: study.of("main", name, amount) for name in names}
        rows = with_seeds(rows, shared_seeds(rows.values()))  # averages over other seeds would not compare
        for column, colour, label in (("val_stopped", "#1f5fa8", "validation"), ("train_last", "#bdbdbd", "training")):
            for scope, warmup in GRID:
                recalls = {value: average(rows[wrf_name(value, scope, warmup)], column) for value in GAMMAS}
                known = [(value, recall) for value, recall in recalls.items() if recall is not None]
                if known:
                    name = f"{label}, {'per tensor' if scope == 'tensor' else scope}" + ", warm-up" * bool(warmup)
                    panel.plot(*zip(*known), "-" if scope == "tensor" else "--", marker="s" if warmup else "o",
                               markersize=4, color=colour, label=name)  # fmt: skip
            panel.axhline(average(rows[PLAIN], column) or 0, color=colour, linewidth=0.8)
        panel.set_xscale("log")
        panel.set_xlabel("γ (thin lines: plain)")
        frame(panel, f"{amount:,} triplets")
    figure.axes[0].set_ylabel("mean of R@10 and R@50, percent")
    figure.axes[0].legend(frameon=False, fontsize=7)
    save(figure, path)
    return True


def draw_curves(study: Study, path: Path) -> bool:
    """Draw the recall of plain, random and WRF over the training, training queries dashed; return whether any."""
    figure, panels = _panels(study)
    if not panels:
        return False
    for amount, panel in panels.items():
        for name, colour in ((PLAIN, "#555555"), (RANDOM, "#d9822b"), (study.wrf, "#1f5fa8")):
            rows = study.of("main", name, amount).values()
            for column, style in (("val_curve", "-"), ("train_curve", "--")):
                curves = [[float(value) for value in row[column].split()] for row in rows]
                if curves:
                    panel.plot(np.mean(curves, axis=0), style, color=colour, label=name if style == "-" else None)
        panel.set_xlabel("validation (dashed: on training queries)")
        frame(panel, f"{amount:,} triplets")
    figure.axes[0].set_ylabel("mean of R@10 and R@50, percent")
    figure.axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)
    return True


def _panels(study: Study) -> tuple[Figure, dict[int, Axes]]:
    """Return a figure with a panel for each main amount that has a plain run."""
    amounts = [amount for amount in study.design.main_amounts if study.of("main", PLAIN, amount)]
    figure = Figure(figsize=(4.6 * max(len(amounts), 1), 3.6), constrained_layout=True)
    return figure, dict(zip(amounts, figure.subplots(1, max(len(amounts), 1), squeeze=False, sharey=True)[0]))
