"""BLIP-2 as the hub has it, small: transformers' own model, its config and weights, and a comparison with ours."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import SMALL, tokens_and_mask

from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir
from lavis_cir_plugin.models.tokenizer import load_tokenizer

# Two heads are not what transformers takes by default, in either part.
VOCABULARY = len(load_tokenizer(SMALL["tokenizer"]))


def transformers_model(tower_scale: float = 0.5):
    """Return transformers' own class, small, with random weights everywhere, also in the keys' bias."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Blip2ForImageTextRetrieval"):
        pytest.skip(f"transformers {transformers.__version__} has no Blip2ForImageTextRetrieval, which came with 4.46")
    torch.manual_seed(0)
    vision = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    qformer = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        qformer_config={
            **qformer,
            "intermediate_size": 16,
            "max_position_embeddings": 40,
            "encoder_hidden_size": 12,
            "use_qformer_text_input": True,
        },
        num_query_tokens=3,
        image_text_hidden_size=6,
    )
    model = transformers.Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            in_tower = name.startswith("vision_model.e")  # embeddings and encoder
            weight.normal_(0, tower_scale if in_tower else 0.5)
    return model


def our_model(source, **changes) -> Blip2Cir:
    settings = {**SMALL, "vit_config": {**SMALL["vit_config"], "depth": 2}, **changes}
    return Blip2Cir.from_config({**settings, "pretrained": str(source)}).eval()


def assert_same_outputs(theirs, ours) -> None:
    """Image, text and image-text outputs of texts of different lengths."""
    pictures = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    texts = ["is red", "has longer sleeves and no collar", "is darker"]
    ids, mask = tokens_and_mask(ours, texts)
    with torch.no_grad():
        out = theirs(pixel_values=pictures, input_ids=ids, attention_mask=mask)
        targets = ours.encode_target(pictures)
        sentences = ours.encode_query({"text_input": texts}, mode="text")
        torch.testing.assert_close(targets, out.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(sentences, out.text_embeds, atol=1e-5, rtol=0)
        scores = (targets @ sentences.T).amax(dim=1)
        torch.testing.assert_close(scores, out.logits_per_image, atol=1e-5, rtol=0)
        fused = ours.encode_query({"image": pictures, "text_input": texts})
        torch.testing.assert_close(fused, fused_query(theirs, pictures, ids, mask), atol=1e-5, rtol=0)


def fused_query(theirs, pictures, ids, mask):
    """One pass over [queries; text] as transformers' matching mode makes it; the output at [CLS], projected."""
    image = theirs.vision_model(pixel_values=pictures).last_hidden_state
    queries = theirs.query_tokens.expand(len(ids), -1, -1)
    hidden = theirs.qformer(
        query_embeds=theirs.embeddings(input_ids=ids, query_embeds=queries),
        query_length=queries.shape[1],
        attention_mask=torch.cat([torch.ones(queries.shape[:2], dtype=mask.dtype), mask], dim=1),
        encoder_hidden_states=image,
        encoder_attention_mask=torch.ones(image.shape[:2]),
    ).last_hidden_state
    return F.normalize(theirs.text_projection(hidden[:, queries.shape[1]]), dim=-1)


def hub_shapes(vision, qformer, patches, vocabulary, positions, queries, projection) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published layout; vision and qformer: (width, layers, intermediate width, patch size)."""
    width, layers, inner, patch = vision
    shapes: dict[str, tuple[int, ...]] = {
        "query_tokens": (1, queries, qformer[0]),
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, patches + 1, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.patch_embedding.bias": (width,),
        "embeddings.word_embeddings.weight": (vocabulary, qformer[0]),
        "embeddings.position_embeddings.weight": (positions, qformer[0]),
    }

    def linear(name, into, out):
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    def norm(name, size):
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    for layer in range(layers):
        name = f"vision_model.encoder.layers.{layer}"
        norm(f"{name}.layer_norm1", width)
        norm(f"{name}.layer_norm2", width)
        linear(f"{name}.self_attn.qkv", width, 3 * width)
        linear(f"{name}.self_attn.projection", width, width)
        linear(f"{name}.mlp.fc1", width, inner)
        linear(f"{name}.mlp.fc2", inner, width)
    norm("vision_model.post_layernorm", width)
    hidden, layers, inner, _ = qformer
    norm("qformer.layernorm", hidden)
    for layer in range(layers):
        name = f"qformer.encoder.layer.{layer}"
        kinds = {"attention": hidden, **({"crossattention": width} if layer % 2 == 0 else {})}
        for kind, source in kinds.items():
            linear(f"{name}.{kind}.attention.query", hidden, hidden)
            linear(f"{name}.{kind}.attention.key", source, hidden)
            linear(f"{name}.{kind}.attention.value", source, hidden)
            linear(f"{name}.{kind}.output.dense", hidden, hidden)
            norm(f"{name}.{kind}.output.LayerNorm", hidden)
        for suffix in ("", "_query"):
            linear(f"{name}.intermediate{suffix}.dense", hidden, inner)
            linear(f"{name}.output{suffix}.dense", inner, hidden)
            norm(f"{name}.output{suffix}.LayerNorm", hidden)
    linear("vision_projection", hidden, projection)
    linear("text_projection", hidden, projection)
    linear("itm_head", hidden, 2)
    return shapes


SMALL_HUB = hub_shapes((12, 2, 24, 8), (8, 3, 16, 0), 4, VOCABULARY, 40, 3, 6)


def small_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A small state dictionary in the hub's layout, written down without transformers."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SMALL_HUB.items()}


def small_config(**vision) -> dict[str, object]:
    return {"vision_config": {"num_attention_heads": 2, **vision}, "qformer_config": {"num_attention_heads": 2}}
