"""Retrieval-DPO around a model: what it must offer, its reference policy, and its training step.

As weight perturbation stands around the call of a model, Retrieval-DPO stands in place of its loss: names of weights,
checkpoints, evaluation, adapters and processes stay what they are.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lavis_cir_plugin.core.processes import rank_and_world
from lavis_cir_plugin.methods.retrieval_dpo.losses import PreferenceSettings, preference_losses, reward_margins
from lavis_cir_plugin.models.contrastive_losses import contrastive_loss


class HasScores(Protocol):
    """What a model offers to be trained by Retrieval-DPO: features with gradients, whose products are scores."""

    @property
    def temperature(self) -> Tensor | float:
        """Divides scores, > 0; read by the anchor alone."""

    def query_features(self, samples: Mapping[str, Any]) -> Tensor:
        """Return unit-length ``(B, D)`` of ``image`` and ``text_input``."""

    def target_features(self, image: Tensor) -> Tensor:
        """Return unit-length ``(B, D)`` or ``(B, T, D)``, of which the best token counts."""


def paired_scores(query: Tensor, features: Tensor) -> Tensor:
    r"""Return the scores of each query's own images, :math:`s_{ij} = \max_t q_i \cdot v_{ijt}`.

    Args:
        query: ``(B, D)``.
        features: ``(B, C, D)`` or ``(B, C, T, D)``.

    Returns:
        ``(B, C)`` float32, also under autocast.
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
    """A frozen copy of the weights that are trained; what is frozen, such as an image tower, is shared with the model.

    Not a module of the model, so that no checkpoint holds it: a resumed run builds it from the same start.

    Args:
        model: As training starts.
    """

    def __init__(self, model: nn.Module) -> None:
        shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
        self.model: Any = copy.deepcopy(model, shared).requires_grad_(False).eval()

    @torch.no_grad()
    def scores(self, samples: Mapping[str, Any], positive: str = "target") -> Tensor:
        """Return ``(B, 1 + K)`` cosines as :class:`PreferenceModel` does."""
        return paired_scores(self.model.query_features(samples), candidate_features(self.model, samples, positive))


class PreferenceModel(nn.Module):
    """Mix-in that goes before a model's class: its loss is Retrieval-DPO's, all else is the model's own.

    It stays in evaluation mode (no dropout, running batch statistics), because policy and reference policy must be the
    same function of their weights, as they are in the first step.
    """

    preference: PreferenceSettings

    def train(self, mode: bool = True) -> PreferenceModel:
        """Stay in evaluation mode."""
        super().train(False)
        return self

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the loss of a batch of B triplets with K negatives each.

        Args:
            samples: ``image``, ``target`` and ``text_input`` as the model takes them; ``negatives`` ``(B, K, ...)``,
                like ``target``; ``negatives_present`` ``(B, K)`` bool; ``reference_scores`` ``(B, 1 + K)``, unless
                there is no reference policy; ``target_id`` and ``image_id`` ``(B,)``, optional.

        Returns:
            ``loss``; ``loss_dpo``, the mean over the queries with a negative, of all processes; ``loss_itc`` where the
            anchor has weight; and, in shares and cosines: ``reward_accuracy`` (h > 0) and ``reward_margin`` (h), over
            all negatives and nan without any; ``positive_drift`` (the right image's score less its reference), over all
            queries; ``without_negative``, the share of queries that have none.
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
            found["itc"] = contrastive_loss(query, features[:, 0], self.temperature, ids)  # type: ignore[arg-type]
            loss = loss + settings.anchor * found["itc"]
        measured = {
            "reward_accuracy": (margins > 0)[present].float().mean(),
            "reward_margin": margins[present].mean(),
            "without_negative": 1 - present.any(dim=1).float().mean(),
        }
        if before is not None:
            measured["positive_drift"] = (scores - before)[:, 0].mean()
        losses = {f"loss_{name}": value for name, value in found.items()}
        return {"loss": loss, **losses, **{name: value.detach() for name, value in measured.items()}}


def learn_preferences(model: nn.Module, settings: PreferenceSettings) -> None:
    """Give a model Retrieval-DPO's loss in place of its own, in place.

    Its class becomes a subclass of the same name, so that its weights keep their names.
    """
    own = type(model)
    attributes = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    model.__class__ = type(own.__name__, (PreferenceModel, own), attributes)
    model.preference = settings  # type: ignore[assignment]
    model.eval()


def keep_unread_as_buffers(model: nn.Module, samples: Mapping[str, Any]) -> None:
    """Turn the trained weights that the loss does not depend on into buffers, in place.

    DistributedDataParallel would wait for their gradients, and as frozen parameters they would be missing in
    checkpoints.

    Args:
        model: A :class:`PreferenceModel`.
        samples: A batch.

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
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in unread:
                del module._parameters[name]
                module.register_buffer(name, weight.detach())
    if unread:
        logging.info("not trained, because no score depends on them: %s", ", ".join(unread.values()))


def _mean_over_all(values: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of the counted values of all processes, once the processes' results are averaged.

    DistributedDataParallel averages gradients, so each process divides its own sum by the mean count.
    """
    count = counted.sum().float()
    world = rank_and_world()[1]
    if world > 1:
        dist.all_reduce(count)
        count = count / world
    return (values * counted).sum() / count.clamp_min(1 / world)
