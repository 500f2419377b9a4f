#!/usr/bin/env bash
# torchmetrics 1.9.0: retrieval_average_precision(top_k=k) divides by the targets that were found, so missing some costs nothing.
#
# Expected: average precision at k divides the sum of precisions by the number of targets, or by the smaller of it and k, as
# CIRCO's mAP@k does. One of four targets found, at rank 1, gives 1/4 at k=5.
# What happens: the sum is divided by the number of targets among the first k. One of four found at rank 1 gives 1.0. A ranking that
# finds a second target, at rank 5, is worse than the one that does not find it.
#
# Seen:
#     4 targets, ranks 1 and 6, 7, 8:  AP@5 1.000, by min(k, targets) 0.250
#     4 targets, ranks 1, 5 and 7, 8:  AP@5 0.700, by min(k, targets) 0.350
#
# Why it matters here: CIRCO has 4.53 targets per query on average and is measured by mAP@5 to mAP@50. Numbers of this function are
# several times too high there, and rank models the other way round.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from torchmetrics.functional.retrieval import retrieval_average_precision

scores = torch.linspace(0.9, 0.2, 8)


def both(ranks, k=5):
    target = torch.zeros(8, dtype=torch.long)
    target[torch.tensor(ranks) - 1] = 1
    seen = [rank for rank in ranks if rank <= k]
    by_hand = sum((i + 1) / rank for i, rank in enumerate(seen)) / min(k, len(ranks))
    return retrieval_average_precision(scores, target, top_k=k).item(), by_hand


one, two = both([1, 6, 7, 8]), both([1, 5, 7, 8])
print("4 targets, ranks 1 and 6, 7, 8:  AP@5 {:.3f}, by min(k, targets) {:.3f}".format(*one))
print("4 targets, ranks 1, 5 and 7, 8:  AP@5 {:.3f}, by min(k, targets) {:.3f}".format(*two))
assert abs(one[0] - 1.0) < 1e-6 and abs(two[0] - 0.7) < 1e-6 and one[1] < two[1], "the behaviour has changed"
PY
