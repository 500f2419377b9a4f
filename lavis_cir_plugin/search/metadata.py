"""The user's own columns, read from a .csv or .jsonl file with one row per picture."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lavis_cir_plugin.benchmarks.annotation_files import refuse_special
from lavis_cir_plugin.benchmarks.json_lines import line_error, parse_line, read_objects
from lavis_cir_plugin.core.error_messages import listed, shown
from lavis_cir_plugin.search.folders import absolute

KEYS = ("path", "file", "filename", "file_name", "image", "image_path")
"""Names of the column that says which picture a row is about; the first that a file has."""

NUMBER, TEXT = "number", "text"

_REMEDY = "name the .csv or .jsonl file of your columns by --metadata"


@dataclass
class Metadata:
    """Columns by picture.

    Attributes:
        columns: `NUMBER` or `TEXT` by column name, in the file's order.
        rows: Values by absolute path of a picture; ``None`` where one is missing.
        unmatched: Rows that name no picture or may mean several, as the file names them.
        mixed: Columns that hold numbers and texts, which are texts from now on.
    """

    columns: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[Any]] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)


def read_metadata(path: str | Path, pictures: Iterable[str], folders: Sequence[str], taken: Iterable[str]) -> Metadata:
    """Read a file of columns and find the picture of every row.

    A row names its picture by absolute path, by its path below the file's own folder, by its path below an indexed
    folder if only one of them has such a picture, or by the file name alone if only one picture has it. CSV: numbers
    where all of a column's values are, empty is missing. JSON lines: numbers, texts, true and false (as 1 and 0), null
    is missing.

    Args:
        path: A ``.csv`` file with a header, or ``.jsonl``.
        pictures: Absolute paths of the index's pictures.
        folders: Absolute paths of its folders.
        taken: Names that columns may not have.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is of another kind, has no column of `KEYS`, names a picture twice, or a value is nested.
    """
    path = Path(path).expanduser()
    records = _read_csv(path) if path.suffix.lower() == ".csv" else _read_jsonl(path)
    key, names = _key_and_columns(path, records, set(taken))
    known = set(pictures)
    by_name: dict[str, list[str]] = {}
    for known_path in known:
        by_name.setdefault(os.path.basename(known_path), []).append(known_path)
    own = absolute(path.parent)
    found = Metadata()
    lines: dict[str, int] = {}
    for line, record in records:
        value = record.get(key)
        if not isinstance(value, str) or not value:
            raise line_error(path, line, f"has {key} = {shown(value)}; it must name a picture")
        picture = _picture(value, known, own, folders, by_name)
        if picture is None:
            found.unmatched.append(value)
            continue
        if picture in lines:
            raise line_error(path, line, f"is about {value}, as line {lines[picture]} is; keep one of the two")
        lines[picture] = line
        found.rows[picture] = [_plain(record.get(name), path, line, name) for name in names]
    _settle_kinds(found, names)
    return found


def _read_csv(path: Path) -> list[tuple[int, dict[str, Any]]]:
    refuse_special(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            records = [(reader.line_num, dict(record)) for record in reader]
            names = list(reader.fieldnames or [])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; {_REMEDY}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}; save it anew.") from error
    if len(set(names)) < len(names) or not records:
        problem = "has no rows" if len(set(names)) == len(names) else "has two columns of one name"
        raise ValueError(f"{path} {problem}; it must hold a header of distinct names and a row per picture.")
    for line, record in records:
        if None in record or None in record.values():
            raise line_error(path, line, f"has not {len(names)} values like the header; quote values that hold a comma")
    return _typed(records, names)


def _typed(records: Sequence[tuple[int, dict[str, Any]]], names: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """Turn a CSV column into numbers where all its values are numbers; empty values into ``None``."""
    columns = {name: [record[name] or None for _, record in records] for name in names}
    for name, values in columns.items():
        numbers = [None if value is None else _number(value) for value in values]
        is_number = name not in KEYS and all((a is None) == (b is None) for a, b in zip(values, numbers))
        columns[name] = numbers if is_number else values
    return [(line, {name: columns[name][n] for name in names}) for n, (line, _) in enumerate(records)]


def _number(text: str) -> int | float | None:
    """Return the number that a text is; ``None`` where it is none, or is an identifier such as 007."""
    bare = text.strip().lstrip("+-")
    if not bare or not (bare[0].isdigit() or bare[0] == ".") or not bare.isascii() or "_" in bare:
        return None
    if len(bare) > 1 and bare[0] == "0" and bare[1].isdigit():
        return None
    try:
        number = int(text) if bare.isdigit() else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and abs(number) < 2**63 else None


def _read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise ValueError(f"{path} is neither .csv nor .jsonl; save your columns as one of the two.")
    return [
        (number, parse_line(text, lambda problem, at=number: line_error(path, at, problem), '{"path": "a.jpg"}'))  # type: ignore[misc]
        for number, text in read_objects(path, _REMEDY)
    ]


def _key_and_columns(
    path: Path, records: Sequence[tuple[int, Mapping[str, Any]]], taken: set[str]
) -> tuple[str, list[str]]:
    names = list(dict.fromkeys(name for _, record in records for name in record))
    key = next((name for name in KEYS if name in names), None)
    if key is None:
        raise ValueError(
            f"{path} has no column that names the pictures; call it {KEYS[0]} (or {', '.join(KEYS[1:])}; columns: "
            f"{', '.join(names)})."
        )
    columns = [name for name in names if name != key]
    if any(not name.strip() for name in columns):
        raise ValueError(f"{path} has a column without a name; name it, or remove it (a comma ends the header, say).")
    refused = [name for name in columns if name in taken]
    if refused:
        raise ValueError(f"{path} has a column {refused[0]!r}, which is the index's own name; rename it.")
    return key, columns


def _picture(
    value: str, known: set[str], own: str, folders: Iterable[str], by_name: Mapping[str, Sequence[str]]
) -> str | None:
    beside = absolute(os.path.join(own, value))
    if beside in known:
        return beside
    below = known.intersection(absolute(os.path.join(folder, value)) for folder in folders)
    meant = list(below or by_name.get(value, ()))
    return meant[0] if len(meant) == 1 else None


def _plain(value: Any, path: Path, line: int, name: str) -> Any:
    if isinstance(value, bool):
        return int(value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < 2**63:
        return value
    raise line_error(path, line, f"has {name} = {shown(value)}; it must be a number, a text, true, false or null")


def _settle_kinds(found: Metadata, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        kinds = {isinstance(row[place], str) for row in found.rows.values() if row[place] is not None}
        found.columns[name] = TEXT if True in kinds else NUMBER
        if len(kinds) == 2:
            found.mixed.append(name)
            for row in found.rows.values():
                row[place] = row[place] if row[place] is None else str(row[place])


def lacking(columns: Iterable[str], pictures: int, total: int) -> list[str]:
    """Say how many pictures have no row of the columns that an index has, which no condition on these finds."""
    if not pictures:
        return []
    return [
        f"metadata: {pictures:,} of {total:,} pictures have no {', '.join(columns)}; {_REMEDY} again if it has them now"
    ]


def summary(metadata: Metadata, pictures: int) -> list[str]:
    """Say what became of the rows, a sentence each."""
    lines = [f"metadata: {len(metadata.rows):,} of {pictures:,} pictures have {', '.join(metadata.columns)}"]
    if metadata.unmatched:
        lines.append(
            f"metadata: {len(metadata.unmatched):,} rows name no picture, or may mean several "
            f"({listed(metadata.unmatched)})"
        )
    if metadata.mixed:
        lines.append(f"metadata: {', '.join(metadata.mixed)} hold numbers and texts, so all are texts")
    return lines
