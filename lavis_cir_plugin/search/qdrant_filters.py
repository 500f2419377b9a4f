"""Conditions on pictures as filters of Qdrant that find the same pictures as SQLite does."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from lavis_cir_plugin.search.catalogue import FILE_COLUMNS
from lavis_cir_plugin.search.filters import Comparison, Condition, Junction, Node, Not

MOST_TEXTS = 10_000
"""Different texts of a column up to which ``like`` and the order of texts are compared here, one by one."""

PICTURES, MISSING = "pictures", "missing"
"""Keys of a point's pictures, and, within one of them, of the list of its columns that have no value."""

LARGEST_WHOLE = 2**53
"""From here on Qdrant, which compares doubles, takes different whole numbers for equal."""

_DATES = ("file_modified", "file_added")
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799  # of the years 1 to 9999
_NOTHING = {"gt": 0.0, "lt": 0.0}
_BOUNDS = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}


class Key(NamedTuple):
    """How a column is called in a picture's payload.

    Attributes:
        name: The key.
        kind: ``float``, ``keyword`` or ``date``, which is whole seconds since 1970.
    """

    name: str
    kind: str


def keys_of(own: Mapping[str, str]) -> dict[str, Key]:
    """Return the key of every column, by the name that SQLite has for it.

    Args:
        own: Kinds of the user's own columns, ``number`` or ``text``, by name in order.
    """
    found = {
        column.sql: Key(name, "date" if name in _DATES else "float" if column.is_number else "keyword")
        for name, column in FILE_COLUMNS.items()
    }
    for place, kind in enumerate(own.values()):
        found[f"metadata.c{place}"] = Key(f"c{place}", "float" if kind == "number" else "keyword")
    return found


def date_text(seconds: int) -> str:
    """Return a date as conditions compare it, such as 2026-01-31 12:00:00, in UTC."""
    return (datetime(1970, 1, 1) + timedelta(seconds=seconds)).isoformat(" ")


def translate(condition: Condition, keys: Mapping[str, Key], values: Callable[[str, int], Sequence[Any]]) -> Any:
    """Translate a condition on one picture into a filter of points, each of which holds the pictures of a content.

    SQL's third truth value has no counterpart there, so a negation is moved inwards to the comparisons, and the
    negation of a comparison asks for a value.

    Args:
        condition: The condition.
        keys: Keys of columns, as `keys_of`.
        values: Function that returns up to so many different values of a key.

    Raises:
        ValueError: it compares with a number that is no finite double, or the order or pattern of too many texts.
    """
    from qdrant_client import models

    inner = _Translation(keys, values).holds(condition.tree)
    nested = models.Nested(key=PICTURES, filter=models.Filter(must=[inner]))
    return models.Filter(must=[models.NestedCondition(nested=nested)])


class _Translation:
    def __init__(self, keys: Mapping[str, Key], values: Callable[[str, int], Sequence[Any]]) -> None:
        from qdrant_client import models

        self.keys, self.values, self.models = keys, values, models

    def holds(self, node: Node, wanted: bool = True) -> Any:
        """Return a filter of the pictures for which a part is true, or for which it is false."""
        if isinstance(node, Not):
            return self.holds(node.part, not wanted)
        if isinstance(node, Junction):
            parts = [self.holds(part, wanted) for part in node.parts]
            is_every = (node.operator == "AND") == wanted
            return self.models.Filter(must=parts) if is_every else self.models.Filter(should=parts)
        key = self.keys[node.column.sql]
        missing = self._field(MISSING, match=self.models.MatchValue(value=key.name))
        wanted = wanted != node.is_negated
        if node.operator == "IS NULL":
            return self.models.Filter(**{"must" if wanted else "must_not": [missing]})
        if node.operator == "<>":
            node, wanted = node._replace(operator="="), not wanted
        found = {"float": self._numbers, "keyword": self._texts, "date": self._dates}[key.kind](key.name, node)
        return found if wanted else self.models.Filter(must_not=[found, missing])

    def _field(self, key: str, **kinds: Any) -> Any:
        return self.models.FieldCondition(key=key, **kinds)

    def _range(self, key: str, **bounds: float) -> Any:
        return self._field(key, range=self.models.Range(**bounds))

    def _one_of(self, ranges: Sequence[Any]) -> Any:
        return self.models.Filter(should=list(ranges))

    def _numbers(self, key: str, node: Comparison) -> Any:
        numbers = [_double(value) for value in node.values]
        if node.operator in _BOUNDS:
            return self._range(key, **{_BOUNDS[node.operator]: numbers[0]})
        if node.operator == "BETWEEN":
            return self._range(key, gte=numbers[0], lte=numbers[1])
        # A match would take 50 and 50.0 for different values.
        return self._one_of([self._range(key, gte=number, lte=number) for number in numbers])

    def _texts(self, key: str, node: Comparison) -> Any:
        if node.operator in ("=", "IN"):
            return self._field(key, match=self.models.MatchAny(any=list(node.values)))
        return self._chosen(key, node, str)

    def _dates(self, key: str, node: Comparison) -> Any:
        if node.operator == "LIKE":
            return self._chosen(key, node, date_text)
        if node.operator in _BOUNDS:
            return self._range(key, **_seconds(node.operator, node.values[0]))
        if node.operator == "BETWEEN":
            return self._range(key, **_seconds(">=", node.values[0]), **_seconds("<=", node.values[1]))
        return self._one_of([self._range(key, **_seconds("=", value)) for value in node.values])

    def _chosen(self, key: str, node: Comparison, text: Callable[[Any], str]) -> Any:
        """Compare every value of a key by SQLite, and ask for those that meet the comparison."""
        known = self.values(key, MOST_TEXTS + 1)
        if len(known) > MOST_TEXTS:
            raise ValueError(
                f"the condition compares {key if key.startswith('file_') else 'a column'} by "
                f"{node.operator.lower()}, which Qdrant does not know, and it has more than {MOST_TEXTS:,} different "
                "texts; compare by = or in, or search the index's folder."
            )
        operator = "BETWEEN ? AND" if node.operator == "BETWEEN" else node.operator
        database = sqlite3.connect(":memory:")
        try:
            statement = f"SELECT ? {operator} ?"
            met = [database.execute(statement, (text(value), *node.values)).fetchone()[0] for value in known]
        finally:
            database.close()
        chosen = [value for value, is_met in zip(known, met) if is_met]
        return self._field(key, match=self.models.MatchAny(any=chosen)) if chosen else self._range(key, **_NOTHING)


def _double(value: float) -> float:
    if abs(value) == math.inf or int(float(value)) != int(value):
        raise ValueError(
            f"the condition compares with {value}, and Qdrant compares doubles; take a number that is one, or search "
            "the index's folder."
        )
    return float(value)


def _seconds(operator: str, text: str) -> dict[str, float]:
    """Return the bounds of the seconds whose text compares so with another text; later seconds have later texts."""
    least, most = _FIRST_SECOND, _LAST_SECOND + 1
    while least < most:
        middle = (least + most) // 2
        if date_text(middle) < text:
            least = middle + 1
        else:
            most = middle
    is_met = least <= _LAST_SECOND and date_text(least) == text
    if operator == "=":
        return {"gte": least, "lte": least} if is_met else _NOTHING
    if operator in (">", "<="):
        least += is_met
    return {"gte" if operator in (">", ">=") else "lt": least}
