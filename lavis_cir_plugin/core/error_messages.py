"""Write parts of messages: values, sizes, options, lists of names, the nearest word, and the first line of an error."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


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


def as_json(value: Any) -> str:
    """Return a value as JSON on one line, with escapes for characters that a terminal does not print."""
    return printable(json.dumps(value, ensure_ascii=False, default=str))


def shown(value: Any) -> str:
    """Return the JSON of a value for an error message, cut to 80 characters."""
    text = as_json(value)
    return text if len(text) <= 80 else text[:77] + "..."


def option(key: str, text: object) -> str:
    """Return ``key=text`` for ``--options``, with the text in quotes unless YAML reads it as it stands.

    Examples:
        >>> option("run.output_dir", "/data/runs"), option("run.output_dir", "/data/run #2")
        ('run.output_dir=/data/runs', 'run.output_dir="/data/run #2"')
    """
    # Config values may refer to others by ${...}; a backslash before it, itself doubled, makes it plain text.
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(text))
    is_plain = re.fullmatch(r"/(?:[\w/.@+~-]|\b \b)*", escaped)
    return f"{key}={escaped if is_plain else json.dumps(escaped, ensure_ascii=False)}"


def printable(value: Any) -> str:
    """Return the text of a value for a message, with escapes for characters that a terminal does not print."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(value))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without terminal codes, or the error's type if it has no message."""
    text = _TERMINAL_CODES.sub("", str(error)).strip()
    return printable(text.splitlines()[0]) if text else type(error).__name__


def size_text(count: int) -> str:
    """Return a number of bytes with its unit, such as "4.0 GB", "1.5 MB", "0.2 kB" or "0 bytes"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} bytes"
