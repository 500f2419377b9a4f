r"""Retrieval-DPO as pure functions: scores of a policy and of a reference policy in, one loss per query out.

The policy over a gallery is :math:`\pi(j \mid q) = \mathrm{softmax}_j(s(q, j) / \tau)`. In the difference between the
right image p and a wrong one n the normaliser cancels, so that DPO's implicit reward margin needs scores alone:

.. math:: h_n = (s_p - s_n) - (s^\mathrm{ref}_p - s^\mathrm{ref}_n)

Scores are cosines. DPO's :math:`\beta / \tau` is one number here, ``beta``, the slope per cosine, so that it means the
same for every temperature.

Source: DPO (arXiv 2305.18290); the variants name theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin.core.sentences import did_you_mean
from lavis_cir_plugin.core.settings import is_number

VARIANTS = ("sigmoid", "label_smoothed", "robust", "hinge", "ipo", "sdpo", "listwise")
REFERENCES = ("start", "mined", "none")
POSITIVES = ("target", "image")


@dataclass(frozen=True)
class PreferenceSettings:
    r"""Settings of Retrieval-DPO, as they stand under ``run.dpo``: :math:`L = L_\mathrm{DPO} + a L_\mathrm{InfoNCE}`.

    Attributes:
        variant: Of :func:`preference_losses`.
        beta: Slope per cosine, > 0: DPO's :math:`\beta` divided by the temperature. The seed paper's 0.1 at CLIP's
            logit scale of 100 is 10 here.
        epsilon: Share of preferences taken to be wrong, >= 0 and < 0.5; of ``label_smoothed`` and ``robust``.
        anchor: Weight a >= 0 of the in-batch contrastive loss, the term that supervised fine-tuning is to DPO. "ITC
            plus 0.4 DPO" is 2.5.
        reference: The reference policy: ``start``, a frozen copy of what is trained as it was before the first step;
            ``mined``, the scores in ``run.negatives.file``, so that no second policy is in memory; ``none``, h without
            its second half (reference-free).
        positive: ``target``; or ``image``, the reference image in the target's place, as the released code has it.

    Raises:
        ValueError: One sentence per impossible value, all at once.
    """

    variant: str = "sigmoid"
    beta: float = 10.0
    epsilon: float = 0.1
    anchor: float = 2.5
    reference: str = "start"
    positive: str = "target"

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        problems = list(self._problems())
        if problems:
            raise ValueError(" ".join(problems))

    def _problems(self) -> Iterator[str]:
        for key, allowed in {"variant": VARIANTS, "reference": REFERENCES, "positive": POSITIVES}.items():
            value = getattr(self, key)
            if value not in allowed:
                yield f"run.dpo.{key} must be one of {', '.join(allowed)}, got {value!r}{did_you_mean(value, allowed)}"
        if not is_number(self.beta) or self.beta <= 0:
            yield f"run.dpo.beta must be a number > 0 (slope per cosine; 10 to 20 is usual), got {self.beta!r}."
        if not is_number(self.epsilon) or not 0 <= self.epsilon < 0.5:
            yield f"run.dpo.epsilon must be a number >= 0 and < 0.5, got {self.epsilon!r}."
        if not is_number(self.anchor) or self.anchor < 0:
            yield f"run.dpo.anchor must be a number >= 0, got {self.anchor!r}."


def reward_margins(scores: Tensor, reference_scores: Tensor | None = None) -> Tensor:
    """Return h of each wrong image, in cosines.

    Args:
        scores: ``(B, 1 + K)`` the policy's: of the right image, then of K wrong ones.
        reference_scores: Likewise of the reference policy; ``None``: reference-free.

    Returns:
        ``(B, K)``.
    """
    margins = scores[:, :1] - scores[:, 1:]
    if reference_scores is None:
        return margins
    return margins - (reference_scores[:, :1] - reference_scores[:, 1:])


def preference_losses(margins: Tensor, present: Tensor, scores: Tensor, settings: PreferenceSettings) -> Tensor:
    r"""Return the loss of each query; with :math:`x_n = \beta h_n` and the mean over a query's n unless said otherwise.

    ==================  ==========================================================================================
    ``sigmoid``         :math:`-\log \sigma(x_n)` (DPO, arXiv 2305.18290)
    ``label_smoothed``  :math:`-(1 - \epsilon) \log \sigma(x_n) - \epsilon \log \sigma(-x_n)` (conservative DPO)
    ``robust``          :math:`[-(1 - \epsilon) \log \sigma(x_n) + \epsilon \log \sigma(-x_n)] / (1 - 2 \epsilon)`
                        (arXiv 2403.00409)
    ``hinge``           :math:`\max(0, 1 - x_n)` (SLiC, arXiv 2305.10425)
    ``ipo``             :math:`(x_n - \frac12)^2`, IPO's :math:`(h_n - 1 / 2 \beta)^2` times :math:`\beta^2`, so that
                        ``beta`` alone does not change how fast it learns (arXiv 2310.12036)
    ``sdpo``            :math:`-\log \sigma(-\log \sum_n e^{-x_n})`, one softmax over all n (S-DPO, arXiv 2406.09215)
    ``listwise``        :math:`-\sum_n w_n \log \sigma(x_n)`, :math:`w_n \propto |1 / \log_2(1 + r_p)
                        - 1 / \log_2(1 + r_n)|` with ranks r from 1 among the 1 + K images by the policy's scores,
                        the weights without gradient and of sum 1 (LiPO-:math:`\lambda`, arXiv 2402.01878, whose
                        weights are not normalised)
    ==================  ==========================================================================================

    At h = 0 and K = 1 all but ``hinge`` (1), ``ipo`` (1/4) are log 2; ``sdpo`` is log(1 + K). With K = 1 ``sdpo`` and
    ``listwise``, and with epsilon = 0 ``label_smoothed`` and ``robust``, are ``sigmoid``.

    Args:
        margins: ``(B, K)`` h, in cosines.
        present: ``(B, K)`` bool, false where a query has fewer than K wrong images.
        scores: ``(B, 1 + K)`` the policy's cosines; read by ``listwise`` alone.
        settings: Variant, beta and epsilon.

    Returns:
        ``(B,)``; 0 for a query without a wrong image.
    """
    exponent = (settings.beta * margins).masked_fill(~present, 0)
    if settings.variant == "sdpo":
        # Without a wrong image the sum is 0 and its logarithm -inf, of which softplus is 0.
        return F.softplus(torch.logsumexp((-exponent).masked_fill(~present, -torch.inf), dim=1))
    epsilon = settings.epsilon
    right, wrong = F.softplus(-exponent), F.softplus(exponent)  # -log sigma(x), -log sigma(-x)
    by_pair = {
        "sigmoid": lambda: right,
        "listwise": lambda: right,
        "label_smoothed": lambda: (1 - epsilon) * right + epsilon * wrong,
        "robust": lambda: ((1 - epsilon) * right - epsilon * wrong) / (1 - 2 * epsilon),
        "hinge": lambda: F.relu(1 - exponent),
        "ipo": lambda: (exponent - 0.5).square(),
    }[settings.variant]()
    weights = _rank_weights(scores, present) if settings.variant == "listwise" else present.float()
    return (by_pair * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(torch.finfo(weights.dtype).tiny)


def _rank_weights(scores: Tensor, present: Tensor) -> Tensor:
    """Return what exchanging the right image with each wrong one changes in DCG: ``(B, K)``, 0 where none is."""
    known = torch.cat([scores[:, :1], scores[:, 1:].masked_fill(~present, -torch.inf)], dim=1).detach()
    ranks = known.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    gains = 1 / torch.log2(1 + ranks.double())
    return ((gains[:, :1] - gains[:, 1:]).abs() * present).float()
