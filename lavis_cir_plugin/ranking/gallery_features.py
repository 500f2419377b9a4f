"""Features of a gallery: each process writes its share into one file, and all map the whole of it.

A gallery of 123,403 images with 32 x 256 features is 4 GB as float32. So no process holds it in its own memory, none is
sent to another, and the operating system drops and reads again what does not fit.
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
    """Write this process's rows beside those of the others and return the rows of all, mapped from the file.

    Every process calls this. The file loses its name as soon as all have it open, so that nothing is left of it,
    however they end.

    Args:
        path: The file, in a folder that all processes see; an older one is replaced.
        total: Number of rows of all processes, at least 1.
        batches: ``(n, ...)`` each, together the rows ``share(total)``, on any device.
        dtype: Of the file, one of `DTYPES`.

    Returns:
        ``(total, ...)`` of ``dtype`` on the CPU; all processes share it, so it is for reading only.

    Raises:
        OSError: the file cannot be written, as on a full disk; with the keys to change.
        ValueError: the number of rows is not the share's, or another process failed.
    """
    is_main = rank_and_world()[0] == 0
    with fail_in_all_processes(), _explained(path):
        if is_main:
            path.write_bytes(b"")
    with ExitStack() as stack:
        with fail_in_all_processes(), _explained(path):
            file = stack.enter_context(path.open("r+b", buffering=0))
        if is_main:
            with suppress(OSError):  # Windows keeps the name of an open file; the next evaluation replaces it
                path.unlink()
        shape = None
        with fail_in_all_processes():
            shape = _write(path, file, share(total), total, batches, dtype)
        shape = next(found for found in gather(shape) if found is not None)
        with fail_in_all_processes(), _explained(path):
            rows = np.memmap(file, _numpy(dtype), mode="r+", shape=(total, *shape))
    return torch.from_numpy(rows)


def _write(
    path: Path, file: FileIO, own: range, total: int, batches: Iterable[Tensor], dtype: torch.dtype
) -> tuple[int, ...] | None:
    """Write rows to their place in the file and return the shape of one; ``None`` if there are none."""
    shape: tuple[int, ...] | None = None
    done = 0
    for batch in batches:
        rows = batch.to("cpu", dtype).numpy()
        row_bytes = rows.nbytes // len(rows)
        with _explained(path):
            if shape is None:
                _check_room(path, file, total, row_bytes)
            file.seek((own.start + done) * row_bytes)
            left = memoryview(rows.tobytes())
            while left:  # an unbuffered file may take less than it is given, a full disk some of it
                left = left[file.write(left) :]
        shape, done = rows.shape[1:], done + len(rows)
    if done != len(own):
        raise ValueError(f"{done:,} of {len(own):,} gallery images were encoded; the model must return a row for each.")
    return shape


def _check_room(path: Path, file: FileIO, total: int, row_bytes: int) -> None:
    """Refuse a gallery that will not fit before it is encoded."""
    needed, free = total * row_bytes - os.fstat(file.fileno()).st_size, shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(None, f"it needs {size_text(needed)} and {size_text(free)} are free")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"the gallery's features cannot be written to {path} ({error.strerror or error}); free some space, set "
            "run.output_dir to a folder on another disk that all processes see, or run.gallery_dtype to float16."
        ) from error


def _numpy(dtype: torch.dtype) -> str:
    return str(dtype).rpartition(".")[2]
