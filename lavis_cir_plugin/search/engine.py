"""An opened index: it ranks its pictures for reference pictures, a text, or both."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
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
from lavis_cir_plugin.search.candidates import Candidates
from lavis_cir_plugin.search.catalogue import Picture, ReadableCatalogue
from lavis_cir_plugin.search.duplicates import Kinds
from lavis_cir_plugin.search.encoder import Encoder, encoder_of, load_encoder
from lavis_cir_plugin.search.folders import MANIFEST
from lavis_cir_plugin.search.gallery import Best, Gallery
from lavis_cir_plugin.search.manifest import read_manifest

MOST_RESULTS = 10_000

WITHOUT_WEIGHT = 0.5

_FOLDED_AT_ONCE = 4

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
class _Query:
    vector: Tensor
    references: frozenset[str] = frozenset()


@dataclass
class _Found:
    """A row that is shown, and what is behind it."""

    row: int
    score: float
    pictures: list[Picture]
    alike: list[Picture] = field(default_factory=list)


class SearchIndex:
    """An opened index; may be asked by several threads, one query being encoded at a time.

    Args:
        path: The index's folder.
        encoder: The encoder instead of the one that the index names: an `Encoder`, or what ``load_run`` returned.
        device: The device that is searched on and that the model is loaded to.
    """

    def __init__(self, path: str | os.PathLike[str], encoder: Any = None, device: str | torch.device = "cpu") -> None:
        self.path = Path(path).expanduser().absolute()
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {device} was asked for and torch sees no GPU; use cpu.")
        self._encoding = threading.Lock()
        self._open()
        self._given = None if encoder is None else encoder_of(encoder)
        if self._given is not None:
            refuse_another_model(self.path, dict(self.manifest.identity), self._given)

    def _open(self) -> None:
        while True:
            stamp = _stamp(self.path)
            try:
                self._open_files()
                return
            except FileNotFoundError:  # a writer may have replaced the state between two steps; the new one is whole
                if _stamp(self.path) == stamp:
                    raise

    def _open_files(self) -> None:
        self._opened_at = _stamp(self.path)
        self.manifest = read_manifest(self.path)
        rows = self.manifest.rows
        self.catalogue = ReadableCatalogue(self.path / self.manifest.files["catalogue"])
        by_row = np.load(self.path / self.manifest.files["pictures"], mmap_mode="r", allow_pickle=False)
        pictures_rows = np.ascontiguousarray(by_row[:, 0])  # sorted
        live = pictures_rows[np.diff(pictures_rows, prepend=-1) > 0]
        features = self.manifest.features(self.path).tensor(rows)
        if self.device.type == "cuda":
            features = features.to(self.device)
        self.looks = self.manifest.looks(self.path).array(rows)
        candidates = self._candidates() if self.device.type == "cpu" else None  # a GPU scans faster than FAISS here
        self.gallery = Gallery(features, self.manifest.longest, None if len(live) == rows else live, candidates)

    def refreshed(self) -> SearchIndex:
        """Return this index, or a new one with the same loaded model where a writer has made a new state since.

        An opened index goes on seeing the state that it opened. So a server calls this between two requests.
        """
        if _stamp(self.path) == self._opened_at:
            return self
        fresh = SearchIndex(self.path, self._given, self.device)
        if "encoder" in vars(self) and fresh.manifest.identity == self.manifest.identity:
            fresh.encoder = self.encoder
        return fresh

    def picture(self, picture_id: int) -> Picture | None:
        """Return a picture by its id; ``None`` where the index has none of it."""
        return self.catalogue.by_id(picture_id)

    def _candidates(self) -> Candidates | None:
        facts = self.manifest.candidates
        if not facts:
            return None
        path = self.path / self.manifest.files["candidates"]
        return Candidates(path, int(facts["rows"]), self.manifest.shape[0], int(facts["probes"]))

    def __len__(self) -> int:
        return self.manifest.pictures

    @property
    def columns(self) -> tuple[str, ...]:
        """What a condition may name."""
        return tuple(self.catalogue.columns)

    @cached_property
    def encoder(self) -> Encoder:
        """What encodes queries: the given model, or the one that the index names, loaded when first needed.

        Raises:
            ValueError: the model is not what made the index any more.
            FileNotFoundError: it is gone.
        """
        if self._given is not None:
            return self._given
        if not self.manifest.name:
            raise ValueError(f"{self.path} names no model; hand over the encoder that made it.")
        encoder = load_encoder(self.manifest.name, self.device)
        refuse_another_model(self.path, dict(self.manifest.identity), encoder)
        return encoder

    def search(
        self,
        images: Source | Sequence[Source] = (),
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

        .. math:: q = \Big\lVert \sum_i w_i \, q(x_i, text) \Big\rVert^{-1} \dots - w_{without} \, t(without)

        The queries of several pictures are added, each with its weight; then the text to avoid is taken away.

        Args:
            images: One or more pictures; none for a text alone.
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
        """
        sources = _listed(images)
        text, without = (text or "").strip() or None, (without or "").strip() or None
        _check(sources, text, k, image_weight, weights, without_weight, min_score)
        condition = filters.parse(where, self.catalogue.columns) if where and where.strip() else None
        allowed = None if condition is None else self.catalogue.rows_where(condition)
        with self._encoding:
            query = self._query(sources, text, image_weight, weights, without, without_weight)
        hidden = frozenset() if keep_references else query.references
        return self._answer(query.vector, k, condition, allowed, min_score, fold, hidden, exact)

    def _query(
        self,
        sources: Sequence[Source],
        text: str | None,
        image_weight: float,
        weights: Sequence[float] | None,
        without: str | None,
        without_weight: float,
    ) -> _Query:
        loaded = [self._loaded(source) for source in sources]
        queries = self.encoder.query([picture for picture, _ in loaded], text, image_weight)
        if len(queries) > 1:
            chosen = torch.tensor(list(weights or [1.0] * len(queries)), dtype=torch.float32)
            queries = F.normalize((queries * chosen.unsqueeze(1)).sum(dim=0, keepdim=True), dim=1)
        if without:
            queries = F.normalize(queries - without_weight * self.encoder.query([], without), dim=1)
        return _Query(queries[0], frozenset(content for _, content in loaded if content))

    def _loaded(self, source: Source) -> tuple[Image.Image, str]:
        """Return a picture, upright, and the SHA-256 of its file; empty for a picture in memory."""
        if isinstance(source, Image.Image):
            return as_rgb(source, upright=True), ""
        if isinstance(source, int):
            picture = self.catalogue.by_id(source)
            if picture is None:
                raise ValueError(f"the index has no picture {source}; take an id from its results.")
            source = picture.path
        name = "the picture" if isinstance(source, bytes) else os.fspath(source)
        if not isinstance(source, bytes):
            path = Path(source).expanduser()
            if not path.is_file():
                raise FileNotFoundError(
                    f"{name} {'is no file' if path.exists() else 'does not exist'}; name a picture."
                )
            source = path.read_bytes()
        return decode_rgb(source, name, upright=True), hashlib.sha256(source).hexdigest()

    def _answer(
        self,
        vector: Tensor,
        k: int,
        condition: filters.Condition | None,
        allowed: np.ndarray[Any, Any] | None,
        min_score: float | None,
        fold: bool,
        hidden: frozenset[str],
        exact: bool,
    ) -> Answer:
        hidden_rows = {row for row in map(self.catalogue.row_of_content, hidden) if row is not None}
        wanted = k + len(hidden_rows)
        while True:
            best = self.gallery.best(vector, wanted, allowed, exact)
            found, folded = self._collect(best, k, condition, min_score, fold, hidden_rows)
            is_all = len(best.rows) < wanted or len(best.rows) == best.total
            is_below = min_score is not None and len(best.scores) > 0 and best.scores[-1] < min_score
            if len(found) >= k or is_all or is_below:
                break
            wanted *= _FOLDED_AT_ONCE
        hits = self._hits(vector, found[:k])
        left_out = [rows[0].path for rows in self.catalogue.of_rows(sorted(hidden_rows)).values() if rows]
        return Answer(
            hits=hits,
            searched=best.total,
            folded=folded,
            left_out=tuple(left_out),
            is_exact=best.is_exact,
            recall=1.0 if best.is_exact else float(self.manifest.candidates["recall"]),
            share_is_estimated=self.gallery.is_sampled,
        )

    def _collect(
        self,
        best: Best,
        k: int,
        condition: filters.Condition | None,
        min_score: float | None,
        fold: bool,
        hidden: set[int],
    ) -> tuple[list[_Found], int]:
        """Return the rows to show, near-duplicates behind the first of their kind, and how many pictures these are."""
        pairs = [
            (int(row), float(score))
            for row, score in zip(best.rows, best.scores)
            if row >= 0 and int(row) not in hidden and (min_score is None or score >= min_score)
        ]
        pictures = self.catalogue.of_rows([row for row, _ in pairs], condition)
        shown: list[_Found] = []
        kinds = Kinds(self.gallery.features, self.looks)
        for row, score in pairs:
            if not pictures[row]:
                continue
            kind = kinds.find(row) if fold else None
            if kind is not None:
                shown[kind].alike.extend(pictures[row])
            elif len(shown) < k:
                kinds.add(row)
                shown.append(_Found(row, score, pictures[row]))
        if fold:
            return shown, sum(len(found.pictures) - 1 + len(found.alike) for found in shown)
        every = [_Found(found.row, found.score, [picture]) for found in shown for picture in found.pictures]
        return every, 0

    def _hits(self, vector: Tensor, found: Sequence[_Found]) -> tuple[Hit, ...]:
        if not found:
            return ()
        shares = self.gallery.share_below(vector, np.array([item.score for item in found]))
        return tuple(
            Hit(item.pictures[0], item.score, float(share), (*item.pictures[1:], *item.alike))
            for item, share in zip(found, shares)
        )

    def close(self) -> None:
        """Close the catalogue's file."""
        self.catalogue.close()


def open_index(path: str | os.PathLike[str], encoder: Any = None, device: str | torch.device = "cpu") -> SearchIndex:
    """Open an index for searching; its model is loaded when the first query comes.

    Args:
        path: The index's folder.
        encoder: The encoder instead of the one that the index names: an `Encoder`, or what ``load_run`` returned.
        device: ``cpu`` or ``cuda``.

    Raises:
        FileNotFoundError: there is no index, or a file of it is missing.
        ValueError: it is half-written, of a newer format, tampered with, or made by another model.
    """
    return SearchIndex(path, encoder, device)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what differs between two states of an index: which file its manifest is, and since when."""
    try:
        found = os.stat(path / MANIFEST)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _listed(images: Source | Sequence[Source]) -> list[Source]:
    if isinstance(images, (str, os.PathLike, bytes, int, Image.Image)):
        return [images]
    return list(images)


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
