"""``lavis-cir``: what looks at runs and data without training; each sub-command lives with what it does."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each module offers add_command(subparsers), which sets ``run`` to a function of the parsed arguments.
_COMMANDS = (
    "check",
    "gap",
    "adapters",
    "submission",
    "synthetic_triplets",
    "negatives",
    "index_command",
    "search_command",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one sub-command; its errors end it with one sentence.

    Args:
        arguments: The command line; ``sys.argv`` by default.
    """
    parser = argparse.ArgumentParser(prog="lavis-cir", description="Look at runs and data without training.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in _COMMANDS:
        importlib.import_module(f"{__package__}.{name}").add_command(subparsers)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"lavis-cir: {error}")


if __name__ == "__main__":
    main()
