"""Files are replaced whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lavis_cir_plugin.core.atomic_files import check_writable, replace_file, replacing


def test_the_old_file_is_there_until_the_block_ends(tmp_path):
    path = replace_file(tmp_path / "made" / "a.json", b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_of_two_writers_the_last_wins_whole(tmp_path):
    """Two writers on two machines with one file system may have the same process id."""
    path = tmp_path / "a.json"
    with replacing(path) as first:
        first.write(b"longer")
        with replacing(path) as second:
            second.write(b"short")
            first.write(b", and longer")
        assert path.read_bytes() == b"short"
    assert path.read_bytes() == b"longer, and longer"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = replace_file(tmp_path / "a.json", b"old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half of it")
            raise error("no such thing")

    with pytest.raises(error, match="no such thing"):  # this is no OSError, so it is raised unchanged
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_sentence_with_what_to_do(tmp_path, monkeypatch):
    """The operating system raises the error when it writes the buffered bytes as the file is closed."""
    path = replace_file(tmp_path / "a.json", b"old")

    def on_a_full_disk(name: Path, mode: str):
        name.touch()
        return open("/dev/full", "wb")

    monkeypatch.setattr(Path, "open", on_a_full_disk)
    sentence = rf"^{path} could not be written: No space left on device; free some space there or write elsewhere "
    with pytest.raises(OSError, match=sentence):
        replace_file(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_moved_is_taken_away(tmp_path):
    folder = tmp_path / "a.json"
    folder.mkdir()
    with pytest.raises(OSError, match=rf"^{folder} could not be written: .*run\.output_dir, "):
        replace_file(folder, b"new")
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_place_is_tried_and_nothing_is_made(tmp_path):
    check_writable(tmp_path / "new/deep/a.json")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/a\.json could not be written: Not a directory; free some space"):
        check_writable(tmp_path / "file/a.json")
    with pytest.raises(OSError, match=r"could not be written: Is a directory; free some space"):
        check_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
