"""Retrieval-DPO through the launcher: both recipes on a small drawn world, logs, resumption, and refusals."""

from __future__ import annotations

import csv
import json
import math
import shutil

import pytest
import torch
from conftest import SMALL, make_scoring_model
from omegaconf import OmegaConf

from lavis_cir_plugin import PROJECTS, load_run
from lavis_cir_plugin.core.checkpoints import read_checkpoint
from lavis_cir_plugin.data.benchmark_datasets import TripletDataset
from lavis_cir_plugin.data.negatives import load_negatives
from lavis_cir_plugin.garments import GarmentsConfig, make_garments
from lavis_cir_plugin.methods.retrieval_dpo import negatives_sheet
from lavis_cir_plugin.methods.retrieval_dpo.miner import NegativeMiner
from lavis_cir_plugin.methods.retrieval_dpo.mining import MiningSettings
from lavis_cir_plugin.methods.retrieval_dpo.preference_model import PreferenceModel
from lavis_cir_plugin.methods.retrieval_dpo.task import RetrievalDpoTask, _check_data
from lavis_cir_plugin.models.open_clip_towers import load_clip
from lavis_cir_plugin.report.run_log import read_steps
from lavis_cir_plugin.training import launcher

DRAW_NEGATIVES = negatives_sheet.negatives_sheet
pytestmark = pytest.mark.usefixtures("blank_pictures")
WORLD = {
    "train_triplets": 8, "train_images": 12, "val_queries": 8, "val_images": 14, "test_queries": 1, "test_images": 2,
    "image_width": 48, "image_height": 60,
}  # fmt: skip
STATISTICS = ("loss_dpo", "loss_itc", "reward_accuracy", "reward_margin", "positive_drift", "without_negative")
BLIP = {**SMALL, "arch": "blip2_cir", "model_type": "tiny", "load_finetuned": True, "freeze_vit": True}
CLIP = {"arch": "clip_cir", "model_type": "tiny", "clip_model": "small_clip_square", "image_size": 16}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Draw a FashionIQ folder of 3 x 8 training triplets over 3 x 12 pictures."""
    return make_garments(tmp_path_factory.mktemp("world"), GarmentsConfig(**WORLD))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Write a checkpoint of the small blip2_cir."""
    path = tmp_path_factory.mktemp("start") / "start.pth"
    torch.save({"model": make_scoring_model("joint", freeze_vit=True).state_dict()}, path)
    return str(path)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Write weights of the small CLIP."""
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.manual_seed(7)
    torch.save(load_clip("small_clip_square").state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def project(world, start, clip):
    """Return a factory of project files: a shipped recipe on the small world and model, with changes by section."""

    def make(folder, recipe="fused_demo", model=None, datasets=None, **run):
        cfg = OmegaConf.load(PROJECTS / f"retrieval_dpo/{recipe}.yaml")
        small = {**BLIP, "finetuned": start} if recipe == "fused_demo" else {**CLIP, "pretrained": clip}
        cfg.model = OmegaConf.merge(cfg.model, small, model or {})
        cfg.datasets = datasets or on(world)
        cfg.run = OmegaConf.merge(
            cfg.run,
            {"batch_size_train": 6, "max_epoch": 2, "output_dir": str(folder), "seed": 3, "test_splits": []},
            {"negatives": {"cap": None}},
            {"negatives": {"count": 2}, "dpo": {"variant": "sigmoid"}} if recipe == "fused_demo" else {},
            run,
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = folder.parent / f"{folder.name}.yaml"
        OmegaConf.save(cfg, path)
        return str(path)

    return make


def on(root, **section):
    processor = {stage: {"name": "target_pad", "image_size": 16} for stage in ("train", "eval")}
    return {"fashioniq": {"build_info": {"root": str(root)}, "vis_processor": processor, **section}}


def run_of(folder):
    (made,) = [path for path in folder.iterdir() if path.is_dir()]
    return made


@pytest.fixture
def run(project, tmp_path):
    """Return a function that runs a project and returns the run's folder."""

    def go(name="out", command="train", **changes):
        launcher.main(command, ["--cfg-path", project(tmp_path / name, **changes)])
        return run_of(tmp_path / name)

    return go


def note_outputs(patch):
    """Return a list to which every training step appends its numbers."""
    kept = []
    forward = PreferenceModel.forward

    def noting(self, samples):
        out = forward(self, samples)
        if "epoch" in samples:  # not in the step that looks for weights that no score reads
            kept.append({"epoch": samples["epoch"], **{name: float(value) for name, value in out.items()}})
        return out

    patch.setattr(PreferenceModel, "forward", noting)
    return kept


@pytest.fixture
def outputs(monkeypatch):
    return note_outputs(monkeypatch)


@pytest.fixture(scope="module")
def fused(project, tmp_path_factory):
    """Return the folder of a run of the working recipe, and the numbers of each step."""
    folder = tmp_path_factory.mktemp("fused") / "out"
    with pytest.MonkeyPatch.context() as patch:
        kept = note_outputs(patch)
        launcher.main("train", ["--cfg-path", project(folder, test_splits=["val"])])
    return run_of(folder), kept


def epochs_of(folder, split="train"):
    with (folder / "epochs.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split]
    return {(int(row["epoch"]), row["metric"]): float(row["value"]) for row in rows}


def log_of(folder):
    """Return the lines of log.txt after the config."""
    text = (folder / "log.txt").read_text()
    return text[json.JSONDecoder().raw_decode(text)[1] :]


def state_of(folder):
    return read_checkpoint(str(folder / "checkpoint_last.pth"))["model"]


def assert_equal_states(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# Both recipes.


def test_the_working_recipe_logs_what_it_learns_and_its_checkpoint_is_a_plain_one(run, world, start, tmp_path, fused):
    """Averages over an epoch are the means of the steps; evaluating the same config needs no training data.

    The checkpoint leaves out the frozen tower, as LAVIS's do.
    """
    made, outputs = fused
    assert outputs[0]["loss_dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert outputs[0]["reward_margin"] == pytest.approx(0, abs=1e-6)
    assert abs(outputs[-1]["reward_margin"]) > 1e-6
    logged = epochs_of(made)
    for epoch in range(2):
        steps = [out for out in outputs if out["epoch"] == epoch]
        assert len(steps) == 24 // 6
        for name in STATISTICS:
            values = [out[name] for out in steps if math.isfinite(out[name])]
            assert logged[epoch, name] == pytest.approx(sum(values) / len(values), abs=6e-6), name
    lines = [json.loads(line) for line in log_of(made).strip().splitlines()]
    assert float(lines[0]["train_reward_margin"]) == pytest.approx(logged[0, "reward_margin"], abs=6e-6)  # 5 decimals
    steps = read_steps(made / "steps.csv")
    for name in ("lr", "loss"):  # of which LAVIS's log keeps 3
        own = [value for value, epoch in zip(steps[name], steps["epoch"]) if epoch == 0]
        assert logged[0, name] == pytest.approx(sum(own) / len(own), rel=1e-6)
    assert [path.name for path in sorted((made / "negatives").glob("*"))] == ["fashioniq_000.npz", "fashioniq_001.npz"]
    assert (made / "negatives_fashioniq.png").is_file()

    elsewhere = tmp_path / "without_training"
    shutil.copytree(world, elsewhere)
    for file in [*elsewhere.rglob("*train*")]:
        file.unlink()
    trained = {"finetuned": str(made / "checkpoint_last.pth")}
    with pytest.raises(
        SystemExit, match=r"leaves out the image tower, which was frozen in its training; set model\.pre"
    ):
        run("refused", "evaluate", model=trained, datasets=on(elsewhere), test_splits=["val"])
    trained["pretrained"] = start
    evaluated = run("again", "evaluate", model=trained, datasets=on(elsewhere), test_splits=["val"])
    metrics, again = (json.loads((folder / "val/metrics.json").read_text()) for folder in (made, evaluated))
    assert again["metrics"] == metrics["metrics"]
    weights, begun = load_run(made).model.state_dict(), read_checkpoint(start)["model"]
    expected = {**begun, **read_checkpoint(str(made / "checkpoint_last.pth"))["model"]}
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_negatives_are_of_the_triplets_category(fused, world):
    sets = load_negatives(fused[0] / "negatives/fashioniq_001.npz")
    counted = set()
    for category in ("dress", "shirt", "toptee"):
        own = json.loads((world / f"captions/cap.{category}.train.json").read_text())
        pairs = {(record["candidate"], record["target"]) for record in own}
        images = {name for pair in pairs for name in pair}
        for row, pair in enumerate(zip(sets.references, sets.targets)):
            if tuple(sets.names[index] for index in pair) in pairs:
                found = {sets.names[index] for index in sets.negatives[row] if index >= 0}
                assert found < images, "the window of 50 holds all but the target and what is as right"
                assert len(found) > len(images) / 2
                counted.add(row)
    assert len(counted) == len(sets.targets)


def test_the_papers_recipe_trains_text_against_the_reference_and_can_be_loaded(run, outputs, clip):
    """Its anchor is 0, so no loss reads CLIP's temperature, but the checkpoint keeps the temperature."""
    made = run(recipe="paper_demo", test_splits=["val"])
    assert {name for out in outputs for name in out} == {
        "epoch", "loss", "loss_dpo", "reward_accuracy", "reward_margin", "without_negative",
    }  # fmt: skip
    sets = load_negatives(made / "negatives/fashioniq_000.npz")
    assert sets.negatives.shape == (24, 1)
    state = state_of(made)
    assert "text_tower.clip.logit_scale" in state
    started = {f"text_tower.clip.{name}": tensor for name, tensor in torch.load(clip).items()}
    assert not torch.equal(state["text_tower.clip.ln_final.weight"], started["text_tower.clip.ln_final.weight"])
    model = {"load_finetuned": True, "finetuned": str(made / "checkpoint_last.pth")}
    evaluated = run("again", "evaluate", recipe="paper_demo", model=model, test_splits=["val"])
    metrics, again = (json.loads((folder / "val/metrics.json").read_text()) for folder in (made, evaluated))
    assert again["metrics"] == metrics["metrics"]


# Interrupted and resumed.

STYLES = {
    "epochs": {},
    # Inner epochs of 3 batches, where the data have 4.
    "iterations": {
        "runner": "runner_iter", "max_iters": 8, "iters_per_inner_epoch": 3, "max_epoch": None, "num_workers": 1,
    },
    "perturbed": {
        "runner": "runner_wrf4cir", "accum_grad_iters": 2,
        "wrf": {"gamma": 0.05, "warmup_epochs": 0, "direction": "random"},
    },
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_an_interrupted_run_ends_as_if_it_had_not_been(style, run, monkeypatch):
    """It is stopped within an epoch and at the second mining; weights, state and logs are bit-equal."""
    changes = {
        **STYLES[style],
        "save_every": 2 if "accum_grad_iters" in STYLES[style] else 1,
        "resume_ckpt_path": "auto",
    }
    whole = run("whole", **changes)
    forward, calls = PreferenceModel.forward, []

    def interrupted(self, samples):
        calls.append("epoch" in samples)
        if sum(calls) in (4 if style == "perturbed" else 3, 7):
            raise KeyboardInterrupt
        return forward(self, samples)

    use = RetrievalDpoTask._use_negatives

    def interrupted_after_mining(self, dataset, sets):
        if sets.about["epoch"] == 1 and "mined" not in calls:
            calls.append("mined")
            raise KeyboardInterrupt
        use(self, dataset, sets)

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceModel, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("killed", **changes)
    with monkeypatch.context() as patch:
        calls = []
        patch.setattr(RetrievalDpoTask, "_use_negatives", interrupted_after_mining)
        with pytest.raises(KeyboardInterrupt):
            run("killed", **changes)
    resumed = run("killed", **changes)
    expected, found = (read_checkpoint(str(folder / "checkpoint_last.pth")) for folder in (whole, resumed))
    assert_equal_states(expected["model"], found["model"])
    random_states = [state["progress"]["processes"][0]["random_state"]["torch"] for state in (expected, found)]
    assert torch.equal(*random_states)
    assert log_of(whole) == log_of(resumed)
    for name in ("epochs.csv", "steps.csv"):
        assert (whole / name).read_text() == (resumed / name).read_text()
    for path in (whole / "negatives").iterdir():
        first, second = load_negatives(path), load_negatives(resumed / "negatives" / path.name)
        assert (first.negatives == second.negatives).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_negatives_are_in_force_from_the_refresh_on(num_workers, run, monkeypatch):
    """Inner epochs have 3 batches, data epochs 4: no batch with negatives of an earlier set was loaded ahead.

    Each mining finds a single image for all triplets, another one each time.
    """
    mine, use, forward = NegativeMiner.mine, RetrievalDpoTask._use_negatives, PreferenceModel.forward
    expected, seen = [], []

    def one_image(self, name, dataset, epoch):
        sets = mine(self, name, dataset, epoch)
        sets.negatives[:] = -1
        sets.negatives[:, 0] = epoch
        return sets

    def noting(self, dataset, sets):
        use(self, dataset, sets)
        expected.append(dataset.load_image(sets.names[sets.about["epoch"]]))

    def looking(self, samples):
        if "epoch" in samples:
            seen.append((samples["epoch"], samples["negatives"][:, 0].clone()))
        return forward(self, samples)

    monkeypatch.setattr(NegativeMiner, "mine", one_image)
    monkeypatch.setattr(RetrievalDpoTask, "_use_negatives", noting)
    monkeypatch.setattr(PreferenceModel, "forward", looking)
    run(
        runner="runner_iter", max_iters=9, iters_per_inner_epoch=3, max_epoch=None, num_workers=num_workers,
        feature_cache=False, model={"freeze_vit": False}, negatives={"count": 1},
    )  # fmt: skip
    assert [epoch for epoch, _ in seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(expected) == 3
    for epoch, pictures in seen:
        assert torch.equal(pictures, expected[epoch].expand_as(pictures))


# Together with other things.


def test_without_a_radius_perturbation_is_the_stock_runner(run, fused):
    wrf = {"gamma": 0.0, "warmup_epochs": 0}
    plain, zero = fused[0], run("zero", runner="runner_wrf4cir", wrf=wrf, fused_adamw=False)
    assert_equal_states(state_of(plain), state_of(zero))
    perturbed = run("perturbed", runner="runner_wrf4cir", wrf={**wrf, "gamma": 0.05})
    saved = read_checkpoint(str(perturbed / "checkpoint_last.pth"))
    assert saved["optimizer"]["wrf"]["steps"] == {"perturbed": 8, "skipped": 0}
    assert not torch.equal(saved["model"]["query_tokens"], state_of(plain)["query_tokens"])


def test_adapters_are_trained_and_found_again(run, outputs):
    lora = {"target_modules": ["query", "value"], "r": 2}
    made = run(lora=lora, accum_grad_iters=2, test_splits=["val"])
    assert outputs[0]["loss_dpo"] == pytest.approx(math.log(2), abs=1e-5)
    state = state_of(made)
    assert {name.split(".")[-3] for name in state if "lora_" in name} == {"lora_A", "lora_B"}
    assert any(float(tensor.abs().max()) > 0 for name, tensor in state.items() if "lora_B" in name)
    assert not [name for name in state if "dense" in name]
    model = {"finetuned": str(made / "checkpoint_last.pth")}
    evaluated = run("again", "evaluate", model=model, lora=lora, test_splits=["val"])
    metrics, again = (json.loads((folder / "val/metrics.json").read_text()) for folder in (made, evaluated))
    assert again["metrics"] == metrics["metrics"]


def test_cached_features_train_the_same_weights(run, fused):
    plain = run(feature_cache=False)
    torch.testing.assert_close(state_of(fused[0]), state_of(plain), atol=1e-4, rtol=1e-3)


def test_scores_that_were_mined_with_the_starting_weights_stand_for_the_reference(run, outputs, monkeypatch):
    """They give the losses of a copy of the weights, up to rounding, if both draw the same negatives and texts."""
    once = {"refresh": 0, "window": [0, 2], "count": 2}
    first = run("first", negatives=once)
    file = str(first / "negatives/fashioniq_000.npz")
    texts = load_negatives(file).texts
    monkeypatch.setattr(TripletDataset, "__getitem__", _with_text(TripletDataset.__getitem__, texts))
    copied = run("copied", negatives=once)
    outputs.clear()
    mined = run("mined", negatives={**once, "file": file}, dpo={"reference": "mined"})
    assert outputs[0]["loss_dpo"] == pytest.approx(math.log(2), abs=1e-4)
    torch.testing.assert_close(state_of(mined), state_of(copied), atol=1e-3, rtol=1e-2)


def _with_text(stock, texts):
    def getitem(self, index):
        return {**stock(self, index), "text_input": self.text_processor(texts[index])}

    return getitem


# What is refused, each in one sentence.


def refused(project, folder, message, **changes):
    with pytest.raises(SystemExit, match=message):
        launcher.main("train", ["--cfg-path", project(folder, **changes)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dpo": {"bta": 1}}, r"run\.dpo\.bta is not a known key; did you mean 'beta'\?"),
        ({"dpo": {"beta": -3}}, r"run\.dpo\.beta must be a number > 0, got -3"),
        ({"dpo": {"epsilon": 0.5}}, r"run\.dpo\.epsilon must be a number >= 0 and < 0\.5, got 0\.5"),
        ({"dpo": {"variant": "orpo"}}, r"run\.dpo\.variant must be one of sigmoid, .*, got 'orpo'"),
        ({"dpo": "sigmoid"}, r"run\.dpo must be a mapping, got 'sigmoid'"),
        ({"negatives": {"windw": [0, 1]}}, r"run\.negatives\.windw is not a known key; did you mean 'window'\?"),
        ({"negatives": {"count": 99}}, r"run\.negatives\.count: 99 is more than run\.negatives\.window: \[0, 50\]"),
        (
            {"dpo": {"reference": "mined"}},
            r"run\.dpo\.reference: mined are the scores in run\.negatives\.file, which is",
        ),
        (
            {"dpo": {"reference": "mined"}, "negatives": {"file": "x.npz"}},
            r"run\.negatives\.file serves all epochs; set run\.negatives\.refresh and \.warmup_epochs to 0",
        ),
        (
            {"dpo": {"reference": "mined", "positive": "image"}, "negatives": {"file": "x.npz", "refresh": 0}},
            r"run\.dpo\.positive: image has no scores in run\.negatives\.file",
        ),
        (
            {"negatives": {"file": "gone.npz", "refresh": 0}},
            r"run\.negatives\.file: gone\.npz does not exist; a retrieval_dpo run w",
        ),
        (
            {"task": "composed_retrieval"},
            r"run\.dpo is read by retrieval_dpo and has no effect under composed_retrieval",
        ),
        (
            {"negatives": {"margin": 2.0}},
            r"leaves none of 24 triplets a negative; widen run\.negatives\.window: \[0, 50\], or lower run\.neg",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message, project, tmp_path):
    refused(project, tmp_path / "out", message, **changes)


def test_negatives_that_nobody_has_are_not_kept(project, tmp_path):
    """Otherwise a resumed run with wider rules would find the file."""
    refused(project, tmp_path / "none", r"leaves none of 24 triplets", negatives={"margin": 2.0})
    assert not list((tmp_path / "none").glob("*/negatives/*"))


def test_a_resumed_run_says_that_its_negatives_were_mined_by_other_rules(run, caplog):
    made = run(max_epoch=1, negatives={"refresh": 0})
    caplog.clear()
    run(resume_ckpt_path=str(made / "checkpoint_last.pth"), negatives={"refresh": 0, "margin": 0.01})
    assert "fashioniq_000.npz was mined by other run.negatives; they count from the next mining on" in caplog.text


def test_a_file_serves_where_the_pictures_have_moved(run, monkeypatch):
    """The sheet needs the pictures' places, so it is drawn here."""
    monkeypatch.setattr(negatives_sheet, "negatives_sheet", DRAW_NEGATIVES)
    once = {"refresh": 0}
    file = run("first", max_epoch=1, negatives=once) / "negatives/fashioniq_000.npz"
    sets = load_negatives(file)
    sets.paths = ["/gone/" + path for path in sets.paths]
    sets.save(file)
    made = run("moved", max_epoch=1, negatives={**once, "file": str(file)}, test_splits=["val"])
    assert (made / "negatives_fashioniq.png").is_file()


def test_an_evaluation_asks_for_no_file_of_negatives(run):
    gone = {"file": "gone.npz", "refresh": 0}
    assert (run("evaluated", "evaluate", negatives=gone, test_splits=["val"]) / "val/metrics.json").is_file()


def test_a_file_is_of_one_data_set():
    with pytest.raises(
        ValueError, match=r"run\.negatives\.file is of one data set, and 2 are trained on \(a, b\); leave"
    ):
        _check_data({"a": None, "b": None}, MiningSettings(file="x.npz", refresh=0))


def test_data_without_image_sets_are_refused(project, tmp_path):
    message = r"source: image_set mines in the image sets that CIRR's annotation names, and the triplets of dat"
    refused(project, tmp_path / "sets", message, negatives={"source": "image_set"})


def test_a_run_resumed_with_other_weights_to_train_is_refused(project, run, tmp_path):
    """The other weight is the temperature, which the anchor alone reads."""
    made = run(max_epoch=1)
    message = r"checkpoint_last\.pth was written by a run that trained \d+ weights and biases, and this one t"
    changes = {"dpo": {"anchor": 0.0}, "resume_ckpt_path": str(made / "checkpoint_last.pth")}
    refused(project, tmp_path / "other", message, **changes)


def test_data_without_triplets_or_with_random_pictures_are_refused(project, world, tmp_path):
    captions = {"garments_caption": {"splits": ["train"], "vis_processor": on(world)["fashioniq"]["vis_processor"]}}
    captions["garments_caption"]["garments"] = {
        "train_images": 24, "val_images": 2, "captions_per_image": 1, "image_width": 48, "image_height": 60,
    }  # fmt: skip
    message = (
        r"retrieval_dpo trains on triplets, and datasets\.garments_caption is GarmentsCaption; leave its train split"
    )
    refused(project, tmp_path / "captions", message, datasets=captions, feature_cache=False)
    crops = on(world)
    crops["fashioniq"]["vis_processor"]["train"] = {"name": "blip_image_train", "image_size": 16}
    message = (
        r"datasets\.fashioniq\.vis_processor\.train is BlipImageTrainProcessor, which may return something else each"
    )
    refused(project, tmp_path / "crops", message, datasets=crops, feature_cache=False)
    assert not list((tmp_path / "crops").glob("*/features")), "told before anything was computed"


def test_models_that_cannot_be_trained_so_are_refused(project, clip, tmp_path, monkeypatch):
    frozen = {**CLIP, "pretrained": clip, "freeze_vit": True, "freeze_text": True}
    message = r"retrieval_dpo has nothing to train: all weights of ClipCir are frozen; set one of its freeze_ keys to"
    refused(project, tmp_path / "frozen", message, recipe="paper_demo", model=frozen)
    noisy = type(make_scoring_model("joint"))
    stock = noisy.query_features
    monkeypatch.setattr(noisy, "query_features", lambda self, samples: stock(self, samples) * torch.rand(1))
    message = r"run\.dpo\.reference: the scores of policy and reference policy differ by 0\.\d+ before the first step"
    refused(project, tmp_path / "random", message)
    monkeypatch.setattr(noisy, "query_features", lambda self, samples: stock(self, samples) * float("nan"))
    refused(project, tmp_path / "nan", r"differ by nan before the first step")
    monkeypatch.delattr(noisy, "query_features")
    message = (
        r"needs a model that scores queries against images, and Blip2Cir has no query_features; choose model\.arch"
    )
    refused(project, tmp_path / "scores", message)


def test_files_of_others_are_refused(project, run, start, tmp_path):
    """Refused are scores of other weights, negatives drawn at random, and negatives among other pictures."""
    made = run(negatives={"refresh": 0, "warmup_epochs": 1})
    drawn, mined = (str(made / f"negatives/fashioniq_{epoch:03}.npz") for epoch in (0, 1))
    settings = {"dpo": {"reference": "mined"}, "negatives": {"refresh": 0, "file": drawn}}
    refused(project, tmp_path / "drawn", r"holds negatives that were drawn at random, without scores", **settings)
    settings["negatives"]["file"] = mined
    many = {"negatives": {**settings["negatives"], "count": 80}}
    refused(
        project, tmp_path / "many", r"holds up to \d+ negatives of a triplet, fewer than .*count: 80; lower", **many
    )
    image = {"dpo": {"positive": "image"}, "negatives": settings["negatives"]}
    refused(
        project, tmp_path / "image", r"was mined for run\.dpo\.positive: target, and it is image now, which", **image
    )
    by_positive = run("by_positive", max_epoch=1, negatives={"refresh": 0, "source": "positive"})
    of_images = {**settings, "negatives": {"refresh": 0, "file": str(by_positive / "negatives/fashioniq_000.npz")}}
    refused(
        project, tmp_path / "images", r"was mined by run\.negatives\.source: positive, so that its scores", **of_images
    )
    other = tmp_path / "other.pth"
    torch.save({"model": make_scoring_model("joint", seed=1, freeze_vit=True).state_dict()}, other)
    message = (
        r"the scores in .*_001\.npz differ by up to \d\.\d+ from those of the starting weights, so they are another p"
    )
    refused(project, tmp_path / "weights", message, model={"finetuned": str(other)}, **settings)
    larger = make_garments(tmp_path / "worlds", GarmentsConfig(**{**WORLD, "train_images": 13}))
    message = (
        r"run\.negatives\.file: .*belongs to other training data: 24 triplets over \d+ images, and fashioniq has 24 ov"
    )
    refused(project, tmp_path / "gallery", message, datasets=on(larger), **settings)
