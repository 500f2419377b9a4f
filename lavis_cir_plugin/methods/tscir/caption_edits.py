"""Edits of captions, learnt from captions: which phrases can replace each other, and how a text says so.

The module needs no dictionary and no parser. Two phrases can be exchanged if other captions have both of them between
the same two words. Phrases that describe one picture ("grey" and "gray", "a belt" and "long sleeves") must not be
exchanged; the several captions of a picture show which these are. Only English function words and the templates of the
modification texts are written down here.
"""

from __future__ import annotations

import itertools
import random
import re
from bisect import bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LONGEST_EXCHANGE, LONGEST_PHRASE = 2, 4
"""Largest number of words of an exchanged phrase (without its article), and of an added or dropped one (with all)."""

LEAST_CONTEXTS = 2
"""Smallest number of pairs of neighbours that two exchangeable phrases share."""

LEAST_SHARE = 0.2
"""Smallest share of either phrase's occurrences that have neighbours which the other phrase has too."""

LARGEST_LIFT = 0.25
"""Largest number of pictures described by both phrases, relative to the number for independent phrases."""

LEAST_EXPECTED = 2.0
"""Smallest number of pictures that independent phrases would share for the comparison to have a meaning."""

FEW_FOLLOWERS, FEW_MODIFIED = 2.5, 4.0
"""Numbers of next words (exponential of their entropy). A word with at most the first number says nothing without the
next word ("short sleeves"); a word with at most the second one changes the meaning of the next word ("dark red")."""

MOST_ATTEMPTS = 20
"""Largest number of exchanges that are tried for a picture."""

ARTICLES = ("a", "the")
JOINERS = ("and", "with")
# fmt: off
FUNCTION_WORDS = frozenset((
    *ARTICLES, *JOINERS,
    "about", "above", "across", "after", "against", "along", "among", "around", "as", "at", "behind", "below",
    "beside", "between", "but", "by", "down", "for", "from", "in", "inside", "into", "is", "are", "it", "its",
    "near", "next", "of", "off", "on", "onto", "or", "out", "over", "that", "their", "there", "this", "through",
    "to", "toward", "towards", "under", "up", "upon", "was", "were", "while", "who", "which",
))
# fmt: on

EMPTY = 0
"""Number of the phrase without words. An exchange with it adds or drops a phrase."""

_TOKEN = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*|[^\w\s]")
_BEFORE_VOWEL = re.compile(r"^a (?=hour|honest|heir|(?!eu|ewe|onc?e\b|u\b|uni(?![dmnr])|us[aeu]|ut[aeio])[aeiou])")
"""The article of a word that begins with the sound of a vowel, as "hour" does and "uniform" does not."""

_BOUNDARY = 0
_Array = Any  # a numpy array; its type parameters differ between numpy's versions


def caption_words(caption: str) -> list[str]:
    """Return the lower-case words of a caption with "a" for "an"; an empty text stands for punctuation."""
    found = [token if token[0].isalnum() else "" for token in _TOKEN.findall(caption.lower())]
    return ["a" if token == "an" else token for token in found]


def normalised_caption(caption: str) -> str:
    """Return a caption's words, as `caption_words` reads them, joiners by blanks without punctuation."""
    return " ".join(token for token in caption_words(caption) if token)


@dataclass(frozen=True)
class CaptionEdit:
    """One edit of one caption.

    Attributes:
        image: Number of the picture that the caption belongs to.
        row: Number of the caption.
        edited: Caption after the edit, in the form of `normalised_caption`.
        old: Phrase that the edit removes; empty if it only adds one.
        new: Phrase that the edit inserts; empty if it only drops one.
        holder: Argument of `Phrases.rows_holding` that finds the captions with the result of the edit.
        text: Modification text.
    """

    image: int
    row: int
    edited: str
    old: str
    new: str
    holder: tuple[int, int]
    text: str


class Phrases:
    """The phrases of a set of captions, and which of them can replace each other.

    A phrase stands in the slot (l, r) if the words l and r are its neighbours. Two phrases are exchangeable if

    * they share `LEAST_CONTEXTS` slots with `LEAST_SHARE` of the occurrences of each phrase,
    * neither contains the words of the other, and no word of one is a form of a word of the other, and
    * they exclude each other: among the pictures with several captions that have one slot, at most `LARGEST_LIFT` of
      the number for independent phrases have both phrases in it. (Synonyms have more, and so have two details that
      captions mention now and then.) If there are too few such captions, captions with both phrases are counted.

    The results depend neither on random numbers nor on the order of threads.
    """

    def __init__(self, captions: Sequence[str], images: Sequence[int]) -> None:
        """Read all captions.

        Args:
            captions: Captions, one per row.
            images: Number of each row's picture, from 0.
        """
        self.rows = [caption_words(caption) for caption in captions]
        self.images = np.asarray(images, dtype=np.int64)
        self._rows_of_image: dict[int, list[int]] = defaultdict(list)
        for number, image in enumerate(self.images.tolist()):
            self._rows_of_image[image].append(number)
        self._numbers = numbers = {"": _BOUNDARY}
        flat, starts = [_BOUNDARY], []
        for row in self.rows:
            starts.append(len(flat))
            flat.extend(numbers.setdefault(token, len(numbers)) for token in row)
            flat.append(_BOUNDARY)
        self._words = list(numbers)
        self._flat, self._starts = np.array(flat, dtype=np.int64), np.array([*starts, len(flat)], dtype=np.int64)
        self._find_bound_words()
        self._find_phrases()
        self._known: dict[tuple[int, int], bool] = {}

    def rows_holding(self, holder: tuple[int, int]) -> _Array:
        """Return the rows with a phrase, for (phrase, -1), or with an empty slot, for (0, slot), in ascending order."""
        phrase, slot = holder
        if phrase != EMPTY:
            chosen = self._by_phrase[self._phrase_starts[phrase] : self._phrase_starts[phrase + 1]]
            return np.unique(self._row[chosen])
        pair = self._pair(slot, EMPTY)
        return np.unique(self._row_by_pair[self._pair_starts[pair] : self._pair_starts[pair + 1]])

    def draw(self, image: int, rng: random.Random) -> CaptionEdit | None:
        """Draw an edit of a caption of a picture, or return ``None`` if no attempt found one."""
        for _ in range(MOST_ATTEMPTS):
            row = rng.choice(self._rows_of_image[image])
            first, last = self._row_starts[row], self._row_starts[row + 1]
            if first == last:
                continue
            place = int(rng.randrange(first, last))
            old, slot = int(self._phrase[place]), int(self._slot[place])
            new = self._draw_filler(slot, rng)
            if new != old and self.exchangeable(old, new):
                edit = self._edit(image, row, place, new, rng)
                if edit is not None:
                    return edit
        return None

    def exchangeable(self, old: int, new: int) -> bool:
        """Return whether two phrases can replace each other, by the rules of the class."""
        key = (min(old, new), max(old, new))
        if key not in self._known:
            self._known[key] = not self._are_rewordings(*key) and self._share_contexts(*key)
        return self._known[key]

    def number(self, phrase: str) -> int:
        """Return the number of a phrase that several captions have; "" has the number `EMPTY`.

        Raises:
            ValueError: If there is no such phrase.
        """
        return self._texts.index(tuple(phrase.split()))

    # -- phrases and slots of the captions -------------------------------------------------------------------------

    def _find_bound_words(self) -> None:
        """Mark the words that are followed by few different words, nearly all of them content words."""
        left, right = self._flat[:-1], self._flat[1:]
        size = len(self._words)
        pairs, counts = np.unique(left * size + right, return_counts=True)
        left, right = pairs // size, pairs % size
        self._is_function = np.array([word == "" or word in FUNCTION_WORDS for word in self._words])
        totals = np.bincount(left, counts, size)
        share = counts / totals[left]
        entropy = np.bincount(left, -share * np.log(share), size)
        loose = np.bincount(left, share * self._is_function[right], size)
        self._is_participle = self._participles(left, right, counts) & (loose >= 0.5)
        loose += np.bincount(left, share * self._is_participle[right], size)
        self._is_tied = tied = (loose < 0.2) & ~self._is_function & (totals > 0)
        self._needs_next = tied & (np.exp(entropy) <= FEW_FOLLOWERS)
        self._modifies_next = tied & (np.exp(entropy) <= FEW_MODIFIED)

    def _participles(self, left: _Array, right: _Array, counts: _Array) -> _Array:
        """Return a mask of the words in -ing that hardly follow an article, as a noun ("a building") does."""
        size = len(self._words)
        articles = np.array([word in ARTICLES for word in self._words])
        has_ending = np.array([len(word) > 4 and word.endswith("ing") for word in self._words])
        share = np.bincount(right, counts * articles[left], size) / np.bincount(right, counts, size).clip(1)
        return has_ending & (share < 0.1)

    def _find_phrases(self) -> None:
        """Number the phrases and the slots, and list every occurrence of a phrase in a slot."""
        flat, size = self._flat, len(self._words)
        row_of = np.repeat(np.arange(len(self.rows)), np.diff(self._starts))  # the rows of flat[1:]
        row_of = np.concatenate([[0], row_of])
        joins = np.array([word in JOINERS for word in self._words])
        articles = np.array([word in ARTICLES for word in self._words])
        content = ~self._is_function
        self._texts: list[tuple[str, ...]] = [()]
        here = np.arange(1, len(flat))
        gaps = here[(flat[here - 1] != _BOUNDARY) | (flat[here] != _BOUNDARY)]
        found = [(gaps, np.zeros(len(gaps), dtype=np.int64), 0)]
        place = here[
            (flat[here] != _BOUNDARY) & (~self._is_function[flat[here]] | articles[flat[here]] | joins[flat[here]])
        ]
        prefix = np.zeros(len(place), dtype=np.int64)
        for length in range(1, LONGEST_PHRASE + 1):
            last = flat[place + length - 1]
            # A phrase has function words only at its start: "a belt", "and buttons", "with a belt".
            longest = np.where(joins[flat[place]], LONGEST_PHRASE, LONGEST_EXCHANGE + articles[flat[place]])
            keep = (length == 1) | content[last] | ((length == 2) & articles[last] & joins[flat[place]])
            keep &= (last != _BOUNDARY) & (length <= longest)
            place, prefix, last = place[keep], prefix[keep], last[keep]
            _, first, prefix, counts = np.unique(
                prefix * size + last, return_index=True, return_inverse=True, return_counts=True
            )
            keep = counts[prefix] > 1  # a longer phrase is never more frequent than its beginning
            ends = keep & ~self._is_function[last]
            numbers = np.full(len(counts), -1)
            kept = np.flatnonzero((counts > 1) & ~self._is_function[last[first]])
            numbers[kept] = len(self._texts) + np.arange(len(kept))
            starts = place[first[kept]].tolist()
            self._texts.extend(tuple(self._words[w] for w in flat[s : s + length].tolist()) for s in starts)
            found.append((place[ends], numbers[prefix[ends]], length))
            place, prefix = place[keep], prefix[keep]
        places = np.concatenate([place for place, _, _ in found])
        phrases = np.concatenate([phrase for _, phrase, _ in found])
        lengths = np.concatenate([np.full(len(place), length) for place, _, length in found])
        left, right = flat[places - 1], flat[places + lengths]
        keep = (left != _BOUNDARY) | (right != _BOUNDARY)
        places, phrases, lengths = places[keep], phrases[keep], lengths[keep]
        slots = np.unique(left[keep] * size + right[keep], return_inverse=True)[1].reshape(-1)
        self._index(places, phrases, lengths, slots, row_of)

    def _index(self, places: _Array, phrases: _Array, lengths: _Array, slots: _Array, row_of: _Array) -> None:
        count = len(self._texts)
        # A slot with a single phrase shows no exchange.
        pairs = np.unique(slots * count + phrases)
        fillers = np.bincount(pairs // count, minlength=int(slots.max(initial=0)) + 1)
        keep = fillers[slots] > 1
        places, phrases, lengths, slots = places[keep], phrases[keep], lengths[keep], slots[keep]
        slots = np.unique(slots, return_inverse=True)[1].reshape(-1)
        order = np.argsort(places, kind="stable")
        self._place, self._phrase, self._length, self._slot = (
            array[order] for array in (places, phrases, lengths, slots)
        )
        self._row = row_of[self._place]
        self._row_starts = np.searchsorted(self._row, np.arange(len(self.rows) + 1)).tolist()
        self._by_phrase = np.argsort(self._phrase, kind="stable")
        self._phrase_starts = np.searchsorted(self._phrase[self._by_phrase], np.arange(count + 1))
        key = self._slot * count + self._phrase
        self._pairs, pair_of, self._pair_counts = np.unique(key, return_inverse=True, return_counts=True)
        pair_of = pair_of.reshape(-1)
        by_pair = np.argsort(pair_of, kind="stable")
        self._row_by_pair = self._row[by_pair]
        self._pair_starts = np.concatenate([[0], np.cumsum(self._pair_counts)])
        pair_slots, pair_phrases = self._pairs // count, self._pairs % count
        self._slot_starts = np.searchsorted(pair_slots, np.arange(int(pair_slots.max(initial=-1)) + 2))
        self._fillers = pair_phrases
        self._weights = np.sqrt(self._pair_counts).cumsum()  # between equal weights of phrases and of occurrences
        order = np.argsort(pair_phrases, kind="stable")
        self._slots_of = (pair_slots[order], self._pair_counts[order])
        self._slots_of_starts = np.searchsorted(pair_phrases[order], np.arange(count + 1))
        self._find_pictures(pair_phrases[order] * len(self._slot_starts) + pair_slots[order])

    def _find_pictures(self, by_phrase: _Array) -> None:
        """List, for each phrase, its pairs (slot, picture) among pictures with several captions that fill the slot.

        ``by_phrase`` holds phrase and slot of all pairs in ascending order.
        """
        size, num_slots = int(self.images.max(initial=0)) + 1, len(self._slot_starts)
        filled = np.unique(self._slot * len(self.rows) + self._row)
        several, counts = np.unique(
            filled // max(1, len(self.rows)) * size + self.images[filled % max(1, len(self.rows))], return_counts=True
        )
        several = several[counts > 1]
        keep = _is_in(self._slot * size + self.images[self._row], several)
        slots, phrases, images = self._slot[keep], self._phrase[keep], self.images[self._row[keep]]
        keys = np.unique(np.searchsorted(by_phrase, phrases * num_slots + slots) * size + images)
        pairs = keys // size
        self._pictures = self._slots_of[0][pairs] * size + keys % size
        self._picture_starts = np.searchsorted(pairs, self._slots_of_starts)
        self._pair_pictures = np.bincount(pairs, minlength=len(by_phrase))
        self._slot_pictures = np.bincount(several // size, minlength=num_slots)

    # -- exchanges -------------------------------------------------------------------------------------------------

    def _draw_filler(self, slot: int, rng: random.Random) -> int:
        first, last = int(self._slot_starts[slot]), int(self._slot_starts[slot + 1])
        below = float(self._weights[first - 1]) if first else 0.0
        drawn = below + rng.random() * (float(self._weights[last - 1]) - below)
        return int(self._fillers[min(bisect(self._weights, drawn, first, last), last - 1)])

    def _pair(self, slot: int, phrase: int) -> int:
        return int(np.searchsorted(self._pairs, slot * len(self._texts) + phrase))

    def _are_rewordings(self, one: int, other: int) -> bool:
        """Return whether two phrases have similar words, or are phrases of different kinds."""
        first, second = self._texts[one], self._texts[other]
        if one == EMPTY:
            return second[0] in ARTICLES  # such a phrase lacks the word that joins it to the sentence
        if first[0] in JOINERS or second[0] in JOINERS:
            return True
        if (first[0] in ARTICLES) != (second[0] in ARTICLES):
            return True
        return _is_rewording(first, second)

    def _share_contexts(self, one: int, other: int) -> bool:
        (slots, counts), starts = self._slots_of, self._slots_of_starts
        ranges = [slice(starts[phrase], starts[phrase + 1]) for phrase in (one, other)]
        short, long = sorted((slots[part] for part in ranges), key=len)
        shared = short[_is_in(short, long)]
        if len(shared) < LEAST_CONTEXTS:
            return False
        places = [part.start + np.searchsorted(slots[part], shared) for part in ranges]
        shares = [counts[place].sum() / counts[part].sum() for place, part in zip(places, ranges)]
        # The empty phrase stands between any two neighbouring words, so no share of its occurrences is required.
        if min(shares if one != EMPTY else shares[1:]) < LEAST_SHARE:
            return False
        mine, others = (self._pictures[self._picture_starts[p] : self._picture_starts[p + 1]] for p in (one, other))
        both = int(_is_in(mine, others).sum())
        pictures = [self._pair_pictures[place] for place in places]
        expected = float((pictures[0] * pictures[1] / self._slot_pictures[shared].clip(1)).sum())
        if max(both, expected) < LEAST_EXPECTED and one != EMPTY:
            rows, other_rows = self.rows_holding((one, -1)), self.rows_holding((other, -1))
            both, expected = int(_is_in(rows, other_rows).sum()), len(rows) * len(other_rows) / len(self.rows)
        return max(both, expected) < LEAST_EXPECTED or both <= LARGEST_LIFT * expected

    # -- words -----------------------------------------------------------------------------------------------------

    def _edit(self, image: int, row: int, place: int, new: int, rng: random.Random) -> CaptionEdit | None:
        """Return the edit, or ``None`` if it says nothing new or would leave a part of the dropped phrase.

        Both phrases of the text are extended by the words that they need for a meaning, and nouns by all words before
        them.
        """
        words, start = self.rows[row], int(self._place[place] - self._starts[row])
        end = start + int(self._length[place])
        before, old, put, after = words[:start], words[start:end], list(self._texts[new]), words[end:]
        edited = " ".join(word for word in (*before, *put, *after) if word)
        joiners = [phrase[0] for phrase in (old, put) if phrase and phrase[0] in JOINERS]
        kind = _phrase_role([*before, *joiners])
        shown = [phrase[1:] if joiners and phrase else phrase for phrase in (old, put)]
        while after and not self._ends_phrases(shown, after[0]) and (kind != "subject" or self._is_unfinished(shown)):
            if not put:
                return None
            shown, after = [[*phrase, after[0]] if phrase else phrase for phrase in shown], after[1:]
        is_noun = not after or self._ends_phrases(shown, after[0])
        while before and not joiners and put and not _is_function_word(before[-1]):
            if not is_noun and not (old and self._modifies_next[self._numbers[before[-1]]]):
                break
            shown, before = [[before[-1], *phrase] if phrase else phrase for phrase in shown], before[:-1]
        if not is_noun:
            shown = [phrase[1:] if phrase and phrase[0] in ARTICLES else phrase for phrase in shown]
        if old and put and _is_rewording(*shown):
            return None
        old_text, new_text = (" ".join(phrase) for phrase in shown)
        article = f"{before[-1]} " if is_noun and not joiners and before and before[-1] in ARTICLES else ""
        text = _modification_text(
            _with_article(article, old_text), _with_article(article, new_text), kind, is_noun, rng
        )
        holder = (new, -1) if new != EMPTY else (EMPTY, int(self._slot[place]))
        return CaptionEdit(image, row, edited, old_text, new_text, holder, text)

    def _ends_phrases(self, shown: Sequence[Sequence[str]], following: str) -> bool:
        """Return whether phrases end before a word: a function word, or a participle after nouns ("a dog sitting")."""
        if _is_function_word(following) or not self._is_participle[self._numbers[following]]:
            return _is_function_word(following)
        return not any(phrase and self._is_tied[self._numbers[phrase[-1]]] for phrase in shown)

    def _is_unfinished(self, shown: Sequence[Sequence[str]]) -> bool:
        return any(phrase and self._needs_next[self._numbers[phrase[-1]]] for phrase in shown)


def _is_function_word(word: str) -> bool:
    return word == "" or word in FUNCTION_WORDS


def _is_in(values: _Array, ascending: _Array) -> _Array:
    """Return a mask of the values that occur in an ascending array."""
    if not len(ascending):
        return np.zeros(len(values), dtype=bool)
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[places] == values


def _is_rewording(one: Sequence[str], other: Sequence[str]) -> bool:
    """Return whether one phrase contains all words of the other, or two different words are forms of one word."""
    mine, others = [word for word in one if word not in other], [word for word in other if word not in one]
    return not mine or not others or any(_same_word(a, b) for a, b in itertools.product(mine, others))


def _same_word(one: str, other: str) -> bool:
    """Return whether two words look like forms or spellings of one word."""
    short, long = sorted((one, other), key=len)
    if len(short) < 4:
        return False
    prefix = next((k for k, (a, b) in enumerate(zip(short, long)) if a != b), len(short))
    if prefix >= 4 and prefix >= 0.5 * len(long):
        return True
    return len(short) == len(long) and sum(a != b for a, b in zip(short, long)) == 1


# -- templates -------------------------------------------------------------------------------------------------------

_ANY = ("{new} instead of {old}", "{new} rather than {old}", "change {old} to {new}")
_REPLACE = {
    "adjective": ("is {new}", "is {new} instead of {old}", "is {new} rather than {old}", "make it {new}", *_ANY),
    "subject": ("is {new} instead of {old}", "is {new} rather than {old}", "is {new}, not {old}", *_ANY),
    "part": ("has {new}", "has {new} instead of {old}", "has {new} rather than {old}", "with {new}", *_ANY),
    "other": ("{new}, not {old}", "replace {old} with {new}", "show {new} instead of {old}", *_ANY),
}
_ADD = {
    "adjective": ("is {new}", "make it {new}", "is also {new}"),
    "subject": ("is {new}", "make it {new}"),
    "part": ("has {new}", "with {new}", "add {new}", "also has {new}"),
    "other": ("with {new}", "add {new}"),
}
_DROP = {
    "adjective": ("is not {old}", "make it not {old}", "no longer {old}"),
    "subject": ("is not {old}", "make it not {old}"),
    "part": ("without {old}", "has no {bare}", "remove {the}", "no {bare}"),
    "other": ("without {old}", "remove {the}", "no {bare}"),
}


def _phrase_role(before: Sequence[str]) -> str:
    """Return the role that the words before a phrase give it: ``subject`` of the caption, ``part`` of it, ``other``."""
    segment = before[len(before) - 1 - before[::-1].index("") + 1 :] if "" in before else before
    functions = [word for word in segment if word in FUNCTION_WORDS and word not in ARTICLES]
    while functions and functions[-1] == "and":
        functions.pop()
    if not functions:
        return "other" if any(word in ARTICLES for word in segment[1:]) or "" in before else "subject"
    return "part" if functions[-1] == "with" else "other"


def _with_article(article: str, phrase: str) -> str:
    return _an(article + phrase) if phrase and phrase.split()[0] not in ARTICLES else _an(phrase)


def _an(text: str) -> str:
    return _BEFORE_VOWEL.sub("an ", text)


def _modification_text(old: str, new: str, kind: str, is_noun: bool, rng: random.Random) -> str:
    templates = _REPLACE if old and new else _ADD if new else _DROP
    chosen = "adjective" if kind == "subject" and not is_noun else kind
    bare = re.sub("^(an?|the) ", "", old)
    return rng.choice(templates[chosen]).format(old=old, new=new, bare=bare, the=f"the {bare}")
