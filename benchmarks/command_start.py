"""Time how soon ``lavis-cir`` answers: processor time of whole processes, beside ``import torch`` and an older build.

All commands run in turns, each round in a process of its own, so that they meet the same machine. An older build is the
folder of a checkout; it runs with the libraries of the interpreter that runs this script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import measure
from check_full_size import write_circo

OWN = Path(__file__).resolve().parents[1]
ENTRIES = {"commands/main.py": "commands.main", "command_line.py": "command_line"}
"""File of the command line in this version and in older ones, and its module."""

HELP_LIMIT, SPEED_UP = 0.15, 20
"""Most that help may take in parts of ``import torch``, and how many times faster than 7eeba88 the rest has to be."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("older", nargs="?", type=Path, help="checkout of an older build to compare with")
    parser.add_argument("--circo", type=Path, help="CIRCO's repository: annotations/ and submission_examples/")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each command (default: 5)")
    arguments = parser.parse_args()
    older, circo = (path and path.resolve() for path in (arguments.older, arguments.circo))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # Python looks for modules in the working folder first, and a checkout has this package
        work = work_commands(Path(folder), circo)
        helps = [["--help"], *([name, "--help"] for name in command_names())]
        commands = {"import torch": (["-c", "import torch"], OWN)}
        for words in [*helps, *work.values()]:
            commands[f"now: {words}"] = (["-m", entry(OWN), *words], OWN)
        for words in [helps[0], *work.values()] if older else []:
            commands[f"older: {words}"] = (["-m", entry(older), *words], older)
        seconds = medians(commands, arguments.rounds)
        os.chdir(OWN)
    torch = seconds["import torch"]
    print(f"import torch: {torch:.3f} s of processor time, the median of {arguments.rounds}")
    for words in helps:
        now = seconds[f"now: {words}"]
        print(f"{' '.join(words):<38} {now:.3f} s = {now / torch:.3f} x import torch (aim: at most {HELP_LIMIT})")
    if older:
        before, now = (seconds[f"{build}: {helps[0]}"] for build in ("older", "now"))
        print(f"{'--help, older build':<38} {before:.3f} s = {before / now:.1f} x now")
    for label, words in work.items():
        before, now = seconds.get(f"older: {words}"), seconds[f"now: {words}"]
        beside = f", older build {before:.3f} s = {before / now:.1f} x (aim: at least {SPEED_UP})" if before else ""
        print(f"{label:<38} {now:.3f} s{beside}")


def command_names() -> list[str]:
    """Return the names of the files beside the command line that add a command."""
    folder = OWN / "lavis_cir_plugin" / "commands"
    return sorted(path.stem for path in folder.glob("*.py") if "def add_command(" in path.read_text())


def entry(root: Path) -> str:
    """Return the module of a checkout's command line."""
    for file, module in ENTRIES.items():
        if (root / "lavis_cir_plugin" / file).is_file():
            return f"lavis_cir_plugin.{module}"
    raise SystemExit(f"{root} is no checkout of lavis_cir_plugin with the command lavis-cir; name its folder.")


def work_commands(folder: Path, circo: Path | None) -> dict[str, list[str]]:
    """Return commands that work: on a small tree, which is written into ``folder``, and on CIRCO's files if given."""
    small = folder / "small"
    write_circo(small, 100)
    records = json.loads((small / "annotations" / "val.json").read_text())
    file = folder / "file.json"
    file.write_text(json.dumps({str(record["id"]): list(range(50)) for record in records}))
    commands = {
        "check, small tree": ["check", str(small)],
        "submission, small tree": ["submission", str(file), "--annotations", str(small / "annotations" / "val.json")],
    }
    for split in ("val", "test") if circo else ():
        example, annotation = f"submission_examples/submission_{split}.json", f"annotations/{split}.json"
        commands[f"submission, CIRCO's example of {split}"] = [
            "submission", str(circo / example), "--annotations", str(circo / annotation)
        ]  # fmt: skip
    return commands


def medians(commands: Mapping[str, tuple[Sequence[str], Path]], rounds: int) -> dict[str, float]:
    """Run all commands in turns and return the median processor time of each, in seconds."""
    seconds: dict[str, list[float]] = {label: [] for label in commands}
    for _ in range(rounds):
        for label, (words, root) in commands.items():
            lines: list[str] = []
            usage = measure.run([sys.executable, "-W", "ignore", *words], lines.append, measure.environment(root))
            seconds[label].append(usage.cpu_seconds)
    return {label: statistics.median(values) for label, values in seconds.items()}


if __name__ == "__main__":
    main()
