"""The drawn data of the study: worlds, the training examples that a run's seed draws of them, and their files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from lavis_cir_plugin.data.benchmark_datasets import cache_root
from lavis_cir_plugin.garments import fashioniq, questions
from lavis_cir_plugin.garments.attributes import CATEGORIES
from lavis_cir_plugin.garments.world import make_once, write_json
from lavis_cir_plugin.methods.tscir.synthetic_triplets import make_triplets
from lavis_cir_plugin.methods.tscir.triplets_file import as_json_lines, read_image_captions
from study.design import CAPTION_WORLD, Design, Run

Example = TypeVar("Example")

WIDTH, HEIGHT = 64, 80  # of the drawn pictures
SEEN = 600
"""Largest number of training examples on which training's score is measured, and of validation's examples."""
SIMILARITY = 0.8
"""Least cosine of an edited and a target's caption, of which synthetic triplets are made."""


def world(design: Design, seed: int) -> Path:
    """Return the folder of a drawn world in FashionIQ's files; the first call draws it."""
    settings = fashioniq.FashionIQGarments(
        seed=seed, train_triplets=design.world_triplets, train_images=design.world_images, test_queries=1,
        test_images=40, image_width=WIDTH, image_height=HEIGHT,
    )  # fmt: skip
    return fashioniq.WORLD.make(cache_root(), settings)


def training_annotations(design: Design, run: Run, work: Path) -> Path:
    """Return FashionIQ's annotations of the world with so many training triplets, which the run's seed draws.

    For one seed, the triplets of a smaller amount are among those of a larger one. Each category has a third.
    """
    root = world(design, run.world)
    place = work / "annotations" / f"{root.name}_{run.triplets}_{run.seed}"

    def write(folder: Path) -> None:
        shutil.copytree(root / "image_splits", folder / "image_splits")
        shutil.copytree(root / "captions", folder / "captions")
        for number, category in enumerate(CATEGORIES):
            path = folder / "captions" / f"cap.{category}.train.json"
            records = json.loads(path.read_text(encoding="utf-8"))
            random.Random(f"{run.seed} {category}").shuffle(records)
            count = (run.triplets + number) // len(CATEGORIES)
            if count > len(records):
                raise ValueError(f"the world has {len(records)} triplets of {category}, and {count} are asked for")
            write_json(path, records[:count])

    return make_once(place, {"triplets": run.triplets, "seed": run.seed}, write)


def caption_world(design: Design) -> Path:
    """Return the folder of a drawn world of captioned pictures; the first call draws it."""
    return questions.WORLD.make(cache_root(), caption_settings(design), section="garments_caption")


def caption_settings(design: Design) -> questions.QuestionGarments:
    return questions.QuestionGarments(
        seed=CAPTION_WORLD, train_images=design.caption_pictures, val_images=40, captions="full",
        image_width=WIDTH, image_height=HEIGHT,
    )  # fmt: skip


def caption_triplets(root: Path, work: Path) -> Path:
    """Return a folder of triplets made of captioned pictures: the text describes the target, the reference is any."""

    def write(folder: Path) -> None:
        records = json.loads((root / "caption_train.json").read_text(encoding="utf-8"))
        names = sorted({record["image"] for record in records})
        rng = random.Random(CAPTION_WORLD)
        lines = []
        for record in records:
            target = record["image"]
            reference = next(name for name in rng.sample(names, 2) if name != target)
            lines.append(json.dumps({"reference": reference, "text": record["caption"], "target": target}))
        (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    return make_once(work / "captions" / root.name, {"world": root.name}, write)


def synthetic_triplets(design: Design, run: Run, work: Path) -> Path:
    """Return a folder of triplets that are made of the captioned pictures, for training; the run's seed draws them.

    Its validation triplets are never ranked: their number is that of the training triplets that are.
    """
    captions = read_image_captions(caption_world(design) / "caption_train.json")
    folder = work / "annotations" / f"synthetic_{design.caption_pictures}_{run.triplets}_{run.seed}"

    def write(folder: Path) -> None:
        sizes = {"train": (run.triplets, run.seed), "val": (min(SEEN, run.triplets), 1000 + run.seed)}
        for split, (count, seed) in sizes.items():
            made = make_triplets(captions, None, count, seed, SIMILARITY)
            (folder / f"{split}.jsonl").write_text(as_json_lines(captions, made.triplets), encoding="utf-8")

    return make_once(folder, {"triplets": run.triplets, "seed": run.seed}, write)


def question_world(run: Run) -> Path:
    """Return the folder of a drawn world of questions and captions; the first call draws it."""
    return questions.WORLD.make(cache_root(), _question_settings(run))


def _question_settings(run: Run) -> questions.QuestionGarments:
    return questions.QuestionGarments(seed=run.world, image_width=WIDTH, image_height=HEIGHT)


def vqa_files(run: Run, work: Path) -> dict[str, list[str]]:
    """Return the annotation files of LAVIS's ``coco_vqa`` by split; ``test`` has questions of the training.

    The records of ``val`` and ``test`` hold the right answer too, which LAVIS's evaluation does not read.
    """
    root = question_world(run)
    folder = work / "annotations" / f"vqa_{root.name}_{run.triplets}_{run.seed}"
    own = ("records", "questions", "annotations")

    def write(folder: Path) -> None:
        settings = _question_settings(run)
        pictures = questions.plan_pictures(settings)
        train, val = (questions.plan_questions(settings, split, pictures[split]) for split in ("train", "val"))
        drawn = _drawn(train, run)
        write_json(folder / "train.json", questions.lavis_records(drawn, with_answers=True))
        for split, asked in (("val", val[:SEEN]), ("test", drawn[:SEEN])):
            files = (questions.lavis_records(asked, with_answers=True), questions.coco_questions(asked),
                     questions.coco_annotations(asked))  # fmt: skip
            for name, content in zip(own, files):
                write_json(folder / f"{split}_{name}.json", content)

    make_once(folder, {"questions": run.triplets, "seed": run.seed}, write)
    evaluated = {split: [str(folder / f"{split}_{name}.json") for name in own] for split in ("val", "test")}
    answers = str(root / "answer_list.json")
    return {"train": [str(folder / "train.json")], **{s: [f[0], answers, *f[1:]] for s, f in evaluated.items()}}


def caption_files(run: Run, work: Path) -> dict[str, list[str]]:
    """Return the annotation files of LAVIS's ``coco_caption`` by split; ``test`` has pictures of the training."""
    root = question_world(run)
    folder = work / "annotations" / f"captions_{root.name}_{run.triplets}_{run.seed}"

    def write(folder: Path) -> None:
        records = _read(root / "caption_train.json")
        texts: dict[str, list[str]] = {}
        for record in records:
            texts.setdefault(record["image"], []).append(record["caption"])
        drawn = _drawn(records, run)
        pictures = list(dict.fromkeys(record["image"] for record in drawn))[:SEEN]
        write_json(folder / "train.json", drawn)
        write_json(folder / "test.json", [{"image": name, "caption": texts[name]} for name in pictures])
        write_json(folder / "val.json", _read(root / "caption_val.json")[:SEEN])

    make_once(folder, {"captions": run.triplets, "seed": run.seed}, write)
    return {split: [str(folder / f"{split}.json")] for split in ("train", "val", "test")}


def _drawn(examples: Sequence[Example], run: Run) -> list[Example]:
    """Return as many examples as the run has; those of a smaller run of the same seed come first."""
    if run.triplets > len(examples):
        raise ValueError(f"the world has {len(examples)} training examples, and {run.triplets} are asked for")
    return random.Random(run.seed).sample(list(examples), len(examples))[: run.triplets]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
