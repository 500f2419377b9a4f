"""Store the features of a gallery in one file: each process writes its share, and all processes map the file.

The features of 123,403 images with 32 x 256 values each take 4 GB as float32, which no process then holds in its own
memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from lavis_cir_plugin.core.processes import fail_in_all_processes, share
from lavis_cir_plugin.core.shared_rows import SharedRows, check_shared

DTYPES = {"float32": torch.float32, "float16": torch.float16}
_CONTENTS = "the gallery's features"
_ADVICE = (
    "free some space, set run.output_dir to a folder on another disk that all processes see, or run.gallery_dtype to "
    "float16"
)


def store_gallery(path: Path, total: int, batches: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
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
    with SharedRows(path, total, _CONTENTS, _ADVICE) as file:
        with fail_in_all_processes():
            _write(file, share(total), batches, dtype)
        return file.mapped()


def check_folder(folder: Path) -> None:
    """Refuse a folder for :func:`store_gallery` that not all processes see. Every process must call this function.

    Raises:
        OSError: If this process cannot write or open a file there.
        ValueError: If another process failed.
    """
    check_shared(folder, _CONTENTS, _ADVICE)


def _write(file: SharedRows, own: range, batches: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Write rows to their places in the file."""
    done = 0
    for batch in batches:
        rows = batch.to("cpu", dtype)
        if done == 0:
            file.check_room(rows[0])  # before the rest of the gallery is encoded
        file.write(own.start + done, rows)
        done += len(rows)
    if done != len(own):
        raise ValueError(f"{done:,} of {len(own):,} gallery images were encoded; the model must return a row for each.")
