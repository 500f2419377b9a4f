"""Decide, from attributes alone, which garments of a gallery answer a reference with a caption: the truth rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .attributes import ATTRIBUTES, Garment
from .wording import Phrase, phrases

# These can change along with a pattern and go unmentioned.
_SILENT = ("secondary", "graphic")
_INDEXED = ("category", "colour", "pattern", "sleeve")


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
    """Find answers among many garments, in the time that the few take that resemble the target."""

    def __init__(self, garments: Sequence[Garment]) -> None:
        self.garments = garments
        self._index: dict[tuple[str, ...], dict[tuple[str, ...], list[int]]] = {}

    def answers(
        self, reference: Garment, target: Garment, caption: Sequence[Phrase], kept: Iterable[str] = ATTRIBUTES
    ) -> list[int]:
        """Return the indices of all garments that answer (`is_answer`), in ascending order.

        `target` is a garment that the caption was made for; it only shortens the search.
        """
        kept = tuple(kept)
        fixed = {"category": reference.category}
        fixed.update((name, getattr(reference, name)) for name in kept if name not in _SILENT)
        for name in _spoken_of(caption):
            fixed.pop(name, None)
        # A phrase that is no comparison holds for one value of what it speaks of.
        absolute = _spoken_of([phrase for phrase in caption if phrase.absolute])
        fixed.update((name, getattr(target, name)) for name in absolute)
        return [
            index
            for index in self._like(fixed)
            if all(getattr(self.garments[index], name) == value for name, value in fixed.items())
            and is_answer(self.garments[index], reference, caption, kept)
        ]

    def _like(self, fixed: Mapping[str, str]) -> list[int]:
        """Return the garments that have the `fixed` values of indexed attributes."""
        names = tuple(name for name in _INDEXED if name in fixed)
        if names not in self._index:
            self._index[names] = {}
            for index, garment in enumerate(self.garments):
                key = tuple(getattr(garment, name) for name in names)
                self._index[names].setdefault(key, []).append(index)
        return self._index[names].get(tuple(fixed[name] for name in names), [])
