"""Score queries against gallery images: exactly, or fast with a bound on the error."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

WORKING_BYTES = 256 * 2**20
"""Upper limit for the size of each temporary array; one query against the whole gallery is the minimum."""

CACHE_BYTES = 8 * 2**20
"""Size of the blocks that a processor works on, so that it finds what it wrote in its cache."""

BITS = 26
"""Bits of a fixed-point entry: 2 x 26 bits of a product and one bit of rounding fit into float64's 53 bits."""


def similarity(query: Tensor, gallery: Tensor) -> Tensor:
    r"""Return the similarity of every query to every gallery image.

    .. math:: s(q, t) = \max_k \; q^\top v_{t,k}

    Source: BLIP-2 (Li et al., 2023), section 3.1.

    Args:
        query: Features ``(Q, D)``.
        gallery: Features ``(G, K, D)`` with K features per image, or ``(G, D)``.

    Returns:
        Scores ``(Q, G)``, differentiable, and in [-1, 1] for features of unit length.

    Examples:
        The second picture has two features, of which the better one counts.

        >>> query = torch.tensor([[1.0, 0.0]])
        >>> gallery = torch.tensor([[[0.0, 1.0], [0.0, 1.0]], [[0.6, 0.8], [1.0, 0.0]]])
        >>> similarity(query, gallery)
        tensor([[0., 1.]])
    """
    if gallery.dim() == 2:
        return query @ gallery.T
    return (query @ gallery.flatten(0, 1).T).reshape(len(query), *gallery.shape[:2]).amax(dim=2)


class Scores:
    r"""Scores of Q queries and G images with K features each, in two arithmetics.

    *Exact* scores round features to fixed point. The step is 2^-26 of the least power of two above the length of the
    query (or of the longest gallery feature), which is finer than the error of a float32 product. The products are
    integers under 2^53 and therefore exact in float64, in whatever order they are summed. So equal features have equal
    scores, and a score depends neither on the other queries nor on the shape of the matrices, the device or the number
    of threads.

    *Approximate* scores are a float32 product. In any order of the sums, with unit roundoff u

    .. math:: |\hat s - s| \le ((D + 6) u + 2^{-25} \sqrt D) \; |q| \max_{t,k} |v_{t,k}|

    (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1, plus half a step per fixed-point entry
    and the rounding of wider features and of thresholds). The bound is larger if torch may multiply in a lower
    precision.

    Both use the same unit. It is a power of two that scales every query (and gallery features of extreme length) to a
    length below 1, so that float32 neither overflows nor loses small numbers.

    Attributes:
        bound: ``(Q, 1)`` float64, largest difference between an approximate and an exact score of each query.
        unit: ``(Q, 1)`` float64; score times unit is :math:`q^\top v`.
    """

    def __init__(self, query: Tensor, gallery: Tensor, longest: float | None = None) -> None:
        """Store the features.

        Args:
            query: Features ``(Q, D)``. All computation runs on their device.
            gallery: Features ``(G, K, D)`` or ``(G, D)`` of any floating type on any device, possibly mapped from a
                file. They are read in blocks and never copied as a whole.
            longest: Result of `longest_feature` for the gallery if it is known, which saves one pass over it.

        Raises:
            ValueError: If a feature is not finite.
        """
        self.device = query.device
        self.gallery = gallery if gallery.dim() == 3 else gallery.unsqueeze(1)
        self.size, self.num_features, self.width = self.gallery.shape
        query_norms = _norms(query.unsqueeze(1), "query")
        longest = longest_feature(gallery) if longest is None else longest

        query_scale = torch.exp2(-_exponents(query_norms).double()).unsqueeze(1)
        scaled = query.double() * query_scale
        self._query = scaled.float()
        self._fixed_query = scaled.mul_(2.0**BITS).round_()
        self._exponent = int(_exponents(torch.tensor(longest, dtype=torch.float64)))
        self._gallery_scale = 1.0 if abs(self._exponent) < 60 else 2.0**-self._exponent
        self.unit = 1 / (query_scale * self._gallery_scale)
        lengths = query_norms.unsqueeze(1) * query_scale
        self.bound = _relative_bound(self.width) * longest * self._gallery_scale * lengths

    def approximate(self, rows: Tensor) -> Tensor:
        """Return the approximate scores of the given queries for the whole gallery: ``(len(rows), G)`` float32."""
        query = self._query[rows]
        return self._assemble(
            len(rows), (similarity(query, self._float32(block)) for block in self._blocks(len(rows), 4))
        )

    def exact(self, rows: Tensor) -> Tensor:
        """Return the exact scores of the given queries for the whole gallery: ``(len(rows), G)`` float64."""
        query = self._fixed_query[rows]
        scores = self._assemble(
            len(rows), (similarity(query, self._fixed(block)) for block in self._blocks(len(rows), 8))
        )
        return scores.mul_(self._integer_unit)

    def exact_pairs(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Return the exact scores ``(n,)`` float64 of pairs of a query ``(n,)`` and an image ``(n,)``."""
        scores = self.unit.new_empty(len(rows))
        if self.num_features == 1:
            # The float64 copies of both sides of a part stay in the cache together.
            for part in memory_slices(len(rows), self._block_bytes, 32 * self.width):
                vectors = self._fixed(self._take(columns[part]).squeeze(1))
                scores[part] = vectors.mul_(self._fixed_query[rows[part]]).sum(dim=1)
            return scores.mul_(self._integer_unit)
        for part in memory_slices(len(rows), self._block_bytes, 4 * self.num_features * self.width):
            vectors = self._take(columns[part])
            approximate = (self._float32(vectors) @ self._query[rows[part]].unsqueeze(2)).squeeze(2).double()
            # Only features whose approximate score is this close to the image's best one can be the best.
            close = approximate >= approximate.amax(dim=1, keepdim=True) - 2 * self.bound[rows[part]]
            pair, feature = close.nonzero(as_tuple=True)
            exact = self._fixed(vectors[pair, feature]).mul_(self._fixed_query[rows[part][pair]]).sum(dim=1)
            scores[part] = torch.full_like(scores[part], -math.inf).scatter_reduce(0, pair, exact, "amax")
        return scores.mul_(self._integer_unit)

    @property
    def _integer_unit(self) -> float:
        return 2.0 ** (self._exponent - 2 * BITS) * self._gallery_scale

    @property
    def _block_bytes(self) -> int:
        return min(CACHE_BYTES, WORKING_BYTES) if self.device.type == "cpu" else WORKING_BYTES

    def _assemble(self, num_queries: int, blocks: Iterator[Tensor]) -> Tensor:
        """Put blocks of columns side by side without holding all of them twice."""
        first = next(blocks)
        if first.shape[1] == self.size:
            return first
        scores = first.new_empty(num_queries, self.size)
        end = 0
        for block in itertools.chain([first], blocks):
            scores[:, end : end + block.shape[1]] = block
            end += block.shape[1]
        return scores

    def _blocks(self, num_queries: int, item_bytes: int) -> Iterator[Tensor]:
        """Yield the gallery in blocks that stay under the size limit, as do their products."""
        # With one feature per image a product is a part of the result, whose size the caller limits.
        columns = self.width if self.num_features == 1 else max(num_queries, self.width)
        for part in memory_slices(self.size, self._block_bytes, item_bytes * self.num_features * columns):
            yield self.gallery[part].squeeze(1).to(self.device)

    def _take(self, columns: Tensor) -> Tensor:
        return self.gallery[columns.to(self.gallery.device)].to(self.device)

    def _float32(self, features: Tensor) -> Tensor:
        return features.float() if self._gallery_scale == 1.0 else (features.double() * self._gallery_scale).float()

    def _fixed(self, features: Tensor) -> Tensor:
        return features.to(torch.float64, copy=True).mul_(2.0 ** (BITS - self._exponent)).round_()


def longest_feature(features: Tensor, name: str = "gallery") -> float:
    """Return the length of the longest vector in ``(N, K, D)`` or ``(N, D)``, which is read in blocks.

    Args:
        features: Features of any floating type.
        name: Name of the features for the error message.

    Raises:
        ValueError: If a feature is not finite.
    """
    return float(_norms(features if features.dim() == 3 else features.unsqueeze(1), name).max())


def memory_slices(total: int, limit_bytes: int, item_bytes: int) -> Iterator[slice]:
    """Yield slices that stay under a number of bytes, each with at least one item.

    Examples:
        >>> list(memory_slices(5, limit_bytes=100, item_bytes=40))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, limit_bytes // item_bytes)
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def _norms(features: Tensor, name: str) -> Tensor:
    """Return ``(N,)`` float64: the length of the longest vector in each row of ``(N, K, D)``, on the same device.

    Raises:
        ValueError: If a feature is not finite.
    """
    norms = torch.empty(len(features), dtype=torch.float64, device=features.device)
    for part in memory_slices(
        len(features), min(CACHE_BYTES, WORKING_BYTES), 8 * features.shape[1] * features.shape[2]
    ):
        block = features[part]
        lengths = torch.linalg.vector_norm(block.float(), dim=2)
        if not ((lengths > 1e-15) & (lengths < 1e15)).all():  # float32 cannot hold such squares
            lengths = torch.linalg.vector_norm(block.double(), dim=2)
        norms[part] = lengths.amax(dim=1)  # NaN if any length is NaN
    bad = (~norms.isfinite()).nonzero().squeeze(1)
    if len(bad):
        raise ValueError(
            f"{len(bad):,} of {len(features):,} {name} features are not finite (first: number {int(bad[0])}); "
            f"the weights have diverged, or half precision overflows: take other weights, or compute in float32 "
            f"(run.amp: false, model.vit_precision: fp32)."
        )
    return norms


def _exponents(norms: Tensor) -> Tensor:
    """Return the exponent of the least power of two above each length, limited to what float64 can scale by."""
    # Unit vectors differ from 1 in the last bits by device and thread count; the factor puts all on one side.
    return torch.frexp(norms * (1 + 1e-5)).exponent.clamp(-900, 900)


def _relative_bound(width: int) -> float:
    """Return the error bound of an approximate score for query and gallery features of length 1."""
    operand, accumulation = 2.0**-24, 2.0**-24
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch >= 2.9 raises if the precision was set per backend
        precision = "medium"
    if precision != "highest":  # TensorFloat-32 or bfloat16: tensor cores do not round sums to nearest
        operand, accumulation = (2.0**-11 if precision == "high" else 2.0**-8), 2.0**-23
    # The added 1 % covers quadratic terms and the rounding of the lengths.
    return 1.01 * (2 * operand + (width + 4) * accumulation + math.sqrt(width) * 2.0 ** (1 - BITS))
