"""The one place that adapts today's libraries (Python >= 3.12) to LAVIS 1.0.2, which expects transformers 4.26.

Nothing is replaced: only names that LAVIS imports and transformers moved are put back where LAVIS looks for them.
Not covered: text generation (``generate`` of LAVIS's BLIP captioners), which relies on 4.26's beam search.
"""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version


def apply() -> None:
    """Let ``import lavis`` succeed with transformers 4.57; do nothing with LAVIS's own pins or without transformers.

    Raises:
        ImportError: If transformers is installed but cannot be imported.
    """
    try:
        major, minor = (int(number) for number in version("transformers").split(".")[:2])
    except PackageNotFoundError:
        return
    if (major, minor) < (4, 27):
        return
    import transformers.modeling_utils as former_home
    import transformers.pytorch_utils as home

    # LAVIS's BERTs (Q-Former, MED, NLVR) import these three from modeling_utils, which stopped re-exporting them.
    for name in ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(former_home, name):
            setattr(former_home, name, getattr(home, name))
    # LAVIS imports timm.models.{hub,registry,layers,helpers}; timm serves them with a warning users cannot act on.
    warnings.filterwarnings("ignore", message=r"Importing from timm\.models\.", category=FutureWarning)
