"""IA3: results and gradients against float64 in both forms, and that it is at home in torch."""

import re
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from factories import WEIGHTS, Problem, make_problem
from numerics import Tensors, assert_within, bound, gamma, gradients

ia3_linear = pk.functional.ia3_linear
EACH_WEIGHT = pytest.mark.parametrize("weight", WEIGHTS)
EACH_FORM = pytest.mark.parametrize("feedforward", [False, True], ids=["output", "feedforward"])
DTYPES = (  # of x, of l and bias
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float64),
)
# Besides the last, the roundings to the dtype of a 16-bit x that a term may pass: for y, x * l and the GEMM's
# result, or the weight; for dx, l * g and the same; for dl those two, z or the sum of g, and its product.
ROUNDINGS = 4


class IA3:
    """A call of `ia3_linear`, and its meaning in float64."""

    def __init__(self, m: int, n: int, k: int, feedforward: bool, **kwargs: Any) -> None:
        scale = "input_scale" if feedforward else "column_scale"
        self.problem: Problem = make_problem(m, n, k, parts=[scale, "bias"], **kwargs)
        self.tensors = dict(self.problem.tensors)
        self.tensors["ia3_l"] = self.tensors.pop(scale)
        self.grad, self.weight, self.feedforward = self.problem.grad, self.problem.weight, feedforward

    def run(self, **overrides: torch.Tensor) -> torch.Tensor:
        t = self.tensors | overrides
        return ia3_linear(t["x"], self.weight, t["ia3_l"], t.get("bias"), self.feedforward)

    def formula(self, t: Tensors, weight: torch.Tensor) -> torch.Tensor:
        x, vector, bias = (t[name].double() for name in ("x", "ia3_l", "bias"))
        if self.feedforward:
            return (x * vector) @ weight.t() + bias
        return (x @ weight.t() + bias) * vector

    def run_with_gradients(self) -> Tensors:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        y = self.run(**leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), self.grad)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    def check(self, results: Tensors) -> None:
        weight, dtype = self.problem.exact_weight, self.grad.dtype
        absolute = {name: tensor.abs() for name, tensor in self.tensors.items()}
        exact = {
            "y": self.formula(self.tensors, weight),
            **gradients(lambda t: self.formula(t, weight), self.tensors, self.grad),
        }
        magnitude = {
            "y": self.formula(absolute, weight.abs()),
            **gradients(lambda t: self.formula(t, weight.abs()), absolute, self.grad.abs()),
        }
        n = (
            sum(self.grad.shape) + weight.shape[1] + 8
        )  # products and sums that a term passes, over M, N and K
        for name, result in results.items():
            assert result.dtype == (dtype if name == "y" else self.tensors[name].dtype), name
            allowed = bound(exact[name], magnitude[name], n, result.dtype)
            if dtype.itemsize == 2:
                allowed = allowed + gamma(ROUNDINGS, dtype) * magnitude[name]
            assert_within(name, result, exact[name], allowed)


@EACH_WEIGHT
@EACH_FORM
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
def test_against_float64(
    backend: str, weight: str, feedforward: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    dtype, adapter_dtype = dtypes
    for m, n, k in (
        (0, 8, 64),
        (1, 16, 64),
        (1, 33, 257),
        (17, 97, 65),
        (40, 130, 192),
        (5, 1, 33),
        (2, 2, 1),
    ):
        ia3 = IA3(m, n, k, feedforward, weight=weight, dtype=dtype, adapter_dtype=adapter_dtype)
        ia3.check(ia3.run_with_gradients())


@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_tokens_than_a_dense_product_takes_at_a_time(
    backend: str, feedforward: bool, dtype: torch.dtype
) -> None:
    ia3 = IA3(1537, 9, 12, feedforward, weight="dense", dtype=dtype)
    ia3.check(ia3.run_with_gradients())


@EACH_WEIGHT
@EACH_FORM
def test_gradcheck_in_float64(weight: str, feedforward: bool) -> None:
    ia3 = IA3(3, 5, 33, feedforward, weight=weight, blocksize=32, dtype=torch.float64)
    names = list(ia3.tensors)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return ia3.run(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, [ia3.tensors[name].requires_grad_() for name in names])


@EACH_WEIGHT
@EACH_FORM
@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_any_strides(backend: str, weight: str, feedforward: bool, view: str) -> None:
    def restride(t: torch.Tensor) -> torch.Tensor:
        if view == "transposed":
            return t.t().contiguous().t() if t.dim() == 2 else t
        return t.repeat_interleave(2, dim=-1)[..., ::2] if view == "strided" else t[:1].expand_as(t)

    ia3 = IA3(6, 10, 66, feedforward, weight=weight)
    ia3.tensors = {name: restride(t) for name, t in ia3.tensors.items()}
    ia3.grad = restride(ia3.grad)
    ia3.check(ia3.run_with_gradients())


@EACH_WEIGHT
@EACH_FORM
def test_shapes_of_peft(backend: str, weight: str, feedforward: bool) -> None:
    """l as [N, 1] or [1, K] gives the same bits, and gets a gradient of its shape."""
    ia3 = IA3(4, 12, 64, feedforward, weight=weight)
    flat = ia3.run_with_gradients()
    ia3.tensors["ia3_l"] = ia3.tensors["ia3_l"].reshape((1, 64) if feedforward else (12, 1))
    shaped = ia3.run_with_gradients()
    for name, value in flat.items():
        assert shaped[name].shape == (ia3.tensors["ia3_l"].shape if name == "ia3_l" else value.shape)
        assert torch.equal(shaped[name].flatten(), value.flatten())


def test_the_bias_is_multiplied_in_fp32(backend: str) -> None:
    """x = 0 leaves bias * l, rounded once."""
    x, weight = torch.zeros(1, 32).bfloat16(), torch.zeros(500, 32).bfloat16()
    bias, vector = torch.randn(500).bfloat16(), torch.randn(500)
    y = pk.functional.ia3_linear(x, weight, vector, bias)
    assert torch.equal(y[0], (bias.float() * vector).bfloat16())


@EACH_FORM
def test_leading_dimensions_and_no_bias(backend: str, feedforward: bool) -> None:
    ia3 = IA3(6, 12, 64, feedforward)
    x, vector = ia3.tensors["x"], ia3.tensors["ia3_l"]
    y = ia3_linear(x.reshape(2, 3, 64), ia3.weight, vector, feedforward=feedforward)
    assert y.shape == (2, 3, 12)
    zero = ia3.run(bias=torch.zeros(12))
    assert torch.equal(y.reshape(6, 12), zero)


@EACH_WEIGHT
@EACH_FORM
def test_only_what_the_gradient_of_l_needs_is_saved(backend: str, weight: str, feedforward: bool) -> None:
    """x W^T where outputs are scaled, the caller's own x where inputs are; nothing where l is frozen."""
    ia3 = IA3(32, 24, 64, feedforward, weight=weight, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    frozen = ia3.weight.base_weight()[:5] if isinstance(ia3.weight, pk.NF4Weight) else (ia3.weight,)
    known = {t.data_ptr() for t in frozen if t is not None}
    for trained in (False, True):
        x, vector = ia3.tensors["x"].detach().requires_grad_(), ia3.tensors["ia3_l"].requires_grad_(trained)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t) or t, lambda t: t):
            ia3_linear(x, ia3.weight, vector, None, feedforward)
        large = [t for t in saved if t.numel() > 64 and t.data_ptr() not in known]
        assert [t.nbytes for t in large] == ([32 * (64 if feedforward else 24) * 2] if trained else [])
        assert not feedforward or all(t.data_ptr() == x.data_ptr() for t in large)


@EACH_WEIGHT
@EACH_FORM
def test_compile_autocast_and_inference_mode(weight: str, feedforward: bool, fresh_compiler: None) -> None:
    ia3 = IA3(5, 24, 64, feedforward, weight=weight)
    expected = ia3.run_with_gradients()
    compiled = torch.compile(ia3_linear, fullgraph=True, backend="aot_eager")
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in ia3.tensors.items()}
    y = compiled(leaves["x"], ia3.weight, leaves["ia3_l"], leaves["bias"], feedforward)
    grads = torch.autograd.grad(y, list(leaves.values()), ia3.grad)
    for name, value in {"y": y, **dict(zip(leaves, grads, strict=True))}.items():
        assert torch.equal(value.detach(), expected[name]), name
    with torch.inference_mode():
        y = ia3.run()
    assert y.is_inference()
    assert torch.equal(y, expected["y"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ia3.run()
    assert y.dtype == torch.bfloat16
    magnitude = ia3.formula(
        {name: t.abs() for name, t in ia3.tensors.items()}, ia3.problem.exact_weight.abs()
    )
    exact = ia3.formula(ia3.tensors, ia3.problem.exact_weight)
    # x and a dense weight were rounded once more than in a call with bf16 tensors.
    assert_within("y", y, exact, gamma(ROUNDINGS + 3, torch.bfloat16) * magnitude)


@EACH_WEIGHT
@EACH_FORM
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(backend: str, weight: str, feedforward: bool, use_reentrant: bool) -> None:
    ia3 = IA3(5, 12, 64, feedforward, weight=weight)
    expected = ia3.run_with_gradients()
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in ia3.tensors.items()}
    y = checkpoint(lambda x: ia3.run(**{**leaves, "x": x}), leaves["x"], use_reentrant=use_reentrant)
    y.backward(ia3.grad)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]), name


@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(feedforward: bool, dtype: torch.dtype) -> None:
    ia3 = IA3(300, 520, 640, feedforward, dtype=dtype)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ia3.run_with_gradients())
    for result in results[1:]:
        assert all(torch.equal(result[name], value) for name, value in results[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_over_tokens_of_a_dense_layer_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    """That of g; the products, z among them, are torch's."""
    ia3 = IA3(700, 40, 24, False, weight="dense", dtype=dtype)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        bias = ia3.tensors["bias"].detach().requires_grad_()
        results.append(torch.autograd.grad(ia3.run(bias=bias), bias, ia3.grad)[0])
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ia3_l": torch.ones(64)},
            "ia3_l must be [N] or [N, 1] = [12] without feedforward, got [64]; pass the vector made",
        ),
        ({"ia3_l": torch.ones(1, 12)}, "ia3_l must be [N] or [N, 1] = [12] without feedforward, got [1, 12]"),
        (
            {"ia3_l": torch.ones(12, 1), "feedforward": True},
            "ia3_l must be [K] or [1, K] = [64] with feedforward, got [12, 1]",
        ),
        ({"ia3_l": torch.ones(12).half()}, "ia3_l must be float32, got float16; convert it"),
        ({"bias": torch.ones(1)}, "bias must be [N] = [12], got [1]"),
        ({"bias": torch.ones(12, 12)}, "bias must be [N] = [12], got [12, 12]"),
        ({"x": torch.ones(4, 65)}, "x must be [..., K] = [..., 64], got [4, 65]"),
        ({"weight": torch.ones(12, 64, requires_grad=True)}, "weight must be frozen, got requires_grad=True"),
    ],
)
def test_bad_input(backend: str, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(4, 64),
        "weight": torch.ones(12, 64),
        "ia3_l": torch.ones(12),
        **change,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        ia3_linear(**arguments)


@pytest.mark.parametrize("name", ["x", "weight", "ia3_l", "bias"])
def test_refuses_what_is_no_tensor(name: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.ones(4, 64),
        "weight": torch.ones(12, 64),
        "ia3_l": torch.ones(12),
        "bias": torch.ones(12),
    }
    with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got list; "):
        ia3_linear(**{**arguments, name: [1.0]})
