"""Image files: found by name, opened as RGB, checked before a long run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from PIL import Image, ImageFile
from tqdm import tqdm  # type: ignore[import-untyped]

from lavis_cir_plugin.benchmarks.benchmark import listed

SUFFIXES = (".jpg", ".jpeg", ".png")
"""Accepted file suffixes (any case); the first wins where a name has several files."""

T = TypeVar("T")

_pillow_settings = threading.RLock()


def scan_images(folders: Iterable[Path]) -> dict[str, Path]:
    """Map the stem of every image file in the folders and in their direct sub-folders to its path.

    One directory listing per folder and no look at a single file, so that 120,000 files take seconds. Where a stem
    occurs twice, earlier folders win, then files outside sub-folders, then `SUFFIXES` order.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for name, path in _listing(folder, subfolders=True).items():
            found.setdefault(name, path)
    return found


def _listing(folder: Path, subfolders: bool) -> dict[str, Path]:
    with os.scandir(folder) as scan:
        entries = list(scan)
    files: dict[str, tuple[int, str]] = {}
    below = []
    for entry in entries:
        stem, suffix = os.path.splitext(entry.name)
        if suffix.lower() in SUFFIXES:
            files[stem] = min(files.get(stem, (len(SUFFIXES), "")), (SUFFIXES.index(suffix.lower()), entry.name))
        elif subfolders and entry.is_dir():
            below.append(entry.name)
    found = {stem: folder / name for stem, (_, name) in files.items()}
    for name in sorted(below):
        for stem, path in _listing(folder / name, subfolders=False).items():
            found.setdefault(stem, path)
    return found


def find_images(
    names: Iterable[str], folders: Sequence[Path], dataset: str, missing_images: str
) -> tuple[dict[str, Path], list[str]]:
    """Find the files of the named images.

    Args:
        names: Image names (file stems); repeated ones count once.
        folders: As `scan_images`.
        dataset: Its registered name, for the message.
        missing_images: ``"error"`` or ``"skip"`` (the caller leaves the missing ones out and says so).

    Returns:
        The path of each image that was found, and the names of those that were not, in the given order.

    Raises:
        FileNotFoundError: ``missing_images="error"`` and an image is missing, or all are; with the count and the first
            five.
    """
    scanned = scan_images(folders)
    wanted = list(dict.fromkeys(names))
    missing = [name for name in wanted if name not in scanned]
    if missing and (missing_images == "error" or len(missing) == len(wanted)):
        raise FileNotFoundError(
            f"{dataset}: {len(missing):,} of {len(wanted):,} images are missing under {', '.join(map(str, folders))} "
            f"({listed(missing)}); add them as <name>{', <name>'.join(SUFFIXES)}, or set "
            f"datasets.{dataset}.build_info.missing_images to skip."
        )
    return {name: scanned[name] for name in wanted if name in scanned}, missing


def image_folders(guesses: Sequence[Path], dataset: str) -> list[Path]:
    """Return the guessed image folders that exist.

    Raises:
        FileNotFoundError: none does.
    """
    existing = [folder for folder in guesses if folder.is_dir()]
    if not existing:
        raise FileNotFoundError(
            f"{dataset}: no image folder; looked for {', '.join(map(str, guesses))}; set "
            f"datasets.{dataset}.build_info.images to the folder that holds the images."
        )
    return existing


def open_rgb(path: Path) -> Image.Image:
    """Open an image file as RGB, by content and not by suffix.

    Alpha and palette transparency are dropped and animations give their first frame, as in the field's reference
    implementations; 16-bit grey is scaled to 8 bits (Pillow alone would clip it to white).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it cannot be decoded (empty, truncated, not an image, too many pixels).
    """

    def decode(image: Image.Image) -> Image.Image:
        if image.mode.startswith("I"):
            return image.convert("I").point(lambda value: value / 257).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image.convert("RGB")

    with _truncation_is_an_error():
        return _read(path, decode)


def verify_images(paths: Iterable[Path]) -> None:
    """Check that the files are images, from their headers and check sums, several at a time.

    A truncated JPEG has an intact header and passes; `open_rgb` names it when it is read.

    Raises:
        ValueError: files that are not images; with the count and the first five.
    """

    def problem(path: Path) -> str:
        try:
            _read(path, Image.Image.verify)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        return ""

    wanted = sorted(set(paths))
    with _truncation_is_an_error(), ThreadPoolExecutor() as pool:
        checked = tqdm(pool.map(problem, wanted), "checking images", len(wanted), unit="file", disable=None)
        problems = [text for text in checked if text]
    if problems:
        raise ValueError(
            f"{len(problems):,} of {len(wanted):,} image files cannot be read; replace or delete them: "
            + " ".join(problems[:5])
        )


@contextmanager
def _truncation_is_an_error() -> Iterator[None]:
    """Undo for a while that importing LAVIS makes Pillow fill what is missing of any picture with grey."""
    with _pillow_settings:
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def _read(path: Path, use: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(path) as image:
            return use(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist.") from None
    except Exception as error:  # Pillow's decoders raise a dozen types on broken files
        reason = "the file is empty" if os.path.getsize(path) == 0 else str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read as an image: {reason}.") from error
