"""The model ``tscir_mapping``, TSCIR's stage I: it maps an image to a word of CLIP's text tower."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Optional

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from lavis.common.registry import registry
from torch import Tensor, nn

from lavis_cir_plugin import CONFIGS
from lavis_cir_plugin.core.checkpoints import load_strictly, read_checkpoint, state_in
from lavis_cir_plugin.core.error_messages import did_you_mean
from lavis_cir_plugin.core.settings import (
    Folder,
    Limits,
    NotNegative,
    NotNegativeNumber,
    Positive,
    PositiveNumber,
    Probability,
    Weights,
    check_argument,
    one_of,
)
from lavis_cir_plugin.methods.tscir.layers import MappingNetwork, VisualInjection
from lavis_cir_plugin.methods.tscir.losses import soft_text_alignment_loss
from lavis_cir_plugin.methods.tscir.phi_weights import check_same_clip, load_phi, read_phi
from lavis_cir_plugin.models.clip_cir import ClipCir, ClipModel, ClipWeights, image_ids
from lavis_cir_plugin.models.contrastive_losses import symmetric_contrastive_loss
from lavis_cir_plugin.models.model_inputs import check_counts, read_pairs, read_pictures, read_texts
from lavis_cir_plugin.models.open_clip_towers import (
    PIXELS,
    PSEUDO_WORD,
    HiddenStateEdit,
    count_blocks,
)

PLAIN_SENTENCE = f"a photo of {PSEUDO_WORD}"
"""Sentence whose feature is trained to equal that of the image alone."""

_TOWERS = ("image_tower.", "text_tower.")


def _check_template(template: str) -> None:
    if re.findall(rf"{re.escape(PSEUDO_WORD)}|{{}}", template) != [PSEUDO_WORD, "{}"]:
        raise ValueError("")


Template = Annotated[
    str,
    Limits(
        words=f"a text with one {PSEUDO_WORD} for the image and after it one {{}} for the text, such as 'a photo of "
        f"{PSEUDO_WORD} that {{}}'",
        check=_check_template,
    ),
]
Blocks = Annotated[tuple[NotNegative, ...], Limits(words="distinct numbers of text blocks from 0")]


@registry.register_model("tscir_mapping")
class TscirMapping(ClipCir):
    r"""Maps an image to a pseudo-word; CLIP's text feature of a sentence with the word is a zero-shot query.

    The mapping network turns the image feature into a word :math:`s_0`, which replaces ``*`` in a sentence. After each
    of ``injection_blocks`` an injection adds information from the patches to the word's hidden state
    (:mod:`~lavis_cir_plugin.methods.tscir.layers`). The model trains on image-caption pairs, of which v' (weakly
    augmented) and v are two views of the image. The word is made of v'; t is the feature of "a photo of *", c that of
    the caption, and all features have unit length. The training loss is

    .. math:: L = 1\cdot L_\mathrm{con}(v, t) + 1\cdot L_\mathrm{con}(v', t) + 0.2\,L_\mathrm{sta}(c, t, v)

    with the losses ``con``, ``weak`` and ``sta`` of ``loss_weights``. Both CLIP towers keep their loaded weights and
    stay in evaluation mode. Pictures ``(B, 2, 3, H, W)``, from the processor ``clip_two_views``, hold v' and v; with
    pictures ``(B, 3, H, W)`` both views are equal.

    Pic2Word (arXiv 2302.03084) is the special case ``injection_blocks: []``, ``loss_weights: {weak: 0, sta: 0}`` on
    single views. For SEARLE's two orders of FashionIQ's captions set the data set's ``captions: both_orders_avg``.
    ``phi`` loads the published networks of Pic2Word, SEARLE and LinCIR.

    Args:
        clip_model, pretrained, image_size, tokenizer, pixels: See ``clip_cir``.
        template: Sentence of a query, in which ``*``, a separate word, stands for the image and a later ``{}`` for the
            modification text.
        phi: Published file of Pic2Word, SEARLE or LinCIR, which replaces a random mapping network and requires
            ``injection_blocks: []``. A network of LinCIR must have been trained without ``--l2_normalize``, which no
            file shows.
        hidden_width: Width of the mapping network's hidden layers; with ``phi`` the file determines it.
        dropout: Dropout probability in the mapping network, >= 0 and < 1.
        injection_blocks: Numbers, from 0, of the text blocks after which there is an injection. The published
            [3, 7, 9, 11] counts twelve blocks from 0. After the last block an injection has no effect, because the
            sentence is read at another position, so the last block is refused.
        injection_width, injection_heads, injection_layers: Dimensions of each injection.
        temperature: Fixed number > 0 by which all scores are divided in training.
        loss_weights: Weights >= 0 by name, merged over the defaults; a loss of weight 0 is not computed.

    Source: TSCIR (arXiv 2504.17990), stage I.

    Raises:
        ValueError: If a choice is unknown or impossible; the message says what is allowed.
    """

    PRETRAINED_MODEL_CONFIG_DICT = {  # noqa: RUF012 (LAVIS's class attribute); the tiny text tower has fewer blocks than the defaults name
        **ClipCir.PRETRAINED_MODEL_CONFIG_DICT,
        "tiny": str(CONFIGS / "models" / "tscir_tiny.yaml"),
    }
    row_label = "stage I"
    baselines: Mapping[str, str] = {"image": "image only", "text": "text only", "sum": "image + text"}
    is_zero_shot = True
    """Whether a benchmark's protocol line says that the model was trained on the benchmark's own training split."""
    DEFAULT_LOSS_WEIGHTS: Mapping[str, float] = {"con": 1.0, "weak": 1.0, "sta": 0.2}

    clip_fingerprint: Tensor

    def __init__(
        self,
        *,
        clip_model: ClipModel = "ViT-L-14-quickgelu",
        pretrained: Optional[ClipWeights] = None,
        image_size: Optional[Positive] = None,
        tokenizer: Optional[Folder] = None,
        pixels: Annotated[str, one_of(("auto", *PIXELS))] = "auto",
        template: Template = "a photo of * that {}",
        phi: Optional[Weights] = None,
        hidden_width: Positive = 512,
        dropout: Probability = 0.1,
        injection_blocks: Blocks = (3, 7, 9),
        injection_width: Positive = 128,
        injection_heads: Positive = 8,
        injection_layers: Positive = 2,
        temperature: PositiveNumber = 0.07,
        loss_weights: Optional[Mapping[str, NotNegativeNumber]] = None,
    ) -> None:
        super(ClipCir, self).__init__()
        self._build_towers(clip_model, pretrained, image_size, tokenizer, pixels, with_patches=bool(injection_blocks))
        self.template, self._temperature = template, float(temperature)
        if int(self.text_tower.tokenize([template.replace("{}", "")]).eq(self.text_tower.placeholder_id).sum()) != 1:
            raise ValueError(
                f"model.template: {template!r} does not hold the image as one word once the tokenizer of {clip_model} "
                f"has read it (there, {PSEUDO_WORD} is {self.text_tower.placeholder!r}); put blanks around "
                f"{PSEUDO_WORD}, and use that word for nothing else."
            )
        self.loss_weights = {**self.DEFAULT_LOSS_WEIGHTS, **dict(loss_weights or {})}
        self.injection_blocks = check_blocks("injection_blocks", injection_blocks, len(self.text_tower.blocks) - 1)
        self._build_mapping(phi, hidden_width, dropout)
        features, words = self.image_tower.width, self.text_tower.width
        # Names contain the block's number, so that a checkpoint with other blocks does not load.
        self.injections = nn.ModuleDict(
            {
                str(block): VisualInjection(words, features, injection_width, injection_heads, injection_layers)
                for block in self.injection_blocks
            }
        )
        self.register_buffer("clip_fingerprint", weights_fingerprint(self.image_tower, self.text_tower))
        self.silent_settings = self._silent_settings(
            {
                "clip_model": clip_model,
                "pretrained": pretrained,
                "pixels": pixels,
                "injection_blocks": self.injection_blocks,
                "injection_heads": injection_heads,
            }
        )
        self._freeze(image=True, text=True)

    def _build_mapping(self, phi: str | None, hidden_width: int, dropout: float) -> None:
        widths = self.image_tower.width, self.text_tower.width
        if not phi:
            has_patches = bool(self.injection_blocks)
            self.mapping = MappingNetwork(*widths, hidden_width, dropout, with_patches=has_patches)
            return
        found = read_phi(phi)
        check_same_clip(found, self.image_tower.visual, self.text_tower.clip, phi)
        self.mapping = MappingNetwork(*widths, found.hidden_width, dropout, False, found.activation)
        load_phi(found, self.mapping.word, phi)

    @classmethod
    def check_config(cls, cfg: Mapping[str, Any]) -> None:
        """Check a ``model`` section without building the model.

        Raises:
            ValueError: If a value is unknown or impossible; the message says what is allowed.
        """
        super().check_config(cfg)
        values = cls._values(cfg)
        if values.get("phi") and list(values["injection_blocks"]):
            raise ValueError(
                f"model.phi: {values['phi']} is a network without injection, and model.injection_blocks are "
                f"{list(values['injection_blocks'])}; set model.injection_blocks: []."
            )
        if values["injection_width"] % values["injection_heads"]:
            raise ValueError(
                f"model.injection_heads: {values['injection_heads']} does not divide model.injection_width: "
                f"{values['injection_width']}."
            )
        blocks = count_blocks(values["clip_model"])
        check_blocks("injection_blocks", values["injection_blocks"], blocks - 1)
        cls._check_loss_weights(values["loss_weights"])

    @classmethod
    def needs_finetuned(cls, cfg: Mapping[str, Any]) -> bool:
        """Return whether the model without ``finetuned`` has a random part: only ``phi`` gives it a mapping network."""
        return not cfg.get("phi")

    @classmethod
    def _check_loss_weights(cls, weights: Any) -> None:
        for name in weights or {}:
            if name not in cls.DEFAULT_LOSS_WEIGHTS:
                raise ValueError(
                    f"model.loss_weights.{name} is no loss of this model{did_you_mean(name, cls.DEFAULT_LOSS_WEIGHTS)}"
                )
        if not any({**cls.DEFAULT_LOSS_WEIGHTS, **(weights or {})}.values()):
            raise ValueError("model.loss_weights are all 0, so that nothing would be trained.")

    def load_checkpoint(self, url_or_filename: str) -> None:
        """Load a checkpoint of this model, which lacks CLIP's weights and must have been trained on equal ones.

        A checkpoint with merged adapters (``lavis-cir lora --merge``) holds CLIP's weights, and they are loaded too.
        Checkpoints of later runs lack them again; ``model.pretrained`` must then name the merged file.

        Raises:
            ValueError: If the checkpoint does not match, or was trained on other weights of CLIP.
        """
        self._load(read_checkpoint(url_or_filename), url_or_filename)

    def _load(self, content: Any, source: str, fresh: tuple[str, ...] = ()) -> None:
        """Load a file's content, in which tensors with the prefixes ``fresh`` may be missing."""
        state = state_in(content, source)
        if "clip_fingerprint" not in state:
            raise ValueError(
                f"checkpoint {source} was not trained by a model of TSCIR: it does not say on which weights of CLIP."
            )
        own = self.state_dict()
        # load_strictly lets buffers be missing, and stage I's weights are buffers in stage II.
        needed = [name for name in own if not name.startswith((*_TOWERS, *fresh))]
        missing = [name for name in needed if name not in state]
        if missing:
            raise ValueError(
                f"checkpoint {source}: {len(missing)} missing keys (first: {missing[0]}). It belongs to another model "
                "or stage: check model.arch and model.injection_blocks against it."
            )
        self._check_settings(content, source)
        load_strictly(self, state, source, fresh=fresh, may_lack=_TOWERS)
        if self._clip_names() <= state.keys():
            self.clip_fingerprint.copy_(weights_fingerprint(self.image_tower, self.text_tower))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights as torch does, also those of a resumed run or of adapters, after a comparison of CLIP's weights.

        Raises:
            ValueError: If they lack CLIP's weights and were trained on other ones.
        """
        theirs = state_dict.get("clip_fingerprint", self.clip_fingerprint)
        if not torch.equal(theirs.cpu(), self.clip_fingerprint.cpu()) and not self._clip_names() <= state_dict.keys():
            raise ValueError(
                "the checkpoint was trained on other weights of CLIP than model.clip_model and model.pretrained name; "
                "set both as for its training, or model.pretrained to the merged checkpoint that it went on from."
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _clip_names(self) -> set[str]:
        """Return the names of CLIP's weights, which only a checkpoint with merged adapters holds."""
        return {name for name, _ in self.named_parameters() if name.startswith(_TOWERS)}

    @classmethod
    def _silent_settings(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        heads = {"injection_heads": values["injection_heads"]} if values["injection_blocks"] else {}
        return {**super()._silent_settings(values), **heads}

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the training losses of a batch of image-caption pairs.

        Args:
            samples: A batch with ``image``, which holds pictures ``(B, 3, H, W)``, the views v' and v
                ``(B, 2, 3, H, W)``, or features ``(B, 1 + P, D)``; ``text_input``, B captions; and optionally
                ``image_id`` ``(B,)``, equal for the same image.

        Returns:
            ``loss``, the weighted sum, and ``loss_<name>`` for each loss.
        """
        weak, view = self._two_views(read_pictures(samples))
        if self.loss_weights["sta"]:
            check_counts(weak, read_texts(samples))
        ids = image_ids(samples)
        sentence = self._sentence_features([PLAIN_SENTENCE] * len(weak), weak)
        images, weak_images = (F.normalize(tokens[:, 0].float(), dim=-1) for tokens in (view, weak))
        losses: dict[str, Callable[[], Tensor]] = {
            "con": lambda: symmetric_contrastive_loss(images, sentence, self.temperature, ids),
            "weak": lambda: symmetric_contrastive_loss(weak_images, sentence, self.temperature, ids),
            "sta": lambda: soft_text_alignment_loss(
                self._unit_text(read_texts(samples)), sentence, images, self.temperature
            ),
        }
        return self._weighted(losses)

    def _weighted(self, losses: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
        found = {name: losses[name]() for name, weight in self.loss_weights.items() if weight}
        total = torch.stack([self.loss_weights[name] * loss for name, loss in found.items()]).sum()
        return {"loss": total, **{f"loss_{name}": loss for name, loss in found.items()}}

    def _two_views(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens of v' and v, from one call of the tower."""
        if image.ndim != 5:
            tokens = self._tokens(image)
            return tokens, tokens
        weak, view = self._tokens(image.transpose(0, 1).flatten(0, 1)).chunk(2)
        return weak, view

    @torch.no_grad()
    def encode_query(self, samples: Mapping[str, Any], mode: str = "multimodal") -> Tensor:
        """Return unit-length query vectors ``(B, D)``.

        Args:
            samples: A batch with ``image`` ``(B, 3, H, W)`` and ``text_input``, B strings (a single string is one
                text); each is read only if the mode needs it.
            mode: ``multimodal`` (the composed sentence), or a mode of plain CLIP: ``image``, ``text``, ``sum`` of both.

        Raises:
            ValueError: If the mode is unknown, or the samples are not such a batch.
        """
        check_argument("model.mode", Annotated[str, one_of(("multimodal", *self.baselines))], mode)
        return super().query_features(samples) if mode == "sum" else super().encode_query(samples, mode)

    @property
    def temperature(self) -> float:  # type: ignore[override]
        """Fixed temperature by which scores are divided in training."""
        return self._temperature

    def query_features(self, samples: Mapping[str, Any]) -> Tensor:
        """Return the feature of the composed sentence, with gradients."""
        return self._sentence_features(*self._query_inputs(samples))

    @property
    def attention_labels(self) -> list[str]:
        """Name of each map of :meth:`attention_maps`; without injections there is none."""
        return [f"block {block}" for block in self.injection_blocks]

    @torch.no_grad()
    def attention_maps(self, samples: Mapping[str, Any]) -> Tensor:
        """Return the attention of each injection for a query, ``(B, injections, grid, grid)``; each map sums to 1.

        A map is the attention of the injection's last layer, averaged over heads.
        """
        attention: list[Tensor] = []
        self._sentence_features(*self._query_inputs(samples), attention)
        grid = self.image_tower.grid
        return torch.stack(attention, dim=1).unflatten(2, (grid, grid))

    def _query_inputs(self, samples: Mapping[str, Any]) -> tuple[list[str], Tensor]:
        """Return the sentences of queries and the tokens of their images."""
        pictures, texts = read_pairs(samples, self.image_tower.tokens_shape)
        return self._sentences(texts), self._tokens(pictures)

    def _sentences(self, texts: Sequence[str]) -> list[str]:
        before, after = self.template.split("{}")
        return [f"{before}{text}{after}" for text in texts]

    def _sentence_features(
        self, sentences: Sequence[str], tokens: Tensor, attention: list[Tensor] | None = None
    ) -> Tensor:
        """Return the unit-length features ``(B, D)`` of sentences about images, which are given by their tokens."""
        word, patches = self.mapping(tokens)
        edits = self._edits(patches, attention if attention is not None else [])
        features = self.text_tower.compose(self.text_tower.tokenize(sentences), word, edits)
        return F.normalize(features.float(), dim=-1)

    def _edits(self, patches: Tensor | None, attention: list[Tensor]) -> list[tuple[int, HiddenStateEdit]]:
        """Return pairs of a block and an edit of its output; each edit appends its attention to ``attention``."""

        def inject(injection: nn.Module) -> HiddenStateEdit:
            def edit(hidden: Tensor, place: Tensor, read: Tensor) -> Tensor:
                changed, weights = injection(hidden, place, read, patches)
                attention.append(weights)
                return changed  # type: ignore[no-any-return]

            return edit

        return [(int(block), inject(injection)) for block, injection in self.injections.items()]


def weights_fingerprint(*modules: nn.Module) -> Tensor:
    """Return a hash of 16 bytes of the names and values of all parameters, independent of device and order."""
    digest = hashlib.blake2b(digest_size=16)
    for number, module in enumerate(modules):
        for name, weight in sorted(module.named_parameters()):
            digest.update(f"{number} {name} {tuple(weight.shape)}".encode())
            digest.update(np.ascontiguousarray(weight.detach().float().cpu().numpy()).tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def check_blocks(key: str, blocks: Sequence[int], count: int) -> tuple[int, ...]:
    """Return block numbers in ascending order.

    Raises:
        ValueError: If they are not distinct numbers in ``range(count)``.
    """
    given = list(blocks)
    if len(set(given)) < len(given) or not set(given) <= set(range(count)):
        why = " (an injection after the last block reaches no position that is read)" * key.startswith("injection")
        raise ValueError(
            f"model.{key} must be distinct numbers of text blocks from 0 to {count - 1}{why}, got {given}."
        )
    return tuple(sorted(int(block) for block in given))
