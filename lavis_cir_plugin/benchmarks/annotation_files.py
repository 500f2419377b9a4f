"""Read annotation files and name the record that is wrong."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lavis_cir_plugin.benchmarks.survey import current_survey
from lavis_cir_plugin.core.error_messages import shown
from lavis_cir_plugin.core.settings import is_text

if TYPE_CHECKING:
    pass


# -- annotation files ------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """Read a UTF-8 JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be read (a folder, no permission), is not UTF-8 or not JSON (with line and column), or an
            object has a key twice.
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
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits; a key twice
        raise ValueError(f"{path} cannot be read as JSON: {error}; correct the file or copy it again.") from error


def refuse_special(path: Path) -> None:
    """Refuse what waits for a writer when it is opened, or never ends: a named pipe, a socket, a device.

    Raises:
        ValueError: it is such a thing. A missing file, a folder and a regular file pass.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # opening it says what is wrong
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path} is no regular file but a named pipe, socket or device; put a file in its place.")


def parse_json(text: str) -> Any:
    """Parse JSON in which no object has a key twice: of the two values, parsers keep one and say nothing.

    Raises:
        ValueError: it is not JSON, or an object has a key twice.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {shown(key)} twice")
    return content


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read an annotation file that is a list of objects.

    Raises:
        FileNotFoundError, ValueError: as `read_json`, or the content is not a non-empty list of objects.
    """
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} must hold a non-empty list of objects, got {shown(records)}.")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise record_error(path, number, f"must be an object, got {shown(record)}")
    return records


def text_field(record: Mapping[str, Any], key: str, path: Path, number: int, optional: bool = False) -> str | None:
    """Return a text of a record; ``None`` only where it is optional and absent.

    Raises:
        ValueError: the field is missing or not text.
    """
    value = record.get(key)
    if is_text(value) or (optional and value is None):
        return value
    raise record_error(path, number, f"{_has(record, key)}; it must be text")


def whole_number_field(
    record: Mapping[str, Any], key: str, path: Path, number: int, optional: bool = False
) -> int | None:
    """Return a whole number of a record; ``None`` only where it is optional and absent.

    Raises:
        ValueError: the field is missing or not a whole number.
    """
    value = record.get(key)
    if type(value) is int or (optional and value is None):
        return value
    raise record_error(path, number, f"{_has(record, key)}; it must be a whole number")


def _has(record: Mapping[str, Any], key: str) -> str:
    return f"has {key} = {shown(record[key])}" if key in record else f"has no '{key}'"


def require_distinct(records: Sequence[Mapping[str, Any]], key: str, path: Path) -> None:
    """Check that no two records have the same value in a field; those without it do not count.

    Raises:
        ValueError: with the first two that do.
    """
    first: dict[Any, int] = {}
    for number, record in enumerate(records):
        value = record.get(key)
        if value is not None and first.setdefault(value, number) != number:
            raise record_error(path, number, f"has {key} = {shown(value)} like record {first[value]}")


def image_name(value: Any, key: str, path: Path, number: int) -> str:
    """Return the image name in a field of a record: a file stem, which can lead to no other folder.

    Args:
        value: What the file holds.
        key: Of the field, for the message.
        path: Of the annotation file.
        number: Of the record, counting from 0.

    Raises:
        ValueError: it is not text, empty, ``.`` or ``..``, or holds a slash, a backslash or something unprintable
            (NUL, line breaks, halves of surrogate pairs).
    """
    if not isinstance(value, str) or value in ("", ".", "..") or set(value) & {"/", "\\"} or not value.isprintable():
        raise record_error(
            path, number, f"has {key} = {shown(value)}; it must be an image name, that is text without / and \\"
        )
    return value


def record_error(path: Path, number: int, problem: str) -> ValueError:
    """Build the error of one record; `number` counts from 0."""
    return ValueError(f"{path}: record {number} (counting from 0) {problem}; correct the file or copy it again.")


def require_listed(
    uses: Iterable[tuple[int, str, Any]], split: Mapping[Any, Any], path: Path, split_path: Path
) -> None:
    """Check that every image that an annotation file uses is in its split file.

    Args:
        uses: Number of the record, field and image; images that are None do not count.
        split: What the split file lists.
        path: Of the annotation file.
        split_path: Of the split file.

    Raises:
        ValueError: with the number of unlisted images and the first one's place.
    """
    unlisted = [use for use in uses if use[2] is not None and use[2] not in split]
    if unlisted:
        number, key, image = unlisted[0]
        raise ValueError(
            f"{path} uses {len({use[2] for use in unlisted}):,} images that {split_path} does not list (first: record "
            f"{number}, counting from 0, has {key} = {shown(image)}); the two files must belong together."
        )


def find_annotation(bases: Sequence[Path], folders: Sequence[str], name: str, dataset: str) -> Path:
    """Find an annotation file in the first of ``base/folder`` that has it.

    Raises:
        FileNotFoundError: naming the places that were looked at and the key to set.
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
