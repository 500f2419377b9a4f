"""Read annotation files, and name the wrong record in errors."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_cir_plugin.benchmarks.survey import current_survey
from lavis_cir_plugin.core.error_messages import shown
from lavis_cir_plugin.core.settings import is_text

# -- annotation files ------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Read a JSON file in UTF-8.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be read (a folder, no permission), is not UTF-8, is not JSON (with line and column), or
            has an object with a repeated key.
    """
    refuse_special(path)
    try:
        return parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; name a JSON file that can.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            f"correct the file or copy it again."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except (RecursionError, ValueError) as error:  # deep nesting, a huge number or a repeated key
        raise ValueError(f"{path} cannot be read as JSON: {error}; correct the file or copy it again.") from error


def refuse_special(path: Path) -> None:
    """Refuse files that would block or never end when they are read: named pipes, sockets and devices.

    Raises:
        ValueError: If the path is such a file. A missing file, a folder and a regular file pass.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # opening the file will raise the right error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path} is no regular file but a named pipe, socket or device; put a file in its place.")


def parse_json(text: str) -> Any:
    """Parse JSON and refuse objects with a repeated key, of which ordinary parsers keep one value without a word.

    Raises:
        ValueError: If the text is not JSON, or an object has a repeated key.
        RecursionError: If it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {shown(key)} twice")
    return content


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read an annotation file that holds a list of objects.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: As in `read_json`, or if the content is not a non-empty list of objects.
    """
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a non-empty list of objects, got {shown(records)}.")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise record_error(path, number, f"must be an object, got {shown(record)}")
    return records


def text_field(record: Mapping[str, Any], key: str, path: Path, number: int, optional: bool = False) -> str | None:
    """Return a text field of a record, or ``None`` if it is optional and missing.

    Raises:
        ValueError: If the field is missing or not text.
    """
    value = record.get(key)
    if is_text(value) or (optional and value is None):
        return value
    raise record_error(path, number, f"{_has(record, key)}; it must be text")


def whole_number_field(
    record: Mapping[str, Any], key: str, path: Path, number: int, optional: bool = False
) -> int | None:
    """Return an integer field of a record, or ``None`` if it is optional and missing.

    Raises:
        ValueError: If the field is missing or not an integer.
    """
    value = record.get(key)
    if type(value) is int or (optional and value is None):
        return value
    raise record_error(path, number, f"{_has(record, key)}; it must be a whole number")


def _has(record: Mapping[str, Any], key: str) -> str:
    return f"has {key} = {shown(record[key])}" if key in record else f"has no '{key}'"


def require_distinct(records: Sequence[Mapping[str, Any]], key: str, path: Path) -> None:
    """Check that no two records have the same value in a field; records without the field do not count.

    Raises:
        ValueError: If two records do. The message names the first two.
    """
    first: dict[Any, int] = {}
    for number, record in enumerate(records):
        value = record.get(key)
        if value is not None and first.setdefault(value, number) != number:
            raise record_error(path, number, f"has {key} = {shown(value)} like record {first[value]}")


def image_name(value: Any, key: str, path: Path, number: int) -> str:
    """Return the image name in a field of a record: a file stem that cannot lead to another folder.

    Args:
        value: Value in the file.
        key: Name of the field, for the message.
        path: Path of the annotation file.
        number: Number of the record, counted from 0.

    Raises:
        ValueError: If the value is not text, is empty, ``.`` or ``..``, or holds a slash, a backslash or unprintable
            characters (NUL, line breaks, lone surrogates).
    """
    if not isinstance(value, str) or value in ("", ".", "..") or set(value) & {"/", "\\"} or not value.isprintable():
        raise record_error(
            path, number, f"has {key} = {shown(value)}; it must be an image name, that is text without / and \\"
        )
    return value


def record_error(path: Path, number: int, problem: str) -> ValueError:
    """Return the error for one record; `number` counts from 0."""
    return ValueError(f"{path}: record {number} (counting from 0) {problem}; correct the file or copy it again.")


def require_listed(
    uses: Iterable[tuple[int, str, Any]], split: Mapping[Any, Any], path: Path, split_path: Path
) -> None:
    """Check that a split file lists every image that an annotation file uses.

    Args:
        uses: Record number, field and image of each use. Images that are None do not count.
        split: Images in the split file.
        path: Path of the annotation file.
        split_path: Path of the split file.

    Raises:
        ValueError: If images are not listed. The message gives their number and where the first one is used.
    """
    unlisted = [use for use in uses if use[2] is not None and use[2] not in split]
    if unlisted:
        number, key, image = unlisted[0]
        raise ValueError(
            f"{path} uses {len({use[2] for use in unlisted}):,} images that {split_path} does not list (first: record "
            f"{number}, counting from 0, has {key} = {shown(image)}); the two files must belong together."
        )


def find_annotation(bases: Sequence[Path], folders: Sequence[str], name: str, dataset: str) -> Path:
    """Return the first existing path of an annotation file among all ``base/folder``.

    Raises:
        FileNotFoundError: If there is none. The message names all places and the key to set.
    """
    places = [base / folder for base in bases for folder in folders]
    survey = current_survey()
    for place in places:
        if (place / name).is_file():
            if survey is not None:
                survey.files.append(place / name)
            return place / name
    if survey is not None:
        survey.absent.append(name)
    raise FileNotFoundError(
        f"{dataset}: annotation file {name} is in none of {', '.join(map(str, places))}; "
        f"set datasets.{dataset}.build_info.root to the data set's folder, or build_info.annotations to that of its "
        f"JSON files."
    )
