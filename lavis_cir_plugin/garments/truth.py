"""Decide, from attributes alone, which garments of a gallery answer a reference with a caption: the truth rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .attributes import ATTRIBUTES, Garment
from .wording import Phrase, phrases

_SILENT = ("secondary", "graphic")
"""Attributes that can change without anybody mentioning it, along with a pattern; see `phrases`."""


def is_answer(
    candidate: Garment, reference: Garment, caption: Sequence[Phrase], kept: Iterable[str] = ATTRIBUTES
) -> bool:
    """Tell whether a candidate answers a reference with a caption.

    It does if it has the reference's category, everything that the caption says is true of it (`phrases` offers each
    of the caption's phrases for the pair of reference and candidate), and of the attributes in `kept` none has changed
    that the caption does not speak of and that could be spoken of. A reference never answers itself.
    """
    if candidate.category != reference.category:
        return False
    said = phrases(reference, candidate)
    true = {(phrase.verb, phrase.text) for options in said.values() for phrase in options}
    spoken_of = _spoken_of(caption)
    return all((phrase.verb, phrase.text) in true for phrase in caption) and not any(
        name in said and name not in spoken_of for name in kept
    )


def _spoken_of(caption: Iterable[Phrase]) -> set[str]:
    return {name for phrase in caption for name in phrase.covers}


class Gallery:
    """Find answers among many garments, in the time that the few take that resemble the reference."""

    def __init__(self, garments: Sequence[Garment]) -> None:
        self.garments = garments
        self._alike: dict[tuple[str, ...], dict[tuple[str, ...], list[int]]] = {}

    def answers(self, reference: Garment, caption: Sequence[Phrase], kept: Iterable[str] = ATTRIBUTES) -> list[int]:
        """Return the indices of all garments that answer (`is_answer`), in ascending order."""
        kept = tuple(kept)
        spoken_of = _spoken_of(caption)
        same = ("category", *(name for name in kept if name not in spoken_of and name not in _SILENT))
        if same not in self._alike:
            self._alike[same] = {}
            for index, garment in enumerate(self.garments):
                self._alike[same].setdefault(_values(garment, same), []).append(index)
        alike = self._alike[same].get(_values(reference, same), [])
        return [index for index in alike if is_answer(self.garments[index], reference, caption, kept)]


def _values(garment: Garment, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(getattr(garment, name) for name in names)
