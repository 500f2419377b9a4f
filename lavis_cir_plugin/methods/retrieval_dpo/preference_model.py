"""Retrieval-DPO's loss in place of a model's own loss, and the frozen reference policy.

The loss replaces that of any model with the interface `HasScores`. Names of weights, checkpoints, evaluation, adapters
and processes stay those of the model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lavis_cir_plugin.core.model_parts import keep_as_buffers
from lavis_cir_plugin.core.processes import rank_and_world
from lavis_cir_plugin.methods.retrieval_dpo.losses import PreferenceSettings, preference_losses, reward_margins
from lavis_cir_plugin.models.contrastive_losses import contrastive_loss


class HasScores(Protocol):
    """Interface of a model that Retrieval-DPO can train: features with gradients, whose products are scores."""

    @property
    def temperature(self) -> Tensor | float:
        """Number > 0 by which the anchor divides scores."""

    def query_features(self, samples: Mapping[str, Any]) -> Tensor:
        """Return unit-length queries ``(B, D)`` of ``image`` and ``text_input``."""

    def target_features(self, image: Tensor) -> Tensor:
        """Return unit-length features ``(B, D)``, or ``(B, T, D)``, of which the best-scoring token counts."""


def paired_scores(query: Tensor, features: Tensor) -> Tensor:
    r"""Return the scores of each query with its own images, :math:`s_{ij} = \max_t q_i \cdot v_{ijt}`.

    Args:
        query: Queries ``(B, D)``.
        features: Features of C images per query, ``(B, C, D)`` or ``(B, C, T, D)``.

    Returns:
        The scores ``(B, C)``, float32 also under autocast.
    """
    with torch.autocast(query.device.type, enabled=False):
        products = torch.einsum("bd,b...d->b...", query.float(), features.float())
        return products if products.dim() == 2 else products.amax(dim=2)


def candidate_features(model: Any, samples: Mapping[str, Any], positive: str = "target") -> Tensor:
    """Return the features of each query's right image and its K wrong ones: ``(B, 1 + K, ...)``."""
    right, wrong = samples[positive], samples["negatives"]
    features = model.target_features(torch.cat([right, wrong.flatten(0, 1)]))
    of_wrong = features[len(right) :].unflatten(0, wrong.shape[:2])
    return torch.cat([features[: len(right)].unsqueeze(1), of_wrong], dim=1)


class ReferencePolicy:
    """A frozen copy of a model's trained weights; frozen weights, such as an image tower's, are shared with the model.

    It is no sub-module of the model, so that no checkpoint holds it. A resumed run builds it from the same start.

    Args:
        model: Model before the first training step.
    """

    def __init__(self, model: nn.Module) -> None:
        shared: dict[int, Any] = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
        # A tokenizer has no weights, and copying a vocabulary takes longer than copying a small model.
        tokenizers = [part.tokenizer for part in model.modules() if hasattr(part, "tokenizer")]
        shared.update({id(tokenizer): tokenizer for tokenizer in tokenizers})
        self.model: Any = copy.deepcopy(model, shared).requires_grad_(False).eval()

    @torch.no_grad()
    def scores(self, samples: Mapping[str, Any], positive: str = "target") -> Tensor:
        """Return the cosines ``(B, 1 + K)`` of each query's right image and its K wrong ones."""
        return paired_scores(self.model.query_features(samples), candidate_features(self.model, samples, positive))


class PreferenceModel(nn.Module):
    """Mix-in before a model's class that replaces the loss by Retrieval-DPO's.

    The model stays in evaluation mode (no dropout, running batch statistics), because policy and reference policy must
    be the same function of their weights.
    """

    preference: PreferenceSettings

    def train(self, mode: bool = True) -> PreferenceModel:
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the loss of a batch of B triplets with K negatives each.

        Args:
            samples: A batch with ``image``, ``target`` and ``text_input`` as the model takes them; ``negatives``
                ``(B, K, ...)``, shaped like ``target``; the mask ``negatives_present`` ``(B, K)``;
                ``reference_scores`` ``(B, 1 + K)``, unless there is no reference policy; and optionally ``target_id``
                and ``image_id`` ``(B,)``.

        Returns:
            ``loss``; ``loss_dpo``, its mean over the queries with a negative on all processes; ``loss_itc``, if the
            anchor has weight; ``reward_accuracy`` and ``reward_margin``, the share of negatives with h > 0 and the mean
            h in cosines, nan without any negative; ``positive_drift``, the mean difference of the right image's score
            and its reference score; ``without_negative``, the share of queries without a negative.
        """
        settings = self.preference
        query = self.query_features(samples)  # type: ignore[operator]
        features = candidate_features(self, samples, settings.positive)
        scores, present = paired_scores(query, features), samples["negatives_present"]
        before = samples["reference_scores"].float() if settings.reference != "none" else None
        margins = reward_margins(scores, before)
        found = {"dpo": _mean_over_all(preference_losses(margins, present, scores, settings), present.any(dim=1))}
        loss = found["dpo"]
        if settings.anchor:
            ids = samples.get("target_id" if settings.positive == "target" else "image_id")
            smoothing = getattr(self, "label_smoothing", 0.0)
            found["itc"] = contrastive_loss(query, features[:, 0], self.temperature, ids, smoothing)  # type: ignore[arg-type]
            loss = loss + settings.anchor * found["itc"]
        measured = {
            "reward_accuracy": _mean_of(present, (margins > 0).float()),
            "reward_margin": _mean_of(present, margins),
            "without_negative": 1 - present.any(dim=1).float().mean(),
        }
        if before is not None:
            measured["positive_drift"] = (scores - before)[:, 0].mean()
        losses = {f"loss_{name}": value for name, value in found.items()}
        return {"loss": loss, **losses, **{name: value.detach() for name, value in measured.items()}}


def learn_preferences(model: nn.Module, settings: PreferenceSettings) -> None:
    """Replace a model's loss by Retrieval-DPO's, in place.

    The model's class becomes a subclass of the same name, so that its weights keep their names.
    """
    own = type(model)
    attributes = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    model.__class__ = type(own.__name__, (PreferenceModel, own), attributes)
    model.preference = settings  # type: ignore[assignment]
    model.eval()


def keep_unread_as_buffers(model: nn.Module, samples: Mapping[str, Any]) -> None:
    """Turn trained weights that the loss does not depend on into buffers, in place.

    DistributedDataParallel would wait for their gradients, and checkpoints would lack them if they were frozen.

    Args:
        model: Model with Retrieval-DPO's loss (:class:`PreferenceModel`).
        samples: Any batch.

    Raises:
        ValueError: If the model trains nothing.
    """
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not trained:
        raise ValueError(
            f"retrieval_dpo has nothing to train: all weights of {type(model).__name__} are frozen; set one of its "
            "freeze_ keys to false, or add adapters (run.lora)."
        )
    zeros = samples["image"].new_zeros(len(samples["image"]), 1 + samples["negatives"].shape[1], dtype=torch.float32)
    loss = model({**samples, "reference_scores": zeros})["loss"]
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    unread = {id(trained[name]): name for name, gradient in zip(trained, gradients) if gradient is None}
    keep_as_buffers(model, lambda weight: id(weight) in unread)
    if unread:
        logging.info("not trained, because no score depends on them: %s", ", ".join(unread.values()))


def _mean_of(present: Tensor, values: Tensor) -> Tensor:
    # An index by a mask would wait for a GPU, because the shape of its result depends on values.
    return values.masked_fill(~present, 0).sum() / present.sum()


def _mean_over_all(values: Tensor, counted: Tensor) -> Tensor:
    """Return this process's part of the mean of all processes' counted values.

    The average of the parts is the mean: DistributedDataParallel averages gradients, so each process divides its own
    sum by the average count.
    """
    count = counted.sum().float()
    world = rank_and_world()[1]
    if world > 1:
        dist.all_reduce(count)
        count = count / world
    return (values * counted).sum() / count.clamp_min(1 / world)
