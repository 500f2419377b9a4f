"""Time ten epochs of a training with a frozen tower under the default settings, beside an older build's defaults.

Each training runs in a process of its own, in turns, with an empty cache: this build by its defaults and without a
cache of features, and an older build, which is the folder of a checkout and runs with the libraries of the interpreter
that runs this script.

The model is a small one with random weights, whose tower costs at most as many times its head as BLIP-2's ViT-L costs
BERT-base, as the script counts it. The pictures are as many as in FashionIQ per triplet, so that the first epoch spares
nothing. Losses and weights with the cache and without must be equal bit for bit; to those of an older build the
difference is printed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

OWN = Path(__file__).resolve().parents[1]
OWN_DEFAULTS, UNCACHED = "this build", "without a cache"
LIMIT = 0.45
VIT_L = 4.8
"""Operations of BLIP-2's ViT-L, forward, in parts of those of BERT-base, forward and backward, counted as below."""
MODEL: dict[str, Any] = {
    "image_size": 98,
    "vit_precision": "fp32",
    "freeze_vit": True,
    "num_query_token": 8,
    "embed_dim": 64,
    "vit_config": {"patch_size": 14, "embed_dim": 384, "depth": 9, "num_heads": 6, "mlp_ratio": 4},
    "qformer_config": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
}
BATCH = 8
WORLD: dict[str, Any] = {
    "train_triplets": 22, "train_images": 44, "val_queries": 1, "val_images": 2, "test_queries": 1, "test_images": 2,
    "image_width": 100, "image_height": 120,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("older", nargs="?", type=Path, help="checkout of an older build to compare with")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each training (default: 1)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each training (default: 10)")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(train(*map(Path, arguments.work))))
        return 0
    print(f"tower : head = {proportion():.1f} : 1 in operations (BLIP-2's ViT-L: {VIT_L} : 1)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        project = write_project(Path(folder), arguments.epochs)
        runs = run_in_turns(project, arguments.older.resolve() if arguments.older else None, arguments.rounds)
    now, uncached = runs[OWN_DEFAULTS][0], runs[UNCACHED][0]
    is_equal = (now["losses"], now["weights"]) == (uncached["losses"], uncached["weights"])
    print(f"{len(now['losses'])} losses and all weights equal those without a cache bit for bit: {is_equal}")
    for other in list(runs)[1:]:
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(runs[OWN_DEFAULTS], runs[other]))
        difference = max(abs(float(a) - float(b)) for a, b in zip(now["losses"], runs[other][0]["losses"]))
        seconds = [measure.median(runs[way], "seconds") for way in (OWN_DEFAULTS, other)]
        print(
            f"{arguments.epochs} epochs, processor seconds: {seconds[0]:.1f}, {other} {seconds[1]:.1f}; ratio "
            f"{ratio:.3f} (aim: at most {LIMIT}); losses differ by up to {difference:.1e}"
        )
    return int(not is_equal)


def run_in_turns(project: Path, older: Path | None, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run the trainings in turns, each with a cache of its own, and return what they reported; an older build last."""
    ways = {OWN_DEFAULTS: (OWN, project), UNCACHED: (OWN, project.with_name("uncached.yaml"))}
    if older:
        ways["older build"] = (older, project)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way, (root, path) in list(ways.items())[:: 1 if number % 2 else -1]:
            with tempfile.TemporaryDirectory() as folder:
                lines: list[str] = []
                command = [sys.executable, "-W", "ignore", __file__, "--work", str(path), folder]
                measure.run(command, lines.append, {**measure.environment(root), "XDG_CACHE_HOME": folder})
                runs[way].append(json.loads(lines[-1]))
    return runs


def write_project(folder: Path, epochs: int) -> Path:
    """Draw the pictures, and write a project of defaults and one that turns the cache off."""
    from omegaconf import OmegaConf

    from lavis_cir_plugin.garments import GarmentsConfig, make_garments

    processor = {stage: {"name": "target_pad", "image_size": MODEL["image_size"]} for stage in ("train", "eval")}
    build_info = {"root": str(make_garments(folder, GarmentsConfig(**WORLD)))}
    project = {
        "model": {"arch": "blip2_cir", "model_type": "tiny", **MODEL},
        "datasets": {"fashioniq": {"build_info": build_info, "splits": ["train"], "vis_processor": processor}},
        "run": {
            "task": "composed_retrieval", "max_epoch": epochs, "batch_size_train": BATCH, "init_lr": 1e-4,
            "num_workers": 0, "device": "cpu", "train_splits": ["train"], "valid_splits": [], "test_splits": [],
        },
    }  # fmt: skip
    for name, run in (("uncached", {"feature_cache": False}), ("default", {})):
        path = folder / f"{name}.yaml"
        OmegaConf.save({**project, "run": {**project["run"], **run}}, path)
    return path


def train(project: Path, folder: Path) -> dict[str, Any]:
    """Train with the build on Python's path, and return what it took and what came out."""
    import torch

    import lavis_cir_plugin  # noqa: F401 (registers models and tasks)

    try:
        launcher = importlib.import_module("lavis_cir_plugin.training.launcher")
    except ImportError:  # a build of 0.4
        launcher = importlib.import_module("lavis_cir_plugin.launcher")
    start = time.process_time()
    launcher.main("train", ["--cfg-path", str(project), "--options", f"run.output_dir={folder / 'output'}"])
    seconds = time.process_time() - start
    (run,) = (path.parent for path in folder.glob("output/*/checkpoint_last.pth"))
    with (run / "steps.csv").open(newline="") as file:
        losses = [row["loss"] for row in csv.DictReader(file)]
    digest = hashlib.sha256()
    for name, weight in sorted(torch.load(run / "checkpoint_last.pth", weights_only=True)["model"].items()):
        digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    return {"seconds": seconds, "losses": losses, "weights": digest.hexdigest()}


def proportion() -> float:
    """Return the operations of the tower, forward, in parts of the head's, forward and backward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lavis_cir_plugin.garments import words
    from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir

    model = Blip2Cir(tokenizer="blip2_cir_tiny_vocab.txt", **MODEL).train()
    generator = random.Random(0)
    pictures = torch.randn(2, 3, MODEL["image_size"], MODEL["image_size"])
    samples = {
        "image": pictures,
        "target": pictures,
        "text_input": [" ".join(generator.choices(words(), k=12)) for _ in range(2)],
        "target_id": torch.arange(2),
    }
    with FlopCounterMode(display=False) as tower:
        model.image_features(torch.cat([pictures, pictures]))
    with FlopCounterMode(display=False) as step:
        model(samples)["loss"].backward()
    whole, own = float(step.get_total_flops()), float(tower.get_total_flops())
    return own / (whole - own)


if __name__ == "__main__":
    raise SystemExit(main())
