"""BERT's tokenizer for BLIP-2 and BLIP, loaded from a local file or from the hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

# LAVIS's own name for it: under transformers 5, what stands there decodes as transformers 4.26 does.
from lavis.models.blip2_models.blip2 import BertTokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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


def token_ids(tokenizer: BertTokenizer, texts: Sequence[str], max_length: int) -> tuple[Tensor, list[int]]:
    """Return the tokens of texts, padded on the right to the longest text of the batch.

    A text's tokens are remembered: LAVIS's tokenizer is written in Python, and a text comes again in every epoch, in
    every evaluation, and in both passes of a perturbed step.

    Args:
        tokenizer: Tokenizer with [CLS], [SEP] and [PAD].
        texts: B texts.
        max_length: Largest number of tokens with [CLS] and [SEP]; longer texts are cut, and a warning names the first
            that fills them all, because it may have been.

    Returns:
        Ids ``(B, T)`` int64, and the number of tokens of each text.
    """
    rows = [torch.tensor(_ids_of_text(tokenizer, text, max_length)) for text in texts]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    lengths = [len(row) for row in rows]
    if max_length in lengths and not getattr(tokenizer, "has_told_of_a_cut", False):
        tokenizer.has_told_of_a_cut = True
        logging.warning(
            "a text fills all %d tokens of model.max_txt_len, and the end of longer ones is not read (said once): %s",
            max_length,
            texts[lengths.index(max_length)],
        )
    return ids, lengths


@lru_cache(maxsize=2**16)  # FashionIQ's training has 36,000 texts, of some 300 bytes with their tokens
def _ids_of_text(tokenizer: BertTokenizer, text: str, max_length: int) -> tuple[int, ...]:
    return tuple(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
