"""Synthetic training triplets made of captioned images, by edits of captions and nearest neighbours."""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from lavis_cir_plugin.methods.tscir.caption_edits import CaptionEdit, Phrases, normalised_caption
from lavis_cir_plugin.ranking.index import build_index

COUNT, CLIP_SIMILARITY, WORDS_SIMILARITY = 10_000, 0.9, 0.7
"""Default number of triplets, and least cosines of an edited caption and the target's by CLIP and by words."""

CANDIDATES = 20
"""Number of captions nearest to an edited one that are considered as the target's."""

LARGEST_EXACT = 20_000
"""Largest number of captions that are all compared with an edited one; FAISS finds the nearest of more."""

_FEWEST, _ROUND, _MOST_TRIED, _SCORES = 1_000, 50_000, 40, 10_000_000
_BLOCK = 8_192  # number of captions whose features are computed at a time
_STEPS = 2048  # entries of features are multiples of 1/2048: float16 holds them and float32 their sums of products


@dataclass(frozen=True)
class ImageCaptions:
    """Captions of a set of images.

    Attributes:
        names: Names of the images, in the order of the file.
        texts: Captions, each once per image.
        images: Number of each caption's image.
    """

    names: list[str]
    texts: list[str]
    images: list[int]


@dataclass(frozen=True)
class SyntheticTriplet:
    """A synthetic triplet.

    Attributes:
        edit: Edit that turns a caption of the reference into the query.
        target: Number of the target image.
        target_row: Number of the target's caption that is nearest to the edited caption.
        similarity: Cosine of these two captions.
    """

    edit: CaptionEdit
    target: int
    target_row: int
    similarity: float


@dataclass
class MadeTriplets:
    """Result of `make_triplets`.

    Attributes:
        triplets: The triplets.
        tried: Number of edits that were tried.
        refused: Number of refused edits by reason.
    """

    triplets: list[SyntheticTriplet] = field(default_factory=list)
    tried: int = 0
    refused: Counter[str] = field(default_factory=Counter)


class CaptionFeatures(Protocol):
    """Interface of a function that turns captions into unit-length features ``(N, D)`` on the CPU."""

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return the features of these captions."""
        ...


class HashedWordFeatures:
    r"""Features of a caption from its words and pairs of words: tf-idf weights, hashed to a fixed width.

    .. math:: f_d = \sum_{w: h(w) = d} \pm n_w (1 + \log \frac{1 + N}{1 + N_w})

    Here the caption has the term w :math:`n_w` times, and :math:`N_w` of the N counted captions have it. Terms that no
    counted caption has are ignored. Features are scaled to length 1, and their entries are rounded, so that sums do
    not depend on their order.

    Source: feature hashing (Weinberger et al., 2009).
    """

    def __init__(self, captions: Sequence[str], width: int = 1024) -> None:
        """Count the terms of captions, which have the form of `normalised_caption`."""
        held = Counter(term for caption in captions for term in set(_terms(caption)))
        self.width = width
        self._entries: dict[str, tuple[int, float]] = {}
        for term, count in held.items():
            code = zlib.crc32(term.encode())
            weight = 1 + math.log((1 + len(captions)) / (1 + count))
            self._entries[term] = (code // 2 % width, weight if code % 2 else -weight)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return the features ``(N, D)``, float32; a caption without a known word has zeros."""
        parts = [self._features(captions[start : start + _BLOCK]) for start in range(0, len(captions), _BLOCK)]
        return torch.cat(parts) if parts else torch.zeros(0, self.width)

    def _features(self, captions: Sequence[str]) -> Tensor:
        places: list[int] = []
        values: list[float] = []
        for row, caption in enumerate(captions):
            entries = [entry for entry in map(self._entries.get, _terms(caption)) if entry is not None]
            places.extend(row * self.width + column for column, _ in entries)
            values.extend(value for _, value in entries)
        flat = np.bincount(np.array(places, dtype=np.int64), np.array(values), len(captions) * self.width)
        # Of no place at all, bincount counts whole numbers, whatever the weights.
        return _rounded(F.normalize(torch.from_numpy(flat).double().view(len(captions), self.width), dim=1))


class ClipTextFeatures:
    """Features of a caption by the text tower of a CLIP model of open_clip."""

    def __init__(self, clip_model: str, pretrained: str | None, batch_size: int = 256) -> None:
        """Load the model by `load_clip`, whose errors are raised."""
        from lavis_cir_plugin.models.open_clip_towers import TextTower, load_clip

        self._batch_size = batch_size
        self._tower = TextTower(load_clip(clip_model, pretrained), clip_model)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tower.to(self._device).eval()

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return the features ``(N, D)``, float32."""
        parts = []
        starts = range(0, len(captions), self._batch_size)
        for start in tqdm(starts, "reading captions", unit="batch", disable=None, leave=False):
            ids = self._tower.tokenize(captions[start : start + self._batch_size])
            parts.append(_rounded(F.normalize(self._tower(ids).double(), dim=1)).cpu())
        return torch.cat(parts)


def _terms(caption: str) -> list[str]:
    words = caption.split()
    return [*words, *(f"{first} {second}" for first, second in zip(words, words[1:]))]


def _rounded(features: Tensor) -> Tensor:
    return ((features * _STEPS).round() / _STEPS).float()


# -- making ----------------------------------------------------------------------------------------------------------


def make_triplets(
    captions: ImageCaptions,
    features: CaptionFeatures | None = None,
    count: int = COUNT,
    seed: int = 0,
    similarity: float | None = None,
) -> MadeTriplets:
    """Make triplets; equal arguments give equal triplets for any number of threads.

    An edit becomes a triplet if there is another image such that

    * one of its captions holds the inserted phrase (or, if the edit only drops a phrase, has nothing in that place),
    * this caption has a cosine of at least ``similarity`` with the edited caption,
    * no caption of this image holds the removed phrase, and no caption of the reference holds the inserted one.

    Of several such images the one is taken whose captions, on average, are nearest to those of the reference after the
    edit. No two triplets have the same reference and target.

    Args:
        captions: Captions of the image set.
        features: Features by which captions are compared; by default `HashedWordFeatures` of these captions.
        count: Largest number of triplets.
        seed: Seed of the draw of edits and templates.
        similarity: Least cosine; by default `WORDS_SIMILARITY`, or `CLIP_SIMILARITY` if features are given.

    Raises:
        ValueError: If the captions belong to fewer than two images.
    """
    if len(captions.names) < 2:
        raise ValueError(f"triplets need captions of at least 2 images, got {len(captions.names)}.")
    phrases = Phrases(captions.texts, captions.images)
    maker = _TargetFinder(captions, phrases, features, similarity)
    made, rng = MadeTriplets(), random.Random(f"synthetic triplets/{seed}")
    used: set[tuple[int, int]] = set()
    known: set[tuple[int, str]] = set()
    order: list[int] = []
    with tqdm(total=count, desc="making triplets", unit="triplet", disable=None) as bar:
        while len(made.triplets) < count and made.tried < _MOST_TRIED * max(count, len(captions.names)):
            wanted = count - len(made.triplets)
            rate = max(0.1, len(made.triplets) / made.tried) if made.tried else 0.5
            number = min(max(_FEWEST, math.ceil(1.2 * wanted / rate)), _ROUND)
            edits, before = [], len(made.triplets)
            for _ in range(number):
                if not order:
                    order = rng.sample(range(len(captions.names)), len(captions.names))
                edit = phrases.draw(order.pop(), rng)
                made.tried += 1
                if edit is None:
                    made.refused["no exchangeable phrase was drawn"] += 1
                elif (edit.row, edit.edited) in known:
                    made.refused["tried before"] += 1
                else:
                    known.add((edit.row, edit.edited))
                    edits.append(edit)
            for edit, found in zip(edits, maker.targets(edits, used)):
                if isinstance(found, str):
                    made.refused[found] += 1
                elif (edit.image, found.target) in used:
                    made.refused["the two images are a triplet already"] += 1
                elif len(made.triplets) < count:
                    used.add((edit.image, found.target))
                    made.triplets.append(found)
                    bar.update()
                else:
                    made.tried -= 1  # the requested number was already reached
            if len(made.triplets) - before < 0.002 * number:
                break
    return made


class _TargetFinder:
    """Finds the target image of an edit among all captioned images."""

    def __init__(
        self, captions: ImageCaptions, phrases: Phrases, features: CaptionFeatures | None, similarity: float | None
    ) -> None:
        self.captions, self.phrases = captions, phrases
        texts = [normalised_caption(text) for text in captions.texts]
        numbers: dict[str, int] = {}
        self.distinct = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
        self.features = HashedWordFeatures(texts) if features is None else features
        default = WORDS_SIMILARITY if features is None else CLIP_SIMILARITY
        self.similarity = default if similarity is None else similarity
        distinct = list(numbers)
        self.gallery = torch.cat(
            [self.features(distinct[start : start + _ROUND]).half() for start in range(0, len(distinct), _ROUND)]
        )
        self.of_caption: list[list[int]] = [[] for _ in numbers]
        said: list[list[str]] = [[] for _ in captions.names]
        self.rows_of: list[list[int]] = [[] for _ in captions.names]
        for row, image in enumerate(captions.images):
            self.of_caption[self.distinct[row]].append(row)
            said[image].append(" ".join(phrases.rows[row]))  # punctuation becomes a second blank
            self.rows_of[image].append(row)
        self.said = [f" {' | '.join(own)} " for own in said]
        rows = self.gallery.numpy()
        self.means = np.zeros((len(captions.names), rows.shape[1]), dtype=np.float16)
        for number, own in enumerate(self.rows_of):
            self.means[number] = rows[self.distinct[own]].mean(axis=0, dtype=np.float32)

    def targets(self, edits: Sequence[CaptionEdit], used: set[tuple[int, int]]) -> list[SyntheticTriplet | str]:
        """Return the triplet of each edit, or the reason why there is none."""
        found: list[SyntheticTriplet | str] = ["no other caption holds the edited phrase"] * len(edits)
        by_holder: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, edit in enumerate(edits):
            if edit.new and f" {edit.new} " in self.said[edit.image]:
                found[number] = "the reference has it already"
            else:
                by_holder[edit.holder].append(number)
        features = self.features([edit.edited for edit in edits]) if edits else torch.empty(0)
        for holder, numbers in sorted(by_holder.items()):
            candidates = np.unique(self.distinct[self.phrases.rows_holding(holder)])
            gallery = self.gallery[torch.from_numpy(candidates)].float()
            scores, places = nearest(features[numbers], gallery, min(CANDIDATES, len(candidates)))
            for number, score, place in zip(numbers, scores.tolist(), places.tolist()):
                near = [(int(candidates[p]), s) for p, s in zip(place, score) if p >= 0]
                found[number] = self._target(edits[number], features[number], near, used)
        return found

    def _target(
        self, edit: CaptionEdit, feature: Tensor, near: Sequence[tuple[int, float]], used: set[tuple[int, int]]
    ) -> SyntheticTriplet | str:
        """Choose the target of an edit among captions, which are given nearest first."""
        choices: list[SyntheticTriplet] = []
        reason, seen = "no other image's caption holds the edited phrase", set()
        for caption, score in near:
            for row in self.of_caption[caption]:
                image = self.captions.images[row]
                if image == edit.image or (edit.new and f" {edit.new} " not in self.said[image]):
                    continue
                if score < self.similarity:
                    reason = "the nearest caption is too far from the edited one" if not choices else reason
                elif edit.old and f" {edit.old} " in self.said[image]:
                    reason = "the target has the replaced phrase too"
                elif (edit.image, image) in used:
                    reason = "the two images are a triplet already"
                elif image not in seen:
                    seen.add(image)
                    choices.append(SyntheticTriplet(edit, image, row, score))
        if not choices:
            return reason
        # Elementwise products are summed in order; a matrix product would depend on the number of threads.
        own, now = self.means[edit.image].astype(np.float32), self.gallery[self.distinct[edit.row]].float().numpy()
        wanted = own + (feature.numpy() - now) / len(self.rows_of[edit.image])
        others = self.means[[choice.target for choice in choices]].astype(np.float32)
        agreement = (others * wanted).sum(axis=1) / np.sqrt((others**2).sum(axis=1)).clip(1e-6)
        return choices[int(agreement.argmax())]


def nearest(query: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return scores and row numbers ``(Q, k)`` of the nearest rows, best first; of equal rows the first comes first.

    All rows of a gallery of up to `LARGEST_EXACT` rows are compared; FAISS finds the nearest of a larger gallery.
    Float32 sums of the rounded features are exact, so that neither the number of threads nor the search changes them.
    """
    if len(gallery) > LARGEST_EXACT:
        return build_index("flat", gallery).search(query, k)
    count, parts = len(gallery), []
    for part in query.split(max(1, _SCORES // count)):
        scores = torch.from_numpy(part.numpy() @ gallery.numpy().T)
        # Score and row number form one integer without ties, which topk would return in no particular order.
        steps = (scores.double() * _STEPS**2).long() * count + torch.arange(count - 1, -1, -1)
        places = count - 1 - steps.topk(k, dim=1).values % count
        parts.append((scores.gather(1, places).double(), places))
    values, places = (torch.cat(found) for found in zip(*parts))
    return values, places
