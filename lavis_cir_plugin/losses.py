"""The former place of the losses, which stand beside the methods that use them."""

from lavis_cir_plugin.methods.blip2_cir.losses import LOSSES, TrainingOutputs, align, alignment_loss, itc, rtc
from lavis_cir_plugin.methods.tscir.losses import mixed_negatives_loss, soft_text_alignment_loss
from lavis_cir_plugin.models.contrastive_losses import (
    contrastive_loss,
    gather_with_gradient,
    symmetric_contrastive_loss,
)

__all__ = [
    "LOSSES",
    "TrainingOutputs",
    "align",
    "alignment_loss",
    "contrastive_loss",
    "gather_with_gradient",
    "itc",
    "mixed_negatives_loss",
    "rtc",
    "soft_text_alignment_loss",
    "symmetric_contrastive_loss",
]
