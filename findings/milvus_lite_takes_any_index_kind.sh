#!/usr/bin/env bash
# milvus-lite 3.2.2 (pymilvus 3.0.2): an index of a kind that does not exist is made and searched; only the next process refuses to load it.
#
# Expected: a kind that is not among the supported ones is refused when the index is made, where its name stands.
# What happens: create_collection() takes IVF_PQ, and a name that nobody ever used, too. Search in that process answers, describe_index()
# says "Finished". The next process cannot load the collection: load_collection() raises, so search and query do. The rows are still
# there: drop_index(), a new index of a supported kind and load_collection() bring them back.
#
# Seen:
#     IVF_PQ: first process finds 0, index state Finished; next process: MilvusException
#     NO_SUCH_KIND: first process finds 0, index state Finished; next process: MilvusException
#     FLAT: first process finds 0, index state Finished; next process: finds 0
#
# Why it matters here: a search over a gallery is tried in one process and served by another, on another day. A configuration written for
# the Milvus server (IVF_PQ, SCANN, DISKANN) passes every trial, and the index that was shipped does not open.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet milvus-lite==3.2.2 pymilvus==3.0.2 numpy==2.4.6 'setuptools<81'
cd "$work"
"$work/venv/bin/python" - <<'PY'
import subprocess
import sys

first = """
import sys
import numpy as np
from pymilvus import DataType, MilvusClient
kind = sys.argv[1]
vectors = np.random.default_rng(0).standard_normal((300, 16)).tolist()
client = MilvusClient(f"./{kind}.db")
schema = client.create_schema()
schema.add_field("id", DataType.INT64, is_primary=True)
schema.add_field("vector", DataType.FLOAT_VECTOR, dim=16)
index = client.prepare_index_params()
parameters = {"nlist": 4, "m": 4, "nbits": 8} if kind == "IVF_PQ" else {}
index.add_index("vector", index_type=kind, metric_type="COSINE", params=parameters)
client.create_collection("gallery", schema=schema, index_params=index)
client.insert("gallery", [{"id": i, "vector": vector} for i, vector in enumerate(vectors)])
state = client.describe_index("gallery", "vector")["state"]
print("finds", client.search("gallery", [vectors[0]], limit=1)[0][0]["id"], state)
client.close()
"""
later = """
import sys
import numpy as np
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException
vectors = np.random.default_rng(0).standard_normal((300, 16)).tolist()
client = MilvusClient(f"./{sys.argv[1]}.db")
try:
    client.load_collection("gallery")
    print("finds", client.search("gallery", [vectors[0]], limit=1)[0][0]["id"])
except MilvusException:
    print("MilvusException")
    client.drop_index("gallery", "vector")
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="COSINE")
    client.create_index("gallery", index)
    client.load_collection("gallery")
    assert client.search("gallery", [vectors[0]], limit=1)[0][0]["id"] == 0, "the rows are lost"
client.close()
"""


def answer(code, kind):
    command = [sys.executable, "-c", code, kind]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout.split()


for kind in ("IVF_PQ", "NO_SUCH_KIND", "FLAT"):
    found, then = answer(first, kind), answer(later, kind)
    message = then[0] if len(then) == 1 else "finds " + then[1]
    print(f"{kind}: first process finds {found[1]}, index state {found[2]}; next process: {message}")
    assert found == ["finds", "0", "Finished"], "the behaviour has changed"
    assert then == (["finds", "0"] if kind == "FLAT" else ["MilvusException"]), "the behaviour has changed"
PY
