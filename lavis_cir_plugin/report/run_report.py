"""Write one HTML file over one run or several: config, curves, metrics, queries as pictures, hardware, commit."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lavis_cir_plugin.report import query_results, run_record
from lavis_cir_plugin.report.curves import (
    best_epoch,
    comparison_figure,
    in_percent,
    logged_panels,
    svg_of,
    training_figure,
)
from lavis_cir_plugin.report.html_parts import Thumbnails, data_url, escaped, page, table
from lavis_cir_plugin.report.query_results import QueryResult, Results
from lavis_cir_plugin.report.run_log import EPOCHS, LOG, read_epochs
from lavis_cir_plugin.report.sheet_layout import BLUE, ORANGE

COLOURS = (BLUE, ORANGE, "#8a3ea8", "#b8223b", "#0e8f9c", "#6b4423", "#d6569a", "#4aa3e0", "#7a7a00", "#5b6470")
"""Colours of runs side by side; an eleventh run has the first one again. Green is kept for right answers."""

QUERIES_SHOWN, IMAGES_SHOWN = 4, 8
"""By default, how many queries of each kind and group are shown, and how many images of each ranking."""


@dataclass(frozen=True)
class Run:
    """What a report says of a run.

    Attributes:
        label: Name of its folder; `report` puts folders above it before it where runs would have the same one.
        folder: Path of the folder.
        starts: As `run_record.read_starts` returns them.
        config: Value and origin by dotted key.
        epochs: As `read_epochs` returns them; empty for an evaluation.
        metrics: Content of ``metrics.json`` by the name of its folder.
        queries: What ``queries.json`` holds, likewise.
    """

    label: str
    folder: Path
    starts: Sequence[Mapping[str, Any]]
    config: Mapping[str, tuple[Any, str]]
    epochs: Mapping[str, Mapping[str, Mapping[int, float]]]
    metrics: Mapping[str, Mapping[str, Any]]
    queries: Mapping[str, Results]


def read_run(folder: Path) -> Run:
    """Read what a report says of a run.

    Raises:
        FileNotFoundError: the folder is not a run's.
        ValueError: a file in it is damaged.
    """
    if not folder.is_dir() or not any((folder / name).is_file() for name in (LOG, EPOCHS, run_record.RECORD)):
        inside = sorted(path.parent.name for path in folder.glob(f"*/{LOG}")) if folder.is_dir() else []
        hint = f"; it holds the runs {', '.join(inside)}" if inside else ""
        raise FileNotFoundError(
            f"{folder} is not the folder of a run{hint}; name the one that the training named at its end."
        )
    starts = run_record.read_starts(folder)
    metrics = {path.parent.name: _metrics(path) for path in sorted(folder.glob("*/metrics.json"))}
    queries = {
        path.parent.name: query_results.read_queries(path) for path in sorted(folder.glob(f"*/{query_results.QUERIES}"))
    }
    epochs = read_epochs(folder / EPOCHS) if (folder / EPOCHS).is_file() else {}
    return Run(folder.resolve().name, folder, starts, _config(folder, starts), epochs, metrics, queries)


def _metrics(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"protocol", "metrics", "selection_metric", "groups"} <= content.keys():
            raise ValueError("it lacks protocol, metrics, selection_metric or groups")
        return content
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); evaluate the run again to write it anew.") from error


def _config(folder: Path, starts: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, str]]:
    """Return the config of the last start, or of an older version's run the one that its log begins with."""
    if starts:
        return {key: (entry["value"], entry["origin"]) for key, entry in starts[-1]["config"].items()}
    try:
        text = (folder / LOG).read_text(encoding="utf-8")
        config, _ = json.JSONDecoder().raw_decode(text.lstrip())
        return {key: (value, "not recorded") for key, value in run_record.flat(config).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def report(
    runs: Sequence[Run], queries: int = QUERIES_SHOWN, images: int = IMAGES_SHOWN, embed: Thumbnails | None = None
) -> str:
    """Return the page over one run or several.

    Args:
        runs: At least one, the first one being what others are compared with.
        queries: How many queries of each kind and group are shown.
        images: How many images of each ranking.
        embed: Makes pictures small; a new one by default. Afterwards it says which pictures could not be read.
    """
    labels = run_record.told_apart([run.folder for run in runs])
    runs = [replace(run, label=label) for run, label in zip(runs, labels)]
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs side by side"
    sections = {
        "Overview": _overview(runs),
        "Metrics": _metric_tables(runs),
        "Curves": _curves(runs),
        "Queries": _queries(runs, queries, images, embed or Thumbnails()),
        "Config": _config_table(runs),
        "Machine": _machine(runs),
    }
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in sections)
    body = "".join(
        f'<section id="{name.lower()}" aria-labelledby="h-{name.lower()}"><h2 id="h-{name.lower()}">{name}</h2>'
        f"{content}</section>"
        for name, content in sections.items()
    )
    head = f"<header><p>lavis_cir_plugin report</p><h1>{escaped(title)}</h1><nav>{links}</nav></header>"
    return page(title, css, f"{head}<main>{body}</main>")


def _chip(runs: Sequence[Run], index: int) -> str:
    """Return the name of a run, with its colour where there are several."""
    name = f'<span class="run">{escaped(runs[index].label)}</span>'
    mark = f'<i class="chip" style="background:{COLOURS[index % len(COLOURS)]}"></i>' if len(runs) > 1 else ""
    return f"{mark}{name}"


def _note(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{escaped(text)}</p>'


# -- overview --------------------------------------------------------------------------------------------------------


def _overview(runs: Sequence[Run]) -> str:
    cards = []
    for index, run in enumerate(runs):
        value, name = _main_number(run)
        facts = "".join(f"<dt>{escaped(key)}</dt><dd>{escaped(text)}</dd>" for key, text in _facts(run).items())
        cards.append(
            f'<article class="card"><h3>{_chip(runs, index)}</h3>'
            f'<p class="number">{value}<small>{escaped(name)}</small></p><dl>{facts}</dl></article>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _main_number(run: Run) -> tuple[str, str]:
    """Return the metric that chooses the checkpoint, and what it is called; of val, if that was evaluated."""
    for folder, content in sorted(run.metrics.items(), key=lambda item: f"_{item[0]}".rpartition("_")[2] != "val"):
        metric = content["selection_metric"]
        own: Mapping[str, Any] = next(iter(content["metrics"].values()), {})
        return f"{_percent(own.get(metric))} %", f"{metric} on {folder}"
    val = run.epochs.get("val", {})
    if "agg_metrics" in val:
        best = f"{max(val['agg_metrics'].values()):.2f}{' %' * in_percent(val)}"
        return best, "best so far in validation; the run has no final evaluation"
    return "–", "no evaluation yet"


def _facts(run: Run) -> dict[str, str]:
    values = {key: value for key, (value, _) in run.config.items()}
    data = dict.fromkeys(key.split(".")[1] for key in values if key.startswith("datasets."))
    val = run.epochs.get("val", {})
    facts = {
        "model": " ".join(str(values[key]) for key in ("model.arch", "model.model_type") if key in values),
        "data": ", ".join(data),
        "runner": str(values.get("run.runner", "")),
        "epochs": str(len(run.epochs.get("train", {}).get("loss", {})) or ""),
        "best epoch": str(best_epoch(val, "agg_metrics")) if "agg_metrics" in val else "",
        "seed": str(values.get("run.seed", "")),
        **_time_facts(run.starts),
    }
    return {key: text for key, text in facts.items() if text}


def _time_facts(starts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    if not starts:
        return {"started": "not recorded: the run is of an older version"}
    last = starts[-1]
    first = str(starts[0]["started"]).replace("T", " ")[:16]
    again = f", and {len(starts) - 1} more start(s)" if len(starts) > 1 else ""
    finished = _duration(last["started"], last["finished"]) if last["finished"] else "not finished"
    label = "duration of the last start" if again else "duration"
    gpus = ", ".join(last["hardware"]["gpus"])
    return {
        "started": first + again,
        label: finished,
        "on": gpus or f"{last['hardware']['cores']} CPU cores",
        "commit": (last["commit"] or "")[:10] + ("+" if str(last["commit"]).endswith("+") else ""),
    }


def _duration(begin: str, end: str) -> str:
    form = "%Y-%m-%dT%H:%M:%S%z"
    seconds = int((datetime.strptime(end, form) - datetime.strptime(begin, form)).total_seconds())
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60} s"


# -- metrics ---------------------------------------------------------------------------------------------------------


def _metric_tables(runs: Sequence[Run]) -> str:
    folders = dict.fromkeys(name for run in runs for name in run.metrics)
    if not folders:
        return _note("No run has a metrics.json: it is written by the final evaluation of run.test_splits.", "empty")
    return "".join(_metric_table(runs, folder) for folder in folders)


def _metric_table(runs: Sequence[Run], folder: str) -> str:
    """Return the metrics of one split: of one run all its rankings, of several their trained models side by side."""
    contents = {index: run.metrics[folder] for index, run in enumerate(runs) if folder in run.metrics}
    columns: list[tuple[str, Mapping[str, Any]]] = []
    for index, content in contents.items():
        rankings = list(content["metrics"].items())
        shown = rankings if len(runs) == 1 else rankings[:1]
        columns += [(escaped(name) if len(runs) == 1 else _chip(runs, index), row) for name, row in shown]
    chosen = next(iter(contents.values()))["selection_metric"]
    names = list(dict.fromkeys(metric for _, row in columns for metric in row))
    names.sort(key=lambda metric: metric != chosen)
    rows = []
    for name in names:
        cells = [_percent(row.get(name)) for _, row in columns]
        if len(runs) > 1:
            cells = [
                cells[0],
                *(f"{cell}{_change(row, columns[0][1], name)}" for cell, (_, row) in zip(cells[1:], columns[1:])),
            ]
        heading = f"{escaped(name)}<small>chooses the checkpoint</small>" if name == chosen else escaped(name)
        rows.append([heading, *cells])
    protocols = {content["protocol"]: index for index, content in contents.items()}
    notes = "".join(_note(f"Protocol: {protocol}") for protocol in protocols)
    if len(protocols) > 1:
        notes = (
            '<p class="warning">These numbers are of different protocols and cannot be compared: '
            + "; ".join(f"{escaped(runs[index].label)}: {escaped(text)}" for text, index in protocols.items())
            + "</p>"
        )
    result = table(["percent", *(name for name, _ in columns)], rows, "numbers", escaped(folder)) + notes
    result += _note(f"Queries / gallery images: {_sizes(next(iter(contents.values())))}")
    return result + (_baselines(runs, contents) if len(runs) > 1 else "")


def _baselines(runs: Sequence[Run], contents: Mapping[int, Mapping[str, Any]]) -> str:
    """Return what each run is compared with, one line per run and ranking."""
    chosen = next(iter(contents.values()))["selection_metric"]
    rows = [
        [f"{_chip(runs, index)}", escaped(name), _percent(row.get(chosen))]
        for index, content in contents.items()
        for name, row in content["metrics"].items()
    ]
    inside = table(["run", "ranking", escaped(chosen)], rows, "numbers", "rankings")
    return f"<details><summary>What each run is compared with, by {escaped(chosen)}</summary>{inside}</details>"


def _sizes(content: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {group['num_queries']:,} / {group['gallery_size']:,}" for name, group in content["groups"].items()
    )


def _percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _change(row: Mapping[str, Any], first: Mapping[str, Any], metric: str) -> str:
    if row.get(metric) is None or first.get(metric) is None:
        return ""
    return f' <span class="change">{row[metric] - first[metric]:+.2f}</span>'


# -- curves ----------------------------------------------------------------------------------------------------------


def _curves(runs: Sequence[Run]) -> str:
    trained = {index: run for index, run in enumerate(runs) if run.epochs}
    if not trained:
        return _note("There are no curves: no run has finished an epoch of training.", "empty")
    own = {index: _own_curve(run) for index, run in trained.items()}
    if len(runs) == 1:
        return own[0]
    metric = _curve_metric(next(iter(trained.values())))
    places = {run.label: (run.folder, COLOURS[index % len(COLOURS)]) for index, run in trained.items()}
    try:
        together = _figure(svg_of(comparison_figure(places, metric)), f"loss and {metric} of all runs over the epochs")
    except ValueError as error:
        together = _note(str(error), "empty")
    apart = "".join(
        f"<details><summary>{_chip(runs, index)}</summary>{figure}</details>" for index, figure in own.items()
    )
    return together + apart


def _own_curve(run: Run) -> str:
    metric = _curve_metric(run)
    try:
        figure = training_figure(run.folder, metric, logged_panels(run.folder))
    except ValueError as error:
        return _note(str(error), "empty")
    return _figure(svg_of(figure), f"loss, {metric} and what was logged, of {run.label} over the epochs")


def _curve_metric(run: Run) -> str:
    """Return the metric that chose the checkpoint, or what validation has in its place."""
    chosen = [content["selection_metric"] for content in run.metrics.values()]
    val = run.epochs.get("val", {})
    return next((name for name in [*chosen, "agg_metrics", *val] if name in val), "agg_metrics")


def _figure(content: bytes, label: str) -> str:
    return f'<figure tabindex="0"><img src="{data_url(content, "image/svg+xml")}" alt="{escaped(label)}"></figure>'


# -- queries ---------------------------------------------------------------------------------------------------------


def _queries(runs: Sequence[Run], count: int, images: int, embed: Thumbnails) -> str:
    folders = dict.fromkeys(name for run in runs for name in run.queries)
    parts = [
        _query_groups(runs, folder, members, count, images, embed)
        for folder in folders
        for members in _alike(runs, folder)
    ]
    if not parts:
        return _note(
            "No run has a queries.json: it is written by the final evaluation of run.test_splits since this version.",
            "empty",
        )
    if embed.missing:
        first = next(iter(embed.missing.values()))
        parts.insert(0, _note(f"{len(embed.missing)} pictures could not be read. The first: {first}", "warning"))
    return "".join(parts)


def _alike(runs: Sequence[Run], folder: str) -> list[list[int]]:
    """Return the positions of the runs that answered the same queries of a split, together."""
    together: dict[Any, list[int]] = {}
    for index, run in enumerate(runs):
        if folder in run.queries:
            groups = run.queries[folder].groups
            key = tuple((name, *((q.reference, q.texts) for q in queries)) for name, queries in groups.items())
            together.setdefault(key, []).append(index)
    return list(together.values())


def _query_groups(
    runs: Sequence[Run], folder: str, members: Sequence[int], count: int, images: int, embed: Thumbnails
) -> str:
    results = [runs[index].queries[folder] for index in members]
    parts: list[str] = []
    for name in results[0].groups:
        queries = [result.groups[name] for result in results]
        first = f" of {runs[members[0]].label}" if len(runs) > 1 else ""
        kinds = {
            f"Best ranks{first}": query_results.best(queries[0], count),
            f"Worst ranks{first}": query_results.worst(queries[0], count),
            "At random, with seed 0 and not by the result": query_results.drawn(queries[0], count),
        }
        if len(members) > 1:
            kinds = {"Where the runs differ most": query_results.most_different(queries, count), **kinds}
        shown = {kind: chosen for kind, chosen in kinds.items() if chosen}
        inside = "".join(
            f"<h4>{escaped(kind)}</h4>"
            + "".join(_query(runs, members, results, [q[index] for q in queries], images, embed) for index in chosen)
            for kind, chosen in shown.items()
        )
        parts.append(
            f"<details{'' if parts else ' open'}><summary>{escaped(folder)}: {escaped(name)} "
            f"<small>{len(queries[0]):,} queries</small></summary>{inside}</details>"
        )
    return "".join(parts)


def _query(
    runs: Sequence[Run],
    members: Sequence[int],
    results: Sequence[Results],
    found: Sequence[QueryResult],
    images: int,
    embed: Thumbnails,
) -> str:
    """Return one query: its reference and text, then the first images of each run's ranking."""
    query = found[0]
    reference = embed.image(results[0].images[query.reference], query.reference, results[0].upright)
    strips = []
    for index, result, own in zip(members, results, found):
        cells = [_found(result, own, place, embed) for place in range(min(images, len(own.top)))]
        target = own.answers[0] if own.answers else None
        if own.rank >= images and target is not None:
            picture = embed.image(result.images[target], target, result.upright)
            cells.append(f'<li class="lower">{picture}<span>rank {own.rank + 1:,}</span></li>')
        verdict = f"<small>{escaped(_verdict(own, images))}</small>"
        label = f'<p class="who">{_chip(runs, index)}{verdict}</p>' if len(runs) > 1 else ""
        strips.append(f'{label}<ol class="strip" tabindex="0" aria-label="retrieved, best first">{"".join(cells)}</ol>')
    alone = f"<small>{escaped(_verdict(query, images))}</small>" if len(runs) == 1 else ""
    return (
        f'<div class="query"><div class="asked"><figure>{reference}</figure>'
        f"<p><q dir=auto>{escaped(' / '.join(query.texts))}</q>{alone}</p></div>"
        f"<div>{''.join(strips)}</div></div>"
    )


def _found(result: Results, query: QueryResult, place: int, embed: Thumbnails) -> str:
    name = query.top[place]
    right = name in query.answers
    label = f"{place + 1} ✓ right" if right else f"{place + 1}" + (" reference" if name == query.reference else "")
    picture = embed.image(result.images[name], name, result.upright)
    return f'<li class="{"right" if right else ""}">{picture}<span>{label}</span></li>'


def _verdict(query: QueryResult, images: int) -> str:
    """Return the rank of the target, and of several right answers also how many are among the images shown."""
    if query.rank < 0:
        return "right answer not public or not in the gallery"
    if len(query.answers) > 1:
        shown = len({*query.answers}.intersection(query.top[:images]))
        return f"{shown} of {len(query.answers)} right answers shown, the target at rank {query.rank + 1:,}"
    return f"right answer at rank {query.rank + 1:,}"


# -- config and machine ----------------------------------------------------------------------------------------------


def _config_table(runs: Sequence[Run]) -> str:
    if not any(run.config for run in runs):
        return _note("No config was recorded.", "empty")
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    if len(runs) == 1:
        rows = [[escaped(key), _value(runs[0], key), escaped(runs[0].config[key][1])] for key in keys]
        return table(["key", "value", "from"], rows, "config", "config and origin of each value")
    head = ["key", *(_chip(runs, index) for index in range(len(runs)))]
    differing = [key for key in keys if len({_value(run, key) for run in runs}) > 1]

    def rows_of(some: Sequence[str]) -> list[list[str]]:
        return [
            [
                escaped(key),
                *(f"{_value(run, key)}<small>{escaped(run.config.get(key, ('', ''))[1])}</small>" for run in runs),
            ]
            for key in some
        ]

    alike = [key for key in keys if key not in set(differing)]
    first = (
        table(head, rows_of(differing), "config", "values that differ")
        if differing
        else _note("The runs have the same config.", "empty")
    )
    rest = table(head, rows_of(alike), "config", "values that are the same")
    return f"{first}<details><summary>{len(alike)} values that are the same</summary>{rest}</details>"


def _value(run: Run, key: str) -> str:
    if key not in run.config:
        return "–"
    return f"<code>{escaped(json.dumps(run.config[key][0], ensure_ascii=False, default=str))}</code>"


def _machine(runs: Sequence[Run]) -> str:
    facts = [_machine_facts(run) for run in runs]
    if not any(facts):
        return _note("The machine was not recorded: the runs are of an older version.", "empty")
    keys = list(dict.fromkeys(key for own in facts for key in own))
    rows = [[escaped(key), *(escaped(own.get(key, "–")) for own in facts)] for key in keys]
    return table(["", *(_chip(runs, index) for index in range(len(runs)))], rows, "config", "hardware and software")


def _machine_facts(run: Run) -> dict[str, str]:
    if not run.starts:
        return {}
    last = run.starts[-1]
    hardware = last["hardware"]
    return {
        "commit": last["commit"] or "not from a checkout of git",
        "command": shlex.join(last["command"]),
        "processes": str(last["processes"]),
        "CPU": f"{hardware['cpu']}, {hardware['cores']} cores",
        "memory": f"{hardware['memory_gib']} GiB",
        "GPUs": ", ".join(hardware["gpus"]) or "none",
        "system": hardware["system"],
        **last["software"],
    }
