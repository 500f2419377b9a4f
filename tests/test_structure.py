"""What the listing promises: layers import downwards only, methods stand alone, and LAVIS enters late."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lavis_cir_plugin"
LAYERS = (
    "core",
    "garments",
    "ranking",
    "benchmarks",
    "report",
    "data",
    "models",
    "training",
    "tasks",
    "methods",
    "search",
    "serving",
    "commands",
)
WITHOUT_LAVIS = LAYERS[:6]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path):
    """Yield the parts of every module and name that a file imports, wherever in the file."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = above + tuple(node.module.split(".") if node.module else ())
            yield from ((*module, alias.name) for alias in node.names)


def own_imports(path):
    return [name[1:] for name in imports(path) if name[0] == PACKAGE.name and len(name) > 1]


def test_every_folder_is_a_layer():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layers_import_downwards_only(path):
    layer = path.relative_to(PACKAGE).parts[0]
    below = LAYERS[: LAYERS.index(layer) + 1]
    wrong = [name for name in own_imports(path) if name[0] in LAYERS and name[0] not in below]
    at_the_top = {"CONFIGS", "PROJECTS", "__version__", "__name__", "former_places", "load_run"}
    wrong += [name for name in own_imports(path) if name[0] not in LAYERS and name[0] not in at_the_top]
    assert wrong == []


def test_no_method_imports_another():
    folders = [path for path in (PACKAGE / "methods").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert len(folders) >= 4
    for folder in folders:
        for path in folder.rglob("*.py"):
            others = [name[1] for name in own_imports(path) if name[0] == "methods" and name[1] != folder.name]
            assert others == [], path


def test_imports_form_no_circle():
    modules = {module_of(path)[1:]: path for path in FILES}
    needs = {
        module: {name[:length] for name in own_imports(path) for length in (len(name), len(name) - 1)} & set(modules)
        for module, path in modules.items()
        if path.name != "__init__.py"
    }
    needs = {module: (needed & set(needs)) - {module} for module, needed in needs.items()}
    while needs:
        free = {module for module, needed in needs.items() if not needed & set(needs)}
        assert free, f"a circle within {sorted(needs)}"
        needs = {module: needed for module, needed in needs.items() if module not in free}


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.relative_to(PACKAGE).parts[0] in WITHOUT_LAVIS],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_only_builders_of_the_first_layers_import_lavis(path):
    has_lavis = any(name[0] == "lavis" for name in imports(path))
    assert not has_lavis or path.parent == PACKAGE / "data" / "builders"


def test_parts_without_lavis_work_where_it_is_not_installed():
    paths = [path for path in FILES if path.relative_to(PACKAGE).parts[0] in WITHOUT_LAVIS]
    modules = [
        ".".join(module_of(path))
        for path in paths
        if path.name != "__main__.py" and not any(name[0] == "lavis" for name in imports(path))
    ]
    assert len(modules) > 30
    code = f"import sys, importlib; sys.modules['lavis'] = None; [importlib.import_module(m) for m in {modules}]"
    result = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


FORMER = {
    "lavis_cir_plugin.garments": ["GarmentsConfig", "make_garments", "write_fashioniq", "draw", "words"],
    "lavis_cir_plugin.ranking": [
        "Ranking", "average_precision_at", "padded", "rank", "recall_at", "rerank", "similarity"
    ],
    "lavis_cir_plugin.index": ["Index", "build_index", "load_index", "recall_against_exact"],
    "lavis_cir_plugin.losses": ["contrastive_loss", "mixed_negatives_loss", "alignment_loss", "LOSSES"],
    "lavis_cir_plugin.report": [
        "metrics_table", "expected_random", "write_metrics", "contact_sheet", "attention_sheet", "training_curve"
    ],
    "lavis_cir_plugin.perturbation": ["WeightPerturbation", "LowRank", "ascent_step"],
    "lavis_cir_plugin.processors": ["TargetPadProcessor", "ClipTwoViewsProcessor"],
    "lavis_cir_plugin.benchmarks.benchmark": [
        "Triplet", "Query", "Group", "Benchmark", "read_json", "read_records", "config_from_mapping", "drawn_like",
        "did_you_mean",
    ],
    "lavis_cir_plugin.benchmarks.fashioniq": ["read_train", "read_benchmark"],
    "lavis_cir_plugin.models.blip2_cir": ["Blip2Cir", "load_tokenizer"],
    "lavis_cir_plugin.models.clip_cir": ["ClipCir"],
    "lavis_cir_plugin.models.tscir_mapping": ["TscirMapping"],
    "lavis_cir_plugin.models.tscir_composing": ["TscirComposing"],
    "lavis_cir_plugin.models.blip_tiny": ["BlipVqaTiny", "BlipCaptionTiny"],
}  # fmt: skip


@pytest.mark.parametrize("module", FORMER)
def test_former_places_of_public_names_still_serve_them(module):
    found = __import__(module, fromlist=["*"])
    assert [name for name in FORMER[module] if not hasattr(found, name)] == []
