"""Training losses of composed image retrieval as pure functions: tensors in, scalar out.

To add one, write the function and name it in ``LOSSES``; ``model.loss_weights.<name>`` then switches it on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_with_grad
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin.ranking import similarity


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all processes along dim 0, in rank order, keeping the gradient to each of them.

    Args:
        tensor: ``(B, ...)``, the same shape on every process.

    Returns:
        ``(world_size * B, ...)``; the tensor itself in a single process. With losses averaged over processes (as
        DistributedDataParallel does with gradients) the gradient equals the one of a single process that sees the
        whole batch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    if not tensor.requires_grad:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)
    return torch.cat(dist_with_grad.all_gather(tensor.contiguous()))


def contrastive_loss(
    query: Tensor, targets: Tensor, temperature: Tensor | float, target_ids: Tensor | None = None
) -> Tensor:
    r"""In-batch contrastive loss from query to target over the batches of all processes.

    .. math:: L = -\frac1B \sum_i \log \frac{\exp(s_{ii}/\tau)}{\exp(s_{ii}/\tau) + \sum_{j \in N_i} \exp(s_{ij}/\tau)},
              \qquad s_{ij} = \max_k q_i \cdot v_{jk}

    :math:`N_i` holds every target of the global batch that is another image than target i. CIRR repeats targets up to
    nine times; counting such a repetition as a negative would push the right answer away.

    Args:
        query: ``(B, D)``, unit length.
        targets: ``(B, K, D)`` or ``(B, D)``, unit length; row i is the target of query i.
        temperature: :math:`\tau > 0`, divides.
        target_ids: ``(B,)`` int64; equal ids mean the same image. ``None``: all targets are taken to differ.

    Returns:
        Scalar; ``log(world_size * B)`` when all scores are equal and no target repeats, 0 for a single target.

    Source: SPRC (arXiv 2310.05473) without the mask; BLIP-2 (arXiv 2301.12597) for the maximum over query tokens.
    """
    all_targets, positives, repeated = _everyone(targets, target_ids)
    # A cosine in half precision is off by up to 5e-4, which the temperature makes 0.7 % of a probability.
    with torch.autocast(query.device.type, enabled=False):
        logits = similarity(query.float(), all_targets.float()) / temperature
    if repeated is not None:
        logits = logits.masked_fill(repeated, -torch.inf)
    return F.cross_entropy(logits, positives)


def _everyone(targets: Tensor, target_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the targets of all processes, the place of each own one there, and where its image is repeated.

    The last is ``(B, N)``, false at the own place; ``None`` where no ids are known.
    """
    everyone = gather_with_gradient(targets)
    count, device = targets.shape[0], targets.device
    own = torch.arange(count, device=device) + (dist.get_rank() * count if everyone.shape[0] > count else 0)
    if target_ids is None:
        return everyone, own, None
    repeated = target_ids[:, None] == gather_with_gradient(target_ids)[None, :]
    repeated[torch.arange(count, device=device), own] = False
    return everyone, own, repeated


def symmetric_contrastive_loss(
    first: Tensor, second: Tensor, temperature: Tensor | float, ids: Tensor | None = None
) -> Tensor:
    r"""CLIP's contrastive loss: the mean of both directions of :func:`contrastive_loss`.

    .. math:: L_\mathrm{con}(a, b) = \tfrac12 \left( L(a \to b) + L(b \to a) \right)

    Args:
        first: ``(B, D)``, unit length.
        second: ``(B, D)``, unit length; row i belongs to row i of the first.
        temperature: > 0, divides.
        ids: ``(B,)`` int64; rows with equal ids are not negatives of each other.

    Source: CLIP (arXiv 2103.00020).
    """
    there = contrastive_loss(first, second, temperature, ids)
    return (there + contrastive_loss(second, first, temperature, ids)) / 2


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
    everyone, own, repeated = _everyone(targets, target_ids)
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


def alignment_loss(sentence_prompt: Tensor, prompt_tokens: Tensor) -> Tensor:
    r"""Pull the mean sentence prompt to the mean learned prompt.

    .. math:: L = \lVert \bar Z - \mathrm{stopgrad}(\bar P) \rVert_2^2 / H \quad\text{averaged over the batch}

    Args:
        sentence_prompt: ``(B, N, H)``, the query outputs Z of the first Q-Former pass.
        prompt_tokens: ``(1, N, H)``, the learned prompt P; receives no gradient.

    Source: SPRC (arXiv 2310.05473), prompt alignment.
    """
    mean_prompt = prompt_tokens.detach().mean(dim=1).expand(sentence_prompt.shape[0], -1)
    return F.mse_loss(sentence_prompt.mean(dim=1), mean_prompt)


@dataclass(frozen=True)
class TrainingOutputs:
    """What a model offers to the losses of one batch of B triplets.

    Attributes:
        query: ``(B, D)``, unit length, fused from reference image and text.
        targets: ``(B, K, D)``, unit length; row i is the target of query i.
        temperature: Divides scores, > 0.
        target_ids: ``(B,)`` int64, equal for the same image; ``None`` if unknown.
        text_query: ``(B, D)``, unit length, from the text and the learned prompt without the image; ``None`` in a
            model without a prompt, like the next two.
        sentence_prompt: ``(B, N, H)``, query outputs of the first pass.
        prompt_tokens: ``(1, N, H)``, the learned prompt.
    """

    query: Tensor
    targets: Tensor
    temperature: Tensor
    target_ids: Tensor | None = None
    text_query: Tensor | None = None
    sentence_prompt: Tensor | None = None
    prompt_tokens: Tensor | None = None


def itc(out: TrainingOutputs) -> Tensor:
    """Contrast the fused query with the targets."""
    return contrastive_loss(out.query, out.targets, out.temperature, out.target_ids)


def rtc(out: TrainingOutputs) -> Tensor:
    """Contrast the text-only query with the targets (SPRC); needs a learned prompt."""
    return contrastive_loss(_prompted(out.text_query), out.targets, out.temperature, out.target_ids)


def align(out: TrainingOutputs) -> Tensor:
    """Align the sentence prompt with the learned prompt (SPRC); needs a learned prompt."""
    return alignment_loss(_prompted(out.sentence_prompt), _prompted(out.prompt_tokens))


LOSSES: dict[str, Callable[[TrainingOutputs], Tensor]] = {"itc": itc, "rtc": rtc, "align": align}


def _prompted(output: Tensor | None) -> Tensor:
    if output is None:
        raise ValueError("the losses rtc and align need a model with a learned prompt (model.fusion: sentence_prompt).")
    return output
