"""Read checkpoint files safely and load them strictly."""

from __future__ import annotations

import logging
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from lavis_cir_plugin.core.processes import fail_together, rank_and_world


def read_state(path_or_url: str) -> dict[str, Tensor]:
    """Return the state dictionary inside a checkpoint file.

    Understood are a bare state dictionary, LAVIS's and BLIP-2's ``{"model": ...}``, and any dictionary of which
    exactly one value is a state dictionary, such as SPRC's ``{"epoch": ..., "Blip2QformerCirAlignPrompt": ...}``.
    Only tensors and plain containers are unpickled (``weights_only``).

    Args:
        path_or_url: A local file, or a URL that is downloaded once into torch's hub cache.

    Raises:
        FileNotFoundError: If the file is missing or the download fails.
        ValueError: If the file is not a checkpoint, holds anything but tensors and plain containers, or holds no
            state dictionary or several.
    """
    return state_in(read_checkpoint(path_or_url), path_or_url)


def state_in(content: Any, source: str) -> dict[str, Tensor]:
    """Return the state dictionary in a checkpoint file's content, as :func:`read_state`.

    Raises:
        ValueError: If there is none or are several; ``source`` is what the message calls the file.
    """
    if _is_state(content):
        return dict(content)
    states = {key: value for key, value in content.items() if _is_state(value)} if isinstance(content, Mapping) else {}
    if "model" in states:
        return dict(states["model"])
    if len(states) == 1:
        return dict(next(iter(states.values())))
    found = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(
        f"checkpoint {source}: expected one state dictionary (name to tensor), found {len(states)} (content: {found})."
    )


def read_checkpoint(path_or_url: str) -> Any:
    """Return the content of a checkpoint file, on the CPU; only tensors and plain containers are unpickled.

    Raises:
        FileNotFoundError, ValueError: As :func:`read_state`.
    """
    path = _local_file(path_or_url)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint {path}: cannot be read as tensors and plain containers ({first_line(error)}). It is "
            "truncated, no checkpoint, or holds other Python objects, which are never unpickled."
        ) from error


def write_checkpoint(content: Any, folder: Path, name: str, previous: str | None = None) -> None:
    """Write a checkpoint beside its place and move it there when it is whole; keep the one before as ``previous``.

    Raises:
        OSError, RuntimeError: If it cannot be written; both older files are then as they were.
    """
    unfinished = folder / f".{name}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and (folder / name).exists():
            os.replace(folder / name, folder / previous)
        os.replace(unfinished, folder / name)
    finally:
        unfinished.unlink(missing_ok=True)


def verify_checkpoint(path: Path) -> None:
    """Compare every record of a checkpoint file with its check sum, which torch does not do when it loads one.

    Raises:
        ValueError: If the file is cut short or any of its bytes differs.
    """
    try:
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        damaged = first_line(error)
    if damaged is not None:
        raise ValueError(f"checkpoint {path} is damaged or was only half written ({damaged}).")


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    unused: Sequence[str] = (),
    fresh: Sequence[str] = (),
    may_lack: Sequence[str] = (),
) -> None:
    """Load a state dictionary, refusing everything that does not match.

    Args:
        model: Takes the weights; unchanged if anything is refused.
        state: Name to tensor.
        source: The file's name, for the messages.
        unused: Names in the checkpoint that this model has no use for; one that ends in a dot means all below it.
        fresh: Names in the model that start anew when the checkpoint lacks them, likewise.
        may_lack: Names that the checkpoint may leave out because they were loaded before, likewise.

    Raises:
        ValueError: If names are unexpected or missing, or shapes differ; with counts, the first of them, and the
            numbers of blocks where those differ.
    """
    own = model.state_dict()
    allowed = {*fresh, *may_lack}
    known = {name: tensor for name, tensor in state.items() if not _is_among(name, unused)}
    unexpected = [name for name in known if name not in own]
    missing = [name for name in own if name not in known and not _is_among(name, allowed)]
    # Buffers such as position ids are constants that some versions write and others do not.
    buffers = {name for name, _ in model.named_buffers()}
    missing = [name for name in missing if name not in buffers]
    reshaped = [name for name in known if name in own and known[name].shape != own[name].shape]
    loaded = len(known) - len(unexpected) - len(reshaped)
    problems = []
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected keys (first: {unexpected[0]})")
    if missing:
        problems.append(f"{len(missing)} missing keys (first: {missing[0]})")
    if reshaped:
        name = reshaped[0]
        problems.append(
            f"{len(reshaped)} keys of another shape (first: {name} is {tuple(known[name].shape)} there and "
            f"{tuple(own[name].shape)} here)"
        )
    there, here = count_blocks_in(known), count_blocks_in(own)
    problems += [
        f"{there[stack]} blocks of {stack} there and {count} here"
        for stack, count in here.items()
        if there.get(stack, count) != count
    ]
    if problems:
        raise ValueError(
            f"checkpoint {source}: {', '.join(problems)}; {loaded} of {len(own)} keys match. It belongs to another "
            "model or type: check model.arch, model.model_type and model.fusion against it."
        )
    model.load_state_dict(known, strict=False)
    logging.info("loaded %d of %d tensors from %s", len(known), len(own), source)


def count_blocks_in(names: Iterable[str]) -> dict[str, int]:
    """Return how many numbered blocks each stack of a model has, by its name: 39 of ``visual_encoder.blocks``, say.

    Args:
        names: Of the model's tensors. A stack inside another one's blocks is not counted.
    """
    numbers: dict[str, set[str]] = {}
    for name in names:
        found = re.match(r"(.+?)\.(\d+)\.", name)
        if found:
            numbers.setdefault(found[1], set()).add(found[2])
    return {stack: len(blocks) for stack, blocks in numbers.items()}


def _is_among(name: str, entries: Collection[str]) -> bool:
    return name in entries or name.startswith(tuple(entry for entry in entries if entry.endswith(".")))


def _local_file(path_or_url: str) -> Path:
    if urlparse(path_or_url).scheme in ("http", "https"):
        return _download(path_or_url)
    path = Path(os.path.expanduser(path_or_url))
    if path.is_dir():
        raise FileNotFoundError(
            f"checkpoint {path} is a folder; name the file in it, such as {path}/checkpoint_best.pth."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {path} does not exist (looked from {os.getcwd()}). Set model.pretrained or model.finetuned "
            "to a local file or a URL."
        )
    return path


def _download(url: str) -> Path:
    """Return the file in torch's cache, where LAVIS keeps downloads too; the main process fetches it if need be."""
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    with fail_together():
        if rank_and_world()[0] == 0 and not cached.is_file():
            _fetch(url, cached)
    return cached


def _fetch(url: str, cached: Path) -> None:
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(cached))
    except OSError as error:
        raise FileNotFoundError(
            f"checkpoint {url} cannot be downloaded ({first_line(error)}). Without a network, download it elsewhere "
            "and set model.pretrained or model.finetuned to the local file."
        ) from error


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(item, Tensor) for item in value.values())


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
