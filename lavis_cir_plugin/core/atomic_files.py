"""Write files atomically: readers see the old file or the whole new one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["replace_file", "replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` when the block ends: readers see the old file or the new one.

    If several processes write, on one machine or on many, the last one wins. The block should only write, because
    every OSError in it is reported as a failure to write.

    Args:
        path: Path of the file. Its folder is made if it is missing.

    Raises:
        OSError: If the file cannot be written. After this or any other error in the block the old file is unchanged.
    """
    # os.replace is atomic within one file system only. Two machines can have equal process ids, so the name is random.
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
    """Write the content of a file with `replacing`, and return its path.

    Raises:
        OSError: If the file cannot be written. An old file then stays unchanged.
    """
    with replacing(path) as file:
        file.write(content)
    return path
