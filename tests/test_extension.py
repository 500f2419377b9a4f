"""One file adds one thing: a toy of each kind lies in a folder of its own, is found there, and works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lavis_cir_plugin"

TOYS = {
    "benchmarks/toy.py": """
from __future__ import annotations
from dataclasses import dataclass
from lavis_cir_plugin.benchmarks.annotation_files import find_annotation, read_records
from lavis_cir_plugin.benchmarks.images import find_images
from lavis_cir_plugin.benchmarks.survey import Checklist, Usage
from lavis_cir_plugin.benchmarks.types import Triplet
from lavis_cir_plugin.core.settings import config_from_mapping
from pathlib import Path

SPLITS = ("train",)

@dataclass(frozen=True)
class ToyConfig:
    root: str

CONFIG = ToyConfig

def read_train(build_info):
    root = Path(config_from_mapping(ToyConfig, "toy", build_info).root)
    rows = read_records(find_annotation([root], ["."], "toy.json", "toy"))
    triplets = [Triplet(row["from"], row["to"], (row["text"],)) for row in rows]
    names = [name for triplet in triplets for name in (triplet.reference, triplet.target)]
    return triplets, find_images(names, [root], "toy", "error")[0]

def training_text(captions, rng):
    return captions[0]

CHECKLIST = Checklist("A toy", (Usage("training", "train"),), {("train", ""): 2}, "it is small", "it has none")
""",
    "garments/toy.py": """
from dataclasses import dataclass
from lavis_cir_plugin.garments.world import World, write_json

@dataclass(frozen=True)
class ToyGarments:
    seed: int = 0

def write_toy(root, settings, progress=True, workers=None):
    write_json(root / "toy.json", [{"seed": settings.seed}])

WORLD = World("garments-toy", 1, ToyGarments, write_toy)
""",
    "commands/toy.py": """
def add_command(subparsers):
    parser = subparsers.add_parser("toy", help="say something")
    parser.add_argument("word")
    parser.set_defaults(run=lambda args: print("toy says", args.word))
""",
    "methods/toy/runner.py": """
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from lavis_cir_plugin.report.curves import Panel
from lavis_cir_plugin.training.resumable_runner import ResumableRunner

@registry.register_runner("runner_toy")
class RunnerToy(ResumableRunner, RunnerBase):
    LOG_COLUMNS = {"joy": "toy/joy"}
    CURVE_PANELS = (Panel("joy", (("joy", "", "#000000"),), by_batch=True),)
""",
    "methods/toy/__init__.py": "",
}

HERE = """
import importlib, sys
from pathlib import Path
import lavis_cir_plugin
toys = Path(sys.argv.pop(1))
for name in ("benchmarks", "garments", "commands"):
    importlib.import_module(f"lavis_cir_plugin.{name}").__path__.append(str(toys / name))
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toys")
    for name, text in TOYS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def run(toys: Path, code: str, *arguments: object) -> str:
    command = [sys.executable, "-W", "ignore", "-c", HERE + code, str(toys), *map(str, arguments)]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


MAIN = "from lavis_cir_plugin.commands.main import main\nmain(sys.argv[1:])\n"


def test_a_command_is_found(toys: Path):
    assert run(toys, MAIN, "toy", "hello") == "toy says hello\n"


def test_a_benchmark_is_looked_for(toys: Path, tmp_path: Path):
    rows = [{"from": "a", "to": "b", "text": "is red"}, {"from": "b", "to": "a", "text": "is blue"}]
    (tmp_path / "toy.json").write_text(json.dumps(rows))
    for name in "ab":
        (tmp_path / f"{name}.jpg").touch()
    printed = run(toys, MAIN, "check", tmp_path)
    assert "A toy\n" in printed
    assert "train    2 triplets" in printed
    assert "training: yes" in printed


def test_a_benchmark_a_world_and_a_method_are_registered(toys: Path, tmp_path: Path):
    """The builder has the toy's world; its runner brings a column of the log and a panel of the curve."""
    code = """
from lavis_cir_plugin.garments.__main__ import worlds
assert not {"lavis", "torch"} & set(sys.modules)
import lavis_cir_plugin.methods as methods  # imports LAVIS, which registers what is there by then
methods.__path__.append(str(toys / "methods"))
lavis_cir_plugin.register()
from lavis.common.registry import registry
from lavis_cir_plugin.tasks.composed_retrieval import _panels_of_methods
builder = registry.get_builder_class("toy")
print(sorted(set(worlds()) & {"toy", "cirr"}), builder.world is worlds()["toy"], builder.benchmark_module.__name__)
print(registry.get_runner_class("runner_toy").LOG_COLUMNS, "joy" in [panel.label for panel in _panels_of_methods()])
print((builder.world.make(Path(sys.argv[1]), builder.world.settings(seed=7)) / "toy.json").read_text())
"""
    first, second, *drawn = run(toys, code, tmp_path).splitlines()
    assert first == "['cirr', 'toy'] True lavis_cir_plugin.benchmarks.toy"
    assert second == "{'joy': 'toy/joy'} True"
    assert json.loads("".join(drawn)) == [{"seed": 7}]
