"""Read files with one JSON object per line that people write themselves, and check their fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lavis_cir_plugin.benchmarks.annotation_files import parse_json, refuse_special
from lavis_cir_plugin.benchmarks.survey import current_survey
from lavis_cir_plugin.core.error_messages import shown
from lavis_cir_plugin.core.settings import is_text

Refusal = Callable[[str], ValueError]
"""Function that makes the error of a record from its problem, such as ``has no 'text'``."""


def read_lines(path: Path, remedy: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank, with their numbers from 1.

    Args:
        path: Path of a UTF-8 file with or without a byte order mark.
        remedy: Advice if the file does not exist, for the message.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be read, is not UTF-8 or has no line.
    """
    survey = current_survey()
    refuse_special(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if survey is not None:
            survey.files.append(path)
    except FileNotFoundError:
        if survey is not None:
            survey.absent.append(path.name)
        raise FileNotFoundError(f"{path} does not exist; {remedy}.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; put a JSON-lines file there that can.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    # splitlines would also break lines at other characters, which text fields may hold.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty; it must hold one image or JSON object per line.")
    return lines


def read_objects(path: Path, remedy: str, otherwise: str = "") -> list[tuple[int, str]]:
    """Return the unparsed lines of a file with one JSON object per line, with their numbers from 1.

    Args:
        path: Path of a UTF-8 file with or without a byte order mark.
        remedy: Advice if the file does not exist, for the message.
        otherwise: Further advice for a file that is one JSON array, for the message; may be empty.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: As in `read_lines`, or if the file is one JSON array or spreads an object over lines.
    """
    lines = read_lines(path, remedy)
    start = "".join(text for _, text in lines[:2])
    if start.startswith("[") and start[1:].lstrip()[:1] in ("{", "]"):
        raise ValueError(
            f"{path} is one JSON array; it must hold one object per line, without brackets and without commas between "
            f"the lines, as jq -c '.[]' writes them{otherwise}."
        )
    if lines[0][1] == "{":
        raise ValueError(
            f"{path} spreads an object over several lines; it must hold each on one line, as jq -c . writes them."
        )
    return lines


def parse_line(text: str, refuse: Refusal, example: str) -> dict[str, Any]:
    """Parse a line that holds one JSON object.

    Args:
        text: Text of the line.
        refuse: Function that makes the error from a problem.
        example: Beginning of an object, for the message.

    Raises:
        ValueError: If the line holds no JSON object.
    """
    try:
        item = parse_json(text)
    except json.JSONDecodeError as error:
        comma = " (no comma belongs at its end)" if text.endswith("},") else ""
        raise refuse(f"is not valid JSON: {error.msg} at column {error.colno}{comma}") from error
    except (RecursionError, ValueError) as error:  # deep nesting, a huge number or a repeated key
        raise refuse(f"cannot be read as JSON: {error}") from error
    if not isinstance(item, dict):
        raise refuse(f"must be an object such as {example}, got {shown(item)}")
    return item


def image_path(value: Any, key: str, refuse: Refusal) -> str:
    """Return the path of an image below the image folder, with ``/`` and a suffix; it cannot leave that folder.

    Raises:
        ValueError: If the value is not such a path.
    """
    if (
        not isinstance(value, str)
        or not value.isprintable()
        or "\\" in value
        or set(value.split("/")) & {"", ".", ".."}
    ):
        raise refuse(
            f"has {key} = {shown(value)}; it must be the path of an image below the image folder, such as shoes/a.jpg"
        )
    return value


def one_or_more_texts(value: Any, key: str, refuse: Refusal) -> tuple[str, ...]:
    """Return the texts of a field that holds one text or a list, without blanks at their ends.

    Raises:
        ValueError: If the field holds something else, or an empty text.
    """
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(is_text(text) and text.strip() for text in texts):
        raise refuse(f"has {key} = {shown(value)}; it must be text, or a list of texts, none empty")
    return tuple(text.strip() for text in texts)


def one_text(value: Any, key: str, refuse: Refusal) -> str:
    """Return a text without blanks at its ends.

    Raises:
        ValueError: If the value is not text or is empty.
    """
    if not (is_text(value) and value.strip()):
        raise refuse(f"has {key} = {shown(value)}; it must be text, not empty")
    return str(value).strip()


def line_error(path: Path, line: int, problem: str) -> ValueError:
    """Return the error for one line; `line` counts from 1."""
    return ValueError(f"{path}, line {line} {problem}; correct the line.")
