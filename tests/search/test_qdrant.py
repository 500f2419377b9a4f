"""A copy in Qdrant answers as the folder does: in its client's local mode, and in the engine itself, run in process."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from search_world import draw, draw_some, index, make_encoder

pytest.importorskip("qdrant_client")

from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import UnexpectedResponse

from lavis_cir_plugin.commands.main import main
from lavis_cir_plugin.search import open_collection, open_index, qdrant, qdrant_filters
from lavis_cir_plugin.search.build import locked
from lavis_cir_plugin.search.qdrant import Collection, connect, keep_in
from lavis_cir_plugin.search.qdrant_index import QdrantIndex

COUNT = 30
URL = "http://engine:6333/photos"


def collection():
    return Collection(QdrantClient(":memory:"), "photos", URL)


def engine(folder):
    pytest.importorskip("qdrant_edge")
    from engine_in_process import EngineInProcess

    return Collection(EngineInProcess(folder), "photos", URL)


@pytest.fixture(scope="module", params=["local mode", "engine"])
def world(request, tmp_path_factory):
    """Pictures with copies, near-duplicates and columns, some without a value, in a folder and in the engine."""
    folder = tmp_path_factory.mktemp("world")
    paths = draw_some(folder / "p", COUNT)
    for number in range(4):
        (folder / "p" / f"copy{number}.png").write_bytes(paths[number].read_bytes())
        draw(folder / "p" / f"large{number}.png", number, 64)
    for number, path in enumerate(sorted((folder / "p").iterdir())):
        os.utime(path, ns=(1, (1_600_000_000 + 3600 * number) * 10**9 + 999_999_999))
    rows = [
        f"{path.name},{'' if number % 7 == 3 else number / 4},{'' if number % 5 == 1 else 'xyzX'[number % 4]},{number}"
        for number, path in enumerate(sorted((folder / "p").iterdir())[:-3])
    ]
    (folder / "m.csv").write_text("\n".join(["path,price,brand,in stock", *rows]))
    encoder = make_encoder()
    index(folder / "p", folder / "i", encoder, metadata=folder / "m.csv")
    there = collection() if request.param == "local mode" else engine(folder / "engine")
    keep_in(there, folder / "i", quiet=True)
    return paths, open_index(folder / "i", encoder), QdrantIndex(there, encoder)


QUESTIONS = {
    "text": ([], "is red", {}),
    "both": ([3], "is red", {}),
    "several": ([3, 8], "is red", {"weights": [1, 2], "without": "blue"}),
    "one by one": ([3], None, {"fold": False}),
    "its own file too": ([3], None, {"keep_references": True}),
    "least score": ([], "is red", {"min_score": -0.02}),
}


@pytest.mark.parametrize("where", [None, "price < 5 and brand in ('x', 'y')", "price = 1", "price > 1000"])
@pytest.mark.parametrize("kind", QUESTIONS)
def test_every_question_is_answered_as_by_the_folder(world, kind, where):
    paths, embedded, there = world
    numbers, text, settings = QUESTIONS[kind]
    for k in (1, 5, 2 * COUNT):
        asked = ([paths[number] for number in numbers], text, k)
        expected = embedded.search(*asked, where=where, **settings)
        assert there.search(*asked, where=where, **settings) == expected


def test_the_questions_of_this_file_find_folded_pictures_copies_and_hidden_references(world):
    paths, embedded, _ = world
    answer = embedded.search(paths[3], k=2 * COUNT)
    assert answer.folded > 0
    assert len(answer.left_out) == 1
    assert any(len(hit.duplicates) > 0 for hit in answer.hits)
    assert 0 < len(embedded.search(text="is red", k=2 * COUNT, min_score=-0.02).hits) < COUNT


def drawn_condition(rng, depth=0):
    """Return a random condition on the columns of `world`."""
    choice = rng.random()
    if depth < 3 and choice < 0.45:
        parts = [drawn_condition(rng, depth + 1) for _ in range(rng.randint(2, 3))]
        return f"({rng.choice([' and ', ' or ']).join(parts)})"
    if depth < 3 and choice < 0.65:
        return f"not {drawn_condition(rng, depth + 1)}"
    name, values = rng.choice(
        [
            ("price", ["0", "1", "2.25", "5", "7e0", "-1"]),
            ('"in stock"', ["3", "20", "true", "36"]),
            ("file_width", ["32", "64", "31.5"]),
            ("file_id", ["1", "7.0", "12"]),
            ("brand", ["'x'", "'X'", "'y'", "'nothing'", "''"]),
            ("file_name", ["'003.png'", "'copy2.png'", "'m'", "'large1.png'"]),
            ("file_modified", ["'2020-09-13'", "'2020-09-13 15:26:40'", "'2020-09-14 02'", "'z'", "''"]),
        ]
    )
    value = lambda: rng.choice(values)  # noqa: E731
    negation = rng.choice(["", "not "])
    kinds = [
        f"{name} {rng.choice(['=', '<>', '<', '<=', '>', '>='])} {value()}",
        f"{name} {negation}in ({value()}, {value()})",
        f"{name} {negation}between {value()} and {value()}",
        f"{name} is {negation}null",
    ]
    if values[0].startswith("'"):
        kinds.append(f"{name} {negation}like '{rng.choice(['%x%', '00_.%', '2020-09-13%', 'X', 'large%'])}'")
    return rng.choice(kinds)


def test_any_condition_finds_what_it_finds_in_the_folder(world):
    _, embedded, there = world
    rng = random.Random(0)
    found = []
    for _ in range(150):
        where = drawn_condition(rng)
        expected = embedded.search(text="is red", k=3, where=where)
        assert there.search(text="is red", k=3, where=where) == expected, where
        found.append(expected.searched)
    assert sum(0 < count < COUNT for count in found) > 40


def test_the_features_that_come_back_are_the_bits_of_the_folder(world):
    _, embedded, there = world
    query = embedded.encoder.query([], "is red")[0]
    points = there.collection.best(query, None, 2 * COUNT, None, 3)
    features = np.stack([point.features for point in sorted(points, key=lambda point: point.row)])
    np.testing.assert_array_equal(features, embedded.gallery.features.numpy())


def test_a_picture_is_found_by_its_id_and_columns_are_known(world):
    _, embedded, there = world
    assert (len(there), there.columns) == (len(embedded), embedded.columns)
    assert [there.picture(number) for number in range(COUNT)] == [embedded.picture(number) for number in range(COUNT)]
    assert there.picture(10**6) is None
    assert there.search(5, "is red") == embedded.search(5, "is red")
    with pytest.raises(ValueError, match="names 'prize', which is no column"):
        there.search(text="red", where="prize < 1")


@pytest.mark.parametrize("where", ["price < 9007199254740993", "price < 1e999"])
def test_a_number_that_is_no_double_is_refused(world, where):
    with pytest.raises(ValueError, match="Qdrant compares doubles"):
        world[2].search(text="red", where=where)


def test_too_many_texts_to_compare_by_order_are_refused(world, monkeypatch):
    monkeypatch.setattr(qdrant_filters, "MOST_TEXTS", 20)
    with pytest.raises(ValueError, match=r"compares file_name by like, .* more than 20 different texts"):
        world[2].search(text="red", where="file_name like '%x'")
    assert world[2].search(text="red", where="brand like '%x'").searched > 0


def answers(opened):
    return [opened.search(text="is red", k=50, where=where) for where in (None, "price > 3", "price is null")]


def columns(folder, rows):
    (folder / "m.csv").write_text("\n".join(["path,price", *rows]))
    return folder / "m.csv"


@pytest.mark.parametrize("is_engine", [False, True])
def test_only_what_differs_is_written(tmp_path, is_engine):
    paths = draw_some(tmp_path / "p", 8)
    encoder = make_encoder()
    index(tmp_path / "p", tmp_path / "i", encoder, metadata=columns(tmp_path, ["000.png,1", "001.png,4"]))
    there = engine(tmp_path / "engine") if is_engine else collection()
    kept = keep_in(there, tmp_path / "i", quiet=True)
    assert (kept.pictures, kept.added, kept.changed, kept.removed, kept.recall) == (8, 8, 0, 0, 1.0)
    opened = QdrantIndex(there, encoder)
    paths[0].unlink()
    (tmp_path / "p" / "copy.png").write_bytes(paths[1].read_bytes())
    draw(tmp_path / "p" / "new.png", 100)
    index(tmp_path / "p", tmp_path / "i", encoder, metadata=columns(tmp_path, ["001.png,4", "002.png,5"]))
    kept = keep_in(there, tmp_path / "i", quiet=True)
    assert (kept.pictures, kept.added, kept.changed, kept.removed) == (9, 1, 2, 1)
    assert answers(opened) == answers(open_index(tmp_path / "i", encoder))
    kept = keep_in(there, tmp_path / "i", quiet=True)
    assert (kept.added, kept.changed, kept.removed) == (0, 0, 0)


class KilledError(Exception):
    pass


def test_killed_and_started_again_it_goes_on_where_it_was(tmp_path, monkeypatch):
    draw_some(tmp_path / "p", 8)
    encoder = make_encoder()
    index(tmp_path / "p", tmp_path / "i", encoder, metadata=columns(tmp_path, ["000.png,1", "001.png,4"]))
    monkeypatch.setattr(qdrant, "_NUMBERS_AT_ONCE", 1)  # a content at a time
    there = collection()
    put, written = there.put, []

    def dying(points):
        if len(written) == 3:
            raise KilledError
        written.extend(points)
        put(points)

    monkeypatch.setattr(there, "put", dying)
    with pytest.raises(KilledError):
        keep_in(there, tmp_path / "i", quiet=True)
    with pytest.raises(ValueError, match=r"photos is half-written; run lavis-cir index --to .* again to finish it"):
        QdrantIndex(there, encoder)
    monkeypatch.setattr(there, "put", put)
    assert keep_in(there, tmp_path / "i", quiet=True).added == 5
    assert answers(QdrantIndex(there, encoder)) == answers(open_index(tmp_path / "i", encoder))


def test_what_another_process_adds_before_the_lock_is_had_is_copied_and_counted(tmp_path, monkeypatch):
    there, encoder = collection(), make_encoder()
    draw_some(tmp_path / "p", 3)
    index(tmp_path / "p", tmp_path / "i", encoder)

    def waiting(path):
        draw_some(tmp_path / "p", 2, start=10)
        index(tmp_path / "p", path, encoder)
        return locked(path)

    monkeypatch.setattr(qdrant, "locked", waiting)
    kept = keep_in(there, tmp_path / "i", quiet=True)
    assert (kept.pictures, kept.added) == (5, 5)


def test_while_a_compacted_index_is_copied_every_picture_has_its_own_score(tmp_path, monkeypatch):
    """Its contents have new rows, and some of those in the collection still have the old ones."""
    monkeypatch.setattr("lavis_cir_plugin.search.build.FEWEST_DEAD", 3)
    paths = draw_some(tmp_path / "p", 8)
    encoder = make_encoder()
    index(tmp_path / "p", tmp_path / "i", encoder)
    there = collection()
    keep_in(there, tmp_path / "i", quiet=True)
    expected = {hit.path: hit.score for hit in QdrantIndex(there, encoder).search(text="red").hits}
    for path in paths[:5]:
        path.unlink()
    index(tmp_path / "p", tmp_path / "i", encoder)
    change, changed = there.change, []

    def dying(*arguments):
        if len(changed) == 2:
            raise KilledError
        changed.append(change(*arguments))

    monkeypatch.setattr(there, "change", dying)
    with pytest.raises(KilledError):
        keep_in(there, tmp_path / "i", quiet=True)
    for fold in (True, False):
        hits = QdrantIndex(there, encoder).search(text="red", fold=fold).hits
        assert {hit.path: hit.score for hit in hits} == expected
        assert [len(hit.duplicates) for hit in hits] == [0] * 8


def test_other_columns_are_shown_when_all_points_have_them(tmp_path, monkeypatch):
    draw_some(tmp_path / "p", 4)
    encoder = make_encoder()
    index(tmp_path / "p", tmp_path / "i", encoder, metadata=columns(tmp_path, ["000.png,1"]))
    there = collection()
    keep_in(there, tmp_path / "i", quiet=True)
    opened = QdrantIndex(there, encoder)
    (tmp_path / "n.csv").write_text("path,brand\n000.png,x\n")
    index(tmp_path / "p", tmp_path / "i", encoder, metadata=tmp_path / "n.csv")
    change = there.change
    monkeypatch.setattr(there, "change", lambda *_: (_ for _ in ()).throw(KilledError))
    with pytest.raises(KilledError):
        keep_in(there, tmp_path / "i", quiet=True)
    with pytest.raises(ValueError, match="half-written"):
        opened.search(text="red")
    monkeypatch.setattr(there, "change", change)
    keep_in(there, tmp_path / "i", quiet=True)
    (hit,) = opened.search(text="red", where="brand = 'x'").hits
    assert hit.picture.columns == {"brand": "x"}


def test_a_collection_of_another_model_or_index_or_maker_is_refused(tmp_path):
    draw_some(tmp_path / "p", 4)
    encoder, other = make_encoder(), make_encoder(seed=1)
    index(tmp_path / "p", tmp_path / "i", encoder)
    index(tmp_path / "p", tmp_path / "other", other)
    index(tmp_path / "p", tmp_path / "twin", encoder)
    there = collection()
    keep_in(there, tmp_path / "i", quiet=True)
    with pytest.raises(ValueError, match="photos was made by another model or transform; choose another collection"):
        keep_in(there, tmp_path / "other", quiet=True)
    with pytest.raises(ValueError, match="photos is the copy of another index; choose another collection"):
        keep_in(there, tmp_path / "twin", quiet=True)
    with pytest.raises(ValueError, match=r"photos was made by another model or transform \(weights\)"):
        QdrantIndex(there, other)
    there.client.create_collection("plain", vectors_config=models.VectorParams(size=4, distance="Dot"))
    plain = Collection(there.client, "plain", "http://engine:6333/plain")
    with pytest.raises(ValueError, match="plain was not made by lavis-cir index"):
        keep_in(plain, tmp_path / "i", quiet=True)
    with pytest.raises(FileNotFoundError, match=r"nowhere has no such collection; make it by lavis-cir index"):
        QdrantIndex(Collection(there.client, "nowhere", "http://engine:6333/nowhere"), encoder)
    there.client.update_collection("photos", metadata={"version": 99})
    with pytest.raises(ValueError, match="has format 99"):
        QdrantIndex(there, encoder)


def test_a_whole_number_that_no_double_holds_is_refused(tmp_path):
    draw_some(tmp_path / "p", 2)
    encoder = make_encoder()
    index(tmp_path / "p", tmp_path / "i", encoder, metadata=columns(tmp_path, [f"000.png,{2**53}"]))
    with pytest.raises(ValueError, match="has the number 9007199254740992, which Qdrant cannot tell"):
        keep_in(collection(), tmp_path / "i", quiet=True)


class Graph(QdrantClient):
    """An engine whose graph misses every second point, unless enough of it is visited."""

    needed = 512
    asked: tuple = ()

    def get_collection(self, *args, **kwargs):
        return super().get_collection(*args, **kwargs).model_copy(update={"indexed_vectors_count": 1})

    def query_points(self, *args, search_params=None, **kwargs):
        self.asked = (*self.asked, search_params)
        found = super().query_points(*args, **kwargs)
        if not search_params.exact and search_params.hnsw_ef < self.needed:
            found.points = found.points[::2]
        return found


def test_recall_of_the_engines_graph_is_measured_and_said(tmp_path, monkeypatch):
    draw_some(tmp_path / "p", 12)
    encoder = make_encoder()
    index(tmp_path / "p", tmp_path / "i", encoder)
    monkeypatch.setattr("lavis_cir_plugin.search.qdrant_index.FEW_ALLOWED", 0)
    for needed, recall, visited in ((512, 1.0, 512), (10**6, 0.5, 2048)):
        there = Collection(Graph(":memory:"), "photos", URL)
        there.client.needed = needed
        assert keep_in(there, tmp_path / "i", quiet=True).recall == recall
        assert there.state().visited == visited
        opened = QdrantIndex(there, encoder)
        expected = open_index(tmp_path / "i", encoder).search(text="is red", k=2)
        exact = opened.search(text="is red", k=2, exact=True)
        assert exact == expected
        answer = opened.search(text="is red", k=2)
        # What finds too few is not believed: the engine is asked again to scan.
        assert (answer.is_exact, answer.recall) == (needed > 512, 1.0)
        assert answer.hits == expected.hits
    assert {(asked.exact, asked.hnsw_ef) for asked in there.client.asked} >= {(True, None), (False, 2048)}


def test_many_equal_scores_lose_nobody(tmp_path, monkeypatch):
    """The engine orders equal scores in its own way, so what may tie with the last is asked for too."""
    for number in range(40):
        draw(tmp_path / "p" / f"{number:02d}.png", number)
    encoder = make_encoder()
    targets = encoder.targets
    monkeypatch.setattr(encoder, "targets", lambda pictures: targets(pictures[:1]).expand(len(pictures), -1, -1))
    index(tmp_path / "p", tmp_path / "i", encoder, batch_size=64)
    there = collection()
    keep_in(there, tmp_path / "i", quiet=True)
    embedded, opened = open_index(tmp_path / "i", encoder), QdrantIndex(there, encoder)
    for k in (1, 7, 40):
        assert opened.search(text="is red", k=k) == embedded.search(text="is red", k=k)


def test_shares_of_many_pictures_come_from_a_sample(world, monkeypatch):
    _, embedded, there = world
    monkeypatch.setattr("lavis_cir_plugin.search.qdrant_index.SAMPLE", 20)
    answer = there.search(text="is red", k=COUNT)
    assert answer.share_is_estimated
    exact = [hit.share_below for hit in embedded.search(text="is red", k=COUNT).hits]
    shares = [hit.share_below for hit in answer.hits]
    assert shares == sorted(shares, reverse=True)
    np.testing.assert_allclose(shares, exact, atol=0.25)


def test_the_commands_keep_and_search(tmp_path, monkeypatch, capsys):
    paths = draw_some(tmp_path / "p", 6)
    encoder, there = make_encoder(), collection()
    encoder.name = "a run"
    monkeypatch.setattr("lavis_cir_plugin.search.encoder.load_encoder", lambda *_: encoder)
    monkeypatch.setattr("lavis_cir_plugin.search.questions.load_encoder", lambda *_: encoder)
    monkeypatch.setattr("lavis_cir_plugin.search.qdrant.connect", lambda url: there)
    monkeypatch.setattr("lavis_cir_plugin.search.qdrant_index.connect", lambda url: there)
    out = str(tmp_path / "i")
    main(
        [
            "index",
            str(tmp_path / "p"),
            "--out",
            out,
            "--model",
            "a run",
            "--device",
            "cpu",
            "--workers",
            "0",
            "--to",
            URL,
        ]
    )
    assert f"{URL}: 6 pictures. Added 6 contents, changed 0, removed 0." in capsys.readouterr().out
    for place in (URL, out):
        main(["search", place, "--image", str(paths[0]), "--text", "is red", "--paths"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == lines[5:]
    assert len(lines) == 10


@pytest.mark.parametrize("url", ["http://localhost:6333", "http://localhost:6333/", "redis://localhost/a", "http:///a"])
def test_a_url_without_a_collection_is_refused(url):
    with pytest.raises(ValueError, match=r"names no collection of Qdrant; write http://HOST:6333/COLLECTION"):
        connect(url)


def test_a_server_that_does_not_answer_is_said_in_a_sentence():
    with pytest.raises(
        ConnectionError, match=r"^http://127.0.0.1:9/photos does not answer \(.*refused\); start Qdrant"
    ):
        open_collection("http://127.0.0.1:9/photos")


@pytest.mark.parametrize(
    ("status", "message"), [(401, "refuses access; set QDRANT_API_KEY"), (500, r"refuses count \(500: no disk\)")]
)
def test_a_server_that_refuses_is_said_in_a_sentence(monkeypatch, status, message):
    there = collection()

    def refuse(*_, **__):
        raise UnexpectedResponse(status, "reason", b"no disk", None)

    monkeypatch.setattr(there.client, "count", refuse)
    with pytest.raises(ConnectionError, match=message):
        there.count()


def test_the_key_of_the_environment_and_a_path_before_the_collection_are_sent(monkeypatch):
    given = {}
    monkeypatch.setattr("qdrant_client.QdrantClient", lambda **settings: given.update(settings))
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    assert connect("https://engine.example/team/photos").name == "photos"
    assert (given["url"], given["prefix"], given["api_key"]) == ("https://engine.example:443", "team", "secret")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qdrant_client", None)
    with pytest.raises(
        ValueError, match=r"needs qdrant-client, which is not installed; pip install 'lavis_cir_plugin\["
    ):
        connect(URL)
