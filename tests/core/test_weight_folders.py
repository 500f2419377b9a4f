"""Reading weights from folders of transformers: one file or shards, and files that contradict each other."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from lavis_cir_plugin.core.weight_folders import is_hub_name, read_folder

STATE = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0]), "c": torch.tensor([[4.0]])}
FIRST, SECOND = "model-00001-of-00002", "model-00002-of-00002"


def write_shards(folder, ending=".safetensors", stem="model") -> None:
    save = save_file if ending == ".safetensors" else torch.save
    first, second = (name.replace("model", stem) + ending for name in (FIRST, SECOND))
    save({"a": STATE["a"]}, folder / first)
    save({"b": STATE["b"], "c": STATE["c"]}, folder / second)
    index = {"metadata": {"total_size": 16}, "weight_map": {"a": first, "b": second, "c": second}}
    (folder / f"{stem}{ending}.index.json").write_text(json.dumps(index))


def assert_whole(folder) -> None:
    state = read_folder(folder).state
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize(("stem", "ending"), [("model", ".safetensors"), ("pytorch_model", ".bin")])
def test_one_file_and_shards_give_the_same(stem, ending, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    (save_file if ending == ".safetensors" else torch.save)(STATE, tmp_path / "one" / f"{stem}{ending}")
    write_shards(tmp_path / "many", ending, stem)
    assert_whole(tmp_path / "one")
    assert_whole(tmp_path / "many")


def test_of_two_formats_safetensors_are_read(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert_whole(tmp_path)


def damage(folder, kind) -> None:
    index = folder / "model.safetensors.index.json"
    if kind == "both":
        save_file(STATE, folder / "model.safetensors")
    elif kind == "shards without index beside a file":
        save_file(STATE, folder / "model.safetensors")
        index.unlink()
    elif kind == "no index":
        index.unlink()
    elif kind == "missing shard":
        (folder / f"{SECOND}.safetensors").unlink()
    elif kind == "stale shard":
        save_file({"d": torch.ones(1)}, folder / "model-00003-of-00003.safetensors")
    elif kind == "other tensors":
        save_file({"a": STATE["a"], "b": STATE["b"]}, folder / f"{FIRST}.safetensors")
    elif kind == "elsewhere":
        index.write_text(json.dumps({"weight_map": {"a": f"../{folder.name}/{FIRST}.safetensors"}}))
    elif kind == "no map":
        index.write_text(json.dumps({"weight_map": ["a"]}))
    elif kind == "no object":
        index.write_text("[1]")
    else:
        index.write_text('{"weight_map":')


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("both", ValueError, r"holds model\.safetensors and beside it model\.safetensors\.index\.json"),
        ("shards without index beside a file", ValueError, f"beside it {FIRST}"),
        ("no index", FileNotFoundError, r"without model\.safetensors\.index\.json"),
        ("missing shard", FileNotFoundError, f"names {SECOND}"),
        ("stale shard", ValueError, "holds model-00003-of-00003"),
        ("other tensors", ValueError, r"disagree on 1 tensors \(first: b\)"),
        ("elsewhere", FileNotFoundError, "is not in this folder"),
        ("no map", ValueError, "has no weight_map"),
        ("no object", ValueError, "must hold a JSON object, got list"),
        ("no JSON", ValueError, "is not valid JSON"),
    ],
)
def test_files_that_contradict_each_other_are_refused(kind, error, message, tmp_path):
    write_shards(tmp_path)
    damage(tmp_path, kind)
    with pytest.raises(error, match=message):
        read_folder(tmp_path)


def test_a_folder_without_weights_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        read_folder(tmp_path)


def test_a_hub_name_has_one_slash_and_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("Salesforce/blip2-itm-vit-g")
    assert not any(map(is_hub_name, ["blip2", "/a/b", "a/b/c", "./a", "~/a", "models/x.pth", "models/x.safetensors"]))
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert not is_hub_name("models/mine")


def test_the_older_format_is_downloaded_only_where_there_are_no_safetensors(tmp_path):
    def download(name, allow_patterns):
        if "pytorch_model*.bin" in allow_patterns:
            torch.save(STATE, tmp_path / "pytorch_model.bin")
        return str(tmp_path)

    with mock.patch("huggingface_hub.snapshot_download", side_effect=download) as downloads:
        assert read_folder("owner/older").path == tmp_path
        assert downloads.call_count == 2
        save_file(STATE, tmp_path / "model.safetensors")
        read_folder("owner/newer")
        assert downloads.call_count == 3
