"""Rank a gallery of CIRCO's size from a file of half-precision features: seconds and peak memory, exactly and by FAISS.

800 queries x 123,403 images x 32 features of width 256: 2 GB of float16, drawn in blocks around 1,000 centres so that
approximate indexes have something to find, written to a temporary folder and removed at the end. Every kind of search
runs in a process of its own, which the operating system measures; pages of the mapped file count as its memory. This
process imports no library, because those that it starts inherit its peak.

A graph (hnsw) of all 3.9 million vectors takes hours to build on few cores: run it alone and smaller, with
``--kinds hnsw --images 5000``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

IMAGES, QUERIES, FEATURES, WIDTH = 123_403, 800, 32, 256
TOP = 50
CENTRES = 1_000
GIB = 2**30
LIMIT = 6 * GIB
GALLERY, QUERY = "gallery.f16", "query.f32"
"""Files of the drawn features."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES, help=f"gallery size (default: {IMAGES})")
    parser.add_argument("--queries", type=int, default=QUERIES, help=f"number of queries (default: {QUERIES})")
    parser.add_argument("--kinds", nargs="*", default=["flat", "ivf"], help="FAISS indexes (default: flat ivf)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step is not None:
        print(json.dumps(run_here(arguments.step, arguments.folder, arguments.images, arguments.queries)))
        return 0

    needed = 2 * arguments.images * FEATURES * WIDTH
    free = shutil.disk_usage(arguments.folder or tempfile.gettempdir()).free
    if free < 2 * needed:
        print(f"the features need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; name another --folder")
        return 1
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        common = ["--folder", folder, "--images", str(arguments.images), "--queries", str(arguments.queries)]
        steps = ["draw", "rank", *arguments.kinds]
        results = {}
        for step in steps:
            (results[step],) = measure.run_ways(__file__, [["--step", step, *common]], 1)[0]
            print(line(step, results[step]), flush=True)
    peak = results["rank"]["peak_bytes"]
    print(f"exact ranking: {peak / GIB:.2f} GiB, {'within' if peak < LIMIT else 'ABOVE'} {LIMIT // GIB} GiB")
    return int(peak >= LIMIT)


def line(step: str, result: dict[str, Any]) -> str:
    numbers = ", ".join(f"{name} {value:,.2f}" for name, value in result.items() if name != "peak_bytes")
    return f"{step:<6} {numbers}, peak {result['peak_bytes'] / GIB:.2f} GiB"


def run_here(step: str, folder: Path, images: int, queries: int) -> dict[str, float]:
    if step == "draw":
        return draw(folder, images, queries)
    query, gallery = read(folder, images)
    return rank_all(folder, query, gallery) if step == "rank" else search(step, folder, query, gallery)


def draw(folder: Path, images: int, queries: int) -> dict[str, float]:
    """Write features: an image belongs to a centre, which most of its features lie around, each its own way."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(shape, generator=generator), dim=-1)

    centres = unit(CENTRES, WIDTH)
    with (folder / GALLERY).open("wb") as file:
        for first in range(0, images, 1024):
            count = min(1024, images - first)
            own = centres[torch.randint(CENTRES, (count,), generator=generator)].unsqueeze(1)
            file.write(F.normalize(own + unit(count, FEATURES, WIDTH), dim=-1).half().numpy().tobytes())
    query = F.normalize(centres[torch.randint(CENTRES, (queries,), generator=generator)] + unit(queries, WIDTH), dim=-1)
    (folder / QUERY).write_bytes(query.numpy().tobytes())
    return {"seconds": time.perf_counter() - start, "GB": (folder / GALLERY).stat().st_size / 1e9}


def read(folder: Path, images: int) -> tuple[Any, Any]:
    """Return the queries, and the gallery mapped from its file."""
    import numpy as np
    import torch

    gallery = np.memmap(folder / GALLERY, np.float16, "c", shape=(images, FEATURES, WIDTH))
    return torch.from_numpy(np.fromfile(folder / QUERY, np.float32)).view(-1, WIDTH), torch.from_numpy(gallery)


def rank_all(folder: Path, query: Any, gallery: Any) -> dict[str, float]:
    import numpy as np
    import torch

    from lavis_cir_plugin.ranking.ranks import rank

    start = time.perf_counter()
    top = rank(query, gallery, torch.full((len(query),), -1), top_k=min(TOP, len(gallery))).top
    seconds = time.perf_counter() - start
    np.save(folder / "exact.npy", top.numpy())
    return {"seconds": seconds, "threads": torch.get_num_threads()}


def search(kind: str, folder: Path, query: Any, gallery: Any) -> dict[str, float]:
    import numpy as np
    import torch

    from lavis_cir_plugin.ranking.index import build_index, recall_against_exact

    exact = torch.from_numpy(np.load(folder / "exact.npy"))
    start = time.perf_counter()
    index = build_index(kind, gallery)
    built = time.perf_counter()
    found = index.search(query, exact.shape[1])[1]
    seconds = time.perf_counter() - built
    return {"build seconds": built - start, "search seconds": seconds, "recall %": recall_against_exact(found, exact)}


if __name__ == "__main__":
    sys.exit(main())
