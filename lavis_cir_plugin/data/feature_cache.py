"""Cache of a frozen image tower's features: each picture is encoded once, and its features are memory-mapped.

A cache has one folder per tower and transform, ``<root>/<key>/``::

    meta.json                 the description whose hash is the key; shape and type of a row
    <segment>.rows            the features of the pictures, one row after the other
    <segment>.jsonl           a line per row: image (hash of the file's bytes), row, check (CRC-32 of both)
    ../files/<segment>.jsonl  a line per file: path, size, mtime, image; it saves hashing an unchanged file again

Files only grow. Each process writes its own segment, and it writes a row before the row's line. A process may therefore
be killed at any moment, and several processes may work at once: a reader ignores a row without a whole line, and a
picture that has two rows does no harm. A row that the disk has lost with the power fails its check.
"""

from __future__ import annotations

import copyreg
import hashlib
import json
import logging
import math
import os
import secrets
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, Callable, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.core.processes import gather, rank_and_world

# Part of every key. Raise it when a shipped model or processor changes its results without changing its name.
_FORMAT = 1

_MODULES_OF_0_4 = {
    "lavis_cir_plugin.models.open_clip_towers": "lavis_cir_plugin.open_clip_towers",
    "lavis_cir_plugin.methods.blip2_cir.model": "lavis_cir_plugin.models.blip2_cir",
    "lavis_cir_plugin.methods.tscir.mapping": "lavis_cir_plugin.models.tscir_mapping",
    "lavis_cir_plugin.methods.tscir.composing": "lavis_cir_plugin.models.tscir_composing",
    "lavis_cir_plugin.methods.tscir.layers": "lavis_cir_plugin.pseudo_word",
}
"""Module path of version 0.4 by present module path, for classes that a tower or a transform may contain."""

# The product of a tower's last layer may have one row per picture. On a CPU its rows are computed in blocks of up to
# eight, and a block of one to three rows is added up in another order, which shows in the last bits.
PICTURES_PER_BLOCK = 8
"""Every call of a tower has a multiple of this number of pictures."""

_FILE_KEYS = ("path", "size", "mtime")
_File = tuple[str, int, int]
_Place = tuple[str, int]  # segment and row

NameOf = Callable[[Any], str]
"""A function that names a class or function in a hash."""


class HasImageTower(Protocol):
    """Interface of a model whose image features can be cached.

    Every method of the model that takes a batch of pictures also takes a batch of ``image_features``.
    """

    @property
    def image_tower(self) -> nn.Module:
        """The module that ``image_features`` depends on; frozen, and in evaluation mode while the model trains."""

    def image_features(self, images: Tensor) -> Tensor:
        """Return one row of features for each picture of ``(B, 3, H, W)``, such as ``(B, P, width)``."""


def has_image_tower(model: Any) -> bool:
    """Return whether a model is a :class:`HasImageTower`."""
    # Python 3.12's isinstance would not find a submodule, because nn.Module looks it up in __getattr__.
    return isinstance(getattr(model, "image_tower", None), nn.Module) and hasattr(model, "image_features")


def tower_problem(model: Any) -> tuple[str, str] | None:
    """Return why a model's image features cannot be cached, and what to set; or None if they can."""
    if not has_image_tower(model):
        return f"{type(model).__name__} offers no image_tower and image_features to cache", ""
    trained = [name for name, weight in model.image_tower.named_parameters() if weight.requires_grad]
    if not trained:
        return None
    reason = f"{len(trained)} tensors of the image tower are trained (first: {trained[0]})"
    return f"{reason}, so its features change with every step", (
        "set model.freeze_vit: true and keep adapters out of the tower"
    )


def fingerprint(thing: Any, name_of: NameOf | None = None) -> str:
    """Return a hash of everything in an object that could change its results.

    The hash is equal in every process and on every device. It covers class, settings, weights and buffers (name, type,
    shape, bytes) of a module, the code of a function, and class and attributes of any other object, or what pickle
    would store of it if it has no attributes.

    Args:
        thing: Any object.
        name_of: Names a class or function in the hash. The default takes the name of the top-level package and the
            qualified name, so that a module may be renamed.

    Raises:
        ValueError: If something in the object has neither attributes nor a form that pickle could store.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _describe(thing, (), name_of or _present_name):
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()


class FeatureCache:
    """Maps a picture to its features, which are computed and kept when a picture is met for the first time.

    A data set asks for pictures (:meth:`picture`), also in DataLoader workers: the cache can be sent to other
    processes, and each process maps the files at its first reading. Missing features are computed and kept in the
    process of the model (:func:`with_features`), and workers that start later read them.

    Args:
        root: Folder of all caches. This cache uses the folder ``<root>/<key>``.
        model: Model whose class and tower the key depends on. The cache keeps no reference to it.
        transform: Deterministic function from an RGB picture to ``(3, H, W)``.
        upright: Whether pictures are turned by their EXIF orientation first; part of the key.

    Attributes:
        folder: Folder of the cache, whose name is the key.
        row_shape: Shape of the features of one picture; empty until it is known.
        row_dtype: Type of the features.

    Raises:
        ValueError: If the folder's ``meta.json`` does not match the key.
    """

    def __init__(
        self, root: Path, model: HasImageTower, transform: Callable[[Any], Tensor], upright: bool = False
    ) -> None:
        self.identity, self.folder = _identity_and_folder(root, model, transform, upright, _present_name)
        if not self.folder.is_dir():
            former_identity, former_folder = _identity_and_folder(root, model, transform, upright, _former_name)
            if former_folder.is_dir():
                self.identity, self.folder = former_identity, former_folder
        self.transform = transform
        self.upright = upright
        self.row_shape: tuple[int, ...] = ()
        self.row_dtype = torch.float32
        self._file_lines = root / "files"
        self._images: dict[_File, str] = {}  # hash of a file's bytes
        self._rows: dict[str, _Place] = {}  # checked rows by image
        self._unchecked: dict[str, dict[str, Any]] = {}  # lines of rows by image
        self._replaced: set[_Place] = set()
        self._wrong: dict[str, _Place] = {}  # rows that do not match their check sums
        self._bytes_read: dict[str, int] = {}  # of the lines of each segment
        self._maps: dict[str, np.ndarray[Any, Any]] = {}
        self._name = _new_name()  # of this process's segment and lines
        self._segment: _Segment | None = None
        self._has_failed = False
        self._read_meta()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unchecked": {}, "_maps": {}, "_segment": None}

    @property
    def row_bytes(self) -> int:
        """Size of the features of one picture; 0 until it is known."""
        return math.prod(self.row_shape) * self.row_dtype.itemsize if self.row_shape else 0

    def find(self, paths: Iterable[Path]) -> set[Path]:
        """Look up the features of these pictures, and return the paths of those that have some.

        In a distributed run every process calls this method with the same arguments, and does its share of the reading.
        Unknown files are hashed, unless the cache is empty.

        Each row is read once and compared with its check sum. For 40,000 rows of 724 kB this is one sequential pass of
        seconds over a fast disk. A check at each reading would cost a tenth of a second per batch of 128 in every
        epoch.
        """
        rank, world = rank_and_world()
        places = sorted(paths)
        self._refresh()
        self._read_known_files()
        if not any(gather(bool(self._rows or self._unchecked))):
            return set()
        unknown = [path for path in places if self._known_file(path) is None]
        self.remember([file for part in gather(_hashed_files(unknown[rank::world])) for file in part])
        known = {path: self._known_file(path) for path in places}
        image_of = {path: file["image"] for path, file in known.items() if file is not None}
        images = sorted({image for image in image_of.values() if image in self._unchecked})
        # Processes on machines with folders of their own have other rows, which each has to check itself.
        rows = repr([_place(self._unchecked[image]) for image in images]).encode()
        is_shared = len(set(gather(hashlib.blake2b(rows, digest_size=16).digest()))) == 1
        checked = gather(self._damaged_rows(images[rank::world] if is_shared else images))
        wrong = {image: place for part in (checked if is_shared else [checked[rank]]) for image, place in part.items()}
        for image in images:
            self._take_checked(image, wrong.get(image))
        return {path for path, image in image_of.items() if image in self._rows}

    def picture(self, path: Path, is_kept: bool = True) -> Tensor | UncachedPicture:
        """Return a picture's features, or the preprocessed picture with what is needed to keep its features.

        Args:
            path: Path of the picture.
            is_kept: Whether missing features shall be kept once they are computed.

        Raises:
            ValueError: If the features are missing and the picture cannot be read; the message names the file.
        """
        # `open_rgb` reports a file that cannot be read.
        file = self._known_file(path) or (_hashed_file(path) if is_kept else None) or {}
        row = self._checked_row(file.get("image"))
        if row is not None:
            return row
        # A picture that was never hashed is told apart by its path.
        about = {"cache": self.folder.name, "is_kept": is_kept and bool(file), "path": os.path.abspath(path), **file}
        return UncachedPicture(self.transform(open_rgb(Path(path), self.upright)), json.dumps(about))

    def rows(self, images: Iterable[str]) -> dict[str, Tensor]:
        """Return the features of images by their hashes, also those that another process has written in the meantime.

        Images without features are left out.
        """
        asked = set(images)
        self._refresh()
        unchecked = asked & self._unchecked.keys()
        wrong = self._damaged_rows(unchecked)
        for image in unchecked:
            self._take_checked(image, wrong.get(image))
        found = {image: self._checked_row(image) for image in asked}
        return {image: row for image, row in found.items() if row is not None}

    def keep(self, files: Sequence[Mapping[str, Any]], features: Tensor) -> None:
        """Append the features of pictures, unless they are not finite.

        If they cannot be written, for example on a full disk, a warning says so once. From then on nothing more is
        written in this process: the rows that are there are whole, and later steps compute what is missing.

        Args:
            files: For each picture its ``path``, ``size``, ``mtime`` and ``image``, as :meth:`picture` gives them.
            features: Features ``(B, ...)`` on any device.

        Raises:
            ValueError: If their shape or type is not that of the cache's rows.
        """
        rows = features.detach().cpu().contiguous()
        if not self.row_shape:
            self.row_shape, self.row_dtype = tuple(rows.shape[1:]), rows.dtype
        if (tuple(rows.shape[1:]), rows.dtype) != (self.row_shape, self.row_dtype):
            raise ValueError(
                f"run.feature_cache: {self.folder} holds rows of {self.row_shape} {self.row_dtype} and the tower "
                f"returns {tuple(rows.shape[1:])} {rows.dtype}; delete the folder or choose another one."
            )
        is_finite = torch.isfinite(rows).flatten(1).all(dim=1)
        for file, finite in zip(files, is_finite.tolist()):
            if not finite:
                logging.warning(
                    "run.feature_cache: the features of %s are not finite and are not kept; check the weights",
                    file["path"],
                )
        kept = [file for file, finite in zip(files, is_finite.tolist()) if finite]
        rows = rows if len(kept) == len(rows) else rows[is_finite]
        if not kept or self._has_failed:
            return
        try:
            if self._segment is not None and not self._segment.is_there:
                # Somebody has deleted the folder. Rows of one name must not stand for those of another file.
                self._segment, self._name = None, _new_name()
            if self._segment is None:
                self._write_meta()
                self._segment = _Segment(self.folder, self._name)
            places = self._segment.append([file["image"] for file in kept], rows, self._wrong)
        except BaseException as error:
            # What was written in part, by an interrupt or on a full disk, shifts all later rows of this segment.
            self._segment, self._name = None, _new_name()
            if not isinstance(error, OSError):
                raise
            self._has_failed = True
            logging.warning(
                "run.feature_cache: %s cannot be written (%s); the features that are there are whole, and the run goes "
                "on without keeping more. Free some space, or set run.feature_cache to a folder on another disk.",
                self.folder,
                error.strerror or error,
            )
            return
        self._rows.update(zip((file["image"] for file in kept), places))
        self.remember(kept)

    # Files and their hashes.

    def _known_file(self, path: Path) -> dict[str, Any] | None:
        """Return path, size, time and hash of a file that was hashed before and has not been changed since."""
        with suppress(OSError):
            key = _file_key(path)
            if key in self._images:
                return {**dict(zip(_FILE_KEYS, key)), "image": self._images[key]}
        return None

    def _read_known_files(self) -> None:
        for path in self._file_lines.glob("*.jsonl"):
            with suppress(OSError):
                for line in _lines_of(path.read_bytes()):
                    key, image = tuple(line.get(name) for name in _FILE_KEYS), line.get("image")
                    if isinstance(image, str):
                        self._images[key] = image  # type: ignore[index]

    def remember(self, files: Iterable[Mapping[str, Any]]) -> None:
        """Note the hashes of files, here and for later runs."""
        new = []
        for file in files:
            key: _File = (file["path"], file["size"], file["mtime"])
            if key not in self._images:
                self._images[key] = file["image"]
                new.append(json.dumps({name: file[name] for name in (*_FILE_KEYS, "image")}) + "\n")
        # These lines only save time: if the folder cannot be written, the next run hashes the files again.
        with suppress(OSError):
            if new:
                self._file_lines.mkdir(parents=True, exist_ok=True)
                with (self._file_lines / f"{self._name}.jsonl").open("a") as lines:
                    lines.write("".join(new))

    # Rows.

    def _read_meta(self) -> None:
        path = self.folder / "meta.json"
        if not path.is_file():
            return
        try:
            meta = json.loads(path.read_text())
            shape, dtype = tuple(map(int, meta.pop("shape"))), getattr(torch, meta.pop("dtype"))
        except (ValueError, KeyError, TypeError, AttributeError):
            meta = None
        if meta != self.identity:
            raise ValueError(
                f"run.feature_cache: {path} does not describe the tower and transform that its folder is named after; "
                "delete the folder or choose another one."
            )
        self.row_shape, self.row_dtype = shape, dtype

    def _write_meta(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "meta.json").is_file():
            whole = self.folder / f"{_new_name()}.tmp"
            meta = {**self.identity, "shape": list(self.row_shape), "dtype": str(self.row_dtype).partition(".")[2]}
            whole.write_text(json.dumps(meta, indent=1))
            whole.replace(self.folder / "meta.json")

    def _refresh(self) -> None:
        """Read the lines that other processes have written since the last reading."""
        if not self.row_shape:
            self._read_meta()
        for path in sorted(self.folder.glob("*.jsonl")) if self.row_shape else ():
            with suppress(OSError):  # somebody may delete the folder
                if path.stem != self._name and path.stat().st_size > self._bytes_read.get(path.stem, 0):
                    self._read_new_lines(path)

    def _read_new_lines(self, path: Path) -> None:
        begin = self._bytes_read.get(path.stem, 0)
        with path.open("rb") as file:
            file.seek(begin)
            content = file.read()
        # Only now: the writer may go on meanwhile, and a line that is read has its row before it.
        count = path.with_suffix(".rows").stat().st_size // self.row_bytes
        whole = content[: content.rfind(b"\n") + 1]
        self._bytes_read[path.stem] = begin + len(whole)
        for line in _lines_of(whole):
            if isinstance(line.get("image"), str) and line.get("row") in range(count):
                self._take_line({**line, "segment": path.stem})

    def _take_line(self, line: dict[str, Any]) -> None:
        image = line["image"]
        if "instead_of" in line:
            damaged: _Place = tuple(line["instead_of"])  # type: ignore[assignment]
            self._replaced.add(damaged)
            if self._rows.get(image) == damaged:
                del self._rows[image]
        if _place(line) not in self._replaced and image not in self._rows:
            self._unchecked[image] = line

    def _take_checked(self, image: str, wrong: _Place | None) -> None:
        line = self._unchecked.pop(image)
        if wrong is None:
            self._rows[image] = _place(line)
        else:
            self._wrong[image] = wrong

    def _checked_row(self, image: str | None) -> Tensor | None:
        """Return a row that was checked, or None if there is none or its file is gone."""
        place = self._rows.get(image) if image is not None else None
        if place is None:
            return None
        with suppress(OSError, IndexError):
            # A copy, because torch has no read-only tensors and the file must not change.
            return torch.from_numpy(self._mapped_row(*place).copy()).view(self.row_dtype).view(self.row_shape)
        return None

    def _mapped_row(self, segment: str, row: int) -> np.ndarray[Any, Any]:
        if row >= len(
            self._maps.get(segment, ())
        ):  # it is not mapped yet, or it has grown since; a thread may map it too
            # np.memmap maps read-only. torch.from_file maps privately, and the system refuses more than the memory.
            data = np.memmap(self.folder / f"{segment}.rows", np.uint8, mode="r")
            count = len(data) // self.row_bytes
            self._maps[segment] = data[: count * self.row_bytes].reshape(count, self.row_bytes)
        mapped: np.ndarray[Any, Any] = self._maps[segment][row]
        return mapped

    def _damaged_rows(self, images: Iterable[str]) -> dict[str, _Place]:
        """Return those of these unchecked images whose row does not match its check sum, with segment and row."""

        def is_wrong(line: Mapping[str, Any]) -> bool:
            with suppress(OSError, IndexError):
                return line.get("check") != _check_sum(line["image"], self._mapped_row(*_place(line)))
            return True

        lines = sorted((self._unchecked[image] for image in images), key=_place)
        if not lines:
            return {}
        with ThreadPoolExecutor() as pool:
            checked = zip(lines, _progress(pool.map(is_wrong, lines), "check features", len(lines)))
            return {line["image"]: _place(line) for line, wrong in checked if wrong}


@dataclass(frozen=True)
class UncachedPicture:
    """A preprocessed picture whose features are in no cache yet, as a data set returns it.

    Attributes:
        pixels: The picture ``(3, H, W)``.
        about: JSON of the cache's key, of whether the features shall be kept, and of the picture's file.
    """

    pixels: Tensor
    about: str


def collate_images(column: Sequence[Any]) -> Tensor | dict[str, Any]:
    """Collate what data sets with a cache return under one key of their samples.

    Args:
        column: For each sample a tensor or an :class:`UncachedPicture`, or a list of K of them.

    Returns:
        The stacked tensors; or, if any picture is uncached, a dictionary of plain types, which loaders and LAVIS handle
        like any other and :func:`with_features` turns into a tensor: ``pictures`` ``(M, 3, H, W)`` and ``about`` of the
        uncached ones, ``features`` of the others, and the mask ``is_cached`` ``(B,)`` or ``(B, K)``.
    """
    is_nested = any(isinstance(entry, list) for entry in column)
    images = [image for entry in column for image in entry] if is_nested else list(column)
    uncached = [image for image in images if isinstance(image, UncachedPicture)]
    if not uncached:
        return torch.stack(list(column))
    cached = [image for image in images if not isinstance(image, UncachedPicture)]
    is_cached = torch.tensor([not isinstance(image, UncachedPicture) for image in images])
    return {
        "pictures": torch.stack([picture.pixels for picture in uncached]),
        "about": [picture.about for picture in uncached],
        "is_cached": is_cached.view(len(column), -1) if is_nested else is_cached,
        **({"features": torch.stack(cached)} if cached else {}),
    }


def with_features(samples: Mapping[str, Any], model: HasImageTower, caches: Iterable[FeatureCache]) -> dict[str, Any]:
    """Return a batch in which features stand in place of the uncached pictures of :func:`collate_images`.

    Features that are missing in the caches are computed by one call of the tower without a gradient, and kept.
    """
    parts = {key: part for key, part in samples.items() if isinstance(part, Mapping) and "is_cached" in part}
    if not parts:
        return dict(samples)
    cache_of = {cache.folder.name: cache for cache in caches}
    pictures: dict[tuple[str, str], tuple[dict[str, Any], Tensor]] = {}
    names: dict[str, list[tuple[str, str]]] = {}
    for key, part in parts.items():
        abouts = [json.loads(about) for about in part["about"]]
        names[key] = [(about["cache"], about.get("image", about["path"])) for about in abouts]
        pictures.update(zip(names[key], zip(abouts, part["pictures"])))
    features = _found_or_computed(pictures, model, cache_of)
    return {**samples, **{key: _joined(part, [features[name] for name in names[key]]) for key, part in parts.items()}}


def _found_or_computed(
    pictures: Mapping[tuple[str, str], tuple[dict[str, Any], Tensor]],
    model: HasImageTower,
    cache_of: Mapping[str, FeatureCache],
) -> dict[tuple[str, str], Tensor]:
    """Return the features of pictures by cache and image."""
    features: dict[tuple[str, str], Tensor] = {}
    for key, cache in cache_of.items():
        found = cache.rows(image for name, image in pictures if name == key)
        cache.remember(pictures[key, image][0] for image in found)
        features.update(((key, image), row) for image, row in found.items())
    missing = [name for name in pictures if name not in features]
    if missing:
        computed = tower_features(model, torch.stack([pictures[name][1] for name in missing]))
        features.update(zip(missing, computed))
    for key, cache in cache_of.items():
        kept = [name for name in missing if name[0] == key and pictures[name][0]["is_kept"]]
        if kept:
            cache.keep([pictures[name][0] for name in kept], torch.stack([features[name] for name in kept]))
    return features


def _joined(part: Mapping[str, Any], uncached: Sequence[Tensor]) -> Tensor:
    """Return the features of a collated column, ``(B, ...)`` or ``(B, K, ...)``, on the device of its pictures."""
    device, is_cached = part["pictures"].device, part["is_cached"]
    rows = torch.stack([row.to(device) for row in uncached])
    places = is_cached.flatten()
    joined = rows.new_empty(len(places), *rows.shape[1:])
    joined[~places] = rows
    if "features" in part:
        joined[places] = part["features"]
    return joined.view(*is_cached.shape, *rows.shape[1:])


@torch.no_grad()
def tower_features(model: HasImageTower, pictures: Tensor) -> Tensor:
    """Return the features of pictures ``(B, 3, H, W)``, in the tower's own precision also under autocast.

    A picture's features do not depend on the other pictures of the call. They could depend on the number of pictures
    in their last bits, so a call is filled up to a multiple of `PICTURES_PER_BLOCK`.
    """
    device = next(model.image_tower.parameters()).device
    model.image_tower.eval()
    count = len(pictures)
    filled = math.ceil(count / PICTURES_PER_BLOCK) * PICTURES_PER_BLOCK
    if count < filled:
        pictures = pictures[torch.arange(filled, device=pictures.device) % count]
    with torch.autocast(device.type, enabled=False):
        return model.image_features(pictures.to(device))[:count]


class _Segment:
    """Appends rows and their lines to the files of one process, a row before its line."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._path = folder / f"{name}.rows"
        # Without a buffer, a failed write leaves nothing behind that could be written later.
        self._rows = self._path.open("xb", buffering=0)
        self._lines = (folder / f"{name}.jsonl").open("xb", buffering=0)
        self._count = 0

    @property
    def is_there(self) -> bool:
        """Whether the file of rows still has its name; without one, rows would fill the disk, and nobody find them."""
        return self._path.is_file()

    def append(self, images: Sequence[str], features: Tensor, wrong: Mapping[str, _Place]) -> list[_Place]:
        """Append rows, whose lines name the ``wrong`` rows that they replace, and return their places."""
        data = features.flatten(1).contiguous().view(torch.uint8).numpy()
        lines = []
        for row, (image, content) in enumerate(zip(images, data), self._count):
            line = {"image": image, "row": row, "check": _check_sum(image, content)}
            lines.append(json.dumps({**line, "instead_of": wrong[image]} if image in wrong else line) + "\n")
        for file, content in ((self._rows, data.data.cast("B")), (self._lines, memoryview("".join(lines).encode()))):
            while len(content):  # a full disk takes a part of a write before it refuses the rest
                content = content[file.write(content) :]
        self._count += len(data)
        return [(self.name, row) for row in range(self._count - len(data), self._count)]


def _identity_and_folder(
    root: Path, model: HasImageTower, transform: Callable[[Any], Tensor], upright: bool, name_of: NameOf
) -> tuple[dict[str, Any], Path]:
    """Return the description of a cache that its key is the hash of, and the cache's folder."""
    identity = {
        "format": _FORMAT,
        "model": name_of(type(model)),
        "tower": fingerprint(model.image_tower, name_of),
        "transform": fingerprint(transform, name_of),
        **({"upright": True} if upright else {}),
    }
    return identity, root / fingerprint(identity, name_of)


def _present_name(thing: Any) -> str:
    return f"{str(thing.__module__).partition('.')[0]}:{thing.__qualname__}"


def _former_name(thing: Any) -> str:
    """Return the name that version 0.4 put into its keys, so that its caches are still found.

    Those keys contained the module path of a class or function.
    """
    module = thing.__module__
    return f"{_MODULES_OF_0_4.get(module, module)}.{thing.__qualname__}"


def _describe(thing: Any, ancestors: tuple[int, ...], name_of: NameOf) -> Iterator[bytes | memoryview]:
    """Yield the bytes that :func:`fingerprint` hashes, depth first."""
    yield name_of(type(thing)).encode()
    if thing is None or isinstance(thing, (bool, int, float, str, bytes, torch.dtype)):
        yield repr(thing).encode()
    elif isinstance(thing, Enum):
        yield thing.name.encode()
    elif isinstance(thing, torch.device):
        return  # features are the same on every device
    elif isinstance(thing, Tensor):
        yield f"{thing.dtype} {tuple(thing.shape)}".encode()
        yield thing.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(thing, np.ndarray):
        yield f"{thing.dtype} {thing.shape}".encode()
        yield thing.tobytes()
    elif id(thing) not in ancestors:
        parts = list(_parts(thing, name_of))
        yield str(len(parts)).encode()
        for part in parts:
            yield from _describe(part, (*ancestors, id(thing)), name_of)


def _parts(thing: Any, name_of: NameOf) -> Iterator[Any]:
    if isinstance(thing, Mapping):
        for item in thing.items():
            yield from item
    elif isinstance(thing, (list, tuple)):
        yield from thing
    elif isinstance(thing, (set, frozenset)):
        yield sorted(fingerprint(part, name_of) for part in thing)
    elif isinstance(thing, MethodType):
        yield from (thing.__func__, thing.__self__)
    elif isinstance(thing, partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, FunctionType):
        yield from (name_of(thing), thing.__code__, thing.__defaults__)
        yield from ((thing.__kwdefaults__,) if thing.__kwdefaults__ else ())
        yield from (cell.cell_contents for cell in thing.__closure__ or ())
    elif isinstance(thing, CodeType):
        yield from (thing.co_code, thing.co_consts, thing.co_names)
    elif isinstance(thing, (type, BuiltinFunctionType)):
        yield name_of(thing)
    elif isinstance(thing, nn.Module):
        # Public settings and registered tensors and modules count; the other attributes are torch's bookkeeping.
        registered = ("_parameters", "_buffers", "_modules")
        for name, value in vars(thing).items():
            if name in registered or not (name.startswith("_") or name == "training"):
                yield from (name, value)
    elif hasattr(thing, "pattern") and hasattr(thing, "flags"):  # regex pickles code whose order varies
        yield from (thing.pattern, int(thing.flags))
    elif hasattr(thing, "__dict__"):
        yield vars(thing)
        yield from ((slots,) if (slots := _slots(thing)) else ())
    else:
        yield from _reduced(thing)


def _slots(thing: Any) -> dict[str, Any]:
    """Return the values of an object's ``__slots__`` by name."""
    found = {}
    for owner in type(thing).__mro__:
        named = vars(owner).get("__slots__", ())
        for name in (named,) if isinstance(named, str) else named:
            is_private = name.startswith("__") and not name.endswith("__")
            place = f"_{owner.__name__.lstrip('_')}{name}" if is_private else name
            if place not in ("__dict__", "__weakref__") and hasattr(thing, place):
                found[place] = getattr(thing, place)
    return found


def _reduced(thing: Any) -> Iterator[Any]:
    """Yield what pickle would store of an object without attributes, such as a path, a number or a pattern."""
    try:
        registered = copyreg.dispatch_table.get(type(thing))
        stored = registered(thing) if registered else thing.__reduce_ex__(2)
    except Exception as error:
        raise ValueError(
            f"run.feature_cache: the tower or its transform holds a {type(thing).__name__}, whose value cannot be "
            f"recognised again ({error}), so that features could be out of date unnoticed; keep it out of them, or set "
            "run.feature_cache: false."
        ) from error
    for part in (stored,) if isinstance(stored, str) else stored:
        yield list(part) if isinstance(part, Iterator) else part


def _check_sum(image: str, row: np.ndarray[Any, Any]) -> int:
    return zlib.crc32(row.data, zlib.crc32(image.encode()))


def _place(line: Mapping[str, Any]) -> _Place:
    return line["segment"], line["row"]


def _file_key(path: Path) -> _File:
    stat = os.stat(path)
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


def _hashed_file(path: Path) -> dict[str, Any] | None:
    """Return path, size, time and hash of a file, or None if it cannot be read."""
    with suppress(OSError):
        key = _file_key(path)
        image = hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
        return {**dict(zip(_FILE_KEYS, key)), "image": image}
    return None


def _hashed_files(paths: Sequence[Path]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor() as pool:
        files = list(_progress(pool.map(_hashed_file, paths), "identify images", len(paths)))
    return [file for file in files if file is not None]


def _lines_of(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file's lines, and leave out torn and damaged lines."""
    *whole, _torn = content.split(b"\n")
    for line in whole:
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found


def _new_name() -> str:
    return secrets.token_hex(8)


def _progress(items: Iterable[Any] | None, label: str, total: int) -> tqdm:
    """Return a progress bar that the first process shows on a terminal."""
    return tqdm(items, label, total, unit="image", leave=False, disable=True if rank_and_world()[0] else None)
