"""Delay the import of libraries that LAVIS imports at its start and few runs use until they are used."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import LazyLoader
from types import ModuleType

_LIBRARIES = ("spacy",)
"""Names of the libraries. LAVIS only says ``import name`` for them at its start.

spacy and its imports take about a tenth of the processor time of LAVIS's import; Img2Prompt-VQA and FlanT5's
lemmatizer use it. decord cannot be deferred, because LAVIS takes ``VideoReader`` from it at once. pandas cannot be
deferred either, because other libraries ask for its attributes.
"""


class _Finder:
    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a deferred library from the other finders, with a loader that waits for the first use."""
        if fullname not in _LIBRARIES:
            return None
        found = (finder.find_spec(fullname, path) for finder in sys.meta_path if finder is not _Finder)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = LazyLoader(spec.loader)  # type: ignore[arg-type]
        return spec


@contextmanager
def deferred() -> Iterator[None]:
    """Let the libraries be imported without execution; a library is executed when its first attribute is read."""
    sys.meta_path.insert(0, _Finder)
    try:
        yield
    finally:
        sys.meta_path.remove(_Finder)
