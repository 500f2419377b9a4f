"""Phi networks of Pic2Word, SEARLE and LinCIR against independent readings of their equations; files, refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL_CLIP, make_triplets
from omegaconf import OmegaConf

from lavis_cir_plugin.methods.tscir.mapping import TscirMapping
from lavis_cir_plugin.methods.tscir.phi_weights import read_phi
from lavis_cir_plugin.models.open_clip_towers import load_clip
from lavis_cir_plugin.training.config import _model_conflicts

HIDDEN = 9
LAYERS = {"pic2word": ("layers.0.0", "layers.1.0", "fc_out"), "searle": ("layers.0", "layers.3", "layers.6")}


def phi_state(kind: str, features: int, words: int) -> dict[str, torch.Tensor]:
    """Return the tensors of a published network by their names in the file."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((HIDDEN, features), (HIDDEN, HIDDEN), (words, HIDDEN))
    state = {}
    for name, (rows, columns) in zip(LAYERS[kind], shapes):
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) * 0.5
        state[f"{name}.bias"] = torch.randn(rows, generator=generator) * 0.5
    return state


def naive_word(kind: str, state, feature) -> list[float]:
    """Compute phi of one un-normalised image feature by loops over plain numbers."""
    x = list(feature)
    for name in LAYERS[kind]:
        rows, bias = state[f"{name}.weight"].tolist(), state[f"{name}.bias"].tolist()
        x = [sum(w * value for w, value in zip(row, x)) + b for row, b in zip(rows, bias)]
        if name == LAYERS[kind][-1]:
            return x
        if kind == "pic2word":
            x = [max(value, 0.0) for value in x]
        else:
            x = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x]
    raise AssertionError


def naive_sentence(clip, ids, placeholder, word):
    """Compute CLIP's text tower block by block for one sentence, whose placeholder's embedding is the word."""
    x = clip.token_embedding(ids)
    x[ids.tolist().index(placeholder)] = torch.tensor(word)
    x = (x + clip.positional_embedding)[None]
    for block in clip.transformer.resblocks:
        x = block(x, attn_mask=clip.attn_mask)
    feature = clip.ln_final(x)[0, ids.argmax()] @ clip.text_projection
    return feature / feature.norm()


@pytest.fixture
def world(tmp_path):
    """Write a small CLIP to a file, and return it with the settings of all models on it."""
    clip = load_clip("small_clip")
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    settings = {**SMALL_CLIP, "pretrained": str(tmp_path / "clip.pt"), "injection_blocks": []}
    widths = clip.visual.proj.shape[1], clip.token_embedding.weight.shape[1]
    return SimpleNamespace(clip=clip, settings=settings, widths=widths, folder=tmp_path)


def save(world, kind, layout, state=None) -> str:
    """Write a file in one of the published layouts."""
    state = state or phi_state(kind, *world.widths)
    path = str(world.folder / f"{layout}.pt")
    if layout == "trainer":
        # As Pic2Word's trainer on several GPUs leaves it: CLIP in half precision, and the optimizer's numbers.
        clip = {f"module.{name}": tensor.half() for name, tensor in world.clip.state_dict().items()}
        img2text = {f"module.{name}": tensor for name, tensor in state.items()}
        optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
        content = {"epoch": 1, "name": "x", "state_dict": clip, "state_dict_img2text": img2text, "optimizer": optimizer}
    elif layout == "Phi":
        content = {"epoch": 4, "Phi": state}
    else:
        content = state
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("kind", "layout", "template"),
    [
        ("pic2word", "trainer", "a photo of * , {}"),
        ("pic2word", "bare", "a photo of * , {}"),
        ("searle", "Phi", "a photo of * that {}"),
        ("searle", "bare", "a photo of * that {}"),
    ],
)
def test_a_published_file_gives_the_queries_of_the_equations(kind, layout, template, world):
    path = save(world, kind, layout)
    model = TscirMapping.from_config({**world.settings, "phi": path, "template": template}).eval()
    batch = make_triplets(3)
    with torch.no_grad():
        features = world.clip.encode_image(batch["image"]).tolist()
        sentences = [template.format(text) for text in batch["text_input"]]
        expected = [
            naive_sentence(
                world.clip,
                model.text_tower.tokenize([sentence])[0],
                model.text_tower.placeholder_id,
                naive_word(kind, phi_state(kind, *world.widths), feature),
            )
            for sentence, feature in zip(sentences, features)
        ]
    torch.testing.assert_close(model.encode_query(batch), torch.stack(expected), atol=1e-5, rtol=0)


def test_a_run_that_goes_on_from_phi_is_found_again_and_only_so(world):
    """The activation is no weight, but a checkpoint of one network does not load into the other."""
    path = save(world, "searle", "Phi")
    model = TscirMapping.from_config({**world.settings, "phi": path})
    with torch.no_grad():
        model.mapping.word[6].bias.add_(1)
    kept = {name: t for name, t in model.state_dict().items() if not name.startswith(("image_tower.", "text_tower."))}
    torch.save({"model": kept}, world.folder / "checkpoint_best.pth")
    finetuned = {"load_finetuned": True, "finetuned": str(world.folder / "checkpoint_best.pth")}
    again = TscirMapping.from_config({**world.settings, "phi": path, **finetuned})
    assert torch.equal(again.eval().encode_query(make_triplets(2)), model.eval().encode_query(make_triplets(2)))
    with pytest.raises(ValueError, match=r"1 unexpected keys \(first: mapping\.gelu"):
        TscirMapping.from_config({**world.settings, "hidden_width": HIDDEN, **finetuned})


def test_every_weight_of_phi_gets_a_gradient(world):
    model = TscirMapping.from_config({**world.settings, "phi": save(world, "searle", "Phi")}).train()
    model({name: value for name, value in make_triplets(3).items() if name != "target"})["loss"].backward()
    assert [name for name, weight in model.mapping.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layers.3.bias"), r"neither Pic2Word nor SEARLE and LinCIR.*5 tensors, none unknown"),
        (lambda state: state.update({"layers.9.weight": torch.ones(1)}), r"7 tensors, unknown: layers\.9\.weight"),
        (lambda state: state.update({"layers.0.weight": torch.ones(HIDDEN, 99)}), "from features of width 99"),
        (lambda state: state.update({"layers.3.weight": torch.ones(HIDDEN, 99)}), "another shape"),
    ],
)
def test_networks_that_do_not_fit_are_refused(change, message, world):
    state = phi_state("searle", *world.widths)
    change(state)
    path = save(world, "searle", "Phi", state)
    with pytest.raises(ValueError, match=message):
        TscirMapping.from_config({**world.settings, "phi": path})


def test_pic2words_file_names_another_clip(world):
    path = save(world, "pic2word", "trainer")
    other = {name: tensor * 1.1 for name, tensor in world.clip.state_dict().items()}
    torch.save(other, world.folder / "clip.pt")
    with pytest.raises(ValueError, match=r"was trained on another CLIP than.*tensors differ, first: "):
        TscirMapping.from_config({**world.settings, "phi": path})


def test_phi_stands_in_for_finetuned_and_refuses_injection(world):
    section = OmegaConf.create({**world.settings, "arch": "tscir_mapping", "phi": save(world, "searle", "Phi")})
    run = OmegaConf.create({"device": "cpu"})
    assert list(_model_conflicts(SimpleNamespace(model_cfg=section, run_cfg=run), "evaluate")) == []
    section.phi = None
    (problem,) = _model_conflicts(SimpleNamespace(model_cfg=section, run_cfg=run), "evaluate")
    assert "would score random weights" in problem
    with pytest.raises(ValueError, match=r"network without injection, and model\.injection_blocks are \[0\]"):
        TscirMapping.check_config({**world.settings, "phi": "x.pt", "injection_blocks": [0]})


def test_published_widths_are_read_from_the_file(tmp_path):
    """SEARLE's network for ViT-L/14 has the widths 768, 3,072, 3,072 and 768."""
    shapes = ((3072, 768), (3072, 3072), (768, 3072))
    state = {f"{name}.weight": torch.zeros(shape) for name, shape in zip(LAYERS["searle"], shapes)}
    state.update({f"{name}.bias": torch.zeros(shape[0]) for name, shape in zip(LAYERS["searle"], shapes)})
    torch.save({"epoch": 1, "Phi": state}, tmp_path / "phi.pt")
    found = read_phi(str(tmp_path / "phi.pt"))
    assert (found.activation, found.hidden_width, found.clip) == ("gelu", 3072, {})
