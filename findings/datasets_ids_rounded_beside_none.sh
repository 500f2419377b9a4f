#!/usr/bin/env bash
# datasets 5.2.0: with the format "numpy", an integer is rounded to float32 if a row beside it holds None.
#
# Expected: a column of int64 gives its numbers exactly, whichever rows are read together; with None among them an array
# of objects, or at worst of float64, which pandas gives and which is exact up to 2^53.
# What happens: a batch with a None comes as float32, exact up to 2^24 = 16,777,216 only. The same row read alone, or in a batch
# without None, is exact. So a row's id depends on its neighbours in the batch.
#
# Seen:
#     stored:         [16777217, 16777219, None]
#     rows 0 and 1:   [16777217, 16777219] int64
#     rows 0, 1, 2:   [16777216.0, 16777220.0, nan] float32
#     row 0 of three as an int: 16777216
#
# Why it matters here: ids of products and of COCO-like pictures pass 16.7 millions, and None is how a split without
# published targets (CIRR test1, CIRCO test) or a missing second target is written. Rounded ids name other pictures.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
from datasets import Dataset

stored = [16777217, 16777219, None]
dataset = Dataset.from_dict({"target": stored})
assert dataset.features["target"].dtype == "int64"
numpy_view = dataset.with_format("numpy")
two, three = numpy_view[0:2]["target"], numpy_view[0:3]["target"]
print("stored:        ", stored)
print("rows 0 and 1:  ", two.tolist(), two.dtype)
print("rows 0, 1, 2:  ", three.tolist(), three.dtype)
print("row 0 of three as an int:", int(three[0]))
assert two.tolist() == stored[:2] and two.dtype == np.int64, "the behaviour has changed"
assert three.dtype == np.float32 and three[:2].tolist() == [16777216.0, 16777220.0], "the behaviour has changed"
PY
