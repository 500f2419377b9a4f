"""Draw a world's pictures, in several processes, and keep its folder: made once, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from lavis_cir_plugin.core.locks import SYSTEM_HAS_LOCKS, hold_lock
from lavis_cir_plugin.core.workers import worker_setup

from .attributes import Garment
from .drawing import draw

_MARKER = "complete.json"
_Job = tuple[Garment, tuple[int, int], str]


def digest(settings: object) -> str:
    """Return 16 hexadecimal digits that are equal for equal settings (what JSON can hold)."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def check_types(config: Any) -> None:
    """Check that every field of a configuration, a dataclass with defaults, is of its default's type.

    Raises:
        ValueError: a field is not; a whole number is also a number.
    """
    words = {int: "a whole number", float: "a number", str: "text"}
    for field in fields(config):
        value, kind = getattr(config, field.name), type(field.default)
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"garments: {field.name} must be {words[kind]}, got {value!r}.")


def check_drawing(image_width: int, image_height: int, held_out: float = 0.0) -> None:
    """Check the settings that worlds share: the pictures' size and the share of combinations kept out of training.

    Raises:
        ValueError: a side below 32 pixels, or a share outside [0, 0.5].
    """
    if min(image_width, image_height) < 32:
        raise ValueError(
            f"garments: image_width and image_height must be at least 32 pixels, got {image_width} x {image_height}."
        )
    if not 0 <= held_out <= 0.5:
        raise ValueError(f"garments: held_out must lie in [0, 0.5], got {held_out}.")


def write_json(path: Path, content: object) -> None:
    """Write a file of JSON; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_pictures(
    folder: Path,
    pictures: Mapping[str, Garment],
    size: tuple[int, int],
    progress: bool = True,
    workers: int | None = None,
) -> None:
    """Draw garments of `size` = (width, height) pixels into `folder`, by file name ending in ".jpg" or ".png".

    A name may hold folders, which are made. The files do not depend on `workers`, the number of drawing processes
    (default: one per core).

    Raises:
        OSError: a file could not be written.
    """
    jobs = [(garment, size, str(folder / name)) for name, garment in pictures.items()]
    for below in {(folder / name).parent for name in pictures}:
        below.mkdir(parents=True, exist_ok=True)
    logging.info("drawing %d garments into %s", len(jobs), folder)
    hidden = None if progress else True  # None: shown on a terminal only
    for _ in tqdm(_drawn(jobs, workers), total=len(jobs), desc="garments", unit="image", disable=hidden):
        pass


def _drawn(jobs: list[_Job], workers: int | None) -> Iterator[None]:
    """Draw every job's picture, in this process or in several, and yield once for each."""
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers <= 1 or len(jobs) < 100:
        yield from map(_draw_job, jobs)
        return
    # A forked worker has the modules already; a fresh interpreter would first import the whole plugin.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(workers, mp_context=context, initializer=worker_setup()) as pool:
            try:
                yield from pool.map(_draw_job, jobs, chunksize=16)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _draw_job(job: _Job) -> None:
    garment, size, path = job
    picture, encoded = draw(garment, size), io.BytesIO()
    if path.endswith(".png"):
        picture.save(encoded, "PNG")
    else:
        picture.save(encoded, "JPEG", quality=90)
    Path(path).write_bytes(encoded.getvalue())


@contextlib.contextmanager
def full_disk_named(root: Path, images: int, size: tuple[int, int]) -> Iterator[None]:
    """Name a full disk as such in the error of whatever writes `images` pictures of `size` below `root`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"garments: no space left on the disk of {root} while writing {images} images of "
                f"{size[0]} x {size[1]}; free some, choose another folder or a smaller world.",
            ) from error
        raise


@dataclass(frozen=True)
class World:
    """A kind of drawn data set.

    Attributes:
        kind: How its folders begin.
        version: Of the generator; part of the cache key, so raise it with every change of the written files.
        settings: Dataclass of its sizes and its seed, which raises ValueError for impossible values.
        write: ``write(folder, settings, progress, workers)`` writes its files.
    """

    kind: str
    version: int
    settings: type
    write: Callable[..., object]

    def make(
        self, cache_root: Path, settings: Any, progress: bool = True, workers: int | None = None, **options: Any
    ) -> Path:
        """Return the folder ``<kind>-<hash>`` below `cache_root`; draw it on the first call only.

        The hash is of the generator's version and of the settings, so that the folder depends on nothing else.

        Args:
            cache_root: Of all worlds; it is made.
            settings: Of the type `settings`.
            progress: Show a bar on a terminal.
            workers: Drawing processes; by default one per core.
            options: What else ``write`` takes, of which no written byte depends.

        Raises:
            OSError: something could not be written; nothing of the unfinished world is left.
        """
        content = {"generator_version": self.version, **asdict(settings)}
        place = Path(cache_root) / f"{self.kind}-{digest(content)}"
        return made_once(place, content, lambda folder: self.write(folder, settings, progress, workers, **options))


def made_once(place: Path, settings: object, write: Callable[[Path], object]) -> Path:
    """Return the folder `place`, made by ``write(folder)`` on the first call only.

    It is written beside its place and moved there when it is whole, with `settings` in a file that marks it so; what
    an interrupted call left is removed by the next one. Processes that call at once wait for the one that writes.

    Raises:
        OSError: something could not be written; nothing of the unfinished folder is left.
    """
    try:
        return _made_once(place, settings, write)
    except OSError as error:
        words = _in_words(error, place)
        raise (OSError(words) if error.errno is None else OSError(error.errno, words)) from error


def _in_words(error: OSError, place: Path) -> str:
    """Say what could not be written, without the name of the unfinished folder, which is gone by then."""
    begin = place.parent / f".{place.name}.part-"
    reason = re.sub(rf"{re.escape(str(begin))}\w+", lambda _: str(place), error.strerror or str(error))
    if reason.startswith("garments: "):
        return reason
    return (
        f"garments: {place} cannot be drawn ({reason}); free some space there, or set XDG_CACHE_HOME to a folder that "
        "can be written."
    )


def _made_once(place: Path, settings: object, write: Callable[[Path], object]) -> Path:
    root = place.parent
    if (place / _MARKER).is_file():
        return place
    root.mkdir(parents=True, exist_ok=True)
    with hold_lock(root / f".{place.name}.lock", f"drawing {place}"):
        if (place / _MARKER).is_file():
            return place
        if SYSTEM_HAS_LOCKS:
            for left_over in root.glob(f".{place.name}.part-*"):
                shutil.rmtree(left_over, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=f".{place.name}.part-", dir=root))
        try:
            write(part)
            part.chmod(0o755)
            write_json(part / _MARKER, settings)
            _moved(part, place)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return place


def _moved(part: Path, place: Path) -> None:
    """Move a whole world to its place; a whole one that another process has put there in the meantime stays."""
    if place.exists() and not (place / _MARKER).is_file():
        shutil.rmtree(place)
    try:
        part.rename(place)
    except OSError:
        if not (place / _MARKER).is_file():
            raise
