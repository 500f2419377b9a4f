"""An opened index: it ranks its pictures for reference pictures, a text, or both."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lavis_cir_plugin.search.build import refuse_another_model
from lavis_cir_plugin.search.candidates import Candidates, has_faiss
from lavis_cir_plugin.search.catalogue import Picture, ReadableCatalogue
from lavis_cir_plugin.search.filters import Column
from lavis_cir_plugin.search.folders import MANIFEST
from lavis_cir_plugin.search.gallery import Gallery
from lavis_cir_plugin.search.manifest import read_manifest
from lavis_cir_plugin.search.questions import Asked, Ranked, Searcher

logger = logging.getLogger(__name__)


def on_device(features: Tensor, device: torch.device, place: str) -> Tensor:
    """Return features on the device, or as they are, with a warning, where they do not fit into a GPU's memory."""
    if device.type != "cuda":
        return features
    try:
        return features.to(device)
    except torch.cuda.OutOfMemoryError:
        size = features.numel() * features.element_size() / 2**30
        logger.warning(
            "%s is searched on the CPU: its %.1f GiB of features do not fit on %s beside what is there",
            place, size, device,
        )  # fmt: skip
        return features


class SearchIndex(Searcher):
    """An opened index; may be asked by several threads, one query being encoded at a time.

    Args:
        path: The index's folder.
        encoder: The encoder instead of the one that the index names: an `Encoder`, or what ``load_run`` returned.
        device: The device that is searched on and that the model is loaded to.
    """

    def __init__(self, path: str | os.PathLike[str], encoder: Any = None, device: str | torch.device = "cpu") -> None:
        self.path = Path(path).expanduser().absolute()
        super().__init__(str(self.path), encoder, device)
        self._open()
        if self._given is not None:
            refuse_another_model(self.place, self.manifest.identity, self._given)

    def _open(self) -> None:
        while True:
            stamp = _stamp(self.path)
            try:
                self._open_files()
                return
            except (FileNotFoundError, ValueError):
                # A writer may have replaced the state between two steps; the new one is whole.
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
        features = on_device(self.manifest.features(self.path).tensor(rows), self.device, self.place)
        self.looks = self.manifest.looks(self.path).array(rows)
        candidates = self._candidates() if features.device.type == "cpu" else None  # a GPU scans faster than FAISS
        self.gallery = Gallery(features, self.manifest.longest, None if len(live) == rows else live, candidates)

    def refreshed(self) -> SearchIndex:
        """Return this index, or a new one with the same loaded model where a writer has made a new state since.

        An opened index goes on seeing the state that it opened. So a server calls this between two requests.

        Raises:
            ValueError, FileNotFoundError, RuntimeError: the new state, or the other model that made it, cannot be
                opened; a GPU that is full is a RuntimeError.
        """
        if _stamp(self.path) == self._opened_at:
            return self
        fresh = SearchIndex(self.path, self._given, self.device)
        if "encoder" in vars(self):
            try:
                if fresh.manifest.identity == self.manifest.identity:
                    fresh.encoder = self.encoder
                fresh.encoder  # noqa: B018 (another model is loaded now, while this state can still be kept)
            except BaseException:
                fresh.close()
                raise
        return fresh

    def picture(self, picture_id: int) -> Picture | None:
        """Return a picture by its id; ``None`` where the index has none of it."""
        return self.catalogue.by_id(picture_id)

    def _candidates(self) -> Candidates | None:
        facts = self.manifest.candidates
        if not facts:
            return None
        path = self.path / self.manifest.files["candidates"]
        found = Candidates(path, int(facts["rows"]), self.manifest.shape[0], int(facts["probes"]))
        if has_faiss():
            found.open()  # now, because a writer may replace the file before the first search
        return found

    def __len__(self) -> int:
        return self.manifest.pictures

    def _made_by(self) -> tuple[str, Mapping[str, str]]:
        return self.manifest.name, self.manifest.identity

    def _condition_columns(self) -> Mapping[str, Column]:
        return self.catalogue.columns

    def _paths_of_contents(self, contents: frozenset[str]) -> list[str]:
        rows = {row for row in map(self.catalogue.row_of_content, contents) if row is not None}
        return [pictures[0].path for pictures in self.catalogue.of_rows(sorted(rows)).values() if pictures]

    def _ranking(self, asked: Asked) -> Callable[[int], Ranked]:
        allowed = None if asked.condition is None else self.catalogue.rows_where(asked.condition)

        def best(count: int) -> Ranked:
            found = self.gallery.best(asked.vector, count, allowed, asked.exact)
            is_kept = found.rows >= 0
            if asked.min_score is not None:
                is_kept &= found.scores >= asked.min_score
            pictures = self.catalogue.of_rows(found.rows[is_kept].tolist(), asked.condition)
            return Ranked(
                found.rows, found.scores, pictures, self.gallery.features, self.looks, found.is_exact, found.total
            )

        return best

    def _shares_below(self, vector: Tensor, scores: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], bool]:
        return self.gallery.share_below(vector, scores) if len(scores) else scores, self.gallery.is_sampled

    def _measured_recall(self) -> float:
        return float(self.manifest.candidates["recall"])

    def close(self) -> None:
        """Close the catalogue's file; ``with open_index(...) as index`` does so at its end."""
        self.catalogue.close()

    def __enter__(self) -> SearchIndex:
        """Return this index, which the end of the ``with`` block closes."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the catalogue's file."""
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a copy, such as the one that a worker process gets, open the index's newest state for itself."""
        return type(self), (self.path, self._given, self.device)


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
