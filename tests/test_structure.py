"""What the listing promises: the parts without LAVIS stay without it, and importing the package registers the rest."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from lavis.common.registry import registry

import lavis_cir_plugin  # noqa: F401 (registers)

PACKAGE = Path(__file__).parents[1] / "lavis_cir_plugin"
WITHOUT_LAVIS = [
    PACKAGE / "feature_cache.py",
    PACKAGE / "losses.py",
    PACKAGE / "negatives.py",
    PACKAGE / "open_clip_towers.py",
    PACKAGE / "pseudo_word.py",
    PACKAGE / "shards.py",
    PACKAGE / "caption_edits.py",
    PACKAGE / "synthetic_triplets.py",
    PACKAGE / "data_order.py",
    PACKAGE / "perturbation.py",
    PACKAGE / "perturbed_model.py",
    PACKAGE / "preference.py",
    PACKAGE / "random_state.py",
    PACKAGE / "recomputation.py",
    PACKAGE / "ranking.py",
    PACKAGE / "report.py",
    PACKAGE / "tracking.py",
    *sorted((PACKAGE / "garments").glob("*.py")),
    *sorted((PACKAGE / "benchmarks").glob("*.py")),
]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", WITHOUT_LAVIS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_parts_without_lavis_do_not_import_it(path):
    assert [name for name in imported(path) if name.split(".")[0] == "lavis"] == []


def test_parts_without_lavis_work_where_it_is_not_installed():
    relative = [path.relative_to(PACKAGE.parent).with_suffix("") for path in WITHOUT_LAVIS]
    modules = [".".join(path.parts).replace(".__init__", "") for path in relative if path.name != "__main__"]
    code = f"import sys, importlib; sys.modules['lavis'] = None; [importlib.import_module(m) for m in {modules}]"
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_the_package_registers_everything():
    assert registry.get_model_class("blip2_cir").__module__ == "lavis_cir_plugin.models.blip2_cir"
    assert "composed_retrieval" in registry.list_tasks()
    assert "runner_wrf4cir" in registry.list_runners()
    assert {"fashioniq", "cirr"} <= set(registry.list_datasets())
    assert "target_pad" in registry.list_processors()
