"""A rehearsal of a GPU without one: tensors that torch takes for CUDA's, whose numbers are on the CPU.

Torch's fake tensors on "cuda" give the device of each operation's result, and raise where devices differ. Then the
numbers are computed on the CPU, so that rankings, losses and whole training steps have values. Autocast acts as on a
GPU, because to torch the tensors are CUDA's. Torch's autograd engine needs the driver, so a loop in this file calls the
nodes of the graph in its place. Every wait for the GPU is noted with the function of the package that asked for it.

A rehearsal shows where a tensor lies, which type it has and who waits for it. It shows no speed, no memory, no kernel
of CUDA and none of its rounding.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lavis_cir_plugin.core.model_parts import tensor_places

PACKAGE = Path(__file__).parents[1] / "lavis_cir_plugin"
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
_RESULTS: dict[Any, frozenset[torch.device] | None] = {}


class CudaTensor(Tensor):
    """A tensor on "cuda" for torch, whose ``numbers`` are a tensor on the CPU."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, numbers: Tensor) -> CudaTensor:
        on_cuda = {"dispatch_device": True, "device_for_backend_keys": CUDA}
        made: CudaTensor = Tensor._make_subclass(cls, numbers, False, **on_cuda)
        made.numbers = numbers
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.numbers.__reduce_ex__(protocol)  # a checkpoint is read to the CPU first

    def record_stream(self, stream: Any) -> None:
        pass

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return CUDA
        raise RuntimeError(f"{func} meets a rehearsed tensor outside of the rehearsal.")


class Rehearsal(TorchDispatchMode):
    """Answers every operation while it lasts.

    Attributes:
        waits: How often each function of the package, ``methods/x/y.py:name``, waited for the GPU: it read a value,
            copied a tensor from or to the CPU, or asked for a result whose shape depends on values. What waits outside
            of the package stands under ``y.py:name``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return CUDA
        if func is torch.ops.aten._fused_sdp_choice.default:
            return 0  # the kernel that is written out in plain operations
        if func is torch.ops.aten._pin_memory.default:
            return args[0]
        given: list[Tensor] = []
        _mapped(given.append, (args, kwargs))
        device = kwargs.get("device")
        is_on_cuda = any(isinstance(tensor, CudaTensor) for tensor in given)
        if not is_on_cuda and (device is None or device.type == "cpu"):
            return func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} changes the shape of a tensor in place.")
        # The devices of results follow from those of the arguments, whatever the sizes; numbers may lie elsewhere.
        kind = func, tuple((tensor.device, tensor.dtype, tensor.dim() == 0) for tensor in given), device
        if kind not in _RESULTS:
            _RESULTS[kind] = self._devices(func, args, kwargs, given)
        devices = _RESULTS[kind]
        if self._is_wait(func, args, kwargs, given, devices):
            self.waits[_place()] += 1
        if device is not None:
            kwargs = {**kwargs, "device": CPU}
        found = _OF_CUDA_ALONE.get(func, func)(*_numbers(args), **_numbers(kwargs))
        owners = {id(_numbers(tensor)): tensor for tensor in given}

        def on_device(tensor: Tensor) -> Tensor:
            if id(tensor) in owners:  # the operation wrote into it
                return owners[id(tensor)]
            return CudaTensor(tensor) if CUDA in (devices or {CUDA}) else tensor

        return _mapped(on_device, found)

    def _devices(self, func: Any, args: Any, kwargs: Any, given: Sequence[Tensor]) -> frozenset[torch.device] | None:
        """Return the device of an operation's results as fake tensors have it, and ``None`` if they need the numbers.

        The result is empty if no tensor results.
        """
        if func.namespace == "c10d":  # an exchange between processes, which fake tensors do not know
            return frozenset({CUDA})
        with self.fake:
            fakes = {
                id(tensor): torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
                for tensor in given
            }
            own = _mapped(lambda tensor: fakes[id(tensor)], (args, kwargs))
            try:
                found = func(*own[0], **own[1])
            except (DataDependentOutputException, DynamicOutputShapeException):
                return None
        devices = set()
        _mapped(lambda tensor: devices.add(tensor.device), found)
        assert len(devices) < 2, f"{func} has results on two devices"
        return frozenset(devices)

    def waiting(self) -> set[str]:
        """Return the functions of the package that waited."""
        return {place for place in self.waits if "/" in place}

    @staticmethod
    def _is_wait(func: Any, args: Any, kwargs: Any, given: Sequence[Tensor], devices: Any) -> bool:
        if devices is None:
            return True
        is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if is_copy and any(value is True for value in (kwargs.get("non_blocking"), *args[2:3])):
            return False
        # An operation takes a number from the CPU as an argument, and a tensor by a copy.
        sides = {tensor.device for tensor in given if tensor.dim() or is_copy} | devices
        return {device.type for device in sides} == {"cpu", "cuda"}


def _softmax_to_float(func: Any) -> Any:
    return lambda values, dim, to_float: func(values.float() if to_float else values, dim, False)


def _softmax_from_float(func: Any) -> Any:
    return lambda grad, output, dim, dtype: func(grad, output, dim, output.dtype).to(dtype)


# Autocast's softmax reads half precision and writes float32 in one kernel, which the CPU lacks.
_OF_CUDA_ALONE = {
    torch.ops.aten._softmax.default: _softmax_to_float(torch.ops.aten._softmax),
    torch.ops.aten._log_softmax.default: _softmax_to_float(torch.ops.aten._log_softmax),
    torch.ops.aten._softmax_backward_data.default: _softmax_from_float(torch.ops.aten._softmax_backward_data),
    torch.ops.aten._log_softmax_backward_data.default: _softmax_from_float(torch.ops.aten._log_softmax_backward_data),
}


def _mapped(change: Callable[[Tensor], Any], values: Any) -> Any:
    """Return the arguments or results of an operation with each tensor changed."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, (list, tuple)):
        return type(values)(_mapped(change, value) for value in values)
    return {name: _mapped(change, value) for name, value in values.items()} if isinstance(values, dict) else values


def _numbers(values: Any) -> Any:
    return _mapped(lambda tensor: tensor.numbers if isinstance(tensor, CudaTensor) else tensor, values)


def _place() -> str:
    """Return the innermost running function of the package, or else of another file than torch's and this one."""
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        frames.append((Path(frame.f_code.co_filename), frame.f_code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    for path, name in frames:
        if PACKAGE in path.parents:
            return f"{path.relative_to(PACKAGE).as_posix()}:{name}"
    inside = {Path(torch.__file__).parent, Path(__file__)}
    return next(f"{path.name}:{name}" for path, name in frames if not inside & {path, *path.parents})


class _Stream:
    """A queue of a GPU, in which nothing ever waits."""

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass

    def is_capturing(self) -> bool:
        return False


class _Generator(torch.Generator):
    """A generator of a device; the numbers of the rehearsal are drawn on the CPU."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls)
        made.claimed = torch.device(device)
        return made


class _GeneratorsFit(TorchFunctionMode):
    """Refuses a generator of another device than that of the tensor it draws."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if isinstance(generator, _Generator):
            drawn = args[0].device if isinstance(args[0], Tensor) else torch.device(kwargs.get("device") or CPU)
            if generator.claimed.type != drawn.type:
                raise RuntimeError(f"a generator on the device {generator.claimed} draws a tensor on {drawn}.")
        return func(*args, **kwargs)


def to_cuda(module: nn.Module) -> nn.Module:
    """Move a module's parameters and buffers, in place; what several modules share stays shared."""
    moved: dict[int, Any] = {}
    for _, holder, key in list(tensor_places(module)):
        tensor = holder[key]
        if tensor is None or isinstance(tensor, CudaTensor):
            continue
        if id(tensor) not in moved:
            copy = tensor.detach().to(CUDA)
            is_weight = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = tensor, nn.Parameter(copy, tensor.requires_grad) if is_weight else copy
        holder[key] = moved[id(tensor)][1]
    return module


def _move(stock: Any) -> Any:
    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        return to_cuda(module) if device is not None and device.type == "cuda" else stock(module, *args, **kwargs)

    return to


@contextmanager
def rehearsal() -> Iterator[Rehearsal]:
    """Let "cuda" be a rehearsed GPU while the context lasts; a test is skipped if torch is too old for it."""
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip(f"torch {torch.__version__} asks a driver for a stream, which a rehearsed GPU lacks")
    torch._C._ensureCUDADeviceGuardSet()  # without it torch asks the driver for a stream; a real GPU keeps its own
    mode = Rehearsal()
    with pytest.MonkeyPatch.context() as patch, torch.backends.cudnn.flags(enabled=False):
        answers = {
            "is_available": lambda: True,
            "_lazy_init": lambda: None,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_name": lambda *_: "rehearsed GPU",
            "get_rng_state": lambda *_: torch.get_rng_state(),
            "set_rng_state": lambda state, *_: torch.set_rng_state(state),
            "synchronize": lambda *_: None,
            "memory_allocated": lambda *_: 0,
            "max_memory_allocated": lambda *_: 0,
            "reset_peak_memory_stats": lambda *_: None,
            "Stream": _Stream,
            "current_stream": _Stream,
            "stream": lambda stream: nullcontext(),
        }
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, answer)
        patch.setattr(torch.accelerator, "current_stream", _Stream)
        join = dist.init_process_group
        patch.setattr(dist, "init_process_group", lambda backend, **options: join("gloo", **options))
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(nn.Module, "to", _move(nn.Module.to))
        patch.setattr(nn.Module, "cuda", lambda module, device=None: to_cuda(module))
        patch.setattr(torch.autograd, "backward", _backward)
        patch.setattr(torch.autograd, "grad", _grad)
        was_lifting = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") asks for a copy then
        try:
            with _GeneratorsFit(), mode:
                yield mode
        finally:
            torch._C._set_only_lift_cpu_tensors(was_lifting)


def on_cuda(values: Any) -> Any:
    """Return the values with every tensor on "cuda"."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(CUDA), values)


def off_cuda(values: Any) -> Any:
    """Return the values with the numbers of every tensor, which must be on "cuda"."""

    def numbers(tensor: Tensor) -> Tensor:
        assert isinstance(tensor, CudaTensor), f"a tensor of shape {tuple(tensor.shape)} is on {tensor.device}"
        return tensor.numbers

    return tree_map_only(Tensor, numbers, values)


def _backward(tensors: Any, grad_tensors: Any = None, *_: Any, **__: Any) -> None:
    """Do what ``torch.autograd.backward`` does to leaves: add each one's gradient to its ``.grad``."""
    root = tensors[0] if isinstance(tensors, (tuple, list)) else tensors
    for node, (gradient, *_rest) in _gradients(root, grad_tensors).items():
        leaf = getattr(node, "variable", None)
        if leaf is not None and gradient is not None:
            with torch.no_grad():
                leaf.grad = gradient.detach() if leaf.grad is None else leaf.grad + gradient


def _grad(
    outputs: Any,
    inputs: Sequence[Tensor],
    grad_outputs: Any = None,
    allow_unused: bool = False,
    materialize_grads: bool = False,
    **_: Any,
) -> tuple[Any, ...]:
    """Do what ``torch.autograd.grad`` does for one output."""
    root = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
    reached = _gradients(root, grad_outputs)
    edges = [torch.autograd.graph.get_gradient_edge(tensor) for tensor in inputs]
    found = [reached[edge.node][edge.output_nr] if edge.node in reached else None for edge in edges]
    assert allow_unused or all(gradient is not None for gradient in found)
    if materialize_grads:
        found = [torch.zeros_like(own) if gradient is None else gradient for own, gradient in zip(inputs, found)]
    return tuple(found)


def _gradients(root: Tensor, seed: Tensor | None) -> dict[Any, list[Any]]:
    """Return the gradients that arrive at each node of the graph below ``root``, one per output of its operation."""
    arrivals: dict[Any, int] = defaultdict(int)
    seen, stack = {root.grad_fn}, [root.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:  # type: ignore[union-attr]
            if node is not None:
                arrivals[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    found: dict[Any, list[Any]] = {node: [None] * len(node._input_metadata) for node in seen}  # type: ignore[union-attr]
    found[root.grad_fn][root.output_nr] = torch.ones_like(root) if seed is None else seed
    ready = [root.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            if hasattr(node, "variable"):
                continue
            is_reached = any(gradient is not None for gradient in found[node])
            results = (node if callable(node) else node.apply)(*found[node]) if is_reached else None  # type: ignore[union-attr]
            results = results if isinstance(results, tuple) else (results,) * len(node.next_functions)  # type: ignore[union-attr]
            for (below, place), result in zip(node.next_functions, results):  # type: ignore[union-attr]
                if below is None:
                    continue
                if result is not None:
                    # The engine sums over dimensions that were expanded, and casts.
                    wanted = below._input_metadata[place]
                    result = result.sum_to_size(wanted.shape).to(wanted.dtype)
                    so_far = found[below][place]
                    found[below][place] = result if so_far is None else so_far + result
                arrivals[below] -= 1
                if arrivals[below] == 0:
                    ready.append(below)
    return found
