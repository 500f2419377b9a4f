"""Declare the settings of a config's sections, and check values by these declarations.

A section is a class: a dataclass, or a model or processor whose constructor takes the settings as keywords. A setting
stands there once: the annotation is its type, `Annotated` with `Limits` for its range, the default is its default, and
its sentence is its entry in the class's docstring. Values are validated by pydantic's core, which needs the annotations
of no other package and is loaded in a fraction of the time that pydantic takes, by the first value.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lavis_cir_plugin.core.error_messages import did_you_mean, shown, unknown_key

Built = TypeVar("Built")
REQUIRED = inspect.Parameter.empty
"""Default of a setting that has none."""


@dataclass(frozen=True)
class Limits:
    """What a type alone does not say of a setting.

    Attributes:
        ge, gt, le, lt: Bounds of a number: at least, more than, at most, less than.
        choices: Words that a text may be, or that a list may hold.
        distinct: Whether the items of a list, of which there must be one, differ.
        may_be_empty: Whether a text may be empty.
        words: What is allowed, in place of words made from type and limits.
        check: Function that raises ValueError if a value of the right type is impossible.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple[str, ...] = ()
    distinct: bool = False
    may_be_empty: bool = False
    words: str = ""
    check: Callable[[Any], object] | None = None

    def bounds(self) -> dict[str, float]:
        """Return the bounds that are set, by name."""
        return {name: value for name in ("ge", "gt", "le", "lt") if (value := getattr(self, name)) is not None}


def one_of(choices: Iterable[str]) -> Limits:
    """Return the limits of a text that is one of a few words."""
    return Limits(choices=tuple(choices))


def check_pattern(pattern: str) -> None:
    """Raise ValueError with the reason unless a text is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(str(error)) from error


Positive = Annotated[int, Limits(ge=1)]
NotNegative = Annotated[int, Limits(ge=0)]
PositiveNumber = Annotated[float, Limits(gt=0)]
NotNegativeNumber = Annotated[float, Limits(ge=0)]
Probability = Annotated[float, Limits(ge=0, lt=1)]
Share = Annotated[float, Limits(ge=0, le=1)]
Folder = Annotated[str, Limits(words="the path of a folder")]
File = Annotated[str, Limits(words="the path of a file")]
Weights = Annotated[str, Limits(words="a path or URL")]
Pattern = Annotated[str, Limits(words="a regular expression", check=check_pattern)]


_SETTINGS: dict[type, Mapping[str, Setting]] = {}


@dataclass(frozen=True)
class Setting:
    """One setting of a section.

    Attributes:
        name: Key of the section.
        hint: Evaluated annotation.
        default: Value of an absent key, or `REQUIRED`.
        meaning: Sentences of the class's docstring.
    """

    name: str
    hint: Any
    default: Any
    meaning: str

    @property
    def allowed(self) -> str:
        """What is allowed, in words such as ``a whole number >= 1, or null``."""
        return _words(self.hint)

    @property
    def section(self) -> type | None:
        """Class of the section that the setting holds; ``None`` for a value."""
        return next((kind for kind in (self.hint, *get_args(self.hint)) if _is_section(kind)), None)

    @property
    def schema(self) -> dict[str, Any]:
        """What is allowed, as a schema of pydantic's core."""
        return _schema(self.hint)

    def problems(self, key: str, value: Any) -> list[str]:
        """Return the sentences on a wrong value of the key, which is named in full; an empty list if it is right."""
        section = self.section
        if section is not None and not (value is None and type(None) in get_args(self.hint)):
            return [] if isinstance(value, section) else section_problems(section, key, value)
        item = _item_of_mapping(self.hint)
        if item is not None and isinstance(value, Mapping):
            parts = [(f"{key}.{name}", each) for name, each in value.items()]
            found = (Setting(part, item, REQUIRED, "").problems(part, each) for part, each in parts)
            return [problem for problems in found for problem in problems]
        reason = _reason(self.hint, value)
        if reason is None:
            return []
        hint = did_you_mean(value, choices) if (choices := _choices(self.hint)) and isinstance(value, str) else "."
        return [f"{key} must be {self.allowed}, got {_got(value)}{reason and f' ({reason})'}{hint}"]

    def converted(self, value: Any) -> Any:
        """Return a right value as the section keeps it: tuples for lists, and objects for sections."""
        section = self.section
        if section is not None:
            return section(**value) if isinstance(value, Mapping) else value
        return tuple(value) if isinstance(value, list) else value


class Section:
    """Base class of frozen dataclasses whose fields are settings, checked when an object is built.

    Attributes:
        WHERE: Full name of the section, for messages.
        EXAMPLE: Content that a message shows if the section is no mapping.
        REFUSED: Why known keys of another package are refused, by key.
    """

    WHERE: ClassVar[str]
    EXAMPLE: ClassVar[str] = ""
    REFUSED: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        """Check all values, then their combination.

        Raises:
            ValueError: If there are problems; the message has one line for each.
        """
        settings = settings_of(type(self))
        problems = [
            problem
            for name, setting in settings.items()
            for problem in setting.problems(f"{self.WHERE}.{name}", getattr(self, name))
        ]
        for name, setting in settings.items() if not problems else ():
            object.__setattr__(self, name, setting.converted(getattr(self, name)))
        problems = problems or list(self.conflicts())
        if problems:
            raise ValueError("\n".join(problems))

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence per combination of right values that is impossible."""
        yield from ()

    @classmethod
    def from_mapping(cls: type[Built], mapping: Mapping[str, Any]) -> Built:
        """Build the section from a config; ``~`` at the beginning of a text becomes the home folder.

        Raises:
            ValueError: If a key is unknown or missing or a value is not allowed. The message names all of them.
        """
        return _built(cls, cls.WHERE, mapping)  # type: ignore[attr-defined]


def settings_of(cls: type) -> Mapping[str, Setting]:
    """Return the settings of a section's class by name: the fields of a dataclass, or the constructor's keywords."""
    if cls not in _SETTINGS:
        _SETTINGS[cls] = _read_settings(cls)
    return _SETTINGS[cls]


def _read_settings(cls: type) -> Mapping[str, Setting]:
    hints = get_type_hints(cls if is_dataclass(cls) else cls.__init__, include_extras=True)  # type: ignore[misc]
    meanings = _meanings(cls)
    made = {
        item.name: item.default_factory()
        for item in (fields(cls) if is_dataclass(cls) else ())
        if item.default_factory is not MISSING
    }
    return {
        name: Setting(name, hints.get(name, Any), made.get(name, parameter.default), meanings.get(name, ""))
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def section_problems(cls: type, where: str, given: Any) -> list[str]:
    """Return one sentence per problem of a section's content: unknown and missing keys, and values not allowed.

    Args:
        cls: Class of the section.
        where: Full name of the section, for messages.
        given: Content of the section in plain containers.
    """
    if not isinstance(given, Mapping):
        return [f"{where} must be a mapping{getattr(cls, 'EXAMPLE', '')}, got {_got(given)}."]
    problems = _shape_problems(cls, where, given)
    if not problems and issubclass(cls, Section):
        try:
            cls(**given)
        except ValueError as error:
            return str(error).splitlines()
    return problems


def _shape_problems(cls: type, where: str, given: Mapping[str, Any]) -> list[str]:
    """Return the problems of single keys of a section."""
    return value_problems(cls, where, given) + [
        f"{where}.{name} is required; set it to {setting.allowed}."
        for name, setting in settings_of(cls).items()
        if setting.default is REQUIRED and name not in given
    ]


def value_problems(cls: type, where: str, given: Mapping[str, Any], others: Sequence[str] = ()) -> list[str]:
    """Return one sentence per unknown key and per value that is not allowed; ``others`` are further known keys."""
    settings, problems = settings_of(cls), []
    refused = getattr(cls, "REFUSED", {})
    for name, value in given.items():
        if name in settings:
            problems += settings[name].problems(f"{where}.{name}", value)
        elif name in refused:
            problems.append(f"{where}.{name} {refused[name]}.")
        elif name not in others:
            problems.append(unknown_key(where, str(name), [*settings, *others]))
    return problems


def check_arguments(cls: type, where: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError, one line per problem, if arguments of a constructor have other values than it declares."""
    problems = [
        problem
        for name, setting in settings_of(cls).items()
        if name in given
        for problem in setting.problems(f"{where}.{name}", plain_value(given[name]))
    ]
    if problems:
        raise ValueError("\n".join(problems))


def constructor_arguments(cls: type, section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a constructor's keywords by a section of a config: absent and empty keys have the defaults.

    Keys of the section that the constructor does not have are left out.
    """
    defaults = cls.__init__.__kwdefaults__ or {}  # type: ignore[misc]
    given = {name: _path_as_text(section.get(name)) for name in defaults}
    return {name: default if given[name] is None else given[name] for name, default in defaults.items()}


def check_overrides(key: str, given: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> None:
    """Raise ValueError, one line per problem, if values that replace defaults have unknown names or other types.

    Args:
        key: Full name of the mapping.
        given: Replacing values by name.
        defaults: Replaced values by name. A number is replaced by one that is as positive, and a probability, which
            ``prob`` or ``rate`` in its name tells, by one below 1; what is ``None`` may become anything.
    """
    problems: list[str] = []
    for name, value in (plain_value(given) or {}).items():
        if name not in defaults:
            problems.append(f"{key}.{name} is not a known key{did_you_mean(name, defaults)}")
        else:
            hint = _like(str(name), defaults[name])
            problems += Setting(str(name), hint, REQUIRED, "").problems(f"{key}.{name}", value)
    if problems:
        raise ValueError("\n".join(problems))


def check_heads(key: str, sizes: Mapping[str, Any], width: str, heads: str) -> None:
    """Raise ValueError unless a number of attention heads divides the width of a layer."""
    if sizes[width] % sizes[heads]:
        raise ValueError(f"{key}.{heads}: {sizes[heads]} does not divide {key}.{width}: {sizes[width]}.")


def _like(name: str, default: Any) -> Any:
    """Return the annotation of a value that may replace a default."""
    if isinstance(default, (bool, str)):
        return type(default)
    if isinstance(default, int):
        return Positive if default > 0 else NotNegative
    if isinstance(default, float):
        return Probability if name.endswith(("_prob", "_rate")) else PositiveNumber
    return Any


def check_argument(key: str, hint: Any, value: Any) -> None:
    """Raise ValueError unless a value is what an annotation declares; ``key`` is its full name."""
    problems = Setting(key, hint, REQUIRED, "").problems(key, value)
    if problems:
        raise ValueError(problems[0])


def config_from_mapping(cls: type[Built], dataset: str, mapping: Mapping[str, Any]) -> Built:
    """Build the frozen config of a data set from its ``build_info``; ``~`` in a path becomes the home folder.

    Args:
        cls: Dataclass of the config; a `Section` is built by its own ``from_mapping``.
        dataset: Registered name of the data set, for messages.
        mapping: Keys and values of ``build_info``.

    Raises:
        ValueError: If a key is unknown or missing or a value is not allowed. The message names all of them.
    """
    if issubclass(cls, Section):
        return cls.from_mapping(mapping)  # a benchmark may check more there
    return _built(cls, f"datasets.{dataset}.build_info", mapping)


def _path_as_text(value: Any) -> Any:
    """Return the text of a path object, which a program may name where a config has a text; all else unchanged."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _built(cls: type[Built], where: str, mapping: Mapping[str, Any]) -> Built:
    mapping = {key: _path_as_text(value) for key, value in mapping.items()}
    problems = _shape_problems(cls, where, mapping)
    if problems:
        raise ValueError("\n".join(problems))
    values = {key: settings_of(cls)[key].converted(value) for key, value in mapping.items()}
    return cls(**{key: os.path.expanduser(value) if isinstance(value, str) else value for key, value in values.items()})


def is_text(value: Any) -> bool:
    """Return whether a value is text that UTF-8 can encode; JSON also allows lone surrogates, which it cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def as_plain(section: Any) -> Mapping[str, Any]:
    """Return a config section as plain containers with interpolations resolved; return {} for an absent section."""
    plain = plain_value(section)
    return plain if isinstance(plain, dict) else {}


def plain_value(value: Any) -> Any:
    """Return a value of a config with plain containers in place of omegaconf's."""
    from omegaconf import Container, OmegaConf  # imported here because most commands read no config

    return OmegaConf.to_container(value, resolve=True) if isinstance(value, Container) else value


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _item_of_mapping(hint: Any) -> Any:
    """Return the annotation of the values of a mapping, perhaps an optional one, and ``None`` for other annotations."""
    for part in (hint, *get_args(hint)):
        origin = get_origin(part)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return get_args(part)[1]
    return None


def _split(hint: Any) -> tuple[Any, Limits]:
    """Return a type and the limits of its annotation."""
    if get_origin(hint) is not Annotated:
        return hint, Limits()
    kind, *extras = get_args(hint)
    return kind, next((extra for extra in extras if isinstance(extra, Limits)), Limits())


def _schema(hint: Any) -> dict[str, Any]:
    """Return the schema of pydantic's core for an annotation; strict, because YAML's values have types."""
    kind, limits = _split(hint)
    schema = _schema_of_kind(kind, limits)
    if limits.check is not None:
        check = limits.check

        def checked(value: Any) -> Any:
            check(value)
            return value

        schema = {"type": "function-after", "schema": schema, "function": {"type": "no-info", "function": checked}}
    return schema


def _schema_of_kind(kind: Any, limits: Limits) -> dict[str, Any]:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return {"type": "any"}
    if kind is type(None):
        return {"type": "none"}
    if kind is bool:
        return {"type": "bool", "strict": True}
    if kind is int:
        return {"type": "int", "strict": True, **limits.bounds()}
    if kind is float:
        return {"type": "float", "strict": True, "allow_inf_nan": False, **limits.bounds()}
    if kind is str:
        if limits.choices:
            return {"type": "literal", "expected": list(limits.choices)}
        return {"type": "str", "strict": True, "min_length": 0 if limits.may_be_empty else 1}
    if origin is Literal:
        return {"type": "literal", "expected": list(args)}
    if origin is Union:
        return {"type": "union", "choices": [_schema(part) for part in args]}
    if _is_section(kind):
        return {"type": "dict"}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"type": "dict", "strict": True, "values_schema": _schema(args[1])}
    if origin is tuple:
        item = _schema(Annotated[args[0], Limits(choices=limits.choices)] if limits.choices else args[0])
        if args[-1] is not Ellipsis:
            return {"type": "tuple", "items_schema": [_schema(part) for part in args]}
        least = {"min_length": 1} if limits.distinct else {}
        return {"type": "tuple", "items_schema": [item], "variadic_item_index": 0, **least}
    raise TypeError(f"a setting cannot have the annotation {kind!r}")


@functools.cache
def _validator(hint: Any) -> Any:
    from pydantic_core import SchemaValidator  # imported here because help needs none

    return SchemaValidator(_schema(hint))


def _reason(hint: Any, value: Any) -> str | None:
    """Return why a value is not allowed, "" if the words say so alone, and ``None`` if it is."""
    from pydantic_core import ValidationError

    try:
        found = _validator(hint).validate_python(value)
    except ValidationError as error:
        causes = [item["ctx"]["error"] for item in error.errors() if "error" in item.get("ctx", {})]
        return str(causes[0]) if causes else ""
    if _split(hint)[1].distinct and len(set(found)) < len(found):
        return ""
    return None if all(is_text(text) for text in _texts(found)) else ""


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _texts(item)


def _choices(hint: Any) -> tuple[str, ...]:
    kind, limits = _split(hint)
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) is Union:
        return tuple(choice for part in get_args(kind) for choice in _choices(part))
    return limits.choices


_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _words(hint: Any) -> str:
    """Return what an annotation allows, in words."""
    kind, limits = _split(hint)
    origin, args = get_origin(kind), get_args(kind)
    bounds = limits.bounds()
    range_ = " and ".join(f"{_SIGNS[name]} {bounds[name]}" for name in _SIGNS if name in bounds)
    choices = _choices(hint)
    if limits.words:
        return limits.words
    if origin is Union:
        *others, last = (_words(part) for part in args)
        return f"{', '.join(others)}, or {last}"
    if origin is tuple:
        if choices:
            return f"a non-empty list of distinct names from {', '.join(choices)}"
        return "a list"
    if choices:
        return f"one of {', '.join(map(str, choices))}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return f"{names.get(kind, 'a mapping')} {range_}".strip()


def _got(value: Any) -> str:
    """Return a value for a message, in YAML's words; texts stand in single quotes."""
    if not isinstance(value, str):
        return shown(value)
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _meanings(cls: type) -> dict[str, str]:
    """Return the entries of ``Attributes`` or ``Args`` of the docstrings of a class and its base classes, by name."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        block = re.search(r"^(?:Attributes|Args):\n((?:^(?: .*)?(?:\n|\Z))+)", text, re.MULTILINE)
        entries = re.split(r"^    (?=\S)", block[1], flags=re.MULTILINE)[1:] if block else []
        for entry in entries:
            names, colon, sentences = " ".join(entry.split()).partition(": ")
            # Entries such as "a, b: See `x`." of a derived class leave the base's sentences as they are.
            found.update({name: sentences for name in names.split(", ") if colon and not sentences.startswith("See ")})
    return found
