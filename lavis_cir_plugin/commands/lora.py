"""The command ``lavis-cir lora``: writes a run's adapters as a folder for peft, or merged into the whole model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def add_command(subparsers: Any) -> None:
    """Add ``lavis-cir lora`` to the sub-commands."""
    parser = subparsers.add_parser("lora", help="export the adapters of a LoRA run, for peft or merged into the model")
    parser.add_argument("run_or_checkpoint", metavar="RUN", help="output folder of a run, or one of its checkpoints")
    parser.add_argument("--output", required=True, help="a new or empty folder")
    parser.add_argument(
        "--merge", action="store_true", help="write a whole model that model.finetuned loads without run.lora"
    )
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    """Write a folder for peft, or with ``--merge`` a checkpoint of the whole model."""
    import torch
    from lavis.tasks.base_task import BaseTask
    from omegaconf import OmegaConf

    from lavis_cir_plugin.core.atomic_files import check_new_folder, new_folder
    from lavis_cir_plugin.training.lora import (
        LoraSettings,
        build_model,
        merged_state,
        read_lora_checkpoint,
        write_peft_folder,
    )
    from lavis_cir_plugin.training.run_folders import checkpoint_in
    from lavis_cir_plugin.training.training_history import trained_on_by

    path = checkpoint_in(Path(os.path.expanduser(args.run_or_checkpoint)))
    output = Path(os.path.expanduser(args.output)).absolute()
    check_new_folder(output)
    saved = read_lora_checkpoint(str(path))
    if saved is None:
        raise ValueError(f"{path} holds no LoRA adapters (or is no checkpoint); name one of a run with run.lora.")
    sections = saved["config"]
    model_cfg = OmegaConf.create({**sections["model"], "load_finetuned": True, "finetuned": str(path)})
    run_cfg = OmegaConf.create(sections["run"])
    model = build_model(BaseTask(), SimpleNamespace(model_cfg=model_cfg, run_cfg=run_cfg))
    with new_folder(output) as content:
        if args.merge:
            whole = {"model": merged_state(model), "trained_on": sorted(trained_on_by(saved))}
            torch.save(whole, content / "checkpoint_merged.pth")
        else:
            write_peft_folder(model, LoraSettings(**sections["run"]["lora"]), content)
    print(f"{output}: {', '.join(sorted(found.name for found in output.iterdir()))}")
