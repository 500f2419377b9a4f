"""Write a garments world from the command line: ``python -m lavis_cir_plugin.garments ROOT --benchmark cirr``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lavis_cir_plugin import garments
from lavis_cir_plugin.core.interruption import interruptible

from .world import World, write_json

MARKER = "garments.json"
"""File below ROOT with the settings of the world, by which a later call recognises the folder as drawn."""


def worlds() -> dict[str, World]:
    """Return the drawn worlds by the names of their modules. Every module that defines ``WORLD`` is found."""
    names = [found.name for found in pkgutil.iter_modules(garments.__path__) if found.name != "__main__"]
    modules = {name: importlib.import_module(f"{garments.__name__}.{name}") for name in names}
    return {name: module.WORLD for name, module in modules.items() if hasattr(module, "WORLD")}


def _mark(root: Path, settings: Mapping[str, Any]) -> None:
    """Write into a folder what is drawn there; refuse one with other files, which might be the real data set's.

    Raises:
        ValueError: If files in the folder are not of this command.
        OSError: If the file cannot be written.
    """
    if root.is_dir() and any(root.iterdir()) and not (root / MARKER).is_file():
        raise ValueError(
            f"{root} holds files and no {MARKER}, by which this command knows what it has drawn and may overwrite; "
            "name a new or empty folder."
        )
    write_json(root / MARKER, settings)


def main() -> None:
    """Write a drawn world below ROOT, a new or empty folder, in the files of the benchmark; its sizes are options."""
    drawn = worlds()
    shape = argparse.ArgumentParser(add_help=False)
    shape.add_argument("--benchmark", choices=list(drawn), default="fashioniq", help="default: %(default)s")
    benchmark = shape.parse_known_args()[0].benchmark
    world = drawn[benchmark]
    parser = argparse.ArgumentParser(
        prog="python -m lavis_cir_plugin.garments",
        description=main.__doc__,
        epilog=f"The options above are those of --benchmark {benchmark}.",
        parents=[shape],
    )
    parser.add_argument("root", type=Path, metavar="ROOT")
    for field in fields(world.settings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default, help="default: %(default)s")
    options = vars(parser.parse_args())
    root = options.pop("root")
    del options["benchmark"]
    with interruptible("garments", lambda: f"{root} is not whole; start it again to write it anew."):
        try:
            settings = world.settings(**options)
            _mark(root, {"benchmark": benchmark, **options})
            world.write(root, settings)
        except (ValueError, OSError) as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
