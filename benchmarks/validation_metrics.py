"""Compare our validation metrics with the usual matrices of strings, at the sizes of CIRR and FashionIQ.

Random features of unit length and width 256: one per image (CLIP), or with ``--features 32`` as many as BLIP-2 has
query tokens, of which the most similar one counts. CIRR: 4,181 queries x 2,297 images, the reference removed,
Recall@1/5/10/50 and, among the 5 other images of the reference's set, Recall@1/2/3. FashionIQ: three categories,
Recall@10/50. From features to recalls; each way runs in a process of its own, which the operating system measures.

More processes only make the features, and only multiply them, since every way needs that product: by one matrix product
and, where an image has 32 features, also as the repositories of BLIP-2 models do, with a copy of the gallery for every
query of a batch. Where there is a GPU the features are on it, and products and sorting are done there, as the field's
code does it; names are compared on the CPU. This process imports no library, because those that it starts inherit its
peak.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import measure

WIDTH = 256
SIZES = {  # queries and images of each group
    "cirr": {"val": (4_181, 2_297)},
    "fashioniq": {"dress": (2_017, 3_817), "shirt": (2_038, 6_346), "toptee": (1_961, 5_373)},
}
CUTOFFS = {"cirr": (1, 5, 10, 50), "fashioniq": (10, 50)}
SUBSET_CUTOFFS = (1, 2, 3)
SUBSET = 6
FEATURES_ONLY, PRODUCT, USUAL_PRODUCT, STRINGS, OURS = (
    "features only",
    "product alone",
    "usual product",
    "string matrix",
    "ours",
)
REPEATS = 10
"""Runs in one process, of which the fastest counts: other work on the machine only ever makes one slower."""
USUAL_BATCH = {"cirr": 32, "fashioniq": 16}
"""Queries that SPRC's validation compares at once with all features of the gallery."""
USUAL_QUERIES = 512
"""Queries of each group whose usual product is measured, once, and scaled: its batches do not depend on each other."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes per way (default: 3)")
    parser.add_argument("--features", type=int, default=1, help="features per image, 1 or 32 (default: 1)")
    parser.add_argument("--dataset", choices=tuple(SIZES), help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way is not None:
        print(json.dumps(run_here(arguments.dataset, arguments.way, arguments.features)))
        return
    for dataset in SIZES:
        own = ("--dataset", dataset, "--features", str(arguments.features))
        names = (FEATURES_ONLY, PRODUCT, *((USUAL_PRODUCT,) if arguments.features > 1 else ()), STRINGS, OURS)
        ways = [(*own, "--way", name) for name in names]
        runs = measure.run_ways(__file__, ways, arguments.rounds)
        print(report(dataset, arguments.features, dict(zip(names, runs))))


def report(dataset: str, num_features: int, runs: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of a data set from the processes of each way; say so where the recalls of two ways differ."""
    sizes = ", ".join(f"{queries:,} x {images:,}" for queries, images in SIZES[dataset].values())
    ours = runs[OURS]
    lines = [
        f"{dataset}: {sizes}, {num_features} feature(s) of width {WIDTH} per image, float32, {ours[0]['device']}, "
        f"{ours[0]['threads']} torch threads; the fastest of {REPEATS} runs, medians of {len(ours)} processes",
        f"  {'':<14} {'seconds':>8} {'peak MB':>8} {'above features':>15}  recalls %",
    ]
    least = measure.median(runs[FEATURES_ONLY], "peak_bytes")
    seconds, memory = {}, {}
    for name in [way for way in runs if way != FEATURES_ONLY]:
        seconds[name], peak = measure.median(runs[name], "seconds"), measure.median(runs[name], "peak_bytes")
        memory[name] = max(peak - least, 1)
        recalls = " ".join(f"{recall:.2f}" for recall in runs[name][0]["recalls"])
        lines.append(f"  {name:<14} {seconds[name]:>8.3f} {peak / 1e6:>8,.0f} {memory[name] / 1e6:>15,.0f}  {recalls}")
    lines.append(
        f"  {STRINGS} / {OURS}: {seconds[STRINGS] / seconds[OURS]:.1f} x the time, "
        f"{memory[STRINGS] / memory[OURS]:.1f} x the memory; the product alone takes "
        f"{100 * seconds[PRODUCT] / seconds[OURS]:.0f} % of our time"
    )
    if USUAL_PRODUCT in runs:
        usual = seconds[USUAL_PRODUCT] + seconds[STRINGS] - seconds[PRODUCT]
        lines.append(
            f"  with the {USUAL_PRODUCT} in place of one: {usual / seconds[OURS]:.0f} x the time, "
            f"{max(memory[USUAL_PRODUCT], memory[STRINGS]) / memory[OURS]:.0f} x the memory"
        )
    if runs[STRINGS][0]["recalls"] != ours[0]["recalls"]:
        lines.append("  THE RECALLS DIFFER: scores closer than a float32 product can tell, or an error")
    return "\n".join(lines)


def run_here(dataset: str, way: str, num_features: int) -> dict[str, Any]:
    import torch

    import lavis_cir_plugin.ranking  # noqa: F401 (all processes carry the same libraries)

    generator = torch.Generator().manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    groups = [[part.to(device) for part in group(num_features, *size, generator)] for size in SIZES[dataset].values()]
    functions = {PRODUCT: multiply, USUAL_PRODUCT: multiply_as_usual, STRINGS: by_strings, OURS: by_ranks}
    function = functions.get(way, lambda *_: [])
    repeats, share = (1, usual_share(dataset)) if way == USUAL_PRODUCT else (REPEATS, 1.0)
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        recalls = [function(dataset, *own) for own in groups]
        if device == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return {
        "seconds": fastest / share,
        "recalls": [sum(values) / len(recalls) for values in zip(*recalls)],
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
    }


def group(num_features: int, num_queries: int, size: int, generator: Any) -> tuple[Any, ...]:
    """Draw features and the indices of targets, references and the sets of 6 images that a reference belongs to."""
    import torch

    query = torch.randn(num_queries, WIDTH, generator=generator)
    gallery = torch.randn(size, num_features, WIDTH, generator=generator).squeeze(1)
    for features in (query, gallery):
        features /= features.norm(dim=-1, keepdim=True)  # in place: a temporary copy would hide part of a peak
    reference = torch.randint(size, (num_queries,), generator=generator)
    # Like CIRR's: a set is six neighbours, and the target mostly one of them; the same images serve FashionIQ.
    members = (reference.unsqueeze(1) + torch.arange(SUBSET)) % size
    target = members[torch.arange(num_queries), torch.randint(1, SUBSET, (num_queries,), generator=generator)]
    query += gallery.reshape(size, num_features, WIDTH)[target, 0] / 4
    return query / query.norm(dim=-1, keepdim=True), gallery, target, reference, members


def multiply(dataset: str, query: Any, gallery: Any, *_: Any) -> list[float]:
    """Compute all scores once, in blocks that stay in a processor's cache as far as they can."""
    for rows in query.split(512):
        for block in gallery.flatten(0, -2).split(4_096):
            rows @ block.T
    return []


def by_ranks(dataset: str, query: Any, gallery: Any, target: Any, reference: Any, members: Any) -> list[float]:
    from lavis_cir_plugin.ranking.metrics import recall_at
    from lavis_cir_plugin.ranking.ranks import rank

    if dataset == "cirr":
        ranking = rank(query, gallery, target, excluded=reference, members=members[:, 1:], top_k=0)
    else:
        ranking = rank(query, gallery, target, top_k=0)
    recalls = [recall_at(ranking.ranks, k) for k in CUTOFFS[dataset]]
    if dataset == "cirr":
        recalls += [recall_at(ranking.subset_ranks, k) for k in SUBSET_CUTOFFS]
    return recalls


def by_strings(dataset: str, query: Any, gallery: Any, target: Any, reference: Any, members: Any) -> list[float]:
    """Sort all distances, spell all names out, and compare them with the names of reference, target and set.

    As the field's code does, it also asserts that each query has one target and, in CIRR, one in its set.
    """
    import numpy as np
    import torch

    from lavis_cir_plugin.ranking.scoring import similarity

    size = len(gallery)
    target, reference, members = target.cpu(), reference.cpu(), members.cpu()
    # As wide as the real ones: CIRR's longest name has 17 characters, and NumPy gives them all its width.
    form, width = ("dev-{}-0-img{}", 17) if dataset == "cirr" else ("B{:08}{}", 10)
    names = np.array([form.format(index // 2, index % 2) for index in range(size)], dtype=f"<U{width}")
    at_once = len(query) if gallery.dim() == 2 else 32
    scores = torch.cat([similarity(rows, gallery) for rows in query.split(at_once)])
    order = torch.argsort(1 - scores, dim=-1)
    sorted_names = names[order.cpu().numpy()]
    if dataset == "cirr":
        kept = sorted_names != np.repeat(names[reference.numpy()], size).reshape(len(query), size)
        sorted_names = sorted_names[kept].reshape(len(query), size - 1)
    columns = sorted_names.shape[1]
    labels = torch.tensor(sorted_names == np.repeat(names[target.numpy()], columns).reshape(len(query), columns))
    if not torch.equal(labels.sum(dim=-1), torch.ones(len(query), dtype=torch.int64)):
        raise ValueError("a query has no target in the gallery, or several.")
    recalls = [100.0 * int(labels[:, :k].sum()) / len(query) for k in CUTOFFS[dataset]]
    if dataset == "cirr":
        in_set = (sorted_names[..., None] == names[members.numpy()][:, None, :]).sum(-1).astype(bool)
        subset_labels = labels[in_set].reshape(len(query), SUBSET - 1)
        recalls += [100.0 * int(subset_labels[:, :k].sum()) / len(query) for k in SUBSET_CUTOFFS]
    return recalls


def usual_share(dataset: str) -> float:
    """Return which share of all pairs of a query and an image `multiply_as_usual` compares."""
    sizes = SIZES[dataset].values()
    measured = sum(min(queries, USUAL_QUERIES) * images for queries, images in sizes)
    return measured / sum(queries * images for queries, images in sizes)


def multiply_as_usual(dataset: str, query: Any, gallery: Any, *_: Any) -> list[float]:
    """Multiply the first queries, a batch at a time, with as many copies of the gallery, as `torch.matmul` takes it."""
    import torch

    features = gallery.permute(0, 2, 1)
    for rows in query[:USUAL_QUERIES].split(USUAL_BATCH[dataset]):
        torch.matmul(rows[:, None, None], features).squeeze(2).amax(dim=-1)
    return []


if __name__ == "__main__":
    sys.exit(main())
