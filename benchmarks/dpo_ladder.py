"""Repair the seed paper's Retrieval-DPO one fault at a time on drawn garments, and show what each repair is worth.

Two starts: a small CLIP trained on captions, which goes from the paper's recipe up to the repaired one rung by rung,
and a small BLIP-2 Q-Former trained for composed retrieval, which the repaired recipe has to improve. Beside both stands
InfoNCE alone for as many steps, because going on to train improves a model without any preference. A finished run is
not repeated and an interrupted one is resumed; with other settings it is one of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf
from stages import evaluate, frame, provenance, save, spread, train

PROJECTS = Path(__file__).parents[1] / "projects"
METRICS = ("R@10", "R@50")
"""FashionIQ's."""
CHANCE = "random (expected)"

# Each rung keeps what those before it repaired.
REPAIRS: dict[str, tuple[str, ...]] = {
    "the paper's recipe": (),
    "+ text projection": ("model.text_projection=true",),
    "+ the target is the positive": ("run.dpo.positive=target",),
    "+ fusion: image and text": ("model.fusion=sum",),
    "+ anchor": ("run.dpo.anchor=1.0",),
    "+ negatives of the query": (
        "run.negatives.source=query",
        "run.negatives.within_category=true",
        "run.negatives.window=[0,50]",
        "run.negatives.cap=0.95",
        "run.negatives.count=4",
        "run.dpo.variant=sdpo",
    ),
    "+ mined in each epoch": ("run.negatives.refresh=1",),
    "+ reference policy": ("run.dpo.reference=start",),
}
CLIP_START, CLIP_ANCHOR = "CLIP as it starts", "CLIP, InfoNCE alone"
START, ANCHOR, FUSED = "Q-Former as it starts", "Q-Former, InfoNCE alone", "Q-Former, Retrieval-DPO"
ROWS = (CLIP_START, *REPAIRS, CLIP_ANCHOR, START, ANCHOR, FUSED)
WITHOUT_PREFERENCES = ("run.dpo.beta=1.0e-9", "run.negatives.refresh=0", "run.negatives.count=1")
"""The preference term's gradient is then nothing beside the anchor's; what is mined has no effect."""

STAGE_ONE = (
    "run.valid_splits=[]",
    "run.max_epoch=7",
    "run.batch_size_train=16",
    "run.init_lr=2.5e-4",
    "run.warmup_steps=100",
)

Values = dict[str, dict[str, float]]
"""Percent by row and metric."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--work", type=Path, default=Path("output/retrieval_dpo/ladder"), help="where everything is kept"
    )
    for name in ("clip", "paper", "stage-one", "fused"):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="KEY=VALUE", help="options for its config")
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in ("clip", "paper", "stage_one", "fused")}
    runs = {seed: run_rungs(args.work, seed, options) for seed in args.seeds}
    report = {
        "metrics": METRICS,
        "options": options,
        **provenance(),
        "seeds": {str(seed): run for seed, run in runs.items()},
    }
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "ladder.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    values = [run["percent"] for run in runs.values()]
    draw_ladder(values, args.work / "ladder.png")
    print(f"\nPercent, mean (least - most) of seeds {', '.join(map(str, args.seeds))}:")
    print(ladder_table(values))
    print(f"\nseconds: {sum(runs[args.seeds[0]]['seconds'].values()):.0f} for seed {args.seeds[0]}")
    print(f"Written to {args.work}: ladder.json, ladder.png")


def run_rungs(work: Path, seed: int, options: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Run what is missing of one seed's rungs; return percentages and seconds by row."""
    clip = train(work, PROJECTS / "tscir" / "clip_demo.yaml", seed, options["clip"])
    paper = PROJECTS / "retrieval_dpo" / "paper_demo.yaml"
    base = [f"model.pretrained={clip['run']}/checkpoint_last.pth", *options["paper"]]
    records = {"small CLIP": clip}
    every: list[str] = []
    records[CLIP_START] = evaluate(work, paper, seed, [*base, "model.text_projection=true", "model.fusion=sum"])
    for row, repair in REPAIRS.items():
        every += repair
        records[row] = train(work, paper, seed, [*base, *every])
    records[CLIP_ANCHOR] = train(work, paper, seed, [*base, *every, *WITHOUT_PREFERENCES])

    first, fused = PROJECTS / "blip2_cir" / "fiq_demo.yaml", PROJECTS / "retrieval_dpo" / "fused_demo.yaml"
    world = OmegaConf.load(fused).datasets.fashioniq.garments
    same_world = [f"datasets.fashioniq.garments.{key}={value}" for key, value in world.items()]
    start = [*same_world, *STAGE_ONE, *options["stage_one"]]
    records[START] = train(work, first, seed, start, name="stage_one")
    base = [f"model.finetuned={records[START]['run']}/checkpoint_last.pth", *options["fused"]]
    records[ANCHOR] = train(work, fused, seed, [*base, *WITHOUT_PREFERENCES])
    records[FUSED] = train(work, fused, seed, base)
    trained = {row: metrics(records[row])[0] for row in ROWS}
    return {
        "percent": {**trained, CHANCE: metrics(records[START])[1]},
        "seconds": {row: record["seconds"] for row, record in records.items()},
    }


def metrics(record: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return a run's metrics, and chance."""
    found = json.loads((Path(record["run"]) / "val" / "metrics.json").read_text(encoding="utf-8"))["metrics"]
    (trained, *_), chance = found.values(), found[CHANCE]
    own, expected = ({name: values[name] for name in METRICS} for values in (trained, chance))
    return own, expected


def ladder_table(values: Sequence[Values]) -> str:
    """Return a line per row, and what the repaired recipe gains over its start and over InfoNCE alone, seed by seed."""
    columns: dict[str, list[list[float]]] = {
        row: [[own[row][name] for own in values] for name in METRICS] for row in (*ROWS, CHANCE)
    }
    for other in (START, ANCHOR):
        pairs = zip(columns[FUSED], columns[other])
        columns[f"gain over {other}"] = [[a - b for a, b in zip(fused, before)] for fused, before in pairs]
    lines = [f"{row:<40}" + "".join(f"{spread(own):>24}" for own in of_row) for row, of_row in columns.items()]
    return "\n".join([f"{'':<40}" + "".join(f"{name:>24}" for name in METRICS), *lines])


def draw_ladder(values: Sequence[Values], path: Path) -> None:
    """Draw per metric a bar per row, from the least to the most of the seeds a line, chance dashed."""
    figure = Figure(figsize=(12, 0.34 * len(ROWS) + 1.2), constrained_layout=True)
    for panel, metric in zip(figure.subplots(1, len(METRICS), sharey=True), METRICS):
        for place, row in enumerate(ROWS):
            own = [of_seed[row][metric] for of_seed in values]
            mean = statistics.mean(own)
            colour = "#8fbbe0" if row in REPAIRS else "#1f5fa8" if row == FUSED else "#bdbdbd"
            panel.barh(place, mean, 0.75, color=colour)
            if len(own) > 1:
                panel.plot([min(own), max(own)], [place, place], color="black", linewidth=1.5)
            panel.annotate(f"{mean:.1f}", (max(own), place), (4, 0), textcoords="offset points", va="center")
        chance = statistics.mean(of_seed[CHANCE][metric] for of_seed in values)
        panel.axvline(chance, color="black", linestyle="--", linewidth=0.9)
        label = f"chance, {chance:.2f}"
        panel.annotate(label, (chance, -0.9), (4, 0), textcoords="offset points", va="center", fontsize=8)
        panel.set_yticks(range(len(ROWS)), ROWS)
        panel.set_xlabel("percent")
        panel.margins(x=0.12)
        frame(panel, f"FashionIQ's {metric} on drawn garments")
        panel.set_ylim(len(ROWS) - 0.4, -1.4)
        panel.set_xlim(left=0)
    save(figure, path)


if __name__ == "__main__":
    main()
