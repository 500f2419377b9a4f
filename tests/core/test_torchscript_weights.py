"""TorchScript files are read without torch's deprecated loader, and give what it gives."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lavis_cir_plugin.core.torchscript_weights import read_torchscript


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.mask = torch.ones(3, 3)  # no weight
        self.register_buffer("steps", torch.tensor([1, 2]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.weight = nn.Parameter(torch.randn(6, 4).t()[:, 1:5:2].half())
        self.sizes = [1, 2]

    def forward(self, x):
        return self.attention(x, x, x)[0] + self.weight.sum() + len(self.sizes)


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), nn.BatchNorm1d(4))
    model[1].steps = model[0].steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model.eval(), torch.randn(3, 4), check_trace=False), tmp_path / "traced.pt")
        torch.jit.save(torch.jit.script(model), tmp_path / "scripted.pt")
    return tmp_path


@pytest.mark.parametrize("name", ["traced.pt", "scripted.pt"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_weights_are_those_of_torchs_own_loader(path, name):
    own, theirs = read_torchscript(path / name), torch.jit.load(path / name).state_dict()
    assert list(own) == list(theirs)
    for key in own:
        assert own[key].dtype == theirs[key].dtype
        assert torch.equal(own[key], theirs[key]), key


def test_what_is_no_module_or_holds_more_is_refused(tmp_path):
    torch.save({"x": torch.ones(2), "y": slice(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt cannot be read as TorchScript \(it holds \w+\.slice"):
        read_torchscript(tmp_path / "other.pt")
    torch.save({"x": torch.ones(2)}, tmp_path / "plain.pt")
    with pytest.raises(ValueError, match=r"plain\.pt cannot be read as TorchScript \(it holds a dict, no module\)"):
        read_torchscript(tmp_path / "plain.pt")
