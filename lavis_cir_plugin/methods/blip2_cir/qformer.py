"""Run LAVIS's Q-Former over several kinds of sequences at once, and compute only what is read of its last layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, Union

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from lavis.models.blip2_models.blip2 import LayerNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavis_cir_plugin.methods.blip2_cir.attention import Projection, attend, attend_to_tokens

Read = Union[Literal["queries"], Tensor]


class ImageTokens:
    """Tokens of an image tower and the layer norm behind it.

    Args:
        tokens: Tokens ``(B, P, W)`` of any float type; they are normalised in float32, because a half-precision
            gradient into the norm would underflow.
        norm: Layer norm over W with gain and bias.
    """

    def __init__(self, tokens: Tensor, norm: nn.LayerNorm) -> None:
        self.tokens = tokens
        self.norm = norm

    @property
    def is_norm_trained_alone(self) -> bool:
        """Whether the norm gets a gradient and the tokens get none."""
        return torch.is_grad_enabled() and self.norm.weight.requires_grad and not self.tokens.requires_grad

    @cached_property
    def affine(self) -> Tensor:
        """The layer norm of the tokens, ``(B, P, W)``."""
        return _as_multiplied(self.norm(self.tokens.float()))

    @cached_property
    def normalised(self) -> Tensor:
        """The layer norm of the tokens without gain and bias, ``(B, P, W)``."""
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
        encoder: LAVIS's ``BertEncoder`` with absolute positions. Its linear layers, layer norms and feed-forward parts
            are called, so that adapters and hooks in them work; its attentions and its layers as wholes are not.
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
    """Return ``BertAttention`` of queries ``(B, K, H)`` per kind to its images, which all have one norm."""
    own, heads, dropout = part.self, part.self.num_attention_heads, _dropout(part.self)
    asking = _Packed.of(queries)
    asked = asking.through(own.query).parts()
    is_norm_trained_alone = all(kind.is_norm_trained_alone for kind in images)
    if is_norm_trained_alone and all(map(_is_plain, (images[0].norm, own.key, own.value))):
        key, value = (_behind(images[0].norm, linear) for linear in (own.key, own.value))
        read = [attend_to_tokens(q, kind.normalised, key, value, heads, dropout) for q, kind in zip(asked, images)]
    else:
        projected = [(own.key(kind.affine), own.value(kind.affine)) for kind in images]
        read = [attend(q, keys, values, heads, dropout=dropout) for q, (keys, values) in zip(asked, projected)]
    return _output(part, asking, read)


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module is its equation alone; a replaced or hooked one, as with an adapter, does more."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    has_own_class = type(module) not in (nn.Linear, nn.LayerNorm, LayerNorm)
    return not (has_own_class or any(hooks) or "forward" in vars(module))


def _behind(norm: nn.LayerNorm, linear: nn.Linear) -> Projection:
    r"""Return the projection of normalised tokens that equals a linear layer behind a norm's gain g and bias β.

    .. math:: W (g \odot \hat x + \beta) + b = (W \,\mathrm{diag}(g))\, \hat x + (W \beta + b)

    Autograd gets the gradients of g and β from those of the weights, so nothing needs the gradient of the tokens.
    """
    bias = linear.bias + (linear.weight * norm.bias).sum(dim=1)  # autocast would make a matrix product half
    return Projection(linear.weight * norm.weight, bias)


def _dropout(attention: Any) -> float:
    probability: float = attention.dropout.p if attention.dropout.training else 0.0
    return probability


def _attention(
    part: Any,
    asking: _Packed,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    visible: Sequence[Tensor | None],
) -> list[Tensor]:
    """Return ``BertAttention`` of states ``(B, A, H)`` per kind, on projected keys and values ``(B, S, H)``."""
    heads, dropout = part.self.num_attention_heads, _dropout(part.self)
    parts = zip(asking.through(part.self.query).parts(), keys, values, visible)
    return _output(part, asking, [attend(q, k, v, heads, mask, dropout) for q, k, v, mask in parts])


def _output(part: Any, asking: _Packed, read: Sequence[Tensor]) -> list[Tensor]:
    return replace(asking, rows=part.output(_Packed.of(read).rows, asking.rows)).parts()


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
