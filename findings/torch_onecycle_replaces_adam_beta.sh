#!/usr/bin/env bash
# torch 2.13.0: OneCycleLR puts its own numbers in the place of AdamW's first beta, so `betas=(0.9, ...)` is never used.
#
# Expected: a scheduler of the learning rate changes learning rates. AdamW(betas=(0.9, 0.98)) averages gradients with 0.9 for the whole training.
# What happens: with its default cycle_momentum=True it takes betas[0] for SGD's momentum: 0.95 at the first step, down to 0.85 at the peak of the
# learning rate, and up to 0.95 again. The value that the user gave is overwritten when the scheduler is made, before any step and without a
# warning, and what a checkpoint of the optimizer saves is the scheduler's.
#
# Seen:
#     as given:           (0.9, 0.98)
#     scheduler is made:  (0.95, 0.98)
#     at the peak:        (0.85, 0.98)
#     after the last step: (0.95, 0.98)
#     with cycle_momentum=False: (0.9, 0.98)
#
# Why it matters here: fine-tuning of CLIP and BLIP-2 for composed retrieval is often AdamW with betas=(0.9, 0.98) under OneCycleLR. Papers and configs
# name 0.9; a reproduction with another schedule of the same learning rates has another optimizer. Print optimizer.param_groups when you reproduce one.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import warnings

import torch

warnings.simplefilter("error")  # nothing warns
STEPS = 10


def betas(**options):
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], lr=1e-5, betas=(0.9, 0.98))
    seen, rates = [optimizer.param_groups[0]["betas"]], [0.0]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-5, total_steps=STEPS, **options)
    for step in range(STEPS):
        seen.append(optimizer.param_groups[0]["betas"])
        rates.append(optimizer.param_groups[0]["lr"])
        weight.sum().backward()
        optimizer.step()
        if step + 1 < STEPS:
            scheduler.step()
    return [(round(float(first), 6), second) for first, second in seen], max(range(len(rates)), key=rates.__getitem__)


seen, peak = betas()
kept = betas(cycle_momentum=False)[0]
print(f"as given:           {seen[0]}")
print(f"scheduler is made:  {seen[1]}")
print(f"at the peak:        {seen[peak]}")
print(f"after the last step: {seen[-1]}")
print(f"with cycle_momentum=False: {kept[-1]}")
expected = [(0.9, 0.98), (0.95, 0.98), (0.85, 0.98), (0.95, 0.98)]
assert [seen[0], seen[1], seen[peak], seen[-1]] == expected and set(kept) == {(0.9, 0.98)}, "the behaviour has changed"
PY
