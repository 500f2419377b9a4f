"""Write captions in FashionIQ's style for the difference of two garments, and descriptions of one garment.

Every phrase is true of the target and not of the reference, or is a true comparison of the two. In the tables `{}`
stands for the words of a value. A phrase is either an "is" phrase (an adjective) or a "has" phrase (a noun), so any two
phrases can be combined.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .attributes import FITS, LENGTHS, NECKLINES, SLEEVES, Garment, changed, chroma, lightness

_COLOUR_WORDS: Mapping[str, tuple[str, ...]] = {
    "red": ("red", "bright red"),
    "orange": ("orange",),
    "yellow": ("yellow", "bright yellow"),
    "green": ("green",),
    "teal": ("teal", "turquoise"),
    "light blue": ("light blue", "pale blue", "baby blue"),
    "blue": ("blue", "royal blue"),
    "navy": ("navy", "navy blue", "dark blue"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "light pink"),
    "burgundy": ("burgundy", "dark red", "maroon"),
    "brown": ("brown", "dark brown"),
    "beige": ("beige", "cream", "tan"),
    "gray": ("gray", "grey"),
    "black": ("black",),
    "white": ("white",),
}
_PATTERN_ADJECTIVES: Mapping[str, tuple[str, ...]] = {
    "solid": ("solid", "plain", "one color"),
    "stripes": ("striped", "horizontally striped"),
    "vertical stripes": ("vertically striped", "pinstriped"),
    "dots": ("polka dotted", "dotted", "spotted"),
    "plaid": ("plaid", "checkered"),
    "floral": ("floral", "flowery"),
    "zigzag": ("zigzag patterned", "zigzagged"),
    "two tone": ("two toned", "color blocked"),
}
_PATTERN_NOUNS: Mapping[str, tuple[str, ...]] = {
    "solid": ("no pattern", "a solid color", "no print"),
    "stripes": ("horizontal stripes", "stripes across", "a striped pattern"),
    "vertical stripes": ("vertical stripes", "stripes up and down", "vertical lines"),
    "dots": ("polka dots", "dots", "a polka dot print"),
    "plaid": ("a plaid pattern", "a checkered print", "checks"),
    "floral": ("a floral pattern", "a flower print", "flowers all over"),
    "zigzag": ("a zigzag pattern", "chevron stripes", "zigzags"),
    "two tone": ("two colors", "a color block design", "a different colored bottom"),
}
_PATTERN_PLURALS: Mapping[str, str] = {
    "stripes": "horizontal stripes",
    "vertical stripes": "vertical stripes",
    "dots": "polka dots",
    "plaid": "checks",
    "floral": "flowers",
    "zigzag": "zigzags",
}
_SLEEVE_ADJECTIVES: Mapping[str, tuple[str, ...]] = {
    "sleeveless": ("sleeveless", "without sleeves"),
    "short": ("short sleeved",),
    "elbow": ("half sleeved",),
    "long": ("long sleeved",),
}
_SLEEVE_NOUNS: Mapping[str, tuple[str, ...]] = {
    "sleeveless": ("no sleeves",),
    "short": ("short sleeves", "short cap sleeves"),
    "elbow": ("elbow length sleeves", "half sleeves", "mid length sleeves"),
    "long": ("long sleeves", "full length sleeves"),
}
_LENGTH_ADJECTIVES: Mapping[str, tuple[str, ...]] = {
    "mini": ("very short", "mini length"),
    "knee": ("knee length",),
    "midi": ("calf length", "midi length"),
    "maxi": ("floor length", "maxi length", "ankle length"),
    "cropped": ("cropped", "waist length"),
    "regular": ("hip length", "regular length"),
    "tunic": ("tunic length", "thigh length"),
}
_NECKLINE_NOUNS: Mapping[str, tuple[str, ...]] = {
    "v": ("a v neck", "a v shaped neckline"),
    "square": ("a square neckline", "a square neck"),
    "round": ("a round neck", "a crew neck", "a round neckline"),
    "boat": ("a boat neck", "a wide straight neckline"),
    "collar": ("a collar", "a collared neck"),
    "high": ("a high neck", "a turtleneck", "a mock neck"),
}
_FIT_ADJECTIVES: Mapping[str, tuple[str, ...]] = {
    "fitted": ("tight fitting", "form fitting"),
    "regular": ("regular fitting",),
    "loose": ("loose fitting", "flowy"),
}
_GRAPHIC_NOUNS: Mapping[str, tuple[str, ...]] = {
    "none": ("no graphic", "no logo", "nothing on the chest"),
    "star": ("a star on it", "a star on the chest", "a star graphic"),
    "heart": ("a heart on it", "a heart on the front", "a heart graphic"),
    "lettering": ("writing on it", "lettering on the chest", "words on the front"),
    "circle": ("a circle on it", "a round logo", "a circle graphic"),
    "moon": ("a moon on it", "a moon on the chest", "a moon graphic"),
}
_GRAPHIC_NAMES = {"star": "star", "heart": "heart", "lettering": "letters", "circle": "circle", "moon": "moon"}
_TOGGLES: Mapping[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("buttons", "yes"): (("has", "buttons"), ("has", "buttons down the front"), ("is", "buttoned")),
    ("buttons", "no"): (("has", "no buttons"), ("is", "without buttons")),
    ("belt", "yes"): (("has", "a belt"), ("is", "belted"), ("has", "a belt at the waist")),
    ("belt", "no"): (("has", "no belt"), ("is", "without a belt")),
    ("hem", "ruffled"): (("has", "a ruffled hem"), ("has", "ruffles"), ("is", "more frilly")),
    ("hem", "straight"): (("has", "no ruffles"), ("has", "a straight hem"), ("is", "less frilly")),
    ("finish", "shiny"): (("is", "shinier"), ("is", "shiny"), ("has", "a satin look")),
    ("finish", "matte"): (("is", "less shiny"), ("is", "matte"), ("has", "no shine")),
}
_NOUNS: Mapping[str, tuple[str, ...]] = {"dress": ("dress",), "shirt": ("shirt",), "toptee": ("top", "shirt")}

_OPENINGS = (
    "{edit}",
    "{edit}",
    "the {noun} {edit}",
    "the same {noun}, but it {edit}",
    "same {noun} that {edit}",
    "show a {noun} that {edit}",
    "shows the same {noun} but it {edit}",
    "unlike the reference image, the {noun} {edit}",
)

_OTHER_WORDS = (
    "a and at bottom in instead is it of the with not no has color colored design print graphic different",
    "darker lighter brighter more less colorful patterned busy solid much slightly little longer shorter",
    "sleeves body hem higher lower neckline collar collared looser tighter fitted fit",
)

_ABSOLUTE, _RELATIVE = True, False


@dataclass(frozen=True)
class Phrase:
    """One true statement: `verb` is "is" or "has", `covers` holds the changed attributes that it mentions.

    absolute: whether the phrase names the target's value; otherwise it only compares.
    """

    verb: str
    text: str
    covers: tuple[str, ...]
    absolute: bool


def _step(reference: str, target: str, order: tuple[str, ...]) -> int:
    return order.index(target) - order.index(reference)


def _colour_phrases(reference: Garment, target: Garment) -> Iterable[Phrase]:
    covers = ("colour",)
    for words in _COLOUR_WORDS[target.colour]:
        for text in (words, f"{words} in color", f"{words} colored"):
            yield Phrase("is", text, covers, _ABSOLUTE)
        for noun in _NOUNS[target.category]:
            yield Phrase("is", f"a {words} {noun}", covers, _ABSOLUTE)
        old = _COLOUR_WORDS[reference.colour][0]
        yield Phrase("is", f"{words} instead of {old}", covers, _ABSOLUTE)
        yield Phrase("is", f"{words} not {old}", covers, _ABSOLUTE)
        if target.pattern == "solid" and target.graphic == "none":
            yield Phrase("is", f"solid {words}" if reference.pattern != "solid" else words, covers, _ABSOLUTE)
    difference = lightness(target.colour) - lightness(reference.colour)
    if abs(difference) > 0.15:
        word = "lighter" if difference > 0 else "darker"
        for text in (word, f"{word} in color", f"{word} colored"):
            yield Phrase("is", text, covers, _RELATIVE)
        yield Phrase("has", f"a {word} color", covers, _RELATIVE)
    vividness = chroma(target.colour) - chroma(reference.colour)
    if abs(vividness) > 0.4:
        yield Phrase("is", "more colorful" if vividness > 0 else "less colorful", covers, _RELATIVE)
        if vividness > 0 and difference > 0:
            yield Phrase("is", "brighter", covers, _RELATIVE)


def _pattern_phrases(reference: Garment, target: Garment) -> Iterable[Phrase]:
    new, old = target.pattern, reference.pattern
    if new == old:
        return
    if target.graphic != "none":
        yield Phrase("is", "solid", ("pattern",), _ABSOLUTE)
        yield Phrase("has", "no pattern", ("pattern",), _ABSOLUTE)
    else:
        for text in _PATTERN_ADJECTIVES[new]:
            yield Phrase("is", text, ("pattern",), _ABSOLUTE)
        for text in _PATTERN_NOUNS[new]:
            yield Phrase("has", text, ("pattern",), _ABSOLUTE)
    if new in _PATTERN_PLURALS:
        plural = _PATTERN_PLURALS[new]
        for words in _COLOUR_WORDS[target.secondary][:2]:
            yield Phrase("has", f"{words} {plural}", ("pattern", "secondary"), _ABSOLUTE)
        if old in _PATTERN_PLURALS:
            yield Phrase("has", f"{plural} instead of {_PATTERN_PLURALS[old]}", ("pattern",), _ABSOLUTE)
    if "colour" in changed(reference, target) and new != "two tone":
        for words in _COLOUR_WORDS[target.colour][:2]:
            adjective = _PATTERN_ADJECTIVES[new][0]
            yield Phrase("is", f"a {adjective} {words} {_NOUNS[target.category][0]}", ("pattern", "colour"), _ABSOLUTE)
    if old == "solid":
        yield Phrase("is", "more patterned", ("pattern",), _RELATIVE)
    elif new == "solid":
        yield Phrase("is", "less patterned", ("pattern",), _RELATIVE)
        yield Phrase("is", "less busy", ("pattern",), _RELATIVE)


def _secondary_phrases(reference: Garment, target: Garment) -> Iterable[Phrase]:
    if not target.secondary:
        return
    for words in _COLOUR_WORDS[target.secondary]:
        if target.pattern in _PATTERN_PLURALS:
            yield Phrase("has", f"{words} {_PATTERN_PLURALS[target.pattern]}", ("secondary",), _ABSOLUTE)
        elif target.pattern == "two tone":
            yield Phrase("is", f"{words} at the bottom", ("secondary",), _ABSOLUTE)
            yield Phrase("has", f"a {words} bottom", ("secondary",), _ABSOLUTE)
        else:
            yield Phrase("has", f"a {words} design", ("secondary",), _ABSOLUTE)
            yield Phrase("has", f"{words} {_GRAPHIC_NAMES[target.graphic]} print", ("secondary",), _ABSOLUTE)


def _sleeve_phrases(reference: Garment, target: Garment) -> Iterable[Phrase]:
    for text in _SLEEVE_ADJECTIVES[target.sleeve]:
        yield Phrase("is", text, ("sleeve",), _ABSOLUTE)
    for text in _SLEEVE_NOUNS[target.sleeve]:
        yield Phrase("has", text, ("sleeve",), _ABSOLUTE)
    step = _step(reference.sleeve, target.sleeve, SLEEVES)
    word = "longer" if step > 0 else "shorter"
    yield Phrase("has", f"{word} sleeves", ("sleeve",), _RELATIVE)
    if abs(step) > 1:
        yield Phrase("has", f"much {word} sleeves", ("sleeve",), _RELATIVE)
    if reference.sleeve == "sleeveless":
        yield Phrase("has", "sleeves", ("sleeve",), _RELATIVE)


def _length_phrases(reference: Garment, target: Garment) -> Iterable[Phrase]:
    for text in _LENGTH_ADJECTIVES[target.length]:
        yield Phrase("is", text, ("length",), _ABSOLUTE)
    step = _step(reference.length, target.length, LENGTHS[target.category])
    word = "longer" if step > 0 else "shorter"
    yield Phrase("is", word, ("length",), _RELATIVE)
    yield Phrase("has", f"a {word} body" if target.category != "dress" else f"a {word} hem", ("length",), _RELATIVE)
    for degree in ("much",) if abs(step) > 1 else ("slightly", "a little"):
        yield Phrase("is", f"{degree} {word}", ("length",), _RELATIVE)


def _neckline_height(garment: Garment) -> int:
    """Return 0 for low, 1 for middle and 2 for high necklines; no neckline is visibly higher within a height."""
    return 0 if garment.neckline in ("v", "square") else 2 if garment.neckline == "high" else 1


def _neckline_phrases(reference: Garment, target: Garment) -> Iterable[Phrase]:
    for text in _NECKLINE_NOUNS[target.neckline]:
        yield Phrase("has", text, ("neckline",), _ABSOLUTE)
    if target.neckline == "collar":
        yield Phrase("is", "collared", ("neckline",), _ABSOLUTE)
    elif reference.neckline == "collar":
        yield Phrase("has", "no collar", ("neckline",), _RELATIVE)
    if _neckline_height(reference) != _neckline_height(target):
        word = "higher" if _step(reference.neckline, target.neckline, NECKLINES) > 0 else "lower"
        yield Phrase("has", f"a {word} neckline", ("neckline",), _RELATIVE)


def _fit_phrases(reference: Garment, target: Garment) -> Iterable[Phrase]:
    for text in _FIT_ADJECTIVES[target.fit]:
        yield Phrase("is", text, ("fit",), _ABSOLUTE)
    looser = _step(reference.fit, target.fit, FITS) > 0
    for text in ("looser", "less fitted") if looser else ("tighter", "more fitted"):
        yield Phrase("is", text, ("fit",), _RELATIVE)
    yield Phrase("has", "a looser fit" if looser else "a tighter fit", ("fit",), _RELATIVE)


def _graphic_phrases(reference: Garment, target: Garment) -> Iterable[Phrase]:
    if target.pattern != "solid" and target.graphic == "none":
        return
    for text in _GRAPHIC_NOUNS[target.graphic]:
        yield Phrase("has", text, ("graphic",), _ABSOLUTE)
    if target.graphic == "none":
        return
    for words in _COLOUR_WORDS[target.secondary][:2]:
        name = _GRAPHIC_NAMES[target.graphic]
        text = f"{words} {name}" if target.graphic == "lettering" else f"a {words} {name}"
        yield Phrase("has", text, ("graphic", "secondary"), _ABSOLUTE)
    yield Phrase("has", "a graphic" if reference.graphic == "none" else "a different graphic", ("graphic",), _RELATIVE)


_PHRASE_WRITERS = {
    "colour": _colour_phrases,
    "secondary": _secondary_phrases,
    "pattern": _pattern_phrases,
    "sleeve": _sleeve_phrases,
    "length": _length_phrases,
    "neckline": _neckline_phrases,
    "fit": _fit_phrases,
    "graphic": _graphic_phrases,
}


def phrases(reference: Garment, target: Garment) -> dict[str, tuple[Phrase, ...]]:
    """Return for every changed attribute all phrases about it, but only for changes that people would mention.

    People do not mention a graphic that a pattern has covered, or a secondary colour that changed with its pattern.
    """
    said: dict[str, tuple[Phrase, ...]] = {}
    names = changed(reference, target)
    for name in names:
        if name == "secondary" and (not reference.secondary or "pattern" in names or "graphic" in names):
            continue
        if name in _PHRASE_WRITERS:
            found = tuple(_PHRASE_WRITERS[name](reference, target))
        else:
            toggles = _TOGGLES[name, getattr(target, name)]
            found = tuple(Phrase(verb, text, (name,), _ABSOLUTE) for verb, text in toggles)
        if found:
            said[name] = found
    return said


def _choose_phrase(options: tuple[Phrase, ...], rng: random.Random, absolute: bool) -> Phrase:
    wanted = [phrase for phrase in options if phrase.absolute == absolute] or list(options)
    return rng.choice(wanted)


def _sentence(chosen: list[Phrase], category: str, rng: random.Random) -> str:
    """Combine phrases as annotators do: "is red and has long sleeves", "is red with long sleeves", "red"."""
    first, *rest = _ordered(chosen, rng)
    text = first.text if rng.random() < 0.1 else f"{first.verb} {first.text}"
    if rng.random() < 0.05:
        text = f"{rng.choice(('the ' + _NOUNS[category][0], 'it'))} {first.verb} {first.text}"
    return _append_phrases(text, first.verb, rest, rng)


def _ordered(chosen: Iterable[Phrase], rng: random.Random) -> list[Phrase]:
    """Return the phrases grouped by verb; chance decides whether "is" or "has" comes first."""
    return sorted(chosen, key=lambda phrase: phrase.verb, reverse=rng.random() < 0.8)


def _append_phrases(text: str, previous: str, rest: Iterable[Phrase], rng: random.Random) -> str:
    """Append phrases to a text whose last verb is `previous`, and return the text."""
    for phrase in rest:
        if phrase.verb == previous:
            text += f" and {phrase.text}"
        elif phrase.verb == "has" and rng.random() < 0.5:
            text += f" with {phrase.text}"
        else:
            text += f" and {phrase.verb} {phrase.text}"
        previous = phrase.verb
    return text


def _as_typed(text: str, rng: random.Random) -> str:
    """Add capitals, full stops and blanks about as often as FashionIQ's annotators leave them."""
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.08:
        text += "."
    if rng.random() < 0.03:
        text = rng.choice((f" {text}", f"{text} "))
    return text


def captions(reference: Garment, target: Garment, rng: random.Random) -> tuple[str, str]:
    """Return the two captions that two annotators give the pair (reference, target).

    Together they mention up to four changes. Each mentions one or two, which often differ between them. In about five
    of six cases at least one caption names the new value of a change; otherwise the captions only compare.

    Raises:
        ValueError: If no difference of the garments can be mentioned.
    """
    said = phrases(reference, target)
    if not said:
        raise ValueError("garments: reference and target differ in nothing that a caption could mention.")
    names = list(said)
    rng.shuffle(names)
    split = min(len(names), rng.choice((1, 2)))
    parts = [names[:split], names[split : split + 2]]
    while not parts[1] or (len(parts[1]) == 1 and len(names) > 1 and rng.random() < 0.45):
        parts[1].append(rng.choice([name for name in names if name not in parts[1]]))
    absolute = {name: rng.random() < 0.85 for name in names}
    mentioned: list[str] = []
    texts = []
    for part in parts:
        chosen: list[Phrase] = []
        for name in part:
            if not any(name in phrase.covers for phrase in chosen):
                chosen.append(
                    _choose_phrase(said[name], rng, absolute[name] if name not in mentioned else rng.random() < 0.5)
                )
        mentioned.extend(part)
        texts.append(_as_typed(_sentence(_without_repeats(chosen), reference.category, rng), rng))
    rng.shuffle(texts)
    return texts[0], texts[1]


def choose_phrases(
    reference: Garment, target: Garment, rng: random.Random, only: Iterable[str] | None = None
) -> list[Phrase]:
    """Choose a phrase for every change that can be mentioned, or only for those in `only`.

    In five of six cases the phrase names the new value. A phrase that mentions two changes ("white stripes") counts for
    both.
    """
    said = phrases(reference, target)
    names = [name for name in said if only is None or name in only]
    rng.shuffle(names)
    chosen: list[Phrase] = []
    for name in names:
        if not any(name in phrase.covers for phrase in chosen):
            chosen.append(_choose_phrase(said[name], rng, absolute=rng.random() < 0.85))
    return _without_repeats(chosen)


def predicate(chosen: Iterable[Phrase], rng: random.Random) -> str:
    """Write phrases in CIRCO's style, from the verb on, without capitals and full stop: "is red and has a belt"."""
    first, *rest = _ordered(chosen, rng)
    return _append_phrases(f"{first.verb} {first.text}", first.verb, rest, rng)


def edit_sentence(chosen: Iterable[Phrase], category: str, rng: random.Random) -> str:
    """Write phrases in CIRR's style, as one sentence: "shows the same dress but it is red and has a belt"."""
    noun = _NOUNS[category][0]
    text = rng.choice(_OPENINGS).format(noun=noun, edit=predicate(chosen, rng))
    return _as_typed(text, rng)


def shared_concept(garment: Garment, names: Iterable[str], rng: random.Random) -> str:
    """Describe what garments share, a category and some attributes: "a red knee length dress with long sleeves".

    `names` holds attributes among colour, pattern, length, sleeve and neckline.
    """
    tables = {"colour": _COLOUR_WORDS, "pattern": _PATTERN_ADJECTIVES, "length": _LENGTH_ADJECTIVES}
    adjectives = [rng.choice(table[getattr(garment, name)]) for name, table in tables.items() if name in names]
    text = " ".join([*adjectives, _NOUNS[garment.category][0]])
    tables = {"sleeve": _SLEEVE_NOUNS, "neckline": _NECKLINE_NOUNS}
    nouns = [rng.choice(table[getattr(garment, name)]) for name, table in tables.items() if name in names]
    if nouns:
        text += f" with {' and '.join(nouns)}"
    return f"{'an' if text.startswith(('orange', 'ankle')) else 'a'} {text}"


def _without_repeats(chosen: list[Phrase]) -> list[Phrase]:
    """Remove phrases whose attributes another phrase also mentions: "a red floral dress" makes "red" redundant."""
    return [
        phrase
        for phrase in chosen
        if not any(other is not phrase and set(phrase.covers) < set(other.covers) for other in chosen)
    ]


def description(garment: Garment, rng: random.Random) -> str:
    """Describe one garment in a caption: "a navy striped dress with long sleeves and a v neck".

    The caption always names the colour and any pattern other than solid, in varied words, and two of the other details.
    """
    adjectives = [rng.choice(_COLOUR_WORDS[garment.colour])]
    if garment.pattern != "solid":
        adjectives.append(rng.choice(_PATTERN_ADJECTIVES[garment.pattern]))
    details = [rng.choice(_SLEEVE_NOUNS[garment.sleeve]), rng.choice(_NECKLINE_NOUNS[garment.neckline])]
    if garment.graphic != "none":
        details.append(rng.choice(_GRAPHIC_NOUNS[garment.graphic]))
    if garment.buttons == "yes":
        details.append("buttons")
    if garment.belt == "yes":
        details.append("a belt")
    first, second = rng.sample(details, 2)
    return _described(adjectives, rng.choice(_NOUNS[garment.category]), (first, second))


def full_description(garment: Garment, rng: random.Random) -> str:
    """Describe one garment with most of what is visible: "a red knee length dress with a belt and no sleeves".

    The text always names the colour and any pattern other than solid. Three of four texts name the length, three of
    four the fit. All name up to three other details, but never the default of buttons, belt, hem, finish or graphic.
    """
    adjectives = [rng.choice(_COLOUR_WORDS[garment.colour])]
    if garment.pattern != "solid":
        adjectives.append(rng.choice(_PATTERN_ADJECTIVES[garment.pattern]))
    details = [rng.choice(_SLEEVE_NOUNS[garment.sleeve]), rng.choice(_NECKLINE_NOUNS[garment.neckline])]
    if garment.graphic != "none":
        details.append(rng.choice(_GRAPHIC_NOUNS[garment.graphic]))
    toggles = (("buttons", "yes", "buttons"), ("belt", "yes", "a belt"), ("hem", "ruffled", "a ruffled hem"),
               ("finish", "shiny", "a satin look"))  # fmt: skip
    details += [text for name, value, text in toggles if getattr(garment, name) == value]
    others = (_LENGTH_ADJECTIVES[garment.length], _FIT_ADJECTIVES[garment.fit])
    adjectives += [rng.choice(words) for words in others if rng.random() < 0.75]
    noun = rng.choice(_NOUNS[garment.category])
    return _described(adjectives, noun, rng.sample(details, min(3, len(details))))


def _described(adjectives: Sequence[str], noun: str, details: Sequence[str]) -> str:
    article = "an" if adjectives[0].startswith(("orange", "ankle")) else "a"
    return f"{article} {' '.join(adjectives)} {noun} with {' and '.join(details)}"


def tokens(text: str) -> list[str]:
    """Return the lower-case words of a caption without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def words() -> list[str]:
    """Return every word that captions can contain, in lower case and sorted: the vocabulary of a tokenizer."""
    tables = (
        _COLOUR_WORDS, _PATTERN_ADJECTIVES, _PATTERN_NOUNS, _SLEEVE_ADJECTIVES, _SLEEVE_NOUNS, _LENGTH_ADJECTIVES,
        _NECKLINE_NOUNS, _FIT_ADJECTIVES, _GRAPHIC_NOUNS, _NOUNS,
    )  # fmt: skip
    texts = [text for table in tables for values in table.values() for text in values]
    texts += [*_PATTERN_PLURALS.values(), *_GRAPHIC_NAMES.values(), *_OTHER_WORDS]
    texts += [text for values in _TOGGLES.values() for _, text in values]
    return sorted({word for text in texts for word in tokens(text)})
