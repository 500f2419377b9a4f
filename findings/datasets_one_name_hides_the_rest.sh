#!/usr/bin/env bash
# datasets 5.2.0: one picture whose name holds the word "test" hides all the others of an image folder.
#
# Expected: load_dataset("imagefolder", data_dir=folder) of ten pictures in one folder gives ten rows. File names with
# "train" or "test" are known to choose splits; a file that fits no split is expected to stay in "train".
# What happens: as soon as one file name holds a split's keyword, files without one belong to no split and are left out,
# without an error or a warning. A folder of nine product photos and one "lab-test.jpg" has one row.
#
# Seen:
#     item-0.jpg ... item-9.jpg:               {'train': 10}
#     item-0.jpg ... item-8.jpg, lab-test.jpg: {'test': 1}
#     item-0.jpg ... item-8.jpg, dev-3.jpg:    {'validation': 1}
#
# Why it matters here: pictures of retrieval galleries are named by products and by data sets (CIRR's are dev-..., test1-...).
# A gallery that loses nine pictures of ten gives a *better* recall.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0 pillow==13.0.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import os
import tempfile

os.environ["HF_HOME"] = tempfile.mkdtemp(dir=os.getcwd())
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
from PIL import Image

datasets.disable_progress_bars()


def rows(names):
    folder = tempfile.mkdtemp(dir=os.getcwd())
    for name in names:
        Image.new("RGB", (4, 4)).save(os.path.join(folder, name))
    return {split: len(part) for split, part in datasets.load_dataset("imagefolder", data_dir=folder).items()}


items = [f"item-{i}.jpg" for i in range(10)]
plain, test, dev = rows(items), rows([*items[:9], "lab-test.jpg"]), rows([*items[:9], "dev-3.jpg"])
print("item-0.jpg ... item-9.jpg:              ", plain)
print("item-0.jpg ... item-8.jpg, lab-test.jpg:", test)
print("item-0.jpg ... item-8.jpg, dev-3.jpg:   ", dev)
assert (plain, test, dev) == ({"train": 10}, {"test": 1}, {"validation": 1}), "the behaviour has changed"
PY
