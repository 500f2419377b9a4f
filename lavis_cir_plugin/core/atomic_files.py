"""Write files and folders atomically: readers see the old file or the whole new one."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["check_new_folder", "check_writable", "is_refused_write", "new_folder", "replace_file", "replacing"]


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
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> Path:
    """Write the content of a file with `replacing`, and return its path.

    Raises:
        OSError: If the file cannot be written. An old file then stays unchanged.
    """
    with replacing(path) as file:
        file.write(content)
    return path


def check_writable(path: Path) -> None:
    """Check that `replacing` could write a file of this path, before long work on its content; nothing is made.

    Raises:
        OSError: If the path is a folder, or no file can be made in its folder or the nearest one that exists.
    """
    with _explained(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _try_in(path.absolute().parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes its place when the block ends. After an error nothing of it is left.

    The block should only write, because every OSError in it is reported as a failure to write, and so are those errors
    of torch and safetensors that stand for one.

    Args:
        path: Absolute path that is free or an empty folder. Folders above it are made if they are missing.

    Raises:
        OSError: If something cannot be written.
    """
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as staging:
            content = Path(staging) / "content"
            content.mkdir()
            yield content
            os.replace(content, path)


def check_new_folder(path: Path) -> None:
    """Check that `new_folder` could make this folder, before long work on its content; nothing is made.

    Raises:
        ValueError: If the path is taken by a file or by a folder that is not empty.
        OSError: If no file can be made in the folder above it or the nearest one that exists.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--output {path} exists and is not an empty folder; choose another.")
    with _explained(path):
        _try_in(path.absolute().parent)


def _try_in(folder: Path) -> None:
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    with tempfile.TemporaryFile(dir=existing):
        pass


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise one kind of error with one sentence for every refusal to write."""
    try:
        yield
    except Exception as error:
        if not is_refused_write(error):
            raise
        own = error if isinstance(error, OSError) else "the file could not be finished"
        reason = getattr(error, "strerror", None) or own
        raise OSError(
            f"{path} could not be written: {reason}; free some space there or write elsewhere (a "
            "run's folder is run.output_dir, a command's its --output, the cache is below XDG_CACHE_HOME)."
        ) from error


def is_refused_write(error: Exception) -> bool:
    """Return whether an error says that a write failed, which torch and safetensors report as errors of their own."""
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename).name
    is_of_torch = isinstance(error, RuntimeError) and origin == "serialization.py"
    return isinstance(error, OSError) or is_of_torch or type(error).__name__ == "SafetensorError"
