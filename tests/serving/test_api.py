"""Answers by HTTP are those of the index; what a request may hold is in the description, and nothing is dropped."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from PIL import Image
from search_world import draw_some, index

from lavis_cir_plugin.search import build_index_folder, open_index
from lavis_cir_plugin.search.answers import as_json
from lavis_cir_plugin.serving.app import PAGES, STATIC

pytest_plugins = ["serving_world"]
SEARCH = "/api/v1/indexes/toys/search"
FORM = {
    "picture", "picture_id", "text", "k", "image_weight", "weight", "without", "without_weight", "where", "min_score",
    "fold", "keep_references", "exact",
}  # fmt: skip


def answer(client, data=None, files=()):
    response = client.post(SEARCH, data=data or {}, files=[("picture", path.read_bytes()) for path in files])
    assert response.status_code == 200, response.text
    return response.json()


def refused(response, status):
    assert response.status_code == status
    return response.json()["error"]["message"]


WHERE = "price < 5 and brand = 'x'"
QUESTIONS = {
    "text": ([], {"text": "is red"}, {"text": "is red"}),
    "picture": ([3], {}, {}),
    "both": ([3], {"text": "is red", "k": 5}, {"text": "is red", "k": 5}),
    "several": ([3, 8], {"text": "a", "weight": [1, 2]}, {"text": "a", "weights": [1.0, 2.0]}),
    "weights": (
        [3],
        {"text": "a", "image_weight": 0.2, "without": "b", "without_weight": 0.3},
        {"text": "a", "image_weight": 0.2, "without": "b", "without_weight": 0.3},
    ),
    "condition": ([], {"text": "a", "where": WHERE}, {"text": "a", "where": WHERE}),
    "score": ([], {"text": "a", "min_score": 0.01}, {"text": "a", "min_score": 0.01}),
    "kept": ([3], {"keep_references": "true", "fold": "false"}, {"keep_references": True, "fold": False}),
    "exact": ([3], {"exact": "true"}, {"exact": True}),
}  # fmt: skip


@pytest.mark.parametrize("kind", QUESTIONS)
def test_an_answer_is_that_of_the_index(client, world, kind):
    numbers, data, settings = QUESTIONS[kind]
    paths = [world.paths[number] for number in numbers]
    found = answer(client, data, paths)
    expected = as_json(world.index.search(paths, **{"k": 24, **settings}))
    assert {key: found[key] for key in expected} == expected
    assert found["index"] == "toys"
    assert found["milliseconds"] > 0


def test_a_picture_of_the_index_is_a_reference_by_its_id(client, world):
    by_file = answer(client, {"text": "is red"}, [world.paths[3]])
    every = client.get("/api/v1/indexes/toys/sample?count=100").json()["pictures"]
    (picture,) = (picture for picture in every if picture["path"] == str(world.paths[3]))
    by_id = answer(client, {"text": "is red", "picture_id": picture["id"]})
    assert {**by_id, "milliseconds": 0} == {**by_file, "milliseconds": 0}


def test_every_field_of_the_form_is_described_and_read(client):
    """A field whose type cannot be evaluated would be left out without a word."""
    spec = client.get("/openapi.json").json()
    body = spec["paths"]["/api/v1/indexes/{index}/search"]["post"]["requestBody"]["content"]
    schema = spec["components"]["schemas"][body["multipart/form-data"]["schema"]["$ref"].rpartition("/")[2]]
    assert set(schema["properties"]) == FORM
    for field in ("k", "image_weight", "without_weight", "min_score", "fold", "keep_references", "exact"):
        message = refused(client.post(SEARCH, data={"text": "a", field: "nonsense"}), 422)
        assert message.startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "there is nothing to look for: name a picture, a text, or both."),
        ({"text": "a", "k": 0}, "k: Input should be greater than or equal to 1."),
        ({"text": "a", "k": 501}, "k: Input should be less than or equal to 500."),
        ({"text": "a" * 2001}, "text: String should have at most 2000 characters."),
        ({"text": "a", "where": "prize < 5"}, "the condition names 'prize', which is no column of this index; did you"),
        ({"picture_id": 99}, "the index has no picture 99; take an id from its results."),
        ({"picture_id": 2**70}, "take them from the results of this index."),
        ({"picture_id": [1, 2, 3, 4, 5]}, "there are 5 references; at most 4 are taken."),
        ({"picture_id": [1, 2], "weight": [1]}, "weights must be one for each picture"),
        ({"text": "a", "min_score": 2}, "min_score: Input should be less than or equal to 1."),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_in_one_sentence(client, data, message):
    said = refused(client.post(SEARCH, data=data), 422)
    assert message in said
    assert said.endswith(".")


@pytest.mark.parametrize(
    ("settings", "status", "message"),
    [
        ({"files": [("image", b"x")]}, 422, "a question has no field 'image', its fields are picture, "),
        ({"data": {"text": "a", "keep_reference": "true"}}, 422, r"; did you mean 'keep_references'\?"),
        ({"data": {"text": "a"}, "params": {"k": 1}}, 422, "'k' stands in the address, where it is not read"),
        ({"data": {"text": ["in blue", "longer"]}}, 422, "text stands in the form 2 times; it is taken once."),
        ({"json": {"text": "a"}}, 415, r"a question is sent as a form \(multipart/form-data\), not as app"),
    ],
)
def test_nothing_of_a_question_is_left_out_without_a_word(client, settings, status, message):
    """A picture under another name, say: the answer would be that of the text alone."""
    assert re.search(message, refused(client.post(SEARCH, **settings), status))


def test_the_server_says_what_it_has(make_client, world):
    client = make_client(indexes={"toys": world.index, "more": world.index})
    info = client.get("/api/v1/server").json()
    assert [(item["name"], item["pictures"]) for item in info["indexes"]] == [("toys", 12), ("more", 12)]
    own = [(item["name"], item["kind"]) for item in info["indexes"][0]["columns"] if item["own"]]
    assert own == [("price", "number"), ("brand", "text")]
    assert info["limits"]["pictures"] == 4


def test_an_unknown_index_is_refused_by_the_names_of_all(make_client, world):
    client = make_client(indexes={"toys": world.index, "more": world.index})
    for path in ("search", "sample"):
        ask = client.post if path == "search" else client.get
        assert "this server has toys, more." in refused(ask(f"/api/v1/indexes/x/{path}"), 404)
    assert "this server has toys, more." in refused(client.get("/api/v1/indexes/x/pictures/1/thumbnail"), 404)


def test_a_sample_is_drawn_by_its_seed(client):
    sample = [client.get("/api/v1/indexes/toys/sample", params={"count": 5, "seed": 1}).json() for _ in range(2)]
    assert sample[0] == sample[1]
    ids = [picture["id"] for picture in sample[0]["pictures"]]
    assert len(set(ids)) == 5
    every = client.get("/api/v1/indexes/toys/sample", params={"count": 100}).json()["pictures"]
    assert len(every) == 12


def test_a_sample_is_as_large_where_most_pictures_were_forgotten(make_client, world, tmp_path):
    draw_some(tmp_path / "gone", 40, start=100)
    index(tmp_path / "gone", tmp_path / "i", world.encoder)
    draw_some(tmp_path / "kept", 4)
    index(tmp_path / "kept", tmp_path / "i", world.encoder)
    build_index_folder([], tmp_path / "i", world.encoder, forget=[tmp_path / "gone"], quiet=True, workers=0)
    client = make_client(indexes={"toys": open_index(tmp_path / "i", world.encoder)})
    for seed in range(3):
        sample = client.get("/api/v1/indexes/toys/sample", params={"count": 4, "seed": seed}).json()["pictures"]
        assert {Path(picture["path"]).name for picture in sample} == {"000.png", "001.png", "002.png", "003.png"}


def test_a_picture_comes_as_it_is_and_small(client, world):
    picture = world.index.picture(1)
    place = "/api/v1/indexes/toys/pictures/1"
    assert client.get(place).json()["sha256"] == picture.sha256
    file = client.get(f"{place}/file")
    assert file.content == Path(picture.path).read_bytes()
    assert file.headers["content-type"] == "image/png"
    assert file.headers["content-disposition"] == 'inline; filename="1.png"'
    small = client.get(f"{place}/thumbnail", params={"side": 160})
    assert small.headers["content-type"] == "image/jpeg"
    with Image.open(io.BytesIO(small.content)) as found:
        assert found.size == (32, 32), "a small picture is not made larger"
    assert small.headers["cache-control"] == "private, no-cache", "another index may come to this address"
    again = client.get(f"{place}/thumbnail?side=160", headers={"If-None-Match": small.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = client.get(
        "/api/v1/indexes/toys/pictures/2/thumbnail?side=160", headers={"If-None-Match": again.headers["etag"]}
    )
    assert other.status_code == 200
    assert "Input should be 160" in refused(client.get(f"{place}/thumbnail?side=161"), 422)
    assert "the index has no picture 99" in refused(client.get("/api/v1/indexes/toys/pictures/99/file"), 404)


def test_the_page_and_the_description_ask_no_other_host(client):
    assert {path.name for path in STATIC.iterdir()} == {name for name, _ in PAGES.values()}
    for path, (name, kind) in PAGES.items():
        response = client.get(f"/{path}")
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        assert response.content == (STATIC / name).read_bytes()
        other = set(re.findall(r"(?:https?:)?//[a-z][\w.-]+\.\w+", response.text)) - {"http://www.w3.org"}
        assert other == set()
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert client.get("/redoc").status_code == 404
    inline = re.findall(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", client.get("/").text + client.get("/docs").text)
    assert inline == [], "the policy would refuse them"
