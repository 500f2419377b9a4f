"""Image processors of composed retrieval: target padding, and two random views of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from lavis.common.registry import registry
from lavis.processors.blip_processors import BlipImageBaseProcessor
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from lavis_cir_plugin.benchmarks.images import as_rgb
from lavis_cir_plugin.core.settings import Limits, Positive, check_arguments


def _check_scale(pair: tuple[float, float]) -> None:
    if not 0 < pair[0] <= pair[1] <= 1:
        raise ValueError("")


Scale = Annotated[
    tuple[float, float],
    Limits(words="two numbers [least, largest] with 0 < least <= largest <= 1", check=_check_scale),
]


PADDED_PIXELS = 2**26
"""Pixels from which on a padded picture is made of a smaller one: a border grows as the square of the long side."""


def pad_to_ratio(image: Image.Image, target_ratio: float) -> Image.Image:
    """Pad the short side with black until the long side is at most ``target_ratio`` times as long.

    A picture that would have more than `PADDED_PIXELS` with its border is first reduced by a whole factor.

    Args:
        image: RGB picture. It is returned unchanged if its ratio is small enough already.
        target_ratio: Largest ratio of long to short side, >= 1.

    Source: CLIP4Cir's target padding with a ratio of 1.25, which SPRC and Bi-Blip4CIR use too. Their code rounds each
    side of the border down, so that it may be up to two pixels narrower in all.
    """
    horizontal, vertical = _border(image.size, target_ratio)
    if not horizontal and not vertical:
        return image
    factor = math.ceil(math.sqrt((image.width + horizontal) * (image.height + vertical) / PADDED_PIXELS))
    if factor > 1:
        image = image.reduce(factor)
        horizontal, vertical = _border(image.size, target_ratio)
    left, top = horizontal // 2, vertical // 2
    return ImageOps.expand(image, border=(left, top, horizontal - left, vertical - top), fill=0)


def _border(size: tuple[int, int], target_ratio: float) -> tuple[int, int]:
    """Return by how many pixels a picture of a width and height is padded horizontally and vertically."""
    width, height = size
    short = round(max(width, height) / target_ratio)
    return max(0, short - width), max(0, short - height)


@registry.register_processor("clip_two_views")
class ClipTwoViewsProcessor(BlipImageBaseProcessor):
    """Makes two random views of a picture: bicubic crops, normalised by CLIP's mean and standard deviation.

    View 0 is the weakly augmented one, of which a model makes its pseudo-word: a random crop, mirrored with
    probability 1/2. View 1 is CLIP's own augmentation: a random crop of nearly the whole picture. The aspect ratios
    of both crops vary from 3/4 to 4/3.

    Args:
        image_size: Pixels per side of each view.
        weak_scale: Smallest and largest share of the picture's area in view 0, ``0 < least <= largest <= 1``.
        scale: Smallest and largest share of the picture's area in view 1, with the same bounds.

    Raises:
        ValueError: If ``image_size`` is below 1, or a scale is not such a pair.

    Source: TSCIR (arXiv 2504.17990), stage I.
    """

    def __init__(self, image_size: Positive = 224, weak_scale: Scale = (0.8, 1.0), scale: Scale = (0.9, 1.0)) -> None:
        super().__init__()
        check_arguments(
            type(self),
            "datasets.<name>.vis_processor",
            {"image_size": image_size, "weak_scale": weak_scale, "scale": scale},
        )
        end = [transforms.ToTensor(), self.normalize]
        weak, nearly_all = (
            transforms.RandomResizedCrop(image_size, tuple(pair), interpolation=InterpolationMode.BICUBIC)
            for pair in (weak_scale, scale)
        )
        self.views = (
            transforms.Compose([weak, transforms.RandomHorizontalFlip(), *end]),
            transforms.Compose([nearly_all, *end]),
        )

    def __call__(self, item: Image.Image) -> Tensor:
        """Return the two views of a picture of any mode: ``(2, 3, image_size, image_size)``, float32.

        Raises:
            ValueError: If ``item`` is not a PIL image.
        """
        picture = _picture(item, "clip_two_views")
        return torch.stack([view(picture) for view in self.views])

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> ClipTwoViewsProcessor:
        """Build from a ``vis_processor`` section."""
        return cls(**{key: value for key, value in (cfg or {}).items() if key != "name"})


def _picture(item: Any, processor: str) -> Image.Image:
    """Return a PIL image in RGB, converted as the data sets convert the pictures of their files."""
    if not isinstance(item, Image.Image):
        raise ValueError(f"{processor} takes one PIL image, got {type(item).__name__}; open a file by PIL.Image.open.")
    return as_rgb(item)


@registry.register_processor("target_pad")
class TargetPadProcessor(BlipImageBaseProcessor):
    """Pads a picture, resizes its short side (bicubic), crops the centre, and normalises by CLIP's mean and deviation.

    The processor is deterministic: training and evaluation see the same pixels, as in CLIP4Cir, SPRC and Bi-Blip4CIR.

    Args:
        image_size: Pixels per side of the result.
        target_ratio: Largest ratio of long to short side that is not padded, >= 1.

    Raises:
        ValueError: If ``target_ratio`` is below 1 or ``image_size`` below 1.
    """

    is_deterministic = True

    def __init__(self, image_size: Positive = 224, target_ratio: Annotated[float, Limits(ge=1)] = 1.25) -> None:
        super().__init__()
        check_arguments(
            type(self), "datasets.<name>.vis_processor", {"image_size": image_size, "target_ratio": target_ratio}
        )
        self.target_ratio = target_ratio
        self.transform = transforms.Compose(
            [
                transforms.Resize(image_size, interpolation=InterpolationMode.BICUBIC),
                transforms.CenterCrop(image_size),
                transforms.ToTensor(),
                self.normalize,
            ]
        )

    def __call__(self, item: Image.Image) -> Tensor:
        """Return a picture of any mode as ``(3, image_size, image_size)``, float32.

        Raises:
            ValueError: If ``item`` is not a PIL image.
        """
        return self.transform(pad_to_ratio(_picture(item, "target_pad"), self.target_ratio))

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> TargetPadProcessor:
        """Build from a ``vis_processor`` section."""
        cfg = cfg or {}
        return cls(image_size=cfg.get("image_size", 224), target_ratio=cfg.get("target_ratio", 1.25))
