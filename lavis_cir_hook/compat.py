"""Adapt today's libraries (Python >= 3.12) to LAVIS 1.0.2, which expects transformers 4.26.

Nothing of transformers itself is replaced: names that LAVIS imports and transformers moved or dropped are put back
where LAVIS looks for them, and LAVIS's own classes get what they once inherited. ``tests/test_stacks.py`` compares the
result with numbers made under LAVIS's own pins. A beam's score is transformers' own affair: 4.26 divides it by the
length with the prompt, later ones by the length without.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

# The base classes of LAVIS's language models, and those of them that call ``generate`` on themselves.
_BASES = (
    ("lavis.models.med", "BertPreTrainedModel"),
    ("lavis.models.blip_models.nlvr_encoder", "BertPreTrainedModel"),
    ("lavis.models.blip2_models.Qformer", "BertPreTrainedModel"),
    ("lavis.models.blip2_models.modeling_opt", "OPTPreTrainedModel"),
    ("lavis.models.blip2_models.modeling_t5", "T5PreTrainedModel"),
)
_GENERATING = (
    ("lavis.models.med", "BertLMHeadModel"),
    ("lavis.models.blip2_models.Qformer", "BertLMHeadModel"),
    ("lavis.models.blip2_models.modeling_opt", "OPTForCausalLM"),
    ("lavis.models.blip2_models.modeling_t5", "T5ForConditionalGeneration"),
)
# Where LAVIS imported BERT's tokenizer.
_TOKENIZING = ("lavis.models.blip_models.blip", "lavis.models.blip2_models.blip2", "lavis.models.albef_models")


def apply() -> bool:
    """Let ``import lavis`` succeed with transformers >= 4.27; do nothing with LAVIS's own pins or without transformers.

    Returns:
        Whether :func:`complete` must be called after the import.

    Raises:
        ImportError: If transformers is installed but cannot be imported.
    """
    if _transformers() < (4, 27):
        return False
    import transformers.modeling_utils as former_home
    import transformers.pytorch_utils as home

    # transformers 5 dropped this one; LAVIS's prune_heads, which nothing calls, is its only user.
    if not hasattr(home, "find_pruneable_heads_and_indices"):
        home.find_pruneable_heads_and_indices = _heads_and_indices
    # LAVIS's BERTs (Q-Former, MED, NLVR) import these three from modeling_utils, which stopped re-exporting them.
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(former_home, name):
            setattr(former_home, name, getattr(home, name))
    if _transformers() >= (5, 0):
        # T5's naive model parallelism, of which LAVIS imports two names.
        parallel: Any = ModuleType("transformers.utils.model_parallel_utils")
        parallel.assert_device_map, parallel.get_device_map = _assert_device_map, _device_map
        sys.modules.setdefault(parallel.__name__, parallel)
    return True


def complete() -> None:
    """Give LAVIS's language models what newer base classes no longer have, where they no longer have it.

    4.50 took out ``generate``. LAVIS's ``prepare_inputs_for_generation`` passes on no cache, in 4.26 as here, so each
    step reads the whole prefix. 5.0 took out masks and the tying of weights by ``get_output_embeddings``.
    """
    from transformers.generation import GenerationMixin

    for model in _classes(_GENERATING):
        if not hasattr(model, "generate"):
            model.__bases__ += (GenerationMixin,)
            if not hasattr(model, "get_encoder"):  # an encoder-decoder has nothing repeated before
                model._expand_inputs_for_generation = staticmethod(_expand_inputs)
    if _transformers() < (5, 0):
        return
    for base in _classes(_BASES):
        for name, function in _BEFORE_5.items():
            setattr(base, name, function)
        _count_positions(base)
    for model in _classes(_GENERATING[3:]):
        _keep_t5_head(model)
    for module in _TOKENIZING:
        if module in sys.modules:
            sys.modules[module].BertTokenizer = _tokenizer_class()  # type: ignore[attr-defined]


def _transformers() -> tuple[int, int]:
    try:
        major, minor = version("transformers").split(".")[:2]
    except PackageNotFoundError:
        return (0, 0)
    return int(major), int(minor)


def _classes(names: Sequence[tuple[str, str]]) -> list[Any]:
    found = (getattr(sys.modules.get(module), name, None) for module, name in names)
    return [model for model in found if model is not None]


def _expand_inputs(
    expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Repeat a batch for its beams as 4.26 did; encoder states stay unchanged, because LAVIS repeats them itself."""
    for name in ("attention_mask", "token_type_ids"):
        if model_kwargs.get(name) is not None:
            model_kwargs[name] = model_kwargs[name].repeat_interleave(expand_size, dim=0)
    if input_ids is not None:
        input_ids = input_ids.repeat_interleave(expand_size, dim=0)
    return input_ids, model_kwargs


def _init_weights(self: Any) -> None:
    """Initialize and tie; LAVIS's BERTs call this where 5.0 wants ``post_init``, which notes what is tied first."""
    from transformers import PreTrainedModel

    if "all_tied_weights_keys" in self.__dict__:
        PreTrainedModel.init_weights(self)
    else:
        self.post_init()


def _tied_names(self: Any, all_submodels: bool = False) -> dict[str, str]:
    """Return what is tied, name by name: parameters that are one, and the output's weight with the input's, as in 4.26.

    5.0 reads a table that LAVIS's classes lack, so it would leave the output's weight apart, and after loading a file
    that has a parameter under one of its names it would draw the others at random.
    """
    first: dict[int, str] = {}
    tied = {}
    for name, weight in self.named_parameters(remove_duplicate=False):
        if first.setdefault(id(weight), name) != name:
            tied[name] = first[id(weight)]
    output = self.get_output_embeddings()
    if output is not None and getattr(self.config, "tie_word_embeddings", True):
        names = {id(module): name for name, module in self.named_modules()}
        tied[f"{names[id(output)]}.weight"] = f"{names[id(self.get_input_embeddings())]}.weight"
    return tied


def _invert_attention_mask(self: Any, mask: Any) -> Any:
    """Return 0 where a mask (batch, [query,] key) is 1, and the least number of the model's type where it is 0."""
    import torch

    mask = mask[:, None, :, :] if mask.dim() == 3 else mask[:, None, None, :]
    return (1.0 - mask.to(self.dtype)) * torch.finfo(self.dtype).min


def _extended_attention_mask(self: Any, mask: Any, shape: tuple[int, int], *_: Any) -> Any:
    """As :func:`_invert_attention_mask`; a decoder's mask (batch, key) also hides what comes later. T5 calls this."""
    import torch

    if mask.dim() == 2 and self.config.is_decoder:
        later = torch.ones(shape[1], mask.shape[1], dtype=mask.dtype, device=mask.device)
        mask = mask[:, None, :] * later.tril(mask.shape[1] - shape[1])
    return _invert_attention_mask(self, mask)


def _head_mask(self: Any, mask: Any, layers: int, *_: Any) -> Any:
    """Return a mask of heads, (heads,) or (layer, heads), in the shape (layer, batch, heads, query, key)."""
    if mask is None:
        return [None] * layers
    mask = mask[None, None, :, None, None] if mask.dim() == 1 else mask[:, None, :, None, None]
    return mask.expand(layers, -1, -1, -1, -1).to(self.dtype)


_BEFORE_5 = {
    "init_weights": _init_weights,
    "get_expanded_tied_weights_keys": _tied_names,
    "invert_attention_mask": _invert_attention_mask,
    "get_extended_attention_mask": _extended_attention_mask,
    "get_head_mask": _head_mask,
}


def _count_positions(base: Any) -> None:
    """Let the buffer ``position_ids``, which the files of BERT lack and 5.0 leaves undefined then, count again."""
    draw = base._init_weights

    def draw_and_count(self: Any, module: Any) -> None:
        draw(self, module)
        positions = getattr(module, "position_ids", None)
        if positions is not None:
            positions.copy_(positions.new_ones(positions.shape).cumsum(-1) - 1)

    base._init_weights = draw_and_count


def _keep_t5_head(model: Any) -> None:
    """Let T5 keep an output layer of its own: 5.0 says ``tie_word_embeddings`` of every T5, also of FLAN-T5."""
    build = model.__init__

    def build_as_configured(self: Any, config: Any) -> None:
        config.tie_word_embeddings = config.scale_decoder_outputs  # where 5.0 keeps what the file says
        build(self, config)

    model.__init__ = build_as_configured


def _tokenizer_class() -> Any:
    """Return BERT's tokenizer as 4.26 had it: texts without blanks before "'t" and ".", and [ENC] under its old name."""
    from transformers import BertTokenizer

    class Tokenizer(BertTokenizer):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{"clean_up_tokenization_spaces": True, **settings})

        @property
        def additional_special_tokens_ids(self) -> list[int]:
            return list(self.extra_special_tokens_ids)

    return Tokenizer


def _heads_and_indices(heads: Any, count: int, size: int, pruned: set[int]) -> tuple[set[int], Any]:
    """Return the heads yet to be pruned, and the indices of what stays of ``count`` heads of ``size`` numbers."""
    import torch

    heads = set(heads) - pruned
    gone = {head - sum(other < head for other in pruned) for head in heads}
    stays = [head * size + index for head in range(count) if head not in gone for index in range(size)]
    return heads, torch.tensor(stays, dtype=torch.long)


def _device_map(layers: int, devices: Any) -> dict[int, list[int]]:
    """Share ``layers`` blocks out among devices, in order and evenly."""
    per_device = -(-layers // len(devices))
    blocks = list(range(layers))
    return {device: blocks[index * per_device :][:per_device] for index, device in enumerate(devices)}


def _assert_device_map(device_map: dict[int, list[int]], layers: int) -> None:
    """Raise ValueError unless every block stands in the map once."""
    if sorted(block for blocks in device_map.values() for block in blocks) != list(range(layers)):
        raise ValueError(f"device_map is {device_map}; name each of the blocks 0 to {layers - 1} once.")
