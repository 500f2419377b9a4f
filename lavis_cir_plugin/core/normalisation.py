"""Mean and standard deviation that normalise pictures for CLIP and BLIP-2."""

from __future__ import annotations

CLIP_MEAN_AND_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation per RGB channel, for pixel values in [0, 1], in LAVIS's processors and in ours."""
