"""LoRA adapters: unchanged outputs at first, trained weights, checkpoints, export, merging, and refusals."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TripletsInMemory
from lavis.models.eva_vit import Attention
from lavis.models.med import BertConfig, XBertLMHeadDecoder
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf
from torch import nn

from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.commands import main
from lavis_cir_plugin.core.model_parts import frozen_names
from lavis_cir_plugin.core.settings import constructor_arguments, section_problems
from lavis_cir_plugin.garments import GarmentsConfig, make_garments
from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.methods.wrf4cir.runner import RunnerWrf4Cir
from lavis_cir_plugin.training import config, launcher
from lavis_cir_plugin.training.lora import (
    LoraRun,
    LoraSettings,
    add_adapters,
    build_model,
    check_loss_scale,
    lora_pairs,
    merged_state,
    write_peft_folder,
)
from lavis_cir_plugin.training.training_history import trained_on

pytestmark = pytest.mark.usefixtures("blank_pictures")
CLIP = {"vit_model": "clip_L", "vit_config": {"patch_size": 8, "width": 12, "layers": 2, "heads": 2}}
EVERY_KIND = r".*\.(query|word_embeddings|patch_embed\.proj|qkv|fc1)"  # Linear, Embedding, Conv2d, read by weight


def randomise(model):
    """Give every factor a value, as training would."""
    for pair in lora_pairs(model):
        nn.init.normal_(pair.a, std=0.3)
        nn.init.normal_(pair.b, std=0.3)
    return model


def outputs(model, batch):
    model.eval()
    return torch.cat([model.encode_query(batch), model.encode_target(batch["target"]).flatten(1)], dim=1)


def names_trained(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


class Text(nn.Module):
    """Model around LAVIS's BERT of BLIP, whose output layer is tied to its word embeddings."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bert = XBertLMHeadDecoder(
            BertConfig(
                vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                encoder_width=8, add_cross_attention=True, is_decoder=True, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0, add_type_embeddings=False,
            )
        )  # fmt: skip

    def forward(self, ids):
        image = torch.ones(len(ids), 3, 8)
        return self.bert(input_ids=ids, encoder_hidden_states=image, labels=ids, return_dict=True)


@pytest.mark.parametrize(
    ("changes", "targets"),
    [
        ({}, ["query", "value"]),
        ({"freeze_vit": True}, r"visual_encoder\.blocks.*\.(qkv|proj|fc1)|visual_encoder\.patch_embed\.proj"),
        ({"fusion": "sentence_prompt"}, ["dense", "word_embeddings"]),
        ({**CLIP, "freeze_vit": True}, ["c_fc", "c_proj"]),
        (CLIP, ["out_proj"]),
    ],
)
def test_new_adapters_change_nothing_and_each_is_reached_by_gradients(changes, targets, small_model, triplets):
    """At first s B A = 0, so the loss is bit-equal; gradients also reach towers that run without them while frozen."""
    batch, model = triplets(4), small_model(**changes).train()
    names = set(dict(model.named_parameters()))
    model.requires_grad_(False)  # torch chooses kernels, and so last bits, also by whether a weight is trained
    with torch.no_grad():
        expected = model(batch)["loss"]
        add_adapters(model, LoraSettings(target_modules=targets, r=2, also_train="^query_tokens"))
        assert torch.equal(model.train()(batch)["loss"], expected)
    model(batch)["loss"].backward()
    trained = names_trained(model)
    added = {name.replace(".base_layer", "") for name, _ in model.named_parameters()} - names
    assert trained == added | {"query_tokens"}
    assert len(added) == 2 * len(lora_pairs(model)) > 0
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == trained
    # The factor that starts at zero has a gradient and the other has none; of an Embedding that is A, by rows.
    for pair in lora_pairs(model):
        assert pair.a.grad.any() or pair.b.grad.any(), pair.a_name
    if model.freeze_vit:
        assert not model.visual_encoder.training


def test_an_adapter_acts_as_the_merged_weight_wherever_it_sits(small_model, triplets):
    """This holds also if a tower reads a Linear's weight without calling it; the merged model has the old names."""
    for changes, targets in (({"freeze_vit": True}, EVERY_KIND), (CLIP, ["out_proj", "c_fc"])):
        batch, base = triplets(4), small_model(**changes)
        before = outputs(base, batch)
        model = small_model(**changes)
        add_adapters(model, LoraSettings(target_modules=targets, r=2, lora_alpha=3))
        after = outputs(randomise(model), batch)
        assert not torch.allclose(after, before, atol=1e-3)
        state = merged_state(model)
        assert set(state) == set(base.state_dict())
        base.load_state_dict(state)
        torch.testing.assert_close(outputs(base, batch), after, atol=1e-5, rtol=1e-4)


def test_the_merged_norm_by_hand():
    """W = [[3, 0], [0, 0]], B = [0, 4]^T, A = [0, 1], alpha/r = 2/1: W + 2 B A = [[3, 0], [0, 8]], norm sqrt(73)."""
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert lora_pairs(model) == []
    add_adapters(model, LoraSettings(target_modules=["0"], r=1, lora_alpha=2))
    (pair,) = lora_pairs(model)
    assert (pair.a_name, pair.b_name) == ("0.lora_A.default.weight", "0.lora_B.default.weight")
    assert pair.scaling == 2
    assert pair.merged_norm().item() == pytest.approx(3)  # B = 0: not zero, but W's own
    pair.a.data, pair.b.data = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [4.0]])
    assert pair.merged_norm().item() == pytest.approx(73**0.5)
    assert not pair.merged_norm().requires_grad


def test_the_merged_norm_of_every_kind_of_layer(small_model):
    """The norm equals that of the merged state dictionary; rank-stabilised scaling is alpha / sqrt(r)."""
    model = small_model()
    add_adapters(model, LoraSettings(target_modules=EVERY_KIND, r=4, lora_alpha=6, use_rslora=True))
    state = merged_state(randomise(model))
    for pair in lora_pairs(model):
        assert model.get_parameter(pair.a_name) is pair.a
        assert model.get_parameter(pair.b_name) is pair.b
        assert pair.scaling == 3
        weight = state[pair.a_name.partition(".lora_")[0] + ".weight"]
        torch.testing.assert_close(pair.merged_norm(), weight.norm())


def test_adapters_of_half_precision_weights_are_float32(small_model):
    """With W in bfloat16, A and B are float32, and the output has the type of the linear layer's output."""
    model = small_model(freeze_vit=True)
    model.visual_encoder.to(torch.bfloat16)
    add_adapters(model, LoraSettings(target_modules=["fc1", "qkv"], r=2))
    layer = model.visual_encoder.blocks[0].mlp.fc1
    assert {weight.dtype for name, weight in model.named_parameters() if name in names_trained(model)} == {
        torch.float32
    }
    assert layer(torch.ones(1, 12, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.bfloat16


def test_training_moves_adapters_and_also_train_only_and_only_they_are_saved(tmp_path, small_model, triplets):
    """LAVIS's loop trains and saves under the perturbing runner."""
    model = small_model(freeze_vit=True)
    add_adapters(model, LoraSettings(target_modules=r".*\.(query|value|qkv)", r=2, also_train="_proj"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run = {
        "device": "cpu", "distributed": False, "evaluate": False, "output_dir": str(tmp_path), "min_lr": 1e-3,
        "lr_sched": "linear_warmup_cosine_lr", "init_lr": 1e-2, "weight_decay": 0.05, "max_epoch": 2, "seed": 1,
        "batch_size_train": 4, "batch_size_eval": 4, "num_workers": 0, "train_splits": ["train"], "valid_splits": [],
        "test_splits": [], "wrf": {"gamma": 0.05},
    }  # fmt: skip
    cfg = OmegaConf.create({"run": run})
    cfg = SimpleNamespace(run_cfg=cfg.run, to_dict=lambda: {"run": run, "model": {}, "datasets": {}})
    data = {"triplets": {"train": TripletsInMemory(triplets(8))}}
    runner = RunnerWrf4Cir(cfg=cfg, task=BaseTask(), model=model, datasets=data, job_id="job")
    runner.train()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == names_trained(model)
    path = tmp_path / "job/checkpoint_1.pth"
    saved = torch.load(path, weights_only=True)["model"]
    assert set(saved) - set(dict(model.named_buffers())) == names_trained(model)
    whole = sum(weight.numel() for weight in model.parameters())
    assert sum(saved[name].numel() for name in names_trained(model)) < whole / 5


def test_a_tied_tensor_and_its_neighbours():
    """The tied table keeps one weight and is refused; adapters elsewhere in the same BERT train."""
    model, ids = Text().train(), torch.tensor([[2, 5, 7], [2, 9, 3]])
    with pytest.raises(ValueError, match=r"bert.bert.embeddings.word_embeddings is tied .*would part them"):
        add_adapters(model, LoraSettings(target_modules=["word_embeddings"]))
    expected = model(ids).loss
    add_adapters(model, LoraSettings(target_modules=["query", "value"], r=2))
    assert torch.equal(model(ids).loss, expected)
    model(ids).loss.backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == names_trained(model)
    merged = Text().train()
    merged.load_state_dict(merged_state(randomise(model)))
    torch.testing.assert_close(merged(ids).loss, model(ids).loss)


def test_a_frozen_tied_tensor_may_be_missing_under_both_names(tmp_path):
    task, lora = SimpleNamespace(build_model=lambda cfg: Text()), {"target_modules": ["query", "value"], "r": 2}
    run = OmegaConf.create({"lora": lora, "seed": 1})
    first = randomise(build_model(task, SimpleNamespace(model_cfg={}, run_cfg=run)))
    trained = {name: weight for name, weight in first.state_dict().items() if name not in frozen_names(first)}
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": trained, "config": {"model": {}, "run": {"lora": lora, "seed": 1}}}, path)
    again = build_model(task, SimpleNamespace(model_cfg={"finetuned": str(path)}, run_cfg=run))
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in first.state_dict().items())


def test_checking_a_config_does_not_import_peft(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)  # an import of it raises
    project = OmegaConf.load(PROJECTS / "wrf4cir/demo.yaml")
    project.run.lora = LORA
    OmegaConf.save(project, tmp_path / "p.yaml")
    assert config.read_config(str(tmp_path / "p.yaml"), []).run.lora.r == 4
    assert lora_pairs(nn.Linear(2, 2)) == []


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        ([1], r"run.lora must be a mapping such as \{target_modules: \[query, value\]\}, got \[1\]"),
        ({}, r"run.lora.target_modules is required; set it to a regular expression"),
        ({"target_modules": ["q"], "rank": 4}, r"run.lora.rank is not a known key\. Known: target_modules, r, lora_al"),
        ({"target_modules": ["q"], "lora_alph": 4}, r"did you mean 'lora_alpha'\?"),
        ({"target_modules": ["q"], "modules_to_save": ["x"]}, r"modules_to_save copies .* run.lora.also_train"),
        ({"target_modules": ["q"], "use_dora": True}, r"use_dora makes a merged weight that is not W \+ scaling"),
        ({"target_modules": "(q"}, r"target_modules must be a regular expression .*, got '\(q' \(missing \)"),
        ({"target_modules": [""]}, r"target_modules must be .* got \[\"\"\]"),
        (
            {"target_modules": ["q"], "also_train": "["},
            r"also_train must be .*, got '\[' \(unterminated",
        ),
        ({"target_modules": ["q"], "also_train": ["x"]}, r"also_train must be a regular expression"),
        ({"target_modules": ["q"], "r": 0}, r"run.lora.r must be a whole number >= 1, got 0"),
        ({"target_modules": ["q"], "lora_alpha": "8"}, r"run.lora.lora_alpha must be a number > 0, got '8'"),
        (
            {"target_modules": ["q"], "lora_alpha": float("inf")},
            r"lora_alpha must be a number > 0, got Infinity",
        ),
        ({"target_modules": ["q"], "lora_dropout": 1}, r"run.lora.lora_dropout must be a number >= 0 and < 1, got 1"),
        ({"target_modules": ["q"], "use_rslora": 1}, r"run.lora.use_rslora must be true or false, got 1"),
        ({"target_modules": ["q"], "init_lora_weights": "pissa"}, r"peft's others change the frozen .*, got 'pissa'"),
    ],
)
def test_impossible_settings_are_refused_with_the_config(lora, sentence, tmp_path):
    (problem, *more) = section_problems(LoraRun, "run", {"lora": lora})
    assert not more
    project = OmegaConf.load(PROJECTS / "wrf4cir/demo.yaml")
    project.run.lora = lora
    OmegaConf.save(project, tmp_path / "p.yaml")
    with pytest.raises(config.ConfigError, match=sentence) as refused:
        config.read_config(str(tmp_path / "p.yaml"), [])
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target_modules": ["querry"]}, r"'querry' matches no module of Blip2Cir; .*layer\.0\.attention\.self\.query"),
        ({"target_modules": ["query", "nope"]}, r"'nope' matches no module"),
        ({"target_modules": "query"}, r"'query' matches no module .*self\.query"),
        (
            {"target_modules": ".*attention.*"},
            r"matches \d+ modules that can have no adapter \(first: .*Linear, Conv2d",
        ),
        ({"target_modules": ["query"], "also_train": "prompt"}, r"also_train: 'prompt' matches no parameter"),
        (
            {"target_modules": ["fc1"], "lora_dropout": 0.1},
            r"lora_dropout has no effect on visual_encoder.blocks.0.mlp",
        ),
        ({"target_modules": ["qkv"], "lora_dropout": 0.1}, r"lora_dropout has no effect on visual_encoder.*qkv"),
    ],
)
def test_patterns_that_miss_are_refused_with_what_could_be_meant(settings, sentence, small_model):
    with pytest.raises(ValueError, match=sentence):
        add_adapters(small_model(freeze_vit=True), LoraSettings(**settings))


def test_models_that_would_train_adapters_wrongly_are_refused(small_model):
    with pytest.raises(ValueError, match=r"fc1 is inside 'visual_encoder', which recomputes its activations"):
        add_adapters(small_model(use_grad_checkpoint=True), LoraSettings(target_modules=["fc1"]))
    model = small_model()
    model.visual_encoder.half()
    with pytest.raises(ValueError, match=r"also_train matches \d+ parameters that are not float32 .*float16"):
        add_adapters(model, LoraSettings(target_modules=["query"], also_train="norm|query_tokens"))
    add_adapters(model, LoraSettings(target_modules=["query", "fc1"]))
    check_loss_scale(model, amp=True)
    with pytest.raises(ValueError, match=r"float16 \(first of 1: visual_encoder.*fc1\).* run\.amp: true"):
        check_loss_scale(model, amp=False)
    model = small_model()
    model.model_pairs = [[model.vision_proj, model.text_proj]]
    with pytest.raises(ValueError, match="Blip2Cir keeps momentum copies of its weights"):
        add_adapters(model, LoraSettings(target_modules=["query"]))


def test_dropout_acts_in_training_and_not_in_evaluation(small_model, triplets):
    batch, model = triplets(4), small_model()
    add_adapters(model, LoraSettings(target_modules=["query"], lora_dropout=0.5))
    randomise(model).train()
    assert not torch.equal(model(batch)["loss"], model(batch)["loss"])
    assert torch.equal(outputs(model, batch), outputs(model, batch))


class Tied(nn.Module):
    """A model whose output reads its embeddings, as those of LAVIS that write texts do."""

    def __init__(self):
        super().__init__()
        self.words, self.layer, self.output = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
        self.output.weight = self.words.weight

    def forward(self, words):
        return self.output(self.layer(self.words(words)))


def test_a_tied_tensor_that_is_trained_beside_adapters_reaches_peft(tmp_path):
    from peft import PeftModel

    model, lora = Tied(), LoraSettings(target_modules=["layer"], also_train="words", init_lora_weights=False)
    add_adapters(model, lora)
    write_peft_folder(model, lora, tmp_path)
    plain = PeftModel.from_pretrained(copy_of_frozen(model), str(tmp_path))
    words = torch.arange(5)
    assert torch.equal(plain(words), model(words))


def copy_of_frozen(model):
    """Return a model with the frozen weights of another one and trained weights of its own."""
    base = Tied()
    base.layer.load_state_dict(model.layer.base_layer.state_dict())
    return base


# From one run to the next: all of these read the checkpoint of one short run.

LORA = {"target_modules": r".*\.(query|value|fc1)", "r": 4, "lora_alpha": 16, "also_train": "_proj|query_tokens"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a factory of project files over a small world, and the folder of one run."""
    folder = tmp_path_factory.mktemp("lora")
    sizes = {"train_triplets": 16, "train_images": 24, "val_queries": 6, "val_images": 10, "test_queries": 3}
    world = make_garments(folder / "cache", GarmentsConfig(**sizes, test_images=6, image_width=48, image_height=60))

    def project(**changes):
        cfg = OmegaConf.load(PROJECTS / "wrf4cir/demo.yaml")
        cfg.datasets.fashioniq = {
            "build_info": {"root": str(world)},
            "vis_processor": {stage: {"name": "target_pad", "image_size": 64} for stage in ("train", "eval")},
        }
        cfg.run.update({"max_epoch": 1, "batch_size_train": 8, "output_dir": str(folder / "out"), "lora": LORA})
        cfg.run.wrf.warmup_epochs = 0
        cfg.model.freeze_vit = True
        for key, value in changes.items():
            OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
        path = folder / "project.yaml"
        OmegaConf.save(cfg, path)
        return str(path)

    launcher.main("train", ["--cfg-path", project()])
    (run,) = (folder / "out").iterdir()
    return SimpleNamespace(project=project, run=run, best=run / "checkpoint_best.pth", folder=folder)


def metrics_of(folder):
    return json.loads(next(folder.rglob("metrics.json")).read_text())["metrics"]


def evaluate(trained, tmp_path, checkpoint, **changes):
    options = ["model.load_finetuned=true", f"model.finetuned={checkpoint}", f"run.output_dir={tmp_path / 'eval'}"]
    launcher.main("evaluate", ["--cfg-path", trained.project(**changes), "--options", *options])
    return metrics_of(tmp_path / "eval")


def refused(call, *arguments):
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    return str(stopped.value)


def rebuilt(best=None, lora=None, seed=42, **changes):
    """Build the run's base model, or with a checkpoint the trained model."""
    run, model = OmegaConf.create({"seed": seed}), {"arch": "blip2_cir", "load_finetuned": bool(best)}
    defaults = OmegaConf.load(Blip2Cir.PRETRAINED_MODEL_CONFIG_DICT["tiny"]).model
    run.lora = lora
    section = OmegaConf.merge(
        defaults, {"freeze_vit": True, **changes}, model, {"finetuned": str(best) if best else None}
    )
    return build_model(BaseTask(), SimpleNamespace(model_cfg=section, run_cfg=run))


def test_a_run_evaluates_its_own_checkpoint_to_the_same_metrics(trained, tmp_path):
    assert evaluate(trained, tmp_path, trained.best) == metrics_of(trained.run)


def test_the_merged_checkpoint_needs_no_lora(trained, tmp_path, capsys):
    main.main(["lora", str(trained.run), "--output", str(tmp_path / "merged"), "--merge"])
    assert "checkpoint_merged.pth" in capsys.readouterr().out
    merged = tmp_path / "merged/checkpoint_merged.pth"
    assert trained_on({"pretrained": str(merged)}, {}) == {"fashioniq"}
    batch = {"image": torch.randn(3, 3, 64, 64), "target": torch.randn(3, 3, 64, 64), "text_input": ["is red"] * 3}
    whole, adapted = rebuilt(merged), rebuilt(trained.best, LORA)
    assert not any("lora" in name for name, _ in whole.named_parameters())
    torch.testing.assert_close(outputs(whole, batch), outputs(adapted, batch), atol=1e-5, rtol=1e-4)
    assert evaluate(trained, tmp_path, merged, run__lora=None) == metrics_of(trained.run)


def test_plain_peft_loads_the_exported_folder(trained, tmp_path):
    """peft loads them into the base model, drawn again from its seed, with heads and prompts that peft cannot name."""
    from peft import PeftModel

    main.main(["lora", str(trained.best), "--output", str(tmp_path / "adapter")])
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    torch.manual_seed(42)
    base = Blip2Cir(**tiny_arguments())
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    batch = {"image": torch.randn(3, 3, 64, 64), "target": torch.randn(3, 3, 64, 64), "text_input": ["is red"] * 3}
    assert torch.equal(outputs(plain.base_model.model, batch), outputs(rebuilt(trained.best, LORA), batch))


def tiny_arguments():
    section = OmegaConf.load(Blip2Cir.PRETRAINED_MODEL_CONFIG_DICT["tiny"]).model
    return {**constructor_arguments(Blip2Cir, section), "freeze_vit": True}


def test_adapters_on_a_finetuned_model_find_it_again(trained, tmp_path):
    """A second run starts from the first one's checkpoint: its adapters go on, over equal frozen weights."""
    content = torch.load(trained.best, weights_only=True)
    base = tmp_path / "base.pth"
    state = rebuilt().state_dict()
    torch.save(
        {"model": {name: tensor + 0.01 if tensor.is_floating_point() else tensor for name, tensor in state.items()}},
        base,
    )
    for origin, name in ((str(base), "on_base.pth"), (str(tmp_path / "on_base.pth"), "continued.pth")):
        content["config"]["model"].update(load_finetuned=True, finetuned=origin)
        torch.save(content, tmp_path / name)
        model = rebuilt(tmp_path / name, LORA)
        weight = model.Qformer["bert"].embeddings.word_embeddings.weight
        assert torch.equal(weight, torch.load(base)["model"]["Qformer.bert.embeddings.word_embeddings.weight"])
        assert torch.equal(model.text_proj.weight, content["model"]["text_proj.weight"])


def test_another_seed_finds_the_same_base_and_another_base_is_told(trained, caplog):
    states = [rebuilt(trained.best, LORA, seed=seed).state_dict() for seed in (42, 1)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not caplog.messages
    rebuilt(trained.best, LORA, vit_pretrained="elsewhere.pth")
    assert "adapters were trained on model.vit_pretrained: None, now: elsewhere.pth" in caplog.text


def test_a_lora_checkpoint_that_does_not_fit_is_refused(trained, tmp_path):
    best = trained.best
    with pytest.raises(ValueError, match=r"holds LoRA adapters; set run.lora as .*\"lora_alpha\": 16.*lavis-cir lora"):
        rebuilt(best)
    with pytest.raises(ValueError, match=r"run.lora.lora_alpha: 8 differs from 16, with which model.finetuned"):
        rebuilt(best, {**LORA, "lora_alpha": 8})
    rebuilt(best, {**LORA, "lora_dropout": 0.0, "init_lora_weights": "gaussian"})
    content = torch.load(best, weights_only=True)
    del content["model"]["query_tokens"]
    torch.save(content, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"1 trained tensors are missing \(first: query_tokens\)"):
        rebuilt(tmp_path / "cut.pth", LORA)
    torch.save({"model": content["model"]}, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="adapters without the run's config"):
        rebuilt(tmp_path / "bare.pth", LORA)


def test_exports_that_would_mislead_are_refused(trained, tmp_path, small_model):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    sentence = refused(main.main, ["lora", str(trained.run), "--output", str(tmp_path / "full")])
    assert sentence.endswith("full exists and is not an empty folder; choose another.")
    sentence = refused(main.main, ["lora", str(tmp_path), "--output", str(tmp_path / "x")])
    assert "is neither a checkpoint nor the folder of a run with one (checkpoint_best.pth, " in sentence
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "other.pth")
    sentence = refused(main.main, ["lora", str(tmp_path / "other.pth"), "--output", str(tmp_path / "x")])
    assert "holds no LoRA adapters" in sentence

    content = torch.load(trained.best, weights_only=True)
    lora = {"target_modules": ["qkv"], "r": 2}
    model = rebuilt(lora=lora)
    assert isinstance(model.visual_encoder.blocks[0].attn, Attention)
    content["config"]["run"]["lora"] = lora
    content["model"] = {name: tensor for name, tensor in model.state_dict().items() if name in names_trained(model)}
    torch.save(content, tmp_path / "qkv.pth")
    sentence = refused(main.main, ["lora", str(tmp_path / "qkv.pth"), "--output", str(tmp_path / "x")])
    assert "plain peft would ignore 3 of the adapters" in sentence
    assert not (tmp_path / "x").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "other.pth", "qkv.pth"]


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("direction", ["gradient", "random"])
def test_the_perturbation_takes_the_radius_of_the_merged_weights(scope, direction, small_model, triplets):
    """At B = 0 a radius relative to each factor would leave every adapter where it is: delta_B = gamma ||B|| = 0 and
    g_A = 0. Scaled by W + s B A, the merged weight moves by gamma ||W||, to first order, and here exactly (g_A = 0)."""
    model = small_model(freeze_vit=True).train()
    add_adapters(model, LoraSettings(target_modules=r"Qformer.*\.(query|value)", r=2, lora_alpha=6))
    optimizer = PerturbingOptimizer(
        torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1),
        model,
        WeightPerturbation(gamma=0.1, scope=scope, direction=direction),
    )
    steps = []
    stock = optimizer.ascent
    optimizer.ascent = lambda d: steps.append(stock(d).steps()) or stock(d)
    clean = model(dict(triplets(3)))["loss"]
    perturbed = optimizer.perturb(model)({**triplets(3), "epoch": 0})["loss"]
    assert perturbed != clean
    if direction == "gradient":
        assert perturbed > clean
    pairs, names = lora_pairs(model), list(optimizer.weights)
    assert 2 * len(pairs) == len(names)
    changes, sizes = [], []
    for pair in pairs:
        a_step, b_step = (steps[0][names.index(name)] for name in (pair.a_name, pair.b_name))
        changes.append(3 * (b_step @ pair.a + pair.b @ a_step).norm().detach())
        sizes.append(pair.merged_norm())
    changes, sizes = torch.stack(changes), torch.stack(sizes)
    if scope == "global":
        changes, sizes = changes.norm(), sizes.norm()
    torch.testing.assert_close(changes, 0.1 * sizes)


def test_one_factor_without_the_other_is_refused(small_model):
    model = small_model(freeze_vit=True)
    add_adapters(model, LoraSettings(target_modules=r"Qformer.*\.query", r=2))
    for values, message in (
        ({"tensors": "lora_A"}, r"chooses only one of .*lora_A.* and .*lora_B.*choose both or neither"),
        ({"radius": "elementwise"}, r"elementwise is not defined for LoRA's factors"),
    ):
        with pytest.raises(ValueError, match=message):
            PerturbingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, WeightPerturbation(**values))


def test_the_frozen_layers_below_the_first_adapter_run_once(small_model, triplets):
    model = small_model(freeze_vit=True).train()
    add_adapters(model, LoraSettings(target_modules=r"Qformer.*\.query", r=2))
    runs = []
    inner = model.visual_encoder.blocks[0].mlp.fc1
    forward = inner.forward
    inner.forward = lambda x: runs.append(1) or forward(x)
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = PerturbingOptimizer(torch.optim.SGD(trained, lr=0.1), model, WeightPerturbation(gamma=0.1))
    optimizer.perturb(model)({**triplets(3), "epoch": 0})
    assert len(runs) == 1
