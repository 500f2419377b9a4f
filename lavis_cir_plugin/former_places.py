"""Public names under the module paths of released versions.

``from lavis_cir_plugin.losses import contrastive_loss`` still works, although the losses have moved to the methods
that use them. A former module has no file. The finder below creates it when it is imported, and the created module
looks up each name in the present modules.
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
"""The present modules that hold the names of each former module."""


def find(former: str, name: str) -> Any:
    """Return the object that a former module had under a name.

    Args:
        former: Name of the former module inside the package.
        name: Name of a public function, class or constant in that module.

    Raises:
        AttributeError: If no present module has the name.
    """
    for today in TODAY[former] if not name.startswith("_") else ():
        module = import_module(f"{__package__}.{today}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module '{__package__}.{former}' has no attribute '{name}'")


class _FormerModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return find(self.__name__.partition(".")[2], name)


class FormerPlaces(MetaPathFinder, Loader):
    """Import finder and loader of the former modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a former module, and None for every other name."""
        package, _, former = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __package__ and former in TODAY else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return a module that looks up each name on its first use."""
        return _FormerModule(spec.name, f"The former place of {', '.join(TODAY[spec.name.partition('.')[2]])}.")

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing, because the created module needs no code."""


def install() -> None:
    """Let Python ask the finder for modules that have no file."""
    sys.meta_path.append(FormerPlaces())
