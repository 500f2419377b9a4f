"""Scores, ranks and metrics of galleries, and the index that finds candidates in large galleries."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from lavis_cir_plugin import former_places  # serves the names that this module had when it was one file

    return former_places.find("ranking", name)
