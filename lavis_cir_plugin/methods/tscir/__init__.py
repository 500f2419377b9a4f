"""TSCIR: zero-shot composed retrieval in two stages on any CLIP (arXiv 2504.17990).

Method card: docs/tscir.md.

Pure functions:

* ``layers``: the trained layers of both stages.
* ``losses``: soft text alignment and mixed negatives.
* ``phi_weights``: published mapping networks of Pic2Word, SEARLE and LinCIR, read from their files.
* ``caption_edits``: edits of captions, learnt from captions.
* ``synthetic_triplets``: triplets made of captions by edits and nearest neighbours.
* ``triplets_file``: captions read from a file, triplets written to one, and a picture of them.

Adapters to LAVIS:

* ``mapping``: the model ``tscir_mapping``, stage I.
* ``composing``: the model ``tscir_composing``, stage II.
"""
