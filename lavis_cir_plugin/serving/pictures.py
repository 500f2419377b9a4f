"""Serve files of an index and thumbnails of them, only with the content that was indexed."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from lavis_cir_plugin.benchmarks.images import FORMATS, decode_rgb
from lavis_cir_plugin.search.catalogue import Picture
from lavis_cir_plugin.serving.refusals import refusal

CHUNK = 256 * 1024
MIME = {
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "PNG": "image/png",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
    "AVIF": "image/avif",
}


def open_indexed(picture: Picture) -> BinaryIO:
    """Open the file of a picture after its bytes have been found to be those that were indexed.

    A path may have become a link to something else, and a file may hold something else, since it was indexed. So the
    checksum is compared, on the same open file that is then read.

    Raises:
        HTTPException: 409, the file is gone or is not what was indexed.
    """
    try:
        # Without O_NONBLOCK the opening of a named pipe would wait for ever.
        number = os.open(picture.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        file = os.fdopen(number, "rb")
    except OSError:
        raise refusal(409, "the file of this picture is gone; bring the index up to date.") from None
    try:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode) or state.st_size != picture.bytes or _sha256(file) != picture.sha256:
            raise refusal(409, "the file of this picture has changed since it was indexed; bring the index up to date.")
    except OSError:
        file.close()
        raise refusal(409, "the file of this picture cannot be read; bring the index up to date.") from None
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """Read a file piece by piece, so that a large one needs no memory, and close it."""
    with file:
        while chunk := file.read(CHUNK):
            yield chunk


def mime_type(file: BinaryIO) -> str:
    """Return the type of a picture's content, whatever its name ends in."""
    try:
        with Image.open(file, formats=FORMATS) as picture:
            kind = picture.format or ""
    except Exception:  # Pillow's decoders raise a dozen types on broken files
        kind = ""
    file.seek(0)
    return MIME.get(kind, "application/octet-stream")


def small_copy(picture: Picture, side: int) -> bytes:
    """Return a picture as JPEG, upright, its longer side of at most so many pixels.

    Raises:
        HTTPException: 409, as `open_indexed`, or it cannot be decoded.
    """
    with open_indexed(picture) as file:
        content = file.read()
    try:
        found = decode_rgb(content, Path(picture.path).name, upright=True)
    except ValueError as error:
        raise refusal(409, str(error)) from None
    found.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    found.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


class Kept:
    """Small copies in memory, those that were asked for last, up to a number of bytes; several threads may ask."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.bytes = 0
        self._items: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int]) -> bytes | None:
        """Return a copy by checksum and side, if it is kept."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: tuple[str, int], content: bytes) -> None:
        """Keep a copy, and drop those that were not asked for for the longest time."""
        with self._lock:
            self.bytes += len(content) - len(self._items.pop(key, b""))
            self._items[key] = content
            while self.bytes > self.most_bytes:
                _, dropped = self._items.popitem(last=False)
                self.bytes -= len(dropped)
