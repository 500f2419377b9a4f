"""Keep rows of tensors in a file without a name, which all processes of a run write and then map.

Mapping the file means that no process holds the rows in its own memory or sends them to another. The operating system
drops pages that do not fit and reads them again.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lavis_cir_plugin.core.error_messages import size_text
from lavis_cir_plugin.core.processes import fail_in_all_processes, gather, rank_and_world


class _Row(NamedTuple):
    """Shape and type of one row."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SharedRows:
    """Rows of one shape and type in a file that all processes write.

    Every process must make the object. The file loses its name as soon as all processes have opened it, so it
    disappears however the processes end.

    Args:
        path: Path of the file in a folder that all processes see. An existing file is replaced.
        total: Number of rows of all processes, at least 1.
        contents: What the rows are, in the plural. Each error's message begins with it.
        advice: End of each error's message, which says what to do or what happens instead.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If another process failed.
    """

    def __init__(self, path: Path, total: int, contents: str, advice: str) -> None:
        self.path, self.total, self.contents, self.advice = path, total, contents, advice
        self._row: _Row | None = None
        is_main = rank_and_world()[0] == 0
        with fail_in_all_processes(), self._errors_explained():
            if is_main:
                path.write_bytes(b"")
        with fail_in_all_processes(), self._errors_explained():
            self._file = path.open("r+b", buffering=0)
        if is_main:
            with suppress(OSError):  # Windows keeps the name of an open file; the next run replaces the file
                path.unlink()

    def __enter__(self) -> SharedRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Rows that were mapped stay readable; otherwise its room is free once all have closed it."""
        self._file.close()

    def check_room(self, row: Tensor, others: int = 0) -> None:
        """Refuse rows that will not fit.

        Args:
            row: A tensor of the shape and type of a row.
            others: Number of bytes that will be needed on the same disk for something else.

        Raises:
            OSError: If they will not fit.
        """
        needed = self.total * row.nbytes - os.fstat(self._file.fileno()).st_size
        free = shutil.disk_usage(self.path.parent).free
        if needed + others > free:
            beside = f" beside {size_text(others)} for other files" if others else ""
            with self._errors_explained():
                raise OSError(None, f"it needs {size_text(needed)}{beside} and {size_text(free)} are free")

    def write(self, start: int, rows: Tensor) -> None:
        """Write rows ``(n, ...)`` on the CPU to the places from ``start`` on.

        Raises:
            OSError: If they cannot be written, as on a full disk.
        """
        self._row = self._row or _Row(tuple(rows.shape[1:]), rows.dtype)
        left: memoryview = rows.contiguous().flatten().view(torch.uint8).numpy().data
        with self._errors_explained():
            self._file.seek(start * self._row.size)
            while left:  # an unbuffered file may write only a part, and so does a full disk
                left = left[self._file.write(left) :]

    def mapped(self) -> Tensor:
        """Return all rows ``(total, ...)``, mapped from the file. Every process must call this method after its writes.

        All processes share the rows, so they must not be changed.

        Raises:
            OSError: If the file cannot be mapped.
            ValueError: If another process failed.
        """
        row = next(found for found in gather(self._row) if found is not None)
        with fail_in_all_processes(), self._errors_explained():
            data = np.memmap(self._file, np.uint8, mode="r+", shape=(self.total, row.size))
        return torch.from_numpy(data).view(row.dtype).view(self.total, *row.shape)

    @contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"{self.contents} cannot be written to {self.path} ({error.strerror or error}); {self.advice}."
            ) from error


def check_shared(folder: Path, contents: str, advice: str) -> None:
    """Refuse a folder that not all processes see or can write. Every process must call this function.

    Args:
        folder: The folder.
        contents: What will be written there, in the plural; the error's message begins with it.
        advice: End of the error's message, which says what to do.

    Raises:
        OSError: If this process cannot write or open a file there.
        ValueError: If another process failed.
    """
    if rank_and_world()[1] > 1:
        name = gather(secrets.token_hex(8))[0]  # another run may test the same folder
        SharedRows(folder / f"{name}.tmp", 1, contents, advice).close()
