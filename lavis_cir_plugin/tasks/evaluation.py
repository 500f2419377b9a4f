"""Rank the galleries of a benchmark with a model: encode gallery and queries by shares of the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lavis_cir_plugin.benchmarks.types import Group, Query
from lavis_cir_plugin.core.processes import fail_in_all_processes, gather, share
from lavis_cir_plugin.core.workers import worker_setup
from lavis_cir_plugin.data.benchmark_datasets import BenchmarkDataset
from lavis_cir_plugin.data.feature_cache import has_image_tower, tower_features, with_features
from lavis_cir_plugin.ranking.gallery_features import store_gallery
from lavis_cir_plugin.ranking.ranks import Ranking, padded, rank
from lavis_cir_plugin.report import contact_sheets
from lavis_cir_plugin.tasks.reference_features import DistinctPictures, ReferenceFeatures

TOP = 50
"""Number of ranked images that a submission or a contact sheet can show per query."""
GALLERY_FILE = "gallery_features.tmp"
ATTENTION_ROWS = 6
"""Number of a group's queries on a sheet of attention maps."""


@dataclass
class Evaluation:
    """Ranks the galleries of one benchmark with one model; it encodes the gallery once and the queries per mode.

    The image tower of a :class:`~lavis_cir_plugin.data.feature_cache.HasImageTower` runs once per picture, for the
    gallery and the queries of all modes together.
    """

    model: nn.Module
    loader: DataLoader
    cuda_enabled: bool
    gallery_dtype: torch.dtype = torch.float32
    gallery: Tensor | None = None
    references: ReferenceFeatures | None = None

    @property
    def dataset(self) -> BenchmarkDataset:
        """Data set of the benchmark."""
        dataset: BenchmarkDataset = self.loader.dataset  # type: ignore[assignment]
        return dataset

    def rankings(self, mode: str = "multimodal", top_k: int = 0) -> dict[str, Ranking]:
        """Return each group's ranking by queries of a mode of the model, such as ``multimodal`` or ``text``."""
        if self.gallery is None:
            self.gallery = self.encode_gallery()
        groups = self.dataset.benchmark.groups
        own: dict[str, Ranking] = {}
        with fail_in_all_processes():
            own = self._own_rankings(mode, self.gallery, top_k)
        everybody = gather(own)
        return {
            group.name: rankings_of_all_processes([part[group.name] for part in everybody if group.name in part])
            for group in groups
        }

    def draw_attention(self, folder: Path) -> list[Path]:
        """Draw the model's attention in the references of some queries of each group, and return the files."""
        processors = self.dataset.vis_processor, self.dataset.text_processor
        written = []
        for group in self.dataset.benchmark.groups:
            queries = [group.queries[index] for index in contact_sheets.drawn_queries(group, ATTENTION_ROWS)]
            # The sheet shows pictures, so the cached features do not help.
            pictures = torch.stack([processors[0](self.dataset.picture(query.reference)) for query in queries])
            samples = {"image": pictures, "text_input": [processors[1](query.texts[0]) for query in queries]}
            maps = self.model.attention_maps(prepare_sample(samples, self.cuda_enabled)).float().cpu()
            sheet = folder / f"attention_{group.name}.png"
            written.append(
                contact_sheets.attention_sheet(
                    self.dataset.benchmark, group, pictures, maps, self.model.attention_labels, sheet
                )
            )
        return written

    def _own_rankings(self, mode: str, gallery: Tensor, top_k: int) -> dict[str, Ranking]:
        """Rank this process's share of each group's queries; a group without any is left out."""
        groups = self.dataset.benchmark.groups
        parts = [[group.queries[index] for index in share(len(group.queries))] for group in groups]
        rows = self.encode_queries(mode, parts)
        position = {name: index for index, name in enumerate(self.dataset.names)}
        own = {}
        for group, queries in zip(groups, parts):
            count = sum(len(query.texts) for query in queries)
            if queries:
                is_whole = list(group.gallery) == self.dataset.names  # a copy of all features would only cost memory
                features = gallery if is_whole else gallery[[position[name] for name in group.gallery]]
                own[group.name] = rank_queries(queries, rows[:count], features, group, self.model.device, top_k)
            rows = rows[count:]
        return own

    def encode_gallery(self, keeps_references: bool = True) -> Tensor:
        """Return the features of all G images, ``(G, ...)``; each process encodes its share.

        Args:
            keeps_references: Whether queries with pictures are encoded afterwards. A model that is a
                :class:`~lavis_cir_plugin.data.feature_cache.HasImageTower` then runs its tower once per picture, and
                the features of the references stay on the disk for as long as this object lives.
        """
        folder = Path(registry.get_path("output_dir"))
        pictures = DistinctPictures(self.dataset)
        saves_passes = (
            keeps_references
            and bool(pictures.references)
            and not self.dataset.keeps_features  # what is kept is read as fast again
            and has_image_tower(self.model)
        )
        # Machines with folders of their own can differ in what their caches keep.
        runs_once = any(gather(saves_passes))
        with ReferenceFeatures(folder, pictures.references) if runs_once else nullcontext() as references:
            batches = self._encode_pictures(pictures, references)
            gallery = store_gallery(folder / GALLERY_FILE, len(self.dataset), batches, self.gallery_dtype)
            if references is not None and references.complete():
                self.references = references
        return gallery

    def _encode_pictures(self, pictures: DistinctPictures, references: ReferenceFeatures | None) -> Iterator[Tensor]:
        """Yield the features of this process's share of the gallery, batch by batch, and write those of references."""
        count = len(self.dataset)
        batches = self._batches(share(count))
        if references is not None:
            outside = share(len(pictures) - count)
            batches += self._batches(range(count + outside.start, count + outside.stop))
        size = 0
        for batch, samples in self._loaded(pictures, batches, "encode gallery"):
            if batch[0] >= count and (references is None or not references.is_writable):
                return
            images = self._prepared(samples)["image"]
            if references is not None and self.dataset.features is None:
                images = tower_features(self.model, images)
            if batch[0] < count:
                features = self.model.encode_target(images).float().cpu()
                size = count * features[0].numel() * self.gallery_dtype.itemsize
                yield features
            if references is not None:
                references.write([pictures.names[index] for index in batch], images, size)

    def encode_queries(self, mode: str, parts: Iterable[Iterable[Query]]) -> Tensor:
        """Return one query vector per text of these parts of the groups: ``(R, D)``, float32."""
        references = self.references if mode != "text" else None
        rows = self.dataset.texts if mode == "text" or references is not None else self.dataset.queries
        indices: list[int] = []
        start = 0
        for group, part in zip(self.dataset.benchmark.groups, parts):
            texts = [len(query.texts) for query in group.queries]
            first = start + sum(texts[: share(len(texts)).start])
            indices += range(first, first + sum(len(query.texts) for query in part))
            start += sum(texts)
        encoded = []
        for batch, samples in self._loaded(rows, self._batches(indices), f"encode queries ({mode})"):
            if references is not None:
                samples["image"] = references.of([rows.rows[index][0] for index in batch])
            encoded.append(self.model.encode_query(self._prepared(samples), mode).float().cpu())
        return torch.cat(encoded) if encoded else torch.empty(0, 0)

    def _prepared(self, samples: dict[str, Any]) -> dict[str, Any]:
        """Return a batch on the model's device, with features in place of pictures if the data set has a cache."""
        caches = [self.dataset.features] if self.dataset.features is not None else []
        return with_features(prepare_sample(samples, self.cuda_enabled), self.model, caches)

    def _batches(self, indices: Sequence[int]) -> list[Sequence[int]]:
        size = self.loader.batch_size or 1
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def _loaded(
        self, dataset: Dataset, batches: Sequence[Sequence[int]], label: str
    ) -> Iterator[tuple[Sequence[int], dict[str, Any]]]:
        """Yield these batches of a data set's rows: their numbers and the samples, on the CPU."""
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=self.loader.num_workers if batches else 0,
            collate_fn=self.dataset.collater,
            worker_init_fn=worker_setup(),
        )
        bar = tqdm(loader, desc=label, disable=None if is_main_process() else True, leave=False)
        yield from zip(batches, bar)


def rank_queries(
    queries: Sequence[Query], rows: Tensor, gallery: Tensor, group: Group, device: torch.device, top_k: int = TOP
) -> Ranking:
    """Rank a group's gallery for some of its queries by the group's rules.

    Args:
        queries: Some queries of the group.
        rows: One unit vector per text of each query, in order, ``(R, D)``. The vector of a query with several texts is
            the normalised mean of theirs.
        gallery: Features ``(G, K, D)`` or ``(G, D)`` in the order of the group's gallery, on any device.
        group: Group with the names and the rules.
        device: Device that computes.
        top_k: Number of best images to return.

    Returns:
        The ranking on the CPU, padded to the widths of the whole group.
    """
    index: dict[str | None, int] = {name: position for position, name in enumerate(group.gallery)}

    def positions(names: Callable[[Query], Sequence[str | None]]) -> Tensor:
        width = max(len(names(query)) for query in group.queries)
        return padded(([index.get(name, -1) for name in names(query)] for query in queries), width).to(device)

    counts = torch.tensor([len(query.texts) for query in queries])
    if bool((counts > 1).any()):
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        rows = F.normalize(torch.zeros(len(counts), rows.shape[1]).index_add_(0, owner, rows), dim=-1)
    ranking = rank(
        rows.to(device),
        gallery,  # `rank` moves it to the device block by block
        positions(lambda query: (query.target,)).flatten(),
        excluded=positions(lambda query: (query.reference,)).flatten() if group.reference_removed else None,
        members=positions(lambda query: query.members),
        relevant=positions(lambda query: [name for name, _ in query.relevance]),
        top_k=top_k,
    )
    return Ranking(**{field.name: getattr(ranking, field.name).cpu() for field in fields(Ranking)})


def rankings_of_all_processes(rankings: Sequence[Ranking]) -> Ranking:
    """Concatenate the rankings of consecutive queries."""
    return Ranking(**{field.name: torch.cat([getattr(r, field.name) for r in rankings]) for field in fields(Ranking)})
