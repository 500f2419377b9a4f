#!/usr/bin/env bash
# transformers 5.24.0: after save_pretrained() in shards into a folder that was saved to before, from_pretrained() loads the old weights.
#
# Expected: from_pretrained(folder) gives what was saved last. The other order, shards first and then one file, does: the shards are removed.
# What happens: a save in shards leaves the older model.safetensors beside them, and loading prefers that file. No error, no warning.
#
# Seen:
#     one file, then shards: first model loaded, model.safetensors still there
#     shards, then one file: second model loaded, 0 shards still there
#
# Why it matters here: fine-tuning that saves into the same folder changes from one file to shards when the model grows over the limit, or
# when max_shard_size is set. Every later evaluation then measures the model before it. Save into an empty folder.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import BertConfig, BertModel
from transformers.utils import logging

logging.disable_progress_bar()

config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
torch.manual_seed(0)
first, second = BertModel(config), BertModel(config)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def loaded(folder):
    model = BertModel.from_pretrained(folder)
    return [name for name, one in (("first", first), ("second", second)) if same(model, one)]


first.save_pretrained("grown")
second.save_pretrained("grown", max_shard_size="5KB")
first.save_pretrained("shrunk", max_shard_size="5KB")
second.save_pretrained("shrunk")
stale = os.path.exists("grown/model.safetensors")
shards = sum("-of-" in name for name in os.listdir("shrunk"))
assert any("-of-" in name for name in os.listdir("grown"))
grown, shrunk = loaded("grown"), loaded("shrunk")
print(f"one file, then shards: {grown[0]} model loaded, model.safetensors {'still there' if stale else 'removed'}")
print(f"shards, then one file: {shrunk[0]} model loaded, {shards} shards still there")
assert (grown, stale, shrunk, shards) == (["first"], True, ["second"], 0), "the behaviour has changed"
PY
