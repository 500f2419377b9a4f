"""Rows in a shared file come back bit for bit in any order and type, and errors of the disk are sentences."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from lavis_cir_plugin.core.shared_rows import SharedRows


def opened(folder, total):
    return SharedRows(folder / "rows.tmp", total, "the rows", "free some space")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_rows_of_any_type_are_read_as_they_were_written_in_any_order(tmp_path, dtype, shape):
    rows = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with opened(tmp_path, 6) as file:
        for start, stop in ((4, 6), (0, 1), (1, 4)):
            file.write(start, rows[start:stop])
        read = file.mapped()
    assert read.dtype == dtype
    assert torch.equal(read, rows)
    assert list(tmp_path.iterdir()) == []


def test_a_transposed_batch_is_written_row_by_row(tmp_path):
    rows = torch.arange(6.0).view(2, 3).T
    with opened(tmp_path, 3) as file:
        file.write(0, rows)
        assert file.mapped().tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]


@pytest.mark.parametrize(("others", "fits"), [(0, True), (16, True), (17, False)])
def test_room_is_asked_for_beside_other_files(tmp_path, others, fits):
    """3 rows of 2 float32 take 24 bytes, and 40 are free."""
    with opened(tmp_path, 3) as file, mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=40)):
        if fits:
            file.check_room(torch.zeros(2), others)
            return
        sentence = (
            r"^the rows cannot be written to .*rows\.tmp \(it needs 24 bytes beside 17 bytes for other files and 40 "
            r"bytes are free\); free some space\.$"
        )
        with pytest.raises(OSError, match=sentence):
            file.check_room(torch.zeros(2), others)
