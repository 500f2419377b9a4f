"""Show what an evaluation and a training run gave: tables, ``metrics.json``, contact sheets and training curves.

Every product names the protocol its numbers belong to, because a recall without its gallery cannot be compared. Files
are written under another name first and then moved into place, so that nobody reads half a file, and they depend on
the arguments alone: the same input gives the same bytes.
"""

from __future__ import annotations

import io
import json
import math
import random
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lavis_cir_plugin.benchmarks.benchmark import Benchmark, Group, Query
from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.negatives import NegativeSets
from lavis_cir_plugin.ranking import Ranking, padded
from lavis_cir_plugin.tracking import EPOCHS, STEPS, read_epochs, read_steps
from lavis_cir_plugin.whole_files import replace_file

TABLE_WIDTH = 120  # characters; the notes below a table are wrapped here

RANDOM_QUERIES = 20_000  # ranked in all to find a mean: it is then known to a few hundredths of its value

OVERALL = "overall"  # heading of the metrics that belong to no group

# The contact sheet, in pixels.
PICTURE = (120, 150)  # width and height of the box a picture is fitted into: garments stand upright
GAP = 14
SECTION_GAP = 40
TEXT_WIDTH = 260
TEXT_SIZE = 16
LINE_HEIGHT = 21
LABEL_HEIGHT = 22
FRAME = 4
MARGIN = 32
ATTENTION_SIDE = 160  # of a picture with a map over it
BLACK, GREY, LIGHT_GREY, WHITE = "#1a1a1a", "#6b6b6b", "#d4d4d4", "#ffffff"
GREEN, ORANGE, BLUE = "#14944a", "#e67800", "#1f5fa8"


def metrics_table(rows: Mapping[str, Mapping[str, float]], benchmark: Benchmark) -> str:
    """Lay out metrics as a plain-text table, one line per ranking, or where that is too wide one line per metric.

    rows: name of a ranking (``"trained model"``, ``"random (expected)"``) to ``{metric: percent}`` as
    ``benchmark.metrics`` returns it. A metric named ``<group>_<rest>`` stands as ``<rest>`` below its group, every
    other one below ``overall``; the headings are left out where all metrics are overall ones. Groups keep the
    benchmark's order, metrics that of the rows. A metric that a ranking lacks shows as ``-``. The lines below the
    table give the number of queries and the gallery size of every group, and the protocol; they are all there is
    without rows.

    The borders are ASCII; the text ends without a newline.
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
    """Put columns of equally long cells side by side."""
    return [" | ".join(line).join(("| ", " |")) for line in zip(*blocks)]


def _border(blocks: Sequence[Sequence[str]]) -> str:
    return "-+-".join("-" * len(block[0]) for block in blocks).join(("+-", "-+"))


def _columns(rows: Mapping[str, Mapping[str, float]], benchmark: Benchmark) -> dict[str, dict[str, str]]:
    """Sort metric names under headings: ``{group: {label: metric}}``, the overall metrics last, no empty heading."""
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


def expected_random(benchmark: Benchmark) -> dict[str, float]:
    r"""Compute what a uniformly random ranking scores on average, in percent.

    .. math:: \mathbb{E}[\mathrm{R@}K] = 100 \cdot \min(K, n) / n

    for a target among :math:`n` candidates (the gallery, less the reference where the group removes it; for
    ``R_subset@K`` the members of the image set). The formula is not restated per metric: a recall is an average over
    queries, so its expectation depends only on how often every rank occurs, and a random ranking gives every rank 0 to
    n-1 equally often. Handing ``benchmark.metrics`` a :class:`Ranking` in which each rank occurs equally often
    therefore yields the expectation itself, for any K and for any sum or mean of recalls over groups.

    A metric of several labelled images (mAP, soft labels) depends on their ranks together, and on those of the members.
    Where a query has such labels, the value is the mean of rankings drawn with a fixed seed, `RANDOM_QUERIES` queries
    in all.

    Queries of a group that differ in :math:`n` are weighted by their number. A query whose target is unknown, removed
    or not in the gallery keeps rank -1. ``top`` is empty.
    """
    if any(query.relevance for group in benchmark.groups for query in group.queries):
        return _mean_of_drawn(benchmark)
    chances = {group.name: sorted(_candidates(group)) or [(0, 0)] for group in benchmark.groups}
    # Usually every query of a group has the same chances, the cuts are 0 and 1, and metrics is called once.
    cuts = {Fraction(1)}
    for pairs in chances.values():
        cuts |= {Fraction(i, len(pairs)) for i in range(len(pairs)) if i == 0 or pairs[i] != pairs[i - 1]}
    edges = sorted(cuts)
    expected: defaultdict[str, float] = defaultdict(float)
    for low, high in zip(edges, edges[1:]):
        rankings = {name: _every_rank(*pairs[int(low * len(pairs))]) for name, pairs in chances.items()}
        for metric, percent in benchmark.metrics(rankings).items():
            expected[metric] += float(high - low) * percent
    return dict(expected)


def _mean_of_drawn(benchmark: Benchmark) -> dict[str, float]:
    rng = random.Random(0)
    known = [
        (group, {name: number for number, name in enumerate(group.gallery)}, _candidates(group))
        for group in benchmark.groups
    ]
    rounds = [
        benchmark.metrics({group.name: _drawn(group, gallery, candidates, rng) for group, gallery, candidates in known})
        for _ in range(math.ceil(RANDOM_QUERIES / sum(len(group.queries) for group in benchmark.groups)))
    ]
    return {metric: sum(values[metric] for values in rounds) / len(rounds) for metric in rounds[0]}


def _drawn(
    group: Group, gallery: Mapping[str, int], candidates: Sequence[tuple[int, int]], rng: random.Random
) -> Ranking:
    """Draw different ranks for the labelled images and the members of each query, the target among them."""
    ranks, subset_ranks, relevant_ranks, subset_top = [], [], [], []
    for query, (found, members) in zip(group.queries, candidates):
        removed = {query.reference} if group.reference_removed else set()
        drawn = dict.fromkeys([*(name for name, _ in query.relevance), query.target or "", *query.members])
        ranked = [name for name in drawn if name in gallery and name not in removed]
        rank_of = dict(zip(ranked, rng.sample(range(len(gallery) - len(removed & gallery.keys())), len(ranked))))
        best = sorted((name for name in query.members if name in rank_of), key=rank_of.__getitem__)
        ranks.append(rank_of.get(query.target or "", -1) if found else -1)
        subset_ranks.append(best.index(str(query.target)) if members else -1)
        subset_top.append([gallery[name] for name in best])
        relevant_ranks.append([rank_of.get(name, -1) for name, _ in query.relevance])
    return Ranking(
        ranks=torch.tensor(ranks),
        top=torch.empty(len(ranks), 0, dtype=torch.int64),
        subset_ranks=torch.tensor(subset_ranks),
        relevant_ranks=padded(relevant_ranks),
        subset_top=padded(subset_top),
    )


def _candidates(group: Group) -> list[tuple[int, int]]:
    """Count, per query, among how many gallery images and how many members its target is ranked; 0 = never found."""
    gallery = set(group.gallery)

    def among(query: Query) -> tuple[int, int]:
        removed = {query.reference} if group.reference_removed else set()
        found = query.target in gallery and query.target not in removed
        members = gallery.intersection(query.members) - removed
        return found * (len(gallery) - len(removed & gallery)), (query.target in members) * len(members)

    return [among(query) for query in group.queries]


def _every_rank(candidates: int, members: int) -> Ranking:
    """Make a ranking with all ranks below candidates, and subset ranks below members, equally often (0: all -1)."""
    order = torch.arange(math.lcm(candidates or 1, members or 1))
    missing = torch.full_like(order, -1)
    return Ranking(
        ranks=order % candidates if candidates else missing,
        top=order.new_empty((len(order), 0)),
        subset_ranks=order % members if members else missing,
    )


def summary_table(results: Mapping[str, tuple[Benchmark, Mapping[str, Mapping[str, float]]]]) -> str:
    """Lay out several benchmarks side by side: of each the metric that chooses its checkpoints, one line per ranking.

    results: by the name of a benchmark's reports, the benchmark and its rows, as :func:`metrics_table` takes them. The
    rankings keep the order in which they first occur; one that a benchmark lacks shows as ``-``.
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


def write_summary(path: str | Path, results: Mapping[str, tuple[Benchmark, Mapping[str, Mapping[str, float]]]]) -> Path:
    """Write what :func:`summary_table` shows as JSON, with each benchmark's protocol; return ``path``.

    Raises:
        OSError: the file cannot be written; an older one is then left as it was.
    """
    content = {
        "unit": "percent",
        "benchmarks": {
            name: {
                "protocol": benchmark.protocol,
                "metric": benchmark.selection_metric,
                "values": {label: _finite(row)[benchmark.selection_metric] for label, row in rows.items()},
            }
            for name, (benchmark, rows) in results.items()
        },
    }
    return replace_file(Path(path), (json.dumps(content, indent=2) + "\n").encode())


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    return {metric: percent if math.isfinite(percent) else None for metric, percent in row.items()}


def write_metrics(
    path: str | Path, rows: Mapping[str, Mapping[str, float]], benchmark: Benchmark, extra: Mapping[str, Any]
) -> Path:
    """Write metrics as JSON, together with everything needed to compare them: benchmark, split, protocol, sizes.

    rows: as for :func:`metrics_table`, in percent; a value that is not finite becomes ``null``. extra: what the caller
    knows of the run (checkpoint, seed, commit ...), stored under ``extra``; what JSON lacks (paths) is stored as text.
    Folders are created, an older file is replaced in one step. Returns ``path``.

    Raises:
        OSError: the file cannot be written (a full disk, say); an older file is then left as it was.
    """
    content = {
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "protocol": benchmark.protocol,
        "unit": "percent",
        "selection_metric": benchmark.selection_metric,
        "groups": {
            group.name: {
                "num_queries": len(group.queries),
                "gallery_size": len(group.gallery),
                "reference_removed": group.reference_removed,
            }
            for group in benchmark.groups
        },
        "metrics": {name: _finite(row) for name, row in rows.items()},
        "extra": dict(extra),
    }
    return replace_file(Path(path), (json.dumps(content, indent=2, default=str) + "\n").encode())


def write_submission(path: str | Path, content: Any) -> Path:
    """Write a file for a test server, without a superfluous byte: CIRR's takes no file over 5 MB. Returns ``path``.

    Raises:
        OSError: the file cannot be written; an older one is then left as it was.
    """
    return replace_file(Path(path), json.dumps(content, separators=(",", ":")).encode())


def contact_sheet(
    benchmark: Benchmark,
    group: Group,
    ranking: Ranking,
    path: str | Path,
    rows: int = 8,
    columns: int = 10,
    seed: int = 0,
) -> Path:
    """Draw queries with the pictures retrieved for them, as a PNG, and return ``path``.

    ranking: of this group, with ``top``. One line per query: reference image, modification text, the best
    ``min(columns, k)`` gallery pictures, numbered from 1. Right answers (the target, and what is labelled with a weight
    of 1) have a green frame; where the target is not among those shown, it stands apart at the end in an orange frame
    with its rank.

    The ``min(rows, Q)`` queries are drawn at random with ``seed`` and shown in the benchmark's order: the sheet is no
    selection of successes, and its caption says so. Pictures keep their aspect ratio.

    Raises:
        ValueError: the ranking does not have one entry per query, or a picture cannot be read.
        OSError: a picture is missing or the sheet cannot be written.
    """
    num_queries = len(group.queries)
    top, ranks = ranking.top, ranking.ranks
    if len(top) != num_queries or len(ranks) != num_queries:
        raise ValueError(
            f"contact_sheet: group {group.name!r} has {num_queries} queries, but top has {len(top)} entries and ranks "
            f"has {len(ranks)}; pass the ranking of this group."
        )
    columns = min(columns, top.shape[1])
    chosen = drawn_queries(group, rows, seed)
    text_left = MARGIN + PICTURE[0] + GAP
    top_left = text_left + TEXT_WIDTH + SECTION_GAP
    answer_left = top_left + columns * (PICTURE[0] + GAP) - GAP + SECTION_GAP
    row_height = PICTURE[1] + LABEL_HEIGHT + GAP
    width = answer_left + PICTURE[0] + MARGIN
    colours = {GREEN: f"right answer among the first {columns}", ORANGE: "right answer ranked lower"}
    title, notes = _title(benchmark, group), _protocol(benchmark, group, len(chosen), seed)
    header = _header(title, notes, width, colours if benchmark.has_targets else {})
    sheet = Image.new("RGB", (width, header.height + LABEL_HEIGHT + len(chosen) * row_height + MARGIN - GAP), WHITE)
    sheet.paste(header, (0, 0))
    draw = ImageDraw.Draw(sheet)
    y = header.height
    titles = {MARGIN: "reference", text_left: "modification text", top_left: "retrieved, best first"}
    if benchmark.has_targets:
        titles[answer_left] = "right answer"
    for x, title in titles.items():
        draw.text((x, y - 4), title, GREY, _font(13))
    for row, index in enumerate(chosen):
        query, rank = group.queries[index], int(ranks[index])
        labelled = {query.target, *(name for name, weight in query.relevance if weight == 1)}
        answers = labelled - {None, query.reference}  # CIRR's soft labels call some references right
        # A ranking with fewer than k candidates ends in -1, which would index the last image of the gallery.
        shown = [group.gallery[i] for i in top[index, :columns].tolist() if i >= 0]
        y = header.height + LABEL_HEIGHT + row * row_height
        _draw_picture(sheet, (MARGIN, y), benchmark.image_paths[query.reference], "", "", benchmark.upright)
        _draw_text(draw, (text_left, y), " / ".join(query.texts))
        for column, name in enumerate(shown):
            frame = GREEN if name in answers else ""
            label = f"{column + 1} (reference)" if name == query.reference else str(column + 1)
            place = (top_left + column * (PICTURE[0] + GAP), y)
            _draw_picture(sheet, place, benchmark.image_paths[name], label, frame, benchmark.upright)
        if rank >= columns and query.target is not None:
            label = f"rank {rank + 1:,}"
            answer = benchmark.image_paths[query.target]
            _draw_picture(sheet, (answer_left, y), answer, label, ORANGE, benchmark.upright)
        verdict = _verdict(rank, columns, len(answers), len(answers.intersection(shown)))
        draw.text((text_left, y + PICTURE[1]), *verdict, _font(13), anchor="ls")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return replace_file(Path(path), buffer.getvalue())


def negatives_sheet(sets: NegativeSets, path: str | Path, rows: int = 8, columns: int = 8, seed: int = 0) -> Path:
    """Draw triplets with the negatives mined for them, as a PNG, and return ``path``.

    One line per triplet: reference image, modification text, target in a green frame, and its first ``columns``
    negatives, hardest first. Below each picture stand its rank in the mining's own ranking, from 1, and its score,
    where they are known: of random negatives neither is. The ``min(rows, N)`` triplets are drawn at random with
    ``seed``.

    Raises:
        FileNotFoundError: pictures to be drawn are no longer where they were mined.
        ValueError: one of them cannot be read.
        OSError: the sheet cannot be written.
    """
    chosen = sorted(random.Random(seed).sample(range(len(sets.targets)), min(rows, len(sets.targets))))
    columns = min(columns, sets.negatives.shape[1])
    _check_pictures(sets, chosen, columns)
    text_left = MARGIN + PICTURE[0] + GAP
    target_left = text_left + TEXT_WIDTH + GAP
    first_left = target_left + PICTURE[0] + SECTION_GAP
    row_height = PICTURE[1] + LABEL_HEIGHT + GAP
    width = first_left + columns * (PICTURE[0] + GAP) - GAP + MARGIN
    settings = ", ".join(f"{key} {json.dumps(value)}" for key, value in sets.about.get("negatives", {}).items())
    notes = [
        f"Shown: {len(chosen)} of {len(sets.targets):,} triplets, chosen at random with seed {seed}, with the hardest "
        f"{columns} of up to {sets.negatives.shape[1]} negatives; gallery of {len(sets.names):,} training images",
        f"In all: {sets.summary()}",
        *([f"run.negatives: {settings}".replace('"', "")] if settings else []),
        "Below each picture: its rank among all that was ranked, from 1 (none: lower than was searched), and its score",
    ]
    name, way = sets.about.get("dataset", "a data set"), "mined" if sets.is_mined else "drawn"
    title = f"Negatives of {name}, {way} at the beginning of epoch {sets.about.get('epoch', 0)}"
    header = _header(title, notes, width)
    sheet = Image.new("RGB", (width, header.height + LABEL_HEIGHT + len(chosen) * row_height + MARGIN - GAP), WHITE)
    sheet.paste(header, (0, 0))
    draw = ImageDraw.Draw(sheet)
    upright = bool(sets.about.get("upright", False))
    right_is_reference = sets.about.get("positive") == "image"
    titles = {
        MARGIN: "reference = positive" if right_is_reference else "reference",
        text_left: "modification text",
        target_left: "target",
        first_left: "negatives",
    }
    for x, word in titles.items():
        draw.text((x, header.height - 4), word, GREY, _font(13))
    for row, index in enumerate(chosen):
        y = header.height + LABEL_HEIGHT + row * row_height
        reference, target = int(sets.references[index]), int(sets.targets[index])
        _draw_text(draw, (text_left, y), sets.texts[index])
        own = _rank_and_score(int(sets.target_ranks[index]), float(sets.target_scores[index]))
        labels = (own, "") if right_is_reference else ("", own)
        _draw_picture(sheet, (MARGIN, y), Path(sets.paths[reference]), labels[0], "", upright)
        _draw_picture(sheet, (target_left, y), Path(sets.paths[target]), labels[1], GREEN, upright)
        for column, image in enumerate(sets.negatives[index, :columns].tolist()):
            if image < 0:
                break
            label = _rank_and_score(int(sets.ranks[index, column]), float(sets.scores[index, column]))
            label += " (reference)" if image == reference else ""
            place = (first_left + column * (PICTURE[0] + GAP), y)
            _draw_picture(sheet, place, Path(sets.paths[image]), label, "", upright)
        if sets.counts[index] == 0:
            draw.text((first_left, y + PICTURE[1] / 2), "none passes the rules", ORANGE, _font(TEXT_SIZE), anchor="lm")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return replace_file(Path(path), buffer.getvalue())


def _check_pictures(sets: NegativeSets, triplets: Sequence[int], columns: int) -> None:
    images = {int(image) for rows in (sets.references, sets.targets) for image in rows[triplets]}
    images.update(image for image in sets.negatives[triplets, :columns].flatten().tolist() if image >= 0)
    moved = [sets.paths[image] for image in sorted(images) if not Path(sets.paths[image]).is_file()]
    if moved:
        raise FileNotFoundError(
            f"{len(moved)} of {len(images)} pictures are not where they were when the negatives were mined (first: "
            f"{moved[0]}); put them back, or mine again."
        )


def _rank_and_score(rank: int, score: float) -> str:
    return ", ".join([*([f"{rank + 1:,}"] if rank >= 0 else []), *([f"{score:.3f}"] if math.isfinite(score) else [])])


def drawn_queries(group: Group, rows: int, seed: int = 0) -> list[int]:
    """Draw the positions of ``min(rows, Q)`` queries, by the seed alone and not by any result, in the group's order."""
    return sorted(random.Random(seed).sample(range(len(group.queries)), min(rows, len(group.queries))))


def attention_sheet(
    benchmark: Benchmark,
    group: Group,
    pictures: Tensor,
    maps: Tensor,
    labels: Sequence[str],
    path: str | Path,
    seed: int = 0,
) -> Path:
    """Draw where a model looks in the reference images of some queries, as a PNG, and return ``path``.

    One line per query of `drawn_queries`: the reference image as the model gets it, the modification text, and the
    image once per map, grey under colours from black (a weight of 0) over purple and red to yellow (the map's largest
    weight). The label below says how many times the average weight that largest one is: 1.0 is an even map.

    Args:
        benchmark: For title and protocol.
        group: Of the queries.
        pictures: ``(R, 3, H, W)``, normalised by CLIP's mean and standard deviation, R the number of lines.
        maps: ``(R, L, h, w)``, weights >= 0 over a grid of patches of the picture, of any scale.
        labels: L names of the maps.
        path: Of the PNG.
        seed: That the queries were drawn with.

    Raises:
        ValueError: the numbers of pictures, maps and labels do not fit each other.
        OSError: the sheet cannot be written.
    """
    rows = drawn_queries(group, len(pictures), seed)
    if maps.ndim != 4 or maps.shape[:2] != (len(rows), len(labels)):
        raise ValueError(
            f"attention_sheet: {len(rows)} pictures and {len(labels)} labels need maps of the shape "
            f"({len(rows)}, {len(labels)}, h, w), got {tuple(maps.shape)}."
        )
    text_left = MARGIN + ATTENTION_SIDE + GAP
    map_left = text_left + TEXT_WIDTH + SECTION_GAP
    row_height = ATTENTION_SIDE + 2 * LABEL_HEIGHT + GAP
    width = max(map_left + len(labels) * (ATTENTION_SIDE + GAP) - GAP + MARGIN, 1000)
    meaning = "Colours: from 0 to the largest weight of each map, whose multiple of the average weight stands below it"
    notes = (*_protocol(benchmark, group, len(rows), seed), meaning)
    header = _header(_title(benchmark, group), notes, width)
    sheet = Image.new("RGB", (width, header.height + LABEL_HEIGHT + len(rows) * row_height + MARGIN - GAP), WHITE)
    sheet.paste(header, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for x, title in {MARGIN: "reference", text_left: "modification text", map_left: "where the model looks"}.items():
        draw.text((x, header.height - 4), title, GREY, _font(13))
    for row, index in enumerate(rows):
        y = header.height + LABEL_HEIGHT + row * row_height
        picture = _denormalised(pictures[row])
        sheet.paste(_as_image(picture), (MARGIN, y))
        _draw_text(draw, (text_left, y), " / ".join(group.queries[index].texts))
        for column, (label, weights) in enumerate(zip(labels, maps[row])):
            x = map_left + column * (ATTENTION_SIDE + GAP)
            sheet.paste(_as_image(_overlaid(picture, weights)), (x, y))
            peak = f"{label}: {float(weights.max() / weights.mean()):.1f} x average"
            draw.text((x + ATTENTION_SIDE / 2, y + ATTENTION_SIDE + 4), peak, GREY, _font(13), anchor="ma")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return replace_file(Path(path), buffer.getvalue())


def _denormalised(picture: Tensor) -> Tensor:
    """Return a picture in colours from 0 to 1, ``(3, side, side)``."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return _resized((picture.float().cpu() * std + mean).clamp(0, 1))


def _overlaid(picture: Tensor, weights: Tensor) -> Tensor:
    """Colour a grey copy of a picture by a map over its patches."""
    high = _resized((weights / weights.max().clamp_min(torch.finfo().tiny))[None])[0].numpy()
    colours = torch.from_numpy(matplotlib.colormaps["inferno"](high)[..., :3]).permute(2, 0, 1).float()
    return 0.45 * picture.mean(dim=0, keepdim=True) + 0.55 * colours


def _resized(image: Tensor) -> Tensor:
    size = (ATTENTION_SIDE, ATTENTION_SIDE)
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]


def _as_image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def _verdict(rank: int, columns: int, num_answers: int, num_shown: int) -> tuple[str, str]:
    """Say at which rank the right answer stands, or how many of several are shown, and in which colour to write it."""
    if num_answers > 1:
        return f"{num_shown} of {num_answers} right answers shown", GREEN if num_shown else ORANGE
    if rank < 0:
        return "right answer not public or not in gallery", GREY
    return f"right answer at rank {rank + 1:,}", GREEN if rank < columns else ORANGE


def _title(benchmark: Benchmark, group: Group) -> str:
    return f"{benchmark.name} {benchmark.split}: {group.name}"


def _protocol(benchmark: Benchmark, group: Group, num_shown: int, seed: int) -> tuple[str, str]:
    """Say by which protocol the numbers are, and how the queries shown were chosen."""
    num_queries = len(group.queries)
    choice = (
        f"all {num_queries:,} queries"
        if num_shown == num_queries
        else f"{num_shown} of {num_queries:,} queries, chosen at random with seed {seed} and not by their result"
    )
    return f"Protocol: {benchmark.protocol}", f"Shown: {choice}; gallery of {len(group.gallery):,} images"


def _header(title: str, notes: Sequence[str], width: int, colours: Mapping[str, str] | None = None) -> Image.Image:
    """Draw the title, lines below it, and the meaning of colours."""
    lines = [line for note in notes for line in _wrap(note, 15, width - 2 * MARGIN)]
    header = Image.new("RGB", (width, MARGIN + 42 + 22 * (len(lines) + 1) + 2 * GAP), WHITE)
    draw = ImageDraw.Draw(header)
    draw.text((MARGIN, MARGIN), title, BLACK, _font(26))
    y = MARGIN + 42
    for line in lines:
        draw.text((MARGIN, y), line, GREY, _font(15))
        y += 22
    x = float(MARGIN)
    for colour, meaning in (colours or {}).items():
        draw.rectangle((x + 1, y + 3, x + 13, y + 15), outline=colour, width=3)
        draw.text((x + 22, y), meaning, BLACK, _font(15))
        x += 22 + _font(15).getlength(meaning) + 2 * GAP
    return header


def _draw_picture(
    sheet: Image.Image, place: tuple[int, int], path: Path, label: str = "", frame: str = "", upright: bool = False
) -> None:
    """Fit a picture into the box at place (left, top), its label below it, with a coloured frame or a thin grey one.

    ``upright`` as in `open_rgb`: a sheet shows what the model sees.
    """
    left, top = place
    draw = ImageDraw.Draw(sheet)
    right, bottom = left + PICTURE[0] - 1, top + PICTURE[1] - 1
    picture = open_rgb(path, upright)
    # Inside the frame, so that a frame never hides a part of the picture.
    inner = (PICTURE[0] - 2 * FRAME, PICTURE[1] - 2 * FRAME)
    scale = min(inner[0] / picture.width, inner[1] / picture.height)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(picture, (left + (PICTURE[0] - size[0]) // 2, top + (PICTURE[1] - size[1]) // 2))
    draw.rectangle((left, top, right, bottom), outline=frame or LIGHT_GREY, width=FRAME if frame else 1)
    draw.text((left + PICTURE[0] / 2, bottom + 4), label, frame or GREY, _font(13), anchor="ma")


def _draw_text(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    """Write a modification text beside its reference image, cut with an ellipsis where it has more lines than fit."""
    lines = _wrap(text, TEXT_SIZE, TEXT_WIDTH)
    fitting = (PICTURE[1] - LABEL_HEIGHT) // LINE_HEIGHT
    if len(lines) > fitting:
        lines = [*lines[: fitting - 1], lines[fitting - 1] + " ..."]
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + LINE_HEIGHT * number), line, BLACK, _font(TEXT_SIZE))


def _wrap(text: str, font_size: int, width: int) -> list[str]:
    """Break a text into lines of at most width pixels, at blanks; a single word that is wider is broken inside."""
    font = _font(font_size)
    lines = [""]
    for word in text.split():
        if font.getlength(f"{lines[-1]} {word}".strip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".strip()
            continue
        lines.append("")
        for character in word:
            if font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return [line for line in lines if line]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Load DejaVu Sans, which comes with matplotlib: Pillow's own default font differs between its versions."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


@dataclass(frozen=True)
class Curve:
    """A line of a panel: ``{x: value}``, where values that are not finite leave a gap."""

    points: Mapping[Any, float]
    label: str
    colour: str
    has_marks: bool = True
    style: str = "-"
    width: float = 1.8


def training_curve(folder: str | Path, png_path: str | Path, metric: str) -> Path:
    r"""Draw how a run went, from its ``epochs.csv`` and ``steps.csv``, as a PNG, and return its path.

    The panels, each where there is something to show: the loss, per batch and as the mean of each epoch; ``metric`` on
    ``val`` and, with the gap between them shaded, on ``seen``; what Retrieval-DPO measures, in shares and in cosines;
    the learning rate; :math:`\lVert\delta\rVert`, the length of the weight perturbation; and the cosine between its
    direction and the gradient that was applied.

    metric: a key of ``benchmark.metrics``, in percent. A dashed line marks the epoch that LAVIS keeps as
    ``checkpoint_best``: the first with the largest ``agg_metrics`` of ``val``. Epochs are counted from 0, as LAVIS
    names its checkpoints; the batches of an epoch lead up to its mark. Losses that are not finite leave a gap, and the
    legend tells how many there are.

    Raises:
        FileNotFoundError: there is no ``epochs.csv``.
        ValueError: it holds no finished epoch, a damaged line, or validations without this metric.
        OSError: the PNG cannot be written.
    """
    folder = Path(folder)
    epochs = read_epochs(folder / EPOCHS)
    steps = _by_position(read_steps(folder / STEPS)) if (folder / STEPS).is_file() else {}
    losses, val = epochs.get("train", {}).get("loss", {}), epochs.get("val", {})
    if not losses and not val:
        raise ValueError(f"{folder / EPOCHS} holds no finished epoch; draw the curve after the first one.")
    panels = {"training loss": _loss_curves(losses, steps.get("loss", {}))}
    if val:
        panels[f"{metric} in percent"] = _metric_curves(epochs, metric, folder / EPOCHS)
    panels.update(_preference_curves(epochs.get("train", {})))
    measured = (("lr", "learning rate"), ("perturbation_norm", "‖δ‖"), ("cosine", "cos(g, g')"))
    for name, label in measured:
        values = steps.get(name, {})  # the perturbation is measured now and then, in a short run once
        panels[label] = [Curve(values, "", GREY, has_marks=len(values) < 50, width=1.0)]
    panels = {label: curves for label, curves in panels.items() if any(curve.points for curve in curves)}
    heights = [1.4 if label in dict(measured).values() else 2.7 for label in panels]
    figure = Figure(figsize=(7.5, 0.6 + sum(heights)), constrained_layout=True)
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    axes = dict(zip(panels, rows))
    for label, panel in axes.items():
        draw_curves(panel, panels[label])
        panel.set_ylabel(label)
        panel.ticklabel_format(axis="y", scilimits=(-3, 4))
    figure.align_ylabels()
    if val:
        panel = axes[f"{metric} in percent"]
        shade_gap(panel, *panels[f"{metric} in percent"])
        _mark_best(list(axes.values()), panel, best_epoch(val, metric), val[metric], metric)
    for panel in axes.values():
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, ncol=3)
    last = max([*losses, *(epoch for values in val.values() for epoch in values)])
    bottom = list(axes.values())[-1]
    bottom.set_xlabel("epoch, counted from 0")
    bottom.set_xlim(-0.03 * last - (1 if steps else 0.3), 1.03 * last + 0.3)
    bottom.xaxis.set_major_locator(FixedLocator(MaxNLocator(integer=True, min_n_ticks=1).tick_values(0, last)))
    return save_figure(figure, png_path)


def _preference_curves(train: Mapping[str, Mapping[int, float]]) -> dict[str, list[Curve]]:
    """Return the panels of a run that learnt from preferences: in shares, and in cosines."""
    panels = {
        "share": {
            "reward_accuracy": ("h > 0 (reward accuracy)", BLUE),
            "without_negative": ("queries without a negative", GREY),
        },
        "cosine": {
            "reward_margin": ("h (reward margin)", BLUE),
            "positive_drift": ("drift of the right image's score", ORANGE),
        },
    }
    return {
        panel: [Curve(train[name], label, colour) for name, (label, colour) in curves.items() if name in train]
        for panel, curves in panels.items()
    }


def best_epoch(val: Mapping[str, Mapping[int, float]], metric: str) -> int:
    """Return the epoch that LAVIS keeps as ``checkpoint_best``: the first with the largest ``agg_metrics``.

    val: ``{metric: {epoch: value}}``; ``metric`` decides where ``agg_metrics`` was not logged.
    """
    deciding = val.get("agg_metrics", val[metric])
    return max(sorted(val[metric]), key=lambda epoch: deciding.get(epoch, -math.inf))


def _by_position(steps: Mapping[str, Sequence[float]]) -> dict[str, dict[float, float]]:
    """Return the logged numbers of each column by place on an axis of epochs: epoch e's batches end at e."""
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


def _mark_best(panels: Sequence[Axes], legend: Axes, best: int, values: Mapping[int, float], metric: str) -> None:
    style: dict[str, Any] = {"color": ORANGE, "linewidth": 1.2, "linestyle": (0, (4, 3))}
    for panel in panels:
        panel.axvline(best, zorder=1, **style)
    legend.plot([], [], label=f"best: epoch {best}, {metric} {values[best]:.2f} %", **style)


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw lines on plain axes, with a mark per point where asked for (a single epoch has no line)."""
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


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG in one step and return ``path``.

    Raises:
        OSError: it cannot be written; an older file is then left as it was.
    """
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return replace_file(Path(path), buffer.getvalue())
