"""Tokens of texts: equal to the tokenizer's own, and remembered."""

from __future__ import annotations

import pytest

from lavis_cir_plugin.models.tokenizer import load_tokenizer, token_ids

TEXTS = ["is red", "", "has long sleeves and a plain collar and no dots at all", "is red"]


@pytest.mark.parametrize("max_length", [2, 6, 32])
def test_tokens_are_those_of_the_tokenizer(max_length):
    tokenizer = load_tokenizer("blip2_cir_tiny_vocab.txt")
    ids, lengths = token_ids(tokenizer, TEXTS, max_length)
    own = tokenizer(TEXTS, padding="longest", truncation=True, max_length=max_length, return_tensors="pt")
    assert ids.dtype == own["input_ids"].dtype
    assert ids.tolist() == own["input_ids"].tolist()
    assert lengths == own["attention_mask"].sum(dim=1).tolist()


def test_a_text_is_tokenized_once_for_each_tokenizer_and_length(monkeypatch):
    counts = []
    for _ in range(2):
        tokenizer, calls = load_tokenizer("blip2_cir_tiny_vocab.txt"), []
        stock = type(tokenizer).__call__
        monkeypatch.setattr(
            type(tokenizer), "__call__", lambda *a, stock=stock, calls=calls, **k: calls.append(a) or stock(*a, **k)
        )
        for length in (8, 8, 5):
            token_ids(tokenizer, TEXTS, length)
        counts.append(len(calls))
        monkeypatch.undo()
    assert counts == [6, 6]


def test_a_text_that_may_have_been_cut_is_named_once(caplog):
    tokenizer = load_tokenizer("blip2_cir_tiny_vocab.txt")
    token_ids(tokenizer, ["is red"], 5)  # 4 tokens with [CLS] and [SEP]
    assert not caplog.records
    for _ in range(2):
        token_ids(tokenizer, ["is red", "is red and has no sleeves"], 5)
    (record,) = caplog.records
    assert record.message.endswith("(said once): is red and has no sleeves")
