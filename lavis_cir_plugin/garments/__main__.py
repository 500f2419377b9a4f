"""Write a garments world from the command line: ``python -m lavis_cir_plugin.garments ROOT --seed 1``."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from .fashioniq import GarmentsConfig, write_fashioniq


def main() -> None:
    """Parse `GarmentsConfig`'s fields as options and write the world below ROOT."""
    parser = argparse.ArgumentParser(prog="python -m lavis_cir_plugin.garments", description=main.__doc__)
    parser.add_argument("root", type=Path, metavar="ROOT")
    for field in fields(GarmentsConfig):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default, help="default: %(default)s")
    options = vars(parser.parse_args())
    root = options.pop("root")
    try:
        write_fashioniq(root, GarmentsConfig(**options))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
