"""Run LAVIS's Q-Former over several kinds of sequences at once, and compute only what is read of its last layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, Union

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Read = Union[Literal["queries"], Tensor]


class ImageTokens:
    r"""Tokens of an image tower behind a layer norm, as the cross-attention's keys and values read them.

    With the normalised tokens :math:`\hat x`, the norm's gain g and bias β, a projection is

    .. math:: W (g \odot \hat x + \beta) + b = (W \,\mathrm{diag}(g))\, \hat x + (W \beta + b)

    While the norm is trained and the tower is not, the right side is computed: autograd then gets the gradients of g
    and β from those of the weights, and spares the gradient of the tokens, one of three matrix products.

    Args:
        tokens: Tokens ``(B, P, W)`` of any float type; they are normalised in float32, because a half-precision
            gradient into the norm would underflow.
        norm: Layer norm over W with gain and bias.
    """

    def __init__(self, tokens: Tensor, norm: nn.LayerNorm) -> None:
        self.tokens = tokens
        self.norm = norm

    def project(self, linear: nn.Module) -> Tensor:
        """Return ``linear`` of the layer norm of the tokens, ``(B, P, out)``."""
        norm = self.norm
        is_head_trained = torch.is_grad_enabled() and norm.weight.requires_grad and not self.tokens.requires_grad
        # A replaced or hooked layer, such as one with an adapter, does more than its product.
        if not is_head_trained or type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks:
            return linear(self.affine)  # type: ignore[no-any-return]
        bias = linear.bias + (linear.weight * norm.bias).sum(dim=1)  # autocast would make a matrix product half
        return F.linear(self._normalised, linear.weight * norm.weight, bias)

    @cached_property
    def affine(self) -> Tensor:
        """The layer norm of the tokens, ``(B, P, W)``."""
        return _as_multiplied(self.norm(self.tokens.float()))

    @cached_property
    def _normalised(self) -> Tensor:
        return _as_multiplied(F.layer_norm(self.tokens.float(), self.norm.normalized_shape, eps=self.norm.eps))


def _as_multiplied(tokens: Tensor) -> Tensor:
    """Return tokens in the type in which autocast multiplies them, so that not every projection converts them anew.

    Tokens with a gradient stay as they are: the gradients of all projections would be added up in half precision.
    """
    kind = tokens.device.type
    if tokens.requires_grad or not torch.is_autocast_enabled(kind):
        return tokens
    return tokens.to(torch.get_autocast_dtype(kind))


@dataclass(frozen=True)
class Sequences:
    """Hidden states of B sequences of one kind: K queries, then T positions of text; either part may be empty.

    Attributes:
        queries: States ``(B, K, H)``, which attend to the images and have a feed-forward part of their own.
        text: States ``(B, T, H)``.
        read: What is read of the last layer: ``queries``, or one position of each text, ``(B,)`` int64.
        images: Tokens of B images; ``None`` if K is 0.
        text_mask: ``(B, T)``, 1 where a text position can be seen and 0 at padding; ``None`` if all can be seen.
    """

    queries: Tensor
    text: Tensor
    read: Read
    images: ImageTokens | None = None
    text_mask: Tensor | None = None

    @property
    def states(self) -> Tensor:
        """All states ``(B, K + T, H)``."""
        return torch.cat([self.queries, self.text], dim=1)

    @property
    def visible(self) -> Tensor | None:
        """Whether a position can be seen, ``(B, 1, 1, K + T)`` bool."""
        if self.text_mask is None:
            return None
        queries = self.text_mask.new_ones(self.queries.shape[:2])
        return torch.cat([queries, self.text_mask], dim=1).bool()[:, None, None, :]

    def only_read(self) -> Sequences:
        """Return the states of the positions that are read, without the others."""
        if isinstance(self.read, str):
            return replace(self, text=self.text[:, :0])
        rows = torch.arange(len(self.text), device=self.text.device)
        return replace(self, queries=self.queries[:, :0], text=self.text[rows, self.read][:, None])


def encode(encoder: Any, kinds: Sequence[Sequences]) -> list[Tensor]:
    """Run the layers of a Q-Former over several kinds of sequences.

    The outputs are those of LAVIS's ``BertEncoder`` on each kind for itself, as long as nothing is dropped out. Its
    row-wise layers run once over the rows of all kinds, so that a weight gets one gradient where it would get one per
    kind, and the last layer computes the positions that are read and no others.

    Args:
        encoder: LAVIS's ``BertEncoder`` with absolute positions; its modules are called, so adapters in them work.
        kinds: Sequences of each kind. Kinds may differ in number and lengths of their sequences.

    Returns:
        For each kind what it reads: ``(B, K, H)`` of the queries, or ``(B, H)`` of one text position.
    """
    is_recomputed = getattr(encoder.config, "gradient_checkpointing", False) and encoder.training
    for images in (kind.images for kind in kinds if kind.images is not None and is_recomputed):
        images.affine  # noqa: B018 (a layer that is recomputed must find what its first pass found)
    for layer in encoder.layer[:-1]:
        run = partial(_layer, layer)
        if is_recomputed:
            run = partial(checkpoint, run, use_reentrant=False)
        kinds = run(kinds, kinds)
    outputs = _layer(encoder.layer[-1], [kind.only_read() for kind in kinds], kinds)
    return [kind.queries if isinstance(kind.read, str) else kind.text[:, 0] for kind in outputs]


def _layer(layer: Any, asking: Sequence[Sequences], asked: Sequence[Sequences]) -> list[Sequences]:
    """Return the output states of the asking positions, which attend to all positions of the asked sequences."""
    states = _Packed.of([kind.states for kind in asked])
    askers = states if asking is asked else _Packed.of([kind.states for kind in asking])
    keys, values = (states.through(part).parts() for part in (layer.attention.self.key, layer.attention.self.value))
    attended = _attention(layer.attention, askers, keys, values, [kind.visible for kind in asked])
    split = [part.split([kind.queries.shape[1], kind.text.shape[1]], 1) for part, kind in zip(attended, asking)]
    queries, text = [own for own, _ in split], [own for _, own in split]
    crossing = [i for i, own in enumerate(queries) if own.shape[1]]
    if layer.has_cross_attention and crossing:
        images = [asking[i].images for i in crossing]
        crossed = _cross_attention(layer.crossattention, [queries[i] for i in crossing], images)  # type: ignore[arg-type]
        queries = [dict(zip(crossing, crossed)).get(i, own) for i, own in enumerate(queries)]
    queries = _feed_forward(layer.intermediate_query, layer.output_query, queries)
    text = _feed_forward(layer.intermediate, layer.output, text)
    return [replace(kind, queries=own, text=words) for kind, own, words in zip(asking, queries, text)]


def _cross_attention(part: Any, queries: Sequence[Tensor], images: Sequence[ImageTokens]) -> list[Tensor]:
    keys, values = ([own.project(linear) for own in images] for linear in (part.self.key, part.self.value))
    return _attention(part, _Packed.of(queries), keys, values, [None] * len(images))


def _attention(
    part: Any,
    asking: _Packed,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    visible: Sequence[Tensor | None],
) -> list[Tensor]:
    """Return ``BertAttention`` of states ``(B, A, H)`` per kind, on projected keys and values ``(B, S, H)``."""
    own = part.self

    def by_head(states: Tensor) -> Tensor:
        return states.view(*states.shape[:2], own.num_attention_heads, -1).transpose(1, 2)

    dropout = own.dropout.p if own.dropout.training else 0.0
    contexts = [
        F.scaled_dot_product_attention(by_head(q), by_head(k), by_head(v), attn_mask=mask, dropout_p=dropout)
        .transpose(1, 2)
        .flatten(2)
        for q, k, v, mask in zip(asking.through(own.query).parts(), keys, values, visible)
    ]
    return replace(asking, rows=part.output(_Packed.of(contexts).rows, asking.rows)).parts()


def _feed_forward(intermediate: nn.Module, output: nn.Module, states: Sequence[Tensor]) -> list[Tensor]:
    packed = _Packed.of(states)
    if not len(packed.rows):
        return list(states)
    return packed.through(lambda rows: output(intermediate(rows), rows)).parts()


@dataclass(frozen=True)
class _Packed:
    """The rows ``(sum of B L, H)`` of tensors ``(B, L, H)`` of several kinds, so that a layer runs once over them."""

    rows: Tensor
    shapes: Sequence[torch.Size]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> _Packed:
        return cls(torch.cat([tensor.flatten(0, 1) for tensor in tensors]), [tensor.shape[:2] for tensor in tensors])

    def through(self, function: Callable[[Tensor], Tensor]) -> _Packed:
        return replace(self, rows=function(self.rows))

    def parts(self) -> list[Tensor]:
        parts = self.rows.split([shape.numel() for shape in self.shapes])
        return [part.view(*shape, self.rows.shape[-1]) for part, shape in zip(parts, self.shapes)]
