"""LAVIS's own tasks under the perturbing runner: the drawn questions and captions, the builders, and whole runs."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch
from lavis.common.registry import registry
from lavis.common.vqa_tools.vqa_eval import VQAEval
from lavis.datasets.datasets.coco_caption_datasets import COCOCapEvalDataset
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset, COCOVQAEvalDataset
from lavis.models.blip2_models import blip2_opt
from lavis.models.blip2_models.blip2 import LayerNorm
from lavis.models.blip2_models.blip2_opt import Blip2OPT
from lavis.models.blip2_models.modeling_opt import OPTConfig, OPTForCausalLM
from lavis.models.blip2_models.Qformer import BertConfig as QformerConfig
from lavis.models.blip2_models.Qformer import BertLMHeadModel as Qformer
from lavis.models.eva_vit import VisionTransformer
from lavis.models.med import BertConfig, XBertLMHeadDecoder
from omegaconf import OmegaConf
from packaging.version import Version
from PIL import Image
from torch import nn
from transformers import __version__ as transformers_version

from lavis_cir_plugin import CONFIGS, PROJECTS
from lavis_cir_plugin.garments import wording
from lavis_cir_plugin.garments.attributes import attributes, is_held_out
from lavis_cir_plugin.garments.questions import (
    KINDS,
    WORLD,
    QuestionGarments,
    answers,
    guess_rate,
    image_id,
    plan_captions,
    plan_pictures,
    plan_questions,
    question_words,
    write_questions,
)
from lavis_cir_plugin.methods.wrf4cir.optimizer import PerturbingOptimizer
from lavis_cir_plugin.methods.wrf4cir.perturbation import WeightPerturbation, ascent_step
from lavis_cir_plugin.models.blip_tiny import BlipCaptionTiny, BlipVqaTiny
from lavis_cir_plugin.models.tokenizer import load_tokenizer
from lavis_cir_plugin.tasks.local_captioning import LocalCaptionTask, caption_scores, tokenized
from lavis_cir_plugin.training import config, launcher

LARGE = QuestionGarments(seed=5, train_images=900, val_images=400)
SMALL = {"train_images": 60, "val_images": 24, "captions_per_image": 2, "image_width": 32, "image_height": 40}


@pytest.fixture(scope="module")
def pictures():
    return plan_pictures(LARGE)


@pytest.fixture(scope="module")
def questions(pictures):
    return {split: plan_questions(LARGE, split, garments) for split, garments in pictures.items()}


# The drawn world


def test_no_garment_is_in_two_pictures_and_no_held_out_combination_is_trained_on(pictures):
    shown = [(g.category, *attributes(g)) for garments in pictures.values() for g in garments.values()]
    assert len(set(shown)) == len(shown) == 1300
    assert not any(is_held_out(garment, LARGE.held_out) for garment in pictures["train"].values())
    held_out = [is_held_out(garment, LARGE.held_out) for garment in pictures["val"].values()]
    assert 0.1 < sum(held_out) / 400 < 0.3


def test_every_kind_is_asked_and_its_answers_are_right_equally_often(questions):
    for split in ("train", "val"):
        counts = Counter((question.kind, question.answer) for question in questions[split])
        for kind in KINDS:
            per_answer = {counts[kind.name, answer] for answer in kind.answers.values()}
            assert len(per_answer) == 1
            assert per_answer != {0}


def test_the_best_constant_answer_scores_what_guess_rate_says(questions):
    """The best answer to each kind, found by counting, is right as often as 1 / (answers of the kind) says."""
    by_kind = {kind.name: Counter() for kind in KINDS}
    for question in questions["val"]:
        by_kind[question.kind][question.answer] += 1
    right = sum(counter.most_common(1)[0][1] for counter in by_kind.values())
    assert guess_rate(questions["val"]) == pytest.approx(100 * right / len(questions["val"]))
    assert guess_rate(questions["val"]) < 35


def test_an_answer_is_what_the_garment_is(pictures, questions):
    kinds = {kind.name: kind for kind in KINDS}
    for split in ("train", "val"):
        for question in questions[split]:
            garment, kind = pictures[split][question.image], kinds[question.kind]
            assert kind.answers[getattr(garment, kind.attribute)] == question.answer
            assert garment.category in kind.categories
            noun = "top" if garment.category == "toptee" else garment.category
            assert noun in question.text or question.text in ("is there a belt?",)


def test_equal_settings_give_equal_plans_and_another_seed_another(pictures, questions):
    assert plan_pictures(LARGE) == pictures
    assert plan_questions(LARGE, "val", pictures["val"]) == questions["val"]
    other = QuestionGarments(seed=6, train_images=900, val_images=400)
    assert plan_pictures(other)["val"] != pictures["val"]


def test_no_answer_is_rewritten_by_the_scorer():
    """VQA's scorer maps "two tone" to "2 tone" and drops articles, in predictions and not in unanimous references."""
    scorer = VQAEval()
    for answer in answers():
        assert scorer.processDigitArticle(scorer.processPunctuation(answer)) == answer


def test_too_few_pictures_for_any_question_are_refused(pictures):
    with pytest.raises(ValueError, match=r"2 pictures show no kind of question .* raise datasets.*val_images"):
        plan_questions(LARGE, "val", dict(list(pictures["val"].items())[:2]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_images": 0}, "train_images must be a whole number >= 1, got 0"),
        ({"image_width": 8}, "image_width must be a whole number >= 32, got 8"),
        ({"held_out": 0.9}, r"held_out must be a number >= 0 and <= 0\.5, got 0\.9"),
    ],
)
def test_impossible_sizes_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        QuestionGarments(**values)


def test_captions_say_the_colour_and_nothing_untrue(pictures):
    """A caption has the garment's colour, its pattern if there is one, and no detail of another value."""
    captions = plan_captions(LARGE, "val", pictures["val"])
    for name, garment in pictures["val"].items():
        for caption in captions[name]:
            details = told_details(caption, garment)
            assert set(details) <= true_details(garment)
            assert len(set(details)) == 2


def test_full_captions_say_nothing_untrue_and_in_the_end_everything(pictures):
    """The captions of 400 pictures, 5 each, name every length, fit and other detail, and only true ones."""
    captions = plan_captions(dataclasses.replace(LARGE, captions="full"), "val", pictures["val"])
    told = set()
    for name, garment in pictures["val"].items():
        own = {*wording._LENGTH_ADJECTIVES[garment.length], *wording._FIT_ADJECTIVES[garment.fit]}
        own |= {*wording._COLOUR_WORDS[garment.colour], *wording._PATTERN_ADJECTIVES[garment.pattern]}
        extra = {("hem", "ruffled"): "a ruffled hem", ("finish", "shiny"): "a satin look"}
        true = true_details(garment) | {
            text for (what, value), text in extra.items() if getattr(garment, what) == value
        }
        for caption in captions[name]:
            details = told_details(caption, garment)
            assert set(details) <= true
            assert 2 <= len(set(details)) <= 3
            adjectives = caption.partition(" with ")[0].split(" ", 1)[1].rpartition(" ")[0]
            while adjectives:
                found = max((text for text in own if f"{adjectives} ".startswith(f"{text} ")), key=len)
                told.add(found)
                adjectives = adjectives[len(found) + 1 :]
            told |= set(details)
    words = [
        text
        for table in (wording._LENGTH_ADJECTIVES, wording._FIT_ADJECTIVES)
        for texts in table.values()
        for text in texts
    ]
    assert told >= {*words, "a ruffled hem", "a satin look", "a belt", "buttons"}


def told_details(caption, garment):
    """Check the head of a caption, and return what follows "with"."""
    head = caption.partition(" with ")[0]
    assert any(f" {colour} " in f" {head} " for colour in wording._COLOUR_WORDS[garment.colour])
    assert garment.pattern == "solid" or any(p in head for p in wording._PATTERN_ADJECTIVES[garment.pattern])
    return re.split(r" and (?!down)", caption.partition(" with ")[2])


def true_details(garment):
    details = {*wording._SLEEVE_NOUNS[garment.sleeve], *wording._NECKLINE_NOUNS[garment.neckline]}
    details |= {*wording._GRAPHIC_NOUNS[garment.graphic]} if garment.graphic != "none" else set()
    details |= {"buttons"} if garment.buttons == "yes" else set()
    return details | ({"a belt"} if garment.belt == "yes" else set())


def test_the_shipped_vocabulary_has_every_word(pictures):
    vocabulary = set((CONFIGS / "models/blip_tiny_vocab.txt").read_text().split())
    said = {
        word for texts in plan_captions(LARGE, "val", pictures["val"]).values() for t in texts for word in t.split()
    }
    assert {*question_words(), *wording.words(), *said, "a", "picture", "of", "?"} - vocabulary == set()


def test_a_picture_id_is_the_number_at_the_end():
    assert image_id("images/garments_val_00000042.jpg") == 42


# LAVIS's data sets over it


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return a cache folder for all runs of this file, so that the small world is drawn once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def build(cache, monkeypatch):
    """Return the data sets of a builder over the small world."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def make(name, **changes):
        builder = registry.get_builder_class(name)
        section = OmegaConf.load(builder.default_config_path()).datasets[name]
        return builder(OmegaConf.merge(section, {"garments": SMALL, **changes})).build_datasets()

    return make


def test_lavis_reads_the_questions(build):
    datasets = build("garments_vqa")
    assert isinstance(datasets["train"], COCOVQADataset)
    assert isinstance(datasets["val"], COCOVQAEvalDataset)
    batch = datasets["train"].collater([datasets["train"][i] for i in range(3)])
    assert batch["image"].shape == (3, 3, 64, 64)
    assert batch["weight"].tolist() == [1.0] * 3
    assert set(batch["answer"]) <= set(datasets["val"].answer_list)
    assert datasets["val"].answer_list == answers()


def test_lavis_reads_the_captions(build):
    datasets = build("garments_caption")
    assert isinstance(datasets["val"], COCOCapEvalDataset)
    assert len(datasets["train"]) == 60 * 2
    assert datasets["train"][0]["text_input"].startswith("a picture of a")
    sample_of_val = datasets["val"][0]
    assert int(sample_of_val["image_id"]) == image_id(datasets["val"].annotation[0]["image"])
    assert len(datasets["val"].annotation[0]["caption"]) == 2


def test_only_the_asked_splits_are_built(build):
    assert list(build("garments_vqa", splits=["val"])) == ["val"]


def test_the_world_is_drawn_once_and_does_not_depend_on_the_number_of_processes(tmp_path):
    settings = QuestionGarments(**{**SMALL, "train_images": 90})
    first = WORLD.make(tmp_path, settings)
    stamps = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    assert WORLD.make(tmp_path, settings) == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == stamps
    again = write_questions(tmp_path / "again", settings, progress=False, workers=2)
    for path in again.rglob("*.*"):
        assert path.read_bytes() == (first / path.relative_to(again)).read_bytes()
    with Image.open(next((first / "images").iterdir())) as picture:
        assert picture.size == (32, 40)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"garments": {"sead": 1}}, r"garments\.sead is not a known key; did you mean 'seed'\?"),
        ({"garments": {"val_images": 0}}, r"val_images must be a whole number >= 1, got 0"),
        ({"splits": ["test"]}, r"splits must be a list of train, val, got"),
        ({"preload": True}, r"preload is not read"),
        ({"build_info": {"root": "x"}}, r"build_info is not read: garments_vqa draws its own files"),
    ],
)
def test_a_slip_in_the_section_is_one_sentence(section, message):
    builder = registry.get_builder_class("garments_vqa")
    (problem,) = builder.section_problems("garments_vqa", OmegaConf.create(section))
    assert re.search(message, problem)


# Whole runs


@pytest.fixture
def run(cache, tmp_path, monkeypatch):
    """Return a factory that trains a demo on the small world and returns the folder of its output."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    small = {"run.batch_size_train": 16, "run.max_epoch": 2, "run.warmup_steps": 2, "run.output_dir": tmp_path / "out"}
    size = "hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32"
    options = [f"{key}={value}" for key, value in small.items()]
    options += ["model.vit_config={patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}"]
    options += [f"model.bert_config={{{size}, max_position_embeddings: 64}}"]

    def train(project, dataset, *more):
        world = [f"datasets.{dataset}.garments.{key}={value}" for key, value in SMALL.items()]
        arguments = ["--cfg-path", str(PROJECTS / "wrf4cir" / project), "--options", *options, *world, *more]
        launcher.main("train", arguments)
        return max((tmp_path / "out").iterdir(), key=os.path.getmtime), arguments

    return train


def logged(folder, split):
    rows = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines() if line.startswith('{"')]
    return [row for row in rows if f"{split}_agg_metrics" in row]


def perturbed_steps(folder, name="checkpoint_best.pth"):
    saved = torch.load(folder / name, weights_only=True)
    return saved["optimizer"]["wrf"]["steps"]["perturbed"], saved["epoch"]


def test_vqa_trains_and_is_scored_by_the_official_scorer(run, cache, tmp_path):
    """Every step is perturbed; the checkpoint, evaluated by another runner, gives the metric that chose it."""
    folder, arguments = run("vqa_demo.yaml", "garments_vqa")
    steps, epoch = perturbed_steps(folder)
    questions = json.loads(next(cache.rglob("vqa_train.json")).read_text())
    assert steps == len(questions) // 16 * (epoch + 1) > 0
    rows = logged(folder, "val")
    assert len(rows) == 2
    assert {"val_other", "val_yes/no"} & set(rows[0])
    assert 0 < max(row["val_agg_metrics"] for row in rows) <= 100
    best = max(row["val_agg_metrics"] for row in rows)
    options = ["model.load_finetuned=true", f"model.finetuned={folder / 'checkpoint_best.pth'}"]
    options += ["run.test_splits=[val]", f"run.output_dir={tmp_path / 'evaluated'}"]
    launcher.main("evaluate", [*arguments, *options])
    (evaluated,) = (tmp_path / "evaluated").rglob("evaluate.txt")
    assert json.loads(evaluated.read_text())["agg_metrics"] == best


def test_vqa_generates_answers_too(run):
    folder, _ = run("vqa_demo.yaml", "garments_vqa", "run.inference_method=generate", "run.max_epoch=1")
    results = json.loads((folder / "result/val_vqa_result.json").read_text())
    assert all(isinstance(row["answer"], str) for row in results)


def test_captioning_trains_and_is_scored_without_java(run):
    folder, _ = run("caption_demo.yaml", "garments_caption")
    steps, epoch = perturbed_steps(folder)
    assert steps == 7 * (epoch + 1)  # 60 pictures, 2 captions each, whole batches of 16
    for row in logged(folder, "val"):
        assert row["val_agg_metrics"] == pytest.approx(row["val_CIDEr"] + row["val_Bleu_4"])


def test_lavis_own_captioning_task_runs_where_nothing_is_to_be_scored(run):
    folder, _ = run("caption_demo.yaml", "garments_caption", "run.task=captioning", "run.report_metric=false")
    assert [row["val_agg_metrics"] for row in logged(folder, "val")] == [0.0, 0.0]
    results = json.loads((folder / "result/val_epoch1.json").read_text())
    assert len(results) == 24
    assert {type(row["image_id"]) for row in results} == {int}


@pytest.mark.parametrize("runner", ["runner_base", "runner_iter", "runner_wrf4cir_iter"])
def test_the_data_serve_other_runners(run, tmp_path, runner):
    """The project runs under LAVIS's runners and the iteration-based one; runners without perturbation refuse wrf."""
    text = (PROJECTS / "wrf4cir/caption_demo.yaml").read_text()
    if runner != "runner_wrf4cir_iter":
        text = text.replace("  wrf:\n    gamma: 0.001\n", "")
    text = text.replace("runner: runner_wrf4cir", f"runner: {runner}")
    if "iter" in runner:
        text = text.replace("max_epoch: 4", "max_iters: 6\n  iters_per_inner_epoch: 3")
    (tmp_path / "project.yaml").write_text(text)
    more = [] if "iter" not in runner else ["run.max_epoch=null"]
    folder, _ = run(tmp_path / "project.yaml", "garments_caption", *more)
    assert len(logged(folder, "val")) == 2


# The scorer of captions


def test_caption_scores_worked_by_hand():
    """Equal captions of two pictures: BLEU-4 is 1; CIDEr-D is its largest value, 10. Disjoint ones: both 0 (1e-9).

    With other n-grams in every picture each n-gram has the weight log(2 / 1), the cosine of equal vectors is 1, and
    the length penalty is exp(0).
    """
    references = [["a red dress with long sleeves"], ["one blue shirt without any collar"]]
    same = caption_scores(["A red dress, with long sleeves.", "one blue shirt without any collar"], references)
    assert same == pytest.approx({"CIDEr": 10.0, "Bleu_4": 1.0}, abs=1e-6)
    other = caption_scores([references[1][0], references[0][0]], references)
    assert other == pytest.approx({"CIDEr": 0.0, "Bleu_4": 0.0}, abs=1e-6)


def test_bleu_4_worked_by_hand():
    """Precisions 5/6, 4/5, 3/4, 2/3 of six words with the last one wrong: their geometric mean is (1/3) ** (1/4)."""
    scores = caption_scores(["a red dress with long collar"], [["a red dress with long sleeves"]])
    assert scores["Bleu_4"] == pytest.approx((1 / 3) ** 0.25, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Kırmızı uzun elbise, mavi gömlek", "kırmızı uzun elbise mavi gömlek"),
        ("Красное платье – с длинными рукавами.", "красное платье с длинными рукавами"),
        ("فستان أحمر، طويل", "فستان أحمر طويل"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # one word of Persian
        ("हिन्दी लाल।", "हिन्दी लाल"),  # vowel signs are marks, no letters
        ("빨간 드레스", "빨간 드레스"),
        ("红色的T恤,２件", "红 色 的 t 恤 ２ 件"),
        ("ワンピースは、々", "ワ ン ピ ー ス は 々"),
        ("ชุดสีแดง", "ชุ ด สี แ ด ง"),  # vowels above and below stay with their letter
        ("❤️👗 !?", ""),
        ("snake_case's 80s V-neck", "snake case's 80s v neck"),
    ],
)
def test_words_of_any_script(text, tokens):
    assert tokenized(text) == tokens
    assert tokenized(unicodedata.normalize("NFD", text)) == tokens


def test_plain_english_is_tokenized_as_it_was():
    rng, characters = random.Random(0), [chr(code) for code in range(9, 127)]
    for _ in range(300):
        text = "".join(rng.choices(characters, k=40))
        assert tokenized(text) == " ".join(re.findall("[a-z0-9']+", text.lower()))


def test_a_wrong_letter_outside_a_to_z_makes_a_wrong_word():
    """Of the 4-grams of 5 words with the first one wrong, the second of two is right: precisions 4/5, 3/4, 2/3, 1/2."""
    right = "kırmızı uzun kollu mavi gömlek"
    assert caption_scores([right], [[right]])["Bleu_4"] == pytest.approx(1, abs=1e-6)
    scores = caption_scores([right.replace("kırmızı", "k rm z")], [[right]])
    assert scores["Bleu_4"] < 0.9
    scores = caption_scores([right.replace("kırmızı", "karmaza")], [[right]])
    assert scores["Bleu_4"] == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, abs=1e-6)


def test_scripts_without_blanks_are_scored_by_characters():
    """The last of six characters is wrong, like the last of six words in `test_bleu_4_worked_by_hand`."""
    scores = caption_scores(["红色长连衣裤"], [["红色长连衣裙"]])
    assert scores["Bleu_4"] == pytest.approx((1 / 3) ** 0.25, abs=1e-6)
    references = [["красное платье в горошек"], ["синяя юбка без узора"]]
    assert caption_scores([texts[0] for texts in references], references)["CIDEr"] == pytest.approx(10)


def test_captions_without_a_word_score_nothing():
    assert caption_scores(["red", ""], [["!!!"], ["👗", "..."]]) == {"CIDEr": 0.0, "Bleu_4": 0.0}
    # With a word anywhere they are scored; a picture whose reference has none counts as 0.
    one = caption_scores(["a b c d", "red"], [["a b c d"], ["..."]])
    assert one["CIDEr"] == pytest.approx(5)


def test_captions_without_a_word_are_told(build, caplog):
    dataset = build("garments_caption", splits=["val"])["val"]
    dataset.annotation[0]["caption"] = ["👗", "a red dress"]
    task = LocalCaptionTask(num_beams=1, max_len=5, min_len=1, evaluate=False)
    task.before_evaluation(BlipCaptionTiny(**TINY), dataset)
    assert "1 of " in caplog.text
    assert "captions hold no letter and no digit (first: '👗')" in caplog.text


def test_a_split_without_captions_is_refused_before_anything_is_generated(build):
    dataset = build("garments_caption", splits=["val"])["val"]
    del dataset.annotation[0]["caption"]
    task = LocalCaptionTask(num_beams=1, max_len=5, min_len=1, evaluate=False)
    with pytest.raises(ValueError, match="this split has none"):
        task.before_evaluation(BlipCaptionTiny(**TINY), dataset)


def test_pictures_whose_names_end_alike_or_are_no_numbers_are_all_scored(tmp_path):
    """LAVIS's data set takes 1 for the id of both first pictures, and "2.pn" for that of the last one."""
    names = ["a/1.jpg", "b/1.jpg", "2.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    records = [{"image": name, "caption": [f"number {place}"]} for place, name in enumerate(names)]
    (tmp_path / "val.json").write_text(json.dumps(records))
    dataset = COCOCapEvalDataset(lambda image: torch.zeros(3), None, str(tmp_path), [str(tmp_path / "val.json")])

    class Said(nn.Module):
        def before_evaluation(self, **_):
            pass

        def generate(self, samples, **_):
            return [f"number {instance}" for instance in samples["instance_id"]]

    task = LocalCaptionTask(num_beams=1, max_len=5, min_len=1, evaluate=False)
    task.before_evaluation(Said(), dataset)
    results = task.valid_step(Said(), dataset.collater([dataset[place] for place in (0, 1, 2, 0)]))  # as processes pad
    path = task.save_result(results, str(tmp_path), "val", remove_duplicate="image_id")
    saved = json.loads(Path(path).read_text())
    assert [(row["image_id"], row["instance_id"]) for row in saved] == [(1, 0), (1, 1), ("2.pn", 2)]
    assert [row["caption"] for row in saved] == ["number 0", "number 1", "number 2"]


def test_missing_lengths_are_told_by_the_config():
    with pytest.raises(config.ConfigError, match=r"run\.max_len must be a whole number >= 1, got null"):
        config.read_config(str(PROJECTS / "wrf4cir/caption_demo.yaml"), ["run.max_len=null"])


# The small models

TINY = {
    "image_size": 32,
    "vit_config": {"patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "bert_config": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
    },
}  # fmt: skip


def test_only_the_construction_differs_from_lavis():
    for model in (BlipVqaTiny, BlipCaptionTiny):
        own = {name for base in model.__mro__[:2] for name in vars(base) if not name.startswith("__")}
        assert own <= {
            "init_tokenizer",
            "_tower_and_bert_config",
            "_vocabulary",
            "check_config",
            "from_config",
            "PRETRAINED_MODEL_CONFIG_DICT",
        }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 40}, r"model\.image_size must be a multiple of model\.vit_config\.patch_size: 16, got 40"),
        ({"vit_config": {"dept": 1}}, r"model\.vit_config\.dept is not a known key; did you mean 'depth'\?"),
        ({"bert_config": {"hidden_sise": 1}}, r"hidden_sise is not a known key; did you mean 'hidden_size'\?"),
    ],
)
def test_impossible_models_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BlipVqaTiny(**{**TINY, **change})


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    torch.save({"model": BlipVqaTiny(**TINY).state_dict()}, tmp_path / "other.pth")
    cfg = {"load_finetuned": True, "finetuned": str(tmp_path / "other.pth")}
    with pytest.raises(ValueError, match=r"other\.pth"):
        BlipVqaTiny.from_config({**TINY, **cfg, "vit_config": {**TINY["vit_config"], "depth": 2}})
    assert BlipVqaTiny.from_config({**TINY, **cfg}).visual_encoder.num_features == 16


# Generation, on LAVIS's own pins and on today's libraries

END, PROMPT = 3, [7, 4]
COUNTS_PROMPT = Version(transformers_version) < Version("4.27")


@pytest.fixture
def decoder():
    def make(seed):
        torch.manual_seed(seed)
        settings = {
            "vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "encoder_width": 12, "add_cross_attention": True, "add_type_embeddings": False,
            "initializer_range": 0.6, "max_position_embeddings": 40, "pad_token_id": 0,
        }  # fmt: skip
        return XBertLMHeadDecoder(BertConfig(**settings)).eval(), torch.randn(2, 5, 12)

    return make


def next_scores(model, states, prefix, least):
    """Return log-probabilities of the next token after a prefix, for one picture and without a cache."""
    output = model(
        torch.tensor([prefix]),
        encoder_hidden_states=states[None],
        encoder_attention_mask=torch.ones(1, len(states), dtype=torch.long),
        is_decoder=True,
    )
    scores = output.logits[0, -1].double().log_softmax(-1)
    if len(prefix) < least:
        scores[END] = -math.inf
    return scores.tolist()


def naive_search(model, states, beams, most, least):
    """Textbook beam search: the best ``beams`` prefixes go on, ended ones are kept with their mean log-probability.

    It stops when nothing that goes on is better than the worst of ``beams`` ended texts. What is counted as length
    differs between the two generations of transformers, and so does what may still win when the length is used up.
    """

    def mean(score, text):
        return score / (len(text) - (text[-1] == END) if COUNTS_PROMPT else len(text) - len(PROMPT))

    running, finished = [(0.0, PROMPT)], []
    while len(running[0][1]) < most:
        grown = [
            (score + step, [*text, token])
            for score, text in running
            for token, step in enumerate(next_scores(model, states, text, least))
        ]
        best = sorted(grown, key=lambda item: -item[0])[: 2 * beams]
        running = [item for item in best if item[1][-1] != END][:beams]
        finished += [(mean(*item), item[1]) for item in best[:beams] if item[1][-1] == END]
        finished = sorted(finished, key=lambda item: -item[0])[:beams]
        length = len(running[0][1])
        hope = best[0][0] / (length - 1) if COUNTS_PROMPT else mean(*running[0])
        if len(finished) == beams and finished[-1][0] >= hope:
            return finished[0][1]
    last = running if COUNTS_PROMPT else [item for item in running if item in best[:beams]]
    return max([*finished, *((mean(*item), item[1]) for item in last)], key=lambda item: item[0])[1]


class Tokens:
    input_ids = torch.tensor([PROMPT, PROMPT])


@pytest.mark.parametrize("beams", [1, 2, 3])
@pytest.mark.parametrize("least", [1, 5])
def test_generation_equals_a_naive_search(decoder, beams, least):
    for seed in range(8):
        model, states = decoder(seed)
        with torch.no_grad():
            made = model.generate_from_encoder(
                Tokens, states, sep_token_id=END, pad_token_id=0, num_beams=beams, max_length=8, min_length=least
            )
            expected = [naive_search(model, state, beams, 8, least) for state in states]
        for row, naive in zip(made.tolist(), expected):
            ends = row.index(END, 2) + 1 if END in row[2:] else len(row)
            assert row[:ends] == naive
            assert set(row[ends:]) <= {0}


# BLIP-2 with a frozen language model behind the trained weights


class OptTokenizer:
    """The part of OPT's tokenizer that Blip2OPT uses, over this package's vocabulary."""

    def __init__(self):
        self.words = load_tokenizer("blip_tiny_vocab.txt")
        self.pad_token_id, self.padding_side = self.words.pad_token_id, "right"

    def __call__(self, text, **options):
        replaced = text.replace("\n", " ?") if isinstance(text, str) else [t.replace("\n", " ?") for t in text]
        return self.words(replaced, **options)


@pytest.fixture
def blip2_opt_model(monkeypatch):
    """Build LAVIS's unchanged class; only the parts that it would download are replaced."""
    tower = dict(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2, mlp_ratio=2, use_mean_pooling=False)
    settings = QformerConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        encoder_width=12, add_cross_attention=True, cross_attention_freq=2, query_length=3, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0, initializer_range=0.2,
    )  # fmt: skip
    language = OPTConfig(
        vocab_size=400, hidden_size=8, num_hidden_layers=2, ffn_dim=16, num_attention_heads=2, dropout=0.0,
        attention_dropout=0.0, word_embed_proj_dim=8, max_position_embeddings=64, init_std=0.2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    monkeypatch.setattr(Blip2OPT, "init_tokenizer", classmethod(lambda cls: None))
    monkeypatch.setattr(Blip2OPT, "init_vision_encoder", lambda *_: (VisionTransformer(**tower), LayerNorm(12)))
    monkeypatch.setattr(Blip2OPT, "init_Qformer", lambda *_: (Qformer(settings), nn.Parameter(torch.randn(1, 3, 8))))
    monkeypatch.setattr(blip2_opt.AutoTokenizer, "from_pretrained", lambda *_, **__: OptTokenizer())
    monkeypatch.setattr(blip2_opt.OPTForCausalLM, "from_pretrained", lambda *_, **__: OPTForCausalLM(language))
    return Blip2OPT(img_size=16, vit_precision="fp32", num_query_token=3)


def test_a_step_through_a_frozen_language_model_equals_the_naive_one(blip2_opt_model):
    """The perturbed call equals two ordinary passes that change the weights in place."""
    model = blip2_opt_model
    batch = {"image": torch.randn(3, 3, 16, 16), "text_input": ["a red dress", "a star", "long sleeves and a belt"]}
    naive = copy.deepcopy(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    settings = WeightPerturbation(gamma=0.05)
    optimizer = PerturbingOptimizer(torch.optim.AdamW(trained, lr=0.1), model, settings)
    loss = optimizer.perturb(model)(batch)["loss"]
    loss.backward()

    naive(batch)["loss"].backward()
    weights = {name: weight for name, weight in naive.named_parameters() if name in optimizer.weights}
    with torch.no_grad():
        steps = ascent_step(list(weights.values()), [weight.grad for weight in weights.values()], 0.05)
        for weight, step in zip(weights.values(), steps):
            weight += step
    naive.zero_grad()
    expected = naive(batch)["loss"]
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not any(weight.grad is not None for weight in model.opt_model.parameters())
    compared = 0
    for (name, weight), reference in zip(model.named_parameters(), naive.parameters()):
        if weight.requires_grad and reference.grad is not None:
            torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-4, atol=1e-6, msg=name)
            compared += 1
    assert compared > 10


def test_blip2_opt_generates(blip2_opt_model):
    blip2_opt_model.opt_tokenizer.batch_decode = blip2_opt_model.opt_tokenizer.words.batch_decode
    samples = {"image": torch.randn(2, 3, 16, 16), "prompt": "a"}
    assert len(blip2_opt_model.eval().generate(samples, num_beams=2, max_length=4)) == 2
