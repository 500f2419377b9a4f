"""Write parts of error messages: values, lists of names, and the nearest known word."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any


def listed(names: Sequence[Any], limit: int = 5) -> str:
    """Return the first few names for an error message: ``first: a, b, c``."""
    return "first: " + ", ".join(str(name) for name in names[:limit])


def unknown_key(where: str, name: str, known: Sequence[str]) -> str:
    """Return the error message for an unknown key; it suggests the nearest known key or lists all known keys."""
    hint = did_you_mean(name, known)
    return f"{where}.{name} is not a known key{hint}" + (f" Known: {', '.join(known)}." if hint == "." else "")


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` with the nearest known word, or a full stop if no word is near."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else "."


def shown(value: Any) -> str:
    """Return a value for an error message as JSON of at most 80 characters, with escapes for unprintable ones."""
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in json.dumps(value, ensure_ascii=False, default=str)
    )
    return text if len(text) <= 80 else text[:77] + "..."
