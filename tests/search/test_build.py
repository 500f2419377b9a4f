"""Building an index: every content once, whatever happens in between; what is not indexed is listed with its reason."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launched import in_two_processes
from PIL import Image
from search_world import draw, draw_some, index, make_encoder
from torch.utils.data import DataLoader

from lavis_cir_plugin.core.locks import FileLock
from lavis_cir_plugin.search import build, build_index_folder, engine, open_index, questions
from lavis_cir_plugin.search.catalogue import ReadableCatalogue
from lavis_cir_plugin.search.folders import WRITER
from lavis_cir_plugin.search.manifest import read_manifest


@pytest.fixture(autouse=True)
def no_race(monkeypatch):
    """Let a file that was written just now count as settled; otherwise it is read again, rightly."""
    monkeypatch.setattr("lavis_cir_plugin.search.catalogue._RACE_NS", 0)


@pytest.fixture
def encoder():
    return make_encoder()


def ids_by_name(out, encoder):
    opened = open_index(out, encoder)
    pictures = opened.search(text="red", k=1000, fold=False).hits
    return {os.path.basename(hit.path): hit.picture.id for hit in pictures}


def features(out, encoder):
    """Return the features by file name, as a reader sees them."""
    opened = open_index(out, encoder)
    hits = opened.search(text="red", k=1000, fold=False).hits
    return {os.path.basename(hit.path): opened.gallery.features[hit.picture.row].clone() for hit in hits}


def test_features_are_those_of_the_model_in_half_precision(tmp_path, encoder):
    paths = draw_some(tmp_path / "p", 5)
    built = index(tmp_path / "p", tmp_path / "i", encoder, batch_size=2)
    assert (built.pictures, built.encoded, built.read, built.forgotten, built.not_indexed) == (5, 5, 5, 0, {})
    stored = features(tmp_path / "i", encoder)
    for path in paths:
        picture = encoder.transform(Image.open(path)).unsqueeze(0)
        expected = torch.nn.functional.normalize(encoder.model.encode_target(picture)[0], dim=-1)
        torch.testing.assert_close(stored[path.name].float(), expected, atol=1e-3, rtol=0)


def test_one_folder_needs_no_list_and_what_load_run_returns_is_an_encoder(tmp_path, encoder, monkeypatch):
    """The characters of ".." are folders, too."""
    draw_some(tmp_path / "p", 3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "p")
    run = (encoder.model, {"eval": encoder.transform}, {}, None)
    built = build_index_folder("../p", tmp_path / "i", run, quiet=True, workers=0)
    assert (built.pictures, built.encoded) == (3, 3)
    draw_some(tmp_path / "q", 1, start=7)
    again = build_index_folder(tmp_path / "q", tmp_path / "i", encoder, forget="../p", quiet=True, workers=0)
    assert (again.pictures, again.encoded) == (1, 1)


def test_an_update_from_python_keeps_the_name_of_the_model(tmp_path, encoder):
    """By its name the commands load the model again; an encoder that code has made has none."""
    folder = draw_some(tmp_path / "p", 2)[0].parent
    build_index_folder(folder, tmp_path / "i", replace(encoder, name="a run"), quiet=True, workers=0)
    draw_some(folder, 1, start=7)
    build_index_folder(folder, tmp_path / "i", replace(encoder, name=""), quiet=True, workers=0)
    assert read_manifest(tmp_path / "i").name == "a run"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": "alway"}, "candidates must be one of auto, always, none, got 'alway'; did you mean 'always'"),
        ({"encoder": "output/RUN"}, "encoder must be an Encoder, or what load_run returned, got str; load_encoder"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, encoder, change, message):
    draw_some(tmp_path / "p", 1)
    with pytest.raises(ValueError, match=message):
        build_index_folder(**{"folders": tmp_path / "p", "out": tmp_path / "i", "encoder": encoder, **change})
    assert not (tmp_path / "i").exists()


def test_again_only_what_is_new_or_changed_is_encoded_and_what_is_gone_is_forgotten(tmp_path, encoder):
    folder, out = tmp_path / "p", tmp_path / "i"
    paths = draw_some(folder, 6)
    index(folder, out, encoder)
    before = ids_by_name(out, encoder)
    again = index(folder, out, encoder)
    assert (again.read, again.encoded) == (0, 0)
    os.utime(paths[0], (1, 1))  # another date, the same content
    draw(paths[1], 100)
    paths[2].unlink()
    paths[3].rename(folder / "moved.png")
    draw(folder / "new.png", 101)
    built = index(folder, out, encoder)
    assert (built.read, built.encoded, built.forgotten, built.pictures) == (4, 2, 2, 6)
    assert encoder.encoded == 8
    after = ids_by_name(out, encoder)
    assert set(after) == {"000.png", "001.png", "004.png", "005.png", "moved.png", "new.png"}
    kept = ("000.png", "004.png", "005.png")
    assert [after[name] for name in kept] == [before[name] for name in kept]
    assert len({*before.values(), *after.values()}) == len(before) + 3  # no id is used twice


def test_a_picture_that_comes_back_has_a_new_id_and_is_not_encoded_again(tmp_path, encoder):
    folder, out = tmp_path / "p", tmp_path / "i"
    paths = draw_some(folder, 4)
    index(folder, out, encoder)
    before = ids_by_name(out, encoder)
    content = paths[3].read_bytes()  # the largest id
    paths[3].unlink()
    index(folder, out, encoder)
    paths[3].write_bytes(content)
    assert index(folder, out, encoder).encoded == 0
    assert ids_by_name(out, encoder)[paths[3].name] > max(before.values())


def test_a_content_that_many_files_have_is_encoded_once_and_nobody_is_lost(tmp_path, encoder):
    folder = tmp_path / "p"
    content = draw(folder / "first.png", 1).read_bytes()
    for number in range(300):
        (folder / f"copy_{number}.png").write_bytes(content)
    draw(folder / "other.png", 2)
    assert index(folder, tmp_path / "i", encoder).encoded == 2
    answer = open_index(tmp_path / "i", encoder).search(text="red", k=1000, fold=False)
    assert len({hit.path for hit in answer.hits}) == 302


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_killed_and_started_again_nothing_is_encoded_twice(tmp_path, batches):
    """By SIGKILL, before the third batch of two, say; what was encoded before is there."""
    folder, out = tmp_path / "p", tmp_path / "i"
    draw_some(folder, 7)
    child = multiprocessing.get_context("fork").Process(target=killed_build, args=(folder, out, batches))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match="is half-written; run lavis-cir index with the same folders again"):
        open_index(out)
    encoder = make_encoder()
    built = index(folder, out, encoder, batch_size=2)
    assert (encoder.encoded, built.encoded, built.pictures) == (7 - 2 * batches, 7 - 2 * batches, 7)
    whole = make_encoder()
    index(folder, tmp_path / "whole", whole)
    expected = features(tmp_path / "whole", whole)
    assert all(torch.equal(row, expected[name]) for name, row in features(out, encoder).items())


def killed_build(folder, out, batches):
    torch.set_num_threads(1)
    encoder = make_encoder()

    def kill(encoder):
        if encoder.encoded >= 2 * batches:
            os.kill(os.getpid(), signal.SIGKILL)

    encoder.before = kill
    index(folder, out, encoder, batch_size=2)


@pytest.mark.parametrize("is_new", [True, False])
def test_what_an_interrupted_call_read_of_a_wrong_folder_is_not_in_the_index(tmp_path, encoder, is_new):
    wrong, right, out = tmp_path / "wrong", tmp_path / "right", tmp_path / "i"
    draw_some(wrong, 6)
    (wrong / "00.png").touch()
    draw_some(right, 3, start=10)
    if not is_new:
        index(right, out, encoder)

    def stop(encoder):
        if encoder.encoded >= 5 + (0 if is_new else 3):
            raise KeyboardInterrupt

    encoder.before = stop
    with pytest.raises(KeyboardInterrupt):
        index(wrong, out, encoder, batch_size=1)
    encoder.before = None
    built = index(right, out, encoder)
    assert (built.pictures, built.not_indexed) == (3, {})
    assert set(ids_by_name(out, encoder)) == {"010.png", "011.png", "012.png"}
    assert index(wrong, out, encoder).encoded == 1, "what was encoded stays known"


@pytest.mark.parametrize("step", ["rmtree", "append_from", "_publish", "write_blocks", "_remove_older"])
def test_stopped_at_any_step_readers_see_a_whole_state_and_the_next_call_goes_on(tmp_path, encoder, monkeypatch, step):
    folder, out = tmp_path / "p", tmp_path / "i"
    draw_some(folder, 4)
    index(folder, out, encoder)
    draw_some(folder, 3, start=10)
    homes = {
        "rmtree": (shutil, "rmtree"),
        "append_from": (build.RowFile, "append_from"),
        "write_blocks": (build, "write_blocks"),
    }

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*homes.get(step, (build._Writer, step)), stop)
        with pytest.raises(KeyboardInterrupt):
            index(folder, out, encoder)
    assert len(open_index(out, encoder)) == (7 if step == "_remove_older" else 4)
    built = index(folder, out, encoder)
    assert (built.pictures, encoder.encoded) == (7, 7)
    assert len(features(out, encoder)) == 7
    left = sorted(path.name for path in out.iterdir())
    assert len([name for name in left if name.startswith("catalogue-")]) == 1
    assert not list((out / WRITER).glob("part-*"))


def test_a_reader_keeps_the_state_that_it_opened(tmp_path, encoder):
    folder, out = tmp_path / "p", tmp_path / "i"
    paths = draw_some(folder, 4)
    index(folder, out, encoder)
    reader = open_index(out, encoder)
    expected = reader.search(text="is red", k=10)
    assert reader.refreshed() is reader
    paths[0].unlink()
    draw_some(folder, 3, start=10)
    index(folder, out, encoder)
    assert reader.search(text="is red", k=10) == expected
    fresh = reader.refreshed()
    assert fresh is not reader
    assert (len(reader), len(fresh)) == (4, 6)


def test_a_new_state_whose_model_cannot_be_loaded_leaves_the_one_before(tmp_path, encoder, monkeypatch):
    """Another model's index takes the folder's place, and that model is gone."""
    folder, out, other = tmp_path / "p", tmp_path / "i", tmp_path / "other"
    draw_some(folder, 4)
    for place, made_by in ((out, encoder), (other, make_encoder(seed=1))):
        made_by.name = str(tmp_path / f"model of {place.name}")
        index(folder, place, made_by)
    monkeypatch.setattr(questions, "load_encoder", lambda name, device: encoder)
    reader = open_index(out)
    expected = reader.search(text="is red", k=3)
    shutil.rmtree(out)
    other.rename(out)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="model of other"):
        reader.refreshed()
    assert reader.search(text="is red", k=3) == expected


@pytest.mark.parametrize("step", ["read_manifest", "ReadableCatalogue", "np.load"])
def test_a_state_that_is_replaced_while_it_is_opened_is_left_for_the_new_one(tmp_path, encoder, monkeypatch, step):
    """Its features too, since most of the pictures are gone."""
    monkeypatch.setattr(build, "FEWEST_DEAD", 3)
    folder, out = tmp_path / "p", tmp_path / "i"
    paths = draw_some(folder, 8)
    index(folder, out, encoder)
    original = {"read_manifest": engine.read_manifest, "ReadableCatalogue": ReadableCatalogue, "np.load": np.load}[step]
    done = []

    def replaced_after(*args, **settings):
        found = original(*args, **settings)
        if not done:
            done.append(step)
            for path in paths[:5]:
                path.unlink()
            index(folder, out, encoder)
        return found

    monkeypatch.setattr(f"lavis_cir_plugin.search.engine.{step}", replaced_after)
    assert len(open_index(out, encoder)) == 3
    assert done == [step]


def test_a_second_writer_is_refused_by_the_name_of_the_first(tmp_path, encoder):
    draw_some(tmp_path / "p", 2)
    index(tmp_path / "p", tmp_path / "i", encoder)
    with FileLock(tmp_path / "i" / WRITER / "lock", "writing to it") as lock:
        assert lock.take()
        message = rf"is being written by process {os.getpid()} on .*, which has been writing to it since .*; wait until"
        with pytest.raises(ValueError, match=message):
            index(tmp_path / "p", tmp_path / "i", encoder)
        assert len(open_index(tmp_path / "i", encoder)) == 2
    index(tmp_path / "p", tmp_path / "i", encoder)


def test_every_file_that_is_not_indexed_is_listed_with_its_reason(tmp_path, encoder):
    folder = tmp_path / "p"
    good = draw(folder / "sub" / "good.png", 1)
    (folder / "empty.jpg").touch()
    (folder / "cut.png").write_bytes(good.read_bytes()[:60])
    (folder / "page.png").write_text("<html>")
    (folder / "notes.txt").touch()
    (folder / ".hidden.png").touch()
    (folder / ".thumbs").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "link").symlink_to(folder / "sub")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    Image.fromarray(np.zeros((4, 4), np.int32)).save(folder / "grey32.tif")
    draw(folder / "good too.png", 2)
    built = index(folder, tmp_path / "i", encoder)
    reasons = {os.path.relpath(path, folder): reason for path, reason in built.not_indexed.items()}
    assert built.pictures == 2
    assert set(reasons) == {
        *("empty.jpg", "cut.png", "page.png", "notes.txt", ".hidden.png", ".thumbs", "gone.png", "link", "pipe.png"),
        "grey32.tif",
    }
    assert reasons["empty.jpg"] == "the file is empty"
    assert "none of JPEG, PNG" in reasons["page.png"]
    assert "its suffix '.txt' is none of" in reasons["notes.txt"]
    assert reasons["gone.png"] == "it is a link to no file"
    assert "grey of 32 bits" in reasons["grey32.tif"]
    written = (tmp_path / "i" / build.NOT_INDEXED).read_text().splitlines()
    assert [line.split("\t") for line in written] == [list(item) for item in sorted(built.not_indexed.items())]
    (folder / "cut.png").write_bytes(draw(tmp_path / "else.png", 3).read_bytes())
    repaired = index(folder, tmp_path / "i", encoder)
    assert (repaired.pictures, len(repaired.not_indexed)) == (3, len(reasons) - 1)


def test_a_picture_that_the_model_makes_no_numbers_of_is_listed(tmp_path, encoder, monkeypatch):
    draw_some(tmp_path / "p", 3)
    original = encoder.model.encode_target

    def broken(pictures):
        found = original(pictures)
        found[1] = float("nan")
        return found

    monkeypatch.setattr(encoder.model, "encode_target", broken)
    built = index(tmp_path / "p", tmp_path / "i", encoder)
    assert built.pictures == 2
    assert built.not_indexed == {str(tmp_path / "p" / "001.png"): "the model makes no finite features of it"}


def test_pictures_are_turned_as_their_camera_says(tmp_path, encoder):
    upright = Image.open(draw(tmp_path / "p" / "upright.png", 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "p" / "turned.png", exif=exif)
    index(tmp_path / "p", tmp_path / "i", encoder)
    stored = features(tmp_path / "i", encoder)
    assert torch.equal(stored["turned.png"], stored["upright.png"])


def test_a_disk_that_is_not_mounted_costs_no_picture(tmp_path, encoder):
    folder, other, out = tmp_path / "p", tmp_path / "q", tmp_path / "i"
    draw_some(folder, 3)
    draw_some(other, 2, start=10)
    build.build_index_folder([folder, other], out, encoder, quiet=True, workers=0)
    shutil.move(folder, tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"does not exist; name a folder of pictures, or take it .* --forget"):
        build.build_index_folder([], out, encoder, quiet=True)
    folder.mkdir()
    with pytest.raises(ValueError, match=r"holds no picture any more, and the index has 3 of it; mount its disk"):
        build.build_index_folder([], out, encoder, quiet=True)
    assert len(open_index(out, encoder)) == 5
    built = build.build_index_folder([], out, encoder, forget=[folder], quiet=True)
    assert (built.pictures, built.forgotten) == (2, 3)
    with pytest.raises(ValueError, match="is none of the folders of"):
        build.build_index_folder([], out, encoder, forget=[folder], quiet=True)


def test_a_file_that_could_not_be_read_is_read_the_next_time(tmp_path, encoder, monkeypatch):
    """A disk was away for a while: the file has the same size and the same dates as before."""
    paths = draw_some(tmp_path / "p", 3)
    original = Path.read_bytes

    def read(path):
        if path.name in ("000.png", "001.png"):
            raise {"000.png": FileNotFoundError, "001.png": OSError}[path.name](5, "Input/output error")
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        assert set(index(tmp_path / "p", tmp_path / "i", encoder).not_indexed) == {str(path) for path in paths[:2]}
    built = index(tmp_path / "p", tmp_path / "i", encoder)
    assert (built.read, built.pictures, built.not_indexed) == (2, 3, {})


def test_the_pictures_of_a_folder_that_cannot_be_read_stay(tmp_path, encoder, monkeypatch):
    folder, out = tmp_path / "p", tmp_path / "i"
    draw_some(folder, 2)
    draw_some(folder / "disk", 2, start=10)
    (folder / "disk" / "empty.png").touch()
    index(folder, out, encoder)
    before = ids_by_name(out, encoder)
    original = os.scandir

    def scandir(path):
        if path == str(folder / "disk"):
            raise OSError(116, "Stale file handle")
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        built = index(folder, out, encoder)
    assert (built.pictures, built.forgotten, ids_by_name(out, encoder)) == (4, 0, before)
    assert built.not_indexed == {
        str(folder / "disk"): "the folder cannot be read: Stale file handle; what the index had of it stays",
        str(folder / "disk" / "empty.png"): "the file is empty",
    }
    built = index(folder, out, encoder)
    assert (built.read, built.pictures, list(built.not_indexed)) == (0, 4, [str(folder / "disk" / "empty.png")])


def test_a_worker_holds_no_list_of_all_files(tmp_path, encoder, monkeypatch):
    """Of two million files it would be half a gigabyte in each of them."""
    made = []

    def loader(dataset, **settings):
        made.append(dataset)
        return DataLoader(dataset, **settings)

    monkeypatch.setattr(build, "DataLoader", loader)
    for count in (1, 9):
        draw_some(tmp_path / str(count), count)
        assert index(tmp_path / str(count), tmp_path / f"i{count}", encoder).pictures == count
    assert len({len(pickle.dumps(dataset)) for dataset in made}) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"m\.jsonl does not exist; name the .csv or .jsonl file of your columns by --metadata"),
        ('{"picture": "000.png"}', "has no column that names the pictures"),
        ('{"path": "000.png", "price": [1]}', r"line 1 has price = \[1\]; it must be a number"),
        ('{"path": "000.png"}\n' * 2, "line 2 is about 000.png, as line 1 is"),
    ],
)
def test_a_wrong_file_of_columns_is_refused_before_anything_is_encoded(tmp_path, encoder, content, message):
    draw_some(tmp_path / "p", 2)
    path = tmp_path / "m.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        index(tmp_path / "p", tmp_path / "i", encoder, metadata=path)
    assert encoder.encoded == 0


def test_a_date_in_the_future_has_a_file_read_once(tmp_path, encoder):
    paths = draw_some(tmp_path / "p", 2)
    os.utime(paths[0], (2**32, 2**32))  # of the year 2106
    assert index(tmp_path / "p", tmp_path / "i", encoder).read == 2
    assert index(tmp_path / "p", tmp_path / "i", encoder).read == 0


def test_pictures_that_no_condition_on_columns_finds_are_counted(tmp_path, encoder):
    """New pictures have no columns until the file is read again, and are found by no price, say."""
    folder, out, columns = tmp_path / "p", tmp_path / "i", tmp_path / "m.csv"
    draw_some(folder, 2)
    assert index(folder, out, encoder).notes == []
    columns.write_text("path,price,brand\n000.png,1,x\n001.png,2,\n")
    assert index(folder, out, encoder, metadata=columns).notes == ["metadata: 2 of 2 pictures have price, brand"]
    assert index(folder, out, encoder).notes == []
    draw_some(folder, 1, start=10)
    assert index(folder, out, encoder).notes == [
        "metadata: 1 of 3 pictures have no price, brand; name the .csv or .jsonl file of your columns by --metadata "
        "again if it has them now"
    ]
    assert open_index(out, encoder).search(text="red", where="price < 5 or not price < 5").searched == 2


def test_a_folder_is_not_forgotten_while_one_above_it_stays(tmp_path, encoder):
    """Its pictures would stay, and nobody would say so."""
    folder, below, out = tmp_path / "p", tmp_path / "p" / "below", tmp_path / "i"
    draw_some(folder, 2)
    draw_some(below, 1, start=10)
    build.build_index_folder([folder, below], out, encoder, quiet=True, workers=0)
    with pytest.raises(ValueError, match=r"below lies below .*p, which stays in the index with all of its pictures"):
        build.build_index_folder([], out, encoder, forget=[below], quiet=True, workers=0)
    built = build.build_index_folder([below], out, encoder, forget=[folder], quiet=True, workers=0)
    assert (built.pictures, built.forgotten) == (1, 2)


def test_an_index_lies_neither_in_other_files_nor_among_pictures(tmp_path, encoder):
    draw_some(tmp_path / "p", 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    with pytest.raises(ValueError, match="holds other files and is no index; choose an empty or a new folder"):
        index(tmp_path / "p", tmp_path / "full", encoder)
    with pytest.raises(
        ValueError, match=r"holds no picture that can be indexed; see .*not_indexed\.tsv for the reason"
    ):
        index(tmp_path / "full", tmp_path / "i", encoder)
    index(tmp_path / "p", tmp_path / "p" / "i", encoder)  # allowed: an index among the pictures is left out
    built = index(tmp_path / "p", tmp_path / "p" / "i", encoder)
    assert built.not_indexed == {str(tmp_path / "p" / "i"): "the folder is an index"}
    with pytest.raises(ValueError, match="is an index and holds no pictures of its own"):
        index(tmp_path / "p" / "i", tmp_path / "j", encoder)


def test_features_of_forgotten_pictures_leave_the_file_once_they_are_many(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(build, "FEWEST_DEAD", 3)
    folder, out = tmp_path / "p", tmp_path / "i"
    paths = draw_some(folder, 8)
    index(folder, out, encoder)
    expected = features(out, encoder)
    reader = open_index(out, encoder)
    for path in paths[:5]:
        path.unlink()
    index(folder, out, encoder)
    assert os.path.getsize(out / "features-2.f16") == 3 * 3 * 6 * 2
    assert not (out / "features-1.f16").exists()
    assert len(reader.search(text="red", k=10).hits) == 8
    stored = features(out, encoder)
    assert set(stored) == {path.name for path in paths[5:]}
    assert all(torch.equal(row, expected[name]) for name, row in stored.items())


def test_rows_that_are_added_after_a_compaction_do_not_change_what_a_reader_has_open(tmp_path, encoder, monkeypatch):
    """Also where those that are left are the first rows of the file, which need no copying."""
    monkeypatch.setattr(build, "FEWEST_DEAD", 3)
    folder, out = tmp_path / "p", tmp_path / "i"
    paths = draw_some(folder, 8)
    index(folder, out, encoder)
    reader = open_index(out, encoder)
    expected = reader.gallery.features.clone()
    for path in paths[3:]:
        path.unlink()
    index(folder, out, encoder)
    assert (out / "features-2.f16").exists()
    draw_some(folder, 5, start=100)
    index(folder, out, encoder)
    assert torch.equal(reader.gallery.features, expected)
    assert len(features(out, encoder)) == 8


def test_a_full_disk_stops_with_a_sentence_and_loses_nothing(tmp_path, encoder, monkeypatch):
    folder, out = tmp_path / "p", tmp_path / "i"
    draw_some(folder, 3)
    index(folder, out, encoder)
    draw_some(folder, 2, start=10)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="cannot be written: No space left on device; free some space and run"):
            index(folder, out, encoder)
    assert len(open_index(out, encoder)) == 3
    assert index(folder, out, encoder).pictures == 5


def distributed_build(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    encoder = make_encoder()
    built = index(f"{folder}/p", f"{folder}/i", encoder, batch_size=2)
    with pytest.raises((OSError, ValueError), match=r"features cannot be written .* choose a folder that all machines"):
        index(f"{folder}/p", f"{folder}/machine {rank}", encoder)
    torch.save((encoder.encoded, built.encoded, built.pictures), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_processes_share_the_encoding(tmp_path):
    """An index that not all of them see is refused; the pictures of other machines would not be in it."""
    draw_some(tmp_path / "p", 7)
    (tmp_path / "p" / "bad.png").touch()
    in_two_processes(distributed_build, str(tmp_path))
    own, total = zip(*(torch.load(tmp_path / f"{rank}.pt")[:2] for rank in range(2)))
    assert sorted(own) == [3, 4]
    assert total[0] == 7
    encoder = make_encoder()
    index(tmp_path / "p", tmp_path / "whole", encoder)
    expected = features(tmp_path / "whole", encoder)
    found = features(tmp_path / "i", encoder)
    assert set(found) == set(expected)
    for name, row in found.items():
        torch.testing.assert_close(row, expected[name], atol=1e-3, rtol=0)


def test_columns_stay_until_they_are_replaced(tmp_path, encoder):
    folder, out = tmp_path / "p", tmp_path / "i"
    draw_some(folder, 3)
    (tmp_path / "m.csv").write_text("path,price\n000.png,1\n002.png,30\n")
    index(folder, out, encoder, metadata=tmp_path / "m.csv")
    draw_some(folder, 1, start=3)
    index(folder, out, encoder)
    opened = open_index(out, encoder)
    assert opened.columns[0] == "price"
    hits = opened.search(text="red", where="price > 5").hits
    assert [(os.path.basename(hit.path), hit.picture.columns) for hit in hits] == [("002.png", {"price": 30})]
    (tmp_path / "m.csv").write_text("path,brand\n003.png,x\n")
    index(folder, out, encoder, metadata=tmp_path / "m.csv")
    assert open_index(out, encoder).columns[0] == "brand"


def test_the_catalogue_is_an_ordinary_sqlite_file(tmp_path, encoder):
    draw_some(tmp_path / "p", 2)
    index(tmp_path / "p", tmp_path / "i", encoder)
    (path,) = (tmp_path / "i").glob("catalogue-*.sqlite")
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert database.execute("SELECT COUNT(*), SUM(width) FROM pictures").fetchone() == (2, 64)
