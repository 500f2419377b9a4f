"""LAVIS's data set builders for every benchmark: the module makes and registers one for each reader."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from torch.utils.data import Dataset

from lavis_cir_plugin import CONFIGS, benchmarks, garments
from lavis_cir_plugin.core.processes import fail_in_all_processes
from lavis_cir_plugin.core.settings import as_plain, config_from_mapping, section_problems
from lavis_cir_plugin.data.benchmark_datasets import BenchmarkDataset, Processor, TripletDataset, cache_root
from lavis_cir_plugin.garments.world import World


def split_problems(name: str, splits: Sequence[str] | None, known: Sequence[str]) -> Iterator[str]:
    """Yield a sentence if a data set does not have a split that its section names."""
    if not set(splits or ()) <= set(known):
        yield f"datasets.{name}.splits must be a list of {', '.join(known)}, got {list(splits or ())}."


def world_problems(name: str, settings: type, given: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence per problem of ``datasets.<name>.garments``."""
    yield from (f"datasets.{name}.{problem}" for problem in section_problems(settings, "garments", given))


def mix_labels(dataset: Any, section: Mapping[str, Any]) -> None:
    """Make labels of a training data set wrong as ``noise_ratio`` and ``noise_seed`` of its section say.

    Raises:
        ValueError: If the ratio draws fewer than two examples, or a drawn one finds no wrong label.
    """
    ratio = section.get("noise_ratio") or 0
    if ratio == 0:
        return
    try:
        dataset.mix_labels(ratio, section.get("noise_seed") or 0)
    except ValueError as error:
        raise ValueError(f"datasets.<name>.noise_ratio: {ratio} {error}; choose another one, or 0.") from error


def unchanged(text: str) -> str:
    """Return a text as it is, for data sets whose ``text_processor`` is null."""
    return text


class Builder(BaseDatasetBuilder):  # type: ignore[misc]
    """Base class of the builders of this package, for which a null ``text_processor`` leaves texts as they are."""

    def build_processors(self) -> None:
        """Build the processors of both stages; LAVIS's own builders would call None, unlike its ``load_preprocess``."""
        super().build_processors()
        self.text_processors = {stage: chosen or unchanged for stage, chosen in self.text_processors.items()}


class BenchmarkBuilder(Builder):
    """Builds the training and evaluation splits of one benchmark.

    Keys of its config section, besides LAVIS's processors:

    * ``splits``: names of the splits to build; the launcher fills in those that the run reads.
    * ``preload``: whether every preprocessed image is kept in memory, for small images or much memory.
    * ``build_info``: settings of the benchmark's reader.
    * ``garments``: settings of the drawn world, which is drawn into the cache on first use and read from there.
    * ``noise_ratio`` and ``noise_seed``: which share of the training examples gets a wrong label.
    """

    benchmark_module: ModuleType
    world: World | None
    """Draws garments in the benchmark's file format; None if no world exists for the benchmark."""

    @classmethod
    def known_splits(cls) -> tuple[str, ...]:
        """Return the splits that the benchmark has."""
        return tuple(cls.benchmark_module.SPLITS)

    @classmethod
    def section_problems(cls, name: str, section: Mapping[str, Any]) -> Iterator[str]:
        """Yield one sentence per wrong value of a config section, before anything is drawn or read."""
        yield from split_problems(name, section.get("splits"), cls.known_splits())
        if section.get("garments") is not None and cls.world is None:
            yield f"datasets.{name}.garments has no effect: no world is drawn in {name}'s files."
        elif section.get("garments") is not None:
            yield from world_problems(name, cls.world.settings, section["garments"])
        try:
            # The section may lack a root, which then comes from the defaults or from the drawn world.
            config_from_mapping(cls.benchmark_module.CONFIG, name, {"root": "any", **(section.get("build_info") or {})})
        except ValueError as error:
            yield from str(error).splitlines()

    def _download_data(self) -> None:
        """Draw the world if the config asks for one; real data sets are never downloaded."""
        self._build_info()

    def _build_info(self) -> dict[str, Any]:
        build_info = dict(as_plain(self.config.get("build_info")))
        if self.config.get("garments") is not None:
            settings = self.world.settings(**as_plain(self.config.garments))
            build_info["root"] = str(self.world.make(cache_root(), settings))
        return build_info

    def build(self) -> dict[str, Dataset]:
        """Return the data sets by split.

        Raises:
            ValueError: If another process failed, as on a machine that lacks pictures.
        """
        with fail_in_all_processes():
            return self._splits()

    def _splits(self) -> dict[str, Dataset]:
        self.build_processors()
        build_info = self._build_info()
        datasets: dict[str, Dataset] = {}
        splits = self.config.get("splits")
        for split in self.known_splits()[:2] if splits is None else splits:
            stage = "train" if split == "train" else "eval"
            processors = self.vis_processors[stage], self.text_processors[stage]
            dataset = self.build_split(split, build_info, *processors)
            if split == "train":
                mix_labels(dataset, self.config)
            if self.config.get("preload"):
                dataset.preload()
            datasets[split] = dataset
        return datasets

    def build_split(
        self, split: str, build_info: Mapping[str, Any], vis_processor: Processor, text_processor: Processor
    ) -> Any:
        """Read one split with the benchmark's reader."""
        if split == "train":
            triplets, image_paths = self.benchmark_module.read_train(build_info)
            text = self.benchmark_module.training_text
            dataset = TripletDataset(triplets, image_paths, vis_processor, text_processor, text)
            dataset.upright = getattr(self.benchmark_module, "UPRIGHT", False)
            return dataset
        return BenchmarkDataset(self.benchmark_module.read_benchmark(build_info, split), vis_processor, text_processor)


def _register_builders() -> None:
    worlds = {found.name for found in pkgutil.iter_modules(garments.__path__)}
    for found in pkgutil.iter_modules(benchmarks.__path__):
        module = importlib.import_module(f"{benchmarks.__name__}.{found.name}")
        if not hasattr(module, "read_train"):
            continue
        configs = {path.stem: str(path) for path in (CONFIGS / "datasets" / found.name).glob("*.yaml")}
        world = importlib.import_module(f"{garments.__name__}.{found.name}").WORLD if found.name in worlds else None
        attributes = {
            "benchmark_module": module,
            "world": world,
            "DATASET_CONFIG_DICT": configs,
            "__doc__": module.__doc__,
        }
        builder = type(f"{found.name.title()}Builder", (BenchmarkBuilder,), {**attributes, "__module__": __name__})
        registry.register_builder(found.name)(builder)


_register_builders()
