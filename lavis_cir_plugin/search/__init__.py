"""Search of one's own pictures: folders in, ranked answers out.

The whole public interface, which everything above this folder uses::

    build_index_folder(folders, out, encoder, *, metadata=None, forget=(), thorough=False, candidates="auto",
                       batch_size=64, workers=None, quiet=False) -> Built   # encoder: as for open_index
    load_encoder(name, device="cpu") -> Encoder       # a run, NAME:WEIGHTS of open_clip, or blip2:TYPE
    open_index(path, encoder=None, device="cpu") -> SearchIndex   # encoder: an Encoder, or what load_run returned
    open_collection(url, encoder=None, device="cpu") -> QdrantIndex  # search, columns, picture, len: the same

    len(index), index.columns, index.manifest, index.encoder
    index.search(images=(), text=None, k=10, *, image_weight=0.5, weights=None, without=None, without_weight=0.5,
                 where=None, min_score=None, fold=True, keep_references=False, exact=False) -> Answer
    index.picture(id) -> Picture | None
    index.refreshed() -> SearchIndex                  # itself, or the newest state with the same loaded model
    index.close()                                     # or: with open_index(path) as index

    Answer: hits, searched, folded, left_out, is_exact, recall, share_is_estimated
    Hit: picture, score, share_below, duplicates, path
    Picture: id, path, sha256, bytes, width, height, modified, added, columns
    answers.as_json(answer) -> dict; answers.picture_as_json(picture) -> dict

A query's picture is a path, a file's content as bytes, the id of an indexed picture, or a picture in memory. Errors
that a user can mend are ValueError, FileNotFoundError and OSError, each with one sentence. An opened index may be asked
by several threads. A worker process that is forked or spawned with one searches in its own copy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis_cir_plugin.search.build import build_index_folder
    from lavis_cir_plugin.search.encoder import Encoder, load_encoder
    from lavis_cir_plugin.search.engine import open_index
    from lavis_cir_plugin.search.qdrant_index import open_collection

__all__ = ["Encoder", "build_index_folder", "load_encoder", "open_collection", "open_index"]

_HOMES = {
    "Encoder": "encoder",
    "build_index_folder": "build",
    "load_encoder": "encoder",
    "open_collection": "qdrant_index",
    "open_index": "engine",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
