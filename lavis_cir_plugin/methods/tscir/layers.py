"""The trained layers of TSCIR: mapping network, visual injection and composing adapter."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.distributed.nn.functional as dist_with_grad
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor, nn

from lavis_cir_plugin.core.processes import rank_and_world
from lavis_cir_plugin.models.open_clip_towers import replace_at_positions


class MappingNetwork(nn.Module):
    r"""Maps an image to the embedding of a word, and its patches to the inputs of the injections.

    .. math:: s_0 = W_3\,\phi(W_2\,\phi(W_1 g + b_1) + b_2) + b_3, \quad \phi = \mathrm{ReLU} \circ \mathrm{Dropout},
              \qquad P' = W_p P + b_p

    The un-normalised image feature is g. With the widths of ViT-L/14 (768, 512, 512, 768) the network has 1,640,960
    parameters: 1,050,368 like Pic2Word's network (arXiv 2302.03084), and 590,592 in :math:`W_p`.

    Args:
        feature_width: Width D of g and of the patches.
        word_width: Width W of the text tower's embeddings.
        hidden_width: Width of the two hidden layers.
        dropout: Dropout probability, >= 0 and < 1.
        with_patches: Whether the network has :math:`W_p`, which would get no gradient without injections.
        activation: ``relu`` after the dropout; or ``gelu`` before it, as in the networks of SEARLE (arXiv 2303.15247)
            and LinCIR. A network with ``gelu`` has a buffer of this name, so that a checkpoint of the other kind does
            not load.

    Source: TSCIR (arXiv 2504.17990), stage I.
    """

    def __init__(
        self,
        feature_width: int,
        word_width: int,
        hidden_width: int = 512,
        dropout: float = 0.1,
        with_patches: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.word = nn.Sequential(
            nn.Linear(feature_width, hidden_width),
            *_between(activation, dropout),
            nn.Linear(hidden_width, hidden_width),
            *_between(activation, dropout),
            nn.Linear(hidden_width, word_width),
        )
        if activation == "gelu":
            self.register_buffer("gelu", torch.ones(1))
        self.patches = nn.Linear(feature_width, feature_width) if with_patches else None

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the word ``(B, W)`` and the mapped patches ``(B, P, D)`` of image tokens ``(B, 1 + P, D)``."""
        return self.word(tokens[:, 0]), None if self.patches is None else self.patches(tokens[:, 1:])


def _between(activation: str, dropout: float) -> tuple[nn.Module, nn.Module]:
    """Return the two modules that follow a hidden layer, in the activation's order."""
    return (nn.GELU(), nn.Dropout(dropout)) if activation == "gelu" else (nn.Dropout(dropout), nn.ReLU())


class VisualInjection(nn.Module):
    r"""Adds information from the patches to the hidden state of the pseudo-word, after one block of the text tower.

    .. math:: h_s \leftarrow h_s + A(h_s, h_\mathrm{EOT}, P'), \qquad
        V = \mathrm{ReLU}(\mathrm{BN}(\mathrm{conv}_{3 \times 3} P')), \quad
        q_0 = f_s(h_s) + f_e(h_\mathrm{EOT}), \quad K = f_v(V), \\
        q_{n+1} = \mathrm{LN}(q_n + W'_n\,\mathrm{GELU}(W_n\,\mathrm{MHA}_n(q_n, K, K))), \qquad
        A = \mathrm{ReLU}(W_b\,\mathrm{ReLU}(W_a q_2))

    :math:`f_s, f_e, f_v` have two layers with a ReLU between them. With text and patch width 768 an injection has
    6,543,104 parameters.

    Only this number and a description are published. Of the widths that give the number, this class takes those whose
    layers have biases and one normalisation each: all hidden layers are ``width`` wide, except the one before the last
    layer, which is as wide as the text tower (768).

    Args:
        word_width: Width W of the text tower.
        patch_width: Width D of the patches.
        width: Width of query, key and value.
        heads: Number of attention heads, a divisor of ``width``.
        layers: Number of attention layers.

    Source: TSCIR (arXiv 2504.17990), visual semantic injection.
    """

    def __init__(self, word_width: int, patch_width: int, width: int = 128, heads: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(patch_width, patch_width, kernel_size=3, padding=1, bias=False)
        self.norm = GatheredBatchNorm2d(patch_width)
        self.from_word = _two_layers(word_width, width, width)
        self.from_end = _two_layers(word_width, width, width)
        self.from_patches = _two_layers(patch_width, width, width)
        self.layers = nn.ModuleList(_AttentionLayer(width, heads) for _ in range(layers))
        self.to_word = nn.Sequential(*_two_layers(width, word_width, word_width), nn.ReLU())

    def attend(self, word: Tensor, end: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vector to add to the word, ``(B, W)``, and the last layer's attention, ``(B, P)``, of row sum 1.

        Args:
            word: Hidden state of the pseudo-word, ``(B, W)``.
            end: Hidden state of the position that is read, ``(B, W)``.
            patches: Mapped patches ``(B, P, D)``, of which P is a square number.
        """
        side = math.isqrt(patches.shape[1])
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        seen = F.relu(self.norm(self.conv(grid))).flatten(2).transpose(1, 2)
        key = self.from_patches(seen)
        query = (self.from_word(word) + self.from_end(end))[:, None]
        weights = query.new_empty(0)
        for layer in self.layers:
            query, weights = layer(query, key)
        return self.to_word(query[:, 0]), weights[:, 0]

    def forward(self, hidden: Tensor, place: Tensor, read: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the hidden states ``(B, L, W)`` after injection at positions ``place`` ``(B,)``, and the attention."""
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        word = hidden[rows, place]
        added, weights = self.attend(word, hidden[rows, read], patches)
        return replace_at_positions(hidden, place, word + added), weights


class ComposingAdapter(nn.Module):
    r"""A low-rank residual on every token after one block of the text tower.

    .. math:: x \leftarrow x + x A B, \qquad A \in \mathbb{R}^{W \times r},\ B \in \mathbb{R}^{r \times W},
              \quad A_{ij}, B_{ij} \sim 0.01\,N(0, 1)

    Six adapters of rank 128 at width 768 have 1,179,648 parameters.

    Args:
        width: Width W of the hidden states.
        rank: Rank r, >= 1.

    Source: TSCIR (arXiv 2504.17990), stage II.
    """

    def __init__(self, width: int, rank: int = 128) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(width, rank) * 0.01)
        self.up = nn.Parameter(torch.randn(rank, width) * 0.01)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the adapted hidden states ``(B, L, W)``."""
        return hidden + hidden @ self.down @ self.up


class GatheredBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes' batches, on a CPU too.

    torch's ``SyncBatchNorm`` refuses a CPU. In one process, and in evaluation mode, this is exactly ``nn.BatchNorm2d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(B, C, H, W)`` by the batch's statistics in training and by the running ones in evaluation."""
        world = rank_and_world()[1]
        if not self.training or world == 1:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            values = input.float()
            count = values.numel() // values.shape[1] * world
            mean = _summed(values.sum(dim=(0, 2, 3))) / count
            centred = values - mean[:, None, None]
            variance = _summed(centred.square().sum(dim=(0, 2, 3))) / count
            self._remember(mean.detach(), variance.detach() * count / (count - 1))
            scale = cast(Tensor, self.weight) * (variance + self.eps).rsqrt()
            return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        cast(Tensor, self.num_batches_tracked).add_(1)
        momentum = cast(float, self.momentum)
        cast(Tensor, self.running_mean).lerp_(mean, momentum)
        cast(Tensor, self.running_var).lerp_(variance, momentum)


class _AttentionLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next query and its attention weights, averaged over heads."""
        found, weights = self.attention(query, key, key)
        return self.norm(query + self.feed_forward(found)), weights


def _two_layers(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, hidden), nn.ReLU(), nn.Linear(hidden, width_out))


def _summed(value: Tensor) -> Tensor:
    """Return the sum over processes, with gradients to each of them."""
    total: Tensor = dist_with_grad.all_reduce(value)
    return total
