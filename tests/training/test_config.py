"""Checks of a config: every name and key of every shipped file is known, and each kind of slip gives a sentence."""

from __future__ import annotations

import argparse
from pathlib import Path

import lavis
import pytest
import torch
from lavis.common.config import Config
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_cir_plugin import CONFIGS, PROJECTS
from lavis_cir_plugin.core import settings
from lavis_cir_plugin.report.run_record import flat
from lavis_cir_plugin.training import config

PROJECT_FILES = sorted(PROJECTS.rglob("*.yaml"))


def checked(options, tmp_path):
    merged = config.read_config(str(PROJECTS / "wrf4cir/demo.yaml"), options)
    config.check_values(complete(merged, tmp_path), "train")


def complete(merged, tmp_path):
    OmegaConf.save(merged, tmp_path / "merged.yaml")
    return Config(argparse.Namespace(cfg_path=str(tmp_path / "merged.yaml"), options=[]))


def test_there_are_projects_to_check():
    names = {str(path.relative_to(PROJECTS)) for path in PROJECT_FILES}
    assert {"wrf4cir/demo.yaml", "wrf4cir/fiq.yaml", "wrf4cir/cirr.yaml"} <= names


@pytest.mark.parametrize("path", PROJECT_FILES, ids=lambda path: str(path.relative_to(PROJECTS)))
def test_every_project_is_valid_down_to_the_last_key(path, tmp_path, monkeypatch):
    """Names, values, build_info and model keys are valid; the file is small and repeats no default."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    open_values = [f"{key}=given" for key in OmegaConf.missing_keys(OmegaConf.load(path))]
    cfg = complete(config.read_config(str(path), open_values), tmp_path)
    config.check_values(cfg, "train" if cfg.run_cfg.train_splits else "evaluate")
    for name, section in cfg.datasets_cfg.items():
        if not hasattr(registry.get_builder_class(name), "benchmark_module"):
            continue  # its builder has no reader of ours: LAVIS's own, or one that draws its files
        build_info = dict(settings.as_plain(section.build_info))
        if section.get("garments") is not None:
            registry.get_builder_class(name).world.settings(**settings.as_plain(section.garments))
            build_info["root"] = "drawn"
        registry.get_builder_class(name).benchmark_module.CONFIG.from_mapping(build_info)
    own = OmegaConf.load(path)
    assert len(path.read_text().splitlines()) <= 35
    repeated = [
        key for key, value in own.run.items() if key in config.RUN_DEFAULTS and config.RUN_DEFAULTS[key] == value
    ]
    assert repeated == []
    model_class = registry.get_model_class(own.model.arch)
    defaults = OmegaConf.load(model_class.default_config_path(own.model.model_type)).model
    given = [key for key in own.model if not OmegaConf.is_missing(own.model, key)]
    repeated = [key for key in given if key in defaults and defaults[key] == own.model[key]]
    assert set(repeated) <= {"arch", "model_type"}


def test_every_config_file_belongs_to_something_registered():
    models = {
        path
        for m in registry.list_models()
        for path in registry.get_model_class(m).PRETRAINED_MODEL_CONFIG_DICT.values()
    }
    datasets = {
        path for d in registry.list_datasets() for path in registry.get_builder_class(d).DATASET_CONFIG_DICT.values()
    }
    files = {str(path) for path in CONFIGS.rglob("*.yaml")}
    assert files
    assert files <= models | datasets


def test_every_registered_name_of_ours_is_used_by_a_project():
    texts = "".join(path.read_text() for path in PROJECT_FILES)
    ours = [
        name
        for mapping in ("model_name_mapping", "task_name_mapping", "runner_name_mapping")
        for name, entry in registry.mapping[mapping].items()
        if entry.__module__.startswith("lavis_cir_plugin")
    ]
    assert ours
    assert [name for name in ours if name not in texts] == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "run.runner=runner_wfr4cir",
            r"run\.runner: 'runner_wfr4cir' is not registered; did you mean 'runner_wrf4cir'\?",
        ),
        ("run.task=composed_retreival", r"run\.task: .* did you mean 'composed_retrieval'\?"),
        ("model.arch=blip2_cri", r"model\.arch: 'blip2_cri' is not registered; did you mean 'blip2_cir'\?"),
        (
            "model.model_type=tinny",
            r"model\.model_type: 'tinny' is no type of blip2_cir; did you mean 'tiny'\? Types: pre",
        ),
        ("model.fussion=joint", r"model\.fussion is not a known key; did you mean 'fusion'\?"),
        ("datasets.fashionqi.type=default", r"datasets: 'fashionqi' is not registered; did you mean 'fashioniq'\?"),
        (
            "datasets.fashioniq.type=garment",
            r"datasets\.fashioniq\.type: 'garment' is not one of .*did you mean 'garments'\?",
        ),
        ("datasets.fashioniq.split=[val]", r"datasets\.fashioniq\.split is not a known key; did you mean 'splits'\?"),
        ("datasets.fashioniq.vis_processor.train.name=target_padd", r"did you mean 'target_pad'\?"),
        ("run.acum_grad_iters=2", r"run\.acum_grad_iters is not a known key; did you mean 'accum_grad_iters'\?"),
        ("run.zzz=2", r"run\.zzz is not a known key\. Known: accum_grad_iters, "),
        ("run.wrf.gama=0.1", r"run\.wrf\.gama is not a known key; did you mean 'gamma'\?"),
        ("run.wrf=0.1", r"run\.wrf must be a mapping such as \{gamma: 0\.001\}, got 0\.1"),
        ("run.lr_sched=cosine", r"run\.lr_sched: 'cosine' is not registered.*Registered: .*linear_warmup_cosine_lr"),
        ("run.runner=runner_base", r"run\.wrf is read by runner_wrf4cir and has no effect under runner_base"),
        ("runs.seed=2", r"'runs' is not a section; did you mean 'run'\?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(option, message):
    with pytest.raises(config.ConfigError, match=message):
        config.read_config(str(PROJECTS / "wrf4cir/demo.yaml"), [option])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("run.wrf.gamma=-0.1", r"run\.wrf\.gamma must be a number >= 0, got -0\.1"),
        ("run.wrf.gamma=1.5", r"run\.wrf\.gamma must be >= 0 and < 1 under run\.wrf\.radius: relative, got 1\.5"),
        ("run.adam_eps=0", r"run\.adam_eps must be a number > 0, or null, got 0"),
        (
            "datasets.fashioniq.vis_processor.train.image_size=224",
            r"vis_processor\.train\.image_size: 224 differs from model\.image_size: 64",
        ),
        ("run.max_epoch=0", r"run\.max_epoch must be a whole number >= 1, or null, got 0"),
        ("run.batch_size_train=many", r"run\.batch_size_train must be a whole number >= 1, or null, got 'many'"),
        ("run.init_lr=0", r"run\.init_lr must be a number > 0, or null, got 0"),
        ("run.init_lr=null", r"run\.init_lr is missing"),
        ("run.beta2=1.5", r"run\.beta2 must be a number >= 0 and < 1, got 1\.5"),
        ("run.evaluate=maybe", r"run\.evaluate must be true or false, got 'maybe'"),
        ("run.output_dir=null", r"run\.output_dir must be the path of a folder, got null"),
        ("run.max_epoch=.inf", r"run\.max_epoch must be a whole number >= 1, or null, got Infinity"),
        ("run.warmup_lr=abc", r"run\.warmup_lr must be a number >= 0, got 'abc'"),
        ("run.init_lr=1e-6", r"run\.min_lr: 1e-05 is above run\.init_lr: 1e-06, so the learning rate would rise"),
        ("run.lr_sched=linear_warmup_step_lr", r"run\.lr_decay_rate must be a number > 0 under"),
        ("run.seed=${nope}", r"cannot be resolved \(Interpolation key 'nope' not found"),
        ("run.train_splits=[]", r"run\.train_splits must be \[train\], the one split that LAVIS trains on, got \[\]"),
        ("run.train_splits=[train,val]", r"run\.train_splits must be \[train\], .* got \['train', 'val'\]"),
        ("run.test_splits=[val,train]", r"run\.test_splits: train is read for training alone and cannot be evaluated"),
        ("run.valid_splits=[fashioniq.train]", r"run\.valid_splits: fashioniq\.train is read for training alone"),
        ("run.max_epoch=null run.max_iters=4", r"run\.max_epoch is missing"),
        ("run.train_dataset_ratios={fashioniq: 1}", r"run\.train_dataset_ratios must stay null"),
        ("datasets.fashioniq=null", r"datasets\.fashioniq must be a mapping, \{\} for its defaults, got None"),
        ("datasets.fashioniq.preload=maybe", r"datasets\.fashioniq\.preload must be true or false, got 'maybe'"),
        (
            "datasets.fashioniq.splits=train",
            r"datasets\.fashioniq\.splits must be a list such as .*, or null, got 'train'",
        ),
        ("datasets.fashioniq.splits=[dev]", r"datasets\.fashioniq\.splits must be a list of train, val, test, seen"),
        ("datasets.fashioniq.garments.sede=1", r"garments\.sede is not a known key; did you mean 'seed'\?"),
        ("datasets.fashioniq.garments.held_out=2", r"garments\.held_out must be a number >= 0 and <= 0\.5"),
        ("datasets.fashioniq.build_info.refrence=kept", r"build_info\.refrence is not a known key; did you mean 'ref"),
        ("datasets.fashioniq.vis_processor=target_pad", r"vis_processor must be a mapping, got 'target_pad'"),
        ("datasets.fashioniq.vis_processor.eval=null", r"vis_processor\.eval must be a mapping such as .*, got null"),
        (
            "datasets.fashioniq.vis_processor.train={name: target_pad, target_rato: 9}",
            r"target_rato is not a known key; did you mean",
        ),
        ("datasets.fashioniq.vis_processor.trian.image_size=64", r"trian is not a known key; did you mean 'train'\?"),
        (
            "datasets.cirr.type=default",
            r"valid_splits: val is built by fashioniq and cirr, and LAVIS chooses the best checkpoint on one of them; "
            r"write \[fashioniq\.val\], say",
        ),
        ("model.finetuned=x.pth", r"model\.finetuned is set and would not be read; set model\.load_finetuned: true"),
        ("model.fusion=late", r"model\.fusion must be one of joint, sentence_prompt, got 'late'"),
        ("model.num_query_token=0", r"model\.num_query_token must be a whole number >= 1, got 0"),
        ("model.vit_config.dept=9", r"model\.vit_config\.dept is not a known key; did you mean 'depth'\?"),
        ("model.qformer_config.hidden_sise=3", r"hidden_sise is not a known key; did you mean 'hidden_size'\?"),
        ("model.loss_weights.itc=abc", r"model\.loss_weights\.itc must be a number >= 0, got 'abc'"),
        ("model.loss_weights=1", r"model\.loss_weights must be a mapping, or null, got 1"),
        ("model.vit_precision=fp16 model.freeze_vit=true", r"'fp16' needs a GPU; on a CPU set"),
        ("run.device=tpu", r"run\.device must be cuda or cpu \(one GPU of several: CUDA_VISIBLE_DEVICES\), got 'tpu'"),
        ("run.amp=true", r"run\.amp: true needs a GPU"),
        ("run.resume_ckpt_path=/nowhere.pth", r"run\.resume_ckpt_path: /nowhere\.pth does not exist"),
        ("run.valid_splits=val", r"run\.valid_splits must be a list such as \[val\], got 'val'"),
        (
            "run.valid_splits=[dev] datasets.fashioniq.splits=[train,val]",
            r"run\.valid_splits: dev is built by no data set \(datasets\.fashioniq\.splits: \[train, val\]\)",
        ),
    ],
)
def test_an_impossible_value_says_what_is_allowed(option, message, tmp_path):
    with pytest.raises(config.ConfigError, match=message):
        checked([option] if "{" in option else option.split(), tmp_path)


def test_a_gpu_that_is_not_there_is_said_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(config.ConfigError, match=r"'cuda' was asked for and torch sees no GPU; set run\.device: cpu"):
        checked(["run.device=cuda"], tmp_path)


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("train", [], ["train", "val"]),
        ("train", ["run.valid_splits=[]", "run.test_splits=[]"], ["train"]),
        ("evaluate", [], ["val"]),
        ("evaluate", ["datasets.fashioniq.splits=[train,val]"], ["val"]),
        ("evaluate", ["datasets.fashioniq.splits=[train]"], []),
    ],
)
def test_only_the_splits_that_a_run_reads_are_built(command, options, expected, tmp_path):
    cfg = complete(config.read_config(str(PROJECTS / "wrf4cir/demo.yaml"), options), tmp_path)
    config.choose_splits(cfg, command)
    assert list(cfg.datasets_cfg.fashioniq.splits) == expected


@pytest.mark.parametrize(
    "wrong",
    ["build_info.root=???", "build_info.protocol=none", "no_key=1", "vis_processor.eval.image_size=1", "type=none"],
)
def test_a_data_set_without_splits_is_left_out_and_not_checked(wrong, tmp_path):
    options = [f"datasets.{wrong}" for wrong in ("cirr.splits=[]", f"cirr.{wrong}")]
    left = config.read_config(str(PROJECTS / "wrf4cir/demo.yaml"), options)
    assert list(left.datasets) == ["fashioniq"]
    with pytest.raises(config.ConfigError, match=r"datasets\.cirr|model\.image_size"):
        checked(options[1:], tmp_path)


def test_a_run_without_any_data_set_is_refused():
    with pytest.raises(config.ConfigError, match="leaves no data set: name one whose splits are not"):
        config.read_config(str(PROJECTS / "wrf4cir/demo.yaml"), ["datasets.fashioniq.splits=[]"])


def test_all_slips_are_told_at_once():
    options = ["run.runner=runner_wfr4cir", "model.fussion=joint", "run.acum_grad_iters=2"]
    with pytest.raises(config.ConfigError) as error:
        config.read_config(str(PROJECTS / "wrf4cir/demo.yaml"), options)
    assert all(word in str(error.value) for word in ("runner_wfr4cir", "fussion", "acum_grad_iters"))


def test_an_option_changes_the_type_and_its_defaults_with_it(tmp_path):
    """LAVIS alone would keep the defaults of the file's type and report the new one."""
    merged = config.read_config(str(PROJECTS / "wrf4cir/demo.yaml"), ["model.model_type=pretrain_vitL"])
    assert complete(merged, tmp_path).model_cfg.vit_model == "clip_L"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {a: [}", "is not valid YAML"),
        ("- a list", "must hold the sections model, datasets and run"),
        ("run: {}", "section 'model' is missing or empty"),
    ],
)
def test_a_file_that_is_no_project(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(config.ConfigError, match=message):
        config.read_config(str(tmp_path / "x.yaml"), [])


def test_a_value_that_a_file_leaves_open_must_be_given():
    path = str(PROJECTS / "tscir/eval_all.yaml")
    with pytest.raises(
        config.ConfigError, match=r"model\.finetuned has no value yet; give it by --options model\.fine"
    ):
        config.read_config(path, [])
    assert config.read_config(path, ["model.finetuned=a.pth"]).model.finetuned == "a.pth"


def test_an_option_without_a_value_is_refused():
    with pytest.raises(config.ConfigError, match=r"'run\.seed' is not of the form key\.path=value"):
        config.read_config(str(PROJECTS / "wrf4cir/demo.yaml"), ["run.seed", "3"])


RECIPES = Path(lavis.__file__).parent / "projects"
# One names a model type that LAVIS does not have, the other is an empty file.
BROKEN_IN_LAVIS = {"blip/coco_cap_ft_iter.yaml", "blip2/eval/caption_coco_flant5xl_eval.yaml"}


def test_label_noise_of_a_data_set_that_does_not_read_it_is_refused():
    with pytest.raises(
        config.ConfigError, match=r"datasets\.coco_vqa\.noise_ratio is read by this package's data sets"
    ):
        config.read_config(str(PROJECTS / "wrf4cir/vqa.yaml"), ["datasets.coco_vqa.noise_ratio=0.5"])


@pytest.mark.parametrize("recipe", sorted({str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml")}))
def test_lavis_own_recipes_are_let_through(recipe):
    """Keys that only LAVIS's tasks know are accepted."""
    if recipe in BROKEN_IN_LAVIS:
        with pytest.raises(config.ConfigError):
            config.read_config(str(RECIPES / recipe), [])
    else:
        assert config.read_config(str(RECIPES / recipe), []).run.task


def test_an_evaluation_by_the_training_command_needs_no_training_settings(tmp_path):
    """``run.evaluate: true`` lets LAVIS's loop evaluate ``valid_splits`` in the first epoch, and train nothing."""
    options = ["run.device=cpu", "run.max_epoch=1"]
    merged = config.read_config(str(RECIPES / "gpt/eval/dialogue_avsd_eval.yaml"), options)
    config.check_values(complete(merged, tmp_path), "train")
    merged.run.evaluate = False
    with pytest.raises(config.ConfigError, match=r"run\.init_lr is missing"):
        config.check_values(complete(merged, tmp_path), "train")


def test_every_value_has_an_origin(tmp_path):
    """The seed is from the command line, the epochs from the file, the rest from three places of defaults."""
    path, options = PROJECTS / "wrf4cir/demo.yaml", ["run.seed=7"]
    cfg = complete(config.read_config(str(path), options), tmp_path)
    config.choose_splits(cfg, "train")
    cfg.run_cfg.output_dir = str(Path(cfg.run_cfg.output_dir).absolute())
    values = flat(cfg.to_dict())
    found = config.origins("demo.yaml", OmegaConf.load(path), options, values)
    assert set(found) == set(values)
    expected = {
        "run.seed": "--options",
        "run.max_epoch": "demo.yaml",
        "run.wrf.gamma": "demo.yaml",
        "run.output_dir": "demo.yaml, completed at the start",
        "run.weight_decay": "default of run",
        "model.arch": "demo.yaml",
        "model.image_size": "default of the model's type",
        "preprocess.vis_processor.eval.image_size": "default of the model's type",
        "datasets.fashioniq.preload": "default of the data set",
        "datasets.fashioniq.splits": "set at the start",
    }
    assert {key: found[key] for key in expected} == expected


def test_a_metric_that_no_chosen_category_has_is_refused_with_the_config():
    """Each value is allowed by itself; FashionIQ's own check of both together is made before anything is built."""
    section = {"build_info": {"categories": ["shirt"], "selection_metric": "dress_R@10"}}
    (problem,) = registry.get_builder_class("fashioniq").section_problems("fashioniq", section)
    assert problem.startswith(
        "datasets.fashioniq.build_info.selection_metric: dress_R@10 is not computed with categories shirt"
    )
