"""TSCIR's stage II: low-rank adapters teach CLIP's text tower to compose a pseudo-word with a modification text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lavis.common.registry import registry
from torch import Tensor, nn

from lavis_cir_plugin.core.checkpoints import read_checkpoint, state_in
from lavis_cir_plugin.core.model_parts import keep_as_buffers
from lavis_cir_plugin.core.settings import check_flag, check_whole
from lavis_cir_plugin.methods.tscir.layers import ComposingAdapter
from lavis_cir_plugin.methods.tscir.losses import mixed_negatives_loss, soft_text_alignment_loss
from lavis_cir_plugin.methods.tscir.mapping import PLAIN_SENTENCE, TscirMapping, check_blocks
from lavis_cir_plugin.models.clip_cir import image_ids
from lavis_cir_plugin.models.contrastive_losses import symmetric_contrastive_loss
from lavis_cir_plugin.models.model_inputs import read_pairs, read_pictures, read_texts
from lavis_cir_plugin.models.open_clip_towers import HiddenStateEdit, count_blocks


@registry.register_model("tscir_composing")
class TscirComposing(TscirMapping):
    r"""A trained mapping and composing adapters; the query is the feature of "a photo of * that {text}".

    After each of ``adapter_blocks`` every token goes through a low-rank residual; where a block has an injection too,
    that comes first. Only the adapters are trained; CLIP and stage I stay as loaded, in eval mode. Stage I's weights
    are buffers here, so that a checkpoint holds everything but CLIP.

    With query q, target image w, reference image r, t the feature of "a photo of *" of the reference and c of its
    caption:

    .. math:: L = L_\mathrm{mix}(q, w) + L_\mathrm{con}(r, t) + 0.2\,L_\mathrm{sta}(c, t, r)

    are the losses ``compose`` (:func:`~lavis_cir_plugin.losses.mixed_negatives_loss`), ``reference`` and ``sta`` of
    ``loss_weights``. ``sta`` needs triplets with a ``reference_caption``.

    Args:
        clip_model, pretrained, image_size, tokenizer, pixels, template, hidden_width, dropout, injection_blocks,
            injection_width, injection_heads, injection_layers, loss_weights: As of ``tscir_mapping``.
        mapping_checkpoint: A checkpoint of ``tscir_mapping`` with the same settings and CLIP; may be empty where
            ``finetuned`` holds a checkpoint of this model, which contains it.
        adapter_blocks: Text blocks, from 0, after which there is an adapter.
        adapter_rank: >= 1.
        temperature: Divides all scores in training; fixed, > 0.
        mixed_negatives: Hard negatives mixed for each query, >= 0.
        mixed_negatives_scaled: Whether the mixtures' scores are divided by the temperature. The released code does not,
            which makes them nearly inert; ``false`` is that.
        alignment_with_target: Whether L_sta compares with the *target's* image, as the released code does. It pulls
            "a photo of *" of the reference to look like the target to the reference's caption, which contradicts
            ``reference``; so it is off.

    Source: TSCIR (arXiv 2504.17990), stage II.

    Raises:
        ValueError: If a choice is unknown or impossible, with what is allowed.
    """

    row_label = "stage I + II"
    kept_in_checkpoints = ("mapping_checkpoint",)
    """Keys of ``model`` that name files whose whole content a checkpoint of this model holds."""
    baselines: Mapping[str, str] = {**TscirMapping.baselines, "mapping": "stage I alone"}
    DEFAULT_LOSS_WEIGHTS: Mapping[str, float] = {"compose": 1.0, "reference": 1.0, "sta": 0.2}

    def __init__(
        self,
        *,
        clip_model: str = "ViT-L-14-quickgelu",
        pretrained: str | None = None,
        image_size: int | None = None,
        tokenizer: str | None = None,
        pixels: str = "auto",
        template: str = "a photo of * that {}",
        hidden_width: int = 512,
        dropout: float = 0.1,
        injection_blocks: Sequence[int] = (3, 7, 9),
        injection_width: int = 128,
        injection_heads: int = 8,
        injection_layers: int = 2,
        temperature: float = 0.01,
        loss_weights: Mapping[str, float] | None = None,
        mapping_checkpoint: str | None = None,
        adapter_blocks: Sequence[int] = (1, 3, 5, 7, 9, 11),
        adapter_rank: int = 128,
        mixed_negatives: int = 10,
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
        """Return what the constructor would be given; a checkpoint of this model holds the mapping already."""
        values = super()._values(cfg)
        return {**values, "mapping_checkpoint": None} if cfg.get("load_finetuned") else values

    def _load_mapping(self, path: str) -> None:
        """Load a checkpoint of stage I, and nothing that this model's own checkpoints would not hold."""
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
        """Check a ``model`` section without building anything.

        Raises:
            ValueError: The first unknown or impossible value, and what is allowed.
        """
        super().check_config(cfg)
        values = cls._values(cfg)
        check_whole("adapter_rank", values["adapter_rank"])
        check_whole("mixed_negatives", values["mixed_negatives"], least=0)
        for key in ("mixed_negatives_scaled", "alignment_with_target"):
            check_flag(key, values[key])
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
            samples: ``image`` (the reference) and ``target``, ``(B, 3, H, W)`` or features ``(B, 1 + P, D)``;
                ``text_input``; optionally ``target_id`` and ``image_id`` ``(B,)``, equal for the same target or
                reference; ``reference_caption`` unless ``sta`` has weight 0.

        Returns:
            ``loss``, the weighted sum, and ``loss_<name>`` of each.

        Raises:
            ValueError: If the reference's captions are needed and missing, or pictures have two views.
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
        tokens, target_tokens = self._tokens(torch.cat([pictures, read_pictures(samples, "target")])).chunk(2)
        reference, target = (nn.functional.normalize(t[:, 0].float(), dim=-1) for t in (tokens, target_tokens))
        composed = self._sentences(texts)
        needs_plain = bool(self.loss_weights["reference"] or self.loss_weights["sta"])
        # One pass over both kinds of sentence: the tower costs by the call as well as by the row.
        plain = [PLAIN_SENTENCE] * len(composed) * needs_plain
        read = self._read([*composed, *plain], torch.cat([tokens, tokens]) if needs_plain else tokens)
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
        """Return unit-length query vectors ``(B, D)``; ``mapping`` leaves the adapters out, the rest as stage I.

        Raises:
            ValueError: If the mode is unknown, or the samples are no such batch.
        """
        if mode != "mapping":
            return super().encode_query(samples, mode)
        self.are_adapters_off = True
        try:
            return super().encode_query(samples)
        finally:
            self.are_adapters_off = False

    are_adapters_off = False

    def _edits(self, patches: Tensor | None, looked: list[Tensor]) -> list[tuple[int, HiddenStateEdit]]:
        """Return stage I's edits, then the adapters."""
        injections = super()._edits(patches, looked)
        if self.are_adapters_off:
            return injections

        def adapt(adapter: nn.Module) -> HiddenStateEdit:
            return lambda hidden, place, read: adapter(hidden)

        return [*injections, *((int(block), adapt(adapter)) for block, adapter in self.adapters.items())]
