"""Decide by attributes which garments of a gallery answer a reference with a caption."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .attributes import ATTRIBUTES, Garment
from .wording import Phrase, phrases

# These attributes can change along with a pattern without a mention in the caption.
_OFTEN_UNMENTIONED = ("secondary", "graphic")
_INDEXED_ATTRIBUTES = ("category", "colour", "pattern", "sleeve")


def is_answer(
    candidate: Garment, reference: Garment, caption: Sequence[Phrase], kept: Iterable[str] = ATTRIBUTES
) -> bool:
    """Return whether a candidate answers a reference with a caption.

    A candidate answers if three things hold. It has the reference's category. Everything in the caption is true of it:
    `phrases` lists each phrase of the caption for the reference and the candidate. No attribute in `kept` has changed
    that a caption can mention and this caption does not. A reference never answers itself.
    """
    if candidate.category != reference.category:
        return False
    said = phrases(reference, candidate)
    true = {(phrase.verb, phrase.text) for options in said.values() for phrase in options}
    mentioned = _mentioned(caption)
    return all((phrase.verb, phrase.text) in true for phrase in caption) and not any(
        name in said and name not in mentioned for name in kept
    )


def _mentioned(caption: Iterable[Phrase]) -> set[str]:
    return {name for phrase in caption for name in phrase.covers}


class Gallery:
    """Find answers among many garments; an index limits the search to garments that resemble the target."""

    def __init__(self, garments: Sequence[Garment]) -> None:
        self.garments = garments
        self._index: dict[tuple[str, ...], dict[tuple[str, ...], list[int]]] = {}

    def answers(
        self, reference: Garment, target: Garment, caption: Sequence[Phrase], kept: Iterable[str] = ATTRIBUTES
    ) -> list[int]:
        """Return the indices of all garments that answer (`is_answer`), in ascending order.

        `target` is a garment for which the caption was written. It only speeds up the search.
        """
        kept = tuple(kept)
        fixed = {"category": reference.category}
        fixed.update((name, getattr(reference, name)) for name in kept if name not in _OFTEN_UNMENTIONED)
        for name in _mentioned(caption):
            fixed.pop(name, None)
        # A phrase that is not a comparison holds for exactly one value of each attribute that it mentions.
        absolute = _mentioned([phrase for phrase in caption if phrase.absolute])
        fixed.update((name, getattr(target, name)) for name in absolute)
        return [
            index
            for index in self._with_values(fixed)
            if all(getattr(self.garments[index], name) == value for name, value in fixed.items())
            and is_answer(self.garments[index], reference, caption, kept)
        ]

    def _with_values(self, fixed: Mapping[str, str]) -> list[int]:
        """Return the indices of garments that have the values in `fixed`, as far as attributes are indexed."""
        names = tuple(name for name in _INDEXED_ATTRIBUTES if name in fixed)
        if names not in self._index:
            self._index[names] = {}
            for index, garment in enumerate(self.garments):
                key = tuple(getattr(garment, name) for name in names)
                self._index[names].setdefault(key, []).append(index)
        return self._index[names].get(tuple(fixed[name] for name in names), [])
