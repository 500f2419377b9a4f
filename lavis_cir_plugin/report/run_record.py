"""Record what a run was started with: config with origins, command, time, hardware, versions and commit."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lavis_cir_plugin.core.atomic_files import replace_file

RECORD = "run.json"
PACKAGES = ("lavis_cir_plugin", "salesforce-lavis", "torch", "torchvision", "transformers", "open_clip_torch", "numpy")
_PACKAGE = Path(__file__).resolve().parents[1]

logger = logging.getLogger(__name__)


def folders_of_runs(paths: Sequence[str]) -> list[Path]:
    """Return the folders of runs that a command line names.

    Raises:
        ValueError: If one is named twice, be it by two paths.
    """
    folders = [Path(os.path.expanduser(path)) for path in paths]
    places = [folder.resolve() for folder in folders]
    twice = [folder for folder, place in zip(folders, places) if places.count(place) > 1]
    if twice:
        raise ValueError(f"{twice[-1]} is named twice; name each run once.")
    return folders


def told_apart(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: as many of the last folders of their paths as tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    depths = range(1, max(map(len, paths)) + 1)
    depth = next((depth for depth in depths if len({parts[-depth:] for parts in paths}) == len(paths)), 1)
    return [Path(*parts[-depth:]).as_posix() for parts in paths]


def begin(
    folder: Path, command: Sequence[str], config: Mapping[str, Any], origins: Mapping[str, str], processes: int = 1
) -> None:
    """Append a start to the ``run.json`` of a run's folder.

    A file that cannot be written costs the run nothing but this record: a warning is logged.

    Args:
        folder: Folder of the run.
        command: Words of the command line.
        config: Values by dotted key, of types that JSON has.
        origins: Origin of each value by the same keys.
        processes: Number of processes of the run.
    """
    start = {
        "started": _now(),
        "finished": None,
        "command": list(command),
        "processes": processes,
        "hardware": hardware(),
        "software": software(),
        "commit": commit(),
        "config": {key: {"value": value, "origin": origins.get(key, "")} for key, value in config.items()},
    }
    _write(folder, [*_starts_or_none(folder), start])


def end(folder: Path) -> None:
    """Note in ``run.json`` that the last start has finished now."""
    starts = _starts_or_none(folder)
    if starts:
        _write(folder, [*starts[:-1], {**starts[-1], "finished": _now()}])


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the starts of a run, the first one first; none where the run was written by an older version.

    Raises:
        ValueError: ``run.json`` is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return []
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        if not isinstance(starts, list) or not all(isinstance(start, dict) and "config" in start for start in starts):
            raise TypeError("its starts are no list of records")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and the report does without.") from error
    return starts


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted key; lists and empty mappings are values."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{name}."))
        else:
            found[name] = value
    return found


def hardware() -> dict[str, Any]:
    """Describe this machine: ``cpu``, ``cores`` that this process may use, ``memory_gib`` and ``gpus`` by name."""
    import torch

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def software() -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result depends on."""
    versions = {name: _version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **{name: text for name, text in versions.items() if text is not None}}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the git commit of the checkout that this package runs from, with ``+`` where its files were changed.

    The ``+`` also stands where git could not say so, as on a slow disk. Nothing is returned for an installed package,
    and neither where there is no git.
    """
    own = f"{_PACKAGE.name}/__init__.py"
    if _git("ls-files", "--error-unmatch", own) is None:  # site-packages may lie in somebody else's repository
        return None
    number = _git("rev-parse", "HEAD")
    return None if number is None else number + ("" if _git("status", "--porcelain", "-uno") == "" else "+")


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE.parent), *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _starts_or_none(folder: Path) -> list[dict[str, Any]]:
    try:
        return read_starts(folder)
    except (ValueError, OSError) as error:
        logger.warning("%s", error)
        return []


def _write(folder: Path, starts: Sequence[Mapping[str, Any]]) -> None:
    content = json.dumps({"starts": list(starts)}, indent=1, default=str) + "\n"
    try:
        replace_file(folder / RECORD, content.encode())
    except OSError as error:
        logger.warning("%s", error)
