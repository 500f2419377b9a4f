#!/usr/bin/env bash
# numpy 2.4.6: seeds that are lists of numbers collide when they end in zeros, and with spawned children.
#
# Expected: default_rng([seed, epoch, worker]) is the usual way to a stream of its own for each of several numbers; lists
# that differ give streams that differ, and a spawned child has a stream that no plain seed has by accident.
# What happens: zeros at the end do not count, so [7], [7, 0] and [7, 0, 0] and the number 7 are one stream. A number from 2^32 on
# is the list of its 32-bit words, so 2^32 + 7 is [7, 1]. The third child spawned from 7 is the list [7, 0, 0, 0, 2].
#
# Seen:
#     7 = [7] = [7, 0] = [7, 0, 0]: True
#     2**32 + 7 = [7, 1]: True
#     SeedSequence(7).spawn(3)[2] = [7, 0, 0, 0, 2]: True
#     [0, 7] = 7: False
#
# Why it matters here: with [seed, epoch, rank] the first epoch of rank 0 draws what the set-up drew from the plain seed: the
# negatives are drawn by the same numbers as the initial weights or the split. Put the part that may be 0 first, and
# a constant last.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np


def draws(seed):
    return np.random.default_rng(seed).integers(0, 2**60, 8).tolist()


zeros = draws(7) == draws([7]) == draws([7, 0]) == draws([7, 0, 0])
words = draws(2**32 + 7) == draws([7, 1])
child = draws(np.random.SeedSequence(7).spawn(3)[2]) == draws([7, 0, 0, 0, 2])
front = draws([0, 7]) == draws(7)
print("7 = [7] = [7, 0] = [7, 0, 0]:", zeros)
print("2**32 + 7 = [7, 1]:", words)
print("SeedSequence(7).spawn(3)[2] = [7, 0, 0, 0, 2]:", child)
print("[0, 7] = 7:", front)
assert (zeros, words, child, front) == (True, True, True, False), "the behaviour has changed"
PY
