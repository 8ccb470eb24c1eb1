"""Host code of the CUDA C++ backend: limits of kernels, GPUs that it has none for, errors, bad arguments."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_linear_cuda import input_gradient_args, make
from test_linear_op import forward_args

import gpuless
import peft_kernels as pk
from factories import make_problem

pytestmark = pytest.mark.usefixtures("emulated_cuda")

OPS = torch.ops.peft_kernels
NO_KERNEL_IMAGE, OUT_OF_MEMORY = 209, 2  # cudaError_t
LARGE = 2**31


@pytest.mark.parametrize(
    ("by_input", "tokens", "k", "n"),
    [
        *((by_input, 0, 64, 64) for by_input in (False, True)),
        *((by_input, 1, 0, 1000) for by_input in (False, True)),
        *((by_input, 1, 64, 0) for by_input in (False, True)),
        *((by_input, 1, LARGE, 1) for by_input in (False, True)),
        *((by_input, 1, 64, LARGE) for by_input in (False, True)),
        *((by_input, 8, 2**20, 2**20) for by_input in (False, True)),
        (False, 8, 64, 65536 * 128),  # CTAs in y
    ],
)
def test_sizes_that_kernels_cannot_count_are_left_to_others(
    by_input: bool, tokens: int, k: int, n: int
) -> None:
    with gpuless.cuda(90):
        assert torch.ops.peft_kernels_cuda.plan(by_input, tokens, k, n, 64, torch.bfloat16) == 0


@pytest.mark.parametrize("m", [1, 3, 20])
def test_more_outputs_than_small_tiles_have_ctas(m: int) -> None:
    n = 65536 * 32
    packed, absmax = torch.empty(n * 32, dtype=torch.uint8), torch.empty(n)
    base = (packed, absmax, None, None, None, 0, 64)
    with gpuless.cuda(90, execute=False) as gpu:
        x = torch.empty(m, 64, dtype=torch.bfloat16)
        OPS.adapted_linear.cuda(x, *base, n, None, None, 1.0, None, None, None, 0.0, None, False)
        OPS.nf4_linear_backward_input.cuda(
            torch.empty(m, n, dtype=torch.bfloat16), *base, 64, None, None, None, None, 0.0, None
        )
    names = [launch.shown for launch in gpu.launches]
    assert names[0].startswith("linear_")
    assert names[1].startswith("input_gradient_kernel")


def test_a_gpu_that_the_library_was_not_built_for(poison: None) -> None:
    problem = make(3, 34, 128, dropout_p=0.3)
    w, a, b = torch.randn(34, 128), torch.randn(4, 128), torch.randn(34, 4)
    with gpuless.cuda(90) as gpu, pk.use_backend("cuda"):
        gpu.device.code_error = NO_KERNEL_IMAGE
        y, grads = problem.run_with_gradients()
        problem.check(y)
        problem.check_gradients(grads)
        quantized = pk.functional.nf4_quantize(w)
        found = quantized.dequantize(torch.bfloat16)
        norm = pk.functional.dora_norm(w, a, b, 0.5)
    assert gpu.launches == []
    expected = pk.functional.nf4_quantize(w)
    assert torch.equal(quantized.packed, expected.packed)
    assert torch.equal(found, expected.dequantize(torch.bfloat16))
    exact = pk.functional.dora_norm(w.double(), a.double(), b.double(), 0.5)
    torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)


def test_other_errors_of_a_gpu_are_no_reason_for_other_kernels() -> None:
    problem = make(3, 34, 128)
    with gpuless.cuda(90) as gpu:
        gpu.device.code_error = OUT_OF_MEMORY
        with pytest.raises(RuntimeError, match="asking the GPU for its properties failed"):
            OPS.adapted_linear.cuda(*forward_args(problem), False)
        gpu.device.code_error = 0
        OPS.adapted_linear.cuda(*forward_args(problem), False)


def test_refused_shared_memory_is_said_once() -> None:
    """And not of the next launch, which is innocent."""
    problem = make(3, 34, 128)
    with gpuless.cuda(90) as gpu:
        enough, gpu.device.shared_memory = gpu.device.shared_memory, 48 << 10
        with pytest.raises(RuntimeError, match="nf4_linear_backward_input failed: invalid argument"):
            OPS.nf4_linear_backward_input.cuda(*input_gradient_args(problem))
        gpu.device.shared_memory = enough
        OPS.adapted_linear.cuda(*forward_args(problem), False)


NAN = float("nan")
NAMES = (
    *("grad", "weight", "absmax", "nested_absmax", "nested_code", "nested_offset", "nested_blocksize"),
    *("blocksize", "in_features", "column_scale", "du", "lora_a", "input_scale", "dropout_p", "seed"),
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grad": torch.randn(9)}, r"grad must be \[M, N\], got \[9\]"),
        (
            {"grad": torch.randn(3, 9, dtype=torch.float64)},
            "grad must be float32, bfloat16 or float16, got Double",
        ),
        ({"grad": torch.empty(3, 9, device="meta")}, "grad must be on a GPU"),
        ({"weight": torch.zeros(287, dtype=torch.uint8)}, r"packed weight must be \[288\], got \[287\]"),
        ({"weight": torch.zeros(288)}, "packed weight must be Byte, got Float"),
        ({"absmax": torch.zeros(9, dtype=torch.float64)}, "absmax must be Float, got Double"),
        (
            {"absmax": torch.zeros(9, device="meta")},
            "absmax must be on the GPU like the op's other arguments",
        ),
        ({"nested_absmax": torch.zeros(1)}, "must be given together or not at all"),
        ({"blocksize": 16}, "blocksize must be a power of two from 32 to 4096, got 16"),
        ({"blocksize": 8192}, "blocksize must be a power of two from 32 to 4096, got 8192"),
        ({"in_features": 0}, r"weight must be \[N, K\] with N, K > 0, got \[9, 0\]"),
        ({"in_features": 2**62}, r"weight must have sizes of 0 and more and fewer than 2\^62 elements"),
        ({"column_scale": torch.zeros(8)}, r"column_scale must be \[9\], got \[8\]"),
        ({"column_scale": torch.zeros(9).half()}, "column_scale must be BFloat16, got Half"),
        ({"du": None}, "du and lora_a must be given together"),
        ({"du": torch.zeros(3)}, r"du must be \[3, 4\], got \[3\]"),
        ({"du": torch.zeros(3, 4).bfloat16()}, "du must be Float, got BFloat16"),
        ({"lora_a": torch.zeros(64)}, r"lora_a must be \[r, K\], got \[64\]"),
        ({"lora_a": torch.zeros(4, 63)}, r"lora_a must be \[4, 64\], got \[4, 63\]"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1"),
        ({"dropout_p": NAN}, r"dropout_p must be in \[0, 1\), got nan"),
        ({"seed": None}, "seed must be given when dropout_p > 0"),
        ({"seed": torch.zeros(1, dtype=torch.int64)}, r"seed must be \[\], got \[1\]"),
        ({"seed": torch.tensor(1)[None].expand(2)[1].int()}, "seed must be Long, got Int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_of_the_input_gradient(changes: dict[str, Any], message: str) -> None:
    args = dict(zip(NAMES, input_gradient_args(make(3, 9, 64, dropout_p=0.3)), strict=True))
    with gpuless.cuda(90), pytest.raises(RuntimeError, match=message):
        OPS.nf4_linear_backward_input.cuda(*(args | changes).values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.nf4_quantize.cuda(torch.randn(64), 65), "blocksize must be a power of two"),
        (lambda: OPS.nf4_quantize.cuda(torch.randn(64).double(), 64), "weight must be float32, bfloat16"),
        (
            lambda: OPS.nf4_dequantize.cuda(*_weight(), [-8, -8], torch.float32),
            r"shape must have sizes of 0 and more and fewer than 2\^62 elements, got 1 x -8",
        ),
        (lambda: OPS.nf4_dequantize.cuda(*_weight(), [8, 8], torch.int32), "dtype must be float32, bfloat16"),
        (
            lambda: OPS.dora_norm.cuda(*_weight(), 1, torch.randn(0, 64), torch.randn(1, 0), 1.0),
            r"lora_a must be \[r, K\] with r > 0, got \[0, 64\]",
        ),
        (
            lambda: OPS.dora_norm.cuda(*_weight(), 1, torch.randn(2, 64), torch.randn(1, 2), NAN),
            "scaling must be finite, got",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_of_codec_and_norm(call: Callable[[], Any], message: str) -> None:
    with gpuless.cuda(90), pytest.raises(RuntimeError, match=message):
        call()


def test_a_dtype_that_no_kernel_takes_is_named_first() -> None:
    args = list(forward_args(make(3, 9, 64)))
    args[0] = args[0].double()
    with gpuless.cuda(90), pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16, got"):
        OPS.adapted_linear.cuda(*args, False)


def _weight() -> tuple[Any, ...]:
    """The format of 64 elements."""
    return torch.zeros(32, dtype=torch.uint8), torch.zeros(1), None, None, None, 0, 64


@pytest.mark.parametrize(
    "arch", [90, *(pytest.param(arch, marks=pytest.mark.gpuless_full) for arch in (80, 120))]
)
@pytest.mark.parametrize("multiprocessors", [1, 84, 1000])
def test_every_plan_is_launched(arch: int, multiprocessors: int) -> None:
    """Grids, blocks and shared memory of every tile are what a GPU takes, whatever it has."""
    with gpuless.cuda(arch, multiprocessors=multiprocessors, execute=False) as gpu:
        for dtype in (torch.bfloat16, torch.float32):
            for m in (1, 2, 4, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129):
                for n, k in ((1, 64), (515, 576), (1, 8192), (16384, 64)):
                    problem = make_problem(m, n, k, parts=("lora",), dtype=dtype)
                    planned = [
                        torch.ops.peft_kernels_cuda.plan(backward, m, k, n, 64, dtype)
                        for backward in (False, True)
                    ]
                    gpu.launches.clear()
                    OPS.adapted_linear.cuda(*forward_args(problem), False)
                    OPS.nf4_linear_backward_input.cuda(*input_gradient_args(problem))
                    names = " ".join(launch.shown for launch in gpu.launches)
                    for method, name in zip(
                        planned,
                        (("linear_gemv", "linear_matmul"), ("-", "input_gradient_kernel")),
                        strict=True,
                    ):
                        assert [each in names for each in name] == [method == 1, method == 2], (m, n, k)
