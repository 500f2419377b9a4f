"""Read weights in transformers' format, one file or shards with an index, from a folder or the Hugging Face hub."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lavis_cir_plugin.core.checkpoints import read_state
from lavis_cir_plugin.core.error_messages import first_line

__all__ = ["FolderWeights", "is_hub_name", "read_folder"]

# Stem and ending of the weight files of each format, in the order in which transformers looks for them.
_FORMATS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_FILE_ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")


class FolderWeights(NamedTuple):
    """Content of a folder that transformers wrote."""

    state: dict[str, Tensor]
    """Every tensor of the weights under its name in the file."""
    config: dict[str, Any]
    """Content of ``config.json``, or {} if the file is missing."""
    path: Path
    """Path of the folder."""


def is_hub_name(source: str) -> bool:
    """Return whether a text reads as ``owner/name`` and names no existing file or folder."""
    is_named = _HUB_NAME.fullmatch(source) is not None and not source.endswith(_FILE_ENDINGS)
    return is_named and not Path(source).exists()


def read_folder(source: str | Path, beside: Sequence[str] = ()) -> FolderWeights:
    """Return the weights in a folder or in a hub repository, which is downloaded once into the hub's cache.

    Args:
        source: Path of a folder with ``model.safetensors`` or ``pytorch_model.bin``, whole or as shards with an index,
            or the name of a hub repository. If a folder has both formats, safetensors are read, as in transformers.
        beside: Names of further files that are downloaded from a hub repository if it has them.

    Raises:
        FileNotFoundError: If the files are missing or the hub cannot be reached.
        ValueError: If the files contradict each other: a single file lies beside shards, the index does not name a
            shard, or a shard holds other tensors than the index says.
    """
    is_on_hub = isinstance(source, str) and is_hub_name(source)
    folder = _downloaded(str(source), beside) if is_on_hub else Path(source).expanduser()
    return FolderWeights(_read_weights(folder), read_config(folder), folder)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's ``config.json``, or {} if the file is missing.

    Raises:
        ValueError: If the file holds no JSON object.
    """
    path = folder / "config.json"
    return _read_object(path) if path.is_file() else {}


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for stem, ending in _FORMATS:
        single, index = folder / f"{stem}{ending}", folder / f"{stem}{ending}.index.json"
        shards = sorted(path.name for path in folder.glob(f"{stem}-*-of-*{ending}"))
        if single.is_file() and (index.is_file() or shards):
            raise ValueError(
                f"{folder} holds {single.name} and beside it {index.name if index.is_file() else shards[0]}, which may "
                "be older or newer weights; remove those that are not meant."
            )
        if single.is_file():
            return read_state(str(single))
        if index.is_file():
            return _read_shards(index, shards)
        if shards:
            raise FileNotFoundError(f"{folder} holds {shards[0]} without {index.name}, which says what belongs to it.")
    raise FileNotFoundError(
        f"{folder} is a folder with neither model.safetensors nor pytorch_model.bin, whole or in shards; name the "
        "folder or the file that holds the weights."
    )


def _read_shards(index: Path, present: list[str]) -> dict[str, Tensor]:
    places = _read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has no weight_map that names a file for each tensor; get this file again.")
    listed = sorted(set(places.values()))
    strange = [name for name in listed if name not in present]
    if strange:
        raise FileNotFoundError(f"{index} names {strange[0]}, which is not in this folder; get the missing shards.")
    stale = [name for name in present if name not in listed]
    if stale:
        raise ValueError(
            f"{index.parent} holds {stale[0]}, which {index.name} does not name; remove the shards of other weights."
        )
    state: dict[str, Tensor] = {}
    for name in listed:
        shard = read_state(str(index.parent / name))
        expected = {tensor for tensor, place in places.items() if place == name}
        differing = sorted(expected ^ shard.keys())
        if differing:
            raise ValueError(
                f"{index.parent / name} and {index.name} disagree on {len(differing)} tensors (first: {differing[0]}); "
                "get both from the same source."
            )
        state.update(shard)
    return state


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({first_line(error)}); get this file again.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}; get this file again.")
    return dict(content)


def _downloaded(name: str, beside: Sequence[str]) -> Path:
    """Return the cache folder of a hub repository with its safetensors, or with the older format if it has none."""
    from huggingface_hub import snapshot_download

    try:
        for stem, ending in _FORMATS:
            wanted = ["config.json", f"{stem}*{ending}", f"{stem}*{ending}.index.json", *beside]
            folder = Path(snapshot_download(name, allow_patterns=wanted))
            if any(folder.glob(f"{stem}*{ending}")):
                return folder
    except Exception as error:  # the hub's client raises errors of many types
        raise FileNotFoundError(
            f"{name!r} is neither a file nor a folder (looked from {os.getcwd()}), and as a name on the Hugging Face "
            f"hub it cannot be downloaded ({first_line(error)}). Without a network, download its files elsewhere and "
            "set model.pretrained to their folder."
        ) from error
    logging.info("%s has weights in none of the two formats of transformers", name)
    return folder
