"""The command ``lavis-cir``, which finds its sub-commands in this folder and runs one of them."""

from __future__ import annotations

import argparse
import codecs
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Sequence

from lavis_cir_plugin import commands
from lavis_cir_plugin.core.interruption import interruptible


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one sub-command; an error ends it with one sentence.

    Each module beside this one with ``add_command(subparsers)`` is a sub-command. That function sets ``run`` to a
    function of the parsed arguments, which imports slow libraries only when it runs.

    Args:
        arguments: Arguments of the command line; by default those of ``sys.argv``.
    """
    parser = argparse.ArgumentParser(prog="lavis-cir", description="Search pictures, and look at data and runs.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    _print_whatever_comes()
    with interruptible("lavis-cir", lambda: "what it writes is whole or not there, so start it again."):
        for found in pkgutil.iter_modules(commands.__path__):
            module = importlib.import_module(f"{commands.__name__}.{found.name}")
            if hasattr(module, "add_command"):
                module.add_command(subparsers)
        args = parser.parse_args(arguments)
        try:
            args.run(args)
            print(end="", flush=True)
        except BrokenPipeError:  # a program such as head has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed at the exit
            sys.exit(128 + 13)  # as shells say that SIGPIPE ended it
        except (ValueError, OSError) as error:
            sys.exit(f"lavis-cir: {_sentence(error)}")


def _print_whatever_comes() -> None:
    """Let standard output take names of files that are no text, and characters that a terminal's encoding lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        is_unicode = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_unicode else "backslashreplace")


def _sentence(error: ValueError | OSError) -> str:
    """Return the message of an error; the system's own ones have a number, a reason and perhaps a path."""
    if not isinstance(error, OSError) or error.errno is None or error.strerror is None:
        return str(error)
    if error.strerror != os.strerror(error.errno):
        return error.strerror
    return (
        f"{error.filename or 'what is printed'} cannot be read or written ({error.strerror}); free some space there, "
        "allow it, or name another place."
    )


if __name__ == "__main__":
    main()
