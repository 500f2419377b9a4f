"""Captioned pictures in webdataset's tar shards (``<key>.jpg``, ``<key>.txt``), read at any position.

A stream of shards has no length and no position, and it can be shuffled only within a buffer. A run over a stream
could not be resumed, and the seed would not determine its data. Tar files on a disk need no streaming: this module
lists their members once, when a run starts, and then reads each member at its offset.
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
from typing import Annotated, Any, BinaryIO, Optional, Union

import numpy as np
from braceexpand import braceexpand
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from lavis_cir_plugin.benchmarks.annotation_files import parse_json, refuse_special
from lavis_cir_plugin.benchmarks.images import SUFFIXES, decode_rgb, is_foreign
from lavis_cir_plugin.benchmarks.json_lines import one_or_more_texts, one_text
from lavis_cir_plugin.benchmarks.types import first_or_drawn
from lavis_cir_plugin.core.atomic_files import replacing
from lavis_cir_plugin.core.error_messages import listed, shown
from lavis_cir_plugin.core.settings import Folder, Limits, NotNegative, Positive, Section

SPLITS = ("train",)

_BLOCK = 512  # a tar file ends with blocks of zeros
_CHUNK = 2**20

logger = logging.getLogger(__name__)


def _check_listed(patterns: str | tuple[str, ...]) -> None:
    if not patterns:
        raise ValueError("")


@dataclass(frozen=True)
class ShardsConfig(Section):
    """Keys of ``datasets.caption_shards.build_info``.

    Attributes:
        root: Folder of the shards.
        shards: Paths of the shards below ``root``: a pattern with braces such as ``{00000..00331}.tar``, or a list of
            patterns. By default these are all ``.tar`` files of the folder, sorted.
        skip_broken: Whether broken shards and samples are left out and counted in the log; otherwise they end the run.
        max_images: Largest number of images to train on: the first ones, or randomly drawn ones if ``seed`` is set.
        seed: Seed of that draw. A smaller draw is part of every larger draw of the same seed.
    """

    WHERE = "datasets.caption_shards.build_info"

    root: Folder
    shards: Optional[
        Annotated[Union[str, tuple[str, ...]], Limits(words="a path or a list of paths", check=_check_listed)]
    ] = None
    skip_broken: bool = False
    max_images: Optional[Positive] = None
    seed: Optional[NotNegative] = None

    def paths(self) -> list[Path]:
        """Return the paths of the shards, in the order of the patterns.

        Raises:
            FileNotFoundError: If there is no shard, or one is missing or a link to nothing.
            ValueError: If a pattern has unbalanced braces.
        """
        root = Path(self.root)
        if self.shards is None:
            paths = sorted(path for path in root.glob("*.tar") if not (is_foreign(path.name) or path.is_dir()))
            if not paths:
                raise FileNotFoundError(
                    f"caption_shards: {root} has no .tar file; set datasets.caption_shards.build_info.root to the "
                    f"folder of the shards."
                )
        else:
            patterns = [self.shards] if isinstance(self.shards, str) else self.shards
            try:
                paths = [root / name for pattern in patterns for name in braceexpand(pattern)]
            except ValueError as error:
                raise ValueError(
                    f"datasets.caption_shards.build_info.shards: {shown(self.shards)} has unbalanced braces; write a "
                    f"pattern such as {{00000..00331}}.tar."
                ) from error
        missing = [path for path in paths if path.is_dir() or not path.exists()]
        if missing:
            raise FileNotFoundError(
                f"caption_shards: {len(missing):,} of {len(paths):,} shards do not exist ({listed(missing)}); set "
                f"datasets.caption_shards.build_info.root or shards."
            )
        return paths


class _NoFurtherArchive(tarfile.ReadError):
    """The bytes after a whole tar file in a shard are not another tar file."""


@dataclass(frozen=True)
class Member:
    """Place of a file's content in a shard: offset of the first byte, and number of bytes."""

    start: int
    size: int


CONFIG = ShardsConfig
"""Section ``build_info`` of the config."""


class CaptionedShards:
    """The captioned pictures of tar shards, in the order of the shards and of their members.

    A sample consists of those files of one shard whose paths are equal up to the first dot of the file name. It needs
    one picture (`SUFFIXES`) and a caption: a ``.txt`` file, or else a ``.json`` file whose key ``caption`` holds a text
    or a list of texts. Other files, and webdataset's own names such as ``__index__``, are ignored. By this rule
    ``a.1.jpg`` and ``a.1.txt`` belong to sample ``a``; a warning names such pairs. If tar files were joined end to end
    in one shard, all of them are read.

    Args:
        config: A ``build_info``.
        cache: Folder for the listings of whole shards. A listing is used until its shard changes. ``None`` keeps none;
            a warning says so where the folder cannot be written.

    Raises:
        ValueError: If a key or value of the configuration is wrong, or a shard or sample is broken. The message has
            the number of broken ones, and shard and key of the first five. With ``skip_broken`` broken ones are an
            error only if no sample is left.
        FileNotFoundError: If a shard is missing.
    """

    def __init__(self, config: Mapping[str, Any], cache: Path | None = None) -> None:
        settings = ShardsConfig.from_mapping(config)
        self.skips_broken = settings.skip_broken
        self.broken_pictures = 0
        self.paths = settings.paths()
        problems: list[str] = []
        # Workers share the memory pages of one array, in which a million samples take 48 MB.
        not_kept: list[OSError] = []
        bar = tqdm(self.paths, "listing shards", disable=None, leave=False)
        listings = [_listing(path, cache, problems, not_kept) for path in bar]
        shards = np.repeat(np.arange(len(listings)), [len(listing) for listing in listings])
        places = np.column_stack([shards, np.concatenate(listings)])
        if problems and not settings.skip_broken:
            raise ValueError(
                f"caption_shards: {len(problems):,} samples or shards are broken and {len(places):,} samples whole; "
                f"correct them, or set datasets.caption_shards.build_info.skip_broken: true. {' '.join(problems[:5])}"
            )
        if problems:
            logger.warning("caption_shards: %d broken, left out. %s", len(problems), " ".join(problems[:5]))
        if not_kept:  # a listing only saves time
            logger.warning("caption_shards: %d listings are made again by the next run: %s", len(not_kept), not_kept[0])
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
        """Return the picture and the captions of a sample.

        With ``skip_broken``, the next sample that can be decoded replaces one that cannot. A warning names the broken
        sample and the number of broken ones that this process has met.

        Raises:
            ValueError: If the picture cannot be decoded; the message names shard and key. With ``skip_broken`` only if
                no picture can be decoded.
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

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the captions of a sample without its picture."""
        shard, _, _, *place, is_json = self._places[index].tolist()
        with self.paths[shard].open("rb") as file:
            return _captions(_content(file, Member(*place)), bool(is_json))


# -- members ---------------------------------------------------------------------------------------------------------


def _listing(
    path: Path, cache: Path | None, problems: list[str], not_kept: list[OSError]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return what `_samples` yields of a shard as ``(N, 5)``, from the cached listing if that is still valid.

    Problems of the samples are added to ``problems``, and to ``not_kept`` why a new listing could not be written.
    """
    refuse_special(path)
    status = path.stat()
    # The 2 distinguishes these listings from those of version 0.4, which stop after the first of joined archives.
    shard = f"2 {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    kept = None if cache is None else cache / f"{hashlib.blake2b(shard.encode(), digest_size=16).hexdigest()}.npy"
    if kept is not None and kept.is_file():
        with suppress(ValueError, OSError, EOFError):  # a damaged listing is made again
            listing: np.ndarray[Any, np.dtype[np.int64]] = np.load(kept)
            return listing
    before = len(problems)
    listing = np.array(list(_samples(path, problems)), dtype=np.int64).reshape(-1, 5)
    if kept is not None and len(problems) == before:
        try:
            with replacing(kept) as file:  # another process may write the same listing
                np.save(file, listing)
        except OSError as error:
            not_kept.append(error)
    return listing


def _samples(path: Path, problems: list[str]) -> Iterator[tuple[int, int, int, int, bool]]:
    """Yield start and size of each sample's picture and caption, and whether the caption is JSON; collect problems."""
    # The archive's number is part of the key, because joined archives may use the same sample names.
    samples: dict[tuple[int, str], dict[str, Member]] = {}
    last: tuple[int, str] | None = None
    twice: dict[tuple[int, str], str] = {}
    try:
        for archive, key, extension, member in _members(path):
            last = archive, key
            files = samples.setdefault(last, {})
            if extension in files:
                twice[last] = extension
            files[extension] = member
    except (tarfile.TarError, OSError, ValueError) as error:
        problems.append(
            f"{path} cannot be read as a tar file after {len(samples):,} samples: {error} (a compressed one must be "
            f"unpacked to .tar)."
        )
        if last is None:  # it may be no file that can be opened
            return
        if not isinstance(error, _NoFurtherArchive):
            del samples[last]  # its last file may be cut, and others may be lost
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
    """Return the part between first and last dot of file names that would be pairs if the last dot ended the key."""
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
    """Return what is wrong with a sample, or an empty text."""
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
    """Yield the archive's number, key, lower-case extension and place of each file of a shard.

    If tar files were joined end to end, they are the archives 0, 1, ... of one shard.
    """
    with tarfile.open(path, "r:") as tar:
        file: Any = tar.fileobj
        part, archive, start = tar, 0, None
        while True:
            for member in part:
                part.members = []  # type: ignore[attr-defined]  # tarfile would keep every member in memory
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                is_meta = name.startswith("__") and name.endswith("__")
                if member.isreg() and stem and extension and not is_meta:
                    place = Member(member.offset_data, member.size)
                    yield archive, os.path.join(folder, stem), extension.lower(), place
            # tarfile takes a cut or damaged header for the end of the file, unless it is the first header.
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
    """Return the offset of the first block, at or after ``start``, that is not all zeros, or None."""
    file.seek(start)
    while chunk := file.read(_CHUNK):
        rest = chunk.lstrip(b"\0")
        if rest:
            return start + (len(chunk) - len(rest)) // _BLOCK * _BLOCK
        start += len(chunk)
    return None


def _key_at(path: Path, picture: Member) -> str:
    """Return the key of a sample; if the shard has changed since it was listed, the picture's place."""
    with suppress(OSError, tarfile.TarError):
        for _, key, _, member in _members(path):
            if member == picture:
                return shown(key)
    return f"with the picture at byte {picture.start:,}"


def _content(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.start)
    return file.read(member.size)


def _captions(content: bytes, is_json: bool) -> tuple[str, ...]:
    """Return the captions in a file's content.

    Raises:
        ValueError: If there are none; the message is the predicate of a sentence about the sample.
    """
    try:
        text = content.decode("utf-8-sig")
        record = parse_json(text) if is_json else None
    except UnicodeDecodeError as error:
        raise ValueError(f"has a caption that is not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"has a .json file that is not valid JSON: {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:  # too deeply nested, a number of thousands of digits, a repeated key
        raise ValueError(f"has a .json file that cannot be read as JSON: {error}") from error
    if not is_json:
        return (one_text(text, "caption", ValueError),)
    if not isinstance(record, dict) or record.get("caption") is None:
        raise ValueError(f"has no 'caption' in its .json file, which holds {shown(record)}")
    return one_or_more_texts(record["caption"], "caption", ValueError)
