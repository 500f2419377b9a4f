#!/usr/bin/env bash
# torch 2.13.0: a module's submodule, parameter or buffer counts for isinstance() with a runtime-checkable protocol on Python 3.11, not from 3.12 on.
#
# Expected: `isinstance(model, HasTower)` is true for a module whose `model.tower` is another module, as hasattr() says.
# What happens: from Python 3.12 on such a check looks attributes up statically. nn.Module keeps submodules, parameters and buffers in
# dictionaries of its own and finds them in __getattr__, which a static look-up does not call. A plain attribute or a property is found.
# No warning is given: the same code takes the other branch after an upgrade of Python.
#
# Seen with Python 3.12:
#     attribute: hasattr True, isinstance True
#     property:  hasattr True, isinstance True
#     submodule: hasattr True, isinstance False
#     parameter: hasattr True, isinstance False
#     buffer:    hasattr True, isinstance False
# With Python 3.11 every line says True twice.
#
# Why it matters here: "does this model have an image tower of its own?" decides whether features are cached. Ask with hasattr().
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class HasTower(Protocol):
    tower: Any


class Attribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = "a name"


class Property(nn.Module):
    @property
    def tower(self):
        return "a name"


class Submodule(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Linear(2, 2)


class Parameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.tower = nn.Parameter(torch.zeros(2))


class Buffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("tower", torch.zeros(2))


is_static = sys.version_info >= (3, 12)
for kind in (Attribute, Property, Submodule, Parameter, Buffer):
    model = kind()
    found = isinstance(model, HasTower)
    print(f"{kind.__name__.lower() + ':':10} hasattr {hasattr(model, 'tower')}, isinstance {found}")
    expected = kind in (Attribute, Property) or not is_static
    assert hasattr(model, "tower") and found == expected, "the behaviour has changed"
PY
