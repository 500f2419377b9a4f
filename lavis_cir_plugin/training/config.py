"""Checks of a config before anything is loaded: first its names, then, with LAVIS's defaults merged in, its values.

LAVIS itself raises an error about NoneType for an unknown name, and it ignores an unknown key.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lavis.common.optims
import lavis.runners  # noqa: F401 (registers LAVIS's own runners)
import torch
import yaml
from lavis.common.config import Config
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from lavis.runners.runner_iter import RunnerIter
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import lavis_cir_plugin
from lavis_cir_plugin.benchmarks.images import refuse_output_inside
from lavis_cir_plugin.core.error_messages import did_you_mean, first_line, unknown_key
from lavis_cir_plugin.core.settings import (
    Positive,
    as_plain,
    check_argument,
    plain_value,
    section_problems,
    settings_of,
    value_problems,
)
from lavis_cir_plugin.report.run_record import flat
from lavis_cir_plugin.training.lora import LoraRun
from lavis_cir_plugin.training.resumable_runner import ResumableRunner
from lavis_cir_plugin.training.run_settings import RUN_DEFAULTS, DatasetSection, LavisModel, LavisRun

_SECTIONS = ("model", "datasets", "run")
_PROCESSORS = ("vis_processor", "text_processor")
# What omegaconf raises where a key or value does not fit; 2.4 raises Python's own TypeError where `a.0=5` meets a list.
_UNFIT = (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, KeyError, AttributeError)


class ConfigError(ValueError):
    """A config is wrong; the message has one sentence per problem."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        super().__init__(f"{source}: " + ("\n  " if len(problems) > 1 else "") + "\n  ".join(problems))


def read_config(path: str, options: Sequence[str]) -> DictConfig:
    """Read a project file, merge in options and the defaults of ``run``, and check all names.

    The options are merged before LAVIS reads the config, because LAVIS chooses default configs by the file alone: with
    LAVIS, ``--options model.model_type=x`` keeps the defaults of the old type and reports x.

    A data set with ``splits: []`` is left out, and not checked.

    Args:
        path: Path of a YAML file with the sections ``model``, ``datasets`` and ``run``.
        options: Texts of the form ``key.path=value``.

    Raises:
        ConfigError: If names or keys are unknown, or values that the file leaves to the command line (``???``) are
            missing. The message names all of them, and the nearest known names.
    """
    merged = _with_options(_load(path), path, options)
    _leave_out_unread(merged)
    problems = list(_structure(merged))
    problems += [f"{key} has no value yet; give it by --options {key}=..." for key in OmegaConf.missing_keys(merged)]
    if not problems:
        absent = {key: value for key, value in RUN_DEFAULTS.items() if key not in merged.run}
        merged = OmegaConf.merge({"run": absent}, merged)
        _make_whole(merged.run)
        problems = [*run_problems(as_plain(merged.run)), *_model_problems(as_plain(merged.model))]
        problems += [*_dataset_problems(as_plain(merged.datasets)), *_all_processor_problems(merged.datasets)]
    if problems:
        raise ConfigError(path, list(dict.fromkeys(problems)))
    return merged


def _load(path: str) -> DictConfig:
    try:
        raw = OmegaConf.load(path)
    except IsADirectoryError as error:
        raise ConfigError(path, ["is a folder; name a YAML file with the sections model, datasets and run."]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(path, [f"is not valid YAML ({' '.join(str(error).split())})."]) from error
    except _UNFIT as error:
        raise ConfigError(path, [f"{_key_of(error)}cannot be read ({first_line(error)})."]) from error
    if not isinstance(raw, DictConfig):
        raise ConfigError(path, ["must hold the sections model, datasets and run."])
    return raw


def _with_options(raw: DictConfig, path: str, options: Sequence[str]) -> DictConfig:
    """Return the config with options merged in and interpolations that resolve."""
    malformed = [option for option in options if "=" not in option]
    if malformed:
        raise ConfigError("--options", [f"{option!r} is not of the form key.path=value." for option in malformed])
    merged = raw
    for option in options:
        merged = _with_option(merged, path, option)
    try:
        OmegaConf.to_container(merged, resolve=True)
    except _UNFIT as error:
        raise ConfigError(path, [f"{_key_of(error)}cannot be resolved ({first_line(error)})."]) from error
    return merged


def _with_option(config: DictConfig, path: str, option: str) -> DictConfig:
    try:
        merged: DictConfig = OmegaConf.merge(config, OmegaConf.from_dotlist([option]))
    except _UNFIT as error:
        problem = f"{option} does not fit {path} ({first_line(error)}); give it the kind of value that stands there."
        raise ConfigError("--options", [problem]) from error
    return merged


def _key_of(error: BaseException) -> str:
    key = getattr(error, "full_key", None)
    return f"{key} " if key else ""


def _make_whole(run: DictConfig) -> None:
    """Turn whole numbers that are written as floats, such as 2e4, into integers where ``run`` takes integers."""
    for name, setting in settings_of(LavisRun).items():
        value = run.get(name)
        if isinstance(value, float) and value.is_integer() and setting.allowed.startswith("a whole number"):
            run[name] = int(value)


def with_lavis_defaults(merged: DictConfig) -> Config:
    """Let LAVIS add the defaults of model and data sets, for which it reads the project from a file.

    Raises:
        ConfigError: If a value does not fit one of these defaults.
    """
    problems = [problem for default, given in _defaults_of_lavis(merged) for problem in _misfits(default, given, "")]
    if problems:
        raise ConfigError("config", problems)
    # A file in memory needs no space on a disk, and no message can name a temporary file that is gone.
    return Config(argparse.Namespace(cfg_path=io.StringIO(OmegaConf.to_yaml(merged)), options=[]))


def _defaults_of_lavis(merged: DictConfig) -> Iterator[tuple[Any, Any]]:
    """Yield the files of defaults that LAVIS merges a project into, each with its part of the project."""
    path = registry.get_model_class(merged.model.arch).default_config_path(merged.model.model_type)
    yield OmegaConf.to_container(OmegaConf.load(path)), {"model": as_plain(merged.model)}
    for name, section in as_plain(merged.datasets).items():
        path = registry.get_builder_class(name).default_config_path(section.get("type", "default"))
        yield OmegaConf.to_container(OmegaConf.load(path)), {"datasets": {name: section}}


def _misfits(default: Any, given: Any, key: str) -> Iterator[str]:
    """Yield a sentence per mapping in the place of a list, or the reverse, which omegaconf cannot merge."""
    if isinstance(default, dict) and isinstance(given, dict):
        for name in default.keys() & given.keys():
            yield from _misfits(default[name], given[name], f"{key}.{name}" if key else str(name))
    elif {type(default), type(given)} == {dict, list}:
        kind = "mapping" if isinstance(default, dict) else "list"
        yield f"{key} must be a {kind}, as in the defaults of LAVIS, got {given!r}."


def origins(source: str, project: DictConfig, options: Sequence[str], values: Mapping[str, Any]) -> dict[str, str]:
    """Say where each value of a complete config comes from.

    The command line, the project file, the defaults of ``run``, of the model's type or of the data set; or the start
    itself, which for example makes paths absolute and chooses splits. Where the start changed what somebody wrote, the
    origin says both.

    Args:
        source: What to call the project file.
        project: Its content.
        options: ``key.path=value`` each.
        values: Of the complete config, by dotted key.
    """
    on_command_line = flat(as_plain(OmegaConf.from_dotlist(list(options))))
    given = {
        "--options": on_command_line,
        source: flat(as_plain(project)),
        "default of run": flat({"run": RUN_DEFAULTS}),
    }
    found = {}
    for key, value in values.items():
        origin = next((name for name, written in given.items() if key in written), None)
        if origin is not None:
            found[key] = origin if given[origin][key] == value else f"{origin}, completed at the start"
        elif key.startswith(("model.", "preprocess.")):
            found[key] = "default of the model's type"
        elif key.startswith("datasets.") and key.split(".")[2:] != ["splits"]:
            found[key] = "default of the data set"
        else:
            found[key] = "set at the start"
    return found


def check_values(cfg: Config, command: str) -> None:
    """Check the values of a config that LAVIS has completed with its defaults.

    Args:
        cfg: LAVIS's config object.
        command: ``train`` or ``evaluate``.

    Raises:
        ConfigError: If values are impossible; the message names the key of each and what is allowed.
    """
    problems = [
        *_run_conflicts(cfg.run_cfg, command),
        *_all_processor_problems(cfg.datasets_cfg),  # of those that LAVIS's defaults name
        *_split_conflicts(cfg, command),
        *_image_sizes(cfg),
        *_output_place(cfg),
        *_model_conflicts(cfg, command),
    ]
    if problems:
        raise ConfigError("config", problems)


def choose_splits(cfg: Config, command: str) -> None:
    """Let each data set build only the splits that this run reads, and distinguish the splits of several benchmarks.

    Thus an evaluation needs no training images, and a training run without ``valid_splits`` needs no validation images.
    Afterwards ``datasets.<name>.splits`` holds the names under which LAVIS's loop finds the splits:

    * If several benchmarks have a split of ``run.test_splits``, the split becomes one per benchmark: ``val`` becomes
      ``[fashioniq.val, cirr.val]``. LAVIS takes one data set per split and evaluates one split after the other.
    * ``cirr.val`` in ``run.valid_splits`` becomes ``val``, because LAVIS chooses a checkpoint on this name alone.
    """
    run, offered = cfg.run_cfg, _offered_splits(cfg)
    chosen: dict[str, list[str]] = {name: [] for name in offered}
    if command == "train":
        for key in ("train_splits", "valid_splits"):
            for split in run[key]:
                for owner in _owners(offered, split):
                    chosen[owner].append(plain_split_name(split))
        run.valid_splits = [plain_split_name(split) for split in run.valid_splits]
    tested = []
    for split in run.test_splits:
        owners = _owners(offered, split)
        tested += [f"{owner}.{split}" for owner in owners] if len(owners) > 1 else [split]
        for owner, name in zip(owners, tested[-len(owners) :]):
            chosen[owner].append(name)
    run.test_splits = list(dict.fromkeys(tested))  # each split is reported once
    for name, splits in chosen.items():
        cfg.datasets_cfg[name].splits = list(dict.fromkeys(splits))


def plain_split_name(split: str) -> str:
    """Return a split's name without its data set: ``val`` for ``cirr.val``, and ``val`` for ``val``."""
    return split.rpartition(".")[2]


def _offered_splits(cfg: Config) -> dict[str, list[str]]:
    """Return the splits that a run may read of each data set: those that its section names, or all that it has.

    A task with ``evaluates_benchmarks`` can train on any data set of LAVIS and evaluates benchmarks alone. For other
    tasks the result leaves out the data sets of other packages, whose splits are unknown here.
    """
    offered = {}
    for name, section in cfg.datasets_cfg.items():
        builder = registry.get_builder_class(name)
        known = builder.known_splits() if is_ours(builder) else ("train",)
        if _evaluates_benchmarks(cfg.run_cfg):
            known = known if hasattr(builder, "benchmark_module") else ("train",)
        elif not is_ours(builder):
            continue
        splits = section.get("splits")
        offered[name] = [plain_split_name(split) for split in (known if splits is None else splits)]
    return offered


def _owners(offered: Mapping[str, Sequence[str]], split: str) -> list[str]:
    """Return the data sets that a split of ``run`` means: ``cirr`` for ``cirr.val``, all that have it for ``val``."""
    owner, _, own = split.rpartition(".")
    return [name for name, splits in offered.items() if own in splits and owner in ("", name)]


def _evaluates_benchmarks(run: DictConfig) -> bool:
    return getattr(registry.get_task_class(run.task), "evaluates_benchmarks", False)


def _leave_out_unread(merged: DictConfig) -> None:
    """Remove the data sets of which a run reads nothing: ``splits: []`` turns one off, whatever else it says."""
    datasets = merged.get("datasets")
    for name, section in list(datasets.items()) if isinstance(datasets, DictConfig) else []:
        splits = section.get("splits") if isinstance(section, DictConfig) else None
        if isinstance(splits, ListConfig) and not splits:
            del datasets[name]


def _structure(merged: DictConfig) -> Iterator[str]:
    for section in _SECTIONS:
        value = merged.get(section)
        if value is None or (isinstance(value, DictConfig) and OmegaConf.is_missing(merged, section)):
            yield f"section '{section}' is missing or empty."
        elif not isinstance(value, DictConfig):
            yield f"section '{section}' must be a mapping, got {plain_value(value)!r}."
    for name in merged:
        if name not in (*_SECTIONS, "preprocess"):
            yield f"'{name}' is not a section{did_you_mean(name, _SECTIONS)}"
    datasets = merged.get("datasets")
    if isinstance(datasets, DictConfig) and not datasets:
        yield "section 'datasets' leaves no data set: name one whose splits are not []."
    for name, section in datasets.items() if isinstance(datasets, DictConfig) else ():
        if not isinstance(section, DictConfig):
            yield f"datasets.{name} must be a mapping, {{}} for its defaults, got {plain_value(section)!r}."


def _registered(key: str, name: Any, known: Sequence[str]) -> Iterator[str]:
    if name not in known:
        yield f"{key}: {name!r} is not registered{did_you_mean(name, known)} Registered: {', '.join(known)}."


def is_ours(entry: type) -> bool:
    """Return whether this package registered a class with LAVIS."""
    return entry.__module__.partition(".")[0] == lavis_cir_plugin.__name__


def _run_settings(entry: Any) -> tuple[str, ...]:
    """Return the keys of ``run`` that a runner or task reads beside LAVIS's."""
    section = getattr(entry, "RUN_SETTINGS", None)
    return tuple(settings_of(section)) if section is not None else ()


def run_sections(run: Mapping[str, Any]) -> list[type]:
    """Return the classes whose settings ``run`` holds: LAVIS's own, and those of its runner, its task and LoRA."""
    chosen = [_chosen(kind, run) for kind in ("runner", "task")]
    sections = [entry.RUN_SETTINGS for entry in (*chosen, ResumableRunner) if hasattr(entry, "RUN_SETTINGS")]
    return list(dict.fromkeys([LavisRun, LoraRun, *sections]))


def run_problems(run: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence per unknown key and per impossible value of ``run``, which has its defaults.

    If another package's task is chosen, whose keys are unknown here, only likely misspellings are reported.
    """
    yield from _registered("run.runner", run["runner"], registry.list_runners())
    yield from _registered("run.lr_sched", run["lr_sched"], registry.list_lr_schedulers())
    if "task" in run:
        yield from _registered("run.task", run["task"], registry.list_tasks())
    else:
        yield f"run.task is missing. Registered: {', '.join(registry.list_tasks())}."
    for kind in ("runner", "task"):
        yield from _foreign_run_keys(run, kind)
    read: set[str] = set()
    for section in run_sections(run):
        own = {key: value for key, value in run.items() if key in settings_of(section)}
        yield from section_problems(section, "run", own)
        read.update(settings_of(section))
    entries = [entry for kind in ("runner", "task") for entry in registry.mapping[f"{kind}_name_mapping"].values()]
    foreign = {key for entry in entries for key in _run_settings(entry)}
    task = _chosen("task", run)
    is_complete = task is not None and is_ours(task)
    for key in run:
        known = sorted(read | foreign)
        if key not in known and (is_complete or difflib.get_close_matches(str(key), known, n=1, cutoff=0.9)):
            yield unknown_key("run", str(key), known)


def _chosen(kind: str, run: Mapping[str, Any]) -> type | None:
    """Return the class of the runner or task that ``run`` names, or ``None`` if it is not registered."""
    name = run.get(kind)
    entry: type | None = registry.mapping[f"{kind}_name_mapping"].get(name) if isinstance(name, str) else None
    return entry


def _foreign_run_keys(run: Mapping[str, Any], kind: str) -> Iterator[str]:
    """Yield a sentence per key of ``run`` that only another runner (or task) than the chosen one reads."""
    if _chosen(kind, run) is None:
        return
    chosen = _run_settings(_chosen(kind, run))
    owners: dict[str, str] = {}
    for name, entry in registry.mapping[f"{kind}_name_mapping"].items():
        for key in _run_settings(entry):
            owners.setdefault(key, name)
    for key in run:
        if key in owners and key not in (*chosen, *settings_of(LavisRun)):
            yield f"run.{key} is read by {owners[key]} and has no effect under {run[kind]}."


def _model_problems(model: Mapping[str, Any]) -> Iterator[str]:
    if "arch" not in model:
        yield f"model.arch is missing. Registered: {', '.join(registry.list_models())}."
        return
    unknown = list(_registered("model.arch", model["arch"], registry.list_models()))
    if unknown:
        yield from unknown
        return
    model_class, chosen = registry.get_model_class(model["arch"]), model.get("model_type")
    types = list(model_class.PRETRAINED_MODEL_CONFIG_DICT)
    if chosen not in types:
        yield (
            f"model.model_type: {chosen!r} is no type of {model['arch']}{did_you_mean(chosen, types)} Types: "
            f"{', '.join(types)}."
        )
    if is_ours(model_class):
        own = {key: value for key, value in model.items() if key in settings_of(LavisModel)}
        yield from value_problems(LavisModel, "model", own)
        others = {key: value for key, value in model.items() if key not in own}
        yield from value_problems(model_class, "model", others, tuple(settings_of(LavisModel)))
        if model.get("finetuned") and not model.get("load_finetuned"):
            yield "model.finetuned is set and would not be read; set model.load_finetuned: true with it."


def _dataset_problems(datasets: Mapping[str, Any]) -> Iterator[str]:
    for name, section in datasets.items():
        unknown = list(_registered("datasets", name, registry.list_datasets()))
        if unknown:
            yield from unknown
            continue
        builder, chosen = registry.get_builder_class(name), section.get("type", "default")
        types = list(builder.DATASET_CONFIG_DICT)
        if chosen not in types:
            yield f"datasets.{name}.type: {chosen!r} is not one of {', '.join(types)}{did_you_mean(chosen, types)}"
        if not is_ours(builder):
            splits = settings_of(DatasetSection)["splits"]
            yield from splits.problems(f"datasets.{name}.splits", section.get("splits"))
            if section.get("noise_ratio"):
                yield (
                    f"datasets.{name}.noise_ratio is read by this package's data sets and has no effect on {name}; "
                    "leave it out, or train on garments_vqa, garments_caption, image_captions or a set of triplets."
                )
        if not isinstance(section.get("build_info", {}), Mapping):
            yield f"datasets.{name}.build_info must be a mapping, got {section['build_info']!r}."
        elif is_ours(builder):
            wrong = value_problems(DatasetSection, f"datasets.{name}", section)
            yield from wrong or builder.section_problems(name, section)


def _all_processor_problems(datasets: Any) -> Iterator[str]:
    for name, section in as_plain(datasets).items():
        for kind in _PROCESSORS:
            stages = section.get(kind, {})
            if isinstance(stages, Mapping):
                for stage, processor in stages.items():
                    yield from _processor_problems(f"datasets.{name}.{kind}.{stage}", stage, processor)
            else:
                yield f"datasets.{name}.{kind} must be a mapping, got {stages!r}."


def _processor_problems(key: str, stage: str, processor: Any) -> Iterator[str]:
    if stage not in ("train", "eval"):
        yield f"{key} is not a known key{did_you_mean(stage, ('train', 'eval'))}"
    elif processor is None and ".vis_processor." in key:
        yield f"{key} must be a mapping such as {{name: target_pad}}, got null."
    elif processor is not None and not isinstance(processor, Mapping):
        yield f"{key} must be a mapping such as {{name: target_pad}}, got {processor!r}."
    elif processor is not None:
        if "name" in processor:
            yield from _registered(f"{key}.name", processor["name"], registry.list_processors())
        chosen = processor.get("name")
        processor_class = registry.get_processor_class(chosen) if isinstance(chosen, str) else None
        if processor_class is not None and is_ours(processor_class):
            given = {name: value for name, value in processor.items() if name != "name"}
            yield from value_problems(processor_class, key, given)
        elif "image_size" in processor:
            try:
                check_argument(f"{key}.image_size", Positive, processor["image_size"])
            except ValueError as error:
                yield str(error)


def _run_conflicts(run: DictConfig, command: str) -> Iterator[str]:
    runner = registry.get_runner_class(run.runner)
    counts_iterations = issubclass(runner, RunnerIter)
    is_trained = command == "train" and not run.evaluate
    required = ["init_lr", "batch_size_train"] if is_trained else []
    if counts_iterations:  # LAVIS's constructor reads these two in an evaluation too
        required += ["max_iters", "iters_per_inner_epoch"]
    elif command == "train" and (run.get("max_iters") is None or issubclass(runner, RunnerBase)):
        required.append("max_epoch")
    yield from (f"run.{key} is missing." for key in required if run.get(key) is None)
    if is_trained and run.get("init_lr") is not None and run.min_lr > run.init_lr:
        yield (
            f"run.min_lr: {run.min_lr:g} is above run.init_lr: {run.init_lr:g}, so the learning rate would rise to it; "
            "lower run.min_lr, or leave it out: it is 0 then."
        )
    if run.lr_sched == "linear_warmup_step_lr" and not run.get("lr_decay_rate"):
        yield "run.lr_decay_rate must be a number > 0 under run.lr_sched: linear_warmup_step_lr."
    if run.get("train_dataset_ratios") is not None:
        yield (
            "run.train_dataset_ratios must stay null: LAVIS 1.0.2 ends with an error of its own where it reads the "
            "key; leave it out, and data sets are joined by their sizes."
        )
    if run.device == "cuda" and not torch.cuda.is_available():
        yield f"run.device: {run.device!r} was asked for and torch sees no GPU; set run.device: cpu."
    if run.amp and run.device == "cpu":
        yield "run.amp: true needs a GPU; set run.amp: false on a CPU."
    asked = run.resume_ckpt_path
    if asked is not None and (command == "evaluate" or run.evaluate):
        yield (
            "run.resume_ckpt_path goes on with a training run; to evaluate one set model.load_finetuned=true and "
            "model.finetuned=<checkpoint_best.pth of the run>."
        )
    if asked not in (None, "auto") and not os.path.exists(os.path.expanduser(asked)):
        yield f"run.resume_ckpt_path: {asked} does not exist; name a checkpoint, a run's folder, or auto."


def _split_conflicts(cfg: Config, command: str) -> Iterator[str]:
    keys = ("train_splits", "valid_splits", "test_splits")
    if command == "train" and not cfg.run_cfg.evaluate and list(cfg.run_cfg.train_splits) != ["train"]:
        given = list(cfg.run_cfg.train_splits)
        yield f"run.train_splits must be [train], the one split that LAVIS trains on, got {given}."
    if command == "train" or _evaluates_benchmarks(cfg.run_cfg):
        evaluated = keys[1:] if command == "train" else keys[2:]
        for key, split in [(kind, split) for kind in evaluated for split in cfg.run_cfg[kind]]:
            if plain_split_name(split) == "train":
                yield (
                    f"run.{key}: {split} is read for training alone and cannot be evaluated; benchmarks have seen, "
                    "which holds training queries."
                )
    if command == "evaluate" and not cfg.run_cfg.test_splits:
        yield "run.test_splits is empty, so lavis.evaluate has nothing to do; set run.test_splits: [val]."
    for key in keys:
        for split in cfg.run_cfg[key]:
            yield from _split_owners(cfg, key, split)
    for own, count in Counter(plain_split_name(split) for split in cfg.run_cfg.valid_splits).items():
        if count > 1:
            yield f"run.valid_splits: LAVIS validates on one {own}, got {list(cfg.run_cfg.valid_splits)}; keep one."
    if _evaluates_benchmarks(cfg.run_cfg):
        for name, section in cfg.datasets_cfg.items():
            if not hasattr(registry.get_builder_class(name), "benchmark_module"):
                yield from _training_data(f"datasets.{name}", section, command)


def _split_owners(cfg: Config, key: str, split: str) -> Iterator[str]:
    """Yield a sentence if no data set builds a split, or if several build one that must have a single owner."""
    offered = _offered_splits(cfg)
    if len(offered) < len(cfg.datasets_cfg):
        return  # the splits of other packages' builders are unknown here
    owners = _owners(offered, split)
    if not owners:
        built = "; ".join(f"datasets.{name}.splits: [{', '.join(splits)}]" for name, splits in offered.items())
        yield f"run.{key}: {split} is built by no data set ({built})."
    if len(owners) > 1 and split != "train":
        several = f"run.{key}: {split} is built by {' and '.join(owners)}, and LAVIS"
        if not _evaluates_benchmarks(cfg.run_cfg):
            yield f"{several} evaluates one data set per split; set datasets.{owners[-1]}.splits: [train]."
        elif key == "valid_splits":
            yield f"{several} chooses the best checkpoint on one of them; write [{owners[0]}.{split}], say."


def _training_data(key: str, section: DictConfig, command: str) -> Iterator[str]:
    """Yield problems of a data set that is not a benchmark: only its training split is read, with a vis_processor."""
    splits = section.get("splits")
    if splits is not None and (isinstance(splits, str) or not set(splits) <= {"train"}):
        yield f"{key}.splits: benchmarks alone are evaluated, this one can be trained on; set [train], got {splits!r}."
    if command == "train" and (section.get("vis_processor") or {}).get("train") is None:
        yield f"{key}.vis_processor.train is missing; name one and its image_size, such as {{name: blip_image_train}}."


def _model_conflicts(cfg: Config, command: str) -> Iterator[str]:
    model_class = registry.get_model_class(cfg.model_cfg.arch)
    if not is_ours(model_class):
        return
    try:
        model_class.check_config(cfg.model_cfg)
    except ValueError as error:
        yield from str(error).splitlines()
    if cfg.run_cfg.device == "cpu" and cfg.model_cfg.get("vit_precision") == "fp16":
        yield "model.vit_precision: 'fp16' needs a GPU; on a CPU set model.vit_precision: fp32."
    needs_finetuned = getattr(model_class, "needs_finetuned", False)
    if callable(needs_finetuned):
        needs_finetuned = needs_finetuned(cfg.model_cfg)
    has_weights = cfg.model_cfg.get("pretrained") and not needs_finetuned
    if command == "evaluate" and not (has_weights or cfg.model_cfg.get("load_finetuned")):
        yield (
            "lavis.evaluate would score random weights: set model.load_finetuned=true and "
            "model.finetuned=<checkpoint_best.pth of a run>."
        )


def _image_sizes(cfg: Config) -> Iterator[str]:
    """Yield a sentence per picture size other than the model's, which LAVIS notices in the first batch alone."""
    if not is_ours(registry.get_model_class(cfg.model_cfg.arch)):
        return
    size = cfg.model_cfg.get("image_size")
    for name, section in cfg.datasets_cfg.items():
        for stage, processor in (section.get("vis_processor") or {}).items():
            given = processor.get("image_size") if isinstance(processor, DictConfig) else None
            if None not in (size, given) and size != given:
                key = f"datasets.{name}.vis_processor.{stage}.image_size"
                yield f"{key}: {given} differs from model.image_size: {size}."


def _output_place(cfg: Config) -> Iterator[str]:
    """Yield a sentence if the output folder lies in a folder whose every picture belongs to a data set."""
    for name, section in cfg.datasets_cfg.items():
        module = getattr(registry.get_builder_class(name), "benchmark_module", None)
        image_folder = getattr(module, "image_folder", None)
        if image_folder is not None and isinstance(cfg.run_cfg.output_dir, str):
            try:
                folder = image_folder(as_plain(section.get("build_info")))
                output = Path(os.path.expanduser(cfg.run_cfg.output_dir))
                refuse_output_inside(output, folder, f"datasets.{name}.build_info")
            except ValueError as error:
                yield str(error)
