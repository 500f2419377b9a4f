"""The command ``lavis-cir config``: prints a project's complete config, where each value is from and what it means."""

from __future__ import annotations

import argparse
import json
from typing import Any

SCHEMA_LINE = "# yaml-language-server: $schema=project.schema.json"


def add_command(subparsers: Any) -> None:
    """Add ``lavis-cir config`` to the sub-commands."""
    parser = subparsers.add_parser(
        "config", help="print and check a project's complete config: each value, its origin and its meaning"
    )
    parser.add_argument("project", nargs="?", help="YAML file; projects/... is also found where none is local")
    parser.add_argument("--options", nargs="+", action="extend", default=[], help="run.seed=1 and the like")
    parser.add_argument("--evaluate", action="store_true", help="check it for lavis.evaluate, not for lavis.train")
    parser.add_argument(
        "--schema",
        action="store_true",
        help="print the JSON schema of project files instead, for editors; save it as project.schema.json beside a "
        f"YAML file that begins with '{SCHEMA_LINE}'",
    )
    parser.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> None:
    """Print the config, then raise ValueError if its check fails; nothing is built."""
    if args.schema == (args.project is not None):
        raise ValueError(
            "config takes either a project before --options, such as projects/wrf4cir/demo.yaml, or --schema; give one."
        )
    if args.schema and (args.options or args.evaluate):
        raise ValueError(
            "config --schema is of every project and reads neither --options nor --evaluate; leave them out."
        )
    from lavis_cir_plugin.training import reference

    if args.schema:
        print(json.dumps(reference.json_schema(), indent=1))
        return
    from omegaconf import OmegaConf

    from lavis_cir_plugin.core.error_messages import as_json
    from lavis_cir_plugin.report.run_record import flat
    from lavis_cir_plugin.training import config
    from lavis_cir_plugin.training.launcher import find_config

    path = find_config(args.project)
    complete = config.with_lavis_defaults(config.read_config(str(path), args.options))
    content = complete.to_dict()
    values = flat(content)
    origins = config.origins(args.project, OmegaConf.load(path), args.options, values)
    for key, value in values.items():
        sentence = reference.meaning_of(key, content)
        print(f"{key}: {as_json(value)}  # {origins[key]}{sentence and f'. {sentence}'}")
    config.check_values(complete, "evaluate" if args.evaluate else "train")
