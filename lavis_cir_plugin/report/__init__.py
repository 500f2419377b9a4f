"""What a run shows: tables, files, contact sheets, curves, and the log it keeps while it trains."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from lavis_cir_plugin import former_places  # the names that this module had when it was a file

    return former_places.find("report", name)
