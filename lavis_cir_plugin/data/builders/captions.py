"""LAVIS builders over pictures with captions, as training data: ``image_captions`` and ``caption_shards``.

Samples are ``image`` and ``text_input``, and of image files ``image_id``, as of LAVIS's own captioning data sets, which
train the same models.
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
from lavis_cir_plugin.data.tar_shards import CaptionedShards


class CaptionDataset(CirDataset):
    """Captioned image files. Of several captions of an example one is drawn each time it is read."""

    upright = True

    def __init__(
        self,
        examples: Sequence[CaptionedImage],
        image_paths: Mapping[str, Path],
        vis_processor: Processor,
        text_processor: Processor,
    ) -> None:
        super().__init__(image_paths, vis_processor, text_processor)
        self.examples = examples

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
    """Captioned images in shards. Of several captions of an example one is drawn each time it is read."""

    def __init__(self, samples: CaptionedShards, vis_processor: Processor, text_processor: Processor) -> None:
        self.samples = samples
        self.vis_processor = vis_processor
        self.text_processor = text_processor

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
        return {"image": self.vis_processor(image), "text_input": self.text_processor(random.choice(texts))}

    def collater(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Stack tensors and list strings."""
        batch: dict[str, Any] = default_collate(list(samples))
        return batch


@registry.register_builder("image_captions")
class ImageCaptionsBuilder(BenchmarkBuilder):
    """Builds the training split of captioned image files, by :mod:`~lavis_cir_plugin.benchmarks.captions`."""

    benchmark_module = captions
    world_module = None
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "datasets/image_captions/default.yaml")}  # noqa: RUF012

    def build_split(
        self, split: str, build_info: Mapping[str, Any], vis_processor: Processor, text_processor: Processor
    ) -> CirDataset:
        """Read the only split."""
        return CaptionDataset(*captions.read_captions(build_info), vis_processor, text_processor)


@registry.register_builder("caption_shards")
class CaptionShardsBuilder(BenchmarkBuilder):
    """Builds the training split of captioned images in tar files, by :mod:`~lavis_cir_plugin.shards`."""

    benchmark_module = tar_shards
    world_module = None
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "datasets/caption_shards/default.yaml")}  # noqa: RUF012

    @classmethod
    def section_problems(cls, name: str, section: Mapping[str, Any]) -> Iterator[str]:
        """Yield what is wrong with a config section's values, before anything is read."""
        if section.get("preload"):
            yield f"datasets.{name}.preload is for small data sets of image files; set datasets.{name}.preload: false."
        yield from super().section_problems(name, section)

    def build_split(
        self, split: str, build_info: Mapping[str, Any], vis_processor: Processor, text_processor: Processor
    ) -> ShardDataset:
        """List the only split."""
        return ShardDataset(CaptionedShards(build_info, cache_root() / "shards"), vis_processor, text_processor)
