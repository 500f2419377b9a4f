"""A small benchmark in memory and an evaluation whose tower is counted, for the tests of evaluations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from conftest import make_scoring_model
from lavis.common.registry import registry
from torch.utils.data import DataLoader

from lavis_cir_plugin.benchmarks.types import Benchmark, Group, Query, no_metrics
from lavis_cir_plugin.data.benchmark_datasets import BenchmarkDataset
from lavis_cir_plugin.data.feature_cache import PICTURES_PER_BLOCK
from lavis_cir_plugin.tasks.evaluation import Evaluation

NAMES = tuple("abcdefghijklm")
OUTSIDE = ("outside 1", "outside 2", "outside 3")
GROUPS = (
    Group(
        "one",
        NAMES[:8],
        (
            Query("a", ("is red",), "b"),
            Query("outside 2", ("is blue", "has longer sleeves"), "c"),
            Query("a", ("is plain",), "d"),
            Query("h", ("is darker",), "a"),
        ),
        reference_removed=True,
    ),
    Group(
        "two",
        NAMES[5:],
        (
            Query("h", ("is red", "is more colorful and has no collar"), "i"),
            Query("outside 1", ("is plain",), "m"),
            Query("m", ("is darker",), "l"),
            Query("outside 3", ("is red",), "k"),
            Query("f", ("is red",), "g"),
        ),
        reference_removed=False,
    ),
)
"""Two groups that share images, references inside and outside their galleries, and queries with two texts."""
REFERENCES = {query.reference for group in GROUPS for query in group.queries}


def make_dataset() -> BenchmarkDataset:
    """Return the benchmark's data set, whose pictures are in memory."""
    paths = {name: Path(name) for name in (*NAMES, *OUTSIDE)}
    benchmark = Benchmark("small", "val", GROUPS, paths, "protocol", no_metrics, "")
    dataset = BenchmarkDataset(benchmark, str, str)
    generator = torch.Generator().manual_seed(5)
    dataset.preloaded = {name: torch.randn(3, 16, 16, generator=generator) for name in paths}
    return dataset


def make_evaluation(
    kind: str, folder: Path, dataset: BenchmarkDataset | None = None, batch_size: int = 3
) -> tuple[Evaluation, Counter[str]]:
    """Return an evaluation in a run's folder, and the number of times that the tower has seen each picture."""
    dataset = dataset or make_dataset()
    model = make_scoring_model(kind).eval()
    seen: Counter[str] = Counter()

    def count(_: Any, inputs: tuple[Any, ...]) -> None:
        names = [name for picture in inputs[0] for name, own in dataset.preloaded.items() if torch.equal(own, picture)]
        assert len(names) == len(inputs[0])
        # A smaller batch is filled up to this number with its own pictures.
        seen.update(set(names) if len(names) == PICTURES_PER_BLOCK else names)

    model.image_tower.register_forward_pre_hook(count)
    registry.mapping["paths"]["output_dir"] = str(folder)
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=dataset.collater)
    return Evaluation(model, loader, cuda_enabled=False), seen
