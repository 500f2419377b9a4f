"""Store the features of a gallery in one file: each process writes its share, and all processes map the file.

The features of 123,403 images with 32 x 256 values each take 4 GB as float32. Mapping the file means that no process
holds them in its own memory or sends them to another. The operating system drops pages that do not fit and reads them
again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lavis_cir_plugin.core.atomic_files import size_text
from lavis_cir_plugin.core.processes import fail_in_all_processes, gather, rank_and_world, share

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def shared_rows(path: Path, total: int, batches: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """Write this process's rows into a file shared by all processes, and return all rows mapped from the file.

    Every process must call this function. The file loses its name as soon as all processes have opened it, so it
    disappears however the processes end.

    Args:
        path: Path of the file in a folder that all processes see. An existing file is replaced.
        total: Number of rows of all processes, at least 1.
        batches: Tensors ``(n, ...)`` on any device that together hold the rows ``share(total)``.
        dtype: Type of the values in the file, one of `DTYPES`.

    Returns:
        ``(total, ...)`` of ``dtype`` on the CPU. All processes share it, so it must not be changed.

    Raises:
        OSError: If the file cannot be written, as on a full disk. The message names the keys to change.
        ValueError: If the number of rows differs from the share, or if another process failed.
    """
    is_main = rank_and_world()[0] == 0
    with fail_in_all_processes(), _explain_disk_error(path):
        if is_main:
            path.write_bytes(b"")
    with ExitStack() as stack:
        with fail_in_all_processes(), _explain_disk_error(path):
            file = stack.enter_context(path.open("r+b", buffering=0))
        if is_main:
            with suppress(OSError):  # Windows keeps the name of an open file; the next evaluation replaces the file
                path.unlink()
        shape = None
        with fail_in_all_processes():
            shape = _write(path, file, share(total), total, batches, dtype)
        shape = next(found for found in gather(shape) if found is not None)
        with fail_in_all_processes(), _explain_disk_error(path):
            rows = np.memmap(file, _numpy(dtype), mode="r+", shape=(total, *shape))
    return torch.from_numpy(rows)


def _write(
    path: Path, file: FileIO, own: range, total: int, batches: Iterable[Tensor], dtype: torch.dtype
) -> tuple[int, ...] | None:
    """Write rows to their place in the file and return the shape of one row, or ``None`` if there are none."""
    shape: tuple[int, ...] | None = None
    done = 0
    for batch in batches:
        rows = batch.to("cpu", dtype).numpy()
        row_bytes = rows.nbytes // len(rows)
        with _explain_disk_error(path):
            if shape is None:
                _check_room(path, file, total, row_bytes)
            file.seek((own.start + done) * row_bytes)
            left = memoryview(rows.tobytes())
            while left:  # an unbuffered file may write only a part, and so does a full disk
                left = left[file.write(left) :]
        shape, done = rows.shape[1:], done + len(rows)
    if done != len(own):
        raise ValueError(f"{done:,} of {len(own):,} gallery images were encoded; the model must return a row for each.")
    return shape


def _check_room(path: Path, file: FileIO, total: int, row_bytes: int) -> None:
    """Raise OSError before the encoding if the gallery will not fit."""
    needed, free = total * row_bytes - os.fstat(file.fileno()).st_size, shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(None, f"it needs {size_text(needed)} and {size_text(free)} are free")


@contextmanager
def _explain_disk_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the gallery's features cannot be written to {path} ({error.strerror or error}); free some space, set "
            "run.output_dir to a folder on another disk that all processes see, or run.gallery_dtype to float16."
        ) from error


def _numpy(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]
