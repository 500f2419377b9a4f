"""Two build steps that setup.cfg cannot express: the import hook's .pth file, and configs and projects in the wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

PTH = "lavis_cir_hook.pth"
# One line, because only lines that start with "import" are executed. Every start of Python runs it, that of a virtual
# environment twice, so nothing is imported until one of the three names is; silent where the package was removed.
HOOK = (
    r'import sys; exec("class LavisFinder:\n @staticmethod\n def find_spec(name, path=None, target=None):\n'
    r"  if name not in ('lavis', 'lavis.train', 'lavis.evaluate'): return None\n"
    r"  try: from lavis_cir_hook import LavisFinder\n  except ImportError: return None\n"
    r"  return LavisFinder.find_spec(name, path)\n"
    r"if not any(getattr(f, '__name__', '') == 'LavisFinder' for f in sys.meta_path):"
    r' sys.meta_path.insert(0, LavisFinder)")'
    "\n"
)


class BuildPy(build_py):
    """Add the .pth file at the root of the wheel and the YAML files inside the package."""

    def run(self):
        super().run()
        if self.editable_mode:  # the checkout's own folders are used
            return
        root = Path(self.build_lib)
        (root / PTH).write_text(HOOK)
        for folder in ("configs", "projects"):
            shutil.copytree(folder, root / "lavis_cir_plugin" / folder, dirs_exist_ok=True)


class WithHook:
    """Any of setuptools' editable strategies, plus the .pth file."""

    def __init__(self, strategy):
        self.strategy = strategy

    def __call__(self, wheel, files, mapping):
        self.strategy(wheel, files, mapping)
        wheel.writestr(PTH, HOOK)

    def __enter__(self):
        self.strategy.__enter__()
        return self

    def __exit__(self, *error):
        return self.strategy.__exit__(*error)


class EditableWheel(editable_wheel):
    """Install the .pth file in editable mode too, so that pip lists it and removes it."""

    def _select_strategy(self, *args):
        return WithHook(super()._select_strategy(*args))


setup(cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheel})
