"""Measure what each weight perturbation costs beside a plain training step, side by side in one process.

On a CPU the model is a small one whose frozen tower costs as many times its head as in BLIP-2 (the script counts both);
on a GPU it is BLIP-2's own size with random weights. The variants take turns, so that a slow minute of the machine
meets all of them; printed are medians over the rounds, and of the ratios within a round.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode

from lavis_cir_plugin.data.resumable_loader import EpochLoader, training_loader
from lavis_cir_plugin.garments import words
from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.methods.wrf4cir.runner import RunnerWrf4Cir

PLAIN = "plain"
EXACT = WeightPerturbation()
# Settings (None: no perturbation at all), whether frozen modules are remembered, whether features are cached.
VARIANTS: dict[str, tuple[WeightPerturbation | None, bool, bool]] = {
    PLAIN: (None, True, False),
    "gamma 0": (WeightPerturbation(gamma=0), True, False),
    "WRF, naive two passes": (EXACT, False, False),
    "WRF, frozen tower once": (EXACT, True, False),
    "WRF, every 5th step": (WeightPerturbation(every=5), True, False),
    "random": (WeightPerturbation(direction="random"), True, False),
    "momentum": (WeightPerturbation(direction="momentum", gamma=0.015), True, False),
    "plain, cached features": (None, True, True),
    "WRF, cached features": (EXACT, True, True),
}
# Tower and head in the proportion of BLIP-2's ViT-g and BERT-base.
SMALL = {
    "vit_precision": "fp32",
    "image_size": 98,
    "num_query_token": 10,
    "embed_dim": 64,
    "vit_config": {"patch_size": 14, "embed_dim": 640, "depth": 12, "num_heads": 10, "mlp_ratio": 4},
    "qformer_config": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
}
FASHIONIQ_TRIPLETS, FASHIONIQ_EPOCHS = 18_000, 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--batch-size", type=int, default=128 if on_gpu else 8)
    parser.add_argument("--rounds", type=int, default=200 if on_gpu else 15)
    args = parser.parse_args()

    device = torch.device("cuda" if on_gpu else "cpu")
    settings: dict[str, Any] = {} if on_gpu else SMALL
    model = build(settings, device)
    samples = batch(args.batch_size, settings.get("image_size", 224), device)
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"blip2_cir, {where}, batch {args.batch_size}, {args.rounds} interleaved rounds")
    if not on_gpu:
        print(
            f"frozen tower : head, forward and backward = {proportion(model, samples):.1f} : 1 in operations "
            f"(BLIP-2: {blip2_proportion(args.batch_size):.1f} : 1)"
        )
    with tempfile.TemporaryDirectory() as folder:
        cached = with_cached_features(model, samples, Path(folder))
        steps = {name: make_step(*variant, model, samples, cached, device) for name, variant in VARIANTS.items()}
        seconds, peaks = measure_in_turns(steps, args.rounds, device)
    show(seconds, peaks)
    if on_gpu:
        hours = {name: FASHIONIQ_TRIPLETS // args.batch_size * FASHIONIQ_EPOCHS * statistics.median(times) / 3600
                 for name, times in seconds.items()}  # fmt: skip
        print(f"\n{FASHIONIQ_EPOCHS} epochs of FashionIQ ({FASHIONIQ_TRIPLETS:,} triplets), extrapolated, in hours:")
        print("\n".join(f"  {name:<24} {value:>7.2f}" for name, value in hours.items()))
    print(f"\nrunner_wrf4cir at gamma 0 against LAVIS's bare loop: {loop_cost():.3f} x (tiny model, CPU)")


def build(settings: dict[str, Any], device: torch.device) -> Blip2Cir:
    """Return the same model each time: random weights, a frozen tower."""
    torch.manual_seed(0)
    return Blip2Cir(**{**settings, "tokenizer": "blip2_cir_tiny_vocab.txt"}).to(device).train()


def batch(size: int, image_size: int, device: torch.device) -> dict[str, Any]:
    """Return random pictures and texts of FashionIQ's mean length, as LAVIS's loop hands them over."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    pictures = {key: torch.randn(size, 3, image_size, image_size, generator=generator) for key in ("image", "target")}
    return {
        **{key: value.to(device) for key, value in pictures.items()},
        "text_input": [" ".join(rng.choices(words(), k=12)) for _ in range(size)],
        "target_id": torch.arange(size, device=device),
        "epoch": 0,
    }


def proportion(model: Blip2Cir, samples: dict[str, Any]) -> float:
    """Return the floating-point operations of the tower divided by those of everything else in a plain step."""
    with FlopCounterMode(display=False) as tower, torch.no_grad():
        model.image_features(torch.cat([samples["image"], samples["target"]]))
    with FlopCounterMode(display=False) as step:
        model(samples)["loss"].backward()
    model.zero_grad()
    return tower.get_total_flops() / (step.get_total_flops() - tower.get_total_flops())


def blip2_proportion(batch_size: int) -> float:
    """Return :func:`proportion` of BLIP-2, counted on tensors that have shapes and no values."""
    device = torch.device("cpu")
    model = build({"vit_precision": "fp32"}, device)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return proportion(model, batch(batch_size, 224, device))


def with_cached_features(model: Blip2Cir, samples: dict[str, Any], folder: Path) -> Callable[[], dict[str, Any]]:
    """Return a function that reads the batch's features from a memory-mapped file, as a cached data set does."""
    with torch.no_grad():
        features = model.image_features(torch.cat([samples["image"], samples["target"]]))
    kept = torch.from_file(
        str(folder / "features.bin"), shared=True, size=features.numel(), dtype=features.dtype
    ).view_as(features.cpu())
    kept.copy_(features)
    names = ("image", "target")

    def read() -> dict[str, Any]:
        rows = kept.clone().to(features.device)
        return {**samples, **dict(zip(names, rows.chunk(2)))}

    return read


def make_step(
    settings: WeightPerturbation | None,
    remembers: bool,
    is_cached: bool,
    model: Blip2Cir,
    samples: dict[str, Any],
    cached: Callable[[], dict[str, Any]],
    device: torch.device,
) -> Callable[[], None]:
    """Return one training step, in the order of LAVIS's loop, with an optimizer of its own.

    All variants train the same model: two copies of one differ by as much as 5 % for where they lie in memory.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.05)
    call: Callable[..., Any] = model
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    if settings is not None:
        optimizer = PerturbingOptimizer(optimizer, model, settings)
        call = optimizer.perturb(model, scaler.get_scale)
        if not remembers:
            call.memo.modules = []

    def step() -> None:
        with torch.autocast(device.type, enabled=device.type == "cuda", dtype=torch.float16):
            loss = call(cached() if is_cached else dict(samples))["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()  # LAVIS reads it every step, which waits for the GPU

    return step


def measure_in_turns(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return the seconds of each step in each round, and on a GPU the most memory it took above what it began with.

    The five rounds before the first only warm up, and in them memory is measured; after as many as the longest cycle
    of a variant, each has met each of its kinds of steps.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, 0)
    for number in range(rounds + 5):
        # In another order each time: what a variant leaves in the processor's caches is not always the same one's gain.
        for name, run_step in random.Random(number).sample(list(steps.items()), len(steps)):
            if number < 5:
                peaks[name] = max(peaks[name], peak_of(run_step, device))
                continue
            start = time.perf_counter()
            run_step()
            seconds[name].append(time.perf_counter() - start)
    return seconds, peaks


def peak_of(run_step: Callable[[], None], device: torch.device) -> int:
    """Return the bytes that a step took at its peak on a GPU; for a CPU, see step_cost.py."""
    if device.type != "cuda":
        run_step()
        return 0
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_step()
    return torch.cuda.max_memory_allocated() - before


def show(seconds: dict[str, list[float]], peaks: dict[str, int]) -> None:
    has_peaks = any(peaks.values())
    print(f"\n  {'':<24} {'steps/s':>8} {'x plain':>8} {'spread':>13}" + " peak MiB" * has_peaks)
    for name, times in seconds.items():
        # A variant that repeats every five steps is compared in means of five.
        ratios = sorted(own / plain for own, plain in zip(fives(times), fives(seconds[PLAIN])))
        spread = f"{ratios[0]:.2f} - {ratios[-1]:.2f}"
        rate = 1 / statistics.median(fives(times))
        peak = f" {peaks[name] / 2**20:>8.0f}" if has_peaks else ""
        print(f"  {name:<24} {rate:>8.2f} {statistics.median(ratios):>8.3f} {spread:>13}{peak}")


def fives(times: list[float]) -> list[float]:
    return [statistics.mean(times[i : i + 5]) for i in range(0, len(times) - 4, 5)]


class InMemory(Dataset):
    """Training batches that cost nothing to load, so that only the loop is measured."""

    def __init__(self, samples: dict[str, Any]) -> None:
        self.rows = [{key: value[i] for key, value in samples.items() if key != "epoch"} for i in range(48)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def collater(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return default_collate(rows)


def loop_cost(rounds: int = 15) -> float:
    """Return how many times the processor time of LAVIS's own loop ``runner_wrf4cir`` takes at gamma 0."""
    tiny = {"vit_precision": "fp32", "image_size": 64, "freeze_vit": False,
            "vit_config": {"patch_size": 16, "embed_dim": 128, "depth": 3, "num_heads": 4, "mlp_ratio": 4},
            "qformer_config": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                               "intermediate_size": 512}, "num_query_token": 8, "embed_dim": 64}  # fmt: skip
    data = InMemory(batch(48, 64, torch.device("cpu")))
    model = build(tiny, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    loader = EpochLoader(training_loader(data, seed=42, batch_size=16, drop_last=True, collate_fn=data.collater))
    task = BaseTask()

    class Constant:
        def step(self, cur_epoch: int, cur_step: int) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder:
        run = {
            "device": "cpu", "distributed": False, "evaluate": False, "output_dir": folder, "num_workers": 0,
            "lr_sched": "linear_warmup_cosine_lr", "init_lr": 1e-4, "min_lr": 1e-4, "weight_decay": 0.05,
            "max_epoch": 10**6, "batch_size_train": 16, "batch_size_eval": 16, "train_splits": ["train"],
            "valid_splits": [], "test_splits": [], "wrf": {"gamma": 0},
        }  # fmt: skip
        cfg = OmegaConf.create({"run": run})
        config = type("Config", (), {"run_cfg": cfg.run, "to_dict": lambda _: OmegaConf.to_container(cfg)})()
        datasets = {"data": {"train": data}}
        runner = RunnerWrf4Cir(
            cfg=config, task=BaseTask(), model=build(tiny, torch.device("cpu")), datasets=datasets, job_id="job"
        )
        runner.save_last = lambda *_: None  # type: ignore[method-assign] # once an epoch of any length
        loops = (
            lambda: task.train_epoch(0, model, loader, optimizer, Constant()),
            lambda: runner.train_epoch(0),
        )
        seconds: list[list[float]] = [[], []]
        for _ in range(rounds + 2):
            for own, loop in zip(seconds, loops):
                start = time.process_time()
                loop()
                own.append(time.process_time() - start)
    return statistics.median(ours / stock for stock, ours in zip(*(own[2:] for own in seconds)))


if __name__ == "__main__":
    main()
