"""TSCIR's stages and clip_cir on two gloo processes give the results of one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from conftest import add_small_towers
from launched import in_two_processes
from torch.nn.parallel import DistributedDataParallel

from lavis_cir_plugin.methods.tscir.composing import TscirComposing
from lavis_cir_plugin.methods.tscir.mapping import TscirMapping
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation
from lavis_cir_plugin.models.clip_cir import ClipCir

SMALL = {"hidden_width": 10, "injection_width": 8, "injection_heads": 2, "dropout": 0.0, "injection_blocks": [0, 1]}
STAGES = {
    "clip captions": (ClipCir, {"freeze_vit": False}),
    "clip triplets": (ClipCir, {"freeze_vit": False}),
    "mapping": (TscirMapping, SMALL),
    "composing": (TscirComposing, {**SMALL, "adapter_blocks": [0, 2], "adapter_rank": 3, "mixed_negatives": 2}),
}
GAMMAS = (0.0, 0.05)


def whole_batch(stage):
    """Return eight rows, of which 1 and 6, on different processes, have the same target image or image."""
    generator = torch.Generator().manual_seed(1)
    image, target = torch.randn(2, 8, 3, 16, 16, generator=generator)
    ids = torch.arange(8)
    ids[6] = ids[1]
    texts = [f"is {word}" for word in ["red", "blue", "green", "plain", "long", "short", "dark", "light"]]
    batch = {"image": image, "text_input": texts, "epoch": [0] * 8}
    if stage in ("clip captions", "mapping"):
        return {**batch, "image_id": ids}
    target[6] = target[1]
    return {**batch, "target": target, "target_id": ids, "reference_caption": [f"a {text[3:]} dress" for text in texts]}


def after_two_steps(stage, gamma, batch, wrap=lambda model: model):
    """Return the second step's gradients and the model's running statistics."""
    torch.manual_seed(0)
    model_class, changes = STAGES[stage]
    model = model_class(clip_model="small_clip", **changes)
    model.text_tower.clip.logit_scale.data.fill_(1.0)
    wrapped = wrap(model.train())
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    stock = torch.optim.AdamW(trained, lr=1e-3, eps=1e-2)
    optimizer = PerturbingOptimizer(stock, wrapped, WeightPerturbation(gamma=gamma, tensors="all"), seed=3)
    call = optimizer.perturb(wrapped)
    for _ in range(2):
        optimizer.zero_grad()
        call({**batch, "epoch": 0})["loss"].backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        optimizer.step()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    return gradients, statistics


def work(rank, folder):
    torch.set_num_threads(1)
    add_small_towers()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    for stage in STAGES:
        half = {key: values[rank * 4 : rank * 4 + 4] for key, values in whole_batch(stage).items()}
        for gamma in GAMMAS:
            found[stage, gamma] = after_two_steps(stage, gamma, half, DistributedDataParallel)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(work, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_two_processes_equal_one(stage, gamma, found):
    """Negatives, mixtures and batch normalisation reach across processes, with and without weight perturbation."""
    gradients, statistics = after_two_steps(stage, gamma, whole_batch(stage))
    assert bool(statistics) == stage.startswith(("mapping", "composing"))
    for rank in range(2):
        theirs, remembered = found[rank][stage, gamma]
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[name], gradient, atol=5e-5, rtol=2e-3, msg=f"{name}")
        for name, buffer in statistics.items():
            torch.testing.assert_close(remembered[name], buffer, atol=1e-5, rtol=1e-4, msg=name)
