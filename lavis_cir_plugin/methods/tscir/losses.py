"""Compute the losses of TSCIR: soft text alignment and mixed negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin.models.contrastive_losses import contrastive_loss, features_of_all_processes, gather_with_gradient


def soft_text_alignment_loss(
    captions: Tensor, sentences: Tensor, images: Tensor, temperature: Tensor | float
) -> Tensor:
    r"""Let captions see the pseudo-word sentences as they see the images.

    .. math:: p_i = \mathrm{softmax}_j(c_i \cdot t_j / \tau), \quad q_i = \mathrm{softmax}_j(c_i \cdot v_j / \tau),
              \qquad L_\mathrm{sta} = \frac1B \sum_i \mathrm{KL}(q_i \,\|\, p_i)

    j runs over the batches of all processes.

    Args:
        captions: c ``(B, D)``, unit length.
        sentences: t ``(B, D)``, unit length: features of sentences with the images' pseudo-words.
        images: v ``(B, D)``, unit length.
        temperature: :math:`\tau > 0`, divides.

    Returns:
        Scalar >= 0; 0 where sentences and images look the same to every caption.

    Source: TSCIR (arXiv 2504.17990), soft text alignment.
    """
    with torch.autocast(captions.device.type, enabled=False):
        of_sentences = captions.float() @ gather_with_gradient(sentences).float().T / temperature
        of_images = captions.float() @ gather_with_gradient(images).float().T / temperature
        wanted = of_images.log_softmax(dim=1)
        return F.kl_div(of_sentences.log_softmax(dim=1), wanted, reduction="batchmean", log_target=True)


def mixed_negatives_loss(
    query: Tensor,
    targets: Tensor,
    temperature: float,
    target_ids: Tensor | None = None,
    negatives: int = 10,
    scaled: bool = True,
) -> Tensor:
    r"""Contrast queries and targets both ways, the queries also with mixtures of right and wrong targets.

    .. math:: \tilde w_{ij} = a_{ij} w_i + (1 - a_{ij}) w_j, \qquad
              a_{ij} = \frac{w_i \cdot w_j - \min_l w_i \cdot w_l}{1 - \min_l w_i \cdot w_l}, \qquad
              L = \tfrac12 \left( \mathrm{CE}_\mathrm{image \to query}
              + \mathrm{CE}_\mathrm{query \to image, mixtures} \right)

    For query i, j runs over its ``negatives`` best-scored wrong targets of the batches of all processes; the mixtures
    are further columns of its row. They are not normalised again, so that their score is the same mixture of scores.
    The smallest cosine of a row becomes 0 and the target with itself 1, so no wrong target is mixed away completely.
    Known is "min-max scaled"; whether over a row or the batch, and the half, is this package's choice: without
    mixtures the loss is :func:`symmetric_contrastive_loss`.

    Args:
        query: ``(B, D)``, unit length.
        targets: w ``(B, D)``, unit length; row i is the target of query i.
        temperature: > 0, divides.
        target_ids: ``(B,)`` int64; equal ids are the same image, which is no negative.
        negatives: k >= 0 mixtures for each query, at most as many as there are wrong targets.
        scaled: Whether the mixtures' scores are divided by the temperature like all others. The released code forgets
            to (``False``): then a mixture's logit is at most 1, where the target's is up to 1 / temperature = 100, and
            the mixtures hardly matter.

    Source: TSCIR (arXiv 2504.17990), hard negatives by mixing.
    """
    to_query = contrastive_loss(targets, query, temperature, target_ids)
    everyone, own, repeated = features_of_all_processes(targets, target_ids)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.float() @ everyone.float().T
        is_same = torch.zeros_like(scores, dtype=torch.bool) if repeated is None else repeated
        is_same[torch.arange(len(own), device=own.device), own] = True
        right = scores.gather(1, own[:, None])
        wrong = scores.masked_fill(is_same, -torch.inf)
        best, chosen = wrong.topk(min(negatives, wrong.shape[1] - 1), dim=1)
        alike = targets.float() @ everyone.float().T
        least = alike.amin(dim=1, keepdim=True)
        share = ((alike - least) / (1 - least).clamp_min(1e-6)).gather(1, chosen)
        # A row with fewer wrong targets has -inf among its best, which would make the gradient NaN.
        is_lacking = best.isneginf()
        mixed = share * right + (1 - share) * best.masked_fill(is_lacking, 0)
        mixed = mixed.masked_fill(is_lacking, -torch.inf)
        logits = [right, wrong, mixed if scaled else mixed * temperature]
        return (to_query + F.cross_entropy(torch.cat(logits, dim=1) / temperature, torch.zeros_like(own))) / 2
