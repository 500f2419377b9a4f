"""Hide deprecation warnings of other libraries while LAVIS is imported; users cannot act on them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, SyntaxWarning)
_AMONG_USER_WARNINGS = "pkg_resources is deprecated"  # setuptools addresses other libraries but uses UserWarning


@contextmanager
def hidden() -> Iterator[None]:
    """Hide deprecation warnings during the block; other warnings still show, and afterwards the user's filters apply.

    The block keeps filters that libraries set for their own warnings while they are imported.
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
