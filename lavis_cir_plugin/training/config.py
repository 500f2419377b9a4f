"""Checks of a config before anything is loaded: first its names, then, with LAVIS's defaults merged in, its values.

LAVIS itself raises an error about NoneType for an unknown name, and it ignores an unknown key.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lavis.common.optims
import lavis.runners  # noqa: F401 (registers LAVIS's own runners)
import torch
import yaml
from lavis.common.config import Config, create_runner_config_validator
from lavis.common.registry import registry
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import lavis_cir_plugin
from lavis_cir_plugin.benchmarks.images import refuse_output_inside
from lavis_cir_plugin.core.error_messages import did_you_mean, unknown_key
from lavis_cir_plugin.core.settings import as_plain, is_number
from lavis_cir_plugin.report.run_record import flat
from lavis_cir_plugin.training import lora
from lavis_cir_plugin.training.resumable_runner import ResumableRunner

# Defaults of ``run``, which a project file need not repeat.
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
# Readers of ``run`` beside runners and tasks. A reader has RUN_KEYS and run_problems.
_RUN_KEY_READERS: tuple[Any, ...] = (ResumableRunner, lora)
_TRAINING_KEYS = ("init_lr", "max_epoch", "batch_size_train")

# Keys that LAVIS's runners and tasks read and that its own (unused) validator lacks.
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
    try:
        OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(path), [f"cannot be resolved ({str(error).splitlines()[0]})."]) from error
    _leave_out_unread(merged)
    problems = list(_sections(merged))
    problems += [f"{key} has no value yet; give it by --options {key}=..." for key in OmegaConf.missing_keys(merged)]
    if not problems:
        merged = OmegaConf.merge({"run": RUN_DEFAULTS}, merged)
        problems = [*_run_names(merged.run), *_model_names(merged.model), *_dataset_names(merged.datasets)]
    if problems:
        raise ConfigError(str(path), problems)
    return merged


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
        *_run_values(cfg.run_cfg, command),
        *_split_values(cfg, command),
        *_image_sizes(cfg),
        *_output_place(cfg),
        *_model_values(cfg, command),
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
        known = builder.known_splits() if _is_ours(builder) else ("train",)
        if _evaluates_benchmarks(cfg.run_cfg):
            known = known if hasattr(builder, "benchmark_module") else ("train",)
        elif not _is_ours(builder):
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


def _sections(merged: DictConfig) -> Iterator[str]:
    for section in ("model", "datasets", "run"):
        if not isinstance(merged.get(section), DictConfig):
            yield f"section '{section}' is missing or empty."
    if isinstance(merged.get("datasets"), DictConfig) and not merged.datasets:
        yield "section 'datasets' leaves no data set: name one whose splits are not []."
    for name, section in (merged.get("datasets") or {}).items():
        if not isinstance(section, DictConfig):
            yield f"datasets.{name} must be a mapping, {{}} for its defaults, got {section!r}."
            continue
        for kind in ("vis_processor", "text_processor", "build_info"):
            if not isinstance(section.get(kind, merged), DictConfig):
                yield f"datasets.{name}.{kind} must be a mapping, got {section[kind]!r}."
    for name in merged:
        if name not in ("model", "datasets", "run", "preprocess"):
            yield f"'{name}' is not a section{did_you_mean(name, ('model', 'datasets', 'run'))}"


def _registered(key: str, name: Any, known: Sequence[str]) -> Iterator[str]:
    if name not in known:
        yield f"{key}: {name!r} is not registered{did_you_mean(name, known)} Registered: {', '.join(known)}."


def _known_keys(where: str, given: Iterable[str], known: Iterable[str], is_complete: bool = True) -> Iterator[str]:
    """Yield a sentence per unknown key. If the known keys are incomplete, only likely misspellings are reported."""
    known = sorted(known)
    for key in given:
        is_slip = bool(difflib.get_close_matches(key, known, n=1, cutoff=0.9))
        if key not in known and (is_complete or is_slip):
            yield unknown_key(where, key, known)


def _is_ours(entry: type) -> bool:
    return entry.__module__.partition(".")[0] == lavis_cir_plugin.__name__


def _run_names(run: DictConfig) -> Iterator[str]:
    yield from _registered("run.runner", run.runner, registry.list_runners())
    yield from _registered("run.lr_sched", run.lr_sched, registry.list_lr_schedulers())
    if "task" not in run:
        yield f"run.task is missing. Registered: {', '.join(registry.list_tasks())}."
        return
    yield from _registered("run.task", run.task, registry.list_tasks())
    task, runner = registry.get_task_class(run.task), registry.get_runner_class(run.runner)
    yield from _foreign_run_keys(run, "runner", registry.mapping["runner_name_mapping"])
    yield from _foreign_run_keys(run, "task", registry.mapping["task_name_mapping"])
    readers = [entry for entry in (runner, task, *_RUN_KEY_READERS) if hasattr(entry, "RUN_KEYS")]
    known = {*RUN_DEFAULTS, *create_runner_config_validator().arguments, *_RUN_KEYS_OF_LAVIS}
    known.update(key for reader in readers for key in reader.RUN_KEYS)
    foreign = {
        key
        for kind in ("runner", "task")
        for entry in registry.mapping[f"{kind}_name_mapping"].values()
        for key in getattr(entry, "RUN_KEYS", ())
    }
    yield from _known_keys("run", run, {*known, *foreign}, is_complete=task is not None and _is_ours(task))
    for reader in readers:
        yield from reader.run_problems(as_plain(run))


def _foreign_run_keys(run: DictConfig, kind: str, entries: Mapping[str, type]) -> Iterator[str]:
    """Yield a sentence per key of ``run`` that only another runner (or task) than the chosen one reads."""
    chosen = getattr(entries.get(run[kind]), "RUN_KEYS", ())
    owners: dict[str, str] = {}
    for name, entry in entries.items():
        for key in getattr(entry, "RUN_KEYS", ()):
            owners.setdefault(key, name)
    for key in run:
        if key in owners and key not in chosen:
            yield f"run.{key} is read by {owners[key]} and has no effect under {run[kind]}."


def _model_names(model: DictConfig) -> Iterator[str]:
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
        if model.get("finetuned") and not model.get("load_finetuned"):
            yield "model.finetuned is set and would not be read; set model.load_finetuned: true with it."


def _dataset_names(datasets: DictConfig) -> Iterator[str]:
    for name, section in datasets.items():
        yield from _registered("datasets", name, registry.list_datasets())
        builder = registry.get_builder_class(name)
        if builder is None:
            continue
        types = list(builder.DATASET_CONFIG_DICT)
        if section.get("type", "default") not in types:
            yield (
                f"datasets.{name}.type: {section.type!r} is not one of {', '.join(types)}"
                f"{did_you_mean(section.type, types)}"
            )
        for kind in ("vis_processor", "text_processor"):
            for stage, processor in (section.get(kind) or {}).items():
                yield from _processor_problems(f"datasets.{name}.{kind}.{stage}", stage, processor)
        if _is_ours(builder):
            yield from _known_keys(f"datasets.{name}", section, _DATASET_KEYS)
            yield from builder.section_problems(name, section)


def _processor_problems(key: str, stage: str, processor: Any) -> Iterator[str]:
    if stage not in ("train", "eval"):
        yield f"{key} is not a known key{did_you_mean(stage, ('train', 'eval'))}"
    elif processor is not None and not isinstance(processor, DictConfig):
        yield f"{key} must be a mapping such as {{name: target_pad}}, got {processor!r}."
    elif processor is not None and "name" in processor:
        yield from _registered(f"{key}.name", processor.name, registry.list_processors())
        processor_class = registry.get_processor_class(processor.name)
        if processor_class is not None and _is_ours(processor_class):
            yield from _known_keys(key, processor, ("name", *inspect.signature(processor_class).parameters))


def _run_values(run: DictConfig, command: str) -> Iterator[str]:
    if command == "train":
        # Iteration-based runners count max_iters instead of max_epoch; LAVIS checks this pair of keys itself.
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
        "accum_grad_iters": 1,
        "log_freq": 1,
    }
    for key, least in whole.items():
        value = run.get(key)
        if value is not None and not (is_number(value) and int(value) == value and value >= least):
            yield f"run.{key} must be a whole number >= {least}, got {value!r}."
    for key in ("evaluate", "amp"):
        if not isinstance(run[key], bool):
            yield f"run.{key} must be true or false, got {run[key]!r}."
    if not isinstance(run.output_dir, str) or not run.output_dir:
        yield f"run.output_dir must be the path of a folder, got {run.output_dir!r}."
    if run.lr_sched == "linear_warmup_step_lr" and not run.get("lr_decay_rate"):
        yield "run.lr_decay_rate must be a number > 0 under run.lr_sched: linear_warmup_step_lr."
    for key, strict in {"init_lr": True, "lr_decay_rate": True, "min_lr": False, "weight_decay": False}.items():
        value = run.get(key)
        if value is not None and not (is_number(value) and (value > 0 if strict else value >= 0)):
            yield f"run.{key} must be a number {'> 0' if strict else '>= 0'}, got {value!r}."
    warmup_lr = run.get("warmup_lr", -1)
    if not is_number(warmup_lr) or (warmup_lr < 0 and warmup_lr != -1):
        yield f"run.warmup_lr must be a number >= 0, got {warmup_lr!r}."
    beta2 = run.get("beta2", 0.999)
    if not is_number(beta2) or not 0 <= beta2 < 1:
        yield f"run.beta2 must be >= 0 and < 1, got {beta2!r}."
    device = str(run.device)
    if device not in ("cpu", "cuda"):
        yield f"run.device: {device!r} is neither cpu nor cuda (one GPU of several: CUDA_VISIBLE_DEVICES)."
    elif device == "cuda" and not torch.cuda.is_available():
        yield f"run.device: {device!r} was asked for and torch sees no GPU; set run.device: cpu."
    if run.amp is True and device == "cpu":
        yield "run.amp: true needs a GPU; set run.amp: false on a CPU."
    asked = run.resume_ckpt_path
    if asked is not None and (command == "evaluate" or run.evaluate is True):
        yield (
            "run.resume_ckpt_path goes on with a training run; to evaluate one set model.load_finetuned=true and "
            "model.finetuned=<checkpoint_best.pth of the run>."
        )
    if asked not in (None, "auto") and not os.path.exists(os.path.expanduser(str(asked))):
        yield f"run.resume_ckpt_path: {asked} does not exist; name a checkpoint, a run's folder, or auto."


def _split_values(cfg: Config, command: str) -> Iterator[str]:
    keys = ("train_splits", "valid_splits", "test_splits")
    malformed = [key for key in keys if not isinstance(cfg.run_cfg[key], ListConfig)]
    yield from (f"run.{key} must be a list such as [val], got {cfg.run_cfg[key]!r}." for key in malformed)
    if malformed:
        return
    if command == "train" and cfg.run_cfg.evaluate is not True and "train" not in cfg.run_cfg.train_splits:
        yield f"run.train_splits must name train, got {list(cfg.run_cfg.train_splits)}."
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


def _model_values(cfg: Config, command: str) -> Iterator[str]:
    model_class = registry.get_model_class(cfg.model_cfg.arch)
    if not _is_ours(model_class):
        return
    try:
        model_class.check_config(cfg.model_cfg)
    except ValueError as error:
        yield str(error)
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
    if not _is_ours(registry.get_model_class(cfg.model_cfg.arch)):
        return
    size = cfg.model_cfg.get("image_size")
    for name, section in cfg.datasets_cfg.items():
        for stage, processor in (section.get("vis_processor") or {}).items():
            given = processor.get("image_size") if processor is not None else None
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
