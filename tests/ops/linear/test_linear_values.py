"""Results and gradients of the adapted linear against float64, over weights, dtypes, shapes and parts."""

import math

import pytest
import torch

import peft_kernels as pk
from factories import PARTS, WEIGHTS, Problem, make_problem

DTYPES = (  # of x, of the adapter
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
)
SHAPES = (  # M, N, K: odd N, K no multiple of the blocksize, one and no token, more than one panel
    (0, 8, 64),
    (1, 16, 64),
    (1, 33, 257),
    (3, 33, 80),
    (17, 97, 65),
    (5, 1, 33),
    (2, 2, 1),
    (40, 130, 200),
)
EACH_WEIGHT = pytest.mark.parametrize("weight", WEIGHTS)


def check(problem: Problem) -> None:
    y, grads = problem.run_with_gradients()
    problem.check(y)
    problem.check_gradients(grads)
    with torch.no_grad():
        assert torch.equal(problem.run(), y)


@EACH_WEIGHT
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_against_float64(
    backend: str, weight: str, dtypes: tuple[torch.dtype, torch.dtype], dropout_p: float
) -> None:
    dtype, adapter_dtype = dtypes
    for m, n, k in SHAPES:
        check(
            make_problem(
                m, n, k, weight=weight, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p
            )
        )


@EACH_WEIGHT
@pytest.mark.parametrize(
    "parts", [[], ["lora"], *([part] for part in PARTS[1:]), ["lora", "bias"]], ids="+".join
)
def test_every_part_alone(backend: str, weight: str, parts: list[str]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(make_problem(6, 20, 96, weight=weight, parts=parts, dtype=dtype))


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 33, 64])
def test_ranks(backend: str, rank: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(make_problem(5, 40, 96, r=rank, dtype=dtype, dropout_p=0.2))


@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("weight", ["nf4", "nf4_double"])
def test_blocksizes(backend: str, weight: str, blocksize: int) -> None:
    for n, k in ((24, 96), (7, 4160), (3, 45)):
        check(make_problem(3, n, k, weight=weight, blocksize=blocksize))


@pytest.mark.parametrize("m", [1, 2, 7, 16, 31, 64, 130, 300])
def test_numbers_of_tokens(backend: str, m: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(make_problem(m, 66, 130, dtype=dtype, dropout_p=0.1))


@EACH_WEIGHT
def test_more_than_one_panel(backend: str, weight: str) -> None:
    check(make_problem(33, 700, 2100, r=8, weight=weight, dropout_p=0.1))


@EACH_WEIGHT
@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_any_strides(backend: str, weight: str, view: str) -> None:
    problem = make_problem(6, 10, 66, weight=weight, dropout_p=0.3)

    def restride(t: torch.Tensor) -> torch.Tensor:
        if view == "transposed":
            return t.t().contiguous().t() if t.dim() == 2 else t
        if view == "strided":
            return t.repeat_interleave(2, dim=-1)[..., ::2]
        return t[:1].expand_as(t)

    problem.tensors = {name: restride(t) for name, t in problem.tensors.items()}
    problem.grad = restride(problem.grad)
    if isinstance(problem.weight, torch.Tensor):
        problem.weight = restride(problem.weight)
        problem.exact_weight = problem.weight.double()
    check(problem)


@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 3, 64), (2, 0, 64), (2, 3, 4, 64)], ids=str)
def test_leading_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    m = math.prod(shape[:-1])
    problem = make_problem(m, 12, 64, dropout_p=0.3)
    x = problem.tensors["x"].reshape(shape).requires_grad_()
    y = problem.run(x=x)
    assert y.shape == (*shape[:-1], 12)
    (dx,) = torch.autograd.grad(y, x, problem.grad.reshape(y.shape))
    expected, grads = problem.run_with_gradients(["x"])
    assert torch.equal(y.reshape(m, 12), expected)
    assert torch.equal(dx.reshape(m, 64), grads["x"])


@pytest.mark.parametrize("double_quant", [False, True])
def test_special_cases_are_the_general_call(backend: str, double_quant: bool) -> None:
    functional, p = pk.functional, make_problem(5, 12, 64, weight="nf4_double" if double_quant else "nf4")
    x, a, b, bias = (p.tensors[name] for name in ("x", "lora_a", "lora_b", "bias"))
    dense = torch.randn(12, 64)
    general = functional.adapted_linear
    assert torch.equal(functional.nf4_linear(x, p.weight, bias), general(x, p.weight, bias=bias))
    lora = {"lora_a": a, "lora_b": b, "scaling": 0.5, "bias": bias, "dropout_p": 0.2, "seed": 9}
    assert torch.equal(
        functional.nf4_lora_linear(x, p.weight, a, b, 0.5, bias, 0.2, 9), general(x, p.weight, **lora)
    )
    assert torch.equal(functional.lora_linear(x, dense, a, b, 0.5, bias, 0.2, 9), general(x, dense, **lora))


def test_output_does_not_depend_on_the_other_tokens(backend: str) -> None:
    """Within rounding: token by token gives what all at once gives. (bitsandbytes on CUDA does not.)"""
    problem = make_problem(37, 48, 96, dtype=torch.bfloat16)
    y = problem.run()
    for token in range(37):
        row = make_problem(37, 48, 96, dtype=torch.bfloat16)
        row.tensors["x"], row.grad = row.tensors["x"][token : token + 1], row.grad[token : token + 1]
        row.check(y[token : token + 1])
        row.check(row.run())


def test_scaling_tensor_gives_the_same_and_gets_a_gradient(backend: str) -> None:
    problem = make_problem(4, 12, 64, dtype=torch.float64, parts=["lora"])
    scaling = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    t = problem.tensors
    call = pk.functional.nf4_lora_linear
    y = call(t["x"], problem.weight, t["lora_a"], t["lora_b"], scaling)
    torch.testing.assert_close(y, call(t["x"], problem.weight, t["lora_a"], t["lora_b"], 0.7))
    (grad,) = torch.autograd.grad(y, scaling, problem.grad)
    low_rank = t["x"] @ t["lora_a"].t() @ t["lora_b"].t()
    torch.testing.assert_close(grad, (problem.grad * low_rank).sum().reshape(1))


@EACH_WEIGHT
def test_inputs_are_not_changed(backend: str, weight: str) -> None:
    problem = make_problem(5, 12, 64, weight=weight, dropout_p=0.3)
    base = list(problem.weight.base_weight()[:5]) if weight != "dense" else [problem.weight]
    inputs = [*problem.tensors.values(), problem.grad, *(t for t in base if t is not None)]
    before = [t.clone() for t in inputs]
    problem.run_with_gradients()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
