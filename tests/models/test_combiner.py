"""CLIP4Cir's combiner against an independent reading of its equations; its files, and refused ones."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL_CLIP, make_triplets
from omegaconf import OmegaConf

from lavis_cir_plugin.models.clip_cir import ClipCir
from lavis_cir_plugin.models.combiner import Combiner, read_combiner
from lavis_cir_plugin.models.open_clip_towers import load_clip
from lavis_cir_plugin.training.config import _model_conflicts


def published_state(width: int, projection: int = 5, hidden: int = 7) -> dict[str, torch.Tensor]:
    """Return the tensors of a published combiner by their names in the file."""
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "text_projection_layer": (projection, width),
        "image_projection_layer": (projection, width),
        "combiner_layer": (hidden, 2 * projection),
        "output_layer": (width, hidden),
        "dynamic_scalar.0": (hidden, 2 * projection),
        "dynamic_scalar.3": (1, hidden),
    }
    state = {}
    for name, (rows, columns) in shapes.items():
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator)
        state[f"{name}.bias"] = torch.randn(rows, generator=generator)
    return state


def naive_query(state, image, text) -> list[float]:
    """Compute one query by loops over plain numbers."""
    numbers = {name: tensor.tolist() for name, tensor in state.items()}

    def linear(name, x):
        rows, bias = numbers[f"{name}.weight"], numbers[f"{name}.bias"]
        return [sum(w * value for w, value in zip(row, x)) + b for row, b in zip(rows, bias)]

    def relu(x):
        return [max(value, 0.0) for value in x]

    both = relu(linear("text_projection_layer", text)) + relu(linear("image_projection_layer", image))
    (logit,) = linear("dynamic_scalar.3", relu(linear("dynamic_scalar.0", both)))
    share = 1 / (1 + math.exp(-logit))
    added = linear("output_layer", relu(linear("combiner_layer", both)))
    query = [a + share * t + (1 - share) * g for a, t, g in zip(added, text, image)]
    length = math.sqrt(sum(value**2 for value in query))
    return [value / length for value in query]


@pytest.fixture
def files(tmp_path):
    """Write CLIP4Cir's two files of made-up weights: the fine-tuned CLIP and the combiner."""
    clip = load_clip("small_clip")
    width = clip.text_projection.shape[1]
    state = published_state(width)
    # OpenAI's class keeps three numbers beside its weights.
    numbers = {"input_resolution": torch.tensor(16), "context_length": torch.tensor(8), "vocab_size": torch.tensor(9)}
    torch.save({"epoch": 3, "CLIP": {**clip.state_dict(), **numbers}}, tmp_path / "tuned_clip_best.pt")
    torch.save({"epoch": 9, "Combiner": state}, tmp_path / "combiner.pt")
    settings = {
        **SMALL_CLIP,
        "fusion": "combiner",
        "pretrained": str(tmp_path / "tuned_clip_best.pt"),
        "combiner": str(tmp_path / "combiner.pt"),
    }
    return SimpleNamespace(clip=clip, state=state, settings=settings, width=width, folder=tmp_path)


def test_the_published_files_give_the_queries_of_the_equations(files):
    """The equations take un-normalised features of the fine-tuned CLIP."""
    model = ClipCir.from_config(files.settings).eval()
    batch = make_triplets(3)
    with torch.no_grad():
        images = files.clip.encode_image(batch["image"])
        texts = files.clip.encode_text(model.text_tower.tokenize(batch["text_input"]))
    expected = [naive_query(files.state, image, text) for image, text in zip(images.tolist(), texts.tolist())]
    torch.testing.assert_close(model.encode_query(batch), torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_new_combiner_has_the_recipes_widths_and_is_trained_whole(files):
    model = ClipCir.from_config({**files.settings, "combiner": None, "freeze_text": True}).train()
    assert model.combiner.combiner_layer.weight.shape == (8 * files.width, 2 * 4 * files.width)
    model(make_triplets(4))["loss"].backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("combiner.")}
    assert len(trained) == 12


def test_a_runs_own_checkpoint_is_found_again(files):
    first = ClipCir.from_config({**files.settings, "freeze_text": True})
    with torch.no_grad():
        first.combiner.output_layer.bias.add_(1)
    kept = {name: tensor for name, tensor in first.state_dict().items() if name.startswith("combiner.")}
    torch.save({"model": kept}, files.folder / "checkpoint_best.pth")
    finetuned = {"load_finetuned": True, "finetuned": str(files.folder / "checkpoint_best.pth"), "freeze_text": True}
    again = ClipCir.from_config({**files.settings, **finetuned})
    assert torch.equal(again.eval().encode_query(make_triplets(2)), first.eval().encode_query(make_triplets(2)))


def test_files_that_do_not_fit_are_refused(files):
    with pytest.raises(ValueError, match=r"holds no combiner of CLIP4Cir.*name its combiner's file"):
        read_combiner(files.settings["pretrained"], files.width)
    with pytest.raises(ValueError, match=f"features of width {files.width}, and model.clip_model gives 99"):
        read_combiner(files.settings["combiner"], 99)
    for change, message in (
        (lambda state: state.pop("dynamic_scalar.3.bias"), "1 missing keys"),
        (lambda state: state.update(extra=torch.ones(1)), "1 unexpected keys"),
        (lambda state: state.update({"output_layer.bias": torch.ones(1)}), "another shape"),
    ):
        state = dict(files.state)
        change(state)
        torch.save({"epoch": 1, "Combiner": state}, files.folder / "changed.pt")
        with pytest.raises(ValueError, match=message):
            read_combiner(str(files.folder / "changed.pt"), files.width)


def test_a_combiner_that_would_not_be_read_or_is_random_is_refused(files):
    with pytest.raises(ValueError, match=r"would not be read, because model.fusion is sum"):
        ClipCir.check_config({**files.settings, "fusion": "sum"})
    section = {**files.settings, "arch": "clip_cir"}
    for combiner, expected in ((section["combiner"], 0), (None, 1)):
        cfg = OmegaConf.create({"model": {**section, "combiner": combiner}, "run": {"device": "cpu"}})
        problems = list(_model_conflicts(SimpleNamespace(model_cfg=cfg.model, run_cfg=cfg.run), "evaluate"))
        assert len(problems) == expected
        assert all("would score random weights" in problem for problem in problems)


def test_dropout_acts_in_training_alone():
    combiner, ones = Combiner(4), torch.ones(2, 4)
    torch.manual_seed(0)
    assert not torch.equal(combiner(ones, ones), combiner(ones, ones))
    assert torch.equal(combiner.eval()(ones, ones), combiner(ones, ones))
