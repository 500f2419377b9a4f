"""open_clip's CLIP as a composed-retrieval model: the sum of image and text feature, the zero-shot baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from lavis.models.blip_models.blip_outputs import BlipOutputFeatures
from torch import Tensor, nn

from lavis_cir_plugin import CONFIGS
from lavis_cir_plugin.core.checkpoints import load_strictly, read_state
from lavis_cir_plugin.core.settings import check_choice, check_flag, check_whole
from lavis_cir_plugin.models.combiner import Combiner, read_combiner
from lavis_cir_plugin.models.contrastive_losses import contrastive_loss, symmetric_contrastive_loss
from lavis_cir_plugin.models.model_inputs import check_pictures, read_pairs, read_pictures, read_texts
from lavis_cir_plugin.models.open_clip_towers import (
    PIXELS,
    ImageTower,
    TextTower,
    check_clip_model,
    load_clip,
    pixel_normalisation,
)

TYPES = {path.stem[len("clip_") :]: str(path) for path in sorted((CONFIGS / "models").glob("clip_*.yaml"))}
"""The type is the open_clip model's name; one file serves all models that stand on open_clip."""

_LARGEST_LOGIT_SCALE = 100.0


@registry.register_model("clip_cir")
class ClipCir(BaseModel):  # type: ignore[misc]
    r"""CLIP with late fusion: a query is the normalised sum of the image's and the text's feature.

    .. math:: q = \frac{\hat g + \hat t}{\lVert \hat g + \hat t \rVert}, \qquad s(q, v) = q \cdot \hat v

    Hats are unit length. ``image`` and ``text`` alone are the two other zero-shot baselines.

    On triplets (samples with ``target``) it is trained to contrast queries with targets; on image-caption pairs as
    CLIP was, also with SigLIP's towers. The temperature is CLIP's learned one.

    Wherever a batch of pictures ``(B, 3, H, W)`` is taken, what :meth:`image_features` returns is taken as well:
    four dimensions are pictures, three are features.

    Args:
        clip_model: A model of open_clip with a CLIP or SigLIP text tower, such as ``ViT-L-14-quickgelu``.
        pretrained: A tag of open_clip, such as ``openai``, or a file; empty: random weights.
        image_size: Pixels per side; other than the model's own interpolates position embeddings.
        tokenizer: Folder of a Hugging Face tokenizer (SigLIP) in place of the one that would be downloaded.
        pixels: Mean of the pixels that the weights were trained with: ``auto`` (as open_clip says), ``clip``, or
            ``inception`` (0.5). The data sets always hand over CLIP's; the tower converts.
        freeze_vit: Whether the image tower stays as loaded, in eval mode.
        freeze_text: Whether the text tower does, and the temperature.
        fusion: ``sum``; ``text``, a query that is the text's feature alone, as in the seed paper's Retrieval-DPO; or
            ``combiner``, CLIP4Cir's network over both features (:class:`~lavis_cir_plugin.models.combiner.Combiner`).
        combiner: Of that fusion: CLIP4Cir's file of the combiner; empty: a new one, to be trained. The CLIP that
            CLIP4Cir has fine-tuned is a file for ``pretrained``.
        text_projection: Whether the text tower's last linear layer brings its features into the space of the images'.
            The released code of Retrieval-DPO leaves it out (``false``), so that scores say nothing; it can where
            both spaces happen to be of one width.

    Raises:
        ValueError: If a choice is unknown or impossible, with what is allowed.
        FileNotFoundError: If weights or tokenizer are neither local nor to be had.
    """

    PRETRAINED_MODEL_CONFIG_DICT = TYPES
    row_label = "image + text"
    """What to call the model itself in a report."""
    fusion = "sum"
    baselines: Mapping[str, str] = {"image": "image only", "text": "text only"}
    """Modes of :meth:`encode_query` that are reported beside the model itself, and what to call them."""

    def __init__(
        self,
        *,
        clip_model: str = "ViT-L-14-quickgelu",
        pretrained: str | None = None,
        image_size: int | None = None,
        tokenizer: str | None = None,
        pixels: str = "auto",
        freeze_vit: bool = True,
        freeze_text: bool = False,
        fusion: str = "sum",
        text_projection: bool = True,
        combiner: str | None = None,
    ) -> None:
        super().__init__()
        self._build_towers(clip_model, pretrained, image_size, tokenizer, pixels, with_patches=False)
        self.fusion = fusion
        if fusion == "text":
            self.row_label = "text as query"
        if not text_projection:
            self.text_tower.skip_projection()
        if fusion == "combiner":
            self.row_label = "combiner"
            width = self.image_tower.width
            self.combiner = read_combiner(combiner, width) if combiner else Combiner(width)
        self._freeze(freeze_vit, freeze_text)

    def _build_towers(
        self,
        clip_model: str,
        pretrained: str | None,
        image_size: int | None,
        tokenizer: str | None,
        pixels: str,
        with_patches: bool,
    ) -> None:
        clip = load_clip(clip_model, pretrained, image_size)
        normalisation = pixel_normalisation(clip_model, pretrained, pixels)
        self.image_tower = ImageTower(clip.visual, normalisation, with_patches)
        self.text_tower = TextTower(clip, clip_model, tokenizer)

    def _freeze(self, image: bool, text: bool) -> None:
        self.frozen: list[nn.Module] = [
            tower for tower, is_frozen in ((self.image_tower, image), (self.text_tower, text)) if is_frozen
        ]
        for tower in self.frozen:
            tower.requires_grad_(False)
        bias = getattr(self.text_tower.clip, "logit_bias", None)
        if bias is not None:
            bias.requires_grad_(False)  # SigLIP's; no loss here reads it, and DDP would wait for its gradient
        self.train(self.training)

    @classmethod
    def _arguments(cls) -> dict[str, Any]:
        return dict(cls.__init__.__kwdefaults__ or {})

    @classmethod
    def _values(cls, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the constructor would be given: absent and empty keys have its defaults."""
        arguments = cls._arguments()
        return {**arguments, **{name: cfg[name] for name in arguments if cfg.get(name) is not None}}

    @classmethod
    def check_config(cls, cfg: Mapping[str, Any]) -> None:
        """Check a ``model`` section without building anything.

        Raises:
            ValueError: The first unknown or impossible value, and what is allowed.
        """
        values = cls._values(cfg)
        check_clip_model(values["clip_model"])
        check_choice("pixels", values["pixels"], ("auto", *PIXELS))
        if values["image_size"] is not None:
            check_whole("image_size", values["image_size"])
        for key in ("freeze_vit", "freeze_text", "text_projection"):
            if key in values:
                check_flag(key, values[key])
        if "fusion" in values:
            check_choice("fusion", values["fusion"], ("sum", "text", "combiner"))
            if values["combiner"] and values["fusion"] != "combiner":
                raise ValueError(
                    f"model.combiner: {values['combiner']} would not be read, because model.fusion is "
                    f"{values['fusion']}; set model.fusion: combiner."
                )
        is_frozen = values.get("freeze_vit", True) or values.get("freeze_text", True)
        if is_frozen and not values["pretrained"]:
            raise ValueError(
                "model.pretrained is empty, so frozen towers would keep random weights; set it to a tag of open_clip "
                "(such as openai) or a file"
                + (", or train both towers: model.freeze_vit=false." if "freeze_vit" in values else ".")
            )

    @classmethod
    def needs_finetuned(cls, cfg: Mapping[str, Any]) -> bool:
        """Return whether a part of the model would be random without ``finetuned``: here, a new combiner."""
        return cfg.get("fusion") == "combiner" and not cfg.get("combiner")

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> ClipCir:
        """Build from the ``model`` section of a config and load the weights it names.

        ``pretrained`` holds CLIP's weights; with ``load_finetuned: true``, ``finetuned`` holds a checkpoint of this
        model, which lacks the towers that were frozen.

        Raises:
            ValueError: If a checkpoint does not match the model.
            FileNotFoundError: If a checkpoint is missing and cannot be downloaded.
        """
        model = cls(**cls._values(cfg))
        if cfg.get("load_finetuned"):
            if not cfg.get("finetuned"):
                raise ValueError("model.load_finetuned is true and model.finetuned is empty; name a checkpoint file.")
            model.load_checkpoint(cfg["finetuned"])
        return model

    def load_checkpoint(self, url_or_filename: str) -> None:
        """Load a checkpoint of this model; frozen towers may be left out of the file.

        Raises:
            ValueError: If it does not match.
        """
        may_lack = tuple(f"{name}." for name, child in self.named_children() if child in self.frozen)
        load_strictly(self, read_state(url_or_filename), url_or_filename, may_lack=may_lack)

    def train(self, mode: bool = True) -> ClipCir:
        """Switch between training and evaluation; what is frozen stays in evaluation."""
        super().train(mode)
        for module in getattr(self, "frozen", ()):
            module.eval()
        return self

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the training loss.

        Args:
            samples: ``image`` ``(B, 3, H, W)`` and ``text_input``, B strings. With ``target``, like ``image``, and
                optionally ``target_id`` ``(B,)``, triplets; without, captions of the images, and optionally
                ``image_id`` ``(B,)``, equal for the same image.
        """
        if "target" not in samples:
            pictures, captions = read_pairs(samples, self.image_tower.tokens_shape)
            images, texts = self._unit_image(pictures), self._unit_text(captions)
            return {"loss": symmetric_contrastive_loss(images, texts, self.temperature, image_ids(samples))}
        query, targets = self.query_features(samples), self.target_features(read_pictures(samples, "target"))
        return {"loss": contrastive_loss(query, targets, self.temperature, samples.get("target_id"))}

    @property
    def temperature(self) -> Tensor:
        """What divides scores: CLIP's learned one."""
        return 1 / self.text_tower.clip.logit_scale.exp().clamp(max=_LARGEST_LOGIT_SCALE)

    def query_features(self, samples: Mapping[str, Any]) -> Tensor:
        """Return :meth:`encode_query` of ``image`` and ``text_input``, with gradients."""
        if self.fusion == "text":
            return self._unit_text(read_texts(samples))
        pictures, texts = read_pairs(samples, self.image_tower.tokens_shape)
        if self.fusion == "combiner":
            return self.combiner(self._tokens(pictures)[:, 0].float(), self._text(texts))
        return F.normalize(self._unit_image(pictures) + self._unit_text(texts), dim=-1)

    def target_features(self, image: Tensor) -> Tensor:
        """Return :meth:`encode_target`, with gradients."""
        return self._unit_image(image)

    @torch.no_grad()
    def encode_query(self, samples: Mapping[str, Any], mode: str = "multimodal") -> Tensor:
        """Return unit-length query vectors ``(B, D)``.

        Args:
            samples: ``image`` ``(B, 3, H, W)`` and ``text_input``, B strings (one string is one text), each only where
                the mode needs it.
            mode: ``multimodal`` (as ``fusion`` says), ``image`` or ``text``.

        Raises:
            ValueError: If the mode is unknown, or the samples are no such batch.
        """
        check_choice("mode", mode, ("multimodal", *self.baselines))
        if mode == "image":
            return self._unit_image(read_pictures(samples))
        return self._unit_text(read_texts(samples)) if mode == "text" else self.query_features(samples)

    @torch.no_grad()
    def encode_target(self, image: Tensor) -> Tensor:
        """Return unit-length target vectors ``(B, D)`` of images ``(B, 3, H, W)``: CLIP's image features."""
        return self.target_features(image)

    @torch.no_grad()
    def extract_features(self, samples: Mapping[str, Any], mode: str = "multimodal") -> BlipOutputFeatures:
        """Return features in LAVIS's container: un-normalised ``image_embeds`` ``(B, 1 + P, D)``, unit projections.

        Raises:
            ValueError: If the mode is unknown.
        """
        check_choice("mode", mode, ("multimodal", "text", "image"))
        tokens = self._tokens(read_pictures(samples)) if mode != "text" else None
        return BlipOutputFeatures(
            image_embeds=tokens,
            image_embeds_proj=None if tokens is None else F.normalize(tokens[:, 0], dim=-1),
            text_embeds_proj=self.encode_query(samples, "text") if mode == "text" else None,
            multimodal_embeds=self.encode_query(samples) if mode == "multimodal" else None,
        )

    def image_features(self, images: Tensor) -> Tensor:
        """Return ``(B, 1 + P, D)`` of pictures ``(B, 3, H, W)``: the image feature, then any patches it reads."""
        is_trained = any(weight.requires_grad for weight in self.image_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
            return self.image_tower(images)

    def _tokens(self, image: Tensor) -> Tensor:
        image = check_pictures(image, self.image_tower.tokens_shape)
        return image if image.ndim == 3 else self.image_features(image)

    def _unit_image(self, image: Tensor) -> Tensor:
        return F.normalize(self._tokens(image)[:, 0].float(), dim=-1)

    def _unit_text(self, texts: list[str]) -> Tensor:
        return F.normalize(self._text(texts), dim=-1)

    def _text(self, texts: list[str]) -> Tensor:
        return self.text_tower(self.text_tower.tokenize(texts)).float()


def image_ids(samples: Mapping[str, Any]) -> Tensor | None:
    """Return ``image_id`` ``(B,)``, equal for the same image, if the batch of every process has numbers there.

    Of several data sets in one batch LAVIS keeps what all samples have, so that it may be here and lack elsewhere. Some
    of LAVIS's caption data sets name images by text.
    """
    ids = samples.get("image_id")
    has_ids = torch.tensor(isinstance(ids, Tensor), dtype=torch.uint8, device=samples["image"].device)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(has_ids, dist.ReduceOp.MIN)
    return ids if has_ids else None
