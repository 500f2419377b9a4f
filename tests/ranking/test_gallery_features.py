"""The file of a gallery's features holds exact rows, disappears at the end, and fails clearly on a full disk."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lavis_cir_plugin.ranking.gallery_features import store_gallery


def rows(total, *shape):
    return torch.randn(total, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 3, 10, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batches_of_any_size_give_the_rows_and_leave_no_file(tmp_path, batch, dtype):
    features = rows(10, 4, 5)
    read = store_gallery(tmp_path / "rows.tmp", 10, features.split(batch), dtype)
    assert torch.equal(read, features.to(dtype))
    assert not list(tmp_path.iterdir())


def test_the_file_has_no_name_while_it_is_written(tmp_path):
    """The file has no name, so a process that is killed leaves nothing, however large the file has become."""

    def batches():
        for batch in rows(6, 5).split(2):
            assert not list(tmp_path.iterdir())
            yield batch

    assert torch.equal(store_gallery(tmp_path / "rows.tmp", 6, batches(), torch.float32), rows(6, 5))


def be_killed(folder):
    def batches():
        yield rows(2, 5)
        os.kill(os.getpid(), signal.SIGKILL)

    store_gallery(folder / "rows.tmp", 6, batches(), torch.float32)


def test_a_killed_process_leaves_no_file(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=be_killed, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


def test_small_galleries_are_counted_in_small_units(tmp_path, monkeypatch):
    """2 rows of 3 float32 need 24 bytes, but no byte is free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(OSError, match=r"it needs 24 bytes and 0 bytes are free"):
        store_gallery(tmp_path / "rows.tmp", 2, [rows(2, 3)], torch.float32)


def test_an_older_longer_file_is_replaced(tmp_path):
    (tmp_path / "rows.tmp").write_bytes(b"x" * 10_000)
    assert store_gallery(tmp_path / "rows.tmp", 3, [torch.ones(3, 2)], torch.float32).tolist() == [[1.0, 1.0]] * 3


def test_too_few_rows_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="9 of 10 gallery images were encoded; the model must return a row for each"):
        store_gallery(tmp_path / "rows.tmp", 10, [rows(9, 2)], torch.float32)


def test_a_gallery_that_does_not_fit_is_refused_after_its_first_batch(tmp_path, monkeypatch):
    """1,000,000 rows of 8 float16 need 16 MB. The error comes when only the first batch has been encoded."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=15_000_000))
    seen = []

    def batches():
        for number in range(3):
            seen.append(number)
            yield rows(10, 8)

    sentence = r"\(it needs 16\.0 MB and 15\.0 MB are free\); free some space, set run\.output_dir .* to float16"
    with pytest.raises(OSError, match=sentence):
        store_gallery(tmp_path / "rows.tmp", 1_000_000, batches(), torch.float16)
    assert seen == [0]


def test_a_disk_that_fills_up_meanwhile_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "memmap", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match=r"cannot be written to .*rows\.tmp \(No space left\); free some space"):
        store_gallery(tmp_path / "rows.tmp", 2, [rows(2, 2)], torch.float32)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(OSError, match=r"cannot be written to .*none/rows\.tmp \(No such file or directory\)"):
        store_gallery(tmp_path / "none" / "rows.tmp", 2, [rows(2, 2)], torch.float32)


def test_a_failing_encoder_is_not_explained_as_a_disk(tmp_path):
    def batches():
        yield rows(1, 2)
        raise ValueError("picture x is broken")

    with pytest.raises(ValueError, match=r"^picture x is broken$"):
        store_gallery(tmp_path / "rows.tmp", 2, batches(), torch.float32)
