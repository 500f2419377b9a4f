"""An index that is asked in Qdrant: candidates come from there, and are scored again here from their features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_cir_plugin.search.build import refuse_another_model
from lavis_cir_plugin.search.catalogue import Picture, ReadableCatalogue, condition_columns
from lavis_cir_plugin.search.filters import Column
from lavis_cir_plugin.search.gallery import FEW_ALLOWED, SAMPLE, Gallery
from lavis_cir_plugin.search.qdrant import Collection, Point, connect
from lavis_cir_plugin.search.qdrant_filters import translate
from lavis_cir_plugin.search.questions import Asked, Ranked, Searcher

_MORE = 8
"""Candidates beyond those that are wanted, since the engine's scores differ in the last bits."""


class QdrantIndex(Searcher):
    """An index in a collection of Qdrant; every question sees the collection's newest state.

    Args:
        collection: The collection.
        encoder: The encoder instead of the one that the index names: an `Encoder`, or what ``load_run`` returned.
        device: The device that the model is loaded to.
    """

    def __init__(self, collection: Collection, encoder: Any = None, device: str | torch.device = "cpu") -> None:
        super().__init__(collection.url, encoder, device)
        self.collection = collection
        self._read_state()
        if self._given is not None:
            refuse_another_model(self.place, self.state.identity, self._given)

    def _read_state(self) -> None:
        state = self.collection.state()
        if not state.is_complete:
            raise ValueError(f"{self.place} is half-written; run lavis-cir index --to {self.place} again to finish it.")
        if "encoder" in vars(self):
            refuse_another_model(self.place, state.identity, self.encoder)
        self.state = state

    def __len__(self) -> int:
        return self.state.pictures

    def picture(self, picture_id: int) -> Picture | None:
        """Return a picture by its id; ``None`` where the collection has none of it."""
        point = self.collection.of_picture(picture_id, len(self.state.columns))
        return None if point is None else self._catalogue([point]).by_id(picture_id)

    def _made_by(self) -> tuple[str, Mapping[str, str]]:
        return self.state.name, self.state.identity

    def _condition_columns(self) -> Mapping[str, Column]:
        self._read_state()
        return condition_columns(self.state.own)

    def _catalogue(self, points: list[Point]) -> ReadableCatalogue:
        records = sorted((record for point in points for record in point.records), key=lambda record: record.id)
        return ReadableCatalogue.of_records(self.state.own, records)

    def _paths_of_contents(self, contents: frozenset[str]) -> list[str]:
        found = self.collection.of_contents(sorted(contents), len(self.state.columns))
        return [point.records[0].path for point in found]

    def _measured_recall(self) -> float:
        return self.state.recall

    def _shares_below(self, vector: Tensor, scores: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], bool]:
        total = self.collection.count()
        is_sampled = total > SAMPLE
        if not len(scores):
            return scores, is_sampled
        models = self.collection.models
        sampled = models.FieldCondition(key="sampled_by", range=models.Range(lt=SAMPLE / total))
        condition = models.Filter(must=[sampled]) if is_sampled else None
        ordered = np.sort(self.collection.scores(vector, condition, 2 * SAMPLE))
        return np.searchsorted(ordered, scores - 1e-5, side="left") / max(1, len(ordered)), is_sampled

    def _ranking(self, asked: Asked) -> Callable[[int], Ranked]:
        state, collection = self.state, self.collection
        condition = None
        if asked.condition is not None:
            condition = translate(asked.condition, state.keys, collection.values)
        total = collection.count(condition)
        scans = asked.exact or not state.recall or total * state.shape[0] <= FEW_ALLOWED or not collection.indexed()
        # A sum of D products of single precision, in any order.
        error = state.shape[1] * 2.0**-23 * state.longest

        def best(count: int) -> Ranked:
            limit, visited = count + _MORE, None if scans else max(state.visited, count + _MORE)
            while True:
                points = collection.best(asked.vector, condition, limit, visited, len(state.columns)) if total else []
                if visited is not None and len(points) < min(limit, total):
                    visited = None  # the graph found too few for this condition
                    continue
                has_all = len(points) < limit
                ranked = self._scored(asked, points, visited is None, total)
                # What the engine left out scores at most this here.
                certain = len(points) if has_all else int((ranked.scores > points[-1].score + error).sum())
                if has_all or certain >= count:
                    kept = min(count, certain)
                    return replace(ranked, rows=ranked.rows[:kept], scores=ranked.scores[:kept])
                limit *= 4

        return best

    def _scored(self, asked: Asked, points: list[Point], is_exact: bool, total: int) -> Ranked:
        """Score points by the features themselves; equal scores in order of the index's rows."""
        points = sorted(points, key=lambda point: point.row)
        shape = (len(points), *self.state.shape)
        features = torch.from_numpy(np.array([point.features for point in points], dtype=np.float16).reshape(shape))
        looks = np.array([point.look for point in points], dtype=np.uint8)
        best = Gallery(features, self.state.longest).best(asked.vector, max(1, len(points)))
        by_row = self._catalogue(points).of_rows(sorted({point.row for point in points}), asked.condition)
        # While a compacted index is being copied, two contents may have the same row.
        pictures = {
            place: [picture for picture in by_row[point.row] if picture.sha256 == point.records[0].sha256.hex()]
            for place, point in enumerate(points)
        }
        return Ranked(best.rows, best.scores, pictures, features, looks, is_exact, total)


def open_collection(url: str, encoder: Any = None, device: str | torch.device = "cpu") -> QdrantIndex:
    """Open the copy of an index in Qdrant for searching; its model is loaded when the first query comes.

    Args:
        url: Where it is, such as ``http://localhost:6333/photos``; the environment's ``QDRANT_API_KEY`` is sent along.
        encoder: The encoder instead of the one that the index names: an `Encoder`, or what ``load_run`` returned.
        device: ``cpu`` or ``cuda``, for the model.

    Raises:
        FileNotFoundError: there is no such collection.
        ValueError: it is half-written, or was made by another model or by something else.
        ConnectionError: the server does not answer, or refuses.
    """
    return QdrantIndex(connect(url), encoder, device)
