"""``lavis-cir`` prints whatever names files have, and says in a sentence what the system refuses."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from lavis_cir_plugin.commands import main


@pytest.mark.parametrize(
    ("encoding", "name", "printed"),
    [("utf-8", b"pictures\xff", b"pictures\xff: "), ("latin-1", "γ".encode(), rb"\u03b3: ")],
)
def test_a_folder_whose_name_cannot_be_printed_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, name: bytes, printed: bytes
):
    folder = os.fsencode(tmp_path) + b"/" + name
    os.mkdir(folder)
    output = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit) as end:
        main.main(["check", os.fsdecode(folder)])
    output.flush()
    assert end.value.code == 1  # nothing is there that can be run
    assert printed in output.buffer.getvalue()


def test_a_closed_output_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after >&-
    main.main(["config", "--schema"])


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "what is printed cannot be read or written (No space left"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/x"), "/x cannot be read or written (Permission"),
        (OSError(errno.ENOSPC, "our own sentence."), "our own sentence."),
        (FileNotFoundError("x is not there."), "x is not there."),
    ],
)
def test_what_the_system_refuses_is_a_sentence(monkeypatch: pytest.MonkeyPatch, error: OSError, sentence: str):
    def refuse(arguments: object) -> None:
        raise error

    monkeypatch.setattr("lavis_cir_plugin.commands.check._check", refuse)
    with pytest.raises(SystemExit) as end:
        main.main(["check", "."])
    assert str(end.value.code).startswith(f"lavis-cir: {sentence}")
    assert "[Errno" not in str(end.value.code)
