"""Conditions find what the same condition in Python finds, and no text of a user becomes a part of the SQL."""

from __future__ import annotations

import random
import sqlite3

import pytest

from lavis_cir_plugin.search.filters import DEEPEST, LONGEST, MOST_VALUES, Column, parse

COLUMNS = {
    "price": Column("t.c0", True),
    "brand": Column("t.c1", False),
    "in stock": Column("t.c2", True),
    "Größe": Column("t.c3", False),
}
ROWS = [
    (price, brand, stock, size)
    for price in (None, -3, 0, 9.5, 50, 51, 2**62)
    for brand in (None, "x", "O'Neill", "X", "50", "a%b")
    for stock in (0, 1)
    for size in ("M", None)
]


@pytest.fixture(scope="module")
def database():
    with sqlite3.connect(":memory:") as found:
        found.execute("CREATE TABLE t (c0 NUMERIC, c1 TEXT, c2 NUMERIC, c3 TEXT)")
        found.executemany("INSERT INTO t VALUES (?, ?, ?, ?)", ROWS)
        yield found


def found_by(database, text):
    condition = parse(text, COLUMNS)
    return database.execute(f"SELECT * FROM t WHERE {condition.sql}", condition.values).fetchall()


CONDITIONS = {
    "price < 50 and brand = 'x'": lambda p, b, s, g: p is not None and p < 50 and b == "x",
    "PRICE <= 50": lambda p, b, s, g: p is not None and p <= 50,
    "price == 9.5 or price = -3": lambda p, b, s, g: p in (9.5, -3),
    "price > 5e1": lambda p, b, s, g: p is not None and p > 50,
    "price = 4611686018427387904": lambda p, b, s, g: p == 2**62,
    "brand = 'O''Neill'": lambda p, b, s, g: b == "O'Neill",
    "brand <> 'x'": lambda p, b, s, g: b is not None and b != "x",
    "not brand = 'x'": lambda p, b, s, g: b is not None and b != "x",
    "not (brand = 'x' or price < 50)": lambda p, b, s, g: None not in (p, b) and b != "x" and p >= 50,
    "brand is null": lambda p, b, s, g: b is None,
    "brand is not null and price is null": lambda p, b, s, g: b is not None and p is None,
    "brand in ('x', '50')": lambda p, b, s, g: b in ("x", "50"),
    "price not in (0, 50)": lambda p, b, s, g: p is not None and p not in (0, 50),
    "brand like 'x%'": lambda p, b, s, g: b is not None and b[0] in "xX",
    "price between 0 and 50": lambda p, b, s, g: p is not None and 0 <= p <= 50,
    "price not between 0 and 50": lambda p, b, s, g: p is not None and not 0 <= p <= 50,
    "\"in stock\" = true and Größe = 'M'": lambda p, b, s, g: s == 1 and g == "M",
    "price < 0 or price > 50 and brand = 'x'": lambda p, b, s, g: p is not None and (p < 0 or (p > 50 and b == "x")),
    "(price < 0 or price > 50) and brand = 'x'": lambda p, b, s, g: p is not None and (p < 0 or p > 50) and b == "x",
}


@pytest.mark.parametrize("text", CONDITIONS)
def test_a_condition_finds_what_python_finds(text, database):
    expected = [row for row in ROWS if CONDITIONS[text](*row)]
    assert 0 < len(expected) < len(ROWS)
    assert found_by(database, text) == expected


@pytest.mark.parametrize(
    "value", ["x'; DROP TABLE t; --", "' OR 1=1 --", 'x" OR "1"="1', "\0", "%", "union select", "?1"]
)
def test_a_text_is_compared_with_whatever_it_holds(value, database):
    condition = parse(f"brand = '{value.replace(chr(39), 2 * chr(39))}'", COLUMNS)
    assert condition.sql == "(t.c1 = ?)"
    assert condition.values == [value]
    assert database.execute(f"SELECT * FROM t WHERE {condition.sql}", condition.values).fetchall() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zz < 50", r"'zz', which is no column of this index\. It has "),
        ("prize < 50", r"names 'prize', which is no column of this index; did you mean 'price'\?"),
        ("t.c0 < 50", r"cannot be read from '\.c0 < 50' on"),
        ("rowid = 1", "names 'rowid', which is no column"),
        ("price < '50'", "the column holds numbers, so a number is due before \"'50'\""),
        ("brand = 50", "the column holds texts, so a text in single quotes is due before '50'"),
        ("price like '5%'", "'like' compares texts"),
        ("brand = 'x", "a quote is not closed"),
        ("price < 50 brand = 'x'", "'and', 'or' or the end was expected before \"brand = 'x'\""),
        ("price <", "a number, or a text in single quotes, was expected at the end"),
        ("(price < 50", r"'\)' was expected at the end"),
        ("price in ()", "was expected before '\\)'"),
        ("price < price", "was expected before 'price'"),
        ("price; drop table t", "cannot be read from '; drop table t' on"),
        ("lower(brand) = 'x'", "names 'lower', which is no column"),
        ("", "the name of a column was expected at the end"),
        ("not " * (DEEPEST + 1) + "price < 1", f"at most {DEEPEST} parentheses"),
        ("price in (" + ", ".join(["1"] * (MOST_VALUES + 1)) + ")", f"at most {MOST_VALUES} numbers"),
        ("price < 1" + " " * LONGEST + "x", f"at most {LONGEST:,} are read"),
    ],
)
def test_what_is_no_condition_is_refused_by_a_sentence(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text, COLUMNS)


def test_any_row_of_words_is_refused_or_understood_by_sqlite(database):
    """Conditions with some words changed: SQLite gets nothing that it cannot run."""
    words = ["price", "brand", '"in stock"', "=", "<", "<>", "(", ")", ",", "and", "or", "not", "in", "is", "null"]
    words += ["like", "between", "'x'", "5", "-1.5", "true", "''", "%", ";", "--", "x"]
    rng = random.Random(0)
    understood = 0
    for _ in range(5_000):
        text = rng.choice(list(CONDITIONS)).split(" ")
        for _ in range(rng.randint(1, 3)):
            text[rng.randrange(len(text))] = rng.choice(words)
        try:
            condition = parse(" ".join(text), COLUMNS)
        except ValueError:
            continue
        database.execute(f"SELECT COUNT(*) FROM t WHERE {condition.sql}", condition.values).fetchone()
        understood += 1
    assert 100 < understood < 4_900
