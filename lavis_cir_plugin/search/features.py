"""Files of rows that only grow: features in half precision, and small looks of the pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavis_cir_plugin.ranking.scoring import memory_slices

LOOK = (8, 8, 3)
"""Rows, columns and colours of a picture's look."""

_BLOCK_BYTES = 64 * 2**20
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class RowFile:
    """Rows of one shape and type, one after the other; those beyond the number that is asked for are ignored.

    Attributes:
        path: The file; a missing one has no rows.
        shape: Shape of a row.
        dtype: Type of its numbers, by NumPy's name.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def append(self, count: int, rows: np.ndarray[Any, Any]) -> None:
        """Write rows behind the first ``count`` ones, over whatever an interrupted writer left there, onto the disk.

        Raises:
            OSError: they cannot be written; the first ``count`` rows are as they were.
        """
        try:
            with open(self.path, "r+b" if self.path.exists() else "xb") as file:
                file.seek(count * self.row_bytes)
                file.write(np.ascontiguousarray(rows, self.dtype).tobytes())
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be written: {error.strerror or error}; free some space and run the command again, "
                "which goes on where it was."
            ) from error

    def append_from(self, count: int, other: RowFile, rows: np.ndarray[Any, Any]) -> None:
        """Append some rows of another file of this kind, some at a time."""
        if not len(rows):
            return
        source = other.array(int(rows.max()) + 1)
        for part in memory_slices(len(rows), _BLOCK_BYTES, self.row_bytes):
            self.append(count + part.start, source[rows[part]])

    def take_over(self, count: int, other: RowFile, rows: np.ndarray[Any, Any]) -> None:
        """Append some rows of a file that nobody writes or reads any more; into an empty file without copying it."""
        if not len(rows) or (not count and self._is_linked(other, rows)):
            return
        self.append_from(count, other, rows)

    def _is_linked(self, other: RowFile, rows: np.ndarray[Any, Any]) -> bool:
        """Make this file a second name of another one, where the rows are its first ones and the file system can."""
        if not np.array_equal(rows, np.arange(len(rows))):
            return False
        try:
            self.path.unlink(missing_ok=True)
            os.link(other.path, self.path)
        except OSError:
            return False
        return True

    def array(self, count: int) -> np.ndarray[Any, Any]:
        """Map the first ``count`` rows, ``(count, *shape)``; what is written to the array stays in memory.

        Raises:
            ValueError: the file has fewer.
        """
        if not count:
            return np.empty((0, *self.shape), self.dtype)
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < count * self.row_bytes:
            raise ValueError(f"{self.path} has {size:,} of {count * self.row_bytes:,} bytes; build the index again.")
        return np.memmap(self.path, self.dtype, mode="c", shape=(count, *self.shape))

    def tensor(self, count: int) -> Tensor:
        """Map the first ``count`` rows as `array` does."""
        return torch.from_numpy(self.array(count))

    def checksum(self, count: int) -> str:
        """Return a checksum of samples spread over the first ``count`` rows, and of both ends."""
        return sampled_checksum(self.path, count * self.row_bytes)


def sampled_checksum(path: Path, size: int) -> str:
    """Return a checksum of 64 pieces of 4 KiB spread evenly over the first ``size`` bytes of a file."""
    digest = hashlib.sha256(str(size).encode())
    if size:
        with path.open("rb") as file:
            for start in np.linspace(0, max(0, size - _SAMPLE_BYTES), _SAMPLES).astype(np.int64):
                file.seek(int(start))
                digest.update(file.read(min(_SAMPLE_BYTES, size - int(start))))
    return digest.hexdigest()


def block_checksums(path: Path, size: int, known: Sequence[str] = ()) -> list[str]:
    """Return the SHA-256 of every 64 MiB of the first ``size`` bytes of a file; the first ones may be known."""
    checksums = list(known)
    with path.open("rb") as file:
        for start in range(len(known) * _BLOCK_BYTES, size, _BLOCK_BYTES):
            file.seek(start)
            checksums.append(hashlib.sha256(file.read(min(_BLOCK_BYTES, size - start))).hexdigest())
    return checksums


def look_of(picture: Image.Image) -> np.ndarray[Any, Any]:
    """Return the mean colours of 8 x 8 parts of an RGB picture, `LOOK` uint8: the same for any size and quality."""
    return np.asarray(picture.resize((LOOK[1], LOOK[0]), Image.Resampling.BOX), dtype=np.uint8)
