"""Build parts of an HTML page that needs no other file: tables, embedded pictures and figures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from lavis_cir_plugin.benchmarks.images import open_rgb

THUMBNAIL = (126, 159)  # most pixels of a picture: garments stand upright
JPEG_QUALITY = 75

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy of a page: a browser asks nobody for anything, whatever a caption holds."""

escaped = html.escape


def page(title: str, css: str, body: str) -> str:
    """Return a whole page."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title)}</title><style>{css}</style></head>\n<body>{body}</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "", caption: str = "") -> str:
    """Return a table of cells that are HTML already; the first cell of each row is its heading.

    It scrolls sideways in a frame of its own where the window is narrower, which the keyboard reaches.
    """
    heading = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    label = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{caption or "table"}"><table class="{kind}">{label}'
        f"<thead><tr>{heading}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def data_url(content: bytes, kind: str) -> str:
    """Return a file as the address of itself."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


class Thumbnails:
    """Small copies of pictures as addresses of themselves, each file read once.

    Attributes:
        missing: Why a file could not be read, by its path.
    """

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self._known: dict[tuple[str, bool], str] = {}

    def image(self, path: str, name: str, upright: bool = False) -> str:
        """Return the picture as HTML, or a box that says that its file cannot be read; `missing` then says why.

        Args:
            path: Path of the file.
            name: Name of the image.
            upright: Whether the picture is turned as its EXIF orientation says.
        """
        if (path, upright) not in self._known:
            try:
                self._known[path, upright] = self._address(Path(path), upright)
            except (OSError, ValueError) as error:
                self._known[path, upright] = ""
                self.missing[path] = str(error)
        address = self._known[path, upright]
        if not address:
            return f'<span class="gone" title="{escaped(path)}">no file<br>{escaped(name)}</span>'
        return f'<img src="{address}" alt="{escaped(name)}" title="{escaped(path)}" loading="lazy">'

    def _address(self, path: Path, upright: bool) -> str:
        picture = open_rgb(path, upright)
        picture.thumbnail(THUMBNAIL)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
        return data_url(buffer.getvalue(), "image/jpeg")
