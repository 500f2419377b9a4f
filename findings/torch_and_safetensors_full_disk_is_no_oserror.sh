#!/usr/bin/env bash
# torch 2.13.0, safetensors 0.8.0: a checkpoint that does not fit on the disk raises no OSError, so code that catches OSError misses it.
#
# Expected: a write that the system refuses is an OSError with its errno, as open().write, json.dump and numpy.save raise it.
# What happens: torch.save with a path, or with a file whose last bytes do not fit, ends in a RuntimeError of its zip writer that speaks of positions
# ("unexpected pos 704 vs 598"), with no word of the disk and no errno. safetensors raises a SafetensorError, which is derived from Exception alone. torch's
# half of a file stays under the final name; safetensors leaves none. Here a limit on the size of files stands for the full disk.
#
# Seen:
#     open().write  OSError, errno 27
#     numpy.save    OSError
#     torch.save    RuntimeError, no OSError, says 'unexpected pos'
#     safetensors   SafetensorError, no OSError
#     left behind:  a.bin, a.npy, a.pth
#
# Why it matters here: trainings save for hours to shared disks that others fill. A handler of OSError that would warn, take the older checkpoint or clean
# up never runs, and the next start may read half of a file. Catch RuntimeError and SafetensorError too, and write under another name first.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import os
import resource
import signal

import numpy as np
import safetensors.torch
import torch

LIMIT = 1_000_000
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit is then refused as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
weights = {"weight": torch.zeros(LIMIT)}


def write_bytes():
    with open("a.bin", "wb", buffering=0) as file:
        file.write(bytes(LIMIT))
        file.write(b"x")


def refused(write):
    try:
        write()
    except Exception as error:
        return error
    raise AssertionError("the write was not refused")


errors = {
    "open().write": refused(write_bytes),
    "numpy.save": refused(lambda: np.save("a.npy", np.zeros(LIMIT))),
    "torch.save": refused(lambda: torch.save(weights, "a.pth")),
    "safetensors": refused(lambda: safetensors.torch.save_file(weights, "a.safetensors")),
}
for name, error in errors.items():
    number = getattr(error, "errno", None)
    words = [type(error).__name__] + ["no OSError"] * (not isinstance(error, OSError))
    words += [f"errno {number}"] * (number is not None) + ["says 'unexpected pos'"] * ("unexpected pos" in str(error))
    print(f"{name:13} {', '.join(words)}")
left = sorted(name for name in os.listdir() if name.startswith("a."))
print(f"left behind:  {', '.join(left)}")
kinds = [type(error).__name__ for error in errors.values()]
assert kinds == ["OSError", "OSError", "RuntimeError", "SafetensorError"], "the behaviour has changed"
assert "unexpected pos" in str(errors["torch.save"]) and left == ["a.bin", "a.npy", "a.pth"]
PY
