"""How pictures are normalised."""

from __future__ import annotations

CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation with which LAVIS's processors, and those of this package, normalise pictures."""
