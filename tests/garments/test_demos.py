"""Small demos of all three benchmarks train a model and then write the answers for the test server."""

from __future__ import annotations

import json

import pytest
from launched import leave_pictures_blank
from omegaconf import OmegaConf

from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.commands import submission
from lavis_cir_plugin.report import chance
from lavis_cir_plugin.training import launcher

SMALL = {"image_width": 48, "image_height": 60}
WORLDS = {
    "fashioniq": {
        **{"train_triplets": 10, "train_images": 14, "val_queries": 6, "val_images": 60},
        **{"test_queries": 3, "test_images": 60},
    },
    "cirr": {"train_sets": 6, "val_sets": 9, "test_sets": 9, "queries_per_set": 2},
    "circo": {"images": 60, "val_queries": 6, "test_queries": 4},
}
ANNOTATIONS = {
    "fashioniq": {f"{name}.test.pred.json": f"cap.{name}.test.json" for name in ("dress", "shirt", "toptee")},
    "cirr": {f"cirr_test1_{metric}.json": "cap.rc2.test1.json" for metric in ("recall", "recall_subset")},
    "circo": {"circo_test.json": "test.json"},
}
METRICS = {
    "fashioniq": {"dress_R@10", "R@50", "mean"},
    "cirr": {"R@1", "R_subset@3", "mean"},
    "circo": {"mAP@5", "mAP@50", "Recall@10"},
}


FEW = 200
"""Number of random rankings for the chance level; the usual number would take seconds."""


@pytest.fixture
def project(tmp_path, monkeypatch, tmp_path_factory):
    """Return a function that writes a demo's project file for small worlds and one epoch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "shapes"))
    monkeypatch.setattr(chance, "RANDOM_QUERIES", FEW)

    def make(demo):
        cfg = OmegaConf.load(PROJECTS / demo)
        for name, section in cfg.datasets.items():
            section.garments = {**WORLDS[name], **SMALL}
        cfg.run.update({"max_epoch": 1, "batch_size_train": 8, "num_workers": 0, "output_dir": str(tmp_path / "out")})
        OmegaConf.save(cfg, tmp_path / "project.yaml")
        return str(tmp_path / "project.yaml")

    return make


@pytest.mark.parametrize(
    ("demo", "name"),
    [
        ("wrf4cir/demo.yaml", "fashioniq"),
        ("wrf4cir/cirr_demo.yaml", "cirr"),
        ("wrf4cir/circo_demo.yaml", "circo"),
        ("blip2_cir/fiq_demo.yaml", "fashioniq"),
        ("blip2_cir/cirr_demo.yaml", "cirr"),
        ("blip2_cir/circo_demo.yaml", "circo"),
    ],
)
def test_a_demo_ends_in_files_that_the_server_takes(project, tmp_path, demo, name, capsys, monkeypatch):
    launcher.main("train", ["--cfg-path", project(demo)])
    leave_pictures_blank(monkeypatch)  # the training run drew its pictures
    (run,) = (tmp_path / "out").iterdir()
    rows = json.loads((run / "val" / "metrics.json").read_text())["metrics"]
    assert all(METRICS[name] <= row.keys() for row in rows.values())

    options = ["model.load_finetuned=true", f"model.finetuned={run / 'checkpoint_best.pth'}", "run.test_splits=[test]"]
    options.append(f"run.output_dir={tmp_path / 'answers'}")
    launcher.main("evaluate", ["--cfg-path", project(demo), "--options", *options])
    (answers,) = (tmp_path / "answers").iterdir()
    found = {path.name for path in (answers / "test").glob("*.json")} - {"queries.json"}
    assert found == set(ANNOTATIONS[name])
    assert {f"test/{file}" for file in found} <= set(capsys.readouterr().out.split())
    worlds = tmp_path.parent / "shapes" / "lavis_cir_plugin"
    for file, annotation in ANNOTATIONS[name].items():
        (path,) = worlds.rglob(annotation)
        review = submission.check(answers / "test" / file, path)
        assert review.problems == {}
        assert not [note for note in review.notes if "not checked" in note]


def test_a_split_without_public_targets_cannot_choose_a_checkpoint(project, tmp_path):
    options = ["run.valid_splits=[test]", f"run.output_dir={tmp_path / 'out'}"]
    message = (
        r"run\.valid_splits: cirr test has no public targets, so no checkpoint can be chosen by it; validate on val"
    )
    with pytest.raises(SystemExit, match=message):
        launcher.main("train", ["--cfg-path", project("wrf4cir/cirr_demo.yaml"), "--options", *options])


def test_circo_cannot_be_trained_on(project):
    with pytest.raises(SystemExit, match=r"run\.train_splits: train is built by no data set"):
        launcher.main(
            "train", ["--cfg-path", project("wrf4cir/circo_demo.yaml"), "--options", "datasets.cirr.splits=[val]"]
        )
