"""The LAVIS task ``composed_retrieval``: trains on triplets, ranks galleries, and reports by each protocol."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Union

import torch
from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.tasks.base_task import BaseTask
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lavis_cir_plugin.benchmarks.types import Benchmark
from lavis_cir_plugin.core.settings import Limits, Section
from lavis_cir_plugin.data.benchmark_datasets import BenchmarkDataset
from lavis_cir_plugin.data.feature_cache import FeatureCache, with_features
from lavis_cir_plugin.ranking.gallery_features import DTYPES, check_folder
from lavis_cir_plugin.ranking.ranks import Ranking
from lavis_cir_plugin.report import chance, contact_sheets, curves, result_files, tables
from lavis_cir_plugin.report.query_results import QUERIES, write_queries
from lavis_cir_plugin.report.run_log import EPOCHS
from lavis_cir_plugin.tasks.evaluation import TOP, Evaluation
from lavis_cir_plugin.tasks.feature_caching import AUTO, cache_features
from lavis_cir_plugin.training.config import plain_split_name
from lavis_cir_plugin.training.training_history import trained_on

TRAINED, RANDOM = "trained model", "random (expected)"
_DISPENSABLE_KEYS = {"image_id", "instance_id"}  # keys of samples that no model needs
BASELINES = {"image": "image only", "text": "text only"}


def _refuse_file(where: bool | str) -> None:
    if isinstance(where, str) and Path(os.path.expanduser(where)).is_file():
        raise ValueError("it is a file")


@dataclass(frozen=True)
class EvaluationSettings(Section):
    """Keys of ``run`` that the task reads.

    Attributes:
        feature_cache: Whether the features of a frozen image tower are kept when a picture is first encoded; ``auto``
            keeps them where that changes no number, spares passes and takes less than a tenth of the free space; a path
            says where.
        gallery_dtype: Type of the gallery's features during the ranking. They lie in a file in the run's folder that is
            gone afterwards: CIRCO's 123,403 x 32 x 256 are 4 GB, or 2.
    """

    WHERE = "run"

    feature_cache: Annotated[
        Union[bool, str], Limits(words="auto, true, false or the path of a folder", check=_refuse_file)
    ] = AUTO
    gallery_dtype: Literal["float32", "float16"] = "float32"


@registry.register_task("composed_retrieval")
class ComposedRetrievalTask(BaseTask):
    """Ranks the gallery of each benchmark group for its queries and scores the rankings by the benchmark's metric.

    The task works with any model that offers ``encode_query(samples, mode)`` and ``encode_target(image)`` as
    ``blip2_cir`` does. The processes share the gallery and the queries with exact counts, and every process gets the
    whole ranking. The final evaluation (after training, and in an evaluation run) writes to ``<run>/<split>/``, or, if
    ``run.test_splits`` names several benchmarks, to ``<run>/<benchmark>_<split>/``. It writes the test server's files
    if the targets are not public, and otherwise ``metrics.json``, which also has the metrics of rankings by the image
    alone, by the text alone and at random. It also writes contact sheets and, after training, the training curve.
    ``<run>/summary.json`` compares several benchmarks.

    A model may also offer:

    * ``row_label``: its name in the tables, in place of "trained model".
    * ``baselines``: names of further rows by the mode of ``encode_query`` that they rank with; by default those of
      ``image`` and ``text``.
    * ``is_zero_shot``: whether the protocol line must say that the model was trained on a benchmark's own training
      split.
    * ``attention_maps(samples)``: maps ``(B, maps, height, width)`` of where it looks in the reference images, and
      ``attention_labels``, a name per map. Sheets of these maps are drawn beside the contact sheets.

    An evaluation runs the image tower once per picture if the model is a
    :class:`~lavis_cir_plugin.data.feature_cache.HasImageTower`.

    Training data may also come from other data sets of LAVIS, such as captions; only benchmarks are evaluated.
    """

    RUN_SETTINGS: type[Section] = EvaluationSettings
    """Section of the keys of ``run`` that the task reads beside LAVIS's."""
    evaluates_benchmarks = True
    """Whether the task evaluates benchmarks alone, each separately; see
    :func:`~lavis_cir_plugin.training.config.choose_splits`."""
    replaces_loss = False
    """Whether :meth:`prepare` gives the model another loss than its own."""

    def __init__(self, gallery_dtype: torch.dtype = torch.float32, test_splits: Sequence[str] = ()) -> None:
        super().__init__()
        self.gallery_dtype = gallery_dtype
        self.test_splits = test_splits
        self.validation_metric: str | None = None  # the metric on `val` that chooses a checkpoint
        self.results: dict[str, tuple[Benchmark, Mapping[str, Mapping[str, float]]]] = {}
        self.model: Any = None
        self.caches: list[FeatureCache] = []
        self._to_preload: list[str] = []

    @classmethod
    def setup_task(cls, cfg: Any, **_: Any) -> ComposedRetrievalTask:
        """Build the task from a config; LAVIS calls this method."""
        run = cfg.run_cfg
        return cls(DTYPES[run.get("gallery_dtype", "float32")], tuple(run.get("test_splits", ())))

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """Build the splits that each section names; unless ``run.feature_cache`` is off, :meth:`prepare` preloads.

        Returns:
            Data sets by name and split; a split has the name in its section, such as ``val`` or ``cirr.val``.

        Raises:
            ValueError: If a checkpoint would be chosen on a split without public targets, or if training data would
                mix samples of several kinds.
        """
        sections = copy.deepcopy(cfg.datasets_cfg)  # the config itself is logged, and a resumed run compares it
        wanted = {name: section.get("splits") for name, section in sections.items()}
        for name, section in list(sections.items()):
            if cfg.run_cfg.get("feature_cache", AUTO) and section.get("preload"):
                section.preload = False  # `prepare` preloads the pictures unless their features are cached
                self._to_preload.append(name)
            if wanted[name] is not None:
                _keep_splits(section, list(dict.fromkeys(plain_split_name(split) for split in wanted[name])))
            if wanted[name] == []:
                del sections[name]
        built = super().build_datasets(SimpleNamespace(datasets_cfg=sections))
        datasets = {
            name: splits if wanted[name] is None else {split: splits[plain_split_name(split)] for split in wanted[name]}
            for name, splits in built.items()
        }
        _check_training_data({name: splits["train"] for name, splits in datasets.items() if "train" in splits})
        for splits in datasets.values():
            for split in cfg.run_cfg.get("valid_splits", []):
                dataset = splits.get(split)
                if not isinstance(dataset, BenchmarkDataset):
                    continue
                if not dataset.benchmark.has_targets:
                    raise ValueError(
                        f"run.valid_splits: {dataset.benchmark.name} {split} has no public targets, so no checkpoint "
                        "can be chosen by it; validate on val, and name it in run.test_splits for a submission."
                    )
                if split == "val":
                    self.validation_metric = dataset.benchmark.selection_metric
        model = getattr(cfg, "model_cfg", None) or {}
        if getattr(registry.get_model_class(model.get("arch")), "is_zero_shot", False):
            _tell_of_own_training(datasets, trained_on(model, cfg.datasets_cfg))
        return datasets

    def prepare(self, model: nn.Module, datasets: Mapping[str, Mapping[str, Any]], cfg: Any) -> None:
        """Let the data sets return cached features of a frozen image tower, as ``run.feature_cache`` says.

        The launcher calls this method after everything is built and before it reads the checkpoint of a resumed run.

        Args:
            model: Model that will be trained or evaluated; it is moved to ``run.device``.
            datasets: Data sets by name and split; those of other packages stay unchanged.
            cfg: Config object of LAVIS.

        Raises:
            OSError: If not all processes see ``run.output_dir``, which an evaluation needs.
            ValueError: If :func:`~lavis_cir_plugin.tasks.feature_caching.cache_features` raises it, or if another
                process failed.
        """
        run = cfg.run_cfg
        if run.get("valid_splits") or run.get("test_splits"):
            check_folder(Path(run.output_dir))  # otherwise the first validation, after an epoch, would find out
        self.model = model
        self.caches = cache_features(model, datasets, run)
        for name in self._to_preload:
            # A benchmark may be there twice, as val and as cirr.val.
            splits = {id(dataset): (split, dataset) for split, dataset in datasets.get(name, {}).items()}
            for split, dataset in splits.values():
                if getattr(dataset, "features", None) is None:
                    dataset.preload()
                else:
                    logging.info(
                        "datasets.%s.preload has no effect on %s: its features are cached instead", name, split
                    )

    def train_step(self, model: Callable[[dict[str, Any]], Any], samples: dict[str, Any]) -> Tensor:
        """Return the loss of a batch; features that are in no cache yet are computed before the model's call."""
        loss: Tensor = super().train_step(model=model, samples=with_features(samples, self.model, self.caches))
        return loss

    def evaluation(self, model: nn.Module, data_loader: DataLoader, cuda_enabled: bool = True) -> Evaluation:
        """Return the evaluation of a split, which encodes and ranks when :meth:`after_evaluation` asks for rankings."""
        return Evaluation(model, data_loader, cuda_enabled, self.gallery_dtype)

    def after_evaluation(self, val_result: Evaluation, split_name: str, epoch: Any, **_: Any) -> dict[str, float]:
        """Compute the metrics of a split, and in the final evaluation write its report.

        Args:
            val_result: Result of :meth:`evaluation`.
            split_name: Name of the evaluated split.
            epoch: LAVIS's epoch; ``"best"`` marks the final evaluation.

        Returns:
            The metrics in percent, and ``agg_metrics``, the one that chooses the best checkpoint. The result is empty
            for a split without public targets.
        """
        benchmark = val_result.dataset.benchmark
        rankings = val_result.rankings(top_k=TOP if epoch == "best" else 0)  # metrics read ranks alone
        metrics = benchmark.metrics(rankings) if benchmark.has_targets else {}
        values = (
            {name: round(value, 2) for name, value in metrics.items()} if metrics else "answers not known, no metrics"
        )
        logging.info("%s: %s", benchmark.protocol, values)
        if epoch == "best":
            self._report(val_result, split_name, metrics, rankings)
        if not benchmark.has_targets:
            return {}
        return {**metrics, "agg_metrics": metrics[benchmark.selection_metric]}

    def _report(
        self, evaluation: Evaluation, split: str, metrics: Mapping[str, float], rankings: Mapping[str, Ranking]
    ) -> None:
        """Write and print the results of a split's final evaluation, and after the last split the summary of all."""
        benchmark, model = evaluation.dataset.benchmark, evaluation.model
        rows: dict[str, Mapping[str, float]] = {}
        if benchmark.has_targets:
            rows[getattr(model, "row_label", TRAINED)] = metrics
            for mode, label in getattr(model, "baselines", BASELINES).items():
                rows[label] = benchmark.metrics(evaluation.rankings(mode))
            rows[RANDOM] = chance.expected_random(benchmark)
            self.results[folder_name(split)] = benchmark, rows
        if not is_main_process():
            return
        run = Path(registry.get_path("output_dir"))
        folder = run / folder_name(split)
        written = write_report(folder, benchmark, rows, rankings, {"gallery_dtype": str(self.gallery_dtype)})
        if getattr(model, "attention_labels", None):
            written += evaluation.draw_attention(folder)
        print(tables.metrics_table(rows, benchmark))
        if split in self.test_splits[-1:] or not self.test_splits:
            written += self._report_run(run, self.validation_metric or benchmark.selection_metric)
        print(f"\nWritten to {run}:\n  " + "\n  ".join(str(path.relative_to(run)) for path in written))

    def _report_run(self, run: Path, curve_metric: str) -> list[Path]:
        """Write and print the reports on all benchmarks of a run; return their files and the checkpoints."""
        written = []
        if len(self.results) > 1:
            print("\n" + tables.summary_table(self.results))
            written.append(result_files.write_summary(run / "summary.json", self.results))
        if (run / EPOCHS).is_file():  # not in an evaluation run
            try:
                path = run / "training_curve.png"
                written.append(curves.training_curve(run, path, curve_metric, _panels_of_methods()))
            except ValueError as error:
                logging.warning("no training curve: %s", error)
        return written + sorted(run.glob("checkpoint_*.pth"))


def _panels_of_methods() -> list[curves.Panel]:
    """Return the panels of the training curve that registered runners and tasks define, each once."""
    entries = [*registry.mapping["runner_name_mapping"].values(), *registry.mapping["task_name_mapping"].values()]
    return list(dict.fromkeys(panel for entry in entries for panel in getattr(entry, "CURVE_PANELS", ())))


def folder_name(split: str) -> str:
    """Return the name of a split's report folder in a run: ``val`` for ``val``, ``cirr_val`` for ``cirr.val``."""
    return split.replace(".", "_")


def _tell_of_own_training(datasets: Mapping[str, Mapping[str, Any]], trained: set[str]) -> None:
    """Add to the protocol line of each benchmark in ``trained`` that its numbers are not zero-shot."""
    for name in trained & datasets.keys():
        for dataset in datasets[name].values():
            if isinstance(dataset, BenchmarkDataset):
                protocol = f"{dataset.benchmark.protocol}; not zero-shot: trained on {name}'s own training split"
                dataset.benchmark = replace(dataset.benchmark, protocol=protocol)


def _keep_splits(section: Any, splits: list[str]) -> None:
    """Let a builder build these splits alone; LAVIS's own builders build every split with an annotation."""
    section.splits = splits
    annotations = (section.get("build_info") or {}).get("annotations")
    if isinstance(annotations, DictConfig):
        for name in set(annotations) - set(splits):
            del annotations[name]


def _check_training_data(datasets: Mapping[str, Any]) -> None:
    """Refuse training data whose samples differ in their keys, because LAVIS keeps only the keys that all have."""
    mixed = {name: dataset for name, dataset in datasets.items() if not isinstance(dataset, IterableDataset)}
    if len(mixed) < 2:
        return
    keys = {name: set(dataset[0]) - _DISPENSABLE_KEYS for name, dataset in mixed.items()}
    most = max(keys, key=lambda name: len(keys[name]))
    for name in keys:
        lacking = sorted(keys[most] - keys[name])
        if lacking:
            raise ValueError(
                f"run.train_splits: samples of {name} have no {' and no '.join(lacking)} as those of {most}, and LAVIS "
                f"would drop that from batches that hold both; train on one of them (datasets.{name}.splits: [val], or "
                "[] where nothing of it is evaluated)."
            )


def write_report(
    folder: Path,
    benchmark: Benchmark,
    rows: Mapping[str, Mapping[str, float]],
    rankings: Mapping[str, Ranking],
    extra: Mapping[str, Any],
) -> list[Path]:
    """Write the report of a split's final evaluation and return the files.

    Args:
        folder: Folder of the split's report.
        benchmark: Benchmark with this split.
        rows: Metrics by the name of the query mode. If it is empty, because the targets are not public, submission
            files are written in place of ``metrics.json``.
        rankings: Rankings of the trained model, by group.
        extra: Further entries of ``metrics.json``.
    """
    written = []
    if rows:
        written.append(result_files.write_metrics(folder / "metrics.json", rows, benchmark, extra))
    else:
        for name, content in benchmark.submissions(rankings).items():
            written.append(result_files.write_submission(folder / name, content))
    written.append(write_queries(folder / QUERIES, benchmark, rankings))
    for group in benchmark.groups:
        sheet = folder / f"contact_sheet_{group.name}.png"
        written.append(contact_sheets.contact_sheet(benchmark, group, rankings[group.name], sheet))
    return written
