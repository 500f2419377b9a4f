"""What the ladders share: commands that run once and go on where they were stopped, and numbers with their spread."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RECORD = "stage.json"


def train(work: Path, config: Path, seed: int, options: Sequence[str], name: str = "") -> dict[str, Any]:
    """Run a training, unless it is finished, and return its record; its folder is called after the config or ``name``.

    An interrupted one is resumed.
    """
    return _launch("train", work, config, seed, options, name or config.stem.removesuffix("_demo"))


def evaluate(work: Path, config: Path, seed: int, options: Sequence[str]) -> dict[str, Any]:
    """Run an evaluation, unless it is finished, and return its record."""
    return _launch("evaluate", work, config, seed, options, f"{config.stem.removesuffix('_demo')}_start")


def _launch(command: str, work: Path, config: Path, seed: int, options: Sequence[str], name: str) -> dict[str, Any]:
    settings = [f"run.seed={seed}", *options]
    folder = stage_folder(work, name, seed, [config.read_text(encoding="utf-8"), *settings])
    launcher = [sys.executable, "-u", "-W", "ignore", "-m", f"lavis.{command}", "--cfg-path", str(config), "--options"]
    resume = ["run.resume_ckpt_path=auto"] * (command == "train")
    return once(folder, [*launcher, f"run.output_dir={folder}", *resume, *settings])


def stage_folder(work: Path, name: str, seed: int, settings: Sequence[str]) -> Path:
    """Return the folder of a stage with these settings, among which are the folders of the stages before it."""
    digest = hashlib.sha256("\n".join(settings).encode()).hexdigest()[:8]
    return work.absolute() / f"{name}_seed{seed}_{digest}"


def once(folder: Path, command: Sequence[str], run: Callable[..., measure.Usage] = measure.run) -> dict[str, Any]:
    """Run a command unless its record is in the folder; return the record: ``run``, its own folder, and ``seconds``.

    The seconds of a resumed command are those of its last part.
    """
    record = folder / RECORD
    if record.is_file():
        return dict(json.loads(record.read_text(encoding="utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    found = {"run": str(folder)}

    def read_line(line: str) -> None:
        print(line, flush=True)
        if "[INFO] output: " in line:
            found["run"] = line.split("[INFO] output: ")[1].strip()

    print(f"\n== {folder.name}", flush=True)
    try:
        usage = run(command, read_line)
    except subprocess.CalledProcessError as error:
        script = Path(sys.argv[0]).stem
        sys.exit(f"{script}: {folder.name} ended with status {error.returncode}; its own message stands above.")
    content = {**found, "seconds": usage.seconds, "command": list(command)}
    part = record.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    part.replace(record)
    return content


def provenance() -> dict[str, str]:
    """Return what a number has to carry: commit and machine."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return {
        "commit": subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip(),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}",
    }


def spread(values: Sequence[float]) -> str:
    """Return the mean, and of several values the least and the most: ``12.34 (11.90 - 12.80)``."""
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} - {max(values):.2f})"


def frame(panel: Axes, title: str) -> None:
    panel.set_title(title)
    panel.margins(y=0.12)
    panel.set_ylim(bottom=0)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
