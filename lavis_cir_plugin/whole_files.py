"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["replace_file", "replacing"]

OUTPUT_DIR = "set run.output_dir to another folder"


@contextmanager
def replacing(path: Path, otherwise: str = OUTPUT_DIR) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends: readers see the old file or the new one.

    Args:
        path: The file; its folder is made where it is missing.
        otherwise: What one may do, other than to free space, where it cannot be written.

    Raises:
        OSError: it cannot be written. Then, as after any other error in the block, an older file is as it was.
    """
    # One name per process, beside the file: os.replace is atomic within one file system only.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"{path} could not be written: {error.strerror or error}; free some space there or {otherwise}."
        ) from error


def replace_file(path: Path, content: bytes, otherwise: str = OUTPUT_DIR) -> Path:
    """Put content at a path by `replacing`, and return the path.

    Raises:
        OSError: it cannot be written; an older file is then as it was.
    """
    with replacing(path, otherwise) as file:
        file.write(content)
    return path
