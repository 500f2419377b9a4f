"""Read checkpoint files safely and load them strictly."""

from __future__ import annotations

import logging
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from torch import Tensor, nn

from lavis_cir_plugin.core.error_messages import first_line, printable
from lavis_cir_plugin.core.processes import fail_in_all_processes, rank_and_world

PREFERRED = ("model", "state_dict", "model_state_dict")
"""If a file holds several state dictionaries, `read_state` takes the first of these keys."""

WRAPPERS = ("module.", "model.", "_orig_mod.")
"""Prefixes that DistributedDataParallel, Lightning and torch.compile put before every name."""

INTEGER_ENDINGS = ("num_batches_tracked", "position_ids")
"""Ends of tensor names. These tensors hold integers in any model."""

_IS_FOLDER = 0x10  # a bit of the external attributes of a zip record
_ZIP = b"PK\x03\x04"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _NumpyType:
    """Stand in for numpy's data type while a numpy number is read, so that no code from the file runs."""

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Sequence[Any]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


def _numpy_number(kind: _NumpyType, content: bytes) -> Any:
    """Return as a plain number what numpy's ``scalar(dtype, bytes)`` would return as a numpy number."""
    if kind.dtype.kind not in "biufc":
        raise ValueError(f"a value of numpy's type {kind.dtype} is no number")
    return np.frombuffer(content, kind.dtype, count=1)[0].item()


def read_state(path_or_url: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state dictionary inside a checkpoint file.

    The file holds a bare state dictionary, or the ``{"model": ...}`` of LAVIS and BLIP-2, or any dictionary of which
    exactly one value is a state dictionary, such as SPRC's ``{"epoch": ..., "Blip2QformerCirAlignPrompt": ...}``. If
    several values are state dictionaries, the first key of `PREFERRED` decides. If all names share a prefix of
    `WRAPPERS`, the function takes the prefix off. It logs both. It unpickles only tensors, plain containers and numbers
    (``weights_only``).

    Args:
        path_or_url: Path of a local file, or a URL. The URL is downloaded once into torch's hub cache.

    Raises:
        FileNotFoundError: If the file is missing or the download fails.
        ValueError: If the file is damaged, is not a checkpoint, holds anything but tensors and plain containers, holds
            no state dictionary or several, or holds tensors that are not dense (sparse, quantised, without values).
    """
    return state_in(read_checkpoint(path_or_url), os.fspath(path_or_url))


def state_in(content: Any, source: str) -> dict[str, Tensor]:
    """Return the state dictionary in the content of a checkpoint file. :func:`read_state` states the rules.

    Args:
        content: Unpickled content of the file.
        source: Name of the file for error messages.

    Raises:
        ValueError: If the content holds no state dictionary, or several.
    """
    state = _chosen_state(content, source)
    _check_dense(state, source)
    return _without_wrappers(state, source)


def config_in(content: Any) -> Mapping[str, Any]:
    """Return the config in the content of a checkpoint file; it is empty if no run wrote the file."""
    config = content.get("config") if isinstance(content, Mapping) else None
    return config if isinstance(config, Mapping) else {}


def finetuned_in(section: Mapping[str, Any]) -> str | None:
    """Return the checkpoint ``finetuned`` of a section ``model``, or None unless ``load_finetuned`` is true.

    Raises:
        ValueError: If ``load_finetuned`` is true and no checkpoint is named.
    """
    if not section.get("load_finetuned"):
        return None
    if not section.get("finetuned"):
        raise ValueError("model.load_finetuned is true and model.finetuned is empty; name a checkpoint file or URL.")
    return str(section["finetuned"])


def _chosen_state(content: Any, source: str) -> dict[str, Tensor]:
    if _is_state(content):
        return dict(content)
    states = {key: value for key, value in content.items() if _is_state(value)} if isinstance(content, Mapping) else {}
    taken = next(iter(states)) if len(states) == 1 else next((key for key in PREFERRED if key in states), None)
    if taken is None:
        raise ValueError(f"checkpoint {source}: {_why_no_state(content, len(states))}.")
    if len(states) > 1:
        others = ", ".join(printable(key) for key in states if key != taken)
        logging.warning("%s holds %d state dictionaries: %s is taken, not %s", source, len(states), taken, others)
    return dict(states[taken])


def _why_no_state(content: Any, count: int) -> str:
    """Return the part of an error message that follows the file name: why no state dictionary can be taken."""
    if isinstance(content, Mapping):
        for mapping in (content, *(value for value in content.values() if isinstance(value, Mapping))):
            if count or not any(isinstance(item, Tensor) for item in mapping.values()):
                continue
            strangers = {key: item for key, item in mapping.items() if not isinstance(item, Tensor)}
            for key, item in strangers.items():
                return (
                    f"{len(strangers)} of {len(mapping)} entries beside its tensors are none (first: {printable(key)}, "
                    f"of type {type(item).__name__}); save the tensors in a dictionary of their own"
                )
            key = next(key for key in mapping if not isinstance(key, str))
            return f"its tensors have names that are no text (first: {printable(key)}, of type {type(key).__name__})"
    found = ", ".join(map(printable, content)) if isinstance(content, Mapping) else type(content).__name__
    return f"expected one state dictionary (name to tensor), found {count} (content: {found or 'nothing'})"


def _without_wrappers(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Remove the prefixes that other programs put before every name."""
    taken_off = ""
    while (
        wrapper := next((word for word in WRAPPERS if all(name.startswith(word) for name in state)), None)
    ) is not None:
        state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
        taken_off += wrapper
    if taken_off:
        logging.info("all names in %s begin with %r, which is left out", source, taken_off)
    return state


def read_checkpoint(path_or_url: str | os.PathLike[str]) -> Any:
    """Return the content of a checkpoint file on the CPU; only tensors, plain containers and numbers are unpickled.

    Numpy numbers become plain numbers. The function verifies the checksums of torch's zip files.

    Raises:
        FileNotFoundError: As :func:`read_state` does.
        ValueError: If the file is damaged, is not a checkpoint, or holds anything but tensors and plain containers.
    """
    path = _local_file(path_or_url)
    with path.open("rb") as file:
        head = file.read(512)
    if path.suffix == ".safetensors" or head[8:10] == b'{"':
        return read_safetensors(path)
    if head.startswith(_ZIP):
        verify_checkpoint(path)
    try:
        with _plain_numbers():
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the content of a foreign file decides which error is raised
        raise ValueError(
            f"checkpoint {path}: cannot be read as tensors and plain containers, because {_why_unread(head, error)}."
        ) from None


def mapped_checkpoint(path: Path) -> Any:
    """Return the content of a checkpoint file, or None for a file that only :func:`read_checkpoint` may judge.

    The file is mapped, so that the weights of a large model cost no memory, and is not compared with its checksums.
    """
    try:
        with _plain_numbers():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # what reads the file for its weights reports what is wrong with it
        return None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` file; raise ValueError if the file has another format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} cannot be read as safetensors ({first_line(error)}).") from error


def _plain_numbers() -> AbstractContextManager[None]:
    """Let ``torch.load(weights_only=True)`` read the numbers of numpy 1 and numpy 2 as plain numbers."""
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    allowed = [(_numpy_number, name) for name in names]
    context: AbstractContextManager[None] = torch.serialization.safe_globals([*allowed, (_NumpyType, "numpy.dtype")])
    return context


def _why_unread(head: bytes, error: Exception) -> str:
    """Return why a file is unreadable, in our own words, because torch's message advises to unpickle any content."""
    text = head.lstrip().lower()
    if not head:
        return "it is empty"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the weights: run 'git lfs pull' in its repository, or download the file"
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "it is a web page, not the weights: the server sent it in their place; download the file itself"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "it is compressed: unpack it"
    message = str(error)
    if "TorchScript" in message:
        return "it is a TorchScript archive: save model.state_dict() by torch.save"
    for pattern in (
        r"unsupported global:? (?:GLOBAL )?([\w.]+)",
        r"but got <class '([\w.]+)'>",
        r"function <[\w -]* ([\w.]+)",
    ):
        found = re.search(pattern, message, re.IGNORECASE)
        if found:
            return (
                f"it holds an object of {found[1]} beside its tensors, and such objects are never unpickled: save "
                "model.state_dict() alone by torch.save, in the program that wrote the file"
            )
    if head.startswith(_ZIP):  # the checksums are right
        return "it is a zip file that torch.save did not write: if the weights lie in it, unpack it"
    if head.startswith(b"\x80"):
        return f"it is truncated or damaged ({type(error).__name__})"
    return f"it is no checkpoint: it begins with {printable(head[:16])}"


def write_checkpoint(content: Any, folder: Path, name: str, previous: str | None = None) -> None:
    """Write a checkpoint to a temporary file, then move it into place.

    Args:
        content: What ``torch.save`` writes.
        folder: Folder of the checkpoint.
        name: File name of the checkpoint.
        previous: File name under which the checkpoint of that name before this one is kept; None keeps none.

    Raises:
        OSError, RuntimeError: If it cannot be written; both older files then stay unchanged.
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
    """Compare every record of a checkpoint file with its checksum. torch does not do this when it loads a file.

    The function logs a warning if the file has no checksums (``torch.serialization.set_crc32_options(False)``).

    Raises:
        ValueError: If the file is cut short or any of its bytes differs.
    """
    try:
        with zipfile.ZipFile(path) as records:
            # If a record is marked as a folder, torch reads nothing and returns uninitialised memory.
            folders = [record.filename for record in records.infolist() if record.external_attr & _IS_FOLDER]
            if not any(record.CRC for record in records.infolist()) and not folders:
                logging.warning("%s was written without check sums, so that damage in it would not be noticed", path)
                return
            damaged = folders[0] if folders else records.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        damaged = first_line(error)
    if damaged is not None:
        raise ValueError(f"checkpoint {path} is damaged or was only half written ({printable(damaged)}).")


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    unused: Sequence[str] = (),
    fresh: Sequence[str] = (),
    may_lack: Sequence[str] = (),
) -> None:
    """Load a state dictionary and refuse everything that does not match.

    Args:
        model: Model that takes the weights. It stays unchanged if anything is refused.
        state: Tensors by name.
        source: Name of the file for messages.
        unused: Names in the checkpoint that this model does not need. A name that ends in a dot stands for all names
            that begin with it.
        fresh: Names in the model that keep their initial values if the checkpoint lacks them; dots as for ``unused``.
        may_lack: Names that the checkpoint may omit because they were loaded before; dots as for ``unused``.

    Raises:
        ValueError: If names are unexpected or missing, or shapes differ. The message counts them, names the first, and
            gives the numbers of blocks if those differ. Also if a tensor is not dense, or if it holds no floats but
            the model's tensor does.
    """
    own = model.state_dict()
    _check_dense(state, source)
    allowed = {*fresh, *may_lack}
    known = {name: tensor for name, tensor in state.items() if not _is_among(name, unused)}
    unexpected = [name for name in known if name not in own]
    missing = [name for name in own if name not in known and not _is_among(name, allowed)]
    # Buffers such as position ids are constants. Some versions write them and others do not.
    buffers = {name for name, _ in model.named_buffers()}
    missing = [name for name in missing if name not in buffers]
    reshaped = [name for name in known if name in own and known[name].shape != own[name].shape]
    loaded = len(known) - len(unexpected) - len(reshaped)
    problems = []
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected keys (first: {printable(unexpected[0])})")
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
        cause = _common_prefix(known, own) or (
            "It belongs to another model or type: check model.arch, model.model_type and model.fusion against it."
        )
        raise ValueError(f"checkpoint {source}: {', '.join(problems)}; {loaded} of {len(own)} keys match. {cause}")
    _check_floats(known, own, source)
    model.load_state_dict(known, strict=False)
    _log_conversions(Counter((tensor.dtype, own[name].dtype) for name, tensor in known.items()), source)
    kept = [name for name in own if name not in known]
    if not kept:
        logging.info("loaded all %d tensors of the model from %s", len(own), source)
        return
    logging.info(
        "loaded %d tensors from %s; the model's other %d are not in it and stay as they are (first: %s)",
        len(known),
        source,
        len(kept),
        kept[0],
    )


def as_float32(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return a state dictionary with every float tensor as float32; log conversions and keep integers.

    Raises:
        ValueError: If a tensor has a type that holds no weights and its name does not end in one of `INTEGER_ENDINGS`.
    """
    strangers = {
        name: tensor
        for name, tensor in state.items()
        if tensor.dtype not in _FLOATS and not name.endswith(INTEGER_ENDINGS)
    }
    if strangers:
        name, tensor = next(iter(strangers.items()))
        raise _no_floats(source, len(strangers), f"{printable(name)} is {_short(tensor.dtype)}")
    kinds = Counter((tensor.dtype, torch.float32) for tensor in state.values() if tensor.dtype in _FLOATS)
    _log_conversions(kinds, source)
    return {name: tensor.float() if tensor.dtype in _FLOATS else tensor for name, tensor in state.items()}


def _check_dense(state: Mapping[str, Any], source: str) -> None:
    """Raise ValueError if a tensor has no values or does not store a value for each element."""
    for name, tensor in state.items():
        kinds = {
            f"a {type(tensor).__name__}": not isinstance(tensor, Tensor),
            "a quantised tensor": getattr(tensor, "is_quantized", False),
            "a meta tensor, which has a shape and no values": getattr(tensor, "is_meta", False),
            "a nested tensor": getattr(tensor, "is_nested", False),
            "a sparse tensor": getattr(tensor, "layout", torch.strided) != torch.strided,
        }
        kind = next((kind for kind, is_so in kinds.items() if is_so), None)
        if kind is not None:
            raise ValueError(
                f"checkpoint {source}: {printable(name)} is {kind}; save the weights as dense tensors "
                "(tensor.to_dense(), tensor.dequantize())."
            )


def _check_floats(state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError if the model has floats where the file has none: torch would cast True to 1.0."""
    strangers = [name for name in state if own[name].is_floating_point() and state[name].dtype not in _FLOATS]
    if strangers:
        name = strangers[0]
        here = f"{printable(name)} is {_short(state[name].dtype)} there and {_short(own[name].dtype)} here"
        raise _no_floats(source, len(strangers), here)


def _no_floats(source: str, count: int, first: str) -> ValueError:
    return ValueError(
        f"checkpoint {source}: {count} tensors are of a type that holds no weights (first: {first}); allowed are "
        f"{', '.join(map(_short, _FLOATS))}: save it so, or name another file."
    )


def _log_conversions(kinds: Mapping[tuple[torch.dtype, torch.dtype], int], source: str) -> None:
    for (there, here), count in kinds.items():
        if there != here:
            logging.info("converted %d tensors of %s from %s to %s", count, source, _short(there), _short(here))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _common_prefix(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """Return a hint if all names of a file share a prefix and the model knows them without it, otherwise ''."""
    parts = next(iter(state), "").split(".")[:-1]
    for count in range(1, len(parts) + 1):
        prefix = ".".join(parts[:count]) + "."
        known = sum(name[len(prefix) :] in own for name in state)
        if known and all(name.startswith(prefix) for name in state):
            return f"All its names begin with {printable(prefix)}, and without that {known} of them match: take it off."
    return ""


def count_blocks_in(names: Iterable[str]) -> dict[str, int]:
    """Return the number of numbered blocks in each stack of a model, such as 39 for ``visual_encoder.blocks``.

    Args:
        names: Names of the model's tensors. Stacks inside the blocks of another stack are not counted.

    Returns:
        The number of blocks by the name of the stack.
    """
    numbers: dict[str, set[str]] = {}
    for name in names:
        found = re.match(r"(.+?)\.(\d+)\.", name)
        if found:
            numbers.setdefault(found[1], set()).add(found[2])
    return {stack: len(blocks) for stack, blocks in numbers.items()}


def _is_among(name: str, entries: Collection[str]) -> bool:
    return name in entries or name.startswith(tuple(entry for entry in entries if entry.endswith(".")))


def _local_file(path_or_url: str | os.PathLike[str]) -> Path:
    path_or_url = os.fspath(path_or_url)
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
    """Return the file in torch's cache, which LAVIS also uses.

    The main process downloads a missing file, and after it the first process of each machine that does not see it.
    """
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    for is_due in (rank_and_world()[0] == 0, os.environ.get("LOCAL_RANK") == "0"):
        with fail_in_all_processes():
            if is_due and not cached.is_file():
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
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(item, Tensor) for name, item in value.items())
    )
