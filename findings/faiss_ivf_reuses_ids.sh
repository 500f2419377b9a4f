#!/usr/bin/env bash
# faiss-cpu 1.15.1: after remove_ids(), an inverted file gives a new vector the id of one that it still holds.
#
# Expected: add() without ids numbers on, so that an id names one vector; a removed id may come back, an id in use may not.
# What happens: IndexIVFFlat keeps the ids of the vectors that stay (0 to 99 without 3), and numbers new vectors from its
# count, which the removal made smaller. The next vector gets id 99, which is in use. No error, no warning.
#
# Seen:
#     100 vectors, id 3 removed, one vector added: ntotal 100
#     the old vector 99 is found as 99, the new vector is found as 99
#     remove_ids([99]) removes 2 vectors
#
# Why it matters here: a gallery that loses and gains pictures maps ids to file names. Two pictures then share an id: a
# result shows the wrong one, and removing one of them removes both.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet faiss-cpu==1.15.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import faiss
import numpy as np

vectors = np.random.default_rng(0).standard_normal((400, 16)).astype("float32")
faiss.normalize_L2(vectors)
index = faiss.IndexIVFFlat(faiss.IndexFlatIP(16), 16, 8, faiss.METRIC_INNER_PRODUCT)
index.train(vectors)
index.nprobe = 8
index.add(vectors[:100])
assert index.remove_ids(np.array([3])) == 1
index.add(vectors[100:101])
print(f"100 vectors, id 3 removed, one vector added: ntotal {index.ntotal}")
scores, ids = index.search(vectors[99:101], 1)
assert np.allclose(scores, 1, atol=1e-5)
print(f"the old vector 99 is found as {ids[0, 0]}, the new vector is found as {ids[1, 0]}")
removed = index.remove_ids(np.array([99]))
print(f"remove_ids([99]) removes {removed} vectors")
assert ids.tolist() == [[99], [99]] and removed == 2, "the behaviour has changed"
PY
