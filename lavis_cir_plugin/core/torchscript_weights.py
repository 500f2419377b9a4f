"""Read the weights of a TorchScript file as a zip of tensors, without loading its program."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, EOFError, RuntimeError)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Return parameters and buffers of a TorchScript module by their names, on the CPU.

    Raises:
        ValueError: If the file is no such module, or holds anything but modules, tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            with archive.open(pickled) as file:
                root = _Unpickler(file, archive, pickled.partition("/")[0]).load()
            if not isinstance(root, _Module):
                raise ValueError(f"it holds a {type(root).__name__}, no module")
            return dict(_weights(root, "", _declared(archive)))
    except (*_UNREADABLE, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"checkpoint {path} cannot be read as TorchScript ({error}).") from error


class _Module:
    """A module of the file: the name of its class, and its attributes."""

    kind = ""

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(file)
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type(name, (_Module,), {"kind": f"{module}.{name}"})
        if module == "torch" and name in _TYPES:
            return _TYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # lists of one type, and types of containers
            return _first
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not read")

    def persistent_load(self, entry: Any) -> Tensor:
        _, kind, key, *_ = entry
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.folder}/data/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=kind) if content else torch.empty(0, dtype=kind)
        return self.storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _first(value: Any, *_: Any) -> Any:
    return value


def _declared(archive: zipfile.ZipFile) -> dict[str, set[str]]:
    """Return, by class, the attributes that are parameters or buffers; other tensors, such as masks, are no weights."""
    declared = {}
    for name in archive.namelist():
        found = re.match(r"[^/]+/code/(.+)\.py$", name)
        if found:
            parts = re.split(r"(?m)^class (\w+)\(Module\):$", archive.read(name).decode())
            for kind, body in zip(parts[1::2], parts[2::2]):
                lists = re.findall(r"(?m)^  __(?:parameters|buffers)__ = \[(.*)\]", body)
                declared[f"{found[1].replace('/', '.')}.{kind}"] = set(re.findall(r'"(.*?)"', " ".join(lists)))
    return declared


def _weights(module: _Module, prefix: str, declared: dict[str, set[str]]) -> Iterator[tuple[str, Tensor]]:
    for name, value in module.attributes.items():
        if isinstance(value, _Module):
            yield from _weights(value, f"{prefix}{name}.", declared)
        elif isinstance(value, Tensor) and name in declared[module.kind]:
            yield f"{prefix}{name}", value
