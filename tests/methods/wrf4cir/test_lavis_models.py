"""A perturbed step of LAVIS's models with momentum copies, queues and tied weights is the naive one, made in place."""

from __future__ import annotations

import copy

import pytest
import torch
from lavis.models.albef_models import AlbefBase
from lavis.models.albef_models.albef_pretrain import AlbefPretrain
from lavis.models.albef_models.albef_vqa import AlbefVQA
from lavis.models.alpro_models import AlproBase
from lavis.models.alpro_models.alpro_retrieval import AlproRetrieval
from lavis.models.blip2_models.blip2 import BertTokenizer
from lavis.models.blip_models.blip import BlipBase
from lavis.models.blip_models.blip_pretrain import BlipPretrain
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from lavis.models.clip_models.model import CLIP
from lavis.models.med import BertConfig, BertForMaskedLM, XBertEncoder, XBertLMHeadDecoder
from lavis.models.timesformer import vit as timesformer
from lavis.models.vit import VisionTransformerEncoder

from lavis_cir_plugin import CONFIGS
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation, ascent_step
from lavis_cir_plugin.models.tokenizer import load_tokenizer
from lavis_cir_plugin.training.portable_runner import join_single_process

GAMMA, WORDS, TEXTS = 0.05, "blip_tiny_vocab.txt", ["a red dress with long sleeves", "a star", "a blue dress", "a top"]
VIDEO = {"image_size": 32, "n_frms": 2}


def tokenizer_of_blip(*_):
    tokenizer = load_tokenizer(WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.enc_token_id = tokenizer.convert_tokens_to_ids("[ENC]")
    return tokenizer


def tokenizer_of_albef(*_):
    return BertTokenizer(str(CONFIGS / "models" / WORDS))


def bert(tokenizer=tokenizer_of_albef, **changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    ours = {"encoder_width": 16, "add_cross_attention": True, "add_type_embeddings": False, "initializer_range": 0.2}
    return BertConfig(**{**sizes, **ours, "vocab_size": len(tokenizer()), "max_position_embeddings": 48, **changes})


def tower():
    made = VisionTransformerEncoder(img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.1)
    made.vision_width = 16  # LAVIS's from_config sets it
    return made


def video_tower(monkeypatch):
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    whole = timesformer.VisionTransformer
    monkeypatch.setattr(timesformer, "VisionTransformer", lambda **stock: whole(**{**stock, **sizes}))
    return timesformer.TimeSformer(**VIDEO)


def albef_vqa(_):
    return AlbefVQA(tower(), XBertEncoder(bert(fusion_layer=1)), XBertLMHeadDecoder(bert(fusion_layer=0)))


def albef_pretrain(_):
    encoder = BertForMaskedLM(bert(fusion_layer=1))
    return AlbefPretrain(tower(), encoder, queue_size=8, embed_dim=6, mlm_mask_prob=0.5)


def blip_pretrain(_):
    decoder = XBertLMHeadDecoder(bert(tokenizer_of_blip))
    return BlipPretrain(tower(), XBertEncoder(bert(tokenizer_of_blip)), decoder, queue_size=8, embed_dim=6)


def blip_retrieval(_):
    """Its image tower is frozen, as one's own project may do."""
    model = BlipRetrieval(tower(), XBertEncoder(bert(tokenizer_of_blip)), queue_size=8, embed_dim=6)
    model.visual_encoder.requires_grad_(False)
    return model


def alpro_retrieval(monkeypatch):
    encoder = XBertEncoder(bert(add_cross_attention=False, add_type_embeddings=True, fusion_layer=1))
    return AlproRetrieval(video_tower(monkeypatch), encoder, vision_width=16, text_width=16, embed_dim=6)


def clip(_):
    image = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return CLIP(6, image, text)


MODELS = [albef_vqa, albef_pretrain, blip_pretrain, blip_retrieval, alpro_retrieval, clip]


def batch():
    pictures = torch.Generator().manual_seed(3)
    answers = {"answer": ["red", "a star"] * 4, "weight": torch.full((8,), 0.5), "n_answers": torch.full((4,), 2)}
    return {
        "image": torch.randn(4, 3, 32, 32, generator=pictures),
        "video": torch.randn(4, 3, 2, 32, 32, generator=pictures),
        "text_input": TEXTS, "image_id": torch.arange(4), "epoch": 0, "iters": 1, "num_iters_per_epoch": 2, **answers,
    }  # fmt: skip


def call(model, samples):
    torch.manual_seed(5)
    return model(dict(samples))["loss"]


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.fixture
def make(monkeypatch):
    """Return a function that builds a model without the hub, in training mode; CLIP and ALPRO ask for a group."""
    join_single_process("cpu")
    tokenizers = {AlbefBase: tokenizer_of_albef, AlproBase: tokenizer_of_albef, BlipBase: tokenizer_of_blip}
    for base, tokenizer in tokenizers.items():
        monkeypatch.setattr(base, "init_tokenizer", classmethod(tokenizer))

    def build(kind):
        torch.manual_seed(0)
        return kind(monkeypatch).train()

    return build


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_a_step_is_the_naive_one_and_the_clean_pass_alone_moves_what_is_not_trained(kind, make):
    model = make(kind)
    clean, moved = copy.deepcopy(model), copy.deepcopy(model)
    settings = WeightPerturbation(gamma=GAMMA)
    optimizer = PerturbingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, settings)
    perturbed = optimizer.perturb(model)
    call(perturbed, batch()).backward()

    call(clean, batch()).backward()
    chosen = {name: weight for name, weight in moved.named_parameters() if name in optimizer.weights}
    direction = [dict(clean.named_parameters())[name].grad for name in chosen]
    direction = [torch.zeros_like(w) if d is None else d for d, w in zip(direction, chosen.values())]
    with torch.no_grad():
        for weight, step in zip(chosen.values(), ascent_step(list(chosen.values()), direction, GAMMA)):
            weight += step
    call(moved, batch()).backward()

    expected, found = gradients(moved), gradients(model)
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)
    assert optimizer.steps == {"perturbed": 1, "skipped": 0}
    state, after = model.state_dict(), clean.state_dict()
    assert [name for name in after if not torch.equal(state[name], after[name])] == []
    assert any(not torch.equal(gradients(clean)[name], gradient) for name, gradient in found.items())
