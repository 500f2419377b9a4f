"""The model ``tscir_composing``, TSCIR's stage II: adapters let CLIP's text tower compose a pseudo-word with a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Optional

import torch
from lavis.common.registry import registry
from torch import Tensor, nn

from lavis_cir_plugin.core.checkpoints import read_checkpoint, state_in
from lavis_cir_plugin.core.model_parts import keep_as_buffers
from lavis_cir_plugin.core.settings import (
    Folder,
    NotNegative,
    NotNegativeNumber,
    Positive,
    PositiveNumber,
    Probability,
    Weights,
    one_of,
)
from lavis_cir_plugin.methods.tscir.layers import ComposingAdapter
from lavis_cir_plugin.methods.tscir.losses import mixed_negatives_loss, soft_text_alignment_loss
from lavis_cir_plugin.methods.tscir.mapping import PLAIN_SENTENCE, Blocks, Template, TscirMapping, check_blocks
from lavis_cir_plugin.models.clip_cir import ClipModel, ClipWeights, image_ids
from lavis_cir_plugin.models.contrastive_losses import symmetric_contrastive_loss
from lavis_cir_plugin.models.model_inputs import read_pairs, read_pictures, read_targets, read_texts
from lavis_cir_plugin.models.open_clip_towers import PIXELS, HiddenStateEdit, count_blocks


@registry.register_model("tscir_composing")
class TscirComposing(TscirMapping):
    r"""Adds composing adapters to a trained mapping; the query is the feature of "a photo of * that {text}".

    After each of ``adapter_blocks`` every token goes through a low-rank residual, which follows the block's injection
    if there is one. Only the adapters are trained; CLIP and stage I keep their loaded weights and stay in evaluation
    mode. Stage I's weights are buffers here, so that a checkpoint holds everything but CLIP.

    For a query q, target image w and reference image r, let t be the feature of "a photo of *" with the reference's
    word and c that of its caption. The training loss is

    .. math:: L = L_\mathrm{mix}(q, w) + L_\mathrm{con}(r, t) + 0.2\,L_\mathrm{sta}(c, t, r)

    with the losses ``compose`` (:func:`~lavis_cir_plugin.methods.tscir.losses.mixed_negatives_loss`), ``reference`` and
    ``sta`` of ``loss_weights``. ``sta`` needs triplets with a ``reference_caption``.

    Args:
        clip_model, pretrained, image_size, tokenizer, pixels, template, hidden_width, dropout, injection_blocks,
            injection_width, injection_heads, injection_layers, loss_weights: See ``tscir_mapping``.
        mapping_checkpoint: Checkpoint of ``tscir_mapping`` with the same settings and CLIP. It may be empty if
            ``finetuned`` names a checkpoint of this model, which contains stage I.
        adapter_blocks: Numbers, from 0, of the text blocks after which there is an adapter.
        adapter_rank: Rank of each adapter, >= 1.
        temperature: Fixed number > 0 by which all scores are divided in training.
        mixed_negatives: Number of hard negatives mixed for each query, >= 0.
        mixed_negatives_scaled: Whether the mixtures' scores are divided by the temperature. With ``false``, as in the
            released code, the mixtures hardly matter.
        alignment_with_target: Whether L_sta compares with the *target's* image, as the released code does. This pulls
            the reference's sentence towards the target in the view of the reference's caption, which contradicts
            ``reference``, so the default is ``false``.

    Source: TSCIR (arXiv 2504.17990), stage II.

    Raises:
        ValueError: If a choice is unknown or impossible; the message says what is allowed.
    """

    row_label = "stage I + II"
    kept_in_checkpoints = ("mapping_checkpoint",)
    """Keys of ``model`` that name files whose content is contained in every checkpoint of this model."""
    baselines: Mapping[str, str] = {**TscirMapping.baselines, "mapping": "stage I alone"}
    DEFAULT_LOSS_WEIGHTS: Mapping[str, float] = {"compose": 1.0, "reference": 1.0, "sta": 0.2}

    def __init__(
        self,
        *,
        clip_model: ClipModel = "ViT-L-14-quickgelu",
        pretrained: Optional[ClipWeights] = None,
        image_size: Optional[Positive] = None,
        tokenizer: Optional[Folder] = None,
        pixels: Annotated[str, one_of(("auto", *PIXELS))] = "auto",
        template: Template = "a photo of * that {}",
        hidden_width: Positive = 512,
        dropout: Probability = 0.1,
        injection_blocks: Blocks = (3, 7, 9),
        injection_width: Positive = 128,
        injection_heads: Positive = 8,
        injection_layers: Positive = 2,
        temperature: PositiveNumber = 0.01,
        loss_weights: Optional[Mapping[str, NotNegativeNumber]] = None,
        mapping_checkpoint: Optional[Weights] = None,
        adapter_blocks: Blocks = (1, 3, 5, 7, 9, 11),
        adapter_rank: Positive = 128,
        mixed_negatives: NotNegative = 10,
        mixed_negatives_scaled: bool = True,
        alignment_with_target: bool = False,
    ) -> None:
        super().__init__(
            clip_model=clip_model,
            pretrained=pretrained,
            image_size=image_size,
            tokenizer=tokenizer,
            pixels=pixels,
            template=template,
            hidden_width=hidden_width,
            dropout=dropout,
            injection_blocks=injection_blocks,
            injection_width=injection_width,
            injection_heads=injection_heads,
            injection_layers=injection_layers,
            temperature=temperature,
            loss_weights=loss_weights,
        )
        self.mixed_negatives, self.mixed_negatives_scaled = mixed_negatives, mixed_negatives_scaled
        self.alignment_with_target = alignment_with_target
        blocks = check_blocks("adapter_blocks", adapter_blocks, len(self.text_tower.blocks))
        width = self.text_tower.width
        self.adapters = nn.ModuleDict({str(block): ComposingAdapter(width, adapter_rank) for block in blocks})
        if mapping_checkpoint:
            self._load_mapping(mapping_checkpoint)
        keep_as_buffers(self.mapping)
        keep_as_buffers(self.injections)
        self.frozen += [self.mapping, self.injections]
        self.train(self.training)

    @classmethod
    def _values(cls, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """Return the constructor's arguments; with ``load_finetuned`` the checkpoint itself contains the mapping."""
        values = super()._values(cfg)
        return {**values, "mapping_checkpoint": None} if cfg.get("load_finetuned") else values

    def _load_mapping(self, path: str) -> None:
        """Load a checkpoint of stage I.

        Raises:
            ValueError: If it is a checkpoint of stage II, or holds other weights of CLIP than the model.
        """
        content = read_checkpoint(path)
        state, own = state_in(content, path), self.state_dict()
        if any(name.startswith("adapters.") for name in state):
            raise ValueError(
                f"model.mapping_checkpoint: {path} holds adapters of stage II; name a checkpoint of tscir_mapping, or "
                "go on from this one with model.load_finetuned=true and model.finetuned."
            )
        if any(not torch.equal(state[name], own[name]) for name in self._clip_names() & state.keys()):
            raise ValueError(
                f"model.mapping_checkpoint: {path} holds other weights of CLIP than model.pretrained (adapters were "
                "merged into them); set model.pretrained to it as well."
            )
        self._load(content, path, fresh=("adapters.",))

    @classmethod
    def check_config(cls, cfg: Mapping[str, Any]) -> None:
        """Check a ``model`` section without building the model.

        Raises:
            ValueError: If a value is unknown or impossible; the message says what is allowed.
        """
        super().check_config(cfg)
        values = cls._values(cfg)
        blocks = check_blocks("adapter_blocks", values["adapter_blocks"], count_blocks(values["clip_model"]))
        if not blocks:
            raise ValueError("model.adapter_blocks is empty, so that nothing would be trained.")
        if not values["mapping_checkpoint"] and not cfg.get("load_finetuned"):
            raise ValueError(
                "model.mapping_checkpoint is empty, so the mapping would stay random: name the checkpoint of a "
                "tscir_mapping run, or a whole one with model.load_finetuned=true and model.finetuned=<file>."
            )

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the training losses of a batch of triplets.

        Args:
            samples: A batch with ``image`` (the reference) and ``target``, both pictures ``(B, 3, H, W)`` or features
                ``(B, 1 + P, D)``; ``text_input``, B strings; ``reference_caption``, unless ``sta`` has weight 0; and
                optionally ``target_id`` and ``image_id`` ``(B,)``, equal for the same target or reference.

        Returns:
            ``loss``, the weighted sum, and ``loss_<name>`` for each loss.

        Raises:
            ValueError: If the references' captions are needed and missing, or if pictures have two views.
        """
        if read_pictures(samples).ndim == 5:
            raise ValueError(
                "tscir_composing trains on single views; set datasets.<name>.vis_processor.train.name: target_pad."
            )
        pictures, texts = read_pairs(samples, self.image_tower.tokens_shape)
        if self.loss_weights["sta"] and "reference_caption" not in samples:
            raise ValueError(
                "model.loss_weights.sta needs the captions of the reference images, which these triplets do not have; "
                "set model.loss_weights.sta: 0."
            )
        tokens, target_tokens = self._tokens(torch.cat([pictures, read_targets(samples, texts)])).chunk(2)
        reference, target = (nn.functional.normalize(t[:, 0].float(), dim=-1) for t in (tokens, target_tokens))
        composed = self._sentences(texts)
        needs_plain = bool(self.loss_weights["reference"] or self.loss_weights["sta"])
        # One call for both kinds of sentence, because each call of the tower has a cost of its own.
        plain = [PLAIN_SENTENCE] * len(composed) * needs_plain
        read = self._sentence_features([*composed, *plain], torch.cat([tokens, tokens]) if needs_plain else tokens)
        query, sentence = read[: len(composed)], read[len(composed) :]
        ids = samples.get("target_id")
        losses: dict[str, Callable[[], Tensor]] = {
            "compose": lambda: mixed_negatives_loss(
                query, target, self.temperature, ids, self.mixed_negatives, self.mixed_negatives_scaled
            ),
            "reference": lambda: symmetric_contrastive_loss(reference, sentence, self.temperature, image_ids(samples)),
            "sta": lambda: soft_text_alignment_loss(
                self._unit_text(read_texts(samples, "reference_caption")),
                sentence,
                target if self.alignment_with_target else reference,
                self.temperature,
            ),
        }
        return self._weighted(losses)

    @torch.no_grad()
    def encode_query(self, samples: Mapping[str, Any], mode: str = "multimodal") -> Tensor:
        """Return unit-length query vectors ``(B, D)``; the mode ``mapping`` is stage I's sentence without adapters.

        The other modes are those of ``tscir_mapping``.

        Raises:
            ValueError: If the mode is unknown, or the samples are not such a batch.
        """
        if mode != "mapping":
            return super().encode_query(samples, mode)
        self.are_adapters_off = True
        try:
            return super().encode_query(samples)
        finally:
            del self.are_adapters_off  # an attribute of the model counts as a setting of an index's features

    are_adapters_off = False

    def _edits(self, patches: Tensor | None, attention: list[Tensor]) -> list[tuple[int, HiddenStateEdit]]:
        """Return stage I's edits, and then those of the adapters."""
        injections = super()._edits(patches, attention)
        if self.are_adapters_off:
            return injections

        def adapt(adapter: nn.Module) -> HiddenStateEdit:
            return lambda hidden, place, read: adapter(hidden)

        return [*injections, *((int(block), adapt(adapter)) for block, adapter in self.adapters.items())]
