"""Composed image retrieval for Salesforce LAVIS; importing the package registers everything with LAVIS.

The import registers the package's models, tasks, data sets, processors and runners with LAVIS. If LAVIS has been
imported, they are registered at once, otherwise when LAVIS is imported. The import of LAVIS takes seconds, so this
package does not start it.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lavis_cir_hook
from lavis_cir_plugin import former_places

if TYPE_CHECKING:
    from lavis_cir_plugin.training.run_loading import load_run

__all__ = ["CONFIGS", "PROJECTS", "load_run", "register"]
__version__ = "0.7.3"

_PACKAGE = Path(__file__).parent
_WITH_DECORATORS = ("processors", "data", "models", "training", "tasks", "methods")


def _shipped(folder: str) -> Path:
    """Return the path of ``configs`` or ``projects``, which a wheel has inside the package and a checkout beside it."""
    inside = _PACKAGE / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder


CONFIGS = _shipped("configs")
PROJECTS = _shipped("projects")


def register() -> None:
    """Register every model, task, data set, processor and runner of this package with LAVIS, once.

    The function imports every module of `_WITH_DECORATORS`; LAVIS's ``@registry.register_*`` decorators in them do
    the registration. A new module in these folders therefore needs no entry in a list.

    Raises:
        ImportError: LAVIS is not installed, or it cannot be imported.
    """
    for name in _WITH_DECORATORS:
        module = importlib.import_module(f"{__name__}.{name}")
        for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"{module.__name__}."):
            importlib.import_module(found.name)
    _extend_model_zoo()


def _extend_model_zoo() -> None:
    # LAVIS makes its list of models while it is imported, before this package registers its own.
    from lavis.common.registry import registry
    from lavis.models import model_zoo

    for name, model in registry.mapping["model_name_mapping"].items():
        if model.__module__.startswith(__name__):
            model_zoo.model_zoo[name] = list(model.PRETRAINED_MODEL_CONFIG_DICT)


def __getattr__(name: str) -> Any:
    """Import ``load_run`` when it is asked for."""
    if name == "load_run":
        return importlib.import_module(f"{__name__}.training.run_loading").load_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


former_places.install()
lavis_cir_hook.install()  # a checkout on PYTHONPATH has no .pth file that would have done this at start-up
lavis_cir_hook.wait_passively()  # for lavis-cir, which loads torch before LAVIS
lavis_cir_hook.call_after_lavis(register)
