"""Opens the file of a picture of an index, only with the content that was indexed."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import BinaryIO

from lavis_cir_plugin.search.catalogue import Picture

CHUNK = 256 * 1024
"""Bytes that are read at once."""


class ChangedError(OSError):
    """The file of a picture is gone or holds something else than when it was indexed; the message says which."""


def open_indexed(picture: Picture) -> BinaryIO:
    """Open the file of a picture after its bytes have been found to be those that were indexed.

    A path may have become a link to something else, and a file may hold something else, since it was indexed. So the
    checksum is compared, on the same open file that is then read.

    Raises:
        ChangedError: the file is gone, cannot be read, or is not what was indexed.
    """
    try:
        # Without O_NONBLOCK the opening of a named pipe would wait for ever.
        number = os.open(picture.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        file = os.fdopen(number, "rb")
    except OSError as error:
        raise _changed(picture, f"cannot be opened ({error.strerror})") from None
    try:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode) or state.st_size != picture.bytes or _sha256(file) != picture.sha256:
            raise _changed(picture, "has changed since it was indexed")
        file.seek(0)
    except ChangedError:
        file.close()
        raise
    except OSError as error:
        file.close()
        raise _changed(picture, f"cannot be read ({error.strerror})") from None
    return file


def _changed(picture: Picture, problem: str) -> ChangedError:
    return ChangedError(f"{picture.path} {problem}; bring the index up to date.")


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
