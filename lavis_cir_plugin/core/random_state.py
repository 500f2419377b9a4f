"""Save and restore the state of every random generator of a training step as plain values for a checkpoint."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def get_random_state(device: torch.device | None = None) -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, and of torch's on ``device`` if it is a GPU."""
    numpy = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {**numpy, "state": {**numpy["state"], "key": torch.from_numpy(numpy["state"]["key"].astype("int64"))}},
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Restore the states that :func:`get_random_state` returned."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    numpy = state["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].numpy().astype("uint32")}})
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def seed_cpu(seed: int) -> None:
    """Seed the generators of the CPU, which draw everything that happens to the data; those of a GPU stay unchanged."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
