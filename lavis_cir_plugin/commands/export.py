"""The command ``lavis-cir export``: writes the whole model of a run for transformers, as safetensors, or for LAVIS."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FORMATS = ("transformers", "safetensors", "lavis")


def add_command(subparsers: Any) -> None:
    """Add ``lavis-cir export`` to the sub-commands."""
    parser = subparsers.add_parser("export", help="write the whole model of a run, its frozen tower included")
    parser.add_argument("run_or_checkpoint", metavar="RUN", help="output folder of a run, or one of its checkpoints")
    parser.add_argument("--output", required=True, help="a new or empty folder")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="transformers",
        help="transformers: Blip2ForImageTextRetrieval, of blip2_cir alone; safetensors: model.safetensors under this "
        "project's names; lavis: checkpoint.pth, which model.finetuned loads",
    )
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> None:
    from lavis_cir_plugin import load_run
    from lavis_cir_plugin.core.atomic_files import check_new_folder, new_folder
    from lavis_cir_plugin.training.run_folders import checkpoint_in

    output = Path(os.path.expanduser(args.output)).absolute()
    check_new_folder(output)
    model = load_run(args.run_or_checkpoint).model
    source = checkpoint_in(Path(os.path.expanduser(args.run_or_checkpoint)))
    with new_folder(output) as content:
        _WRITERS[args.format](model, content, source)
    print(f"{output}: {', '.join(sorted(found.name for found in output.iterdir()))}")


def _whole_state(model: Any) -> dict[str, Any]:
    """Return every tensor of a model with merged adapters, in separate memory because safetensors share none."""
    from lavis_cir_plugin.training.lora import merged_state

    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in merged_state(model).items()}


def _write_transformers(model: Any, folder: Path, source: Path) -> None:
    """Write a folder for ``Blip2ForImageTextRetrieval.from_pretrained``, with float32 tensors.

    The folder lacks the matching head, which composed retrieval does not have. transformers warns and draws a random
    head.
    """
    from safetensors.torch import save_file

    from lavis_cir_plugin.methods.blip2_cir.hub_weights import EXTRA_FILE, EXTRA_TENSORS, hub_config, to_hub_names
    from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir

    if not isinstance(model, Blip2Cir):
        raise ValueError(
            f"--format transformers writes blip2_cir alone, and this run trained {type(model).__name__}; take "
            "--format safetensors or lavis."
        )
    config = {**hub_config(model), "torch_dtype": "float32"}
    state = _whole_state(model)
    named = {name: tensor.float() for name, tensor in to_hub_names(state).items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({name: state[name] for name in EXTRA_TENSORS if name in state}, folder / EXTRA_FILE)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model.tokenizer.save_pretrained(folder)


def _write_safetensors(model: Any, folder: Path, source: Path) -> None:
    from safetensors.torch import save_file

    save_file(_whole_state(model), folder / "model.safetensors", metadata={"format": "pt"})


def _write_lavis(model: Any, folder: Path, source: Path) -> None:
    """Write a checkpoint that also keeps the data sets of the run whose checkpoint is ``source``."""
    import torch

    from lavis_cir_plugin.core.checkpoints import mapped_checkpoint
    from lavis_cir_plugin.training.training_history import trained_on_by

    names = sorted(trained_on_by(mapped_checkpoint(source)))
    torch.save({"model": _whole_state(model), "trained_on": names}, folder / "checkpoint.pth")


_WRITERS: Mapping[str, Callable[[Any, Path, Path], None]] = {
    "transformers": _write_transformers,
    "safetensors": _write_safetensors,
    "lavis": _write_lavis,
}
