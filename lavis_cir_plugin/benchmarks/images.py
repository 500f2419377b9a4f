"""Find image files by name, open them as RGB, and check them before a long run."""

from __future__ import annotations

import io
import logging
import os
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from lavis_cir_plugin.benchmarks.annotation_files import refuse_special
from lavis_cir_plugin.benchmarks.survey import current_survey, scan_once
from lavis_cir_plugin.core.error_messages import listed

if TYPE_CHECKING:
    from PIL import Image

_HAS_AVIF = find_spec("PIL._avif") is not None  # Pillow has it since 11.3 in most builds

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if _HAS_AVIF else []))
"""Decoded formats in Pillow's names, whatever a file is called. The decoder of JPEG also reads MPO.

Pillow knows some forty more. Catalogues hardly contain them, few people check their decoders, and one of them passes
PostScript to an external interpreter.
"""

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *([".avif"] if _HAS_AVIF else []),
)
"""Accepted file suffixes in any case. If a name has several files, the first suffix here wins.

The published data sets need the first three, and catalogues hold the others. Files are opened by content in any case.
"""

T = TypeVar("T")

SYSTEM_FOLDERS = frozenset(
    {
        "@eadir", "@recently-snapshot", "@recycle", "@sharebin", "@tmp", "@__thumb", "#recycle", "#snapshot",
        "__macosx", "$recycle.bin", "lost+found", "network trash folder", "system volume information",
        "temporary items",
    }
)  # fmt: skip
"""Folders, in lower case, in which file servers and systems keep thumbnails, metadata and deleted files.

They belong to Synology, QNAP, macOS and Windows. Names that begin with a dot are hidden and left out anyway.
"""

_pillow_settings = threading.RLock()

logger = logging.getLogger(__name__)


def scan_images(folders: Iterable[Path]) -> dict[str, Path]:
    """Return the paths of all image files in the folders and their direct sub-folders, by stem.

    The scan lists each folder once and opens no file, so 120,000 files take seconds. Broken links, named pipes and
    folders with an image suffix do not count. Hidden entries and `SYSTEM_FOLDERS` are left out. If a stem occurs twice,
    earlier folders win, then files outside sub-folders, then the order of `SUFFIXES`.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        for name, path in _listing(folder, subfolders=True).items():
            found.setdefault(name, path)
    return found


def _listing(folder: Path, subfolders: bool) -> dict[str, Path]:
    names, below = _entries(folder)
    files: dict[str, tuple[int, str]] = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        files[stem] = min(files.get(stem, (len(SUFFIXES), "")), (SUFFIXES.index(suffix.lower()), name))
    found = {stem: folder / name for stem, (_, name) in files.items()}
    for name in below if subfolders else ():
        for stem, path in _listing(folder / name, subfolders=False).items():
            found.setdefault(stem, path)
    return found


def scan_tree(folder: Path) -> dict[str, Path]:
    """Return the paths of all image files below a folder by their relative path with ``/``, sorted.

    The scan is as fast as `scan_images`. It leaves out files that are not the owner's pictures: hidden files, files in
    hidden folders, in `SYSTEM_FOLDERS` and in the output folders of runs, and special files. A warning counts them; a
    survey records it in `Survey.left_out`. Links to folders are followed only into the tree, never up it.
    """
    found: dict[str, Path] = {}
    left_out = _LeftOut()
    root = os.path.realpath(folder)

    def descend(inside: str, above: frozenset[str]) -> None:
        names, below = _entries(folder / inside, left_out)
        found.update((inside + name, folder / (inside + name)) for name in names)
        for name in below:
            path = folder / (inside + name)
            real = os.path.realpath(path)
            if os.path.islink(path) and (real in above or _leads_out(root, real)):
                left_out.add("links to folders out of the tree, up it or to what is left out", path)
            elif _is_run(path):
                left_out.add_pictures("in the output folders of runs", path)
            else:
                descend(f"{inside}{name}/", above | {real})

    descend("", frozenset({root}))
    left_out.log(folder)
    return dict(sorted(found.items()))


class _LeftOut:
    """Count the files that a scan leaves out, by reason."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, Path] = {}

    def add(self, reason: str, path: str | Path) -> None:
        self._counts[reason] += 1
        self._first.setdefault(reason, Path(path))

    def add_pictures(self, reason: str, folder: str | Path) -> None:
        """Add all files below a folder that have an image suffix."""
        for place, _, names in os.walk(folder):
            for name in filter(_is_called_a_picture, names):
                self.add(reason, os.path.join(place, name))

    def log(self, folder: Path) -> None:
        """Log what was left out, or record it in the running survey; do nothing if nothing was left out."""
        if not self._counts:
            return
        parts = [
            f"{count:,} {reason} (first: {os.path.relpath(self._first[reason], folder)})"
            for reason, count in self._counts.items()
        ]
        sentence = f"{sum(self._counts.values()):,} left out of {folder}: {', '.join(parts)}"
        survey = current_survey()
        if survey is None:
            _warn_once(f"{sentence}.")
        else:
            survey.left_out[folder] = sentence


@cache
def _warn_once(sentence: str) -> None:
    """Log a warning once per process, because several splits are read from one folder."""
    logger.warning("%s", sentence)


def _entries(folder: Path, left_out: _LeftOut | None = None) -> tuple[list[str], list[str]]:
    """Return the sorted names of a folder's images and sub-folders, without hidden ones and `SYSTEM_FOLDERS`."""
    files, folders = [], []
    with os.scandir(folder) as scan:
        for entry in scan:
            # Asking the entry is free except for links; a circle of links would raise.
            is_link = entry.is_symlink()
            if os.path.isdir(entry) if is_link else entry.is_dir():
                if not is_foreign(entry.name):
                    folders.append(entry.name)
                elif left_out is not None:
                    left_out.add_pictures("in hidden or system folders", entry.path)
            elif _is_called_a_picture(entry.name):
                is_regular = os.path.isfile(entry) if is_link else entry.is_file()
                if is_regular and not is_foreign(entry.name):
                    files.append(entry.name)
                elif left_out is not None:
                    left_out.add("hidden" if is_regular else "that are no regular files", entry.path)
    return files, sorted(folders)


def is_foreign(name: str) -> bool:
    """Return whether a file or folder with this name is hidden or belongs to a system, and not to the owner."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _is_called_a_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _leads_out(root: str, real: str) -> bool:
    """Return whether a folder lies outside a tree or in a left-out part of it; both paths are free of links."""
    if Path(root) not in (Path(real), *Path(real).parents):
        return True
    return any(is_foreign(part) for part in Path(real).relative_to(root).parts)


def _is_run(folder: Path) -> bool:
    """Return whether a folder is the output of a run, whose ``log.txt`` begins with the config as a JSON object."""
    log = folder / "log.txt"
    with suppress(OSError):
        if log.is_file():
            with log.open("rb") as file:
                return file.read(1) == b"{"
    return False


def refuse_output_inside(output: Path, folder: Path, key: str) -> None:
    """Refuse an output folder inside an image folder, because later runs would take its files for pictures.

    Args:
        output: Folder of all runs; it need not exist.
        folder: Folder of the images; it need not exist.
        key: Config key of the image folder, for the message.

    Raises:
        ValueError: If the output folder is the image folder or lies below it; links are followed.
    """
    inside, above = Path(os.path.realpath(output)), Path(os.path.realpath(folder))
    if inside == above or above in inside.parents:
        raise ValueError(
            f"run.output_dir: {output} lies inside the image folder {folder} ({key}), where a later run would take "
            "its sheets and curves for pictures; choose a folder outside."
        )


class Spelling:
    """Find the files of names in one's own catalogue that are spelt in another way.

    File systems and programs write accents as one character or as two (Unicode's NFC and NFD), which look alike, and
    suffixes in upper or lower case. A name without an exact file stands for the only file that differs in nothing else.

    Args:
        scanned: Paths by the names of the files, from `scan_tree`.
        dataset: Registered name of the data set, for the warning.
    """

    def __init__(self, scanned: Mapping[str, Path], dataset: str) -> None:
        self.scanned = scanned
        self.dataset = dataset
        self._by_key: dict[str, list[str]] | None = None
        self._respelt: dict[str, str] = {}

    def file_name(self, name: str) -> str:
        """Return the name of the file that is meant, or the name itself if no file or more than one matches."""
        if name in self.scanned:
            return name
        if name in self._respelt:
            return self._respelt[name]
        if self._by_key is None:
            self._by_key = {}
            for found in self.scanned:
                self._by_key.setdefault(_spelling_key(found), []).append(found)
        meant = self._by_key.get(_spelling_key(name), [])
        if len(meant) != 1:
            return name
        self._respelt[name] = meant[0]
        return meant[0]

    def near(self, name: str) -> str:
        """Return a hint about files that a missing name may mean, which follows the names in a message, or ""."""
        comparable = _comparable(name)
        near = [found for found in self.scanned if _comparable(found) == comparable]
        return f"; {name} may be {' or '.join(near[:3])}" if near else ""

    def log(self) -> None:
        """Log once per process how many names mean a file with another spelling."""
        if self._respelt:
            name, found = next(iter(self._respelt.items()))
            _warn_once(
                f"{self.dataset}: {len(self._respelt):,} names mean files that are spelt in another Unicode form or "
                f"with another case of the suffix (first: {name!a} is {found!a})."
            )


def _spelling_key(name: str) -> str:
    stem, suffix = os.path.splitext(unicodedata.normalize("NFC", name))
    return stem + suffix.lower()


def _comparable(name: str) -> str:
    """Return a name without folders and suffix, and without differences of case and of Unicode's compatible forms."""
    stem = os.path.splitext(name.rpartition("/")[2])[0]
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", stem).casefold())


def find_images(
    names: Iterable[str], folders: Sequence[Path], dataset: str, missing_images: str, verify: bool = False
) -> tuple[dict[str, Path], list[str]]:
    """Return the files of the named images.

    Args:
        names: Image names (file stems). Repeated names count once.
        folders: Folders for `scan_images`.
        dataset: Registered name of the data set, for messages.
        missing_images: ``"error"``, or ``"skip"`` if the caller leaves missing images out and reports it.
        verify: Whether to check the found files with `verify_images`.

    Returns:
        The path of each found image, and the names of the missing ones in the given order.

    Raises:
        FileNotFoundError: If an image is missing and ``missing_images="error"``, or if all are missing. The message
            gives their number and the first five.
        ValueError: If `verify_images` finds a problem.
    """
    remedy = f"add them as <name>{', <name>'.join(SUFFIXES)}"
    scanned = scan_once(scan_images, tuple(folders))
    return select_images(names, scanned, ", ".join(map(str, folders)), remedy, dataset, missing_images, verify)


def select_images(
    names: Iterable[str],
    scanned: Mapping[str, Path],
    where: str,
    remedy: str,
    dataset: str,
    missing_images: str,
    verify: bool,
    near: Callable[[str], str] | None = None,
) -> tuple[dict[str, Path], list[str]]:
    """Return the paths of the named images from a scan, and the names of the missing ones, as `find_images` does.

    Args:
        names: Image names. Repeated names count once.
        scanned: Paths by name.
        where: Scanned folders, for the message.
        remedy: Advice about missing images, for the message.
        dataset: Registered name of the data set, for messages.
        missing_images: ``"error"``, or ``"skip"`` if the caller leaves missing images out and reports it.
        verify: Whether to check the found files with `verify_images`.
        near: Function that returns a hint about a missing name, such as `Spelling.near`.
    """
    wanted = list(dict.fromkeys(names))
    missing = [name for name in wanted if name not in scanned]
    survey = current_survey()
    if survey is not None:
        survey.paths.update((name, scanned[name]) for name in wanted if name in scanned)
        survey.missing.update(dict.fromkeys(missing))
        return {name: scanned[name] if name in scanned else Path(name) for name in wanted}, []
    if missing and (missing_images == "error" or len(missing) == len(wanted)):
        raise FileNotFoundError(
            f"{dataset}: {len(missing):,} of {len(wanted):,} images are missing under {where} "
            f"({listed(missing)}{near(missing[0]) if near else ''}); "
            f"{remedy}, or set datasets.{dataset}.build_info.missing_images to skip."
        )
    found = {name: scanned[name] for name in wanted if name in scanned}
    if verify:
        verify_images(found.values())
    return found, missing


def image_folders(guesses: Sequence[Path], dataset: str) -> list[Path]:
    """Return the image folders that exist. Only in a survey may there be none.

    Raises:
        FileNotFoundError: If none exists.
    """
    existing = [folder for folder in guesses if folder.is_dir()]
    if not existing and current_survey() is None:
        raise FileNotFoundError(
            f"{dataset}: no image folder; looked for {', '.join(map(str, guesses))}; set "
            f"datasets.{dataset}.build_info.images to the folder that holds the images."
        )
    return existing


def open_rgb(path: Path, upright: bool = False) -> Image.Image:
    """Open an image file as RGB, by content and not by suffix.

    Alpha and palette transparency are dropped, and an animation gives its first frame, as in the field's reference
    implementations. 16-bit grey is scaled to 8 bits; Pillow alone would clip it to white.

    Args:
        path: Path of the file.
        upright: Whether to turn and mirror the image as its EXIF orientation says, as viewers do. The reference
            implementations of the benchmarks do not, so benchmark images stay as they are stored.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be decoded (empty, truncated, not an image, too many pixels), or is grey with 32 bits
            or in floating point, which does not define black and white.
    """
    with _truncation_is_an_error():
        return _read(path, partial(as_rgb, upright=upright))


def decode_rgb(content: bytes, name: str, upright: bool = False) -> Image.Image:
    """Decode the content of an image file as `open_rgb` does.

    Args:
        content: Bytes of the file.
        name: Name of the file for messages.
        upright: Whether to apply the EXIF orientation.

    Raises:
        ValueError: If the content cannot be decoded.
    """
    with _truncation_is_an_error():
        try:
            with _opened(io.BytesIO(content)) as image:
                return as_rgb(image, upright)
        except Exception as error:  # Pillow's decoders raise a dozen types on broken files
            raise _unreadable(name, not content, error) from error


_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""Names of Pillow's transpositions by EXIF orientation."""
_ORIENTATION = 0x0112  # number of the EXIF tag


def as_rgb(image: Image.Image, upright: bool = False) -> Image.Image:
    """Return a picture of any mode as RGB by the rules of `open_rgb`.

    Raises:
        ValueError: If it is grey with 32 bits or in floating point.
    """
    turn = _turn(image) if upright else None
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # older Pillows use mode I here
        image = image.convert("I").point(lambda value: value / 257)
    elif image.mode in ("I", "F"):
        kind = "32 bits" if image.mode == "I" else "floating point"
        raise ValueError(
            f"it is grey of {kind}, which says nowhere what is black and what white; save it with 8 or 16 bits"
        )
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    picture = image.convert("RGB")
    return picture if turn is None else picture.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes a picture upright, or ``None`` if it is upright or has no orientation."""
    from PIL import Image

    image.load()  # newer Pillows turn a TIFF here and remove the tag
    try:
        name = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises many types of errors on broken EXIF data, which do not affect the pixels
        return None
    return None if name is None else Image.Transpose[name]


def verify_images(paths: Iterable[Path]) -> None:
    """Check that the files are whole images, several at a time.

    A PNG is checked by its checksums. A JPEG is checked by its headers and the marker at its end, which a truncated
    file lacks. Neither is decoded. A JPEG without the marker and every other format are decoded (an animation only in
    its first frame). A file that passes can still hold wrong pixels.

    Raises:
        ValueError: If files are missing or not whole images. The message gives their number and the first five.
    """
    wanted = sorted(set(paths))
    problems = [problem for problem in image_problems(wanted) if problem]
    if problems:
        raise ValueError(
            f"{len(problems):,} of {len(wanted):,} image files cannot be read; replace or delete them: "
            + " ".join(problems[:5])
        )


def image_problems(paths: Sequence[Path]) -> list[str]:
    """Return for each file a sentence about why it is no whole image, or "" if it is one; see `verify_images`."""
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm  # type: ignore[import-untyped]

    def problem(path: Path) -> str:
        try:
            kind = _read(path, _verified_format)
            if not (kind == "PNG" or (kind == "JPEG" and _ends_like_a_jpeg(path))):
                _read(path, as_rgb)
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        return ""

    with _truncation_is_an_error(), ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(problem, paths), "checking images", len(paths), unit="file", disable=None))


def _verified_format(image: Image.Image) -> str | None:
    image.verify()
    return image.format


def _ends_like_a_jpeg(path: Path) -> bool:
    """Return whether a file ends in the end-of-image marker, apart from zeros and blanks as padding."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4096))
        return file.read().rstrip(b"\0 \r\n\t").endswith(b"\xff\xd9")


@contextmanager
def _truncation_is_an_error() -> Iterator[None]:
    """Make Pillow refuse truncated pictures during the block; importing LAVIS lets it fill missing parts with grey."""
    from PIL import ImageFile

    with _pillow_settings:
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def check_format(path: Path) -> None:
    """Check the format of an image file for code that opens it itself; only the file's beginning is read.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the format is not in `FORMATS`, or the image has too many pixels.
    """
    _read(path, lambda image: None)


def _opened(source: Path | BinaryIO) -> Image.Image:
    """Open an image with a decoder of `FORMATS`; the whole package opens pictures here."""
    from PIL import Image  # imported here because the search for files does not need it

    return Image.open(source, formats=FORMATS)


def _read(path: Path, use: Callable[[Image.Image], T]) -> T:
    refuse_special(path)
    try:
        with _opened(path) as image:
            return use(image)
    except FileNotFoundError:
        problem = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        raise FileNotFoundError(f"{path} {problem}.") from None
    except Exception as error:  # Pillow's decoders raise a dozen types on broken files
        raise _unreadable(str(path), os.path.getsize(path) == 0, error) from error


def _unreadable(name: str, is_empty: bool, error: Exception) -> ValueError:
    return ValueError(f"{name} cannot be read as an image: {'the file is empty' if is_empty else _reason(error)}.")


def _reason(error: Exception) -> str:
    """Return what is wrong with a picture, in our own words if Pillow's message does not help."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}, or of a kind of these that Pillow does not know"
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return (
            f"it says that it has more than {limit:,} pixels, which exceeds the limit of what is decoded (a small file "
            "may claim any number, and fill the memory); scale it down, or leave out the lines that name it"
        )
    return str(error) or type(error).__name__
