#!/usr/bin/env bash
# faiss-cpu 1.15.1: the first hit of an exact search is another one when more hits are asked for.
#
# Expected: IndexFlatIP is exact; the best hit of search(query, 1) is the first of search(query, 10). Equal scores may
# come in any order, but in one order.
# What happens: among equal scores k=1 gives the first vector that was added. A larger k keeps the k that were added first
# and lists them from the last to the first. So each k has another first hit, and the best 5 are not the first 5 of the best 10.
#
# Seen:
#     k=1: [0]
#     k=5: [4, 3, 2, 1, 0]
#     k=10: [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
#
# Why it matters here: duplicates in a gallery have equal scores, and recall at 1 is taken from the first column of one
# search for the largest k. The number changes with that k, which has nothing to do with it; a page of results that asks
# for 10 more does not begin with what it showed. Sort by score and then by id, after the search.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet faiss-cpu==1.15.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import faiss
import numpy as np

index = faiss.IndexFlatIP(16)
index.add(np.ones((300, 16), dtype="float32"))
query = np.ones((1, 16), dtype="float32")
hits = {}
for k in (1, 5, 10):
    scores, ids = index.search(query, k)
    assert (scores == 16).all()
    hits[k] = ids[0].tolist()
    print(f"k={k}: {hits[k]}")
assert hits == {1: [0], 5: [4, 3, 2, 1, 0], 10: list(range(9, -1, -1))}, "the behaviour has changed"
PY
