"""The wheel, the editable install, and the import hook, in throw-away environments."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import lavis_cir_hook
from lavis_cir_hook import LavisFinder, install

ROOT = Path(__file__).parents[1]
PARTS = ("setup.py", "setup.cfg", "pyproject.toml", "LICENSE", "README.md", "lavis_cir_plugin", "lavis_cir_hook")
REPACK = ROOT / "lavis_without_pins" / "repack.py"
SITE = sysconfig.get_paths()["purelib"]

requires_lavis = pytest.mark.skipif(importlib.util.find_spec("lavis") is None, reason="LAVIS is not installed")


def run(*command: object, **options: object) -> str:
    """Return the standard output of a command that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Environment:
    """A virtual environment that borrows the heavy libraries of the one that runs the tests."""

    def __init__(self, folder: Path):
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        self.site = Path(run(self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
        # .pth files inside the borrowed folder are not executed, so this project's own install there stays unseen.
        (self.site / "zz_borrowed.pth").write_text(SITE)

    def pip(self, *arguments: object) -> None:
        run(sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", *arguments)

    def modules_at_start(self) -> set[str]:
        return set(run(self.python, "-I", "-c", "import sys; print(*sys.modules)").split())

    def files(self) -> set[Path]:
        return {path.relative_to(self.python.parents[1]) for path in self.python.parents[1].rglob("*")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Copy what a build needs, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("source")
    for part in (*PARTS, "configs", "projects"):
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / part).is_file():
            shutil.copy(ROOT / part, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(source, folder / "source")  # setuptools builds inside the source
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, copy)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, source, tmp_path_factory):
    """Install the project; on the way out, uninstall it and see that nothing is left."""
    environment = Environment(tmp_path_factory.mktemp(request.param) / "venv")
    environment.bare_modules = environment.modules_at_start()
    before = environment.files()
    what = [request.getfixturevalue("wheel")] if request.param == "wheel" else ["--editable", source]
    environment.pip("install", "--no-index", "--no-deps", "--no-build-isolation", *what)
    environment.mode = request.param
    yield environment
    environment.pip("uninstall", "--yes", "lavis_cir_plugin")
    assert environment.files() == before


def test_wheel_installs_two_packages_and_one_pth_file(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top_level == {"lavis_cir_plugin", "lavis_cir_hook", "lavis_cir_hook.pth"}


@pytest.mark.parametrize("folder", ["configs", "projects"])
def test_wheel_holds_every_config_and_project(wheel, source, folder):
    shipped = {path.relative_to(source).as_posix() for path in (source / folder).rglob("*") if path.is_file()}
    prefix = "lavis_cir_plugin/"
    inside = {name[len(prefix) :] for name in zipfile.ZipFile(wheel).namelist() if name.startswith(prefix + folder)}
    assert shipped
    assert inside == shipped


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only git knows which files belong to the project")
def test_the_sdist_is_a_whole_checkout(tmp_path):
    """In which `make` works: every file that git has, beside what a build adds."""
    tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")[:-1]
    for name in tracked:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=tmp_path / "source")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert set(tracked) <= packed
    assert {name.split("/")[0] for name in packed - set(tracked)} <= {"PKG-INFO", "lavis_cir_plugin.egg-info"}


@requires_lavis
def test_launcher_answers_from_any_folder(installed, tmp_path):
    command = "train" if installed.mode == "wheel" else "evaluate"  # importing LAVIS takes seconds: one each
    usage = run(installed.python, "-m", f"lavis.{command}", "--help", cwd=tmp_path)
    assert f"python -m lavis.{command}" in usage
    assert "--cfg-path" in usage


def test_start_up_imports_nothing(installed):
    """A wheel adds no module at all; an editable install comes with setuptools' own finder and what that imports."""
    new = installed.modules_at_start() - installed.bare_modules
    assert not new & {"lavis_cir_hook", "lavis_cir_plugin", "lavis", "transformers", "torch", "numpy"}
    if installed.mode == "wheel":
        assert new == set()
    finders = run(installed.python, "-c", "import sys; print([getattr(f, '__name__', '') for f in sys.meta_path])")
    assert finders.count("LavisFinder") == 1


def test_start_up_is_silent_where_the_package_was_removed_by_hand(wheel, tmp_path):
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "--no-index", "--no-deps", wheel)
    shutil.rmtree(environment.site / "lavis_cir_hook")
    done = subprocess.run([environment.python, "-c", ""], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@requires_lavis
def test_a_launcher_that_lavis_ships_wins_and_knows_our_entries(tmp_path, monkeypatch, capsys):
    """A later LAVIS is simulated by one more folder in LAVIS's own search path."""
    import lavis

    (tmp_path / "train.py").write_text(
        "from lavis.common.registry import registry\n"
        "print('from LAVIS:', registry.get_runner_class('runner_wrf4cir').__name__)\n"
    )
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    install()
    monkeypatch.setattr(lavis, "__path__", [*lavis.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "lavis.train", raising=False)  # another test may have imported ours
    runpy.run_module("lavis.train", run_name="__main__")
    assert "from LAVIS: RunnerWrf4Cir" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["os", "train", "lavis.models", "lavis.training", "lavis.train.x", "lavis_cir_plugin"])
def test_finder_declines_every_other_name(name):
    assert LavisFinder.find_spec(name, None) is None


def test_finder_is_installed_once(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if getattr(f, "__name__", "") != "LavisFinder"])
    others = list(sys.meta_path)
    install()
    install()
    assert sys.meta_path == [LavisFinder, *others]


def test_launcher_is_located_without_importing_the_plugin():
    script = (
        "import sys, lavis_cir_hook\n"
        "spec = lavis_cir_hook.LavisFinder.find_spec('lavis.evaluate', [])\n"
        "print(spec.origin, 'lavis_cir_plugin' in sys.modules)\n"
    )
    origin = ROOT / "lavis_cir_plugin" / "evaluate.py"
    assert run(sys.executable, "-c", script, cwd=ROOT).split() == [str(origin), "False"]


def test_without_the_plugin_python_gives_its_usual_error(tmp_path):
    (tmp_path / "lavis").mkdir()
    (tmp_path / "lavis" / "__init__.py").touch()
    shutil.copytree(ROOT / "lavis_cir_hook", tmp_path / "lavis_cir_hook")
    script = "import lavis_cir_hook; lavis_cir_hook.install(); import lavis.train"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "ModuleNotFoundError: No module named 'lavis.train'" in done.stderr


@pytest.mark.parametrize("arguments", [["-m", "--cfg-path", "x.yaml"], ["/usr/bin/lavis-cir", "lora"], ["own.py"], []])
@pytest.mark.parametrize("python", [(3, 11, 7), (3, 12, 0)])
def test_our_commands_say_how_to_install_lavis_where_pip_cannot_by_itself(monkeypatch, arguments, python):
    monkeypatch.setattr(lavis_cir_hook, "_found_elsewhere", lambda *_: None)
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "version_info", python)
    if python < (3, 12) or arguments in (["own.py"], []):
        assert LavisFinder.find_spec("lavis") is None
    else:
        line = rf"run: {re.escape(sys.executable)} -m pip install --no-deps salesforce-lavis==1\.0\.2$"
        with pytest.raises(ModuleNotFoundError, match=line) as caught:
            LavisFinder.find_spec("lavis")
        assert caught.value.name == "lavis"  # import_lavis() and others tell it from a library that LAVIS misses


def test_lavis_own_wheel_comes_back_whole_but_for_requirements_and_version(tmp_path):
    repack = runpy.run_path(str(REPACK))
    old, new = tmp_path / "salesforce_lavis-1.0.2-py3-none-any.whl", tmp_path / f"x-{repack['NEW_VERSION']}-y.whl"
    head = "Metadata-Version: 2.1\nName: salesforce-lavis\nVersion: 1.0.2\nRequires-Dist: timm (==0.4.12)\n"
    description = "\nVersion: 1.0.2\nRequires-Dist: of the description\n"
    files = {
        "lavis/__init__.py": "x = 1\n",
        "lavis/a.yaml": "é",
        "salesforce_lavis-1.0.2.dist-info/WHEEL": "Tag: any\n",
    }
    with zipfile.ZipFile(old, "w") as wheel:
        for name, text in {
            **files,
            "salesforce_lavis-1.0.2.dist-info/METADATA": head + description,
            "salesforce_lavis-1.0.2.dist-info/RECORD": "",
        }.items():
            wheel.writestr(name, text)
    repack["repack"](old, new)
    with zipfile.ZipFile(new) as wheel:
        content = {name: wheel.read(name).decode() for name in wheel.namelist()}
    info = "salesforce_lavis-1.0.2+without.pins.dist-info"
    record = content.pop(f"{info}/RECORD").splitlines()
    metadata = content.pop(f"{info}/METADATA")
    assert metadata == head.replace("1.0.2", "1.0.2+without.pins").rpartition("Requires")[0] + description
    assert content == {name.replace("1.0.2.dist", "1.0.2+without.pins.dist"): text for name, text in files.items()}
    # sha256 of "x = 1\n", by sha256sum and base64
    assert "lavis/__init__.py,sha256=nia_NpkRxFwkPGhBR7I_yeHc_PJX0pmhxjIBam_NM_Q,6" in record
    assert {line.split(",")[0] for line in record} == {*content, f"{info}/METADATA", f"{info}/RECORD"}


@pytest.mark.parametrize("key", ["name", "version", "requires-python"])
def test_the_project_file_of_lavis_without_pins_says_what_its_backend_builds(key):
    text = (REPACK.parent / "pyproject.toml").read_text()
    said = {
        "name": "salesforce-lavis",
        "version": runpy.run_path(str(REPACK))["NEW_VERSION"],
        "requires-python": ">=3.12",
    }
    assert f'{key} = "{said[key]}"\n' in text
