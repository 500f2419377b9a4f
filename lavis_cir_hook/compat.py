"""Adapt today's libraries (Python >= 3.12) to LAVIS 1.0.2, which expects transformers 4.26.

This module replaces nothing. It puts names that transformers moved back to the place from which LAVIS imports them,
and it gives LAVIS's language models the ``generate`` that they once inherited. It leaves the scores of beams to
transformers: 4.26 divides a score by the length with the prompt, 4.57 by the length without it.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# LAVIS's classes that call ``generate`` on themselves and read nothing from a key-value cache.
_GENERATING = (
    ("lavis.models.med", "BertLMHeadModel"),
    ("lavis.models.blip2_models.Qformer", "BertLMHeadModel"),
    ("lavis.models.blip2_models.modeling_opt", "OPTForCausalLM"),
)


def apply() -> bool:
    """Let ``import lavis`` succeed with transformers 4.57; do nothing with LAVIS's own pins or without transformers.

    Returns:
        Whether :func:`complete` must be called after the import.

    Raises:
        ImportError: If transformers is installed but cannot be imported.
    """
    try:
        major, minor = (int(number) for number in version("transformers").split(".")[:2])
    except PackageNotFoundError:
        return False
    if (major, minor) < (4, 27):
        return False
    import transformers.modeling_utils as former_home
    import transformers.pytorch_utils as home

    # LAVIS's BERTs (Q-Former, MED, NLVR) import these three from modeling_utils, which no longer exports them.
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(former_home, name):
            setattr(former_home, name, getattr(home, name))
    return True


def complete() -> None:
    """Give LAVIS's language models ``generate``, which transformers 4.50 removed from their base class.

    LAVIS's ``prepare_inputs_for_generation`` passes no cache on, here as in 4.26, so each step reads the whole prefix.
    """
    from transformers import PreTrainedModel
    from transformers.generation import GenerationMixin

    for module, name in _GENERATING:
        model = getattr(sys.modules.get(module), name, None)
        if model is None or not issubclass(model, PreTrainedModel) or hasattr(model, "generate"):
            continue
        model.__bases__ += (GenerationMixin,)
        model._expand_inputs_for_generation = staticmethod(_expand_inputs)


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
