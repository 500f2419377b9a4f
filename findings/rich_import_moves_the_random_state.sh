#!/usr/bin/env bash
# rich 15.0.0: importing it draws from Python's global generator, so numbers that are drawn after `random.seed(0)` depend on whether, and when, somebody
# imports rich.
#
# Expected: an import leaves the state of `random` alone. A program that seeds and then imports what it needs draws the same numbers as one that imports
# first, and printing in colour changes no experiment.
# What happens: rich makes its default styles when it is imported. One of them is a style with a link, and a link gets a number of random.randint. Only the
# first import counts, so the same lines give other numbers in a notebook where rich was already there.
#
# Seen:
#     seed, draw:                      0.844422
#     seed, import rich.console, draw: 0.385245
#     again, rich is there now:        0.844422
#
# Why it matters here: progress bars, loggers and command lines import rich late, such as at the first warning or in one process alone. The order of the
# training data, crops and negatives that `random` draws then differs between runs with one seed. Draw what has to be repeated from a random.Random of its
# own, or seed after all imports.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet rich==15.0.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import random


def drawn(between):
    random.seed(0)
    between()
    return random.random()


def import_rich():
    import rich.console  # noqa: F401


seen = [drawn(lambda: None), drawn(import_rich), drawn(import_rich)]
for words, number in zip(("seed, draw:", "seed, import rich.console, draw:", "again, rich is there now:"), seen):
    print(f"{words:32} {number:.6f}")
assert seen[0] == seen[2] != seen[1], "the behaviour has changed"
PY
