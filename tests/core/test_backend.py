"""use_backend, resolve and backend_of: which implementation runs, and what is refused."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels as pk
from peft_kernels.core import backend as backend_module
from peft_kernels.core import gpu as gpu_module
from peft_kernels.core.backend import backend_of, resolve
from peft_kernels.core.library import NativeLibrary, native_library

needs_native = pytest.mark.skipif(not native_library().loaded, reason="native library not loaded")


class Recorder(TorchDispatchMode):
    """The names of our ops that are called, with their overload."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "peft_kernels":
            self.names.append(func.name().removeprefix("peft_kernels::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """Names of our ops called in the test, as `<op>` or `<op>.reference`."""
    with Recorder() as recorder:
        yield recorder.names


def train_step(dtype: torch.dtype = torch.float32) -> None:
    x = torch.randn(3, 32, dtype=dtype, requires_grad=True)
    a = torch.randn(2, 32, dtype=dtype, requires_grad=True)
    b = torch.randn(8, 2, dtype=dtype, requires_grad=True)
    pk.functional.lora_linear(x, torch.randn(8, 32, dtype=dtype), a, b, 1.0).sum().backward()


NATIVE = ["adapted_linear", "adapted_linear_backward"]
REFERENCE = ["adapted_linear.reference", "adapted_linear_backward.reference"]


def test_default_is_the_dispatchers_choice(calls: list[str]) -> None:
    train_step()
    assert calls == NATIVE


def test_reference_is_forced_in_forward_and_backward(calls: list[str]) -> None:
    with pk.use_backend("reference"):
        train_step()
    assert calls == REFERENCE


def test_float64_runs_on_the_reference(calls: list[str]) -> None:
    train_step(torch.float64)
    assert calls == REFERENCE


def test_nested_contexts_and_exceptions_restore(calls: list[str]) -> None:
    with pk.use_backend("reference"):
        with pytest.raises(KeyError), pk.use_backend("reference"):
            raise KeyError
        train_step()
    train_step()
    assert calls == REFERENCE + NATIVE


def test_a_forced_backend_stays_in_its_thread() -> None:
    names: list[str] = []

    def in_thread() -> None:
        with Recorder() as recorder:
            train_step()
        names.extend(recorder.names)

    with pk.use_backend("reference"):
        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join()
    assert names == NATIVE


def test_compiled_functions_obey_a_forced_backend(fresh_compiler: None) -> None:
    graphs: list[str] = []

    def recording_compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    def double(x: torch.Tensor) -> torch.Tensor:
        return pk.functional.philox_dropout(x, 0.5, 7) * 2

    x = torch.ones(8)
    compiled = torch.compile(double, backend=recording_compiler, fullgraph=True)
    expected = compiled(x)
    assert "peft_kernels.philox_dropout.default" in graphs[0]
    with pk.use_backend("reference"), Recorder() as recorder:
        assert torch.equal(compiled(x), expected)
    assert recorder.names == ["philox_dropout.reference"]
    assert torch.equal(compiled(x), expected)
    assert len(graphs) == 1


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be one of reference, cpu, triton, cuda, got 'gpu'"):
        pk.use_backend("gpu").__enter__()


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_backend_without_a_gpu(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"'{name}' needs a GPU: Triton finds none on this machine"):
        pk.use_backend(name).__enter__()


def test_backend_without_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "why_no_gpu", lambda: None)
    monkeypatch.setattr(backend_module, "has_cuda_kernels", lambda: False)
    with pytest.raises(RuntimeError, match="needs a native library with CUDA C"):
        pk.use_backend("cuda").__enter__()


def test_cpu_backend_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = NativeLibrary(native_library().path, False, "it does not exist", None, ())
    monkeypatch.setattr(backend_module, "native_library", lambda: missing)
    with pytest.raises(RuntimeError, match="needs the native library: it does not exist; run `make build`"):
        pk.use_backend("cpu").__enter__()
    assert backend_of("adapted_linear", "cpu") == "reference"


@needs_native
def test_cpu_backend_refuses_what_it_cannot_run() -> None:
    with pk.use_backend("cpu"):
        train_step()
        with pytest.raises(
            RuntimeError, match=r"'cpu' is forced, but adapted_linear got a torch\.float64 tensor"
        ):
            train_step(torch.float64)
        with pytest.raises(RuntimeError, match=r"got a torch\.float32 tensor on meta"):
            resolve("adapted_linear", torch.empty(1, device="meta"))


@needs_native
def test_backend_of_names_what_runs() -> None:
    assert backend_of("nf4_quantize", "cpu") == f"cpu (C++ {native_library().capability})"
    assert backend_of("nf4_quantize", torch.device("cuda")) == "reference"  # for there is none here
    with pk.use_backend("reference"):
        assert backend_of("nf4_quantize", "cpu") == "reference"


def test_op_without_triton_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "why_no_gpu", lambda: None)
    with pk.use_backend("triton"), pytest.raises(RuntimeError, match="nf4_linear_int8 has no Triton kernel"):
        resolve("nf4_linear_int8", torch.empty(1))


class OldDriver:
    """Triton's driver on a machine with a T4."""

    utils = SimpleNamespace(
        get_device_properties=lambda _: {"multiprocessor_count": 40, "max_shared_mem": 65536}
    )

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        return SimpleNamespace(backend="cuda", arch=75)


def test_old_gpu_gets_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = OldDriver()
    monkeypatch.setattr(gpu_module, "_driver", lambda: driver)
    with pytest.raises(RuntimeError, match=r"compute capability 7\.5, and 8\.0 is needed"):
        pk.use_backend("triton").__enter__()
    weight = torch.randn(64)
    packed, _ = torch.ops.peft_kernels.nf4_quantize.triton(weight, 64)
    assert torch.equal(packed, torch.ops.peft_kernels.nf4_quantize.reference(weight, 64)[0])
