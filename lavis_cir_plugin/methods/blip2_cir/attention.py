"""Multi-head attention to keys and values, and to image tokens, which are projected only where that takes less."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, heads: int, visible: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    r"""Return :math:`\mathrm{softmax}(q k^\top / \sqrt d)\, v` of each head, one after the other.

    Args:
        queries: ``(B, A, H)``; head i has the i-th d = H / heads of the H numbers, as in keys and values.
        keys: ``(B, S, H)``.
        values: ``(B, S, H)``.
        heads: Number of heads.
        visible: ``(B, 1, 1, S)`` bool, whether a position can be seen; ``None`` if all can be seen.
        dropout: Probability with which a weight of the attention is dropped.

    Returns:
        ``(B, A, H)``.
    """
    by_head = (states.unflatten(-1, (heads, -1)).transpose(1, 2) for states in (queries, keys, values))
    read = F.scaled_dot_product_attention(*by_head, attn_mask=visible, dropout_p=dropout)
    return read.transpose(1, 2).flatten(2)


class Projection(NamedTuple):
    """Weights of a linear layer: ``weight`` ``(H, W)`` and ``bias`` ``(H,)``."""

    weight: Tensor
    bias: Tensor

    def by_head(self, heads: int) -> Projection:
        """Return the weight as ``(heads, d, W)`` and the bias as ``(heads, d)``."""
        return Projection(*(part.unflatten(0, (heads, -1)) for part in self))


def attend_to_tokens(
    queries: Tensor, tokens: Tensor, key: Projection, value: Projection, heads: int, dropout: float = 0.0
) -> Tensor:
    r"""Return what `attend` returns for keys and values that are projections of tokens.

    Where `spares_products` says so, they are not computed. With a head's query q, its projections
    :math:`W_k, b_k, W_v, b_v`, and the tokens x,

    .. math::
        a &= \mathrm{softmax}\big(((q W_k)\, x^\top + q b_k) / \sqrt d\big) \\
        y &= (a x)\, W_v^\top + \big(\textstyle\sum a\big)\, b_v

    The terms are those of :math:`\mathrm{softmax}(q k^\top / \sqrt d)\, v` in another order. Tokens get no gradient.

    Args:
        queries: ``(B, K, H)``.
        tokens: ``(B, P, W)``.
        key: Weight ``(H, W)`` and bias ``(H,)`` of the keys.
        value: Those of the values.
        heads: Number of heads.
        dropout: Probability with which a weight of the attention is dropped.

    Returns:
        ``(B, K, H)``.
    """
    if not spares_products(queries, tokens, heads):
        return attend(queries, F.linear(tokens, *key), F.linear(tokens, *value), heads, dropout=dropout)
    asked = queries.unflatten(-1, (heads, -1))
    asked = asked * asked.shape[-1] ** -0.5
    weights = [part.to(tokens.dtype) for part in (asked, *key.by_head(heads), *value.by_head(heads))]
    with torch.autocast(tokens.device.type, enabled=False):
        return _TokenAttention.apply(tokens, *weights, dropout).flatten(2)  # type: ignore[no-any-return]


def spares_products(queries: Tensor, tokens: Tensor, heads: int) -> bool:
    """Return whether attention to tokens takes fewer multiplications if they are not projected, in both directions.

    Queries ``(B, K, H)`` then go six times through the projections, and four times from the W numbers of a token to
    scores or back, in each head. Otherwise P tokens go four times through the projections, and the queries six times
    through scores, of H numbers in all heads together. BLIP-2 has 32 queries and 12 heads, H = 768, P = 257 and
    W = 1024 or 1408, so two thirds are left.
    """
    (count, hidden), (places, width) = queries.shape[1:], tokens.shape[1:]
    unprojected = 6 * count * hidden * width + 4 * heads * count * places * width
    return unprojected < 4 * places * hidden * width + 6 * count * places * hidden


class _TokenAttention(torch.autograd.Function):
    """The equation of `attend_to_tokens` with its gradient.

    Autograd would copy the widest states, ``(B, K, heads, W)``, before every product, because one product goes through
    them by head and the next by image. Products that write where the next one reads need no copies, and the second
    product of each direction writes where the first one has been read.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        tokens: Tensor,
        queries: Tensor,
        key: Tensor,
        key_bias: Tensor,
        value: Tensor,
        value_bias: Tensor,
        dropout: float,
    ) -> Tensor:
        asked = _through(queries, key)
        scores = torch.bmm(_by_image(asked), tokens.transpose(1, 2))
        scores += _by_image((queries * key_bias).sum(-1, keepdim=True))
        # Half precision would lose the small weights and what distinguishes their gradients.
        attention = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        kept = F.dropout(torch.ones_like(attention), dropout) if dropout else None
        weights = (attention if kept is None else attention * kept).to(tokens.dtype)
        read = torch.bmm(weights, tokens, out=_by_image(asked)).view_as(asked)
        total = weights.sum(-1).view(*queries.shape[:3], 1)
        ctx.save_for_backward(tokens, queries, key, key_bias, value, value_bias, attention, kept, read, total)
        return _through(read, value.transpose(1, 2)) + total * value_bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tokens, queries, key, key_bias, value, value_bias, attention, kept, read, total = ctx.saved_tensors
        of_value = torch.bmm(_by_head(gradient).transpose(1, 2), _by_head(read))
        of_value_bias = (gradient * total).sum((0, 1))
        of_read = _through(gradient, value)
        of_weights = torch.bmm(_by_image(of_read), tokens.transpose(1, 2))
        of_weights += _by_image((gradient * value_bias).sum(-1, keepdim=True))
        of_scores = attention * (of_weights if kept is None else of_weights * kept)
        of_scores -= attention * of_scores.sum(-1, keepdim=True)
        of_asked = torch.bmm(of_scores.to(tokens.dtype), tokens, out=_by_image(of_read)).view_as(of_read)
        # Rounding alone, because a shift of all scores changes no softmax.
        of_shift = of_scores.sum(-1).view_as(total).to(tokens.dtype)
        of_key = torch.bmm(_by_head(queries).transpose(1, 2), _by_head(of_asked))
        of_key_bias = (queries * of_shift).sum((0, 1))
        of_queries = _through(of_asked, key.transpose(1, 2)) + of_shift * key_bias
        return None, of_queries, of_key, of_key_bias, of_value, of_value_bias, None


def _through(states: Tensor, weights: Tensor) -> Tensor:
    """Return the states ``(B, K, heads, n)`` times each head's weights ``(heads, n, m)``, ``(B, K, heads, m)``."""
    product = states.new_empty(*states.shape[:3], weights.shape[2])
    torch.bmm(_by_head(states), weights, out=_by_head(product))
    return product


def _by_head(states: Tensor) -> Tensor:
    """Return a view ``(heads, B K, n)`` of states ``(B, K, heads, n)``."""
    return states.flatten(0, 1).transpose(0, 1)


def _by_image(states: Tensor) -> Tensor:
    """Return a view ``(B, K heads, n)`` of states ``(B, K, heads, n)``."""
    return states.flatten(1, 2)
