"""Check a config before LAVIS acts on it: names first, then, after LAVIS has merged its defaults, values.

LAVIS itself answers an unknown name with an error about NoneType and an unknown key with silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lavis.common.optims
import lavis.runners  # noqa: F401 (registers LAVIS's own runners)
import torch
import yaml
from lavis.common.config import Config, create_runner_config_validator
from lavis.common.registry import registry
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_cir_plugin.benchmarks.benchmark import did_you_mean

# What a project file need not repeat.
RUN_DEFAULTS: dict[str, Any] = {
    "runner": "runner_base",
    "lr_sched": "linear_warmup_cosine_lr",
    "min_lr": 0,
    "weight_decay": 0.05,
    "batch_size_eval": 64,
    "num_workers": 4,
    "seed": 42,
    "output_dir": "output",
    "amp": False,
    "resume_ckpt_path": None,
    "evaluate": False,
    "device": "cuda",
    "world_size": 1,
    "dist_url": "env://",
    "train_splits": [],
    "valid_splits": [],
    "test_splits": [],
}
_TRAINING_KEYS = ("init_lr", "max_epoch", "batch_size_train")

# Read by LAVIS's runners and tasks, and missing in its own (unused) validator.
_RUN_KEYS_OF_LAVIS = (
    "amp",
    "beta2",
    "log_freq",
    "resume_ckpt_path",
    "train_dataset_ratios",
    "prompt",
    "load_gt_from_file",
)
_MODEL_KEYS = ("arch", "model_type", "load_finetuned", "pretrained", "finetuned", "vit_pretrained")
_DATASET_KEYS = ("type", "data_type", "splits", "preload", "build_info", "garments", "vis_processor", "text_processor")


class ConfigError(ValueError):
    """Everything that is wrong with a config, one sentence each."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        super().__init__(f"{source}: " + ("\n  " if len(problems) > 1 else "") + "\n  ".join(problems))


def read_config(path: str, options: Sequence[str]) -> DictConfig:
    """Return a project file with command-line overrides and the defaults of ``run`` merged in, all names checked.

    The overrides go in before LAVIS looks, because it picks default configs by the file alone: with LAVIS,
    ``--options model.model_type=x`` keeps the old type's defaults and reports x.

    Args:
        path: YAML file with ``model``, ``datasets`` and ``run``.
        options: ``key.path=value`` each.

    Raises:
        ConfigError: With every unknown name and key, and the nearest known one.
    """
    try:
        raw = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"is not valid YAML ({' '.join(str(error).split())})."]) from error
    if not isinstance(raw, DictConfig):
        raise ConfigError(str(path), ["must hold the sections model, datasets and run."])
    malformed = [option for option in options if "=" not in option]
    if malformed:
        raise ConfigError("--options", [f"{option!r} is not of the form key.path=value." for option in malformed])
    try:
        merged = OmegaConf.merge(raw, OmegaConf.from_dotlist(list(options)))
    except OmegaConfBaseException as error:
        raise ConfigError("--options", [f"cannot be merged into {path} ({str(error).splitlines()[0]})."]) from error
    problems = list(_sections(merged))
    if not problems:
        merged = OmegaConf.merge({"run": RUN_DEFAULTS}, merged)
        problems = [*_run_names(merged.run), *_model_names(merged.model, merged.run), *_dataset_names(merged.datasets)]
    if problems:
        raise ConfigError(str(path), problems)
    return merged


def check_values(cfg: Config, command: str) -> None:
    """Check the values of a config that LAVIS has completed with its defaults.

    Args:
        cfg: LAVIS's config.
        command: ``train`` or ``evaluate``.

    Raises:
        ConfigError: With every impossible value, what is allowed, and its key.
    """
    problems = [*_run_values(cfg.run_cfg, command), *_split_values(cfg), *_image_sizes(cfg)]
    if problems:
        raise ConfigError("config", problems)


def choose_splits(cfg: Config, command: str) -> None:
    """Let each of our data sets build only the splits that this run reads, unless its section says which.

    So an evaluation needs no training images, and a training run without ``valid_splits`` no validation images.
    """
    keys = ("train_splits", "valid_splits", "test_splits") if command == "train" else ("test_splits",)
    needed = list(dict.fromkeys(split for key in keys for split in cfg.run_cfg[key]))
    for name, section in cfg.datasets_cfg.items():
        if _is_ours(registry.get_builder_class(name)) and section.get("splits") is None:
            section.splits = needed


def _sections(merged: DictConfig) -> Iterator[str]:
    for section in ("model", "datasets", "run"):
        if not isinstance(merged.get(section), DictConfig):
            yield f"section '{section}' is missing or empty."
    for name in merged:
        if name not in ("model", "datasets", "run", "preprocess"):
            yield f"'{name}' is not a section{did_you_mean(name, ('model', 'datasets', 'run'))}"


def _registered(key: str, name: Any, known: Sequence[str]) -> Iterator[str]:
    if name not in known:
        yield f"{key}: {name!r} is not registered{did_you_mean(name, known)} Registered: {', '.join(known)}."


def _known_keys(where: str, given: Iterable[str], known: Iterable[str], is_complete: bool = True) -> Iterator[str]:
    """Name unknown keys; of a list that LAVIS does not state completely, only those that look like a slip."""
    known = sorted(known)
    for key in given:
        hint = did_you_mean(key, known)
        has_hint = hint != "."
        if key not in known and (is_complete or has_hint):
            allowed = "" if has_hint else f" Known: {', '.join(known)}."
            yield f"{where}.{key} is not a known key{hint}{allowed}"


def _is_ours(entry: type) -> bool:
    return entry.__module__.startswith(__package__)


def _run_names(run: DictConfig) -> Iterator[str]:
    yield from _registered("run.runner", run.runner, registry.list_runners())
    yield from _registered("run.lr_sched", run.lr_sched, registry.list_lr_schedulers())
    if "task" not in run:
        yield f"run.task is missing. Registered: {', '.join(registry.list_tasks())}."
        return
    yield from _registered("run.task", run.task, registry.list_tasks())
    runners = {name: registry.get_runner_class(name) for name in registry.list_runners()}
    owners = {key: name for name, runner in runners.items() for key in getattr(runner, "RUN_KEYS", ())}
    foreign = [key for key in run if owners.get(key, run.runner) != run.runner]
    yield from (f"run.{key} is read by {owners[key]} and has no effect under {run.runner}." for key in foreign)
    known = {*RUN_DEFAULTS, *create_runner_config_validator().arguments, *_RUN_KEYS_OF_LAVIS, *owners}
    task = registry.get_task_class(run.task)
    yield from _known_keys("run", run, known, is_complete=task is not None and _is_ours(task))
    runner = runners.get(run.runner)
    if runner is not None and hasattr(runner, "run_problems"):
        yield from runner.run_problems(as_plain(run))


def _model_names(model: DictConfig, run: DictConfig) -> Iterator[str]:
    if "arch" not in model:
        yield f"model.arch is missing. Registered: {', '.join(registry.list_models())}."
        return
    yield from _registered("model.arch", model.arch, registry.list_models())
    model_class = registry.get_model_class(model.arch)
    if model_class is None:
        return
    types = list(model_class.PRETRAINED_MODEL_CONFIG_DICT)
    if model.get("model_type") not in types:
        yield (
            f"model.model_type: {model.get('model_type')!r} is no type of {model.arch}"
            f"{did_you_mean(model.get('model_type'), types)} Types: {', '.join(types)}."
        )
    if _is_ours(model_class):
        yield from _known_keys("model", model, (*_MODEL_KEYS, *model_class.__init__.__kwdefaults__))


def _dataset_names(datasets: DictConfig) -> Iterator[str]:
    for name, section in datasets.items():
        yield from _registered("datasets", name, registry.list_datasets())
        builder = registry.get_builder_class(name)
        if builder is None or section is None:
            continue
        types = list(builder.DATASET_CONFIG_DICT)
        if section.get("type", "default") not in types:
            yield (
                f"datasets.{name}.type: {section.type!r} is not one of {', '.join(types)}"
                f"{did_you_mean(section.type, types)}"
            )
        if _is_ours(builder):
            yield from _known_keys(f"datasets.{name}", section, _DATASET_KEYS)
        for kind in ("vis_processor", "text_processor"):
            for stage, processor in (section.get(kind) or {}).items():
                if processor is not None and "name" in processor:
                    key = f"datasets.{name}.{kind}.{stage}.name"
                    yield from _registered(key, processor.name, registry.list_processors())


def _run_values(run: DictConfig, command: str) -> Iterator[str]:
    if command == "train":
        # Iteration-based runners count by max_iters instead of max_epoch; LAVIS checks that pair itself.
        counted_by_iterations = run.get("max_iters") is not None
        for key in _TRAINING_KEYS:
            if run.get(key) is None and not (key == "max_epoch" and counted_by_iterations):
                yield f"run.{key} is missing."
    whole = {
        "max_epoch": 1,
        "batch_size_train": 1,
        "batch_size_eval": 1,
        "num_workers": 0,
        "seed": 0,
        "warmup_steps": 0,
    }
    whole.update(accum_grad_iters=1, log_freq=1)
    for key, least in whole.items():
        value = run.get(key)
        if value is not None and not (_is_number(value) and int(value) == value and value >= least):
            yield f"run.{key} must be a whole number >= {least}, got {value!r}."
    for key, strict in {"init_lr": True, "min_lr": False, "weight_decay": False}.items():
        value = run.get(key)
        if value is not None and not (_is_number(value) and (value > 0 if strict else value >= 0)):
            yield f"run.{key} must be a number {'> 0' if strict else '>= 0'}, got {value!r}."
    beta2 = run.get("beta2", 0.999)
    if not _is_number(beta2) or not 0 <= beta2 < 1:
        yield f"run.beta2 must be >= 0 and < 1, got {beta2!r}."
    device = str(run.device)
    if not device.startswith(("cpu", "cuda")):
        yield f"run.device: {device!r} is neither cpu nor cuda."
    elif device.startswith("cuda") and not torch.cuda.is_available():
        yield f"run.device: {device!r} was asked for and torch sees no GPU; set run.device: cpu."
    if run.amp and not device.startswith("cuda"):
        yield "run.amp: true needs a GPU; set run.amp: false on a CPU."
    if run.resume_ckpt_path is not None and not os.path.isfile(str(run.resume_ckpt_path)):
        yield f"run.resume_ckpt_path: {run.resume_ckpt_path} does not exist."


def _split_values(cfg: Config) -> Iterator[str]:
    for key in ("train_splits", "valid_splits", "test_splits"):
        if not isinstance(cfg.run_cfg[key], ListConfig):
            yield f"run.{key} must be a list such as [val], got {cfg.run_cfg[key]!r}."
            continue
        for name, section in cfg.datasets_cfg.items():
            unknown = set(cfg.run_cfg[key]) - set(section.get("splits") or cfg.run_cfg[key])
            if unknown:
                yield (
                    f"run.{key}: {', '.join(sorted(unknown))} is not built by datasets.{name}.splits: "
                    f"{list(section.splits)}."
                )


def _image_sizes(cfg: Config) -> Iterator[str]:
    """A tower takes pictures of one size; LAVIS finds out in the first batch, by an assertion."""
    size = cfg.model_cfg.get("image_size")
    for name, section in cfg.datasets_cfg.items():
        for stage, processor in (section.get("vis_processor") or {}).items():
            given = processor.get("image_size") if processor is not None else None
            if None not in (size, given) and size != given:
                key = f"datasets.{name}.vis_processor.{stage}.image_size"
                yield f"{key}: {given} differs from model.image_size: {size}."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_plain(section: Any) -> Mapping[str, Any]:
    """Return a config section as plain containers, interpolations resolved; an absent one is empty."""
    plain = OmegaConf.to_container(section, resolve=True) if section is not None else {}
    return plain if isinstance(plain, dict) else {}
