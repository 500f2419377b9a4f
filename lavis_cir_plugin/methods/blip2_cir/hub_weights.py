"""BLIP-2's weights in the layout of transformers' ``Blip2ForImageTextRetrieval``, translated to LAVIS's and back."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from lavis_cir_plugin.core.checkpoints import read_state
from lavis_cir_plugin.core.weight_folders import FolderWeights, is_hub_name, read_config, read_folder

__all__ = [
    "EXTRA_FILE",
    "Blip2Weights",
    "check_hub_config",
    "hub_config",
    "read_blip2_weights",
    "to_hub_names",
    "to_lavis_names",
]

HUB_NAMES = {
    "blip2_pretrained.pth": "Salesforce/blip2-itm-vit-g",
    "blip2_finetune_coco.pth": "Salesforce/blip2-itm-vit-g-coco",
}
"""Hub name of the weights in each file of LAVIS."""

_STORAGE = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"

EXTRA_FILE = "lavis_cir.safetensors"
"""File beside exported weights with the tensors that transformers' class lacks."""

EXTRA_TENSORS = ("temp", "prompt_tokens")

# Pairs (LAVIS, transformers) of whole names and prefixes; a longer prefix precedes its own beginning.
_MODULES = (
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.blocks.", "vision_model.encoder.layers."),
    ("ln_vision.", "vision_model.post_layernorm."),
    ("query_tokens", "query_tokens"),
    ("Qformer.bert.embeddings.word_embeddings.", "embeddings.word_embeddings."),
    ("Qformer.bert.embeddings.position_embeddings.", "embeddings.position_embeddings."),
    ("Qformer.bert.embeddings.position_ids", "embeddings.position_ids"),
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("Qformer.bert.encoder.", "qformer.encoder."),
    ("vision_proj.", "vision_projection."),
    ("text_proj.", "text_projection."),
    ("itm_head.", "itm_head."),
)
# Parts of names inside a layer of the image tower and of the Q-Former, (LAVIS, transformers).
_VISION_PARTS = ((".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."), (".attn.", ".self_attn."))
_PROJECTION = (".self_attn.proj.", ".self_attn.projection.")
_QFORMER_PARTS = (("attention.self.", "attention.attention."),)  # this also renames crossattention

# Settings that no tensor shows, with transformers' defaults for keys that config.json lacks.
_SILENT = {
    "vision_config": {"num_attention_heads": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-6},
    "qformer_config": {"num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
}
_BY_KEY = {
    "vision_config.num_attention_heads": "model.vit_config.num_heads",
    "qformer_config.num_attention_heads": "model.qformer_config.num_attention_heads",
    "qformer_config.hidden_act": "model.qformer_config.hidden_act",
    "qformer_config.layer_norm_eps": "model.qformer_config.layer_norm_eps",
}


class Blip2Weights(NamedTuple):
    """BLIP-2's weights from any source."""

    state: dict[str, Tensor]
    """Tensors by LAVIS's names."""
    lacks: tuple[str, ...]
    """Names of tensors that the source's layout lacks, so that they start anew."""
    config: Mapping[str, Any] | None
    """Content of ``config.json`` for transformers' layout (empty if the file is missing), None for LAVIS's layout."""


def read_blip2_weights(source: str | os.PathLike[str]) -> Blip2Weights:
    """Return BLIP-2's weights under LAVIS's names.

    Args:
        source: File or URL in LAVIS's layout; or, in transformers' layout, a file (``.safetensors``, ``.bin``), a
            folder with one file or shards, or a hub name such as ``Salesforce/blip2-itm-vit-g``. The layout is
            recognised by the names of the tensors.

    Raises:
        FileNotFoundError: If the weights are missing or cannot be downloaded; the message names other sources.
        ValueError: If they cannot be read, or a tensor in transformers' layout has an unknown name.
    """
    source = os.fspath(source)
    path = Path(os.path.expanduser(source))
    if urlparse(source).scheme in ("http", "https"):
        state, folder = _read_url(source), None
    elif path.is_dir() or is_hub_name(source):
        state, _, folder = _read_folder(source)
    else:
        state, folder = read_state(source), path.parent
    if not any(name.startswith(("vision_model.", "qformer.")) for name in state):
        return Blip2Weights(state, (), None)
    extra = _read_extra(folder)
    named = {**to_lavis_names(state, source), **extra}
    lacks = tuple(name for name in EXTRA_TENSORS if name not in extra)
    logging.info(
        "%s is in transformers' layout: ln_vision keeps LAVIS's eps of 1e-5, under which it was trained, where "
        "transformers takes 1e-6%s",
        source,
        "; no temperature is in it, which starts at 0.07" if "temp" in lacks else "",
    )
    return Blip2Weights(named, lacks, read_config(folder) if folder is not None else {})


def to_lavis_names(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return a state dictionary of ``Blip2ForImageTextRetrieval`` under LAVIS's names.

    LAVIS has no bias of the keys, the middle third of each ``qkv.bias``, and this bias has no effect: it adds an equal
    number to a query's scores of all keys, which the softmax over them cancels.

    Args:
        state: Tensors by name.
        source: Name of the file in error messages.

    Raises:
        ValueError: If a tensor's name is unknown, such as those of a BLIP-2 with a language model.
    """
    named: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        own = _renamed(name, to_lavis=True)
        if own is None:
            unknown.append(name)
        elif own.endswith(".attn.qkv.bias"):
            attention = own.removesuffix("qkv.bias")
            named[f"{attention}q_bias"], _, named[f"{attention}v_bias"] = tensor.chunk(3)
        else:
            named[own] = tensor
    if unknown:
        raise ValueError(
            f"checkpoint {source}: {len(unknown)} tensors have no place in BLIP-2's image-text model (first: "
            f"{unknown[0]}); take weights of transformers' Blip2ForImageTextRetrieval, such as "
            f"{' or '.join(HUB_NAMES.values())}."
        )
    return named


def to_hub_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dictionary of ``blip2_cir`` under the names of ``Blip2ForImageTextRetrieval``.

    The result lacks `EXTRA_TENSORS`, and position ids, which transformers computes itself.

    Raises:
        ValueError: If transformers' class has no place for a tensor.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in EXTRA_TENSORS or name.endswith(".position_ids") or name.endswith(".v_bias"):
            continue
        if name.endswith(".q_bias"):
            attention = name.removesuffix("q_bias")
            value = state[f"{attention}v_bias"]
            name, tensor = f"{attention}qkv.bias", torch.cat([tensor, torch.zeros_like(value), value])
        other = _renamed(name, to_lavis=False)
        if other is None:
            raise ValueError(f"{name} has no place in transformers' Blip2ForImageTextRetrieval; use another --format.")
        named[other] = tensor
    return named


def hub_config(model: nn.Module) -> dict[str, Any]:
    """Return the settings of a ``blip2_cir`` model as the content of transformers' ``config.json``.

    Raises:
        ValueError: If the image tower is not EVA-CLIP's, the only one that transformers' class supports.
    """
    tower: Any = model.visual_encoder
    if not hasattr(tower, "patch_embed"):
        raise ValueError(
            "transformers' Blip2ForImageTextRetrieval has EVA-CLIP's image tower alone and model.vit_model is clip_L; "
            "set model.vit_model: eva_clip_g (model_type pretrain or coco), or use weights in LAVIS's layout."
        )
    block = tower.blocks[0]
    bert: Any = model.Qformer["bert"].config
    return {
        "architectures": ["Blip2ForImageTextRetrieval"],
        "model_type": "blip-2",
        "num_query_tokens": model.query_tokens.shape[1],
        "image_text_hidden_size": model.vision_proj.out_features,
        "image_token_index": None,
        "vision_config": {
            "hidden_size": tower.num_features,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_hidden_layers": len(tower.blocks),
            "num_attention_heads": block.attn.num_heads,
            "image_size": tower.patch_embed.img_size[0],
            "patch_size": tower.patch_embed.patch_size[0],
            "hidden_act": "gelu",
            "layer_norm_eps": block.norm1.eps,
            "qkv_bias": True,
        },
        "qformer_config": {
            "vocab_size": bert.vocab_size,
            "hidden_size": bert.hidden_size,
            "num_hidden_layers": bert.num_hidden_layers,
            "num_attention_heads": bert.num_attention_heads,
            "intermediate_size": bert.intermediate_size,
            "hidden_act": bert.hidden_act,
            "max_position_embeddings": bert.max_position_embeddings,
            "layer_norm_eps": bert.layer_norm_eps,
            "cross_attention_frequency": bert.cross_attention_freq,
            "encoder_hidden_size": bert.encoder_width,
            "use_qformer_text_input": True,
        },
    }


def check_hub_config(config: Mapping[str, Any], model: nn.Module, source: str) -> None:
    """Refuse weights that were trained under other settings than the model's, if no tensor shows the difference.

    Args:
        config: Content of ``config.json``. If it is empty, nothing can be compared.
        model: Model ``blip2_cir`` that shall load the weights.
        source: Name of the weights in error messages.

    Raises:
        ValueError: If a number of heads, an activation or an epsilon differs, or the image tower is not EVA-CLIP's.
    """
    own = hub_config(model)
    if not config:
        return
    for section, defaults in _SILENT.items():
        for key, default in defaults.items():
            there, here = (config.get(section) or {}).get(key, default), own[section][key]
            if there != here:
                key = f"{section}.{key}"
                raise ValueError(
                    f"checkpoint {source}: its config.json has {key}: {there} and this model has {here}; "
                    + (f"set {_BY_KEY[key]} to that." if key in _BY_KEY else "take other weights.")
                )


def _renamed(name: str, to_lavis: bool) -> str | None:
    """Return a tensor's name in the other layout, or None if that layout has no such tensor."""
    came_from, goes_to = (1, 0) if to_lavis else (0, 1)
    for pair in _MODULES:
        begins, becomes = pair[came_from], pair[goes_to]
        if name == begins or (begins.endswith(".") and name.startswith(begins)):
            parts: tuple[tuple[str, str], ...] = ()
            if pair[0] == "visual_encoder.blocks.":
                # The projection's new name begins with the attention's, so the attention has to be renamed first.
                parts = (*_VISION_PARTS, _PROJECTION)
            elif pair[0] == "Qformer.bert.encoder.":
                parts = _QFORMER_PARTS
            rest = name[len(begins) :]
            for part in reversed(parts) if to_lavis else parts:
                rest = rest.replace(part[came_from], part[goes_to])
            return becomes + rest
    return None


def _read_url(url: str) -> dict[str, Tensor]:
    try:
        return read_state(url)
    except FileNotFoundError as error:
        name = HUB_NAMES.get(urlparse(url).path.rpartition("/")[2])
        if name is None:
            raise
        raise FileNotFoundError(
            f"{error} The Hugging Face hub has the same weights as {name}: set model.pretrained to this name, or to "
            "a folder with the files of that repository."
        ) from error


def _read_folder(source: str) -> FolderWeights:
    try:
        return read_folder(source, beside=(EXTRA_FILE,))
    except FileNotFoundError as error:
        file = next((file for file, name in HUB_NAMES.items() if name == source), None)
        if file is None:
            raise
        raise FileNotFoundError(f"{error} The same weights are a file of LAVIS: {_STORAGE}/{file}.") from error


def _read_extra(folder: Path | None) -> dict[str, Tensor]:
    path = folder / EXTRA_FILE if folder is not None else None
    if path is None or not path.is_file():
        return {}
    state = read_state(str(path))
    strange = [name for name in state if name not in EXTRA_TENSORS]
    if strange:
        raise ValueError(f"checkpoint {path}: {strange[0]} does not belong here; known: {', '.join(EXTRA_TENSORS)}.")
    return state
