"""Published mapping networks from image feature to pseudo-word ("phi"): files of Pic2Word, SEARLE and LinCIR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lavis_cir_plugin.core.checkpoints import load_strictly, read_checkpoint, state_in

__all__ = ["PhiWeights", "check_same_clip", "load_phi", "read_phi"]

# Names of the three linear layers in a file, and in `MappingNetwork.word`.
_PIC2WORD = {"layers.0.0": "0", "layers.1.0": "3", "fc_out": "6"}
_SEARLE = {"layers.0": "0", "layers.3": "3", "layers.6": "6"}

# Constants that Pic2Word's copy of CLIP has beside its weights.
_CONSTANTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")


class PhiWeights(NamedTuple):
    """A phi network from a file."""

    state: dict[str, Tensor]
    """Tensors by their names in :attr:`~lavis_cir_plugin.methods.tscir.layers.MappingNetwork.word`."""
    activation: str
    """Activation of the hidden layers: ``relu`` (Pic2Word) or ``gelu`` (SEARLE, LinCIR)."""
    hidden_width: int
    """Width of the two hidden layers."""
    clip: dict[str, Tensor]
    """CLIP's weights if the file holds them, as Pic2Word's does; otherwise empty."""


def read_phi(source: str) -> PhiWeights:
    """Return a phi network of three linear layers, whose layout is recognised by the names of its tensors.

    Args:
        source: Path or URL of Pic2Word's checkpoint ``{"state_dict_img2text": ..., "state_dict": ...}``, of SEARLE's or
            LinCIR's ``{"epoch": ..., "Phi": ...}``, or of one of their state dictionaries alone.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file has neither layout.
    """
    content = read_checkpoint(source)
    clip: Mapping[str, Tensor] = {}
    if isinstance(content, Mapping) and "state_dict_img2text" in content:
        state, clip = content["state_dict_img2text"], content.get("state_dict") or {}
    else:
        state = state_in(content, source)
    state, clip = _without_prefix(state), _without_prefix(clip)
    for layers, activation in ((_PIC2WORD, "relu"), (_SEARLE, "gelu")):
        names = {f"{name}.{kind}": f"{own}.{kind}" for name, own in layers.items() for kind in ("weight", "bias")}
        if names.keys() == state.keys():
            named = {names[name]: tensor for name, tensor in state.items()}
            return PhiWeights(named, activation, int(named["0.weight"].shape[0]), clip)
    known = {f"{name}.{kind}" for layers in (_PIC2WORD, _SEARLE) for name in layers for kind in ("weight", "bias")}
    strange = [name for name in state if name not in known]
    raise ValueError(
        f"model.phi: {source} is in the layout of neither Pic2Word nor SEARLE and LinCIR, which have three linear "
        f"layers each ({len(state)} tensors, {'unknown: ' + strange[0] if strange else 'none unknown'}); name such a "
        "file."
    )


def load_phi(phi: PhiWeights, word: nn.Sequential, source: str) -> None:
    """Load a phi network into a mapping network's layers of the same activation and hidden width.

    Args:
        phi: Result of :func:`read_phi`.
        word: Layers that take the weights.
        source: Name of the file in error messages.

    Raises:
        ValueError: If the network was trained for a CLIP of other widths, or its layers do not fit each other.
    """
    first, last = phi.state["0.weight"], phi.state["6.weight"]
    own = word.state_dict()
    theirs = int(first.shape[1]), int(last.shape[0])
    ours = int(own["0.weight"].shape[1]), int(own["6.weight"].shape[0])
    if theirs != ours:
        raise ValueError(
            f"model.phi: {source} makes words of width {theirs[1]} from features of width {theirs[0]}, and "
            f"model.clip_model has {ours[1]} and {ours[0]}; set model.clip_model to the CLIP that it was trained on."
        )
    load_strictly(word, {name: tensor.float() for name, tensor in phi.state.items()}, source)


def check_same_clip(phi: PhiWeights, image_tower: nn.Module, text_tower: nn.Module, source: str) -> None:
    """Compare the CLIP in Pic2Word's file with the loaded one, up to half precision; other files hold no CLIP.

    Args:
        phi: Result of :func:`read_phi`.
        image_tower: Image tower of open_clip.
        text_tower: open_clip's model without the image tower.
        source: Name of the file in error messages.

    Raises:
        ValueError: If names, shapes or values differ.
    """
    if not phi.clip:
        return
    own = {f"visual.{name}": weight for name, weight in image_tower.named_parameters()}
    own.update(text_tower.named_parameters())
    theirs = {name: tensor for name, tensor in phi.clip.items() if name not in _CONSTANTS}
    differing = sorted(own.keys() ^ theirs.keys())
    differing += [name for name in own if name not in differing and not _is_close(own[name], theirs[name])]
    if differing:
        raise ValueError(
            f"model.phi: {source} was trained on another CLIP than model.clip_model and model.pretrained name "
            f"({len(differing)} tensors differ, first: {differing[0]}); set both as for its training."
        )


def _is_close(own: Tensor, other: Tensor) -> bool:
    same_shape = own.shape == other.shape
    return same_shape and torch.allclose(own.detach().float().cpu(), other.float(), rtol=2e-3, atol=1e-5)


def _without_prefix(state: Any) -> dict[str, Tensor]:
    """Return a state dictionary without the prefix ``module.`` of parallel training."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
