"""A GPU that is not there: fake CUDA tensors on a CPU build of torch, and a ledger of what they would have cost.

CPU tensors stay real and are computed; CUDA tensors have shape, type and device, and no numbers. What is read back from
the device is made up (`Ledger.answers`). So the suite's own code runs unchanged, every mismatch of device, type or
shape stops it, and the ledger knows each kernel that would be launched and each place where the host would wait.

It cannot show numbers, time, memory, which kernel a library takes, alignment, graphs, or races between streams.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILER = os.environ.get("CXX", "g++")


def library() -> Path:
    """Return hooks.cpp as a library, compiled now (seconds) or in an earlier run with the same torch."""
    source, torch_folder = HERE / "hooks.cpp", _torch_folder()
    version = (torch_folder / "version.py").read_bytes()
    digest = hashlib.sha256(source.read_bytes() + version + str(torch_folder).encode()).hexdigest()[:16]
    built = ROOT / ".pytest_cache" / "cuda_rehearsal" / f"hooks-{digest}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:  # another process may be doing the same
            _compile(source, torch_folder, Path(folder) / built.name)
            (Path(folder) / built.name).replace(built)
    return built


def _torch_folder() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _compile(source: Path, torch_folder: Path, target: Path) -> None:
    include, lib = torch_folder / "include", torch_folder / "lib"
    flags = f"-shared -fPIC -std=c++20 -I{include} -I{include}/torch/csrc/api/include -L{lib} -Wl,-rpath,{lib}"
    command = [COMPILER, *flags.split(), str(source), "-o", str(target), "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)


def load() -> None:
    """Make this process one that can trace fake CUDA tensors. Torch must not have been imported yet.

    Raises:
        RuntimeError: there is no compiler, or torch is imported already.
    """
    if shutil.which(COMPILER) is None:
        raise RuntimeError(f"the rehearsal needs a C++ compiler, and {COMPILER} is not here")
    if "torch" in sys.modules:
        raise RuntimeError("the hooks must be there before torch is")
    ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)


load()

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

# Operators that launch nothing beside views: they allocate, or look at what the host knows.
FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_", "_unsafe_view"),
    *("_reshape_alias", "lift_fresh", "is_same_size", "_has_same_storage_numel", "device"),
    *("sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "is_pinned", "record_stream"),
}
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution"}
# Operators whose result has as many rows as the device finds, which the host waits to know.
COUNTED = {"masked_select", "_unique2", "unique_dim", "unique_consecutive"}
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # of the CUDA 13 wheels
ALIGNED = 16  # to which the memory-efficient kernel pads the last dimension of a mask


class NoDevice(FakeTensorMode):
    """A mode that starts no device, whatever ``torch.cuda.is_available`` is made to say."""

    avoid_device_init = True


class Ledger(TorchDispatchMode):
    """Runs CPU operators for real and CUDA operators on fakes; counts kernels, waits and products.

    Attributes:
        phase: what ``kernels`` are booked under now.
        kernels: (phase, operator) to how many operators that launch at least one kernel.
        waits: (what, where) to how often the host would have waited for the device.
        products: (phase, operator, type) of matrix products.
        answers: what is read from the device, by kind of type.
        kept: how many rows boolean indexing finds; tests set what is true of their data.
    """

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.phase = ""
        self.kernels: Counter[tuple[str, str]] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.products: Counter[tuple[str, str, str]] = Counter()
        self.answers: dict[str, Any] = {"bool": True, "int": 500, "float": 1.0}
        self.kept: Callable[[torch.Tensor], int] = lambda mask: mask.numel()

    def snapshot(self) -> tuple[Counter, Counter]:
        """Return what is booked so far: kernels and waits."""
        return Counter(self.kernels), Counter(self.waits)

    def wait(self, what: str) -> None:
        """Note that the host waits for the device here."""
        self.waits[what, caller()] += 1

    def __torch_dispatch__(self, func: Any, classes: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operator."""
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
        if not any(device.type == "cuda" for device in (*devices, *(tensor.device for tensor in tensors))):
            return self._on_cpu(func, args, kwargs, tensors)
        if func.namespace == "aten" and func._can_decompose():  # those of inference mode come undivided
            with self:
                return func.decompose(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in SPECIAL and (answer := SPECIAL[name](self, args, kwargs)) is not None:
            return answer
        if name in COUNTED:
            self.wait(name)
        args = self._without_masks(name, args)
        if not func.is_view and name not in FREE:
            self.kernels[self.phase, name] += 1
        if name in PRODUCTS:
            if len(types := {name_of(tensor.dtype) for tensor in tensors}) > 1:  # fake tensors do not mind
                raise RuntimeError(f"{name} of {' and '.join(sorted(types))}")
            self.products[self.phase, name, name_of(tensors[-1].dtype)] += 1
        args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
        return func(*args, **kwargs)

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.gpu.mode.from_tensor(tensor)

    def _on_cpu(self, func: Any, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> Any:
        if any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        pinned = kwargs.pop("pin_memory", None)
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        if pinned:
            self.gpu.pin(result)
        return result

    # Operators that read the device, or move between it and the host; None: go on as with any other operator.

    def _item(self, args: tuple, kwargs: dict) -> Any:
        self.wait("item")
        return self._answer(args[0].dtype)

    def _to_copy(self, args: tuple, kwargs: dict) -> torch.Tensor | None:
        source, device = args[0], kwargs.get("device")
        target = source.device if device is None else torch.device(device)
        waits_not = bool(kwargs.get("non_blocking"))
        if target.type == source.device.type:
            return None
        if target.type == "cpu":
            if not waits_not:
                self.wait("to the CPU")
            return self._made_up(source.shape, kwargs.get("dtype") or source.dtype)
        self._to_device(source, waits_not)
        return None

    def _copy(self, args: tuple, kwargs: dict) -> torch.Tensor | None:
        target, source = args[:2]
        waits_not = bool(kwargs.get("non_blocking") or args[2:3] == (True,))
        if target.device.type == source.device.type:
            return None
        if target.device.type == "cpu":
            if not waits_not:
                self.wait("to the CPU")
            with unset_fake_temporarily():
                return target.copy_(self._made_up(source.shape, source.dtype))
        self._to_device(source, waits_not)
        return None

    def _to_device(self, source: torch.Tensor, waits_not: bool) -> None:
        if not (waits_not and self.gpu.is_pinned(source)):  # a copy of pageable memory is staged, which waits
            self.wait("to the GPU")

    def _nonzero(self, args: tuple, kwargs: dict) -> torch.Tensor:
        self.wait("nonzero")
        self.kernels[self.phase, "nonzero"] += 1
        (mask,) = args
        return mask.new_empty((self.kept(mask), mask.dim()), dtype=torch.long)

    def _without_masks(self, name: str, args: tuple) -> tuple:
        """Replace boolean indexes by as many whole ones: a fake tensor does not know how many rows they keep."""
        if name not in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"):
            return args
        places: list[Any] = []
        for index in args[1]:
            if isinstance(index, torch.Tensor) and index.device.type == "cpu":
                self.wait("an index to the GPU")
            if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
                self.wait("boolean index")
                self.kernels[self.phase, "nonzero"] += 1
                count = self.kept(index)
                places += [index.new_empty(count, dtype=torch.long, device=args[0].device) for _ in index.shape]
            else:
                places.append(index)
        return (args[0], places, *args[2:])

    def _answer(self, dtype: torch.dtype) -> Any:
        if dtype == torch.bool:
            return self.answers["bool"]
        return self.answers["float" if dtype.is_floating_point else "int"]

    def _made_up(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        with unset_fake_temporarily():
            return torch.full(shape, self._answer(dtype), dtype=dtype)


PLAIN_ATTENTION = torch.nn.functional.scaled_dot_product_attention
SPECIAL: dict[str, Callable[[Ledger, tuple, dict], Any]] = {
    "_local_scalar_dense": Ledger._item,
    "_to_copy": Ledger._to_copy,
    "copy_": Ledger._copy,
    "nonzero": Ledger._nonzero,
}


def name_of(dtype: torch.dtype) -> str:
    """Return bfloat16 for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def caller() -> str:
    """Return which line of the suite is running."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(HERE) and ".venv" not in path.parts:
            return f"{path.stem}.{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class FakeStream:
    """A stream or an event: order costs nothing here, waiting for it is booked."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cuda", 0)

    def wait_stream(self, stream: Any) -> None:
        """Let this stream come after another."""

    def wait_event(self, event: Any) -> None:
        """Let this stream come after an event."""

    def wait(self, stream: Any = None) -> None:
        """Let a stream come after this event."""

    def record(self, stream: Any = None) -> None:
        """Mark a place in a stream."""

    def record_event(self, event: Any = None) -> FakeStream:
        """Mark a place in this stream."""
        return event or FakeStream()

    def query(self) -> bool:
        """Say that all is done."""
        return True

    def synchronize(self) -> None:
        """Wait."""
        FakeGpu.now.ledger.wait("synchronize")

    def elapsed_time(self, event: Any) -> float:
        """Return milliseconds, which are unknown."""
        return 1.0


class FakeGpu:
    """While entered, torch sees one GPU of a compute capability, whose tensors are fake; ``ledger`` keeps the books.

    Args:
        capability: (major, minor); from (8, 0) on it multiplies in bf16.
    """

    now: FakeGpu  # the one that is entered

    def __init__(self, capability: tuple[int, int] = (8, 0)) -> None:
        self.capability = capability
        self.mode = NoDevice(allow_non_fake_inputs=True)
        self.ledger = Ledger(self)
        self._pinned: dict[int, torch.Tensor] = {}  # kept, so that no other tensor gets the same memory
        self._held = contextlib.ExitStack()

    def __enter__(self) -> FakeGpu:
        FakeGpu.now = self
        for owner, changes in self._replacements():
            for name, value in changes.items():
                self.replace(owner, name, value)
        return self

    def __exit__(self, *error: Any) -> None:
        self._held.close()

    @contextlib.contextmanager
    def rehearsed(self) -> Iterator[Ledger]:
        """While entered, what runs is booked."""
        with torch.autograd.set_multithreading_enabled(False), self.mode, self.ledger:  # backward in this thread
            yield self.ledger

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note that a CPU tensor's memory is page-locked."""
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether it is; of an empty tensor nothing is copied."""
        return not tensor.numel() or tensor.untyped_storage().data_ptr() in self._pinned

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Attend as torch does on a GPU whose cuDNN is not asked: flash, and memory-efficient where it cannot.

        A CPU build would choose the products one by one, for which a GPU has a kernel.
        """
        if query.device.type != "cuda":
            return PLAIN_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        assert not enable_gqa, "the rehearsal's attention has as many heads of keys as of queries"
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(dtype)
        assert query.dtype == key.dtype == value.dtype, (query.dtype, key.dtype, value.dtype)
        if attn_mask is None and query.dtype != torch.float32 and self.capability >= (8, 0):
            call = torch.ops.aten._scaled_dot_product_flash_attention
            return call(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        if attn_mask is not None:
            attn_mask = self._bias(attn_mask, query, key)
        call = torch.ops.aten._scaled_dot_product_efficient_attention
        gradient = torch.is_grad_enabled() and query.requires_grad
        return call(query, key, value, attn_mask, gradient, dropout_p, is_causal, scale=scale)[0]

    def _bias(self, mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Return the mask as the memory-efficient kernel takes it: to be added, of the query's type, aligned."""
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, torch.full((), -torch.inf, dtype=query.dtype, device=query.device))
        assert mask.dtype == query.dtype, f"a mask in {mask.dtype} beside queries in {query.dtype}"
        length = mask.shape[-1]
        if mask.stride(-2) % ALIGNED and mask.shape[-2] > 1:
            mask = torch.nn.functional.pad(mask, (0, -length % ALIGNED))[..., :length]
        return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute for as long as this GPU is entered."""
        self._held.enter_context(mock.patch.object(owner, name, value))

    def _replacements(self) -> list[tuple[Any, dict[str, Any]]]:
        major, minor = self.capability
        card = SimpleNamespace(
            name="Fake GPU", major=major, minor=minor, total_memory=24 * 10**9, multi_processor_count=80
        )
        state = torch.zeros(16, dtype=torch.uint8)
        facts = {
            "is_available": True,
            "is_initialized": True,
            "is_current_stream_capturing": False,
            "device_count": 1,
            "current_device": 0,
            "set_device": None,
            "get_device_properties": card,
            "get_device_capability": self.capability,
            "get_device_name": card.name,
            "get_arch_list": ARCHITECTURES,
            "mem_get_info": (20 * 10**9, card.total_memory),
            "max_memory_allocated": 10**9,
            "max_memory_reserved": 10**9,
            "memory_allocated": 10**9,
            "memory_reserved": 10**9,
            "reset_peak_memory_stats": None,
            "empty_cache": None,
            "manual_seed": None,
            "manual_seed_all": None,
            "get_rng_state": state,
            "set_rng_state": None,
            "_lazy_init": None,
        }
        cuda: dict[str, Any] = {name: _always(value) for name, value in facts.items()}
        cuda["is_bf16_supported"] = lambda including_emulation=True: including_emulation or major >= 8
        cuda["synchronize"] = lambda device=None: FakeGpu.now.ledger.wait("synchronize")
        cuda |= {"Stream": FakeStream, "Event": FakeStream, "current_stream": _always(FakeStream())}
        cuda["stream"] = lambda stream: contextlib.nullcontext()
        tensor = {
            "pin_memory": lambda self, device=None: FakeGpu.now.pin(self.clone()),
            "is_pinned": lambda self, device=None: FakeGpu.now.is_pinned(self),
            "record_stream": lambda self, stream: None,
        }
        # torch's optimisers take their fast ways for the types that they know.
        known = [torch.Tensor, torch.nn.Parameter, FakeTensor]
        from captioning.kernels import attention_route  # torch is here only now

        return [
            (torch.nn.Module, {"_apply": _apply}),
            (torch.nn.functional, {"scaled_dot_product_attention": self.attention}),
            (FakeTensor, {"tolist": lambda self: self.cpu().tolist()}),
            (attention_route, {"_decided": {}, "_decide": _always("packed")}),  # by numbers and times otherwise
            (torch.backends.cuda, {"is_flash_attention_available": _always(True)}),
            (torch.cuda, cuda),
            (torch.Tensor, tensor),
            (sys.modules["torch.optim.optimizer"], {"_foreach_supported_types": known}),
            (sys.modules["torch.utils._foreach_utils"], {"_foreach_supported_types": known}),
        ]


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _apply(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """Move or cast a module's tensors: torch's own way cannot do it to fake ones. What was tied stays tied."""
    for child in module.children() if recurse else ():
        _apply(child, function)
    moved = vars(function).setdefault("moved", {})  # by id: the old tensor, which keeps its id taken, and the new
    for name, parameter in module._parameters.items():
        if parameter is not None:
            if id(parameter) not in moved:
                with torch.no_grad():
                    moved[id(parameter)] = parameter, torch.nn.Parameter(function(parameter), parameter.requires_grad)
            module._parameters[name] = moved[id(parameter)][1]
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module
