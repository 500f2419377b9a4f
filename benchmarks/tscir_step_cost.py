"""Measure what a training step of TSCIR costs beside CLIP's text tower alone, and which part takes it, in one process.

On a CPU the backbone is ViT-B/32, on a GPU ViT-L/14, with random weights. The parts take turns, so that a slow minute
of the machine meets all of them; printed are medians over the rounds, and of the ratios within a round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from perturbation_cost import measure_in_turns, with_cached_features

from lavis_cir_plugin.garments import words
from lavis_cir_plugin.methods.tscir.composing import TscirComposing
from lavis_cir_plugin.methods.tscir.mapping import PLAIN_SENTENCE, TscirMapping

TEXT_TOWER = "text tower alone, forward and backward"
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--clip-model", default="ViT-L-14-quickgelu" if on_gpu else "ViT-B-32-quickgelu")
    parser.add_argument("--batch-size", type=int, default=128 if on_gpu else 8)
    parser.add_argument("--rounds", type=int, default=100 if on_gpu else 10)
    args = parser.parse_args()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    mapping, composing = (
        model_class(clip_model=args.clip_model).to(device).train() for model_class in (TscirMapping, TscirComposing)
    )
    samples = batch(args.batch_size, composing.image_tower.image_size, device)
    where = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.clip_model}, {where}, batch {args.batch_size}, {args.rounds} interleaved rounds")
    with tempfile.TemporaryDirectory() as folder:
        cached = with_cached_features(composing, samples, Path(folder))
        steps = make_steps(mapping, composing, samples, cached, device)
        seconds, _ = measure_in_turns(steps, args.rounds, device)
    show(seconds)


def batch(size: int, image_size: int, device: torch.device) -> dict[str, Any]:
    """Return random pictures, with texts of FashionIQ's mean length and captions of a line."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    pictures = {key: torch.randn(size, 3, image_size, image_size, generator=generator) for key in ("image", "target")}
    return {
        **{key: value.to(device) for key, value in pictures.items()},
        "text_input": [" ".join(rng.choices(words(), k=12)) for _ in range(size)],
        "reference_caption": [" ".join(rng.choices(words(), k=12)) for _ in range(size)],
        "target_id": torch.arange(size, device=device),
    }


def make_steps(
    mapping: TscirMapping,
    composing: TscirComposing,
    samples: dict[str, Any],
    cached: Callable[[], dict[str, Any]],
    device: torch.device,
) -> dict[str, Step]:
    """Return the steps of both stages and the parts of stage II's, by name."""
    size = len(samples["text_input"])
    both = torch.cat([samples["image"], samples["target"]])
    views = {"image": torch.stack([samples["image"], samples["target"]], dim=1), "text_input": samples["text_input"]}
    features = cached()["image"]
    tower = composing.text_tower
    ids = tower.tokenize([*composing._sentences(samples["text_input"]), *[PLAIN_SENTENCE] * size])
    word = torch.randn(2 * size, tower.width, device=device, requires_grad=True)

    def timed(work: Callable[[], Any]) -> Step:
        def step() -> None:
            with torch.autocast(device.type, enabled=device.type == "cuda", dtype=torch.float16):
                out = work()
            if out.requires_grad:
                out.sum().backward()
            out.sum().item()  # waits for the GPU

        return step

    @torch.no_grad()
    def inject() -> torch.Tensor:
        _, patches = composing.mapping(torch.cat([features, features]))
        state = torch.zeros(2 * size, tower.width, device=device)
        return torch.stack([module.attend(state, state, patches)[0] for module in composing.injections.values()])

    @torch.no_grad()
    def read_captions() -> torch.Tensor:
        return tower(tower.tokenize(samples["reference_caption"]))

    return {
        TEXT_TOWER: timed(lambda: tower.compose(ids, word)),
        "part of II: image tower, reference and target": timed(lambda: composing.image_features(both)),
        "part of II: mapping and injections, forward": timed(inject),
        "part of II: captions, forward": timed(read_captions),
        "stage II, cached features": training_step(composing, cached, device),
        "stage II, pictures": training_step(composing, lambda: samples, device),
        "stage I, two views": training_step(mapping, lambda: views, device),
    }


def training_step(model: TscirMapping, data: Callable[[], dict[str, Any]], device: torch.device) -> Step:
    """Return one training step, in the order of LAVIS's loop."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def step() -> None:
        with torch.autocast(device.type, enabled=device.type == "cuda", dtype=torch.float16):
            loss = model(data())["loss"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()

    return step


def show(seconds: dict[str, list[float]]) -> None:
    print(f"\n  {'':<46} {'ms':>8} {'x text tower':>13} {'spread':>13}")
    for name, times in seconds.items():
        ratios = sorted(own / base for own, base in zip(times, seconds[TEXT_TOWER]))
        spread = f"{ratios[0]:.2f} - {ratios[-1]:.2f}"
        print(f"  {name:<46} {1000 * statistics.median(times):>8.0f} {statistics.median(ratios):>13.2f} {spread:>13}")


if __name__ == "__main__":
    main()
