"""Reading weight files that are damaged, foreign, or wrapped by another program."""

import argparse
import io
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lavis_cir_plugin.core import checkpoints
from lavis_cir_plugin.core.checkpoints import (
    as_float32,
    finetuned_in,
    load_strictly,
    mapped_checkpoint,
    read_checkpoint,
    read_state,
    verify_checkpoint,
)

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([0.5, -1.5])}
ADVICE = ("weights_only", "add_safe_globals", "safe_globals", "\x1b", "arbitrary code", "pytorch.org")


@pytest.fixture(autouse=True)
def log(caplog):
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a content and returns its path."""

    def save(content, name="x.pth", **options):
        torch.save(content, tmp_path / name, **options)
        return str(tmp_path / name)

    return save


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def refusal(path, error=ValueError):
    """Return the message with which a file is refused; the message repeats no advice of torch."""
    with pytest.raises(error) as caught:
        read_state(str(path))
    message = str(caught.value)
    assert not any(word in message for word in ADVICE), message
    assert message.isprintable()
    assert caught.value.__cause__ is None or "weights_only" not in str(caught.value.__cause__)
    return message


# Damage


def test_every_flipped_byte_is_refused_or_changes_nothing(saved, tmp_path):
    whole = (tmp_path / "x.pth", saved(STATE))[0].read_bytes()
    refused = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        (tmp_path / "y.pth").write_bytes(damaged)
        try:
            found = read_state(str(tmp_path / "y.pth"))
        except ValueError:
            refused += 1
            continue
        assert found.keys() == STATE.keys(), place
        assert all(torch.equal(found[name], STATE[name]) for name in STATE), place
    assert refused > 300


def test_a_flipped_byte_of_a_weight_is_damage(saved, tmp_path):
    path = saved(STATE)
    whole = (tmp_path / "x.pth").read_bytes()
    place = whole.index(STATE["weight"].numpy().tobytes())
    (tmp_path / "x.pth").write_bytes(whole[: place + 6] + b"\x41" + whole[place + 7 :])
    assert torch.load(path, weights_only=True)["weight"][0, 1] != 1, "torch notices nothing"
    with pytest.raises(ValueError, match=r"x\.pth is damaged or was only half written \(.*/data/0\)"):
        read_state(path)


def test_a_cut_file_is_refused_in_both_of_torchs_formats(saved, tmp_path):
    for is_zip in (True, False):
        path = tmp_path / "x.pth"
        whole = (saved(STATE, _use_new_zipfile_serialization=is_zip), path)[1].read_bytes()
        assert read_state(str(path)).keys() == STATE.keys()
        for length in range(0, len(whole) - 1, 7):
            path.write_bytes(whole[:length])
            refusal(path)


def test_a_file_without_check_sums_is_taken_and_said(saved, log):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(STATE)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_state(path).keys() == STATE.keys()
    assert "x.pth was written without check sums" in log.text


# Foreign files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n", "it is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "it is a web page"),
        (b"<html></html>", "it is a web page"),
        (b"", "it is empty"),
        (b"\x1f\x8b\x08\x00", "it is compressed: unpack it"),
        (b"hello \x1b[1m", r"it is no checkpoint: it begins with b'hello \x1b[1m'"),
        (b"\x80\x02}q\x00.", "it is truncated or damaged"),
    ],
)
def test_what_is_no_weight_file_is_named(content, message, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    assert message in refusal(tmp_path / "x.pth")


def test_other_archives_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("folder/weights.pth", b"x")
    assert "it is a zip file that torch.save did not write" in refusal(tmp_path / "x.pth")
    torch.jit.save(torch.jit.script(linear()), str(tmp_path / "x.pth"))
    assert "it is a TorchScript archive" in refusal(tmp_path / "x.pth")


class Evil:
    def __reduce__(self):
        return eval, ("1 + 1",)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"model": STATE, "args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
        ({"model": STATE, "history": np.ones(3)}, r"multiarray._reconstruct"),
        ({"model": STATE, "evil": Evil()}, "eval"),
        (linear(), "torch.nn.modules.linear.Linear"),
    ],
)
def test_an_object_beside_the_tensors_is_named(content, name, saved):
    message = refusal(saved(content))
    assert f"{name} beside its tensors" in message
    assert "save model.state_dict() alone by torch.save" in message


def test_numbers_of_numpy_become_plain_ones(saved):
    kinds = [np.float64(3.25), np.float32(0.5), np.int64(-7), np.bool_(True), np.dtype(">f8").type(2.5)]
    found = read_checkpoint(saved({"model": STATE, "best": kinds}))["best"]
    assert found == [3.25, 0.5, -7, True, 2.5]
    assert [type(value) for value in found] == [float, float, int, bool, float]
    assert read_state(saved({"state_dict": STATE, "best_recall": np.float64(3.0)})).keys() == STATE.keys()


def test_numbers_of_both_numpys_are_read(saved, tmp_path):
    """Numpy 2 renamed `numpy.core` to `numpy._core`. The test rewrites one file for each version."""
    with zipfile.ZipFile(saved({"model": STATE, "best": np.float64(3.25)})) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    for core in (b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"):
        with zipfile.ZipFile(tmp_path / "y.pth", "w") as archive:
            for name, content in records.items():
                changed = content.replace(b"cnumpy._core.multiarray\n", core).replace(b"cnumpy.core.multiarray\n", core)
                archive.writestr(name, changed)
        assert read_checkpoint(str(tmp_path / "y.pth"))["best"] == 3.25


def test_a_safetensors_file_is_read_whatever_it_is_called(tmp_path):
    save_file(STATE, tmp_path / "x.pth")
    assert torch.equal(read_state(str(tmp_path / "x.pth"))["bias"], STATE["bias"])


# Finding the state dictionary in a file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**STATE, "epoch": 3}, "1 of 3 entries beside its tensors are none (first: epoch, of type int)"),
        ({"model": {**STATE, "n": [1]}}, "1 of 3 entries beside its tensors are none (first: n, of type list)"),
        ({1: STATE["bias"]}, "its tensors have names that are no text (first: 1, of type int)"),
        ({"model": {2: STATE["bias"]}}, "its tensors have names that are no text (first: 2, of type int)"),
        ({}, "expected one state dictionary (name to tensor), found 0 (content: nothing)"),
        ({"a\x1b[1m": 1}, r"found 0 (content: a\x1b[1m)"),
        (STATE["bias"], "found 0 (content: Tensor)"),
        ({"ema": STATE, "online": STATE}, "found 2 (content: ema, online)"),
    ],
)
def test_a_file_without_one_state_dictionary_says_what_is_in_it(content, message, saved):
    assert message in refusal(saved(content))


@pytest.mark.parametrize(("other", "taken"), [("ema", "model"), ("ema", "state_dict"), ("state_dict", "model")])
def test_which_of_two_state_dictionaries_is_taken_is_said(other, taken, saved, log):
    path = saved({other: {"x": torch.zeros(1)}, taken: STATE})
    assert read_state(path).keys() == STATE.keys()
    assert f"{path} holds 2 state dictionaries: {taken} is taken, not {other}" in log.text


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "module.model."])
def test_a_prefix_that_programs_put_before_all_names_is_taken_off(prefix, saved, log):
    model = linear()
    path = saved({"state_dict": {prefix + name: tensor for name, tensor in STATE.items()}})
    load_strictly(model, read_state(path), path)
    assert torch.equal(model.bias, STATE["bias"])
    assert f"all names in {path} begin with {prefix!r}, which is left out" in log.text
    partly = saved({"model.a": STATE["bias"], "b": STATE["bias"]})
    assert set(read_state(partly)) == {"model.a", "b"}


def test_any_other_common_prefix_is_named():
    state = {f"student.net.{name}": tensor for name, tensor in STATE.items()}
    message = (
        r"2 unexpected keys .*; 0 of 2 keys match\. All its names begin with student\.net\., and without that 2 of"
    )
    with pytest.raises(ValueError, match=message):
        load_strictly(linear(), state, "x.pth")
    with pytest.raises(ValueError, match="It belongs to another model or type"):
        load_strictly(linear(), {"student.other": STATE["bias"]}, "x.pth")


# Tensors that hold no weights


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(2).to_sparse(), "a sparse tensor"),
        (torch.eye(2).to_sparse_csr(), "a sparse tensor"),
        (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "a quantised tensor"),
        (torch.empty(2, device="meta"), "a meta tensor, which has a shape and no values"),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "a nested tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_is_not_dense_is_named(tensor, kind, saved):
    assert f"bias is {kind}; save the weights as dense" in refusal(saved({**STATE, "bias": tensor}))
    with pytest.raises(ValueError, match=f"x.pth: bias is {kind}"):
        load_strictly(linear(), {**STATE, "bias": tensor}, "x.pth")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_type_that_holds_no_weights_is_refused_and_nothing_is_loaded(dtype):
    model, before = linear(), linear()
    state = {**STATE, "bias": torch.ones(2).to(dtype)}
    name = str(dtype).replace("torch.", "")
    message = rf"x\.pth: 1 tensors are of a type that holds no weights \(first: bias is {name} there and float32 here\)"
    with pytest.raises(ValueError, match=message):
        load_strictly(model, state, "x.pth")
    assert torch.equal(model.weight, before.weight)
    with pytest.raises(ValueError, match=rf"first: bias is {name}\); allowed are float16, bfloat16, float32"):
        as_float32(state, "x.pth")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_converted_and_said(dtype, log):
    model = linear()
    load_strictly(model, {**STATE, "bias": STATE["bias"].to(dtype)}, "x.pth")
    assert torch.equal(model.bias, STATE["bias"])
    said = f"converted 1 tensors of x.pth from {str(dtype)[6:]} to float32"
    assert log.messages == [said, "loaded all 2 tensors of the model from x.pth"]
    log.clear()
    assert {tensor.dtype for tensor in as_float32({"bias": STATE["bias"].to(dtype)}, "x.pth").values()} == {
        torch.float32
    }
    assert log.messages == [said]


def test_integers_stay_where_the_model_has_integers():
    model = nn.BatchNorm1d(2)
    state = {**model.state_dict(), "num_batches_tracked": torch.tensor(7)}
    load_strictly(model, as_float32(state, "x.pth"), "x.pth")
    assert model.num_batches_tracked == 7
    assert as_float32(state, "x.pth")["num_batches_tracked"].dtype == torch.int64


def test_what_a_file_leaves_out_is_said(log):
    load_strictly(linear(), {"bias": STATE["bias"]}, "x.pth", may_lack=("weight",))
    assert log.messages == [
        "loaded 1 tensors from x.pth; the model's other 1 are not in it and stay as they are (first: weight)"
    ]


def test_a_files_terminal_codes_reach_no_message():
    with pytest.raises(ValueError, match=r"first: a\\x1b\[31m\)"):
        load_strictly(linear(), {"a\x1b[31m": STATE["bias"]}, "x.pth")


def test_an_archive_of_torchscript_is_verified(tmp_path):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(linear()), buffer)
    content = bytearray(buffer.getvalue())
    place = content.index(linear().bias.detach().numpy().tobytes())
    content[place] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt is damaged or was only half written"):
        verify_checkpoint(tmp_path / "x.pt")


def test_finetuned_weights_are_named_where_they_are_asked_for():
    assert finetuned_in({"load_finetuned": True, "finetuned": "x.pth"}) == "x.pth"
    assert finetuned_in({"load_finetuned": False, "finetuned": "x.pth"}) is None
    for empty in ({}, {"finetuned": None}, {"finetuned": ""}):
        assert finetuned_in(empty) is None
        with pytest.raises(
            ValueError, match=r"load_finetuned is true and model\.finetuned is empty; name a checkpoint"
        ):
            finetuned_in({"load_finetuned": True, **empty})


def test_a_mapped_file_has_the_same_content_and_no_other_file_is_judged(tmp_path):
    torch.save({"model": {"weight": torch.arange(3.0)}, "score": np.float64(0.5)}, tmp_path / "run.pth")
    content = mapped_checkpoint(tmp_path / "run.pth")
    assert torch.equal(content["model"]["weight"], torch.arange(3.0))
    assert content["score"] == 0.5
    (tmp_path / "text.pth").write_text("no checkpoint")
    assert mapped_checkpoint(tmp_path / "text.pth") is None


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_the_first_process_of_each_machine_downloads_what_the_machine_lacks(local_rank, tmp_path, monkeypatch):
    """The ninth process of a run may be the first one of a machine with a cache of its own."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(checkpoints, "rank_and_world", lambda: (8, 16))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path: Path(path).write_text(url))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert checkpoints._download("https://example.org/w.pth").is_file() == (local_rank == "0")
