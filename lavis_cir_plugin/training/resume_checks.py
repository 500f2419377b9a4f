"""Checks of a checkpoint before a run goes on from it: its content, its optimizer, and the order of its data."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from lavis_cir_plugin.core.error_messages import printable
from lavis_cir_plugin.core.processes import rank_and_world

# The order of the data, and hence the position to go on from, depends on these keys.
_MUST_AGREE = ("seed", "batch_size_train", "accum_grad_iters", "iters_per_inner_epoch")
_MAY_DIFFER = ("resume_ckpt_path", "output_dir", "num_workers", "log_freq", "save_every", "distributed", "rank", "gpu",
               "world_size", "dist_url", "dist_backend", "device", "feature_cache")  # fmt: skip

_Check = tuple[str, Any, Any, str]
"""Key of a part of a checkpoint, its value, whether it can be used, and a description of values that can."""


def check_saved_run(saved: Any, path: str, counts: str, runner: Any) -> None:
    """Check that a file has the content of a run's checkpoint, before any of it is loaded.

    Args:
        saved: Content of the file.
        path: Path of the file, for the messages.
        counts: Unit that this run counts, ``epoch`` or ``iters``.
        runner: Value of ``run.runner``.

    Raises:
        ValueError: If a part is missing or cannot be used; the message names the first one.
    """
    _refuse_other_files(saved, path, counts, runner)
    checks = [*_lavis_checks(saved, counts), *(_progress_checks(saved) if "progress" in saved else ())]
    for key, value, is_right, what in checks:
        if not is_right:
            raise _unusable(path, key, value, what)


def _refuse_other_files(saved: Any, path: str, counts: str, runner: Any) -> None:
    missing = [key for key in ("model", "optimizer") if not isinstance(saved, Mapping) or key not in saved]
    if missing:
        raise ValueError(
            f"run.resume_ckpt_path: {path} holds no {' and no '.join(missing)}, so it is no "
            "checkpoint of a LAVIS run; to start from its weights set model.finetuned and model.load_finetuned."
        )
    if counts not in saved:
        raise ValueError(
            f"run.resume_ckpt_path: {path} counts no {counts}, so it was written by another kind of "
            f"runner than run.runner: {runner}; choose that runner."
        )
    if "progress" in saved and "config" not in saved:
        raise ValueError(
            f"run.resume_ckpt_path: {path} holds progress and no config, so that nothing tells whether the order of "
            "the data is the same; resume from another checkpoint of that run, or start a new one from these weights "
            "(model.finetuned)."
        )


def _lavis_checks(saved: Mapping[str, Any], counts: str) -> list[_Check]:
    """Return the checks of the parts that a checkpoint of LAVIS has."""
    model, scaler = saved["model"], saved.get("scaler")
    return [
        ("model", model, _is_mapping_of(model, str, Tensor) and model, "tensors by name"),
        ("optimizer", saved["optimizer"], _is_optimizer(saved["optimizer"]), "an optimizer's state and param_groups"),
        (counts, saved[counts], _is_whole(saved[counts], -1), "a whole number"),
        ("scaler", scaler, isinstance(scaler, (Mapping, type(None))), "a mapping or null"),
    ]


def _progress_checks(saved: Mapping[str, Any]) -> list[_Check]:
    """Return the checks of the parts that a resumable run adds."""
    config, progress = saved["config"], saved["progress"]
    is_config = isinstance(config, Mapping) and isinstance(config.get("run", {}), Mapping)
    is_mapping = isinstance(progress, Mapping)
    state: Mapping[str, Any] = progress if is_mapping else {}
    processes, best = state.get("processes"), state.get("best")
    is_own = isinstance(processes, list) and all(
        isinstance(own, Mapping) and all(isinstance(own.get(key), Mapping) for key in ("random_state", "meters"))
        for own in processes
    )
    parts: dict[str, tuple[Any, str]] = {
        "place": (_is_whole(state.get("place")), "a whole number >= 0"),
        "batches": (_is_whole(state.get("batches")), "a whole number >= 0"),
        "taken": (_is_whole_list(state.get("taken")), "a list of whole numbers"),
        "lengths": (_is_whole_list(state.get("lengths")), "a list of whole numbers"),
        "processes": (is_own, "a list of each process's random_state and meters"),
        "gradients": (_is_mapping_of(state.get("gradients"), str, Tensor), "tensors by name"),
        "best": (isinstance(best, Mapping) and {"epoch", "metric"} <= best.keys(), "an epoch and a metric"),
        "logs": (_is_mapping_of(state.get("logs"), str, int), "sizes by the name of the log"),
    }
    if "trained" in state:
        parts["trained"] = (_is_mapping_of(state["trained"], str, Tensor), "tensors by name")
        parts["averaged"] = (_is_whole(state.get("averaged")), "a whole number >= 0")
    return [
        ("config", config, is_config, "a run's config"),
        ("progress", progress, is_mapping, "a mapping"),
        *((f"progress.{key}", state.get(key), is_right, what) for key, (is_right, what) in parts.items()),
    ]


def check_optimizer(saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], path: str) -> None:
    """Refuse the state of an optimizer that trained another number of weights, which torch reports less clearly.

    Raises:
        ValueError: If the groups of the saved state and those of this run have other numbers of weights.
    """
    before, now = ([len(group["params"]) for group in each] for each in (saved["param_groups"], groups))
    if before != now:
        raise ValueError(
            f"run.resume_ckpt_path: {path} was written by a run that trained {sum(before)} weights and biases, and "
            f"this one trains {sum(now)}; set back what decides about that (model, run.lora, run.dpo.anchor), or "
            "start a new run from these weights (model.finetuned)."
        )


def check_same_data(saved: Mapping[str, Any], path: str, config: Mapping[str, Any], lengths: Sequence[int]) -> None:
    """Refuse a checkpoint of a run that read its data in another order, and warn of other differences.

    Raises:
        ValueError: If the number of processes, a key that decides about the order, or the number of batches of an epoch
            of each training loader (``lengths``) differs.
    """
    progress, world = saved["progress"], rank_and_world()[1]
    if len(progress["processes"]) != world:
        raise ValueError(
            f"run.resume_ckpt_path: {path} was written by {len(progress['processes'])} processes and this run has "
            f"{world}; start as many (torchrun --nproc_per_node)."
        )
    for key, before, now in run_differences(saved["config"], config):
        if key in _MUST_AGREE:
            raise ValueError(
                f"run.{key}: {now!r} differs from {before!r} in {path}, and the order of the data follows from it; "
                "set it back, or start a new run from these weights (model.finetuned)."
            )
        logging.warning("run.%s is %r now and was %r when %s was written", key, now, before, path)
    for section in differing_sections(saved["config"], config):
        logging.warning("section %s differs from that of %s", section, path)
    if progress["lengths"] != lengths:
        raise ValueError(
            f"run.resume_ckpt_path: {path} was written with {progress['lengths']} training batches an epoch and there "
            f"are {lengths} now; restore the data, or start a new run from these weights (model.finetuned)."
        )


def check_tensor_names(progress: Mapping[str, Any], known: Collection[str], path: str) -> None:
    """Raise ValueError if a checkpoint's progress has a gradient or weight of a tensor that the model lacks."""
    for key in ("gradients", "trained"):
        unknown = [name for name in progress.get(key, ()) if name not in known]
        if unknown:
            raise _unusable(path, f"progress.{key}", unknown[0], "of a tensor that this model has")


def run_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return key, earlier and present value of what differs in ``run`` of two configs and matters to a resumed run."""
    there, here = before.get("run", {}), now.get("run", {})
    keys = [key for key in {**there, **here} if key not in _MAY_DIFFER]
    return [(key, there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)]


def differing_sections(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return which of the sections ``model`` and ``datasets`` differ in two configs."""
    return [section for section in ("model", "datasets") if before.get(section) != now.get(section)]


def _unusable(path: str, key: str, value: Any, what: str) -> ValueError:
    """Return an error that names a key of a checkpoint with its value, or with its type if the value is long."""
    is_plain = value is None or isinstance(value, (bool, int, float, str)) or value in ({}, [])
    written = printable(repr(value))[:80] if is_plain else f"a {type(value).__name__}"
    return ValueError(
        f"run.resume_ckpt_path: {path} has {key}: {written}, and it must be {what}; resume from another checkpoint of "
        "that run, or start a new one from its weights (model.finetuned)."
    )


def _is_optimizer(value: Any) -> bool:
    groups = value.get("param_groups") if isinstance(value, Mapping) else None
    return (
        isinstance(groups, list)
        and all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups)
        and isinstance(value.get("state"), Mapping)
    )


def _is_whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_whole_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


def _is_mapping_of(value: Any, key: type, item: type) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, key) and isinstance(v, item) for k, v in value.items())
