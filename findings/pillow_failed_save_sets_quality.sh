#!/usr/bin/env bash
# Pillow 13.0.0: a save() that fails leaves its parameters on the picture, where they win over those of the next save().
#
# Expected: save(..., quality=5) to a format that is unknown raises KeyError and has no other effect. The next save() uses
# its own parameters.
# What happens: after the error the picture still holds quality=5. The next save() as JPEG uses it instead of the default, and
# also instead of a quality that is given in the call.
#
# Seen:
#     as JPEG, fresh picture:                     default 3093 bytes, quality=95 5434 bytes
#     as JPEG, after a failed save of quality=5:  default 888 bytes, quality=95 888 bytes
#
# Why it matters here: tools that write a gallery try a format and fall back to another one. The fallback's pictures are
# coarse without a sign, and features of them are not those of the originals. Save a copy() in the second try.
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

picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype="uint8"))


def size(**parameters):
    file = io.BytesIO()
    picture.save(file, "JPEG", **parameters)
    return len(file.getvalue())


fresh = size(), size(quality=95)
try:
    picture.save(io.BytesIO(), "NO-SUCH-FORMAT", quality=5)
    raise SystemExit("the behaviour has changed: an unknown format is saved")
except KeyError:
    pass
later = size(), size(quality=95)
print(f"as JPEG, fresh picture:                     default {fresh[0]} bytes, quality=95 {fresh[1]} bytes")
print(f"as JPEG, after a failed save of quality=5:  default {later[0]} bytes, quality=95 {later[1]} bytes")
assert later[0] == later[1] < fresh[0] < fresh[1], "the behaviour has changed"
PY
