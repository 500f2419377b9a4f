r"""Retrieval-DPO's losses, computed from the scores of a policy and a reference policy, and their settings.

The policy over a gallery is :math:`\pi(j \mid q) = \mathrm{softmax}_j(s(q, j) / \tau)`. The normaliser cancels in the
difference between the right image p and a wrong image n, so that DPO's implicit reward margin needs scores alone:

.. math:: h_n = (s_p - s_n) - (s^\mathrm{ref}_p - s^\mathrm{ref}_n)

Scores are cosines. DPO's :math:`\beta / \tau` is the single number ``beta`` here, the slope per cosine, whose meaning
does not depend on the temperature.

Source: DPO (arXiv 2305.18290); the sources of the variants stand beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin.core.settings import Limits, NotNegativeNumber, PositiveNumber, Section, one_of

VARIANTS = ("sigmoid", "label_smoothed", "robust", "hinge", "ipo", "sdpo", "listwise")
REFERENCES = ("start", "mined", "none")
POSITIVES = ("target", "image")


@dataclass(frozen=True)
class PreferenceSettings(Section):
    r"""Settings under ``run.dpo`` of Retrieval-DPO's loss :math:`L = L_\mathrm{DPO} + a L_\mathrm{InfoNCE}`.

    Attributes:
        variant: Loss of a right and its wrong images; :func:`preference_losses` has the equations.
        beta: Slope per cosine, DPO's :math:`\beta` divided by the temperature; 10 to 20 is usual. The seed paper's
            0.1 at CLIP's logit scale of 100 is 10 here.
        epsilon: Assumed share of wrong preferences, >= 0 and < 0.5, for ``label_smoothed`` and ``robust``.
        anchor: Weight a >= 0 of the in-batch contrastive loss, which has the role of DPO's supervised fine-tuning term.
            "ITC plus 0.4 DPO" is 2.5.
        reference: Reference policy: ``start`` is a frozen copy of the trained weights before the first step; ``mined``
            takes the scores in ``run.negatives.file``, so that no second policy is in memory; ``none`` drops the second
            half of h (reference-free).
        positive: Right image of a triplet: ``target``, or ``image``, the reference image, as in the released code.

    Raises:
        ValueError: If values are impossible; the message has one sentence for each.
    """

    WHERE = "run.dpo"

    variant: Annotated[str, one_of(VARIANTS)] = "sigmoid"
    beta: PositiveNumber = 10.0
    epsilon: Annotated[float, Limits(ge=0, lt=0.5)] = 0.1
    anchor: NotNegativeNumber = 2.5
    reference: Annotated[str, one_of(REFERENCES)] = "start"
    positive: Annotated[str, one_of(POSITIVES)] = "target"


def reward_margins(scores: Tensor, reference_scores: Tensor | None = None) -> Tensor:
    """Return the reward margin h of each wrong image, in cosines.

    Args:
        scores: Policy's scores of the right image and then of K wrong ones, ``(B, 1 + K)``.
        reference_scores: Reference policy's scores of the same images, or ``None`` for reference-free margins.

    Returns:
        The margins, ``(B, K)``.

    Examples:
        The policy prefers the right image by 0.5 to the first wrong one and by 0 to the second, the reference policy
        by 0.25 to both.

        >>> scores, reference = torch.tensor([[0.75, 0.25, 0.75]]), torch.tensor([[0.5, 0.25, 0.25]])
        >>> reward_margins(scores, reference)
        tensor([[ 0.2500, -0.2500]])
    """
    margins = scores[:, :1] - scores[:, 1:]
    if reference_scores is None:
        return margins
    return margins - (reference_scores[:, :1] - reference_scores[:, 1:])


def preference_losses(margins: Tensor, present: Tensor, scores: Tensor, settings: PreferenceSettings) -> Tensor:
    r"""Return the loss of each query.

    With :math:`x_n = \beta h_n`, the loss is the mean over a query's wrong images n of the variant's term, except for
    ``sdpo`` and ``listwise``:

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

    At h = 0 and K = 1 the loss is log 2, except for ``hinge`` (1) and ``ipo`` (1/4); ``sdpo`` is log(1 + K) at h = 0.
    ``sdpo`` and ``listwise`` equal ``sigmoid`` for K = 1, ``label_smoothed`` and ``robust`` equal it for epsilon = 0.

    Args:
        margins: Margins h in cosines, ``(B, K)``.
        present: Mask ``(B, K)``, false in the places that a query with fewer than K wrong images leaves empty.
        scores: Policy's cosines, ``(B, 1 + K)``; only ``listwise`` reads them.
        settings: Settings with variant, beta and epsilon.

    Returns:
        The losses, ``(B,)``; a query without a wrong image has 0.

    Examples:
        At the start of training every margin is 0, and the loss is log 2. A query without a wrong image has none.

        >>> margins, present = torch.zeros(2, 1), torch.tensor([[True], [False]])
        >>> losses = preference_losses(margins, present, torch.zeros(2, 2), PreferenceSettings())
        >>> [round(loss, 4) for loss in losses.tolist()]
        [0.6931, 0.0]
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
    """Return the change of DCG by an exchange of the right image with each wrong one, ``(B, K)``; 0 for absent ones."""
    known = torch.cat([scores[:, :1], scores[:, 1:].masked_fill(~present, -torch.inf)], dim=1).detach()
    ranks = known.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
    gains = 1 / torch.log2(1 + ranks.double())
    return ((gains[:, :1] - gains[:, 1:]).abs() * present).float()
