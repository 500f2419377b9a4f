"""The drawn worlds in CIRR's and CIRCO's files: fields, the rule of ground truths, splits, sets of six."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lavis_cir_plugin import CONFIGS
from lavis_cir_plugin.benchmarks import circo as circo_benchmark
from lavis_cir_plugin.benchmarks import cirr as cirr_benchmark
from lavis_cir_plugin.garments import __main__ as command_line
from lavis_cir_plugin.garments import attributes as world
from lavis_cir_plugin.garments import circo, cirr, fashioniq, questions
from lavis_cir_plugin.garments.ground_truth import Gallery, is_answer
from lavis_cir_plugin.garments.wording import Phrase, choose_phrases, edit_sentence, phrases, tokens

CIRR = cirr.CIRRGarments(seed=3, train_sets=8, val_sets=7, test_sets=2, image_width=32, image_height=40)
CIRCO = circo.CIRCOGarments(seed=3, images=150, val_queries=30, test_queries=12, image_width=32, image_height=40)

SOLID = world.Garment(
    category="dress", colour="red", secondary="", pattern="solid", sleeve="short", length="knee", neckline="round",
    fit="regular", graphic="none", buttons="no", belt="no", hem="straight", finish="matte",
    photo=world.sample_photo(random.Random(0)),
)  # fmt: skip


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def cirr_root(tmp_path_factory) -> Path:
    return cirr.write_cirr(tmp_path_factory.mktemp("cirr"), CIRR, progress=False, workers=1)


@pytest.fixture(scope="module")
def circo_root(tmp_path_factory) -> Path:
    return circo.write_circo(tmp_path_factory.mktemp("circo"), CIRCO, progress=False, workers=1)


def test_same_bytes_whatever_the_number_of_processes(cirr_root, circo_root, tmp_path):
    again = cirr.write_cirr(tmp_path / "cirr", CIRR, progress=False, workers=2)
    assert contents(again) == contents(cirr_root)
    again = circo.write_circo(tmp_path / "circo", CIRCO, progress=False, workers=2)
    assert contents(again) == contents(circo_root)


def test_a_plan_depends_on_the_seed_and_on_nothing_else():
    assert cirr.plan_split(CIRR, "val") == cirr.plan_split(replace(CIRR, image_width=64), "val")
    assert cirr.plan_split(CIRR, "val") != cirr.plan_split(replace(CIRR, seed=4), "val")
    assert circo.plan_world(CIRCO) == circo.plan_world(replace(CIRCO, image_width=64))
    assert circo.plan_world(CIRCO) != circo.plan_world(replace(CIRCO, seed=4))


# -- the rule of ground truths ---------------------------------------------------------------------------------------


def caption(target: world.Garment, *texts: str) -> list[Phrase]:
    options = [phrase for many in phrases(SOLID, target).values() for phrase in many]
    return [next(phrase for phrase in options if phrase.text == text) for text in texts]


def test_what_answers_a_caption():
    """The reference is a solid red knee-length dress with short sleeves; the caption says "is blue"."""
    blue = replace(SOLID, colour="blue")
    is_blue = caption(blue, "blue")
    assert is_answer(blue, SOLID, is_blue)
    assert is_answer(replace(blue, photo=world.sample_photo(random.Random(1))), SOLID, is_blue), "photos do not count"
    assert not is_answer(SOLID, SOLID, is_blue)
    assert not is_answer(replace(SOLID, colour="green"), SOLID, is_blue)
    assert not is_answer(replace(blue, category="toptee", length="regular"), SOLID, is_blue)
    looser = replace(blue, fit="loose")
    assert not is_answer(looser, SOLID, is_blue), "it changes what the caption does not speak of"
    assert is_answer(looser, SOLID, is_blue, kept=circo.SALIENT), "CIRCO's details are free"
    assert not is_answer(replace(blue, sleeve="long"), SOLID, is_blue, kept=circo.SALIENT)
    assert is_answer(replace(blue, sleeve="long"), SOLID, is_blue, kept=())


def test_a_colour_that_comes_with_a_pattern_may_be_left_open():
    """Dots of any colour answer "has polka dots"; only white dots answer "white polka dots"."""
    white = replace(SOLID, pattern="dots", secondary="white")
    yellow = replace(SOLID, pattern="dots", secondary="yellow")
    dots, white_dots = caption(white, "polka dots"), caption(white, "white polka dots")
    assert [is_answer(garment, SOLID, dots) for garment in (white, yellow)] == [True, True]
    assert [is_answer(garment, SOLID, white_dots) for garment in (white, yellow)] == [True, False]


def test_a_comparison_is_answered_by_every_value_it_is_true_of():
    maxi, mini = replace(SOLID, length="maxi"), replace(SOLID, length="mini")
    longer = caption(maxi, "longer")
    assert [is_answer(g, SOLID, longer) for g in (maxi, replace(SOLID, length="midi"), mini)] == [True, True, False]


@pytest.mark.parametrize("kept", [world.ATTRIBUTES, circo.SALIENT, ()])
def test_the_gallery_finds_what_a_look_at_every_garment_finds(kept):
    garments = circo.plan_world(CIRCO).garments
    gallery, rng, answered = Gallery(garments), random.Random(0), 0
    for _ in range(200):
        reference = rng.choice(garments)
        target = world.edited(reference, rng, 1)
        said = choose_phrases(reference, target, rng)
        naive = [index for index, garment in enumerate(garments) if is_answer(garment, reference, said, kept)]
        assert gallery.answers(reference, target, said, kept) == naive
        answered += bool(naive)
    assert answered > 5


def test_captions_tell_every_change_once():
    rng = random.Random(2)
    for index in range(400):
        reference = world.sample(world.DISTINCT_CATEGORIES[index % 2], rng)
        target = world.edited(reference, rng, 1 + index % 2)
        said = choose_phrases(reference, target, rng)
        assert {name for phrase in said for name in phrase.covers} >= set(phrases(reference, target))
        assert is_answer(target, reference, said)
        assert len(said) <= len(phrases(reference, target))


def test_sentences_use_words_that_the_small_model_knows():
    vocabulary = set((CONFIGS / "models/blip2_cir_tiny_vocab.txt").read_text(encoding="utf-8").split())
    rng, texts = random.Random(0), []
    for index in range(1500):
        reference = world.sample(world.DISTINCT_CATEGORIES[index % 2], rng)
        said = choose_phrases(reference, world.edited(reference, rng, 1 + index % 2), rng)
        if said:
            texts.append(edit_sentence(said, reference.category, rng))
    assert {word for text in texts for word in tokens(text)} <= vocabulary
    assert len(set(texts)) > 1000
    assert 8 < np.mean([len(tokens(text)) for text in texts]) < 12, "CIRR: 11.0 words"


# -- CIRR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "folder"), [("train", r"train/\d{1,2}"), ("val", "dev"), ("test1", "test1")])
def test_cirr_has_the_protocols_fields_and_files(cirr_root, split, folder):
    rows = read(cirr_root / f"cirr/captions/cap.rc2.{split}.json")
    images = read(cirr_root / f"cirr/image_splits/split.rc2.{split}.json")
    assert len(images) == 6 * CIRR.sets(split)
    for name, place in images.items():
        assert re.fullmatch(rf"\./{folder}/{name}\.png", place)
        assert re.fullmatch(r"(train|dev|test1)-\d+-[0-3]-img[01]", name)
        assert Image.open(cirr_root / place).format == "PNG"
    public = split != "test1"
    for row in rows:
        targets = {"target_hard", "target_soft"} if public else set()
        assert set(row) == {"pairid", "reference", "caption", "img_set"} | targets
        ranks = {"reference_rank"} | ({"target_rank"} if public else set())
        assert set(row["img_set"]) == {"id", "members"} | ranks
        assert all(isinstance(row["img_set"][rank], int) and 0 <= row["img_set"][rank] <= 5 for rank in ranks)
        assert isinstance(row["img_set"]["id"], int)
        members = row["img_set"]["members"]
        assert len(members) == len(set(members)) == 6
        assert {row["reference"], row.get("target_hard", row["reference"])} <= set(members) <= set(images)
        assert row["caption"].strip()
        if public:
            assert row["target_hard"] != row["reference"]
            assert row["target_soft"][row["target_hard"]] == 1.0
            assert set(row["target_soft"]) <= set(members) - {row["reference"]}
            assert sorted(row["target_soft"].values())[-2:-1] in ([], [0.5], [-1.0]), "one right answer"
    pairids = [row["pairid"] for row in rows]
    assert all(isinstance(pairid, int) for pairid in pairids)
    assert pairids == sorted(set(pairids))
    assert pairids[-1] - pairids[0] >= len(pairids), "pair ids have gaps"


def test_cirr_images_belong_to_one_split_and_one_set(cirr_root):
    listed = [name for split in cirr.SPLITS for name in read(cirr_root / f"cirr/image_splits/split.rc2.{split}.json")]
    assert len(set(listed)) == len(listed)
    assert {path.stem for path in cirr_root.rglob("*.png")} == set(listed)
    for split in cirr.SPLITS:
        members = [name for names in cirr.plan_split(CIRR, split).sets for name in names]
        assert sorted(members) == sorted(cirr.plan_split(CIRR, split).images)


def test_no_garment_occurs_twice_in_a_cirr_gallery():
    for split in cirr.SPLITS:
        images = cirr.plan_split(CIRR, split).images.values()
        assert len({(garment.category, *world.attributes(garment)) for garment in images}) == len(images)


def test_cirr_targets_are_the_only_answers_in_the_whole_gallery():
    queries = 0
    for split in cirr.SPLITS:
        plan = cirr.plan_split(CIRR, split)
        for pair in plan.pairs:
            names = plan.sets[pair.image_set]
            reference = plan.images[names[pair.reference]]
            answers = [name for name, garment in plan.images.items() if is_answer(garment, reference, pair.changes)]
            assert answers == [names[pair.target]]
            queries += 1
    assert queries > 50


def test_cirr_sets_are_hard():
    """Each member is one or two edits from another, each query asks for one or two, and a set has up to 7 queries."""
    plan = cirr.plan_split(CIRR, "val")
    for names in plan.sets:
        members = [plan.images[name] for name in names]
        for member in members:
            others = (len(phrases(other, member)) for other in members if other is not member)
            assert 1 <= min(others) <= 2
        assert len({member.category for member in members}) == 1
    counts = Counter(pair.image_set for pair in plan.pairs)
    assert max(counts.values()) == CIRR.queries_per_set
    assert min(counts.values()) > 1
    for pair in plan.pairs:
        before, after = (plan.images[plan.sets[pair.image_set][place]] for place in (pair.reference, pair.target))
        assert 1 <= len(phrases(before, after)) <= 2


def test_cirr_soft_labels():
    """The caption asks for blue. Blue with a belt has 0.5, four changes from the target -1.0, and others no label."""
    blue = replace(SOLID, colour="blue")
    members = [
        SOLID,
        blue,
        replace(blue, belt="yes"),
        replace(SOLID, colour="green", sleeve="long", belt="yes", finish="shiny"),
        replace(SOLID, colour="green"),
        replace(SOLID, sleeve="long"),
    ]
    pair = cirr.Pair(0, 0, 1, tuple(caption(blue, "blue")), "is blue")
    assert cirr.soft_labels(members, pair) == {1: 1.0, 2: 0.5, 3: -1.0}


def test_held_out_combinations_are_never_in_cirrs_training_images():
    train = cirr.plan_split(replace(CIRR, train_sets=40), "train").images.values()
    val = cirr.plan_split(replace(CIRR, val_sets=40), "val").images.values()
    assert not any(world.is_held_out(garment, CIRR.held_out) for garment in train)
    assert sum(world.is_held_out(garment, CIRR.held_out) for garment in val) > 10


def test_cirrs_reader_reads_it(cirr_root):
    config = {"root": str(cirr_root), "verify_images": True}
    triplets, paths = cirr_benchmark.read_train(config)
    assert len(triplets) == len(cirr.plan_split(CIRR, "train").pairs)
    assert all(path.is_file() for path in paths.values())
    for split in ("val", "test"):
        plan = cirr.plan_split(CIRR, "val" if split == "val" else "test1")
        (group,) = cirr_benchmark.read_benchmark(config, split).groups
        assert group.gallery == tuple(plan.images)
        assert [query.reference for query in group.queries] == [plan.sets[p.image_set][p.reference] for p in plan.pairs]
        assert all(len(query.members) == 5 for query in group.queries)
        assert all((query.target is None) == (split == "test") for query in group.queries)


# -- CIRCO -----------------------------------------------------------------------------------------------------------


def test_circo_has_the_protocols_fields_and_files(circo_root):
    coco = circo_root / "COCO2017_unlabeled"
    listed = read(coco / "annotations/image_info_unlabeled2017.json")["images"]
    ids = [image["id"] for image in listed]
    assert len(set(ids)) == len(ids) == CIRCO.images
    assert ids != sorted(ids)
    assert [image["file_name"] for image in listed] == [f"{number:012d}.jpg" for number in ids]
    assert {path.name for path in (coco / "unlabeled2017").iterdir()} == {image["file_name"] for image in listed}
    assert all(Image.open(coco / "unlabeled2017" / image["file_name"]).size == (32, 40) for image in listed[:5])
    for split in circo.SPLITS:
        rows = read(circo_root / f"annotations/{split}.json")
        assert [row["id"] for row in rows] == list(range(CIRCO.queries(split)))
        references = [row["reference_img_id"] for row in rows]
        assert len(set(references)) == len(references)
        for row in rows:
            public = {"target_img_id", "gt_img_ids", "semantic_aspects"} if split == "val" else set()
            assert set(row) == {"reference_img_id", "relative_caption", "shared_concept", "id"} | public
            assert re.fullmatch(r"(is|has) [a-z ]+[a-z]", row["relative_caption"])
            assert re.fullmatch(r"an? [a-z ]+[a-z]", row["shared_concept"])
            assert row["reference_img_id"] in ids
            if split == "val":
                truths = row["gt_img_ids"]
                assert row["target_img_id"] == truths[0]
                assert len(set(truths)) == len(truths) <= circo.MAX_GROUND_TRUTHS
                assert set(truths) <= set(ids) - {row["reference_img_id"]}
                aspects = row["semantic_aspects"]
                assert aspects == [aspect for aspect in circo.ASPECTS if aspect in aspects]
                assert aspects


def test_circos_ground_truths_are_all_that_satisfy_the_rule_and_nothing_else():
    """The test writes the rule again: category, phrases of the caption, and salient attributes without a mention."""
    plan = circo.plan_world(CIRCO)
    near_misses = 0
    for query in (each for split in plan.queries.values() for each in split):
        reference = plan.garments[query.reference]
        mentioned = {name for phrase in query.changes for name in phrase.covers}
        stays = {"colour", "pattern", "sleeve", "length", "neckline"} - mentioned
        for place, garment in enumerate(plan.garments):
            if garment.category != reference.category:
                assert place not in query.ground_truths
                continue
            offered = {(p.verb, p.text) for many in phrases(reference, garment).values() for p in many}
            says = {(p.verb, p.text) for p in query.changes} <= offered
            same = all(getattr(garment, name) == getattr(reference, name) for name in stays)
            assert (says and same) == (place in query.ground_truths)
            near_misses += says and not same
        assert all(phrase.text in query.caption for phrase in query.changes)
    assert near_misses > 50


def test_circos_shared_concept_is_true_of_the_reference_and_of_every_answer():
    plan = circo.plan_world(CIRCO)
    for query in plan.queries["val"]:
        shown = [plan.garments[place] for place in (query.reference, *query.ground_truths)]
        noun = "dress" if shown[0].category == "dress" else "top"
        assert noun in tokens(query.concept)
        assert len({garment.category for garment in shown}) == 1
        if "sleeves" in query.concept:
            assert len({garment.sleeve for garment in shown}) == 1
        if re.search("stripe", query.concept):
            assert {garment.pattern for garment in shown} <= {"stripes", "vertical stripes"}


def test_circo_has_about_as_many_ground_truths_as_the_real_one():
    """CIRCO's val has 4.16 ground truths on average, from 1 to 14; five worlds together come near that.

    A larger gallery has more looks, but not more garments per look.
    """
    counts = [
        len(query.ground_truths)
        for seed in range(5)
        for query in circo.plan_world(circo.CIRCOGarments(seed=seed, val_queries=60)).queries["val"]
    ]
    assert 3 < np.mean(counts) < 5.5
    assert min(counts) == 1
    assert max(counts) > 9
    large = circo.plan_world(circo.CIRCOGarments(images=6000, val_queries=150, test_queries=1)).queries["val"]
    assert 3 < np.mean([len(query.ground_truths) for query in large]) < 5.5


@pytest.mark.parametrize(
    ("edit", "texts", "aspects"),
    [
        ({"colour": "blue"}, ["blue"], ["direct_addressing"]),
        ({"colour": "blue"}, ["blue instead of red"], ["direct_addressing", "compare_change"]),
        ({"colour": "navy"}, ["darker"], ["comparative_statement"]),
        ({"belt": "yes"}, ["a belt at the waist"], ["addition", "direct_addressing", "spatial_relations_background"]),
        ({"sleeve": "sleeveless"}, ["no sleeves"], ["negation", "direct_addressing"]),
        (
            {"pattern": "two tone", "secondary": "white", "length": "maxi"},
            ["two colors", "longer"],
            ["cardinality", "addition", "direct_addressing", "comparative_statement", "statement_with_conjunction"],
        ),
    ],
)
def test_semantic_aspects(edit, texts, aspects):
    """The reference SOLID is a plain red dress with short sleeves and no belt."""
    changes = caption(replace(SOLID, **edit), *texts)
    assert list(circo.semantic_aspects(SOLID, changes, " and ".join(texts))) == aspects


def test_circos_reader_reads_it(circo_root):
    plan = circo.plan_world(CIRCO)
    config = {"root": str(circo_root), "verify_images": True}
    for split in circo.SPLITS:
        benchmark = circo_benchmark.read_benchmark(config, split)
        (group,) = benchmark.groups
        assert len(group.gallery) == CIRCO.images
        place = {name: index for index, name in enumerate(group.gallery)}
        for query, planned in zip(group.queries, plan.queries[split]):
            assert place[query.reference] == planned.reference
            truths = tuple(place[name] for name, _ in query.relevance)
            assert truths == (planned.ground_truths if split == "val" else ())


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "values", "message"),
    [
        (cirr, {"val_sets": "many"}, "val_sets must be a whole number >= 1, got 'many'"),
        (cirr, {"held_out": None}, "held_out must be a number >= 0 and <= 0.5, got null"),
        (circo, {"images": 99.5}, r"images must be a whole number >= 1, got 99\.5"),
        (circo, {"seed": True}, "seed must be a whole number, got true"),
        (fashioniq, {"image_suffix": 3}, "image_suffix must be one of .jpg, .png, got 3"),
        (questions, {"train_images": []}, r"train_images must be a whole number >= 1, got \[\]"),
        (cirr, {"val_sets": 0}, "val_sets must be a whole number >= 1, got 0"),
        (cirr, {"queries_per_set": 10}, r"queries_per_set must be a whole number >= 1 and <= 9, got 10"),
        (cirr, {"image_width": 20}, "image_width must be a whole number >= 32, got 20"),
        (cirr, {"held_out": 0.7}, r"held_out must be a number >= 0 and <= 0.5, got 0.7"),
        (circo, {"val_queries": 800}, "val_queries must be less than garments.images: 800, got 800"),
        (circo, {"test_queries": 0}, "test_queries must be a whole number >= 1, got 0"),
        (circo, {"image_height": 8}, "image_height must be a whole number >= 32, got 8"),
    ],
)
def test_impossible_values_are_refused(module, values, message):
    with pytest.raises(ValueError, match=message):
        module.WORLD.settings(**values)


def test_more_queries_than_a_gallery_holds_is_said():
    """Two images share one look, so no query can ask for another look."""
    with pytest.raises(ValueError, match="2 images gave 0 queries for val, not 1; raise images or lower the number"):
        circo.plan_world(circo.CIRCOGarments(images=2, val_queries=1, test_queries=1))


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (cirr, replace(CIRR, train_sets=1, val_sets=1, test_sets=1)),
        (circo, replace(CIRCO, images=40, val_queries=4, test_queries=2)),
    ],
)
def test_a_world_is_drawn_once(module, config, tmp_path):
    place = module.WORLD.make(tmp_path, config, progress=False, workers=1)
    written = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert module.WORLD.make(tmp_path, config, progress=False, workers=1) == place
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == written
    assert module.WORLD.make(tmp_path, replace(config, seed=9), progress=False, workers=1) != place


def test_the_command_line_overwrites_nothing_but_what_it_has_drawn(tmp_path, monkeypatch, capsys):
    command = ["garments", str(tmp_path), "--benchmark", "circo", "--image-width", "32"]
    monkeypatch.setattr("sys.argv", [*command, "--images", "40", "--val-queries", "4", "--test-queries", "2"])
    real = tmp_path / "annotations/val.json"
    real.parent.mkdir()
    real.write_text("the real data set's")
    with pytest.raises(SystemExit):
        command_line.main()
    assert f"{tmp_path} holds files and no garments.json" in capsys.readouterr().err
    assert real.read_text() == "the real data set's"
    real.unlink()
    real.parent.rmdir()
    for _ in range(2):
        command_line.main()
    assert len(read(real)) == 4
    assert read(tmp_path / "garments.json")["val_queries"] == 4


def test_the_command_line_writes_the_chosen_shape(tmp_path, monkeypatch, capsys):
    command = ["garments", str(tmp_path), "--benchmark", "circo"]
    sizes = ["--images", "40", "--val-queries", "4", "--test-queries", "2", "--image-width", "32"]
    monkeypatch.setattr("sys.argv", [*command, *sizes])
    command_line.main()
    assert len(read(tmp_path / "annotations/val.json")) == 4
    monkeypatch.setattr("sys.argv", [*command, "--images", "1"])
    with pytest.raises(SystemExit):
        command_line.main()
    assert "val_queries must be less than garments.images: 1, got 220" in capsys.readouterr().err
