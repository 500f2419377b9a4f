"""Write metrics, summaries and the files for test servers as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis_cir_plugin.benchmarks.types import Benchmark
from lavis_cir_plugin.core.atomic_files import replace_file


def write_summary(path: str | Path, results: Mapping[str, tuple[Benchmark, Mapping[str, Mapping[str, float]]]]) -> Path:
    """Write the content of :func:`summary_table` as JSON with each benchmark's protocol, and return ``path``.

    Raises:
        OSError: If the file cannot be written. An old file then stays unchanged.
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
    """Write metrics as JSON with everything needed to compare them: benchmark, split, protocol and sizes.

    Missing folders are made, and an old file is replaced in one step.

    Args:
        path: Path of the file.
        rows: Metrics in percent as for :func:`metrics_table`. A value that is not finite becomes ``null``.
        benchmark: Benchmark of the metrics.
        extra: What the caller knows of the run (checkpoint, seed, commit ...), stored under ``extra``. Values that JSON
            cannot hold (paths) are stored as text.

    Returns:
        The path of the file.

    Raises:
        OSError: If the file cannot be written, as on a full disk. An old file then stays unchanged.
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
    """Write a file for a test server without superfluous bytes, because CIRR's server accepts at most 5 MB.

    Returns:
        The path of the file.

    Raises:
        OSError: If the file cannot be written. An old file then stays unchanged.
    """
    return replace_file(Path(path), json.dumps(content, separators=(",", ":")).encode())
