"""open_clip's towers give open_clip's own numbers if nothing is edited, and weights of all kinds load."""

from __future__ import annotations

import copy
import sys

import numpy as np
import open_clip
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import nn

from lavis_cir_plugin.core.checkpoints import count_blocks_in
from lavis_cir_plugin.models import open_clip_towers
from lavis_cir_plugin.models.open_clip_towers import (
    CLIP_MEAN_AND_STD,
    PIXELS,
    ImageTower,
    TextTower,
    check_clip_model,
    load_clip,
    pixel_normalisation,
)

SENTENCES = ["a photo of *", "a photo of * that is red", "a photo of * with long sleeves and x"]


@pytest.fixture(params=["small_clip", "small_siglip"])
def kind(request):
    return request.param


@pytest.fixture
def clip(kind):
    torch.manual_seed(0)
    return load_clip(kind)


@pytest.fixture
def tower(kind, clip, siglip_tokenizer):
    return TextTower(copy.deepcopy(clip), kind, siglip_tokenizer if kind == "small_siglip" else None)


def pictures(count=3):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def words(count=3):
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(2))


def test_pictures_are_normalised_as_open_clip_says_of_openais_weights():
    assert open_clip_towers.CLIP_MEAN_AND_STD == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def test_without_open_clip_its_models_are_refused_with_what_to_install(monkeypatch):
    open_clip_towers.open_clip_library.cache_clear()
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"the library open_clip, which is not installed; run pip install open_clip_"):
        load_clip("ViT-B-32-quickgelu")


def test_row_0_is_open_clips_image_feature_and_the_rest_its_patches_in_the_same_space(clip):
    last = {}
    clip.visual.transformer.register_forward_hook(lambda module, inputs, output: last.update(tokens=output))
    tokens = ImageTower(clip.visual, with_patches=True)(pictures())
    assert tokens.shape == (3, 1 + 16, 8)
    torch.testing.assert_close(tokens[:, 0], clip.encode_image(pictures()))
    clip.encode_image(pictures())
    assert isinstance(clip.visual, VisionTransformer)
    torch.testing.assert_close(tokens[:, 1:], (clip.visual.ln_post(last["tokens"]) @ clip.visual.proj)[:, 1:])


def test_a_size_that_is_not_the_models_own_is_said(caplog):
    load_clip("small_clip", None, 16)
    assert not caplog.text
    load_clip("small_clip", None, 32)
    assert "model.image_size: small_clip is trained on pictures of 16 pixels and gets 32" in caplog.text


def test_without_patches_there_is_one_row(clip):
    tower = ImageTower(clip.visual)
    assert tower.grid == 0
    torch.testing.assert_close(tower(pictures())[:, 0], clip.encode_image(pictures()))


def test_pictures_normalised_for_clip_reach_a_tower_trained_with_other_means_as_it_knows_them(clip):
    raw = torch.rand(2, 3, 16, 16)

    def normalised(mean, std):
        return (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    tower = ImageTower(clip.visual, PIXELS["inception"])
    found = tower(normalised(*CLIP_MEAN_AND_STD))[:, 0]
    torch.testing.assert_close(found, clip.encode_image(normalised(*PIXELS["inception"])), atol=1e-5, rtol=1e-4)


def test_pixels_follow_the_tag_and_are_asked_for_where_a_file_cannot_say():
    assert pixel_normalisation("ViT-B-16-SigLIP", "any/file") == PIXELS["inception"]
    assert pixel_normalisation("ViT-L-14", "laion2b_s32b_b82k") == PIXELS["inception"]
    assert pixel_normalisation("ViT-L-14", "datacomp_xl_s13b_b90k") == CLIP_MEAN_AND_STD
    assert pixel_normalisation("small_clip", None) == CLIP_MEAN_AND_STD
    assert pixel_normalisation("ViT-L-14", "any/file", "clip") == CLIP_MEAN_AND_STD
    with pytest.raises(ValueError, match=r"model\.pixels: weights of ViT-L-14 .* set model\.pixels to clip or incep"):
        pixel_normalisation("ViT-L-14", "any/file")


def test_a_plain_sentence_is_read_as_open_clip_reads_it(clip, tower):
    ids = tower.tokenize(SENTENCES)
    assert torch.equal(tower(ids), clip.encode_text(ids))


def test_a_pseudo_word_equals_a_row_of_the_embedding_table(clip, tower):
    """open_clip reads the same sentence, with the word in an unused row of its embedding table."""
    ids = tower.tokenize(SENTENCES)
    composed = tower.compose(ids, words())
    for row in range(3):
        own = copy.deepcopy(clip)
        table = own.text.token_embedding if hasattr(own, "text") else own.token_embedding
        # Only the first placeholder is the image. A second one, as in the last sentence, is a word and needs its row.
        unused = next(number for number in range(table.num_embeddings) if not ids[row].eq(number).any())
        renamed = ids[row : row + 1].clone()
        renamed[0, int(renamed.eq(tower.placeholder_id).int().argmax())] = unused
        with torch.no_grad():
            table.weight[unused] = words()[row]
        torch.testing.assert_close(composed[row : row + 1], own.encode_text(renamed))


def test_an_edit_gets_the_positions_and_replaces_the_hidden_states(tower):
    ids = tower.tokenize(SENTENCES)
    seen = []

    def edit(hidden, place, read):
        seen.append((hidden.shape, place.tolist(), read.tolist()))
        return hidden * 2

    plain = tower.compose(ids, words(), [(1, lambda hidden, place, read: hidden)])
    torch.testing.assert_close(plain, tower.compose(ids, words()))
    twice = tower.compose(ids, words(), [(1, edit), (1, edit)])
    four = tower.compose(ids, words(), [(1, lambda hidden, place, read: hidden * 4)])
    torch.testing.assert_close(twice, four)
    length = ids.shape[1]
    ends = [int(row.argmax()) for row in ids] if tower.pooling == "argmax" else [length - 1] * 3
    first = 4 if tower.pooling == "argmax" else 3  # CLIP begins with a token of its own
    assert seen[0] == ((3, length, 12), [first] * 3, ends)


def test_nothing_of_an_edit_is_left_behind_also_after_an_error(tower):
    ids = tower.tokenize(SENTENCES)
    before = tower(ids)

    def fail(hidden, place, read):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        tower.compose(ids, words(), [(0, lambda hidden, place, read: hidden + 1), (2, fail)])
    assert torch.equal(tower(ids), before)
    assert not any(module._forward_hooks for module in tower.modules())


def test_gradients_reach_the_word(tower):
    leaf = words().requires_grad_()
    tower.compose(tower.tokenize(SENTENCES), leaf).sum().backward()
    assert bool((leaf.grad.abs().sum(dim=1) > 0).all())


def test_a_sentence_without_the_image_is_refused(tower):
    with pytest.raises(ValueError, match=r"every sentence to compose needs a '\*' for the image; see model\.template"):
        tower.compose(tower.tokenize(["a photo of *", "a red dress"]), words(2))


def test_a_sentence_that_is_cut_is_told_once(tower, caplog):
    tower.tokenize(["", "a photo", *SENTENCES])
    assert caplog.text == ""
    tower.tokenize(["a photo", "a red dress " * 9])
    tower.tokenize(["a red dress " * 9])
    (record,) = caplog.records
    assert "a sentence fills all 16 positions" in record.message
    assert "a red dress a red" in record.message


def test_a_long_sentence_is_cut_and_still_read(tower):
    ids = tower.tokenize(["a photo of * that " + "is red and " * 30])
    assert ids.shape == (1, 16)
    assert bool(tower.compose(ids, words(1)).isfinite().all())


def test_each_tensor_has_one_name(clip, tower):
    image = ImageTower(clip.visual)
    names = {*image.state_dict(), *tower.state_dict()}
    assert sum(weight.numel() for weight in nn.ModuleList([image, tower]).parameters()) == sum(
        weight.numel() for weight in clip.parameters()
    )
    assert not any(name == "scale" or name.startswith("text.") for name in names)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("ViT-L-41", r"'ViT-L-41' is no model of open_clip .*did you mean"),
        ("roberta-ViT-B-32", "roberta-ViT-B-32 is not supported, because its text tower roberta-base comes from"),
        ("coca_ViT-B-32", "coca_ViT-B-32 is not supported, because CoCa's text tower"),
    ],
)
def test_towers_that_cannot_be_composed_with_are_refused_by_name(name, problem):
    with pytest.raises(ValueError, match=problem):
        check_clip_model(name)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="builds, of 203 million weights")
def test_a_tower_of_a_newer_timm_is_refused_with_the_stack_that_has_it():
    with pytest.raises(ValueError, match=r"cannot build 'ViT-B-16-SigLIP' .*need Python >= 3\.12, because"):
        load_clip("ViT-B-16-SigLIP")


def test_patches_of_a_tower_without_any_are_refused():
    class Pooled(nn.Module):
        image_size = 16

        def forward(self, images):
            return images.mean((2, 3))

    assert ImageTower(Pooled()).width == 3
    with pytest.raises(ValueError, match=r"an image tower of type Pooled gives no patches; take a ViT"):
        ImageTower(Pooled(), with_patches=True)
    config = {"layers": [1, 1, 1, 1], "output_dim": 8, "heads": 2, "image_size": 32, "width": 4}
    with pytest.raises(ValueError, match="an image tower of type ModifiedResNet gives no patches"):
        ImageTower(ModifiedResNet(**config), with_patches=True)
    assert ImageTower(ModifiedResNet(**config)).width == 8


# Weights.


def archive(state, path):
    """Write a TorchScript file with these tensors, OpenAI's format of CLIP."""

    class Node(nn.Module):
        def forward(self, x):
            return x

    root = Node()
    for name, tensor in state.items():
        *parents, last = name.split(".")
        node = root
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, Node())
            node = node._modules[parent]
        node.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=False))
    for name in ("input_resolution", "context_length", "vocab_size"):
        root.register_buffer(name, torch.tensor(16))
    torch.jit.save(torch.jit.script(root), str(path))


def same(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("form", ["bare", "trainer", "lightning", "safetensors", "clip_cir"])
def test_weights_in_every_published_form_are_loaded(form, clip, kind, tmp_path):
    state, path = clip.state_dict(), tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "trainer":  # open_clip's own training, on several GPUs
        torch.save({"epoch": 3, "name": "x", "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    elif form == "lightning":
        content = {"state_dict": {f"model.{k}": v for k, v in state.items()}, "best_recall": np.float64(3.0)}
        torch.save(content, path)
    elif form == "safetensors":
        save_file(state, path)
    elif form == "clip_cir":
        prefix = {True: "image_tower.", False: "text_tower.clip."}
        torch.save({"model": {prefix[k.startswith("visual.")] + k: v for k, v in state.items()}}, path)
    else:
        torch.save(state, path)
    torch.manual_seed(5)
    assert same(load_clip(kind, str(path)), clip)


def test_openais_archive_is_read_without_unpickling_and_only_into_quickgelu(tmp_path, monkeypatch):
    config = open_clip.get_model_config("small_clip")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small_clip-quickgelu", {**config, "quick_gelu": True})
    torch.manual_seed(0)
    original = load_clip("small_clip-quickgelu")
    archive(original.half().state_dict(), tmp_path / "ViT.pt")
    loaded = load_clip("small_clip-quickgelu", str(tmp_path / "ViT.pt"))
    assert same(loaded, original.float())
    message = r"OpenAI's weights in .*ViT\.pt were trained with QuickGELU and small_clip has GELU; set model"
    with pytest.raises(ValueError, match=message):
        load_clip("small_clip", str(tmp_path / "ViT.pt"))


def test_weights_that_a_run_trained_keep_their_activation(tmp_path, monkeypatch):
    """Their names and shapes do not tell it, but the run's config does; a file of others may have any ``config``."""
    config = open_clip.get_model_config("small_clip")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small_clip-quickgelu", {**config, "quick_gelu": True})
    clip, path = load_clip("small_clip"), tmp_path / "checkpoint_best.pth"
    torch.save({"model": clip.state_dict(), "config": {"model": {"clip_model": "small_clip"}}}, path)
    assert same(load_clip("small_clip", str(path)), clip)
    with pytest.raises(ValueError, match=r"weights in .*best\.pth were trained with GELU and small_clip-quickgelu has"):
        load_clip("small_clip-quickgelu", str(path))
    for foreign in ({"model": "ViT"}, ["ViT"], {"model": {"clip_model": "no model of open_clip"}}):
        torch.save({"model": clip.state_dict(), "config": foreign}, path)
        assert same(load_clip("small_clip-quickgelu", str(path)), clip)


def test_a_damaged_archive_of_openai_is_refused(tmp_path, monkeypatch):
    config = open_clip.get_model_config("small_clip")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small_clip-quickgelu", {**config, "quick_gelu": True})
    original = load_clip("small_clip-quickgelu")
    archive(original.half().state_dict(), tmp_path / "ViT.pt")
    content = bytearray((tmp_path / "ViT.pt").read_bytes())
    content[content.index(original.token_embedding.weight.detach().numpy().tobytes()) + 5] ^= 2
    (tmp_path / "ViT.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"ViT\.pt is damaged or was only half written"):
        load_clip("small_clip-quickgelu", str(tmp_path / "ViT.pt"))


def test_weights_of_other_types_are_converted_and_said_or_refused(tmp_path, caplog):
    clip, path = load_clip("small_clip"), tmp_path / "weights.pt"
    state = clip.bfloat16().state_dict()
    torch.save(state, path)
    caplog.set_level("INFO")
    assert same(load_clip("small_clip", str(path)), clip.float())
    assert f"converted {len(state)} tensors of {path} from bfloat16 to float32" in caplog.text
    torch.save({**state, "positional_embedding": torch.ones(4, 2, dtype=torch.int64)}, path)
    with pytest.raises(ValueError, match=r"a type that holds no weights \(first: positional_embedding is int64\)"):
        load_clip("small_clip", str(path))


def test_a_tag_of_another_activation_is_refused_before_anything_is_downloaded():
    with pytest.raises(ValueError, match=r"the weights openai were trained with QuickGELU and ViT-B-32 has GELU"):
        load_clip("ViT-B-32", "openai")


def test_other_picture_sizes_interpolate_the_positions(tmp_path):
    torch.manual_seed(0)
    small = load_clip("small_clip")
    torch.save(small.state_dict(), tmp_path / "weights.pt")
    large = load_clip("small_clip", str(tmp_path / "weights.pt"), image_size=24)
    assert large.visual.positional_embedding.shape == (1 + 36, 12)
    assert torch.equal(large.visual.positional_embedding[0], small.visual.positional_embedding[0])
    assert ImageTower(large.visual, with_patches=True).grid == 6


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("stack", ["visual.transformer.resblocks", "transformer.resblocks"])
def test_weights_with_another_number_of_blocks_are_refused_with_both_numbers(stack, change, tmp_path):
    state = load_clip("small_clip").state_dict()
    count = count_blocks_in(state)[stack]
    last = {name: tensor for name, tensor in state.items() if name.startswith(f"{stack}.{count - 1}.")}
    for name, tensor in last.items():
        if change < 0:
            del state[name]
        else:
            state[name.replace(f"{stack}.{count - 1}.", f"{stack}.{count}.")] = tensor
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=rf", {count + change} blocks of {stack} there and {count} here; "):
        load_clip("small_clip", str(tmp_path / "other.pt"))


def test_wrong_missing_and_unreachable_weights_get_a_sentence(tmp_path, monkeypatch):
    state = load_clip("small_clip").state_dict()
    torch.save({name: t for name, t in state.items() if "ln_final" not in name}, tmp_path / "lacks.pt")
    with pytest.raises(ValueError, match=r"lacks\.pt: 2 missing keys \(first: ln_final"):
        load_clip("small_clip", str(tmp_path / "lacks.pt"))
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_clip("small_clip", str(tmp_path / "broken.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"'opnai' is neither a file .* nor a tag of ViT-B-32.* \(tags: openai"):
        load_clip("ViT-B-32-quickgelu", "opnai")

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", offline)
    with pytest.raises(FileNotFoundError, match=r"openai of ViT-B-32-quickgelu cannot be downloaded \(no route"):
        load_clip("ViT-B-32-quickgelu", "openai")


def test_tokenizers_that_are_missing_or_not_wanted_get_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the tokenizer of small_siglip cannot be had from .*nowhere"):
        TextTower(load_clip("small_siglip"), "small_siglip", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"small_clip has CLIP's own tokenizer; leave model\.tokenizer empty"):
        TextTower(load_clip("small_clip"), "small_clip", str(tmp_path))
