"""Answers equal a naive loop over the pictures, for every kind of question, and say what they leave out."""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import pickle
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (the name everybody knows)
from cuda_rehearsal import rehearsal
from PIL import Image
from search_world import draw, draw_some, index, make_encoder

from lavis_cir_plugin.search import open_index
from lavis_cir_plugin.search.answers import as_json, as_lines
from lavis_cir_plugin.search.engine import on_device
from lavis_cir_plugin.search.originals import ChangedError

COUNT = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    paths = draw_some(folder / "p", COUNT)
    rows = [f"{path.name},{number},{'xyz'[number % 3]}" for number, path in enumerate(paths)]
    (folder / "m.csv").write_text("\n".join(["path,price,brand", *rows]))
    encoder = make_encoder()
    index(folder / "p", folder / "i", encoder, metadata=folder / "m.csv")
    return paths, encoder, open_index(folder / "i", encoder)


def unit(vector):
    return F.normalize(vector.float(), dim=-1)


def encoded(encoder, path=None, text=None):
    """Return the model's own query of one picture, one text, or both."""
    samples, mode = {}, "multimodal"
    if path is not None:
        samples["image"] = encoder.transform(Image.open(path)).unsqueeze(0)
    if text is not None:
        samples["text_input"] = [text]
    if path is None or text is None:
        mode = "image" if text is None else "text"
    return unit(encoder.model.encode_query(samples, mode)[0])


def naive(encoder, query, paths):
    """Return names and scores, best first, from the pictures themselves, one by one in half precision."""
    scores = []
    for path in paths:
        target = encoder.model.encode_target(encoder.transform(Image.open(path)).unsqueeze(0))[0]
        scores.append((float((unit(target).half().double() @ query.double()).max()), path.name))
    return sorted(scores, key=lambda item: -item[0])


def check(answer, expected, k):
    assert [os.path.basename(hit.path) for hit in answer.hits] == [name for _, name in expected[:k]]
    np.testing.assert_allclose([hit.score for hit in answer.hits], [score for score, _ in expected[:k]], atol=1e-5)


QUESTIONS = {
    "image": ([3], None, {}),
    "text": ([], "is red", {}),
    "both": ([3], "has longer sleeves", {}),
    "several": ([3, 8, 11], "is darker", {"weights": [1, 2, 0.5]}),
    "several images": ([3, 8], None, {}),
    "without": ([3], "is red", {"without": "plain blue", "without_weight": 0.3}),
    "more text": ([3], "is red", {"image_weight": 0.2}),
    "more image": ([3], "is red", {"image_weight": 0.9}),
    "text alone": ([3], "is red", {"image_weight": 0}),
    "image alone": ([3], "is red", {"image_weight": 1}),
}


def naive_query(encoder, paths, numbers, text, settings):
    def one(path):
        both = encoded(encoder, path, text)
        weight = settings.get("image_weight", 0.5)
        if text is None or path is None or weight == 0.5:
            return both
        if weight < 0.5:
            return unit(2 * weight * both + (1 - 2 * weight) * encoded(encoder, text=text))
        return unit(2 * (1 - weight) * both + (2 * weight - 1) * encoded(encoder, path))

    weights = settings.get("weights") or [1] * max(1, len(numbers))
    queries = [one(paths[number]) for number in numbers] or [one(None)]
    query = unit(sum(weight * query for weight, query in zip(weights, queries)))
    if "without" in settings:
        query = unit(query - settings["without_weight"] * encoded(encoder, text=settings["without"]))
    return query


@pytest.mark.parametrize("where", [None, "price < 20 and brand in ('x', 'y')", "price = 7", "price > 1000"])
@pytest.mark.parametrize("kind", QUESTIONS)
def test_every_question_is_answered_as_by_a_naive_loop(world, kind, where):
    paths, encoder, opened = world
    numbers, text, settings = QUESTIONS[kind]
    query = naive_query(encoder, paths, numbers, text, settings)
    allowed = {None: range(COUNT), "price = 7": [7], "price > 1000": []}
    kept = allowed.get(where, [number for number in range(20) if number % 3 < 2])
    expected = naive(encoder, query, [paths[number] for number in kept if number not in numbers])
    for k in (1, 5, COUNT):
        answer = opened.search([paths[number] for number in numbers], text, k, where=where, fold=False, **settings)
        check(answer, expected, k)
        assert answer.is_exact
    assert answer.searched == len(kept)


def test_a_picture_is_named_by_path_content_id_or_in_memory(world):
    paths, _, opened = world
    expected = opened.search(paths[3], "is red")
    number = next(hit.picture.id for hit in opened.search(paths[3], keep_references=True).hits if hit.score > 0)
    picture = next(
        hit.picture for hit in opened.search(paths[3], k=COUNT, keep_references=True).hits if hit.path == str(paths[3])
    )
    assert opened.picture(picture.id) == picture
    assert opened.picture(10**6) is None
    assert number > 0
    assert opened.search(paths[3].read_bytes(), "is red") == expected
    assert opened.search(picture.id, "is red") == expected
    in_memory = opened.search(Image.open(paths[3]), "is red", keep_references=True)
    assert in_memory.hits == opened.search(str(paths[3]), "is red", keep_references=True).hits


def test_a_reference_by_its_id_is_the_picture_that_was_indexed_or_is_refused(tmp_path):
    paths = draw_some(tmp_path / "p", 3)
    encoder = make_encoder()
    index(tmp_path / "p", tmp_path / "i", encoder)
    opened = open_index(tmp_path / "i", encoder)
    number = next(hit.picture.id for hit in opened.search(text="red").hits if hit.path == str(paths[1]))
    expected = opened.search(paths[1], "is red")
    assert opened.search(number, "is red") == expected
    content = paths[1].read_bytes()
    draw(paths[1], 77)
    with pytest.raises(ChangedError, match=r"001\.png has changed since it was indexed; bring the index up to date"):
        opened.search(number, "is red")
    paths[1].unlink()
    with pytest.raises(ChangedError, match=r"001\.png cannot be opened \(No such file or directory\); bring the"):
        opened.search(number, "is red")
    paths[1].write_bytes(content)
    assert opened.search(number, "is red") == expected


def test_the_reference_itself_is_left_out_and_said(world):
    paths, _, opened = world
    answer = opened.search(paths[3], k=COUNT)
    assert len(answer.hits) == COUNT - 1
    assert answer.left_out == (str(paths[3]),)
    kept = opened.search(paths[3], k=COUNT, keep_references=True)
    assert len(kept.hits) == COUNT
    assert kept.left_out == ()


def test_a_reference_that_was_forgotten_is_not_said_to_be_left_out(tmp_path):
    paths = draw_some(tmp_path / "p", 4)
    encoder = make_encoder()
    index(tmp_path / "p", tmp_path / "i", encoder)
    content = paths[0].read_bytes()
    paths[0].unlink()
    index(tmp_path / "p", tmp_path / "i", encoder)
    answer = open_index(tmp_path / "i", encoder).search(content)
    assert (len(answer.hits), answer.left_out) == (3, ())


def test_whether_a_reference_is_in_the_index_is_found_without_reading_all_pictures(world):
    """Counted in steps of SQLite's machine, which takes several for each picture that it reads."""
    catalogue, steps = world[2].catalogue, []
    catalogue._database.set_progress_handler(lambda: steps.append(1), 1)
    try:
        assert catalogue.row_of_content("00" * 32) is None
    finally:
        catalogue._database.set_progress_handler(None, 1)
    assert 0 < len(steps) < COUNT


def test_the_share_below_counts_the_index_and_not_the_filtered_part(world):
    paths, encoder, opened = world
    scores = [score for score, _ in naive(encoder, encoded(encoder, text="is red"), paths)]
    answer = opened.search(text="is red", k=COUNT, where="brand = 'x'")
    assert not answer.share_is_estimated
    for hit in answer.hits:
        assert hit.share_below == pytest.approx(np.mean([score < hit.score - 1e-6 for score in scores]))


def test_nothing_under_the_least_score_comes_back(world):
    paths, encoder, opened = world
    expected = naive(encoder, encoded(encoder, text="is red"), paths)
    least = expected[9][0] - 1e-4
    check(opened.search(text="is red", k=COUNT, min_score=least), expected[:10], COUNT)
    assert opened.search(text="is red", min_score=1.0).hits == ()


def test_near_duplicates_are_folded_behind_the_best_and_k_results_still_come_back(tmp_path):
    folder = tmp_path / "p"
    first = draw(folder / "first.png", 1, size=64)
    for quality in (95, 97, 99):
        Image.open(first).save(folder / f"q{quality}.jpg", quality=quality, subsampling=0)
    Image.open(first).resize((128, 128), Image.Resampling.NEAREST).save(folder / "large.png")
    Image.open(first).save(folder / "same.png", compress_level=1)
    (folder / "copy.png").write_bytes(first.read_bytes())
    alike = {path.name for path in folder.iterdir()}
    draw_some(folder, 6, start=10)
    encoder = make_encoder()
    index(folder, tmp_path / "i", encoder)
    opened = open_index(tmp_path / "i", encoder)
    answer = opened.search(text="is red", k=7)
    assert len(answer.hits) == 7
    (group,) = (hit for hit in answer.hits if os.path.basename(hit.path) in alike)
    names = {os.path.basename(picture.path) for picture in (group.picture, *group.duplicates)}
    assert names == alike
    assert answer.folded == len(alike) - 1
    assert any("near-duplicates are folded" in note for note in as_lines(answer)[1])
    every = opened.search(text="is red", k=100, fold=False)
    assert (len(every.hits), every.folded) == (6 + len(alike), 0)
    assert group.score == max(hit.score for hit in every.hits if os.path.basename(hit.path) in alike)


def test_files_that_are_not_there_any_more_are_named(tmp_path):
    """The folder was renamed, and the index not brought up to date."""
    draw_some(tmp_path / "p", 4)
    encoder = make_encoder()
    index(tmp_path / "p", tmp_path / "i", encoder)
    answer = open_index(tmp_path / "i", encoder).search(text="is red", k=3)
    assert not any("Not on this machine" in note for note in as_lines(answer)[1])
    (tmp_path / "p").rename(tmp_path / "q")
    note = as_lines(answer)[1][-1]
    assert note.startswith(f"Not on this machine: 3 of the 3 files (first: {answer.hits[0].path}); ")


def test_pictures_of_one_colour_each_differ_for_people_and_are_not_folded(tmp_path):
    """A random model may see no difference between them."""
    (tmp_path / "p").mkdir()
    for level in range(0, 250, 25):
        Image.new("RGB", (32, 32), (level, level, level)).save(tmp_path / "p" / f"{level}.png")
    encoder = make_encoder()
    index(tmp_path / "p", tmp_path / "i", encoder)
    assert len(open_index(tmp_path / "i", encoder).search(text="is red", k=20).hits) == 10


@pytest.mark.parametrize("name", ["sentence_prompt", "clip", "mapping", "composing"])
def test_every_model_of_ours_indexes_and_searches(tmp_path, name):
    paths = draw_some(tmp_path / "p", 6)
    encoder = make_encoder(name)
    index(tmp_path / "p", tmp_path / "i", encoder)
    opened = open_index(tmp_path / "i", encoder)
    for path, text in ((paths[0], "is red"), (None, "is red"), (paths[0], None)):
        expected = naive(encoder, encoded(encoder, path, text), [other for other in paths if other != path])
        check(opened.search([] if path is None else path, text, fold=False), expected, 10)


def test_what_was_not_trained_to_compose_adds_the_features_of_picture_and_text(tmp_path):
    paths = draw_some(tmp_path / "p", 6)
    encoder = make_encoder()
    encoder.composes = False
    index(tmp_path / "p", tmp_path / "i", encoder)
    query = unit(encoded(encoder, paths[0]) + encoded(encoder, text="is red"))
    answer = open_index(tmp_path / "i", encoder).search(paths[0], "is red", fold=False)
    check(answer, naive(encoder, query, paths[1:]), 10)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "there is nothing to look for: name a picture, a text, or both"),
        ({"text": "  "}, "there is nothing to look for"),
        ({"text": "x", "k": 0}, "k must be a whole number from 1 to 10,000, got 0"),
        ({"text": "x", "k": True}, "k must be a whole number"),
        ({"text": "x", "image_weight": 1.5}, "image_weight must be a number from 0 to 1, got 1.5"),
        ({"text": "x", "min_score": float("nan")}, "min_score must be a number from -1 to 1, got nan"),
        ({"text": "x", "without_weight": -1}, "without_weight must be a number from 0 to 100"),
        ({"images": [1], "weights": [1, 2]}, "weights must be one for each picture: 1 pictures, 2 weights"),
        ({"images": [1], "weights": [0]}, "weights must be numbers > 0 and <= 1000"),
        ({"images": 10**6}, "the index has no picture 1000000; take an id from its results"),
        ({"images": b"x"}, "the picture cannot be read as an image"),
        (
            {"text": "stripes", "without": "stripes", "without_weight": 1},
            r"the text to avoid takes away all that is looked for; change it, or lower its weight \(without_weight 1\)",
        ),
        ({"images": bytearray(b"x")}, "a picture must be a path, the bytes of a file.*got bytearray"),
        ({"images": io.BytesIO(b"x")}, "a picture must be a path.*got BytesIO"),
        ({"images": np.zeros((4, 4, 3))}, "a picture must be a path.*got ndarray"),
        ({"images": [True]}, "a picture must be a path.*got bool"),
        ({"images": Image.new("F", (4, 4))}, "the picture cannot be read as an image: it is grey of floating point"),
        ({"images": 2**70}, "the index has no picture"),
        ({"text": ["is red"]}, "text must be a string, got list"),
        ({"text": "x", "where": {"price": 1}}, "where must be a string, got dict"),
        ({"text": "x", "where": "prize < 1"}, r"no column of this index; did you mean 'price'\?"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_by_a_sentence(world, asked, message):
    with pytest.raises(ValueError, match=message):
        world[2].search(**asked)


def test_numbers_of_numpy_are_numbers(world):
    """Tables hold ids and weights as numpy's numbers."""
    expected = world[2].search([3, 8], "is red", 4, image_weight=0.25, weights=[1, 2])
    for ids in ([np.int64(3), np.int32(8)], np.array([3, 8])):
        found = world[2].search(
            ids, "is red", np.int64(4), image_weight=np.float32(0.25), weights=np.array([1, 2], np.float32)
        )
        assert found == expected
    assert world[2].search(np.int64(3)) == world[2].search(3)


def test_no_picture_may_be_said_by_none(world):
    assert world[2].search(None, "is red") == world[2].search(text="is red")


def test_an_index_says_what_it_is(world):
    assert repr(world[2]) == f"SearchIndex({str(world[2].path)!r}, {COUNT} pictures, model None)"
    assert "Linear" not in repr(world[1])  # the encoder's


def test_a_closed_index_says_so(world):
    with open_index(world[2].path, world[1]) as opened:
        assert opened.search(3, k=1).hits
    for ask in (
        lambda: opened.search(3),
        lambda: opened.search(text="red", where="price < 9"),
        lambda: opened.picture(1),
    ):
        with pytest.raises(ValueError, match="the index was closed; open it again by open_index"):
            ask()
    opened.close()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda opened: pickle.loads(pickle.dumps(opened))])
def test_a_copy_opens_the_index_for_itself(world, way):
    """Workers that are spawned get one."""
    with way(world[2]) as twin:
        assert twin.search(3, "is red") == world[2].search(3, "is red")
    assert world[2].picture(1) is not None


def test_a_model_in_training_mode_is_refused(world):
    """Its dropout would change every feature of an index without a word."""
    encoder = dataclasses.replace(world[1], model=copy.deepcopy(world[1].model).train())
    with pytest.raises(
        ValueError, match=r"in training mode, whose dropout changes every feature; call model\.eval\(\)"
    ):
        open_index(world[2].path, encoder).search(3, "is red")
    with pytest.raises(ValueError, match="in training mode"):
        encoder.targets(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("encoder", ["output/RUN", ("model", {}, {}), 3])
def test_what_is_no_encoder_is_refused(world, encoder):
    with pytest.raises(ValueError, match=r"encoder must be an Encoder, or what load_run returned, got .*load_encoder"):
        open_index(world[2].path, encoder)


def test_a_missing_reference_is_named(world, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png does not exist; name a picture"):
        world[2].search(tmp_path / "nowhere.png")


def test_own_columns_and_the_files_own_are_found_by(world):
    paths, _, opened = world
    assert opened.columns[:2] == ("price", "brand")
    (hit,) = opened.search(text="red", where="file_name = '007.png' and file_width = 32").hits
    assert hit.picture.columns == {"price": 7, "brand": "y"}
    assert (hit.picture.width, hit.picture.height, hit.picture.bytes) == (32, 32, paths[7].stat().st_size)
    today = "file_modified >= '2020-01-01' and file_added > '2020-01-01 00:00:00'"
    assert opened.search(text="red", where=today).searched == COUNT


def test_an_answer_is_plain_values_too(world):
    paths, _, opened = world
    found = as_json(opened.search(paths[3], "is red", k=2))
    assert {"hits", "searched", "folded", "left_out", "exact", "recall", "share_is_estimated"} == set(found)
    first = found["hits"][0]
    assert {"id", "path", "score", "share_below", "columns", "duplicates", "sha256", "bytes", "width"} <= set(first)
    assert first["columns"]["price"] == int(os.path.basename(first["path"])[:3])


def test_threads_get_the_answers_of_one(world):
    paths, _, opened = world
    expected = [opened.search(path, "is red", 5) for path in paths[:8]]
    found = [None] * 8

    def ask(number):
        found[number] = opened.search(paths[number], "is red", 5)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_a_gpu_gives_the_same_answers(world):
    """A rehearsed one, with the numbers of the CPU."""
    paths, _, opened = world
    expected = opened.search(paths[3], "is red", 5)
    with rehearsal():
        on_gpu = make_encoder()
        on_gpu.model.cuda()
        on_gpu.device = torch.device("cuda")
        answer = open_index(opened.path, on_gpu, "cuda").search(paths[3], "is red", 5)
    assert [hit.path for hit in answer.hits] == [hit.path for hit in expected.hits]
    assert [hit.score for hit in answer.hits] == pytest.approx([hit.score for hit in expected.hits], abs=1e-5)


def test_features_that_do_not_fit_on_a_gpu_are_searched_where_they_are(caplog):
    class Large:
        """Half a gibibyte of features that no GPU takes."""

        def to(self, device):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        def numel(self):
            return 2**28

        def element_size(self):
            return 2

    features = Large()
    for kind in ("cpu", "mps"):  # the latter has no double precision, in which scores are compared
        assert on_device(features, torch.device(kind), "shop") is features
    assert not caplog.text
    assert on_device(features, torch.device("cuda"), "shop") is features
    assert "shop is searched on the CPU: its 0.5 GiB of features do not fit on cuda beside" in caplog.text
