"""``lavis-cir gap``: reading of logs, the loss around the weights by hand, and the command on a small trained run."""

from __future__ import annotations

import csv
import os
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.commands import main
from lavis_cir_plugin.garments import GarmentsConfig, make_garments
from lavis_cir_plugin.methods.wrf4cir import generalisation_gap as gap
from lavis_cir_plugin.report.run_log import RunLog
from lavis_cir_plugin.training import launcher

pytestmark = pytest.mark.usefixtures("blank_pictures")
WORLD = {
    "train_triplets": 8, "train_images": 12, "val_queries": 3, "val_images": 6, "test_queries": 1, "test_images": 4,
    "image_width": 40, "image_height": 40,
}  # fmt: skip


def write_run(folder, val, seen=(), metric="mean"):
    """Write the log of a run with one validation per epoch."""
    folder.mkdir(parents=True)
    log = RunLog(folder)
    for split, values in (("val", val), ("seen", seen)):
        for epoch, value in enumerate(values):
            log.log_epoch(epoch, epoch, split, {"R@10": value + 1, metric: value, "agg_metrics": value})
    log.close()
    return folder


def command(*arguments):
    main.main(["gap", *map(str, arguments)])


def refused(*arguments):
    with pytest.raises(SystemExit) as stopped:
        command(*arguments)
    return str(stopped.value)


# -- what was logged -------------------------------------------------------------------------------------------------


def test_table_points_and_picture_of_two_runs(tmp_path, capsys):
    """Run a is best at epoch 1 with 30 of 42 seen; run b, without seen queries, at epoch 0."""
    a = write_run(tmp_path / "a", [10, 30, 20], seen=[12, 42, 60])
    b = write_run(tmp_path / "b", [25, 24])
    command(a, b, "--output", tmp_path / "new" / "gap.png", "--batches", 0)
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[0].split()) == "run best epoch seen mean val mean gap loss rise at γ rise, random"
    assert lines[2].split() == ["a", "1", "42.00", "30.00", "12.00", "-", "-", "-"]
    assert lines[3].split() == ["b", "0", "-", "25.00", "-", "-", "-", "-"]
    assert lines[5] == "b: no mean on seen training queries was logged; train with run.valid_splits: [val, seen]."
    with (tmp_path / "new" / "gap.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["run", "series", "x", "value"]
    assert rows[1:] == [
        *(["a", "val mean", str(epoch), value] for epoch, value in enumerate(("10.0", "30.0", "20.0"))),
        *(["a", "seen mean", str(epoch), value] for epoch, value in enumerate(("12.0", "42.0", "60.0"))),
        *(["b", "val mean", str(epoch), value] for epoch, value in enumerate(("25.0", "24.0"))),
    ]
    assert Image.open(tmp_path / "new" / "gap.png").width == 7 * 150


def test_runs_in_folders_of_one_name_are_told_apart(tmp_path, capsys):
    runs = [write_run(tmp_path / seed / "wrf", [10, value]) for seed, value in (("seed0", 30), ("seed1", 31))]
    command(*runs, "--output", tmp_path / "gap.png", "--batches", 0)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:4]] == ["seed0/wrf", "seed1/wrf"]
    with (tmp_path / "gap.csv").open() as file:
        values = {(row["run"], row["x"]): row["value"] for row in csv.DictReader(file)}
    assert values["seed0/wrf", "1"] == "30.0"
    assert values["seed1/wrf", "1"] == "31.0"
    assert "seed0/../seed0/wrf is named twice" in refused(runs[0], tmp_path / "seed0/../seed0/wrf")


def test_a_folder_whose_name_is_no_text_is_drawn(tmp_path, capsys):
    run = write_run(tmp_path / "run", [10]).rename(tmp_path / os.fsdecode(b"run\xff"))
    command(run, "--output", tmp_path / "gap.png", "--batches", 0)
    assert capsys.readouterr().out.splitlines()[2].split()[0] == r"run\udcff"


def test_the_numbers_replace_no_other_file(tmp_path):
    """Beside RUN/epochs.png the numbers would be RUN/epochs.csv, the log of the run."""
    run = write_run(tmp_path / "a", [10, 30])
    before = (run / "epochs.csv").read_bytes()
    sentence = refused(run, "--output", run / "epochs.png", "--batches", 0)
    assert sentence.endswith("epochs.csv, another kind of file; take another.")
    assert (run / "epochs.csv").read_bytes() == before
    for _ in range(2):  # those of an earlier call are replaced
        command(run, "--output", run / "gap.png", "--batches", 0)


def test_a_place_that_cannot_be_written_is_refused_before_the_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(gap, "with_losses", lambda *_: pytest.fail("losses were computed"))
    (tmp_path / "gap.csv").mkdir()
    assert "gap.csv could not be written: Is a directory" in refused(
        write_run(tmp_path / "a", [10]), "--output", tmp_path / "gap.png"
    )


def test_another_metric_is_drawn_at_the_same_best_epoch(tmp_path, capsys):
    command(write_run(tmp_path / "a", [10, 30, 20]), "--metric", "R@10", "--output", tmp_path / "g.png", "--batches", 0)
    assert capsys.readouterr().out.splitlines()[2].split()[:4] == ["a", "1", "-", "31.00"]


def test_the_metric_that_chooses_the_checkpoint_is_found_by_its_values():
    val = {"R@10": {0: 1.0, 1: 2.0}, "mean": {0: 1.0, 1: 3.0}, "agg_metrics": {0: 1.0, 1: 3.0}}
    assert gap.selection_metric(val) == "mean"
    assert gap.selection_metric({"CIDEr": {0: 1.0}, "agg_metrics": {0: 1.5}}) == "agg_metrics"


def test_what_cannot_be_drawn_is_one_sentence(tmp_path):
    run = write_run(tmp_path / "out" / "job", [10])
    assert refused(tmp_path / "nowhere").endswith("nowhere has no epochs.csv, so it is no folder of a training run.")
    assert refused(tmp_path / "out").endswith("; it holds the runs job.")
    assert "no validation metric 'R@1'; set --metric to one of: R@10, agg_metrics, mean." in refused(
        run, "--metric", "R@1"
    )
    assert "ends in .png" in refused(run, "--output", tmp_path / "gap.pdf")
    assert "--batches must be a whole number >= 0, got -1." in refused(run, "--batches", -1)
    only_training = tmp_path / "training"
    only_training.mkdir()
    RunLog(only_training).close()
    assert "has no validation yet" in refused(only_training)
    assert not (tmp_path / "gap.png").exists()


@pytest.mark.parametrize(
    ("run", "label"),
    [
        ({"runner": "runner_base"}, "no perturbation"),
        ({"runner": "runner_wrf4cir", "wrf": {"gamma": 0}}, "no perturbation"),
        ({"runner": "runner_wrf4cir"}, "γ = 0.001"),
        ({"runner": "runner_wrf4cir", "wrf": {"gamma": 0.01, "scope": "tensor"}}, "γ = 0.01"),
        ({"runner": "runner_wrf4cir", "wrf": {"direction": "random"}}, "γ = 0.001, direction random"),
    ],
)
def test_runs_are_named_by_what_differs(run, label):
    assert gap._settings({"run": run}) == label


# -- the loss around the weights -------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """Model with loss scale / 2 * ||W||^2, a frozen layer that adds 0 and counts its calls, and a counting buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        self.frozen = Counting()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, samples):
        self.seen += 1
        nothing = 0 * self.frozen(samples["image"]).sum()
        return {"loss": samples["scale"] / 2 * self.weight.square().sum() + nothing}


class Counting(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        Counting.calls += 1
        return self.scale * x


def test_loss_along_the_gradient_of_a_quadratic():
    """The gradient is s W, so delta = 0.001 W whatever s is: the loss is s / 2 * 25 * (1 + 0.001 m)^2, s = 1 and 3.

    A random delta has the same length 0.001 * 5, so L(m) + L(-m) - 2 L(0) = s * m^2 * 25e-6, with s = 2 on average.
    """
    model = Quadratic()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "seen"}
    Counting.calls = 0
    samples = [{"image": torch.randn(2, 2), "scale": torch.tensor(scale)} for scale in (1.0, 3.0)]
    losses = gap.loss_along(model.eval(), samples)
    assert losses["gradient"] == pytest.approx({m: 25 * (1 + 0.001 * m) ** 2 for m in range(-10, 11)}, rel=1e-6)
    random = losses["random"]
    assert random[0] == 25.0
    assert random[10] + random[-10] - 2 * random[0] == pytest.approx(2 * 100 * 25e-6, abs=1e-5)
    assert abs(random[10] - random[0]) < losses["gradient"][10] - losses["gradient"][0]
    assert Counting.calls == 2  # a frozen tower runs once per batch
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


class Drawing(nn.Module):
    """A loss with a drawn factor, as one over drawn negatives is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, samples):
        return {"loss": torch.rand(()) * self.weight.square().sum()}


def test_a_loss_draws_the_same_numbers_at_every_distance_and_in_every_call():
    first, again = (gap.loss_along(Drawing().eval(), [{}, {}]) for _ in range(2))
    assert first == again
    start = first["random"][0]
    assert first["gradient"] == pytest.approx({m: start * (1 + 0.001 * m) ** 2 for m in range(-10, 11)}, rel=1e-5)


def test_the_rise_is_that_at_the_papers_radius():
    run = gap.RunCurves("a", {0: 1.0}, {}, 0, losses={"gradient": {0: 2.0, 1: 2.5, 10: 9.0}})
    assert run.rise("gradient") == 0.5
    assert run.rise("random") != run.rise("random")  # nan


# -- the command on a trained run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train the demo's model for one epoch on 24 triplets, with validation on val and seen."""
    folder = tmp_path_factory.mktemp("trained")
    world = make_garments(folder / "cache", GarmentsConfig(**WORLD))
    cfg = OmegaConf.load(PROJECTS / "wrf4cir/demo.yaml")
    cfg.model.update(image_size=32)
    cfg.datasets.fashioniq = {
        "build_info": {"root": str(world)},
        "vis_processor": {stage: {"name": "target_pad", "image_size": 32} for stage in ("train", "eval")},
    }
    cfg.run.update(max_epoch=1, batch_size_train=8, num_workers=0, valid_splits=["val", "seen"])
    cfg.run.update(output_dir=str(folder / "out"), test_splits=[])
    cfg.run.wrf.warmup_epochs = 0
    OmegaConf.save(cfg, folder / "project.yaml")
    launcher.main("train", ["--cfg-path", str(folder / "project.yaml")])
    (run,) = (folder / "out").iterdir()
    return run


def test_a_run_is_built_again_from_its_checkpoint(trained, tmp_path, capsys, monkeypatch):
    """The same command gives the same numbers; the gradient's direction climbs, and more than a random one."""
    monkeypatch.setattr(gap, "MULTIPLES", (-1, 0, 1))
    results = []
    for name in ("a", "b"):
        command(trained, "--output", tmp_path / f"{name}.png", "--batches", 1)
        results.append((tmp_path / f"{name}.csv").read_bytes())
    assert results[0] == results[1]
    assert Image.open(tmp_path / "a.png").width == 13 * 150
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {f"γ = 0.001 ({trained.name})"}
    assert {row["series"] for row in rows} == {"val mean", "seen mean", "loss along gradient", "loss along random"}
    loss = {(row["series"], row["x"]): float(row["value"]) for row in rows if row["series"].startswith("loss")}
    assert len(loss) == 2 * 3
    rise = loss["loss along gradient", "0.001"] - loss["loss along gradient", "0"]
    assert rise > 0
    assert rise > loss["loss along random", "0.001"] - loss["loss along random", "0"]
    assert "Written" in capsys.readouterr().out


def test_a_run_whose_loss_cannot_be_computed_is_drawn_without(trained, tmp_path, capsys):
    """Without its checkpoint or its images the run's recall is drawn, and a sentence says what is missing."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(trained / "epochs.csv", bare)
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    saved = torch.load(moved / "checkpoint_best.pth", weights_only=True)
    saved["config"]["datasets"]["fashioniq"]["build_info"]["root"] = str(tmp_path / "elsewhere")
    torch.save(saved, moved / "checkpoint_best.pth")
    command(bare, moved, "--output", tmp_path / "gap.png")
    printed = capsys.readouterr().out
    assert "bare: the loss is not drawn: there is neither checkpoint_best.pth nor checkpoint_last.pth." in printed
    assert "the loss is not drawn: fashioniq: annotation file cap.dress.train.json is in none of" in printed
    assert Image.open(tmp_path / "gap.png").width == 7 * 150


def test_another_loss_than_the_models_own_is_not_drawn(trained, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    saved = torch.load(moved / "checkpoint_best.pth", weights_only=True)
    saved["config"]["run"]["task"] = "retrieval_dpo"
    torch.save(saved, moved / "checkpoint_best.pth")
    command(moved, "--output", tmp_path / "gap.png")
    said = (
        "the loss is not drawn: run.task: retrieval_dpo trains another loss than the model's own, of mined negatives."
    )
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("content", [[1], {"x": torch.zeros(1)}, {"model": {}, "config": {"run": None}}])
def test_a_checkpoint_without_a_runs_config_becomes_a_note(content, tmp_path):
    torch.save(content, tmp_path / "checkpoint_best.pth")
    run = gap.RunCurves(label="a run", val={0: 1.0}, seen={}, best=0)
    found = gap.with_losses(run, tmp_path, batches=1)
    assert not found.losses
    assert "checkpoint_best.pth holds no weights with a run's config; name a folder that a run wrote." in found.notes[0]
