"""The task composed_retrieval reads its settings where LAVIS makes it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from lavis_cir_plugin.tasks.composed_retrieval import ComposedRetrievalTask


def test_the_task_knows_the_type_of_the_gallery_from_its_start():
    """LAVIS makes a task by setup_task; without a config the type is float32."""
    config = SimpleNamespace(run_cfg={"gallery_dtype": "float16"})
    assert ComposedRetrievalTask.setup_task(cfg=config).gallery_dtype == torch.float16
    assert ComposedRetrievalTask.setup_task(cfg=SimpleNamespace(run_cfg={})).gallery_dtype == torch.float32
    assert ComposedRetrievalTask().gallery_dtype == torch.float32
