"""The drawn world in FashionIQ's files: it is deterministic, its captions are true, and its cache is safe."""

from __future__ import annotations

import errno
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavis_cir_plugin.garments import attributes as world
from lavis_cir_plugin.garments import draw, draw_for_name, fashioniq
from lavis_cir_plugin.garments import world as cache
from lavis_cir_plugin.garments.fashioniq import WORLD, FashionIQGarments, plan_split, write_fashioniq
from lavis_cir_plugin.garments.wording import captions, phrases, tokens, words

SMALL = FashionIQGarments(
    seed=3,
    train_triplets=30,
    train_images=36,
    val_queries=20,
    val_images=30,
    test_queries=4,
    test_images=8,
    image_width=40,
    image_height=50,
)
COLOUR_OF_WORDS = {
    "light blue": "light blue", "pale blue": "light blue", "baby blue": "light blue", "light pink": "pink",
    "royal blue": "blue", "navy blue": "navy", "dark blue": "navy", "dark red": "burgundy", "dark brown": "brown",
    "bright red": "red", "bright yellow": "yellow", "turquoise": "teal", "violet": "purple", "maroon": "burgundy",
    "cream": "beige", "tan": "beige", "grey": "gray",
    **{name: name for name in world.COLOURS if " " not in name},
}  # fmt: skip
PATTERN_OF_WORDS = {
    "vertical stripes": "vertical stripes", "vertical lines": "vertical stripes", "pinstriped": "vertical stripes",
    "vertically striped": "vertical stripes", "stripes up and down": "vertical stripes", "chevron stripes": "zigzag",
    "zigzag": "zigzag", "zigzags": "zigzag", "zigzagged": "zigzag", "striped": "stripes", "stripes": "stripes",
    "dots": "dots", "polka dot": "dots", "dotted": "dots", "spotted": "dots", "plaid": "plaid", "checkered": "plaid",
    "checks": "plaid", "floral": "floral", "flowery": "floral", "flower": "floral", "flowers": "floral",
    "two colors": "two tone", "two toned": "two tone", "color block": "two tone", "color blocked": "two tone",
    "solid": "solid", "plain": "solid", "no pattern": "solid", "no print": "solid", "one color": "solid",
}  # fmt: skip
SLEEVE_OF_WORDS = {
    "sleeveless": "sleeveless", "without sleeves": "sleeveless", "no sleeves": "sleeveless", "short sleeves": "short",
    "short sleeved": "short", "short cap sleeves": "short", "half sleeves": "elbow", "half sleeved": "elbow",
    "elbow length": "elbow", "mid length": "elbow", "long sleeves": "long", "long sleeved": "long",
    "full length": "long",
}  # fmt: skip


def pairs(count: int, seed: int = 0):
    rng = random.Random(seed)
    for index in range(count):
        reference = world.sample(world.CATEGORIES[index % 3], rng)
        target = replace(world.edited(reference, rng, 1 + index % 3), photo=world.sample_photo(rng))
        if phrases(reference, target):
            yield reference, target, captions(reference, target, rng)


def found(text: str, table: dict[str, str]) -> set[str]:
    """Return the values that a text names; longest words come first, so "dark red" is not read as "red"."""
    values = set()
    for phrase in sorted(table, key=len, reverse=True):
        if re.search(rf"\b{phrase}\b", text):
            values.add(table[phrase])
            text = re.sub(rf"\b{phrase}\b", "_", text)
    return values


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write_fashioniq(tmp_path_factory.mktemp("world"), SMALL, progress=False, workers=1)


def test_same_bytes_whatever_the_number_of_processes(written, tmp_path):
    assert contents(write_fashioniq(tmp_path, SMALL, progress=False, workers=2)) == contents(written)


def test_another_seed_gives_another_world(written):
    assert plan_split(SMALL, "dress", "val") == plan_split(SMALL, "dress", "val")
    assert plan_split(replace(SMALL, seed=4), "dress", "val") != plan_split(SMALL, "dress", "val")


def test_files_have_fashioniqs_fields_and_the_configured_sizes(written):
    names: list[str] = []
    for category in world.CATEGORIES:
        for split in fashioniq.SPLITS:
            queries, images = SMALL.counts(split)
            gallery = json.loads((written / "image_splits" / f"split.{category}.{split}.json").read_text())
            rows = json.loads((written / "captions" / f"cap.{category}.{split}.json").read_text())
            assert len(gallery) == images
            assert len(rows) == queries
            names += gallery
            for row in rows:
                assert set(row) == {"candidate", "captions"} | ({"target"} if split != "test" else set())
                assert len(row["captions"]) == 2
                assert all(isinstance(text, str) and text.strip() for text in row["captions"])
                assert row["candidate"] in gallery
            if split != "test":
                targets = [row["target"] for row in rows]
                assert len(set(targets)) == len(targets)
                assert set(targets) <= set(gallery)
                assert all(row["candidate"] != row["target"] for row in rows)
    assert len(set(names)) == len(names), "an image occurs in two splits"
    assert all(re.fullmatch(r"B0[0-9A-Z]{8}", name) for name in names)
    assert {path.name for path in (written / "images").iterdir()} == {f"{name}.jpg" for name in names}
    assert Image.open(written / "images" / f"{names[0]}.jpg").size == (40, 50)


def test_png_is_written_when_asked(tmp_path):
    tiny = replace(SMALL, train_triplets=1, train_images=2, val_queries=1, val_images=2, test_queries=1, test_images=2)
    write_fashioniq(tmp_path, replace(tiny, image_suffix=".png"), progress=False, workers=1)
    pictures = list((tmp_path / "images").iterdir())
    assert len(pictures) == 18
    assert all(Image.open(picture).format == "PNG" for picture in pictures)


def test_held_out_combinations_are_seen_in_evaluation_only():
    config = FashionIQGarments(train_triplets=400, train_images=420)
    for category in world.CATEGORIES:
        train = plan_split(config, category, "train").images.values()
        val = plan_split(config, category, "val").images.values()
        assert not any(world.is_held_out(garment, config.held_out) for garment in train)
        assert sum(world.is_held_out(garment, config.held_out) for garment in val) > 20


def test_held_out_share_is_the_share_of_combinations():
    """16 colours x 8 patterns x 4 sleeves are 512 draws at 0.2 with a standard deviation of 1.8 %; 4 are allowed."""
    garment = world.sample("dress", random.Random(0))
    all_combinations = [
        replace(garment, colour=colour, pattern=pattern, sleeve=sleeve)
        for colour in world.COLOURS
        for pattern in world.VALUES["dress"]["pattern"]
        for sleeve in world.SLEEVES
    ]
    assert len(all_combinations) == 512
    share = np.mean([world.is_held_out(combination, 0.2) for combination in all_combinations])
    assert abs(share - 0.2) < 0.071
    assert not any(world.is_held_out(combination, 0) for combination in all_combinations)


def test_no_garment_occurs_twice_in_a_gallery():
    images = plan_split(FashionIQGarments(), "shirt", "val").images.values()
    assert len({world.attributes(garment) for garment in images}) == 400


def test_garments_are_possible_and_edits_change_what_they_say():
    rng = random.Random(1)
    for index in range(600):
        garment = world.sample(world.CATEGORIES[index % 3], rng)
        other = world.edited(garment, rng, edits := 1 + index % 3)
        for one in (garment, other):
            shows_secondary = one.pattern != "solid" or one.graphic != "none"
            assert (one.secondary != "") == shows_secondary
            assert one.secondary != one.colour
            assert one.pattern == "solid" or one.graphic == "none"
        assert len(world.changed(garment, other)) >= edits


def test_every_clause_is_true_of_the_target_and_new():
    for reference, target, both in pairs(3000):
        difference = world.lightness(target.colour) - world.lightness(reference.colour)
        sleeve_step = world.SLEEVES.index(target.sleeve) - world.SLEEVES.index(reference.sleeve)
        lengths = world.LENGTHS[target.category]
        length_step = lengths.index(target.length) - lengths.index(reference.length)
        for text in both:
            said = " ".join(tokens(text))
            new = re.sub(r"(instead of|not) [a-z ]+?(?= and | with |$)", "", said)
            old = " ".join(re.findall(r"(?:instead of|not) ([a-z ]+?)(?= and | with |$)", said))
            assert found(new, COLOUR_OF_WORDS) <= {target.colour, target.secondary}, (said, target)
            assert found(old, COLOUR_OF_WORDS) <= {reference.colour}, (said, reference)
            without_colours = new.replace("no print", "no pattern").replace("solid color", "solid")
            assert found(without_colours, PATTERN_OF_WORDS) <= {target.pattern}, (said, target)
            assert found(old, PATTERN_OF_WORDS) <= {reference.pattern}, (said, reference)
            sleeves = found(new, SLEEVE_OF_WORDS)
            assert sleeves <= {target.sleeve}, (said, target)
            assert not sleeves or sleeve_step != 0
            if "darker" in said or "lighter" in said:
                assert ("lighter" in said) == (difference > 0)
            if re.search("(longer|shorter) sleeves", said):
                assert ("longer sleeves" in said) == (sleeve_step > 0)
                assert sleeve_step != 0
            if re.search(r"(longer|shorter)(?! sleeves)", said):
                assert bool(re.search(r"longer(?! sleeves)", said)) == (length_step > 0), (said, reference, target)
                assert length_step != 0
            if re.search(r"\bbelt(ed)?\b", said):
                assert target.belt == ("no" if re.search("no belt|without a belt", said) else "yes")
                assert target.belt != reference.belt
            if "button" in said:
                assert target.buttons == ("no" if re.search("no buttons|without buttons", said) else "yes")
            for graphic in ("star", "heart", "moon"):
                assert graphic not in tokens(said) or target.graphic == graphic
            if re.search("looser|less fitted|tighter|more fitted", said):
                step = world.FITS.index(target.fit) - world.FITS.index(reference.fit)
                assert bool(re.search("looser|less fitted", said)) == (step > 0)


def test_two_changes_are_both_spoken_of_by_the_pair_of_captions():
    for reference, target, both in pairs(600, seed=5):
        if set(phrases(reference, target)) == {"sleeve", "colour"}:
            text = " ".join(tokens(" ".join(both)))
            assert "sleeve" in text
            assert found(text, COLOUR_OF_WORDS) or re.search("light|dark|color|bright", text)


def test_captions_look_like_fashioniqs():
    """FashionIQ's captions have 5.3 words on average and at most 18, some capitals and some full stops."""
    texts = [text for *_, both in pairs(1500, seed=2) for text in both]
    lengths = [len(tokens(text)) for text in texts]
    assert 4.5 < np.mean(lengths) < 6
    assert max(lengths) <= 18
    assert 0.03 < np.mean([text.strip().endswith(".") for text in texts]) < 0.15
    assert 0.05 < np.mean([text.strip()[0].isupper() for text in texts]) < 0.25
    assert len(set(texts)) > 1000


def test_the_word_list_is_complete_and_not_padded():
    used = {word for *_, both in pairs(6000, seed=7) for text in both for word in tokens(text)}
    assert used <= set(words())
    assert len(set(words()) - used) < 5
    assert words() == sorted(set(words()))


@pytest.mark.parametrize("size", [(144, 180), (64, 64), (37, 90)])
def test_pictures_have_the_asked_size_and_are_repeatable(size):
    garment = world.sample("dress", random.Random(0))
    picture = draw(garment, size)
    assert (picture.size, picture.mode) == (size, "RGB")
    assert picture.tobytes() == draw(garment, size).tobytes()


def test_every_attribute_is_visible_at_64_pixels():
    """Pictures that differ in one attribute alone (equal photo and grain) differ by 8 grey levels somewhere."""
    rng = random.Random(4)
    for category in world.CATEGORIES:
        for name, values in world.VALUES[category].items():
            if len(values) == 1:
                continue
            garment = world.edited(world.sample(category, rng), rng, 1, only=(name,))
            other = world.edited(garment, rng, 1, only=(name,))
            first, second = (np.asarray(draw(one).resize((64, 64)), dtype=float) for one in (garment, other))
            assert np.abs(first - second).max() > 8, (category, name, garment, other)


def test_colour_of_the_cloth_is_the_garments_colour():
    """Among the saturated colours the garment's own is nearest to the mean colour around the belly."""
    names = ("red", "green", "blue", "yellow", "purple")
    for name in names:
        garment = world.sample("toptee", random.Random(6))
        plain = replace(garment, colour=name, secondary="", pattern="solid", graphic="none", finish="matte")
        plain = replace(plain, buttons="no", length="tunic")
        patch = np.asarray(draw(plain), dtype=float)[95:110, 62:82].mean(axis=(0, 1))
        assert min(names, key=lambda other: np.abs(patch - world.COLOURS[other]).sum()) == name


def test_placeholders_depend_on_name_and_category_only():
    first = draw_for_name("B00A", "dress", (36, 45))
    assert first.tobytes() == draw_for_name("B00A", "dress", (36, 45)).tobytes()
    assert first.tobytes() != draw_for_name("B00B", "dress", (36, 45)).tobytes()
    assert first.tobytes() != draw_for_name("B00A", "shirt", (36, 45)).tobytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"val_queries": 400}, "val_queries must be less than garments.val_images: 400, got 400"),
        ({"train_triplets": 0}, "train_triplets must be a whole number >= 1, got 0"),
        ({"image_width": 20}, "image_width must be a whole number >= 32, got 20"),
        ({"image_suffix": "jpg"}, "image_suffix must be one of .jpg, .png, got 'jpg'"),
        ({"held_out": 0.7}, r"held_out must be a number >= 0 and <= 0.5, got 0.7"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FashionIQGarments(**values)


def test_unknown_category_is_refused():
    with pytest.raises(ValueError, match="category must be one of dress, shirt, toptee, got 'hat'"):
        draw_for_name("B00A", "hat")


@pytest.fixture
def drawn_names(monkeypatch) -> list[str]:
    """Return a list that collects the names of the pictures drawn in this process."""
    names: list[str] = []
    draw_job = cache._draw_job
    monkeypatch.setattr(cache, "_draw_job", lambda job: (names.append(job[2]), draw_job(job)))
    return names


TINY = replace(SMALL, train_triplets=2, train_images=4, val_queries=2, val_images=4, test_queries=1, test_images=2)


def test_second_call_draws_nothing(tmp_path, drawn_names):
    place = WORLD.make(tmp_path, TINY, progress=False, workers=1)
    assert len(drawn_names) == 30
    assert WORLD.make(tmp_path, TINY, progress=False, workers=1) == place
    assert len(drawn_names) == 30
    assert WORLD.make(tmp_path, replace(TINY, seed=9), progress=False, workers=1) != place
    assert len(drawn_names) == 60


def test_another_generator_version_is_another_world(tmp_path):
    place = WORLD.make(tmp_path, TINY, progress=False, workers=1)
    assert replace(WORLD, version=-1).make(tmp_path, TINY, progress=False, workers=1) != place


def test_interrupted_run_is_redone(tmp_path, monkeypatch):
    place = WORLD.make(tmp_path, TINY, progress=False, workers=1)
    (place / "complete.json").unlink()  # as if an earlier run had stopped halfway
    next((place / "images").iterdir()).unlink()
    left_over = tmp_path / f".{place.name}.part-killed"
    left_over.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(cache, "_draw_job", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            WORLD.make(tmp_path, TINY, progress=False, workers=1)
    assert WORLD.make(tmp_path, TINY, progress=False, workers=1) == place
    assert len(list((place / "images").iterdir())) == 30
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [place]


def test_full_disk_is_said_in_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def no_space(job):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache, "_draw_job", no_space)
    with pytest.raises(OSError, match=r"no space left on the disk of .* while writing 30 images of 40 x 50") as caught:
        WORLD.make(tmp_path, TINY, progress=False, workers=1)
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value.__cause__, OSError)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_world_that_another_process_finished_meanwhile_stays(tmp_path):
    place, part = tmp_path / "place", tmp_path / "part"
    for folder in (place, part):
        folder.mkdir()
        (folder / "complete.json").write_text(folder.name)
    cache._move_into_place(part, place)
    assert (place / "complete.json").read_text() == "place"
