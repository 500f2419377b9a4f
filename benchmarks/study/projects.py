"""The project of each run: the models and tasks that the study trains, in the sections of the launcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from study import worlds
from study.design import Design, Run
from study.starts import (
    PROCESSORS,
    clip_checkpoint,
    mapping_checkpoint,
    model_section,
    run_section,
    start_checkpoint,
)

Sections = Mapping[str, Mapping[str, Any]]
Project = Callable[[Design, Run, Path], Sections]


def project(design: Design, run: Run, work: Path) -> dict[str, Any]:
    """Return the project of a run, without its row's options. The first call trains what the run starts from."""
    own = PROJECTS.get(run.part, blip2_cir)(design, run, work)
    common = {**run_section(design, work), "runner": "runner_wrf4cir_iter", "wrf": {"gamma": 0.0},
              "max_iters": design.steps, "iters_per_inner_epoch": design.steps // design.validations,
              "valid_splits": ["val", "seen"], "seed": run.seed}  # fmt: skip
    settings = {**common, **own.get("run", {})}
    if settings["task"] != common["task"]:
        del settings["feature_cache"]  # it belongs to the task of retrieval
    return {"model": dict(own["model"]), "datasets": dict(own["datasets"]), "run": settings}


def blip2_cir(design: Design, run: Run, work: Path) -> Sections:
    """A trained Q-Former on a frozen tower."""
    start = start_checkpoint(design, run.row.start, work)
    return {
        "model": {**model_section(run.row.start, start), "freeze_vit": True},
        "datasets": {"fashioniq": _fashioniq(design, run, work)},
    }


def clip_cir(design: Design, run: Run, work: Path) -> Sections:
    """CLIP's text tower, trained with late fusion on a frozen image tower."""
    model = {"arch": "clip_cir", "model_type": "tiny", "pretrained": str(clip_checkpoint(design, work))}
    return {"model": model, "datasets": {"fashioniq": _fashioniq(design, run, work)}}


def tscir(design: Design, run: Run, work: Path) -> Sections:
    """TSCIR's stage II: adapters in a frozen CLIP, trained on synthetic triplets and validated on FashionIQ's."""
    model = {"arch": "tscir_composing", "model_type": "tiny", "pretrained": str(clip_checkpoint(design, work)),
             "mapping_checkpoint": str(mapping_checkpoint(design, work)), "temperature": 0.06}  # fmt: skip
    build_info = {
        "root": str(worlds.synthetic_triplets(design, run, work)),
        "images": str(worlds.caption_world(design) / "images"),
    }
    triplets = {"build_info": build_info, "vis_processor": PROCESSORS, "splits": ["train", "seen"]}
    return {
        "model": model,
        "datasets": {"triplets": triplets, "fashioniq": {**_fashioniq(design, run, work), "splits": ["val"]}},
    }


def vqa(design: Design, run: Run, work: Path) -> Sections:
    """LAVIS's BLIP for questions, by LAVIS's task and data set, from random weights."""
    return {
        "model": {"arch": "blip_vqa_tiny", "model_type": "tiny"},
        "datasets": {"coco_vqa": _coco(run, worlds.vqa_files(run, work), "blip_question")},
        "run": {"task": "vqa", "num_ans_candidates": 16, "valid_splits": ["val", "test"]},
    }


def captioning(design: Design, run: Run, work: Path) -> Sections:
    """LAVIS's BLIP for captions, by LAVIS's data set, from random weights."""
    return {
        "model": {"arch": "blip_caption_tiny", "model_type": "tiny"},
        "datasets": {"coco_caption": _coco(run, worlds.caption_files(run, work), "blip_caption")},
        "run": {"task": "local_captioning", "num_beams": 1, "max_len": 24, "min_len": 5,
                "valid_splits": ["val", "test"]},
    }  # fmt: skip


PROJECTS: Mapping[str, Project] = {"clip_cir": clip_cir, "tscir": tscir, "vqa": vqa, "captioning": captioning}
"""Projects by the part of the study; the other parts train ``blip2_cir``."""


def _fashioniq(design: Design, run: Run, work: Path) -> dict[str, Any]:
    annotations = worlds.training_annotations(design, run, work)
    root = str(worlds.world(design, run.world))
    return {
        "build_info": {"root": root, "verify_images": False, "annotations": str(annotations)},
        "vis_processor": PROCESSORS,
        "noise_seed": run.seed,
    }


def _coco(run: Run, files: Mapping[str, list[str]], text_processor: str) -> dict[str, Any]:
    """Return the section of a COCO data set of LAVIS with our files, in which ``test`` stands for ``seen``."""
    pictures = {"name": "blip_image_eval", "image_size": 64}
    return {
        "build_info": {
            "annotations": {split: {"url": paths, "storage": paths} for split, paths in files.items()},
            "images": {"storage": str(worlds.question_world(run) / "images")},
        },
        "vis_processor": {"train": pictures, "eval": pictures},
        "text_processor": {"train": {"name": text_processor}, "eval": {"name": text_processor}},
    }
