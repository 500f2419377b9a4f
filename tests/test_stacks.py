"""Every stack computes what LAVIS's own pins compute: losses, gradients, captions, checkpoints, and what is tied."""

from __future__ import annotations

import json
import pickle

import pytest
import stack_numbers
import torch

EXPECTED = json.loads(stack_numbers.FILE.read_text())


def test_the_file_has_every_model():
    assert set(EXPECTED) == {*stack_numbers.MODELS, "tokenizer"}


def test_the_tokenizer_reads_and_writes_as_under_lavis_own_pins():
    assert stack_numbers.measure_tokenizer() == EXPECTED["tokenizer"]


@pytest.mark.parametrize("name", stack_numbers.MODELS)
def test_numbers_are_those_of_lavis_own_pins(name):
    expected, measured = EXPECTED[name], stack_numbers.measure(name)
    assert measured["tied"] == expected["tied"]
    assert measured["keys"] == expected["keys"]
    assert measured["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    # A bias of keys has no gradient but for rounding.
    assert measured["gradients"] == pytest.approx(expected["gradients"], rel=1e-4, abs=1e-6)
    assert measured["said"] == expected["said"]


# Files as they are published: of what is one tensor under several names, one; of buffers that are no weights, none.
PUBLISHED = {
    "BERT": (
        lambda: stack_numbers.qformer()[0],
        {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids"},
    ),
    "OPT": (stack_numbers.opt, {"lm_head.weight"}),
    "FLAN-T5": (
        lambda: stack_numbers.t5(config=stack_numbers.t5_config("flan")),
        {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"},
    ),
    "T5": (
        lambda: stack_numbers.t5(config=stack_numbers.t5_config("tied")),
        {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_from_pretrained_gives_what_the_file_has_and_ties_the_rest(name, tmp_path):
    build, lacking = PUBLISHED[name]
    model = build()
    stack_numbers.set_weights(model)
    whole = model.state_dict()
    assert lacking <= set(whole)
    torch.save({key: whole[key].clone() for key in whole if key not in lacking}, tmp_path / "pytorch_model.bin")
    # The published FLAN-T5 says this in its file; the configuration of transformers 5 no longer writes it.
    settings = {**model.config.to_dict(), "tie_word_embeddings": name != "FLAN-T5"}
    (tmp_path / "config.json").write_text(json.dumps(settings))

    loaded = type(model).from_pretrained(str(tmp_path))
    assert stack_numbers.tied_names(loaded) == stack_numbers.tied_names(model)
    state = loaded.state_dict()
    assert set(state) == set(whole)
    for key in whole:
        assert torch.equal(state[key], whole[key]), key


def test_a_model_is_pickled_with_its_tokenizer(small_model):
    """Spawned workers get a model so; its class for transformers 5 was one that pickle cannot find."""
    model = small_model()
    copied = pickle.loads(pickle.dumps(model))
    assert type(copied.tokenizer) is type(model.tokenizer)
    assert copied.tokenizer("is red").input_ids == model.tokenizer("is red").input_ids
