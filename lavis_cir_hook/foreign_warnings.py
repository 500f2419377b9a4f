"""Hide what libraries warn each other of while LAVIS is imported; users can do nothing about it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, SyntaxWarning)
_AMONG_USER_WARNINGS = "pkg_resources is deprecated"  # setuptools means other libraries and calls it a UserWarning


@contextmanager
def hidden() -> Iterator[None]:
    """Hide deprecations for a while; every other warning shows, and afterwards all do as the user has set it.

    The filters that libraries set for their own warnings while they are imported are kept.
    """
    with warnings.catch_warnings():
        for category in _CATEGORIES:
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", _AMONG_USER_WARNINGS, UserWarning)
        known = list(warnings.filters)
        yield
        added = [entry for entry in warnings.filters if entry not in known]
    for action, message, kind, module, line in reversed(added):
        warnings.filterwarnings(action, _text(message), kind, _text(module), line)  # type: ignore[arg-type]


def _text(pattern: re.Pattern[str] | str | None) -> str:
    return pattern.pattern if isinstance(pattern, re.Pattern) else pattern or ""
