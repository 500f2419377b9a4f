"""TSCIR's stages run through the launcher: chained, perturbed, with LoRA, cached, resumed, evaluated."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

from lavis_cir_plugin import load_run
from lavis_cir_plugin.core.checkpoints import read_checkpoint
from lavis_cir_plugin.data.benchmark_datasets import cache_root
from lavis_cir_plugin.garments.questions import WORLD, QuestionGarments
from lavis_cir_plugin.methods.tscir.composing import TscirComposing
from lavis_cir_plugin.methods.tscir.mapping import TscirMapping
from lavis_cir_plugin.training import launcher

pytestmark = pytest.mark.usefixtures("blank_pictures")
PICTURES = {"train_images": 24, "val_images": 2, "captions_per_image": 2, "image_width": 48, "image_height": 60}
SMALL_MODEL = {"clip_model": "small_clip", "image_size": 16, "injection_blocks": [1], "hidden_width": 8}
RUN = {
    "task": "composed_retrieval", "max_epoch": 2, "batch_size_train": 8, "init_lr": 1e-3, "warmup_steps": 2,
    "num_workers": 0, "device": "cpu", "train_splits": ["train"],
}  # fmt: skip
VAL = {
    "fashioniq": {"type": "garments", "splits": ["val"], "garments": {
        "train_triplets": 4, "train_images": 8, "val_queries": 4, "val_images": 8, "test_queries": 2, "test_images": 4,
        "image_width": 48, "image_height": 60,
    }},
}  # fmt: skip


def processors(**train):
    return {
        "train": {"name": "target_pad", "image_size": 16, **train},
        "eval": {"name": "target_pad", "image_size": 16},
    }


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def triplets():
    """Write a folder of 16 training triplets among the captioned pictures, in the format of the data set triplets."""
    root = WORLD.make(cache_root(), QuestionGarments(**PICTURES))
    records = json.loads((root / "caption_train.json").read_text())
    captions = {record["image"]: record["caption"] for record in records}
    names = list(captions)
    lines = [
        {"reference": a, "text": f"is {captions[b]}", "target": b, "reference_caption": captions[a]}
        for a, b in zip(names[:16], names[1:17])
    ]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def run(folder, model, datasets, command="train", **changes):
    """Run a project with these sections and return the folder of its only run."""
    cfg = {"model": {"model_type": "tiny", **model}, "datasets": datasets, "run": {**RUN, "output_dir": str(folder)}}
    cfg["run"].update(changes)
    path = folder.parent / f"{folder.name}.yaml"
    OmegaConf.save(OmegaConf.create(cfg), path)
    launcher.main(command, ["--cfg-path", str(path)])
    (made,) = folder.iterdir()
    return made


CAPTIONS = {"garments_caption": {"splits": ["train"], "garments": PICTURES, "vis_processor": processors()}}
TWO_VIEWS = {
    "garments_caption": {**CAPTIONS["garments_caption"], "vis_processor": processors(name="clip_two_views")},
}  # fmt: skip


def triplet_data(root):
    return {"triplets": {"splits": ["train"], "build_info": {"root": str(root)}, "vis_processor": processors()}}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Return a checkpoint of clip_cir that was trained on captions."""
    model = {"arch": "clip_cir", "clip_model": "small_clip", "image_size": 16, "freeze_vit": False}
    return str(run(tmp_path_factory.mktemp("clip") / "out", model, CAPTIONS) / "checkpoint_last.pth")


@pytest.fixture(scope="module")
def mapping(tmp_path_factory, clip):
    """Return a checkpoint of stage I."""
    model = {"arch": "tscir_mapping", **SMALL_MODEL, "pretrained": clip}
    return str(run(tmp_path_factory.mktemp("mapping") / "out", model, TWO_VIEWS) / "checkpoint_last.pth")


def composing(clip, mapping, **changes):
    model = {"arch": "tscir_composing", **SMALL_MODEL, "pretrained": clip, "adapter_blocks": [0, 2]}
    return {**model, "mapping_checkpoint": mapping, "adapter_rank": 4, **changes}


def state_of(folder):
    return read_checkpoint(str(folder / "checkpoint_last.pth"))["model"]


def test_both_stages_then_a_benchmark_and_the_checkpoint_again(tmp_path, clip, mapping, triplets):
    """Stage II ends with a table of all baselines; its checkpoint and CLIP alone give the same table again."""
    data = {**triplet_data(triplets), **VAL}
    data["fashioniq"]["vis_processor"] = processors()
    made = run(tmp_path / "out", composing(clip, mapping), data, test_splits=["val"])
    metrics = json.loads((made / "val/metrics.json").read_text())["metrics"]
    rows = {"stage I + II", "stage I alone", "image only", "text only", "image + text", "random (expected)"}
    assert set(metrics) == rows
    assert (made / "val/attention_dress.png").is_file()
    trained = composing(clip, None, load_finetuned=True, finetuned=str(made / "checkpoint_last.pth"))
    again = run(tmp_path / "again", trained, VAL, "evaluate", test_splits=["val"], train_splits=[])
    assert json.loads((again / "val/metrics.json").read_text())["metrics"] == metrics
    loaded = load_run(made)
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in state_of(made).items())
    assert loaded.vis_processors["eval"].transform.transforms[0].size == 16


@pytest.mark.parametrize("stage", ["mapping", "composing"])
def test_weight_perturbation_and_lora_apply_to_both_stages(stage, tmp_path, clip, mapping, triplets):
    lora = {"target_modules": r"text_tower\.clip\.transformer\.resblocks\.\d\.mlp\.c_fc", "r": 2, "lora_alpha": 4}
    lora["also_train"] = "^mapping|^injections|^adapters"
    model = (
        composing(clip, mapping)
        if stage == "composing"
        else {"arch": "tscir_mapping", **SMALL_MODEL, "pretrained": clip}
    )
    data = triplet_data(triplets) if stage == "composing" else TWO_VIEWS
    changes = {"runner": "runner_wrf4cir", "wrf": {"gamma": 0.01, "warmup_epochs": 1}, "lora": lora}
    made = run(tmp_path / "out", model, data, **changes)
    saved = read_checkpoint(str(made / "checkpoint_last.pth"))
    assert saved["optimizer"]["wrf"]["steps"]["perturbed"] > 0
    assert sum("lora_B" in name for name in saved["model"]) == 3
    assert any(float(t.abs().max()) > 0 for name, t in saved["model"].items() if "lora_B" in name)
    trained = {"mapping": "mapping.word.0.weight", "composing": "adapters.0.up"}[stage]
    assert trained in saved["model"]


def test_cached_features_train_the_same_adapters(tmp_path, clip, mapping, triplets):
    """The frozen tower runs once per picture, and the weights equal those without a cache up to rounding."""
    plain = run(tmp_path / "plain", composing(clip, mapping), triplet_data(triplets))
    cached = run(
        tmp_path / "cached", composing(clip, mapping), triplet_data(triplets), feature_cache=str(tmp_path / "f")
    )
    for name, tensor in state_of(plain).items():
        torch.testing.assert_close(state_of(cached)[name], tensor, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("stage", ["mapping", "composing"])
def test_an_interrupted_stage_ends_as_if_it_had_not_been(stage, tmp_path, monkeypatch, clip, mapping, triplets):
    """Dropout, random views and batch statistics go on, so the result is bit-equal."""
    if stage == "mapping":
        model, data, model_class = {"arch": "tscir_mapping", **SMALL_MODEL, "pretrained": clip}, TWO_VIEWS, TscirMapping
    else:
        model, data, model_class = composing(clip, mapping), triplet_data(triplets), TscirComposing
    changes = {"save_every": 1, "resume_ckpt_path": "auto"}
    whole = run(tmp_path / "whole", model, data, **changes)
    forward, calls = model_class.forward, []

    def interrupted(self, samples):
        calls.append(samples)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(model_class, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", model, data, **changes)
    resumed = run(tmp_path / "killed", model, data, **changes)
    expected, found = state_of(whole), state_of(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("lora", [None, {"target_modules": ["c_fc"], "r": 2, "also_train": "^mapping|^injections"}])
def test_a_run_does_not_go_on_from_other_weights_of_clip(lora, tmp_path, clip):
    """Another file of the same name replaced the weights between the run and its resumption."""
    weights = tmp_path / "clip.pth"
    content = read_checkpoint(clip)
    torch.save(content, weights)
    model = {"arch": "tscir_mapping", **SMALL_MODEL, "pretrained": str(weights)}
    changes = {"save_every": 1, **({"lora": lora} if lora else {})}
    made = run(tmp_path / "out", model, CAPTIONS, **changes)
    content["model"]["text_tower.clip.ln_final.bias"] += 0.1
    torch.save(content, weights)
    with pytest.raises(SystemExit, match=r"was trained on other weights of CLIP than model\.clip_model and model\.pre"):
        run(tmp_path / "out", model, CAPTIONS, **changes, resume_ckpt_path=str(made / "checkpoint_last.pth"))


def test_half_precision_trains_stably(clip, mapping, triplets):
    """Under bfloat16 autocast, as on a GPU with run.amp, losses are near those of float32 and gradients finite."""
    for model_class, extra in ((TscirMapping, {}), (TscirComposing, {"mapping_checkpoint": mapping})):
        torch.manual_seed(0)
        settings = {**SMALL_MODEL, "pretrained": clip, **extra}
        if model_class is TscirComposing:
            settings.update(adapter_blocks=[0, 2], adapter_rank=4)
        model = model_class(**settings).eval()
        batch = {"image": torch.randn(4, 3, 16, 16), "text_input": ["a red dress", "a top", "a blue shirt", "a dress"]}
        if model_class is TscirComposing:
            batch.update(target=torch.randn(4, 3, 16, 16), reference_caption=batch["text_input"])
        full = model(batch)["loss"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(batch)["loss"]
        assert half.dtype == torch.float32
        assert float(half) == pytest.approx(float(full), rel=0.1)
        half.backward()
        gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
        assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


def test_a_stage_two_without_stage_one_or_clip_does_not_start(tmp_path, clip, mapping, triplets, capsys):
    for model, problem in (
        (composing(clip, None), "model.mapping_checkpoint is empty"),
        (composing(None, mapping), "model.pretrained is empty"),
        (composing(clip, clip), "was not trained by a model of TSCIR"),
        (composing(clip, mapping, injection_heads=4), "was trained with model.injection_heads: 8, here it is 4"),
    ):
        with pytest.raises(SystemExit, match=problem):
            run(tmp_path / "out", model, triplet_data(triplets))
