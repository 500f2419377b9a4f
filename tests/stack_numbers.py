"""What LAVIS's models compute under weight perturbation's runners, small and with weights made by a formula.

``python tests/stack_numbers.py`` writes ``tests/stack_numbers.json``; it is run under LAVIS's own pins (Python 3.11,
transformers 4.26) and nowhere else. ``tests/test_stacks.py`` compares every other stack with that file.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lavis.models.blip2_models import blip2_opt, blip2_t5
from lavis.models.blip2_models.blip2 import Blip2Base, LayerNorm
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.blip2_qformer import Blip2Qformer
from lavis.models.blip2_models.blip2_t5 import Blip2T5
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM
from lavis.models.blip2_models.modeling_t5 import T5Config, T5ForConditionalGeneration
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel
from lavis.models.eva_vit import VisionTransformer
from torch import Tensor, nn

from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir
from lavis_cir_plugin.models.blip_tiny import BlipCaptionTiny, BlipVqaTiny
from lavis_cir_plugin.models.tokenizer import load_tokenizer

FILE = Path(__file__).with_suffix(".json")
TEXTS = ["a red dress with long sleeves", "a star"]
WORDS = "blip_tiny_vocab.txt"

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 48, **_NO_DROPOUT,
}  # fmt: skip
_BLIP = {
    "image_size": 32,
    "vit_config": {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "bert_config": _BERT,
}
_CIR = {
    "image_size": 16,
    "vit_config": {"patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2, "mlp_ratio": 2},
    "vit_precision": "fp32",
    "freeze_vit": False,
    "tokenizer": "blip2_cir_tiny_vocab.txt",
    "num_query_token": 3,
    "qformer_config": _BERT,
    "embed_dim": 6,
}


def formula(name: str, shape: torch.Size) -> Tensor:
    """Return numbers in [-1, 1) that follow from a name alone, in float32: no random generator, no rounding.

    They are quadratic in the position, because rows that differ by a constant are one to a layer norm.
    """
    place = torch.arange(shape.numel(), dtype=torch.int64) + zlib.crc32(name.encode()) % 65521
    mixed = (place * place % 65521 * 9176 + place * 40503) % 65521
    return (mixed.double() / 32760.5 - 1).float().reshape(shape)


def set_weights(model: nn.Module) -> None:
    """Give every parameter of its own its formula; of parameters that are one, the first name counts.

    Temperatures stay as they are, because one near zero would enlarge rounding to the size of the gradients.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 0:
                continue
            is_scale = weight.dim() == 1 and name.endswith("weight")
            weight.copy_(1 + 0.2 * formula(name, weight.shape) if is_scale else 0.4 * formula(name, weight.shape))


def pictures(size: int, name: str = "image") -> Tensor:
    """Return two pictures, float32, of ``size`` pixels per side."""
    return formula(name, torch.Size((2, 3, size, size)))


class Words:
    """What LAVIS asks of the tokenizers of OPT and T5, over this package's vocabulary."""

    def __init__(self) -> None:
        self.words = load_tokenizer(WORDS)
        self.pad_token_id, self.padding_side = self.words.pad_token_id, "right"

    def __call__(self, text: Any, **options: Any) -> Any:
        replaced = text.replace("\n", " ?") if isinstance(text, str) else [t.replace("\n", " ?") for t in text]
        return self.words(replaced, **options)

    def batch_decode(self, *arguments: Any, **options: Any) -> list[str]:
        return self.words.batch_decode(*arguments, **options)


def _tower(*_: Any) -> tuple[nn.Module, nn.Module]:
    tower = dict(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2, mlp_ratio=2, use_mean_pooling=False)
    return VisionTransformer(**tower), LayerNorm(12)


def qformer(*_: Any) -> tuple[nn.Module, nn.Parameter]:
    # One word less than the tokenizer has: BLIP-2 adds [DEC] to BERT's.
    settings = BertConfig(
        **_BERT, vocab_size=len(load_tokenizer(WORDS)) - 1, encoder_width=12, add_cross_attention=True,
        cross_attention_freq=2, query_length=3,
    )  # fmt: skip
    return BertLMHeadModel(settings), nn.Parameter(torch.zeros(1, 3, 16))


def opt(*_: Any, **__: Any) -> OPTForCausalLM:
    settings = OPTConfig(
        vocab_size=len(load_tokenizer(WORDS)), hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2,
        dropout=0.0, attention_dropout=0.0, word_embed_proj_dim=16, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return OPTForCausalLM(settings)


def t5(*_: Any, config: T5Config, **__: Any) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(config)


def t5_config(name: str) -> T5Config:
    return T5Config(
        vocab_size=len(load_tokenizer(WORDS)), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=name == "tied",
        decoder_start_token_id=0, eos_token_id=3,
    )  # fmt: skip


@contextmanager
def _without_hub() -> Iterator[None]:
    """Build here what LAVIS's BLIP-2 classes would take from the hub; the classes themselves stay as they are."""
    places = [
        (Blip2Base, "init_tokenizer", classmethod(lambda cls: load_tokenizer(WORDS))),
        (Blip2Base, "init_vision_encoder", _tower),
        (Blip2Base, "init_Qformer", qformer),
        (blip2_opt.AutoTokenizer, "from_pretrained", lambda *_, **__: Words()),
        (blip2_opt.OPTForCausalLM, "from_pretrained", opt),
        (blip2_t5.T5TokenizerFast, "from_pretrained", lambda *_, **__: Words()),
        (blip2_t5.T5Config, "from_pretrained", t5_config),
        (blip2_t5.T5ForConditionalGeneration, "from_pretrained", t5),
        (torch.distributed, "get_rank", lambda: 0),
        (torch.distributed, "get_world_size", lambda: 1),
    ]
    with ExitStack() as stack:
        for owner, name, value in places:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


_BLIP2 = {"img_size": 16, "vit_precision": "fp32", "num_query_token": 3}


def _blip2_t5(name: str) -> Blip2T5:
    model = Blip2T5(**_BLIP2, t5_model=name)
    model.t5_model.float()  # LAVIS stores it in bfloat16, in which nothing is equal to five digits
    return model


def _captions(model: nn.Module, size: int) -> list[str]:
    # Greedy ones of any length, and beams of one length: how a beam's score counts the prompt differs.
    samples = {"image": pictures(size), "prompt": "a"}
    greedy = model.generate(samples, num_beams=1, max_length=10, min_length=1, repetition_penalty=5.0)
    return greedy + model.generate(samples, num_beams=3, max_length=9, min_length=9, repetition_penalty=5.0)


def _answers(model: nn.Module) -> list[str]:
    samples = {"image": pictures(32), "text_input": ["is it red ?", "what is it ?"]}
    greedy = model.predict_answers(samples, num_beams=1, inference_method="generate", max_len=6, min_len=1)
    beams = model.predict_answers(samples, num_beams=3, inference_method="generate", max_len=6, min_len=6)
    answers = ["red", "a star", "long sleeves"]
    return greedy + beams + model.predict_answers(samples, inference_method="rank", answer_list=answers)


def _with_text(size: int, **more: Any) -> dict[str, Any]:
    return {"image": pictures(size), "text_input": TEXTS, **more}


_QUESTIONS = {"answer": ["red", "yes", "a star"], "weight": torch.tensor([0.5, 0.5, 1.0]), "n_answers": [2, 1]}
_SOUGHT = {"target": pictures(16, "target"), "target_id": torch.tensor([1, 2])}

MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Callable[[nn.Module], list[str]] | None]] = {
    "blip_vqa": (lambda: BlipVqaTiny(**_BLIP), _with_text(32, **_QUESTIONS), _answers),
    "blip_caption": (lambda: BlipCaptionTiny(**_BLIP), _with_text(32), lambda model: _captions(model, 32)),
    "blip2": (lambda: Blip2Qformer(**_BLIP2, embed_dim=6), _with_text(16), lambda model: _captions(model, 16)),
    "blip2_opt": (lambda: Blip2OPT(**_BLIP2), _with_text(16), lambda model: _captions(model, 16)),
    # FLAN-T5, which BLIP-2 takes, has an output layer of its own; T5 itself has not.
    "blip2_t5": (
        lambda: _blip2_t5("flan"),
        _with_text(16, text_output=TEXTS[::-1]),
        lambda model: _captions(model, 16),
    ),
    "blip2_t5 tied": (
        lambda: _blip2_t5("tied"),
        _with_text(16, text_output=TEXTS[::-1]),
        lambda model: _captions(model, 16),
    ),
    "blip2_cir": (lambda: Blip2Cir(**_CIR), _with_text(16, **_SOUGHT), None),
    "blip2_cir sentence_prompt": (
        lambda: Blip2Cir(**_CIR, fusion="sentence_prompt"),
        _with_text(16, **_SOUGHT),
        None,
    ),
}
"""By name: how the model is built, a batch, and what it says about two pictures (None: it says nothing)."""


def build(name: str) -> nn.Module:
    """Return a model with the formula's weights."""
    with _without_hub():
        model = MODELS[name][0]()
    set_weights(model)
    return model


def tied_names(model: nn.Module) -> list[list[str]]:
    """Return the names under which one and the same parameter stands, for each that has several."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


def measure(name: str) -> dict[str, Any]:
    """Return loss, gradients' norms by name, what the model says, its checkpoint's names and shapes, and its ties."""
    _, batch, say = MODELS[name]
    model = build(name)
    with _without_hub():
        loss = model(dict(batch))["loss"]
        loss.backward()
        said = say(model.eval()) if say else []
    # State dictionaries of other versions have buffers that are no weights, such as position_ids, in other places.
    return {
        "loss": loss.item(),
        "gradients": {
            name: weight.grad.double().norm().item()
            for name, weight in model.named_parameters()
            if weight.grad is not None
        },
        "said": said,
        "keys": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        "tied": tied_names(model),
    }


SPELLINGS = ["don't", "It's a V-neck, isn't it?", "Café\tRED.", "红色 dress", "[SEP] x [DEC]", "", "zzz 👗 80s"]


def measure_tokenizer() -> dict[str, Any]:
    """Return texts' token ids, cut at 9 and whole, and what these are decoded to."""
    tokenizer = load_tokenizer(WORDS)
    whole = tokenizer(SPELLINGS).input_ids
    return {
        "size": len(tokenizer),
        "ids": whole,
        "cut": tokenizer(SPELLINGS, truncation=True, max_length=9).input_ids,
        "decoded": [tokenizer.decode(ids, skip_special_tokens=True) for ids in whole],
        "batch": tokenizer.batch_decode(whole),
    }


if __name__ == "__main__":
    from transformers import __version__

    if not __version__.startswith("4.26."):
        sys.exit(f"The expected numbers are those of transformers 4.26, LAVIS's own pin; this is {__version__}.")
    numbers: dict[str, Any] = {name: measure(name) for name in MODELS}
    numbers["tokenizer"] = measure_tokenizer()
    lines = (f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in numbers.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
