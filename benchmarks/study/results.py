"""The study's results: one small row per finished run in a CSV of the repository."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lavis_cir_plugin.core.atomic_files import replace_file
from lavis_cir_plugin.core.locks import hold_lock

COLUMNS = (
    "part", "row", "world", "triplets", "seed", "digest", "train_last", "val_last", "train_best", "val_best",
    "epoch_best", "val_stopped", "loss", "rise_gradient", "rise_random", "radius", "norm_start", "norm_end",
    "step_seconds", "run_seconds", "val_curve", "train_curve", "hits_last", "hits_stopped", "settings", "start",
    "commit", "cpu", "torch", "python",
)  # fmt: skip

Result = Mapping[str, str]
Scores = NDArray[Any]
"""How well examples are answered, ``(scores per example, examples)``: bools, or floats."""


def key_of(row: Result) -> tuple[str, str]:
    """Return what identifies a run: its key and the digest of its settings."""
    return f"{row['part']}/{row['row']}/{row['triplets']}/{row['seed']}", row["digest"]


def read_results(path: Path) -> dict[tuple[str, str], Result]:
    """Return the finished runs by key and digest; none if there is no file.

    Raises:
        ValueError: If the file has other columns.
    """
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames} and this study writes {list(COLUMNS)}.")
        return {key_of(row): row for row in reader}


def append_result(path: Path, row: Result) -> None:
    """Add the row of a finished run: the file is replaced by a whole one, and other processes wait in the meantime."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(path.with_name(f".{path.name}.lock"), f"writing {path}"):
        rows = {**read_results(path), key_of(row): row}
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        replace_file(path, text.getvalue().encode())


def pack_scores(scores: Scores) -> str:
    """Return scores as text: bools a bit each, ``825:`` and base64; others in half precision, ``600f:`` and base64."""
    is_exact = scores.dtype == np.bool_
    content = np.packbits(scores) if is_exact else scores.astype("<f2")
    return f"{scores.shape[1]}{'' if is_exact else 'f'}:" + base64.b64encode(content.tobytes()).decode()


def unpack_scores(text: str) -> Scores:
    """Return the scores of `pack_scores`."""
    kind, _, encoded = text.partition(":")
    content, count = base64.b64decode(encoded), int(kind.rstrip("f"))
    if kind.endswith("f"):
        return np.frombuffer(content, dtype="<f2").reshape(-1, count).astype(np.float64)
    bits = np.unpackbits(np.frombuffer(content, dtype=np.uint8))
    cutoffs = len(bits) // count
    return bits[: cutoffs * count].reshape(cutoffs, count).astype(bool)
