"""One declaration serves a key's sentence, the tables of the reference, and the JSON schema of editors."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from lavis.common.registry import registry

from lavis_cir_plugin import CONFIGS, PROJECTS
from lavis_cir_plugin.core.settings import REQUIRED, settings_of
from lavis_cir_plugin.training import config, reference
from lavis_cir_plugin.training.run_settings import LavisModel

SECTIONS = reference.sections()
SETTINGS = [
    pytest.param(setting, id=f"{name} {setting.name}")
    for name, classes in SECTIONS.items()
    for cls in classes
    for setting in settings_of(cls).values()
]


def test_there_are_sections_of_every_kind():
    expected = {"run", "run.wrf", "run.lora", "run.dpo", "run.negatives", "datasets", "datasets.cirr.garments"}
    expected |= {"model blip2_cir", "model tscir_mapping", "datasets.triplets.build_info", "processor target_pad"}
    assert expected <= set(SECTIONS)


def test_the_table_of_run_has_every_key_of_every_runner_and_task():
    told = {name for cls in SECTIONS["run"] for name in settings_of(cls)}
    for runner, task in itertools.product(registry.list_runners(), registry.list_tasks()):
        known = {name for cls in config.run_sections({"runner": runner, "task": task}) for name in settings_of(cls)}
        assert known <= told, (runner, task)
    assert {"save_every", "ema_decay", "adam_eps", "feature_cache"} <= told


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_has_a_sentence_and_a_right_default(setting: Any):
    assert setting.meaning.endswith(".")
    if setting.default is not REQUIRED and setting.section is None:
        assert setting.name == "task" or setting.problems(setting.name, setting.default) == []


@pytest.mark.parametrize("path", sorted((CONFIGS / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_types_of_models_are_right(path: Path):
    model = yaml.safe_load(path.read_text())["model"]
    archs = [model["arch"]] if model.get("arch") else []
    for arch in archs:
        known = {name: setting for cls in SECTIONS[f"model {arch}"] for name, setting in settings_of(cls).items()}
        for name, value in model.items():
            assert known[name].problems(name, value) == []


def test_a_derived_model_has_the_sentences_of_its_base():
    mapping, clip = (settings_of(SECTIONS[f"model {arch}"][1]) for arch in ("tscir_mapping", "clip_cir"))
    assert mapping["clip_model"].meaning == clip["clip_model"].meaning != ""


def test_roles_and_formulas_become_markdown():
    text = r"DPO's :math:`\beta` of :func:`~a.b.run`, or ``x``."
    assert reference.markdown(text) == r"DPO's $`\beta`$ of `run`, or `x`."


def test_a_table_is_put_after_its_mark_and_replaces_the_old_one():
    page = "# A\n\n<!-- settings: processor target_pad -->\n\n| old |\n\ntext\n"
    first = reference.with_tables(page)
    assert "| `target_ratio` | `1.25` | a number >= 1 | Largest ratio" in first
    assert "| old |" not in first
    assert first.endswith("|\n\ntext\n")
    assert reference.with_tables(first) == first


@pytest.mark.parametrize("path", sorted(PROJECTS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(PROJECTS)))
def test_the_schema_lets_every_project_through(path: Path):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(reference.json_schema()).validate(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("run", "seed", -1), ("run", "wrf", {"gama": 1}), ("model", "fusion", "late"), ("model", "fussion", "joint"),
        ("run", "task", "composed_retreival"), ("datasets", "fashioniq", {"build_info": {"gallery": "VALL"}}),
    ],
)  # fmt: skip
def test_the_schema_refuses_what_the_check_refuses(section: str, key: str, value: Any):
    jsonschema = pytest.importorskip("jsonschema")
    project = yaml.safe_load((PROJECTS / "wrf4cir/demo.yaml").read_text())
    project[section][key] = value
    assert not jsonschema.Draft202012Validator(reference.json_schema()).is_valid(project)


def test_no_model_says_a_common_key_twice():
    for name, classes in SECTIONS.items():
        if name.startswith("model "):
            counted = Counter(key for cls in classes for key in settings_of(cls))
            assert {key for key, count in counted.items() if count > 1} <= set(settings_of(LavisModel))
