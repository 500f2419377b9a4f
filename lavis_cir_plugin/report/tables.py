"""Lay out metrics as plain-text tables."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

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
    names = ["", "percent", *rows]
    blocks = [[name.ljust(max(map(len, names))) for name in names]]
    columns = _columns(rows, benchmark)
    for heading, keys in columns.items():
        cells = [[label.rjust(6), *(_percent(row, key) for row in rows.values())] for label, key in keys.items()]
        lines = ["  ".join(cell.rjust(len(column[0])) for cell, column in zip(line, cells)) for line in zip(*cells)]
        width = max(len(heading), len(lines[0]))
        blocks.append([heading.center(width), *(line.rjust(width) for line in lines)])
    headings, labels, *body = _bordered(blocks)
    border = _border(blocks)
    return [border, *([headings] if set(columns) - {OVERALL} else []), labels, border, *body, border]


def _line_per_metric(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    metrics = list(dict.fromkeys(key for row in rows.values() for key in row))
    blocks = [[name.ljust(max(map(len, ["percent", *metrics]))) for name in ["percent", *metrics]]]
    for name, row in rows.items():
        blocks.append([cell.rjust(max(6, len(name))) for cell in [name, *(_percent(row, key) for key in metrics)]])
    labels, *body = _bordered(blocks)
    return [_border(blocks), labels, _border(blocks), *body, _border(blocks)]


def _percent(row: Mapping[str, float], metric: str) -> str:
    return f"{row[metric]:6.2f}" if metric in row else "-"


def _bordered(blocks: Sequence[Sequence[str]]) -> list[str]:
    """Return columns of equally long cells side by side."""
    return [" | ".join(line).join(("| ", " |")) for line in zip(*blocks)]


def _border(blocks: Sequence[Sequence[str]]) -> str:
    return "-+-".join("-" * len(block[0]) for block in blocks).join(("+-", "-+"))


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
    cells = ["", "percent", *names]
    blocks = [[cell.ljust(max(map(len, cells))) for cell in cells]]
    for heading, (benchmark, rows) in results.items():
        metric = benchmark.selection_metric
        column = [heading, metric, *(_percent(rows.get(name, {}), metric) for name in names)]
        blocks.append([cell.rjust(max(map(len, column))) for cell in column])
    headings, labels, *body = _bordered(blocks)
    border = _border(blocks)
    return "\n".join([border, headings, labels, border, *body, border])
