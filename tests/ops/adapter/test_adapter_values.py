"""The bottleneck adapter against float64: results and every gradient, for all options, shapes and dtypes."""

import itertools
import math
import random

import pytest
import torch
from adapter_problems import NAMES, make_problem

import peft_kernels as pk
from peft_kernels.core.backend import use_backend
from peft_kernels.core.library import native_library
from peft_kernels.ops.adapter.schema import ACTIVATIONS

F = torch.nn.functional
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
PARTS = ("down_bias", "up_bias", "scale", "gate", "residual")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_activation(backend: str, activation: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    dtype, parameter_dtype = dtypes
    problem = make_problem(
        37, 96, 18, 70, dtype=dtype, parameter_dtype=parameter_dtype, activation=activation, dropout_p=0.3
    )
    problem.check(*problem.run_with_gradients())


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (1, 300, 5, 33), (5, 17, 300, 64), (300, 40, 33, 260), (530, 64, 8, 64)]
)
def test_sizes_that_are_no_whole_blocks(backend: str, sizes: tuple[int, int, int, int]) -> None:
    problem = make_problem(*sizes, activation="silu")
    problem.check(*problem.run_with_gradients())


@pytest.mark.parametrize("count", range(len(PARTS) + 1))
def test_every_subset_of_the_optional_parts(backend: str, count: int) -> None:
    for parts in itertools.combinations(PARTS, count):
        problem = make_problem(9, 40, 7, parts=parts, activation="tanh", dropout_p=0.2)
        problem.check(*problem.run_with_gradients())


def test_random_problems(backend: str) -> None:
    choose = random.Random(0)
    for seed in range(40):
        dtype, parameter_dtype = choose.choice(DTYPES)
        d = choose.randint(1, 150)
        same = choose.random() < 0.5
        n = d if same else choose.randint(1, 150)
        problem = make_problem(
            choose.randint(1, 90), d, choose.randint(1, 70), n,
            dtype=dtype, parameter_dtype=parameter_dtype, seed=seed,
            parts=tuple(part for part in PARTS if choose.random() < 0.6),
            scale_size=choose.choice([1, n]), activation=choose.choice(ACTIVATIONS),
            dropout_p=choose.choice([0.0, 0.3]),
        )  # fmt: skip
        if same and "residual" not in problem.tensors:
            problem.residual_is_hidden = choose.random() < 0.7
        problem.check(*problem.run_with_gradients())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residual_that_is_hidden_itself(backend: str, dtype: torch.dtype) -> None:
    problem = make_problem(20, 48, 6, parts=("down_bias",), dtype=dtype, residual_is_hidden=True)
    out, grads = problem.run_with_gradients()
    problem.check(out, grads)
    apart = make_problem(20, 48, 6, parts=("down_bias",), dtype=dtype)
    apart.tensors["residual"] = problem.tensors["hidden"].clone()
    assert torch.equal(apart.run(), out)


def test_a_wide_residual_makes_a_wide_result(backend: str) -> None:
    problem = make_problem(9, 40, 7, dtype=torch.bfloat16)
    problem.tensors["residual"], problem.grad = problem.tensors["residual"].float(), problem.grad.float()
    out, grads = problem.run_with_gradients()
    assert out.dtype == torch.float32
    assert grads["residual"].dtype == torch.float32
    assert grads["hidden"].dtype == torch.bfloat16
    problem.check(out, grads)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("used", [s for k in (1, 2, 3) for s in itertools.combinations(range(3), k)])
def test_down_and_up_are_differentiable(backend: str, used: tuple[int, ...], gated: bool) -> None:
    """As in AdapterFusion, which uses `up` alone; against torch's autograd on the formula, in float64."""
    parts = ("down_bias", "up_bias", "scale", *(["gate"] if gated else []))
    problem = make_problem(6, 24, 5, parts=parts, dtype=torch.float64, dropout_p=0.4 * gated)
    weights = [torch.randn(6, size, dtype=torch.float64) for size in (24, 5, 24)]
    names = list(problem.tensors)
    leaves = {name: problem.tensors[name].requires_grad_() for name in names}
    down = F.gelu(F.linear(leaves["hidden"], leaves["down_weight"], leaves["down_bias"]))
    up = F.linear(down, leaves["up_weight"], leaves["up_bias"]) * leaves["scale"]
    out = up
    if gated:
        keep = pk.functional.philox_dropout_mask(up.shape, 0.4, 1234)
        out = up * keep * torch.tensor(1 / 0.6, dtype=torch.float32) * leaves["gate"]

    def loss(results: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return sum((results[i] * weights[i]).sum() for i in used)

    expected = torch.autograd.grad(loss((out, down, up)), list(leaves.values()), allow_unused=True)
    got = torch.autograd.grad(loss(problem.run_all()), list(leaves.values()), allow_unused=True)
    for name, one, two in zip(names, got, expected, strict=True):
        if two is None:
            assert one is None or not one.any(), name
        else:
            torch.testing.assert_close(one, two, msg=name)
    # and in float32, on the backend under test
    single = make_problem(6, 24, 5, parts=parts, dropout_p=0.4 * gated)
    ours = {name: single.tensors[name].requires_grad_() for name in names}
    got = torch.autograd.grad(
        sum((result * weights[i].float()).sum() for i, result in enumerate(single.run_all()) if i in used),
        list(ours.values()), allow_unused=True,
    )  # fmt: skip
    for name, one, two in zip(names, got, expected, strict=True):
        if two is not None and one is not None:
            torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-5, msg=name)


def test_down_and_up_are_what_out_is_made_of(backend: str) -> None:
    problem = make_problem(7, 24, 5, parts=("down_bias", "up_bias", "scale"))
    out, down, up = problem.run_all()
    assert torch.equal(out, up)
    assert torch.equal(out, problem.run())
    t = problem.tensors
    torch.testing.assert_close(down, F.gelu(F.linear(t["hidden"], t["down_weight"], t["down_bias"])))
    assert problem.run_all(need_down=False)[1] is None
    assert problem.run_all(need_up=False)[2] is None


def test_dropout_is_that_of_philox_on_up(backend: str) -> None:
    problem = make_problem(7, 24, 5, parts=("up_bias",), dropout_p=0.5)
    out, _, up = problem.run_all()
    torch.testing.assert_close(out, pk.functional.philox_dropout(up, 0.5, problem.seed))


def test_gate_of_a_sequence(backend: str) -> None:
    hidden, gate = torch.randn(2, 5, 24), torch.rand(2, 1, 1, requires_grad=True)
    problem = make_problem(10, 24, 5, parts=())
    out = problem.run(hidden=hidden, gate=gate)
    torch.testing.assert_close(out, problem.run(hidden=hidden) * gate)
    out.sum().backward()
    torch.testing.assert_close(gate.grad, problem.run(hidden=hidden).sum((1, 2), keepdim=True))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_layer_norms(backend: str, before: bool, inside: bool) -> None:
    t = make_problem(6, 24, 5, parts=("down_bias", "residual")).tensors
    norm = (torch.randn(24), torch.randn(24), 1e-5)
    option = {"ln_before": norm} if before else {"ln_after": norm, "adapter_residual_before_ln": inside}
    got = pk.functional.bottleneck_adapter(
        t["hidden"], t["down_weight"], t["down_bias"], t["up_weight"], None,
        activation="relu", residual=t["residual"], **option,
    )  # fmt: skip
    normed = F.layer_norm(t["hidden"], (24,), *norm) if before else t["hidden"]
    up = F.linear(torch.relu(F.linear(normed, t["down_weight"], t["down_bias"])), t["up_weight"])
    if before:
        expected = up + t["residual"]
    elif inside:
        expected = F.layer_norm(up + t["residual"], (24,), *norm)
    else:
        expected = F.layer_norm(up, (24,), *norm) + t["residual"]
    torch.testing.assert_close(got, expected)


def test_a_callable_activation_is_composed_of_torch_ops(backend: str) -> None:
    problem = make_problem(7, 24, 5, dropout_p=0.3)
    expected, grads = problem.run_with_gradients()
    problem.activation = F.gelu
    out, composed = problem.run_with_gradients()
    torch.testing.assert_close(out, expected)
    for name, grad in composed.items():
        torch.testing.assert_close(grad, grads[name], msg=name)
    problem.activation = F.mish
    assert problem.run_with_gradients()[0].isfinite().all()


def test_no_tokens(backend: str) -> None:
    problem = make_problem(0, 24, 5)
    out, grads = problem.run_with_gradients()
    assert out.shape == (0, 24)
    for name, grad in grads.items():
        assert grad.shape == problem.tensors[name].shape
        assert not grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_stays_in_its_row(backend: str, activation: str, bad: float) -> None:
    problem = make_problem(20, 24, 5, parts=("down_bias",), activation=activation)
    problem.tensors["down_weight"] = problem.tensors["down_weight"].abs()
    expected = problem.run()
    hidden = problem.tensors["hidden"].clone()
    hidden[7, 3] = bad
    out = problem.run(hidden=hidden)
    others = torch.arange(20) != 7
    assert torch.equal(out[others], expected[others])
    saturates = activation == "tanh" or (bad == -math.inf and activation == "relu")
    assert saturates == bool(out[7].isfinite().all()) or math.isnan(bad)
    if math.isnan(bad):
        assert out[7].isnan().all()


def test_strides_do_not_matter(backend: str) -> None:
    problem = make_problem(12, 24, 5)
    expected, grads = problem.run_with_gradients()
    problem.tensors = {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
        for name, tensor in problem.tensors.items()
    }
    problem.grad = problem.grad.t().contiguous().t()
    out, strided = problem.run_with_gradients()
    torch.testing.assert_close(out, expected)  # the reference's GEMM may sum in another order
    for name, grad in strided.items():
        torch.testing.assert_close(grad, grads[name], msg=name)


def test_inputs_are_left_alone(backend: str) -> None:
    problem = make_problem(12, 24, 5, dropout_p=0.3)
    before = {name: tensor.clone() for name, tensor in problem.tensors.items()}
    grad = problem.grad.clone()
    problem.run_with_gradients()
    assert torch.equal(problem.grad, grad)
    for name, tensor in problem.tensors.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.skipif(not native_library().loaded, reason="native library not loaded")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 64, 8), (70, 130, 40), (700, 96, 24)])
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    problem = make_problem(*sizes, dtype=dtype, dropout_p=0.2)
    expected, grads = problem.run_with_gradients()
    for threads in (2, 7, 3, 1):
        torch.set_num_threads(threads)
        out, others = problem.run_with_gradients()
        assert torch.equal(out, expected), threads
        for name in NAMES:
            assert torch.equal(others[name], grads[name]), (name, threads)


@pytest.mark.skipif(not native_library().loaded, reason="native library not loaded")
def test_backends_agree_on_dropout_and_scale() -> None:
    problem = make_problem(33, 64, 8, dropout_p=0.5)
    native = problem.run()
    with use_backend("reference"):
        torch.testing.assert_close(native, problem.run())
