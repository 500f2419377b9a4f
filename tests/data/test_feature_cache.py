"""The feature cache changes no number, computes nothing twice, and never returns a wrong row of a damaged file."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import re
import resource
import shutil
import signal
import threading
from collections import deque
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch
import torch.distributed as dist
from conftest import make_scoring_model
from launched import in_two_processes, leave_pictures_blank
from lavis.common.registry import registry
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from lavis_cir_plugin import PROJECTS
from lavis_cir_plugin.benchmarks.images import open_rgb
from lavis_cir_plugin.data import feature_cache
from lavis_cir_plugin.data.benchmark_datasets import CirDataset
from lavis_cir_plugin.data.feature_cache import FeatureCache, collate_images, fingerprint, with_features
from lavis_cir_plugin.garments import GarmentsConfig, make_garments
from lavis_cir_plugin.methods.blip2_cir.model import Blip2Cir
from lavis_cir_plugin.processors import TargetPadProcessor
from lavis_cir_plugin.tasks.composed_retrieval import ComposedRetrievalTask
from lavis_cir_plugin.training import launcher
from lavis_cir_plugin.training.config import ConfigError

ROW_BYTES = 2 * 3 * 4


class Stub(nn.Module):
    """Model with rows (2, 3) for pictures (3, 8, 8); it remembers the number of different pictures of each call."""

    def __init__(self, stop_at=-1):
        super().__init__()
        torch.manual_seed(0)
        self.image_tower = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6), nn.LayerNorm(6)).requires_grad_(False)
        self.calls = []
        self.stop_at = stop_at

    def image_features(self, images):
        if len(self.calls) == self.stop_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls.append(len(torch.unique(images, dim=0)))
        return self.image_tower(images).unflatten(1, (2, 3))


def draw(folder, count=7):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(count)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (10, 9, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def paths(tmp_path):
    return draw(tmp_path / "images")


def filled(root, paths, model=None, batch_size=2, transform=None):
    """Return a new cache, as the next run would open it, and the number of pictures in each call of its tower."""
    model = model or Stub()
    cache = FeatureCache(root, model, transform or TargetPadProcessor(8))
    cache.find(paths)
    rows = read(cache, paths, model, batch_size)
    # Compare every row with the tower's output for its picture alone.
    for path, row in zip(paths, rows):
        alone = model.image_tower(cache.transform(open_rgb(path))[None])[0].view(2, 3)
        torch.testing.assert_close(row, alone, atol=1e-6, rtol=1e-5)
    return cache, model.calls


def read(cache, paths, model, batch_size=2):
    """Return the rows of pictures as a training gets them, batch by batch."""
    parts = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    columns = (collate_images([cache.picture(path) for path in part]) for part in parts)
    return torch.cat([with_features({"image": column}, model, [cache])["image"] for column in columns])


def the(folder, suffix):
    (found,) = folder.glob(f"*{suffix}")
    return found


# --- what is computed --------------------------------------------------------------------------------------------


def test_each_picture_is_computed_once_for_ever(tmp_path, paths):
    """Each of ceil(7 / 2) batches is computed by one call, and the next run calls nothing."""
    _, calls = filled(tmp_path / "c", paths)
    assert calls == [2, 2, 2, 1]
    assert filled(tmp_path / "c", paths)[1] == []
    assert filled(tmp_path / "c", paths[3:5])[1] == []


def test_pictures_of_equal_content_are_computed_once(tmp_path, paths):
    twin = tmp_path / "elsewhere.png"
    shutil.copy(paths[0], twin)
    assert sum(filled(tmp_path / "c", [*paths, twin, paths[1]])[1]) == len(paths)
    assert sum(filled(tmp_path / "d", [paths[0], twin, paths[0]], batch_size=3)[1]) == 1


def test_more_pictures_are_added(tmp_path, paths):
    filled(tmp_path / "c", paths[:4])
    assert filled(tmp_path / "c", paths)[1] == [2, 1]


def test_a_changed_picture_is_computed_again_and_an_untouched_one_not_even_read(tmp_path, paths):
    """A file of equal size and time stamp counts as unchanged, as in make or git; otherwise it is read again."""
    filled(tmp_path / "c", paths)
    before = paths[0].stat()
    Image.new("RGB", (10, 9), "red").save(paths[1], format="png")
    assert filled(tmp_path / "c", paths)[1] == [1]
    paths[0].write_bytes(b"x" * before.st_size)  # this is no picture any more, so reading it would raise an error
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    cache = FeatureCache(tmp_path / "c", Stub(), TargetPadProcessor(8))
    assert cache.find(paths) == set(paths)
    assert torch.is_tensor(cache.picture(paths[0]))
    os.utime(paths[0])
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image"):
        cache.picture(paths[0])


def change_weight(model):
    model.image_tower[1].weight[0, 0] += 1e-6


def change_dtype(model):
    model.image_tower.double()


def change_setting(model):
    model.image_tower[2].eps = 1e-3


def change_class(model):
    model.image_tower[0].__class__ = type("Flatten", (nn.Flatten,), {})


@pytest.mark.parametrize("change", [change_weight, change_dtype, change_setting, change_class])
def test_another_tower_has_another_folder(tmp_path, change):
    model = Stub()
    keys = [FeatureCache(tmp_path, model, TargetPadProcessor(8)).folder]
    change(model)
    keys.append(FeatureCache(tmp_path, model, TargetPadProcessor(8)).folder)
    assert keys[0] != keys[1]


def test_another_transform_has_another_folder_and_both_stay(tmp_path, paths):
    wide = TargetPadProcessor(8, target_ratio=1.0)
    assert sum(filled(tmp_path / "c", paths)[1]) == 7
    assert sum(filled(tmp_path / "c", paths, transform=wide)[1]) == 7
    assert filled(tmp_path / "c", paths)[1] == filled(tmp_path / "c", paths, transform=wide)[1] == []


@pytest.mark.parametrize(
    ("kind", "former"),
    [
        ("frozen tower", "ad3a3da83fdf9f22d1438e8ac478d8b7"),
        ("clip", "6356e5f4509afe67632f78b79d5b6cf0"),
        ("mapping", "8857ad8dd5285cc3b9ba578b7999f373"),
    ],
)
def test_a_cache_of_version_0_4_is_found_under_the_key_that_it_had_then(kind, former, tmp_path):
    """Version 0.4 printed these keys, on both stacks, for towers whose weights are all 0.5."""
    model = make_scoring_model(kind)
    for weight in model.image_tower.parameters():
        torch.nn.init.constant_(weight.requires_grad_(False), 0.5)
    today = FeatureCache(tmp_path, model, TargetPadProcessor(8)).folder
    assert today.name != former
    (tmp_path / former).mkdir()
    assert FeatureCache(tmp_path, model, TargetPadProcessor(8)).folder == tmp_path / former
    today.mkdir()
    assert FeatureCache(tmp_path, model, TargetPadProcessor(8)).folder == today


def test_the_key_holds_no_name_of_a_module():
    first = type("Tower", (torch.nn.Linear,), {"__module__": "somewhere.first"})
    second = type("Tower", (torch.nn.Linear,), {"__module__": "somewhere.renamed"})
    towers = [kind(1, 1) for kind in (first, second)]
    for tower in towers:
        torch.nn.init.constant_(tower.weight, 1.0)
        torch.nn.init.constant_(tower.bias, 0.0)
    assert fingerprint(towers[0]) == fingerprint(towers[1])


def test_fingerprints_tell_apart_what_computes_differently():
    def scaled(factor):
        return lambda x: x * factor

    different = [
        [[1], 2], [[1, 2]], [1.0], (1,), {"a": 1}, {"b": 1}, {1, 2}, "a", b"a", None, len, torch.float16,
        torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).half(), np.zeros(2), scaled(1), scaled(2), lambda x: x + 1,
        TargetPadProcessor, TargetPadProcessor(8), TargetPadProcessor(9), nn.Linear(2, 2), nn.Dropout(0.1),
        nn.Dropout(0.2), partial(scaled, 1), partial(scaled, factor=1), partial(scaled, factor=2), np.float32(1),
        np.int64(2), np.int64(3), Path("a"), Path("b"), range(3), range(4), deque([1]), deque([2]), re.compile("a"),
        re.compile("b"), Decimal(1), Decimal(2), complex(1, 2), complex(2, 1), Slotted(1), Slotted(2), SlottedToo(1, 2),
        SlottedToo(1, 3), SlottedToo(2, 2), slice(1), slice(2),
        with_keyword(1), with_keyword(2),
    ]  # fmt: skip
    assert len({fingerprint(thing) for thing in different}) == len(different)
    for same in (lambda: scaled(1), lambda: partial(scaled, factor=1), lambda: Slotted(1), lambda: SlottedToo(1, 2)):
        assert fingerprint(same()) == fingerprint(same())


def with_keyword(default):
    def scaled(x, *, factor=default):
        return x * factor

    return scaled


class Slotted:
    __slots__ = ("__hidden",)

    def __init__(self, value):
        self.__hidden = value


class SlottedToo(Slotted):
    """Has slots of its base and attributes of its own."""

    def __init__(self, hidden, value):
        super().__init__(hidden)
        self.value = value


def test_the_device_and_the_order_of_compiled_code_are_no_part_of_a_fingerprint():
    assert fingerprint([torch.device("cpu")]) == fingerprint([torch.device("meta")])
    for library in (re, regex):
        pattern = library.compile("a|b", library.IGNORECASE)
        assert list(feature_cache._parts(pattern, str)) == ["a|b", int(pattern.flags)]


def test_what_cannot_be_recognised_again_is_refused():
    with pytest.raises(ValueError, match=r"the tower or its transform holds a lock, whose value cannot be recognised"):
        fingerprint([threading.Lock()])


def test_what_does_not_change_the_output_keeps_the_fingerprint():
    tower = Stub().image_tower
    expected = fingerprint(Stub().image_tower)
    tower.train().requires_grad_(True).register_forward_hook(lambda *_: None)
    tower[1].weight.grad = torch.ones_like(tower[1].weight)
    assert fingerprint(tower) == expected
    knot = [1]
    knot.append(knot)
    assert fingerprint(knot) == fingerprint(knot)  # and it ends


def test_filling_draws_no_random_number_and_leaves_the_model_in_training(tmp_path, paths):
    model = Stub().train()
    state = torch.get_rng_state()
    filled(tmp_path / "c", paths, model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_workers_and_copies_read_the_same_rows_without_carrying_the_files(tmp_path, paths):
    """Five of seven pictures are cached; the third batch of a loader holds one of them and two that are not."""
    model = Stub()
    cache, _ = filled(tmp_path / "c", paths[:5], model)
    expected = read(FeatureCache(tmp_path / "d", model, TargetPadProcessor(8)), paths, model)

    class Pictures(CirDataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            return {"image": self.load_image(paths[index].name)}

    dataset = Pictures({path.name: path for path in paths}, TargetPadProcessor(8), str)
    dataset.use_features(cache)
    model.calls.clear()
    loader = DataLoader(dataset, 3, num_workers=1, collate_fn=dataset.collater)
    batches = [with_features(batch, model, [cache])["image"] for batch in loader]
    assert model.calls == [1, 1]
    assert torch.equal(torch.cat(batches), expected)
    sent = pickle.loads(pickle.dumps(cache))
    unread = len(pickle.dumps(sent))
    assert torch.equal(torch.stack([sent.picture(path) for path in paths]), expected)
    assert len(pickle.dumps(sent)) == unread
    sent.picture(paths[0]).zero_()  # a row is the reader's own
    assert torch.equal(sent.picture(paths[0]), expected[0])


def test_negatives_of_a_sample_may_be_cached_in_part(tmp_path, paths):
    """Two samples of three images each; of the six images four are different, and two of those are cached."""
    model = Stub()
    cache, _ = filled(tmp_path / "c", paths[:2], model)
    model.calls.clear()
    places = [[0, 1, 2], [3, 0, 2]]
    samples = [{"negatives": [cache.picture(paths[place]) for place in own], "text": "a"} for own in places]
    batch = CirDataset({}, TargetPadProcessor(8), str).collater(samples)
    found = with_features(batch, model, [cache])
    assert model.calls == [2]
    assert torch.equal(found["negatives"], torch.stack([read(cache, [paths[i] for i in own], model) for own in places]))
    assert found["text"] == ["a", "a"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_have_the_towers_own_type(tmp_path, paths, dtype):
    model = Stub()
    features = model.image_features
    model.image_features = lambda images: features(images).to(dtype)
    cache = FeatureCache(tmp_path / "c", model, TargetPadProcessor(8))
    read(cache, paths, model)
    pictures = torch.stack([TargetPadProcessor(8)(open_rgb(path)) for path in paths])
    found = torch.stack([cache.picture(path) for path in paths])
    assert found.dtype == dtype
    torch.testing.assert_close(found, model.image_features(pictures))


# --- what may happen to it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_killed_fill_is_continued(tmp_path, paths, stop_at):
    """SIGKILL ends the process in call 1 or 3; before call k, k batches of two are on the disk."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        model = Stub(stop_at=stop_at)
        read(FeatureCache(tmp_path / "c", model, TargetPadProcessor(8)), paths, model)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert sum(filled(tmp_path / "c", paths)[1]) == 7 - 2 * stop_at
    assert filled(tmp_path / "c", paths)[1] == []


def test_two_runs_at_once_use_what_the_other_has_computed(tmp_path, paths):
    """Both open an empty cache; the second one's last batch of three holds one picture that the first has not met."""
    first, second = ((FeatureCache(tmp_path / "c", model, TargetPadProcessor(8)), model) for model in (Stub(), Stub()))
    rows = read(first[0], paths[:6], first[1])
    again = read(second[0], paths, second[1], batch_size=4)
    assert second[1].calls == [1]
    assert torch.equal(again[:6], rows)
    assert torch.equal(read(first[0], paths, first[1]), again)
    assert first[1].calls == [2, 2, 2]


def test_a_row_that_is_written_while_lines_are_read_is_found(tmp_path, paths, monkeypatch):
    """The writer goes on after the reader has asked for a size or opened a file, and before it reads the lines."""
    writer, model = FeatureCache(tmp_path / "c", Stub(), TargetPadProcessor(8)), Stub()
    read(writer, paths[:2], model)
    reader = FeatureCache(tmp_path / "c", Stub(), TargetPadProcessor(8))
    path_open, left = Path.open, [paths[2:4]]

    def opened(path, *arguments, **named):
        file = path_open(path, *arguments, **named)
        if arguments == ("rb",) and path.parent == writer.folder and path.suffix == ".jsonl" and left:
            read(writer, left.pop(), model)
        return file

    monkeypatch.setattr(Path, "open", opened)
    assert reader.find(paths) == set(paths[:4])
    assert not left


def cut_the_rows(folder):
    rows = the(folder, ".rows")
    os.truncate(rows, rows.stat().st_size - 1)


def tear_the_last_line(folder):
    lines = the(folder, ".jsonl")
    os.truncate(lines, lines.stat().st_size - 1)


def damage_a_line(folder):
    lines = the(folder, ".jsonl")
    first, *rest = lines.read_bytes().split(b"\n")
    lines.write_bytes(b"\n".join([b"\x00" * len(first), *rest]))


def add_lines_without_rows(folder):
    with the(folder, ".jsonl").open("a") as lines:
        lines.write('{"image": "f", "row": 7, "check": 0}\n{"row": 0}\n[]\n{"image": "e", "row": -1}\n')


def flip_a_bit(folder):
    with the(folder, ".rows").open("r+b") as rows:
        rows.seek(3 * ROW_BYTES + 5)
        byte = rows.read(1)[0]
        rows.seek(-1, os.SEEK_CUR)
        rows.write(bytes([byte ^ 1]))


def swap_two_lines_rows(folder):
    lines = the(folder, ".jsonl")
    content = [json.loads(line) for line in lines.read_text().splitlines()]
    content[0]["row"], content[1]["row"] = 1, 0
    lines.write_text("".join(json.dumps(line) + "\n" for line in content))


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (cut_the_rows, 1),
        (tear_the_last_line, 1),
        (damage_a_line, 1),
        (add_lines_without_rows, 0),
        (flip_a_bit, 1),
        (swap_two_lines_rows, 2),
        (lambda folder: the(folder, ".rows").unlink(), 7),
        (lambda folder: the(folder, ".jsonl").write_bytes(b""), 7),
    ],
)
def test_what_is_damaged_is_computed_again_and_nothing_else(tmp_path, paths, damage, lost):
    cache, _ = filled(tmp_path / "c", paths)
    damage(cache.folder)
    assert sum(filled(tmp_path / "c", paths, batch_size=7)[1]) == lost
    assert filled(tmp_path / "c", paths)[1] == []


def test_a_folder_that_is_not_what_its_name_says_is_refused(tmp_path, paths):
    cache, _ = filled(tmp_path / "c", paths)
    meta = cache.folder / "meta.json"
    for content in (meta.read_text().replace("1,", "0,", 1), "{", "[]"):
        meta.write_text(content)
        with pytest.raises(ValueError, match=r"meta\.json does not describe the tower and transform .*; delete"):
            FeatureCache(tmp_path / "c", Stub(), TargetPadProcessor(8))


def test_a_disk_that_fills_up_ends_the_keeping_and_not_the_run(tmp_path, paths, caplog):
    """No file may grow beyond two batches of two rows and a few bytes, so the third batch is written in part."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    filled(tmp_path / "c", paths[:1])  # meta.json is longer
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        _, calls = filled(tmp_path / "c", paths)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert calls == [1, 2, 2, 1]
    (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "cannot be written (File too large); the features that are there are whole, and the run goes on" in said
    _, calls = filled(tmp_path / "c", paths)
    assert 0 < sum(calls) < 6


def test_a_folder_that_goes_away_does_no_harm(tmp_path, paths):
    cache, _ = filled(tmp_path / "c", paths)
    shutil.rmtree(tmp_path / "c")
    fresh = pickle.loads(pickle.dumps(cache))  # with nothing mapped, like a worker
    model = Stub()
    rows = read(fresh, paths, model)
    assert sum(model.calls) == 7
    assert torch.equal(rows, read(cache, paths, model))


def test_a_folder_that_is_deleted_during_a_run_is_filled_again(tmp_path, paths):
    """Rows of a file without a name are never found again, so each epoch would add all of them to the disk."""
    model = Stub()
    cache, _ = filled(tmp_path / "c", paths, model)
    shutil.rmtree(tmp_path / "c")
    computed = []
    for _ in range(2):
        model.calls.clear()
        worker = pickle.loads(pickle.dumps(cache))
        column = collate_images([worker.picture(path) for path in paths])
        with_features({"image": column}, model, [cache])
        computed.append(sum(model.calls))
    assert computed == [7, 0]
    assert filled(tmp_path / "c", paths)[1] == []


def test_features_that_are_no_numbers_are_not_kept(tmp_path, paths, caplog):
    model = Stub()
    model.image_tower[1].bias[0] = float("nan")
    cache = FeatureCache(tmp_path / "c", model, TargetPadProcessor(8))
    assert read(cache, paths, model).isnan().any()
    assert f"the features of {paths[6]} are not finite and are not kept" in caplog.text
    assert not cache.find(paths)


def test_pictures_that_nobody_hashes_are_told_apart(tmp_path, paths):
    """A split that keeps nothing asks an empty cache for pictures: each has to get its own features."""
    model, cache = Stub(), FeatureCache(tmp_path / "c", Stub(), TargetPadProcessor(8))
    column = collate_images([cache.picture(path, is_kept=False) for path in paths])
    rows = with_features({"image": column}, model, [cache])["image"]
    expected = read(FeatureCache(tmp_path / "other", model, TargetPadProcessor(8)), paths, Stub())
    torch.testing.assert_close(rows, expected)
    assert model.calls == [7]
    assert not list((tmp_path / "c").glob("*"))


def test_an_interrupt_while_rows_are_written_shifts_none_of_the_later_ones(tmp_path, paths):
    model, cache = Stub(), FeatureCache(tmp_path / "c", Stub(), TargetPadProcessor(8))
    read(cache, paths[:2], model)
    lines = cache._segment._lines
    cache._segment._lines = SimpleNamespace(write=interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(cache, paths[2:4], model)
    lines.close()
    rows = read(cache, paths[4:], model)
    torch.testing.assert_close(torch.stack([cache.picture(path) for path in paths[4:]]), rows)
    assert FeatureCache(tmp_path / "c", Stub(), TargetPadProcessor(8)).find(paths) == {*paths[:2], *paths[4:]}


def interrupted(content):
    raise KeyboardInterrupt


def test_a_tower_that_returns_something_else_is_noticed(tmp_path, paths):
    filled(tmp_path / "c", paths[:3])
    model = Stub()
    model.image_features = lambda images: model.image_tower(images)
    with pytest.raises(ValueError, match=r"holds rows of \(2, 3\) torch\.float32 and the tower returns \(6,\)"):
        filled(tmp_path / "c", paths, model)


# --- two processes -----------------------------------------------------------------------------------------------


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    root, paths, model = Path(folder, "c"), sorted(Path(folder, "images").glob("*.png")), Stub()
    cache = FeatureCache(root, model, TargetPadProcessor(8))
    found = [len(cache.find(paths))]
    read(cache, paths[rank::2], model)
    dist.barrier()
    again = FeatureCache(root, model, TargetPadProcessor(8))
    if rank == 0:
        shutil.copytree(Path(folder, "images"), Path(folder, "moved"))
    dist.barrier()
    moved = sorted(Path(folder, "moved").glob("*.png"))
    found += [len(again.find(paths)), len(again.find([*moved, Path(folder, "missing.png")]))]
    Path(folder, f"{rank}.json").write_text(json.dumps([model.calls, found]))
    dist.destroy_process_group()


def test_two_processes_compute_their_own_pictures_and_find_all(tmp_path, paths):
    """Of 7 pictures they compute 4 and 3; moved files are recognised by their bytes, and a missing one is no error."""
    in_two_processes(work, str(tmp_path))
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results == [[[2, 2], [0, 7, 7]], [[2, 1], [0, 7, 7]]]
    assert filled(tmp_path / "c", paths)[1] == []


def find_own(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    paths = sorted(Path(folder, "images").glob("*.png"))
    cache = FeatureCache(Path(folder, f"cache{rank}"), Stub(), TargetPadProcessor(8))
    found = sorted(path.name for path in cache.find(paths))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_processes_with_folders_of_their_own_check_all_of_their_rows(tmp_path, paths):
    """One byte of the second process's first row is wrong, which the first process's share would cover."""
    for rank in range(2):
        filled(tmp_path / f"cache{rank}", paths)
    (rows,) = (tmp_path / "cache1").glob("*/*.rows")
    content = bytearray(rows.read_bytes())
    for row in range(7):
        content[row * ROW_BYTES] ^= 1 if row < 4 else 0
    rows.write_bytes(bytes(content))
    in_two_processes(find_own, str(tmp_path))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [[path.name for path in paths], [path.name for path in paths[4:]]]


# --- the model and the task --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", ["joint", "sentence_prompt"])
@pytest.mark.parametrize("vit_model", ["eva_clip_g", "clip_L"])
def test_tokens_in_place_of_pictures_give_the_same_losses_gradients_and_vectors(
    fusion, vit_model, small_model, triplets
):
    """The tokens are computed one by one, as in a cache of another batch size."""
    small = {"vit_config": {"patch_size": 8, "width": 12, "layers": 2, "heads": 2}} if vit_model == "clip_L" else {}
    model = small_model(fusion=fusion, vit_model=vit_model, freeze_vit=True, **small)
    batch = triplets(4)
    with torch.no_grad():
        rows = {key: torch.cat([model.image_features(one[None]) for one in batch[key]]) for key in ("image", "target")}
    assert rows["image"].shape == (4, 5, 12)
    outputs = []
    for samples in (batch, {**batch, **rows}):
        model.zero_grad()
        losses = model.train()(samples)
        losses["loss"].backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.eval()
        vectors = [model.encode_query(samples, mode) for mode in ("multimodal", "image")]
        outputs.append((losses, gradients, vectors, model.encode_target(samples["target"])))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


def test_pictures_are_preloaded_later_and_the_config_stays_as_it_was(project):
    """The config must not change, because a resumed run is found by it."""
    section = OmegaConf.merge(
        OmegaConf.load(registry.get_builder_class("fashioniq").default_config_path()).datasets.fashioniq,
        OmegaConf.load(project).datasets.fashioniq,
    )
    preloaded = []
    for where in (False, "auto"):
        made = OmegaConf.create({"datasets_cfg": {"fashioniq": section}, "run_cfg": {"feature_cache": where}})
        before = copy.deepcopy(made)
        datasets = ComposedRetrievalTask().build_datasets(made)["fashioniq"]
        assert made == before
        preloaded.append({split: bool(dataset.preloaded) for split, dataset in datasets.items()})
    assert preloaded == [{"train": True, "val": True}, {"train": False, "val": False}]


# --- lavis.train and lavis.evaluate ------------------------------------------------------------------------------

WORLD = {
    "train_triplets": 12, "train_images": 16, "val_queries": 5, "val_images": 14, "test_queries": 2, "test_images": 4,
    "image_width": 32, "image_height": 40,
}  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Write the demo's project with a frozen tower, on 3 x (16 + 14) small pictures that the data set would preload."""
    folder = tmp_path_factory.mktemp("project")
    made = OmegaConf.load(PROJECTS / "wrf4cir" / "demo.yaml")
    made.model.freeze_vit = True
    made.datasets.fashioniq = {
        "build_info": {"root": str(make_garments(folder, GarmentsConfig(**WORLD)))},
        "preload": True,
        "vis_processor": {stage: {"name": "target_pad", "image_size": 64} for stage in ("train", "eval")},
    }
    made.run.update({"max_epoch": 1, "batch_size_train": 8})
    made.run.wrf.warmup_epochs = 0
    path = folder / "project.yaml"
    OmegaConf.save(made, path)
    return str(path)


def launch(command, project, output, *options):
    launcher.main(command, ["--cfg-path", project, "--options", f"run.output_dir={output}", *options])
    (metrics,) = output.rglob("metrics.json")
    return metrics.parents[1], json.loads(metrics.read_text())["metrics"]


def test_training_and_evaluation_through_the_launcher(project, tmp_path, monkeypatch):
    """The first run computes features, later runs of both commands only read them; no number changes."""
    calls = []
    tower = Blip2Cir.image_features
    monkeypatch.setattr(
        Blip2Cir, "image_features", lambda self, images: calls.append(len(images)) or tower(self, images)
    )
    cache = f"run.feature_cache={tmp_path / 'cache'}"

    folder, first = launch("train", project, tmp_path / "first", cache)
    (rows,) = (path for path in (tmp_path / "cache").glob("*/*.jsonl") if path.parent.name != "files")
    images = [json.loads(line)["image"] for line in rows.read_text().splitlines()]
    assert len(images) == len(set(images))
    assert len(images) > 3 * 14  # those of the evaluation and some more
    assert (folder / "val" / "contact_sheet_dress.png").is_file()
    leave_pictures_blank(monkeypatch)
    calls.clear()
    again, second = launch("train", project, tmp_path / "second", cache)
    assert second == first
    weights = [torch.load(run / "checkpoint_best.pth", weights_only=True)["model"] for run in (folder, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    # The frozen tower is not in the checkpoint and its random weights come from the seed: the same tower, the same key.
    loaded = torch.load(folder / "checkpoint_best.pth", weights_only=True)
    monkeypatch.setattr(
        Blip2Cir, "load_checkpoint_from_config", lambda self, cfg: self.load_checkpoint(cfg["finetuned"])
    )
    trained = ["model.load_finetuned=true", f"model.finetuned={folder / 'checkpoint_best.pth'}"]
    _, evaluated = launch("evaluate", project, tmp_path / "third", cache, *trained)
    assert not calls
    assert not any(name.startswith("visual_encoder") for name in loaded["model"])
    _, uncached = launch("evaluate", project, tmp_path / "fourth", *trained)
    assert calls
    assert evaluated == uncached == first


def test_a_random_processor_is_refused_by_its_key(project, tmp_path, capsys):
    options = [f"run.feature_cache={tmp_path}", "datasets.fashioniq.vis_processor.train.name=blip_image_train"]
    options += ["datasets.fashioniq.preload=false", f"run.output_dir={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match=r"vis_processor\.train is BlipImageTrainProcessor, which may .*\.train\.name"):
        launcher.main("train", ["--cfg-path", project, "--options", *options])


def test_a_cache_that_is_no_folder_is_refused_before_anything_is_loaded(project):
    with pytest.raises(
        SystemExit, match=r"run\.feature_cache must be auto, true, false or the path of a folder, got 3"
    ):
        launcher.main("train", ["--cfg-path", project, "--options", "run.feature_cache=3"])


def test_it_is_no_key_of_other_tasks(project):
    from lavis_cir_plugin.training.config import read_config

    with pytest.raises(ConfigError, match=r"run\.feature_cache is read by composed_retrieval and has no effect under"):
        read_config(project, ["run.task=captioning", "run.feature_cache=true"])
