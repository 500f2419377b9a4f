"""Serve public names under the modules in which released versions had them.

``from lavis_cir_plugin.losses import contrastive_loss`` still works although the losses now stand beside the methods
that use them. A former module has no file: the finder below makes it when it is imported, and it looks its names up in
the modules of today when they are asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TODAY = {
    "ranking": ("ranking.ranks", "ranking.metrics", "ranking.scoring"),
    "report": (
        "report.tables",
        "report.chance",
        "report.result_files",
        "report.contact_sheets",
        "report.curves",
        "methods.retrieval_dpo.negatives_sheet",
    ),
    "index": ("ranking.index",),
    "losses": ("models.contrastive_losses", "methods.blip2_cir.losses", "methods.tscir.losses"),
    "perturbation": ("methods.wrf4cir.perturbation",),
    "benchmarks.benchmark": (
        "benchmarks.types",
        "benchmarks.annotation_files",
        "benchmarks.seen_split",
        "core.settings",
        "core.error_messages",
    ),
    "models.blip2_cir": ("methods.blip2_cir.model", "models.tokenizer"),
    "models.tscir_mapping": ("methods.tscir.mapping",),
    "models.tscir_composing": ("methods.tscir.composing",),
}
"""Modules of today that have the names of each former one."""

RENAMED = {"some_of": "list_of"}
"""Name of today for each former name that has changed."""


def find(former: str, name: str) -> Any:
    """Return what a former module had under a name.

    Args:
        former: Name of the former module inside the package.
        name: Name of a public function, class or constant in that module.

    Raises:
        AttributeError: no module of today has it.
    """
    new_name = RENAMED.get(name, name)
    for today in TODAY[former] if not name.startswith("_") else ():
        module = import_module(f"{__package__}.{today}")
        if hasattr(module, new_name):
            return getattr(module, new_name)
    raise AttributeError(f"module '{__package__}.{former}' has no attribute '{name}'")


class _FormerModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return find(self.__name__.partition(".")[2], name)


class FormerPlaces(MetaPathFinder, Loader):
    """Finder and loader of the former modules that have no file of their own."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a former module, None for every other name."""
        package, _, former = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __package__ and former in TODAY else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return a module that looks up its names when they are asked for."""
        return _FormerModule(spec.name, f"The former place of {', '.join(TODAY[spec.name.partition('.')[2]])}.")

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module is complete."""


def install() -> None:
    """Ask the finder for what no file is found for."""
    sys.meta_path.append(FormerPlaces())
