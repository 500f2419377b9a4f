"""The fused attention of a frozen EVA tower equals LAVIS's explicit softmax; CLIP's tower uses the kernel itself."""

from __future__ import annotations

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lavis.models import eva_vit
from lavis.models.clip_vit import VisionTransformer as ClipVisionTransformer
from torch import nn

from lavis_cir_plugin.models.fused_attention import FusedAttention, fuse_attention


def tower(**changes):
    torch.manual_seed(0)
    made = eva_vit.VisionTransformer(
        **{"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2, **changes},
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    for weight in made.parameters():  # biases and position tables start at zero, where a mistake would not show
        nn.init.normal_(weight, std=0.5)
    return made.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": True},
        {"qkv_bias": False, "qk_scale": 0.7},
        {"qkv_bias": True, "use_rel_pos_bias": True},
        {"qkv_bias": True, "use_shared_rel_pos_bias": True},
        {"qkv_bias": True, "use_rel_pos_bias": True, "use_shared_rel_pos_bias": True},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_it_equals_the_explicit_softmax_under_the_same_names(changes):
    made = tower(**changes)
    images = torch.randn(3, 3, 24, 24)
    names = list(made.state_dict())
    with torch.no_grad():
        expected = made(images)
        fuse_attention(made)
        with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as kernel:
            found = made(images)
    assert kernel.call_count == 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert list(made.state_dict()) == names


def test_in_training_it_draws_the_dropout_that_lavis_draws():
    made = tower(qkv_bias=True, attn_drop_rate=0.5).train()
    images = torch.randn(2, 3, 24, 24)
    outputs = []
    for fuse in (lambda tower: None, fuse_attention):
        fuse(made)
        torch.manual_seed(1)
        outputs.append(made(images))
    assert torch.equal(*outputs)


def test_frozen_towers_are_fused_and_trained_ones_are_lavis_own(small_model):
    kinds = {freeze: type(small_model(freeze_vit=freeze).visual_encoder.blocks[0].attn) for freeze in (True, False)}
    assert kinds == {True: FusedAttention, False: eva_vit.Attention}


def test_the_clip_tower_calls_the_fused_kernel_as_it_is():
    """nn.MultiheadAttention computes the weights itself only if they are asked for; layers - 1 blocks are built."""
    clip = ClipVisionTransformer(16, 8, width=12, layers=3, heads=2, use_grad_checkpointing=False).eval()
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as kernel:
        clip(torch.randn(1, 3, 16, 16))
    assert kernel.call_count == 2
