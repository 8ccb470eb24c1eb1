"""NF4 linear on activations rounded to int8: its error, its bits, and what it refuses."""

import re
from typing import Any

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import peft_kernels as pk
from numerics import assert_within, gamma, smallest, unit_roundoff
from peft_kernels.core.backend import backend_of
from peft_kernels.ops.linear.reference import INT8_GROUP, INT8_LEVEL_SCALE
from peft_kernels.ops.linear.schema import Int8Args
from peft_kernels.ops.nf4.reference import dequantize_absmax, nf4_code

OP = torch.ops.peft_kernels.nf4_linear_int8
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
DOUBLE = pytest.mark.parametrize("double_quant", [False, True])
SHAPES = (  # M, N, K, blocksize
    (0, 8, 64, 64),
    (1, 1, 1, 64),
    (1, 33, 64, 64),
    (3, 40, 192, 32),  # two blocks of the weight in a group
    (4, 16, 1024, 64),
    (5, 70, 320, 128),  # blocks that cross rows, in whole groups
    (13, 33, 96, 32),  # a last group of half the size
    (7, 19, 100, 64),  # blocks that cross rows within groups
    (2, 5, 577, 32),
    (30, 130, 640, 4096),
)


def make(
    m: int,
    n: int,
    k: int,
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
    double_quant: bool = False,
) -> tuple[torch.Tensor, pk.NF4Weight, torch.Tensor]:
    """x, a weight and a bias."""
    weight = pk.functional.nf4_quantize(torch.randn(n, k) / k**0.5, blocksize, double_quant)
    return torch.randn(m, k).to(dtype), weight, torch.randn(n).to(dtype)


def int8_linear(x: torch.Tensor, w: pk.NF4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    return pk.functional.nf4_linear(x, w, bias, activation="int8")


def arguments(x: torch.Tensor, w: pk.NF4Weight, bias: torch.Tensor | None) -> Int8Args:
    return Int8Args(x, *w.base_weight(), w.shape[0], bias)


def bound(x: torch.Tensor, w: pk.NF4Weight, bias: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """What the error of y = x W^T + bias cannot exceed; ops/linear/README.md derives it.

    With A the largest magnitude of an input's group and d the largest error of a level,

        |error| <= sum_k (A / 254 |w| + d absmax (|x| + A / 254)) + rounding

    where rounding is that of `numerics.bound` for sums over K/32 segments (a group has two at most, or as
    many as it has blocks), in each of which a term passes 3 roundings of its value and 4 of its product.
    """
    (n, k), dtype, x = w.shape, x.dtype, x.double()
    groups = torch.nn.functional.pad(x, (0, -k % INT8_GROUP)).unflatten(1, (-1, INT8_GROUP))
    half_step = (groups.abs().amax(2) / 254).repeat_interleave(INT8_GROUP, 1)[:, :k]
    weight = w.dequantize(torch.float32).double().abs()
    absmax = dequantize_absmax(w.base_weight()).repeat_interleave(w.blocksize)[: n * k].reshape(n, k).double()
    code = nf4_code(x.device).double()
    level_error = (torch.round(code * INT8_LEVEL_SCALE) / INT8_LEVEL_SCALE - code).abs().max()
    rounded = half_step @ weight.t() + level_error * ((x.abs() + half_step) @ absmax.t())
    magnitude = (x.abs() + half_step) @ (weight + level_error * absmax).t() + bias.double().abs()
    error = rounded + gamma(k // 32 + 4 + 7, torch.float32) * magnitude
    return error + unit_roundoff(dtype) * (exact.abs() + error) + smallest(dtype)


@DTYPES
@DOUBLE
def test_against_float64(backend: str, dtype: torch.dtype, double_quant: bool) -> None:
    for m, n, k, blocksize in SHAPES:
        x, w, bias = make(m, n, k, blocksize, dtype, double_quant)
        exact = x.double() @ w.dequantize(torch.float32).double().t() + bias.double()
        assert_within("y", int8_linear(x, w, bias), exact, bound(x, w, bias, exact))


def test_bound_is_sharp_enough_to_tell() -> None:
    """A bound that leaving out one of a thousand inputs would not break could not fail."""
    x, w, bias = make(8, 32, 1024)
    exact = x.double() @ w.dequantize(torch.float32).double().t() + bias.double()
    lost = x.clone()
    lost[:, 64:128] = 0
    with pytest.raises(AssertionError, match="times what rounding can cause"):
        assert_within("y", int8_linear(lost, w, bias), exact, bound(x, w, bias, exact))


@pytest.mark.parametrize(("outliers", "documented"), [(0.0, 0.008), (20.0, 0.014), (60.0, 0.019)])
def test_error_is_as_documented(backend: str, outliers: float, documented: float) -> None:
    """Root mean square of the error over that of the result; `outliers` scales six features of 4096."""
    x, w, _ = make(16, 256, 4096)
    if outliers:
        x[:, torch.randperm(4096)[:6]] *= outliers
    exact = x.double() @ w.dequantize(torch.float32).double().t()
    error = float((int8_linear(x, w).double() - exact).norm() / exact.norm())
    assert documented / 2 < error < documented


@DTYPES
@DOUBLE
def test_native_has_the_bits_of_the_reference(dtype: torch.dtype, double_quant: bool) -> None:
    if backend_of("nf4_linear_int8", "cpu") == "reference":
        pytest.skip("native library not loaded")
    for m, n, k, blocksize in SHAPES:
        for bias_dtype in (None, dtype, torch.float32):
            x, w, bias = make(m, n, k, blocksize, dtype, double_quant)
            args = arguments(x, w, None if bias_dtype is None else bias.to(bias_dtype))
            assert torch.equal(OP.default(*args), OP.reference(*args)), (m, n, k, blocksize)


def test_a_token_has_the_same_bits_alone(backend: str) -> None:
    for k, blocksize in ((320, 64), (96, 32), (100, 64)):
        x, w, bias = make(40, 50, k, blocksize)
        y = int8_linear(x, w, bias)
        for first, last in ((0, 1), (1, 4), (2, 13), (7, 37)):
            assert torch.equal(int8_linear(x[first:last], w, bias), y[first:last])


@pytest.mark.parametrize("threads", [2, 3])
def test_any_thread_count_gives_the_same_bits(backend: str, threads: int) -> None:
    for m, n, k in ((1, 700, 1088), (33, 700, 1088), (300, 40, 4096), (9, 100, 1001)):
        x, w, bias = make(m, n, k)
        torch.set_num_threads(1)
        y = int8_linear(x, w, bias)
        torch.set_num_threads(threads)
        assert torch.equal(int8_linear(x, w, bias), y)


@pytest.mark.parametrize("k", [256, 100])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_gives_nan_and_no_other_does(backend: str, value: float, k: int) -> None:
    for m in (2, 20):
        x, w, bias = make(m, 40, k)
        y = int8_linear(x, w, bias)
        x[1, 70] = value
        broken = int8_linear(x, w, bias)
        assert broken[1].isnan().all()
        broken[1] = y[1]
        assert torch.equal(broken, y)


@pytest.mark.parametrize("k", [128, 100])
def test_zeros_and_the_ends_of_the_range(backend: str, k: int) -> None:
    x, w, bias = make(6, 40, k)
    x[0] = 0
    x[1] *= 1e-39  # too small to be scaled to 127: counts as zero
    x[2] *= 1e30
    x[3, :64] = torch.tensor(1e-30)
    exact = x.double() @ w.dequantize(torch.float32).double().t() + bias.double()
    y = int8_linear(x, w, bias)
    assert torch.equal(y[0], bias)
    assert_within("y", y, exact, bound(x, w, bias, exact))


@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 3, 64), (2, 0, 64)], ids=str)
def test_leading_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    _, w, bias = make(1, 12, 64)
    x = torch.randn(shape)
    y = int8_linear(x, w, bias)
    assert torch.equal(y, int8_linear(x.reshape(-1, 64), w, bias).reshape(*shape[:-1], 12))


@pytest.mark.parametrize(
    "variant", ["contiguous", "transposed", "stride 0", "no bias", "no tokens", "ragged"]
)
@pytest.mark.parametrize("overload", ["default", "reference"])
@DTYPES
def test_opcheck(variant: str, overload: str, dtype: torch.dtype) -> None:
    x, w, bias = make(0 if variant == "no tokens" else 4, 9, 34 if variant == "ragged" else 64, dtype=dtype)
    if variant == "transposed":
        x = x.t().contiguous().t()
    elif variant == "stride 0":
        x, bias = x[:1].expand(4, 64), bias[:1].expand(9)
    torch.library.opcheck(getattr(OP, overload), arguments(x, w, None if variant == "no bias" else bias))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_equals_eager(fresh_compiler: None, dynamic: bool) -> None:
    _, w, bias = make(1, 40, 128)
    compiled = torch.compile(int8_linear, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for m in (4, 7):
        x = torch.randn(m, 128)
        assert torch.equal(compiled(x, w, bias), int8_linear(x, w, bias))


def test_autocast_casts_x(backend: str) -> None:
    x, w, bias = make(5, 12, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = int8_linear(x, w, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, int8_linear(x.bfloat16(), w, bias))


def test_meta_tensors_give_shapes() -> None:
    x, w, bias = make(5, 12, 64)
    y = int8_linear(x.to("meta"), w.to("meta"), bias.to("meta"))
    assert (y.shape, y.device.type) == ((5, 12), "meta")


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_refused_and_needless_ones_ignored(backend: str, context: Any) -> None:
    x, w, bias = make(5, 12, 64)
    y = int8_linear(x, w, bias)
    for name in ("x", "bias"):
        leaves = {"x": x, "bias": bias, name: {"x": x, "bias": bias}[name].clone().requires_grad_()}
        message = (
            f"{name} must not require a gradient with activation='int8', which has none, got "
            "requires_grad=True; call it under torch.inference_mode() or torch.no_grad(), or pass "
            "activation=None"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            int8_linear(leaves["x"], w, leaves["bias"])
        with context():
            assert torch.equal(int8_linear(leaves["x"], w, leaves["bias"]), y)


@pytest.mark.parametrize("activation", ["int4", "INT8", "", 8, torch.int8])
def test_other_activations_are_refused(activation: Any) -> None:
    x, w, bias = make(1, 12, 64)
    with pytest.raises(ValueError, match=f"^activation must be None or 'int8', got {activation!r}$"):
        pk.functional.nf4_linear(x, w, bias, activation)


def test_is_never_the_default() -> None:
    x, w, bias = make(9, 12, 64)
    assert torch.equal(pk.functional.nf4_linear(x, w, bias), pk.functional.adapted_linear(x, w, bias=bias))
    assert not torch.equal(pk.functional.nf4_linear(x, w, bias), int8_linear(x, w, bias))


@pytest.mark.parametrize("compiled", [False, True])
def test_transforms_are_refused(fresh_compiler: None, compiled: bool) -> None:
    x, w, _ = make(3, 12, 64)

    def vmap(x: torch.Tensor) -> torch.Tensor:
        return torch.vmap(lambda row: int8_linear(row, w))(x)

    def dual(x: torch.Tensor) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(int8_linear(forward_ad.make_dual(x, x), w)).tangent

    for transform, reason in (
        (vmap, "inside a torch.func transform"),
        (dual, "under forward-mode differentiation"),
    ):
        function: Any = torch.compile(transform, backend="aot_eager") if compiled else transform
        with pytest.raises((NotImplementedError, Unsupported), match=f"'int8' is not available {reason}"):
            function(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 65)}, "x must be [..., K] = [..., 64], got [4, 65]"),
        ({"x": torch.zeros(4, 64).double()}, "x must be float32 or bfloat16 or float16, got float64"),
        ({"x": torch.zeros(4, 64).char()}, "x must be float32 or bfloat16 or float16, got int8"),
        ({"bias": torch.zeros(13)}, "bias must be [N] = [12], got [13]"),
        ({"bias": torch.zeros(12).half()}, "bias must be float32, got float16"),
        ({"bias": torch.zeros(12, device="meta")}, "bias must be on the device of x, cpu, got meta"),
        ({"w": make(1, 12, 64)[1].to("meta")}, "weight must be on the device of x, cpu, got meta"),
        ({"w": pk.functional.nf4_quantize(torch.zeros(2, 3, 64))}, "weight must be [N, K], got an NF4Weight"),
    ],
)
def test_public_call_refuses(backend: str, change: dict[str, Any], message: str) -> None:
    x, w, bias = make(4, 12, 64)
    with pytest.raises(ValueError, match=re.escape(message)):
        int8_linear(**{"x": x, "w": w, "bias": bias, **change})


def test_public_call_refuses_what_is_no_tensor() -> None:
    x, w, bias = make(4, 12, 64)
    with pytest.raises(TypeError, match=r"^x must be a torch\.Tensor, got list"):
        int8_linear(x.tolist(), w, bias)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^bias must be a torch\.Tensor, got list"):
        int8_linear(x, w, bias.tolist())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^w must be an NF4Weight, got Tensor"):
        int8_linear(x, torch.zeros(12, 64), bias)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 2, 64)}, "x must be [M, K], got [2, 2, 64]; flatten the leading dimensions"),
        ({"x": torch.zeros(4, 0)}, "weight must be [N, K] with N, K > 0, got [12, 0]"),
        ({"x": torch.zeros(4, 32)}, "packed must be [(n+1)//2] = [192], got [384]"),
        ({"x": torch.zeros(4, 64).double()}, "x must be float32 or bfloat16 or float16, got float64"),
        ({"absmax": torch.zeros(11)}, "absmax must be [ceil(n/blocksize)] = [12], got [11]"),
        ({"blocksize": 63}, "blocksize must be one of 32, 64"),
        ({"out_features": -1}, "weight must be [N, K] with N, K > 0, got [-1, 64]"),
        ({"bias": torch.zeros(1)}, "bias must be [N] = [12], got [1]"),
        ({"bias": torch.zeros(12).half()}, "bias must be float32, got float16"),
    ],
)
def test_op_refuses(change: dict[str, Any], message: str) -> None:
    """Reference and fake say `message`; the native kernel refuses in its own words."""
    args = arguments(*make(4, 12, 64))._replace(**change)
    with pytest.raises(ValueError, match=re.escape(message)):
        OP.reference(*args)
    with pytest.raises((ValueError, RuntimeError)):
        OP.default(*args)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=re.escape(message)):
        OP.default(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args])
