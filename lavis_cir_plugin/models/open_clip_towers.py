"""open_clip's image and text tower: loading of weights, patch features, and edits of the text's hidden states."""

from __future__ import annotations

import logging
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lavis_cir_plugin import CONFIGS
from lavis_cir_plugin.core.checkpoints import (
    as_float32,
    config_in,
    load_strictly,
    read_checkpoint,
    state_in,
    verify_checkpoint,
)
from lavis_cir_plugin.core.error_messages import did_you_mean, first_line
from lavis_cir_plugin.core.normalisation import CLIP_MEAN_AND_STD
from lavis_cir_plugin.core.torchscript_weights import read_torchscript

PSEUDO_WORD = "*"
"""The word of a sentence that stands for the image."""

PIXELS = {"clip": CLIP_MEAN_AND_STD, "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}

# Numbers that OpenAI's archives hold beside the weights.
_ARCHIVE_NUMBERS = ("input_resolution", "context_length", "vocab_size")

# Candidates for the word that a tokenizer reads in place of the pseudo-word; the first that stays one token is used.
_PLACEHOLDERS = (PSEUDO_WORD, "@", "x")

HiddenStateEdit = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function (hidden states (B, L, W), positions (B,) of the pseudo-word, positions (B,) read) -> hidden states."""


@cache
def open_clip_library() -> Any:
    """Import ``open_clip``, add this package's tiny model to it, and return it; only models on CLIP need it.

    Raises:
        ValueError: If open_clip is not installed.
    """
    try:
        import open_clip
    except ModuleNotFoundError as error:
        if error.name != "open_clip":
            raise
        raise ValueError(
            "clip_cir, tscir_mapping, tscir_composing and lavis-cir triplets --clip-model need the library open_clip, "
            "which is not installed; run pip install open_clip_torch, or choose another model.arch."
        ) from error
    open_clip.add_model_config(CONFIGS / "models" / "open_clip_tiny.json")
    return open_clip


def load_clip(clip_model: str, pretrained: str | None = None, image_size: int | None = None) -> nn.Module:
    """Return an open_clip model on the CPU, in evaluation mode.

    Args:
        clip_model: Model name of open_clip, such as ``ViT-L-14-quickgelu``.
        pretrained: One of the model's tags, such as ``openai`` (downloaded once); or a file: a state dictionary, a
            ``.safetensors`` file, OpenAI's archive, or a checkpoint of ``clip_cir``. ``None`` gives random weights.
        image_size: Pixels per side. If it differs from the model's own size, position embeddings are interpolated.

    Raises:
        ValueError: If the model or its text tower is not supported, or the weights do not fit the model.
        FileNotFoundError: If the weights are missing and cannot be downloaded.
    """
    config = check_clip_model(clip_model)
    clip = _build(clip_model, dict(config), image_size)
    if pretrained:
        path = _weights_file(clip_model, str(pretrained), bool(config.get("quick_gelu")))
        state = _clip_state(path, clip_model, bool(config.get("quick_gelu")))
        _load(clip, state, path)
    return clip.eval()


def pixel_normalisation(clip_model: str, pretrained: str | None, asked: str = "auto") -> tuple[Any, Any]:
    """Return mean and standard deviation of the pictures that a model was trained on.

    Args:
        clip_model: Model name of open_clip.
        pretrained: Tag or file of the weights.
        asked: ``clip``, ``inception``, or ``auto``: open_clip's information on the tag, or the one on which all tags
            of the model agree.

    Raises:
        ValueError: If ``auto`` cannot decide, because the weights are a file and the model's tags differ.
    """
    if asked != "auto":
        return PIXELS[asked]
    tags = open_clip_library().list_pretrained_tags_by_model(clip_model)
    tags = [pretrained] if pretrained in tags else tags
    known = [open_clip_library().get_pretrained_cfg(clip_model, tag) for tag in tags]
    found = {(tuple(tag["mean"]), tuple(tag["std"])) for tag in known if tag.get("mean") and tag.get("std")}
    if len(found) > 1 and pretrained:
        raise ValueError(
            f"model.pixels: weights of {clip_model} were trained with different means of the pixels, and the file "
            f"{pretrained} does not say with which; set model.pixels to {' or '.join(PIXELS)} (inception: all 0.5, as "
            "laion2b_s32b_b82k)."
        )
    return found.pop() if len(found) == 1 else CLIP_MEAN_AND_STD


class ImageTower(nn.Module):
    r"""Image tower that returns a row for the image feature g and, on request, a row for each patch.

    .. math:: [g; p_1 \dots p_P] = \mathrm{LN}(x^{(L)}) W_v

    All last-layer tokens go through the final normalisation and the visual projection, if the tower has one. Row 0 is
    exactly open_clip's un-normalised ``encode_image``, also for towers with another pooling (SigLIP).

    Args:
        visual: The image tower ``clip.visual`` of an open_clip model.
        pixels: Mean and standard deviation that the tower expects. Pictures arrive with CLIP's, and the tower converts.
        with_patches: Whether to return the patches.

    Raises:
        ValueError: If patches are asked for, and the tower has none as wide as the feature in a square grid.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, visual: nn.Module, pixels: tuple[Any, Any] = CLIP_MEAN_AND_STD, with_patches: bool = False
    ) -> None:
        super().__init__()
        self.visual: Any = visual
        self.with_patches = with_patches
        (mean, std), (clip_mean, clip_std) = pixels, CLIP_MEAN_AND_STD
        self.renormalises = (tuple(mean), tuple(std)) != (tuple(clip_mean), tuple(clip_std))
        scale = torch.tensor(clip_std) / torch.tensor(std)
        shift = (torch.tensor(clip_mean) - torch.tensor(mean)) / torch.tensor(std)
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        size: Any = self.visual.image_size
        self.image_size = int(size[0] if isinstance(size, (tuple, list)) else size)
        with torch.no_grad():
            probe = self.eval()(torch.zeros(1, 3, self.image_size, self.image_size))
        self.width = int(probe.shape[-1])
        self.grid = math.isqrt(probe.shape[1] - 1)
        if self.grid**2 != probe.shape[1] - 1:
            raise ValueError(f"model.clip_model: the {probe.shape[1] - 1} patches of its image tower form no square.")

    @property
    def tokens_shape(self) -> tuple[int, int]:
        """Shape (1 + P, D) of the result for one picture."""
        return 1 + self.grid**2, self.width

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(B, 1 + P, D)`` for pictures ``(B, 3, H, W)`` in CLIP's normalisation; without patches P is 0."""
        if self.renormalises:
            images = images * self.scale + self.shift
        if not self.with_patches:
            feature: Tensor = self.visual(images)
            return feature[:, None]
        out = self._last_layer(images)
        feature, patches = out["image_features"], out["image_intermediates"][-1]
        if isinstance(projection := getattr(self.visual, "proj", None), Tensor):
            patches = patches @ projection
        if patches.shape[-1] != feature.shape[-1]:
            raise ValueError(
                f"model.clip_model: its patches have width {patches.shape[-1]} and its image feature "
                f"{feature.shape[-1]}; injection needs a tower that has both in one space, such as any ViT of CLIP."
            )
        return torch.cat([feature[:, None], patches], dim=1)

    def _last_layer(self, images: Tensor) -> Any:
        """Return the feature and the tokens of the last layer; raise ValueError if the tower has no tokens."""
        trunk = getattr(self.visual, "trunk", self.visual)
        # The pooling of CLIP's ResNets projects into the feature's space, so their positions are not in that space.
        if hasattr(trunk, "forward_intermediates") and not hasattr(self.visual, "attnpool"):
            with suppress(AssertionError):  # timm's convolutional towers refuse the format of tokens by an assertion
                return self.visual.forward_intermediates(
                    images, indices=1, normalize_intermediates=True, output_fmt="NLC"
                )
        raise ValueError(
            f"model.clip_model: an image tower of type {type(trunk).__name__} gives no patches; take a ViT, or set "
            "model.injection_blocks: []."
        )


class TextTower(nn.Module):
    """Text tower that computes open_clip's ``encode_text``, optionally with a pseudo-word and edited hidden states.

    Args:
        clip: The open_clip model. Its image tower is removed, so that each tensor has a single name.
        clip_model: Name of the model, which determines the tokenizer.
        tokenizer: Folder of a Hugging Face tokenizer, which replaces the download; only for models that use such a
            tokenizer (SigLIP). CLIP's own tokenizer needs no file.

    Raises:
        ValueError: If the tower's pooling reads no single position, or its tokenizer splits every placeholder.
        FileNotFoundError: If the tokenizer is neither local nor downloadable.
    """

    def __init__(self, clip: nn.Module, clip_model: str, tokenizer: str | None = None) -> None:
        super().__init__()
        clip._modules.pop("visual", None)
        # open_clip's classes share methods, but no base class that a type hint could name.
        self.clip: Any = clip
        self.pooling = str(getattr(clip, "text_pool_type", None) or self._text.pool_type)
        if self.pooling not in ("argmax", "eos", "last", "first"):
            raise ValueError(
                f"model.clip_model: {clip_model} reads its sentences by {self.pooling!r}, which names no position."
            )
        if self.pooling == "first" and self._text.attn_mask is not None:
            raise ValueError(f"model.clip_model: {clip_model} reads the first position, which sees no other.")
        self.tokenizer = _tokenizer(clip_model, tokenizer)
        self.placeholder, self.placeholder_id = self._choose_placeholder(clip_model)
        self.padding = int(self.tokenizer([""])[0, -1])
        self.has_told_of_a_cut = False

    @property
    def _text(self) -> Any:
        """The module with embeddings and blocks: the model itself, or its text tower if open_clip separates them."""
        return getattr(self.clip, "text", self.clip)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's blocks, from the first to the last."""
        blocks: nn.ModuleList = self._text.transformer.resblocks
        return blocks

    @property
    def width(self) -> int:
        """Width W of the hidden states."""
        return int(self._text.token_embedding.weight.shape[1])

    def skip_projection(self) -> None:
        """Replace the last linear layer by the identity, as the released code of Retrieval-DPO leaves it out.

        Raises:
            ValueError: If the tower's width differs from the width of the image feature, so that scores are undefined.
        """
        projection = getattr(self._text, "text_projection", None)
        if not isinstance(projection, Tensor) or projection.shape[0] != projection.shape[1]:
            raise ValueError(
                "model.text_projection: false needs a text tower whose last layer is a square matrix, got "
                f"{tuple(projection.shape) if isinstance(projection, Tensor) else type(projection).__name__}; set it "
                "to true."
            )
        del self._text.text_projection
        identity = torch.eye(len(projection), dtype=projection.dtype)
        self._text.register_buffer("text_projection", identity, persistent=False)

    def tokenize(self, sentences: Sequence[str]) -> Tensor:
        """Return token ids ``(B, L)`` on the CPU; ``*`` becomes its placeholder, and longer sentences are cut.

        A warning names the first sentence without padding, because it may have been cut.
        """
        ids = self.tokenizer([sentence.replace(PSEUDO_WORD, self.placeholder) for sentence in sentences])
        if not self.has_told_of_a_cut and bool((is_full := ids[:, -1] != self.padding).any()):
            self.has_told_of_a_cut = True
            logging.warning(
                "a sentence fills all %d positions of the text tower, and the end of longer ones is not read (said "
                "once): %s",
                ids.shape[1],
                sentences[int(is_full.int().argmax())],
            )
        return ids

    def positions_read(self, ids: Tensor) -> Tensor:
        """Return the position ``(B,)`` whose hidden state becomes the sentence's feature (CLIP: end of text)."""
        if self.pooling == "argmax":
            return ids.argmax(dim=1)
        if self.pooling == "eos":
            return ids.eq(self._text.eos_id).int().argmax(dim=1)
        return torch.full_like(ids[:, 0], 0 if self.pooling == "first" else ids.shape[1] - 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Return open_clip's un-normalised text features ``(B, D)`` for token ids ``(B, L)``."""
        features: Tensor = self.clip.encode_text(self._on_device(ids))
        return features

    def _on_device(self, ids: Tensor) -> Tensor:
        # A copy that blocks would wait until a GPU has done everything queued before it.
        return ids.to(self._text.token_embedding.weight.device, non_blocking=True)

    def compose(self, ids: Tensor, words: Tensor, edits: Sequence[tuple[int, HiddenStateEdit]] = ()) -> Tensor:
        """Return the features of sentences in which a vector replaces a word and hidden states are edited.

        Args:
            ids: Token ids ``(B, L)``, of which the first placeholder of each sentence is replaced. On a GPU they are
                better on the CPU, where :meth:`tokenize` leaves them, because their check reads them.
            words: Vectors ``(B, W)`` that replace the embedding of that token, before positions are added.
            edits: Pairs of a block's number and an edit of the block's output. Edits of one block run in order.

        Returns:
            Un-normalised features ``(B, D)``. Without edits they are what open_clip returns if its embedding table
            held the vectors.

        Raises:
            ValueError: If a sentence has no placeholder.
        """
        is_word = ids.eq(self.placeholder_id)
        if not bool(is_word.any(dim=1).all()):
            raise ValueError(f"every sentence to compose needs a {PSEUDO_WORD!r} for the image; see model.template.")
        place = self._on_device(is_word.int().argmax(dim=1))
        ids = self._on_device(ids)
        read = self.positions_read(ids)

        def put(_: nn.Module, __: Any, embeddings: Tensor) -> Tensor:
            return replace_at_positions(embeddings, place, words.to(embeddings.dtype))

        with self._hooked(self._text.token_embedding, put), self._edited(edits, place, read):
            features: Tensor = self.clip.encode_text(ids)
            return features

    @contextmanager
    def _edited(self, edits: Sequence[tuple[int, HiddenStateEdit]], place: Tensor, read: Tensor) -> Iterator[None]:
        if not edits:
            yield
            return
        (block, edit), *others = edits

        def apply(_: nn.Module, __: Any, hidden: Tensor) -> Tensor:
            return edit(hidden, place, read)

        with self._hooked(self.blocks[block], apply), self._edited(others, place, read):
            yield

    @staticmethod
    @contextmanager
    def _hooked(module: nn.Module, hook: Callable[[nn.Module, Any, Tensor], Tensor]) -> Iterator[None]:
        handle = module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _choose_placeholder(self, clip_model: str) -> tuple[str, int]:
        """Return a word that the tokenizer keeps as one token inside a sentence, and the token's id."""
        for word in _PLACEHOLDERS:
            without, with_word, after = self.tokenizer(["a photo of", f"a photo of {word}", f"a photo of {word} that"])
            differ = (without != with_word).nonzero().flatten()
            if len(differ) and len(set(with_word.tolist()) - set(without.tolist())) == 1:
                place = int(differ[0])
                token = int(with_word[place])
                if int(after[place]) == token and token not in without.tolist():
                    return word, token
        raise ValueError(
            f"model.clip_model: the tokenizer of {clip_model} keeps none of {', '.join(_PLACEHOLDERS)} as one token."
        )


def replace_at_positions(hidden: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
    """Return a copy of ``hidden`` ``(B, L, W)`` with ``rows`` ``(B, W)`` at one position ``(B,)`` of each sentence."""
    index = positions[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.scatter(1, index, rows[:, None].to(hidden.dtype))


def check_clip_model(clip_model: Any) -> Mapping[str, Any]:
    """Return open_clip's config of a model.

    Raises:
        ValueError: If open_clip does not know the model, or a pseudo-word cannot be put into its text tower.
    """
    config = open_clip_library().get_model_config(clip_model)
    if config is None:
        raise ValueError(
            f"model.clip_model: {clip_model!r} is no model of open_clip {open_clip_library().__version__}"
            f"{did_you_mean(clip_model, open_clip_library().list_models())}"
        )
    text = config.get("text_cfg", {})
    reason = ""
    if "hf_model_name" in text:
        reason = f"its text tower {text['hf_model_name']} comes from transformers, whose blocks open_clip does not show"
    elif "multimodal_cfg" in config or text.get("embed_cls"):
        reason = "CoCa's text tower appends a token of its own and is read there"
    if reason:
        raise ValueError(
            f"model.clip_model: {clip_model} is not supported, because {reason}; take one with CLIP's or SigLIP's own "
            "text tower, such as ViT-L-14-quickgelu, ViT-H-14 or ViT-B-16-SigLIP."
        )
    return dict(config)


def model_of_run(content: Any) -> Mapping[str, Any]:
    """Return the section ``model`` of the run that wrote a checkpoint; it is empty if no run on open_clip wrote it."""
    model = config_in(content).get("model")
    return model if isinstance(model, Mapping) and "clip_model" in model else {}


def count_blocks(clip_model: str) -> int:
    """Return the number of blocks of a model's text tower.

    Raises:
        ValueError: If :func:`check_clip_model` raises it.
    """
    return int(check_clip_model(clip_model)["text_cfg"]["layers"])


def _build(clip_model: str, config: dict[str, Any], image_size: int | None) -> nn.Module:
    """Build a model with random weights, without open_clip's own function, which would warn of random weights."""
    own_size = config["vision_cfg"].get("image_size")
    if image_size is not None:
        config["vision_cfg"] = {**config["vision_cfg"], "image_size": image_size}
        if own_size not in (None, image_size):
            logging.warning(
                "model.image_size: %s is trained on pictures of %s pixels and gets %d, with interpolated position "
                "embeddings; for its own size set model.image_size and the image_size of each vis_processor",
                clip_model,
                own_size,
                image_size,
            )
    build = open_clip_library().CustomTextCLIP if config.pop("custom_text", False) else open_clip_library().CLIP
    try:
        clip: nn.Module = build(**config)
    except (RuntimeError, AssertionError) as error:  # this version of timm does not know the image tower
        raise ValueError(
            f"model.clip_model: open_clip cannot build {clip_model!r} ({first_line(error)}). Image towers of timm, "
            "such as SigLIP's, need Python >= 3.12, because LAVIS's pins for earlier ones keep timm at 0.4."
        ) from error
    return clip


def _tokenizer(clip_model: str, folder: str | None) -> Callable[[Sequence[str]], Tensor]:
    text = open_clip_library().get_model_config(clip_model)["text_cfg"]
    if folder and not text.get("hf_tokenizer_name"):
        raise ValueError(f"model.tokenizer: {clip_model} has CLIP's own tokenizer; leave model.tokenizer empty.")
    try:
        if folder:
            local = os.path.expanduser(folder)
            length = int(text["context_length"])
            found = open_clip_library().tokenizer.HFTokenizer(
                local, context_length=length, **text.get("tokenizer_kwargs", {})
            )
        else:
            found = open_clip_library().get_tokenizer(clip_model)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"model.tokenizer: the tokenizer of {clip_model} cannot be had from "
            f"{folder or text.get('hf_tokenizer_name')!r} ({first_line(error)}). Without a network, set "
            "model.tokenizer to a folder that holds it."
        ) from error
    return found  # type: ignore[no-any-return]


def _weights_file(clip_model: str, pretrained: str, quick_gelu: bool) -> Path:
    """Return the local file of a tag, which is downloaded if needed, or of a path."""
    tags = open_clip_library().list_pretrained_tags_by_model(clip_model)
    if pretrained not in tags:
        path = Path(os.path.expanduser(pretrained))
        if not path.is_file():
            known = ", ".join(tags) or "none"
            raise FileNotFoundError(
                f"model.pretrained: {pretrained!r} is neither a file (looked from {os.getcwd()}) nor a tag of "
                f"{clip_model} in open_clip (tags: {known})."
            )
        return path
    tag = open_clip_library().get_pretrained_cfg(clip_model, pretrained)
    _check_activation(clip_model, f"the weights {pretrained}", bool(tag.get("quick_gelu")), quick_gelu)
    try:
        return Path(open_clip_library().download_pretrained(tag))
    except Exception as error:  # the hub's client raises exceptions of many classes
        raise FileNotFoundError(
            f"model.pretrained: {pretrained} of {clip_model} cannot be downloaded ({first_line(error)}). Without a "
            "network, set model.pretrained to the local file."
        ) from error


def _check_activation(clip_model: str, what: str, trained: bool, built: bool) -> None:
    if trained != built:
        other = clip_model.replace("-quickgelu", "") if built else f"{clip_model}-quickgelu"
        raise ValueError(
            f"model.clip_model: {what} were trained with {'QuickGELU' if trained else 'GELU'} and {clip_model} has "
            f"{'QuickGELU' if built else 'GELU'}; set model.clip_model: {other}."
        )


def _clip_state(path: Path, clip_model: str, quick_gelu: bool) -> dict[str, Tensor]:
    """Return open_clip's state dictionary from any supported file."""
    if _is_archive(path):
        _check_activation(clip_model, f"OpenAI's weights in {path}", True, quick_gelu)
        verify_checkpoint(path)
        state = read_torchscript(path)
    else:
        content = read_checkpoint(str(path))
        trained = open_clip_library().get_model_config(str(model_of_run(content).get("clip_model")))
        if trained is not None:
            _check_activation(clip_model, f"the weights in {path}", bool(trained.get("quick_gelu")), quick_gelu)
        state = state_in(content, str(path))
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    towers = {"image_tower.visual.": "visual.", "text_tower.clip.": ""}  # prefixes in a checkpoint of clip_cir
    if any(name.startswith(tuple(towers)) for name in state):  # TSCIR's checkpoints with merged adapters have more
        state = {
            own + name.removeprefix(prefix): tensor
            for prefix, own in towers.items()
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
    return as_float32({name: tensor for name, tensor in state.items() if name not in _ARCHIVE_NUMBERS}, str(path))


def _is_archive(path: Path) -> bool:
    """Return whether a file is TorchScript, OpenAI's format; files of ``torch.save`` are zip files too."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _load(clip: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    state = dict(open_clip_library().convert.convert_state_dict(clip, state))
    if hasattr(clip, "text") and not any(name.startswith("text.") for name in state):
        state = open_clip_library().model.convert_to_custom_text_state_dict(state)
    for name in ("logit_scale", "logit_bias"):
        own = getattr(clip, name, None)
        if name in state and own is not None:
            state[name] = state[name].reshape(own.shape)
    open_clip_library().model.resize_pos_embed(state, clip)
    constant = ("attn_mask", "text.attn_mask")
    load_strictly(clip, state, str(path), unused=constant, fresh=("logit_bias",))
