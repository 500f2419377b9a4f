"""Make ``python -m lavis.train`` exist, let today's libraries import LAVIS, and tell who waits for LAVIS's import.

No LAVIS release ships the two modules and LAVIS has no hook for plugins. ``lavis_cir_hook.pth``, installed beside this
package, puts a finder into ``sys.meta_path`` at every interpreter start, which imports this package, and asks
:class:`LavisFinder`, only when one of three names is imported.
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
    """Meta path finder for ``lavis``, ``lavis.train`` and ``lavis.evaluate``; it declines every other name."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the launcher's spec, LAVIS's own to be completed, or None to let the import go its usual way.

        fullname: absolute module name. path: ``lavis.__path__`` when ``fullname`` is a launcher, else None.
        """
        if fullname == "lavis":
            wait_passively()
            return _prepared()
        if fullname in _LAUNCHERS:
            return _launcher(fullname, path)
        return None


def install() -> None:
    """Put the finder first in ``sys.meta_path``, unless it or the one of the .pth file is there."""
    if not any(_is_ours(finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, LavisFinder)


def call_after_lavis(function: "Callable[[], None]") -> None:
    """Call a function at once if LAVIS has been imported, otherwise when it is; never while it is being imported."""
    lavis = sys.modules.get("lavis")
    if lavis is not None and not getattr(lavis.__spec__, "_initializing", False):
        from lavis_cir_hook.foreign_warnings import hidden

        with hidden():
            function()
    else:
        _after_lavis.append(function)


def import_lavis() -> None:
    """Import LAVIS if it is installed; without it, what needs it raises where it is used."""
    from importlib import import_module

    try:
        import_module("lavis")
    except ModuleNotFoundError as error:
        if error.name != "lavis":
            raise


def wait_passively(
    arguments: "Sequence[str] | None" = None, environment: "MutableMapping[str, str] | None" = None
) -> None:
    """Let OpenMP's threads sleep while they wait, in a CPU run of this project's commands; the user's own choice stays.

    Waiting threads spin otherwise, and on cores that do other work they spin against each other. OpenMP reads its
    settings once, when torch is loaded: under ``python -m lavis.train`` that is when ``lavis`` is imported.

    arguments: the command line, ``sys.argv`` by default. environment: what to change, ``os.environ`` by default.
    """
    arguments = sys.argv if arguments is None else arguments
    environment = os.environ if environment is None else environment
    if any(name in environment for name in _WAITING) or not arguments:
        return
    # While the module of -m is being located, the first argument is "-m" itself.
    is_launcher = arguments[0] == "-m" and any(argument.startswith("--cfg-path") for argument in arguments)
    is_tool = os.path.splitext(os.path.basename(arguments[0]))[0] == "lavis-cir"
    if is_tool or (is_launcher and _device(arguments[1:]) == "cpu"):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def _device(arguments: "Sequence[str]") -> "str | None":
    """Return ``run.device`` as a command line and its project file have it; None where neither names one."""
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
    """Return where a project of this package may lie: inside it in a wheel, beside it in a checkout."""
    from importlib.util import find_spec

    plugin = find_spec("lavis_cir_plugin") if path.startswith("projects") else None
    folders = list(plugin.submodule_search_locations or ()) if plugin else []
    return [os.path.join(place, path) for folder in folders for place in (folder, os.path.dirname(folder))]


def _prepared() -> "ModuleSpec | None":
    """Let LAVIS's first import begin and end with what the compatibility module does, then with who waits for it."""
    spec = _found_elsewhere("lavis", None)
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
    """Find this project's ``train.py`` or ``evaluate.py`` under LAVIS's name; a module of LAVIS's own wins."""
    from importlib.util import find_spec, spec_from_file_location

    if _found_elsewhere(fullname, path):
        import lavis_cir_plugin  # noqa: F401  LAVIS's own launcher must know this project's entries too

        return None
    plugin = find_spec("lavis_cir_plugin")  # a top-level name: located, not imported
    if plugin is None or not plugin.submodule_search_locations:
        return None
    folder = next(iter(plugin.submodule_search_locations))
    return spec_from_file_location(fullname, f"{folder}/{fullname.rpartition('.')[2]}.py")


def _found_elsewhere(fullname: str, path: "Sequence[str] | None") -> "ModuleSpec | None":
    found = (finder.find_spec(fullname, path) for finder in sys.meta_path if not _is_ours(finder))
    return next((spec for spec in found if spec is not None), None)


def _is_ours(finder: object) -> bool:
    return getattr(finder, "__name__", None) == LavisFinder.__name__
