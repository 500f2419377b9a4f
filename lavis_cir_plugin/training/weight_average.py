"""Exponential moving average of the trained weights, which is evaluated and saved in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    r"""The exponential moving average of a model's trainable tensors.

    .. math:: \bar\theta_n = d_n \bar\theta_{n-1} + (1 - d_n)\,\theta_n, \qquad d_n = \min(d, n / (9 + n))

    :math:`\theta_n` are the weights after the n-th step of the optimizer, and :math:`\bar\theta_0` are the weights at
    the start. The smaller first factors let the average forget the start, so that a short run can have a decay near 1.
    Buffers, such as the statistics of a batch norm, are not averaged.

    Args:
        model: Model whose trainable tensors are averaged.
        decay: Factor d, > 0 and < 1.

    Attributes:
        weights: The trainable tensors by name.
        updates: Number n of averaged steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.restart(0)

    def update(self) -> None:
        """Take the present weights into the average."""
        self.updates += 1
        decay = min(self.decay, self.updates / (9 + self.updates))
        own = [weight.detach() for weight in self.weights.values()]
        torch._foreach_lerp_(list(self._averages.values()), own, 1 - decay)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Let the model have the averages in place of its weights until the block ends."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def restart(self, updates: int) -> None:
        """Take the model's present weights as the average of so many steps."""
        self.updates = updates
        self._averages = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def trained(self) -> Mapping[str, Tensor]:
        """Return the weights that the optimizer moves, by name, for a checkpoint that holds the averages."""
        return {name: weight.detach() for name, weight in self.weights.items()}

    def _exchange(self) -> None:
        for name, weight in self.weights.items():
            weight.data, self._averages[name] = self._averages[name], weight.data
