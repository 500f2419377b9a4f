"""BERT's tokenizer for BLIP-2 and BLIP, loaded from a local file or from the hub."""

from __future__ import annotations

import os
from pathlib import Path

# LAVIS's own name for it: under transformers 5, what stands there decodes as transformers 4.26 does.
from lavis.models.blip2_models.blip2 import BertTokenizer

from lavis_cir_plugin import CONFIGS
from lavis_cir_plugin.core.settings import Limits

TOKENIZER = Limits(words="a folder, a vocabulary file, or a name on the hub")
"""What the setting ``tokenizer`` of a model may be."""


def load_tokenizer(name: str) -> BertTokenizer:
    """Return a WordPiece tokenizer with BLIP-2's extra token [DEC].

    Args:
        name: A folder with ``vocab.txt``, a vocabulary file, the name of a vocabulary shipped with this package's
            model configs, or a name on the Hugging Face hub.

    Raises:
        FileNotFoundError: If the vocabulary is neither local nor downloadable from the hub.
    """
    local = Path(os.path.expanduser(name))
    local = local / "vocab.txt" if local.is_dir() else local
    shipped = CONFIGS / "models" / name
    try:
        if local.is_file() or shipped.is_file():
            tokenizer = BertTokenizer(str(local if local.is_file() else shipped))
        else:
            tokenizer = BertTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model.tokenizer: {name!r} is no local folder or file (looked from {os.getcwd()}) and cannot be had from "
            "the hub. Without a network, set model.tokenizer to a folder that holds the vocab.txt of bert-base-uncased."
        ) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer
