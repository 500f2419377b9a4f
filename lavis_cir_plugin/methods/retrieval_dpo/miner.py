"""The miner of hard negatives: it ranks the training images with the present weights, by shares of the processes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lavis_cir_plugin.benchmarks.types import Benchmark, Group, Query, no_metrics
from lavis_cir_plugin.core.processes import fail_in_all_processes, gather, share
from lavis_cir_plugin.data.benchmark_datasets import BenchmarkDataset, TripletDataset
from lavis_cir_plugin.data.negatives import NegativeSets
from lavis_cir_plugin.methods.retrieval_dpo.mining import (
    MinedNegatives,
    MiningGroup,
    MiningSettings,
    forbidden_images,
    in_order_of_triplets,
    mean_features,
    mine,
    mining_groups,
    mining_index,
    random_negatives,
)
from lavis_cir_plugin.ranking.ranks import padded
from lavis_cir_plugin.tasks.evaluation import Evaluation


@dataclasses.dataclass(frozen=True)
class NegativeMiner:
    """Mines the negatives of training triplets with the present weights of a model."""

    model: Any
    """Model that is trained, with ``query_features`` and ``target_features``."""
    settings: MiningSettings
    positive: str
    """Image that is right, and so no negative: ``target`` or ``image``, as ``run.dpo.positive`` has it."""
    seed: int
    device: torch.device
    batch_size: int
    """Number of training images that are encoded at once."""
    num_workers: int
    """Number of processes that load them."""
    gallery_dtype: torch.dtype = torch.float32
    """Type of the features of the training images, which are kept in a file during the search."""

    def mine(self, name: str, dataset: TripletDataset, epoch: int) -> NegativeSets:
        """Return the negatives of a data set's triplets; each process mines for its share of the triplets.

        Args:
            name: Name of the data set.
            dataset: Triplets, whose images are the gallery.
            epoch: Number of the epoch, from 0; before ``warmup_epochs`` the negatives are random.
        """
        benchmark = training_benchmark(name, dataset, self.seed, epoch)
        (group,) = benchmark.groups
        place = {image: number for number, image in enumerate(group.gallery)}
        references = torch.tensor([place[triplet.reference] for triplet in dataset.triplets])
        targets = torch.tensor([place[triplet.target] for triplet in dataset.triplets])
        right = targets if self.positive == "target" else references
        banned = padded(
            [[place[image] for image in own if image in place] for own in forbidden_images(dataset.triplets)], 1
        )
        groups = mining_groups(dataset.triplets, place, self.settings.within_category)
        if epoch < self.settings.warmup_epochs:
            found = self._draw_random(groups, right, banned)
        else:
            candidates = None
            if self.settings.source == "image_set":
                sets = [[place[name] for name in t.members if name in place] for t in dataset.triplets]
                candidates = padded(sets, width=1)
            found = self._search(benchmark, dataset, groups, right, banned, candidates)
        arrays = {field: rows.numpy() for field, rows in found._asdict().items()}
        return NegativeSets(
            names=list(group.gallery),
            references=references.int().numpy(),
            targets=targets.int().numpy(),
            texts=[query.texts[0] for query in group.queries],
            about={
                "dataset": name,
                "epoch": epoch,
                "seed": self.seed,
                "positive": self.positive,
                "negatives": self.plain_settings(),
                "upright": dataset.upright,
            },
            paths=image_files(dataset, group.gallery),
            **arrays,
        )

    def plain_settings(self) -> dict[str, Any]:
        """Return ``run.negatives`` in the form that a file of negatives holds."""
        return {**dataclasses.asdict(self.settings), "window": list(self.settings.window)}

    def _draw_random(self, groups: Sequence[MiningGroup], right: Tensor, banned: Tensor) -> MinedNegatives:
        """Draw random negatives of all triplets."""
        parts, numbers = [], []
        for group in groups:
            rows = group.numbers
            places = group.places(right[rows]), group.places(banned[rows])
            found = random_negatives(*places, len(group.images), self.settings.width, self.seed)
            parts.append(found._replace(negatives=group.indices(found.negatives)))
            numbers += rows
        return in_order_of_triplets(parts, numbers)

    def _search(
        self,
        benchmark: Benchmark,
        dataset: TripletDataset,
        groups: Sequence[MiningGroup],
        right: Tensor,
        banned: Tensor,
        candidates: Tensor | None,
    ) -> MinedNegatives:
        """Mine the negatives of all triplets with the present weights; each process searches for its share."""
        images = BenchmarkDataset(benchmark, dataset.vis_processor, dataset.text_processor)
        images.features, images.keeps_features = dataset.features, dataset.keeps_features
        images.preloaded = dataset.preloaded
        loader = DataLoader(images, self.batch_size, num_workers=self.num_workers)
        evaluation = Evaluation(self.model, loader, self.device.type == "cuda", self.gallery_dtype)
        gallery = evaluation.encode_gallery(keeps_references=self.settings.source != "positive")
        own = share(len(right))
        parts: list[MinedNegatives] = []
        with fail_in_all_processes():
            if len(own):
                (everything,) = benchmark.groups
                if self.settings.source == "positive":
                    query = mean_features(gallery)[right[list(own)]]
                else:
                    query = evaluation.encode_queries("multimodal", [[everything.queries[row] for row in own]])
                found, numbers = [], []
                for group in groups:
                    rows = [number for number in group.numbers if number in own]
                    if not rows:
                        continue
                    index = mining_index(gallery if len(groups) == 1 else gallery[group.images], self.settings)
                    places = group.places(right[rows]), group.places(banned[rows])
                    group_candidates = None if candidates is None else group.places(candidates[rows])
                    mined = mine(
                        query[[row - own.start for row in rows]], index, *places, self.settings, group_candidates
                    )
                    found.append(mined._replace(negatives=group.indices(mined.negatives)))
                    numbers += rows
                parts = [in_order_of_triplets(found, numbers)]
        return in_order_of_triplets([part for of_process in gather(parts) for part in of_process])


def image_files(dataset: TripletDataset, names: Sequence[str]) -> list[str]:
    """Return the absolute paths of images of a data set."""
    return [str(dataset.image_paths[name].absolute()) for name in names]


def training_benchmark(name: str, dataset: TripletDataset, seed: int, epoch: int) -> Benchmark:
    """Return a benchmark of the training triplets: queries with one drawn text each, against all training images."""
    queries = tuple(
        Query(
            triplet.reference,
            (dataset.training_text(triplet.captions, random.Random(f"{seed} {epoch} {number}")),),
            triplet.target,
        )
        for number, triplet in enumerate(dataset.triplets)
    )
    group = Group(name, tuple(dataset.image_paths), queries, reference_removed=False)
    return Benchmark(
        name, "train", (group,), dataset.image_paths, f"{name} train", no_metrics, "", upright=dataset.upright
    )
