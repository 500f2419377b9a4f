"""The manifest of an index: one small file that names the files of a state, and is replaced to publish a new one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lavis_cir_plugin.core.atomic_files import replace_file
from lavis_cir_plugin.search.features import LOOK, RowFile, block_checksums, sampled_checksum
from lavis_cir_plugin.search.folders import MANIFEST, WRITER

FORMAT = "lavis_cir_plugin search index"
VERSION = 1
BLOCKS = "checksums.json"
"""The file of the checksums of all blocks, which only a verification reads."""

_LARGEST = 2**20


@dataclass(frozen=True)
class Manifest:
    """One state of an index.

    Attributes:
        generation: Number of the state, from 1.
        name: The name that `load_encoder` loads the model by; empty if only code can make it.
        identity: The encoder's `Encoder.identity`.
        rows: Number of contents that have features, those of forgotten pictures included.
        pictures: Number of pictures.
        not_indexed: Number of files that are not in the index.
        shape: Shape ``[K, D]`` of a picture's features.
        longest: Length of the longest feature.
        files: Name of the current file by its job: features, looks, catalogue, pictures, perhaps candidates.
        checksums: Checksums of samples of these files, by job.
        candidates: ``rows``, ``probes`` and measured ``recall`` of the candidates; empty without.
    """

    generation: int
    name: str
    identity: Mapping[str, str]
    rows: int
    pictures: int
    not_indexed: int
    shape: tuple[int, int]
    longest: float
    files: Mapping[str, str]
    checksums: Mapping[str, str] = field(default_factory=dict)
    candidates: Mapping[str, float] = field(default_factory=dict)

    def write(self, index: Path) -> None:
        """Make this the state of an index that readers see."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        content["checksum"] = _checksum(content)
        replace_file(index / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())

    def features(self, index: Path) -> RowFile:
        """Return the file of the features."""
        return RowFile(index / self.files["features"], tuple(self.shape), "float16")

    def looks(self, index: Path) -> RowFile:
        """Return the file of the looks."""
        return RowFile(index / self.files["looks"], LOOK, "uint8")

    def sizes(self, index: Path) -> dict[str, int]:
        """Return the bytes of each file that belong to this state, by job; rows behind the last one do not."""
        sizes = {job: (index / name).stat().st_size for job, name in self.files.items()}
        sizes["features"] = self.rows * self.features(index).row_bytes
        sizes["looks"] = self.rows * self.looks(index).row_bytes
        return sizes

    def sampled(self, index: Path) -> dict[str, str]:
        """Return the checksums that the files have now, of samples of them."""
        return {job: sampled_checksum(index / self.files[job], size) for job, size in self.sizes(index).items()}

    def blocks(self, index: Path, known: Mapping[str, list[str]] | None = None) -> dict[str, list[str]]:
        """Return the checksums of all blocks of the files, by name.

        Args:
            index: The index's folder.
            known: The blocks of an earlier state; features and looks, which only grow, have kept all but the last.
        """
        sizes = self.sizes(index)
        kept = {job: (known or {}).get(self.files[job], [])[:-1] for job in ("features", "looks")}
        return {name: block_checksums(index / name, sizes[job], kept.get(job, [])) for job, name in self.files.items()}


def verify(index: Path) -> Manifest:
    """Read the state of an index and compare every byte of it with what was written; return it.

    Raises:
        FileNotFoundError, ValueError: as `read_manifest`, or a byte differs.
    """
    manifest = read_manifest(index)
    written = read_blocks(index, manifest.generation)
    changed = [name for name, blocks in manifest.blocks(index).items() if blocks != written.get(name)]
    if changed:
        raise ValueError(f"{index / changed[0]} has changed since it was written; build the index again.")
    return manifest


def read_blocks(index: Path, generation: int) -> dict[str, list[str]]:
    """Return the checksums of blocks that were written with a state of an index; nothing where there are none."""
    try:
        content = json.loads((index / BLOCKS).read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    is_asked = content.pop("generation", generation) == generation  # version 0.7.0 named none
    before: dict[str, list[str]] = content.pop("before", {})
    return content if is_asked else before


def write_blocks(
    index: Path, generation: int, blocks: Mapping[str, list[str]], before: Mapping[str, list[str]]
) -> None:
    """Write the checksums of a state's blocks before its manifest, and keep those of the state ``before``.

    The latter is the published one until the manifest is written, and stays it if the process ends first.
    """
    content = {**blocks, "generation": generation, "before": before}
    replace_file(index / BLOCKS, (json.dumps(content) + "\n").encode())


def read_manifest(index: Path) -> Manifest:
    """Read the state of an index and check that its files are there and unchanged, by samples.

    Raises:
        FileNotFoundError: there is no index, or a file of it is missing.
        ValueError: it is half-written, of a newer format, or was changed by something else.
    """
    path = index / MANIFEST
    if not path.is_file():
        if (index / WRITER).is_dir():
            raise ValueError(f"{index} is half-written; run lavis-cir index with the same folders again to finish it.")
        raise FileNotFoundError(f"{index} is no index (it has no {MANIFEST}); make one by lavis-cir index.")
    content = _parsed(path)
    version = content.pop("version", None)
    if content.pop("format") != FORMAT or not isinstance(version, int):
        raise ValueError(f"{path} is no manifest of an index; build the index again.")
    if version > VERSION:
        raise ValueError(
            f"{index} has format {version}, this version of lavis_cir_plugin reads {VERSION}; install a newer version."
        )
    try:
        found = Manifest(**{**content, "shape": tuple(content["shape"])})
    except (TypeError, KeyError):
        raise ValueError(f"{path} lacks or has unknown entries; build the index again.") from None
    _check_files(index, found)
    return found


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_LARGEST))
        checksum = content.pop("checksum")
        if "format" not in content or (content.get("version") == VERSION and checksum != _checksum(content)):
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"{path} is damaged or was changed by hand; build the index again.") from None
    return dict(content)


def _checksum(content: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in content.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _check_files(index: Path, manifest: Manifest) -> None:
    for name in manifest.files.values():
        if Path(name).name != name or name in (".", ".."):
            raise ValueError(f"{index / MANIFEST} names the file {name!r} outside of the index; build the index again.")
        if not (index / name).is_file():
            raise FileNotFoundError(f"{index / name} is missing; build the index again.")
    sizes = manifest.sizes(index)
    for file, job in ((manifest.features(index), "features"), (manifest.looks(index), "looks")):
        if file.path.stat().st_size < sizes[job]:
            raise ValueError(f"{file.path} is cut short; build the index again.")
    changed = [job for job, checksum in manifest.sampled(index).items() if checksum != manifest.checksums.get(job)]
    if changed:
        raise ValueError(
            f"{index / manifest.files[changed[0]]} is not what lavis-cir index wrote; build the index again."
        )
