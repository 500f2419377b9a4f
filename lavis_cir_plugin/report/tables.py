"""Lay out metrics as plain-text tables."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lavis_cir_plugin.benchmarks.types import Benchmark

TABLE_WIDTH = 120  # width in characters at which notes below a table are wrapped

OVERALL = "overall"  # heading of the metrics that belong to no group


def metrics_table(rows: Mapping[str, Mapping[str, float]], benchmark: Benchmark) -> str:
    """Return metrics as a plain-text table with one line per ranking, or one line per metric if that is too wide.

    A metric named ``<group>_<rest>`` stands as ``<rest>`` below its group, every other one below ``overall``. If all
    metrics are overall ones, there are no headings. Groups keep the benchmark's order, and metrics keep the order of
    the rows. A metric that a ranking lacks shows as ``-``. Lines below the table give the protocol, and the number of
    queries and the gallery size of every group. Without rows only these lines remain.

    The borders are ASCII, and the text ends without a newline.

    Args:
        rows: ``{metric: percent}`` as ``benchmark.metrics`` returns it, by the name of a ranking
            (``"trained model"``, ``"random (expected)"``).
        benchmark: Benchmark of the metrics.
    """
    table = _line_per_ranking(rows, benchmark) if rows else []
    if table and len(table[0]) > TABLE_WIDTH:
        table = _line_per_metric(rows)
    sizes = ", ".join(f"{group.name} {len(group.queries):,} / {len(group.gallery):,}" for group in benchmark.groups)
    notes = (f"Queries / gallery images: {sizes}", f"Protocol: {benchmark.protocol}")
    return "\n".join([*table, *(line for note in notes for line in textwrap.wrap(note, TABLE_WIDTH))])


def _line_per_ranking(rows: Mapping[str, Mapping[str, float]], benchmark: Benchmark) -> list[str]:
    groups = _columns(rows, benchmark)
    with_headings = set(groups) != {OVERALL}
    columns = [
        (f"{heading}\n{label}" if with_headings else label, [_percent(row, key) for row in rows.values()])
        for heading, keys in groups.items()
        for label, key in keys.items()
    ]
    return _table(("\npercent" if with_headings else "percent", list(rows)), columns)


def _line_per_metric(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    metrics = list(dict.fromkeys(key for row in rows.values() for key in row))
    columns = [(name, [_percent(row, key) for key in metrics]) for name, row in rows.items()]
    return _table(("percent", metrics), columns)


def _table(names: tuple[str, Sequence[str]], columns: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    """Return the lines of a table: a column of names, then columns of numbers, each with its heading."""
    table = Table(box=box.ASCII2)
    table.add_column(Text(names[0]), no_wrap=True)
    for heading, _ in columns:
        table.add_column(Text(heading), justify="right", no_wrap=True, min_width=6)
    for cells in zip(names[1], *(cells for _, cells in columns)):
        table.add_row(*map(Text, cells))
    # The caller decides what is too wide. The console would shorten cells instead.
    console = Console(file=io.StringIO(), width=100_000, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().splitlines()


def _percent(row: Mapping[str, float], metric: str) -> str:
    return f"{row[metric]:.2f}" if metric in row else "-"


def _columns(rows: Mapping[str, Mapping[str, float]], benchmark: Benchmark) -> dict[str, dict[str, str]]:
    """Return metric names under headings as ``{group: {label: metric}}``, overall metrics last, no heading empty."""
    names = [group.name for group in benchmark.groups]
    columns: dict[str, dict[str, str]] = {name: {} for name in names}
    overall = {}
    for key in dict.fromkeys(key for row in rows.values() for key in row):
        group = max((name for name in names if key.startswith(f"{name}_")), key=len, default=None)
        if group is None:
            overall[key] = key
        else:
            columns[group][key[len(group) + 1 :]] = key
    return {heading: keys for heading, keys in [*columns.items(), (OVERALL, overall)] if keys}


def summary_table(results: Mapping[str, tuple[Benchmark, Mapping[str, Mapping[str, float]]]]) -> str:
    """Return a table of several benchmarks side by side, with the metric that chooses checkpoints in each.

    results: the benchmark and its rows (as for :func:`metrics_table`) by the name of the benchmark's reports. The table
    has one line per ranking, in the order in which rankings first occur. A ranking that a benchmark lacks shows as
    ``-``.
    """
    names = list(dict.fromkeys(name for _, rows in results.values() for name in rows))
    columns = []
    for heading, (benchmark, rows) in results.items():
        metric = benchmark.selection_metric
        columns.append((f"{heading}\n{metric}", [_percent(rows.get(name, {}), metric) for name in names]))
    return "\n".join(_table(("\npercent", names), columns))
