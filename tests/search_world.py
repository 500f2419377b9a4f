"""A folder of small pictures and a small real model that counts what it encodes, for the tests of search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from conftest import make_scoring_model
from PIL import Image
from torch import Tensor

from lavis_cir_plugin.processors import TargetPadProcessor
from lavis_cir_plugin.search import Encoder, build_index_folder


class CountingEncoder(Encoder):
    """Counts the pictures that it encoded, and fails or does anything else before a batch where it is told to."""

    encoded = 0
    before: Any = None

    def targets(self, pictures: Tensor) -> Tensor:
        if self.before is not None:
            self.before(self)
        self.encoded += len(pictures)
        return super().targets(pictures)


def make_encoder(name: str = "joint", seed: int = 0, **changes: Any) -> CountingEncoder:
    """Return an encoder with a small random model of a kind of `conftest.SCORING_MODELS`."""
    return CountingEncoder(make_scoring_model(name, seed, **changes).eval(), TargetPadProcessor(16))


def draw(path: Path, seed: int, size: int = 32) -> Path:
    """Write a picture of 4 x 4 fields of random colours."""
    fields = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(fields).resize((size, size), Image.Resampling.NEAREST).save(path)
    return path


def draw_some(folder: Path, count: int, start: int = 0) -> list[Path]:
    """Write pictures that all differ, in names that sort as they are numbered."""
    return [draw(folder / f"{number:03d}.png", number) for number in range(start, start + count)]


def index(folder: Path, out: Path, encoder: Encoder, **settings: Any) -> Any:
    """Index a folder without a word."""
    return build_index_folder([folder], out, encoder, quiet=True, workers=0, **settings)
