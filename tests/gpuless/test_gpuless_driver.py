"""The emulated GPU as Triton's device: launches, autotuning, heuristics and torch ops as on a real one."""

import pytest
import torch
import triton
import triton.language as tl

import gpuless


@triton.autotune([triton.Config({"B": 32}, num_warps=1), triton.Config({"B": 128}, num_warps=4)], key=["n"])
@triton.heuristics({"WHOLE": lambda arguments: arguments["n"] % arguments["B"] == 0})
@triton.jit
def scale_kernel(x_ptr, out_ptr, n, factor, B: tl.constexpr, WHOLE: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    if WHOLE:
        x = tl.load(x_ptr + i)
        tl.store(out_ptr + i, x * factor)
    else:
        x = tl.load(x_ptr + i, mask=i < n)
        tl.store(out_ptr + i, x * factor, mask=i < n)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 120])
@pytest.mark.parametrize("n", [100, 256])
def test_autotune_and_heuristics(arch: int, n: int) -> None:
    x, out = torch.randn(n), torch.empty(n)
    scale_kernel.cache.clear()  # what is best on one device, Triton takes on every other
    with gpuless.device(arch) as gpu:
        scale_kernel[lambda meta: (triton.cdiv(n, meta["B"]),)](x, out, n, 3.0, enable_fp_fusion=False)
    assert torch.equal(out, x * 3)
    assert {launch.num_warps for launch in gpu.launches} == {1, 4}  # each configuration was run
    assert all(launch.arch == arch and f"sm_{arch}" in launch.ptx for launch in gpu.launches)


def test_arguments_are_specialised_as_on_a_gpu() -> None:
    """Aligned pointers and divisible sizes give wide loads, in the code that production runs."""
    storage, out = torch.randn(1025), torch.empty(1024)
    with gpuless.device(80, execute=False) as gpu:
        for x in (storage[:1024], storage[1:]):
            scale_kernel.fn.fn[(8,)](
                x, out, 1024, 3.0, B=128, WHOLE=True, num_warps=1, enable_fp_fusion=False
            )
    assert ["ld.global.v4.b32" in launch.ptx for launch in gpu.launches] == [True, False]


def test_strided_tensors_and_torch_ops_between_launches() -> None:
    x = torch.randn(64, 64)
    out = torch.empty(64)
    with gpuless.device(90):
        scale_kernel[(2,)](x[3], out, 64, 2.0, enable_fp_fusion=False)
        product = torch.mm(x.bfloat16(), x.bfloat16(), out_dtype=torch.float32)
    assert torch.equal(out, x[3] * 2)
    torch.testing.assert_close(product, x.bfloat16().float() @ x.bfloat16().float())


def test_findings_are_raised_or_kept() -> None:
    x, out = torch.randn(100), torch.empty(64)
    with gpuless.device(80, strict=False) as gpu:
        scale_kernel.fn.fn[(1,)](x, out, 100, 1.0, B=128, WHOLE=False, enable_fp_fusion=False)
    assert any("out of bounds" in str(finding) for finding in gpu.launches[0].result.findings)
    with gpuless.device(80), pytest.raises(gpuless.Report, match="out of bounds"):
        scale_kernel.fn.fn[(1,)](x, out, 100, 1.0, B=128, WHOLE=False, enable_fp_fusion=False)


def test_grids_have_the_limits_of_a_gpu() -> None:
    x, out = torch.randn(1), torch.empty(1)
    with gpuless.device(80), pytest.raises(ValueError, match="at most 65535 in y and z"):
        scale_kernel.fn.fn[(1, 65536)](x, out, 1, 1.0, B=32, WHOLE=False, enable_fp_fusion=False)
    with gpuless.device(80) as gpu:
        scale_kernel.fn.fn[(0,)](x, out, 1, 1.0, B=32, WHOLE=False, enable_fp_fusion=False)
    assert gpu.launches[0].result is None


def test_the_device_is_there_only_inside() -> None:
    driver = triton.runtime.driver
    with gpuless.device(80):
        assert driver.active.get_current_target().arch == 80
        with gpuless.device(90):
            assert driver.active.get_current_target().arch == 90
        assert driver.active.get_current_target().arch == 80
    with pytest.raises(RuntimeError, match="0 active drivers"):
        driver.active.get_current_target()


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"arch must be one of 80, 86, 89, 90, 100, 120, .*, got 75"):
        gpuless.device(75).__enter__()
    with pytest.raises(ValueError, match="execute must be False for AMD GPUs"):
        gpuless.device("gfx942").__enter__()
