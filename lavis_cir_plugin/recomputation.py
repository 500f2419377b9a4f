"""What is computed twice in a training step: frozen sub-modules need not be, checkpointed activations have to be."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

# LAVIS's and timm's towers are often entered by the second.
_ENTRIES = ("forward", "forward_features")

# Of LAVIS's EVA tower, of transformers, and of timm and open_clip.
_RECOMPUTING_FLAGS = ("use_checkpoint", "gradient_checkpointing", "grad_checkpointing")

_Version = tuple[int, int]


class FrozenMemo:
    """Remembers what frozen sub-modules of a model returned in one pass, and returns it in the next one.

    A sub-module is frozen if it has parameters and none is trained. In a pass under :meth:`recording` its outermost
    calls are noted; under :meth:`replaying` the n-th call is answered from the notes, without running the module, if
    nothing can have changed: the inputs are equal, carry no gradient, and neither they, the output, the parameters
    nor the buffers have been written to. Otherwise the module runs. torch's random numbers go on as if it had run.

    So the result of the second pass is bit for bit what it would be without this class. A module that is fed by
    trained ones (BLIP-2's language model) is not skipped, but its inner modules that are not fed by them are.

    Args:
        model: Searched once, so freeze before.
        device: Of the model, whose random generator is watched.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.modules = [module for module in model.modules() if _is_frozen(module)]
        self.calls: dict[tuple[nn.Module, str], list[_Call | None]] = defaultdict(list)
        self.position: dict[tuple[nn.Module, str], int] = defaultdict(int)
        self.versions: dict[int, _Version] = {}
        self.is_inside = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note the calls of frozen modules while the context lasts."""
        self.calls.clear()
        self.versions = {id(tensor): _version(tensor) for tensor in _tensors(self.model)} if self.modules else {}
        with self._intercepted(self._record):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Answer calls from the notes where nothing has changed, and forget them at the end."""
        self.position.clear()
        try:
            with self._intercepted(self._replay):
                yield
        finally:
            self.calls.clear()

    @contextmanager
    def _intercepted(self, answer: Callable[..., Any]) -> Iterator[None]:
        """Put ``answer(module, entry, original, args, kwargs)`` before the entries of every frozen module."""
        replaced: list[tuple[nn.Module, str, Any]] = []
        try:
            for module in self.modules:
                for entry in _ENTRIES:
                    if hasattr(module, entry):
                        replaced.append((module, entry, module.__dict__.get(entry)))
                        module.__dict__[entry] = self._entry(answer, module, entry, getattr(module, entry))
            yield
        finally:
            for module, entry, own in replaced:
                if own is None:
                    del module.__dict__[entry]
                else:
                    module.__dict__[entry] = own

    def _entry(self, answer: Callable[..., Any], module: nn.Module, entry: str, original: Callable[..., Any]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_inside:
                return original(*args, **kwargs)
            leaves, structure = tree_flatten((args, kwargs))
            if any(isinstance(leaf, Tensor) and (leaf.requires_grad or leaf.is_inference()) for leaf in leaves):
                return original(*args, **kwargs)
            return answer((module, entry), _Inputs(leaves, structure), lambda: self._run(original, args, kwargs))

        return call

    def _run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.is_inside = True
        try:
            return original(*args, **kwargs)
        finally:
            self.is_inside = False

    def _record(self, key: tuple[nn.Module, str], inputs: _Inputs, run: Callable[[], Any]) -> Any:
        before = _random_state(self.device)
        versions = [_version(leaf) for leaf in inputs.leaves if isinstance(leaf, Tensor)]
        was_clean = self._is_clean(key[0])
        output = run()
        after = _random_state(self.device)
        leaves, _ = tree_flatten(output)
        is_sound = was_clean and self._is_clean(key[0]) and all(_is_plain(leaf) for leaf in leaves)
        call = None
        if is_sound:
            has_drawn = not all(map(torch.equal, before, after))
            call = _Call(
                inputs,
                versions,
                output,
                [_version(leaf) for leaf in leaves if isinstance(leaf, Tensor)],
                [_version(weight) for weight in key[0].parameters()],
                after if has_drawn else None,
            )
        self.calls[key].append(call)
        return output

    def _replay(self, key: tuple[nn.Module, str], inputs: _Inputs, run: Callable[[], Any]) -> Any:
        position = self.position[key]
        self.position[key] += 1
        call = self.calls[key][position] if position < len(self.calls[key]) else None
        if call is None or not call.holds_for(key[0], inputs):
            return run()
        if call.random_state is not None:
            _set_random_state(call.random_state, self.device)
        return call.output

    def _is_clean(self, module: nn.Module) -> bool:
        """Whether nothing of the module has been written to since the recording began."""
        return all(self.versions.get(id(tensor)) == _version(tensor) for tensor in _tensors(module))


def recomputing_modules(model: nn.Module) -> Iterator[str]:
    """Yield the name prefixes of modules with activation checkpointing, by the marks that LAVIS's models leave."""
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        by_flag = any(getattr(module, flag, False) is True for flag in _RECOMPUTING_FLAGS)
        by_config = getattr(config, "gradient_checkpointing", False) is True
        by_wrapper = isinstance(module.forward, functools.partial) and "checkpoint" in module.forward.func.__name__
        if by_flag or by_config or by_wrapper:
            yield f"{name}." if name else ""


@dataclass(frozen=True)
class _Inputs:
    leaves: list[Any]
    structure: Any

    def equal(self, other: _Inputs) -> bool:
        return self.structure == other.structure and all(map(_is_equal, self.leaves, other.leaves))


@dataclass(frozen=True)
class _Call:
    inputs: _Inputs
    input_versions: list[_Version]
    output: Any
    output_versions: list[_Version]
    weight_versions: list[_Version]
    random_state: tuple[Tensor, ...] | None

    def holds_for(self, module: nn.Module, inputs: _Inputs) -> bool:
        return (
            self.weight_versions == [_version(weight) for weight in module.parameters()]
            # The second pass sees fresh copies of the buffers, which count their versions from 0.
            and all(buffer._version == 0 for buffer in module.buffers())
            and self.input_versions == [_version(leaf) for leaf in self.inputs.leaves if isinstance(leaf, Tensor)]
            and self.output_versions
            == [_version(leaf) for leaf in tree_flatten(self.output)[0] if isinstance(leaf, Tensor)]
            and self.inputs.equal(inputs)
        )


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (cpu,)


def _set_random_state(state: tuple[Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


def _is_frozen(module: nn.Module) -> bool:
    trained = [weight.requires_grad for weight in module.parameters()]
    return bool(trained) and not any(trained) and not isinstance(module, torch.jit.ScriptModule)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _version(tensor: Tensor) -> _Version:
    return tensor.data_ptr(), tensor._version


def _is_plain(leaf: Any) -> bool:
    """Whether a leaf of an output can be handed out twice; one with a gradient belongs to the first pass's graph."""
    if isinstance(leaf, Tensor):
        return not leaf.requires_grad and not leaf.is_inference()
    return leaf is None or isinstance(leaf, (bool, int, float, str))


def _is_equal(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and left.device == right.device and torch.equal(left, right)
    return type(left) is type(right) and isinstance(left, (bool, int, float, str)) and left == right
