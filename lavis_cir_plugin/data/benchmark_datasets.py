"""PyTorch data sets over every benchmark: training triplets, gallery images, queries."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.benchmarks.types import Benchmark, Triplet
from lavis_cir_plugin.data.feature_cache import FeatureCache, UncachedPicture, collate_images
from lavis_cir_plugin.data.label_noise import LabelNoise, mixed_sources
from lavis_cir_plugin.data.negatives import NegativeSets

Processor = Callable[[Any], Any]
_IMAGES = (torch.Tensor, UncachedPicture)


def image_id(name: str) -> int:
    """Return a 63-bit id of an image name, which is the same in every data set, process and run."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def cache_root() -> Path:
    """Return the folder of drawn worlds and cached image features.

    It is ``$XDG_CACHE_HOME/lavis_cir_plugin``; without that variable it is ``~/.cache/lavis_cir_plugin``.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lavis_cir_plugin"


def features_root() -> Path:
    """Return the folder of the feature caches of runs that name no other folder."""
    return cache_root() / "features"


class CirDataset(Dataset):
    """Base class of the data sets of composed retrieval: it loads pictures, and its collater drops no sample.

    Attributes:
        upright: Whether pictures are turned by their EXIF orientation.
    """

    upright = False

    def __init__(self, image_paths: Mapping[str, Path], vis_processor: Processor, text_processor: Processor) -> None:
        self.image_paths = image_paths
        self.vis_processor = vis_processor
        self.text_processor = text_processor
        self.preloaded: dict[str, torch.Tensor] = {}
        self.features: FeatureCache | None = None
        self.keeps_features = False

    def __repr__(self) -> str:
        """Return a text with the numbers of samples and pictures."""
        size = len(self)  # type: ignore[arg-type]
        return f"{type(self).__name__}({size:,} samples, {len(self.image_paths):,} pictures)"

    @property
    def pictures_read(self) -> int:
        """Number of pictures that one pass over the data set reads, a picture as often as it is read."""
        return len(self)  # type: ignore[arg-type]

    def load_image(self, name: str) -> torch.Tensor | UncachedPicture:
        """Return the preprocessed picture ``(3, H, W)``; with a cache its features, such as ``(P, width)``.

        A picture whose features are not in the cache yet is an
        :class:`~lavis_cir_plugin.data.feature_cache.UncachedPicture`.

        Raises:
            ValueError: If the picture cannot be read; the message names the file.
        """
        if self.features is not None:
            return self.features.picture(self.image_paths[name], self.keeps_features)
        if name in self.preloaded:
            return self.preloaded[name]
        return self.vis_processor(self.picture(name))

    def picture(self, name: str) -> Image.Image:
        """Return the RGB picture before preprocessing."""
        return open_rgb(self.image_paths[name], self.upright)

    @property
    def is_deterministic(self) -> bool:
        """Whether the processor declares that it returns equal tensors for equal pictures."""
        return bool(getattr(self.vis_processor, "is_deterministic", False))

    def use_features(self, features: FeatureCache, keeps_features: bool = True) -> None:
        """Let the data set return features in place of pictures, and drop preloaded pictures.

        Args:
            features: Cache of the features.
            keeps_features: Whether missing features shall be kept once they are computed.
        """
        self.features, self.keeps_features, self.preloaded = features, keeps_features, {}

    def preload(self) -> None:
        """Preprocess every picture now and keep it in memory, which forked workers share.

        A picture takes 4 * 3 * H * W bytes.

        Raises:
            ValueError: If the processor is random, because a kept picture would show the same crop in every epoch.
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
        """Stack tensors and list strings; :func:`~lavis_cir_plugin.data.feature_cache.collate_images` joins images."""
        images = {
            key
            for sample in samples
            for key, value in sample.items()
            if isinstance(value, UncachedPicture) or (isinstance(value, list) and isinstance(value[0], _IMAGES))
        }
        others = [{key: value for key, value in sample.items() if key not in images} for sample in samples]
        batch: dict[str, Any] = default_collate(others) if others[0] else {}
        return {**batch, **{key: collate_images([sample[key] for sample in samples]) for key in images}}


class TripletDataset(CirDataset):
    """Training triplets as samples with ``image``, ``text_input``, ``target`` and, if annotated, ``reference_caption``.

    ``image_id`` and ``target_id`` are equal for the same picture.

    If the annotation of a triplet has several texts, ``training_text`` draws one at each reading. It draws from
    Python's global generator, which LAVIS seeds in the main process and torch in each worker.

    After :meth:`use_negatives` a sample also has ``negatives`` ``(K, ...)``, which are drawn from the same generator,
    and ``negatives_present`` ``(K,)``. If a triplet has fewer than K negatives, its target fills the other places.
    If the features of one are not in the cache yet, the negatives are a list.

    Attributes:
        noise: The triplets with a wrong target; ``None`` before :meth:`mix_labels`.
    """

    noise: LabelNoise | None = None

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
        """Let each sample have ``count`` of these negatives.

        Args:
            negatives: Negatives of every triplet.
            count: K, how many are drawn at each reading.
            with_scores: Whether a sample also has their scores as ``reference_scores`` ``(1 + K,)``. Its text is then
                the one that the scores were computed with.
        """
        self.negatives, self.num_negatives, self.with_scores = negatives, count, with_scores

    def mix_labels(self, ratio: float, seed: int) -> None:
        """Give a share of the triplets another triplet's target, which is no right answer by their own annotation.

        Raises:
            ValueError: If :func:`~lavis_cir_plugin.data.label_noise.mixed_sources` raises it.
        """
        right = list(self.triplets)

        def is_wrong(own: int, other: int) -> bool:
            triplet, target = right[own], right[other].target
            return target not in (triplet.target, triplet.reference, *triplet.also_right)

        sources = mixed_sources(len(right), ratio, seed, is_wrong)
        self.triplets = [
            replace(triplet, target=right[sources[index]].target) if index in sources else triplet
            for index, triplet in enumerate(right)
        ]
        wrong = [
            {"index": index, "reference": right[index].reference, "target": right[source].target,
             "right_target": right[index].target}
            for index, source in sources.items()
        ]  # fmt: skip
        self.noise = LabelNoise(ratio, seed, sources, wrong)

    @property
    def pictures_read(self) -> int:
        """Number of references and targets."""
        return 2 * len(self)

    @property
    def contents(self) -> str:
        """Numbers of triplets, of wrong ones and of pictures, in words for the log."""
        wrong = f" ({len(self.noise.wrong):,} with a wrong target)" if self.noise is not None else ""
        return f"{len(self):,} triplets{wrong} of {len(self.image_paths):,} pictures"

    def __len__(self) -> int:
        """Return the number of triplets."""
        return len(self.triplets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one triplet under LAVIS's keys."""
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

    def _negatives_of(self, index: int, sets: NegativeSets, target: torch.Tensor | UncachedPicture) -> dict[str, Any]:
        columns = sets.draw(index, self.num_negatives)
        lacking = self.num_negatives - len(columns)
        images = [self.load_image(sets.names[sets.negatives[index, column]]) for column in columns]
        images += [target] * lacking
        is_complete = all(isinstance(image, torch.Tensor) for image in images)
        found: dict[str, Any] = {
            "negatives": torch.stack(images) if is_complete else images,  # type: ignore[arg-type]
            "negatives_present": torch.tensor([True] * len(columns) + [False] * lacking),
        }
        if self.with_scores:
            own = [sets.target_scores[index], *(sets.scores[index, column] for column in columns)]
            found["reference_scores"] = torch.tensor([*own, *own[:1] * lacking], dtype=torch.float32)
            found["text_input"] = self.text_processor(sets.texts[index])
        return found


class BenchmarkDataset(CirDataset):
    """The gallery images of a benchmark, each once and in a fixed order.

    Attributes:
        queries: Data set of the benchmark's queries.
        texts: Data set of the queries' texts, without pictures.
    """

    def __init__(self, benchmark: Benchmark, vis_processor: Processor, text_processor: Processor) -> None:
        super().__init__(benchmark.image_paths, vis_processor, text_processor)
        self.benchmark = benchmark
        self.upright = benchmark.upright
        # FashionIQ's categories share images; the model encodes each image once.
        self.names = list(dict.fromkeys(name for group in benchmark.groups for name in group.gallery))
        self.queries = QueryDataset(self)
        self.texts = QueryDataset(self, with_image=False)

    @property
    def pictures_read(self) -> int:
        """Number of distinct images, because an evaluation encodes each image once."""
        return len(self.image_paths)

    @property
    def contents(self) -> str:
        """Numbers of gallery pictures and queries, in words for the log."""
        queries = sum(len(group.queries) for group in self.benchmark.groups)
        return f"{len(self):,} gallery pictures, {queries:,} queries"

    def __len__(self) -> int:
        """Return the number of distinct gallery images."""
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one gallery image."""
        return {"image": self.load_image(self.names[index])}


class QueryDataset(CirDataset):
    """Every text of every query of a benchmark, group by group, as samples with ``text_input`` and ``image``.

    With ``with_image=False`` the samples have no ``image``.
    """

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
        """Return one text of a query, with the query's picture if the data set has pictures."""
        reference, text = self.rows[index]
        row: dict[str, Any] = {"text_input": self.text_processor(text)}
        if self.with_image:
            row["image"] = self.dataset.load_image(reference)
        return row
