"""Any value at any key of any shipped project: the check passes, or its sentences name that key."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.core.settings import as_plain, settings_of
from lavis_cir_plugin.training import config
from lavis_cir_plugin.training.launcher import find_config

FILES = sorted(PROJECTS.rglob("*.yaml"))
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**32, 10**30, 0.5, 1.5, -0.1, float("nan"), float("inf"), "", "abc", "0.1", "*",
    [], [1, 2], ["a"], [["a"]], [None], {}, {"a": 1}, {0: 1}, {"a": {"b": None}}, {"name": []},
]  # fmt: skip
EXAMPLES = int(os.environ.get("CIR_EXAMPLES", "60"))


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def filled(path: Path) -> list[str]:
    """Return options for the values that a project leaves open."""
    return [f"{key}=given" for key in OmegaConf.missing_keys(OmegaConf.load(path))]


def command_of(path: Path) -> str:
    return "train" if OmegaConf.load(path).run.get("train_splits") else "evaluate"


def check(path: Path, options: list[str], command: str = "train") -> None:
    merged = config.read_config(str(path), options)
    config.check_values(config.with_lavis_defaults(merged), command)


def keys_below(value: Any, place: str = "") -> Iterator[str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        key = f"{place}.{name}" if place else str(name)
        yield key
        yield from keys_below(inner, key)


def keys_of(path: Path) -> list[str]:
    """Return the full names of all that a project may set: of the merged config, and of all its schemas."""
    merged = config.read_config(str(path), filled(path))
    complete = config.with_lavis_defaults(merged).config
    keys = set(keys_below({name: as_plain(complete[name]) for name in ("model", "datasets", "run")}))
    for section in config.run_sections(as_plain(merged.run)):
        keys |= {f"run.{name}" for name in settings_of(section)}
        inner = {name: setting.section for name, setting in settings_of(section).items() if setting.section}
        keys |= {f"run.{name}.{part}" for name, cls in inner.items() for part in settings_of(cls)}
    keys |= {f"model.{name}" for name in settings_of(registry.get_model_class(merged.model.arch))}
    for name in merged.datasets:
        module = getattr(registry.get_builder_class(name), "benchmark_module", None)
        keys |= {f"datasets.{name}.build_info.{part}" for part in (settings_of(module.CONFIG) if module else ())}
    return sorted(keys)


def answer(path: Path, key: str, value: Any, folder: Path) -> list[str]:
    """Return the sentences of the check of a project with one value replaced, and [] if it passes."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")
    command = command_of(path)
    if isinstance(value, (dict, list)):  # an option would be merged with what the project has; a file replaces it
        raw = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(filled(path)))
        if not any(part.isdigit() for part in key.split(".")):
            OmegaConf.update(raw, key, value, merge=False, force_add=True)
            path, options = folder / "project.yaml", []
            OmegaConf.save(raw, path)
        else:
            options = [f"{key}={text}"]
    else:
        options = [*filled(path), f"{key}={text}"]
    try:
        check(path, options, command)
    except config.ConfigError as error:
        first, *others = str(error).splitlines()
        return [line.strip() for line in others] or [first.removeprefix(f"{path}: ")]
    return []


def is_about(key: str, sentences: list[str]) -> bool:
    """Return whether each sentence names the key, or the section that it opens, such as `run.lora`."""
    parent, _, name = key.rpartition(".")
    return all(name in sentence or ("." in parent and parent in sentence) for sentence in sentences)


def test_any_value_at_any_key_runs_or_is_answered_by_its_name(tmp_path: Path):
    drawn = random.Random(0)
    keys = {path: keys_of(path) for path in drawn.sample(FILES, min(len(FILES), 2 + EXAMPLES // 8))}
    wrong = []
    for _ in range(EXAMPLES):
        path = drawn.choice(list(keys))
        key, value = drawn.choice(keys[path]), drawn.choice(VALUES)
        try:
            sentences = answer(path, key, value, tmp_path)
        except Exception as error:
            sentences = [f"{type(error).__name__}: {error}"]
            wrong.append((path.name, key, value, sentences))
            continue
        if sentences and not is_about(key, sentences):
            wrong.append((path.name, key, value, sentences))
    assert wrong == []


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("run.train_splits.0=train", r"run\.train_splits\.0=train does not fit|run\.train_splits must be a list"),
        ("run=[]", r"run=\[\] does not fit .*; give it the kind of value that stands there"),
        ("datasets=[]", r"datasets=\[\] does not fit"),
        ("datasets=abc", r"section 'datasets' must be a mapping, got 'abc'"),
        ("model=[x]", r"model=\[x\] does not fit"),
        ("run.valid_splits={a: 1}", r"run\.valid_splits=\{a: 1\} does not fit|run\.valid_splits must be a list"),
        ("run.train_splits=[1,2]", r"run\.train_splits must be a list such as \[val\], got \[1, 2\]"),
        ("datasets.fashioniq.splits=true", r"datasets\.fashioniq\.splits must be a list such as .*, or null, got true"),
        ("run.task=[a]", r"run\.task: \['a'\] is not registered"),
        ("run.runner={a: 1}", r"run\.runner: \{'a': 1\} is not registered"),
        ("model.arch=[a]", r"model\.arch: \['a'\] is not registered"),
        ("datasets.fashioniq.vis_processor.eval.name=[a]", r"vis_processor\.eval\.name: \['a'\] is not registered"),
        *((f"run.{key}=null", rf"run\.{key} must be a .*, got null") for key in (
            "seed", "num_workers", "batch_size_eval", "min_lr", "weight_decay", "warmup_steps", "accum_grad_iters",
            "log_freq",
        )),
        ("model.image_size=null", r"model\.image_size must be a whole number >= 1, got null"),
        ("datasets.fashioniq.vis_processor.eval.image_size=null", r"eval\.image_size must be a whole number >= 1, got"),
        ("run.seed=4294967296", r"run\.seed must be a whole number >= 0 and <= 4294967295, got 4294967296"),
        *((f"model.drop_path_rate={value}", r"model\.drop_path_rate must be a number >= 0 and < 1, got ")
          for value in ("abc", ".nan", "1.5", "-1")),
        *((f"datasets.fashioniq.vis_processor.eval.target_ratio={value}", r"target_ratio must be a number >= 1, got ")
          for value in ("abc", ".nan", "-1")),
        ("model.pretrained=-1", r"model\.pretrained must be a path, URL or name, or null, got -1"),
        ("model.tokenizer=-1", r"model\.tokenizer must be a folder, .*, got -1"),
        ("run.world_size=abc", r"run\.world_size must be a whole number >= 1, got 'abc'"),
        ("datasets.fashioniq.data_type=abc", r"datasets\.fashioniq\.data_type must be one of images, got 'abc'"),
        ("run.runner=runner_wrf4cir_iter", r"run\.max_iters is missing"),
        ("run.batch_size_train=[", r"run\.batch_size_train=\[ does not fit"),
    ],
)  # fmt: skip
def test_values_that_once_ended_in_a_traceback_or_later(option: str, sentence: str):
    with pytest.raises(config.ConfigError, match=sentence):
        check(PROJECTS / "wrf4cir/demo.yaml", [option])


def test_a_folder_is_called_a_folder():
    with pytest.raises(ValueError, match=r"--cfg-path .* names a folder; name a YAML file"):
        find_config(str(PROJECTS))


def test_whole_numbers_may_be_written_as_floats():
    options = ["run.runner=runner_wrf4cir_iter", "run.max_iters=2e4", "run.iters_per_inner_epoch=2e3"]
    run = config.read_config(str(PROJECTS / "wrf4cir/demo.yaml"), options).run
    assert (run.max_iters, type(run.max_iters), run.iters_per_inner_epoch) == (20000, int, 2000)


def test_a_key_that_yaml_reads_as_a_number_is_named():
    with pytest.raises(config.ConfigError, match=r"run\.0 is not a known key"):
        check(PROJECTS / "wrf4cir/demo.yaml", ["run={0: 1}"])
