"""``run.feature_cache``: what it decides and says, and that no number of a training depends on it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import LAVIS_VIT_L, SMALL, make_scoring_model
from launched import in_two_processes
from lavis.common.logger import SmoothedValue
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from lavis_cir_plugin.benchmarks.types import Benchmark, Group, Query, Triplet, no_metrics
from lavis_cir_plugin.core.settings import section_problems
from lavis_cir_plugin.data import benchmark_datasets, feature_cache
from lavis_cir_plugin.data.benchmark_datasets import BenchmarkDataset, TripletDataset
from lavis_cir_plugin.data.feature_cache import FeatureCache, tower_features
from lavis_cir_plugin.data.resumable_loader import EpochLoader, training_loader
from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.processors import TargetPadProcessor
from lavis_cir_plugin.tasks import feature_caching
from lavis_cir_plugin.tasks.composed_retrieval import ComposedRetrievalTask, EvaluationSettings
from lavis_cir_plugin.tasks.evaluation import Evaluation

TRIPLETS, PICTURES = 10, 9
ROW_BYTES = 5 * 12 * 4  # of the small tower: a class token and four patches of width 12, float32


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Let `auto` and `true` use this folder."""
    monkeypatch.setattr(benchmark_datasets, "features_root", lambda: tmp_path / "features")
    return tmp_path / "features"


@pytest.fixture
def data(tmp_path):
    """Return a factory of ten triplets over the same nine pictures."""
    draw(tmp_path / "images")
    return lambda processor=None: triplets_of(tmp_path, processor)


def draw(folder):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(PICTURES):
        picture = Image.fromarray(generator.integers(0, 256, (18, 16, 3), dtype=np.uint8))
        picture.save(folder / f"{number}.png")


def triplets_of(folder, processor=None):
    paths = {str(number): folder / "images" / f"{number}.png" for number in range(PICTURES)}
    triplets = [
        Triplet(str(number % 7), str((3 * number + 2) % PICTURES), ("is red", "is darker"))
        for number in range(TRIPLETS)
    ]
    return TripletDataset(
        triplets, paths, processor or TargetPadProcessor(16), str, lambda texts, rng: rng.choice(texts)
    )


def evaluation(training, gallery=None):
    """Return a benchmark with a query from each picture against a gallery, by default of all."""
    paths = training.image_paths
    queries = tuple(Query(name, ("is red", "is darker"), "1") for name in paths)
    group = Group("all", tuple(gallery or paths), queries, reference_removed=False)
    return BenchmarkDataset(Benchmark("b", "val", (group,), paths, "b", no_metrics, ""), training.vis_processor, str)


def settings(where=None, **run):
    given = {} if where is None else {"feature_cache": where}
    return OmegaConf.create(
        {"run_cfg": {"device": "cpu", "output_dir": ".", "max_epoch": 3, "batch_size_train": 4, **given, **run}}
    )


class Constant:
    def step(self, cur_epoch, cur_step):
        pass


class Training:
    """LAVIS's loop over the task's own step, with what a stopped run needs to go on."""

    def __init__(self, model, dataset, where, perturbs=False, workers=0):
        self.model, self.dataset, self.losses, self.encoded = model.train(), dataset, [], []
        self.task = ComposedRetrievalTask()
        self.task.prepare(model, {"drawn": {"train": dataset}}, settings(where))
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.call = model
        if perturbs:
            self.optimizer = PerturbingOptimizer(self.optimizer, model, WeightPerturbation(gamma=0.05))
            self.call = self.optimizer.perturb(model)
        self.loader = EpochLoader(
            training_loader(
                dataset, seed=3, batch_size=4, drop_last=True, num_workers=workers, collate_fn=dataset.collater
            )
        )
        tower = model.image_features
        model.image_features = lambda pictures: self.encoded.append(len(pictures)) or tower(pictures)

    def epochs(self, *numbers, accumulated=1):
        for number in numbers:
            self.task.train_epoch(
                number, self.noting, self.loader, self.optimizer, Constant(), accum_grad_iters=accumulated
            )
        return self

    def noting(self, samples):
        output = self.call(samples)
        self.losses.append(float(output["loss"].detach()))
        return output

    def assert_equals(self, other):
        assert self.losses == other.losses
        state = other.model.state_dict()
        assert not [name for name, value in self.model.state_dict().items() if not torch.equal(value, state[name])]


# --- no number depends on it -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("perturbs", "workers", "accumulated"),
    [(False, 0, 1), (True, 0, 2), (False, 2, 1)],
    ids=["plain", "WRF", "workers"],
)
def test_a_training_with_features_equals_one_without_bit_for_bit(
    perturbs, workers, accumulated, root, data, small_model
):
    """Of 3 x 2 batches the uncached training encodes all pictures; the other encodes each once, in the first epoch."""
    trainings = [
        Training(small_model(freeze_vit=True, fusion="sentence_prompt"), data(), where, perturbs, workers).epochs(
            0, 1, 2, accumulated=accumulated
        )
        for where in (False, None, None)
    ]
    for training in trainings[1:]:
        training.assert_equals(trainings[0])
    assert len(trainings[0].losses) == 6
    assert trainings[0].encoded == [8] * 6 * (1 + perturbs)  # the second pass asks a memo of the tower
    assert 1 <= len(trainings[1].encoded) <= 4
    assert trainings[2].encoded == []
    rows = sum(path.stat().st_size for path in root.glob("*/*.rows")) // ROW_BYTES
    assert rows <= PICTURES


def train_in_process(rank, folder, where):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    SmoothedValue.synchronize_between_processes = lambda meter: None  # LAVIS's own needs a GPU
    torch.manual_seed(0)
    training = Training(Blip2Cir(**{**SMALL, "freeze_vit": True}), triplets_of(Path(folder)), where)
    training.call = DistributedDataParallel(training.model)
    training.epochs(0, 1)
    torch.save([training.losses, training.model.state_dict(), training.encoded], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_train_as_without_features(tmp_path):
    """Each process has one batch of four in each epoch of ten triplets; the second epoch's pictures are new in part."""
    draw(tmp_path / "images")
    found = []
    for where in (False, str(tmp_path / "features")):
        in_two_processes(train_in_process, str(tmp_path), where)
        found.append([torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)])
        (tmp_path / "rendezvous").unlink(missing_ok=True)
    for (losses, weights, _), (other_losses, other_weights, _) in zip(*found):
        assert losses == other_losses
        assert not [name for name, value in weights.items() if not torch.equal(value, other_weights[name])]
    assert [len(encoded) for _, _, encoded in found[0]] == [2, 2]
    assert sum(path.stat().st_size for path in (tmp_path / "features").glob("*/*.rows")) >= 8 * ROW_BYTES


def test_it_may_be_turned_on_and_off_in_mid_run(root, data, small_model):
    expected = Training(small_model(freeze_vit=True), data(), False).epochs(0, 1, 2)
    part = Training(small_model(freeze_vit=True), data(), None).epochs(0)
    for where, epoch in ((False, 1), (True, 2)):
        resumed = Training(copy_of(part.model, small_model), data(), where)
        resumed.optimizer.load_state_dict(part.optimizer.state_dict())
        resumed.losses = part.losses
        resumed.loader.seek(part.loader.taken)
        part = resumed.epochs(epoch)
    part.assert_equals(expected)


def copy_of(model, small_model):
    other = small_model(freeze_vit=True)
    other.load_state_dict(model.state_dict())
    return other


def kill_in_second_step(training):
    call = training.call

    def dying(samples):
        if len(training.losses) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(samples)

    training.call = dying
    # A fork of a process that has had threads of autograd's refuses a backward pass; the cached rows need none.
    torch.Tensor.backward = lambda self: None
    training.epochs(0)


def test_a_run_that_was_killed_in_mid_fill_leaves_whole_rows(root, data, small_model):
    expected = Training(small_model(freeze_vit=True), data(), False).epochs(0, 1)
    model, dataset = small_model(freeze_vit=True), data()
    child = multiprocessing.get_context("fork").Process(
        target=lambda: kill_in_second_step(Training(model, dataset, None))
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert list(root.glob("*/*.rows"))
    again = Training(small_model(freeze_vit=True), data(), None).epochs(0)
    assert not again.encoded  # both batches of the killed run had gone through the tower
    again.epochs(1).assert_equals(expected)


def test_two_runs_at_once_share_features_and_differ_in_nothing(root, data, small_model):
    expected = Training(small_model(freeze_vit=True), data(), False).epochs(0, 1)
    first, second = (Training(small_model(freeze_vit=True), data(), None) for _ in range(2))
    first.epochs(0)
    second.epochs(0)
    for run in (first, second):
        run.epochs(1).assert_equals(expected)
    assert first.encoded
    assert not second.encoded


@pytest.mark.parametrize("kind", ["frozen tower", "clip", "mapping"])
def test_an_evaluation_with_features_equals_one_without_bit_for_bit(kind, root, data, tmp_path):
    """The tower sees each of nine pictures once, for a gallery of six and queries from outside it, and later none."""
    model = make_scoring_model(kind, freeze_vit=True).eval() if kind == "clip" else make_scoring_model(kind).eval()
    seen = []
    model.image_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(torch.unique(inputs[0], dim=0))))
    registry.mapping["paths"]["output_dir"] = str(tmp_path)

    def encoded(where, trains=True):
        dataset = evaluation(data(), [str(number) for number in range(6)])
        splits = {"train": data(), "val": dataset} if trains else {"val": dataset}
        ComposedRetrievalTask().prepare(model, {"drawn": splits}, settings(where, valid_splits=["val"]))
        seen.clear()
        loader = DataLoader(dataset, batch_size=4, collate_fn=dataset.collater)
        run = Evaluation(model, loader, cuda_enabled=False)
        queries = [group.queries for group in dataset.benchmark.groups]
        rows = [run.encode_gallery(), *(run.encode_queries(mode, [*queries]) for mode in ("multimodal", "image"))]
        return torch.cat([part.flatten() for part in rows]), sum(seen)

    expected, passes = encoded(False)
    assert passes == PICTURES
    for where, trains, count in [("auto", False, 9), ("auto", True, 9), ("auto", True, 0), ("auto", False, 0)]:
        found, passes = encoded(where, trains)
        assert torch.equal(found, expected)
        assert passes == count
    paths = sorted(root.glob("*/*.rows"))
    assert len(paths) == 1  # the evaluation alone has kept nothing


def test_a_disk_that_is_full_in_mid_fill_changes_no_number(root, data, small_model, monkeypatch, caplog):
    expected = Training(small_model(freeze_vit=True), data(), False).epochs(0, 1)
    append = feature_cache._Segment.append
    calls = []

    def full(self, *arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return append(self, *arguments)

    monkeypatch.setattr(feature_cache._Segment, "append", full)
    run = Training(small_model(freeze_vit=True), data(), None).epochs(0, 1)
    run.assert_equals(expected)
    assert caplog.text.count("cannot be written (No space left on device)") == 1
    assert len(calls) == 2


def test_a_picture_that_cannot_be_read_ends_the_training_in_its_own_sentence(root, data, small_model):
    dataset = data()
    dataset.image_paths["0"].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"images/0\.png cannot be read as an image"):
        Training(small_model(freeze_vit=True), dataset, None).epochs(0)
    dataset.image_paths["0"].unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.png"):
        Training(small_model(freeze_vit=True), dataset, None).epochs(0)


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize(
    ("name", "changes"),
    [("frozen tower", {}), ("frozen tower", LAVIS_VIT_L), ("clip", {}), ("mapping", {}), ("composing", {})],
)
def test_features_depend_on_no_other_picture_of_the_call(name, changes, threads, set_threads):
    """Each of 28 pictures has the same bits alone, in batches of 2 to 28, and in other company."""
    set_threads(threads)
    model = make_scoring_model(name, **changes)
    pictures = torch.randn(28, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([tower_features(model, picture[None]) for picture in pictures])
    for size in (2, 3, 5, 7, 8, 9, 10, 11, 12, 16, 17, 23, 24, 25, 28):
        for first in range(0, 29 - size, 4):
            assert torch.equal(tower_features(model, pictures[first : first + size]), alone[first : first + size])


# --- what it decides and says ------------------------------------------------------------------------------------


def prepared(model, datasets, caplog, where=None, **run):
    """Return what the cache's lines say about data sets by name and split."""
    caplog.clear()
    with caplog.at_level(logging.INFO):
        ComposedRetrievalTask().prepare(model, datasets, settings(where, **run))
    return [record.message for record in caplog.records if record.message.startswith("feature cache")]


def free(monkeypatch, count):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(count))


def test_it_says_what_it_keeps_and_what_that_spares(root, data, small_model, monkeypatch, caplog):
    """Nine rows of 240 bytes are 2,160 bytes; three epochs of ten triplets read 60 pictures and validate 27."""
    free(monkeypatch, 10**6)
    training = data()
    datasets = {"drawn": {"train": training, "val": evaluation(training)}}
    (said,) = prepared(small_model(freeze_vit=True), datasets, caplog, valid_splits=["val"])
    assert said == (
        "feature cache: 9 pictures of (5, 12) torch.float32, 240 bytes each; 0 are there, 9 are kept when they are "
        f"first encoded, 2.2 kB or 0.2% of the 1.0 MB free in {root}; the image tower runs for 9 pictures in place of "
        "87 (datasets.drawn.train, datasets.drawn.val)"
    )
    assert all(dataset.features is not None for dataset in datasets["drawn"].values())
    assert not root.exists()  # nothing is written before a picture is encoded


def test_auto_takes_less_than_a_tenth_of_the_free_space(root, data, small_model, monkeypatch, caplog):
    """Nine rows take 9 x 240 bytes and 9 lines of up to 200."""
    needed = 9 * (ROW_BYTES + 200)
    for count, is_on in ((10 * needed + 1, True), (10 * needed, False)):
        free(monkeypatch, count)
        dataset = data()
        (said,) = prepared(small_model(freeze_vit=True), {"drawn": {"train": dataset}}, caplog)
        assert (dataset.features is not None) == is_on
    assert "its features and those of the other splits would take 2.2 kB, more than a tenth of the 39.6 kB free" in said
    assert "5.5% of the free space, would spare 51 of 60 pictures' passes" in said
    free(monkeypatch, needed - 60)
    with pytest.raises(ValueError, match=r"9 images of 240 bytes need 2\.2 kB and .* has 3\.9 kB free; free some"):
        prepared(small_model(freeze_vit=True), {"drawn": {"train": data()}}, caplog, True)


def test_a_final_evaluation_reads_what_validations_keep(root, data, small_model, caplog):
    """The split of the final evaluation has a name of its own where several benchmarks are evaluated."""
    datasets = {"drawn": {"train": data(Random(16)), "val": evaluation(data()), "drawn.val": evaluation(data())}}
    lines = prepared(
        small_model(freeze_vit=True), datasets, caplog, valid_splits=["val"], test_splits=["drawn.val"], max_epoch=2
    )
    assert "runs for 9 pictures in place of 27 (datasets.drawn.val, datasets.drawn.drawn.val)" in lines[0]
    prepared(small_model(freeze_vit=True), {"drawn": {"drawn.val": datasets["drawn"]["drawn.val"]}}, caplog)
    evaluated = {"drawn": {"val": evaluation(data())}}
    lines = prepared(small_model(freeze_vit=True), evaluated, caplog, valid_splits=["val"], test_splits=["val"])
    assert lines[0].endswith("because this run encodes each of its pictures once")  # `lavis.evaluate` validates nothing


def test_features_that_are_there_are_read_also_where_no_more_would_be_kept(
    root, data, small_model, monkeypatch, caplog
):
    """An evaluation alone encodes each picture once: it keeps nothing, but it reads what a training has kept."""
    model = small_model(freeze_vit=True)
    only = {"drawn": {"val": evaluation(data())}}
    (said,) = prepared(model, only, caplog, test_splits=["val"], evaluate=True)
    assert said.endswith("off for datasets.drawn.val, because this run encodes each of its pictures once")
    Training(model, data(), None).epochs(0)
    kept = sum(path.stat().st_size for path in root.glob("*/*.rows"))
    for count in (10**9, 100):  # also on a full disk
        free(monkeypatch, count)
        (said,) = prepared(model, only, caplog, test_splits=["val"], evaluate=True)
        assert f"{kept // ROW_BYTES} are there, 0 are kept" in said
    assert sum(path.stat().st_size for path in root.glob("*/*.rows")) == kept


def test_a_split_that_is_read_under_two_names_is_counted_once(root, data, small_model, caplog):
    """`cirr.val` and `val` may be one data set: what its validations keep, its final evaluation reads."""
    both = evaluation(data())
    datasets = {"drawn": {"train": data(Random(16)), "val": both, "drawn.val": both}}
    lines = prepared(
        small_model(freeze_vit=True), datasets, caplog, valid_splits=["val"], test_splits=["drawn.val"], max_epoch=2
    )
    assert "runs for 9 pictures in place of 27 (datasets.drawn.val)" in lines[0]
    assert both.keeps_features


@pytest.mark.parametrize("is_full", [False, True], ids=["training keeps a part", "nothing fits"])
def test_a_gallery_that_is_larger_than_what_is_kept_has_its_own_features(is_full, root, data, monkeypatch):
    """Training shows four of nine pictures. Or validation would keep all, and its features are too large."""

    def gallery(where):
        model = make_scoring_model("frozen tower").eval()
        training = data()
        training.image_paths = {name: path for name, path in training.image_paths.items() if int(name) < 4}
        training.triplets = [Triplet(str(i % 4), str((i + 1) % 4), ("is red",)) for i in range(8)]
        parts = {"train": training, "val": evaluation(data()), "test": evaluation(data())}
        splits = {"valid_splits": ["val"]} if is_full else {}
        if not is_full:
            del parts["val"]
        task = ComposedRetrievalTask()
        task.prepare(model, {"drawn": parts}, settings(where, test_splits=["test"], **splits))
        loader = DataLoader(parts["test"], batch_size=3, collate_fn=parts["test"].collater)
        found = Evaluation(model, loader, cuda_enabled=False)
        found.rankings()
        return found.gallery.clone()

    free(monkeypatch, 20000 if is_full else 10**9)
    assert torch.equal(gallery(None), gallery(False))


def test_two_training_sets_are_cached_both_or_not_at_all(root, tmp_path, small_model, monkeypatch):
    """One has features of an earlier run, and those of the other do not fit: a batch would mix rows and pictures."""
    sets = []
    for name in "ab":
        (tmp_path / name).mkdir()
        draw(tmp_path / name / "images")
        sets.append(triplets_of(tmp_path / name))
    for number, path in enumerate(sorted((tmp_path / "b/images").glob("*.png"))):
        Image.new("RGB", (20, 20), (20 * number, 0, 0)).save(path)
    Training(small_model(freeze_vit=True), sets[0], None).epochs(0)
    free(monkeypatch, 20000)
    first, second = (triplets_of(tmp_path / name) for name in "ab")
    ComposedRetrievalTask().prepare(
        small_model(freeze_vit=True), {"a": {"train": first}, "b": {"train": second}}, settings()
    )
    assert first.features is None
    assert second.features is None


class Refusing(TargetPadProcessor):
    """A processor that takes large pictures alone."""

    def __call__(self, picture):
        if picture.width == picture.height == 64:
            raise ValueError("64 is too small")
        return super().__call__(picture)


def test_a_processor_that_refuses_the_probe_is_left_out(root, data, small_model, caplog):
    training = data(Refusing(16))
    (said,) = prepared(small_model(freeze_vit=True), {"drawn": {"train": training}}, caplog)
    assert "the features of a grey picture, which tell their size, cannot be computed (64 is too small)" in said
    (said,) = prepared(small_model(), {"drawn": {"train": training}}, caplog)
    assert "tensors of the image tower are trained" in said
    with pytest.raises(ValueError, match="64 is too small"):
        prepared(small_model(freeze_vit=True), {"drawn": {"train": training}}, caplog, True)


class Locked(TargetPadProcessor):
    def __init__(self, size):
        super().__init__(size)
        self.lock = threading.Lock()


def test_a_processor_that_cannot_be_recognised_is_left_out(root, data, small_model, caplog):
    training = data(Locked(16))
    (said,) = prepared(small_model(freeze_vit=True), {"drawn": {"train": training}}, caplog)
    assert "holds a lock, whose value cannot be recognised again" in said
    assert training.features is None
    with pytest.raises(ValueError, match="holds a lock"):
        prepared(small_model(freeze_vit=True), {"drawn": {"train": data(Locked(16))}}, caplog, True)


def test_foreign_training_data_beside_a_full_disk_do_no_harm(root, data, small_model, monkeypatch, caplog):
    free(monkeypatch, 0)
    datasets = {"foreign": {"train": Foreign()}, "drawn": {"val": evaluation(data())}}
    lines = prepared(small_model(freeze_vit=True), datasets, caplog, valid_splits=["val"])
    assert any("more than a tenth of the 0 bytes free" in line for line in lines)


def test_a_folder_that_may_not_be_entered_turns_auto_off(root, data, small_model, monkeypatch, caplog):
    def refused(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(feature_caching.shutil, "disk_usage", refused)
    training = data()
    (said,) = prepared(small_model(freeze_vit=True), {"drawn": {"train": training}}, caplog)
    assert f"because {root} cannot be used (Permission denied)" in said
    assert training.features is None
    with pytest.raises(PermissionError):
        prepared(small_model(freeze_vit=True), {"drawn": {"train": data()}}, caplog, True)


class Random(TargetPadProcessor):
    is_deterministic = False


class Foreign(Dataset):
    vis_processor = TargetPadProcessor(16)

    def __len__(self):
        return 5


def test_what_cannot_be_cached_is_left_out_with_the_reason(root, data, small_model, caplog):
    frozen = small_model(freeze_vit=True)
    (said,) = prepared(small_model(), {"drawn": {"train": data()}}, caplog)
    assert said.startswith("feature cache: off for datasets.drawn.train, because ")
    assert "tensors of the image tower are trained (first: cls_token), so its features change with every step" in said
    assert "; 2.2 kB, " in said
    assert "would spare 51 of 60 pictures' passes through the image tower (set model.freeze_vit: true" in said

    training = data(Random(16))
    kept = evaluation(data())
    lines = prepared(frozen, {"drawn": {"train": training, "val": kept}}, caplog, valid_splits=["val"])
    assert "datasets.drawn.vis_processor.train is Random, which may return something else each time" in lines[1]
    assert lines[1].endswith("(set datasets.drawn.vis_processor.train.name: target_pad)")
    assert training.features is None
    assert kept.features is not None

    first = data()
    lines = prepared(frozen, {"drawn": {"train": first}, "shards": {"train": Foreign()}}, caplog)
    assert "off for datasets.shards.train, because Foreign has no files of pictures to recognise; 1.2 kB" in lines[1]
    assert "would spare 10 of 15 pictures' passes" in lines[1]
    assert "its samples come in batches with those of datasets.shards.train, whose features are not cached" in lines[0]
    assert first.features is None

    (said,) = prepared(nn.Linear(1, 1), {"drawn": {"train": data()}}, caplog)
    assert said.endswith("because Linear offers no image_tower and image_features to cache")
    assert not root.exists()


def test_autocast_that_would_change_features_is_no_case_for_auto(root, data, small_model, monkeypatch, caplog):
    """CUDA's autocast is played by the CPU's, which computes products in bfloat16."""
    monkeypatch.setattr(feature_caching, "_is_mixed", lambda run: True)
    model, dataset = small_model(freeze_vit=True), data()
    (said,) = prepared(model, {"drawn": {"train": dataset}}, caplog)
    assert "run.amp computes this tower in half precision in training and in full precision in evaluations" in said
    assert dataset.features is None
    prepared(model, {"drawn": {"train": dataset}}, caplog, True)
    assert dataset.features is not None
    with torch.autocast("cpu"):
        assert tower_features(model, torch.zeros(1, 3, 16, 16)).dtype == torch.float32


def test_what_was_asked_for_and_cannot_be_is_refused_with_the_key_to_change(root, data, small_model):
    task = ComposedRetrievalTask()
    for model, processor, message in [
        (small_model(), None, r"tensors of the image tower are trained \(first: cls_token\).*freeze_vit: true"),
        (nn.Linear(1, 1), None, r"Linear offers no image_tower and image_features to cache; set run\.feature_cache"),
        (
            small_model(freeze_vit=True),
            Random(16),
            r"train is Random, .*\.train\.name: target_pad, or set run\.feature",
        ),
    ]:
        for where in (True, str(root)):
            with pytest.raises(ValueError, match=message):
                task.prepare(model, {"drawn": {"train": data(processor)}}, settings(where))
    task.prepare(nn.Linear(1, 1), {}, settings(False))  # nothing is asked for, nothing is refused


def test_towers_that_differ_between_processes_are_named_as_such(root, data, small_model, monkeypatch, caplog):
    elsewhere = lambda value: [value, "elsewhere"] if isinstance(value, str) else [value]  # noqa: E731
    monkeypatch.setattr(feature_caching, "gather", elsewhere)
    with pytest.raises(ValueError, match=r"the frozen tower or its transform differs between the processes"):
        ComposedRetrievalTask().prepare(small_model(freeze_vit=True), {"drawn": {"train": data()}}, settings(True))
    dataset = data()
    (said,) = prepared(small_model(freeze_vit=True), {"drawn": {"train": dataset}}, caplog)
    assert "because the frozen tower or its transform differs between the processes" in said
    assert dataset.features is None


def test_a_folder_that_is_not_what_its_name_says_does_not_stop_auto(root, data, small_model, caplog):
    model, dataset = small_model(freeze_vit=True), data()
    folder = FeatureCache(root, model, dataset.vis_processor).folder
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text("{}")
    (said,) = prepared(model, {"drawn": {"train": dataset}}, caplog)
    assert "meta.json does not describe the tower and transform that its folder is named after" in said
    assert dataset.features is None


def test_iterations_are_counted_as_epochs_of_the_data(root, data, small_model, caplog):
    """15 iterations of 4 triplets are 6 epochs of 10: 120 pictures; a validation after every 5 reads 3 x 9."""
    datasets = {"drawn": {"train": data(), "val": evaluation(data())}}
    run = {"max_iters": 15, "iters_per_inner_epoch": 5, "valid_splits": ["val"]}
    (said,) = prepared(small_model(freeze_vit=True), datasets, caplog, **run)
    assert "in place of 147" in said


def test_pictures_are_preloaded_only_where_no_features_are_cached(root, data, small_model):
    task = ComposedRetrievalTask()
    task._to_preload = ["drawn", "once"]
    once = evaluation(data(TargetPadProcessor(16, target_ratio=1.0)))
    datasets = {"drawn": {"train": data()}, "once": {"val": once}}
    task.prepare(small_model(freeze_vit=True), datasets, settings(None, test_splits=["val"]))
    assert not datasets["drawn"]["train"].preloaded
    assert len(once.preloaded) == PICTURES


def test_impossible_values_are_named():
    for value in (3, "", [1], __file__):
        (problem,) = section_problems(EvaluationSettings, "run", {"feature_cache": value})
        assert problem.startswith("run.feature_cache")
    assert not [
        problem
        for value in ("auto", True, False, "here")
        for problem in section_problems(EvaluationSettings, "run", {"feature_cache": value})
    ]
