#!/usr/bin/env bash
# omegaconf 2.3.0: a value of the command line that OmegaConf has read is not the text that was typed, and no warning says so.
#
# Expected: `output_dir=/runs/lr 3e-4 #2` sets the text "/runs/lr 3e-4 #2", as one argument that the shell has already passed on whole. Hydra reads its
# overrides by a grammar of its own; OmegaConf's dot lists look the same.
# What happens: from_dotlist and from_cli give each value to a YAML reader. A blank and "#" begin a comment, so the rest is dropped. A name of digits and
# underscores is a number, from which the underscores are taken: the folder 2024_11_28 becomes the number 20241128, and the folder of that name is made
# or looked for.
#
# Seen:
#     /runs/lr 3e-4 #2     -> '/runs/lr 3e-4'
#     2024_11_28           -> 20241128
#     "/runs/lr 3e-4 #2"   -> '/runs/lr 3e-4 #2'
#     "2024_11_28"         -> '2024_11_28'
#
# Why it matters here: LAVIS's `--options run.output_dir=... model.finetuned=...` are such dot lists. Two runs can write into one folder, and a run can be
# evaluated that is not the one that was named. A value in quotes that reach OmegaConf, '"..."' in a shell, is taken as it stands.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet omegaconf==2.3.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import warnings

from omegaconf import OmegaConf

warnings.simplefilter("error")  # nothing warns
typed = ["/runs/lr 3e-4 #2", "2024_11_28", '"/runs/lr 3e-4 #2"', '"2024_11_28"']
read = [OmegaConf.from_dotlist([f"run.output_dir={text}"]).run.output_dir for text in typed]
for text, value in zip(typed, read):
    print(f"{text:20} -> {value!r}")
assert read == ["/runs/lr 3e-4", 20241128, "/runs/lr 3e-4 #2", "2024_11_28"], "the behaviour has changed"
assert OmegaConf.from_cli(["run.output_dir=2024_11_28"]).run.output_dir == 20241128, "from_cli has changed"
PY
