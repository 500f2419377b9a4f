"""``lavis-cir export`` writes a folder with every tensor, which gives the run's scores in transformers and here."""

from __future__ import annotations

import json
import resource
import signal

import pytest
import torch
from conftest import SMALL, SMALL_TSCIR, make_scoring_model, make_triplets
from hub_blip2 import assert_same_outputs, small_config, small_state
from safetensors.torch import load_file, save_file

from lavis_cir_plugin.commands import main
from lavis_cir_plugin.commands.export import FORMATS
from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir
from lavis_cir_plugin.training.training_history import trained_on


def export(run, folder, form) -> None:
    main.main(["export", str(run), "--output", str(folder), "--format", form])


@pytest.fixture
def run(tmp_path):
    """Return the folder of a run, whose checkpoint has trained weights alone; the frozen tower is in another file."""
    base = tmp_path / "base"
    base.mkdir()
    save_file(small_state(), base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(small_config()))
    section = {
        **SMALL,
        "arch": "blip2_cir",
        "model_type": "tiny",
        "vit_config": {**SMALL["vit_config"], "depth": 2},
        "freeze_vit": True,
        "fusion": "sentence_prompt",
        "pretrained": str(base),
    }
    model = Blip2Cir.from_config(section)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape) * 0.01)
    return written_run(tmp_path / "run", model, section), model.eval()


def written_run(folder, model, section):
    folder.mkdir()
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    content = {"model": state, "config": {"model": section, "run": {"seed": 42}, "datasets": {}}}
    torch.save(content, folder / "checkpoint_best.pth")
    return folder


def query_and_targets(model):
    batch = make_triplets(3)
    return model.encode_query(batch), model.encode_target(batch["target"])


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_loads_here_to_the_same_scores(form, run, tmp_path, capsys):
    """Scores are bit-equal; transformers' layout lacks temperature and prompt, which are in a file beside it."""
    folder, trained = run
    export(folder, tmp_path / "out", form)
    section = {**SMALL, "vit_config": {**SMALL["vit_config"], "depth": 2}, "fusion": "sentence_prompt"}
    section["freeze_vit"] = True  # as in the run, since a frozen tower has another kernel, which rounds otherwise
    file = {"transformers": "", "safetensors": "model.safetensors", "lavis": "checkpoint.pth"}[form]
    assert file in capsys.readouterr().out
    loaded = Blip2Cir.from_config({**section, "pretrained": str(tmp_path / "out" / file)}).eval()
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.state_dict().items())
    assert all(map(torch.equal, query_and_targets(loaded), query_and_targets(trained)))


def test_lavis_checkpoint_keeps_what_the_run_was_trained_on(run, tmp_path):
    saved = torch.load(run[0] / "checkpoint_best.pth")
    torch.save({**saved, "trained_on": ["cirr", "fashioniq"]}, run[0] / "checkpoint_best.pth")
    export(run[0], tmp_path / "out", "lavis")
    assert trained_on({"pretrained": str(tmp_path / "out/checkpoint.pth")}, {}) == {"cirr", "fashioniq"}


def test_transformers_loads_the_folder_and_gives_the_same_scores(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Blip2ForImageTextRetrieval"):
        pytest.skip(f"transformers {transformers.__version__} has no Blip2ForImageTextRetrieval, which came with 4.46")
    export(run[0], tmp_path / "out", "transformers")
    theirs, report = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert set(report["missing_keys"]) == {"itm_head.weight", "itm_head.bias"}
    assert not report["unexpected_keys"]
    # The joint fusion is what transformers' own passes can be compared with; it reads the same tensors.
    section = {**SMALL, "vit_config": {**SMALL["vit_config"], "depth": 2}, "pretrained": str(tmp_path / "out")}
    (tmp_path / "out" / "lavis_cir.safetensors").unlink()
    assert_same_outputs(theirs.eval(), Blip2Cir.from_config(section).eval())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("is red").input_ids == run[1].tokenizer("is red").input_ids


def test_other_models_leave_in_the_two_formats_that_hold_them(tmp_path):
    model = make_scoring_model("mapping").eval()
    section = {**SMALL_TSCIR, "arch": "tscir_mapping", "model_type": "tiny"}
    clip = {**model.image_tower.visual.state_dict(prefix="visual."), **model.text_tower.clip.state_dict()}
    torch.save(clip, tmp_path / "clip.pt")
    folder = written_run(tmp_path / "run", model, {**section, "pretrained": str(tmp_path / "clip.pt")})
    export(folder, tmp_path / "out", "safetensors")
    state = load_file(tmp_path / "out/model.safetensors")
    assert state.keys() == model.state_dict().keys()
    other = make_scoring_model("mapping", seed=1).eval()
    other.load_checkpoint(str(tmp_path / "out/model.safetensors"))
    assert all(map(torch.equal, query_and_targets(other), query_and_targets(model)))
    with pytest.raises(SystemExit, match="writes blip2_cir alone, and this run trained TscirMapping"):
        export(folder, tmp_path / "no", "transformers")
    assert not (tmp_path / "no").exists()


def test_what_is_no_run_and_a_folder_in_use_are_refused(run, tmp_path):
    folder, trained = run
    torch.save({"model": trained.state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(SystemExit, match="holds no weights with the config of a run"):
        export(tmp_path / "bare.pth", tmp_path / "out", "lavis")
    with pytest.raises(SystemExit, match="neither a checkpoint nor the folder"):
        export(tmp_path / "base", tmp_path / "out", "lavis")
    with pytest.raises(SystemExit, match="is not an empty folder"):
        export(folder, folder, "lavis")


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(form, run, tmp_path):
    """To the writers, a limit on the size of files looks like a full disk; each of them has another error for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(SystemExit, match=r"lavis-cir: .*out could not be written: .*; free some space there or"):
            export(run[0], tmp_path / "out", form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr("lavis_cir_plugin.load_run", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"file/deep/out could not be written: Not a directory; free some space"):
        export(run[0], tmp_path / "file/deep/out", "lavis")
