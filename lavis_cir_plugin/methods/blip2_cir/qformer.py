"""Run LAVIS's Q-Former over several kinds of sequences at once, and compute only what is read of its last layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, Union

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from lavis.models.blip2_models.blip2 import LayerNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavis_cir_plugin.methods.blip2_cir.attention import Projection, attend, attend_to_tokens

Read = Union[Literal["queries"], Sequence[int]]


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
        read: What is read of the last layer: ``queries``, or one position of each text, B numbers below its length.
        images: Tokens of B images; ``None`` if K is 0.
        lengths: Number of positions of each text, B numbers from 1 to T; behind them is padding, which no position
            sees. ``None`` if all are T.
    """

    queries: Tensor
    text: Tensor
    read: Read
    images: ImageTokens | None = None
    lengths: Sequence[int] | None = None


def encode(encoder: Any, kinds: Sequence[Sequences]) -> list[Tensor]:
    """Run the layers of a Q-Former over several kinds of sequences.

    The outputs are those of LAVIS's ``BertEncoder`` on each kind for itself, as long as nothing is dropped out. Its
    row-wise layers run once over the rows of all kinds, so that a weight gets one gradient where it would get one per
    kind. They do not run over padding, and the last layer computes the positions that are read and no others.

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
    packed = _Packed.of(kinds)
    for layer in encoder.layer[:-1]:
        if is_recomputed:
            rows = checkpoint(_rows_after, layer, packed.layouts, packed.rows, use_reentrant=False)
        else:
            rows = _rows_after(layer, packed.layouts, packed.rows)
        packed = packed.with_rows(rows)
    found = _layer(encoder.layer[-1], packed.only_read(), packed).sequences()
    return [own if isinstance(kind.read, str) else own[:, 0] for own, kind in zip(found, kinds)]


def _rows_after(layer: Any, layouts: Sequence[_Layout], rows: Tensor) -> Tensor:
    """Return the output rows of a layer; torch restores a GPU's random numbers only of an argument that is a tensor."""
    packed = _Packed(rows, layouts)
    return _layer(layer, packed, packed).rows


def _layer(layer: Any, asking: _Packed, asked: _Packed) -> _Packed:
    """Return the output states of the asking rows, which attend to all rows of the asked sequences."""
    own, heads, dropout = layer.attention.self, layer.attention.self.num_attention_heads, _dropout(layer.attention.self)
    visible = [layout.visible for layout in asked.layouts]
    keys, values = (asked.with_rows(part(asked.rows)).sequences() for part in (own.key, own.value))
    projected = asking.with_rows(own.query(asking.rows)).sequences()
    attended = [attend(q, k, v, heads, mask, dropout) for q, k, v, mask in zip(projected, keys, values, visible)]
    states = asking.with_rows(layer.attention.output(asking.with_sequences(attended).rows, asking.rows))
    queries, text = states.queries_and_text()
    if len(queries):
        if layer.has_cross_attention:
            crossing = [layout for layout in asking.layouts if layout.count]
            queries = _cross_attention(layer.crossattention, queries, crossing)
        queries = layer.output_query(layer.intermediate_query(queries), queries)
    if len(text):
        text = layer.output(layer.intermediate(text), text)
    return asking.with_rows(torch.cat([queries, text]))


def _cross_attention(part: Any, queries: Tensor, layouts: Sequence[_Layout]) -> Tensor:
    """Return ``BertAttention`` of the queries ``(Q, H)`` of all kinds to their images, which all have one norm."""
    own, heads, dropout = part.self, part.self.num_attention_heads, _dropout(part.self)
    images: list[Any] = [layout.images for layout in layouts]
    projected = own.query(queries).split([layout.sizes[0] for layout in layouts])
    asked = [states.unflatten(0, (-1, layout.count)) for states, layout in zip(projected, layouts)]
    is_norm_trained_alone = all(kind.is_norm_trained_alone for kind in images)
    if is_norm_trained_alone and all(map(_is_plain, (images[0].norm, own.key, own.value))):
        key, value = (_behind(images[0].norm, linear) for linear in (own.key, own.value))
        read = [attend_to_tokens(q, kind.normalised, key, value, heads, dropout) for q, kind in zip(asked, images)]
    else:
        pairs = [(own.key(kind.affine), own.value(kind.affine)) for kind in images]
        read = [attend(q, keys, values, heads, dropout=dropout) for q, (keys, values) in zip(asked, pairs)]
    return part.output(torch.cat([states.flatten(0, 1) for states in read]), queries)  # type: ignore[no-any-return]


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


class _Layout:
    """Converts states of one kind between sequences ``(B, K + T, H)`` and rows without padding.

    The rows are B K of queries and, apart from them, one for each text position.

    Attributes:
        images: Those of the sequences.
        read: That of the sequences.
        count: Number K of queries.
        sizes: Number of rows of the queries, and of the texts.
        visible: Whether a position can be seen, ``(B, 1, 1, K + T)`` bool; ``None`` if there is no padding.
    """

    def __init__(self, kind: Sequences) -> None:
        self.images, self.read = kind.images, kind.read
        self.batch, self.count = kind.queries.shape[:2]
        self.length = kind.text.shape[1]
        self.lengths = list(kind.lengths or [self.length] * self.batch)
        self.sizes = self.batch * self.count, sum(self.lengths)
        self.visible: Tensor | None = None
        self._unpadded: Tensor | None = None  # the places (R,) of the text's rows among its B T positions
        if self.sizes[1] < self.batch * self.length:
            self._find_padding(kind.text.device)

    def _find_padding(self, device: torch.device) -> None:
        lengths = torch.tensor(self.lengths).to(device, non_blocking=True)
        self.visible = (
            torch.arange(self.count + self.length, device=device) < (self.count + lengths)[:, None, None, None]
        )
        padding = self.length - lengths
        # Without their number, which is known here, a GPU would have to be waited for.
        before = (padding.cumsum(0) - padding).repeat_interleave(lengths, output_size=self.sizes[1])
        self._unpadded = before + torch.arange(self.sizes[1], device=device)

    def text_rows(self, text: Tensor) -> Tensor:
        """Return the rows ``(R, H)`` of texts ``(B, T, H)``."""
        rows = text.flatten(0, 1)
        return rows if self._unpadded is None else rows.index_select(0, self._unpadded)

    def sequences(self, queries: Tensor, text: Tensor) -> Tensor:
        """Return the sequences ``(B, K + T, H)`` of these rows; padding is 0."""
        if self._unpadded is not None:
            text = text.new_zeros(self.batch * self.length, text.shape[1]).index_copy(0, self._unpadded, text)
        parts = [(queries, self.count), (text, self.length)]
        return torch.cat([rows.unflatten(0, (self.batch, length)) for rows, length in parts if length], dim=1)

    def only_read(self, queries: Tensor, text: Tensor) -> Sequences:
        """Return the states of the positions that are read, of these rows."""
        if isinstance(self.read, str):
            own = queries.unflatten(0, (self.batch, self.count))
            return Sequences(own, own[:, :0], self.read, self.images)
        firsts = accumulate(self.lengths[:-1], initial=0)
        places = torch.tensor([first + place for first, place in zip(firsts, self.read)])
        own = text.index_select(0, places.to(text.device, non_blocking=True))[:, None]
        return Sequences(own[:, :0], own, self.read)


@dataclass(frozen=True)
class _Packed:
    """States of all kinds as rows ``(Q + R, H)``: of all queries, then of all texts without padding."""

    rows: Tensor
    layouts: Sequence[_Layout]

    @classmethod
    def of(cls, kinds: Sequence[Sequences]) -> _Packed:
        layouts = [_Layout(kind) for kind in kinds]
        text = [layout.text_rows(kind.text) for layout, kind in zip(layouts, kinds)]
        return cls(torch.cat([*(kind.queries.flatten(0, 1) for kind in kinds), *text]), layouts)

    @property
    def sizes(self) -> tuple[list[int], list[int]]:
        """For each kind, the number of rows of its queries, and of its texts."""
        return [layout.sizes[0] for layout in self.layouts], [layout.sizes[1] for layout in self.layouts]

    def with_rows(self, rows: Tensor) -> _Packed:
        """Return other states in the same places."""
        return _Packed(rows, self.layouts)

    def with_sequences(self, sequences: Iterable[Tensor]) -> _Packed:
        """Return the states ``(B, K + T, H)`` of each kind in the same places."""
        parts = [own.split([layout.count, layout.length], dim=1) for own, layout in zip(sequences, self.layouts)]
        text = [layout.text_rows(own) for (_, own), layout in zip(parts, self.layouts)]
        return self.with_rows(torch.cat([*(own.flatten(0, 1) for own, _ in parts), *text]))

    def queries_and_text(self) -> Sequence[Tensor]:
        """Return the rows ``(Q, H)`` of all queries and those ``(R, H)`` of all texts."""
        return self.rows.split([sum(sizes) for sizes in self.sizes])

    def by_kind(self) -> Iterator[tuple[_Layout, Tensor, Tensor]]:
        """Yield each kind's layout with the rows of its queries and of its texts."""
        queries, text = self.sizes
        parts = self.rows.split([*queries, *text])  # one split, because each slice would get a gradient of all rows
        yield from zip(self.layouts, parts, parts[len(queries) :])

    def sequences(self) -> list[Tensor]:
        """Return the sequences ``(B, K + T, H)`` of each kind."""
        return [layout.sequences(queries, text) for layout, queries, text in self.by_kind()]

    def only_read(self) -> _Packed:
        """Return the states of the positions that are read, without the others."""
        return _Packed.of([layout.only_read(queries, text) for layout, queries, text in self.by_kind()])
