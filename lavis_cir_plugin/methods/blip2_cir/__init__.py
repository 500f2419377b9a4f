"""The BLIP-2 Q-Former for composed retrieval. Method card: docs/blip2_cir.md."""
