"""Adapt today's libraries (Python >= 3.12) to LAVIS 1.0.2, which expects transformers 4.26.

This module replaces nothing of transformers itself. It puts names that transformers moved or removed back to the place
from which LAVIS imports them, and it gives LAVIS's own classes the methods that they once inherited.
``tests/test_stacks.py`` compares the result with numbers of LAVIS's own pins. Scores of beams stay transformers' own.
"""

from __future__ import annotations

import math
import sys
from functools import cache, wraps
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, SimpleNamespace
from typing import Any

# LAVIS's language models, those of them that call ``generate`` on themselves, and who imported BERT's tokenizer.
_BASES = (
    ("med", "BertPreTrainedModel"),
    ("blip_models.nlvr_encoder", "BertPreTrainedModel"),
    ("blip2_models.Qformer", "BertPreTrainedModel"),
    ("blip2_models.modeling_opt", "OPTPreTrainedModel"),
    ("blip2_models.modeling_t5", "T5PreTrainedModel"),
)
_GENERATING = (
    ("med", "BertLMHeadModel"),
    ("blip2_models.Qformer", "BertLMHeadModel"),
    ("blip2_models.modeling_opt", "OPTForCausalLM"),
    ("blip2_models.modeling_t5", "T5ForConditionalGeneration"),
)
_TOKENIZING = ("albef_models", "alpro_models", "blip_models.blip", "blip2_models.blip2")
# These take nothing but np.Inf from numpy.
_INFINITE = ("albef_models.albef_pretrain", "alpro_models.alpro_retrieval")


def apply() -> bool:
    """Let ``import lavis`` succeed with transformers >= 4.27; do nothing with LAVIS's own pins or without transformers.

    Returns:
        Whether :func:`complete` is wanted after the import.
    """
    if _transformers() < (4, 27):
        return False
    import transformers.modeling_utils as former_home
    import transformers.pytorch_utils as home

    if _transformers() >= (5, 0):
        # Gone: the pruning of heads, and the splitting of T5 over devices.
        home.find_pruneable_heads_and_indices = _refuse
        parallel: Any = ModuleType("transformers.utils.model_parallel_utils")
        parallel.assert_device_map = parallel.get_device_map = _refuse
        sys.modules[parallel.__name__] = parallel
    # LAVIS's BERTs (Q-Former, MED, NLVR) import these three from modeling_utils, which stopped re-exporting them.
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(former_home, name):
            setattr(former_home, name, getattr(home, name))
    return True


def complete() -> None:
    """Give LAVIS's language models what newer base classes no longer have.

    4.50 took out ``generate``. LAVIS's ``prepare_inputs_for_generation`` passes on no cache, in 4.26 as here, so each
    step reads the whole prefix. 5.0 took out masks and the tying of weights by ``get_output_embeddings``. numpy 2 took
    out ``np.Inf``.
    """
    from transformers.generation import GenerationMixin

    for name in _INFINITE:
        _module(name).np = SimpleNamespace(Inf=math.inf)
    *berts, opt, t5 = (getattr(_module(name), model) for name, model in _GENERATING)
    for model in (*berts, opt, t5):
        if not hasattr(model, "generate"):
            model.__bases__ += (GenerationMixin,)
            if model is not t5:  # LAVIS repeats nothing for T5's beams
                model._expand_inputs_for_generation = staticmethod(_expand_inputs)
    if _transformers() < (5, 0):
        for name, _ in _GENERATING[:2]:  # from_pretrained sets parameters anew, and from then on these were two
            _module(name).BertLMPredictionHead._tie_weights = lambda self: setattr(self.decoder, "bias", self.bias)
        return
    for base in (getattr(_module(name), base) for name, base in _BASES):
        for method, function in _BEFORE_5.items():
            setattr(base, method, function)
        base._init_weights = _counting_positions(base._init_weights)
    opt.prepare_inputs_for_generation = _with_whole_mask(opt.prepare_inputs_for_generation)
    t5.__init__ = _as_configured(t5.__init__)
    tokenizer = _tokenizer_class()
    for name in _TOKENIZING:
        _module(name).BertTokenizer = tokenizer


def _module(name: str) -> Any:
    return sys.modules[f"lavis.models.{name}"]


def _transformers() -> tuple[int, int]:
    try:
        major, minor = version("transformers").split(".")[:2]
    except PackageNotFoundError:
        return 0, 0
    return int(major), int(minor)


def _expand_inputs(expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **more: Any) -> Any:
    """Repeat a batch for its beams as 4.26 did: what LAVIS has repeated itself (its encoders' states) is left alone."""
    for name in ("attention_mask", "token_type_ids"):
        if more.get(name) is not None:
            more[name] = more[name].repeat_interleave(expand_size, dim=0)
    return input_ids if input_ids is None else input_ids.repeat_interleave(expand_size, dim=0), more


def _init_weights(self: Any) -> None:
    """Initialize and tie. LAVIS's BERTs call this, where 5.0 wants ``post_init``, which first notes what is tied."""
    from transformers import PreTrainedModel

    PreTrainedModel.init_weights(self) if "all_tied_weights_keys" in self.__dict__ else self.post_init()


def _tied_names(self: Any, all_submodels: bool = False) -> dict[str, str]:
    """Return what is tied, name by name: parameters that are one, and the output's weight with the input's, as in 4.26.

    5.0 reads a table that LAVIS's classes lack: it would leave the output's weight apart, and draw at random what a
    file has under another of its names.
    """
    first: dict[int, str] = {}
    weights = [(name, id(weight)) for name, weight in self.named_parameters(remove_duplicate=False)]
    tied = {name: first[weight] for name, weight in weights if first.setdefault(weight, name) != name}
    output = self.get_output_embeddings()
    if output is not None and self.config.tie_word_embeddings:
        names = {module: name for name, module in self.named_modules()}
        tied[f"{names[output]}.weight"] = f"{names[self.get_input_embeddings()]}.weight"
    return tied


def _inverted(self: Any, mask: Any) -> Any:
    """Return 0 where a mask (batch, [query,] key) is 1, and the least number of the model's type where it is 0."""
    import torch

    mask = mask[:, None, :, :] if mask.dim() == 3 else mask[:, None, None, :]
    return (1.0 - mask.to(self.dtype)) * torch.finfo(self.dtype).min


def _extended(self: Any, mask: Any, shape: tuple[int, int], *_: Any) -> Any:
    """Invert a mask; one of a decoder (batch, key) also hides what comes later. LAVIS's BERTs have their own."""
    if mask.dim() == 2 and self.config.is_decoder:
        mask = mask[:, None, :] * mask.new_ones(shape[1], mask.shape[1]).tril(mask.shape[1] - shape[1])
    return _inverted(self, mask)


_BEFORE_5 = {
    "init_weights": _init_weights,
    "get_expanded_tied_weights_keys": _tied_names,
    "invert_attention_mask": _inverted,
    "get_extended_attention_mask": _extended,
    "get_head_mask": lambda self, mask, layers: [None] * layers if mask is None else _refuse(),
}


def _counting_positions(draw: Any) -> Any:
    @wraps(draw)
    def draw_and_count(self: Any, module: Any) -> None:
        draw(self, module)
        # A buffer that published files of BERT lack; 5.0 makes it anew without a value.
        if getattr(module, "position_ids", None) is not None:
            module.position_ids.copy_(module.position_ids.new_ones(module.position_ids.shape).cumsum(-1) - 1)

    return draw_and_count


def _with_whole_mask(prepare: Any) -> Any:
    @wraps(prepare)  # generate() reads its parameters
    def prepare_with_mask(self: Any, input_ids: Any, attention_mask: Any = None, **inputs: Any) -> Any:
        if attention_mask is None:  # 5.0 drops a mask of ones, and OPT's own would not count the image's queries
            attention_mask = input_ids.new_ones(len(input_ids), inputs["query_embeds"].shape[1] + input_ids.shape[1])
        return prepare(self, input_ids, attention_mask=attention_mask, **inputs)

    return prepare_with_mask


def _as_configured(build: Any) -> Any:
    @wraps(build)
    def build_as_configured(self: Any, config: Any) -> None:
        # 5.0 says of every T5 that its output is tied, also of FLAN-T5, and keeps here what the file says.
        config.tie_word_embeddings = config.scale_decoder_outputs
        build(self, config)

    return build_as_configured


@cache
def _tokenizer_class() -> Any:
    """Return BERT's tokenizer as in 4.26: it decodes "don't" and "red.", and has the ids of [ENC] by their old name."""
    from transformers import BertTokenizer

    class Tokenizer(BertTokenizer):  # type: ignore[misc]
        additional_special_tokens_ids = property(lambda self: self.extra_special_tokens_ids)

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{"clean_up_tokenization_spaces": True, **settings})

    Tokenizer.__qualname__ = Tokenizer.__name__  # pickle then finds it in this module, by the function below
    return Tokenizer


def __getattr__(name: str) -> Any:
    """Return BERT's tokenizer under the name by which a pickled model asks for it."""
    if name == "Tokenizer":
        return _tokenizer_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _refuse(*_: Any, **__: Any) -> Any:
    """Stand for what LAVIS imports and only its own methods use that nothing calls."""
    raise NotImplementedError("transformers 5 has no prune_heads, parallelize and head_mask for LAVIS; install 4.57.")
