"""LAVIS's import through the hook: no library's deprecations, the user's own filters, no library that nothing uses."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lavis_cir_hook import deferred
from lavis_cir_hook.foreign_warnings import hidden

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning, SyntaxWarning])
def test_deprecations_are_hidden_and_errors_of_the_user_come_back(category: type[Warning]):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with hidden():
            warnings.warn("old", category, stacklevel=1)
            warnings.warn("pkg_resources is deprecated as an API.", UserWarning, stacklevel=1)
        with pytest.raises(category, match="old"):
            warnings.warn("old", category, stacklevel=1)


def test_other_warnings_show_while_deprecations_are_hidden():
    with pytest.warns(UserWarning, match="the driver is too old"), hidden():
        warnings.warn("the driver is too old", UserWarning, stacklevel=1)


def test_filters_that_a_library_sets_are_kept_before_those_of_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        users = list(warnings.filters)
        with hidden():
            warnings.simplefilter("always", BytesWarning)
            warnings.filterwarnings("ignore", "the first step", UserWarning, r"library\.steps", 3)
            set_by_library = warnings.filters[:2]
        assert warnings.filters == [*set_by_library, *users]


def test_after_an_error_in_between_the_filters_are_those_of_the_user():
    users = list(warnings.filters)
    with pytest.raises(ImportError), hidden():
        raise ImportError
    assert warnings.filters == users


@pytest.fixture
def slow_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "slow_library.py").write_text("import sys\nsys.loaded_slowly = True\nANSWER = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(deferred, "_LIBRARIES", ("slow_library", "library_that_is_not_there"))
    monkeypatch.setattr(sys, "loaded_slowly", False, raising=False)
    yield "slow_library"
    sys.modules.pop("slow_library", None)


def test_a_deferred_library_is_executed_when_it_is_used(slow_library: str):
    finders = list(sys.meta_path)
    with deferred.deferred():
        library = importlib.import_module(slow_library)
    assert sys.meta_path == finders
    assert not sys.loaded_slowly
    assert library.ANSWER == 42
    assert sys.loaded_slowly


def test_from_import_executes_a_deferred_library_at_once(slow_library: str):
    with deferred.deferred():
        from slow_library import ANSWER
    assert (ANSWER, sys.loaded_slowly) == (42, True)


@pytest.mark.usefixtures("slow_library")
def test_a_library_that_is_not_installed_is_missed_at_its_import():
    with deferred.deferred(), pytest.raises(ModuleNotFoundError, match="library_that_is_not_there"):
        importlib.import_module("library_that_is_not_there")


REGISTERED = """
names = (registry.list_models(), registry.list_tasks(), registry.list_runners(), registry.list_datasets())
wanted = ({"blip2_cir", "clip_cir", "tscir_mapping", "tscir_composing"}, {"composed_retrieval", "retrieval_dpo"},
          {"runner_wrf4cir", "runner_wrf4cir_iter"}, {"fashioniq", "cirr", "circo", "triplets"})
assert all(want <= set(have) for want, have in zip(wanted, names)), names
assert "blip2_cir" in model_zoo.model_zoo
load_model("blip2_cir", "tiny")
"""
LAVIS = "from lavis.common.registry import registry\nfrom lavis.models import load_model, model_zoo\n"
PLUGIN_FIRST = f"""
import sys, warnings
warnings.simplefilter("error", DeprecationWarning)
users = list(warnings.filters)
import lavis_cir_plugin
assert 'lavis' not in sys.modules and 'torch' not in sys.modules
{LAVIS}
assert [entry for entry in warnings.filters if entry in users] == users
assert not any(entry[2] in (FutureWarning, SyntaxWarning) for entry in warnings.filters)
assert "thinc" not in sys.modules and "spacy" in sys.modules
sys.modules.update(dict.fromkeys(["open_clip", "tensorboard"]))  # as if they were not installed
{REGISTERED}
print("imported")
warnings.warn("of the user's own doing", FutureWarning)
"""


def test_lavis_is_imported_in_silence_and_the_user_is_warned_afterwards():
    """The user's filters stay, spacy is not executed, and BLIP-2 needs neither open_clip nor tensorboard.

    The plugin is imported first, and its entries are registered when LAVIS is.
    """
    pytest.importorskip("lavis")
    done = subprocess.run([sys.executable, "-c", PLUGIN_FIRST], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr
    first, *rest = done.stderr.splitlines()
    assert first.endswith("FutureWarning: of the user's own doing")
    own_line = PLUGIN_FIRST.splitlines()[-1]  # Python 3.13 shows it below the warning
    assert not any("Warning" in line for line in rest if line.strip() != own_line)


LAVIS_FIRST = f"{LAVIS}assert 'blip2_cir' not in registry.list_models()\nimport lavis_cir_plugin\n{REGISTERED}"


def test_entries_are_registered_at_once_where_lavis_was_imported_first():
    pytest.importorskip("lavis")
    command = [sys.executable, "-W", "ignore", "-c", LAVIS_FIRST]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
