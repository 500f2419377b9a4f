"""Draw the picture of the README: queries that a run of `make demo` answers well, and one that it does not.

Three queries are drawn at random from those whose right answer is among the first three images, and one from those
whose right answer is not among the first fifty. The shares of both kinds stand on the picture.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lavis_cir_plugin import load_run
from lavis_cir_plugin.benchmarks.fashioniq import read_benchmark
from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.benchmarks.types import Benchmark, Group
from lavis_cir_plugin.data.benchmark_datasets import cache_root
from lavis_cir_plugin.garments.fashioniq import WORLD, FashionIQGarments
from lavis_cir_plugin.ranking.ranks import Ranking, rank
from lavis_cir_plugin.report.sheet_layout import (
    GREEN,
    ORANGE,
    SECTION_GAP,
    TEXT_WIDTH,
    Cell,
    Column,
    Picture,
    Words,
    draw_sheet,
)

GOOD, BAD, SHOWN = 3, 50, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a run of projects/wrf4cir/demo.yaml")
    parser.add_argument("--output", type=Path, default=Path("docs/contact_sheet.jpg"))
    parser.add_argument("--seed", type=int, default=0, help="of the choice of the queries (default: 0)")
    arguments = parser.parse_args()

    loaded = load_run(arguments.run)
    settings = FashionIQGarments(**(loaded.config.datasets.fashioniq.get("garments") or {}))
    benchmark = read_benchmark({"root": str(WORLD.make(cache_root(), settings))}, "val")
    ranked = [
        (group, number, ranking)
        for group in benchmark.groups
        for number, ranking in ranked_queries(loaded, benchmark, group)
    ]
    good = [entry for entry in ranked if entry[2][0] < GOOD]
    bad = [entry for entry in ranked if entry[2][0] >= BAD]
    rng = random.Random(arguments.seed)
    lines = [line(benchmark, *entry) for entry in [*rng.sample(good, 3), *rng.sample(bad, 1)]]
    shares = [round(100 * len(kind) / len(ranked)) for kind in (good, bad)]
    notes = [
        f"Three of the {shares[0]} % of queries whose right answer is among the first {GOOD} of 400 images, and one of "
        f"the {shares[1]} % whose right answer is not among the first {BAD}."
    ]
    layout = [Column("reference"), Column("what to change", TEXT_WIDTH), Column("best first", space=SECTION_GAP)]
    layout += [*[Column()] * (SHOWN - 1), Column("right answer", space=SECTION_GAP)]
    sheet = draw_sheet("Drawn garments, a small model trained for minutes on a CPU", notes, layout, lines)
    Image.open(io.BytesIO(sheet)).convert("RGB").save(arguments.output, quality=85, optimize=True, progressive=True)
    print(f"Written: {arguments.output}")


@torch.no_grad()
def ranked_queries(loaded: Any, benchmark: Benchmark, group: Group) -> Iterator[tuple[int, tuple[int, list[int]]]]:
    """Yield the number of each query with the rank of its target, from 0, and its first images."""
    look, read = loaded.vis_processors["eval"], loaded.txt_processors["eval"]
    images = {name: look(open_rgb(benchmark.image_paths[name])) for name in group.gallery}
    parts = torch.stack([images[name] for name in group.gallery]).split(50)
    gallery = torch.cat([loaded.model.encode_target(part) for part in parts])
    queries = []
    for query in group.queries:
        sample = {"image": images[query.reference][None], "text_input": [read(query.texts[0])]}
        queries.append(loaded.model.encode_query(sample))
    targets = torch.tensor([group.gallery.index(query.target) for query in group.queries])
    ranking: Ranking = rank(torch.cat(queries), gallery, targets, top_k=SHOWN)
    yield from enumerate(zip(ranking.ranks.tolist(), ranking.top.tolist()))


def line(benchmark: Benchmark, group: Group, number: int, ranking: tuple[int, list[int]]) -> list[Cell]:
    query, (place, top) = group.queries[number], ranking
    colour = GREEN if place < SHOWN else ORANGE
    cells: list[Cell] = [
        Picture(benchmark.image_paths[query.reference]),
        Words(query.texts[0], foot=f"right answer at rank {place + 1}", foot_colour=colour),
    ]
    for column, index in enumerate(top, start=1):
        name = group.gallery[index]
        label = f"{column} (reference)" if name == query.reference else str(column)
        cells.append(Picture(benchmark.image_paths[name], label, GREEN if name == query.target else ""))
    lower = Picture(benchmark.image_paths[str(query.target)], f"rank {place + 1}", ORANGE)
    return [*cells, lower if place >= SHOWN else None]


if __name__ == "__main__":
    main()
