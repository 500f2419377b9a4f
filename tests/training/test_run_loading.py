"""The model of load_run scores like the run's own model, with every setting; LAVIS's own call loads the type tiny."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, make_triplets
from lavis.models import load_model, load_model_and_preprocess
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf
from PIL import Image

import lavis_cir_plugin.search
from lavis_cir_plugin import load_run
from lavis_cir_plugin.commands import main
from lavis_cir_plugin.core.checkpoints import read_checkpoint
from lavis_cir_plugin.core.model_parts import frozen_names
from lavis_cir_plugin.methods.tscir.composing import TscirComposing
from lavis_cir_plugin.methods.tscir.mapping import TscirMapping
from lavis_cir_plugin.ranking.scoring import similarity
from lavis_cir_plugin.training import config, lora
from lavis_cir_plugin.training.lora import lora_pairs

BLIP2 = {"arch": "blip2_cir", **SMALL}
CLIP = {"clip_model": "small_clip", "image_size": 16}
TSCIR = {**CLIP, "hidden_width": 10, "injection_width": 8, "injection_heads": 2, "injection_blocks": [0, 1]}
COMPOSING = {"arch": "tscir_composing", **TSCIR, "adapter_blocks": [0, 2], "adapter_rank": 3}
SMALL_BLIP = {
    "vit_config": {"embed_dim": 8, "depth": 1, "num_heads": 2},
    "bert_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
}
LORA = {"target_modules": ["query", "value"], "r": 2, "also_train": "_proj"}
SCORING = {
    "joint": BLIP2,
    "mean_queries": {**BLIP2, "pooling": "mean_queries"},
    "sentence_prompt": {**BLIP2, "fusion": "sentence_prompt"},
    "frozen tower": {**BLIP2, "fusion": "sentence_prompt", "freeze_vit": True},
    "clip": {"arch": "clip_cir", **CLIP, "freeze_vit": False},
    "clip text": {"arch": "clip_cir", **CLIP, "freeze_vit": False, "fusion": "text"},
    "frozen clip": {"arch": "clip_cir", **CLIP, "freeze_text": True, "freeze_vit": False},
    "mapping": {"arch": "tscir_mapping", **TSCIR, "template": "* and {}"},
    "composing": COMPOSING,
}


def randomise(model, seed=7):
    """Give trained weights values that no file and no seed gives."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def whole_file(path, model, seed):
    """Write the weights of such a model under this seed to one file."""
    torch.manual_seed(seed)
    built = BaseTask().build_model(SimpleNamespace(model_cfg=OmegaConf.create({"model_type": "tiny", **model})))
    torch.save({"model": built.state_dict()}, path)
    return str(path)


def write_run(folder, model, **run):
    """Build the model of a project as the launcher does, change it by noise, and save a runner's checkpoint of it."""
    folder.mkdir(exist_ok=True)
    processor = {"name": "target_pad", "image_size": int(model.get("image_size", 64)), "target_ratio": 1.5}
    plain = {"train": {"name": "blip_caption"}, "eval": {"name": "blip_caption", "max_words": 3}}
    section = {
        "splits": ["train", "val"],
        "build_info": {"root": "anywhere"},
        "vis_processor": {"train": processor, "eval": processor},
        "text_processor": plain,
    }
    settings = {"task": "composed_retrieval", "device": "cpu", "train_splits": ["train"], "seed": 3, **run}
    content = {"model": {"model_type": "tiny", **model}, "datasets": {"cirr": section}, "run": settings}
    OmegaConf.save(OmegaConf.create(content), folder / "project.yaml")
    cfg = config.with_lavis_defaults(config.read_config(str(folder / "project.yaml"), []))
    torch.manual_seed(int(cfg.run_cfg.seed))
    built = randomise(lora.build_model(BaseTask(), cfg)).eval()
    left_out = frozen_names(built)
    state = {name: tensor for name, tensor in built.state_dict().items() if name not in left_out}
    torch.save({"model": state, "config": cfg.to_dict(), "epoch": 0}, folder / "checkpoint_best.pth")
    return built


def with_start(folder, model):
    """Return project settings that name files with the frozen weights."""
    if model["arch"] in ("tscir_mapping", "tscir_composing") or model.get("freeze_text"):
        clip = {"arch": "clip_cir", **CLIP, "freeze_vit": False}
        model = {**model, "pretrained": whole_file(folder / "clip.pth", clip, 5)}
    if model.get("freeze_vit"):
        model = {**model, "pretrained": whole_file(folder / "blip2.pth", {**model, "freeze_vit": False}, 5)}
    return model


def scores(model, batch):
    return similarity(model.encode_query(batch), model.encode_target(batch["target"]))


@pytest.mark.parametrize("name", SCORING)
def test_every_model_scores_as_it_did_in_its_run(name, tmp_path):
    built = write_run(tmp_path / "run", with_start(tmp_path, SCORING[name]))
    with torch.random.fork_rng():
        torch.manual_seed(99)  # nothing depends on the caller's generator
        before = torch.random.get_rng_state()
        loaded = load_run(tmp_path / "run")
        assert torch.equal(torch.random.get_rng_state(), before)
    assert type(loaded.model) is type(built)
    assert not loaded.model.training
    batch = make_triplets(3)
    assert torch.equal(scores(loaded.model, batch), scores(built, batch))
    assert loaded.config.run.seed == 3
    assert loaded.config.model.arch == SCORING[name]["arch"]
    picture = loaded.vis_processors["eval"](Image.new("RGB", (40, 20), "red"))
    assert picture.shape == (3, 16, 16)
    assert loaded.vis_processors["eval"].target_ratio == 1.5
    assert loaded.txt_processors["eval"]("one two three four") == "one two three"


@pytest.mark.parametrize("package", [lavis_cir_plugin, lavis_cir_plugin.search])
def test_what_is_imported_when_asked_for_is_shown_before(package):
    """A notebook completes names by ``dir``."""
    assert set(package.__all__) <= set(dir(package))
    assert all(hasattr(package, name) for name in package.__all__)


@pytest.mark.parametrize("name", ["sentence_prompt", "frozen tower", "mapping", "composing"])
def test_adapters_come_back_with_their_settings(name, tmp_path):
    lora = {"target_modules": ["c_fc"], "r": 2, "also_train": "^mapping|^adapters"} if "ing" in name else LORA
    built = write_run(tmp_path / "run", with_start(tmp_path, SCORING[name]), lora=lora)
    assert lora_pairs(built)
    loaded = load_run(tmp_path / "run" / "checkpoint_best.pth").model
    assert len(lora_pairs(loaded)) == len(lora_pairs(built))
    assert torch.equal(scores(loaded, make_triplets(3)), scores(built, make_triplets(3)))


@pytest.mark.parametrize("lora", [None, LORA])
def test_loading_leaves_the_generators_of_gpus_alone(lora, tmp_path, monkeypatch):
    """Otherwise a program that loads a run between draws gets the same numbers on a GPU again and again."""
    write_run(tmp_path / "run", with_start(tmp_path, SCORING["sentence_prompt"]), lora=lora)
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    load_run(tmp_path / "run")
    assert seeds == []


def test_a_run_that_went_on_from_a_whole_file_has_its_frozen_tower_from_there(tmp_path):
    """The run's checkpoint lacks the tower of that file, such as SPRC's, not the one of model.pretrained."""
    tuned = {**BLIP2, "fusion": "sentence_prompt", "freeze_vit": True}
    files = [whole_file(tmp_path / f"{seed}.pth", {**tuned, "freeze_vit": False}, seed) for seed in (5, 6)]
    start = {"pretrained": files[0], "load_finetuned": True, "finetuned": files[1]}
    built = write_run(tmp_path / "run", {**tuned, **start})
    loaded = load_run(tmp_path / "run").model
    assert torch.equal(loaded.visual_encoder.cls_token, read_checkpoint(files[1])["model"]["visual_encoder.cls_token"])
    assert torch.equal(scores(loaded, make_triplets(3)), scores(built, make_triplets(3)))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_moved_file_is_named_by_changes(kind, tmp_path):
    model = with_start(tmp_path, SCORING["frozen tower"])
    built = write_run(tmp_path / "run", model)
    (tmp_path / "blip2.pth").rename(tmp_path / "moved.pth")
    with pytest.raises(FileNotFoundError, match=r"blip2\.pth does not exist .* Set model\.pretrained"):
        load_run(tmp_path / "run")
    loaded = load_run(tmp_path / "run", changes={"pretrained": kind(tmp_path / "moved.pth")}).model
    assert torch.equal(scores(loaded, make_triplets(3)), scores(built, make_triplets(3)))
    with pytest.raises(ValueError, match=r"changes\.pretrianed is not a known key; did you mean 'pretrained'\?"):
        load_run(tmp_path / "run", changes={"pretrianed": "x"})


@pytest.mark.parametrize("kind", [str, Path])
def test_a_moved_start_of_a_lora_run_is_named_by_changes(kind, tmp_path):
    tuned = {**BLIP2, "fusion": "sentence_prompt"}
    base = Path(whole_file(tmp_path / "base.pth", tuned, 5))
    built = write_run(tmp_path / "run", {**tuned, "load_finetuned": True, "finetuned": str(base)}, lora=LORA)
    moved = base.rename(tmp_path / "moved.pth")
    loaded = load_run(tmp_path / "run", changes={"finetuned": kind(moved)}).model
    assert torch.equal(scores(loaded, make_triplets(3)), scores(built, make_triplets(3)))
    whole_file(base, tuned, 6)  # another file in the old place is not read
    loaded = load_run(tmp_path / "run", changes={"finetuned": kind(moved)}).model
    assert torch.equal(scores(loaded, make_triplets(3)), scores(built, make_triplets(3)))


def test_stage_two_needs_the_file_of_stage_one_no_more(tmp_path):
    clip = whole_file(tmp_path / "clip.pth", {"arch": "clip_cir", **CLIP, "freeze_vit": False}, 5)
    write_run(tmp_path / "one", {"arch": "tscir_mapping", **TSCIR, "pretrained": clip})
    stage_one = tmp_path / "one" / "checkpoint_best.pth"
    built = write_run(tmp_path / "two", {**COMPOSING, "pretrained": clip, "mapping_checkpoint": str(stage_one)})
    stage_one.unlink()
    loaded = load_run(tmp_path / "two").model
    batch = make_triplets(3)
    for mode in ("multimodal", "mapping"):
        assert torch.equal(loaded.encode_query(batch, mode), built.encode_query(batch, mode))


def test_adapters_on_stage_two_are_exported_without_the_file_of_stage_one(tmp_path):
    clip = whole_file(tmp_path / "clip.pth", {"arch": "clip_cir", **CLIP, "freeze_vit": False}, 5)
    stage_one = tmp_path / "one" / "checkpoint_best.pth"
    write_run(tmp_path / "one", {"arch": "tscir_mapping", **TSCIR, "pretrained": clip})
    two = {**COMPOSING, "pretrained": clip, "mapping_checkpoint": str(stage_one)}
    built = write_run(tmp_path / "two", two, lora={"target_modules": ["c_fc"], "r": 2, "also_train": "^adapters"})
    stage_one.unlink()
    main.main(["lora", str(tmp_path / "two"), "--output", str(tmp_path / "merged"), "--merge"])
    merged = read_checkpoint(str(tmp_path / "merged/checkpoint_merged.pth"))["model"]
    assert all(torch.equal(merged[name], tensor) for name, tensor in lora.merged_state(built).items())


def test_a_tower_in_half_precision_is_loaded_in_single_precision_on_a_cpu(tmp_path):
    """A run on a GPU wrote the checkpoint; only its config says fp16."""
    write_run(tmp_path / "run", with_start(tmp_path, SCORING["frozen tower"]))
    path = tmp_path / "run" / "checkpoint_best.pth"
    content = read_checkpoint(str(path))
    content["config"]["model"]["vit_precision"] = "fp16"
    torch.save(content, path)
    loaded = load_run(path)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
    assert scores(loaded.model, make_triplets(2)).shape == (2, 2)
    assert loaded.config.model.vit_precision == "fp16"  # as the run had it


def test_frozen_weights_of_no_file_are_drawn_again_and_said(tmp_path, caplog):
    built = write_run(tmp_path / "run", {**BLIP2, "freeze_vit": True})
    loaded = load_run(tmp_path / "run").model
    assert torch.equal(scores(loaded, make_triplets(3)), scores(built, make_triplets(3)))
    assert "frozen tensors are in no file and were drawn again from run.seed (first: visual_encoder." in caplog.text


@pytest.mark.parametrize("arch", ["blip_vqa_tiny", "blip_caption_tiny"])
def test_lavis_own_tasks_models_load_with_their_types_processors(arch, tmp_path):
    dataset = {"blip_vqa_tiny": "garments_vqa", "blip_caption_tiny": "garments_caption"}[arch]
    model = {"arch": arch, "model_type": "tiny", "image_size": 32, **SMALL_BLIP}
    torch.manual_seed(0)
    built = BaseTask().build_model(SimpleNamespace(model_cfg=OmegaConf.create(model)))
    saved = {
        "model": model,
        "datasets": {dataset: {"splits": ["train", "val"]}},
        "run": {"seed": 1},
    }
    torch.save({"model": built.state_dict(), "config": saved}, tmp_path / "checkpoint_last.pth")
    loaded = load_run(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.state_dict().values(), built.state_dict().values()))
    assert loaded.vis_processors["eval"](Image.new("RGB", (50, 40))).shape == (3, 32, 32)


def test_texts_that_a_run_left_as_they_are_stay_so(tmp_path):
    """Null in the run's section is its choice and must not become the processor of the model's type."""
    write_run(tmp_path / "run", BLIP2)
    path = tmp_path / "run" / "checkpoint_best.pth"
    content = torch.load(path, weights_only=False)
    content["config"]["datasets"]["cirr"]["text_processor"]["eval"] = None
    torch.save(content, path)
    processors = load_run(tmp_path / "run").txt_processors
    assert (processors["eval"]("Red. Now"), processors["train"]("Red. Now")) == ("Red. Now", "red now")


def test_the_best_checkpoint_of_a_folder_is_taken_else_the_last(tmp_path):
    write_run(tmp_path / "run", BLIP2)
    best = tmp_path / "run" / "checkpoint_best.pth"
    other = read_checkpoint(str(best))
    other["model"]["temp"] = torch.tensor(0.5)
    torch.save(other, tmp_path / "run" / "checkpoint_last.pth")
    assert float(load_run(str(tmp_path / "run")).model.temp) != 0.5
    best.unlink()
    assert float(load_run(tmp_path / "run").model.temp) == 0.5


def test_what_no_run_wrote_is_named(tmp_path, small_model):
    with pytest.raises(FileNotFoundError, match=r"is neither a checkpoint nor the folder of a run with one"):
        load_run(tmp_path / "nowhere")
    torch.save({"model": small_model().state_dict()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds no weights with the config of a run; load it into a model by"):
        load_run(tmp_path / "x.pth")
    torch.save({"model": {}, "config": {"model": {"arch": "no_such"}}}, tmp_path / "y.pth")
    with pytest.raises(ValueError, match=r"y\.pth is of model\.arch: 'no_such', which is not registered"):
        load_run(tmp_path / "y.pth")


@pytest.mark.parametrize("model_class", [TscirMapping, TscirComposing])
def test_the_tiny_types_load_by_lavis_own_calls(model_class):
    name = {TscirMapping: "tscir_mapping", TscirComposing: "tscir_composing"}[model_class]
    model, vis_processors, txt_processors = load_model_and_preprocess(name, "tiny", is_eval=True)
    assert type(model) is model_class
    assert type(load_model(name, "tiny")) is model_class
    images = torch.stack([vis_processors["eval"](Image.new("RGB", (30, 90), colour)) for colour in ("red", "blue")])
    query = model.encode_query({"image": images, "text_input": [txt_processors["eval"]("is RED")] * 2})
    assert query.shape == (2, 128)
    assert model.injection_blocks == (1, 2)


def test_importing_the_package_loads_none_of_it():
    code = "import sys, lavis_cir_plugin; print('lavis_cir_plugin.training.run_loading' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == "False"
