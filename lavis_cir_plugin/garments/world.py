"""Draw a world's pictures in several processes, and write its folder once, whole or not at all."""

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm  # type: ignore[import-untyped]

from lavis_cir_plugin.core.locks import SYSTEM_HAS_LOCKS, hold_lock
from lavis_cir_plugin.core.settings import Limits
from lavis_cir_plugin.core.workers import worker_setup

from .attributes import Garment
from .drawing import draw

_MARKER = "complete.json"
_DrawingJob = tuple[Garment, tuple[int, int], str]


def digest(settings: object) -> str:
    """Return 16 hexadecimal digits that are equal for equal settings, which JSON must be able to hold."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


Pixels = Annotated[int, Limits(ge=32)]
HeldOut = Annotated[float, Limits(ge=0, le=0.5)]


def write_json(path: Path, content: object) -> None:
    """Write a JSON file and make its folder if necessary."""
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

    Folders in a name are made if necessary. The files do not depend on `workers`, the number of drawing processes
    (default: one per core).

    Raises:
        OSError: If a file cannot be written.
    """
    jobs = [(garment, size, str(folder / name)) for name, garment in pictures.items()]
    for below in {(folder / name).parent for name in pictures}:
        below.mkdir(parents=True, exist_ok=True)
    logging.info("drawing %d garments into %s", len(jobs), folder)
    hidden = None if progress else True  # None shows the bar on a terminal only
    for _ in tqdm(_draw_all(jobs, workers), total=len(jobs), desc="garments", unit="image", disable=hidden):
        pass


def _draw_all(jobs: list[_DrawingJob], workers: int | None) -> Iterator[None]:
    """Draw the picture of every job, in this process or in several, and yield once per picture."""
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers <= 1 or len(jobs) < 100:
        yield from map(_draw_job, jobs)
        return
    # A forked worker already has the modules. A new interpreter would first import the whole plugin.
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


def _draw_job(job: _DrawingJob) -> None:
    garment, size, path = job
    picture, encoded = draw(garment, size), io.BytesIO()
    if path.endswith(".png"):
        picture.save(encoded, "PNG")
    else:
        picture.save(encoded, "JPEG", quality=90)
    Path(path).write_bytes(encoded.getvalue())


@contextlib.contextmanager
def explain_full_disk(root: Path, images: int, size: tuple[int, int]) -> Iterator[None]:
    """Say in an OSError of the block that the disk is full, if it is; the block writes pictures below `root`."""
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
    """A type of drawn data set.

    Attributes:
        kind: Prefix of its folder names.
        version: Version of the generator in the cache key. Raise it whenever the written files change.
        settings: Dataclass of its sizes and its seed. It raises ValueError for impossible values.
        write: Function ``write(folder, settings, progress, workers)`` that writes its files.
    """

    kind: str
    version: int
    settings: type
    write: Callable[..., object]

    def make(
        self, cache_root: Path, settings: Any, progress: bool = True, workers: int | None = None, **options: Any
    ) -> Path:
        """Return the folder ``<kind>-<hash>`` below `cache_root`. Only the first call draws it.

        The hash covers the generator's version and the settings, so the folder depends on nothing else.

        Args:
            cache_root: Folder of all worlds. It is made if it is missing.
            settings: Sizes and seed, of the type `settings`.
            progress: Whether to show a bar on a terminal.
            workers: Number of drawing processes; the default is one per core.
            options: Further arguments of ``write``. No written byte may depend on them.

        Raises:
            OSError: If something cannot be written. Nothing of the unfinished world is left.
        """
        content = {"generator_version": self.version, **asdict(settings)}
        place = Path(cache_root) / f"{self.kind}-{digest(content)}"
        return make_once(place, content, lambda folder: self.write(folder, settings, progress, workers, **options))


def make_once(place: Path, settings: object, write: Callable[[Path], object]) -> Path:
    """Return the folder `place`. Only the first call makes it, by ``write(folder)``.

    `write` fills a folder beside `place`, which is moved there as soon as it is whole. A file with `settings` marks it
    as whole. The next call removes what an interrupted call left. Other processes that call in the meantime wait.

    Raises:
        OSError: If something cannot be written. Nothing of the unfinished folder is left.
    """
    try:
        return _make_under_lock(place, settings, write)
    except OSError as error:
        words = _without_unfinished_name(error, place)
        raise (OSError(words) if error.errno is None else OSError(error.errno, words)) from error


def _without_unfinished_name(error: OSError, place: Path) -> str:
    """Return what could not be written, without the name of the unfinished folder, which no longer exists."""
    begin = place.parent / f".{place.name}.part-"
    reason = re.sub(rf"{re.escape(str(begin))}\w+", lambda _: str(place), error.strerror or str(error))
    if reason.startswith("garments: "):
        return reason
    return (
        f"garments: {place} cannot be drawn ({reason}); free some space there, or set XDG_CACHE_HOME to a folder that "
        "can be written."
    )


def _make_under_lock(place: Path, settings: object, write: Callable[[Path], object]) -> Path:
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
            _move_into_place(part, place)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return place


def _move_into_place(part: Path, place: Path) -> None:
    """Move a whole world to its place, unless another process has put a whole world there in the meantime."""
    if place.exists() and not (place / _MARKER).is_file():
        shutil.rmtree(place)
    try:
        part.rename(place)
    except OSError:
        if not (place / _MARKER).is_file():
            raise
