"""Files of own columns: whose picture a row is about, which columns hold numbers, and what is refused."""

from __future__ import annotations

import json

import pytest

from lavis_cir_plugin.search.metadata import read_metadata, summary

PICTURES = ["/a/one.jpg", "/a/sub/two.jpg", "/b/two.jpg", "/b/drei.png"]


def read(path, content):
    path.write_text(content, encoding="utf-8")
    return read_metadata(path, PICTURES, ["/a", "/b"], ["file_id"])


def test_csv_names_pictures_by_path_below_a_folder_or_by_the_name_alone(tmp_path):
    content = "path,price,code,note\n/a/one.jpg,1.5,007,\nsub/two.jpg,2,12,x\ndrei.png,,3,y\nnone.jpg,9,9,z\n"
    found = read(tmp_path / "m.csv", content)
    assert found.columns == {"price": "number", "code": "text", "note": "text"}
    assert found.rows == {
        "/a/one.jpg": [1.5, "007", None],
        "/a/sub/two.jpg": [2, "12", "x"],
        "/b/drei.png": [None, "3", "y"],
    }
    assert found.unmatched == ["none.jpg"]
    assert summary(found, len(PICTURES)) == [
        "metadata: 3 of 4 pictures have price, code, note",
        "metadata: 1 rows name no picture, or may mean several (first: none.jpg)",
    ]


def test_a_name_that_several_pictures_have_means_the_one_below_a_folder_and_else_none(tmp_path):
    found = read_metadata_of(tmp_path, ["/a/x/two.jpg", "/a/y/two.jpg"], "two.jpg")
    assert found.rows == {}
    assert found.unmatched == ["two.jpg"]


@pytest.mark.parametrize("name", ["one.jpg", "sub/two.jpg"])
def test_a_path_that_exists_below_several_folders_means_none_of_them(tmp_path, name):
    path = tmp_path / "m.csv"
    path.write_text(f"path,price\n{name},1\n/b/{name},2\n")
    found = read_metadata(path, [f"/a/{name}", f"/b/{name}"], ["/a", "/b"], [])
    assert found.rows == {f"/b/{name}": [2]}
    assert found.unmatched == [name]


def test_a_path_below_the_files_own_folder_is_meant_though_it_exists_below_others(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text("path,price\none.jpg,1\n")
    pictures = ["/a/one.jpg", f"{tmp_path}/one.jpg"]
    assert read_metadata(path, pictures, ["/a", str(tmp_path)], []).rows == {f"{tmp_path}/one.jpg": [1]}


def read_metadata_of(tmp_path, pictures, name):
    path = tmp_path / "m.csv"
    path.write_text(f"file,price\n{name},1\n")
    return read_metadata(path, pictures, ["/a"], [])


def test_json_lines_keep_kinds_and_mixed_columns_become_texts(tmp_path):
    lines = [
        {"path": "one.jpg", "ok": True, "size": 40, "n": None},
        {"path": "drei.png", "ok": False, "size": "M", "n": 2**62, "more": "x"},
    ]
    found = read(tmp_path / "m.jsonl", "\n".join(map(json.dumps, lines)))
    assert found.columns == {"ok": "number", "size": "text", "n": "number", "more": "text"}
    assert found.rows == {"/a/one.jpg": [1, "40", None, None], "/b/drei.png": [0, "M", 2**62, "x"]}
    assert found.mixed == ["size"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "name,price\nx,1\n", r"has no column that names the pictures; call it path \(or file"),
        ("m.csv", "path,price\none.jpg,1\n/a/one.jpg,2\n", "line 3 is about /a/one.jpg, as line 2 is"),
        ("m.csv", "path,price\none.jpg,1,2\n", "line 2 has not 2 values like the header"),
        ("m.csv", "path,price\none.jpg\n", "line 2 has not 2 values like the header"),
        ("m.csv", "path,price,price\none.jpg,1,2\n", "has two columns of one name"),
        ("m.csv", "path,price\n", "has no rows"),
        ("m.csv", "path,price,\none.jpg,1,\n", "has a column without a name; name it, or remove it"),
        ("m.csv", "path,file_id\none.jpg,1\n", "has a column 'file_id', which is the index's own name"),
        ("m.csv", "path,price\n,1\n", r"line 2 has path = null; it must name a picture"),
        ("m.jsonl", '{"path": "one.jpg", "tags": ["a"]}', r'has tags = \["a"\]; it must be a number, a text'),
        ("m.jsonl", '{"path": 5}', "has path = 5; it must name a picture"),
        ("m.jsonl", '[{"path": "one.jpg"}]', "is one JSON array"),
        ("m.jsonl", '{"path": "one.jpg", "n": 1e400}', "has n = "),
        ("m.xlsx", "x", "is neither .csv nor .jsonl"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_a_sentence(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name, content)
