"""What an index is asked and what it answers, wherever its pictures are ranked."""

from __future__ import annotations

import hashlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Union

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from PIL import Image
from torch import Tensor

from lavis_cir_plugin.benchmarks.images import as_rgb, decode_rgb
from lavis_cir_plugin.core.settings import is_number
from lavis_cir_plugin.search import filters
from lavis_cir_plugin.search.build import refuse_another_model
from lavis_cir_plugin.search.catalogue import Picture
from lavis_cir_plugin.search.duplicates import Kinds
from lavis_cir_plugin.search.encoder import Encoder, encoder_of, load_encoder
from lavis_cir_plugin.search.originals import open_indexed

MOST_RESULTS = 10_000

WITHOUT_WEIGHT = 0.5

_FOLDED_AT_ONCE = 4

_NOTHING_LEFT = 1e-4
"""Length of a query from which on it is more than the rounding errors of two features of length 1."""

Source = Union[str, "os.PathLike[str]", bytes, int, Image.Image]
"""A query's picture: a path, a file's content, the id of a picture of the index, or a picture in memory."""


@dataclass(frozen=True)
class Hit:
    """A result.

    Attributes:
        picture: The picture that was found.
        score: Cosine of the query with the nearest of the picture's features, from -1 to 1.
        share_below: Share of the index's pictures that score less, from 0 to 1.
        duplicates: Pictures that look the same and stand behind this one.
    """

    picture: Picture
    score: float
    share_below: float
    duplicates: tuple[Picture, ...] = ()

    @property
    def path(self) -> str:
        """Absolute path of the picture."""
        return self.picture.path


@dataclass(frozen=True)
class Answer:
    """Results, best first.

    Attributes:
        hits: The results, at most as many as were asked for.
        searched: Number of different pictures that the condition leaves to choose from.
        folded: Number of near-duplicates that stand behind the hits.
        left_out: Paths of references that were left out of the results.
        is_exact: Whether no better picture can have been missed.
        recall: Otherwise, the share of the exact 50 best that was found when candidates were built.
        share_is_estimated: Whether ``share_below`` comes from a sample of the index.
    """

    hits: tuple[Hit, ...]
    searched: int
    folded: int = 0
    left_out: tuple[str, ...] = ()
    is_exact: bool = True
    recall: float = 1.0
    share_is_estimated: bool = False


@dataclass(frozen=True)
class Asked:
    """A question whose pictures and texts are encoded.

    Attributes:
        vector: The query, ``(D,)`` of unit length.
        k: Number of results.
        condition: What pictures must meet.
        min_score: Least score of a result.
        fold: Whether near-duplicates stand behind one of them.
        hidden: SHA-256 of the contents that are not shown, in hexadecimal.
        exact: Whether every picture has to be scanned.
    """

    vector: Tensor
    k: int
    condition: filters.Condition | None
    min_score: float | None
    fold: bool
    hidden: frozenset[str]
    exact: bool


@dataclass(frozen=True)
class Ranked:
    """The best contents for a question, best first.

    Attributes:
        rows: Rows of the contents in ``features`` and ``looks``.
        scores: Their scores, float64.
        pictures: Pictures of each row that meet the condition, in order of their ids.
        features: ``(G, K, D)``.
        looks: ``(G, 8, 8, 3)`` uint8.
        is_exact: Whether no better content can have been missed.
        total: How many contents there were to choose from.
    """

    rows: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]
    pictures: Mapping[int, list[Picture]]
    features: Tensor
    looks: np.ndarray[Any, Any]
    is_exact: bool
    total: int


@dataclass
class _Found:
    """A content that is shown, and what is behind it."""

    score: float
    pictures: list[Picture]
    alike: list[Picture] = field(default_factory=list)


class Searcher(ABC):
    """Answers questions on pictures; may be asked by several threads, one query being encoded at a time.

    Args:
        place: What the index is called in messages.
        encoder: The encoder instead of the one that the index names: an `Encoder`, or what ``load_run`` returned.
        device: The device that the model is loaded to.
    """

    def __init__(self, place: str, encoder: Any = None, device: str | torch.device = "cpu") -> None:
        self.place, self.device = place, torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {device} was asked for and torch sees no GPU; use cpu.")
        self._given = None if encoder is None else encoder_of(encoder)
        self._encoding = threading.Lock()

    @cached_property
    def encoder(self) -> Encoder:
        """What encodes queries: the given model, or the one that the index names, loaded when first needed.

        Raises:
            ValueError: the model is not what made the index any more.
            FileNotFoundError: it is gone.
        """
        if self._given is not None:
            return self._given
        name, identity = self._made_by()
        if not name:
            raise ValueError(f"{self.place} names no model; hand over the encoder that made it.")
        encoder = load_encoder(name, self.device)
        refuse_another_model(self.place, identity, encoder)
        return encoder

    @abstractmethod
    def _made_by(self) -> tuple[str, Mapping[str, str]]:
        """Return name and identity of the model that made the index."""

    @abstractmethod
    def picture(self, picture_id: int) -> Picture | None:
        """Return a picture by its id; ``None`` where there is none of it."""

    @abstractmethod
    def _condition_columns(self) -> Mapping[str, filters.Column]:
        """Return what a condition may name, by name."""

    @abstractmethod
    def _paths_of_contents(self, contents: frozenset[str]) -> list[str]:
        """Return the path of one picture of each of these contents that is indexed, in order of the index's rows."""

    @abstractmethod
    def _ranking(self, asked: Asked) -> Callable[[int], Ranked]:
        """Return a function that gives the best of a number of contents for a question, fewer only if fewer exist."""

    @abstractmethod
    def _shares_below(self, vector: Tensor, scores: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], bool]:
        """Return which share of all contents scores less than each score, and whether this is an estimate."""

    @abstractmethod
    def _measured_recall(self) -> float:
        """Return the recall of answers that are not exact."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of pictures."""

    def __repr__(self) -> str:
        """Return a text with the place, the number of pictures and the model's name."""
        return f"{type(self).__name__}({self.place!r}, {len(self):,} pictures, model {self._made_by()[0] or None!r})"

    @property
    def columns(self) -> tuple[str, ...]:
        """What a condition may name."""
        return tuple(self._condition_columns())

    def search(
        self,
        images: Source | Iterable[Source] | None = (),
        text: str | None = None,
        k: int = 10,
        *,
        image_weight: float = 0.5,
        weights: Sequence[float] | None = None,
        without: str | None = None,
        without_weight: float = WITHOUT_WEIGHT,
        where: str | None = None,
        min_score: float | None = None,
        fold: bool = True,
        keep_references: bool = False,
        exact: bool = False,
    ) -> Answer:
        r"""Return the best pictures for reference pictures, a text, or both.

        .. math:: q = n\left(n\left(\sum_i w_i \, q(x_i, text)\right) - w_{without} \, t(without)\right), \quad
                  n(v) = v / \lVert v \rVert

        The queries of several pictures are added, each with its weight; then the text to avoid is taken away.

        Args:
            images: One or more pictures; none, or ``None``, for a text alone.
            text: What to change, or what to look for where there is no picture.
            k: How many results, from 1 to 10,000. So many come back if so many meet the condition.
            image_weight: From 0 (the text alone) over 0.5 (what the model makes of both) to 1 (the pictures alone).
            weights: One for each picture, > 0; equal ones by default.
            without: A text that results should not match.
            without_weight: How strongly, >= 0.
            where: A condition on the pictures, as `filters.parse`; it is met before anything is ranked.
            min_score: Leave out what scores less.
            fold: Show one of several near-duplicates, the best, with the others behind it.
            keep_references: Also find the files that have a reference's very content.
            exact: Scan all pictures though the index has candidates.

        Raises:
            ValueError: there is neither picture nor text, or a value is out of its range.
            FileNotFoundError: a picture's file does not exist.
            ChangedError: the file of a picture that is named by its id is not what was indexed.
        """
        sources = _listed(images)
        for name, words in (("text", text), ("without", without), ("where", where)):
            if words is not None and not isinstance(words, str):
                raise ValueError(f"{name} must be a string, got {type(words).__name__}.")
        k, image_weight, without_weight, min_score = map(_plain, (k, image_weight, without_weight, min_score))
        weights = None if weights is None else [_plain(weight) for weight in weights]
        text, without = (text or "").strip() or None, (without or "").strip() or None
        _check(sources, text, k, image_weight, weights, without_weight, min_score)
        columns = self._condition_columns()
        condition = filters.parse(where, columns) if where and where.strip() else None
        with self._encoding:
            vector, references = self._query(sources, text, image_weight, weights, without, without_weight)
        hidden = frozenset() if keep_references else references
        return self._answer(Asked(vector, k, condition, min_score, fold, hidden, exact))

    def _query(
        self,
        sources: Sequence[Source],
        text: str | None,
        image_weight: float,
        weights: Sequence[float] | None,
        without: str | None,
        without_weight: float,
    ) -> tuple[Tensor, frozenset[str]]:
        """Return the query ``(D,)`` and the SHA-256 of the contents that it refers to."""
        loaded = [self._loaded(source) for source in sources]
        queries = self.encoder.query([picture for picture, _ in loaded], text, image_weight)
        if len(queries) > 1:
            chosen = torch.tensor(list(weights or [1.0] * len(queries)), dtype=torch.float32)
            queries = F.normalize((queries * chosen.unsqueeze(1)).sum(dim=0, keepdim=True), dim=1)
        if without:
            queries = queries - without_weight * self.encoder.query([], without)
            if float(queries.norm()) < _NOTHING_LEFT:
                raise ValueError(
                    "the text to avoid takes away all that is looked for; change it, or lower its weight "
                    f"(without_weight {without_weight:g})."
                )
            queries = F.normalize(queries, dim=1)
        return queries[0], frozenset(content for _, content in loaded if content)

    def _loaded(self, source: Source) -> tuple[Image.Image, str]:
        """Return a picture, upright, and the SHA-256 of its file; empty for a picture in memory."""
        if isinstance(source, Image.Image):
            try:
                return as_rgb(source, upright=True), ""
            except ValueError as error:
                raise ValueError(f"the picture cannot be read as an image: {error}.") from None
        if isinstance(source, int):
            picture = self.picture(source)
            if picture is None:
                raise ValueError(f"the index has no picture {source}; take an id from its results.")
            with open_indexed(picture) as file:
                return decode_rgb(file.read(), picture.path, upright=True), picture.sha256
        if not isinstance(source, (str, os.PathLike, bytes)):
            raise _no_picture(source)
        name = "the picture" if isinstance(source, bytes) else os.fspath(source)
        if not isinstance(source, bytes):
            path = Path(source).expanduser()
            if not path.is_file():
                raise FileNotFoundError(
                    f"{name} {'is no file' if path.exists() else 'does not exist'}; name a picture."
                )
            source = path.read_bytes()
        return decode_rgb(source, name, upright=True), hashlib.sha256(source).hexdigest()

    def _answer(self, asked: Asked) -> Answer:
        left_out = self._paths_of_contents(asked.hidden) if asked.hidden else []
        best = self._ranking(asked)
        wanted = asked.k + len(left_out)
        while True:
            ranked = best(wanted)
            found, folded = _collect(ranked, asked)
            is_all = len(ranked.rows) < wanted or len(ranked.rows) == ranked.total
            least = asked.min_score
            is_below = least is not None and len(ranked.scores) > 0 and ranked.scores[-1] < least
            if len(found) >= asked.k or is_all or is_below:
                break
            wanted *= _FOLDED_AT_ONCE
        hits, is_estimated = self._hits(asked.vector, found[: asked.k])
        return Answer(
            hits=hits,
            searched=ranked.total,
            folded=folded,
            left_out=tuple(left_out),
            is_exact=ranked.is_exact,
            recall=1.0 if ranked.is_exact else self._measured_recall(),
            share_is_estimated=is_estimated,
        )

    def _hits(self, vector: Tensor, found: Sequence[_Found]) -> tuple[tuple[Hit, ...], bool]:
        shares, is_estimated = self._shares_below(vector, np.array([item.score for item in found]))
        hits = (
            Hit(item.pictures[0], item.score, float(share), (*item.pictures[1:], *item.alike))
            for item, share in zip(found, shares)
        )
        return tuple(hits), is_estimated


def _collect(ranked: Ranked, asked: Asked) -> tuple[list[_Found], int]:
    """Return what to show, near-duplicates behind the first of their kind, and how many pictures these are."""
    shown: list[_Found] = []
    kinds = Kinds(ranked.features, ranked.looks)
    for row, score in zip(ranked.rows.tolist(), ranked.scores.tolist()):
        pictures = ranked.pictures.get(row, [])
        if not pictures or pictures[0].sha256 in asked.hidden:
            continue
        if asked.min_score is not None and score < asked.min_score:
            break
        kind = kinds.find(row) if asked.fold else None
        if kind is not None:
            shown[kind].alike.extend(pictures)
        elif len(shown) < asked.k:
            kinds.add(row)
            shown.append(_Found(score, list(pictures)))
    if asked.fold:
        return shown, sum(len(found.pictures) - 1 + len(found.alike) for found in shown)
    every = [_Found(found.score, [picture]) for found in shown for picture in found.pictures]
    return every, 0


def _listed(images: Source | Iterable[Source] | None) -> list[Source]:
    images = _plain(images)
    if images is None:
        return []
    if isinstance(images, (str, os.PathLike, bytes, int, Image.Image)):
        images = [images]
    # The entries of an open file are its lines, and those of a buffer are numbers, which would be taken for ids.
    if not isinstance(images, Iterable) or isinstance(images, (bytearray, memoryview)) or hasattr(images, "read"):
        raise _no_picture(images)
    sources = [_plain(image) for image in images]
    if any(isinstance(source, bool) for source in sources):
        raise _no_picture(True)
    return sources


def _no_picture(value: Any) -> ValueError:
    return ValueError(
        "a picture must be a path, the bytes of a file, the id of a picture of the index or a picture of Pillow, or "
        f"images a list of these, got {type(value).__name__}."
    )


def _plain(value: Any) -> Any:
    """Return Python's own number for one of numpy's, as columns of tables hold them; all else unchanged."""
    return value.item() if isinstance(value, np.generic) else value


def _check(
    sources: Sequence[Source],
    text: str | None,
    k: int,
    image_weight: float,
    weights: Sequence[float] | None,
    without_weight: float,
    min_score: float | None,
) -> None:
    if not sources and text is None:
        raise ValueError("there is nothing to look for: name a picture, a text, or both.")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST_RESULTS:
        raise ValueError(f"k must be a whole number from 1 to {MOST_RESULTS:,}, got {k!r}.")
    ranges = {"image_weight": (image_weight, 0.0, 1.0), "without_weight": (without_weight, 0.0, 100.0)}
    if min_score is not None:
        ranges["min_score"] = (min_score, -1.0, 1.0)
    for name, (value, least, most) in ranges.items():
        if not is_number(value) or not least <= value <= most:
            raise ValueError(f"{name} must be a number from {least:g} to {most:g}, got {value!r}.")
    if weights is not None:
        if len(weights) != len(sources):
            raise ValueError(f"weights must be one for each picture: {len(sources)} pictures, {len(weights)} weights.")
        if not all(is_number(weight) and 0 < weight <= 1000 for weight in weights):
            raise ValueError(f"weights must be numbers > 0 and <= 1000, got {list(weights)}.")
