"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["replace_file", "replacing", "size_text"]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block ends: readers see the old file or the new one.

    Of several writers, on one machine or on many, the last one wins. The block should only write, since what the
    operating system refuses in it is taken for a refusal to write.

    Args:
        path: The file; its folder is made where it is missing.

    Raises:
        OSError: it cannot be written. Then, as after any other error in the block, an older file is as it was.
    """
    # Beside the file, as os.replace is atomic within one file system only; processes of two machines share numbers.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"{path} could not be written: {error.strerror or error}; free some space there or write elsewhere (a "
            "run's folder is run.output_dir, a command's its --output, the cache is below XDG_CACHE_HOME)."
        ) from error


def replace_file(path: Path, content: bytes) -> Path:
    """Put content at a path by `replacing`, and return the path.

    Raises:
        OSError: it cannot be written; an older file is then as it was.
    """
    with replacing(path) as file:
        file.write(content)
    return path


def size_text(count: int) -> str:
    """Return a number of bytes with its unit, such as "4.0 GB", "1.5 MB", "0.2 kB" or "0 bytes"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} bytes"
