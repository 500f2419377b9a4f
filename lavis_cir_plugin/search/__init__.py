"""Search of one's own pictures: folders in, ranked answers out, on the command line, in Python and by HTTP."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis_cir_plugin.search.build import build_index_folder
    from lavis_cir_plugin.search.encoder import Encoder, load_encoder
    from lavis_cir_plugin.search.engine import open_index

__all__ = ["Encoder", "build_index_folder", "load_encoder", "open_index"]

_HOMES = {"Encoder": "encoder", "build_index_folder": "build", "load_encoder": "encoder", "open_index": "engine"}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
