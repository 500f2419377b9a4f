"""The training splits of every shipped project, and the protocol line of a model that is not zero-shot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.tasks.composed_retrieval import ComposedRetrievalTask
from lavis_cir_plugin.training import config
from lavis_cir_plugin.training.training_history import trained_on

FASHIONIQ, CIRR, CAPTIONS = {"fashioniq": ["train"]}, {"cirr": ["train"]}, {"garments_caption": ["train"]}
EXPECTED = {
    "blip2_cir/circo.yaml": CIRR,
    "blip2_cir/circo_demo.yaml": CIRR,
    "blip2_cir/cirr.yaml": CIRR,
    "blip2_cir/cirr_demo.yaml": CIRR,
    "blip2_cir/fiq.yaml": FASHIONIQ,
    "blip2_cir/fiq_demo.yaml": FASHIONIQ,
    "clip_cir/eval_all.yaml": {},
    "clip_cir/eval_clip4cir.yaml": {},
    "clip_cir/triplets.yaml": {},
    "retrieval_dpo/fused.yaml": FASHIONIQ,
    "retrieval_dpo/fused_demo.yaml": FASHIONIQ,
    "retrieval_dpo/paper.yaml": FASHIONIQ,
    "retrieval_dpo/paper_demo.yaml": FASHIONIQ,
    "retrieval_dpo/triplets.yaml": {"triplets": ["train"]},
    "tscir/clip_demo.yaml": CAPTIONS,
    "tscir/composing.yaml": {"laion_cir": ["train"]},
    "tscir/composing_demo.yaml": {"triplets": ["train"]},
    "tscir/composing_triplets.yaml": {"triplets": ["train"]},
    "tscir/eval_all.yaml": {},
    "tscir/eval_pic2word.yaml": {},
    "tscir/eval_searle.yaml": {},
    "tscir/eval_triplets.yaml": {},
    "tscir/mapping.yaml": {"caption_shards": ["train"]},
    "tscir/mapping_captions.yaml": {"image_captions": ["train"]},
    "tscir/mapping_demo.yaml": CAPTIONS,
    "wrf4cir/caption.yaml": {"coco_caption": ["train"]},
    "wrf4cir/caption_demo.yaml": CAPTIONS,
    "wrf4cir/circo.yaml": CIRR,
    "wrf4cir/circo_demo.yaml": CIRR,
    "wrf4cir/cirr.yaml": CIRR,
    "wrf4cir/cirr_demo.yaml": CIRR,
    "wrf4cir/demo.yaml": FASHIONIQ,
    "wrf4cir/demo_iterations.yaml": FASHIONIQ,
    "wrf4cir/fiq.yaml": FASHIONIQ,
    "wrf4cir/fiq_tiny.yaml": FASHIONIQ,
    "wrf4cir/triplets.yaml": {"triplets": ["train"]},
    "wrf4cir/triplets_tiny.yaml": {"triplets": ["train"]},
    "wrf4cir/vqa.yaml": {"coco_vqa": ["train"], "vg_vqa": ["train"]},
    "wrf4cir/vqa_demo.yaml": {"garments_vqa": ["train"]},
}
"""By project: the data sets that it trains on, with the splits of each."""

WORLD = {
    "train_triplets": 4, "train_images": 8, "val_queries": 3, "val_images": 8, "test_queries": 2, "test_images": 4,
    "image_width": 48, "image_height": 60,
}  # fmt: skip
OWN = "; not zero-shot: trained on fashioniq's own training split"


def completed(path, options, command):
    cfg = config.with_lavis_defaults(config.read_config(str(path), options))
    config.choose_splits(cfg, command)
    return cfg


def trained_splits(cfg):
    """Return the splits that a project trains on; LAVIS trains on those of ``run.train_splits`` that it builds."""
    asked = list(cfg.run_cfg.train_splits)
    found = {}
    for name, section in cfg.datasets_cfg.items():
        offered = section.get("splits")
        found[name] = [split for split in asked if offered is None or split in offered]
    return {name: splits for name, splits in found.items() if splits}


def test_no_project_is_left_out_of_the_expectation():
    assert {str(path.relative_to(PROJECTS)) for path in PROJECTS.rglob("*.yaml")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_project_trains_on_the_splits_it_means(name):
    path = PROJECTS / name
    options = [f"{key}=given" for key in OmegaConf.missing_keys(OmegaConf.load(path))]
    trains = "train_splits" in OmegaConf.load(path).run
    cfg = completed(path, options, "train" if trains else "evaluate")
    assert trained_splits(cfg) == EXPECTED[name]


@pytest.mark.parametrize("name", ["clip_cir/eval_clip4cir.yaml", "tscir/eval_pic2word.yaml", "tscir/eval_searle.yaml"])
def test_weights_published_with_a_clip_read_captions_with_their_punctuation(name):
    """Their authors pass captions to CLIP's tokenizer as they are; ``blip_caption`` would drop CIRR's full stops."""
    path = PROJECTS / name
    options = [f"{key}=given" for key in OmegaConf.missing_keys(OmegaConf.load(path))]
    for section in completed(path, options, "evaluate").datasets_cfg.values():
        assert section.text_processor["eval"] is None


@pytest.fixture
def protocols(tmp_path, tmp_path_factory, monkeypatch):
    """Return a function that gives the protocol lines of FashionIQ's val under a project with these changes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "training_splits"))

    def lines(model, splits, command="train"):
        content = {
            "model": {"model_type": "tiny", **model},
            "datasets": {"fashioniq": {"type": "garments", "garments": WORLD, "splits": splits}},
            "run": {"task": "composed_retrieval", "train_splits": ["train"], "test_splits": ["val"], "device": "cpu"},
        }
        OmegaConf.save(OmegaConf.create(content), tmp_path / "project.yaml")
        cfg = completed(tmp_path / "project.yaml", [], command)
        return cfg, ComposedRetrievalTask().build_datasets(cfg)["fashioniq"]["val"].benchmark.protocol

    return lines


@pytest.mark.parametrize(
    ("arch", "splits", "is_said"),
    [
        ("tscir_composing", ["train", "val"], True),
        ("tscir_mapping", ["train", "val"], True),
        ("tscir_composing", ["val"], False),
        ("blip2_cir", ["train", "val"], False),  # which nobody calls zero-shot
    ],
)
def test_a_zero_shot_model_trained_on_the_benchmark_says_so(arch, splits, is_said, protocols):
    _, line = protocols({"arch": arch}, splits)
    assert line.endswith(OWN) is is_said


def test_a_checkpoint_remembers_through_every_file_it_stands_on(tmp_path, protocols):
    """The run that trained on the benchmark is three files away: finetuned, mapping_checkpoint, pretrained."""
    cfg, _ = protocols({"arch": "clip_cir"}, ["train", "val"])
    names = [str(tmp_path / name) for name in ("clip.pth", "mapping.pth", "composing.pth")]
    elsewhere = {"laion_cir": {"splits": ["train"]}, "fashioniq": {"splits": ["val"]}}
    configs = [
        cfg.to_dict(),
        {"model": {"pretrained": names[0]}, "datasets": elsewhere},
        {"model": {"mapping_checkpoint": names[1], "finetuned": None}, "datasets": elsewhere},
    ]
    for name, saved in zip(names, configs):
        torch.save({"model": {}, "config": saved}, name)
    model = {"arch": "tscir_composing", "load_finetuned": True, "finetuned": names[2]}
    _, line = protocols(model, ["val"], "evaluate")
    assert line.endswith(OWN)
    assert trained_on(model, {}) == {"fashioniq", "laion_cir"}
    assert trained_on({**model, "load_finetuned": False}, {}) == set()  # then it is not read


def test_a_checkpoint_remembers_without_the_files_it_stands_on(tmp_path):
    """A run's checkpoint is copied alone to another machine."""
    model = {"mapping_checkpoint": str(tmp_path / "moved.pth"), "finetuned": None}
    run = {"config": {"model": model, "datasets": {"cirr": {"splits": ["train"]}}}, "trained_on": ["cirr", "fashioniq"]}
    torch.save(run, tmp_path / "composing.pth")
    assert trained_on({"pretrained": str(tmp_path / "composing.pth")}, {}) == {"cirr", "fashioniq"}


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"trained_on": "photographs"},
        {"trained_on": [["x"], 3]},
        {"config": "a text"},
        {"config": {"model": "ViT-B-32", "datasets": ["coco"]}},
        {"config": {"model": {"pretrained": 3}, "datasets": {"coco": "train"}}},
        {"config": {"datasets": {"coco": {"splits": 3}, "flickr": {"splits": "pretrained"}}}},
    ],
)
def test_what_other_programs_keep_in_their_checkpoints_gives_no_names(content, tmp_path):
    torch.save(content, tmp_path / "foreign.pth")
    assert trained_on({"pretrained": str(tmp_path / "foreign.pth")}, {}) == set()


def test_files_of_others_say_nothing_and_a_circle_ends(tmp_path):
    (tmp_path / "foreign.pth").write_bytes(b"no checkpoint")
    circle = str(tmp_path / "circle.pth")
    torch.save({"config": {"model": {"pretrained": circle}, "datasets": {"cirr": {"splits": ["train"]}}}}, circle)
    for path, expected in {str(tmp_path / "foreign.pth"): set(), circle: {"cirr"}, "openai": set()}.items():
        assert trained_on({"pretrained": path}, {}) == expected


def test_a_number_of_numpy_in_a_checkpoint_hides_no_training(tmp_path):
    """The numbers of such a model would be called zero-shot."""
    path = str(tmp_path / "old.pth")
    torch.save({"config": {"datasets": {"cirr": {"splits": ["train"]}}}, "metric": np.float64(30)}, path)
    assert trained_on({"pretrained": path}, {}) == {"cirr"}
