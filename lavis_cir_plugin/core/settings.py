"""Declare and check the sections of a config, and values of it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields
from typing import Any, TypeVar

from lavis_cir_plugin.core.sentences import did_you_mean, shown, unknown_key

Section = TypeVar("Section")


def is_text(value: Any) -> bool:
    """Return whether a value is text that can be written: JSON also spells halves of surrogate pairs, which cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def one_of(default: str, *others: str) -> Any:
    """Declare a configuration field that takes one of a few words."""
    return field(default=default, metadata={"choices": (default, *others)})


def some_of(*default: str, others: Sequence[str] = ()) -> Any:
    """Declare a configuration field that takes a non-empty list of distinct words, of the default ones and others."""
    return field(default=default, metadata={"choices": (*default, *others)})


def at_least(least: int) -> Any:
    """Declare a configuration field that takes a whole number from ``least`` on, or null, the default."""
    return field(default=None, metadata={"least": least})


def config_from_mapping(cls: type[Section], dataset: str, mapping: Mapping[str, Any]) -> Section:
    """Build the frozen configuration of a data set from its ``build_info``; ``~`` in a path becomes the home folder.

    Args:
        cls: Dataclass whose fields are ``str``, ``str | None``, ``bool``, ``str | tuple[str, ...] | None``, or declared
            by `one_of`, `some_of` or `at_least`.
        dataset: Its registered name, for the messages.
        mapping: The ``build_info``.

    Raises:
        ValueError: one message with every unknown key, missing key and impossible value.
    """
    where = f"datasets.{dataset}.build_info"
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    values, errors = {}, []
    for key, value in mapping.items():
        if key not in known:
            errors.append(f"{where}.{key} is not a known key{did_you_mean(key, known)} Known: {', '.join(known)}.")
            continue
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = tuple(value)
        problem = _problem(known[key].type, known[key].metadata, value)
        if problem:
            errors.append(f"{where}.{key} must be {problem}")
        is_path = isinstance(value, str) and "choices" not in known[key].metadata
        values[key] = os.path.expanduser(value) if is_path else value
    errors += [
        f"{where}.{name} is required; set it to the data set's folder."
        for name, item in known.items()
        if item.default is MISSING and name not in mapping
    ]
    if errors:
        raise ValueError("\n".join(errors))
    return cls(**values)


def _problem(kind: Any, metadata: Mapping[str, Any], value: Any) -> str:
    """Say what a value must be, with what it is; empty where it is right. `kind` is the annotation's source text."""
    choices = metadata.get("choices", ())
    if kind == "bool":
        return "" if isinstance(value, bool) else f"true or false, got {shown(value)}."
    if "least" in metadata:
        is_right = value is None or (type(value) is int and value >= metadata["least"])
        return "" if is_right else f"a whole number >= {metadata['least']} or null, got {shown(value)}."
    if kind == "str | tuple[str, ...] | None":
        paths = (value,) if isinstance(value, str) else value
        is_right = paths is None or (
            isinstance(paths, tuple) and paths and all(is_text(path) and path for path in paths)
        )
        return "" if is_right else f"a path or a list of paths, got {shown(value)}."
    if kind.startswith("tuple"):
        is_right = isinstance(value, tuple) and value and len(set(map(str, value))) == len(value)
        if is_right and all(item in choices for item in value):
            return ""
        return f"a non-empty list of distinct names from {', '.join(choices)}, got {shown(value)}."
    if choices:
        allowed = f"one of {', '.join(choices)}, got {shown(value)}"
        return "" if value in choices else allowed + did_you_mean(value, choices)
    if value is None and kind.endswith("None"):
        return ""
    return "" if isinstance(value, str) and value else f"the path of a folder, got {shown(value)}."


def setting_problems(key: str, settings: type, given: Any, example: str = "") -> Iterator[str]:
    """Yield what is wrong with a config section that holds the fields of a dataclass, which refuses impossible values.

    Args:
        key: Of the section, for the messages.
        settings: The dataclass.
        given: The section.
        example: For the message where it is no mapping.
    """
    if not isinstance(given, Mapping):
        yield f"{key} must be a mapping{example}, got {given!r}."
        return
    known = [field.name for field in fields(settings)]
    unknown = [name for name in given if name not in known]
    yield from (unknown_key(key, name, known) for name in unknown)
    try:
        settings(**{name: value for name, value in given.items() if name in known})
    except ValueError as error:
        yield str(error)


def is_number(value: Any) -> bool:
    """Return whether a value of a config is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_choice(key: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ValueError unless a value of ``model`` is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"model.{key}: {value!r} is not one of {', '.join(allowed)}.")


def check_whole(key: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless a value of ``model`` is a whole number that large."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"model.{key} must be a whole number >= {least}, got {value!r}.")


def check_flag(key: str, value: Any) -> None:
    """Raise ValueError unless a value of ``model`` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"model.{key} must be true or false, got {value!r}.")


def as_plain(section: Any) -> Mapping[str, Any]:
    """Return a config section as plain containers, interpolations resolved; an absent one is empty."""
    from omegaconf import OmegaConf  # here, because most commands read no config

    plain = OmegaConf.to_container(section, resolve=True) if section is not None else {}
    return plain if isinstance(plain, dict) else {}
