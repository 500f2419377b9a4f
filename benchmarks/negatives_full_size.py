"""Mine hard negatives among FashionIQ's training images in their number: processor time, memory, recall.

10,000 queries x 46,609 images x 32 features of width 256 (float32, 1.5 GB, drawn around centres as circo_full_size.py
does): the index is built, then every query mined by the default rules; and some queries are mined exactly beside it.
Each in a process of its own, which the operating system measures. This process imports no library, because those that
it starts inherit its peak.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import circo_full_size
import measure

IMAGES, QUERIES, EXACT = 46_609, 10_000, 500
UNITS = ("seconds", "CPU seconds")
LIMIT = 60.0
"""Seconds of processor time for 10,000 queries."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES, help=f"training images (default: {IMAGES})")
    parser.add_argument("--queries", type=int, default=QUERIES, help=f"triplets (default: {QUERIES})")
    parser.add_argument("--exact", type=int, default=EXACT, help=f"of these mined exactly as well (default: {EXACT})")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step is not None:
        print(json.dumps(run_here(arguments)))
        return 0

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        common = ["--folder", folder, "--images", str(arguments.images), "--queries", str(arguments.queries)]
        results = {}
        for step in ("draw", "exact", "auto"):
            way = ["--step", step, *common, "--exact", str(arguments.exact)]
            (results[step],) = measure.run_ways(__file__, [way], 1)[0]
            print(circo_full_size.line(step, results[step]), flush=True)
    wall, cpu = (sum(results["auto"][f"{part} {kind}"] for part in ("build", "mine")) for kind in UNITS)
    allowed = LIMIT * arguments.queries / QUERIES
    verdict = "within" if cpu < allowed else "ABOVE"
    print(f"index and negatives: {cpu:.1f} s of processor time, {verdict} {allowed:.0f}; {wall:.1f} s")
    return int(cpu >= allowed)


def run_here(arguments: argparse.Namespace) -> dict[str, float]:
    if arguments.step == "draw":
        return circo_full_size.draw(arguments.folder, arguments.images, arguments.queries)
    queries = arguments.exact if arguments.step == "exact" else arguments.queries
    return mine_all(arguments.step, arguments.folder, arguments.images, queries)


def mine_all(kind: str, folder: Path, images: int, queries: int) -> dict[str, float]:
    """Mine for queries that lie around a feature of their right image, as those of a trained model do."""
    import numpy as np
    import torch
    import torch.nn.functional as F  # noqa: N812

    from lavis_cir_plugin.methods.retrieval_dpo.mining import MiningSettings, mine, mining_index
    from lavis_cir_plugin.ranking.index import recall_against_exact

    noise, gallery = circo_full_size.read(folder, images)
    gallery = gallery.float()
    targets = torch.randint(images, (len(noise),), generator=torch.Generator().manual_seed(0))[:queries]
    query = F.normalize(gallery[targets, 0] + noise[:queries], dim=-1)
    settings = MiningSettings(index=kind)
    none = torch.full((queries, 1), -1)

    start = time.perf_counter(), time.process_time()
    index = mining_index(gallery, settings)
    built = time.perf_counter(), time.process_time()
    negatives = mine(query, index, targets, none, settings).negatives
    done = time.perf_counter(), time.process_time()
    result = {
        "build seconds": built[0] - start[0],
        "build CPU seconds": built[1] - start[1],
        "mine seconds": done[0] - built[0],
        "mine CPU seconds": done[1] - built[1],
        "negatives each": float((negatives >= 0).float().sum(dim=1).mean()),
    }
    if kind == "exact":
        np.save(folder / "exact.npy", negatives.numpy())
        return result
    exact = torch.from_numpy(np.load(folder / "exact.npy"))
    return {**result, "recall %": recall_against_exact(negatives[: len(exact)], exact)}


if __name__ == "__main__":
    sys.exit(main())
