#!/usr/bin/env bash
# faiss-cpu 1.15.1: equal vectors that one call of add() puts into an HNSW graph cut other vectors off; one call each does not.
#
# Expected: an index holds the same vectors whether they come in one call of add() or in many; 1,000 distinct vectors
# that are searched for by themselves are found, about equally well either way.
# What happens: 2,000 copies of one vector, then 1,000 distinct ones, of 32 numbers each, M=16, efSearch=128, one thread.
# Added in one call, half of the distinct vectors are not found by their own copy. Added one by one, nearly all are.
#
# Seen:
#     one call of add(): 0.499 of the distinct vectors find themselves
#     one call each:     0.972 of the distinct vectors find themselves
#
# Why it matters here: galleries of shops hold the same picture many times (placeholders, one photo for every colour), so
# their features are equal. Recall falls for the *other* pictures, and nothing tells: ntotal is right, no search fails.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet faiss-cpu==1.15.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import faiss
import numpy as np

faiss.omp_set_num_threads(1)
vectors = np.random.default_rng(0).standard_normal((1001, 32)).astype("float32")
faiss.normalize_L2(vectors)
distinct = vectors[1:]
gallery = np.concatenate([np.repeat(vectors[:1], 2000, axis=0), distinct])


def found(calls):
    index = faiss.IndexHNSWFlat(32, 16, faiss.METRIC_L2)
    index.hnsw.efSearch = 128
    for part in np.array_split(gallery, calls):
        index.add(part)
    assert index.ntotal == 3000
    _, ids = index.search(distinct, 1)
    return float((ids[:, 0] == np.arange(2000, 3000)).mean())


bulk, single = found(1), found(3000)
print(f"one call of add(): {bulk:.3f} of the distinct vectors find themselves")
print(f"one call each:     {single:.3f} of the distinct vectors find themselves")
assert bulk < 0.7 and single > 0.9, "the behaviour has changed"
PY
