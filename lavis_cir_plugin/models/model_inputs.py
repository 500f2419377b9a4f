"""Checks of the texts and pictures that a model is given, which it could otherwise misread without an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

PROCESS = "torch.stack([vis_processors['eval'](picture) for picture in pictures])"


def read_texts(samples: Mapping[str, Any], key: str = "text_input") -> list[str]:
    """Return the texts of a batch; a single string is a batch of one text.

    Raises:
        ValueError: If the batch has nothing under this key, or something other than strings.
    """
    texts = _value(samples, key)
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} must be a string or a list of one string per picture, got {_shown(texts)}.")
    return list(texts)


def read_pictures(samples: Mapping[str, Any], key: str = "image") -> Tensor:
    """Return the pictures of a batch, or their features, without a check of the shape (see :func:`check_pictures`).

    Raises:
        ValueError: If the batch has nothing under this key, or something other than a tensor.
    """
    return _tensor(_value(samples, key), key)


def check_pictures(pictures: Any, features: tuple[int, int]) -> Tensor:
    """Return a batch of pictures ``(B, 3, H, W)`` or of their features ``(B, P, D)``.

    Args:
        pictures: The value to check.
        features: P and D of the model's image tower. They distinguish features from a single picture, which has three
            dimensions too.

    Raises:
        ValueError: If the value is neither.
    """
    batch = _tensor(pictures, "image")
    shape = tuple(batch.shape)
    if not batch.is_floating_point():
        kind = str(batch.dtype).removeprefix("torch.")
        raise ValueError(f"image holds {kind}, as an unprocessed picture does; give {PROCESS}.")
    if batch.ndim == 3 and shape[0] in (1, 3, 4) and shape[1:] != features:
        raise ValueError(f"image is a single picture of shape {shape}; make a batch of one, picture[None].")
    is_batch = (batch.ndim == 4 and shape[1] == 3) or (batch.ndim == 3 and shape[1:] == features)
    if not is_batch:
        raise ValueError(
            f"image must be a batch of RGB pictures (B, 3, height, width) or of their features (B, {features[0]}, "
            f"{features[1]}), got the shape {shape}; give {PROCESS}."
        )
    return batch


def read_pairs(samples: Mapping[str, Any], features: tuple[int, int]) -> tuple[Tensor, list[str]]:
    """Return the pictures of a batch, or their features, and its texts, of which each picture has one.

    Raises:
        ValueError: If :func:`check_pictures`, :func:`read_texts` or :func:`check_counts` raises it.
    """
    pictures = check_pictures(read_pictures(samples), features)
    texts = read_texts(samples)
    check_counts(pictures, texts)
    return pictures, texts


def read_targets(samples: Mapping[str, Any], texts: Sequence[str]) -> Tensor:
    """Return the target pictures of a batch, or their features, of which each text has one.

    Raises:
        ValueError: If :func:`read_pictures` or :func:`check_counts` raises it.
    """
    targets = read_pictures(samples, "target")
    check_counts(targets, texts, "target")
    return targets


def check_counts(pictures: Tensor, texts: Sequence[str], key: str = "image") -> None:
    """Refuse a batch that has not as many pictures under this key as texts.

    Raises:
        ValueError: If the numbers differ.
    """
    if len(pictures) != len(texts):
        raise ValueError(
            f"{key} has {len(pictures)} and text_input {len(texts)} entries; give as many texts as pictures, one each."
        )


def _value(samples: Any, key: str) -> Any:
    if not isinstance(samples, Mapping):
        raise ValueError(f"samples must be a dictionary with 'image' and 'text_input', got {_shown(samples)}.")
    if samples.get(key) is None:
        found = ", ".join(map(repr, samples)) or "nothing"
        raise ValueError(f"samples have no {key!r}, which is needed here; they have {found}.")
    return samples[key]


def _tensor(value: Any, key: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{key} must be a tensor of a batch of pictures, got {_shown(value)}; give {PROCESS}.")
    return value


def _shown(value: Any) -> str:
    """Return the name of a value's type; for a list with the type of its first entry."""
    inside = f" of {type(value[0]).__name__}" if isinstance(value, (list, tuple)) and value else ""
    return f"{type(value).__name__}{inside}"
