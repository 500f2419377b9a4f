"""Sample the split ``seen`` from the training data for a comparison with ``val``."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from lavis_cir_plugin.benchmarks.types import Group, Query, images_of


def drawn_like(training: Group, val: Group, seed: int = 0) -> Group:
    """Sample training queries as a group of val's size; its recall less val's recall is the generalisation gap.

    Recall depends on the number of gallery images and on how many of them resemble the target. So the gallery gets
    val's size and is filled with whole clusters in random order. A cluster holds all training images that queries
    connect (FashionIQ's variants of one product, CIRR's image sets). The queries are sampled from those whose images
    all lie in that gallery.

    Args:
        training: Group with all training queries and images.
        val: Group whose two sizes the result gets. The result is smaller if the training data are too few.
        seed: Seed of the sample, which otherwise depends only on the group's name.

    Returns:
        A group with the name and the rule of `training`. Every reference, target, member and labelled image is in its
        gallery. Queries and gallery keep the order of `training`.
    """
    rng = random.Random(f"{seed} {training.name}")
    clusters = _clusters(training.queries)
    rng.shuffle(clusters)
    room = len(val.gallery)
    chosen: set[str] = set()
    for query in (query for cluster in clusters for query in cluster):
        new = set(images_of(query)) - chosen
        if len(chosen) + len(new) <= room:
            chosen |= new
    others = [name for name in training.gallery if name not in chosen]
    chosen.update(rng.sample(others, min(room - len(chosen), len(others))))
    queries = [query for query in training.queries if chosen.issuperset(images_of(query))]
    drawn = sorted(rng.sample(range(len(queries)), min(len(val.queries), len(queries))))
    gallery = tuple(name for name in training.gallery if name in chosen)
    return replace(training, gallery=gallery, queries=tuple(queries[index] for index in drawn))


def _clusters(queries: Sequence[Query]) -> list[list[Query]]:
    """Return the connected components of queries that share images, in the order of their first queries."""
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
