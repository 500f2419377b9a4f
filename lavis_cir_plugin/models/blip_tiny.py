"""LAVIS's BLIP for question answering and captioning in any size, so that it can learn from scratch on a CPU.

Only the construction differs from LAVIS's classes, which take BERT's tokenizer from the hub and a tower of fixed size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, Optional

from lavis.common.registry import registry
from lavis.models.blip_models.blip import BertTokenizer
from lavis.models.blip_models.blip_caption import BlipCaption
from lavis.models.blip_models.blip_vqa import BlipVQA
from lavis.models.med import BertConfig, XBertEncoder, XBertLMHeadDecoder
from lavis.models.vit import VisionTransformerEncoder

from lavis_cir_plugin import CONFIGS
from lavis_cir_plugin.core.checkpoints import finetuned_in, load_strictly, read_state
from lavis_cir_plugin.core.settings import (
    Limits,
    Positive,
    check_arguments,
    check_heads,
    check_overrides,
    constructor_arguments,
)
from lavis_cir_plugin.models.tokenizer import TOKENIZER, load_tokenizer

_VIT = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
# Settings that LAVIS's med_config.json adds to BERT's own.
_BERT = {"add_cross_attention": True, "add_type_embeddings": False}


class _BuiltFromConfig:
    """Mix-in before a BLIP class of LAVIS: tokenizer, image tower and text models are built from the config alone."""

    _vocabulary: str

    def init_tokenizer(self) -> BertTokenizer:
        """Return the tokenizer with BLIP's extra tokens [DEC] and [ENC]; LAVIS's constructor calls this method."""
        tokenizer = load_tokenizer(self._vocabulary)
        tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        tokenizer.enc_token_id = tokenizer.additional_special_tokens_ids[0]
        return tokenizer

    def _tower_and_bert_config(
        self,
        tokenizer: str,
        image_size: int,
        vit_config: Mapping[str, Any] | None,
        bert_config: Mapping[str, Any] | None,
    ) -> tuple[VisionTransformerEncoder, BertConfig]:
        self.check_config({"image_size": image_size, "vit_config": vit_config, "bert_config": bert_config})
        self._vocabulary = tokenizer
        tower = VisionTransformerEncoder(img_size=image_size, **{**_VIT, **dict(vit_config or {})})
        size = {"vocab_size": len(self.init_tokenizer()), "encoder_width": tower.num_features}
        return tower, BertConfig(**{**_BERT, **dict(bert_config or {}), **size})

    @classmethod
    def check_config(cls, cfg: Mapping[str, Any]) -> None:
        """Check a ``model`` section without building the model.

        Raises:
            ValueError: If a key is unknown or a size impossible; the message says what is allowed.
        """
        values = constructor_arguments(cls, cfg)
        check_arguments(cls, "model", values)
        tower = {
            name: parameter.default
            for name, parameter in inspect.signature(VisionTransformerEncoder).parameters.items()
        }
        check_overrides("model.vit_config", values["vit_config"], tower)
        check_overrides("model.bert_config", values["bert_config"], {**BertConfig().to_dict(), **_BERT})
        vit = {**_VIT, **(values["vit_config"] or {})}
        check_heads("model.vit_config", vit, "embed_dim", "num_heads")
        bert = {**BertConfig().to_dict(), **(values["bert_config"] or {})}
        check_heads("model.bert_config", bert, "hidden_size", "num_attention_heads")
        image_size = values["image_size"]
        if image_size % vit["patch_size"]:
            raise ValueError(
                f"model.image_size must be a multiple of model.vit_config.patch_size: {vit['patch_size']}, got "
                f"{image_size!r}."
            )

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> _BuiltFromConfig:
        """Build the model of a ``model`` section, and load ``finetuned`` if ``load_finetuned`` is true.

        Raises:
            ValueError: If the checkpoint does not match the model.
            FileNotFoundError: If the checkpoint is missing.
        """
        model = cls(**constructor_arguments(cls, cfg))
        checkpoint = finetuned_in(cfg) or cfg.get("pretrained")
        if checkpoint:
            load_strictly(model, read_state(checkpoint), checkpoint)
        return model


def _types(name: str) -> dict[str, str]:
    return {"tiny": str(CONFIGS / "models" / f"{name}.yaml")}


@registry.register_model("blip_vqa_tiny")
class BlipVqaTiny(_BuiltFromConfig, BlipVQA):
    """LAVIS's BLIP for visual question answering, in the size of its config.

    Args:
        tokenizer: Folder or file of a WordPiece vocabulary, name of a vocabulary in this package, or a hub name.
        image_size: Pixels per side, a multiple of the patch size.
        vit_config: Values that replace ViT-B/16's dimensions, by the argument names of LAVIS's image tower.
        bert_config: Values that replace BERT-base's dimensions, in the question encoder and the answer decoder.
        max_txt_len: Largest number of tokens of a question; longer questions are cut.
    """

    PRETRAINED_MODEL_CONFIG_DICT = _types("blip_vqa_tiny")

    def __init__(
        self,
        *,
        tokenizer: Annotated[str, TOKENIZER] = "blip_tiny_vocab.txt",
        image_size: Positive = 64,
        vit_config: Optional[Mapping[str, Any]] = None,
        bert_config: Optional[Mapping[str, Any]] = None,
        max_txt_len: Positive = 35,
    ) -> None:
        tower, config = self._tower_and_bert_config(tokenizer, image_size, vit_config, bert_config)
        question_encoder = XBertEncoder(config, add_pooling_layer=False)
        super().__init__(tower, question_encoder, XBertLMHeadDecoder(config), max_txt_len)


@registry.register_model("blip_caption_tiny")
class BlipCaptionTiny(_BuiltFromConfig, BlipCaption):
    """LAVIS's BLIP for captioning, in the size of its config.

    Args:
        tokenizer: Folder or file of a WordPiece vocabulary, name of a vocabulary in this package, or a hub name.
        image_size: Pixels per side, a multiple of the patch size.
        vit_config: Values that replace ViT-B/16's dimensions, by the argument names of LAVIS's image tower.
        bert_config: Values that replace BERT-base's dimensions, in the decoder.
        prompt: Beginning of every caption; it does not count as generated text.
        max_txt_len: Largest number of tokens of a training caption, with the prompt.
    """

    PRETRAINED_MODEL_CONFIG_DICT = _types("blip_caption_tiny")

    def __init__(
        self,
        *,
        tokenizer: Annotated[str, TOKENIZER] = "blip_tiny_vocab.txt",
        image_size: Positive = 64,
        vit_config: Optional[Mapping[str, Any]] = None,
        bert_config: Optional[Mapping[str, Any]] = None,
        prompt: Annotated[str, Limits(may_be_empty=True)] = "a picture of ",
        max_txt_len: Positive = 40,
    ) -> None:
        tower, config = self._tower_and_bert_config(tokenizer, image_size, vit_config, bert_config)
        super().__init__(tower, XBertLMHeadDecoder(config), prompt, max_txt_len)
