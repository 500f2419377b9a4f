"""Composed image retrieval for Salesforce LAVIS.

Importing this package registers its models, tasks, datasets, processors and runners with LAVIS when LAVIS is
installed. The parts that need no LAVIS (``garments``, ``benchmarks``, ``ranking``, ``losses``, ``perturbation``,
``report``) can be imported without it.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from typing import Any

__version__ = "0.4.0"

_PACKAGE = Path(__file__).parent
_DATASETS = ("datasets", "caption_datasets", "vqa_caption_datasets")
_STATIONS_WITH_DECORATORS = ("processors", *_DATASETS, "models", "tasks", "runners")


def _shipped(folder: str) -> Path:
    """Return ``configs`` or ``projects``: inside the package in a wheel, beside it in a checkout."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


CONFIGS = _shipped("configs")
PROJECTS = _shipped("projects")


def register() -> None:
    """Register every model, task, dataset, processor and runner of this package with LAVIS, once.

    A new file below ``models``, ``tasks`` or ``runners`` that carries one of LAVIS's ``@registry.register_*``
    decorators is found by itself.

    Raises:
        ImportError: If LAVIS is installed but cannot be imported.
    """
    for station in _STATIONS_WITH_DECORATORS:
        module = importlib.import_module(f"{__name__}.{station}")
        for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
            importlib.import_module(f"{module.__name__}.{found.name}")
    _extend_model_zoo()


def _extend_model_zoo() -> None:
    # LAVIS takes its list of models when it is imported, which is before ours are registered.
    from lavis.common.registry import registry
    from lavis.models import model_zoo

    for name, model in registry.mapping["model_name_mapping"].items():
        if model.__module__.startswith(__name__):
            model_zoo.model_zoo[name] = list(model.PRETRAINED_MODEL_CONFIG_DICT)


def __getattr__(name: str) -> Any:
    """Import ``load_run`` when it is asked for."""
    if name == "load_run":
        return importlib.import_module(f"{__name__}.run_loading").load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if importlib.util.find_spec("lavis_cir_hook") is not None:
    # A checkout on PYTHONPATH has no .pth file that would have done this at start-up.
    import lavis_cir_hook

    lavis_cir_hook.install()

if importlib.util.find_spec("lavis") is not None:
    register()
