"""What an index is refused for, each time by one sentence: half-written, tampered, newer, of another model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from search_world import draw_some, index, make_encoder

from lavis_cir_plugin.search import open_index
from lavis_cir_plugin.search.folders import MANIFEST, WRITER
from lavis_cir_plugin.search.manifest import BLOCKS, VERSION, Manifest, verify


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    draw_some(folder / "p", 6)
    index(folder / "p", folder / "i", make_encoder())
    return folder


@pytest.fixture
def out(original, tmp_path):
    return shutil.copytree(original / "i", tmp_path / "i")


def changed_manifest(out, **changes):
    content = json.loads((out / MANIFEST).read_text())
    del content["checksum"]
    content.update(changes)
    content["checksum"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (out / MANIFEST).write_text(json.dumps(content))


@pytest.mark.parametrize("pattern", ["features-*", "looks-*", "catalogue-*", "pictures-*"])
@pytest.mark.parametrize("how", ["byte", "cut", "gone"])
def test_a_file_that_was_changed_is_refused(out, pattern, how):
    (path,) = out.glob(pattern)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content if how == "byte" else content[: len(content) // 2])
    message = {"byte": "is not what lavis-cir index wrote", "cut": "cut short|not what", "gone": "is missing"}[how]
    with pytest.raises((ValueError, FileNotFoundError), match=rf"{message}.*build the index again"):
        open_index(out, make_encoder())


def test_a_manifest_that_was_changed_by_hand_is_refused(out):
    text = (out / MANIFEST).read_text()
    for changed in (text.replace('"rows": 6', '"rows": 5'), text[:50], "[]", "null", "", '{"format": 1}'):
        (out / MANIFEST).write_text(changed)
        with pytest.raises(ValueError, match="is damaged or was changed by hand; build the index again"):
            open_index(out)


def test_a_newer_format_is_refused_by_its_number(out):
    changed_manifest(out, version=VERSION + 1, novelty=[1])
    with pytest.raises(
        ValueError, match=rf"has format {VERSION + 1}, this version of lavis_cir_plugin reads {VERSION}"
    ):
        open_index(out)


def test_a_manifest_names_no_file_outside(out):
    files = json.loads((out / MANIFEST).read_text())["files"]
    changed_manifest(out, files={**files, "catalogue": "../../secret"})
    with pytest.raises(ValueError, match=r"names the file '\.\./\.\./secret' outside of the index"):
        open_index(out)


def test_a_half_written_index_and_none_at_all_are_told_apart(out, tmp_path):
    (out / MANIFEST).unlink()
    with pytest.raises(ValueError, match="is half-written; run lavis-cir index with the same folders again"):
        open_index(out)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"is no index .*; make one by lavis-cir index"):
            open_index(folder)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 1}, "weights"),
        ({"name": "mean_queries"}, "weights"),
        ({"name": "clip"}, "architecture Blip2Cir and not ClipCir"),
    ],
)
def test_another_model_is_refused_for_searching_and_for_indexing(original, out, changes, what):
    other = make_encoder(**changes)
    with pytest.raises(ValueError, match=rf"was made by another model or transform \({what}.*; name the model it was"):
        open_index(out, other)
    with pytest.raises(ValueError, match="was made by another model or transform"):
        index(original / "p", out, other)
    assert len(open_index(out, make_encoder()).search(text="red").hits) == 6


def test_another_transform_is_refused(out):
    other = make_encoder()
    other.transform.target_ratio = 2.0
    with pytest.raises(ValueError, match=r"another model .*target_ratio=1\.25.* and not .*=2\.0"):
        open_index(out, other)


def test_a_writer_that_lost_what_it_knows_refuses(original, out):
    shutil.rmtree(out / WRITER)
    with pytest.raises(ValueError, match="has lost what its writer knows"):
        index(original / "p", out, make_encoder())


def test_every_byte_is_verified_on_demand(tmp_path, monkeypatch):
    """A change between the samples that an opening looks at."""
    (tmp_path / "p").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "p" / f"{number}.png")
    monkeypatch.setattr("lavis_cir_plugin.search.features._SAMPLE_BYTES", 1)
    monkeypatch.setattr("lavis_cir_plugin.search.features._SAMPLES", 2)
    index(tmp_path / "p", tmp_path / "i", make_encoder())
    assert verify(tmp_path / "i").pictures == 3
    (path,) = (tmp_path / "i").glob("features-*")
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    assert len(open_index(tmp_path / "i", make_encoder())) == 3
    with pytest.raises(ValueError, match="has changed since it was written; build the index again"):
        verify(tmp_path / "i")


def test_a_state_is_verified_also_after_a_writer_was_stopped_before_the_next_one(original, tmp_path, monkeypatch):
    """The checksums of the next state's blocks are written before its manifest."""
    shutil.copytree(original / "p", tmp_path / "p")
    index(tmp_path / "p", tmp_path / "i", make_encoder())
    before = verify(tmp_path / "i")
    draw_some(tmp_path / "p", 2, start=50)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            index(tmp_path / "p", tmp_path / "i", make_encoder())
    assert verify(tmp_path / "i") == before
    index(tmp_path / "p", tmp_path / "i", make_encoder())
    assert verify(tmp_path / "i").pictures == before.pictures + 2
    path = tmp_path / "i" / BLOCKS
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: content[name] for name in content.keys() - {"generation", "before"}}))
    assert verify(tmp_path / "i").pictures == before.pictures + 2, "as version 0.7.0 wrote them"


def test_a_folder_without_write_permission_is_searched(original, out):
    for path in (out, *out.rglob("*")):
        os.chmod(path, 0o555 if path.is_dir() else 0o444)
    try:
        assert len(open_index(out, make_encoder()).search(text="red").hits) == 6
    finally:
        for path in (out, *out.rglob("*")):
            os.chmod(path, 0o755 if path.is_dir() else 0o644)
