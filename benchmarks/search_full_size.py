"""Search at its full size: build, memory, disk and latency of indexes of drawn features, and recall against exact.

Features lie around drawn centres, so that candidates have something to find, as pictures of one kind do: real recall
may be lower, and every index says its own. Reading and encoding of pictures are left out; everything else is what
``lavis-cir index`` and ``search`` do. Ratios compare times of one process on one machine. Each step runs in a process
of its own, whose memory is what it has itself (RssAnon), without pages of mapped files, which the system takes back
when it wants. Ratios have an aim in the first shape alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

WIDTH, TOP, QUERIES, CENTRES = 256, 50, 20, 1000
GIB = 2**30
SHAPES = ("100000x32", "1000000x1", "300000x32")
ADDED, SAME = 100, 2000
OTHERS = 300_000
"""Feature vectors beside those of the equal pictures; of fewer, an index looks at all."""

STEPS = ("build", "add", "search", "same")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), help="pictures x features (default: all three)")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's)")
    parser.add_argument("--candidates", default="auto", help="auto, always or none (default: auto, where they pay)")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(run_here(arguments.step, arguments.folder, arguments.shapes[0], arguments.candidates)))
        return 0
    failures = 0
    for shape in arguments.shapes:
        pictures, features = sizes(shape)
        needed = 4 * pictures * features * WIDTH
        free = shutil.disk_usage(arguments.folder or tempfile.gettempdir()).free
        if free < needed:
            print(f"{shape} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; name another --folder")
            return 1
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            common = ["--folder", folder, "--shapes", shape, "--candidates", arguments.candidates]
            results = {}
            for step in STEPS:
                (results[step],) = measure.run_ways(__file__, [["--step", step, *common]], 1)[0]
        failures += report(shape, results)
    return int(failures > 0)


def sizes(shape: str) -> tuple[int, int]:
    pictures, _, features = shape.partition("x")
    return int(pictures), int(features)


def report(shape: str, results: dict[str, dict[str, Any]]) -> int:
    """Print a shape's figures, each with its aim; return how many aims were missed."""
    build, add, search, same = (results[step] for step in STEPS)
    figures: list[tuple[str, float, str, float | None]] = [
        ("memory while searching, GiB", search["anon_bytes"] / GIB, "<=", 2.0),
        ("opening, s", search["open"], "<=", 0.2),
        ("recall@50, the lower one of without and with the filter", search["recall"], ">=", 0.99),
        ("of 2,000 equal pictures found", same["found"], ">=", SAME),
    ]
    ratios = [
        ("warm search, its time / the exact scan's", search["warm"] / search["exact"], 0.1),
        ("the same with a filter of 1 %", search["filtered"] / search["exact"], 0.1),
        ("adding 100, its time / the build's", add["seconds"] / build["seconds"], 0.02),
    ]
    figures += [(name, value, "<=", aim if shape == SHAPES[0] else None) for name, value, aim in ratios]
    parts = [
        f"built in {build['seconds']:.0f} s ({build['peak_bytes'] / GIB:.2f} GiB at most)",
        f"{build['disk'] / 1e9:.2f} GB on disk",
        f"exact scan {search['exact']:.3f} s",
        f"warm search {search['warm']:.3f} s {'with' if search['has_candidates'] else 'without'} candidates",
        f"with a filter of 1 % {search['filtered']:.3f} s",
        f"first search {search['first']:.3f} s",
        f"100 added in {add['seconds']:.2f} s",
    ]
    print(f"{shape}: {', '.join(parts)}", flush=True)
    missed = 0
    for name, value, sign, aim in figures:
        is_met = aim is None or (value <= aim if sign == "<=" else value >= aim)
        missed += not is_met
        note = "" if aim is None else f" (aim {sign} {aim:g})"
        print(f"  {name}: {value:.4g}{note}{'' if is_met else ' MISSED'}", flush=True)
    return missed


def run_here(step: str, folder: Path, shape: str, candidates: str) -> dict[str, Any]:
    """Run one step in this process."""
    import lavis_cir_plugin.search.build  # noqa: F401 (before any time is taken)

    pictures, features = sizes(shape)
    out = folder / "index"
    if step == "build":
        start = time.perf_counter()
        drawn = write_index(out, range(pictures), features, candidates)
        disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return {"seconds": time.perf_counter() - start - drawn, "disk": disk}
    if step == "add":
        start = time.perf_counter()
        drawn = write_index(out, range(pictures + ADDED), features, candidates, range(pictures, pictures + ADDED))
        return {"seconds": time.perf_counter() - start - drawn}
    if step == "same":
        return equal_pictures(folder / "same", features)
    return searched(out, pictures, features)


def drawn_features(rows: range, features: int) -> Any:
    """Return unit features ``(n, features, WIDTH)`` float16 of some pictures, the same whatever the block."""
    import torch
    import torch.nn.functional as F  # noqa: N812 (the name everybody knows)

    centres = torch.randn(CENTRES, WIDTH, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + rows.start)
    chosen = centres[torch.randint(CENTRES, (len(rows),), generator=generator)].unsqueeze(1)
    own = torch.randn(len(rows), 1, WIDTH, generator=generator)
    each = torch.randn(len(rows), features, WIDTH, generator=generator)
    return F.normalize(chosen + own + each, dim=2).half().numpy()


def synthetic_encoder() -> Any:
    """Return an encoder whose texts are numbers of queries, each between two new pictures; "same" is picture 0's."""
    import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
    from torch import from_numpy

    from lavis_cir_plugin.search import Encoder

    class Synthetic(Encoder):
        identity = {"architecture": "drawn"}  # noqa: RUF012 (in place of the property)

        def query(self, pictures: Any, text: str | None, image_weight: float = 0.5) -> Any:
            start = 0 if text == "same" else 10**9 + int(text or 0)
            pair = from_numpy(drawn_features(range(start, start + (1 if text == "same" else 2)), 1)).float()
            return F.normalize(pair.sum(dim=(0, 1)), dim=0).unsqueeze(0)

    return Synthetic(None, str)


def write_index(
    out: Path, pictures: range, features: int, candidates: str, new: range | None = None, same: int = 0
) -> float:
    """Write an index by the parts that ``lavis-cir index`` writes one by; return the seconds that drawing took.

    Args:
        out: Its folder.
        pictures: All numbers of pictures that it shall have.
        features: Of a picture.
        candidates: As of `build_index_folder`.
        new: The numbers that it does not have yet; by default all.
        same: So many of the first pictures have features of their own content that are equal.
    """
    import numpy as np

    from lavis_cir_plugin.search import build
    from lavis_cir_plugin.search.catalogue import Read
    from lavis_cir_plugin.search.features import LOOK
    from lavis_cir_plugin.search.folders import Scan, Signature

    rng = np.random.default_rng(0)
    sizes_in_bytes = rng.integers(0, 100_000, pictures.stop).tolist()

    def path(number: int) -> str:
        return f"/drawn/{number:08d}.png"

    new, drawing, at_once = pictures if new is None else new, 0.0, 4096
    writer = build._Writer(out, synthetic_encoder())
    try:
        part = build._Part.create(out)
        for start in range(new.start, new.stop, at_once):
            rows = range(start, min(start + at_once, new.stop))
            begin = time.perf_counter()
            drawn = drawn_features(rows, features)
            looks = rng.integers(0, 255, (len(rows), *LOOK), dtype=np.uint8)
            drawing += time.perf_counter() - begin
            if same:
                drawn[: max(0, same - start)] = drawn_features(range(1), 1)[0]
            reads = [
                Read(
                    path(n),
                    Signature(sizes_in_bytes[n], 0, 0),
                    1,
                    hashlib.sha256(str(n).encode()).digest(),
                    row,
                    8,
                    8,
                    "",
                )
                for row, n in enumerate(rows)
            ]
            part.add(reads, drawn, looks)
        part.close()
        writer.scanned, writer.folders, writer.forget, writer.todo = ["/drawn"], ["/drawn"], [], []
        writer.scan = Scan({path(n): Signature(sizes_in_bytes[n], 0, 0) for n in pictures})
        writer.finish(None, candidates)
    finally:
        writer.close()
    return drawing


def content_of(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def searched(out: Path, pictures: int, features: int) -> dict[str, Any]:
    """Ask the questions of one index without filter and with one of 1 %, exactly and not."""
    from lavis_cir_plugin.search import open_index

    encoder = synthetic_encoder()
    start = time.perf_counter()
    index = open_index(out, encoder)
    opened = time.perf_counter() - start
    filtered = {"where": "file_bytes < 1000"}
    start = time.perf_counter()
    index.search(text="0", k=TOP)
    first = time.perf_counter() - start
    numbers = [str(number) for number in range(QUERIES)]
    exact, exact_hits = asked(index, numbers[:5], exact=True)
    warm, hits = asked(index, numbers)
    with_filter, filtered_hits = asked(index, numbers, **filtered)
    _, exact_filtered = asked(index, numbers[:5], exact=True, **filtered)
    return {
        "open": opened,
        "first": first,
        "exact": exact,
        "warm": warm,
        "filtered": with_filter,
        "recall": min(recall(hits, exact_hits), recall(filtered_hits, exact_filtered)),
        "anon_bytes": anonymous_bytes(),
        "has_candidates": bool(index.manifest.candidates),
    }


def asked(index: Any, numbers: list[str], **settings: Any) -> tuple[float, list[set[int]]]:
    """Return the median seconds of the questions, each asked twice, and the ids that they found."""
    seconds, found = [], []
    for number in numbers:
        index.search(text=number, k=TOP, **settings)
        start = time.perf_counter()
        answer = index.search(text=number, k=TOP, **settings)
        seconds.append(time.perf_counter() - start)
        found.append({hit.picture.id for hit in answer.hits})
    return statistics.median(seconds), found


def recall(found: list[set[int]], exact: list[set[int]]) -> float:
    return statistics.mean(len(one & other) / len(other) for one, other in zip(found, exact))


def equal_pictures(out: Path, features: int) -> dict[str, Any]:
    """Count how many of 2,000 pictures with equal features a search for as many finds, beside many others."""
    from lavis_cir_plugin.search import open_index

    others = max(4 * SAME, OTHERS // features)
    write_index(out, range(SAME + others), features, "always", same=SAME)
    answer = open_index(out, synthetic_encoder()).search(text="same", k=SAME, fold=False)
    equal = {hit.picture.id for hit in answer.hits if int(Path(hit.path).stem) < SAME}
    return {"found": len(equal), "is_exact": answer.is_exact}


def anonymous_bytes() -> int:
    """Return the memory that is this process's own; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
