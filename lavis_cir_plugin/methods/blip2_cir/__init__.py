"""BLIP-2's Q-Former for composed retrieval (arXiv 2301.12597; SPRC's fusion: arXiv 2310.05473).

Method card: docs/blip2_cir.md.

Pure functions:

* ``losses``: losses on the outputs of a batch, by name.
* ``hub_weights``: names and settings of BLIP-2's weights in transformers' layout, translated both ways.

Adapters to LAVIS:

* ``model``: the model ``blip2_cir``.
"""
