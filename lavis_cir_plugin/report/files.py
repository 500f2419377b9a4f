"""Write metrics, summaries and test servers' files as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_cir_plugin.benchmarks.types import Benchmark
from lavis_cir_plugin.core.atomic_files import replace_file


def write_summary(path: str | Path, results: Mapping[str, tuple[Benchmark, Mapping[str, Mapping[str, float]]]]) -> Path:
    """Write what :func:`summary_table` shows as JSON, with each benchmark's protocol; return ``path``.

    Raises:
        OSError: the file cannot be written; an older one is then left as it was.
    """
    content = {
        "unit": "percent",
        "benchmarks": {
            name: {
                "protocol": benchmark.protocol,
                "metric": benchmark.selection_metric,
                "values": {label: _finite(row)[benchmark.selection_metric] for label, row in rows.items()},
            }
            for name, (benchmark, rows) in results.items()
        },
    }
    return replace_file(Path(path), (json.dumps(content, indent=2) + "\n").encode())


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    return {metric: percent if math.isfinite(percent) else None for metric, percent in row.items()}


def write_metrics(
    path: str | Path, rows: Mapping[str, Mapping[str, float]], benchmark: Benchmark, extra: Mapping[str, Any]
) -> Path:
    """Write metrics as JSON, together with everything needed to compare them: benchmark, split, protocol, sizes.

    rows: as for :func:`metrics_table`, in percent; a value that is not finite becomes ``null``. extra: what the caller
    knows of the run (checkpoint, seed, commit ...), stored under ``extra``; what JSON lacks (paths) is stored as text.
    Folders are created, an older file is replaced in one step. Returns ``path``.

    Raises:
        OSError: the file cannot be written (a full disk, say); an older file is then left as it was.
    """
    content = {
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "protocol": benchmark.protocol,
        "unit": "percent",
        "selection_metric": benchmark.selection_metric,
        "groups": {
            group.name: {
                "num_queries": len(group.queries),
                "gallery_size": len(group.gallery),
                "reference_removed": group.reference_removed,
            }
            for group in benchmark.groups
        },
        "metrics": {name: _finite(row) for name, row in rows.items()},
        "extra": dict(extra),
    }
    return replace_file(Path(path), (json.dumps(content, indent=2, default=str) + "\n").encode())


def write_submission(path: str | Path, content: Any) -> Path:
    """Write a file for a test server, without a superfluous byte: CIRR's takes no file over 5 MB. Returns ``path``.

    Raises:
        OSError: the file cannot be written; an older one is then left as it was.
    """
    return replace_file(Path(path), json.dumps(content, separators=(",", ":")).encode())
