"""BLIP-2's weights in the hub's layout: outputs equal transformers' model; names, shapes at full size, refusals."""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
from hub_blip2 import (
    assert_same_outputs,
    hub_shapes,
    our_model,
    small_config,
    small_state,
    transformers_model,
)
from safetensors.torch import load_file, save_file

from lavis_cir_plugin import CONFIGS
from lavis_cir_plugin.methods.blip2_cir import hub_weights
from lavis_cir_plugin.methods.blip2_cir.hub_weights import (
    EXTRA_FILE,
    hub_config,
    read_blip2_weights,
    to_hub_names,
    to_lavis_names,
)
from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir


@pytest.mark.parametrize("shards", ["1GB", "4KB"])
def test_a_folder_that_transformers_wrote_gives_its_outputs(shards, tmp_path):
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors").exists() == (shards == "1GB")
    assert_same_outputs(theirs, our_model(tmp_path))


def test_the_file_itself_and_the_older_format_are_read_too(tmp_path):
    theirs = transformers_model()
    theirs.save_pretrained(tmp_path)
    assert_same_outputs(theirs, our_model(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same_outputs(theirs, our_model(tmp_path))


def test_the_eps_of_ln_vision_is_all_that_differs(tmp_path):
    """Small weights make tokens of a variance near eps; with LAVIS's eps in transformers' model, both are equal."""
    theirs = transformers_model(tower_scale=0.002)
    theirs.save_pretrained(tmp_path)
    ours = our_model(tmp_path)
    with pytest.raises(AssertionError):
        assert_same_outputs(theirs, ours)
    theirs.vision_model.post_layernorm.eps = 1e-5
    assert_same_outputs(theirs, ours)


def test_what_the_layout_lacks_starts_anew_and_is_said(tmp_path, caplog):
    transformers_model().save_pretrained(tmp_path)
    with caplog.at_level("INFO"):
        model = our_model(tmp_path, fusion="sentence_prompt")
    assert model.temp.item() == pytest.approx(0.07)
    assert "eps of 1e-5" in caplog.text
    assert "temperature" in caplog.text


def full_size(pixels: int) -> dict[str, tuple[int, ...]]:
    return hub_shapes((1408, 39, 6144, 14), (768, 12, 3072, 0), (pixels // 14) ** 2, 30523, 512, 32, 256)


@pytest.fixture
def full_size_model(tmp_path):
    """Return a factory of ``blip2_cir`` in the size of the published checkpoints, on the meta device."""
    vocabulary = tmp_path / "vocab.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary.write_text("\n".join([*words, *(f"word{number}" for number in range(30522 - len(words)))]))

    def make(pixels: int) -> Blip2Cir:
        # LAVIS's tower reads numbers out of a tensor while it is built.
        with torch.device("meta"), mock.patch.object(torch, "linspace", partial(torch.linspace, device="cpu")):
            return Blip2Cir(image_size=pixels, tokenizer=str(vocabulary), vit_precision="fp32")

    return make


@pytest.mark.parametrize("pixels", [224, 364])
def test_names_and_shapes_at_full_size_match_one_to_one(pixels, full_size_model):
    state = {name: torch.empty(shape, device="meta") for name, shape in full_size(pixels).items()}
    named = {
        name: tuple(tensor.shape) for name, tensor in to_lavis_names(state, "hub").items() if "itm_head" not in name
    }
    model = full_size_model(pixels)
    own = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name != "temp" and not name.endswith("position_ids")
    }
    assert named == own
    back = {name: tuple(tensor.shape) for name, tensor in to_hub_names(model.state_dict()).items()}
    assert back == {name: shape for name, shape in full_size(pixels).items() if "itm_head" not in name}


def test_our_config_at_full_size_builds_transformers_model_of_these_names_and_shapes(full_size_model):
    theirs = transformers_model()
    with torch.device("meta"):
        built = type(theirs)(type(theirs.config)(**hub_config(full_size_model(224))))
    assert {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} == full_size(224)


def test_every_tensor_arrives_under_its_own_name(tmp_path):
    """The tower's attention, computed from the hub's names by the equations, and a few tensors prove it by hand."""
    state = small_state()
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(small_config()))
    model = our_model(tmp_path)
    own = model.state_dict()
    assert torch.equal(own["visual_encoder.cls_token"], state["vision_model.embeddings.class_embedding"])
    assert torch.equal(own["ln_vision.bias"], state["vision_model.post_layernorm.bias"])
    crossing = "encoder.layer.2.crossattention"
    assert torch.equal(
        own[f"Qformer.bert.{crossing}.self.key.weight"], state[f"qformer.{crossing}.attention.key.weight"]
    )
    tokens = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(3))
    name = "vision_model.encoder.layers.1.self_attn"
    qkv = (tokens @ state[f"{name}.qkv.weight"].T + state[f"{name}.qkv.bias"])[0].view(5, 3, 2, 6)
    query, key, value = (part.transpose(0, 1) for part in qkv.unbind(1))
    mixed = (torch.softmax(query @ key.transpose(1, 2) / math.sqrt(6), dim=-1) @ value).transpose(0, 1).reshape(5, 12)
    expected = mixed @ state[f"{name}.projection.weight"].T + state[f"{name}.projection.bias"]
    with torch.no_grad():
        found = model.visual_encoder.blocks[1].attn(tokens)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_there_and_back_changes_only_the_keys_bias():
    state = small_state()
    back = to_hub_names(to_lavis_names(state, "hub"))
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        if name.endswith("qkv.bias"):
            query, key, value = back[name].chunk(3)
            assert torch.equal(query, tensor[:12])
            assert not key.any()
            assert torch.equal(value, tensor[24:])
        else:
            assert torch.equal(back[name], tensor)


def write(folder, state, config=None) -> None:
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or small_config()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("vision_model.post_layernorm.bias"), "1 missing keys .first: ln_vision.bias"),
        (lambda state: state.update({"language_projection.weight": torch.ones(1)}), "language_projection.weight"),
        (lambda state: state.update({"qformer.extra": torch.ones(1)}), "qformer.extra.; take weights of"),
        (lambda state: state.update({"query_tokens": torch.ones(1, 4, 8)}), r"query_tokens is \(1, 4, 8\) there"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, tmp_path):
    state = small_state()
    change(state)
    write(tmp_path, state)
    with pytest.raises(ValueError, match=message):
        our_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, nullcontext()),
        (small_config(num_attention_heads=4), "num_attention_heads: 4 and this model has 2; set model.vit_config.num"),
        ({"vision_config": {"num_attention_heads": 2}}, "qformer_config.num_attention_heads: 12 and this model has 2"),
        (small_config(hidden_act="quick_gelu"), "hidden_act: quick_gelu and this model has gelu; take other weights"),
    ],
)
def test_settings_that_no_tensor_shows_are_compared(config, message, tmp_path):
    """Without a config.json nothing is compared; keys that the file lacks have transformers' defaults."""
    write(tmp_path, small_state())
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        (tmp_path / "config.json").unlink()
    with message if not isinstance(message, str) else pytest.raises(ValueError, match=message):
        our_model(tmp_path)


def test_another_image_tower_is_refused(tmp_path):
    write(tmp_path, small_state())
    tower = {"patch_size": 8, "width": 8, "layers": 1, "heads": 2}
    with pytest.raises(ValueError, match=r"EVA-CLIP's image tower alone and model\.vit_model is clip_L"):
        our_model(tmp_path, vit_model="clip_L", vit_config=tower)


def test_a_hub_name_is_downloaded(tmp_path):
    write(tmp_path, small_state())
    with mock.patch("huggingface_hub.snapshot_download", return_value=str(tmp_path)) as download:
        model = our_model("Salesforce/blip2-itm-vit-g")
    assert download.call_args.args == ("Salesforce/blip2-itm-vit-g",)
    assert torch.equal(model.query_tokens, load_file(tmp_path / "model.safetensors")["query_tokens"])


def test_an_exported_model_comes_back_whole_from_the_hub(tmp_path):
    """Only the files that the patterns name arrive; without the file beside the weights the prompt would start anew."""
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    write(there, small_state())
    extra = {"temp": torch.tensor(0.5), "prompt_tokens": torch.randn(1, 3, 8)}
    save_file(extra, there / EXTRA_FILE)

    def download(name, allow_patterns):
        for path in there.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, here)
        return str(here)

    with mock.patch("huggingface_hub.snapshot_download", side_effect=download):
        model = our_model("owner/mine", fusion="sentence_prompt")
    assert model.temp.item() == 0.5
    assert torch.equal(model.prompt_tokens, extra["prompt_tokens"])


def test_without_a_network_each_source_names_the_others():
    url = "https://storage.example.invalid/models/BLIP2/blip2_finetune_coco.pth"
    refused = mock.patch("torch.hub.download_url_to_file", side_effect=OSError("HTTP Error 403"))
    with refused, pytest.raises(FileNotFoundError, match=r"403.*hub has the same weights as Salesforce/.*-g-coco"):
        read_blip2_weights(url)
    with refused, pytest.raises(FileNotFoundError, match=r"local file\.$"):
        read_blip2_weights("https://storage.example.invalid/models/BLIP2/blip2_pretrained_vitL.pth")
    offline = mock.patch("huggingface_hub.snapshot_download", side_effect=ConnectionError("no network"))
    with offline, pytest.raises(FileNotFoundError, match=r"no network.*of LAVIS: .*blip2_pretrained\.pth"):
        read_blip2_weights("Salesforce/blip2-itm-vit-g")


def test_the_files_of_lavis_that_the_hub_has_are_those_of_our_types():
    configs = "".join(path.read_text() for path in (CONFIGS / "models").glob("blip2_cir_*.yaml"))
    assert all(f"/{file}\n" in configs for file in hub_weights.HUB_NAMES)
