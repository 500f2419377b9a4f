"""Train TSCIR on drawn garments for several seeds, and show what each stage adds to zero-shot retrieval.

The stages are commands of their own: a small CLIP from scratch on captions, the mapping (stage I) on the same captions,
synthetic triplets, and the composing adapters (stage II) for each number of triplets. A finished stage is not run
again and an interrupted one is resumed; with other settings, or after another stage, it is one of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf
from stages import frame, once, provenance, save, spread, stage_folder, train

PROJECTS = Path(__file__).parents[1] / "projects" / "tscir"
TRAININGS = ("clip", "mapping", "composing")
# Higher than the command's own: the less else differs in a triplet, the more it says about its text.
SIMILARITY = "0.8"
BOTH_STAGES, STAGE_ONE, CHANCE = "stage I + II", "stage I alone", "random (expected)"
ROWS = ("image only", "text only", "image + text", STAGE_ONE, BOTH_STAGES)
COLOURS = ("#dcdcdc", "#bdbdbd", "#8f8f8f", "#8fbbe0", "#1f5fa8")

Values = dict[str, dict[str, float]]
"""Percent by benchmark and row."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--amounts", type=int, nargs="+", default=[3000], help="triplets; the table shows the first")
    parser.add_argument("--work", type=Path, default=Path("output/tscir/ladder"), help="where everything is kept")
    for name in TRAININGS:
        parser.add_argument(
            f"--{name}", nargs="+", default=[], metavar="KEY=VALUE", help=f"options for projects/tscir/{name}_demo.yaml"
        )
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in TRAININGS}
    runs = {
        (seed, amount): run_stages(args.work, seed, amount, options) for seed in args.seeds for amount in args.amounts
    }
    of_amount = {amount: [runs[seed, amount]["percent"] for seed in args.seeds] for amount in args.amounts}
    first = runs[args.seeds[0], args.amounts[0]]
    report = {
        "metrics": first["metrics"],
        "options": options,
        **provenance(),
        "runs": [{"seed": seed, "triplets": amount, **run} for (seed, amount), run in runs.items()],
    }
    (args.work / "ladder.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw_ladder(of_amount[args.amounts[0]], first["metrics"], args.work / "ladder.png")
    print(f"\n{args.amounts[0]:,} triplets, percent, mean (least - most) of seeds {', '.join(map(str, args.seeds))}:")
    print(ladder_table(of_amount[args.amounts[0]], first["metrics"]))
    if len(args.amounts) > 1:
        draw_amounts(of_amount, first["metrics"], args.work / "amounts.png")
        print("\n" + amounts_table(of_amount, first["metrics"]))
    print("\nseconds: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in first["seconds"].items()))
    print("Written to " + str(args.work) + ": " + ", ".join(sorted(path.name for path in args.work.glob("*.*"))))


# -- stages ----------------------------------------------------------------------------------------------------------


def run_stages(work: Path, seed: int, amount: int, options: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Run what is missing of one seed's stages; return the names of the metrics, percentages and seconds."""
    clip = train(work, PROJECTS / "clip_demo.yaml", seed, options["clip"])
    weights = f"model.pretrained={clip['run']}/checkpoint_last.pth"
    mapping = train(work, PROJECTS / "mapping_demo.yaml", seed, [weights, *options["mapping"]])
    captions = captions_file(options["clip"])
    triplets = make_triplets(work, captions, seed, amount)
    inputs = [
        weights,
        f"model.mapping_checkpoint={mapping['run']}/checkpoint_last.pth",
        f"datasets.triplets.build_info.root={triplets['run']}",
        f"datasets.triplets.build_info.images={captions.parent / 'images'}",
    ]
    # Stage II is built around stage I's network.
    network = [option for option in options["mapping"] if option.startswith(("model.injection", "model.hidden"))]
    composing = train(work, PROJECTS / "composing_demo.yaml", seed, [*inputs, *network, *options["composing"]])
    found = json.loads((Path(composing["run"]) / "summary.json").read_text(encoding="utf-8"))["benchmarks"]
    summary = {name.removesuffix("_val"): values for name, values in found.items()}
    stages = {"clip": clip, "mapping": mapping, "triplets": triplets, "composing": composing}
    return {
        "metrics": {name: found["metric"] for name, found in summary.items()},
        "percent": {name: found["values"] for name, found in summary.items()},
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
    }


def make_triplets(work: Path, captions: Path, seed: int, amount: int) -> dict[str, Any]:
    """Make synthetic triplets of captions, unless they are there, and return the record."""
    folder = stage_folder(work, f"triplets_{amount}", seed, [str(captions), SIMILARITY])
    command = [sys.executable, "-W", "ignore", "-m", "lavis_cir_plugin.commands.main", "triplets", str(captions)]
    command += ["--count", str(amount), "--seed", str(seed), "--output", str(folder), "--overwrite"]
    command += ["--similarity", SIMILARITY]
    images = ["--images", str(captions.parent / "images"), "--contact-sheet", str(folder / "triplets.png")]
    return once(folder, [*command, *images])


def captions_file(options: Sequence[str]) -> Path:
    """Return the file of the captions that the CLIP stage was trained on; the pictures lie in images/ beside it."""
    from lavis_cir_plugin.data.benchmark_datasets import cache_root
    from lavis_cir_plugin.garments.questions import WORLD, QuestionGarments

    config = OmegaConf.merge(OmegaConf.load(PROJECTS / "clip_demo.yaml"), OmegaConf.from_dotlist(list(options)))
    settings = OmegaConf.to_container(config.datasets.garments_caption.garments)
    return WORLD.make(cache_root(), QuestionGarments(**settings)).absolute() / "caption_train.json"


# -- tables and pictures ---------------------------------------------------------------------------------------------


def over_seeds(values: Sequence[Values], benchmark: str, row: str) -> list[float]:
    return [of_seed[benchmark][row] for of_seed in values]


def ladder_table(values: Sequence[Values], metrics: Mapping[str, str]) -> str:
    """Return the rows of the ladder, and the gain of both stages over the best other row of the same seed."""
    lines = [f"{'':<18}" + "".join(f"{name + ' ' + metric:>24}" for name, metric in metrics.items())]
    lines += [
        f"{row:<18}" + "".join(f"{spread(over_seeds(values, name, row)):>24}" for name in metrics)
        for row in (*ROWS, CHANCE)
    ]
    gains = [
        [of_seed[name][BOTH_STAGES] - max(of_seed[name][row] for row in ROWS[:-1]) for of_seed in values]
        for name in metrics
    ]
    return "\n".join([*lines, f"{'gain':<18}" + "".join(f"{spread(gain):>24}" for gain in gains)])


def amounts_table(values: Mapping[int, Sequence[Values]], metrics: Mapping[str, str]) -> str:
    """Return both stages' results by the number of triplets; 0 is stage I alone."""
    lines = [f"{'triplets':<18}" + "".join(f"{name + ' ' + metric:>24}" for name, metric in metrics.items())]
    rows = [(0, STAGE_ONE, next(iter(values.values()))), *((n, BOTH_STAGES, values[n]) for n in sorted(values))]
    for amount, row, own in rows:
        lines.append(f"{amount:<18,}" + "".join(f"{spread(over_seeds(own, name, row)):>24}" for name in metrics))
    return "\n".join(lines)


def draw_ladder(values: Sequence[Values], metrics: Mapping[str, str], path: Path) -> None:
    """Draw a group of bars for each benchmark, from the least to the most of the seeds a line, and chance dashed."""
    figure = Figure(figsize=(3.2 * len(metrics) + 1, 4), constrained_layout=True)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for panel, (name, metric) in zip(panels, metrics.items()):
        for place, (row, colour) in enumerate(zip(ROWS, COLOURS)):
            own = over_seeds(values, name, row)
            mean = statistics.mean(own)
            panel.bar(place, mean, 0.8, color=colour)
            if len(own) > 1:
                panel.plot([place, place], [min(own), max(own)], color="black", linewidth=1.5)
            panel.annotate(f"{mean:.1f}", (place, max(own)), (0, 3), textcoords="offset points", ha="center")
        chance = statistics.mean(over_seeds(values, name, CHANCE))
        panel.axhline(chance, color="black", linestyle="--", linewidth=0.8)
        panel.annotate("chance", (len(ROWS) - 0.5, chance), (0, 2), textcoords="offset points", ha="right", fontsize=8)
        panel.set_xticks(range(len(ROWS)), ROWS, rotation=35, ha="right")
        frame(panel, f"{name}, {metric}")
    panels[0].set_ylabel("percent")
    save(figure, path)


def draw_amounts(values: Mapping[int, Sequence[Values]], metrics: Mapping[str, str], path: Path) -> None:
    """Draw both stages over the number of triplets, the least and the most of the seeds shaded; stage I dashed."""
    figure = Figure(figsize=(3.2 * len(metrics) + 1, 3.4), constrained_layout=True)
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    amounts = sorted(values)
    for panel, (name, metric) in zip(panels, metrics.items()):
        own = [over_seeds(values[amount], name, BOTH_STAGES) for amount in amounts]
        panel.fill_between(amounts, [min(v) for v in own], [max(v) for v in own], color=COLOURS[-2], linewidth=0)
        panel.plot(amounts, [statistics.mean(v) for v in own], color=COLOURS[-1], marker="o", label=BOTH_STAGES)
        alone = statistics.mean(over_seeds(values[amounts[0]], name, STAGE_ONE))
        panel.axhline(alone, color="black", linestyle="--", linewidth=1, label=STAGE_ONE)
        panel.set_xscale("log")
        panel.set_xticks(amounts, [f"{amount:,}" for amount in amounts], rotation=35)
        panel.minorticks_off()
        panel.set_xlabel("synthetic triplets")
        frame(panel, f"{name}, {metric}")
    panels[0].set_ylabel("percent")
    panels[0].legend(frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main()
