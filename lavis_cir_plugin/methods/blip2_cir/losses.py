"""Losses of ``blip2_cir`` by name: contrastive, contrastive of the text alone, alignment of the prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin.models.contrastive_losses import contrastive_loss


def alignment_loss(sentence_prompt: Tensor, prompt_tokens: Tensor) -> Tensor:
    r"""Pull the mean sentence prompt to the mean learned prompt.

    .. math:: L = \lVert \bar Z - \mathrm{stopgrad}(\bar P) \rVert_2^2 / H \quad\text{averaged over the batch}

    Args:
        sentence_prompt: Query outputs Z of the first Q-Former pass, ``(B, N, H)``.
        prompt_tokens: Learned prompt P, ``(1, N, H)``; it receives no gradient.

    Examples:
        The means over N = 2 tokens are (2, 0) and (0, 0), and (2² + 0²) / 2 = 2.

        >>> import torch
        >>> alignment_loss(torch.tensor([[[1.0, 0.0], [3.0, 0.0]]]), torch.zeros(1, 2, 2))
        tensor(2.)

    Source: SPRC (arXiv 2310.05473), prompt alignment.
    """
    mean_prompt = prompt_tokens.detach().mean(dim=1).expand(sentence_prompt.shape[0], -1)
    return F.mse_loss(sentence_prompt.mean(dim=1), mean_prompt)


@dataclass(frozen=True)
class TrainingOutputs:
    """Outputs of a model for a batch of B triplets, from which the losses are computed.

    Attributes:
        query: Unit-length queries ``(B, D)``, fused from reference image and text.
        targets: Unit-length targets ``(B, K, D)``; row i is the target of query i.
        temperature: Number > 0 by which scores are divided.
        target_ids: ``(B,)`` int64, equal for the same image; ``None`` if unknown.
        text_query: Unit-length queries ``(B, D)`` from the text and the learned prompt, without the image. This and
            the next two are ``None`` in a model without a prompt.
        sentence_prompt: Query outputs of the first pass, ``(B, N, H)``.
        prompt_tokens: Learned prompt, ``(1, N, H)``.
        label_smoothing: Label smoothing of the contrastive losses, >= 0 and < 1.
    """

    query: Tensor
    targets: Tensor
    temperature: Tensor
    target_ids: Tensor | None = None
    text_query: Tensor | None = None
    sentence_prompt: Tensor | None = None
    prompt_tokens: Tensor | None = None
    label_smoothing: float = 0.0


def itc(out: TrainingOutputs) -> Tensor:
    """Contrast the fused query with the targets."""
    return contrastive_loss(out.query, out.targets, out.temperature, out.target_ids, out.label_smoothing)


def rtc(out: TrainingOutputs) -> Tensor:
    """Contrast the text-only query with the targets (SPRC); the model must have a learned prompt."""
    query = _prompted(out.text_query)
    return contrastive_loss(query, out.targets, out.temperature, out.target_ids, out.label_smoothing)


def align(out: TrainingOutputs) -> Tensor:
    """Align the sentence prompt with the learned prompt (SPRC); the model must have a learned prompt."""
    return alignment_loss(_prompted(out.sentence_prompt), _prompted(out.prompt_tokens))


LOSSES: dict[str, Callable[[TrainingOutputs], Tensor]] = {"itc": itc, "rtc": rtc, "align": align}


def _prompted(output: Tensor | None) -> Tensor:
    if output is None:
        raise ValueError("the losses rtc and align need a model with a learned prompt (model.fusion: sentence_prompt).")
    return output
