"""CLIP's activation function, computed so that a number's result does not depend on its place in the tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class QuickGelu(nn.Module):
    r"""Computes :math:`x / (1 + e^{-1.702 x})`, which LAVIS and open_clip compute as x times torch's sigmoid.

    On a CPU torch's sigmoid has another function for the last numbers of each thread's share, which differs in the last
    bits. A picture's features would depend on the number of pictures and of threads. The power also takes half the
    time. On a GPU, in half precision and for a gradient the sigmoid stays.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of ``x``, of the same shape."""
        if x.device.type != "cpu" or x.dtype != torch.float32 or (torch.is_grad_enabled() and x.requires_grad):
            return x * torch.sigmoid(1.702 * x)
        divisor = (-1.702 * x).exp_().add_(1)
        return torch.div(x, divisor, out=divisor)


def replace_quick_gelu(tower: nn.Module) -> None:
    """Let every QuickGELU of LAVIS or open_clip in a tower be a `QuickGelu`; the results are equal up to rounding."""
    for module in tower.modules():
        # Each of the two libraries has a class of this name, without any state; to import open_clip takes seconds.
        if type(module).__name__ == "QuickGELU":
            module.__class__ = QuickGelu
