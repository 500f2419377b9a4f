"""Build the words of error sentences: values, lists of names, the nearest known word."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def listed(names: Sequence[Any], limit: int = 5) -> str:
    """Write the first few names for an error sentence: ``first: a, b, c``."""
    return "first: " + ", ".join(str(name) for name in names[:limit])


def unknown_key(where: str, name: str, known: Sequence[str]) -> str:
    """Return the sentence for a key that is not known: the nearest known one, or all."""
    hint = did_you_mean(name, known)
    return f"{where}.{name} is not a known key{hint}" + (f" Known: {', '.join(known)}." if hint == "." else "")


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the nearest known word, or a full stop."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else "."


def shown(value: Any) -> str:
    """Write a value for an error sentence: as JSON, shortened, escaping what is not printable."""
    text = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in json.dumps(value, ensure_ascii=False, default=str)
    )
    return text if len(text) <= 80 else text[:77] + "..."
