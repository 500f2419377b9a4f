"""The model ``blip2_cir``: BLIP-2's Q-Former fuses a reference image and a text into a query for target images."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Annotated, Any, Literal, Optional

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from lavis.common.registry import registry
from lavis.models import clip_vit, eva_vit
from lavis.models.blip2_models.blip2 import Blip2Base, LayerNorm
from lavis.models.blip2_models.Qformer import BertConfig, BertModel
from lavis.models.blip_models.blip_outputs import BlipOutputFeatures
from lavis.models.clip_vit import VisionTransformer as ClipVisionTransformer
from torch import Tensor, nn

from lavis_cir_plugin import CONFIGS
from lavis_cir_plugin.core.checkpoints import count_blocks_in, finetuned_in, load_strictly, read_state
from lavis_cir_plugin.core.model_parts import keep_as_buffers
from lavis_cir_plugin.core.settings import (
    Limits,
    NotNegativeNumber,
    Positive,
    Probability,
    check_argument,
    check_arguments,
    check_heads,
    check_overrides,
    constructor_arguments,
)
from lavis_cir_plugin.methods.blip2_cir.hub_weights import check_hub_config, read_blip2_weights
from lavis_cir_plugin.methods.blip2_cir.losses import LOSSES, TrainingOutputs
from lavis_cir_plugin.methods.blip2_cir.qformer import ImageTokens, Sequences, encode
from lavis_cir_plugin.models.fused_attention import fuse_attention
from lavis_cir_plugin.models.model_inputs import check_pictures, read_pairs, read_pictures, read_targets, read_texts
from lavis_cir_plugin.models.quick_gelu import replace_quick_gelu
from lavis_cir_plugin.models.tokenizer import TOKENIZER, load_tokenizer, token_ids

DEFAULT_LOSS_WEIGHTS = {"joint": {"itc": 1.0}, "sentence_prompt": {"itc": 1.0, "rtc": 1.0, "align": 1.0}}

Mode = Literal["multimodal", "text", "image"]

# BLIP-2's checkpoints hold EVA's and CLIP's published towers without their last block. LAVIS's CLIP tower builds one
# block less than `layers`; LAVIS 1.0.2 sets `layers` to 22, so that its tower lacks two blocks of the checkpoints.
_EVA_G = {"patch_size": 14, "embed_dim": 1408, "depth": 39, "num_heads": 16, "mlp_ratio": 4.3637}
_CLIP_L = {"patch_size": 14, "width": 1024, "layers": 24, "heads": 16}

# glibc gives a block of more than 32 MiB back to the system when it is freed. Each layer of the tower would have new
# pages, which takes longer than its activation function.
_LARGEST_BLOCK_KEPT = 32 * 2**20

# A checkpoint may hold heads of BLIP-2's other objectives, which composed retrieval does not use.
_UNUSED_IN_CHECKPOINTS = ("itm_head.", "Qformer.cls.", "Qformer.bert.embeddings.position_ids")


@registry.register_model("blip2_cir")
class Blip2Cir(Blip2Base):
    r"""BLIP-2's Q-Former with a query that is fused from a reference image and a modification text.

    A target is represented by the Q-Former's K projected query outputs on the target image, :math:`v_1 \dots v_K` of
    unit length, and a query by one vector q of unit length. The score is :math:`s(q, t) = \max_k q \cdot v_k`.

    With ``fusion="joint"`` the Q-Former runs once over [queries; text] with cross-attention to the reference image.
    The projected output at the text's [CLS] is q, or with ``pooling="mean_queries"`` the projected mean of the query
    outputs. The loss is itc.

    With ``fusion="sentence_prompt"`` (SPRC, arXiv 2310.05473) that pass gives the query outputs Z. A second pass over
    [Z; text] sees no image, and its projected output at [CLS] is q. There are three losses: itc contrasts q with the
    targets; rtc contrasts r with them, which is the [CLS] output of a pass over [[CLS]; learned prompt; rest of the
    text] without an image; align pulls the mean of Z to the mean of the prompt. The training loss is their sum,
    weighted by ``loss_weights``.

    The types are ``pretrain`` (EVA-CLIP ViT-g, 224 px), ``pretrain_vitL`` (CLIP ViT-L, 224 px), ``coco`` (ViT-g,
    364 px) and ``tiny`` (2 layers, width 128, 64 px, trained from scratch on a CPU).

    Parameters have the names of BLIP-2's published checkpoints, so that checkpoints of LAVIS and SPRC load unchanged.
    The model lacks the matching and language-model heads, which composed retrieval does not use.

    Methods that take a batch of pictures ``(B, 3, H, W)`` also take the tower's tokens ``(B, P, vit width)`` that
    :meth:`image_features` returns; the number of dimensions, four or three, tells them apart.

    Args:
        vit_model: Image tower, ``eva_clip_g`` or ``clip_L``.
        image_size: Pixels per side; the data set's ``vis_processor`` must have the same.
        vit_config: Values that replace the tower's published dimensions (``tiny`` uses them). ``layers`` of ``clip_L``
            is one more than the number of blocks.
        vit_precision: Storage type of the tower, ``fp16`` or ``fp32``; fp16 needs a GPU and a frozen tower.
        freeze_vit: Whether the image tower keeps its loaded weights and stays in evaluation mode.
        use_grad_checkpoint: Whether the tower's activations are recomputed in the backward pass, which weight
            perturbation refuses on a trained tower.
        drop_path_rate: Stochastic depth of the ViT-g tower.
        tokenizer: Folder or file of a WordPiece vocabulary, name of a vocabulary in this package, or a hub name.
        num_query_token: Number K of query tokens.
        cross_attention_freq: Number of layers from one cross-attention layer to the next.
        qformer_config: Values that replace BERT-base's dimensions (``tiny`` uses them).
        embed_dim: Width of q and v.
        max_txt_len: Largest number of text tokens with [CLS] and [SEP]; longer texts are cut.
        fusion: One pass over [queries; text] (``joint``), or SPRC's two passes (``sentence_prompt``).
        pooling: Output of the joint fusion that becomes the query, ``text_cls`` or ``mean_queries``.
        loss_weights: Weights by loss, 1 by default: ``itc``, and with ``sentence_prompt`` also ``rtc`` and ``align``.
        label_smoothing: Share of the probability that itc and rtc spread evenly over a batch's different targets.

    Raises:
        ValueError: If a choice is unknown or impossible; the message says what is allowed.
    """

    PRETRAINED_MODEL_CONFIG_DICT = {  # noqa: RUF012 (LAVIS's class attribute)
        name: str(CONFIGS / "models" / f"blip2_cir_{name}.yaml")
        for name in ("pretrain", "pretrain_vitL", "coco", "tiny")
    }

    def __init__(
        self,
        *,
        vit_model: Literal["eva_clip_g", "clip_L"] = "eva_clip_g",
        image_size: Positive = 224,
        vit_config: Optional[Mapping[str, Any]] = None,
        vit_precision: Literal["fp16", "fp32"] = "fp16",
        freeze_vit: bool = True,
        use_grad_checkpoint: bool = False,
        drop_path_rate: Probability = 0.0,
        tokenizer: Annotated[str, TOKENIZER] = "bert-base-uncased",
        num_query_token: Positive = 32,
        cross_attention_freq: Positive = 2,
        qformer_config: Optional[Mapping[str, Any]] = None,
        embed_dim: Positive = 256,
        max_txt_len: Annotated[int, Limits(ge=2)] = 32,
        fusion: Literal["joint", "sentence_prompt"] = "joint",
        pooling: Literal["text_cls", "mean_queries"] = "text_cls",
        loss_weights: Optional[Mapping[str, NotNegativeNumber]] = None,
        label_smoothing: Probability = 0.0,
    ) -> None:
        super().__init__()
        self.check_config(locals())
        self.fusion, self.pooling = fusion, pooling
        self.loss_weights = _checked_loss_weights(fusion, loss_weights)
        self.label_smoothing = label_smoothing
        self.freeze_vit = freeze_vit
        self.is_depth_chosen = bool({"depth", "layers"} & set(vit_config or {}))
        self.max_txt_len = max_txt_len
        self.tokenizer = load_tokenizer(tokenizer)

        self.visual_encoder = _build_tower(
            vit_model, image_size, dict(vit_config or {}), drop_path_rate, use_grad_checkpoint
        )
        self.ln_vision = LayerNorm(self.visual_encoder.num_features)
        if vit_precision == "fp16":
            eva_vit.convert_weights_to_fp16(self.visual_encoder)
        self.visual_encoder.requires_grad_(not freeze_vit)
        if freeze_vit:
            fuse_attention(self.visual_encoder)
            replace_quick_gelu(self.visual_encoder)

        config = BertConfig(
            vocab_size=len(self.tokenizer),
            encoder_width=self.visual_encoder.num_features,
            add_cross_attention=True,
            cross_attention_freq=cross_attention_freq,
            query_length=num_query_token,
            **dict(qformer_config or {}),
        )
        # A ModuleDict gives the published names, Qformer.bert.*, without BLIP-2's language-model head.
        self.Qformer = nn.ModuleDict({"bert": BertModel(config, add_pooling_layer=False)})
        self.query_tokens = nn.Parameter(torch.randn(1, num_query_token, config.hidden_size) * config.initializer_range)
        if fusion == "sentence_prompt":
            prompt = torch.randn(1, num_query_token, config.hidden_size) * config.initializer_range
            self.prompt_tokens = nn.Parameter(prompt)
        self.vision_proj = nn.Linear(config.hidden_size, embed_dim)
        self.text_proj = nn.Linear(config.hidden_size, embed_dim)
        self.temp = nn.Parameter(torch.tensor(0.07))
        if fusion == "joint" and pooling == "mean_queries":
            # The last layer's text positions feed no loss then. Parameters without a gradient would stop DDP, and
            # frozen parameters would be missing in checkpoints.
            keep_as_buffers(self.Qformer["bert"].encoder.layer[-1].intermediate)
            keep_as_buffers(self.Qformer["bert"].encoder.layer[-1].output)

    @classmethod
    def check_config(cls, cfg: Mapping[str, Any]) -> None:
        """Check a ``model`` section without building the model; absent keys have the constructor's defaults.

        Raises:
            ValueError: If a value is unknown or impossible; the message says what is allowed.
        """
        values = constructor_arguments(cls, cfg)
        check_arguments(cls, "model", values)
        if values["vit_precision"] == "fp16" and not values["freeze_vit"]:
            raise ValueError(
                "model.vit_precision: 'fp16' stores the image tower in half precision, which cannot be trained; set "
                "model.vit_precision: fp32 or model.freeze_vit: true."
            )
        is_clip = values["vit_model"] == "clip_L"
        tower, bert = (_CLIP_L if is_clip else _EVA_G), BertConfig().to_dict()
        check_overrides("model.vit_config", values["vit_config"], tower)
        check_overrides("model.qformer_config", values["qformer_config"], bert)
        widths = ("width", "heads") if is_clip else ("embed_dim", "num_heads")
        check_heads("model.vit_config", {**tower, **(values["vit_config"] or {})}, *widths)
        sizes = {**bert, **(values["qformer_config"] or {})}
        check_heads("model.qformer_config", sizes, "hidden_size", "num_attention_heads")
        texts, queries, places = (values["max_txt_len"], values["num_query_token"], sizes["max_position_embeddings"])
        if places < queries + texts:
            raise ValueError(
                f"model.max_txt_len: {texts} and model.num_query_token: {queries} exceed the {places} positions "
                "of model.qformer_config.max_position_embeddings."
            )
        if sizes.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(
                f"model.qformer_config.position_embedding_type: {sizes['position_embedding_type']!r} is not available, "
                "because BLIP-2's Q-Former has absolute positions; leave the key out."
            )
        _checked_loss_weights(values["fusion"], values["loss_weights"])

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> Blip2Cir:
        """Build from the ``model`` section of a config and load the weights it names.

        ``pretrained`` (empty: random weights) holds BLIP-2's weights; with ``load_finetuned: true``, ``finetuned``
        holds a composed-retrieval checkpoint, either whole or as LAVIS writes it, without the frozen tower, which then
        comes from ``pretrained``. ``vit_pretrained`` is read only when ``pretrained`` lacks the tower.

        Raises:
            ValueError: If a checkpoint does not match the model.
            FileNotFoundError: If a checkpoint is missing and cannot be downloaded.
        """
        model = cls(**constructor_arguments(cls, cfg))
        model.load_checkpoint_from_config(cfg)
        return model

    def load_checkpoint_from_config(self, cfg: Mapping[str, Any], **_: Any) -> None:
        """Load what ``from_config`` describes."""
        pretrained, finetuned = cfg.get("pretrained"), finetuned_in(cfg)
        state = read_state(finetuned) if finetuned else {}
        is_whole = any(name.startswith("visual_encoder.") for name in state)
        if "query_tokens" in state and not is_whole and not pretrained:
            raise ValueError(
                f"model.finetuned: {finetuned} leaves out the image tower, which was frozen in its training; set "
                "model.pretrained to the checkpoint that this training started from."
            )
        if pretrained and not is_whole:
            self.load_from_pretrained(pretrained, vit_pretrained=cfg.get("vit_pretrained"))
        if finetuned:
            may_lack = ("visual_encoder.",) if pretrained and self.freeze_vit else ()
            load_strictly(self, state, finetuned, unused=_UNUSED_IN_CHECKPOINTS, may_lack=may_lack)

    def load_from_pretrained(self, url_or_filename: str, vit_pretrained: str | None = None) -> None:
        """Load BLIP-2's weights in LAVIS's or transformers' layout; tensors that they lack start anew.

        Args:
            url_or_filename: File, URL, folder of transformers or hub name, as
                :func:`~lavis_cir_plugin.methods.blip2_cir.hub_weights.read_blip2_weights` takes it.
            vit_pretrained: File or URL of the image tower, which is read only if the weights lack the tower.
        """
        state, lacks, config = read_blip2_weights(url_or_filename)
        if config is not None:
            check_hub_config(config, self, url_or_filename)
        if vit_pretrained and not any(name.startswith("visual_encoder.") for name in state):
            state.update(self._tower_state(read_state(vit_pretrained), vit_pretrained))
        load_strictly(self, state, url_or_filename, unused=_UNUSED_IN_CHECKPOINTS, fresh=("prompt_tokens", *lacks))

    def _tower_state(self, tower: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """Fit the published file of an image tower to this tower, as LAVIS does, without its last block and head."""
        is_clip = isinstance(self.visual_encoder, ClipVisionTransformer)
        own = self.visual_encoder.state_dict()
        self._check_depth(count_blocks_in(tower), count_blocks_in(own), source)
        interpolate = clip_vit.interpolate_pos_embed if is_clip else eva_vit.interpolate_pos_embed
        interpolate(self.visual_encoder, tower)
        return {f"visual_encoder.{name}": tensor for name, tensor in tower.items() if name in own}

    def _check_depth(self, there: Mapping[str, int], here: Mapping[str, int], source: str) -> None:
        """Refuse a tower of another depth, because the first blocks of a deeper tower fit by name and shape.

        If ``model.vit_config`` names the depth, more blocks in the file are intended and only logged.
        """
        for stack, count in here.items():
            found = there.get(stack, 0)
            said = f"{source} has {found} blocks of {stack} and this tower has {count}"
            if found < count or (found > count + 1 and not self.is_depth_chosen):
                raise ValueError(
                    f"model.vit_pretrained: {said}; name the file of a tower with {count} or {count + 1}, whose last "
                    "one is left out, or set model.vit_config to this file's depth."
                )
            if found > count:
                logging.info("model.vit_pretrained: %s; the last of the file are left out", said)

    def load_checkpoint(self, url_or_filename: str) -> None:
        """Load a composed-retrieval checkpoint into this model; the file may lack a frozen tower."""
        may_lack = ("visual_encoder.",) if self.freeze_vit else ()
        load_strictly(
            self, read_state(url_or_filename), url_or_filename, unused=_UNUSED_IN_CHECKPOINTS, may_lack=may_lack
        )

    def train(self, mode: bool = True) -> Blip2Cir:
        """Switch between training and evaluation mode; a frozen tower stays in evaluation mode."""
        super().train(mode)
        if self.freeze_vit:
            self.visual_encoder.eval()
        return self

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the training losses of a batch of triplets.

        Args:
            samples: A batch with ``image`` and ``target`` ``(B, 3, H, W)``, or both as tokens ``(B, P, vit width)``;
                ``text_input``, B strings; and optionally ``target_id`` ``(B,)`` int64, equal for the same image.

        Returns:
            ``loss``, the weighted sum, and ``loss_<name>`` for each loss of the fusion.
        """
        return self.loss_of_share(samples, 1.0)

    def loss_of_share(self, samples: Mapping[str, Any], share: float) -> dict[str, Tensor]:
        """Return the losses of a share of the batch, its first rows, for which all B targets are negatives.

        Targets that are only negatives get no gradient.

        Args:
            samples: A batch as :meth:`forward` takes it.
            share: Share > 0 of the B triplets, rounded up to a whole triplet; 1 gives the losses of the batch.
        """
        pictures, texts = read_pairs(samples, self._tokens_shape)
        both = torch.cat([pictures, read_targets(samples, texts)])
        if not self._is_tower_trained:  # a second pass over the batch finds the outputs for all pictures again
            both = self._tower_tokens(both)
        both = both.unflatten(0, (2, -1))
        rows = math.ceil(share * len(texts))
        reference, target = self._tower_tokens(both[:, :rows].flatten(0, 1)).chunk(2)
        words, lengths = self._embed_words(texts[:rows])
        fused, found = encode(self._encoder, [self._fused_kind(reference, words, lengths), self._picture_kind(target)])
        targets = F.normalize(self.vision_proj(found), dim=-1)
        if rows < len(texts):
            targets = torch.cat([targets, self.encode_target(both[1, rows:])])
        has_prompt = self.fusion == "sentence_prompt"
        if has_prompt:
            query, text_query = self._read_texts(
                [self._sentence_states(fused, words), self._prompted_states(words)], lengths
            )
        else:
            query, text_query = self._project_fused(fused), None
        outputs = TrainingOutputs(
            query=query,
            targets=targets,
            temperature=self.temp,
            target_ids=samples.get("target_id"),
            text_query=text_query,
            sentence_prompt=fused if has_prompt else None,
            prompt_tokens=self.prompt_tokens if has_prompt else None,
            label_smoothing=self.label_smoothing,
        )
        losses = {name: LOSSES[name](outputs) for name in self.loss_weights}
        total = torch.stack([self.loss_weights[name] * loss for name, loss in losses.items()]).sum()
        return {"loss": total, **{f"loss_{name}": loss for name, loss in losses.items()}}

    @torch.no_grad()
    def encode_query(self, samples: Mapping[str, Any], mode: str = "multimodal") -> Tensor:
        """Return unit-length query vectors ``(B, embed_dim)``.

        Args:
            samples: A batch with ``image`` ``(B, 3, H, W)`` and ``text_input``, B strings (a single string is one
                text); each is read only if the mode needs it.
            mode: ``multimodal`` (both), ``text`` (a pass over the text alone, with the learned prompt if the fusion has
                one) or ``image`` (the mean of the reference's target vectors, which finds similar images).

        Raises:
            ValueError: If the mode is unknown, or the samples are not such a batch.
        """
        check_argument("model.mode", Mode, mode)
        if mode == "image":
            return F.normalize(self.encode_target(read_pictures(samples)).mean(dim=1), dim=-1)
        if mode == "text":
            words, lengths = self._embed_words(read_texts(samples))
            return self._read_texts([self._prompted_states(words)], lengths)[0]
        return self.query_features(samples)

    @torch.no_grad()
    def encode_target(self, image: Tensor) -> Tensor:
        """Return unit-length target vectors ``(B, K, embed_dim)`` of images ``(B, 3, H, W)``."""
        return self.target_features(image)

    @property
    def temperature(self) -> Tensor:
        """Temperature by which scores are divided."""
        return self.temp

    def query_features(self, samples: Mapping[str, Any]) -> Tensor:
        """Return :meth:`encode_query` of ``image`` and ``text_input``, with gradients."""
        pictures, texts = read_pairs(samples, self._tokens_shape)
        words, lengths = self._embed_words(texts)
        fused = encode(self._encoder, [self._fused_kind(self._tower_tokens(pictures), words, lengths)])[0]
        if self.fusion == "joint":
            return self._project_fused(fused)
        return self._read_texts([self._sentence_states(fused, words)], lengths)[0]

    def target_features(self, image: Tensor) -> Tensor:
        """Return :meth:`encode_target`, with gradients."""
        return F.normalize(self.vision_proj(self._query_outputs(image)), dim=-1)

    @torch.no_grad()
    def extract_features(self, samples: Mapping[str, Any], mode: str = "multimodal") -> BlipOutputFeatures:
        """Return features in LAVIS's container, for LAVIS's three modes.

        Mode ``image`` fills ``image_embeds`` ``(B, K, hidden)`` and ``image_embeds_proj``, the result of
        :meth:`encode_target`. Mode ``text`` fills ``text_embeds_proj`` ``(B, embed_dim)``, the text-only query. Mode
        ``multimodal`` fills ``multimodal_embeds`` ``(B, embed_dim)``, the result of :meth:`encode_query`, and the image
        features of the reference.

        Raises:
            ValueError: If the mode is unknown.
        """
        check_argument("model.mode", Mode, mode)
        image_embeds = self._query_outputs(read_pictures(samples)) if mode != "text" else None
        return BlipOutputFeatures(
            image_embeds=image_embeds,
            image_embeds_proj=None if image_embeds is None else F.normalize(self.vision_proj(image_embeds), dim=-1),
            text_embeds_proj=self.encode_query(samples, "text") if mode == "text" else None,
            multimodal_embeds=self.encode_query(samples) if mode == "multimodal" else None,
        )

    @property
    def image_tower(self) -> nn.Module:
        """The module that :meth:`image_features` depends on."""
        return self.visual_encoder

    def image_features(self, images: Tensor) -> Tensor:
        """Return the tower's tokens ``(B, P, vit width)`` of pictures ``(B, 3, H, W)``, in the tower's precision.

        With ``vit_precision: fp16`` the tokens are float16, although ViT-g adds its half-precision layers up in
        float32: the additional bits carry no information and would double the size of cached features.

        Raises:
            ValueError: If the tower is stored in half precision and the pictures are on a CPU.
        """
        is_half = any(weight.dtype == torch.float16 for weight in self.visual_encoder.parameters())
        if is_half and images.device.type == "cpu":
            raise ValueError("model.vit_precision: 'fp16' needs a GPU; on a CPU set model.vit_precision: fp32.")
        precision = torch.autocast(images.device.type, dtype=torch.float16) if is_half else nullcontext()
        with precision, torch.set_grad_enabled(torch.is_grad_enabled() and self._is_tower_trained):
            parts = [self.visual_encoder(part) for part in self._parts(images)]
        tokens = torch.cat(parts) if len(parts) > 1 else parts[0]
        return tokens.half() if is_half else tokens

    def _parts(self, images: Tensor) -> Sequence[Tensor]:
        """Split pictures for a frozen tower on a CPU so that its widest states take no more than `_LARGEST_BLOCK_KEPT`.

        The tokens are the same bits, because every product of these towers has one row per token, hence many rows.
        """
        if images.device.type != "cpu" or self._is_tower_trained:
            return [images]
        widths = (layer.out_features for layer in self.visual_encoder.modules() if isinstance(layer, nn.Linear))
        size = len(images) * self._tokens_shape[0] * max(widths, default=1) * images.element_size()
        return images.tensor_split(max(1, min(len(images), math.ceil(size / _LARGEST_BLOCK_KEPT))))

    @property
    def _tokens_shape(self) -> tuple[int, int]:
        """Number and width of the tower's tokens for one picture."""
        tower: Any = self.visual_encoder
        patches = tower if isinstance(tower, ClipVisionTransformer) else tower.patch_embed
        return int(patches.num_patches) + 1, int(tower.num_features)

    @property
    def _is_tower_trained(self) -> bool:
        # freeze_vit would be the wrong test, because adapters can be trained inside a frozen tower.
        return any(weight.requires_grad for weight in self.visual_encoder.parameters())

    @property
    def _encoder(self) -> Any:
        return self.Qformer["bert"].encoder

    def _tower_tokens(self, image: Tensor) -> Tensor:
        """Return tokens ``(B, P, vit width)`` of pictures ``(B, 3, H, W)``, or of such tokens themselves."""
        image = check_pictures(image, self._tokens_shape)
        return image if image.ndim == 3 else self.image_features(image)

    def _embed_words(self, text: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Return word embeddings ``(B, T, hidden)`` without positions, and the number of each text's tokens.

        All passes share one look-up, because each look-up gives the whole table a dense gradient.
        """
        ids, lengths = token_ids(self.tokenizer, text, self.max_txt_len)
        # A copy that blocks would wait until a GPU has done everything queued before it.
        ids = ids.to(self.device, non_blocking=True)
        return self.Qformer["bert"].embeddings.word_embeddings(ids), lengths

    def _placed(self, words: Tensor) -> Tensor:
        """Add the positions 0, 1, … to ``(B, L, hidden)``."""
        positions = torch.arange(words.shape[1], device=words.device)
        return words + self.Qformer["bert"].embeddings.position_embeddings(positions)

    def _as_input(self, embeddings: Tensor) -> Tensor:
        """Return the layers' input of embeddings ``(B, L, hidden)``: their layer norm and dropout."""
        return self.Qformer["bert"].embeddings(query_embeds=embeddings)

    def _picture_kind(self, tokens: Tensor) -> Sequences:
        """Return the queries alone, in front of B pictures; the query outputs are read."""
        queries = self._as_input(self.query_tokens.expand(len(tokens), -1, -1))
        return Sequences(queries, queries[:, :0], "queries", ImageTokens(tokens, self.ln_vision))

    def _fused_kind(self, tokens: Tensor, words: Tensor, lengths: Sequence[int]) -> Sequences:
        """Return [queries; text] in front of B pictures; the query outputs are read, or the text's [CLS]."""
        reads_queries = self.fusion == "sentence_prompt" or self.pooling == "mean_queries"
        return Sequences(
            queries=self._as_input(self.query_tokens.expand(len(tokens), -1, -1)),
            text=self._as_input(self._placed(words)),
            read="queries" if reads_queries else [0] * len(tokens),
            images=ImageTokens(tokens, self.ln_vision),
            lengths=lengths,
        )

    def _sentence_states(self, fused: Tensor, words: Tensor) -> tuple[Tensor, int]:
        """Return the input [Z; text] of SPRC's second pass, and the position of [CLS], which is read."""
        return self._as_input(torch.cat([fused, self._placed(words)], dim=1)), fused.shape[1]

    def _prompted_states(self, words: Tensor) -> tuple[Tensor, int]:
        """Return the input of a text without an image, and the position of [CLS], which is read."""
        if self.fusion == "joint":
            return self._as_input(self._placed(words)), 0
        # SPRC inserts the prompt after [CLS] *before* it adds positions, so the prompt takes positions 1..K.
        prompt = self.prompt_tokens.expand(len(words), -1, -1)
        return self._as_input(self._placed(torch.cat([words[:, :1], prompt, words[:, 1:]], dim=1))), 0

    def _read_texts(self, passes: Sequence[tuple[Tensor, int]], lengths: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the unit-length projection ``(B, embed_dim)`` of the read position for each of some passes.

        The passes see no image and treat every position as text. Each has states ``(B, L, hidden)``, at the end of
        which the words of B texts of these lengths are padded to the longest.
        """
        states = torch.cat([own for own, _ in passes])
        before = states.shape[1] - max(lengths)
        read = [position for own, position in passes for _ in range(len(own))]
        kind = Sequences(states[:, :0], states, read, lengths=[before + length for length in lengths] * len(passes))
        return F.normalize(self.text_proj(encode(self._encoder, [kind])[0]), dim=-1).chunk(len(passes))

    def _project_fused(self, fused: Tensor) -> Tensor:
        """Return the joint fusion's query from its [CLS] ``(B, hidden)`` or its query outputs ``(B, K, hidden)``."""
        pooled = fused if fused.ndim == 2 else fused.mean(dim=1)
        return F.normalize(self.text_proj(pooled), dim=-1)

    def _query_outputs(self, image: Tensor) -> Tensor:
        """Return the outputs ``(B, K, hidden)`` of the Q-Former over the queries alone."""
        return encode(self._encoder, [self._picture_kind(self._tower_tokens(image))])[0]


def _build_tower(
    vit_model: str, image_size: int, vit_config: dict[str, Any], drop_path_rate: float, use_grad_checkpoint: bool
) -> nn.Module:
    """Build the image tower with random weights; LAVIS's own functions would first download weights."""
    if vit_model == "clip_L":
        return ClipVisionTransformer(
            input_resolution=image_size, use_grad_checkpointing=use_grad_checkpoint, **{**_CLIP_L, **vit_config}
        )
    return eva_vit.VisionTransformer(
        img_size=image_size,
        use_mean_pooling=False,
        qkv_bias=True,
        drop_path_rate=drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_checkpoint=use_grad_checkpoint,
        **{**_EVA_G, **vit_config},
    )


def _checked_loss_weights(fusion: str, weights: Mapping[str, float] | None) -> dict[str, float]:
    given = weights or {}
    unknown = [name for name in given if name not in LOSSES]
    if unknown:
        raise ValueError(f"model.loss_weights: {', '.join(map(str, unknown))} is no loss; known: {', '.join(LOSSES)}.")
    prompted = [name for name in given if name in ("rtc", "align")]
    if fusion == "joint" and prompted:
        raise ValueError(f"model.loss_weights: {', '.join(prompted)} needs model.fusion: sentence_prompt.")
    return {**DEFAULT_LOSS_WEIGHTS[fusion], **{name: float(weight) for name, weight in given.items()}}
