"""The adapted linear's CUDA C++ kernels, as compiled, launched by their own host code, on emulated GPUs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_linear_op import BACKWARD, FORWARD, backward_args, forward_args

import gpuless
from factories import Problem, make_problem
from peft_kernels.core import plan
from peft_kernels.core.backend import backend_of
from peft_kernels.ops.linear import regimes, triton_plan

PARTS = ("lora", "column_scale", "bias")  # no input_scale: the forward's is Triton's
SIXTEEN = (torch.bfloat16, torch.float16)
full = pytest.mark.gpuless_full
INPUT_GRADIENT = torch.ops.peft_kernels.nf4_linear_backward_input


def make(m: int, n: int, k: int, **options: Any) -> Problem:
    return make_problem(m, n, k, **{"parts": PARTS, "dtype": torch.bfloat16, **options})


def check(gpu: Any, problem: Problem, wrt: Sequence[str] | None = None) -> None:
    """Results and gradients against float64; CUDA C++ computed the products that its chooser takes."""
    gpu.launches.clear()
    y, grads = problem.run_with_gradients(wrt)
    problem.check(y)
    problem.check_gradients(grads)
    (m, k), n, dtype = problem.tensors["x"].shape, problem.grad.shape[1], problem.grad.dtype
    product = triton_plan.Product(m, n, k, problem.weight.blocksize, dtype)
    scaled_input = "input_scale" in problem.tensors
    for backward in (False, True):
        chosen = regimes.cuda_method(product, backward=backward) is not None
        assert launched(gpu, backward) == (chosen and (backward or not scaled_input)), backward


KERNELS = {False: "linear_", True: "input_gradient_kernel"}


def launched(gpu: Any, backward: bool) -> bool:
    """Whether a CUDA C++ kernel computed the product."""
    names = [launch.shown for launch in gpu.launches]
    return any(name.startswith(KERNELS[backward]) for name in names)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 17, 33, 64, pytest.param(65, marks=full), 100])
def test_results_and_gradients(cuda_gpu: Any, m: int, dtype: torch.dtype) -> None:
    check(cuda_gpu, make(m, 70, 320, dtype=dtype, weight="nf4_double", dropout_p=0.3))


@pytest.mark.parametrize("m", [1, 3, 4, 5])
def test_fp32(cuda_gpu: Any, m: int) -> None:
    check(cuda_gpu, make(m, 37, 192, dtype=torch.float32, dropout_p=0.3))


@pytest.mark.parametrize("k", [64, 128, 576, pytest.param(1088, marks=full)])
@pytest.mark.parametrize("n", [1, 33, 130])
@pytest.mark.parametrize("m", [1, 5, 20])
def test_ragged_shapes(cuda_gpu: Any, m: int, n: int, k: int) -> None:
    check(cuda_gpu, make(m, n, k, dropout_p=0.3))


@full
@pytest.mark.parametrize("m", [1, 7, 11, 40, 96, 128])
@pytest.mark.parametrize("n", [129, 257])
@pytest.mark.parametrize("k", [448, 832])
@pytest.mark.parametrize("weight", ["nf4", "nf4_double"])
def test_more_shapes(cuda_gpu: Any, m: int, n: int, k: int, weight: str) -> None:
    check(cuda_gpu, make(m, n, k, weight=weight, dropout_p=0.3))


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, pytest.param(4096, marks=full)])
@pytest.mark.parametrize("m", [1, 20])
def test_every_blocksize(cuda_gpu: Any, m: int, blocksize: int) -> None:
    check(cuda_gpu, make(m, 34, max(256, blocksize), blocksize=blocksize))


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("r", [1, 16, 20, 70])
@pytest.mark.parametrize("m", [1, 20])
def test_every_rank(cuda_gpu: Any, m: int, r: int, adapter_dtype: torch.dtype) -> None:
    check(cuda_gpu, make(m, 34, 128, r=r, adapter_dtype=adapter_dtype, dropout_p=0.3))


@pytest.mark.parametrize("m", [1, 20])
def test_projection_of_long_rows(cuda_gpu: Any, m: int) -> None:
    """All warps of a CTA, and more than one turn."""
    problem = make(m, 9, 2240, r=5, parts=("lora",), dropout_p=0.3)
    problem.check(problem.run())


@pytest.mark.parametrize("parts", [(), ("lora",), ("column_scale",), ("bias",)], ids=str)
@pytest.mark.parametrize("m", [1, 20])
def test_every_part_alone(cuda_gpu: Any, m: int, parts: tuple[str, ...]) -> None:
    check(cuda_gpu, make(m, 34, 128, parts=parts))


@pytest.mark.parametrize("m", [0, 1, 20, 150])
def test_what_triton_serves(cuda_gpu: Any, m: int) -> None:
    """No tokens, many of them, an input scale: problems that go on to Triton's kernels."""
    problem = make_problem(m, 34, 128, dtype=torch.bfloat16, dropout_p=0.3)
    y, grads = problem.run_with_gradients()
    problem.check(y)
    problem.check_gradients(grads)


@pytest.mark.parametrize("m", [1, 20])
def test_input_scale_of_the_input_gradient(cuda_gpu: Any, m: int) -> None:
    problem = make_problem(m, 34, 128, dtype=torch.bfloat16, dropout_p=0.3)
    check(cuda_gpu, problem, wrt=[name for name in problem.tensors if name != "input_scale"])


@pytest.mark.parametrize("m", [1, 6, 20])
@pytest.mark.parametrize("variant", ["transposed", "stride 0", "unaligned", "gaps", "shifted"])
def test_strides(cuda_gpu: Any, m: int, variant: str) -> None:
    problem = make(m, 34, 128, dropout_p=0.3)
    x, grad = problem.tensors["x"], problem.grad
    if variant == "transposed":
        x, grad = x.t().contiguous().t(), grad.t().contiguous().t()
    elif variant == "stride 0":
        x, grad = x[:1].expand_as(x), grad[:1, :1].expand_as(grad)
    elif variant == "unaligned":
        x, grad = (torch.cat([t[:, :3], t], 1)[:, 3:] for t in (x, grad))
    elif variant == "shifted":
        problem.tensors = {name: _shifted(tensor) for name, tensor in problem.tensors.items()}
        x, grad = problem.tensors["x"], _shifted(grad)
    else:
        for name in problem.tensors.keys() - {"x"}:
            problem.tensors[name] = _with_gaps(problem.tensors[name])
        problem.weight = replace(problem.weight, absmax=_with_gaps(problem.weight.absmax))
    problem.tensors["x"], problem.grad = x, grad
    check(cuda_gpu, problem)


def _shifted(tensor: torch.Tensor) -> torch.Tensor:
    """By one element: begins at no multiple of 16 bytes."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view_as(tensor)


def _with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor + 1], -1)[..., 0]


def test_unaligned_weight(cuda_gpu: Any) -> None:
    """A view of a larger tensor, as checkpoints may hold: Triton's kernels take it."""
    problem = make(3, 34, 128)
    packed = problem.weight.packed
    problem.weight = replace(problem.weight, packed=torch.cat([packed[:1], packed])[1:])
    y, grads = problem.run_with_gradients()
    problem.check(y)
    problem.check_gradients(grads)


@pytest.mark.parametrize("m", [1, 6, 20, 70])
def test_same_bits_on_every_run(cuda_gpu: Any, m: int) -> None:
    problem = make(m, 34, 320, dropout_p=0.3)
    y, grads = problem.run_with_gradients()
    again, grads_again = problem.run_with_gradients()
    assert torch.equal(y, again)
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), name


@pytest.mark.parametrize("m", [6, 18])
def test_infinity_and_nan_stay_in_their_token(cuda_gpu: Any, m: int) -> None:
    problem = make(m, 20, 192)
    clean = problem.run()
    x = problem.tensors["x"].clone()
    x[3, 5], x[4, 7] = torch.inf, torch.nan
    y = problem.run(x=x)
    assert not y[3].isfinite().any()
    assert y[4].isnan().all()
    rest = [i for i in range(m) if i not in (3, 4)]
    assert torch.equal(y[rest], clean[rest])


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("m", [1, 6, 20])
def test_odd_absmax_stays_in_its_output(cuda_gpu: Any, m: int, value: float) -> None:
    """One block of one output: what float64 says of that output, and nothing of the others."""
    problem = make(m, 20, 192, parts=())
    absmax = problem.weight.absmax.clone()
    absmax[3 * 3 + 1] = value  # output 3, its second block
    weight = replace(problem.weight, absmax=absmax)
    clean, y = problem.run(), replace(problem, weight=weight).run()
    rest = [i for i in range(20) if i != 3]
    assert torch.equal(y[:, rest], clean[:, rest])
    if value in (0.0, 1e-40, 1e30):
        odd = replace(problem, weight=weight, exact_weight=weight.dequantize(torch.float32).double())
        odd.check(y)
    else:
        assert not y[:, 3].isfinite().any()
    dx = replace(problem, weight=weight).run_with_gradients()[1]["x"]
    columns = [i for i in range(192) if not 64 <= i < 128]
    assert torch.equal(dx[:, columns], problem.run_with_gradients()[1]["x"][:, columns])


def test_no_gradient_modes(cuda_gpu: Any) -> None:
    problem = make(3, 34, 128)
    expected = problem.run()
    with torch.inference_mode():
        assert torch.equal(problem.run(), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(problem.run(), expected)


def test_activation_checkpointing(cuda_gpu: Any) -> None:
    problem = make(6, 34, 128, dropout_p=0.3)
    leaf = problem.tensors["x"].clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(lambda x: problem.run(x=x), leaf, use_reentrant=False)
    (dx,) = torch.autograd.grad(y, leaf, problem.grad)
    assert torch.equal(dx, problem.run_with_gradients(["x"])[1]["x"])


def test_inputs_are_not_changed(cuda_gpu: Any) -> None:
    problem = make(20, 34, 128, dropout_p=0.3)
    before = {name: tensor.clone() for name, tensor in problem.tensors.items()}
    problem.run_with_gradients()
    for name, tensor in problem.tensors.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("variant", ["plain", "transposed", "stride 0", "no tokens"])
def test_opcheck(variant: str, poison: None) -> None:
    problem = make(0 if variant == "no tokens" else 4, 9, 64, dropout_p=0.3)
    if variant == "transposed":
        problem.tensors["x"] = problem.tensors["x"].t().contiguous().t()
        problem.grad = problem.grad.t().contiguous().t()
    elif variant == "stride 0":
        problem.tensors["x"] = problem.tensors["x"][:1].expand(4, 64)
        problem.grad = problem.grad[:1, :1].expand(4, 9)
    with gpuless.cuda(80):
        torch.library.opcheck(FORWARD.cuda, (*forward_args(problem), True))
        torch.library.opcheck(BACKWARD.cuda, tuple(backward_args(problem)))
        torch.library.opcheck(INPUT_GRADIENT.cuda, input_gradient_args(problem))


def input_gradient_args(problem: Problem) -> tuple[Any, ...]:
    """With du at random, where there is a low-rank part."""
    a = backward_args(problem)
    du = None if a.lora_a is None else torch.randn(a.grad.shape[0], a.lora_a.shape[0])
    seed = torch.tensor(problem.seed)
    return (
        *(a.grad, a.weight, a.absmax, a.nested_absmax, a.nested_code, a.nested_offset, a.nested_blocksize),
        *(a.blocksize, a.x.shape[1], a.column_scale, du, a.lora_a, None, problem.dropout_p, seed),
    )


def test_compile(fresh_compiler: None) -> None:
    """Traced without the emulator, a mode of torch that dynamo does not know; then run in it."""
    problem = make(3, 9, 64)
    a = forward_args(problem)

    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = FORWARD.cuda(x, *a[1:], False)[0]
            return y + 1

    traced = torch.export.export(Layer(), (a.x,)).module()
    with gpuless.cuda(90):
        assert torch.equal(traced(a.x), Layer()(a.x))


def test_wrong_arguments_are_named() -> None:
    problem = make(3, 9, 64)
    args = (*forward_args(problem), False)
    with gpuless.cuda(90):
        for index, value, message in (
            (0, args[0][0], r"x must be \[M, K\], got \[64\]"),
            (1, args[1][1:], r"packed weight must be \[288\], got \[287\]"),
            (7, 48, r"blocksize must be a power of two from 32 to 4096, got 48"),
            (10, args[10][:, :1], r"lora_b must be \[9, 4\], got \[9, 1\]"),
            (14, args[14][:3], r"bias must be \[9\], got \[3\]"),
        ):
            with pytest.raises(RuntimeError, match=message):
                FORWARD.cuda(*args[:index], value, *args[index + 1 :])


def test_reference_of_the_input_gradient(poison: None) -> None:
    """It is the part of the backward's that gives dx."""
    problem = make(5, 9, 64, dropout_p=0.3)
    a = backward_args(problem)
    du = a.scaling * ((a.grad.float() * a.column_scale) @ a.lora_b.float())
    args = list(input_gradient_args(problem))
    args[10] = du
    expected = BACKWARD.reference(*a)[0]
    torch.testing.assert_close(INPUT_GRADIENT.reference(*args), expected, rtol=1e-2, atol=1e-2)


def test_explain_says_what_is_launched(cuda_gpu: Any) -> None:
    device = torch.device("cpu")
    plans = regimes.plans(plan.Product(128, 64, torch.bfloat16, device))
    for direction in ("forward", "input gradient"):
        for regime in plans[direction].regimes:
            for m in {regime.first, regime.last or regime.first + 1}:
                problem = make(m, 16, 128, parts=())
                cuda_gpu.launches.clear()
                if direction == "forward":
                    problem.run()
                else:
                    INPUT_GRADIENT.cuda(*input_gradient_args(problem))
                native = launched(cuda_gpu, direction != "forward")
                assert native == ("CUDA C++" in regime.method), (m, regime)


def test_explain_knows_that_a_scaled_input_is_triton_s(cuda_gpu: Any) -> None:
    plans = regimes.plans(plan.Product(128, 64, torch.bfloat16, torch.device("cpu"), input_scale=True))
    problem = make(3, 34, 128, parts=("input_scale",))
    cuda_gpu.launches.clear()
    problem.run_with_gradients()
    assert cuda_gpu.launches == []
    assert all("CUDA C++" not in str(each) for each in plans.values())


def test_explain_has_nothing_to_say_of_the_reference(cuda_gpu: Any) -> None:
    assert regimes.plans(plan.Product(128, 64, torch.float64, torch.device("cpu"))) == {}


def test_backend_of_names_it(cuda_gpu: Any) -> None:
    assert backend_of("adapted_linear", "cpu") == "cuda"
    assert backend_of("philox_dropout", "cpu") == "triton"
