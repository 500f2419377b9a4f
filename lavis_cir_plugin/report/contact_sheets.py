"""Draw queries with the pictures retrieved for them, and the places where a model looks."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from PIL import Image
from torch import Tensor

from lavis_cir_plugin.benchmarks.types import Benchmark, Group
from lavis_cir_plugin.core.atomic_files import replace_file
from lavis_cir_plugin.core.normalisation import CLIP_MEAN_AND_STD
from lavis_cir_plugin.ranking.ranks import Ranking
from lavis_cir_plugin.report.query_results import QueryResult, query_result
from lavis_cir_plugin.report.sheet_layout import (
    FRAME,
    GREEN,
    GREY,
    ORANGE,
    SECTION_GAP,
    TEXT_WIDTH,
    Cell,
    Column,
    Picture,
    Words,
    draw_sheet,
    title_of,
)

ATTENTION_SIDE = 160  # side of a picture with a map over it, in pixels


def contact_sheet(
    benchmark: Benchmark,
    group: Group,
    ranking: Ranking,
    path: str | Path,
    rows: int = 8,
    columns: int = 10,
    seed: int = 0,
) -> Path:
    """Draw queries with the pictures retrieved for them as a PNG, and return ``path``.

    Each line holds one query: the reference image, the modification text and the best ``min(columns, k)`` gallery
    pictures, numbered from 1. Right answers (the target and images labelled with a weight of 1) have a green frame. If
    the target is not among the pictures shown, it stands at the end of the line in an orange frame with its rank.

    The ``min(rows, Q)`` queries are chosen at random with ``seed`` and shown in the benchmark's order. So the sheet is
    not a selection of successes, and its caption says so. Pictures keep their aspect ratio.

    Args:
        benchmark: Benchmark of the queries.
        group: Group of the queries.
        ranking: Ranking of this group, with ``top``.
        path: Path of the PNG.
        rows: Number of queries to show, at most.
        columns: Number of gallery pictures per query, at most.
        seed: Seed of the choice of queries.

    Raises:
        ValueError: If the ranking does not have one entry per query, or a picture cannot be read.
        OSError: If a picture is missing or the sheet cannot be written.
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
    layout = [
        Column("reference"),
        Column("modification text", TEXT_WIDTH),
        Column("retrieved, best first", space=SECTION_GAP),
        *[Column()] * (columns - 1),
        Column("right answer" if benchmark.has_targets else "", space=SECTION_GAP),
    ]
    results = [query_result(group, index, ranking, columns) for index in chosen]
    lines = [query_cells(result, benchmark.image_paths, columns, benchmark.upright) for result in results]
    colours = {GREEN: f"right answer among the first {columns}", ORANGE: "right answer ranked lower"}
    notes = _protocol(benchmark, group, len(chosen), seed)
    title = title_of(benchmark, group)
    content = draw_sheet(title, notes, layout, lines, colours=colours if benchmark.has_targets else None)
    return replace_file(Path(path), content)


def query_cells(
    result: QueryResult, images: Mapping[str, str | Path], columns: int, upright: bool = False
) -> list[Cell]:
    """Return the cells of one query: reference, text, retrieved pictures, and the right answer if it is not shown.

    Args:
        result: The query and what was found.
        images: Path of the file by the name of the image.
        columns: Number of retrieved pictures; places of a shorter ranking stay empty.
        upright: Whether pictures are turned as their EXIF orientation says.
    """

    def picture(name: str, label: str = "", frame: str = "") -> Picture:
        return Picture(Path(images[name]), label, frame, upright)

    shown = result.top[:columns]
    retrieved: list[Cell] = [None] * columns
    for column, name in enumerate(shown):
        label = f"{column + 1} (reference)" if name == result.reference else str(column + 1)
        retrieved[column] = picture(name, label, GREEN if name in result.answers else "")
    verdict, colour = _verdict(result.rank, columns, len(result.answers), len({*result.answers}.intersection(shown)))
    text = Words(" / ".join(result.texts), foot=verdict, foot_colour=colour)
    lower = bool(result.answers) and result.rank >= columns
    answer = picture(result.answers[0], f"rank {result.rank + 1:,}", ORANGE) if lower else None
    return [picture(result.reference), text, *retrieved, answer]


def drawn_queries(group: Group, rows: int, seed: int = 0) -> list[int]:
    """Return the positions of ``min(rows, Q)`` queries in the group's order, chosen by the seed and not by results."""
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
    """Draw where a model looks in the reference images of some queries as a PNG, and return ``path``.

    Each line holds one query of `drawn_queries`: the reference image as the model gets it, the modification text, and
    the image once per map. A map colours a grey image from black (a weight of 0) over purple and red to yellow (the
    map's largest weight). The label below it gives the ratio of the largest weight to the average; an even map has 1.0.

    Args:
        benchmark: Benchmark for title and protocol.
        group: Group of the queries.
        pictures: ``(R, 3, H, W)``, normalised by CLIP's mean and standard deviation, with R the number of lines.
        maps: ``(R, L, h, w)``, weights >= 0 over a grid of patches of the picture, on any scale.
        labels: Names of the L maps.
        path: Path of the PNG.
        seed: Seed with which the queries were chosen.

    Raises:
        ValueError: If the numbers of pictures, maps and labels do not match.
        OSError: If the sheet cannot be written.
    """
    rows = drawn_queries(group, len(pictures), seed)
    if maps.ndim != 4 or maps.shape[:2] != (len(rows), len(labels)):
        raise ValueError(
            f"attention_sheet: {len(rows)} pictures and {len(labels)} labels need maps of the shape "
            f"({len(rows)}, {len(labels)}, h, w), got {tuple(maps.shape)}."
        )
    meaning = "Colours: from 0 to the largest weight of each map, whose multiple of the average weight stands below it"
    box = (ATTENTION_SIDE + 2 * FRAME, ATTENTION_SIDE + 2 * FRAME)
    layout = [
        Column("reference", box[0]),
        Column("modification text", TEXT_WIDTH),
        Column("where the model looks", box[0], SECTION_GAP),
        *[Column(width=box[0])] * (len(labels) - 1),
    ]
    lines: list[list[Cell]] = []
    for index, picture, attention in zip(rows, map(_denormalised, pictures), maps):
        lines.append([Picture(_as_image(picture)), Words(" / ".join(group.queries[index].texts))])
        for label, weights in zip(labels, attention):
            peak = f"{label}: {float(weights.max() / weights.mean()):.1f} x average"
            lines[-1].append(Picture(_as_image(_overlaid(picture, weights)), peak))
    notes = (*_protocol(benchmark, group, len(rows), seed), meaning)
    return replace_file(Path(path), draw_sheet(title_of(benchmark, group), notes, layout, lines, box))


def _denormalised(picture: Tensor) -> Tensor:
    """Return a picture with colours from 0 to 1, ``(3, side, side)``."""
    mean, std = (torch.tensor(values)[:, None, None] for values in CLIP_MEAN_AND_STD)
    return _resized((picture.float().cpu() * std + mean).clamp(0, 1))


def _overlaid(picture: Tensor, weights: Tensor) -> Tensor:
    """Return a grey copy of a picture, coloured by a map over its patches."""
    high = _resized((weights / weights.max().clamp_min(torch.finfo().tiny))[None])[0].numpy()
    colours = torch.from_numpy(matplotlib.colormaps["inferno"](high)[..., :3]).permute(2, 0, 1).float()
    return 0.45 * picture.mean(dim=0, keepdim=True) + 0.55 * colours


def _resized(image: Tensor) -> Tensor:
    size = (ATTENTION_SIDE, ATTENTION_SIDE)
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0]


def _as_image(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def _verdict(rank: int, columns: int, num_answers: int, num_shown: int) -> tuple[str, str]:
    """Return a line about the right answer's rank, or about how many of several are shown, and the line's colour."""
    if num_answers > 1:
        return f"{num_shown} of {num_answers} right answers shown", GREEN if num_shown else ORANGE
    if rank < 0:
        return "right answer not public or not in gallery", GREY
    return f"right answer at rank {rank + 1:,}", GREEN if rank < columns else ORANGE


def _protocol(benchmark: Benchmark, group: Group, num_shown: int, seed: int) -> tuple[str, str]:
    """Return a line with the protocol of the numbers, and a line about the choice of the queries shown."""
    num_queries = len(group.queries)
    choice = (
        f"all {num_queries:,} queries"
        if num_shown == num_queries
        else f"{num_shown} of {num_queries:,} queries, chosen at random with seed {seed} and not by their result"
    )
    return f"Protocol: {benchmark.protocol}", f"Shown: {choice}; gallery of {len(group.gallery):,} images"
