"""The LAVIS task ``retrieval_dpo``: composed retrieval trained by preferences between right and mined wrong images."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from lavis.common.dist_utils import is_main_process
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from torch import Tensor, nn

from lavis_cir_plugin.core.processes import fail_in_all_processes, gather
from lavis_cir_plugin.core.random_state import get_random_state, set_random_state
from lavis_cir_plugin.core.settings import as_plain
from lavis_cir_plugin.data.benchmark_datasets import TripletDataset
from lavis_cir_plugin.data.feature_cache import with_features
from lavis_cir_plugin.data.negatives import NegativeSets, load_negatives, negatives_path
from lavis_cir_plugin.methods.retrieval_dpo import negatives_sheet
from lavis_cir_plugin.methods.retrieval_dpo.losses import PreferenceSettings
from lavis_cir_plugin.methods.retrieval_dpo.miner import NegativeMiner, image_files
from lavis_cir_plugin.methods.retrieval_dpo.mining import MiningSettings
from lavis_cir_plugin.methods.retrieval_dpo.preference_model import (
    ReferencePolicy,
    candidate_features,
    keep_unread_as_buffers,
    learn_preferences,
    paired_scores,
)
from lavis_cir_plugin.report.curves import Panel
from lavis_cir_plugin.report.sheet_layout import BLUE, GREY, ORANGE
from lavis_cir_plugin.tasks.composed_retrieval import ComposedRetrievalTask, EvaluationSettings

_LARGEST_DIFFERENCE = 0.01
"""Largest difference of two scores of one policy, which half precision or another device can cause."""
_COMPARED = 64


@dataclass(frozen=True)
class DpoRun(EvaluationSettings):
    """Keys of ``run`` that the task reads.

    Attributes:
        dpo: The loss of preferences.
        negatives: The rules by which negatives are mined.
    """

    dpo: Optional[PreferenceSettings] = None
    negatives: Optional[MiningSettings] = None

    def conflicts(self) -> Iterator[str]:
        """Yield a sentence per combination of values that is impossible."""
        preference, mining = self.dpo or PreferenceSettings(), self.negatives or MiningSettings()
        if preference.reference == "mined" and mining.file is None:
            yield (
                "run.dpo.reference: mined are the scores in run.negatives.file, which is empty; name the file of a run "
                "that started from the same weights, or set run.dpo.reference: start."
            )
        if preference.reference == "mined" and preference.positive != "target":
            yield (
                f"run.dpo.positive: {preference.positive} has no scores in run.negatives.file, which holds those of "
                "targets; set it to target, or set run.dpo.reference: start."
            )


@registry.register_task("retrieval_dpo")
class RetrievalDpoTask(ComposedRetrievalTask):
    r"""Trains a model by preferences between right and wrong images, and evaluates it as ``composed_retrieval`` does.

    .. math:: L = L_\mathrm{DPO} + a L_\mathrm{InfoNCE}

    ``run.dpo`` holds the fields of :class:`~lavis_cir_plugin.methods.retrieval_dpo.losses.PreferenceSettings`, and
    ``run.negatives`` those of :class:`~lavis_cir_plugin.methods.retrieval_dpo.mining.MiningSettings`. The model must be
    a :class:`~lavis_cir_plugin.methods.retrieval_dpo.preference_model.HasScores`, such as ``blip2_cir``, ``clip_cir``,
    ``tscir_mapping`` or ``tscir_composing``.

    At the beginning of an epoch for which a mining is due, the negatives are mined among the training images of each
    data set and written to ``<run>/negatives/``, where a resumed run finds them. A frozen image tower runs once per
    step, for both policy and reference policy.
    """

    RUN_SETTINGS = DpoRun
    replaces_loss = True
    CURVE_PANELS = (
        Panel(
            "share",
            (
                ("reward_accuracy", "h > 0 (reward accuracy)", BLUE),
                ("without_negative", "queries without a negative", GREY),
            ),
        ),
        Panel(
            "cosine",
            (
                ("reward_margin", "h (reward margin)", BLUE),
                ("positive_drift", "drift of the right image's score", ORANGE),
            ),
        ),
    )

    @classmethod
    def setup_task(cls, cfg: Any, **_: Any) -> RetrievalDpoTask:
        """Build the task from a config; LAVIS calls this method."""
        task: RetrievalDpoTask = super().setup_task(cfg)  # type: ignore[assignment]
        task.preference = PreferenceSettings(**as_plain(cfg.run_cfg.get("dpo")))
        task.mining = MiningSettings(**as_plain(cfg.run_cfg.get("negatives")))
        return task

    def prepare(self, model: nn.Module, datasets: Mapping[str, Mapping[str, Any]], cfg: Any) -> None:
        """Cache features, and for a training give the model Retrieval-DPO's loss and a reference policy.

        Raises:
            ValueError: If the model has no scores or no trained weights, if the data are no triplets, or if policy and
                reference policy differ before the first step.
        """
        self.training = {name: splits["train"] for name, splits in datasets.items() if "train" in splits}
        if self.training:
            _check_data(self.training, self.mining)
            _check_model(model)
        super().prepare(model, datasets, cfg)
        if not self.training:
            return
        run = cfg.run_cfg
        self.device = torch.device(run.device)
        self.in_use: dict[str, int] = {}
        self.miner = NegativeMiner(
            model=model.to(self.device),
            settings=self.mining,
            positive=self.preference.positive,
            seed=int(run.seed),
            device=self.device,
            batch_size=int(run.batch_size_eval),
            num_workers=int(run.num_workers),
            gallery_dtype=self.gallery_dtype,
        )
        learn_preferences(model, self.preference)
        samples = self._first_samples(2)
        others = samples["target"].roll(1, dims=0)
        samples.update(negatives=others[:, None], negatives_present=torch.ones(2, 1, dtype=torch.bool).to(self.device))
        keep_unread_as_buffers(model, samples)
        self.reference = ReferencePolicy(model) if self.preference.reference == "start" else None
        if self.reference is not None:
            difference = (self.reference.scores(samples) - self._policy_scores(samples)).abs().max()
            if not difference <= _LARGEST_DIFFERENCE:  # nan, too
                raise ValueError(
                    f"run.dpo.reference: the scores of policy and reference policy differ by {difference:.3f} before "
                    f"the first step, although their weights are equal: {type(model).__name__}'s are random or depend "
                    "on more than its weights; such a model has no reference policy (run.dpo.reference: none)."
                )
        if self.mining.file is not None:
            for name, dataset in self.training.items():
                self._use_negatives(dataset, self._from_file(name, dataset, self.mining.file))

    def train_epoch(self, epoch: int, **arguments: Any) -> Any:
        """Mine negatives if a mining is due, then train an epoch of LAVIS's loop."""
        self.begin_epoch(epoch, arguments["data_loader"])
        return super().train_epoch(epoch=epoch, **arguments)

    def train_iters(self, epoch: int, start_iters: int, iters_per_inner_epoch: int, **arguments: Any) -> Any:
        """Mine negatives if a mining is due, then train an inner epoch of LAVIS's loop."""
        self.begin_epoch(start_iters // iters_per_inner_epoch, arguments["data_loader"])
        return super().train_iters(
            epoch=epoch, start_iters=start_iters, iters_per_inner_epoch=iters_per_inner_epoch, **arguments
        )

    def train_step(self, model: Callable[[dict[str, Any]], Any], samples: dict[str, Any]) -> Tensor:
        """Return the loss of a batch; features and scores without gradient are computed before the model's call."""
        samples = self._with_features(samples)
        if self.reference is not None:
            samples["reference_scores"] = self.reference.scores(samples, self.preference.positive)
        loss: Tensor = super().train_step(model=model, samples=samples)
        return loss

    def _with_features(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """Return the samples with the features of a frozen image tower in place of pictures, cached or not."""
        result = with_features(samples, self.model, self.caches)
        tower = getattr(self.model, "image_tower", None)
        if result["image"].dim() != 4 or tower is None or any(weight.requires_grad for weight in tower.parameters()):
            return result
        pictures = [result["image"], result["target"], result["negatives"].flatten(0, 1)]
        with torch.no_grad():
            tokens = self.model.image_features(torch.cat(pictures)).split([len(part) for part in pictures])
        wrong = tokens[2].unflatten(0, result["negatives"].shape[:2])
        return {**result, "image": tokens[0], "target": tokens[1], "negatives": wrong}

    def _report_run(self, run: Path, curve_metric: str) -> list[Path]:
        """Write the reports of composed retrieval, and draw the negatives of the last epoch."""
        sheets = []
        for name, dataset in self.training.items():
            if dataset.negatives is not None:
                try:
                    sheets.append(negatives_sheet.negatives_sheet(dataset.negatives, run / f"negatives_{name}.png"))
                except (ValueError, OSError) as error:
                    logging.warning("no sheet of the negatives: %s", error)
        return [*super()._report_run(run, curve_metric), *sheets]

    # Negatives.

    def begin_epoch(self, epoch: int, data_loader: Any) -> None:
        """Let the data sets return the negatives of an epoch, which are mined now or read from the run's file.

        Args:
            epoch: Number of the epoch, from 0.
            data_loader: Loader of the epoch's batches, whose workers are restarted if the negatives are new.
        """
        at = self.mining.mined_at(epoch)
        for name, dataset in self.training.items():
            if self.in_use.get(name) == at or self.mining.file is not None:
                continue
            path = negatives_path(Path(registry.get_path("output_dir")), name, at)
            is_kept = gather(path.is_file())[0]
            if is_kept:
                with fail_in_all_processes():
                    sets = load_negatives(path)
                    self._check_gallery(sets, name, dataset, str(path))
                if sets.about.get("negatives") != self.miner.plain_settings():
                    logging.warning("%s was mined by other run.negatives; they count from the next mining on", path)
            else:
                if at < epoch:
                    logging.warning("%s is not there: negatives are mined with the weights as they are now", path)
                state = get_random_state(self.device)
                sets = self.miner.mine(name, dataset, at)
                set_random_state(state, self.device)  # a resumed run finds the file and draws nothing here
                self._check_any(sets)
                with fail_in_all_processes():
                    if is_main_process():
                        sets.save(path)
            logging.info("negatives of %s for epoch %d: %s", name, epoch, sets.summary())
            self._use_negatives(dataset, sets)
            self.in_use[name] = at
            data_loader.renew()

    def _check_any(self, sets: NegativeSets) -> None:
        if not sets.counts.any():
            asked = [f"widen run.negatives.window: {list(self.mining.window)}"]
            if self.mining.cap is not None:
                asked.append(f"raise run.negatives.cap: {self.mining.cap}")
            if self.mining.margin is not None:
                asked.append(f"lower run.negatives.margin: {self.mining.margin}")
            raise ValueError(
                f"run.negatives leaves none of {len(sets.targets):,} triplets a negative; {', or '.join(asked)}."
            )

    def _use_negatives(self, dataset: TripletDataset, sets: NegativeSets) -> None:
        sets.paths = image_files(dataset, sets.names)  # paths in a file may be of another machine
        dataset.use_negatives(sets, self.mining.count, with_scores=self.preference.reference == "mined")

    def _from_file(self, name: str, dataset: TripletDataset, path: str) -> NegativeSets:
        """Read the negatives of an earlier run, and compare them with the data and the starting weights."""
        sets = load_negatives(path)
        self._check_gallery(sets, name, dataset, f"run.negatives.file: {path}")
        if sets.counts.max() < self.mining.count:
            raise ValueError(
                f"run.negatives.file: {path} holds up to {sets.counts.max()} negatives of a triplet, fewer than "
                f"run.negatives.count: {self.mining.count}; lower count, or mine them anew with a wider window."
            )
        if self.preference.reference != "mined":
            return sets
        if sets.about.get("negatives", {}).get("source") == "positive":
            raise ValueError(
                f"run.negatives.file: {path} was mined by run.negatives.source: positive, so that its scores are those "
                "of right images with others, not a policy's; mine with source: query, or set run.dpo.reference: start."
            )
        if np.isnan(sets.target_scores).any():
            raise ValueError(
                f"run.negatives.file: {path} holds negatives that were drawn at random, without scores; name those of "
                "a later epoch, or set run.dpo.reference: start."
            )
        dataset.use_negatives(sets, self.mining.count, with_scores=True)
        samples = self._with_features(self._first_samples(min(_COMPARED, len(dataset)), dataset))
        difference = (samples["reference_scores"] - self._policy_scores(samples)).abs()
        if not difference.max() <= _LARGEST_DIFFERENCE:  # nan, too
            raise ValueError(
                f"run.negatives.file: the scores in {path} differ by up to {difference.max():.3f} from those of the "
                "starting weights, so they are another policy's; mine with these weights, or set run.dpo.reference: "
                "start."
            )
        return sets

    def _check_gallery(self, sets: NegativeSets, name: str, dataset: TripletDataset, source: str) -> None:
        names = sets.names
        theirs = [(names[reference], names[target]) for reference, target in zip(sets.references, sets.targets)]
        ours = [(triplet.reference, triplet.target) for triplet in dataset.triplets]
        if theirs != ours or set(names) != set(dataset.image_paths):
            raise ValueError(
                f"{source} belongs to other training data: {len(theirs):,} triplets over {len(names):,} images, and "
                f"{name} has {len(ours):,} over {len(dataset.image_paths):,}; mine them anew for these data."
            )
        before, now = sets.about.get("positive"), self.preference.positive
        if before != now:
            raise ValueError(
                f"{source} was mined for run.dpo.positive: {before}, and it is {now} now, which may be among those "
                "negatives; set it back, or mine them anew."
            )

    def _first_samples(self, count: int, dataset: TripletDataset | None = None) -> dict[str, Any]:
        """Return the first triplets as a batch on the device, and leave all random generators unchanged."""
        dataset = dataset or next(iter(self.training.values()))
        state = get_random_state()
        random.seed(0)
        samples = dataset.collater([dataset[index % len(dataset)] for index in range(count)])
        set_random_state(state)
        return with_features(prepare_sample(samples, self.device.type == "cuda"), self.model, self.caches)

    @torch.no_grad()
    def _policy_scores(self, samples: Mapping[str, Any]) -> Tensor:
        return paired_scores(self.model.query_features(samples), candidate_features(self.model, samples))


def _check_data(training: Mapping[str, Any], mining: MiningSettings) -> None:
    if mining.file is not None and len(training) > 1:
        raise ValueError(
            f"run.negatives.file is of one data set, and {len(training)} are trained on ({', '.join(training)}); leave "
            "it out, or train on one."
        )
    if mining.file is not None and not Path(mining.file).expanduser().is_file():
        raise FileNotFoundError(
            f"run.negatives.file: {mining.file} does not exist; a retrieval_dpo run writes <run>/negatives/*.npz."
        )
    for name, dataset in training.items():
        if not isinstance(dataset, TripletDataset):
            raise ValueError(
                f"retrieval_dpo trains on triplets, and datasets.{name} is {type(dataset).__name__}; leave its train "
                f"split out (datasets.{name}.splits)."
            )
        if not dataset.is_deterministic:
            raise ValueError(
                f"retrieval_dpo mines with the training pictures, and datasets.{name}.vis_processor.train is "
                f"{type(dataset.vis_processor).__name__}, which may return something else each time; set its name to "
                "target_pad."
            )
        if mining.source == "image_set" and not any(triplet.members for triplet in dataset.triplets):
            raise ValueError(
                f"run.negatives.source: image_set mines in the image sets that CIRR's annotation names, and the "
                f"triplets of datasets.{name} have none; choose query or positive."
            )


def _check_model(model: nn.Module) -> None:
    lacking = [name for name in ("query_features", "target_features", "temperature") if not hasattr(model, name)]
    if lacking:
        raise ValueError(
            f"retrieval_dpo needs a model that scores queries against images, and {type(model).__name__} has no "
            f"{' and no '.join(lacking)}; choose model.arch: blip2_cir, clip_cir, tscir_mapping or tscir_composing."
        )
