"""Check uploaded pictures before anything is decoded."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from lavis_cir_plugin.benchmarks.images import FORMATS
from lavis_cir_plugin.serving.limits import Limits
from lavis_cir_plugin.serving.refusals import refusal

KINDS = tuple(name for name in FORMATS if name != "TIFF")
"""Formats that are taken. A TIFF is a container of anything, and no browser or telephone makes one."""


def check_upload(content: bytes, limits: Limits) -> None:
    """Refuse an uploaded picture by its size, and by the kind and the pixels that its header says.

    Raises:
        HTTPException: 413 for too many bytes or pixels, 415 for another kind.
    """
    if len(content) > limits.upload_bytes:
        raise refusal(413, f"a picture has {len(content):,} bytes; at most {limits.upload_bytes:,} are taken.")
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=KINDS) as picture:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # counted below
            width, height = picture.size
    except Image.DecompressionBombError:
        raise refusal(413, f"a picture has more than {limits.upload_pixels:,} pixels; scale it down.") from None
    except Exception:  # Pillow's decoders raise a dozen types on broken files
        raise refusal(415, f"a file is no whole picture of a kind that is taken ({', '.join(KINDS)}).") from None
    if width * height > limits.upload_pixels:
        raise refusal(
            413,
            f"a picture has {width:,} x {height:,} pixels, at most {limits.upload_pixels:,} are taken; scale it down.",
        )
