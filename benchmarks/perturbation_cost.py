"""Measure what the weight perturbation costs: training steps of the tiny model on a CPU, side by side in one process.

The variants take turns, so that a slow minute of the machine meets all of them; medians over the rounds are printed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lavis.models import load_model

from lavis_cir_plugin.garments import words
from lavis_cir_plugin.perturbation import WeightPerturbation
from lavis_cir_plugin.perturbed_model import PerturbingOptimizer

PLAIN = "stock step"
SETTINGS = {
    "gamma 0": WeightPerturbation(gamma=0),
    "exact, tensor scope": WeightPerturbation(scope="tensor"),
    "exact, global scope": WeightPerturbation(scope="global"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()

    samples = batch(args.batch_size)
    steps = {PLAIN: plain_step(samples), **{name: perturbed_step(samples, s) for name, s in SETTINGS.items()}}
    seconds = measure_in_turns(steps, args.rounds)
    print(
        f"\nblip2_cir tiny, CPU, {torch.get_num_threads()} torch threads, batch {args.batch_size}, "
        f"medians of {args.rounds} interleaved rounds\n  {'':<20} {'steps/s':>8} {'x stock':>8}"
    )
    for name, times in seconds.items():
        ratio = statistics.median(own / plain for own, plain in zip(times, seconds[PLAIN]))
        print(f"  {name:<20} {1 / statistics.median(times):>8.2f} {ratio:>8.2f}")


def batch(size: int) -> dict[str, Any]:
    """Return random pictures and texts of FashionIQ's mean length, as LAVIS's loop hands them over."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(size, 3, 64, 64, generator=generator),
        "target": torch.randn(size, 3, 64, 64, generator=generator),
        "text_input": [" ".join(rng.choices(words(), k=12)) for _ in range(size)],
        "target_id": torch.arange(size),
        "epoch": 0,
    }


def plain_step(samples: dict[str, Any]) -> Callable[[], None]:
    model, optimizer = fresh()
    return lambda: step(model, optimizer, samples)


def perturbed_step(samples: dict[str, Any], settings: WeightPerturbation) -> Callable[[], None]:
    model, stock = fresh()
    optimizer = PerturbingOptimizer(stock, model, settings)
    perturbed = optimizer.perturb(model)
    return lambda: step(perturbed, optimizer, samples)


def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a model of its own for each variant, always the same one, and LAVIS's optimizer."""
    torch.manual_seed(0)
    model = load_model("blip2_cir", "tiny", is_eval=False)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)


def step(model: Callable[..., Any], optimizer: torch.optim.Optimizer, samples: dict[str, Any]) -> None:
    """Train once, in the order of LAVIS's loop."""
    model(samples)["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def measure_in_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each step in each round; the round before the first only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, run_step in steps.items():
            start = time.perf_counter()
            run_step()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


if __name__ == "__main__":
    main()
