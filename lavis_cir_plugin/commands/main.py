"""``lavis-cir``: what looks at runs and data without training."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence

from lavis_cir_plugin import commands
from lavis_cir_plugin.core.interruption import interruptible


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one sub-command; its errors end it with one sentence.

    Each module beside this one that has ``add_command(subparsers)`` is a sub-command; it sets ``run`` to a function of
    the parsed arguments, and imports what takes long when it runs.

    Args:
        arguments: The command line; ``sys.argv`` by default.
    """
    parser = argparse.ArgumentParser(prog="lavis-cir", description="Look at runs and data without training.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    with interruptible("lavis-cir", lambda: "what it writes is whole or not there, so start it again."):
        for found in pkgutil.iter_modules(commands.__path__):
            module = importlib.import_module(f"{commands.__name__}.{found.name}")
            if hasattr(module, "add_command"):
                module.add_command(subparsers)
        args = parser.parse_args(arguments)
        try:
            args.run(args)
        except (ValueError, OSError) as error:
            sys.exit(f"lavis-cir: {error}")


if __name__ == "__main__":
    main()
