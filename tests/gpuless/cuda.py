"""An emulated GPU for CUDA C++: our own launchers and bindings run on CPU tensors, as on a device.

The library that toolchain.py builds has the real host code over a CUDA runtime of our own (cuda_runtime.cpp).
A launch comes here: the kernel's PTX for the emulated architecture runs in the emulator, with the limits that
a device has, over the tensors that are alive in the op that launches it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from gpuless import toolchain
from gpuless.driver import MODELS, MOST_CTAS_Y_Z, EmulatedGPU, device
from gpuless.launch import Result, launch
from gpuless.parser import parse
from gpuless.toolchain import Sources
from gpuless.torch_calls import MissingKernel, has_launcher

# cudaError_t
_SUCCESS, _INVALID_VALUE, _INVALID_CONFIGURATION, _OUT_OF_RESOURCES, _LAUNCH_FAILURE = 0, 1, 9, 701, 719
_SHARED_WITHOUT_ASKING = 48 * 1024
_MOST_CTAS_X, _MOST_THREADS, _MOST_THREADS_Z = 2**31 - 1, 1024, 64


@dataclass
class CudaLaunch:
    """One launch of a CUDA C++ kernel.

    Attributes:
        name: of the kernel, as the linker sees it; `shown` as C++ does.
        arch: 90 for sm_90.
        grid, block: in x, y, z.
        shared: bytes of dynamic shared memory.
        ptx: the module that ran, as `edit` left it.
        tensors: that were alive, by name.
        result: what the emulator counted.
    """

    name: str
    arch: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    ptx: str = field(repr=False)
    tensors: dict[str, torch.Tensor] = field(repr=False)
    result: Result | None = field(default=None, repr=False)

    @property
    def shown(self) -> str:
        """The kernel's name in C++."""
        return demangled(self.name)


@functools.cache
def demangled(name: str) -> str:
    """A name as C++ writes it, without its parameters."""
    shown = subprocess.run(["c++filt", "-p", name], check=True, capture_output=True, text=True).stdout
    return shown.strip().replace("(anonymous namespace)::", "").replace("peft_kernels::cuda::", "")


class _Device(ctypes.Structure):
    """The same struct is in cuda_runtime.cpp."""

    launch_type = ctypes.CFUNCTYPE(
        *(ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint32), ctypes.c_size_t),
        *(ctypes.POINTER(ctypes.c_void_p), ctypes.c_int),
    )
    allow_shared_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("arch", "multiprocessors", "shared_memory", "code_error")),
        ("launch", launch_type),
        ("allow_shared", allow_shared_type),
    )


class EmulatedCuda(TorchDispatchMode):
    """What `cuda()` yields. As a mode of torch it sees the ops that launch, and every tensor they use.

    Attributes:
        triton: the same GPU as Triton's device.
        launches: all that CUDA C++ launched.
    """

    def __init__(
        self,
        sources: Sources,
        runtime: ctypes.CDLL,
        triton: EmulatedGPU,
        execute: bool,
        strict: bool,
        counts: bool,
        edit: Callable[[str], str],
    ) -> None:
        super().__init__()
        self.triton, self.launches = triton, list[CudaLaunch]()
        self._sources, self._runtime, self._edit = sources, runtime, edit
        self._execute, self._strict, self._counts = execute, strict, counts
        self._alive: list[dict[str, torch.Tensor]] = []  # by name, of every op that is running
        self._allowed_shared: dict[str, int] = {}
        self._refusals: list[str] = []  # why launches failed as they would on a device
        self._failure: BaseException | None = None  # what the emulator raised
        arch = int(triton.arch)
        self.device = _Device(
            *(arch, triton.multiprocessors, MODELS[arch].shared_memory, _SUCCESS),
            _Device.launch_type(self._guarded(self._launch)),
            _Device.allow_shared_type(self._guarded(self._allow_shared)),
        )

    # ---- ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        traced = any(issubclass(each, (FakeTensor, FunctionalTensor)) for each in types)
        if traced or func._overloadname not in ("cuda", "triton"):
            results = func(*args, **kwargs)
            if self._alive:
                self._note(func._schema.name.partition("::")[2], results)
            return results
        if not has_launcher(func.name()):
            raise MissingKernel(f"{func.name()} has no kernel")
        named = zip((argument.name for argument in func._schema.arguments), args, strict=False)
        self._alive.append({})
        for name, value in (*named, *kwargs.items()):
            self._note(name, value)
        try:
            with self:  # for what the op calls
                results = func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        except Exception as error:
            self._explain(error)
            raise
        finally:
            self._alive.pop()
        self._explain(None)
        self._note(func._schema.name.partition("::")[2], results)
        return results

    def _note(self, name: str, values: Any) -> None:
        """Remember tensors; kept while the op runs, so that no address is used twice."""
        if not self._alive:
            return
        alive = self._alive[-1]
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                number, unique = 1, name
                while unique in alive:
                    number, unique = number + 1, f"{name} {number + 1}"
                alive[unique] = tensor

    def _explain(self, error: Exception | None) -> None:
        """Raise what the emulator raised, or tell why CUDA refused a launch."""
        failure, refusals, left = self._failure, self._refusals, self._runtime.gpuless_take_error()
        self._failure, self._refusals = None, []
        if failure is not None:
            raise failure from None
        if left or (error is None and refusals):
            missing = "leave no error behind (cudaGetLastError)" if left else "raise"
            raise AssertionError(f"an op whose launch fails must {missing}: {'; '.join(refusals)}") from error
        for reason in refusals:
            error.add_note(reason)  # type: ignore[union-attr]

    # ---- called by cuda_runtime.cpp

    def _guarded(self, function: Callable[..., int]) -> Callable[..., int]:
        """An exception must not cross C: it is kept for the op, and the launch fails."""

        def call(*args: Any) -> int:
            try:
                with _disable_current_modes():
                    return function(*args)
            except BaseException as error:  # noqa: BLE001
                self._failure = self._failure or error
                return _LAUNCH_FAILURE

        return call

    def _refuse(self, code: int, reason: str) -> int:
        self._refusals.append(reason)
        return code

    def _allow_shared(self, kernel: bytes, size: int) -> int:
        name, most = kernel.decode(), self.device.shared_memory
        if not 0 <= size <= most - parse(self._ptx(name), name).shared_bytes:
            return self._refuse(_INVALID_VALUE, f"{demangled(name)} may have {most} bytes, asked for {size}")
        self._allowed_shared[name] = size
        return _SUCCESS

    def _launch(self, kernel: bytes, sizes: Any, shared: int, arguments: Any, on_current_stream: int) -> int:
        name = kernel.decode()
        if not on_current_stream:
            raise AssertionError(f"{demangled(name)} must be launched on torch's current stream")
        grid, block = tuple(sizes[:3]), tuple(sizes[3:6])
        ptx = self._ptx(name)
        program = parse(ptx, name)
        threads = block[0] * block[1] * block[2]
        what = f"{demangled(name)}<<<{grid}, {block}, {shared}>>>"
        if not (0 < grid[0] <= _MOST_CTAS_X and all(0 < n <= MOST_CTAS_Y_Z for n in grid[1:])):
            return self._refuse(
                _INVALID_CONFIGURATION,
                f"{what}: a grid has 1 to {MOST_CTAS_Y_Z} CTAs in y and z, 1 to 2^31 - 1 in x",
            )
        if not (0 < threads <= _MOST_THREADS and block[2] <= _MOST_THREADS_Z):
            return self._refuse(
                _INVALID_CONFIGURATION,
                f"{what}: a CTA has 1 to {_MOST_THREADS} threads, {_MOST_THREADS_Z} in z",
            )
        if threads > (program.max_threads or _MOST_THREADS):
            return self._refuse(
                _OUT_OF_RESOURCES, f"{what}: __launch_bounds__ says {program.max_threads} threads"
            )
        allowed = self._allowed_shared.get(name, _SHARED_WITHOUT_ASKING - program.shared_bytes)
        if shared > allowed:
            return self._refuse(
                _INVALID_VALUE,
                f"{what}: {allowed} bytes of dynamic shared memory are allowed, beside {program.shared_bytes}"
                " static ones; cudaFuncSetAttribute(cudaFuncAttributeMaxDynamicSharedMemorySize) allows more",
            )
        memory = {key: value for alive in self._alive for key, value in alive.items()}
        record = CudaLaunch(name, int(self.triton.arch), grid, block, shared, ptx, memory)
        self.launches.append(record)
        if not self._execute:
            return _SUCCESS
        sizes_of = program.parameters.values()
        values = [ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes_of)]
        record.result = launch(
            ptx, grid, values, block=block, shared=shared, name=name, memory=memory,
            strict=self._strict, counts=self._counts,
        )  # fmt: skip
        return _SUCCESS

    def _ptx(self, kernel: str) -> str:
        source = toolchain.source_of(kernel, self._sources)
        return self._edit(_module(source, int(self.triton.arch), self._sources.include))


@functools.lru_cache(maxsize=64)
def _module(source: Any, arch: int, include: tuple[Any, ...]) -> str:
    return toolchain.ptx(source, arch, include)


@functools.cache
def _load(sources: Sources) -> ctypes.CDLL:
    """The library, loaded once: its ops are registered for good. Without `cuda()` they find no device."""
    path = toolchain.library(sources)
    torch.ops.load_library(path)
    symbols = ctypes.CDLL(str(path))
    symbols.gpuless_set_device.argtypes = [ctypes.POINTER(_Device)]
    return symbols


@contextlib.contextmanager
def cuda(
    arch: int,
    *,
    multiprocessors: int | None = None,
    execute: bool = True,
    strict: bool = True,
    counts: bool = False,
    edit: Callable[[str], str] = lambda ptx: ptx,
    sources: Sources | None = None,
) -> Iterator[EmulatedCuda]:
    """Make an emulated GPU the device of our CUDA C++ kernels, and of Triton's.

    Args:
        arch: 80, 86, 89, 90 or 120.
        multiprocessors: that it has; by default those of a model of this architecture.
        execute: run what is launched; otherwise results are memory that nobody wrote.
        strict: raise `Report` at the first launch with a finding; otherwise findings stay in its result.
        counts: count instructions, memory transactions and bytes of every launch (slower).
        edit: changes a module of PTX before it runs: a bug to be caught.
        sources: what to build instead of the project.

    Yields:
        The device, with the list of its launches.

    Raises:
        CompileError: nvcc or g++ is missing, or refuses.
    """
    sources = sources or Sources.of_the_project()
    runtime = _load(sources)
    with device(
        arch, execute=execute, strict=strict, counts=counts, multiprocessors=multiprocessors
    ) as triton:
        emulated = EmulatedCuda(sources, runtime, triton, execute, strict, counts, edit)
        runtime.gpuless_set_device(emulated.device)
        try:
            with emulated:
                yield emulated
        finally:
            runtime.gpuless_set_device(None)
