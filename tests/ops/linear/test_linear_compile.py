"""The adapted linear under torch.compile and autocast."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import peft_kernels as pk
from factories import WEIGHTS, make_problem

pytestmark = pytest.mark.usefixtures("fresh_compiler")

EXACT_SCALING = -2.0  # torch.compile multiplies it into lora_b: a power of two brings no rounding
EACH_WEIGHT = pytest.mark.parametrize("weight", WEIGHTS)


@EACH_WEIGHT
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compile_equals_eager(weight: str, dynamic: bool, dropout_p: float) -> None:
    compiled = torch.compile(
        pk.functional.adapted_linear, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for m in (4, 7):
        problem = make_problem(m, 12, 64, weight=weight, dropout_p=dropout_p)
        problem.scaling = EXACT_SCALING
        expected, grads = problem.run_with_gradients()
        leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
        x = leaves.pop("x")
        y = compiled(
            x, problem.weight, scaling=problem.scaling, dropout_p=dropout_p, seed=torch.tensor(1234), **leaves
        )
        assert torch.equal(y, expected)
        y.backward(problem.grad)
        for name, leaf in {"x": x, **leaves}.items():
            assert torch.equal(leaf.grad, grads[name]), name


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_compile_multiplies_scaling_into_lora_b(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """As eager mode does with a tensor, bit for bit, and in fp32 within the bounds of eager mode."""
    problem = make_problem(5, 12, 64, dtype=dtypes[0], adapter_dtype=dtypes[1])
    problem.scaling = 0.7
    compiled = torch.compile(problem.run, fullgraph=True, backend="aot_eager")
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
    results = []
    y = compiled(**leaves)
    results.append((y, *torch.autograd.grad(y, list(leaves.values()), problem.grad)))
    if dtypes[1] == torch.float32:
        problem.check(y.detach())
        problem.check_gradients(dict(zip(leaves, results[0][1:], strict=True)))
    problem.scaling = torch.tensor(0.7)
    y = problem.run(**leaves)
    results.append((y, *torch.autograd.grad(y, list(leaves.values()), problem.grad)))
    for name, got, expected in zip(("y", *leaves), *results, strict=True):
        assert torch.equal(got, expected), name


def test_any_scaling_runs_in_two_graphs() -> None:
    problem = make_problem(5, 12, 64, parts=["lora"])
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
    compiled = torch.compile(pk.functional.adapted_linear, fullgraph=True, backend="aot_eager")
    counters["stats"].clear()
    for scaling in (1.0, 2.0, 0.5, 0.25, -4.0, 8.0):
        problem.scaling = scaling
        expected = problem.run(**leaves)
        y = compiled(
            leaves["x"], problem.weight, lora_a=leaves["lora_a"], lora_b=leaves["lora_b"], scaling=scaling
        )
        assert torch.equal(y, expected)
        for got, grad in zip(
            torch.autograd.grad(y, list(leaves.values()), problem.grad),
            torch.autograd.grad(expected, list(leaves.values()), problem.grad),
            strict=True,
        ):
            assert torch.equal(got, grad)
    assert counters["stats"]["unique_graphs"] <= 2


def test_compile_draws_a_new_mask_each_call_and_follows_the_seed() -> None:
    problem = make_problem(16, 12, 64, parts=["lora"], dropout_p=0.5)
    problem.seed = None
    compiled = torch.compile(problem.run, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    first, second = compiled(), compiled()
    torch.manual_seed(4)
    assert torch.equal(compiled(), first)
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_compile_with_inductor() -> None:
    problem = make_problem(6, 12, 64, weight="nf4_double", dropout_p=0.3)
    w, t = problem.weight, problem.tensors

    def block(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = pk.functional.nf4_lora_linear(x * 2, w, a, b, 2.0, dropout_p=0.3, seed=5)
        return torch.nn.functional.gelu(y) + 1

    results = []
    for function in (block, torch.compile(block, fullgraph=True)):
        leaves = [t[name].detach().clone().requires_grad_() for name in ("x", "lora_a", "lora_b")]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, problem.grad)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)  # inductor's gelu rounds differently


@EACH_WEIGHT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_x_and_a_dense_weight(backend: str, weight: str, dtype: torch.dtype) -> None:
    """As F.linear does; the adapter stays in fp32, and the sums too."""
    problem = make_problem(5, 12, 64, weight=weight, parts=["lora", "bias"], dropout_p=0.2)
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
    with torch.autocast("cpu", dtype):
        y = problem.run(**leaves)
        linear = torch.nn.functional.linear(leaves["x"], torch.randn(12, 64))
    assert y.dtype == linear.dtype == dtype
    y.backward(problem.grad.to(dtype))

    by_hand = make_problem(5, 12, 64, weight=weight, parts=["lora", "bias"], dropout_p=0.2)
    by_hand.tensors["x"], by_hand.grad = by_hand.tensors["x"].to(dtype), problem.grad.to(dtype)
    if weight == "dense":
        by_hand.weight = by_hand.weight.to(dtype)
    expected, grads = by_hand.run_with_gradients()
    assert torch.equal(y, expected)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, grads[name].float()), name


def test_autocast_does_not_reach_inside(backend: str) -> None:
    """Backward, too, sums in fp32 when it runs under autocast."""
    problem = make_problem(5, 12, 64, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    expected, grads = problem.run_with_gradients()
    with torch.autocast("cpu", torch.bfloat16):
        y, under_autocast = problem.run_with_gradients()
    assert torch.equal(y, expected)
    for name, grad in grads.items():
        assert torch.equal(under_autocast[name], grad), name


def test_autocast_leaves_float64_alone() -> None:
    problem = make_problem(5, 12, 64, dtype=torch.float64)
    expected = problem.run()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(problem.run(), expected)


@EACH_WEIGHT
def test_compile_under_autocast(weight: str) -> None:
    problem = make_problem(5, 12, 64, weight=weight, parts=["lora"])
    problem.scaling = EXACT_SCALING

    def call() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return problem.run()

    y = torch.compile(call, fullgraph=True, backend="aot_eager")()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, call())


def test_compile_in_float64() -> None:
    problem = make_problem(5, 12, 64, dtype=torch.float64, dropout_p=0.3)
    problem.scaling = EXACT_SCALING
    compiled = torch.compile(problem.run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), problem.run())


def test_export() -> None:
    holder, x = Model(), torch.randn(2, 64)
    exported = torch.export.export(holder, (x,)).module()
    assert torch.equal(exported(x), holder(x))


def test_meta_tensors_give_shapes() -> None:
    problem = make_problem(5, 12, 64, parts=["lora"])
    on_meta = {name: t.to("meta").requires_grad_() for name, t in problem.tensors.items()}
    problem.weight = problem.weight.to("meta")
    y = problem.run(**on_meta)
    assert (y.shape, y.device.type) == ((5, 12), "meta")
    (dx,) = torch.autograd.grad(y.sum(), on_meta["x"])
    assert dx.shape == (5, 64)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = pk.functional.nf4_quantize(torch.randn(32, 64), double_quant=True)
        self.a = torch.nn.Parameter(torch.randn(4, 64))
        self.b = torch.nn.Parameter(torch.randn(32, 4))

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        return pk.functional.nf4_lora_linear(x, self.w, self.a, self.b, 0.5, **options)


def test_compiled_module_trains() -> None:
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64)
    model(x, dropout_p=0.5, seed=1).sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    compiled(x, dropout_p=0.5, seed=1).sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)
