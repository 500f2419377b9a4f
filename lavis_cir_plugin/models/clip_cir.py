"""CLIP with late fusion: the zero-shot baseline ``clip_cir``, and the base class of TSCIR's models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from lavis.models.blip_models.blip_outputs import BlipOutputFeatures
from torch import Tensor, nn

from lavis_cir_plugin import CONFIGS
from lavis_cir_plugin.core.checkpoints import finetuned_in, load_strictly, read_checkpoint, state_in
from lavis_cir_plugin.core.model_parts import frozen_names
from lavis_cir_plugin.core.processes import rank_and_world
from lavis_cir_plugin.core.settings import (
    Folder,
    Limits,
    Positive,
    Probability,
    Weights,
    check_argument,
    check_arguments,
    constructor_arguments,
    one_of,
)
from lavis_cir_plugin.models.combiner import Combiner, read_combiner
from lavis_cir_plugin.models.contrastive_losses import contrastive_loss, symmetric_contrastive_loss, with_gradient_of
from lavis_cir_plugin.models.model_inputs import check_pictures, read_pairs, read_pictures, read_targets, read_texts
from lavis_cir_plugin.models.open_clip_towers import (
    PIXELS,
    ImageTower,
    TextTower,
    check_clip_model,
    load_clip,
    model_of_run,
    pixel_normalisation,
)
from lavis_cir_plugin.models.quick_gelu import replace_quick_gelu

TYPES = {path.stem.removeprefix("clip_"): str(path) for path in sorted((CONFIGS / "models").glob("clip_*.yaml"))}
"""Config file by model type. A type is named after the open_clip model; all models on open_clip share these files."""

_LARGEST_LOG_SCALE = math.log(100)
ClipModel = Annotated[str, Limits(words="the name of a model of open_clip")]
ClipWeights = Annotated[str, Limits(words="a tag of open_clip, a path")]


@registry.register_model("clip_cir")
class ClipCir(BaseModel):  # type: ignore[misc]
    r"""CLIP with late fusion: a query is the normalised sum of the image's and the text's feature.

    .. math:: q = \frac{\hat g + \hat t}{\lVert \hat g + \hat t \rVert}, \qquad s(q, v) = q \cdot \hat v

    Hats denote unit length. The image's or the text's feature alone gives the two other zero-shot baselines.

    On triplets (samples with ``target``) training contrasts queries with targets. On image-caption pairs the model is
    trained as CLIP was, also with SigLIP's towers. The temperature is CLIP's learned one.

    Methods that take a batch of pictures ``(B, 3, H, W)`` also take the features that :meth:`image_features` returns;
    the number of dimensions, four or three, tells them apart.

    Args:
        clip_model: Name of an open_clip model with a CLIP or SigLIP text tower, such as ``ViT-L-14-quickgelu``.
        pretrained: Tag of open_clip, such as ``openai``, or a file. Without it the weights are random.
        image_size: Pixels per side. If it differs from the model's own size, position embeddings are interpolated.
        tokenizer: Folder of a Hugging Face tokenizer (SigLIP), which replaces the download.
        pixels: Normalisation that the weights were trained with: ``auto`` (open_clip's information), ``clip``, or
            ``inception`` (mean and deviation 0.5). The data sets always normalise as CLIP does; the tower converts.
        freeze_vit: Whether the image tower keeps its loaded weights and stays in evaluation mode.
        freeze_text: Whether the text tower and the temperature keep theirs.
        fusion: ``sum``; ``text``, which takes the text's feature alone as the query, like the seed paper's
            Retrieval-DPO; or ``combiner``, CLIP4Cir's network over both features
            (:class:`~lavis_cir_plugin.models.combiner.Combiner`).
        combiner: CLIP4Cir's file of its combiner, for ``fusion: combiner``. Without it the combiner is new and has to
            be trained. CLIP4Cir's fine-tuned CLIP is another file, for ``pretrained``.
        text_projection: Whether the text tower's last linear layer maps its features into the space of the images'
            features. With ``false``, as in the released code of Retrieval-DPO, scores compare two spaces and say
            nothing; this needs a text tower as wide as the image feature.
        label_smoothing: Share of the probability that the loss spreads evenly over a batch's different targets.

    Raises:
        ValueError: If a choice is unknown or impossible; the message says what is allowed.
        FileNotFoundError: If weights or tokenizer are neither local nor downloadable.
    """

    PRETRAINED_MODEL_CONFIG_DICT = TYPES
    row_label = "image + text"
    """Name of the model's own row in a report."""
    fusion = "sum"
    baselines: Mapping[str, str] = {"image": "image only", "text": "text only"}
    """Names of the rows beside the model's own, by the mode of :meth:`encode_query` that they rank with."""

    def __init__(
        self,
        *,
        clip_model: ClipModel = "ViT-L-14-quickgelu",
        pretrained: Optional[ClipWeights] = None,
        image_size: Optional[Positive] = None,
        tokenizer: Optional[Folder] = None,
        pixels: Annotated[str, one_of(("auto", *PIXELS))] = "auto",
        freeze_vit: bool = True,
        freeze_text: bool = False,
        fusion: Literal["sum", "text", "combiner"] = "sum",
        text_projection: bool = True,
        combiner: Optional[Weights] = None,
        label_smoothing: Probability = 0.0,
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self._build_towers(clip_model, pretrained, image_size, tokenizer, pixels, with_patches=False)
        self.silent_settings = self._silent_settings(
            {"clip_model": clip_model, "pretrained": pretrained, "pixels": pixels}
        )
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
        if image:
            replace_quick_gelu(self.image_tower)
        bias = getattr(self.text_tower.clip, "logit_bias", None)
        if bias is not None:
            bias.requires_grad_(False)  # SigLIP's bias feeds no loss here, and DDP would wait for its gradient
        self.train(self.training)

    @classmethod
    def _values(cls, cfg: Mapping[str, Any]) -> dict[str, Any]:
        """Return the constructor's arguments by a ``model`` section."""
        return constructor_arguments(cls, cfg)

    @classmethod
    def check_config(cls, cfg: Mapping[str, Any]) -> None:
        """Check a ``model`` section without building the model.

        Raises:
            ValueError: If a value is unknown or impossible; the message says what is allowed.
        """
        values = cls._values(cfg)
        check_arguments(cls, "model", values)
        check_clip_model(values["clip_model"])
        if values.get("combiner") and values["fusion"] != "combiner":
            raise ValueError(
                f"model.combiner: {values['combiner']} would not be read, because model.fusion is {values['fusion']}; "
                "set model.fusion: combiner."
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
        """Return whether the model without ``finetuned`` has a random part, which is a new combiner."""
        return cfg.get("fusion") == "combiner" and not cfg.get("combiner")

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> ClipCir:
        """Build the model of a config's ``model`` section and load the weights that the section names.

        ``pretrained`` names CLIP's weights. With ``load_finetuned: true``, ``finetuned`` names a checkpoint of this
        model, which lacks the towers that were frozen in its training.

        Raises:
            ValueError: If a checkpoint does not match the model.
            FileNotFoundError: If a checkpoint is missing and cannot be downloaded.
        """
        model = cls(**cls._values(cfg))
        finetuned = finetuned_in(cfg)
        if finetuned is not None:
            model.load_checkpoint(finetuned)
        return model

    def load_checkpoint(self, url_or_filename: str) -> None:
        """Load a checkpoint of this model; the file may lack frozen weights.

        Raises:
            ValueError: If the checkpoint does not match the model, or was trained with other settings that no tensor
                shows.
        """
        content = read_checkpoint(url_or_filename)
        self._check_settings(content, url_or_filename)
        load_strictly(self, state_in(content, url_or_filename), url_or_filename, may_lack=frozen_names(self))

    def _check_settings(self, content: Any, source: str) -> None:
        """Refuse a run's checkpoint if settings differ that change the model's output but no tensor's name or shape."""
        model = model_of_run(content)
        if not model:
            return
        there = self._silent_settings(self._values(model))
        for key, here in self.silent_settings.items():
            if there.get(key, here) != here:
                raise ValueError(
                    f"checkpoint {source} was trained with model.{key}: {there[key]}, here it is {here}; set it to "
                    "that."
                )

    @classmethod
    def _silent_settings(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings, of all arguments of the constructor, that :meth:`_check_settings` compares."""
        normalisation = pixel_normalisation(values["clip_model"], values["pretrained"], values["pixels"])
        named = next((name for name, pair in PIXELS.items() if pair == normalisation), values["pixels"])
        return {"clip_model": values["clip_model"], "pixels": named}

    def train(self, mode: bool = True) -> ClipCir:
        """Switch between training and evaluation mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        for module in getattr(self, "frozen", ()):
            module.eval()
        return self

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the training loss.

        Args:
            samples: A batch with ``image`` ``(B, 3, H, W)`` and ``text_input``, B strings. A batch of triplets also has
                ``target``, shaped like ``image``, and optionally ``target_id`` ``(B,)``, equal for the same image. In a
                batch without ``target`` the texts are captions, and ``image_id`` ``(B,)`` is optional.
        """
        return self.loss_of_share(samples, 1.0)

    def loss_of_share(self, samples: Mapping[str, Any], share: float) -> dict[str, Tensor]:
        """Return the loss of a share of the batch, its first rows, for which all B rows are negatives.

        Pictures and captions that are only negatives get no gradient.

        Args:
            samples: A batch as :meth:`forward` takes it.
            share: Share > 0 of the B rows, rounded up to a whole row; 1 gives the loss of the batch.
        """
        texts = read_texts(samples)
        rows = math.ceil(share * len(texts))
        if "target" not in samples:
            pictures, _ = read_pairs(samples, self.image_tower.tokens_shape)
            images = with_gradient_of(rows, self._unit_image, self._of_frozen_tower(pictures))
            captions = with_gradient_of(rows, self._unit_text, texts)
            ids = image_ids(samples)
            loss = symmetric_contrastive_loss(images, captions, self.temperature, ids, rows, self.label_smoothing)
            return {"loss": loss}
        query = self.query_features(samples if share == 1 else self._first(rows, samples))
        targets = self._of_frozen_tower(read_targets(samples, texts))
        found = with_gradient_of(rows, self.target_features, targets)
        ids = samples.get("target_id")
        return {"loss": contrastive_loss(query, found, self.temperature, ids, self.label_smoothing)}

    def _first(self, rows: int, samples: Mapping[str, Any]) -> dict[str, Any]:
        first = {"text_input": read_texts(samples)[:rows]}
        if self.fusion == "text":
            return first
        return {**first, "image": self._of_frozen_tower(read_pictures(samples))[:rows]}

    def _of_frozen_tower(self, pictures: Tensor) -> Tensor:
        """Return the tokens of all pictures if the tower is frozen; a second pass over the batch finds them again."""
        return pictures if self._is_tower_trained else self._tokens(pictures)

    @property
    def _is_tower_trained(self) -> bool:
        return any(weight.requires_grad for weight in self.image_tower.parameters())

    @property
    def temperature(self) -> Tensor:
        """CLIP's learned temperature, by which scores are divided: at least 0.01."""
        log_scale = self.text_tower.clip.logit_scale
        # The gradient passes the limit, or else a scale beyond it (SigLIP's begin there) would never be trained again.
        excess = (log_scale - _LARGEST_LOG_SCALE).clamp(min=0).detach()
        return 1 / (log_scale - excess).exp()

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
            samples: A batch with ``image`` ``(B, 3, H, W)`` and ``text_input``, B strings (a single string is one
                text); each is read only if the mode needs it.
            mode: ``multimodal`` (fused by ``fusion``), ``image`` or ``text``.

        Raises:
            ValueError: If the mode is unknown, or the samples are not such a batch.
        """
        check_argument("model.mode", Annotated[str, one_of(("multimodal", *self.baselines))], mode)
        if mode == "image":
            return self._unit_image(read_pictures(samples))
        return self._unit_text(read_texts(samples)) if mode == "text" else self.query_features(samples)

    @torch.no_grad()
    def encode_target(self, image: Tensor) -> Tensor:
        """Return CLIP's image features of pictures ``(B, 3, H, W)`` as unit-length target vectors ``(B, D)``."""
        return self.target_features(image)

    @torch.no_grad()
    def extract_features(self, samples: Mapping[str, Any], mode: str = "multimodal") -> BlipOutputFeatures:
        """Return features in LAVIS's container.

        ``image_embeds`` ``(B, 1 + P, D)`` are not normalised; all other features have unit length.

        Raises:
            ValueError: If the mode is unknown.
        """
        check_argument("model.mode", Literal["multimodal", "text", "image"], mode)
        tokens = self._tokens(read_pictures(samples)) if mode != "text" else None
        return BlipOutputFeatures(
            image_embeds=tokens,
            image_embeds_proj=None if tokens is None else F.normalize(tokens[:, 0], dim=-1),
            text_embeds_proj=self.encode_query(samples, "text") if mode == "text" else None,
            multimodal_embeds=self.encode_query(samples) if mode == "multimodal" else None,
        )

    def image_features(self, images: Tensor) -> Tensor:
        """Return the image feature and any P patches of pictures ``(B, 3, H, W)``: ``(B, 1 + P, D)``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._is_tower_trained):
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
    """Return ``image_id`` ``(B,)``, equal for the same image, if every process's batch has numbers under this key.

    If a batch mixes data sets, LAVIS keeps only the keys that all samples have. Thus the key can be present on one
    process and absent on another. Some of LAVIS's caption data sets have texts under this key.
    """
    ids = samples.get("image_id")
    ids = ids if isinstance(ids, Tensor) else None
    if rank_and_world()[1] == 1:
        return ids
    has_ids = torch.tensor(ids is not None, dtype=torch.uint8, device=samples["image"].device)
    dist.all_reduce(has_ids, dist.ReduceOp.MIN)
    return ids if has_ids else None
