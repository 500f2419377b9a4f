"""Encoders of pictures and texts: a run of this package, a model of open_clip, or BLIP-2's own weights."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from PIL import Image
from torch import Tensor, nn

from lavis_cir_plugin.core.error_messages import did_you_mean
from lavis_cir_plugin.data.feature_cache import has_image_tower

BLIP2 = "blip2"
"""What a model's name begins with that is BLIP-2's own weights, such as ``blip2:pretrain``."""

_SAMPLED_NUMBERS = 1024

_locks: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
_choosing = threading.Lock()


def _forget_turns() -> None:
    """Let a forked process begin without the turns of the other's threads, which it does not have."""
    global _choosing
    _locks.clear()
    _choosing = threading.Lock()


os.register_at_fork(after_in_child=_forget_turns)


def _turn_of(model: nn.Module) -> threading.Lock:
    """Return the lock of a model, whichever encoders and indexes share it: TSCIR hooks a query's word into it."""
    with _choosing:
        return _locks.setdefault(model, threading.Lock())


@dataclass
class Encoder:
    """A model with what brings pictures and texts into its shape; threads take turns in asking it.

    Attributes:
        model: A model in evaluation mode, with this package's ``encode_target`` and ``encode_query``.
        transform: Function that makes a tensor ``(3, H, W)`` of an RGB picture.
        text_transform: Function that is applied to every text.
        name: The name by which `load_encoder` loads it again; empty if only code can make it.
        composes: Whether the model has learned to fuse image and text; otherwise their features are added.
        device: The model's device.
    """

    model: Any = field(repr=False)
    transform: Callable[[Image.Image], Tensor]
    text_transform: Callable[[str], str] = str
    name: str = ""
    composes: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @cached_property
    def identity(self) -> dict[str, str]:
        """What has to be equal for features to be comparable: weights, picture and text transform, composition."""
        return {
            "architecture": type(self.model).__name__,
            "weights": self._fingerprints[0],
            "transform": described(self.transform),
            "text": described(self.text_transform),
            "composition": "own" if self.composes else "sum",
        }

    @cached_property
    def _fingerprints(self) -> tuple[str, ...]:
        return fingerprints(self.model)

    def differing(self, identity: Mapping[str, str]) -> list[str]:
        """Return the names of what another identity has otherwise; weights have the same name in all versions."""
        return [
            name
            for name, value in identity.items()
            if value != self.identity.get(name) and not (name == "weights" and value in self._fingerprints)
        ]

    @torch.no_grad()
    def targets(self, pictures: Tensor) -> Tensor:
        """Return unit features ``(B, K, D)`` float32 on the CPU of transformed pictures ``(B, 3, H, W)``."""
        self._check_mode()
        with _turn_of(self.model):
            features = self.model.encode_target(pictures.to(self.device)).float().cpu()
        return F.normalize(features if features.dim() == 3 else features.unsqueeze(1), dim=-1)

    def query(self, pictures: Sequence[Image.Image], text: str | None, image_weight: float = 0.5) -> Tensor:
        r"""Return the unit query of each picture with a text ``(B, D)``, or of the text alone ``(1, D)``; on the CPU.

        .. math:: q(w) = 2 w \, q_{both} + (1 - 2 w) \, q_{text} \;(w \le 1/2), \quad
                  2 (1 - w) \, q_{both} + (2 w - 1) \, q_{image} \;(w \ge 1/2)

        Args:
            pictures: RGB; may be empty where there is a text.
            text: The change, or a description; ``None`` for pictures alone.
            image_weight: w from 0 to 1: 0 is the text alone, 1/2 what the model makes of both, 1 the picture alone.
        """
        with _turn_of(self.model), torch.no_grad():
            return self._query(pictures, text, image_weight)

    def _query(self, pictures: Sequence[Image.Image], text: str | None, image_weight: float) -> Tensor:
        self._check_mode()
        if text is not None and (not pictures or image_weight == 0):
            return self._mode("text", text=text).expand(max(1, len(pictures)), -1)
        images = torch.stack([self.transform(picture) for picture in pictures]).to(self.device)
        if text is None or image_weight == 1:
            return self._mode("image", images)
        if image_weight <= 0.5:
            both = self._both(images, text)
            if image_weight == 0.5:
                return both
            mixed = 2 * image_weight * both + (1 - 2 * image_weight) * self._mode("text", text=text)
        else:
            if has_image_tower(self.model):
                images = self.model.image_features(images)  # once for both queries
            both = self._both(images, text)
            mixed = 2 * (1 - image_weight) * both + (2 * image_weight - 1) * self._mode("image", images)
        return F.normalize(mixed, dim=-1)

    def _check_mode(self) -> None:
        if getattr(self.model, "training", False):
            raise ValueError("the model is in training mode, whose dropout changes every feature; call model.eval().")

    def _both(self, images: Tensor, text: str) -> Tensor:
        if self.composes:
            return self._mode("multimodal", images, text)
        return F.normalize(self._mode("image", images) + self._mode("text", text=text), dim=-1)

    def _mode(self, mode: str, images: Tensor | None = None, text: str | None = None) -> Tensor:
        samples: dict[str, Any] = {}
        if images is not None:
            samples["image"] = images
        if text is not None:
            samples["text_input"] = [self.text_transform(text)] * (1 if images is None else len(images))
        return F.normalize(self.model.encode_query(samples, mode).float().cpu(), dim=-1)


def load_encoder(name: str | os.PathLike[str], device: str | torch.device = "cpu") -> Encoder:
    """Load what turns pictures and texts into features.

    Args:
        name: The folder of a run of this package or one of its checkpoints; or ``NAME:WEIGHTS`` of open_clip, such as
            ``ViT-B-32-quickgelu:openai``, where WEIGHTS is a tag or a file, for which ``:clip`` or ``:inception`` may
            have to say the mean of the pixels; or ``blip2:TYPE``, BLIP-2's own weights for
            ``pretrain``, ``pretrain_vitL`` or ``coco``, or ``blip2:TYPE:FILE`` with a file, a folder or a repository of
            the hub.
        device: The device that the model is put on.

    Raises:
        FileNotFoundError: there is no such run, or weights are missing.
        ValueError: the name is none of these, or the weights do not fit.
    """
    name, device = os.fspath(name), torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for and torch sees no GPU; use cpu.")
    if os.path.exists(os.path.expanduser(name)):
        return _of_run(name, device)
    kind, colon, rest = name.partition(":")
    if kind == BLIP2 and colon:
        return _of_blip2(name, rest, device)
    if colon:
        return _of_open_clip(name, kind, rest, device)
    raise FileNotFoundError(
        f"model {name!r} is no file or folder (looked from {os.getcwd()}); name a run's folder, a model of open_clip "
        "with its weights such as ViT-B-32-quickgelu:openai, or blip2:pretrain."
    )


def encoder_of(run: Any) -> Encoder:
    """Return an encoder as it is, or the one of a run that ``load_run`` returned.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(run, Encoder):
        return run
    if not isinstance(run, tuple) or len(run) != 4:
        raise ValueError(
            f"encoder must be an Encoder, or what load_run returned, got {type(run).__name__}; load_encoder makes one "
            "by the name of a run or of a model."
        )
    model, vis_processors, txt_processors, _ = run
    text = (txt_processors or {}).get("eval") or str
    return Encoder(model, vis_processors["eval"], text, device=next(model.parameters()).device)


def _of_run(name: str, device: torch.device) -> Encoder:
    from lavis_cir_plugin import load_run

    return replace(encoder_of(load_run(name, device)), name=str(Path(name).expanduser().absolute()))


def _of_open_clip(name: str, clip_model: str, weights: str, device: torch.device) -> Encoder:
    import open_clip

    from lavis_cir_plugin.models.clip_cir import ClipCir

    known = open_clip.list_models()
    if clip_model not in known:
        raise ValueError(f"model {name!r}: {clip_model!r} is no model of open_clip{did_you_mean(clip_model, known)}")
    weights, pixels = _split_pixels(weights)
    if not weights:
        raise ValueError(f"model {name!r} names no weights; write a tag of open_clip or a file behind the colon.")
    path = Path(weights).expanduser()
    weights = str(path.absolute()) if path.exists() else weights
    try:
        model = ClipCir(clip_model=clip_model, pretrained=weights, pixels=pixels)
    except ValueError as error:
        if "model.pixels" not in str(error):
            raise
        raise ValueError(
            f"model {name!r}: weights of {clip_model} were trained with different means of the pixels, and the file "
            f"does not say with which; write {name}:clip, or {name}:inception for all 0.5."
        ) from None
    transform = _target_pad(model.image_tower.image_size)
    kept = ":".join([clip_model, weights, *([] if pixels == "auto" else [pixels])])
    return Encoder(model.to(device).eval(), transform, str, kept, True, device)


def _split_pixels(weights: str) -> tuple[str, str]:
    """Return the weights and the mean of the pixels that ``WEIGHTS:clip`` or ``WEIGHTS:inception`` names."""
    from lavis_cir_plugin.models.open_clip_towers import PIXELS

    head, colon, last = weights.rpartition(":")
    return (head, last) if colon and last in PIXELS else (weights, "auto")


def _of_blip2(name: str, rest: str, device: torch.device) -> Encoder:
    from omegaconf import OmegaConf

    from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir

    kind, _, file = rest.partition(":")
    known = [known for known in Blip2Cir.PRETRAINED_MODEL_CONFIG_DICT if known != "tiny" or file]
    if kind not in known:
        raise ValueError(
            f"model {name!r}: BLIP-2 has no weights {kind!r}{did_you_mean(kind, known)} ({', '.join(known)})"
        )
    config = OmegaConf.load(Blip2Cir.PRETRAINED_MODEL_CONFIG_DICT[kind]).model
    config.update({"load_finetuned": False})
    if file:
        path = Path(file).expanduser().absolute()
        if path.exists():
            config.pretrained, name = str(path), f"{BLIP2}:{kind}:{path}"
        elif re.fullmatch(r"\w[\w.-]*/[\w.-]+", file):
            config.pretrained = file
        else:
            raise FileNotFoundError(
                f"model {name!r}: {path} does not exist; name a file or folder of BLIP-2's weights behind the colon, "
                "or their repository on the hub."
            )
    if device.type == "cpu":
        config.vit_precision = "fp32"
    model = Blip2Cir.from_config(config)
    # BLIP-2 was never trained to fuse a picture with a change of it, so the two features are added.
    return Encoder(model.to(device).eval(), _target_pad(config.image_size), str, name, False, device)


def _target_pad(image_size: int) -> Callable[[Image.Image], Tensor]:
    from lavis.common.registry import registry

    made: Callable[[Image.Image], Tensor] = registry.get_processor_class("target_pad")(image_size=image_size)
    return made


def fingerprints(model: nn.Module) -> tuple[str, ...]:
    """Return a checksum of a model, and behind it those that earlier versions gave to the same model.

    It is of the settings that features depend on and of every tensor's name, shape and up to 1,024 of its numbers. The
    numbers are compared in half precision, so that a tower is the same whether it is stored in 16 or in 32 bits.
    """
    digests = [hashlib.sha256(repr(settings).encode()) for settings in _known_settings(model)]
    tensors = {**dict(model.named_buffers()), **model.state_dict()}
    with torch.no_grad():
        for name, tensor in sorted(tensors.items()):
            flat = tensor.detach().reshape(-1)
            step = max(1, len(flat) // _SAMPLED_NUMBERS)
            sample = flat[::step].cpu()
            numbers = (sample.half() if sample.is_floating_point() else sample).numpy().tobytes()
            for digest in digests:
                digest.update(f"{name} {tuple(tensor.shape)}\n".encode() + numbers)
    return tuple(digest.hexdigest() for digest in digests)


def _known_settings(model: nn.Module) -> list[list[tuple[str, Any]]]:
    """Return the settings of a model as indexes know them, those of today first.

    No feature depends on label smoothing, which version 0.6.1 counted as a setting, nor on whether a text has been cut
    since the model was loaded, which all versions up to it did. Today's list has the latter as false, so that the
    indexes of version 0.5 keep their fingerprint.
    """
    settings = [
        (f"{place}.{name}", name, value)
        for place, module in model.named_modules()
        if type(module).__module__.startswith("lavis_cir_plugin.")  # other libraries' settings differ by version
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and name not in ("training", "freeze_vit")
    ]
    return [
        sorted(
            (place, has_told if name == "has_told_of_a_cut" else value)
            for place, name, value in settings
            if has_smoothing or name != "label_smoothing"
        )
        for has_smoothing, has_told in product((False, True), repeat=2)
    ]


def described(transform: Any) -> str:
    """Describe a transform by its class and settings, so that two descriptions are equal where the results are."""
    if isinstance(transform, type) or not hasattr(transform, "__dict__"):
        return getattr(transform, "__qualname__", type(transform).__qualname__)
    settings = "; ".join(f"{name}={value!r}" for name, value in sorted(vars(transform).items()))
    text = f"{type(transform).__qualname__}({settings})"
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(text.split()))
