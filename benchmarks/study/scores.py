"""How well each validation example is answered: ranks of targets, right answers, and CIDEr of captions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lavis_cir_plugin.tasks.local_captioning import cider_of_each

CUTOFFS = (10, 50)


def scores_of(val_result: Any, dataset: Any) -> Tensor:
    """Return the scores of a split's examples, ``(scores per example, examples)``.

    Retrieval has a bool for each cutoff, whether the target is among the first K; questions have one, whether the
    answer is right; captions have CIDEr.

    Args:
        val_result: What LAVIS's loop hands to the task after an evaluation.
        dataset: The evaluated split, whose annotation holds right answers and captions.
    """
    if hasattr(val_result, "rankings"):
        rankings = val_result.rankings()
        val_result.rankings = lambda *_, **__: rankings  # they are computed once
        ranks = torch.cat([ranking.ranks for ranking in rankings.values()])
        return torch.stack([(ranks >= 0) & (ranks < k) for k in CUTOFFS])
    if any("answer" in result for result in val_result):
        return _right_answers(val_result, dataset.annotation)
    return _cider(val_result, dataset.annotation)


def _right_answers(results: list[dict[str, Any]], annotation: list[dict[str, Any]]) -> Tensor:
    given = {int(result["question_id"]): result["answer"] for result in results}
    return torch.tensor([[given[record["question_id"]] == record["answer"][0] for record in annotation]])


def _cider(results: list[dict[str, Any]], annotation: list[dict[str, Any]]) -> Tensor:
    given = {int(result["instance_id"]): result["caption"] for result in results}
    captions = [given[place] for place in range(len(annotation))]
    return torch.tensor([cider_of_each(captions, [record["caption"] for record in annotation])])


def stopped_scores(scores: Tensor) -> Tensor:
    """Return each example's scores in the epoch that the other half of the examples chooses.

    A best epoch that the reported examples chose themselves would flatter. So the examples with even places choose for
    those with odd places, and the reverse, each by the mean of their scores; the first of equal epochs counts.

    Args:
        scores: ``(epochs, scores per example, examples)``.

    Returns:
        ``(scores per example, examples)``.
    """
    found = torch.empty_like(scores[0])
    for own, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        epoch = int(scores[:, :, other].double().mean(dim=(1, 2)).argmax())
        found[:, own] = scores[epoch][:, own]
    return found
