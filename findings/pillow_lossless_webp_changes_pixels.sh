#!/usr/bin/env bash
# Pillow 13.0.0: save(..., lossless=True) as WebP changes the colours of transparent pixels, so the pixels after convert("RGB") are others.
#
# Expected: "lossless" gives back every number that was stored, as PNG does.
# What happens: colours under an alpha of 0 are thrown away unless exact=True is given too. A viewer shows the same picture. A program that
# drops the alpha channel, as the image towers of this field do by convert("RGB"), reads a different one: here its background is
# black instead of white.
#
# Seen (a red square on a white background that is transparent):
#     PNG:                          equal as RGBA True,  equal as RGB True,  corner (255, 255, 255)
#     WebP, lossless:               equal as RGBA False, equal as RGB False, corner (0, 0, 0)
#     WebP, lossless, exact:        equal as RGBA True,  equal as RGB True,  corner (255, 255, 255)
#
# Why it matters here: shops keep cut-out products as PNG with alpha, and a conversion of the catalogue to lossless WebP, which seems to
# change nothing, gives the pictures of an index other features. Lay transparent pictures on a background of your choice before both.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import io

import numpy as np
from PIL import Image

pixels = np.full((64, 64, 4), (255, 255, 255, 0), dtype="uint8")
pixels[16:48, 16:48] = (200, 30, 30, 255)
picture = Image.fromarray(pixels)
seen = {}
for name, parameters in {
    "PNG:": {"format": "PNG"},
    "WebP, lossless:": {"format": "WEBP", "lossless": True},
    "WebP, lossless, exact:": {"format": "WEBP", "lossless": True, "exact": True},
}.items():
    file = io.BytesIO()
    picture.save(file, **parameters)
    back = Image.open(file)
    as_stored = back.mode == "RGBA" and np.array_equal(np.array(back), pixels)
    as_read = np.array_equal(np.array(back.convert("RGB")), pixels[:, :, :3])
    corner = back.convert("RGB").getpixel((0, 0))
    seen[name] = as_stored, as_read, corner
    print(f"{name:<29} equal as RGBA {str(as_stored) + ',':<6} equal as RGB {str(as_read) + ',':<6} corner {corner}")
white = True, True, (255, 255, 255)
assert list(seen.values()) == [white, (False, False, (0, 0, 0)), white], "the behaviour has changed"
PY
