"""Towers of newer models and of newer versions of open_clip: attention of its own, MobileCLIP, SigLIP 2's tokenizer."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import open_clip
import pytest
import torch
from packaging.version import Version
from torch import nn

from lavis_cir_plugin.models.open_clip_towers import ImageTower, TextTower, load_clip

if Version(version("open_clip_torch")) < Version("3"):
    pytest.skip("these towers came with open_clip 3", allow_module_level=True)
open_clip.add_model_config(Path(__file__).parents[1] / "open_clip_3")

SENTENCES = ["a photo of *", "a photo of * that is red"]


@pytest.fixture(scope="module")
def gemma_tokenizer(tmp_path_factory) -> str:
    """Return a folder with a tokenizer like SigLIP 2's: pieces with ▁ for blanks, bytes for the rest, <eos> last."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += ["▁", *"abcdefghiopqrtuwx", "▁x", "▁a"]
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(
        models.BPE(numbers, [("▁", "x"), ("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    folder = tmp_path_factory.mktemp("gemma")
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["small_clip_own_attention", "small_mobileclip", "small_siglip2"])
def towers(request, gemma_tokenizer):
    """Return the name, open_clip's own model, and our two towers with its weights."""
    torch.manual_seed(0)
    clip = load_clip(request.param)
    pixels = clip.visual.image_size
    image = ImageTower(clip.visual)
    torch.manual_seed(0)
    text = TextTower(
        load_clip(request.param), request.param, gemma_tokenizer if request.param == "small_siglip2" else None
    )
    return request.param, clip, image, text, pixels[0] if isinstance(pixels, tuple) else pixels


def test_features_are_open_clips(towers):
    _, clip, image, text, pixels = towers
    pictures = torch.randn(2, 3, pixels, pixels)
    torch.testing.assert_close(image(pictures)[:, 0], clip.encode_image(pictures))
    ids = text.tokenize(SENTENCES)
    torch.testing.assert_close(text(ids), clip.encode_text(ids))


def test_a_word_in_place_of_its_own_embedding_changes_nothing_and_another_does(towers):
    _, _, _, text, _ = towers
    ids = text.tokenize(SENTENCES)
    word = text._text.token_embedding.weight[text.placeholder_id].expand(2, -1)
    torch.testing.assert_close(text.compose(ids, word), text(ids))
    assert not torch.allclose(text.compose(ids, torch.randn(2, text.width)), text(ids))


def test_edits_reach_the_feature_and_the_word_has_a_gradient(towers):
    _, _, _, text, _ = towers
    ids, word = text.tokenize(SENTENCES), torch.randn(2, text.width, requires_grad=True)
    plain = text.compose(ids, word)
    same = text.compose(ids, word, [(1, lambda hidden, place, read: hidden)])
    torch.testing.assert_close(same, plain)
    edited = text.compose(ids, word, [(1, lambda hidden, place, read: hidden * 2 + 1)])
    assert not torch.allclose(edited, plain)
    edited.sum().backward()
    assert bool((word.grad.abs().sum(1) > 0).all())


def test_own_attention_is_what_open_clip_builds_here():
    blocks = load_clip("small_clip_own_attention").transformer.resblocks
    assert not any(isinstance(module, nn.MultiheadAttention) for module in blocks.modules())


def test_patches_of_a_tower_with_its_own_attention_are_projected_as_its_feature():
    clip = load_clip("small_clip_own_attention")
    last = {}
    clip.visual.transformer.register_forward_hook(lambda module, inputs, output: last.update(tokens=output))
    pictures = torch.randn(2, 3, 16, 16)
    tokens = ImageTower(clip.visual, with_patches=True)(pictures)
    clip.encode_image(pictures)
    torch.testing.assert_close(tokens[:, 1:], (clip.visual.ln_post(last["tokens"]) @ clip.visual.proj)[:, 1:])


def test_mobileclips_picture_has_no_patches():
    with pytest.raises(ValueError, match=r"an image tower of type FastVit gives no patches; take a ViT"):
        ImageTower(load_clip("small_mobileclip").visual, with_patches=True)


def test_siglip_2_reads_the_last_position_of_sentences_filled_up_to_their_length(gemma_tokenizer):
    text = TextTower(load_clip("small_siglip2"), "small_siglip2", gemma_tokenizer)
    ids = text.tokenize(["a Red, x!", "a x"])
    assert ids.shape == (2, 16)
    first = ["a", "▁", "r", "e", "d", "▁x", "<eos>"]  # canonical: in lower case, without punctuation
    assert text.tokenizer.tokenizer.convert_ids_to_tokens(ids[0].tolist())[:8] == [*first, "<pad>"]
    assert text.padding == 0
    assert text.positions_read(ids).tolist() == [15, 15]


def test_adapters_train_in_towers_with_their_own_attention():
    """LoRA on the projection and the MLP of each block: the first step moves B, and A gets its gradient afterwards."""
    from lavis_cir_plugin.models.clip_cir import ClipCir
    from lavis_cir_plugin.training.lora import LoraSettings, add_adapters

    torch.manual_seed(0)
    model = ClipCir(clip_model="small_clip_own_attention", freeze_vit=False)
    add_adapters(model, LoraSettings(target_modules=("out_proj", "c_fc"), r=2))
    batch = {
        "image": torch.randn(3, 3, 16, 16),
        "target": torch.randn(3, 3, 16, 16),
        "text_input": ["is red", "is blue", "has sleeves"],
        "target_id": torch.arange(3),
    }
    model(batch)["loss"].backward()
    moved = [name for name, weight in model.named_parameters() if "lora_B" in name and weight.grad.abs().sum() > 0]
    assert len(moved) == 2 * (2 + 3)
