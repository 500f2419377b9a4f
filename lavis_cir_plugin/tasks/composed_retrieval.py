"""The LAVIS task of composed retrieval: train a model on triplets, rank galleries, report by the protocol."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from lavis.tasks.base_task import BaseTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from lavis_cir_plugin import report
from lavis_cir_plugin.benchmarks.benchmark import Group
from lavis_cir_plugin.datasets import BenchmarkDataset, CirDataset, cache_root
from lavis_cir_plugin.feature_cache import FeatureCache, check_tower, fingerprint
from lavis_cir_plugin.ranking import Ranking, rank
from lavis_cir_plugin.tracking import EPOCHS

TRAINED, IMAGE_ONLY, TEXT_ONLY, RANDOM = "trained model", "image only", "text only", "random (expected)"


@registry.register_task("composed_retrieval")
class ComposedRetrievalTask(BaseTask):
    """Ranks each benchmark group's gallery for its queries and scores the ranking by the benchmark's own metric.

    Works with any model that offers ``encode_query(samples, mode)`` and ``encode_target(image)`` as ``blip2_cir`` does.
    The gallery and the queries are shared out over the processes with exact counts; every process ends with all of
    them. The final evaluation (after training, and in an evaluation run) also ranks by the image alone, by the text
    alone and at random, and writes ``metrics.json``, contact sheets and the training curve to the run's folder.

    ``run.feature_cache`` (``false``, ``true`` or a folder) runs a frozen image tower once per picture, for any model
    that is a :class:`~lavis_cir_plugin.feature_cache.HasImageTower`.
    """

    RUN_KEYS = ("feature_cache",)

    @staticmethod
    def run_problems(run: Mapping[str, Any]) -> Iterator[str]:
        """Yield what is wrong with ``run.feature_cache``."""
        where = run.get("feature_cache", False)
        if not isinstance(where, (bool, str)) or where == "":
            yield f"run.feature_cache must be true, false or the path of a folder, got {where!r}."
        elif isinstance(where, str) and Path(where).expanduser().is_file():
            yield f"run.feature_cache: {where} is a file; name a folder."

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """Build LAVIS's way; pictures whose features will be cached are not preloaded."""
        if not cfg.run_cfg.get("feature_cache"):
            return super().build_datasets(cfg)
        sections = copy.deepcopy(cfg.datasets_cfg)  # the config itself is logged, and compared when a run is resumed
        for name, section in sections.items():
            if section.get("preload"):
                logging.info("datasets.%s.preload has no effect: run.feature_cache keeps the features instead", name)
                section.preload = False
        return super().build_datasets(SimpleNamespace(datasets_cfg=sections))

    def cache_features(self, model: nn.Module, datasets: Mapping[str, Mapping[str, Any]], cfg: Any) -> None:
        """Let the data sets return cached features of a frozen image tower, if ``run.feature_cache`` says so.

        Args:
            model: As it will be trained or evaluated; moved to ``run.device``.
            datasets: By name and split; those of other packages stay as they are.
            cfg: LAVIS's config.

        Raises:
            ValueError: If the tower is trained, or a processor random; with the key to change.
            OSError: If the features cannot be written.
        """
        where = cfg.run_cfg.get("feature_cache")
        if not where:
            return
        root = cache_root() / "features" if where is True else Path(where).expanduser().absolute()
        check_tower(model)
        alike: dict[str, list[CirDataset]] = {}
        for name, splits in datasets.items():
            for split, dataset in splits.items():
                if not isinstance(dataset, CirDataset):
                    continue
                if not dataset.is_deterministic:
                    key = f"datasets.{name}.vis_processor.{'train' if split == 'train' else 'eval'}"
                    raise ValueError(
                        f"run.feature_cache: {key} is {type(dataset.vis_processor).__name__}, which may return "
                        f"something else each time; set {key}.name: target_pad or run.feature_cache: false."
                    )
                alike.setdefault(fingerprint(dataset.vis_processor), []).append(dataset)
        model.to(torch.device(cfg.run_cfg.device))
        for members in alike.values():
            cache = FeatureCache(root, model, members[0].vis_processor)
            paths = {path for dataset in members for path in dataset.image_paths.values()}
            workers = int(cfg.run_cfg.get("num_workers", 0))
            cache.fill(model, paths, batch_size=int(cfg.run_cfg.get("batch_size_eval", 64)), num_workers=workers)
            for dataset in members:
                dataset.use_features(cache)

    def evaluation(self, model: nn.Module, data_loader: DataLoader, cuda_enabled: bool = True) -> Evaluation:
        """Encode the gallery and rank every query; the rest happens in :meth:`after_evaluation`."""
        return Evaluation(model, data_loader, cuda_enabled)

    def after_evaluation(self, val_result: Evaluation, split_name: str, epoch: Any, **_: Any) -> dict[str, float]:
        """Return the metrics in percent and ``agg_metrics``, the one that chooses the best checkpoint.

        Args:
            val_result: What :meth:`evaluation` returned.
            split_name: Of the evaluated split.
            epoch: LAVIS's epoch; ``"best"`` marks the final evaluation.
        """
        benchmark = val_result.dataset.benchmark
        rankings = val_result.rankings()
        metrics = benchmark.metrics(rankings)
        logging.info("%s: %s", benchmark.protocol, {name: round(value, 2) for name, value in metrics.items()})
        if epoch == "best":
            rows = {
                TRAINED: metrics,
                IMAGE_ONLY: benchmark.metrics(val_result.rankings("image")),
                TEXT_ONLY: benchmark.metrics(val_result.rankings("text")),
                RANDOM: report.expected_random(benchmark),
            }
            if is_main_process():
                write_report(Path(registry.get_path("output_dir")), val_result.dataset, rows, rankings)
        return {**metrics, "agg_metrics": metrics[benchmark.selection_metric]}


@dataclass
class Evaluation:
    """One model on one benchmark: encodes the gallery once, queries per mode."""

    model: nn.Module
    loader: DataLoader
    cuda_enabled: bool
    gallery: Tensor | None = None

    @property
    def dataset(self) -> BenchmarkDataset:
        """The benchmark's data set."""
        dataset: BenchmarkDataset = self.loader.dataset  # type: ignore[assignment]
        return dataset

    def rankings(self, mode: str = "multimodal") -> dict[str, Ranking]:
        """Return each group's ranking by queries of ``mode`` (``multimodal``, ``image`` or ``text``)."""
        if self.gallery is None:
            self.gallery = self._encode(
                self.dataset, lambda samples: self.model.encode_target(samples["image"]), "encode gallery"
            )
        rows = self.dataset.texts if mode == "text" else self.dataset.queries
        queries = self._encode(rows, lambda samples: self.model.encode_query(samples, mode), f"encode queries ({mode})")
        position = {name: index for index, name in enumerate(self.dataset.names)}
        rankings = {}
        start = 0
        for group in self.dataset.benchmark.groups:
            end = start + sum(len(query.texts) for query in group.queries)
            gallery = self.gallery[[position[name] for name in group.gallery]]
            rankings[group.name] = rank_group(group, queries[start:end], gallery, self.model.device)
            start = end
        return rankings

    def _encode(self, dataset: CirDataset, function: Callable[[dict[str, Any]], Tensor], label: str) -> Tensor:
        """Apply ``function`` to all rows of a data set, shared out over processes: ``(len(dataset), ...)`` float32."""
        own = list(range(get_rank(), len(dataset), get_world_size()))
        loader = DataLoader(
            Subset(dataset, own or [0]),  # a process without a row still has to take part in the gathering
            batch_size=self.loader.batch_size,
            num_workers=self.loader.num_workers,
            collate_fn=dataset.collater,
        )
        bar = tqdm(loader, desc=label, disable=None if is_main_process() else True, leave=False)
        rows = torch.cat([function(prepare_sample(samples, self.cuda_enabled)).float().cpu() for samples in bar])
        return gather_rows(rows[: len(own)], len(dataset), self.model.device)


def gather_rows(own: Tensor, total: int, device: torch.device) -> Tensor:
    """Interleave the rows of all processes: process r holds rows r, r + world size, r + 2 * world size, ...

    Args:
        own: ``(n, ...)``, this process's rows; counts may differ by one.
        total: Number of rows of all processes.
        device: Where the processes' backend exchanges tensors.

    Returns:
        ``(total, ...)`` on the CPU, the same on every process.
    """
    world = get_world_size()
    if world == 1:
        return own
    longest = -(-total // world)
    padded = own.new_zeros(longest, *own.shape[1:])
    padded[: own.shape[0]] = own
    parts = [torch.empty_like(padded, device=device) for _ in range(world)]
    dist.all_gather(parts, padded.to(device))
    return torch.stack([part.cpu() for part in parts], dim=1).flatten(0, 1)[:total]


def rank_group(group: Group, rows: Tensor, gallery: Tensor, device: torch.device) -> Ranking:
    """Rank one group's gallery for its queries by the group's rules.

    Args:
        group: Names and rules.
        rows: ``(R, D)``, one unit vector per text of each query, in order; a query with several texts is the
            normalised mean of theirs.
        gallery: ``(G, K, D)`` or ``(G, D)`` in the group's order, on any device.
        device: Where to compute.
    """
    index = {name: position for position, name in enumerate(group.gallery)}
    counts = torch.tensor([len(query.texts) for query in group.queries])
    queries = rows
    if bool((counts > 1).any()):
        owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
        queries = F.normalize(torch.zeros(len(counts), rows.shape[1]).index_add_(0, owner, rows), dim=-1)
    references = torch.tensor([index.get(query.reference, -1) for query in group.queries])
    members = None
    if any(query.members for query in group.queries):
        longest = max(len(query.members) for query in group.queries)
        padded = [[index[name] for name in query.members] for query in group.queries]
        members = torch.tensor([row + [-1] * (longest - len(row)) for row in padded]).to(device)
    return rank(
        queries.to(device),
        gallery,  # moved block by block
        torch.tensor([-1 if query.target is None else index.get(query.target, -1) for query in group.queries]).to(
            device
        ),
        excluded=references.to(device) if group.reference_removed else None,
        members=members,
    )


def write_report(
    folder: Path,
    dataset: BenchmarkDataset,
    rows: Mapping[str, Mapping[str, float]],
    rankings: Mapping[str, Ranking],
) -> None:
    """Print the table and write metrics, contact sheets and the training curve; say where they are."""
    benchmark = dataset.benchmark
    report.write_metrics(folder / "metrics.json", rows, benchmark, {})
    written = [folder / "metrics.json"]
    for group in benchmark.groups:
        ranking = rankings[group.name]
        sheet = folder / f"contact_sheet_{group.name}.png"
        report.contact_sheet(benchmark, group, ranking.top.cpu(), ranking.ranks.cpu(), sheet)
        written.append(sheet)
    if (folder / EPOCHS).is_file():  # not in an evaluation run
        try:
            report.training_curve(folder, folder / "training_curve.png", benchmark.selection_metric)
            written.append(folder / "training_curve.png")
        except ValueError as error:
            logging.warning("no training curve: %s", error)
    written += sorted(folder.glob("checkpoint_*.pth"))
    print(report.metrics_table(rows, benchmark))
    print("\nWritten to " + str(folder) + ":\n  " + "\n  ".join(path.name for path in written))
