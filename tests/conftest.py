"""Fixtures for every test: one thread, a fixed seed, poisoned memory, and the choice of backend."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

EMULATED = (80, 90, 120)  # architectures that Triton's kernels are tested on
EMULATED_CUDA = (80, 86, 90, 120)  # and CUDA C++ ones


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors (pyproject.toml), but for those that torch causes itself and for one of ours.

    Without the native library the suite runs on the reference, and says so in the reasons for its skips.
    That is why nothing here imports peft_kernels before this function has run.
    """
    config.addinivalue_line("filterwarnings", "ignore:peft_kernels runs WITHOUT:RuntimeWarning")
    # Dynamo, on its way through any autograd.Function.
    config.addinivalue_line("filterwarnings", "ignore:.*should not be instantiated:DeprecationWarning")
    config.addinivalue_line("filterwarnings", "ignore:.*torch.jit.:DeprecationWarning")  # importing inductor


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the emulated GPUs, `make test` runs each case on one, in turn; `make test-gpuless` on all."""
    cases: dict[str, int] = {}
    for item in items:
        parameters = getattr(item, "callspec", None) and item.callspec.params  # type: ignore[attr-defined]
        for fixture, emulated in (("gpu", EMULATED), ("cuda_gpu", EMULATED_CUDA)):
            if arch := (parameters or {}).get(fixture):
                case = cases.setdefault(item.nodeid.replace(f"sm_{arch}", ""), len(cases))
                if emulated[case % len(emulated)] != arch:
                    item.add_marker("gpuless_full")


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> Iterator[None]:
    """Tests share small machines, and each must pass alone as it does in the suite."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def nvcc() -> str:
    """Path of nvcc: a test that needs it is skipped where there is none, but not in CI."""
    path = shutil.which("nvcc")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("nvcc is missing: CI must have it")
        pytest.skip("nvcc is not on PATH")
    return path


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what torch.compile has compiled: its limit on recompilations counts over a whole process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill memory allocated without a value (torch.empty, in C++ too) with NaN, or the largest integer.

    An element that a kernel forgets to write, or reads before it is written, then shows in the result.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory  # torch's default
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest, poison: None) -> Iterator[str]:
    """Run the test on the reference and on the native library, both over poisoned memory."""
    import peft_kernels as pk
    from peft_kernels.core.library import native_library

    if request.param == "native":
        if not native_library().loaded:
            pytest.skip(f"native library not loaded: {native_library().reason}")
        yield "native"  # without use_backend: what users get
    else:
        with pk.use_backend("reference"):
            yield "reference"


@pytest.fixture(params=EMULATED, ids=lambda arch: f"sm_{arch}")
def gpu(request: pytest.FixtureRequest, poison: None) -> Iterator[Any]:
    """Run the test on an emulated GPU with Triton's kernels, over poisoned memory; any finding raises."""
    import gpuless
    import peft_kernels as pk

    with gpuless.device(request.param) as gpu, pk.use_backend("triton"):
        yield gpu


@pytest.fixture(scope="session")
def emulated_cuda() -> None:
    """Build the library with the CUDA C++ kernels' host code; if that fails, it fails once."""
    import gpuless

    with gpuless.cuda(EMULATED_CUDA[0]):
        pass


@pytest.fixture(params=EMULATED_CUDA, ids=lambda arch: f"sm_{arch}")
def cuda_gpu(request: pytest.FixtureRequest, emulated_cuda: None, poison: None) -> Iterator[Any]:
    """Run the test on an emulated GPU with CUDA C++ kernels, and Triton's for what they do not take."""
    import gpuless
    import peft_kernels as pk

    with gpuless.cuda(request.param) as gpu, pk.use_backend("cuda"):
        yield gpu
