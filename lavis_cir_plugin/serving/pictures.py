"""Draw thumbnails of pictures of an index, keep some in memory, and send files piece by piece."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from lavis_cir_plugin.benchmarks.images import FORMATS, decode_rgb
from lavis_cir_plugin.search.catalogue import Picture
from lavis_cir_plugin.search.originals import CHUNK, open_indexed
from lavis_cir_plugin.serving.refusals import refusal

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
        ChangedError: the file is not what was indexed.
        HTTPException: 409, it cannot be decoded.
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
