"""Run LAVIS's Q-Former over several kinds of sequences at once, and compute only what is read of its last layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
        read: What is read of the last layer: ``queries``, or one position of each text, B numbers.
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
        run = partial(_layer, layer)
        if is_recomputed:
            run = partial(checkpoint, run, use_reentrant=False)
        packed = run(packed, packed)
    found = _layer(encoder.layer[-1], packed.only_read(), packed).sequences()
    return [own if isinstance(kind.read, str) else own[:, 0] for own, kind in zip(found, kinds)]


def _layer(layer: Any, asking: _Packed, asked: _Packed) -> _Packed:
    """Return the output states of the asking rows, which attend to all rows of the asked sequences."""
    own, heads, dropout = layer.attention.self, layer.attention.self.num_attention_heads, _dropout(layer.attention.self)
    visible = [place.visible for place in asked.places]
    keys, values = (asked.with_rows(part(asked.rows)).sequences() for part in (own.key, own.value))
    projected = asking.with_rows(own.query(asking.rows)).sequences()
    attended = [attend(q, k, v, heads, mask, dropout) for q, k, v, mask in zip(projected, keys, values, visible)]
    states = asking.with_rows(layer.attention.output(_rows(asking.places, attended), asking.rows))
    queries, text = states.queries_and_text()
    if len(queries):
        if layer.has_cross_attention:
            queries = _cross_attention(layer.crossattention, queries, [place for place in asking.places if place.count])
        queries = layer.output_query(layer.intermediate_query(queries), queries)
    if len(text):
        text = layer.output(layer.intermediate(text), text)
    return asking.with_rows(torch.cat([queries, text]))


def _cross_attention(part: Any, queries: Tensor, places: Sequence[_Place]) -> Tensor:
    """Return ``BertAttention`` of the queries ``(Q, H)`` of all kinds to their images, which all have one norm."""
    own, heads, dropout = part.self, part.self.num_attention_heads, _dropout(part.self)
    images: list[Any] = [place.kind.images for place in places]
    projected = own.query(queries).split([place.sizes[0] for place in places])
    asked = [states.unflatten(0, (-1, place.count)) for states, place in zip(projected, places)]
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


class _Place:
    """Where the rows of one kind belong in its sequences: first those of its queries, then those of its texts.

    Attributes:
        kind: The sequences.
        count: Number K of queries.
        lengths: Number of positions of each text.
        sizes: Number of rows of the queries, and of the texts without padding.
        visible: Whether a position can be seen, ``(B, 1, 1, K + T)`` bool; ``None`` if there is no padding.
    """

    def __init__(self, kind: Sequences) -> None:
        self.kind = kind
        batch, self.count = kind.queries.shape[:2]
        length = kind.text.shape[1]
        self.lengths = list(kind.lengths or [length] * batch)
        self.sizes = batch * self.count, sum(self.lengths)
        self.visible: Tensor | None = None
        self._unpadded: Tensor | None = None
        if self.sizes[1] < batch * length:
            self._find_padding(length, kind.text.device)

    def _find_padding(self, length: int, device: torch.device) -> None:
        # From numbers, because the number of rows could be read from a GPU's mask only after all that is queued.
        ends = torch.tensor(self.lengths)[:, None, None, None] + self.count
        self.visible = (torch.arange(self.count + length) < ends).to(device, non_blocking=True)
        places = [row * length + place for row, end in enumerate(self.lengths) for place in range(end)]
        self._unpadded = torch.tensor(places).to(device, non_blocking=True)

    def sequences(self, queries: Tensor, text: Tensor) -> Tensor:
        """Return the sequences ``(B, K + T, H)`` of these rows; padding is 0."""
        batch, length, width = self.kind.text.shape
        if self._unpadded is not None:
            text = text.new_zeros(batch * length, width).index_copy(0, self._unpadded, text)
        parts = queries.view(batch, self.count, width), text.view(batch, length, width)
        return torch.cat(parts, dim=1) if self.count and length else parts[0 if self.count else 1]

    def rows(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of the queries and of the texts of these sequences."""
        queries, text = (part.flatten(0, 1) for part in sequences.split([self.count, self.kind.text.shape[1]], dim=1))
        return queries, text if self._unpadded is None else text.index_select(0, self._unpadded)

    def only_read(self, queries: Tensor, text: Tensor) -> Sequences:
        """Return the states of the positions that are read, of these rows."""
        if isinstance(self.kind.read, str):
            own = queries.unflatten(0, (-1, self.count))
            return replace(self.kind, queries=own, text=own[:, :0], lengths=None)
        firsts = accumulate(self.lengths[:-1], initial=0)
        places = torch.tensor([first + place for first, place in zip(firsts, self.kind.read)])
        own = text.index_select(0, places.to(text.device, non_blocking=True))[:, None]
        return replace(self.kind, queries=own[:, :0], text=own, lengths=None)


@dataclass(frozen=True)
class _Packed:
    """States of all kinds as rows ``(Q + R, H)``: of all queries, then of all texts without padding."""

    rows: Tensor
    places: Sequence[_Place]

    @classmethod
    def of(cls, kinds: Sequence[Sequences]) -> _Packed:
        places = [_Place(kind) for kind in kinds]
        return cls(_rows(places, (torch.cat([kind.queries, kind.text], dim=1) for kind in kinds)), places)

    def with_rows(self, rows: Tensor) -> _Packed:
        return _Packed(rows, self.places)

    def queries_and_text(self) -> Sequence[Tensor]:
        """Return the rows ``(Q, H)`` of all queries and those ``(R, H)`` of all texts."""
        return self.rows.split([sum(sizes) for sizes in zip(*(place.sizes for place in self.places))])

    def by_kind(self) -> Iterator[tuple[_Place, Tensor, Tensor]]:
        """Yield each kind's place with the rows of its queries and of its texts."""
        # One split, because each slice would get a gradient of all rows.
        parts = self.rows.split([size for sizes in zip(*(place.sizes for place in self.places)) for size in sizes])
        yield from zip(self.places, parts, parts[len(self.places) :])

    def sequences(self) -> list[Tensor]:
        """Return the sequences ``(B, K + T, H)`` of each kind."""
        return [place.sequences(queries, text) for place, queries, text in self.by_kind()]

    def only_read(self) -> _Packed:
        """Return the states of the positions that are read, without the others."""
        return _Packed.of([place.only_read(queries, text) for place, queries, text in self.by_kind()])


def _rows(places: Sequence[_Place], sequences: Iterable[Tensor]) -> Tensor:
    """Return the rows ``(Q + R, H)`` of the sequences ``(B, K + T, H)`` of each kind."""
    queries, text = zip(*(place.rows(own) for place, own in zip(places, sequences)))
    return torch.cat([*queries, *text])
