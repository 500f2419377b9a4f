"""Return pictures and texts of benchmarks as data sets."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.benchmarks.types import Benchmark, Triplet
from lavis_cir_plugin.data.feature_cache import FeatureCache
from lavis_cir_plugin.data.negatives import NegativeSets

Processor = Callable[[Any], Any]


def image_id(name: str) -> int:
    """Return a stable 63-bit id of an image name: the same picture has it in every data set and process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def cache_root() -> Path:
    """Return where drawn worlds and image features are kept.

    ``$XDG_CACHE_HOME/lavis_cir_plugin``, by default below ``~/.cache``.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lavis_cir_plugin"


class CirDataset(Dataset):
    """What the data sets of composed retrieval share: picture loading and a collater that drops nothing.

    Attributes:
        upright: Whether pictures are turned as their EXIF orientation says.
    """

    upright = False

    def __init__(self, image_paths: Mapping[str, Path], vis_processor: Processor, text_processor: Processor) -> None:
        self.image_paths = image_paths
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.preloaded: dict[str, torch.Tensor] = {}
        self.features: FeatureCache | None = None

    def load_image(self, name: str) -> torch.Tensor:
        """Return the preprocessed picture ``(3, H, W)``, or its features, such as ``(P, width)``, if they are cached.

        An unreadable picture is an error that names the file.
        """
        if self.features is not None:
            return self.features[self.image_paths[name]]
        if name in self.preloaded:
            return self.preloaded[name]
        return self.vis_processor(self.picture(name))

    def picture(self, name: str) -> Image.Image:
        """Return the picture as RGB, not yet preprocessed."""
        return open_rgb(self.image_paths[name], self.upright)

    @property
    def is_deterministic(self) -> bool:
        """Whether the processor says that it returns the same for the same picture."""
        return bool(getattr(self.vis_processor, "is_deterministic", False))

    def use_features(self, features: FeatureCache) -> None:
        """Return these features in place of pictures from now on; preloaded pictures are dropped."""
        self.features, self.preloaded = features, {}

    def preload(self) -> None:
        """Preprocess every picture now and keep it: 4 * 3 * H * W bytes each, shared with forked workers.

        Raises:
            ValueError: If the processor is random, so that a kept picture would be the same crop for ever.
        """
        if not self.is_deterministic:
            raise ValueError(
                f"datasets.<name>.preload: true needs a processor without randomness, got "
                f"{type(self.vis_processor).__name__}; use target_pad or set preload: false."
            )
        names = list(self.image_paths)
        with ThreadPoolExecutor() as pool:
            pictures = tqdm(pool.map(self.load_image, names), "preload images", len(names), disable=None, leave=False)
            self.preloaded = dict(zip(names, pictures))
        size = sum(picture.nbytes for picture in self.preloaded.values())
        logging.info("preloaded %d images, %.0f MB", len(names), size / 1e6)

    def collater(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Stack tensors and list strings."""
        return default_collate(list(samples))


class TripletDataset(CirDataset):
    """Training triplets: ``image``, ``text_input``, ``target``, and perhaps ``reference_caption``.

    ``image_id`` and ``target_id`` are equal for the same picture.

    A triplet whose annotation has several texts gets one drawn by ``training_text`` each time it is read, from
    Python's global generator, which LAVIS seeds and torch seeds in each worker.

    With :meth:`use_negatives`, also ``negatives`` ``(K, ...)``, drawn likewise, and ``negatives_present`` ``(K,)``:
    where there are fewer, the target stands in.
    """

    def __init__(
        self,
        triplets: Sequence[Triplet],
        image_paths: Mapping[str, Path],
        vis_processor: Processor,
        text_processor: Processor,
        training_text: Callable[[tuple[str, ...], Any], str],
    ) -> None:
        super().__init__(image_paths, vis_processor, text_processor)
        self.triplets = triplets
        self.training_text = training_text
        self.has_reference_captions = any(triplet.reference_caption for triplet in triplets)
        self.negatives: NegativeSets | None = None

    def use_negatives(self, negatives: NegativeSets, count: int, with_scores: bool = False) -> None:
        """Return ``count`` of these negatives with each triplet from now on.

        With their scores, ``reference_scores`` ``(1 + K,)``, comes the text that they were computed with.
        """
        self.negatives, self.num_negatives, self.with_scores = negatives, count, with_scores

    @property
    def contents(self) -> str:
        """How many triplets, and of how many pictures, for the log."""
        return f"{len(self):,} triplets of {len(self.image_paths):,} pictures"

    def __len__(self) -> int:
        """Return the number of triplets."""
        return len(self.triplets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one triplet in LAVIS's keys."""
        triplet = self.triplets[index]
        sample: dict[str, Any] = {
            "image": self.load_image(triplet.reference),
            "image_id": image_id(triplet.reference),
            "target": self.load_image(triplet.target),
            "text_input": self.text_processor(self.training_text(triplet.captions, random)),
            "target_id": image_id(triplet.target),
        }
        if self.has_reference_captions:
            sample["reference_caption"] = self.text_processor(triplet.reference_caption)
        if self.negatives is not None:
            sample.update(self._negatives_of(index, self.negatives, sample["target"]))
        return sample

    def _negatives_of(self, index: int, sets: NegativeSets, target: torch.Tensor) -> dict[str, Any]:
        columns = sets.draw(index, self.num_negatives)
        lacking = self.num_negatives - len(columns)
        pictures = [self.load_image(sets.names[sets.negatives[index, column]]) for column in columns]
        found: dict[str, Any] = {
            "negatives": torch.stack([*pictures, *[target] * lacking]),
            "negatives_present": torch.tensor([True] * len(columns) + [False] * lacking),
        }
        if self.with_scores:
            own = [sets.target_scores[index], *(sets.scores[index, column] for column in columns)]
            found["reference_scores"] = torch.tensor([*own, *own[:1] * lacking], dtype=torch.float32)
            found["text_input"] = self.text_processor(sets.texts[index])
        return found


class BenchmarkDataset(CirDataset):
    """A benchmark's images, each once, in a fixed order; ``queries`` (without pictures: ``texts``) are its queries."""

    def __init__(self, benchmark: Benchmark, vis_processor: Processor, text_processor: Processor) -> None:
        super().__init__(benchmark.image_paths, vis_processor, text_processor)
        self.benchmark = benchmark
        self.upright = benchmark.upright
        # Categories of FashionIQ share images; each goes through the model once.
        self.names = list(dict.fromkeys(name for group in benchmark.groups for name in group.gallery))
        self.queries = QueryDataset(self)
        self.texts = QueryDataset(self, with_image=False)

    @property
    def contents(self) -> str:
        """How many pictures the gallery has, and how many queries there are, for the log."""
        queries = sum(len(group.queries) for group in self.benchmark.groups)
        return f"{len(self):,} gallery pictures, {queries:,} queries"

    def __len__(self) -> int:
        """Return the number of distinct gallery images."""
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one gallery image."""
        return {"image": self.load_image(self.names[index])}


class QueryDataset(CirDataset):
    """Every text of every query of a benchmark, group by group: ``text_input`` and, unless left out, ``image``."""

    def __init__(self, dataset: BenchmarkDataset, with_image: bool = True) -> None:
        super().__init__(dataset.image_paths, dataset.vis_processor, dataset.text_processor)
        self.dataset = dataset
        self.with_image = with_image
        self.rows = [
            (query.reference, text)
            for group in dataset.benchmark.groups
            for query in group.queries
            for text in query.texts
        ]

    def __len__(self) -> int:
        """Return the number of (query, text) rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row."""
        reference, text = self.rows[index]
        row: dict[str, Any] = {"text_input": self.text_processor(text)}
        if self.with_image:
            row["image"] = self.dataset.load_image(reference)
        return row
