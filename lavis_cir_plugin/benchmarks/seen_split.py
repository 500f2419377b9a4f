"""Draw the split ``seen`` from the training data, to be compared with ``val``."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from lavis_cir_plugin.benchmarks.types import Group, Query, images_of


def drawn_like(training: Group, val: Group, seed: int = 0) -> Group:
    """Draw training queries into a group of val's size: recall on it less recall on val is the generalisation gap.

    Recall depends on the number of gallery images and on how many of them resemble the target, so the gallery gets
    val's size and is filled by whole clusters, that is, with all training images that are connected through queries
    (FashionIQ's variants of one product, CIRR's image sets), in random order. The queries are drawn from those whose
    images all lie in that gallery.

    Args:
        training: All training queries, and the images to draw from.
        val: What to resemble in its two sizes; where the training data are too few, the result is smaller.
        seed: Of the draw, which also depends on the group's name and on nothing else.

    Returns:
        A group with training's name and rule. Every reference, target, member and labelled image is in its gallery;
        queries and gallery keep training's order.
    """
    rng = random.Random(f"{seed} {training.name}")
    clusters = _clusters(training.queries)
    rng.shuffle(clusters)
    room = len(val.gallery)
    chosen: set[str] = set()
    for query in (query for cluster in clusters for query in cluster):
        images = images_of(query)
        if len(chosen.union(images)) <= room:
            chosen.update(images)
    others = [name for name in training.gallery if name not in chosen]
    chosen.update(rng.sample(others, min(room - len(chosen), len(others))))
    queries = [query for query in training.queries if chosen.issuperset(images_of(query))]
    drawn = sorted(rng.sample(range(len(queries)), min(len(val.queries), len(queries))))
    gallery = tuple(name for name in training.gallery if name in chosen)
    return replace(training, gallery=gallery, queries=tuple(queries[index] for index in drawn))


def _clusters(queries: Sequence[Query]) -> list[list[Query]]:
    """Sort queries so that no image occurs in two clusters and no cluster can be parted; in order of first queries."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers: dict[str, int] = {}
    edges = []
    for query in queries:
        reference, *others = (numbers.setdefault(name, len(numbers)) for name in (query.reference, *images_of(query)))
        edges += [(reference, other) for other in others]
    graph = coo_array(([True] * len(edges), tuple(zip(*edges)) or ((), ())), shape=(len(numbers), len(numbers)))
    _, labels = connected_components(graph, directed=False)
    clusters: dict[int, list[Query]] = {}
    for query in queries:
        clusters.setdefault(int(labels[numbers[query.reference]]), []).append(query)
    return list(clusters.values())
