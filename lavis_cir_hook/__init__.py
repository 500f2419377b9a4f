"""Provide ``python -m lavis.train``, let today's libraries import LAVIS, and call back when LAVIS is imported.

LAVIS releases contain neither ``lavis.train`` nor ``lavis.evaluate``, and LAVIS has no hook for plugins. The file
``lavis_cir_hook.pth`` is installed beside this package. At every interpreter start it puts a finder into
``sys.meta_path``. When one of three names is imported, that finder imports this package and asks
:class:`LavisFinder`.
"""

import os
import sys

TYPE_CHECKING = False  # typing's own flag would import typing at every interpreter start
if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_LAUNCHERS = ("lavis.train", "lavis.evaluate")
_after_lavis: "list[Callable[[], None]]" = []


class LavisFinder:
    """Meta path finder for ``lavis``, ``lavis.train`` and ``lavis.evaluate``; it ignores every other name."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec of a launcher or of LAVIS, or None if the other finders shall find the module.

        fullname: absolute module name. path: ``lavis.__path__`` if ``fullname`` is a launcher, otherwise None.
        """
        if fullname == "lavis":
            wait_passively()
            return _prepared()
        if fullname in _LAUNCHERS:
            return _launcher(fullname, path)
        return None


def install() -> None:
    """Put the finder first in ``sys.meta_path``, unless it or the finder of the .pth file is already there."""
    if not any(_is_ours(finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, LavisFinder)


def call_after_lavis(function: "Callable[[], None]") -> None:
    """Call a function at once if LAVIS has been imported, otherwise as soon as its import has ended."""
    lavis = sys.modules.get("lavis")
    if lavis is not None and not getattr(lavis.__spec__, "_initializing", False):
        from lavis_cir_hook.foreign_warnings import hidden

        with hidden():
            function()
    else:
        _after_lavis.append(function)


def import_lavis() -> None:
    """Import LAVIS if it is installed; if it is not, code that needs it raises an error later."""
    from importlib import import_module

    try:
        import_module("lavis")
    except ModuleNotFoundError as error:
        if error.name != "lavis":
            raise


def wait_passively(
    arguments: "Sequence[str] | None" = None, environment: "MutableMapping[str, str] | None" = None
) -> None:
    """Let OpenMP's threads sleep while they wait, in CPU runs of this project's commands; keep a choice of the user.

    Waiting threads spin by default. On cores that do other work they then compete with each other. OpenMP reads its
    settings once, when torch is loaded; ``python -m lavis.train`` loads torch when it imports ``lavis``.

    arguments: command line, ``sys.argv`` by default. environment: variables to change, ``os.environ`` by default.
    """
    arguments = sys.argv if arguments is None else arguments
    environment = os.environ if environment is None else environment
    if any(name in environment for name in _WAITING) or not arguments:
        return
    # While Python locates the module of -m, the first argument is "-m" itself.
    is_launcher = arguments[0] == "-m" and any(argument.startswith("--cfg-path") for argument in arguments)
    if _is_tool(arguments) or (is_launcher and _device(arguments[1:]) == "cpu"):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def _is_tool(arguments: "Sequence[str]") -> bool:
    return bool(arguments) and os.path.splitext(os.path.basename(arguments[0]))[0] == "lavis-cir"


def _device(arguments: "Sequence[str]") -> "str | None":
    """Return ``run.device`` from a command line or its project file, or None if neither sets it."""
    options = [argument for argument in arguments if argument.startswith("run.device=")]
    if options:
        return options[-1].partition("=")[2]
    path = next((word.partition("=")[2] for word in arguments if word.startswith("--cfg-path=")), None)
    if path is None and "--cfg-path" in arguments[:-1]:
        path = arguments[arguments.index("--cfg-path") + 1]
    if path is None:
        return None
    import re

    for place in (os.path.expanduser(path), *_shipped(path)):
        try:
            with open(place, encoding="utf-8") as file:
                found = re.search(r"""(?:^|[\s{,])device:\s*["']?(\w+)""", file.read())
        except (OSError, ValueError):
            continue
        return found[1] if found else None
    return None


def _shipped(path: str) -> "list[str]":
    """Return the possible paths of a project file of this package: inside it in a wheel, beside it in a checkout."""
    from importlib.util import find_spec

    plugin = find_spec("lavis_cir_plugin") if path.startswith("projects") else None
    folders = list(plugin.submodule_search_locations or ()) if plugin else []
    return [os.path.join(place, path) for folder in folders for place in (folder, os.path.dirname(folder))]


def _prepared() -> "ModuleSpec | None":
    """Return LAVIS's spec, whose first import also runs the compatibility code and the functions that wait for it."""
    spec = _found_elsewhere("lavis", None)
    if spec is None and sys.version_info >= (3, 12) and (sys.argv[:1] == ["-m"] or _is_tool(sys.argv)):
        raise ModuleNotFoundError(
            f"LAVIS is not installed, and Python {sys.version_info[0]}.{sys.version_info[1]} has no wheels of the "
            f"versions that it pins; run: {sys.executable} -m pip install --no-deps salesforce-lavis==1.0.2",
            name="lavis",
        )
    if spec is None or spec.loader is None:
        return None
    from lavis_cir_hook import compat
    from lavis_cir_hook.deferred import deferred
    from lavis_cir_hook.foreign_warnings import hidden

    with hidden():
        needs_completion = compat.apply()
    execute = spec.loader.exec_module

    def execute_and_complete(module: "ModuleType") -> None:
        with hidden():
            with deferred():
                execute(module)
            if needs_completion:
                compat.complete()
            while _after_lavis:
                _after_lavis.pop(0)()

    spec.loader.exec_module = execute_and_complete  # type: ignore[method-assign]
    return spec


def _launcher(fullname: str, path: "Sequence[str] | None") -> "ModuleSpec | None":
    """Find this project's ``train.py`` or ``evaluate.py`` under LAVIS's name, unless LAVIS has such a module."""
    from importlib.util import find_spec, spec_from_file_location

    if _found_elsewhere(fullname, path):
        import lavis_cir_plugin  # noqa: F401  LAVIS's own launcher must know this project's entries too

        return None
    plugin = find_spec("lavis_cir_plugin")  # a top-level name is located without an import
    if plugin is None or not plugin.submodule_search_locations:
        return None
    folder = next(iter(plugin.submodule_search_locations))
    return spec_from_file_location(fullname, f"{folder}/{fullname.rpartition('.')[2]}.py")


def _found_elsewhere(fullname: str, path: "Sequence[str] | None") -> "ModuleSpec | None":
    found = (finder.find_spec(fullname, path) for finder in sys.meta_path if not _is_ours(finder))
    return next((spec for spec in found if spec is not None), None)


def _is_ours(finder: object) -> bool:
    return getattr(finder, "__name__", None) == LavisFinder.__name__
