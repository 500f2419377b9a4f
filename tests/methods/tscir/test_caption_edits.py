"""Edits of captions: words, exchangeable phrases in hand-made captions, and the wording of the modification."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lavis_cir_plugin.methods.tscir.caption_edits import EMPTY, Phrases, caption_words, normalised_caption

NOUNS = ("dress", "shirt", "top")


def phrases(*captions: list[str]) -> Phrases:
    """Return the phrases of captions, which are given as a list for each picture."""
    return Phrases([text for own in captions for text in own], [n for n, own in enumerate(captions) for _ in own])


def exchangeable(known: Phrases, old: str, new: str) -> bool:
    return known.exchangeable(known.number(old), known.number(new))


def texts(known: Phrases, image: int, draws: int = 300) -> set[tuple[str, str, str]]:
    """Return drawn edits of a picture's captions as (removed phrase, inserted phrase, text)."""
    rng = random.Random(0)
    edits = [known.draw(image, rng) for _ in range(draws)]
    return {(edit.old, edit.new, edit.text) for edit in edits if edit is not None}


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("An orange T-shirt, long sleeves.", ["a", "orange", "t-shirt", "", "long", "sleeves", ""]),
        ("the woman's hat!", ["the", "woman's", "hat", ""]),
        ("Ein Kleid für 2", ["ein", "kleid", "für", "2"]),
        ("...", ["", "", ""]),
    ],
)
def test_tokens(caption, found):
    assert caption_words(caption) == found


@given(st.text())
def test_plain_is_plain(caption):
    assert normalised_caption(normalised_caption(caption)) == normalised_caption(caption)


def test_two_shared_contexts_make_an_exchange():
    """ "red" and "blue" share two slots, "long" and "short" share (with, sleeves) alone, "dress" and "with" none."""
    known = phrases(
        ["a red dress with long sleeves"],
        ["a blue dress with long sleeves"],
        ["a red shirt with short sleeves"],
        ["a blue shirt with short sleeves"],
    )
    assert exchangeable(known, "red", "blue")
    assert exchangeable(known, "dress", "shirt")
    assert not exchangeable(known, "long", "short")
    assert not exchangeable(known, "long sleeves", "short sleeves")
    assert not exchangeable(known, "red", "dress")


def test_what_one_picture_is_called_is_no_exchange():
    """Each of burgundy's 3 pictures is also called maroon; red and burgundy share 3 contexts and no picture."""
    known = phrases(
        *([f"a burgundy {noun} here", f"a maroon {noun} here"] for noun in NOUNS),
        *([f"a red {noun} here", f"a red {noun} there"] for noun in NOUNS),
    )
    assert not exchangeable(known, "burgundy", "maroon")
    assert exchangeable(known, "burgundy", "red")
    assert exchangeable(known, "maroon", "red")


def test_two_details_of_which_captions_mention_some_are_no_exchange():
    """Belts and buttons share contexts, and as many pictures as independent details share."""
    details = ["a belt", "buttons", "no sleeves"]
    known = phrases(
        *([f"a dress with {one} and {detail}" for one in details if one != detail] for detail in details for _ in "abc")
    )
    assert not exchangeable(known, "buttons", "no sleeves")


def test_one_caption_each_tells_details_by_those_named_together():
    """Of 12 captions 6 name buttons and 6 stripes, so 3 name both by chance: 4 do, and none names red and blue."""
    both = [[f"a {colour} top with buttons and stripes"] for colour in ("red", "red", "blue", "blue")]
    one = [[f"a {colour} top with {detail} here"] for colour in ("red", "blue") for detail in ("buttons", "stripes")]
    rest = [[f"the {colour} top"] for colour in ("red", "blue") for _ in "ab"]
    known = phrases(*both, *one, *rest)
    assert exchangeable(known, "red", "blue")
    assert not exchangeable(known, "buttons", "stripes")


@pytest.mark.parametrize(
    ("one", "other"), [("stripe", "striped"), ("checks", "check"), ("gray", "grey"), ("dark red", "red")]
)
def test_forms_of_one_word_are_no_exchange(one, other):
    known = phrases(*([f"a {word} {noun} here"] for word in (one, other) for noun in NOUNS))
    assert not exchangeable(known, one, other)


def test_what_is_missing_elsewhere_can_be_added_and_dropped():
    """ "striped" stands in (red, dress), (red, shirt), (red, top), between which other captions have no word."""
    known = phrases(*([f"a red {word} {noun}"] for word in ("striped", "") for noun in NOUNS))
    assert known.exchangeable(EMPTY, known.number("striped"))
    dropped = {(old, text) for old, new, text in texts(known, 0) if not new}
    assert dropped == {("striped", text) for text in ("is not striped", "make it not striped", "no longer striped")}
    added = {(new, text) for old, new, text in texts(known, 3) if not old}
    assert added == {("striped", text) for text in ("is striped", "make it striped", "is also striped")}


def test_joined_phrases_are_only_added_and_dropped():
    """ "with a belt" follows each of 3 nouns; the text that drops it does not say "with"."""
    known = phrases(*([f"a red {noun}{detail}"] for detail in (" with a belt", "") for noun in NOUNS))
    assert known.exchangeable(EMPTY, known.number("with a belt"))
    dropped = {(old, text) for old, new, text in texts(known, 0) if not new}
    assert dropped == {("a belt", text) for text in ("without a belt", "has no belt", "remove the belt", "no belt")}
    assert not any(old == "a belt" and new for old, new, _ in texts(known, 0))


def test_a_word_with_few_next_words_is_shown_with_its_next():
    """Sleeves are short or long in 3 contexts, colours stand before 3 nouns: "long" alone would say nothing."""
    known = phrases(
        *(
            [f"a {colour} {noun} {joint} {size} sleeves"]
            for colour in ("red", "blue", "orange")
            for noun in NOUNS
            for joint, size in (("with", "short"), ("with", "long"), ("showing", "short"), ("showing", "long"))
        )
    )
    found = texts(known, 0)
    assert ("short sleeves", "long sleeves", "has long sleeves instead of short sleeves") in found
    assert ("red", "orange", "is orange instead of red") in found
    assert not any(old == "short" or new == "short" for old, new, _ in found)


def test_articles():
    """The subject's noun has its article and adjectives in the text, with "an" before a vowel."""
    known = phrases(*([f"an orange {noun} {end}"] for noun in (*NOUNS, "apron") for end in ("with dots", "in town")))
    said = {text for old, new, text in texts(known, 0) if new == "orange apron"}
    assert "is an orange apron instead of an orange dress" in said
    known = phrases(*([f"a {noun} {end}"] for noun in (*NOUNS, "apron") for end in ("with dots", "in town")))
    assert "change a dress to an apron" in {text for *_, text in texts(known, 0)}


@pytest.mark.parametrize(
    ("word", "article"),
    [("apron", "an"), ("unicorn", "a"), ("one-shoulder", "a"), ("hourglass", "an"), ("unusual", "an"), ("euro", "a")],
)
def test_the_article_follows_the_sound(word, article):
    known = phrases(*([f"a {noun} {end}"] for noun in (*NOUNS, word) for end in ("with dots", "in town")))
    assert f"change a dress to {article} {word}" in {text for *_, text in texts(known, 0)}


def test_a_participle_is_no_part_of_the_noun_before_it():
    """ "sitting" follows nouns, which also stand alone. "building" is a noun, and "red" says nothing without it."""
    known = phrases(
        *([f"a {pet} {end}"] for pet in ("dog", "cat", "owl") for end in ("sitting on grass", "lying here", "in town")),
        *([f"the {colour} building {end}"] for colour in ("red", "blue") for end in ("sitting on grass", "in town")),
        *([f"my {colour} building"] for colour in ("red", "blue")),
        ["a building in town"],
    )
    said = {text for image in range(9) for *_, text in texts(known, image)}
    assert "is a cat instead of a dog" in said
    assert not any("sitting" in text or "lying" in text for text in said if "cat" in text)
    assert "is the blue building instead of the red building" in {text for *_, text in texts(known, 9)}
    assert not any(text.endswith((" red", " blue")) for *_, text in texts(known, 9))


def test_a_participle_before_a_noun_belongs_to_it():
    fits = ("tight", "loose")
    known = phrases(*([f"{the} {fit} fitting {noun}"] for fit in fits for noun in NOUNS for the in ("a", "the")))
    said = {text for *_, text in texts(known, 0)}
    assert "is loose fitting instead of tight fitting" in said
    assert not any(text.endswith(("tight", "loose")) for text in said)


def test_an_edit_says_where_it_leads():
    known = phrases(*([f"A {colour} {noun}, seen here."] for colour in ("red", "blue", "green") for noun in NOUNS))
    edit = known.draw(0, random.Random(0))
    assert edit is not None
    rows = known.rows_holding(edit.holder)
    assert len(rows) == 3
    assert all(edit.new in " ".join(known.rows[row]) for row in rows.tolist())


WORDS = st.sampled_from(["a", "the", "red", "blue", "dark", "dress", "shirt", "with", "and", "belt", "dots", ",", "an"])
CAPTIONS = st.lists(st.lists(WORDS, max_size=7).map(" ".join), min_size=1, max_size=25)


@settings(deadline=None)
@given(CAPTIONS, st.randoms(use_true_random=False))
def test_edits_of_any_captions(captions, rng):
    """An edit changes the caption, by phrases that exclude each other's words; exchanges work both ways."""
    known = Phrases(captions, [n // 2 for n in range(len(captions))])
    for image in range((len(captions) + 1) // 2):
        edit = known.draw(image, rng)
        if edit is None:
            continue
        assert known.images[edit.row] == image
        assert edit.edited != normalised_caption(captions[edit.row])
        assert edit.text.strip() == edit.text
        assert edit.old or edit.new
        assert not edit.old or f" {edit.old} " in f" {' '.join(known.rows[edit.row])} "
        assert not edit.new or f" {edit.new} " in f" {edit.edited} "
        assert len(known.rows_holding(edit.holder))
    for (one, other), found in known._known.items():
        known._known = {}
        assert known.exchangeable(other, one) == found
        break


@settings(deadline=None)
@given(CAPTIONS)
def test_rows_with_a_phrase_are_those_of_its_words(captions):
    """Every row that `rows_holding` names has the phrase between boundaries."""
    known = Phrases(captions, list(range(len(captions))))
    for number in range(1, len(known._texts)):
        words = " ".join(known._texts[number])
        for row in known.rows_holding((number, -1)).tolist():
            assert f" {words} " in f" {' '.join(known.rows[row])} "
