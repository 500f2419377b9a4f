"""The launcher from the command line to its files, on a small drawn world, and its refusals."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path

import lavis
import pytest
import torch
from launched import run_by_torchrun
from lavis.models.blip_models.blip import BlipBase
from lavis.models.blip_models.blip_caption import BlipCaption
from lavis.models.vit import VisionTransformerEncoder
from omegaconf import OmegaConf
from PIL import Image

from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.garments import GarmentsConfig, make_garments
from lavis_cir_plugin.models.tokenizer import load_tokenizer
from lavis_cir_plugin.training import launcher

WORLD = {
    "train_triplets": 16, "train_images": 24, "val_queries": 6, "val_images": 10, "test_queries": 3, "test_images": 6,
    "image_width": 48, "image_height": 60,
}  # fmt: skip


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Draw a FashionIQ folder of 3 x (24 + 10) pictures."""
    return make_garments(tmp_path_factory.mktemp("cache"), GarmentsConfig(**WORLD))


@pytest.fixture
def project(tmp_path, world):
    """Return a factory of project files: the demo on the small world, with changes as dotted keys."""

    def make(base="wrf4cir/demo.yaml", **changes):
        cfg = OmegaConf.load(PROJECTS / base)
        cfg.datasets.fashioniq = {
            "build_info": {"root": str(world)},
            "vis_processor": {stage: {"name": "target_pad", "image_size": 64} for stage in ("train", "eval")},
        }
        small = {"max_epoch": 2, "batch_size_train": 8, "num_workers": 0, "output_dir": str(tmp_path / "out")}
        cfg.run.update(small)
        cfg.run.wrf.warmup_epochs = 1
        for key, value in changes.items():
            OmegaConf.update(cfg, key.replace("__", "."), value)
        path = tmp_path / "project.yaml"
        OmegaConf.save(cfg, path)
        return str(path)

    return make


def output_of(tmp_path):
    (folder,) = (tmp_path / "out").iterdir()
    return folder


def test_train_then_evaluate_end_to_end(project, tmp_path, capsys):
    """One command trains, tabulates and leaves its files; a second evaluates the checkpoint to the same numbers."""
    launcher.main("train", ["--cfg-path", project()])
    folder = output_of(tmp_path)
    printed = capsys.readouterr().out
    for row in (
        "trained model",
        "image only",
        "text only",
        "random (expected)",
        "Protocol: FashionIQ val, original-split",
    ):
        assert row in printed
    assert str(folder) in printed
    metrics = json.loads((folder / "val" / "metrics.json").read_text())
    assert metrics["metrics"]["random (expected)"]["dress_R@10"] == 100.0  # a gallery of 10
    assert metrics["groups"]["dress"]["gallery_size"] == 10
    sheets = [f"val/contact_sheet_{category}" for category in ("dress", "shirt", "toptee")]
    for name in (*sheets, "training_curve"):
        assert Image.open(folder / f"{name}.png").width > 300
    assert not list(folder.glob("*.tmp"))
    saved = torch.load(folder / "checkpoint_best.pth", weights_only=True)
    # 48 triplets, 6 batches of 8 an epoch, the first of two epochs is the warm-up.
    assert saved["optimizer"]["wrf"]["steps"]["perturbed"] == 6 * saved["epoch"]

    options = ["model.load_finetuned=true", f"model.finetuned={folder / 'checkpoint_best.pth'}"]
    options += [f"run.output_dir={tmp_path / 'evaluated'}"]
    launcher.main("evaluate", ["--cfg-path", project(), "--options", *options])
    again = json.loads(next((tmp_path / "evaluated").rglob("metrics.json")).read_text())
    assert again["metrics"] == metrics["metrics"]


@pytest.mark.slow
def test_two_processes_train_and_rank_together(project, tmp_path):
    """torchrun's processes write one folder and one table, and their ranking equals that of a single process."""
    printed = tmp_path / "printed.txt"
    run_by_torchrun("train", ["--cfg-path", project(run__max_epoch=1)], printed, world_size=2)
    assert printed.read_text().count("Protocol:") == 1
    folder = output_of(tmp_path)
    metrics = json.loads((folder / "val" / "metrics.json").read_text())["metrics"]
    options = ["model.load_finetuned=true", f"model.finetuned={folder / 'checkpoint_best.pth'}"]
    launcher.main("evaluate", ["--cfg-path", project(), "--options", *options, f"run.output_dir={tmp_path / 'one'}"])
    alone = json.loads(next((tmp_path / "one").rglob("metrics.json")).read_text())["metrics"]
    assert alone == metrics


def test_lavis_own_recipe_runs_through_the_same_launcher(tmp_path, monkeypatch):
    """LAVIS's COCO captioning recipe runs on a CPU; only its downloads and its large model are replaced."""
    monkeypatch.setattr(BlipBase, "init_tokenizer", classmethod(lambda cls: blip_tokenizer()))
    small_tower = {"img_size": 32, "patch_size": 16, "embed_dim": 768, "depth": 1, "num_heads": 2}
    monkeypatch.setattr(VisionTransformerEncoder, "from_config", classmethod(lambda cls, cfg: cls(**small_tower)))
    monkeypatch.setattr(BlipCaption, "load_checkpoint_from_config", lambda self, cfg: None)
    bert = json.loads((Path(lavis.__file__).parent / "configs/models/med_config.json").read_text())
    bert.update(num_hidden_layers=1, vocab_size=len(blip_tokenizer()), intermediate_size=64)
    (tmp_path / "bert.json").write_text(json.dumps(bert))
    records = [{"image": f"{i}.jpg", "caption": "a plain picture", "image_id": f"x_{i}"} for i in range(4)]
    (tmp_path / "records.json").write_text(json.dumps(records))
    for record in records:
        Image.new("RGB", (40, 40), (90, 80, 120)).save(tmp_path / record["image"])
    annotations = "datasets.coco_caption.build_info.annotations"
    options = [
        f"{annotations}.{split}.{key}={tmp_path}/records.json"
        for split in ("train", "val", "test")
        for key in ("url", "storage")
    ]
    options += [
        f"datasets.coco_caption.build_info.images.storage={tmp_path}",
        f"model.med_config_path={tmp_path}/bert.json",
    ]
    options += [f"datasets.coco_caption.vis_processor.{stage}.image_size=32" for stage in ("train", "eval")]
    options += [
        "run.device=cpu",
        "run.max_epoch=1",
        "run.batch_size_train=2",
        "run.num_workers=0",
        "run.valid_splits=[]",
    ]
    options += ["run.test_splits=[]", f"run.output_dir={tmp_path}/out"]
    recipe = Path(lavis.__file__).parent / "projects/blip/train/caption_coco_ft.yaml"
    launcher.main("train", ["--cfg-path", str(recipe), "--options", *options])
    saved = torch.load(output_of(tmp_path) / "checkpoint_0.pth", weights_only=True)
    assert "wrf" not in saved["optimizer"]
    assert any(name.startswith("text_decoder.") for name in saved["model"])


def blip_tokenizer():
    tokenizer = load_tokenizer("blip2_cir_tiny_vocab.txt")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.additional_special_tokens_ids[0]
    return tokenizer


def test_projects_are_found_without_a_checkout(monkeypatch, tmp_path):
    """``projects/...`` works from any folder; a local file of that name wins."""
    monkeypatch.chdir(tmp_path)
    assert launcher.find_config("projects/wrf4cir/demo.yaml") == PROJECTS / "wrf4cir/demo.yaml"
    local = tmp_path / "projects/wrf4cir/demo.yaml"
    local.parent.mkdir(parents=True)
    local.write_text("run: {}")
    assert launcher.find_config("projects/wrf4cir/demo.yaml").samefile(local)


def refused(arguments):
    """Return the one sentence with which the launcher stops."""
    with pytest.raises(SystemExit) as stopped:
        launcher.main("train", arguments)
    return str(stopped.value)


def test_the_annotation_files_are_missing(project, tmp_path):
    sentence = refused(["--cfg-path", project(datasets__fashioniq__build_info__root=str(tmp_path / "nowhere"))])
    assert sentence.startswith("lavis.train: fashioniq: annotation file cap.dress.train.json is in none of")
    assert "set datasets.fashioniq.build_info.root" in sentence


@pytest.fixture
def damaged(tmp_path, world):
    """Return a copy of the world that a test may damage."""
    return Path(shutil.copytree(world, tmp_path / "damaged"))


def test_images_are_missing(project, damaged):
    for path in sorted((damaged / "images").iterdir())[:7]:
        path.unlink()
    sentence = refused(["--cfg-path", project(datasets__fashioniq__build_info__root=str(damaged))])
    assert re.search(r"fashioniq: \d+ of \d+ images", sentence), sentence
    assert "missing_images" in sentence


def test_an_image_is_unreadable(project, damaged):
    for path in (damaged / "images").iterdir():
        path.write_bytes(path.read_bytes()[:300])
    sentence = refused(["--cfg-path", project(datasets__fashioniq__build_info__root=str(damaged))])
    assert str(damaged / "images") in sentence


def test_a_caption_file_has_a_broken_record(project, damaged):
    path = damaged / "captions/cap.shirt.train.json"
    records = json.loads(path.read_text())
    records[3]["captions"] = "is red"
    path.write_text(json.dumps(records))
    sentence = refused(["--cfg-path", project(datasets__fashioniq__build_info__root=str(damaged))])
    assert sentence == (
        f"lavis.train: {path}: record 3 (counting from 0) needs 'captions', a list of 2 texts; "
        "correct the file or copy it again."
    )


def test_a_checkpoint_of_another_model(project, tmp_path):
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, tmp_path / "other.pth")
    sentence = refused(["--cfg-path", project(model__pretrained=str(tmp_path / "other.pth"))])
    assert "other.pth: 1 unexpected keys (first: layer.weight)" in sentence


def test_no_space_is_left_for_the_checkpoint(project, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    sentence = refused(["--cfg-path", project()])
    assert "no checkpoint could be written to" in sentence
    assert "No space left on device" in sentence


def test_an_error_that_is_not_ours_keeps_its_traceback(project, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr("lavis.tasks.setup_task", broken)
    with pytest.raises(ValueError, match="a bug"):
        launcher.main("train", ["--cfg-path", project()])


def test_options_may_be_given_in_several_parts(project, tmp_path):
    """The last option is wrong on purpose: the sentence shows that the first one was not dropped."""
    arguments = [
        "--options",
        f"run.output_dir={tmp_path}/elsewhere",
        "--options",
        "datasets.fashioniq.build_info.root=/no",
    ]
    refused(["--cfg-path", project(), *arguments])
    assert (tmp_path / "elsewhere").is_dir()


def test_an_unwritable_output_folder_is_told_before_anything_starts(project):
    sentence = refused(["--cfg-path", project(run__output_dir="/proc/nope")])
    assert sentence.startswith("lavis.train: run.output_dir: /proc/nope cannot be written")


def test_a_batch_larger_than_the_data_is_refused(project):
    sentence = refused(["--cfg-path", project(run__batch_size_train=1000)])
    assert "gives no batch of run.batch_size_train: 1000" in sentence


def test_an_unreadable_image_met_by_a_worker_is_the_same_sentence(project, damaged):
    for path in (damaged / "images").iterdir():
        path.write_bytes(path.read_bytes()[:700])  # a header that opens, and too little behind it
    options = {"datasets__fashioniq__build_info__root": str(damaged), "run__num_workers": 2}
    sentence = refused(["--cfg-path", project(**options, datasets__fashioniq__build_info__verify_images=False)])
    assert str(damaged / "images") in sentence
    assert "Traceback" not in sentence


def test_a_missing_config_lists_the_shipped_ones():
    sentence = refused(["--cfg-path", "projects/wrf4cir/fq.yaml"])
    assert "projects/wrf4cir/fq.yaml does not exist" in sentence
    assert "projects/wrf4cir/fiq.yaml" in sentence
