"""Measure a training step of ``blip2_cir`` beside an older build's: processor time, memory, and equal results.

The model has the size of ViT-L and BERT-base with random weights, SPRC's fusion and a batch of eight pairs of 224 px,
with texts as long as FashionIQ's.
The steps are those of LAVIS's own loop under ``runner_wrf4cir``, plain or perturbed, with the image tower in the loop
or with its features given. Each run is a process of its own, and the builds take turns; memory has runs of its own, in
which the allocator gives back what is free. Without an older build only this one is measured. An older build is the
folder of a checkout; it runs with the libraries of the interpreter that runs this script.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure

OWN = Path(__file__).resolve().parents[1]
BATCH, STEPS, EQUAL_STEPS = 8, 3, 20
WORDS = ["is", "darker", "and", "has", "longer", "sleeves", "with", "a", "plain", "collar", "on", "it"]
TOKENS = (10, 12, 13, 15, 15, 16, 18, 20)  # of a text with [CLS] and [SEP]; mean and spread are FashionIQ's


@dataclass(frozen=True)
class Kind:
    """A kind of step: its settings, and how much of the older build's time and memory it may take."""

    wrf: dict[str, float]
    has_features: bool
    time_aim: float = math.nan
    memory_aim: float = math.nan


PLAIN, QUARTER, QUARTER_AIM = "plain, cached", "WRF of a quarter, cached", 1.45
KINDS = {
    PLAIN: Kind({"gamma": 0}, True, 0.80, 1.0),
    "WRF, cached": Kind({"gamma": 0.001}, True, 0.80, 0.90),
    "WRF with the tower": Kind({"gamma": 0.001}, False, 0.88, 0.90),
    QUARTER: Kind({"gamma": 0.001, "direction_share": 0.25}, True),  # older builds lack it
}
SMALL = {
    "vit_config": {"patch_size": 16, "width": 64, "layers": 3, "heads": 2},
    "image_size": 64,
    "num_query_token": 8,
    "embed_dim": 32,
    "qformer_config": {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("older", nargs="?", type=Path, help="checkout of an older build to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind and build (default: 3)")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=list(KINDS), help="kinds to measure")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "VALUE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child[0]](arguments.child[1])))
        return
    builds = {"older": arguments.older.resolve()} if arguments.older else {}
    builds["now"] = OWN
    found: dict[tuple[str, str, str], list[float]] = {}
    for number in range(arguments.rounds):
        for kind in arguments.only:
            for build, folder in builds.items():
                if build == "older" and kind == QUARTER:
                    continue
                for what in ("seconds", "mib") if number == 0 else ("seconds",):
                    values = run_child(folder, what, kind)
                    print(f"  {build}, {kind}, {what}: {', '.join(f'{value:.2f}' for value in values)}", flush=True)
                    found.setdefault((build, kind, what), []).extend(values)
    show({key: statistics.median(values) for key, values in found.items()})
    if arguments.older:
        show_differences(builds)


def run_child(build: Path, what: str, value: str) -> Any:
    environment = measure.environment(build)
    if what == "mib":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory leaves the process at once
    lines: list[str] = []
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--child", what, value]
    measure.run(command, lines.append, environment)
    return json.loads(lines[-1])


def show(medians: dict[tuple[str, str, str], float]) -> None:
    for what, title in (("seconds", f"processor seconds a step, batch {BATCH}"), ("mib", "peak of a step, MiB")):
        print(f"\n  {title:<38} {'older':>8} {'now':>8} {'ratio':>7} {'aim':>6}")
        for name, kind in KINDS.items():
            before, now = (medians.get((build, name, what), math.nan) for build in ("older", "now"))
            if not math.isnan(now):
                aim = kind.time_aim if what == "seconds" else kind.memory_aim
                print(f"  {name:<38} {before:8.2f} {now:8.2f} {now / before:7.3f} {aim:6.2f}")
    plain, quarter = (medians.get(("now", name, "seconds"), math.nan) for name in (PLAIN, QUARTER))
    print(f"  {QUARTER}: {quarter / plain:.2f} x {PLAIN} (aim: at most {QUARTER_AIM})")


def show_differences(builds: dict[str, Path]) -> None:
    """Compare losses and weights of both builds after the same steps of a small model without dropout."""
    import torch

    for gamma in (0, 0.001):
        with tempfile.TemporaryDirectory() as folder:
            files = {build: Path(folder) / f"{build}.pth" for build in builds}
            losses = [
                torch.tensor(run_child(builds[build], "equal", f"{gamma} {file}"), dtype=torch.float64)
                for build, file in files.items()
            ]
            before, now = (torch.load(file, weights_only=True) for file in files.values())
        loss = float(((losses[0] - losses[1]) / losses[0]).abs().max())
        # A key's bias adds the same to all scores of a query; its gradient is rounding alone, which Adam enlarges.
        weight = max(
            float((now[name] - old).norm() / old.norm().clamp_min(1e-12))
            for name, old in before.items()
            if not name.endswith("key.bias")
        )
        print(
            f"  gamma {gamma}, {EQUAL_STEPS} steps without dropout: losses differ by at most {loss:.1e} of their size, "
            f"weights by {weight:.1e} of a tensor's norm"
        )


# -- in the process of one build --------------------------------------------------------------------------------------


def seconds_of(kind: str) -> list[float]:
    """Return the processor seconds of steps of the full size, after a first one."""
    marks: list[float] = []
    train(KINDS[kind], STEPS, lambda: marks.append(time.process_time()))
    marks.append(time.process_time())
    return [after - before for before, after in zip(marks[1:], marks[2:])]


def mib_of(kind: str) -> list[float]:
    """Return by how much the memory of a step at its peak exceeds that of the process before it."""
    watch = Peak()
    train(KINDS[kind], 1, watch.restart)
    watch.restart()
    return watch.peaks[1:]


def equal_steps(value: str) -> list[float]:
    """Return the losses of the first steps of a small model, and save the weights after them."""
    import torch

    gamma, file = value.split()
    runner, task = make_run(SMALL, {"gamma": float(gamma)}, BATCH * EQUAL_STEPS, (3, 64, 64), lambda: None)
    runner.train_epoch(0)
    torch.save({name: tensor.detach().clone() for name, tensor in runner.model.named_parameters()}, file)
    return task.losses  # type: ignore[no-any-return]


CHILDREN = {"seconds": seconds_of, "mib": mib_of, "equal": equal_steps}


def train(kind: Kind, steps: int, on_step: Any) -> None:
    import torch

    # Where features are given the tower is not called; version 0.4 had another default of its depth.
    settings = {"vit_config": {"layers": 2 if kind.has_features else 24}}
    picture = (257, 1024) if kind.has_features else (3, 224, 224)
    runner, _ = make_run(settings, kind.wrf, BATCH * (steps + 1), picture, on_step)
    embeddings = runner.model.Qformer["bert"].embeddings  # with the vocabulary of BERT
    width = embeddings.word_embeddings.embedding_dim
    embeddings.word_embeddings = torch.nn.Embedding(30523, width, padding_idx=0)
    runner.train_epoch(0)


def make_run(
    settings: dict[str, Any], wrf: dict[str, float], size: int, picture: tuple[int, ...], on_step: Any
) -> tuple[Any, Any]:
    """Return a runner of ``size`` random pairs, and its task, which calls ``on_step`` before each step."""
    import torch
    from lavis.common.registry import registry
    from lavis.tasks.base_task import BaseTask
    from omegaconf import OmegaConf
    from torch.utils.data import Dataset, default_collate

    import lavis_cir_plugin  # noqa: F401 (registers model and runner)

    class Noting(BaseTask):
        """LAVIS's task, which notes the losses."""

        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []

        def train_step(self, model: Any, samples: dict[str, Any]) -> Any:
            on_step()
            loss = super().train_step(model=model, samples=samples)
            self.losses.append(float(loss.detach()))
            return loss

    class Pairs(Dataset):
        def __len__(self) -> int:
            return size

        def __getitem__(self, index: int) -> dict[str, Any]:
            generator = torch.Generator().manual_seed(index)
            image, target = (torch.randn(picture, generator=generator) for _ in range(2))
            text = " ".join((WORDS * 2)[: TOKENS[index % BATCH] - 2])
            return {"image": image, "target": target, "text_input": text, "target_id": index}

        def collater(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
            return default_collate(rows)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    common = {
        "vit_model": "clip_L", "vit_precision": "fp32", "fusion": "sentence_prompt",
        "tokenizer": "blip2_cir_tiny_vocab.txt",
    }  # fmt: skip
    model = registry.get_model_class("blip2_cir")(**common, **settings)
    run = {
        "device": "cpu", "distributed": False, "evaluate": False, "output_dir": tempfile.mkdtemp(), "num_workers": 0,
        "lr_sched": "linear_warmup_cosine_lr", "init_lr": 1e-4, "min_lr": 1e-4, "weight_decay": 0.05, "max_epoch": 2,
        "batch_size_train": BATCH, "batch_size_eval": BATCH, "train_splits": ["train"], "valid_splits": [],
        "test_splits": [], "wrf": wrf,
    }  # fmt: skip
    cfg, task = OmegaConf.create({"run": run}), Noting()
    config = type("Config", (), {"run_cfg": cfg.run, "to_dict": lambda _: OmegaConf.to_container(cfg)})()
    runner = registry.get_runner_class("runner_wrf4cir")(
        cfg=config, task=task, model=model, datasets={"data": {"train": Pairs()}}, job_id="job"
    )
    for name in ("save_last", "_save_last"):  # its name now, and in older builds
        setattr(runner, name, lambda *_: None)  # a checkpoint is no part of the step
    return runner, task


class Peak:
    """Watches the resident memory of this process and notes its highest rise between two restarts, in MiB."""

    def __init__(self) -> None:
        self.peaks: list[float] = []
        self.highest = self.before = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.highest = max(self.highest, resident())
            time.sleep(0.005)

    def restart(self) -> None:
        if self.before:
            self.peaks.append((self.highest - self.before) / 2**20)
        gc.collect()
        self.before = self.highest = resident()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    main()
