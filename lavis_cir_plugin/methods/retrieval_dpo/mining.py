"""Hard negatives of training queries, mined among the training images, and the settings of the search."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Optional

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor

from lavis_cir_plugin.benchmarks.types import Triplet
from lavis_cir_plugin.core.settings import File, Limits, NotNegative, Positive, Section, one_of
from lavis_cir_plugin.ranking import scoring
from lavis_cir_plugin.ranking.index import KINDS, VECTORS_PER_LIST, Index, build_index
from lavis_cir_plugin.ranking.ranks import padded, rerank
from lavis_cir_plugin.ranking.scoring import memory_slices

SOURCES = ("query", "positive", "image_set")
LARGE_GALLERY = 10_000
"""Number of images from which ``index: auto`` means an inverted file; in fewer, exact search takes seconds."""
TWIN = 0.999
"""Least cosine between corresponding features of two images that count as the same picture."""
_SCORES_OF_TWINS = 0.05
"""Largest difference of scores of twins: unit features with a cosine of 0.999 are sqrt(0.002) = 0.045 apart."""
_TWINS_FORESEEN = 8
DEEPEST = 1000
"""Largest number of a ranking's images that are searched, unless the window ends later."""
_PROBES = 4
_STEEP_LEAST = 4


def _check_window(window: tuple[int, int]) -> None:
    if window[0] >= window[1]:
        raise ValueError("")


@dataclass(frozen=True)
class MiningSettings(Section):
    """Settings under ``run.negatives``: the rules by which training images become negatives of a triplet.

    Images are ranked for each triplet. Images that may not be negatives (:func:`forbidden_images`, and twins of the
    right image) and images with too high a score (``cap``, ``margin``) are left out. Of the rest, ``window`` chooses by
    rank. Thus a right image with a low rank has negatives too, namely images below it.

    Attributes:
        source: Origin of the ranking: ``query``, the fused query of the triplet; ``positive``, the embedding of the
            right image itself, as in the seed paper; or ``image_set``, the query within CIRR's set of six images.
        count: Number of negatives in each step, >= 1, drawn without repetition from the window; a triplet may have
            fewer.
        window: Ranks ``[first, last)`` from 0 among the images that are not left out, at most 1,000 of them. The
            search ends after the first 1,000 of the whole ranking (`DEEPEST`), unless the window ends later.
        within_category: Whether a triplet with a category (FashionIQ) is ranked among the images of its category's
            triplets alone, as in its evaluation. A dress is no hard negative of a shirt, and a top may be a right one.
        cap: Share of the right image's score that a negative's score must stay below (positive-aware mining,
            NV-Retriever, arXiv 2407.15831), > 0 and <= 1; ``null`` sets no limit. If the right image's score s is
            negative, the limit is s - (1 - cap) |s|.
        margin: Cosines by which a negative must stay below the right image, >= 0 and <= 2; ``null`` sets no limit.
        steep_drop: Whether to leave out images that score as high as the right image or higher, and to keep of the
            window only the images between the two steepest drops of the score (:func:`between_drops`). This is QuRe
            (arXiv 2507.12416) with ``cap: null`` and a window of 1,000.
        warmup_epochs: Number of epochs with random negatives before the first mining, >= 0.
        refresh: Number of epochs from one mining to the next, which uses the weights of that moment; 0 mines once.
        index: How the ranking is searched: ``exact``; by FAISS's index ``flat``, ``ivf`` or ``hnsw``; or ``auto``,
            which is ``exact`` below 10,000 images (`LARGE_GALLERY`) and ``ivf`` otherwise. All kinds but ``hnsw`` find
            the same images each time.
        file: File with negatives of an earlier run, ``<run>/negatives/<data set>_<epoch>.npz``, which replaces mining.
            It requires ``refresh`` and ``warmup_epochs`` to be 0, and the rules that choose images have no effect.

    Raises:
        ValueError: If values are impossible; the message has one sentence for each.
    """

    WHERE = "run.negatives"

    source: Annotated[str, one_of(SOURCES)] = "query"
    count: Positive = 1
    window: Annotated[
        tuple[NotNegative, Positive],
        Limits(words="two ranks [first, last] with 0 <= first < last", check=_check_window),
    ] = (0, 50)
    within_category: bool = True
    cap: Optional[Annotated[float, Limits(gt=0, le=1)]] = 0.95
    margin: Optional[Annotated[float, Limits(ge=0, le=2)]] = None
    steep_drop: bool = False
    warmup_epochs: NotNegative = 0
    refresh: NotNegative = 1
    index: Annotated[str, one_of(("auto", *KINDS))] = "auto"
    file: Optional[File] = None

    @property
    def width(self) -> int:
        """Largest number of negatives of a triplet."""
        return self.window[1] - self.window[0]

    def mined_at(self, epoch: int) -> int:
        """Return the epoch at whose beginning the negatives of ``epoch`` are found."""
        if epoch < self.warmup_epochs:
            return 0
        return epoch - (epoch - self.warmup_epochs) % self.refresh if self.refresh else self.warmup_epochs

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence per combination of values that is impossible."""
        window = list(self.window)
        if self.width > DEEPEST:
            yield f"run.negatives.window must span at most {DEEPEST:,} ranks, got {window}."
        elif self.steep_drop and self.width < _STEEP_LEAST:
            yield (
                f"run.negatives.window: {window} has no image between two drops for run.negatives.steep_drop; it "
                f"needs at least {_STEEP_LEAST} ranks."
            )
        elif self.count > self.width and self.file is None:
            yield (
                f"run.negatives.count: {self.count} is more than run.negatives.window: {window} has ({self.width}); "
                "widen the window or lower count."
            )
        if self.file is not None and (self.refresh or self.warmup_epochs):
            yield "run.negatives.file serves all epochs; set run.negatives.refresh and .warmup_epochs to 0."


def forbidden_images(triplets: Sequence[Triplet]) -> list[set[str]]:
    """Return, for each triplet, the names of the images that may never be its negatives.

    These are the target, the targets of triplets with the same reference and a caption in common, which may be the
    query's whole text, and the images that the annotation lists as also right (CIRR's soft labels). Twins of the target
    are found later, by their features.
    """
    answers: dict[tuple[str, str], set[str]] = {}
    for triplet in triplets:
        for caption in triplet.captions:
            answers.setdefault((triplet.reference, caption), set()).update((triplet.target, *triplet.also_right))
    return [{own.target}.union(*(answers[own.reference, caption] for caption in own.captions)) for own in triplets]


class MinedNegatives(NamedTuple):
    """Negatives that :func:`mine` found for Q queries; :class:`NegativeSets` describes the fields."""

    negatives: Tensor
    scores: Tensor
    target_scores: Tensor
    ranks: Tensor
    target_ranks: Tensor


@dataclass(frozen=True)
class MiningGroup:
    """Triplets that are mined among the same images.

    Attributes:
        numbers: Numbers of the triplets.
        images: Gallery indices of the images, ascending, ``(g,)``.
    """

    numbers: list[int]
    images: Tensor

    def places(self, images: Tensor) -> Tensor:
        """Return the positions of gallery indices, of any shape, among the group's images; -1 for other images."""
        found = torch.searchsorted(self.images, images).clamp(max=len(self.images) - 1)
        return torch.where(self.images[found] == images, found, -1)

    def indices(self, places: Tensor) -> Tensor:
        """Return the gallery indices at these positions as int32; the position -1 gives -1."""
        return torch.where(places >= 0, self.images[places.clamp(min=0).long()], -1).int()


def mining_groups(triplets: Sequence[Triplet], place: Mapping[str, int], within_category: bool) -> list[MiningGroup]:
    """Divide triplets by category, or return one group of all if there is a single category or no division is asked.

    Args:
        triplets: All triplets, in order.
        place: Gallery index of every image, by its name.
        within_category: Whether to divide by category.
    """
    by_category: dict[str, list[int]] = {}
    for number, triplet in enumerate(triplets):
        by_category.setdefault(triplet.category, []).append(number)
    if not within_category or len(by_category) == 1:
        return [MiningGroup(list(range(len(triplets))), torch.arange(len(place)))]
    groups = []
    for numbers in by_category.values():
        own = [triplets[number] for number in numbers]
        images = {place[name] for triplet in own for name in (triplet.reference, triplet.target)}
        groups.append(MiningGroup(numbers, torch.tensor(sorted(images))))
    return groups


def in_order_of_triplets(parts: Sequence[MinedNegatives], order: Sequence[int] | None = None) -> MinedNegatives:
    """Concatenate the negatives of several parts, and with ``order``, the queries' numbers, sort them by it."""
    found = MinedNegatives(*(torch.cat(rows) for rows in zip(*parts)))
    return found if order is None else MinedNegatives(*(rows[torch.tensor(order).argsort()] for rows in found))


def mining_index(gallery: Tensor, settings: MiningSettings) -> Index:
    """Return an index for mining over a gallery of unit-length features, ``(G, D)`` or ``(G, K, D)``.

    An inverted file has half as many lists as for retrieval, because it is built at each mining. A search looks into
    fewer lists, because other hard negatives remain if one is missed.
    """
    kind = settings.index
    if kind == "auto":
        kind = "ivf" if len(gallery) >= LARGE_GALLERY else "exact"
    vectors = gallery.numel() // gallery.shape[-1]
    lists = max(1, min(math.isqrt(vectors) // 2, vectors // VECTORS_PER_LIST))
    return build_index(kind, gallery, lists=lists, probes=_PROBES)


def mine(
    query: Tensor,
    index: Index,
    targets: Tensor,
    banned: Tensor,
    settings: MiningSettings,
    candidates: Tensor | None = None,
) -> MinedNegatives:
    """Mine the negatives of Q queries.

    Args:
        query: Unit-length vectors ``(Q, D)``: fused queries, or the embeddings of the right images.
        index: Index over the gallery, ``(G, D)`` or ``(G, K, D)``, of unit length.
        targets: Gallery indices of the right images, ``(Q,)``.
        banned: Gallery indices of other images that may not be negatives, ``(Q, F)``, padded with -1.
        settings: Rules of the mining.
        candidates: Distinct gallery indices to choose from, ``(Q, C)``, padded with -1; by default the index searches
            the whole gallery.

    Returns:
        The negatives ``(Q, P)`` with P = ``settings.width``, best first, padded with -1.
    """
    own = rerank(query, index.gallery, targets[:, None], 1, longest=index.longest)[0]
    if candidates is None:
        # The search is deep enough that banned images do not shorten the window.
        depth = settings.window[1] + 1 + banned.shape[1] + _TWINS_FORESEEN
        return _search(query, index, own, targets, banned, settings, depth)
    scores, found = rerank(query, index.gallery, candidates, candidates.shape[1], longest=index.longest)
    return _apply_rules(scores, found, own, targets, banned, index.gallery, settings)[0]


def _search(
    query: Tensor, index: Index, own: Tensor, targets: Tensor, banned: Tensor, settings: MiningSettings, depth: int
) -> MinedNegatives:
    """Choose among the best ``depth`` images, and search deeper for the queries whose window is not full."""
    depth = min(depth, len(index.gallery))
    # This many vectors belong to at least ``depth`` images, even if all vectors of an image are alike.
    hits = depth * index.gallery[0].numel() // query.shape[1]
    parts, full = [], []
    for part in memory_slices(len(query), scoring.WORKING_BYTES, depth * (64 + banned.shape[1])):
        scores, found = index.search(query[part], depth, hits=hits)
        mined, is_full = _apply_rules(scores, found, own[part], targets[part], banned[part], index.gallery, settings)
        parts.append(mined)
        full.append(is_full)
    mined, short = in_order_of_triplets(parts), (~torch.cat(full)).nonzero().squeeze(1)
    if not len(short) or depth >= min(DEEPEST, len(index.gallery)):
        return mined
    deeper = 4 * depth if 8 * depth <= DEEPEST else DEEPEST
    again = _search(query[short], index, own[short], targets[short], banned[short], settings, deeper)
    return MinedNegatives(*(rows.index_copy(0, short, found) for rows, found in zip(mined, again)))


def _apply_rules(
    scores: Tensor,
    found: Tensor,
    own: Tensor,
    targets: Tensor,
    banned: Tensor,
    gallery: Tensor,
    settings: MiningSettings,
) -> tuple[MinedNegatives, Tensor]:
    """Apply the rules to rankings; return the negatives, and whether each query's window is full, ``(Q,)``.

    Args:
        scores: Scores of the ranked images, descending, ``(Q, C)``.
        found: Gallery indices of the ranked images, ``(Q, C)``, padded with -1 at the end.
        own: Scores of the right images, ``(Q, 1)``.
        targets: Gallery indices of the right images, ``(Q,)``.
        banned: Gallery indices that may not be negatives, ``(Q, F)``.
        gallery: Features ``(G, D)`` or ``(G, K, D)``.
        settings: Rules of the mining.
    """
    is_target = found == targets[:, None]
    allowed = (found >= 0) & ~is_target & ~(found[:, :, None] == banned[:, None, :]).any(dim=2)
    if settings.cap is not None:
        allowed &= scores < own - (1 - settings.cap) * own.abs()
    if settings.margin is not None:
        allowed &= scores < own - settings.margin
    if settings.steep_drop:
        allowed &= scores < own
    row, column = (allowed & ((scores - own).abs() <= _SCORES_OF_TWINS)).nonzero(as_tuple=True)
    allowed[row, column] = ~_are_twins(gallery, found[row, column], targets[row])
    place = allowed.cumsum(dim=1) - 1  # the rank among the allowed images
    kept = allowed & (place >= settings.window[0]) & (place < settings.window[1])
    if settings.steep_drop:
        kept = between_drops(scores, kept)
    order = (~kept).int().argsort(dim=1, stable=True)[:, : settings.width]
    is_kept = kept.gather(1, order)

    def filled(rows: Tensor, fill: float) -> Tensor:
        return F.pad(rows.masked_fill(~is_kept, fill), (0, settings.width - rows.shape[1]), value=fill)

    mined = MinedNegatives(
        negatives=filled(found.gather(1, order).int(), -1),
        scores=filled(scores.gather(1, order).float(), torch.nan),
        target_scores=own[:, 0].float(),
        ranks=filled(order.int(), -1),
        target_ranks=torch.where(is_target.any(dim=1), is_target.int().argmax(dim=1), -1).int(),
    )
    return mined, allowed.sum(dim=1) >= settings.window[1]


def between_drops(scores: Tensor, counted: Tensor) -> Tensor:
    """Return a mask of the images between the two steepest drops of each ranking's score.

    A drop leads from one counted image to the next. If the two steepest drops are adjacent, so that a single image
    lies between them, the second and the third steepest are taken, and so on, as in QuRe's released code
    (arXiv 2507.12416). Of equal drops the first counts as the steeper one.

    Args:
        scores: Scores of the ranked images, descending, ``(Q, C)``.
        counted: Mask ``(Q, C)`` of the images below the right one.

    Returns:
        The mask, ``(Q, C)``. It is empty for a query without two drops that are apart, as with fewer than four images.
    """
    between = torch.zeros_like(counted)
    for row, is_counted in enumerate(counted):
        places = is_counted.nonzero().squeeze(1)
        values = scores[row, places]
        steepest = (values[:-1] - values[1:]).argsort(descending=True, stable=True).tolist()
        for drops in zip(steepest, steepest[1:]):
            if max(drops) - min(drops) > 1:
                between[row, places[min(drops) + 1 : max(drops) + 1]] = True
                break
    return between


def mean_features(gallery: Tensor) -> Tensor:
    """Return the mean direction ``(G, D)``, float32, of each image's features ``(G, D)`` or ``(G, K, D)``."""
    features = gallery if gallery.dim() == 3 else gallery.unsqueeze(1)
    means = torch.empty(len(gallery), gallery.shape[-1])
    for part in memory_slices(len(gallery), scoring.WORKING_BYTES, 4 * features[0].numel()):
        means[part] = F.normalize(features[part].float().mean(dim=1), dim=-1)
    return means


def _are_twins(gallery: Tensor, images: Tensor, others: Tensor) -> Tensor:
    """Return whether the images of each pair show the same picture, ``(n,)``."""
    result = torch.empty(len(images), dtype=torch.bool)
    for part in memory_slices(len(images), scoring.CACHE_BYTES, 8 * gallery[0].numel()):
        cosines = F.cosine_similarity(gallery[images[part]].float(), gallery[others[part]].float(), dim=-1)
        result[part] = (cosines >= TWIN).reshape(len(cosines), -1).all(dim=1)
    return result


def random_negatives(targets: Tensor, banned: Tensor, size: int, width: int, seed: int) -> MinedNegatives:
    """Draw up to ``width`` negatives of each target uniformly among ``size`` images, except banned ones."""
    rng = random.Random(seed)
    rows = []
    for target, own in zip(targets.tolist(), map(set, banned.tolist())):
        sampled = rng.sample(range(size), min(size, width + len(own) + 1))
        rows.append([image for image in sampled if image not in own and image != target][:width])
    drawn = padded(rows, width).int()
    unknown, nan = torch.full_like(drawn, -1), torch.full(drawn.shape, torch.nan)
    return MinedNegatives(drawn, nan, nan[:, 0], unknown, unknown[:, 0])
