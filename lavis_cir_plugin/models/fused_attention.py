"""Attention of LAVIS's EVA tower computed by torch's fused kernel, which never stores the attention matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from lavis.models import eva_vit
from torch import Tensor, nn


class FusedAttention(eva_vit.Attention):
    """Computes LAVIS's attention, softmax(scale * q k^T + bias) v, by torch's ``scaled_dot_product_attention``.

    Parameters and their names are LAVIS's, and the results are equal up to rounding. In training mode LAVIS's own
    method runs, because the kernel's dropout would draw other random numbers.
    """

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        """Return the attention's output ``(B, N, C)`` for tokens ``(B, N, C)`` and a bias ``(heads, N, N)`` or None."""
        if self.training:
            return super().forward(x, rel_pos_bias)
        bias = None
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        added = self._position_bias(rel_pos_bias)
        mask = None if added is None else added.to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _position_bias(self, shared: Tensor | None) -> Tensor | None:
        """Return the sum of the layer's and the tower's relative position bias, ``(heads, N, N)``, or None."""
        if self.relative_position_bias_table is None:
            return shared
        own = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        return own if shared is None else own + shared


def fuse_attention(tower: nn.Module) -> None:
    """Let every EVA attention of a tower use the fused kernel, and leave other attention layers unchanged.

    LAVIS's CLIP tower needs no change: ``nn.MultiheadAttention`` calls the fused kernel unless weights are asked for.
    """
    for module in tower.modules():
        if type(module) is eva_vit.Attention:
            # The subclass adds no state, and LAVIS's constructor has no argument for the attention's class.
            module.__class__ = FusedAttention
