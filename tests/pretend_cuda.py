"""A pretended GPU: ordinary CPU tensors whose storages are marked as the device's.

`with pretend_cuda() as log:` makes `device="cuda"`, `.to("cuda")` and `.cuda()` mark what they return. Marked tensors say that
they are on cuda:0. Whatever CUDA would refuse raises here, too: operators that are given marked and other tensors together
(0-dim host tensors may join arithmetic, host indices may index), `.numpy()`, pinning what is on the device, generators of the
other device. `torch.cuda` answers as with one GPU, as far as this project asks. Operators run on the CPU, those of this project
by their CPU path, or with `kernels=True` by their Triton kernels in Triton's interpreter. So results are the CPU's.

What it cannot show: numbers of other algorithms (cuDNN, TF32, atomics), races, and speed. It holds for the thread that enters
it (autograd runs there, too).

`log.syncs` counts what makes the host wait for the device, `log.copies` the bytes' ways, `log.launches` about what a GPU would
launch, each by what it is and by the line of the project that asked for it.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from masklake.model.kernels.operators import IMPLEMENTATIONS

CUDA = torch.device("cuda", 0)
T = torch.Tensor
ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("model", "pipeline", "jobs", "benchmarks")
NAMESPACE = "masklake"

# Operators whose results' sizes or values the host must read.
SYNC = frozenset(
    [
        "nonzero",
        "_local_scalar_dense",
        "masked_select",
        "_unique",
        "unique_dim",
        "_unique2",
        "unique_consecutive",
        "bincount",
        "nms",
        "equal",
        "is_nonzero",
    ]
)
# What may take tensors of both devices: copies. Indices have rules of their own.
MIXED = frozenset(["copy_", "_to_copy", "set_", "lift_fresh", "lift_fresh_copy", "detach", "alias"])
INDEXING = frozenset(["index", "index_put", "index_put_", "_index_put_impl_"])
# Operators, beside arithmetic, that take a number as a 0-dim host tensor.
TAKES_SCALARS = frozenset(["masked_fill", "masked_fill_", "fill", "fill_", "index_fill", "index_fill_", "clip_grad_norm_"])
# What launches nothing: storage without values, and views.
FREE = frozenset(
    ["empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "lift_fresh", "detach", "alias", "set_"]
)
VIEWS = frozenset(
    [
        "view",
        "_unsafe_view",
        "expand",
        "permute",
        "transpose",
        "t",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "chunk",
        "unsqueeze",
        "squeeze",
        "unbind",
        "as_strided",
        "_reshape_alias",
        "diagonal",
        "unfold",
        "movedim",
        "unflatten",
        "flatten",
        "reshape",
    ]
)
CONVERSIONS = (T.to, T.cpu, T.cuda)


class Log:
    """What happened on the pretended device. Keys of the counters: (what, "folder/file.py:line")."""

    def __init__(self) -> None:
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.copies: Counter[tuple[str, str]] = Counter()
        self.launches: Counter[tuple[str, str]] = Counter()
        self.kernels: Counter[str] = Counter()
        """Launches of Triton kernels in the interpreter, by name."""
        self.sync_debug_mode = 0
        self.adopts_outputs = False
        """Whether an `out=` on the host is taken for the device's: memory that C++ made, as DDP's buckets of gradients."""
        self._marks: dict[int, StorageWeakRef] = {}
        self._pinned: dict[int, StorageWeakRef] = {}

    def clear(self) -> None:
        """Begin to count anew; what is on the device stays there."""
        for counter in (self.syncs, self.copies, self.launches, self.kernels):
            counter.clear()

    def marked(self, x: Any) -> bool:
        """Whether this is a tensor of the device."""
        with torch._C.DisableTorchFunction():
            return isinstance(x, T) and x.layout == torch.strided and x.untyped_storage()._cdata in self._marks

    def mark(self, out: Any) -> Any:
        """Put all tensors in `out` on the device, as they are."""
        self._add(self._marks, out)
        return out

    def pin(self, x: torch.Tensor) -> torch.Tensor:
        """Make this host memory count as pinned."""
        self._add(self._pinned, x)
        return x

    def pinned(self, x: torch.Tensor) -> bool:
        """Whether this is pinned host memory."""
        with torch._C.DisableTorchFunction():
            return x.layout == torch.strided and x.untyped_storage()._cdata in self._pinned

    def sync(self, what: str) -> None:
        """The host waits for the device."""
        self.syncs[what, where()] += 1
        message = f"called a synchronizing CUDA operation: {what} at {where()}"
        if self.sync_debug_mode == 1:
            place, _, line = where().rpartition(":")
            warnings.warn_explicit(message, UserWarning, str(ROOT / place), int(line))
        if self.sync_debug_mode == 2:
            raise RuntimeError(message)

    def copy(self, what: str, size: int) -> None:
        """Bytes cross between host and device."""
        self.copies[what, where()] += size

    def report(self) -> str:
        """What was counted, for a person."""
        lines = [f"{sum(self.launches.values())} launches, {sum(self.syncs.values())} synchronisations"]
        for (what, at), count in sorted(self.syncs.items(), key=lambda item: item[0][1]):
            lines.append(f"{count:5d} x waits  {what:32s} {at}")
        for (what, at), size in sorted(self.copies.items(), key=lambda item: item[0][1]):
            lines.append(f"{size:9d} bytes {what:30s} {at}")
        return "\n".join(lines)

    @staticmethod
    def _add(refs: dict[int, StorageWeakRef], out: Any) -> None:
        with torch._C.DisableTorchFunction():
            for x in tree_leaves(out):
                if isinstance(x, T) and x.layout == torch.strided:
                    # The reference keeps the storage's address from being given to another one.
                    refs.setdefault(x.untyped_storage()._cdata, StorageWeakRef(x.untyped_storage()))


def tree_leaves(tree: Any) -> list[Any]:
    """What lies in tuples, lists and dictionaries. Each operator asks several times; torch's own takes a third of a test."""
    if isinstance(tree, tuple | list):
        return [leaf for part in tree for leaf in tree_leaves(part)]
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in tree_leaves(part)]
    return [tree]


def where() -> str:
    """The innermost line of the project that runs, of tests where none of it does."""
    frame = sys._getframe(1)
    while frame is not None:
        if path := _of_the_project(frame.f_code.co_filename):
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere:0"


@cache
def _of_the_project(filename: str) -> str:
    """The path from the root, or nothing for what is not the project's: asked for at every operator, hence kept."""
    path = Path(filename).resolve()  # `masklake/model` is a link
    inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in FOLDERS
    return str(path.relative_to(ROOT)) if inside else ""


class _Dispatch(TorchDispatchMode):
    """Watches operators: which devices they are given, and where their results are."""

    def __init__(self, log: Log, function: _Function, kernels: bool) -> None:
        super().__init__()
        self._log, self._function, self._kernels = log, function, kernels

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would load its compiler, for seconds, to leave this class alone

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self, torch._C.DisableTorchFunction():  # inference mode brings these whole
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        namespace, name = func._schema.name.split("::")
        if namespace == NAMESPACE and self._kernels:
            with self, self._function:  # its code sees the device and chooses its kernels
                return IMPLEMENTATIONS[func._schema.name](*args, **kwargs)  # the operator itself would come back to here
        with torch._C.DisableTorchFunction():  # a project's operator sees CPU tensors and takes its CPU path
            return self._run(func, name, args, kwargs)

    def _run(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        log = self._log
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, T)]
        on_device = any(log.marked(x) for x in tensors)
        if name in INDEXING:
            on_device = log.marked(args[0])
            self._check_indices(func, name, args)
        elif on_device and name not in MIXED:
            if self._log.adopts_outputs:
                log.mark(kwargs.get("out"))
            scalars = torch.Tag.pointwise in func.tags or name in TAKES_SCALARS
            if any(not log.marked(x) and (x.dim() or not scalars) for x in tensors):
                shapes = [f"{tuple(x.shape)} on {'cuda:0' if log.marked(x) else 'cpu'}" for x in tensors]
                raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {', '.join(shapes)}")
        if name == "copy_":
            on_device = log.marked(args[0])
            self._count_copy(args, kwargs)
        if on_device and (name in SYNC or (name == "repeat_interleave" and kwargs.get("output_size") is None)):
            log.sync(name)
        out = func(*args, **kwargs)
        if on_device:
            if name not in FREE and not func.is_view and name not in VIEWS:
                log.launches[name, where()] += 1
            log.mark(out)
        return out

    def _count_copy(self, args: Any, kwargs: Any) -> None:
        to, source = args[:2]
        if self._log.marked(to) != self._log.marked(source):
            self._log.copy("to the device" if self._log.marked(to) else "to the host", source.nbytes)
            waits = not (args[2:3] or (kwargs.get("non_blocking"),))[0]
            if waits or not self._log.pinned(to if self._log.marked(source) else source):
                self._log.sync("copy_ between host and device")

    def _check_indices(self, func: Any, name: str, args: Any) -> None:
        """What indexing may mix: host indices are copied, numbers are assigned; nothing else."""
        log, here = self._log, self._log.marked(args[0])
        indices = [x for x in args[1] if isinstance(x, T)]
        value = args[2] if name != "index" else None
        if here and isinstance(value, T) and torch._C._current_autograd_node() is not None:
            log.mark(value)  # a derivative's own zeros: it makes them where the storage really is
        if isinstance(value, T) and log.marked(value) != here and (value.dim() or not here):
            raise RuntimeError(f"{func}: expected self and values on one device, values are on {'cpu' if here else 'cuda:0'}")
        if not here and any(log.marked(x) for x in indices):
            raise RuntimeError(f"{func}: indices should be on the device of the indexed tensor (cpu), one is on cuda:0")
        if not here:
            return
        if any(not log.marked(x) for x in indices):
            log.copy("index to the device", sum(x.nbytes for x in indices if not log.marked(x)))
            log.sync("index from the host")
        boolean = [x.dtype in (torch.bool, torch.uint8) for x in indices]
        fills = isinstance(value, T) and value.numel() == 1 and not log.marked(value) and all(boolean)
        if any(boolean) and not fills:  # torch fills where a mask says so without counting it
            log.sync("boolean index")


class _Function(TorchFunctionMode):
    """Watches Python's calls: what asks for a device, and what asks a tensor where it is."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log
        self._answers: dict[Any, Callable[[], Any]] = {
            T.device.__get__: lambda: CUDA,
            T.is_cuda.__get__: lambda: True,
            T.is_cpu.__get__: lambda: False,
            T.get_device: lambda: CUDA.index,
            T.is_pinned: lambda: False,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        here = bool(args) and self._log.marked(args[0])
        if here and func in self._answers:
            return self._answers[func]()
        if here and (func in (T.numpy, T.__array__)) and not kwargs.get("force"):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory"
            )
        if func is T.pin_memory:
            return self._pin(args[0])
        if func is T.is_pinned:
            return self._log.pinned(args[0])
        if here and func is T.tolist:
            self._log.sync("tolist")
        wanted = self._wanted(func, args, kwargs)
        _check_generator(func, kwargs.get("generator"), here if wanted is None else wanted)
        if wanted is None:
            return func(*args, **kwargs)
        pin = kwargs.pop("pin_memory", False)
        args = tuple("cpu" if _is_device(x, func) else x for x in args)
        if _is_device(kwargs.get("device"), T.to):
            kwargs["device"] = "cpu"
        if func in CONVERSIONS:
            return self._convert(func, args, kwargs, here, wanted)
        out = func(*args, **kwargs)
        if not wanted:
            return self._log.pin(out) if pin else out
        if getattr(func, "__name__", "") in ("tensor", "as_tensor", "new_tensor", "asarray", "scalar_tensor"):
            self._log.copy("to the device", sum(x.nbytes for x in tree_leaves(out)))
            self._log.sync("values to the device")
        elif getattr(func, "__name__", "") not in FREE:
            self._log.launches[getattr(func, "__name__", "?"), where()] += 1
        return self._log.mark(out)

    def _pin(self, x: torch.Tensor) -> torch.Tensor:
        if self._log.marked(x):
            name = x.type().replace("torch.", "torch.cuda.")
            raise RuntimeError(f"cannot pin '{name}' only dense CPU tensors can be pinned")
        return self._log.pin(_copied(x))

    def _convert(self, func: Any, args: Any, kwargs: Any, here: bool, wanted: bool) -> Any:
        """`.to`, `.cpu`, `.cuda`: between the devices always another storage, with or without the mark."""
        x, log = args[0], self._log
        if wanted == here:
            out = func(*args, **kwargs) if func is T.to else x
            return log.mark(out) if wanted else out
        waits, pinned = not kwargs.get("non_blocking", False), not here and log.pinned(x)
        if not wanted and not waits:
            raise NotImplementedError("a copy to the host that nobody waits for: its values are not there yet on a GPU")
        log.copy("to the host" if here else "to the device, pinned" if pinned else "to the device", x.nbytes)
        if here or waits or not pinned:  # memory that is not pinned is copied to where it is, behind what runs
            log.sync("to the host" if here else "to the device")
        out = _copied(func(*args, **kwargs) if func is T.to else x)
        return log.mark(out) if wanted else out

    def _wanted(self, func: Any, args: Any, kwargs: Any) -> bool | None:
        """Whether the result is to be on the device; None where the call does not say."""
        if func is T.cpu:
            return False
        if func is T.cuda:
            return True
        if func is T.to:
            for x in (*args[1:], kwargs.get("device"), kwargs.get("other")):
                if isinstance(x, T):
                    return self._log.marked(x)
                if _is_device(x, func):
                    return _is_cuda(x)
            return None
        if _is_device(kwargs.get("device"), T.to):
            return _is_cuda(kwargs["device"])
        if kwargs.get("pin_memory") is True:
            return False
        return self._log.marked(args[0]) if func is T.new_tensor else None


def _copied(x: torch.Tensor) -> torch.Tensor:
    """A copy that no mode sees, in a storage of its own; differentiable where `x` is."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return x.clone()


def _is_device(x: Any, func: Any) -> bool:
    """Whether an argument names the CPU or the GPU; other devices ("meta") are left alone."""
    if isinstance(x, torch.device):
        return x.type in ("cpu", "cuda")
    if isinstance(x, str):
        return x.split(":")[0] in ("cpu", "cuda")
    return func is T.to and type(x) is int


def _is_cuda(device: Any) -> bool:
    return type(device) is int or torch.device(device).type == "cuda"


def _check_generator(func: Any, generator: torch.Generator | None, on_device: bool) -> None:
    if isinstance(generator, torch.Generator) and (generator.device.type == "cuda") != on_device:
        wanted = "cuda" if on_device else "cpu"
        raise RuntimeError(f"{func}: expected a '{wanted}' device type for generator but found '{generator.device.type}'")


class _Generator(torch.Generator):
    """`torch.Generator`, for either device."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu")
        made.where = CUDA if _is_cuda(device) else torch.device("cpu")
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where


class _Event:
    """Time on the host: operators have ended when they return."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._at = 0.0

    def record(self, *_: Any) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1000 * (end._at - self._at)

    def synchronize(self) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream(_Event):
    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, *_: Any) -> None:
        pass

    def wait_event(self, *_: Any) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event


@contextmanager
def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    yield


def _torch_cuda(log: Log, bf16: bool) -> dict[str, Any]:
    """What `torch.cuda` answers: one GPU of Hopper's kind without memory."""
    properties = SimpleNamespace(
        name="pretended GPU",
        major=9,
        minor=0,
        total_memory=80 << 30,
        multi_processor_count=132,
        L2_cache_size=50 << 20,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        shared_memory_per_block_optin=227 << 10,
        regs_per_multiprocessor=65536,
    )
    stream = _Stream()

    def sync_debug(mode: int | str) -> None:
        log.sync_debug_mode = mode if isinstance(mode, int) else {"default": 0, "warn": 1, "error": 2}[mode]

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda including_emulation=True: bf16,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: log.sync("synchronize"),
        "set_sync_debug_mode": sync_debug,
        "get_sync_debug_mode": lambda: log.sync_debug_mode,
        "Event": _Event,
        "Stream": lambda *_, **__: stream,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": _nothing,
        "device": _nothing,
        "device_of": _nothing,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (79 << 30, 80 << 30),
        "memory_stats": lambda device=None: {},
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
    }


def _loader(log: Log) -> Callable[..., Any]:
    """`torch.load`, whose map_location may be the device."""
    load = torch.load

    def loaded(file: Any, map_location: Any = None, **options: Any) -> Any:
        if not _is_device(map_location, load) or not _is_cuda(map_location):
            return load(file, map_location=map_location, **options)
        found = load(file, map_location="cpu", **options)
        return tree_map(lambda x: log.mark(x) if isinstance(x, T) else x, found)

    return loaded


def _grouper(log: Log) -> Callable[..., Any]:
    """What sorts an optimiser's tensors by their device, below Python: all are the device's, or none is."""
    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(tensors: Any, *options: Any) -> Any:
        there = {log.marked(x) for x in tree_leaves(tensors) if isinstance(x, T) and x.dim()}
        if len(there) > 1:
            raise NotImplementedError("tensors of both devices in one group")
        device = CUDA if True in there else torch.device("cpu")
        return {(device, dtype): value for (_, dtype), value in group(tensors, *options).items()}

    return grouped


def _profiler() -> Callable[..., Any]:
    """`torch.profiler.profile` of the host alone: there is no device whose times could be read."""
    profile = torch.profiler.profile

    def profiled(*, activities: Any = None, **options: Any) -> Any:
        return profile(activities=[torch.profiler.ProfilerActivity.CPU], **options)

    return profiled


def _interpreted(log: Log, launch: Callable[..., Any]) -> Callable[..., Any]:
    """A launch in Triton's interpreter: it refuses host memory, and sees the tensors as what they are."""

    def launched(grid: Any, *arguments: Any, **constants: Any) -> Any:
        if any(isinstance(x, T) and not log.marked(x) for x in arguments):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        log.kernels[grid.fn.__name__] += 1
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return launch(grid, *arguments, **constants)

    return launched


def _forget_what_is_kept_by_device() -> None:
    """Constants that the project made on a device are not of the next one."""
    for module, name in (
        ("masklake.model.devices", "_constant"),
        ("masklake.model.kernels.roi_align_triton", "_device_tables"),
    ):
        if module in sys.modules:
            getattr(sys.modules[module], name).cache_clear()


@contextmanager
def pretend_cuda(kernels: bool = False, bf16: bool = True) -> Iterator[Log]:
    """Pretend one GPU for this thread, see the head of this file.

    kernels: run the project's Triton kernels, which must have been defined for the interpreter (TRITON_INTERPRET=1 while they
    were imported). bf16: what the device says of itself.
    """
    log = Log()
    function = _Function(log)
    with ExitStack() as stack:
        _forget_what_is_kept_by_device()
        stack.callback(_forget_what_is_kept_by_device)
        for name, answer in _torch_cuda(log, bf16).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(torch, "load", _loader(log)))
        for name, answer in {"current_stream": lambda device=None: _Stream(), "synchronize": torch.cuda.synchronize}.items():
            stack.enter_context(mock.patch.object(torch.accelerator, name, answer))
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouper(log)))
        stack.enter_context(mock.patch.object(torch.profiler, "profile", _profiler()))
        stack.enter_context(mock.patch("masklake.model.devices.c_compiler", return_value="cc"))  # nothing is compiled here
        if kernels:
            from triton.runtime.interpreter import GridExecutor

            launch = _interpreted(log, GridExecutor.__call__)
            stack.enter_context(mock.patch.object(GridExecutor, "__call__", launch))
        stack.enter_context(_Dispatch(log, function, kernels))
        stack.enter_context(function)
        yield log
