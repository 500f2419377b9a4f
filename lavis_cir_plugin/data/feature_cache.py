"""Cache of a frozen image tower's features: each picture is encoded once, and its features are memory-mapped.

A cache has one folder per tower and transform, ``<root>/<key>/``::

    meta.json                 the description whose hash is the key; shape and type of a row
    <segment>.rows            the features of the pictures, one row after the other
    <segment>.jsonl           a line per row: image (hash of the file's bytes), row, check (CRC-32 of both)
    ../files/<segment>.jsonl  a line per file: path, size, mtime, image; it saves hashing an unchanged file again

No written file is ever changed. Each process writes its own segments, and it writes a row to the disk before the row's
line. A process may therefore be killed at any moment, and several processes may work at once: a reader ignores a row
without a whole line, and a picture that has two rows does no harm.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any, Callable, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.core.atomic_files import size_text
from lavis_cir_plugin.core.processes import fail_in_all_processes, gather, rank_and_world
from lavis_cir_plugin.core.workers import worker_setup

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


def check_tower(model: Any) -> None:
    """Refuse a model whose image features may change during training.

    Raises:
        ValueError: If the model is not a :class:`HasImageTower`, or its tower is trained.
    """
    if not has_image_tower(model):
        raise ValueError(
            f"run.feature_cache: {type(model).__name__} offers no image_tower and image_features to cache; set "
            "run.feature_cache: false."
        )
    trained = [name for name, weight in model.image_tower.named_parameters() if weight.requires_grad]
    if trained:
        raise ValueError(
            f"run.feature_cache: {len(trained)} tensors of the image tower are trained (first: {trained[0]}), so its "
            "features change with every step; set model.freeze_vit: true and keep adapters out of the tower, or set "
            "run.feature_cache: false."
        )


def fingerprint(thing: Any, name_of: NameOf | None = None) -> str:
    """Return a hash of everything in an object that could change its results.

    The hash is equal in every process and on every device. It covers class, settings, weights and buffers (name, type,
    shape, bytes) of a module, the code of a function, and class and attributes of any other object. Of an object
    without attributes it covers the class alone.

    Args:
        thing: Any object.
        name_of: Names a class or function in the hash. The default takes the name of the top-level package and the
            qualified name, so that a module may be renamed.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _describe(thing, (), name_of or _present_name):
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()


class FeatureCache:
    """Maps a picture's path to its features.

    The cache can be sent to other processes, such as DataLoader workers. Each process maps the files at its first
    reading.

    Args:
        root: Folder of all caches. This cache uses the folder ``<root>/<key>``.
        model: Model whose class and tower the key depends on. The cache keeps no reference to it.
        transform: Deterministic function from an RGB picture to ``(3, H, W)``.
        upright: Whether pictures are turned by their EXIF orientation first; part of the key.

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
        self._file_lines = root / "files"
        self._rows: dict[str, tuple[str, int]] = {}  # path -> segment and row
        self._maps: dict[str, np.ndarray[Any, Any]] = {}
        self._shape: tuple[int, ...] = ()  # unknown until there is a row
        self._dtype = torch.float32
        self._read_meta()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __getitem__(self, path: Path) -> Tensor:
        segment, row = self._rows[str(path)]
        # A copy, because torch has no read-only tensors and the file must not change.
        return torch.from_numpy(self._mapped_segment(segment)[row].copy()).view(self._dtype).view(self._shape)

    def fill(self, model: HasImageTower, paths: Iterable[Path], *, batch_size: int = 64, num_workers: int = 0) -> None:
        """Make the features of these pictures readable, and compute the missing ones.

        In a distributed run every process calls this method with the same arguments and computes its share.

        The method reads each needed row once and compares it with its check sum; the processes share this work too.
        For 40,000 rows of 724 kB this is one sequential pass of seconds over a fast disk. A check at each reading
        would cost a tenth of a second per batch of 128 in every epoch.

        Args:
            model: The model that this cache was made for, on the device that shall compute.
            paths: Paths of the picture files. Files with equal content are computed once.
            batch_size: Pictures per call of the tower.
            num_workers: Number of processes that decode pictures.

        Raises:
            ValueError: If there is too little free space (then nothing has been written), if a picture cannot be read,
                if its features are not finite, or if the processes of a run have different towers.
            OSError: If a row cannot be written, for example on a full disk. Rows written earlier stay valid.
        """
        rank, world = rank_and_world()
        if len(set(gather(str(self.folder)))) > 1:
            raise ValueError(
                "run.feature_cache: the frozen tower or its transform differs between the processes of this run, so "
                "that they would train on different features; load the tower from a file (model.finetuned), or build "
                "it from the same seed on each."
            )
        names = sorted({str(path) for path in paths})
        with fail_in_all_processes():
            files = self._hash_files(names[rank::world])
        image_of = {file["name"]: file["image"] for part in gather(files) for file in part}
        source = {image_of[name]: name for name in reversed(names)}

        rows = self._read_rows()
        checked = gather(self._damaged_rows(rows, list(source)[rank::world]))
        wrong = {image: place for part in checked for image, place in part.items()}
        # Processes can see different rows while another run writes to the cache, so the first process decides.
        missing = gather([image for image in source if image not in rows or image in wrong])[0]
        with fail_in_all_processes():
            if missing and not self._shape:
                probe = self._features(model, self._picture(source[missing[0]])[None])
                self._shape, self._dtype = tuple(probe.shape[1:]), probe.dtype
            self._announce_or_refuse(len(source), len(missing), len(wrong))
        with fail_in_all_processes():
            self._remember_hashes(files)
            if missing[rank::world]:
                self._compute(model, missing[rank::world], source, wrong, batch_size, num_workers)

        rows = self._read_rows()
        lost = [image for image in source if image not in rows]
        if lost:
            raise ValueError(
                f"run.feature_cache: {self.folder} lacks {len(lost):,} images after every process has written its "
                "share; choose a folder that all processes see."
            )
        self._rows = {name: _segment_and_row(rows[image]) for name, image in image_of.items()}

    # Files and their hashes.

    def _hash_files(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return a line for each file; the hash of an unchanged file is looked up, not computed."""
        lines = [line for path in self._file_lines.glob("*.jsonl") for line in _read_lines(path)]
        known = {(line.get("path"), line.get("size"), line.get("mtime")): line.get("image") for line in lines}

        def identify(name: str) -> dict[str, Any]:
            path = os.path.abspath(name)
            try:
                stat = os.stat(path)
                image = known.get((path, stat.st_size, stat.st_mtime_ns))
                is_new = image is None
                image = image or hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()
            except OSError as error:
                raise ValueError(f"{path} cannot be read ({error.strerror}).") from error
            file = {"path": path, "size": stat.st_size, "mtime": stat.st_mtime_ns, "image": image}
            return {"name": name, "is_new": is_new, "file": file, "image": image}

        with ThreadPoolExecutor() as pool:
            return list(_progress(pool.map(identify, names), "identify images", len(names)))

    def _remember_hashes(self, files: Sequence[dict[str, Any]]) -> None:
        new = [json.dumps(file["file"]) + "\n" for file in files if file["is_new"]]
        # These lines only save time: if the folder cannot be written, the next run hashes the files again.
        with suppress(OSError):
            if new:
                self._file_lines.mkdir(parents=True, exist_ok=True)
                (self._file_lines / f"{_new_name()}.jsonl").write_text("".join(new))

    # Rows.

    @property
    def _row_bytes(self) -> int:
        return math.prod(self._shape) * self._dtype.itemsize

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
        self._shape, self._dtype = shape, dtype

    def _write_meta(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "meta.json").is_file():
            whole = self.folder / f"{_new_name()}.tmp"
            meta = {**self.identity, "shape": list(self._shape), "dtype": str(self._dtype).partition(".")[2]}
            whole.write_text(json.dumps(meta, indent=1))
            whole.replace(self.folder / "meta.json")

    def _read_rows(self) -> dict[str, dict[str, Any]]:
        """Return, for each image with a whole row, its line and the segment's name."""
        self._maps = {}
        if not self._shape:
            self._read_meta()
        lines = []
        for path in sorted(self.folder.glob("*.jsonl")) if self._shape else ():
            rows = path.with_suffix(".rows")
            whole = range(rows.stat().st_size // self._row_bytes if rows.is_file() else 0)
            found = (line for line in _read_lines(path) if "image" in line and line.get("row") in whole)
            lines += [{**line, "segment": path.stem} for line in found]
        replaced = {tuple(line["instead_of"]) for line in lines if "instead_of" in line}
        return {line["image"]: line for line in lines if _segment_and_row(line) not in replaced}

    def _mapped_segment(self, segment: str) -> np.ndarray[Any, Any]:
        if segment not in self._maps:
            # np.memmap maps read-only. torch.from_file maps privately, and the system refuses more than the memory.
            data = np.memmap(self.folder / f"{segment}.rows", np.uint8, mode="r")
            count = len(data) // self._row_bytes
            self._maps[segment] = data[: count * self._row_bytes].reshape(count, self._row_bytes)
        return self._maps[segment]

    def _damaged_rows(self, rows: Mapping[str, Mapping[str, Any]], images: Iterable[str]) -> dict[str, tuple[str, int]]:
        """Return those of these images whose row does not match its check sum, with segment and row."""

        def is_wrong(line: Mapping[str, Any]) -> bool:
            return line.get("check") != _check_sum(line["image"], self._mapped_segment(line["segment"])[line["row"]])

        lines = sorted((rows[image] for image in images if image in rows), key=_segment_and_row)
        for segment in {line["segment"] for line in lines}:
            self._mapped_segment(segment)  # map each file before the threads, which could map it twice
        with ThreadPoolExecutor() as pool:
            checked = zip(lines, _progress(pool.map(is_wrong, lines), "check features", len(lines)))
            return {line["image"]: _segment_and_row(line) for line, wrong in checked if wrong}

    def _announce_or_refuse(self, total: int, missing: int, wrong: int) -> None:
        """Log sizes and free space before anything is written; refuse to start if the features do not fit."""
        existing = next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())
        free = shutil.disk_usage(existing).free
        size = self._row_bytes
        again = f" ({wrong:,} of them again, for a wrong check sum)" if wrong else ""
        logging.info(
            f"feature cache: {total:,} images of {self._shape} {self._dtype}, {size_text(size)}, in all "
            f"{size_text(total * size)}; {total - missing:,} are there, {missing:,} to compute{again}, "
            f"{size_text(missing * size)}; {self.folder}, {size_text(free)} free"
        )
        line_size = 200
        if missing * (size + line_size) > free:
            raise ValueError(
                f"run.feature_cache: {missing:,} images of {size_text(size)} need {size_text(missing * size)} and "
                f"{existing} has {size_text(free)} free; free some space, or set run.feature_cache to a folder on "
                "another disk or to false."
            )

    def _compute(
        self,
        model: HasImageTower,
        images: Sequence[str],
        source: Mapping[str, str],
        wrong: Mapping[str, tuple[str, int]],
        batch_size: int,
        num_workers: int,
    ) -> None:
        """Write the rows of these images into a new segment; its lines name the ``wrong`` rows that they replace."""
        names = [source[image] for image in images]
        # With its own generator the loader leaves the run's random numbers alone, whether or not features are missing.
        loader = DataLoader(
            _Pictures(names, self._picture),
            batch_size,
            num_workers=num_workers,
            generator=torch.Generator(),
            worker_init_fn=worker_setup(),
        )
        with ExitStack() as stack:
            with _write_errors_explained(self.folder):
                self._write_meta()
                segment = stack.enter_context(_Segment(self.folder))
            bar = stack.enter_context(_progress(None, "image features", len(images)))
            start, done = time.monotonic(), 0
            for pictures in loader:
                features = self._features(model, pictures)
                batch = images[done : done + len(features)]
                is_finite = torch.isfinite(features).flatten(1).all(dim=1).tolist()
                if not all(is_finite):
                    name = source[batch[is_finite.index(False)]]
                    raise ValueError(f"run.feature_cache: the features of {name} are not finite; check the weights.")
                with _write_errors_explained(self.folder):
                    segment.append(batch, features, wrong)
                before, done = done, done + len(batch)
                bar.update(len(batch))
                if bar.disable and 10 * done // len(images) > 10 * before // len(images):
                    passed = time.monotonic() - start
                    left = passed / done * (len(images) - done)
                    logging.info(f"feature cache: {done:,} of {len(images):,} in {passed:.0f} s, {left:.0f} s to go")

    def _picture(self, name: str) -> Tensor:
        return self.transform(open_rgb(Path(name), self.upright))

    @torch.no_grad()
    def _features(self, model: HasImageTower, pictures: Tensor) -> Tensor:
        tower = model.image_tower.eval()
        features = model.image_features(pictures.to(next(tower.parameters()).device)).cpu().contiguous()
        if self._shape and (tuple(features.shape[1:]), features.dtype) != (self._shape, self._dtype):
            raise ValueError(
                f"run.feature_cache: {self.folder} holds rows of {self._shape} {self._dtype} and the tower returns "
                f"{tuple(features.shape[1:])} {features.dtype}; delete the folder or choose another one."
            )
        return features


class _Segment:
    """Appends rows and their lines to the files of one process; a row is on the disk before its line is written."""

    def __init__(self, folder: Path) -> None:
        name = _new_name()
        self._rows = (folder / f"{name}.rows").open("xb")
        self._lines = (folder / f"{name}.jsonl").open("xb")
        self._count = 0

    def __enter__(self) -> _Segment:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._rows, self._lines):
            with suppress(OSError):  # valid rows are on the disk; the buffer holds at most the rest of a failed write
                file.close()

    def append(self, images: Sequence[str], features: Tensor, wrong: Mapping[str, tuple[str, int]]) -> None:
        data = features.flatten(1).view(torch.uint8).numpy()
        lines = []
        for row, (image, content) in enumerate(zip(images, data), self._count):
            line = {"image": image, "row": row, "check": _check_sum(image, content)}
            lines.append(json.dumps({**line, "instead_of": wrong[image]} if image in wrong else line) + "\n")
        for file, content in ((self._rows, data.data), (self._lines, "".join(lines).encode())):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._count += len(data)


class _Pictures(Dataset[Tensor]):
    def __init__(self, names: Sequence[str], read: Callable[[str], Tensor]) -> None:
        self.names, self.read = names, read

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        return self.read(self.names[index])


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
    elif isinstance(thing, FunctionType):
        yield from (name_of(thing), thing.__code__, thing.__defaults__)
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
    elif hasattr(thing, "__dict__"):
        yield vars(thing)


def _check_sum(image: str, row: np.ndarray[Any, Any]) -> int:
    return zlib.crc32(row.data, zlib.crc32(image.encode()))


def _segment_and_row(line: Mapping[str, Any]) -> tuple[str, int]:
    return line["segment"], line["row"]


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file's lines, and leave out torn and damaged lines."""
    *whole, _torn = path.read_bytes().split(b"\n")
    for line in whole:
        with suppress(ValueError):
            content = json.loads(line)
            if isinstance(content, dict):
                yield content


def _new_name() -> str:
    return secrets.token_hex(8)


def _progress(items: Iterable[Any] | None, label: str, total: int) -> tqdm:
    """Return a progress bar that the first process shows on a terminal."""
    return tqdm(items, label, total, unit="image", leave=False, disable=True if rank_and_world()[0] else None)


@contextmanager
def _write_errors_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"run.feature_cache: {folder} cannot be written ({error.strerror}); the features that are there are whole "
            "and the next run goes on from them. Free some space or choose another folder."
        ) from error
