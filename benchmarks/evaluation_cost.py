"""Time the evaluation of CIRR's and FashionIQ's validation splits, beside one that encodes each reference again.

Each evaluation runs in a process of its own, in turns. An older build is the folder of a checkout; it runs with the
libraries of the interpreter that runs this script. Without one, this build runs with a model that hides its image tower
and so encodes again.

The splits have a tenth of their pictures and queries, and the model is a small one with random weights whose tower
costs about as many times its head as BLIP-2's ViT-L or ViT-g costs BERT-base; the script counts its operations, and
the ratio that they alone would give. Its recall means nothing, but it must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

OWN = Path(__file__).resolve().parents[1]
SHAPES = {"CIRR": (230, 418, 0.40), "FashionIQ": (1554, 602, 0.75)}
"""Pictures and query texts of a tenth of each validation split, and how much of the older time it may take."""
WIDTHS = {"ViT-L": (128, "13.6 : 1 and 10.9 : 1"), "ViT-g": (64, "41 : 1 and 32 : 1")}
"""Width of the small head by BLIP-2's tower, and the tower's proportion there to BERT-base for a picture of the gallery
and for a query; that of ViT-L is counted as below, that of ViT-g by hand."""
BATCH, PIXELS = 32, 98


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("older", nargs="?", type=Path, help="checkout of an older build to compare with")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each evaluation (default: 1)")
    parser.add_argument("--modes", nargs="+", default=["multimodal"], help="kinds of queries (default: multimodal)")
    parser.add_argument("--vit", choices=WIDTHS, default="ViT-L", help="tower of the proportions (default: ViT-L)")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(evaluate(**json.loads(arguments.work))))
        return 0
    costs = operations(arguments.vit)
    print(
        f"tower : head = {1 / costs[0]:.1f} : 1 for a picture of the gallery and {1 / costs[1]:.1f} : 1 for a query "
        f"(BLIP-2's {arguments.vit}: {WIDTHS[arguments.vit][1]})"
    )
    agree = True
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), max(pictures for pictures, _, _ in SHAPES.values()))
        for shape, (_, _, limit) in SHAPES.items():
            agree &= compare(shape, limit, costs, Path(folder), arguments)
    return int(not agree)


def compare(shape: str, limit: float, costs: tuple[float, float], folder: Path, arguments: argparse.Namespace) -> float:
    """Run both ways in turns, print what they took and whether they agree, and return the ratio of their times."""
    older = arguments.older.resolve() if arguments.older else None
    ways = {"once": (OWN, False), "again": (older or OWN, older is None)}
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(arguments.rounds):
        for way, (root, hides_tower) in list(ways.items())[:: 1 if number % 2 else -1]:
            work = {"shape": shape, "folder": str(folder), "modes": arguments.modes, "vit": arguments.vit}
            lines: list[str] = []
            env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
            command = [
                sys.executable,
                "-W",
                "ignore",
                __file__,
                "--work",
                json.dumps({**work, "hides_tower": hides_tower}),
            ]
            measure.run(command, lines.append, env)
            runs[way].append(json.loads(lines[-1]))
    now, before = runs["once"][0], runs["again"][0]
    ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs["once"], runs["again"]))
    seconds = {way: measure.median(own, "seconds") for way, own in runs.items()}
    pictures, queries, _ = SHAPES[shape]
    heads = costs[0] * pictures + costs[1] * queries
    counted = f", {(now['passes'] + heads) / (before['passes'] + heads):.3f} by operations" * (
        len(arguments.modes) == 1
    )
    differences = [abs(a - b) for mode in now["values"] for a, b in zip(now["values"][mode], before["values"][mode])]
    print(
        f"{shape}, {' + '.join(arguments.modes)}: {seconds['once']:.1f} s of processor time, "
        f"{'older build' if older else 'encoding again'} {seconds['again']:.1f} s, ratio {ratio:.3f}{counted} (aim: "
        f"at most {limit:.2f}); tower passes {now['passes']:,} and {before['passes']:,}\n"
        f"  metrics equal: {now['metrics'] == before['metrics']}, ranks equal: {now['ranks'] == before['ranks']}, "
        f"gallery equal bit for bit: {now['gallery'] == before['gallery']}, query vectors: "
        f"{now['queries'] == before['queries'] or f'differ by up to {max(differences):.1e}'}",
        flush=True,
    )
    return bool(now["metrics"] == before["metrics"] and now["ranks"] == before["ranks"])


def draw(folder: Path, count: int) -> None:
    """Write pictures of CIRR's kind of proportions with random colours."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((160, 120), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")


def build(vit: str) -> Any:
    """Return the same model each time."""
    import torch
    from lavis.common.registry import registry

    import lavis_cir_plugin  # noqa: F401 (registers the model)

    torch.manual_seed(0)
    width = WIDTHS[vit][0]
    return registry.get_model_class("blip2_cir")(
        vit_precision="fp32",
        tokenizer="blip2_cir_tiny_vocab.txt",
        image_size=PIXELS,
        embed_dim=64,
        vit_config={"patch_size": 14, "embed_dim": 256, "depth": 12, "num_heads": 4, "mlp_ratio": 4},
        qformer_config={
            "hidden_size": width, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 4 * width
        },
    ).eval()  # fmt: skip


def texts(count: int) -> list[str]:
    """Return sentences of 5 to 9 words, as short beside the head's queries as captions are in BLIP-2."""
    from lavis_cir_plugin.garments import words

    generator, known = random.Random(0), words()
    return [" ".join(generator.choices(known, k=generator.randint(5, 9))) for _ in range(count)]


def operations(vit: str) -> tuple[float, float]:
    """Return the operations of the head for a picture of the gallery and for a query, in parts of the tower's."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model = build(vit).requires_grad_(False)
    with FlopCounterMode(display=False) as tower:
        tokens = model.image_features(torch.randn(2, 3, PIXELS, PIXELS))
    with FlopCounterMode(display=False) as target:
        model.encode_target(tokens)
    with FlopCounterMode(display=False) as query:
        model.encode_query({"image": tokens, "text_input": texts(2)})
    return target.get_total_flops() / tower.get_total_flops(), query.get_total_flops() / tower.get_total_flops()


def evaluate(shape: str, folder: str, modes: list[str], vit: str, hides_tower: bool) -> dict[str, Any]:
    """Rank a shape's queries with the build on Python's path, and return what it took and what came out."""
    import torch
    from lavis.common.registry import registry
    from torch.utils.data import DataLoader

    model = build(vit)
    vectors: dict[str, list[torch.Tensor]] = {mode: [] for mode in modes}
    encode, passes = model.encode_query, 0

    def encode_query(samples: Any, mode: str) -> torch.Tensor:
        vectors[mode].append(encode(samples, mode))
        return vectors[mode][-1]

    def count(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal passes
        passes += len(inputs[0])

    model.encode_query = encode_query
    model.visual_encoder.register_forward_pre_hook(count)
    task, dataset = registry.get_task_class("composed_retrieval")(), make_dataset(shape, Path(folder))
    registry.register_path("output_dir", folder)
    loader = DataLoader(dataset, batch_size=BATCH, collate_fn=dataset.collater)
    shown = Encoders(model) if hides_tower else model
    start = time.process_time()
    with torch.no_grad():
        evaluation = task.evaluation(shown, loader, cuda_enabled=False)
        rankings = {mode: evaluation.rankings(mode) for mode in modes}
    seconds = time.process_time() - start
    flat = {mode: torch.cat(found) for mode, found in vectors.items()}
    return {
        "seconds": seconds,
        "passes": passes,
        "metrics": {mode: dataset.benchmark.metrics(found) for mode, found in rankings.items()},
        "ranks": {mode: found["all"].ranks.tolist() for mode, found in rankings.items()},
        "gallery": checksum(evaluation.gallery),
        "queries": {mode: checksum(found) for mode, found in flat.items()},
        "values": {mode: found.flatten().tolist() for mode, found in flat.items()},
    }


def make_dataset(shape: str, folder: Path) -> Any:
    """Return a benchmark of a shape: one gallery, and one text per query; with CIRR each picture is a reference."""
    from lavis.common.registry import registry

    try:
        from lavis_cir_plugin.benchmarks.types import Benchmark, Group, Query
        from lavis_cir_plugin.data.benchmark_datasets import BenchmarkDataset
    except ImportError:  # a build of 0.4
        from lavis_cir_plugin.benchmarks.benchmark import Benchmark, Group, Query
        from lavis_cir_plugin.datasets import BenchmarkDataset

    count, number, _ = SHAPES[shape]
    names = [str(index) for index in range(count)]
    generator = random.Random(1)
    references = [*names, *generator.choices(names, k=number)][:number] if number > count else names[:number]
    generator.shuffle(references)
    queries = tuple(
        Query(reference, (text,), generator.choice(names)) for reference, text in zip(references, texts(number))
    )
    group = Group("all", tuple(names), queries, reference_removed=shape == "CIRR")
    paths = {name: folder / f"{name}.jpg" for name in names}
    benchmark = Benchmark(shape, "val", (group,), paths, "no protocol", recalls, "recall at 10")
    processor = registry.get_processor_class("target_pad")(image_size=PIXELS)
    return BenchmarkDataset(benchmark, processor, str)


def recalls(rankings: Any) -> dict[str, float]:
    ranks = rankings["all"].ranks
    return {f"recall at {k}": float((ranks < k).double().mean()) for k in (1, 10, 50)}


def checksum(tensor: Any) -> str:
    import hashlib

    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


class Encoders:
    """A model that shows its encoders and not its tower."""

    def __init__(self, model: Any) -> None:
        self.encode_query, self.encode_target, self.device = model.encode_query, model.encode_target, model.device


if __name__ == "__main__":
    raise SystemExit(main())
