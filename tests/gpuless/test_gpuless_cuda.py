"""The emulated CUDA runtime: a small library with its own kernels, launchers and binding, as on a device."""

from pathlib import Path

import pytest
import torch

import gpuless
from gpuless import toolchain
from gpuless.mutations import mutants
from gpuless.torch_calls import MissingKernel, TorchCalls

TOY = Path(__file__).parent / "toy"
SOURCES = toolchain.Sources((TOY / "toy.cu",), (TOY / "binding.cpp",), (TOY,))
THREADS = 64


@pytest.fixture(autouse=True)
def compilers(nvcc: str) -> None:
    """Every test here needs them."""


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 100)


@pytest.fixture
def y() -> torch.Tensor:
    return torch.randn(100, 3).t()


def add(x: torch.Tensor, y: torch.Tensor, threads: int = THREADS, rows: tuple[int, int] = (3, 1), *,
        shared: int | None = None, allowed: int = -1) -> torch.Tensor:  # fmt: skip
    shared = 4 * threads if shared is None else shared
    return torch.ops.gpuless_toy.add.cuda(x, y, 2.0, threads, *rows, shared, allowed)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120])
def test_a_launch(arch: int, x: torch.Tensor, y: torch.Tensor, poison: None) -> None:
    with gpuless.cuda(arch, sources=SOURCES, counts=True) as gpu:
        assert torch.equal(add(x, y), 2 * x + y)
    (launch,) = gpu.launches
    assert (launch.arch, launch.grid, launch.block, launch.shared) == (arch, (2, 3, 1), (THREADS, 1, 1), 256)
    assert launch.shown == "toy::add_kernel"
    assert f".target sm_{arch}" in launch.ptx
    assert launch.result.bytes_read == {"x": x.nbytes, "contiguous": y.nbytes, "new_empty": 0}
    assert launch.result.bytes_written == {"x": 0, "contiguous": 0, "new_empty": x.nbytes}


def test_the_host_code_asks_about_the_device(x: torch.Tensor) -> None:
    def device() -> tuple[int, int]:
        return torch.ops.gpuless_toy.device.cuda(x)

    with gpuless.cuda(89, sources=SOURCES, multiprocessors=7):
        assert device() == (89, 7)
    with gpuless.cuda(120, sources=SOURCES) as gpu:
        assert device() == (120, gpuless.MODELS[120].multiprocessors)
        assert gpu.triton.multiprocessors == gpuless.MODELS[120].multiprocessors
    assert device()[0] == -1  # gone


def test_without_a_device_a_launch_fails(x: torch.Tensor, y: torch.Tensor) -> None:
    with gpuless.cuda(80, sources=SOURCES):
        pass
    with pytest.raises(RuntimeError, match="no CUDA-capable device is detected"):
        add(x, y)


def test_every_allocation_has_its_own_bounds(x: torch.Tensor) -> None:
    copy = torch.ops.gpuless_toy.copy.cuda
    with gpuless.cuda(90, sources=SOURCES) as gpu:
        assert torch.equal(copy(x, 300, False), x.flatten())
        with pytest.raises(
            gpuless.Report, match=r"global out of bounds: 4 bytes at x\+1200 \(its 1200 bytes"
        ):
            copy(x, 301, False)
        assert torch.equal(copy(x, 300, False), x.flatten())  # the device works on
    assert [launch.shown for launch in gpu.launches] == 3 * ["toy::copy_kernel"]
    with gpuless.cuda(90, sources=SOURCES, strict=False) as gpu:
        copy(x, 301, False)
    kinds = [(found.kind, found.lanes) for found in gpu.launches[0].result.findings]
    assert kinds == [("global out of bounds", 1), ("global out of bounds", 1)]


def test_a_report_is_an_exception_and_no_crash(x: torch.Tensor, y: torch.Tensor) -> None:
    with gpuless.cuda(80, sources=SOURCES), pytest.raises(gpuless.Report, match="shared out of bounds"):
        add(x, y, shared=4 * THREADS - 4)


def test_a_launch_must_be_on_the_current_stream(x: torch.Tensor) -> None:
    with gpuless.cuda(80, sources=SOURCES), pytest.raises(AssertionError, match="on torch's current stream"):
        torch.ops.gpuless_toy.copy.cuda(x, 1, True)


@pytest.mark.parametrize(
    ("threads", "rows", "said", "reason"),
    [
        (64, (65535, 1), None, None),
        (64, (65536, 1), "invalid configuration argument", "65535 CTAs in y and z"),
        (64, (1, 65536), "invalid configuration argument", "65535 CTAs in y and z"),
        (64, (0, 1), "invalid configuration argument", "a grid has 1 to"),
        (257, (1, 1), "too many resources requested for launch", "__launch_bounds__ says 256"),
        (1025, (1, 1), "invalid configuration argument", "1 to 1024 threads"),
    ],
)
def test_limits_of_a_launch(
    threads: int, rows: tuple[int, int], said: str | None, reason: str | None
) -> None:
    x = torch.zeros(1, 1)
    with gpuless.cuda(80, sources=SOURCES) as gpu:
        if said is None:
            add(x, x, threads, rows)
            assert len(gpu.launches) == 1
            return
        with pytest.raises(RuntimeError, match=f"add: {said}") as caught:
            add(x, x, threads, rows, shared=1024)
        assert reason in caught.value.__notes__[0]
        assert not gpu.launches


def test_errors_that_an_op_keeps_to_itself_or_leaves_behind(x: torch.Tensor) -> None:
    with gpuless.cuda(80, sources=SOURCES):
        with pytest.raises(
            AssertionError, match=r"must raise: toy::copy_kernel<<<\(0, 1, 1\), \(32, 1, 1\), 0>>>"
        ):
            torch.ops.gpuless_toy.copy.cuda(x, 0, False)
        with pytest.raises(
            AssertionError, match=r"must leave no error behind \(cudaGetLastError\): toy::copy"
        ):
            torch.ops.gpuless_toy.copy.cuda(x, -1, False)
        assert torch.equal(torch.ops.gpuless_toy.copy.cuda(x, 300, False), x.flatten())


def test_more_shared_memory_must_be_asked_for(x: torch.Tensor, y: torch.Tensor) -> None:
    usual, most = 48 * 1024, gpuless.MODELS[86].shared_memory
    with gpuless.cuda(86, sources=SOURCES):
        add(x, y, shared=usual)
        with pytest.raises(RuntimeError, match="invalid argument") as caught:
            add(x, y, shared=usual + 1)
        assert "49152 bytes of dynamic shared memory are allowed" in caught.value.__notes__[0]
        with pytest.raises(RuntimeError, match="invalid argument") as caught:
            add(x, y, allowed=most + 1)
        assert f"may have {most} bytes" in caught.value.__notes__[0]
        add(x, y, shared=most, allowed=most)
        add(x, y, shared=most)  # asked for once is enough
    with gpuless.cuda(86, sources=SOURCES), pytest.raises(RuntimeError, match="invalid argument"):
        add(x, y, shared=most)  # a new device knows nothing


def test_planted_bugs(x: torch.Tensor, y: torch.Tensor) -> None:
    with gpuless.cuda(80, sources=SOURCES) as gpu:
        add(x, y)
    (launch,) = gpu.launches
    planted = [mutant for mutant in mutants(launch.ptx, launch.name) if not mutant.harmless]
    assert planted
    for mutant in planted:
        with gpuless.cuda(80, sources=SOURCES, edit=lambda ptx, mutant=mutant: mutant.ptx):  # noqa: SIM117
            with pytest.raises(gpuless.Report):
                add(x, y)


def test_triton_runs_beside(x: torch.Tensor) -> None:
    import peft_kernels as pk

    with gpuless.cuda(90, sources=SOURCES) as gpu, pk.use_backend("triton"):
        pk.functional.nf4_quantize(torch.randn(64, 64), 64)
    assert len(gpu.triton.launches) == 1


def test_torch_calls_of_an_op(x: torch.Tensor, y: torch.Tensor) -> None:
    with TorchCalls(execute=True) as calls, gpuless.cuda(90, sources=SOURCES):
        add(x, y)
    assert [(call.name, call.read_bytes, call.write_bytes) for call in calls.calls] == [("clone", 1200, 1200)]
    too_late = pytest.raises(AssertionError, match=r"enter TorchCalls before gpuless\.cuda")
    with gpuless.cuda(90, sources=SOURCES), TorchCalls(execute=True), too_late:
        add(x, y)


def test_an_op_without_kernels(x: torch.Tensor) -> None:
    with gpuless.cuda(90, sources=SOURCES), pytest.raises(MissingKernel):
        torch.ops.gpuless_toy.nothing.cuda(x)


def test_what_is_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "CACHE", tmp_path / "cache")
    source = tmp_path / "one.cu"
    source.write_text('#include "value.h"\nextern "C" __global__ void one(int* x) { *x = VALUE; }\n')
    (tmp_path / "value.h").write_text("#define VALUE 123\n")
    text = toolchain.ptx(source, 90, (tmp_path,))
    assert "123" in text
    assert ".target sm_90a" in text
    monkeypatch.setattr(toolchain.subprocess, "run", None)  # nothing is compiled again
    assert toolchain.ptx(source, 90, (tmp_path,)) == text
    monkeypatch.undo()
    monkeypatch.setattr(toolchain, "CACHE", tmp_path / "cache")
    (tmp_path / "value.h").write_text("#define VALUE 124\n")
    assert "124" in toolchain.ptx(source, 90, (tmp_path,))
    source.write_text("error")
    with pytest.raises(toolchain.CompileError, match=r"one\.cu"):
        toolchain.ptx(source, 90, (tmp_path,))
