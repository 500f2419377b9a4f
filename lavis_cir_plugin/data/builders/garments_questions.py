"""LAVIS's data set builders for drawn questions and captions: ``garments_vqa`` and ``garments_caption``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lavis.common.registry import registry
from lavis.datasets.datasets.coco_caption_datasets import COCOCapDataset, COCOCapEvalDataset
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset, COCOVQAEvalDataset
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from lavis_cir_plugin import CONFIGS
from lavis_cir_plugin.benchmarks.images import check_format
from lavis_cir_plugin.core.settings import as_plain
from lavis_cir_plugin.data.benchmark_datasets import cache_root
from lavis_cir_plugin.data.builders.benchmarks import Builder, mix_labels, split_problems, world_problems
from lavis_cir_plugin.data.label_noise import LabelNoise, mixed_sources
from lavis_cir_plugin.garments.questions import SPLITS, WORLD, QuestionGarments


class _ChecksFormat:
    """Mix-in before a data set of LAVIS: it refuses picture formats that this package refuses and Pillow would open."""

    def __getitem__(self, index: int) -> Any:
        check_format(Path(self.vis_root, self.annotation[index]["image"]))  # type: ignore[attr-defined]
        return super().__getitem__(index)  # type: ignore[misc]


class _MixesLabels:
    """Mix-in before a training data set of LAVIS whose label is one entry of each annotation.

    Attributes:
        label: Key of the label in an annotation.
        noise: The annotations with a wrong label; ``None`` before :meth:`mix_labels`.
    """

    label: str
    noise: LabelNoise | None = None

    def mix_labels(self, ratio: float, seed: int) -> None:
        """Give a share of the annotations the label of another annotation that shows another picture.

        Raises:
            ValueError: If :func:`~lavis_cir_plugin.data.label_noise.mixed_sources` raises it.
        """
        right: list[dict[str, Any]] = self.annotation  # type: ignore[has-type]

        def is_wrong(own: int, other: int) -> bool:
            return all(right[own][key] != right[other][key] for key in ("image", self.label))

        sources = mixed_sources(len(right), ratio, seed, is_wrong)
        self.annotation = [
            {**annotation, self.label: right[sources.get(index, index)][self.label]}
            for index, annotation in enumerate(right)
        ]
        wrong = [
            {"index": index, "image": right[index]["image"], self.label: right[source][self.label],
             f"right_{self.label}": right[index][self.label]}
            for index, source in sources.items()
        ]  # fmt: skip
        self.noise = LabelNoise(ratio, seed, sources, wrong)


class GarmentsVqa(_MixesLabels, _ChecksFormat, COCOVQADataset):  # type: ignore[misc]
    """Questions on drawn garments, for training."""

    label = "answer"


class GarmentsVqaEval(_ChecksFormat, COCOVQAEvalDataset):  # type: ignore[misc]
    """Questions on drawn garments, for evaluation."""


class GarmentsCaption(_MixesLabels, _ChecksFormat, COCOCapDataset):  # type: ignore[misc]
    """Captions of drawn garments, for training."""

    label = "caption"


class GarmentsCaptionEval(_ChecksFormat, COCOCapEvalDataset):  # type: ignore[misc]
    """Captions of drawn garments, for evaluation."""


class GarmentsBuilder(Builder):
    """Base class of the builders that let LAVIS's COCO data sets read a drawn world.

    Keys of its config section, besides LAVIS's processors:

    * ``splits``: names of the splits to build; the launcher fills in those that the run reads.
    * ``garments``: the fields of :class:`~lavis_cir_plugin.garments.questions.QuestionGarments`.
    * ``noise_ratio`` and ``noise_seed``: which share of the training examples gets a wrong label.
    """

    world = WORLD
    section: str
    annotation_files: Mapping[str, tuple[str, ...]]

    @classmethod
    def known_splits(cls) -> tuple[str, ...]:
        """Return the splits that are drawn."""
        return SPLITS

    @classmethod
    def section_problems(cls, name: str, section: Mapping[str, Any]) -> Iterator[str]:
        """Yield one sentence per wrong value of a config section, before anything is drawn."""
        for key in ("build_info", "preload"):
            if section.get(key):
                yield f"datasets.{name}.{key} is not read: {name} draws its own files; set datasets.{name}.garments."
        yield from split_problems(name, section.get("splits"), SPLITS)
        yield from world_problems(name, cls.world.settings, section.get("garments") or {})

    def _download_data(self) -> None:
        """Draw the world, in the place where LAVIS's builders download."""
        self._with_files()

    def _with_files(self) -> Any:
        settings = QuestionGarments(**as_plain(self.config.get("garments")))
        root = WORLD.make(cache_root(), settings, section=self.section)
        annotations = {
            split: {"storage": [str(root / name) for name in self.annotation_files[split]]}
            for split in (SPLITS if self.config.get("splits") is None else self.config.splits)
        }
        build_info = {"annotations": annotations, "images": {"storage": str(root / "images")}}
        return OmegaConf.merge(self.config, {"build_info": build_info})

    def build(self) -> dict[str, Dataset[Any]]:
        """Return the data sets by split, which LAVIS's builder makes from the drawn files."""
        self.config = self._with_files()
        datasets: dict[str, Dataset[Any]] = super().build()
        if "train" in datasets:
            mix_labels(datasets["train"], self.config)
        return datasets


@registry.register_builder("garments_vqa")
class GarmentsVqaBuilder(GarmentsBuilder):
    """Builds questions and answers on drawn garments, for LAVIS's ``vqa`` task."""

    section = "garments_vqa"
    train_dataset_cls = GarmentsVqa
    eval_dataset_cls = GarmentsVqaEval
    annotation_files = {  # noqa: RUF012
        "train": ("vqa_train.json",),
        "val": ("vqa_val.json", "answer_list.json", "questions_val.json", "annotations_val.json"),
    }
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "datasets/garments_vqa/default.yaml")}  # noqa: RUF012


@registry.register_builder("garments_caption")
class GarmentsCaptionBuilder(GarmentsBuilder):
    """Builds captions of drawn garments, for LAVIS's task ``captioning`` and for ``local_captioning``."""

    section = "garments_caption"
    train_dataset_cls = GarmentsCaption
    eval_dataset_cls = GarmentsCaptionEval
    annotation_files = {"train": ("caption_train.json",), "val": ("caption_val.json",)}  # noqa: RUF012
    DATASET_CONFIG_DICT = {"default": str(CONFIGS / "datasets/garments_caption/default.yaml")}  # noqa: RUF012
