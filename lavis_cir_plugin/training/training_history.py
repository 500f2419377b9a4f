"""Which data sets a model was trained on: by this run, and by those whose checkpoints it stands on."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_CHECKPOINT_KEYS = ("pretrained", "mapping_checkpoint", "finetuned")


def trained_on(model: Mapping[str, Any], datasets: Mapping[str, Any]) -> set[str]:
    """Return the names of the data sets whose split ``train`` a run reads, or an earlier one of its model has read.

    Args:
        model: Section of a config. The checkpoints that it names are followed back, as far as they are local files
            with a run's config in them and the files that this names in turn still exist.
        datasets: Section of the same config, with the splits that :func:`~lavis_cir_plugin.config.choose_splits` put
            there.
    """
    return _trained_on(model, datasets, set())


def _trained_on(model: Mapping[str, Any], datasets: Mapping[str, Any], seen: set[Path]) -> set[str]:
    names = {name for name, section in datasets.items() if "train" in ((section or {}).get("splits") or ())}
    for key in _CHECKPOINT_KEYS:
        path = model.get(key)
        if not isinstance(path, str) or (key == "finetuned" and not model.get("load_finetuned")):
            continue
        place = Path(os.path.expanduser(path)).absolute()
        if place.is_file() and place not in seen:
            earlier = _config_in(place)
            names |= _trained_on(earlier.get("model") or {}, earlier.get("datasets") or {}, {*seen, place})
    return names


def _config_in(path: Path) -> Mapping[str, Any]:
    """Return the config of the run that wrote a checkpoint; empty for files of others, which the model judges."""
    try:
        # Mapped, so that looking at the config of a large model costs nothing.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError):
        return {}
    config = content.get("config") if isinstance(content, Mapping) else None
    return config if isinstance(config, Mapping) else {}
