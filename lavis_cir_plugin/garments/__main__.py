"""Write a garments world from the command line: ``python -m lavis_cir_plugin.garments ROOT --benchmark cirr``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

from lavis_cir_plugin.interruption import interruptible

from . import circo, cirr, fashioniq

_WRITERS: Mapping[str, tuple[type, Callable[..., object]]] = {
    "fashioniq": (fashioniq.GarmentsConfig, fashioniq.write_fashioniq),
    "cirr": (cirr.GarmentsConfig, cirr.write_cirr),
    "circo": (circo.GarmentsConfig, circo.write_circo),
}


def main() -> None:
    """Write a drawn world below ROOT, in the files of the benchmark; its sizes are options."""
    shape = argparse.ArgumentParser(add_help=False)
    shape.add_argument("--benchmark", choices=list(_WRITERS), default="fashioniq", help="default: %(default)s")
    benchmark = shape.parse_known_args()[0].benchmark
    config_class, write = _WRITERS[benchmark]
    parser = argparse.ArgumentParser(
        prog="python -m lavis_cir_plugin.garments",
        description=main.__doc__,
        epilog=f"The options above are those of --benchmark {benchmark}.",
        parents=[shape],
    )
    parser.add_argument("root", type=Path, metavar="ROOT")
    for field in fields(config_class):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default, help="default: %(default)s")
    options = vars(parser.parse_args())
    root = options.pop("root")
    del options["benchmark"]
    with interruptible("garments", lambda: f"{root} is not whole; start it again to write it anew."):
        try:
            write(root, config_class(**options))
        except (ValueError, OSError) as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
