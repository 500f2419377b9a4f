"""Finds the data sets that a model was trained on, in this run and in the runs whose checkpoints it started from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_cir_plugin.core.checkpoints import config_in, mapped_checkpoint

_CHECKPOINT_KEYS = ("pretrained", "mapping_checkpoint", "finetuned")


def trained_on(model: Mapping[str, Any], datasets: Mapping[str, Any]) -> set[str]:
    """Return the names of the data sets whose split ``train`` this run or an earlier run of its model has read.

    Args:
        model: Section ``model`` of a config. The function reads the checkpoints that the section names. Each of them
            keeps the names under ``trained_on``. One from before version 0.7.1 has its config alone, so the checkpoints
            that the config names are read, too, as long as they are existing local files.
        datasets: Section ``datasets`` of the same config, after
            :func:`~lavis_cir_plugin.training.config.choose_splits`.
    """
    return _trained_on(model, datasets, set())


def trained_on_by(content: Any) -> set[str]:
    """Return the names of the data sets that the model in the content of a checkpoint was trained on.

    Args:
        content: Content of a checkpoint file. One that no run of this package wrote gives no names.
    """
    return _trained_on_by(content, set())


def _trained_on(model: Mapping[str, Any], datasets: Mapping[str, Any], seen: set[Path]) -> set[str]:
    names = {name for name, section in datasets.items() if _reads_train(section)}
    for key in _CHECKPOINT_KEYS:
        path = model.get(key)
        if not isinstance(path, str) or (key == "finetuned" and not model.get("load_finetuned")):
            continue
        place = Path(os.path.expanduser(path)).absolute()
        if place.is_file() and place not in seen:
            names |= _trained_on_by(mapped_checkpoint(place), {*seen, place})
    return names


def _trained_on_by(content: Any, seen: set[Path]) -> set[str]:
    kept = content.get("trained_on") if isinstance(content, Mapping) else None
    names = {name for name in kept if isinstance(name, str)} if isinstance(kept, list) else set()
    # Other programs keep what they like under these names.
    sections = [config_in(content).get(name) for name in ("model", "datasets")]
    model, datasets = (section if isinstance(section, Mapping) else {} for section in sections)
    return names | _trained_on(model, datasets, seen)


def _reads_train(section: Any) -> bool:
    splits = section.get("splits") if isinstance(section, Mapping) else None
    return isinstance(splits, Sequence) and not isinstance(splits, str) and "train" in splits
