"""Several benchmarks in one run beside training data that is no benchmark, and what a model may offer a report."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from cuda_rehearsal import rehearsal, to_cuda
from launched import finish, start_launcher
from lavis.common.registry import registry
from lavis.datasets.builders import base_dataset_builder
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from lavis_cir_plugin.benchmarks import fashioniq
from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.data.benchmark_datasets import BenchmarkDataset
from lavis_cir_plugin.data.feature_cache import FeatureCache, UncachedPicture
from lavis_cir_plugin.garments import GarmentsConfig, make_garments
from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir
from lavis_cir_plugin.processors import TargetPadProcessor
from lavis_cir_plugin.report import chance
from lavis_cir_plugin.tasks.composed_retrieval import ComposedRetrievalTask
from lavis_cir_plugin.training import config, launcher
from lavis_cir_plugin.training.config import ConfigError

FASHIONIQ = {
    "train_triplets": 8, "train_images": 12, "val_queries": 3, "val_images": 20, "test_queries": 2, "test_images": 6,
    "image_width": 48, "image_height": 60,
}  # fmt: skip
WORLDS = {
    "cirr": {"train_sets": 3, "val_sets": 2, "test_sets": 2, "image_width": 48, "image_height": 60},
    "circo": {"images": 60, "val_queries": 4, "test_queries": 3, "image_width": 48, "image_height": 60},
    "fashioniq": FASHIONIQ,
}
CAPTIONS = {
    "garments": {"train_images": 12, "val_images": 4, "image_width": 48, "image_height": 60},
    "vis_processor": {"train": {"name": "target_pad", "image_size": 64}},
}
WITH_WEIGHTS = {"pretrained": "weights.pth"}
FEW = 40
"""Rankings to find chance from, which takes long otherwise."""
THREE = ["cirr.val", "circo.val", "fashioniq.val"]


def project(tmp_path, datasets=None, model=None, **run):
    """Write a project over three small worlds: trained and validated on CIRR, tested on all, with changes."""
    worlds = {name: {"type": "garments", "garments": world} for name, world in WORLDS.items()}
    worlds["fashioniq"].update(splits=["val", "test"], build_info={"categories": ["dress"]})
    for name, section in (datasets or {}).items():
        worlds[name] = {**worlds.get(name, {}), **section}
    defaults = {
        "task": "composed_retrieval",
        "max_epoch": 1,
        "batch_size_train": 4,
        "init_lr": 1e-3,
        "num_workers": 0,
        "device": "cpu",
        "output_dir": str(tmp_path / "out"),
        "train_splits": ["train"],
        "valid_splits": ["cirr.val"],
        "test_splits": ["val"],
    }
    content = {
        "model": {"arch": "blip2_cir", "model_type": "tiny", **(model or {})},
        "datasets": worlds,
        "run": {**defaults, **run},
    }
    OmegaConf.save(OmegaConf.create(content), tmp_path / "project.yaml")
    return str(tmp_path / "project.yaml")


def completed(path, command="train"):
    cfg = config.with_lavis_defaults(config.read_config(path, []))
    config.check_values(cfg, command)
    config.choose_splits(cfg, command)
    return cfg


# -- which splits a run has ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "run", "tested", "built"),
    [
        ("train", {}, THREE, {"cirr": ["train", "val", "cirr.val"], "circo": ["circo.val"]}),
        ("evaluate", {}, THREE, {"cirr": ["cirr.val"], "circo": ["circo.val"]}),
        ("train", {"valid_splits": [], "test_splits": ["circo.val"]}, ["circo.val"], {"cirr": ["train"]}),
        ("evaluate", {"test_splits": ["circo.test"]}, ["circo.test"], {"circo": ["circo.test"], "cirr": []}),
        ("evaluate", {"test_splits": ["cirr.val", "cirr.val"]}, ["cirr.val"], {"cirr": ["cirr.val"], "circo": []}),
        ("evaluate", {"test_splits": ["seen"]}, ["seen"], {"cirr": ["seen"], "circo": [], "fashioniq": []}),
        (
            "evaluate",
            {"test_splits": ["val", "cirr.test"]},
            [*THREE, "cirr.test"],
            {"cirr": ["cirr.val", "cirr.test"]},
        ),
    ],
)
def test_a_split_that_several_benchmarks_have_becomes_one_of_each(command, run, tested, built, tmp_path):
    """A single owner keeps the plain name; what a run does not read is not built."""
    cfg = completed(project(tmp_path, model=WITH_WEIGHTS, **run), command)
    assert list(cfg.run_cfg.test_splits) == tested
    assert {name: list(cfg.datasets_cfg[name].splits) for name in built} == built
    assert list(cfg.run_cfg.valid_splits) == (
        ["cirr.val"] if command == "evaluate" else run.get("valid_splits", ["val"])
    )


def test_of_a_finished_run_the_training_split_alone_can_be_chosen(tmp_path):
    """The loss landscape needs this; CIRCO has no training split."""
    cfg = completed(project(tmp_path))
    cfg.run_cfg.update({"valid_splits": [], "test_splits": []})
    config.choose_splits(cfg, "train")
    assert {name: list(section.splits) for name, section in cfg.datasets_cfg.items()} == {
        "cirr": ["train"], "circo": [], "fashioniq": [],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("datasets", "run", "message"),
    [
        (
            {},
            {"valid_splits": ["val"]},
            r"valid_splits: val is built by cirr and circo and fashioniq, .* \[cirr\.val\]",
        ),
        (
            {},
            {"valid_splits": ["cirr.val", "circo.val"]},
            r"valid_splits: LAVIS validates on one val, got \['cirr\.val",
        ),
        ({}, {"test_splits": ["cirr.vall"]}, r"test_splits: cirr\.vall is built by no data set \(datasets\.cirr\.spl"),
        ({}, {"test_splits": ["triplets.val"]}, r"test_splits: triplets\.val is built by no data set"),
        (
            {"garments_caption": {**CAPTIONS, "splits": ["train", "val"]}},
            {},
            r"garments_caption\.splits: benchmarks al",
        ),
        (
            {"coco_caption": {"splits": "train"}},
            {},
            r"coco_caption\.splits must be a list such as .*, or null, got 'train'",
        ),
        ({"coco_caption": {}}, {}, r"coco_caption\.vis_processor\.train is missing; name one and its image_size"),
        (
            {"garments_vqa": {}, "garments_caption": {}},
            {"task": "local_captioning", "valid_splits": ["val"], "num_beams": 1, "max_len": 9, "min_len": 1},
            r"valid_splits: val is built by .*garments_vqa and garments_caption, and LAVIS evaluates one data set per",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(datasets, run, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        completed(project(tmp_path, datasets, **run))


def test_weights_that_are_not_enough_are_refused(tmp_path, monkeypatch):
    """A model says whether ``pretrained`` makes it whole."""
    path = project(tmp_path, model=WITH_WEIGHTS)
    completed(path, "evaluate")
    monkeypatch.setattr(Blip2Cir, "needs_finetuned", True, raising=False)
    with pytest.raises(ConfigError, match=r"lavis\.evaluate would score random weights: set model\.load_finetuned"):
        completed(path, "evaluate")
    completed(path, "train")


# -- training data of LAVIS ------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path):
    """Return a section of LAVIS's own builder with local training files; the other files would be downloaded."""
    Image.new("RGB", (80, 64), "red").save(tmp_path / "a.jpg")
    captions = [{"image": "a.jpg", "caption": text, "image_id": "a"} for text in ("a red wall", "plain red")]
    (tmp_path / "train.json").write_text(json.dumps(captions))
    file = str(tmp_path / "train.json")
    return {
        "build_info": {"annotations": {"train": {"url": file, "storage": file}}, "images": {"storage": str(tmp_path)}},
        "vis_processor": {"train": {"name": "target_pad", "image_size": 64}},
    }


@pytest.mark.parametrize("said", [{}, {"splits": ["train"]}])
def test_a_caption_data_set_of_lavis_is_training_data_beside_benchmarks(said, coco, tmp_path, monkeypatch):
    """Its validation files are neither downloaded nor read."""

    def refuse(**arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(base_dataset_builder, "download_url", refuse)
    path = project(tmp_path, {"coco_caption": {**coco, **said}, "cirr": {"splits": ["val"]}}, WITH_WEIGHTS)
    cfg = completed(path)
    before = OmegaConf.to_container(cfg.datasets_cfg)
    datasets = ComposedRetrievalTask.setup_task(cfg).build_datasets(cfg)
    assert OmegaConf.to_container(cfg.datasets_cfg) == before, "it is compared when a run is resumed"
    assert {name: list(splits) for name, splits in datasets.items()} == {
        "cirr": ["val", "cirr.val"], "circo": ["circo.val"], "fashioniq": ["fashioniq.val"], "coco_caption": ["train"],
    }  # fmt: skip
    sample = datasets["coco_caption"]["train"][1]
    assert (sample["text_input"], sample["image"].shape) == ("plain red", (3, 64, 64))
    evaluated = completed(path, "evaluate")
    assert "coco_caption" not in ComposedRetrievalTask.setup_task(evaluated).build_datasets(evaluated)


def test_samples_of_several_kinds_are_not_mixed(coco, tmp_path):
    """Of triplets and captions LAVIS would keep image and text alone; two caption data sets may be mixed."""
    build = ComposedRetrievalTask().build_datasets
    mixed = project(tmp_path, {"garments_caption": CAPTIONS})
    with pytest.raises(ValueError, match=r"samples of garments_caption have no target and no target_id as those of ci"):
        build(completed(mixed))
    alike = project(tmp_path, {"garments_caption": CAPTIONS, "coco_caption": coco, "cirr": {"splits": ["val"]}})
    assert [name for name, splits in build(completed(alike)).items() if "train" in splits] == [
        "garments_caption", "coco_caption",
    ]  # fmt: skip


def test_a_cache_of_features_says_whose_pictures_it_leaves_out(small_model, tmp_path, caplog):
    """The warning names LAVIS's data sets; the benchmarks' pictures are cached."""
    path = project(
        tmp_path, {"garments_caption": CAPTIONS, "cirr": {"splits": ["val"]}}, feature_cache=str(tmp_path / "features")
    )
    cfg = completed(path)
    task = ComposedRetrievalTask.setup_task(cfg)
    datasets = task.build_datasets(cfg)
    for splits in datasets.values():
        for dataset in splits.values():
            dataset.vis_processor = TargetPadProcessor(16)
    task.prepare(small_model(freeze_vit=True), datasets, cfg)
    assert "off for datasets.garments_caption.train, because GarmentsCaption has no files of pictures" in caplog.text
    assert isinstance(datasets["circo"]["circo.val"][0]["image"], UncachedPicture)
    assert datasets["garments_caption"]["train"][0]["image"].ndim == 3


# -- what a model may say --------------------------------------------------------------------------------------------


class Stub(torch.nn.Module):
    """Model that describes a picture by its mean colour and looks at its corner at the top right."""

    row_label = "stage I + II"
    baselines = {"sum": "image + text", "mapping": "stage I alone"}  # noqa: RUF012
    attention_labels = ("block 3", "block 7")
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.modes, self.seen = [], []

    def encode_target(self, image):
        return F.normalize(image.mean(dim=(2, 3)), dim=-1)

    def encode_query(self, samples, mode):
        self.modes.append(mode)
        return -self.encode_target(samples["image"]) if mode == "mapping" else self.encode_target(samples["image"])

    def attention_maps(self, samples):
        self.seen.append(samples)
        maps = torch.zeros(len(samples["image"]), 2, 4, 4)
        maps[:, :, 0, -1] = 1
        return maps


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = make_garments(tmp_path_factory.mktemp("cache"), GarmentsConfig(**FASHIONIQ))
    benchmark = fashioniq.read_benchmark({"root": str(root), "categories": ["dress"]}, "val")
    return BenchmarkDataset(benchmark, TargetPadProcessor(32), str.upper)


def final_evaluation(model, dataset, run):
    registry.mapping["paths"]["output_dir"] = str(run)
    run.mkdir(exist_ok=True)
    task = ComposedRetrievalTask()
    loader = DataLoader(dataset, batch_size=4, collate_fn=dataset.collater)
    task.after_evaluation(task.evaluation(model, loader, cuda_enabled=False), "fashioniq.val", "best")
    return run / "fashioniq_val"


def test_a_gpu_gives_the_metrics_and_the_features_of_the_cpu(dataset, tmp_path, small_model):
    """A rehearsed one: the model is on the GPU, the features that are kept on the CPU."""
    registry.mapping["paths"]["output_dir"] = str(tmp_path)
    model, found = small_model(image_size=32, freeze_vit=True).eval(), []
    loader = DataLoader(dataset, batch_size=4, collate_fn=dataset.collater)
    cached = DataLoader(copy.copy(dataset), batch_size=4, collate_fn=dataset.collater)

    def metrics(loader, on_gpu):
        task = ComposedRetrievalTask()
        found.append(task.after_evaluation(task.evaluation(model, loader, cuda_enabled=on_gpu), "val", 0))

    metrics(loader, False)
    with rehearsal():
        to_cuda(model)
        metrics(loader, True)
        cache = FeatureCache(tmp_path / "features", model, dataset.vis_processor)
        cached.dataset.use_features(cache)
        metrics(cached, True)
    assert found[0] == found[1] == found[2]
    assert cache.find(dataset.image_paths.values()) == set(dataset.image_paths.values())


def test_the_rows_and_the_attention_are_those_that_the_model_names(dataset, tmp_path, capsys):
    model = Stub()
    folder = final_evaluation(model, dataset, tmp_path / "run")
    found = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert list(found) == ["stage I + II", "image + text", "stage I alone", "random (expected)"]
    assert found["stage I + II"] == found["image + text"] != found["stage I alone"]
    assert set(model.modes) == {"multimodal", "sum", "mapping"}
    assert "| stage I alone     |" in capsys.readouterr().out
    (samples,) = model.seen
    queries = dataset.benchmark.groups[0].queries
    assert samples["text_input"] == [query.texts[0].upper() for query in queries]
    expected = [dataset.vis_processor(open_rgb(dataset.image_paths[query.reference])) for query in queries]
    assert torch.equal(samples["image"], torch.stack(expected))
    assert Image.open(folder / "attention_dress.png").mode == "RGB"


def test_a_model_that_names_no_map_gets_no_picture(dataset, tmp_path):
    model = Stub()
    model.attention_labels = []
    folder = final_evaluation(model, dataset, tmp_path / "run")
    assert sorted(path.name for path in folder.iterdir()) == ["contact_sheet_dress.png", "metrics.json", "queries.json"]


def test_the_stock_names_are_kept_where_a_model_says_nothing(dataset, tmp_path):
    model = SimpleNamespace(
        device=Stub.device,
        encode_target=Stub().encode_target,
        encode_query=lambda samples, mode: torch.eye(3)[:1].repeat(len(samples["text_input"]), 1),
    )
    metrics = json.loads((final_evaluation(model, dataset, tmp_path / "run") / "metrics.json").read_text())["metrics"]
    assert list(metrics) == ["trained model", "image only", "text only", "random (expected)"]


# -- from the command line to the files ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train on CIRR's world, validate on it, and test on val of all three benchmarks and CIRR's test."""
    folder = tmp_path_factory.mktemp("trained")
    path = project(folder, test_splits=["val", "cirr.test"])
    with mock.patch.object(chance, "RANDOM_QUERIES", FEW):
        launcher.main("train", ["--cfg-path", path])
    (run,) = (folder / "out").iterdir()
    return path, run


def test_each_benchmark_is_tested_by_itself_and_all_are_summed_up(trained):
    """The summary has each benchmark's own metric from its metrics.json; a split with hidden targets gives answers."""
    _, run = trained
    folders = {path.name for path in run.iterdir() if path.is_dir()} - {"result"}
    names = [f"{name}_val" for name in WORLDS]
    assert folders == {*names, "cirr_test"}
    summary = json.loads((run / "summary.json").read_text())["benchmarks"]
    assert list(summary) == names
    for name, metric in zip(names, ("mean", "mAP@5", "mean")):
        metrics = json.loads((run / name / "metrics.json").read_text())
        assert summary[name]["metric"] == metric
        assert summary[name]["protocol"] == metrics["protocol"]
        assert summary[name]["values"] == {row: values[metric] for row, values in metrics["metrics"].items()}
    answers = {path.name for path in (run / "cirr_test").glob("*.json")}
    assert answers == {"cirr_test1_recall.json", "cirr_test1_recall_subset.json", "queries.json"}
    assert (run / "training_curve.png").is_file()


def test_the_same_command_resumes(trained, capsys, monkeypatch):
    """The log's end is taken away, as if the final evaluation had been interrupted."""
    path, run = trained
    log = run / "log.txt"
    ended = log.read_text()
    log.write_text(ended.replace('{"run_finished": true}\n', ""))
    before = (run / "summary.json").read_text()
    (run / "summary.json").unlink()
    monkeypatch.setattr(chance, "RANDOM_QUERIES", FEW)
    launcher.main("train", ["--cfg-path", path, "--options", "run.resume_ckpt_path=auto"])
    assert list(run.parent.iterdir()) == [run]
    assert (run / "summary.json").read_text() == before
    assert log.read_text() == ended
    assert capsys.readouterr().out.count("| cirr_val | circo_val | fashioniq_val |") == 1


@pytest.mark.slow
def test_two_processes_evaluate_the_same(trained, tmp_path):
    path, run = trained
    options = [
        "run.test_splits=[val]", f"run.output_dir={tmp_path / 'out'}",
        "model.load_finetuned=true", f"model.finetuned={run / 'checkpoint_best.pth'}",
    ]  # fmt: skip
    arguments, log = ["--cfg-path", path, "--options", *options], tmp_path / "printed.txt"
    finish(start_launcher("evaluate", arguments, log, world_size=2, random_queries=FEW), log)
    (other,) = (tmp_path / "out").iterdir()
    assert (other / "summary.json").read_text() == (run / "summary.json").read_text()
    assert log.read_text().count("fashioniq_val |") == 1
