"""Outputs of frozen modules, remembered in the first pass of a training step and returned in the second one."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

# LAVIS's and timm's towers are often called by their method forward_features.
_ENTRIES = ("forward", "forward_features")

_Version = tuple[int, int, torch.Size, tuple[int, ...]]
_Key = tuple[nn.Module, str]
_Holder = dict[str, Any]


class FrozenMemo:
    """Remembers the outputs of a model's frozen sub-modules in one pass and returns them in the next pass.

    A sub-module is frozen if it has parameters and none of them is trained. A pass under :meth:`recording` notes the
    outermost calls of frozen sub-modules. A pass under :meth:`replaying` answers the n-th call from the notes, without
    running the module, if nothing can have changed: the inputs are equal and carry no gradient, and neither inputs nor
    output nor parameters nor buffers have been written to. Otherwise the module runs. torch's random numbers go on as
    if the module had run. A module runs in both passes if it draws from Python's or NumPy's generators, or if a module
    inside it has forward hooks.

    The second pass is therefore bit-equal to one without this class, if a frozen module's only effect is its output.
    Other effects, such as writing into an argument or counting calls, happen once.

    A module whose input comes from trained ones (BLIP-2's language model) is not skipped, nor is a module whose output
    is no plain container of tensors. Modules inside them are skipped if the conditions hold for them.

    Args:
        model: Model, whose weights must be frozen before, because it is searched only once.
        device: Device of the model, whose random generator is watched.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.modules = [module for module in model.modules() if _is_frozen(module)]
        # Every step needs these tensors, so the module tree is walked only once.
        self.tensors = {module: [(m._parameters, m._buffers) for m in module.modules()] for module in self.modules}
        holders = [holder for pairs in self.tensors.values() for pair in pairs for holder in pair]
        self.holders = list({id(holder): holder for holder in holders}.values())
        self.entered: set[_Key] = set()  # modules that cannot be skipped; their inner modules are noted instead
        self.calls: dict[_Key, list[_NotedCall | None]] = defaultdict(list)
        self.position: dict[_Key, int] = defaultdict(int)
        self.versions: dict[int, _Version] = {}
        self.is_inside = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note the calls of frozen modules while the context lasts."""
        self.calls.clear()
        self.versions = {id(tensor): _version(tensor) for holder in self.holders for tensor in _present(holder)}
        with self._intercepted(self._record):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Answer calls from the notes while the context lasts, and forget the notes at its end."""
        self.position.clear()
        try:
            with self._intercepted(self._replay):
                yield
        finally:
            self.calls.clear()

    @contextmanager
    def _intercepted(self, answer: Callable[..., Any]) -> Iterator[None]:
        """Let ``answer(key, inputs, run)`` answer the calls of every frozen module while the context lasts."""
        replaced: list[tuple[nn.Module, str, Any]] = []
        try:
            for module in self.modules:
                for entry in _ENTRIES:
                    if hasattr(module, entry):
                        replaced.append((module, entry, module.__dict__.get(entry)))
                        module.__dict__[entry] = self._entry(answer, (module, entry), getattr(module, entry))
            yield
        finally:
            for module, entry, own in replaced:
                if own is None:
                    del module.__dict__[entry]
                else:
                    module.__dict__[entry] = own

    def _entry(self, answer: Callable[..., Any], key: _Key, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_inside or key in self.entered or _has_hooks_inside(key[0]):
                return original(*args, **kwargs)
            leaves, structure = tree_flatten((args, kwargs))
            if any(isinstance(leaf, Tensor) and (leaf.requires_grad or leaf.is_inference()) for leaf in leaves):
                return original(*args, **kwargs)
            return answer(key, _NotedValues(leaves, structure), lambda: self._run(original, args, kwargs))

        return call

    def _run(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.is_inside = True
        try:
            return original(*args, **kwargs)
        finally:
            self.is_inside = False

    def _record(self, key: _Key, inputs: _NotedValues, run: Callable[[], Any]) -> Any:
        others = _other_random_states()
        before = _random_state(self.device)
        was_clean = self._is_clean(key[0])
        output = run()
        after = _random_state(self.device)
        noted = _NotedValues(*tree_flatten(output))
        if was_clean and self._is_clean(key[0]) and noted.is_plain() and others == _other_random_states():
            weights = [_version(weight) for holder, _ in self.tensors[key[0]] for weight in _present(holder)]
            has_drawn = not all(map(torch.equal, before, after))
            self.calls[key].append(_NotedCall(inputs, noted, weights, after if has_drawn else None))
        else:
            self.calls[key].append(None)
            self.entered.add(key)
        return output

    def _replay(self, key: _Key, inputs: _NotedValues, run: Callable[[], Any]) -> Any:
        position = self.position[key]
        self.position[key] += 1
        call = self.calls[key][position] if position < len(self.calls[key]) else None
        if call is None or not call.holds_for(self.tensors[key[0]], inputs):
            return run()
        if call.random_state is not None:
            _set_random_state(call.random_state, self.device)
        return tree_unflatten(call.output.leaves, call.output.structure)

    def _is_clean(self, module: nn.Module) -> bool:
        """Return whether no tensor of the module has been written to since the recording began."""
        return all(
            self.versions.get(id(tensor)) == _version(tensor)
            for holders in self.tensors[module]
            for holder in holders
            for tensor in _present(holder)
        )


class _NotedValues:
    """Tensors and other values of a call's arguments or output, with the versions that they had when noted."""

    def __init__(self, leaves: list[Any], structure: Any) -> None:
        self.leaves = leaves
        self.structure = structure
        self.versions = self._versions()

    def _versions(self) -> list[_Version]:
        # Inference tensors count no versions. An output with such a tensor is not plain and never used again.
        return [_version(leaf) for leaf in self.leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]

    def is_unchanged(self) -> bool:
        return self.versions == self._versions()

    def is_plain(self) -> bool:
        return all(map(_is_plain, self.leaves))

    def equals(self, other: _NotedValues) -> bool:
        return bool(self.structure == other.structure) and all(map(_is_equal, self.leaves, other.leaves))


@dataclass(frozen=True)
class _NotedCall:
    """A call of a frozen module: its values, the versions of its weights, and the random state after it if it drew."""

    inputs: _NotedValues
    output: _NotedValues
    weight_versions: list[_Version]
    random_state: tuple[Tensor, ...] | None

    def holds_for(self, tensors: list[tuple[_Holder, _Holder]], inputs: _NotedValues) -> bool:
        return (
            self.weight_versions == [_version(weight) for holder, _ in tensors for weight in _present(holder)]
            # The second pass gets new copies of the buffers, which count their versions from 0.
            and all(buffer._version == 0 for _, holder in tensors for buffer in _present(holder))
            and self.inputs.is_unchanged()
            and self.output.is_unchanged()
            and self.inputs.equals(inputs)
        )


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (cpu,)


def _set_random_state(state: tuple[Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)


def _other_random_states() -> tuple[Any, ...]:
    numpy = np.random.get_state(legacy=False)
    return random.getstate(), numpy["state"]["key"].tobytes(), numpy["state"]["pos"], numpy["has_gauss"]


def _is_frozen(module: nn.Module) -> bool:
    trained = [weight.requires_grad for weight in module.parameters()]
    return bool(trained) and not any(trained) and not isinstance(module, torch.jit.ScriptModule)


def _has_hooks_inside(module: nn.Module) -> bool:
    return any(inner._forward_hooks or inner._forward_pre_hooks for inner in module.modules() if inner is not module)


def _present(holder: _Holder) -> Iterator[Tensor]:
    return (tensor for tensor in holder.values() if tensor is not None)


def _version(tensor: Tensor) -> _Version:
    return tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride()


def _is_plain(leaf: Any) -> bool:
    """Return whether a leaf of an output can be returned twice; one with a gradient belongs to the first pass."""
    if isinstance(leaf, Tensor):
        return not leaf.requires_grad and not leaf.is_inference()
    return leaf is None or isinstance(leaf, (bool, int, float, str))


def _is_equal(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and left.device == right.device and torch.equal(left, right)
    return type(left) is type(right) and isinstance(left, (bool, int, float, str)) and left == right
