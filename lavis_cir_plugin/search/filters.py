"""Conditions on pictures, such as ``price < 50 and brand = 'x'``, parsed into a tree and SQL with parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn, Union

from lavis_cir_plugin.core.error_messages import did_you_mean

LONGEST = 4000
"""Characters of a condition, at most."""

DEEPEST = 50
"""Parentheses and ``not`` inside one another, at most."""

MOST_VALUES = 500
"""Numbers and texts in a condition, at most; every SQLite takes that many parameters."""

COMPARISONS = {"=": "=", "==": "=", "!=": "<>", "<>": "<>", "<": "<", "<=": "<=", ">": ">", ">=": ">="}
KEYWORDS = ("and", "or", "not", "in", "like", "is", "null", "between", "true", "false")

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
      | '(?P<text>(?:[^']|'')*)'
      | "(?P<quoted>(?:[^"]|"")+)"
      | (?P<word>[^\W\d]\w*)
      | (?P<sign><=|>=|<>|!=|==|[=<>(),])
    )""",
    re.VERBOSE,
)


class Column(NamedTuple):
    """What a condition may name.

    Attributes:
        sql: How SQLite calls it; never a user's word.
        is_number: Whether it holds numbers, not texts.
    """

    sql: str
    is_number: bool


class Comparison(NamedTuple):
    """A comparison of a column with values.

    Attributes:
        column: The column.
        operator: SQL's operator in capitals: one of the values of `COMPARISONS`, IN, LIKE, BETWEEN or IS NULL.
        values: Numbers or texts, as many as the operator takes.
        is_negated: Whether NOT stands before the operator.
    """

    column: Column
    operator: str
    values: tuple[Any, ...] = ()
    is_negated: bool = False


class Not(NamedTuple):
    """The negation of a part."""

    part: Node


class Junction(NamedTuple):
    """Parts that must all hold (AND), or of which one must (OR)."""

    operator: str
    parts: tuple[Node, ...]


Node = Union[Comparison, Not, Junction]


class Condition(NamedTuple):
    """A condition.

    Attributes:
        sql: An expression as SQLite takes it, with ``?`` for every value.
        values: The values, in order.
        tree: The same for other engines.
    """

    sql: str
    values: list[Any]
    tree: Node


class _Token(NamedTuple):
    kind: str
    value: str
    position: int


def parse(text: str, columns: Mapping[str, Column]) -> Condition:
    """Translate a condition.

    Known are ``= == != <> < <= > >=``, ``[not] in (...)``, ``[not] like``, ``[not] between ... and ...``,
    ``is [not] null``, ``and``, ``or``, ``not`` and parentheses. Texts stand in single quotes (a quote inside is
    doubled), names with other characters than letters, digits and _ in double ones. A comparison with a missing value
    is neither true nor false, as in SQL, so its picture is not found, by ``not`` neither; ``is null`` finds it.

    Args:
        text: The condition.
        columns: What may be named, by name; the case of a name does not matter where it is unique.

    Raises:
        ValueError: it is no condition, names an unknown column, or compares a number with a text.
    """
    if len(text) > LONGEST:
        raise ValueError(f"the condition has {len(text):,} characters; at most {LONGEST:,} are read, so shorten it.")
    return _Parser(text, columns).whole()


@dataclass
class _Parser:
    text: str
    columns: Mapping[str, Column]
    values: list[Any] = field(default_factory=list)
    depth: int = 0

    def __post_init__(self) -> None:
        self.tokens = self._tokens()

    def whole(self) -> Condition:
        tree = self._or()
        if self._next.kind != "end":
            self._refuse("'and', 'or' or the end was expected")
        return Condition(_sql(tree), self.values, tree)

    def _tokens(self) -> list[_Token]:
        tokens, position, end = [], 0, len(self.text.rstrip())
        while position < end:
            match = _TOKEN.match(self.text, position)
            if match is None:
                rest = self.text[position:].strip()
                hint = "; a quote is not closed" if rest[0] in "'\"" else ""
                raise ValueError(f"the condition cannot be read from {rest[:30]!r} on{hint}.")
            kind = str(match.lastgroup)
            value = match.group(kind)
            if kind == "word" and value.lower() in KEYWORDS:
                kind, value = "keyword", value.lower()
            tokens.append(_Token(kind, value, match.end() - len(match.group().lstrip())))
            position = match.end()
        tokens.append(_Token("end", "", end))
        return tokens[::-1]

    @property
    def _next(self) -> _Token:
        return self.tokens[-1]

    def _takes(self, *values: str) -> bool:
        """Go past the next token if it is one of these keywords or signs."""
        if self._next.kind in ("keyword", "sign") and self._next.value in values:
            self.tokens.pop()
            return True
        return False

    def _expect(self, value: str) -> None:
        if not self._takes(value):
            self._refuse(f"{value!r} was expected")

    def _refuse(self, problem: str) -> NoReturn:
        found = self.text[self._next.position :].strip()
        place = f"before {found[:30]!r}" if found else "at the end"
        raise ValueError(f"the condition {self.text.strip()[:80]!r} cannot be read: {problem} {place}.")

    def _or(self) -> Node:
        parts = [self._and()]
        while self._takes("or"):
            parts.append(self._and())
        return parts[0] if len(parts) == 1 else Junction("OR", tuple(parts))

    def _and(self) -> Node:
        parts = [self._not()]
        while self._takes("and"):
            parts.append(self._not())
        return parts[0] if len(parts) == 1 else Junction("AND", tuple(parts))

    def _not(self) -> Node:
        self.depth += 1
        if self.depth > DEEPEST:
            self._refuse(f"at most {DEEPEST} parentheses and 'not' may stand inside one another")
        node: Node
        if self._takes("not"):
            node = Not(self._not())
        elif self._takes("("):
            node = self._or()
            self._expect(")")
        else:
            node = self._comparison()
        self.depth -= 1
        return node

    def _comparison(self) -> Comparison:
        column = self._column()
        if self._takes("is"):
            is_negated = self._takes("not")
            self._expect("null")
            return Comparison(column, "IS NULL", (), is_negated)
        is_negated = self._takes("not")
        if self._takes("in"):
            return Comparison(column, "IN", self._list(column), is_negated)
        if self._takes("like"):
            if column.is_number:
                self._refuse("'like' compares texts, and the column holds numbers,")
            return Comparison(column, "LIKE", (self._value(column),), is_negated)
        if self._takes("between"):
            least = self._value(column)
            self._expect("and")
            return Comparison(column, "BETWEEN", (least, self._value(column)), is_negated)
        if is_negated or self._next.kind != "sign" or self._next.value not in COMPARISONS:
            self._refuse(f"one of {' '.join(COMPARISONS)}, in, like, between or is was expected")
        sign = COMPARISONS[self.tokens.pop().value]
        return Comparison(column, sign, (self._value(column),))

    def _column(self) -> Column:
        if self._next.kind not in ("word", "quoted"):
            self._refuse("the name of a column was expected")
        name = self.tokens.pop().value.replace('""', '"')
        alike = [known for known in self.columns if known.lower() == name.lower()]
        if name in self.columns:
            return self.columns[name]
        if len(alike) == 1:
            return self.columns[alike[0]]
        raise ValueError(
            f"the condition names {name!r}, which is no column of this index{did_you_mean(name, self.columns)} "
            f"It has {', '.join(self.columns)}."
        )

    def _list(self, column: Column) -> tuple[Any, ...]:
        self._expect("(")
        values = [self._value(column)]
        while self._takes(","):
            values.append(self._value(column))
        self._expect(")")
        return tuple(values)

    def _value(self, column: Column) -> Any:
        token = self._next
        is_number = token.kind == "number" or (token.kind == "keyword" and token.value in ("true", "false"))
        if not is_number and token.kind != "text":
            self._refuse("a number, or a text in single quotes, was expected")
        if is_number != column.is_number:
            kinds = ("a number", "a text in single quotes")
            self._refuse(f"the column holds {'numbers' if column.is_number else 'texts'}, so {kinds[is_number]} is due")
        if len(self.values) == MOST_VALUES:
            self._refuse(f"at most {MOST_VALUES} numbers and texts may be compared with")
        self.tokens.pop()
        self.values.append(_literal(token))
        return self.values[-1]


def _sql(node: Node) -> str:
    if isinstance(node, Not):
        return f"(NOT {_sql(node.part)})"
    if isinstance(node, Junction):
        return f"({f' {node.operator} '.join(map(_sql, node.parts))})"
    name, negation = node.column.sql, "NOT " if node.is_negated else ""
    if node.operator == "IS NULL":
        return f"({name} IS {negation}NULL)"
    if node.operator == "IN":
        return f"({name} {negation}IN ({', '.join('?' * len(node.values))}))"
    if node.operator == "BETWEEN":
        return f"({name} {negation}BETWEEN ? AND ?)"
    return f"({name} {negation}{node.operator} ?)"


def _literal(token: _Token) -> Any:
    if token.kind == "text":
        return token.value.replace("''", "'")
    if token.kind == "keyword":
        return int(token.value == "true")
    number = float(token.value)
    # SQLite has whole numbers of 64 bits; a float compares with them exactly.
    is_whole = token.value.lstrip("+-").isdigit() and abs(number) < 2**63
    return int(token.value) if is_whole else number
