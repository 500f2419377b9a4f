#!/usr/bin/env bash
# torch 2.13.0: AdamW(fused=True) on a CPU trains a parameter that is a view of another tensor wrongly, and writes into what lies between.
#
# Expected: fused=True computes the same update as fused=False up to rounding, or refuses what it cannot do.
# What happens: the kernel walks the memory of a parameter as if it were contiguous. Of a view such as stored[:, :4] it updates the first numbers of
# the memory, whichever they are: some of the parameter's own stay as they are, and numbers of the larger tensor beside it, which belong
# to nobody's optimizer, are changed. Nothing is raised and the loss may still fall.
#
# Seen, after one step of lr 0.1 on the left half of a 4 x 8 tensor of ones, whose gradients are ones:
#     fused=False: parameter 0.899 to 0.899, the other half 1.000 to 1.000
#     fused=True:  parameter 0.899 to 1.000, the other half 0.899 to 1.000
#
# Why it matters here: weights cut out of a larger tensor are common when a checkpoint's packed matrix (the joint query, key and value weights of CLIP) is
# split into parameters, or a table of words is shortened: nn.Parameter(packed[:, :n]) keeps the view. Call .contiguous() first.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch


def span(tensor):
    return f"{float(tensor.min()):.3f} to {float(tensor.max()):.3f}"


seen = {}
for fused in (False, True):
    stored = torch.ones(4, 8)
    weight = torch.nn.Parameter(stored[:, :4])
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
    weight.sum().backward()
    assert (weight.grad == 1).all() and weight.grad.shape == (4, 4)
    optimizer.step()
    seen[fused] = span(weight.detach()), span(stored[:, 4:])
    print(f"fused={str(fused) + ':':<6} parameter {seen[fused][0]}, the other half {seen[fused][1]}")
assert seen[False] == ("0.899 to 0.899", "1.000 to 1.000"), "the behaviour has changed"
assert seen[True] == ("0.899 to 1.000", "0.899 to 1.000"), "the behaviour has changed"
PY
