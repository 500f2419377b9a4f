"""In a fresh interpreter, help, ``check`` and ``submission`` load no heavy library."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from lavis_cir_plugin import commands

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "lavis",
    "numpy",
    "scipy",
    "PIL.Image",
    "matplotlib",
    "omegaconf",
    "pydantic",
    "tqdm",
    "transformers",
    "open_clip",
}
NAMES = sorted({found.name for found in pkgutil.iter_modules(commands.__path__)} - {"main"})
RUN = """
import sys
from lavis_cir_plugin.commands.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print(f"ended by {end.code}")
print("loaded:", *sys.modules)
"""


def run(*arguments: object) -> tuple[str, set[str]]:
    """Return the output of a command and the heavy libraries that it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    printed, _, loaded = done.stdout.rpartition("loaded:")
    assert "lavis_cir_plugin.commands.main" in loaded.split()
    return printed, HEAVY & set(loaded.split())


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_help_names_every_command_and_loads_nothing():
    printed, heavy = run("--help")
    assert len(NAMES) >= 6
    assert set(NAMES) <= set(printed.split())
    assert heavy == set()


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_loads_nothing(name: str):
    printed, heavy = run(name, "--help")
    assert printed.startswith(f"usage: lavis-cir {name}")
    assert heavy == set()


def test_a_file_of_val_is_scored_without_torch(tmp_path: Path):
    """Of 50 images the target is the second and the other right one the fourth: (1/2 + 2/4) / 2 of mAP@5."""
    record = {"id": 3, "reference_img_id": 9, "relative_caption": "is red", "target_img_id": 101}
    annotation = write(tmp_path / "val.json", [{**record, "gt_img_ids": [101, 103]}])
    printed, heavy = run(
        "submission", write(tmp_path / "file.json", {"3": [*range(100, 150)]}), "--annotations", annotation
    )
    assert "mAP@5: 50.00" in printed.splitlines()
    assert "ended by" not in printed
    assert heavy == set()


def test_a_folder_is_checked_without_torch(tmp_path: Path):
    write(tmp_path / "train.jsonl", {"reference": "a.jpg", "text": "is red", "target": "b.jpg"})
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "images" / name).touch()
    printed, heavy = run("check", tmp_path)
    assert "  training: yes" in printed.splitlines()
    assert heavy == set()


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_official_circo_examples_load_nothing(real_annotations: Path, split: str):
    root = real_annotations / "CIRCO"
    example, annotation = (
        root / "submission_examples" / f"submission_{split}.json",
        root / "annotations" / f"{split}.json",
    )
    printed, heavy = run("submission", example, "--annotations", annotation)
    assert f"ok as far as it was checked: {example}" in printed
    assert heavy == set()


def test_the_defaults_that_the_help_of_triplets_names_are_those_of_the_maker(capsys: pytest.CaptureFixture[str]):
    from lavis_cir_plugin.commands import main
    from lavis_cir_plugin.methods.tscir.synthetic_triplets import CLIP_SIMILARITY, COUNT, WORDS_SIMILARITY

    with pytest.raises(SystemExit):
        main.main(["triplets", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"(default: {COUNT})" in said
    assert f"(default {WORDS_SIMILARITY}, CLIP: {CLIP_SIMILARITY})" in said
