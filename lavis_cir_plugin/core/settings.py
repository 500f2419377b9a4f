"""Declare the sections of a config and check their values."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, field, fields
from typing import Any, TypeVar

from lavis_cir_plugin.core.error_messages import did_you_mean, shown, unknown_key

Section = TypeVar("Section")


def is_text(value: Any) -> bool:
    """Return whether a value is text that UTF-8 can encode; JSON also allows lone surrogates, which it cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def one_of(default: str, *others: str) -> Any:
    """Declare a config field that takes one of a few words."""
    return field(default=default, metadata={"choices": (default, *others)})


def list_of(*default: str, others: Sequence[str] = ()) -> Any:
    """Declare a config field that takes a non-empty list of distinct words, and the words allowed in it."""
    return field(default=default, metadata={"choices": (*default, *others)})


def at_least(least: int) -> Any:
    """Declare a config field that takes null, its default, or an integer of at least ``least``."""
    return field(default=None, metadata={"least": least})


def config_from_mapping(cls: type[Section], dataset: str, mapping: Mapping[str, Any]) -> Section:
    """Build the frozen config of a data set from its ``build_info``; ``~`` in a path becomes the home folder.

    Args:
        cls: Dataclass of the config. Each field is ``str``, ``str | None``, ``bool`` or
            ``str | tuple[str, ...] | None``, or is declared by `one_of`, `list_of` or `at_least`.
        dataset: Registered name of the data set, for messages.
        mapping: Keys and values of ``build_info``.

    Raises:
        ValueError: If a key is unknown or missing or a value is not allowed. One message names all of them.
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
    """Return what a value must be and what it is, or "" if it is right; `kind` is the annotation's source text."""
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
    """Yield the problems of a config section that holds the fields of a dataclass, which checks its own values.

    Args:
        key: Name of the section, for messages.
        settings: Dataclass of the section.
        given: Content of the section.
        example: Text that the message shows if the section is not a mapping.
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
    """Return whether a config value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_choice(key: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ValueError unless a value of the section ``model`` is among those allowed."""
    if value not in allowed:
        raise ValueError(f"model.{key}: {value!r} is not one of {', '.join(allowed)}.")


def check_whole(key: str, value: Any, least: int = 1) -> None:
    """Raise ValueError unless a value of the section ``model`` is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"model.{key} must be a whole number >= {least}, got {value!r}.")


def check_flag(key: str, value: Any) -> None:
    """Raise ValueError unless a value of the section ``model`` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"model.{key} must be true or false, got {value!r}.")


def as_plain(section: Any) -> Mapping[str, Any]:
    """Return a config section as plain containers with interpolations resolved; return {} for an absent section."""
    from omegaconf import OmegaConf  # imported here because most commands read no config

    plain = OmegaConf.to_container(section, resolve=True) if section is not None else {}
    return plain if isinstance(plain, dict) else {}
