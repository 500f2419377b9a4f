"""Store each query of a benchmark with the rank of its target and its first images, for reports without a model."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lavis_cir_plugin.benchmarks.types import Benchmark, Group
from lavis_cir_plugin.core.atomic_files import replace_file
from lavis_cir_plugin.ranking.ranks import Ranking

QUERIES = "queries.json"
TOP = 10
"""How many images of each ranking are kept."""


@dataclass(frozen=True)
class QueryResult:
    """A query and what was found.

    Attributes:
        reference: Name of the reference image.
        texts: Modification texts of the query.
        answers: Names of the right answers, the target first; empty where they are not public.
        rank: Rank of the target, counted from 0; -1 where the target is not public or no candidate.
        top: Names of the first images, best first.
    """

    reference: str
    texts: tuple[str, ...]
    answers: tuple[str, ...]
    rank: int
    top: tuple[str, ...]


@dataclass(frozen=True)
class Results:
    """The queries of a split by group, and the files of the images that they name.

    Attributes:
        groups: Results by the name of their group, in the benchmark's order.
        images: Path of the file by the name of the image.
        upright: Whether pictures are turned as their EXIF orientation says.
    """

    groups: Mapping[str, tuple[QueryResult, ...]]
    images: Mapping[str, str]
    upright: bool


def query_result(group: Group, index: int, ranking: Ranking, count: int) -> QueryResult:
    """Return a query of a group with what was found.

    Args:
        group: The group.
        index: Position of the query.
        ranking: Ranking of the group, with ``top``.
        count: Number of first images, at most the width of ``top``; a ranking with fewer candidates has fewer.
    """
    query = group.queries[index]
    labelled = (query.target, *(name for name, weight in query.relevance if weight == 1))
    # CIRR's soft labels mark some references as right.
    answers = tuple(name for name in dict.fromkeys(labelled) if name is not None and name != query.reference)
    # A ranking with fewer than k candidates ends in -1. As an index, -1 would be the last image of the gallery.
    top = tuple(group.gallery[image] for image in ranking.top[index, :count].tolist() if image >= 0)
    return QueryResult(query.reference, query.texts, answers, int(ranking.ranks[index]), top)


def write_queries(path: Path, benchmark: Benchmark, rankings: Mapping[str, Ranking]) -> Path:
    """Write the queries of a split with what was found, as JSON, and return ``path``.

    rankings: of every group, with ``top``. Images are numbered, so that 6,000 queries take about a megabyte.

    Raises:
        OSError: the file cannot be written; an older one is then as it was.
    """
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers))

    groups: dict[str, list[list[object]]] = {}
    for group in benchmark.groups:
        found = (query_result(group, index, rankings[group.name], TOP) for index in range(len(group.queries)))
        groups[group.name] = [
            [number(one.reference), list(one.texts), [*map(number, one.answers)], one.rank, [*map(number, one.top)]]
            for one in found
        ]
    images = {name: str(Path(benchmark.image_paths[name]).absolute()) for name in numbers}
    content = {"upright": benchmark.upright, "images": images, "groups": groups}
    return replace_file(path, json.dumps(content, separators=(",", ":")).encode())


def read_queries(path: Path) -> Results:
    """Read what `write_queries` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = list(content["images"])

        def result(row: list[object]) -> QueryResult:
            reference, texts, answers, rank, top = row
            return QueryResult(
                names[reference],  # type: ignore[call-overload]
                tuple(texts),  # type: ignore[arg-type]
                tuple(names[index] for index in answers),  # type: ignore[attr-defined]
                int(rank),  # type: ignore[call-overload]
                tuple(names[index] for index in top),  # type: ignore[attr-defined]
            )

        groups = {name: tuple(map(result, rows)) for name, rows in content["groups"].items()}
        return Results(groups, content["images"], bool(content["upright"]))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); evaluate the run again to write it anew.") from error


def best(queries: tuple[QueryResult, ...], count: int) -> list[int]:
    """Return the positions of the queries with the best ranks, the first of equal ones; without a rank none."""
    return sorted(_ranked(queries), key=lambda index: queries[index].rank)[:count]


def worst(queries: tuple[QueryResult, ...], count: int) -> list[int]:
    """Return the positions of the queries with the worst ranks, worst first, the first of equal ones."""
    return sorted(_ranked(queries), key=lambda index: -queries[index].rank)[:count]


def drawn(queries: tuple[QueryResult, ...], count: int, seed: int = 0) -> list[int]:
    """Draw positions by the seed alone and not by any result, in order."""
    return sorted(random.Random(seed).sample(range(len(queries)), min(count, len(queries))))


def most_different(runs: list[tuple[QueryResult, ...]], count: int) -> list[int]:
    """Return the positions of the queries whose ranks differ most between runs, by the ratio of the ranks from 1.

    The ratio and not the difference: from rank 1 to rank 100 is more than from 1,001 to 1,100. Queries on which all
    runs agree are left out.
    """

    def ratio(index: int) -> float:
        ranks = [queries[index].rank + 1 for queries in runs]
        return max(ranks) / min(ranks) if min(ranks) > 0 else 1.0

    ratios = {index: ratio(index) for index in range(len(runs[0]))}
    return sorted((index for index in ratios if ratios[index] > 1), key=lambda index: -ratios[index])[:count]


def _ranked(queries: tuple[QueryResult, ...]) -> list[int]:
    return [index for index, query in enumerate(queries) if query.rank >= 0]
