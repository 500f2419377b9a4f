#!/usr/bin/env bash
# webdataset 1.0.2: of two hard-linked pictures in a shard that tar made, the second is missing.
#
# Expected: a shard that `tar -cf` makes of a folder gives one sample per file. Python's own tarfile reads all three files of the
# shard below, each with its content.
# What happens: tar stores a file's second name as a link to the first. WebDataset passes over members that are no regular files,
# without a word, so that name is no sample.
#
# Seen:
#     tarfile reads: {'./a.txt': 'red', './b.txt': 'red', './c.txt': 'blue'}
#     webdataset:    {'./a': 'red', './c': 'blue'}
#
# Why it matters here: tools that save space hard-link equal pictures, and galleries are full of equal pictures under several product
# names. The name that sorts later cannot be retrieved, and a sample of picture and caption loses its picture alone.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet webdataset==1.0.2
cd "$work"
"$work/venv/bin/python" - <<'PY'
import os
import subprocess
import tarfile

import webdataset

os.mkdir("pictures")
for name, text in (("a", "red"), ("c", "blue")):
    with open(f"pictures/{name}.txt", "w") as file:
        file.write(text)
os.link("pictures/a.txt", "pictures/b.txt")
names = ["./a.txt", "./b.txt", "./c.txt"]
subprocess.run(["tar", "-C", "pictures", "-cf", "shard.tar", *names], check=True)
with tarfile.open("shard.tar") as shard:
    whole = {name: shard.extractfile(name).read().decode() for name in shard.getnames()}
samples = {s["__key__"]: s["txt"].decode() for s in webdataset.WebDataset("shard.tar", shardshuffle=False)}
print("tarfile reads:", whole)
print("webdataset:   ", samples)
assert list(whole) == names and samples == {"./a": "red", "./c": "blue"}, "the behaviour has changed"
PY
