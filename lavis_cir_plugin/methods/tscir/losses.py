"""Losses of TSCIR: soft text alignment, and contrast with mixed negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin.models.contrastive_losses import contrastive_loss, features_of_all_processes, gather_with_gradient


def soft_text_alignment_loss(
    captions: Tensor, sentences: Tensor, images: Tensor, temperature: Tensor | float
) -> Tensor:
    r"""Pull the captions' similarities to pseudo-word sentences to their similarities to the images.

    .. math:: p_i = \mathrm{softmax}_j(c_i \cdot t_j / \tau), \quad q_i = \mathrm{softmax}_j(c_i \cdot v_j / \tau),
              \qquad L_\mathrm{sta} = \frac1B \sum_i \mathrm{KL}(q_i \,\|\, p_i)

    The index j runs over the batches of all processes.

    Args:
        captions: Unit-length features c of captions, ``(B, D)``.
        sentences: Unit-length features t of sentences with the images' pseudo-words, ``(B, D)``.
        images: Unit-length features v of images, ``(B, D)``.
        temperature: :math:`\tau > 0`, by which similarities are divided.

    Returns:
        A scalar >= 0, which is 0 if every caption is as similar to each sentence as to its image.

    Examples:
        >>> captions, images = torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> soft_text_alignment_loss(captions, images, images, 0.07)
        tensor(0.)
        >>> bool(soft_text_alignment_loss(captions, captions, images, 0.07) > 0)
        True

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
    r"""Contrast queries and targets both ways, and queries also with mixtures of right and wrong targets.

    .. math:: \tilde w_{ij} = a_{ij} w_i + (1 - a_{ij}) w_j, \qquad
              a_{ij} = \frac{w_i \cdot w_j - \min_l w_i \cdot w_l}{1 - \min_l w_i \cdot w_l}, \qquad
              L = \tfrac12 \left( \mathrm{CE}_\mathrm{image \to query}
              + \mathrm{CE}_\mathrm{query \to image, mixtures} \right)

    For query i, the index j runs over its ``negatives`` best-scored wrong targets of the batches of all processes, and
    the mixtures are further columns of its row. They are not normalised again, so that their scores are the same
    mixtures of scores. The scaling of a row maps its smallest cosine to 0 and the target's cosine with itself to 1, so
    no wrong target is mixed away completely. The paper says "min-max scaled". This package chose to scale over a row,
    not the batch, and chose the factor 1/2, with which the loss without mixtures is
    :func:`symmetric_contrastive_loss`.

    Args:
        query: Unit-length queries, ``(B, D)``.
        targets: Unit-length targets w, ``(B, D)``; row i is the target of query i.
        temperature: Number > 0 by which scores are divided.
        target_ids: ``(B,)`` int64, equal for the same image, which is no negative.
        negatives: Number >= 0 of mixtures for each query, limited by the number of wrong targets.
        scaled: Whether the mixtures' scores are divided by the temperature, too. The released code does not do this
            (``False``): then a mixture's logit is at most 1, while the target's is up to 1 / temperature = 100, and the
            mixtures hardly matter.

    Examples:
        Without mixtures it is :func:`symmetric_contrastive_loss`. A mixture is a further wrong answer, which adds to
        the loss.

        >>> from lavis_cir_plugin.models.contrastive_losses import symmetric_contrastive_loss
        >>> query, targets = torch.eye(3), torch.tensor([[0.8, 0.6, 0.0], [0.0, 1.0, 0.0], [0.0, 0.6, 0.8]])
        >>> plain = mixed_negatives_loss(query, targets, 0.07, negatives=0)
        >>> torch.isclose(plain, symmetric_contrastive_loss(query, targets, 0.07))
        tensor(True)
        >>> bool(mixed_negatives_loss(query, targets, 0.07, negatives=2) > plain)
        True

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
        # A row with too few wrong targets has -inf among its best scores, which would make the gradient NaN.
        is_lacking = best.isneginf()
        mixed = share * right + (1 - share) * best.masked_fill(is_lacking, 0)
        mixed = mixed.masked_fill(is_lacking, -torch.inf)
        logits = [right, wrong, mixed if scaled else mixed * temperature]
        return (to_query + F.cross_entropy(torch.cat(logits, dim=1) / temperature, torch.zeros_like(own))) / 2
