#!/usr/bin/env bash
# torchmetrics 1.9.0: a relevant document whose score is zero or negative counts as not relevant.
#
# Expected: recall, average precision and reciprocal rank depend on the order of the scores only; adding a constant to all
# of them changes nothing. The documentation calls the scores estimated probabilities and names no threshold.
# What happens: in the retrieval metrics below a target with a score <= 0 is set to 0 before anything is computed. A perfect ranking
# by negative scores has recall, average precision and reciprocal rank 0, without an error or a warning. Normalised gain does not
# do so: it is 1.
#
# Seen:
#     scores: recall@1, AP, RR, NDCG
#     [0.9, 0.8, 0.7]         1.0 1.0 1.0 1.0
#     [-0.1, -0.2, -0.3]      0.0 0.0 0.0 1.0
#
# Why it matters here: cosines of composed queries and pictures, negated distances and logits are negative often. The metric then
# reads as a bad model. Shift the scores above zero first.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from torchmetrics.functional.retrieval import (
    retrieval_average_precision,
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)


def metrics(scores):
    scores, target = torch.tensor(scores), torch.tensor([1, 0, 0])
    return [
        retrieval_recall(scores, target, top_k=1).item(),
        retrieval_average_precision(scores, target).item(),
        retrieval_reciprocal_rank(scores, target).item(),
        retrieval_normalized_dcg(scores, target).item(),
    ]


positive, negative = metrics([0.9, 0.8, 0.7]), metrics([-0.1, -0.2, -0.3])
print("scores: recall@1, AP, RR, NDCG")
print("[0.9, 0.8, 0.7]        ", *positive)
print("[-0.1, -0.2, -0.3]     ", *negative)
assert (positive, negative) == ([1, 1, 1, 1], [0, 0, 0, 1]), "the behaviour has changed"
PY
