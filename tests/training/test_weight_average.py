"""The moving average of the weights by hand-derived numbers, and what a run evaluates and saves with it."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.core.checkpoints import read_checkpoint
from lavis_cir_plugin.garments import GarmentsConfig, make_garments
from lavis_cir_plugin.tasks.composed_retrieval import ComposedRetrievalTask
from lavis_cir_plugin.training import launcher
from lavis_cir_plugin.training.weight_average import WeightAverage

pytestmark = pytest.mark.usefixtures("blank_pictures")
WORLD = {
    "train_triplets": 8, "train_images": 12, "val_queries": 4, "val_images": 8, "test_queries": 2, "test_images": 4,
    "image_width": 48, "image_height": 60,
}  # fmt: skip


@pytest.fixture
def layer():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    return layer


def test_the_average_worked_by_hand(layer):
    """From 1 the weight goes to 11, then to 21; the factors are 1 / 10 and 2 / 11, later ones at most 0.15.

    .1 * 1 + .9 * 11 = 10; .15 * 10 + .85 * 21 = 19.35.
    """
    average = WeightAverage(layer, 0.15)
    for value, expected in ((11.0, 10.0), (21.0, 19.35)):
        layer.weight.data.fill_(value)
        average.update()
        with average.in_model():
            assert float(layer.weight) == pytest.approx(expected)
        assert float(layer.weight) == value
    assert average.updates == 2


def test_the_weights_come_back_after_an_error_and_after_a_checkpoint_was_read_into_the_average(layer):
    average = WeightAverage(layer, 0.9)
    own = layer.weight.data.clone()

    def fail():
        with average.in_model():
            layer.load_state_dict({"weight": torch.full((1, 1), 7.0)})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert torch.equal(layer.weight.data, own)


def test_frozen_weights_have_no_average(layer):
    layer.weight.requires_grad_(False)
    assert WeightAverage(layer, 0.9).trained() == {}


def test_a_run_evaluates_and_saves_the_average_and_goes_on_from_the_weights(tmp_path, monkeypatch):
    """Six batches of two epochs; a naive average over the steps is what the checkpoints and evaluations have."""
    world = make_garments(tmp_path / "cache", GarmentsConfig(**WORLD))
    cfg = OmegaConf.load(PROJECTS / "wrf4cir/demo.yaml")
    cfg.datasets.fashioniq = {
        "build_info": {"root": str(world)},
        "vis_processor": {stage: {"name": "target_pad", "image_size": 64} for stage in ("train", "eval")},
    }
    cfg.run.update({"max_epoch": 2, "batch_size_train": 8, "output_dir": str(tmp_path / "out"), "ema_decay": 0.5})
    cfg.run.test_splits = []
    OmegaConf.save(cfg, tmp_path / "project.yaml")
    weights, evaluated = [], []
    update, evaluation = WeightAverage.update, ComposedRetrievalTask.evaluation

    def recording_update(self):
        weights.append(self.weights["temp"].detach().clone())
        update(self)

    def recording_evaluation(self, model, *arguments, **named):
        evaluated.append(model.temp.detach().clone())
        return evaluation(self, model, *arguments, **named)

    monkeypatch.setattr(WeightAverage, "update", recording_update)
    monkeypatch.setattr(ComposedRetrievalTask, "evaluation", recording_evaluation)
    launcher.main("train", ["--cfg-path", str(tmp_path / "project.yaml")])
    (folder,) = (tmp_path / "out").iterdir()
    saved = read_checkpoint(str(folder / "checkpoint_last.pth"))
    averages = [torch.tensor(0.07)]
    for number, weight in enumerate(weights, start=1):
        decay = min(0.5, number / (9 + number))
        averages.append(decay * averages[-1] + (1 - decay) * weight)
    assert len(weights) == saved["progress"]["averaged"] == 6
    torch.testing.assert_close(saved["model"]["temp"], averages[6])
    torch.testing.assert_close(torch.stack(evaluated), torch.stack([averages[3], averages[6]]))
    assert torch.equal(saved["progress"]["trained"]["temp"], weights[-1])
    assert not torch.equal(weights[-1], averages[6])
