#!/usr/bin/env bash
# torch 2.13.0: F.normalize() of a zero vector is NaN in half precision only, and topk() then ranks it first for every query.
#
# Expected: eps is there so that a zero vector stays zero. It does in float32 and in bfloat16.
# What happens: the default eps, 1e-12, is 0 in float16 (its smallest number is about 6e-8), so 0 / 0 gives NaN, without a warning.
# topk() takes NaN for larger than every number, so that row is the first result of every query.
#
# Seen:
#     float32:  normalised zero vector [0.0, 0.0], best of 4 for 3 queries [0, 1, 2]
#     bfloat16: normalised zero vector [0.0, 0.0], best of 4 for 3 queries [0, 1, 2]
#     float16:  normalised zero vector [nan, nan], best of 4 for 3 queries [3, 3, 3]
#
# Why it matters here: galleries are kept in half precision to save memory, and zero rows come from padding and from pictures that
# could not be read. One such row takes recall at 1 to zero. Normalise before halving, or pass an eps that float16 has.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F

seen = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    gallery = F.normalize(torch.tensor([[1, 0], [0, 1], [-1, 0], [0, 0]], dtype=dtype), dim=-1)
    queries = torch.tensor([[1, 0], [0, 1], [-1, 0]], dtype=dtype)
    best = (queries @ gallery.T).topk(1, dim=-1).indices[:, 0].tolist()
    seen[dtype] = best
    name = f"{str(dtype).removeprefix('torch.')}:"
    print(f"{name:9} normalised zero vector {gallery[3].tolist()}, best of 4 for 3 queries {best}")
assert seen[torch.float32] == seen[torch.bfloat16] == [0, 1, 2], "the behaviour has changed"
assert seen[torch.float16] == [3, 3, 3], "the behaviour has changed"
PY
