"""Decide by ``run.feature_cache`` which data sets return cached features of a frozen image tower, and say why."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lavis_cir_plugin.core.error_messages import size_text
from lavis_cir_plugin.core.processes import fail_in_all_processes, gather, rank_and_world
from lavis_cir_plugin.core.random_state import get_random_state, set_random_state
from lavis_cir_plugin.data import benchmark_datasets
from lavis_cir_plugin.data.benchmark_datasets import CirDataset
from lavis_cir_plugin.data.feature_cache import FeatureCache, fingerprint, has_image_tower, tower_problem

AUTO = "auto"
AUTO_SHARE = 0.1
"""Share of the free space that ``auto`` fills at most."""
_LINE_BYTES = 200


@dataclass
class _Split:
    """One split: how often this run reads its pictures, and its cache, or why it has none."""

    name: str
    dataset: Any
    pictures: int
    reads: int
    reason: str = ""
    remedy: str = ""
    cache: FeatureCache | None = None
    found: set[Path] = field(default_factory=set)
    keeps: bool = True

    @property
    def paths(self) -> set[Path]:
        return set(self.dataset.image_paths.values())

    @property
    def cached_pictures(self) -> set[tuple[Path, Path]]:
        """Folder of the cache, if there is one, and path of each picture."""
        return set() if self.cache is None else {(self.cache.folder, path) for path in self.paths}

    def leave_out(self, reason: str, remedy: str = "") -> None:
        if not self.reason:
            self.cache, self.reason, self.remedy = None, reason, remedy


def cache_features(model: Any, datasets: Mapping[str, Mapping[str, Any]], run: Mapping[str, Any]) -> list[FeatureCache]:
    """Let data sets return cached features, and return the caches.

    With ``auto``, a data set does so if that changes no number and spares passes through the tower, and if the missing
    features take less than `AUTO_SHARE` of the free space. Features that are there are read in any case. One line of
    the log says what is cached, and one for each reason what is not, and what it would spare.

    Args:
        model: Model that will be trained or evaluated; it is moved to ``run.device``.
        datasets: Data sets by name and split; those of other packages stay unchanged.
        run: Section ``run`` of the config.

    Raises:
        ValueError: If ``feature_cache`` is ``true`` or a folder, and the tower is trained, a processor is random, or
            the features do not fit on the disk; the message names the key to change.
    """
    where = run.get("feature_cache", AUTO)
    if where is False:
        return []
    is_auto = where == AUTO
    named = None if where in (AUTO, True) else Path(os.path.expanduser(where)).absolute()
    root = named or benchmark_datasets.features_root()
    splits = list(_splits(datasets, run))
    model.to(torch.device(run["device"]))
    problem = tower_problem(model)
    # What one process cannot do, such as a probe on a full GPU, all processes leave out.
    found = gather(problem or (_amp_problem(model, splits, run) if is_auto else None))
    _leave_out_impossible(splits, next((one for one in found if one is not None), None))
    if not is_auto:
        _refuse_impossible(splits, problem)
    _open_caches(root, model, splits, is_auto)
    row = _row(model, splits, is_auto)
    folder, free = _free_space(root, splits, is_auto)
    if is_auto:
        _choose(splits, row, folder, free)
    else:
        _refuse_too_large(splits, row, folder, free)
    for split in splits:
        if split.cache is not None:
            split.dataset.use_features(split.cache, split.keeps)
    _say_what_is_cached(splits, row, root, free)
    _say_what_is_not(splits, row, free, logging.INFO if is_auto else logging.WARNING)
    return _caches(splits)


# What a run reads.


def _splits(datasets: Mapping[str, Mapping[str, Any]], run: Mapping[str, Any]) -> Iterable[_Split]:
    """Return the data sets of a run, each once: a benchmark may be read as ``val`` and as ``cirr.val``."""
    trains = any("train" in parts for parts in datasets.values()) and not run.get("evaluate")
    splits: dict[int, _Split] = {}
    for name, parts in datasets.items():
        for part, dataset in parts.items():
            pictures = len(set(dataset.image_paths.values())) if isinstance(dataset, CirDataset) else _length(dataset)
            read = dataset.pictures_read if isinstance(dataset, CirDataset) else _length(dataset)
            if part == "train":
                times = _training_passes(run, _length(dataset)) if trains else 0.0
            else:
                times = float(part in run.get("test_splits", ()))
                times += _validations(run) if trains and part in run.get("valid_splits", ()) else 0.0
            split = splits.setdefault(id(dataset), _Split(f"datasets.{name}.{part}", dataset, pictures, 0))
            split.reads += round(read * times)
    return splits.values()


def _length(dataset: Any) -> int:
    return len(dataset) if hasattr(dataset, "__len__") else 0


def _training_passes(run: Mapping[str, Any], samples: int) -> float:
    if run.get("max_iters") is None:
        return float(run.get("max_epoch") or 1)
    world = rank_and_world()[1]
    return int(run["max_iters"]) * int(run["batch_size_train"]) * world / max(samples, 1)


def _validations(run: Mapping[str, Any]) -> float:
    if run.get("max_iters") is None:
        return float(run.get("max_epoch") or 1)
    return math.ceil(int(run["max_iters"]) / int(run.get("iters_per_inner_epoch") or run["max_iters"]))


# What cannot be cached.


def _leave_out_impossible(splits: Sequence[_Split], problem: tuple[str, str] | None) -> None:
    for split in splits:
        if problem is not None:
            split.leave_out(*problem)
        elif not isinstance(split.dataset, CirDataset):
            split.leave_out(f"{type(split.dataset).__name__} has no files of pictures to recognise")
        elif not split.dataset.is_deterministic:
            section, stage = split.name.split(".")[1], "train" if split.name.endswith(".train") else "eval"
            key = f"datasets.{section}.vis_processor.{stage}"
            processor = type(split.dataset.vis_processor).__name__
            split.leave_out(
                f"{key} is {processor}, which may return something else each time", f"set {key}.name: target_pad"
            )
    _leave_out_mixed(splits)


def _leave_out_mixed(splits: Sequence[_Split]) -> None:
    """Leave out all training data if some is left out: LAVIS joins it into batches, which hold features or pictures."""
    training = [split for split in splits if split.name.endswith(".train")]
    uncached = [split.name for split in training if split.reason]
    for split in training if uncached else ():
        split.leave_out(f"its samples come in batches with those of {uncached[0]}, whose features are not cached")


def _amp_problem(model: Any, splits: Sequence[_Split], run: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return a problem if autocast changes the tower's features; then kept ones differ from those of training."""
    dataset = next((split.dataset for split in splits if isinstance(split.dataset, CirDataset)), None)
    if not _is_mixed(run) or dataset is None:
        return None
    try:
        with torch.autocast(torch.device(run["device"]).type):
            rounded = _probe(model, dataset)
        plain = _probe(model, dataset)
    except Exception as error:
        return _without_probe(error), ""
    if rounded.dtype == plain.dtype and torch.equal(rounded, plain):
        return None
    return (
        "run.amp computes this tower in half precision in training and in full precision in evaluations",
        "set run.feature_cache: true, which keeps features in full precision for both",
    )


def _is_mixed(run: Mapping[str, Any]) -> bool:
    return bool(run.get("amp")) and str(run["device"]).startswith("cuda")


def _refuse_impossible(splits: Sequence[_Split], problem: tuple[str, str] | None) -> None:
    first = problem or next(((split.reason, split.remedy) for split in splits if split.remedy), None)
    if first is not None:
        reason, remedy = first
        raise ValueError(
            f"run.feature_cache: {reason}; {f'{remedy}, or ' if remedy else ''}set run.feature_cache: false."
        )


def _open_caches(root: Path, model: Any, splits: Sequence[_Split], is_auto: bool) -> None:
    """Open a cache for each transform, and look up in it the pictures of the splits with this transform."""
    alike: dict[tuple[str, bool], list[_Split]] = {}
    for split in (split for split in splits if not split.reason):
        try:
            key = fingerprint(split.dataset.vis_processor), split.dataset.upright
        except ValueError as error:
            if not is_auto:
                raise
            split.leave_out(_reason_in(error))
            continue
        alike.setdefault(key, []).append(split)
    for members in alike.values():
        try:
            with fail_in_all_processes():
                cache = FeatureCache(root, model, members[0].dataset.vis_processor, members[0].dataset.upright)
            if len(set(gather(str(cache.folder)))) > 1:
                raise ValueError(
                    "run.feature_cache: the frozen tower or its transform differs between the processes of this run, "
                    "so that they train on different features; load the tower from a file (model.finetuned), or build "
                    "it from the same seed on each."
                )
            found = cache.find(path for path in set().union(*(split.paths for split in members)))
        except (ValueError, OSError) as error:
            if not is_auto:
                raise
            for split in members:
                split.leave_out(_reason_in(error))
            continue
        for split in members:
            split.cache, split.found = cache, found & split.paths
    _leave_out_mixed(splits)


def _reason_in(error: Exception) -> str:
    return str(error).removeprefix("run.feature_cache: ").rstrip(".")


def _row(model: Any, splits: Sequence[_Split], is_auto: bool) -> Tensor:
    """Return features of one picture in shape and type; an empty tensor if they are not known."""
    for cache in _caches(splits):
        if cache.row_shape:
            return torch.empty(cache.row_shape, dtype=cache.row_dtype, device="meta")
    datasets = [split.dataset for split in splits if hasattr(split.dataset, "vis_processor")]
    if not datasets or not has_image_tower(model):
        return torch.empty(0, device="meta")
    try:
        return _probe(model, datasets[0]).to("meta")
    except Exception as error:  # a processor of the user's may refuse the grey picture, or return no tensor
        if _caches(splits) and not is_auto:
            raise
        for split in splits:
            split.leave_out(_without_probe(error))
        return torch.empty(0, device="meta")


def _without_probe(error: Exception) -> str:
    return f"the features of a grey picture, which tell their size, cannot be computed ({error})"


@torch.no_grad()
def _probe(model: Any, dataset: Any) -> Tensor:
    """Return the features of a grey picture; no random number is drawn, and the model's modes stay as they are."""
    tower = model.image_tower
    device = next(tower.parameters()).device
    state, modes = get_random_state(device), [(module, module.training) for module in tower.modules()]
    try:
        picture = dataset.vis_processor(Image.new("RGB", (64, 64), "grey"))
        tower.eval()
        features: Tensor = model.image_features(picture.reshape(-1, *picture.shape[-3:])[:1].to(device))[0]
    finally:
        for module, mode in modes:
            module.training = mode
        set_random_state(state, device)
    return features


# What fits.


def _free_space(root: Path, splits: Sequence[_Split], is_auto: bool) -> tuple[Path, int]:
    """Return the nearest folder of the caches that is there, and the bytes free in it."""
    try:
        folder = next(folder for folder in (root, *root.parents) if folder.is_dir())
        return folder, shutil.disk_usage(folder).free
    except OSError as error:  # such as a home folder that this user may not enter
        if not is_auto:
            raise
        for split in splits:
            split.leave_out(f"{root} cannot be used ({error.strerror or error})")
        return root, 0


def _found(splits: Iterable[_Split]) -> set[tuple[Path, Path]]:
    return {(split.cache.folder, path) for split in splits if split.cache is not None for path in split.found}


def _missing(splits: Sequence[_Split]) -> int:
    """Return the number of pictures whose features shall be kept and are not there yet."""
    return len({picture for split in splits if split.keeps for picture in split.cached_pictures} - _found(splits))


def _refuse_too_large(splits: Sequence[_Split], row: Tensor, folder: Path, free: int) -> None:
    missing = _missing(splits)
    with fail_in_all_processes():
        if missing * (row.nbytes + _LINE_BYTES) > free:
            raise ValueError(
                f"run.feature_cache: {missing:,} images of {size_text(row.nbytes)} need "
                f"{size_text(missing * row.nbytes)} and {folder} has {size_text(free)} free; free some space, or set "
                "run.feature_cache to a folder on another disk or to false."
            )


def _choose(splits: Sequence[_Split], row: Tensor, folder: Path, free: int) -> None:
    """Let ``auto`` keep what spares passes and fits, and read only what is there of the rest."""
    for split in splits:
        split.keeps = split.reads > split.pictures
    missing = _missing(splits)
    fits = gather(missing * (row.nbytes + _LINE_BYTES) < AUTO_SHARE * free)[0]
    too_large = [
        split for split in splits if split.cache is not None and split.keeps and not fits and split.paths - split.found
    ]
    for split in too_large:
        split.keeps = False
    size = (
        f"its features and those of the other splits would take {size_text(missing * row.nbytes)}, more than a tenth "
        f"of the {size_text(free)} free in {folder}",
        "free some space, or set run.feature_cache: true or a folder on another disk",
    )
    _leave_out_useless(splits, too_large, size)
    _leave_out_mixed(splits)
    _leave_out_useless(splits, too_large, size)  # those that shared pictures with training data


def _leave_out_useless(splits: Sequence[_Split], too_large: Sequence[_Split], size: tuple[str, str]) -> None:
    """Leave out the splits that keep nothing, find nothing, and have no picture that another split keeps."""
    kept = {picture for split in splits if split.keeps for picture in split.cached_pictures}
    for split in splits:
        if not (split.keeps or split.found or split.cached_pictures & kept):
            split.leave_out(*(size if split in too_large else ("this run encodes each of its pictures once", "")))


# What is said.


def _caches(splits: Iterable[_Split]) -> list[FeatureCache]:
    return list({split.cache.folder: split.cache for split in splits if split.cache is not None}.values())


def _say_what_is_cached(splits: Sequence[_Split], row: Tensor, root: Path, free: int) -> None:
    cached = [split for split in splits if split.cache is not None]
    if not cached:
        return
    pictures = {picture for split in cached for picture in split.cached_pictures}
    found, missing = _found(cached), _missing(cached)
    size, reads = missing * row.nbytes, sum(split.reads for split in cached)
    logging.info(
        f"feature cache: {len(pictures):,} pictures of {tuple(row.shape)} {row.dtype}, {size_text(row.nbytes)} each; "
        f"{len(found):,} are there, {missing:,} are kept when they are first encoded, {size_text(size)} or "
        f"{size / max(free, 1):.1%} of the {size_text(free)} free in {root}; the image tower runs for "
        f"{len(pictures - found):,} pictures in place of {reads:,} ({', '.join(split.name for split in cached)})"
    )


def _say_what_is_not(splits: Sequence[_Split], row: Tensor, free: int, level: int) -> None:
    reasons: dict[tuple[str, str], list[_Split]] = {}
    for split in splits:
        if split.reason:
            reasons.setdefault((split.reason, split.remedy), []).append(split)
    for (reason, remedy), members in reasons.items():
        pictures, reads = sum(split.pictures for split in members), sum(split.reads for split in members)
        size = pictures * row.nbytes
        saving = (
            f"; {size_text(size)}, {size / max(free, 1):.1%} of the free space, would spare {reads - pictures:,} of "
            f"{reads:,} pictures' passes through the image tower"
        )
        logging.log(
            level,
            f"feature cache: off for {', '.join(split.name for split in members)}, because {reason}"
            f"{saving if row.nbytes and reads > pictures else ''}{f' ({remedy})' if remedy else ''}",
        )
