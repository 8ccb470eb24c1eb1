"""Contract of the adapted linear: schemas, argument checks (shared by the eager and the fake path), fakes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from peft_kernels.core.backend import define_op, fake_kernel
from peft_kernels.core.checks import (
    check_device,
    check_dtype,
    check_finite,
    check_probability,
    check_shape,
    check_tensor,
)
from peft_kernels.ops.dropout.schema import FLOAT_DTYPES, check_seed
from peft_kernels.ops.nf4.schema import WEIGHT_DTYPES, BaseWeight, check_nf4_format

BASE_SCHEMA = (
    "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset, "
    "int nested_blocksize, int blocksize"
)

define_op(
    "adapted_linear",
    f"(Tensor x, {BASE_SCHEMA}, SymInt out_features, Tensor? lora_a, Tensor? lora_b, float scaling, "
    "Tensor? column_scale, Tensor? input_scale, Tensor? bias, float dropout_p, Tensor? seed, "
    "bool save_preactivation) -> (Tensor y, Tensor u, Tensor z)",
    triton="peft_kernels.ops.linear.triton",
)
define_op(
    "adapted_linear_backward",
    f"(Tensor grad, Tensor x, {BASE_SCHEMA}, Tensor? lora_a, Tensor? lora_b, float scaling, "
    "Tensor? column_scale, Tensor? input_scale, float dropout_p, Tensor? seed, Tensor? u, Tensor? z, "
    "bool need_x, bool need_lora_a, bool need_lora_b, bool need_column_scale, bool need_input_scale, "
    "bool need_bias) -> (Tensor dx, Tensor dlora_a, Tensor dlora_b, Tensor dcolumn_scale, "
    "Tensor dinput_scale, Tensor dbias)",
    triton="peft_kernels.ops.linear.triton",
    cuda="peft_kernels.ops.linear.cuda",
)
define_op(
    "nf4_linear_backward_input",
    f"(Tensor grad, {BASE_SCHEMA.replace('? absmax', ' absmax')}, SymInt in_features, Tensor? column_scale, "
    "Tensor? du, Tensor? lora_a, Tensor? input_scale, float dropout_p, Tensor? seed) -> Tensor dx",
    triton="peft_kernels.ops.linear.triton",
)
define_op(
    "nf4_linear_int8",
    f"(Tensor x, {BASE_SCHEMA.replace('? absmax', ' absmax')}, SymInt out_features, Tensor? bias) -> Tensor",
)

# Which CUDA C++ method computes a product on the current GPU, counted as in `regimes.CUDA_METHODS`.
torch.library.define(
    "peft_kernels_cuda::plan",
    "(bool by_input, int tokens, int in_features, int out_features, int blocksize, ScalarType dtype) -> int",
)


class ForwardArgs(NamedTuple):
    """Arguments of `adapted_linear` in the order of its schema, but for `save_preactivation`."""

    x: torch.Tensor  # [M, K]
    weight: torch.Tensor  # dense [N, K] of the dtype of x; or, with absmax, NF4 bytes: see NF4Weight
    absmax: torch.Tensor | None
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    nested_offset: torch.Tensor | None
    nested_blocksize: int  # 0 where not double-quantised
    blocksize: int  # 0 where dense
    out_features: int  # N
    lora_a: torch.Tensor | None  # [r, K], float32 or the dtype of x; so are lora_b, the scales and the bias
    lora_b: torch.Tensor | None  # [N, r]
    scaling: float
    column_scale: torch.Tensor | None  # [N]
    input_scale: torch.Tensor | None  # [K]
    bias: torch.Tensor | None  # [N]
    dropout_p: float
    seed: torch.Tensor | None  # int64 0-dim


def base_weight(args: "ForwardArgs | InputGradientArgs | Int8Args") -> BaseWeight:
    """The frozen weight's part of the arguments (torch 2.10 cannot trace a NamedTuple's property)."""
    return BaseWeight(*args[1:8])


class BackwardArgs(NamedTuple):
    """Arguments of `adapted_linear_backward` in the order of its schema.

    The values of `x` are read only if need_lora_a or need_input_scale: otherwise it may be a stand-in of the
    right shape and dtype.
    """

    grad: torch.Tensor  # [M, N], dtype of x
    x: torch.Tensor  # [M, K]
    weight: torch.Tensor
    absmax: torch.Tensor | None
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    nested_offset: torch.Tensor | None
    nested_blocksize: int
    blocksize: int
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None
    scaling: float
    column_scale: torch.Tensor | None
    input_scale: torch.Tensor | None
    dropout_p: float
    seed: torch.Tensor | None
    u: torch.Tensor | None  # [M, r], accumulate dtype
    z: torch.Tensor | None  # [M, N], dtype of x
    need_x: bool
    need_lora_a: bool
    need_lora_b: bool
    need_column_scale: bool
    need_input_scale: bool
    need_bias: bool

    @property
    def forward(self) -> ForwardArgs:
        """What the forward op was called with; the bias plays no part in any gradient."""
        return ForwardArgs(*self[1:9], self.grad.shape[1], *self[9:14], None, *self[14:16])


class InputGradientArgs(NamedTuple):
    """Arguments of `nf4_linear_backward_input` in the order of its schema: the part of a GPU's backward."""

    grad: torch.Tensor  # [M, N]
    weight: torch.Tensor  # NF4 bytes, and what belongs to them: see NF4Weight
    absmax: torch.Tensor | None  # the schema has no None
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    nested_offset: torch.Tensor | None
    nested_blocksize: int
    blocksize: int
    in_features: int  # K
    column_scale: torch.Tensor | None  # [N], float32 or the dtype of grad, like lora_a and input_scale
    du: torch.Tensor | None  # [M, r], accumulate dtype; with lora_a or not at all
    lora_a: torch.Tensor | None  # [r, K]
    input_scale: torch.Tensor | None  # [K]
    dropout_p: float
    seed: torch.Tensor | None  # int64 0-dim


class Int8Args(NamedTuple):
    """Arguments of `nf4_linear_int8` in the order of its schema. Forward only: it has no gradient."""

    x: torch.Tensor  # [M, K], float32, bfloat16 or float16
    weight: torch.Tensor  # NF4 bytes, and what belongs to them: see NF4Weight
    absmax: torch.Tensor | None  # the schema has no None
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    nested_offset: torch.Tensor | None
    nested_blocksize: int
    blocksize: int
    out_features: int  # N
    bias: torch.Tensor | None  # [N], float32 or the dtype of x


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of `dtype` are summed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def check_adapted_linear(args: ForwardArgs) -> None:
    """Argument contract of `adapted_linear`."""
    x, n = args.x, args.out_features
    check_dtype("x", x, FLOAT_DTYPES)
    if x.dim() != 2:
        raise ValueError(f"x must be [M, K], got {list(x.shape)}; flatten the leading dimensions")
    k = x.shape[1]
    if n < 1 or k < 1:
        raise ValueError(f"weight must be [N, K] with N, K > 0, got [{n}, {k}]")
    check_device("weight", args.weight, "x", x)
    if args.absmax is not None:
        check_nf4_format(base_weight(args), (n, k))
    else:
        check_dtype("weight", args.weight, (x.dtype,), "convert it or x: a dense weight has the dtype of x")
        check_shape("weight", args.weight, "[N, K]", (n, k))
    check_finite("scaling", args.scaling)
    _check_lora(x, args.lora_a, args.lora_b, n)
    check_vector("column_scale", args.column_scale, "[N]", n, x)
    check_vector("input_scale", args.input_scale, "[K]", k, x)
    check_vector("bias", args.bias, "[N]", n, x)
    _check_dropout(args.dropout_p, args.seed, "x", x)
    if args.lora_a is None and args.dropout_p > 0.0:
        raise ValueError(f"dropout_p must be 0 without lora_a and lora_b, got {args.dropout_p}")


def check_adapted_linear_backward(args: BackwardArgs) -> None:
    """Argument contract of `adapted_linear_backward`."""
    grad, x = args.grad, args.x
    check_shape("x", x, "[M, K]", (None, None))
    check_dtype("grad", grad, (x.dtype,))
    check_shape("grad", grad, "[M, N]", (x.shape[0], None))
    check_device("grad", grad, "x", x)
    check_adapted_linear(args.forward)
    for needed, names in (
        (args.need_lora_a, ("lora_a",)),
        (args.need_lora_b, ("lora_b", "u")),
        (args.need_column_scale, ("column_scale", "z")),
        (args.need_input_scale, ("input_scale",)),
    ):
        for name in names:
            if needed and getattr(args, name) is None:
                raise ValueError(f"{name} must be given when need_{names[0]} is True, got None")
    if args.need_lora_b and args.lora_a is not None and args.u is not None:
        check_shape("u", args.u, "[M, r]", (x.shape[0], args.lora_a.shape[0]))
        check_dtype("u", args.u, (accumulate_dtype(x.dtype),))
    if args.need_column_scale and args.z is not None:
        check_shape("z", args.z, "[M, N]", tuple(grad.shape))
        check_dtype("z", args.z, (x.dtype,))


def check_nf4_linear_backward_input(args: InputGradientArgs) -> None:
    """Argument contract of `nf4_linear_backward_input`."""
    grad, k = args.grad, args.in_features
    check_dtype("grad", grad, FLOAT_DTYPES)
    if grad.dim() != 2:
        raise ValueError(f"grad must be [M, N], got {list(grad.shape)}; flatten the leading dimensions")
    n = grad.shape[1]
    if n < 1 or k < 1:
        raise ValueError(f"weight must be [N, K] with N, K > 0, got [{n}, {k}]")
    check_device("weight", args.weight, "grad", grad)
    check_nf4_format(base_weight(args), (n, k))
    check_vector("column_scale", args.column_scale, "[N]", n, grad)
    check_vector("input_scale", args.input_scale, "[K]", k, grad)
    if (args.du is None) != (args.lora_a is None):
        raise ValueError("du and lora_a must be given together, got one of them")
    if args.du is not None and args.lora_a is not None:
        check_shape("lora_a", args.lora_a, "[r, K]", (None, k))
        check_dtype("lora_a", args.lora_a, (grad.dtype, accumulate_dtype(grad.dtype)), "convert it")
        check_shape("du", args.du, "[M, r]", (grad.shape[0], args.lora_a.shape[0]))
        check_dtype("du", args.du, (accumulate_dtype(grad.dtype),))
    _check_dropout(args.dropout_p, args.seed, "grad", grad)


def check_activation(activation: str | None) -> None:
    """Require a way to take x that the op for NF4 weights knows."""
    if activation is not None and not (isinstance(activation, str) and activation == "int8"):
        raise ValueError(f"activation must be None or 'int8', got {activation!r}")


def check_nf4_linear_int8(args: Int8Args) -> None:
    """Argument contract of `nf4_linear_int8`."""
    x, n = args.x, args.out_features
    check_dtype("x", x, WEIGHT_DTYPES, "convert it, or pass activation=None")
    if x.dim() != 2:
        raise ValueError(f"x must be [M, K], got {list(x.shape)}; flatten the leading dimensions")
    if n < 1 or x.shape[1] < 1:
        raise ValueError(f"weight must be [N, K] with N, K > 0, got [{n}, {x.shape[1]}]")
    check_device("weight", args.weight, "x", x)
    check_nf4_format(base_weight(args), (n, x.shape[1]))
    check_vector("bias", args.bias, "[N]", n, x)


def check_lora(
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    shape: tuple[int, int],
    dtypes: Sequence[torch.dtype],
    like_name: str,
    like: torch.Tensor,
) -> None:
    """Require A [r, K] and B [N, r] of one of `dtypes` for a weight of `shape`, on the device of `like`."""
    n, k = shape
    check_tensor("lora_a", lora_a)
    check_tensor("lora_b", lora_b)
    remedy = "pass the adapter made for this layer"
    check_shape("lora_a", lora_a, "[r, K]", (None, k), remedy)
    if lora_a.shape[0] == 0:
        raise ValueError(f"lora_a must be [r, K] with r > 0, got {list(lora_a.shape)}")
    check_shape("lora_b", lora_b, "[N, r]", (n, lora_a.shape[0]), remedy)
    check_dtype("lora_a", lora_a, dtypes, f"convert the adapter or {like_name}")
    check_dtype("lora_b", lora_b, (lora_a.dtype,), "lora_a and lora_b have one dtype")
    check_device("lora_a", lora_a, like_name, like)
    check_device("lora_b", lora_b, like_name, like)


def _check_lora(x: torch.Tensor, lora_a: torch.Tensor | None, lora_b: torch.Tensor | None, n: int) -> None:
    if lora_a is not None and lora_b is not None:
        check_lora(lora_a, lora_b, (n, x.shape[1]), (x.dtype, accumulate_dtype(x.dtype)), "x", x)
    elif lora_a is not lora_b:
        missing = "lora_a" if lora_a is None else "lora_b"
        raise ValueError(f"lora_a and lora_b must be given together, got no {missing}")


def _check_dropout(p: float, seed: torch.Tensor | None, like_name: str, like: torch.Tensor) -> None:
    check_probability("dropout_p", p)
    if seed is None and p > 0.0:
        raise ValueError("seed must be given when dropout_p > 0, got None; pass an int64 0-dim tensor")
    if seed is not None:
        check_seed(seed, like_name, like)


def check_vector(name: str, vector: torch.Tensor | None, letters: str, size: int, x: torch.Tensor) -> None:
    """Require a scale or a bias of a layer that computes on x."""
    if vector is not None:
        check_tensor(name, vector)
        check_shape(name, vector, letters, (size,))
        check_dtype(name, vector, (x.dtype, accumulate_dtype(x.dtype)), "convert it")
        check_device(name, vector, "x", x)


@fake_kernel("adapted_linear")
def _(*args: Any) -> tuple[torch.Tensor, ...]:
    a, save_preactivation = ForwardArgs(*args[:-1]), args[-1]
    check_adapted_linear(a)
    m, n = a.x.shape[0], a.out_features
    return (
        a.x.new_empty([m, n]),
        a.x.new_empty([0] if a.lora_a is None else [m, a.lora_a.shape[0]], dtype=accumulate_dtype(a.x.dtype)),
        a.x.new_empty([m, n] if save_preactivation else [0]),
    )


@fake_kernel("adapted_linear_backward")
def _(*args: Any) -> tuple[torch.Tensor, ...]:
    a = BackwardArgs(*args)
    check_adapted_linear_backward(a)

    def gradient(needed: bool, of: torch.Tensor | None) -> torch.Tensor:
        of = a.x if of is None else of
        return of.new_empty(of.shape if needed else [0])

    return (
        gradient(a.need_x, a.x),
        gradient(a.need_lora_a, a.lora_a),
        gradient(a.need_lora_b, a.lora_b),
        gradient(a.need_column_scale, a.column_scale),
        gradient(a.need_input_scale, a.input_scale),
        a.grad.new_empty([a.grad.shape[1]] if a.need_bias else [0]),
    )


@fake_kernel("nf4_linear_backward_input")
def _(*args: Any) -> torch.Tensor:
    a = InputGradientArgs(*args)
    check_nf4_linear_backward_input(a)
    return a.grad.new_empty([a.grad.shape[0], a.in_features])


@fake_kernel("nf4_linear_int8")
def _(*args: Any) -> torch.Tensor:
    a = Int8Args(*args)
    check_nf4_linear_int8(a)
    return a.x.new_empty([a.x.shape[0], a.out_features])
