#!/usr/bin/env bash
# datasets 5.2.0: Dataset.select() and indexing take a boolean mask for row numbers.
#
# Expected: a mask of True and False keeps the rows at True, as in numpy, pandas, torch and pyarrow, or is refused.
# What happens: True is row 1 and False is row 0. The result has as many rows as the mask is long, all of them copies of
# the first two. No error, no warning, for a numpy mask and for a list.
#
# Seen:
#     mask:                   [True, False, True, True]
#     select(mask):           ['b', 'a', 'b', 'b']
#     dataset[mask.tolist()]: ['b', 'a', 'b', 'b']
#
# Why it matters here: a mask is how one keeps the triplets whose pictures exist, or one category of FashionIQ. The length
# stays that of the whole, so a count does not show it; training then sees two rows only.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
from datasets import Dataset

dataset = Dataset.from_dict({"name": ["a", "b", "c", "d"]})
mask = np.array([True, False, True, True])
selected, indexed = dataset.select(mask)["name"][:], dataset[mask.tolist()]["name"]
print("mask:                  ", mask.tolist())
print("select(mask):          ", selected)
print("dataset[mask.tolist()]:", indexed)
assert selected == indexed == ["b", "a", "b", "b"], "the behaviour has changed"
PY
