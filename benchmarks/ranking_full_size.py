"""Compare chunked ranking with the usual string-matrix metric at FashionIQ's largest size: time and peak memory.

Category shirt with BLIP-2's shapes: 2,038 queries x 6,346 images x 32 features of width 256, random and of unit length.
Each way runs in a process of its own, which the operating system measures; a third process that only makes the features
tells how much of a peak is theirs. This one imports no library, because those that it starts inherit its peak.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import measure

QUERIES, GALLERY, FEATURES, WIDTH = 2_038, 6_346, 32, 256
CUTOFFS = (10, 50)
ROUNDS = 3
FEATURES_ONLY, STRINGS, CHUNKED = "features only", "string matrix", "chunked ranking"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=(FEATURES_ONLY, STRINGS, CHUNKED), help="run one way in this process")
    way = parser.parse_args().way
    if way is not None:
        print(json.dumps(run_here(way)))
        return

    ways = (FEATURES_ONLY, STRINGS, CHUNKED)
    runs = dict(zip(ways, measure.run_ways(__file__, [("--way", name) for name in ways], ROUNDS)))
    print(
        f"{QUERIES:,} queries x {GALLERY:,} images x {FEATURES} features of width {WIDTH}, float32, CPU, "
        f"{runs[FEATURES_ONLY][0]['threads']} torch threads; features to recall, medians of {ROUNDS} processes each\n"
        f"  {'':<16} {'seconds':>8} {'peak MiB':>9} {'above features':>15} {'R@10 %':>8} {'R@50 %':>8}"
    )
    floor = measure.median(runs[FEATURES_ONLY], "peak_bytes")
    for name in (STRINGS, CHUNKED):
        peak = measure.median(runs[name], "peak_bytes")
        recalls = " ".join(f"{recall:>8.3f}" for recall in runs[name][0]["recalls"])
        memory = f"{peak / 2**20:>9,.0f} {(peak - floor) / 2**20:>15,.0f}"
        print(f"  {name:<16} {measure.median(runs[name], 'seconds'):>8.2f} {memory} {recalls}")
    time_ratio = measure.median(runs[STRINGS], "seconds") / measure.median(runs[CHUNKED], "seconds")
    memory_ratio = (measure.median(runs[STRINGS], "peak_bytes") - floor) / (
        measure.median(runs[CHUNKED], "peak_bytes") - floor
    )
    print(f"  string matrix / chunked ranking: {time_ratio:.2f} x the time, {memory_ratio:.2f} x the memory")


def run_here(way: str) -> dict[str, Any]:
    import torch

    import lavis_cir_plugin.ranking  # noqa: F401 (all three processes carry the same libraries)

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(QUERIES, WIDTH, generator=generator)
    gallery = torch.randn(GALLERY, FEATURES, WIDTH, generator=generator)
    for features in (query, gallery):
        features /= features.norm(dim=-1, keepdim=True)  # in place: a temporary copy would hide part of a peak
    targets = torch.randperm(GALLERY, generator=generator)[:QUERIES]
    start = time.perf_counter()
    recalls = {FEATURES_ONLY: lambda *_: [], STRINGS: by_strings, CHUNKED: by_chunks}[way](query, gallery, targets)
    return {"seconds": time.perf_counter() - start, "recalls": recalls, "threads": torch.get_num_threads()}


def by_chunks(query: Any, gallery: Any, targets: Any) -> list[float]:
    from lavis_cir_plugin.ranking import rank, recall_at

    ranks = rank(query, gallery, targets).ranks
    return [recall_at(ranks, k) for k in CUTOFFS]


def by_strings(query: Any, gallery: Any, targets: Any) -> list[float]:
    """Score in blocks, then sort all distances and compare a matrix of names with the targets' names."""
    import numpy as np
    import torch

    names = np.array([f"B{index:09d}" for index in range(GALLERY)])
    similarity = torch.cat(
        [(block @ gallery.flatten(0, 1).T).view(-1, *gallery.shape[:2]).amax(-1) for block in query.split(32)]
    )
    sorted_names = names[torch.argsort(1 - similarity, dim=-1).numpy()]
    target_names = np.repeat(names[targets.numpy()], GALLERY).reshape(QUERIES, GALLERY)
    labels = torch.tensor(sorted_names == target_names)
    return [100.0 * float(labels[:, :k].sum()) / QUERIES for k in CUTOFFS]


if __name__ == "__main__":
    main()
