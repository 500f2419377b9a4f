"""CLIP4Cir's combiner: a network that fuses CLIP's image and text feature into a query."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from torch import Tensor, nn

from lavis_cir_plugin.core.checkpoints import load_strictly, read_state

__all__ = ["Combiner", "read_combiner"]

# Widths of a new combiner in multiples of the features', as in the published recipe (640, 2560, 5120).
_PROJECTION, _HIDDEN = 4, 8


class Combiner(nn.Module):
    r"""Fuses an image feature g and a text feature t, both un-normalised and of width D.

    .. math:: c = [\phi(W_t t); \phi(W_g g)], \qquad \lambda = \sigma(w\,\phi(W_s c)), \qquad
              q = \frac{W_o\,\phi(W_c c) + \lambda t + (1 - \lambda) g}{\lVert \cdot \rVert}

    :math:`\phi` is a ReLU followed by dropout with probability 1/2, and every linear layer has a bias. The parameters
    have the names of the published files.

    Args:
        feature_width: D, the width of both features.
        projection_width: Number of rows of :math:`W_t` and :math:`W_g`; 4 D by default.
        hidden_width: Number of rows of :math:`W_c` and :math:`W_s`; 8 D by default.

    Source: CLIP4Cir (Baldrati et al., ACM TOMM 2023).
    """

    def __init__(
        self, feature_width: int, projection_width: int | None = None, hidden_width: int | None = None
    ) -> None:
        super().__init__()
        projection = projection_width or _PROJECTION * feature_width
        hidden = hidden_width or _HIDDEN * feature_width
        self.text_projection_layer = nn.Linear(feature_width, projection)
        self.image_projection_layer = nn.Linear(feature_width, projection)
        self.combiner_layer = nn.Linear(2 * projection, hidden)
        self.output_layer = nn.Linear(hidden, feature_width)
        self.dynamic_scalar = nn.Sequential(
            nn.Linear(2 * projection, hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, 1), nn.Sigmoid()
        )
        self.dropout = nn.Dropout(0.5)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return unit-length queries ``(B, D)`` of image features and text features, both ``(B, D)``."""
        projected = self.text_projection_layer(text), self.image_projection_layer(image)
        both = torch.cat([self.dropout(F.relu(part)) for part in projected], dim=-1)
        share = self.dynamic_scalar(both)
        added = self.output_layer(self.dropout(F.relu(self.combiner_layer(both))))
        return F.normalize(added + share * text + (1 - share) * image, dim=-1)


def read_combiner(source: str, feature_width: int) -> Combiner:
    """Return the combiner of a file of CLIP4Cir (``{"epoch": ..., "Combiner": ...}``) or of a bare state dictionary.

    The file determines the widths of the layers.

    Args:
        source: Path or URL of the file.
        feature_width: D, the width of the CLIP model's features.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file holds no combiner, or one for features of another width.
    """
    state = read_state(source)
    weights = state.get("combiner_layer.weight"), state.get("output_layer.weight")
    if any(weight is None or weight.ndim != 2 for weight in weights):
        raise ValueError(
            f"model.combiner: {source} holds no combiner of CLIP4Cir, but {len(state)} tensors such as "
            f"{next(iter(state))}; name its combiner's file, and in model.pretrained that of the fine-tuned CLIP."
        )
    (hidden, doubled), (width, _) = (weight.shape for weight in weights if weight is not None)
    if width != feature_width:
        raise ValueError(
            f"model.combiner: {source} combines features of width {width}, and model.clip_model gives {feature_width}; "
            "set model.clip_model and model.pretrained to the CLIP that it was trained on."
        )
    combiner = Combiner(width, doubled // 2, hidden)
    load_strictly(combiner, state, source)
    return combiner
