"""Pictures and captions in webdataset shards, read by position: tar files with ``<key>.jpg`` and ``<key>.txt``.

A stream of shards has no length, no position and no shuffling but a buffer's, so that a run over it could not be
resumed nor its data told from the seed, as all others can. A tar file on disk needs no streaming: its members are
listed once, when a run starts, and each is then read where it lies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from braceexpand import braceexpand
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from lavis_cir_plugin.benchmarks.annotation_files import parse_json, refuse_special
from lavis_cir_plugin.benchmarks.images import SUFFIXES, decode_rgb, is_foreign
from lavis_cir_plugin.benchmarks.json_lines import one_text, some_texts
from lavis_cir_plugin.benchmarks.types import first_or_drawn
from lavis_cir_plugin.core.sentences import listed, shown
from lavis_cir_plugin.core.settings import at_least, config_from_mapping
from lavis_cir_plugin.core.whole_or_nothing import replacing

SPLITS = ("train",)

_BLOCK = 512  # a tar file ends with blocks of zeros
_CHUNK = 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardsConfig:
    """Keys of ``datasets.caption_shards.build_info``.

    Attributes:
        root: Folder of the shards.
        shards: Which, by their paths below ``root``: a pattern with braces such as ``{00000..00331}.tar``, or a list of
            patterns. By default all ``.tar`` files of the folder, sorted.
        skip_broken: Leave out what is broken and log how much; otherwise it ends the run.
        max_images: Train on so many at most: the first, or with a ``seed`` drawn ones.
        seed: Of the draw. Fewer images of one seed are among more of it.
    """

    root: str
    shards: str | tuple[str, ...] | None = None
    skip_broken: bool = False
    max_images: int | None = at_least(1)
    seed: int | None = at_least(0)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> ShardsConfig:
        """Build the configuration; raise ValueError with every unknown key and impossible value."""
        return config_from_mapping(cls, "caption_shards", mapping)

    def paths(self) -> list[Path]:
        """Return the shards, in the order of the patterns.

        Raises:
            FileNotFoundError: there is none, or one is missing.
            ValueError: a pattern's braces do not match.
        """
        root = Path(self.root)
        if self.shards is None:
            paths = sorted(path for path in root.glob("*.tar") if not is_foreign(path.name))
            if not paths:
                raise FileNotFoundError(
                    f"caption_shards: {root} has no .tar file; set datasets.caption_shards.build_info.root to the "
                    f"folder of the shards."
                )
            return paths
        patterns = [self.shards] if isinstance(self.shards, str) else self.shards
        try:
            paths = [root / name for pattern in patterns for name in braceexpand(pattern)]
        except ValueError as error:
            raise ValueError(
                f"datasets.caption_shards.build_info.shards: {shown(self.shards)} has unbalanced braces; write a "
                f"pattern such as {{00000..00331}}.tar."
            ) from error
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"caption_shards: {len(missing):,} of {len(paths):,} shards do not exist ({listed(missing)}); set "
                f"datasets.caption_shards.build_info.root or shards."
            )
        return paths


class _NoFurtherArchive(tarfile.ReadError):
    """What follows a whole tar file in a shard is none."""


@dataclass(frozen=True)
class Member:
    """Where the content of a file lies in a shard: first byte and number of bytes."""

    start: int
    size: int


def check_config(config: Mapping[str, Any]) -> None:
    """Check the keys and values of a ``build_info`` without reading anything.

    Raises:
        ValueError: every unknown key and impossible value.
    """
    ShardsConfig.from_mapping(config)


class CaptionedShards:
    """The pictures of shards with their captions, in the order of the shards and of their members.

    A sample is the files of one shard that have the same path up to the first dot of the file name. It needs one
    picture (`SUFFIXES`) and a caption: a ``.txt`` file, or else a ``.json`` file with the key ``caption``, text or a
    list of texts. Other files are ignored, as are names such as ``__index__``, webdataset's own; ``a.1.jpg`` with
    ``a.1.txt``, which belong to sample ``a`` by that rule, are named. Tar files joined end to end are read to the last.

    Args:
        config: A ``build_info``.
        cache: Folder that keeps the listings of whole shards, for as long as these do not change; ``None``: none.

    Raises:
        ValueError: a key or value of the configuration is wrong, or a shard or sample is broken; with the number of
            broken ones, and shard and key of the first five. With ``skip_broken`` only if nothing is left.
        FileNotFoundError: a shard is missing.
    """

    def __init__(self, config: Mapping[str, Any], cache: Path | None = None) -> None:
        settings = ShardsConfig.from_mapping(config)
        self.skips_broken = settings.skip_broken
        self.broken_pictures = 0
        self.paths = settings.paths()
        problems: list[str] = []
        # One array, not many objects: workers share its pages, and a million samples take 48 MB.
        listings = [_listing(p, cache, problems) for p in tqdm(self.paths, "listing shards", disable=None, leave=False)]
        shards = np.repeat(np.arange(len(listings)), [len(listing) for listing in listings])
        places = np.column_stack([shards, np.concatenate(listings)])
        if problems and not settings.skip_broken:
            raise ValueError(
                f"caption_shards: {len(problems):,} samples or shards are broken and {len(places):,} samples whole; "
                f"correct them, or set datasets.caption_shards.build_info.skip_broken: true. {' '.join(problems[:5])}"
            )
        if problems:
            logger.warning("caption_shards: %d broken, left out. %s", len(problems), " ".join(problems[:5]))
        if not len(places):
            raise ValueError(
                f"caption_shards: {len(self.paths):,} shards ({listed(self.paths)}) hold no whole pair such as "
                f"000000000.jpg and 000000000.txt; check datasets.caption_shards.build_info.shards."
            )
        self._places = places[first_or_drawn(range(len(places)), settings.max_images, settings.seed)]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Image.Image, tuple[str, ...]]:
        """Return a sample's picture and captions.

        In the place of a picture that cannot be decoded stands the next one that can, if ``skip_broken``; a warning
        says which and how many this process has met.

        Raises:
            ValueError: the picture cannot be decoded; with shard and key. With ``skip_broken`` only if none can.
        """
        for following in range(len(self)):
            shard, *place, is_json = self._places[(index + following) % len(self)].tolist()
            path, picture, caption = self.paths[shard], Member(*place[:2]), Member(*place[2:])
            with path.open("rb") as file:
                content, text = _content(file, picture), _content(file, caption)
            try:
                return decode_rgb(content, "the picture", upright=True), _captions(text, bool(is_json))
            except ValueError as error:
                problem = f"{path}, sample {_key_at(path, picture)}: {error}"
                if not self.skips_broken:
                    raise ValueError(
                        f"{problem} Replace it, or set datasets.caption_shards.build_info.skip_broken: true."
                    ) from error
            self.broken_pictures += 1
            logger.warning("%s Left out, with %d in all by this process.", problem, self.broken_pictures)
        raise ValueError(f"caption_shards: no picture of {len(self.paths):,} shards can be read.")


# -- members ---------------------------------------------------------------------------------------------------------


def _listing(path: Path, cache: Path | None, problems: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return what `_samples` finds, ``(N, 5)``; the kept listing of an unchanged shard that was whole."""
    refuse_special(path)
    status = path.stat()
    # The 2 tells listings from those of version 0.4, which end with the first of several joined archives.
    shard = f"2 {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    kept = None if cache is None else cache / f"{hashlib.blake2b(shard.encode(), digest_size=16).hexdigest()}.npy"
    if kept is not None and kept.is_file():
        with suppress(ValueError, OSError, EOFError):  # damaged: list the shard again
            listing: np.ndarray[Any, np.dtype[np.int64]] = np.load(kept)
            return listing
    before = len(problems)
    listing = np.array(list(_samples(path, problems)), dtype=np.int64).reshape(-1, 5)
    if kept is not None and len(problems) == before:
        with replacing(kept) as file:  # another process may do the same
            np.save(file, listing)
    return listing


def _samples(path: Path, problems: list[str]) -> Iterator[tuple[int, int, int, int, bool]]:
    """List a shard: per sample start and size of picture and caption, and whether that is JSON; note what is broken."""
    # By archive and key: archives that are joined end to end may number their samples alike.
    samples: dict[tuple[int, str], dict[str, Member]] = {}
    twice: dict[tuple[int, str], str] = {}
    try:
        for archive, key, extension, member in _members(path):
            files = samples.setdefault((archive, key), {})
            if extension in files:
                twice[archive, key] = extension
            files[extension] = member
    except (tarfile.TarError, OSError, ValueError) as error:
        problems.append(
            f"{path} cannot be read as a tar file after {len(samples):,} samples: {error} (a compressed one must be "
            f"unpacked to .tar)."
        )
        if samples and not isinstance(error, _NoFurtherArchive):
            samples.popitem()  # its end may be lost
    with path.open("rb") as file:
        for place, files in samples.items():
            pictures = [files[extension] for extension in files if f".{extension}" in SUFFIXES]
            caption, is_json = files.get("txt") or files.get("json"), "txt" not in files
            dotted = _dotted_pairs(files)
            problem = f"has two files .{twice[place]}" if place in twice else _problem(file, pictures, caption, is_json)
            if problem and dotted:
                problem += f" ({_rule(place[1], dotted)})"
            elif dotted:
                logger.warning("%s: %s", path, _rule(place[1], dotted))
            if problem:
                problems.append(f"{path}, sample {shown(place[1])} {problem}.")
            elif caption is not None:
                yield pictures[0].start, pictures[0].size, caption.start, caption.size, is_json


def _dotted_pairs(files: Mapping[str, Member]) -> list[str]:
    """Return what stands between the first and the last dot of names that would be pairs if the last one counted."""
    kinds: dict[str, set[str]] = {}
    for extension in files:
        inner, dot, last = extension.rpartition(".")
        if dot:
            kinds.setdefault(inner, set()).add("picture" if f".{last}" in SUFFIXES else last)
    return [inner for inner, found in kinds.items() if "picture" in found and found & {"txt", "json"}]


def _rule(key: str, dotted: Sequence[str]) -> str:
    first = shown(f"{key}.{dotted[0]}")
    return (
        f"a sample's name ends at the first dot of its files' names, so {len(dotted):,} pairs such as {first} are none "
        "of their own; write these dots otherwise"
    )


def _problem(file: BinaryIO, pictures: Sequence[Member], caption: Member | None, is_json: bool) -> str:
    """Say what is wrong with a sample; empty where nothing is."""
    if len(pictures) != 1:
        return f"has {len(pictures)} pictures; it must have one"
    if caption is None:
        return "has no caption, neither .txt nor .json"
    try:
        _captions(_content(file, caption), is_json)
    except ValueError as error:
        return str(error)
    return ""


def _members(path: Path) -> Iterator[tuple[int, str, str, Member]]:
    """Yield number of the archive, key, extension in lower case, and place of each file of a shard.

    Tar files that were joined end to end are archives 0, 1, ... of one shard.
    """
    with tarfile.open(path, "r:") as tar:
        file: Any = tar.fileobj
        part, archive, start = tar, 0, None
        while True:
            for member in part:
                part.members = []  # type: ignore[attr-defined]  # it would keep all
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                is_meta = name.startswith("__") and name.endswith("__")
                if member.isreg() and stem and extension and not is_meta:
                    place = Member(member.offset_data, member.size)
                    yield archive, os.path.join(folder, stem), extension.lower(), place
            # tarfile takes a header that is cut or damaged, but for the first, for the end of the file.
            if (file.seek(part.offset), file.read(_BLOCK))[1] != bytes(_BLOCK):
                if archive and part.offset == start:
                    raise _NoFurtherArchive(f"after its end, at byte {start:,}, it goes on with no tar file")
                raise tarfile.ReadError(f"it is cut or damaged at byte {part.offset:,}")
            start = _after_zeros(file, part.offset)
            if start is None:
                return
            file.seek(start)
            part, archive = tarfile.TarFile(fileobj=file), archive + 1


def _after_zeros(file: BinaryIO, start: int) -> int | None:
    """Return where the first block with anything but zeros begins, at or after ``start``; None where there is none."""
    file.seek(start)
    while chunk := file.read(_CHUNK):
        rest = chunk.lstrip(b"\0")
        if rest:
            return start + (len(chunk) - len(rest)) // _BLOCK * _BLOCK
        start += len(chunk)
    return None


def _key_at(path: Path, picture: Member) -> str:
    return next(shown(key) for _, key, _, member in _members(path) if member == picture)


def _content(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.start)
    return file.read(member.size)


def _captions(content: bytes, is_json: bool) -> tuple[str, ...]:
    """Return the captions of a file's content; raise ValueError with what is wrong, to follow the sample's name."""
    try:
        text = content.decode("utf-8-sig")
        record = parse_json(text) if is_json else None
    except UnicodeDecodeError as error:
        raise ValueError(f"has a caption that is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"has a .json file that is not valid JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits; a key twice
        raise ValueError(f"has a .json file that cannot be read as JSON: {error}") from error
    if not is_json:
        return (one_text(text, "caption", ValueError),)
    if not isinstance(record, dict) or record.get("caption") is None:
        raise ValueError(f"has no 'caption' in its .json file, which holds {shown(record)}")
    return some_texts(record["caption"], "caption", ValueError)
