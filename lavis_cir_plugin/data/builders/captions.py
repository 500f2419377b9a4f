"""LAVIS's data set builders for captioned pictures as training data: ``image_captions`` and ``caption_shards``.

Samples have ``image`` and ``text_input``; samples of image files also have ``image_id``. LAVIS's own captioning data
sets use the same keys, so that they can train the same models.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from torch.utils.data import Dataset, default_collate

from lavis_cir_plugin import CONFIGS
from lavis_cir_plugin.benchmarks import captions
from lavis_cir_plugin.benchmarks.captions import CaptionedImage
from lavis_cir_plugin.data import tar_shards
from lavis_cir_plugin.data.benchmark_datasets import CirDataset, Processor, cache_root, image_id
from lavis_cir_plugin.data.builders.benchmarks import BenchmarkBuilder
from lavis_cir_plugin.data.label_noise import LabelNoise, mixed_sources
from lavis_cir_plugin.data.tar_shards import CaptionedShards


class CaptionDataset(CirDataset):
    """Captioned image files. If an example has several captions, one is drawn at each reading.

    Attributes:
        noise: The pictures with wrong captions; ``None`` before :meth:`mix_labels`.
    """

    upright = True
    noise: LabelNoise | None = None

    def __init__(
        self,
        examples: Sequence[CaptionedImage],
        image_paths: Mapping[str, Path],
        vis_processor: Processor,
        text_processor: Processor,
    ) -> None:
        super().__init__(image_paths, vis_processor, text_processor)
        self.examples = examples

    def mix_labels(self, ratio: float, seed: int) -> None:
        """Give a share of the pictures the captions of another picture.

        Raises:
            ValueError: If :func:`~lavis_cir_plugin.data.label_noise.mixed_sources` raises it.
        """
        right = list(self.examples)

        def is_wrong(own: int, other: int) -> bool:
            return right[own].image != right[other].image and right[own].captions != right[other].captions

        sources = mixed_sources(len(right), ratio, seed, is_wrong)
        self.examples = [
            CaptionedImage(example.image, right[sources.get(index, index)].captions)
            for index, example in enumerate(right)
        ]
        wrong = [
            {"index": index, "image": right[index].image, "captions_of": right[source].image}
            for index, source in sources.items()
        ]
        self.noise = LabelNoise(ratio, seed, sources, wrong)

    @property
    def contents(self) -> str:
        """How many captioned pictures, for the log."""
        return f"{len(self):,} captioned pictures"

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one example in LAVIS's keys."""
        example = self.examples[index]
        return {
            "image": self.load_image(example.image),
            "image_id": image_id(example.image),
            "text_input": self.text_processor(random.choice(example.captions)),
        }


class ShardDataset(Dataset[dict[str, Any]]):
    """Captioned images in tar shards. If an example has several captions, one is drawn at each reading.

    Attributes:
        noise: The samples with wrong captions; ``None`` before :meth:`mix_labels`.
    """

    noise: LabelNoise | None = None

    def __init__(self, samples: CaptionedShards, vis_processor: Processor, text_processor: Processor) -> None:
        self.samples = samples
        self.vis_processor = vis_processor
        self.text_processor = text_processor

    def mix_labels(self, ratio: float, seed: int) -> None:
        """Give a share of the samples the captions of another sample, whatever these say.

        Raises:
            ValueError: If :func:`~lavis_cir_plugin.data.label_noise.mixed_sources` raises it.
        """
        sources = mixed_sources(len(self), ratio, seed, lambda own, other: own != other)
        wrong = [{"index": index, "captions_of": source} for index, source in sources.items()]
        self.noise = LabelNoise(ratio, seed, sources, wrong)

    @property
    def contents(self) -> str:
        """How many captioned pictures, for the log."""
        return f"{len(self):,} captioned pictures"

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one example in LAVIS's keys."""
        image, texts = self.samples[index]
        if self.noise is not None and index in self.noise.sources:
            texts = self.samples.captions(self.noise.sources[index])
        return {"image": self.vis_processor(image), "text_input": self.text_processor(random.choice(texts))}

    def collater(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Stack tensors and list strings."""
        batch: dict[str, Any] = default_collate(list(samples))
        return batch


@registry.register_builder("image_captions")
class ImageCaptionsBuilder(BenchmarkBuilder):
    """Builds the training split of captioned image files with :mod:`~lavis_cir_plugin.benchmarks.captions`."""

    benchmark_module = captions
    world = None
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "datasets/image_captions/default.yaml")}  # noqa: RUF012

    def build_split(
        self, split: str, build_info: Mapping[str, Any], vis_processor: Processor, text_processor: Processor
    ) -> CirDataset:
        """Read the training split, which is the only one."""
        return CaptionDataset(*captions.read_captions(build_info), vis_processor, text_processor)


@registry.register_builder("caption_shards")
class CaptionShardsBuilder(BenchmarkBuilder):
    """Builds the training split of captioned images in tar files with :mod:`~lavis_cir_plugin.data.tar_shards`."""

    benchmark_module = tar_shards
    world = None
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "datasets/caption_shards/default.yaml")}  # noqa: RUF012

    @classmethod
    def section_problems(cls, name: str, section: Mapping[str, Any]) -> Iterator[str]:
        """Yield one sentence per wrong value of a config section, before anything is read."""
        if section.get("preload"):
            yield f"datasets.{name}.preload is for small data sets of image files; set datasets.{name}.preload: false."
        yield from super().section_problems(name, section)

    def build_split(
        self, split: str, build_info: Mapping[str, Any], vis_processor: Processor, text_processor: Processor
    ) -> ShardDataset:
        """List the samples of the training split, which is the only one."""
        return ShardDataset(CaptionedShards(build_info, cache_root() / "shards"), vis_processor, text_processor)
