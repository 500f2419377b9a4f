"""``lavis-cir config`` prints each value with its origin and meaning, checks the config, and builds nothing."""

from __future__ import annotations

import json

import pytest
import torch

from lavis_cir_plugin.commands import main
from lavis_cir_plugin.commands.config import SCHEMA_LINE

DEMO = "projects/wrf4cir/demo.yaml"


def test_every_value_has_its_origin_and_its_sentence(capsys: pytest.CaptureFixture[str]):
    main.main(["config", DEMO, "--options", "run.seed=7"])
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["run.seed"] == "7  # --options. Seed of all generators; a process adds its rank."
    assert lines["run.max_epoch"].startswith(f"10  # {DEMO}. Number of epochs")
    assert lines["run.weight_decay"] == "0.05  # default of run. AdamW's weight decay."
    assert lines["run.wrf.gamma"] == f"0.001  # {DEMO}. Radius; 0 switches the perturbation off."
    assert lines["model.embed_dim"] == "64  # default of the model's type. Width of q and v."
    size = "datasets.fashioniq.vis_processor.eval.image_size"
    assert lines[size] == "64  # default of the data set. Pixels per side of the result."


def test_a_long_value_is_printed_whole(capsys: pytest.CaptureFixture[str]):
    folder = "/data/" + "long" * 40
    main.main(["config", DEMO, "--options", f"run.output_dir={folder}"])
    assert f'run.output_dir: "{folder}"  # --options.' in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--evaluate"], ["--options", "run.seed=1"]])
def test_the_schema_takes_no_option_that_it_would_ignore(more: list[str]):
    with pytest.raises(SystemExit, match="reads neither --options nor --evaluate"):
        main.main(["config", "--schema", *more])


def test_a_wrong_value_ends_the_command_with_its_sentence(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match=r"run\.seed must be a whole number >= 0 and <= 4294967295, got -1"):
        main.main(["config", DEMO, "--options", "run.seed=-1"])


def test_values_that_do_not_go_together_are_told_after_the_config(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        main.main(["config", DEMO, "--options", "run.device=cuda"])
    assert 'run.device: "cuda"' in capsys.readouterr().out


def test_the_schema_is_printed_with_the_line_that_names_it(capsys: pytest.CaptureFixture[str]):
    main.main(["config", "--schema"])
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"]["run"]["properties"]["seed"]["maximum"] == 4294967295
    with pytest.raises(SystemExit):
        main.main(["config", "--help"])
    assert SCHEMA_LINE in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", [[], [DEMO, "--schema"]])
def test_it_takes_a_project_or_prints_the_schema(arguments: list[str]):
    with pytest.raises(SystemExit, match="either a project"):
        main.main(["config", *arguments])
