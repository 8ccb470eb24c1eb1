"""Public calls of the adapted linear and of its common special cases."""

import torch

from peft_kernels.core.backend import resolve
from peft_kernels.core.checks import (
    check_dtype,
    check_finite,
    check_memory,
    check_probability,
    check_tensor,
)
from peft_kernels.core.transforms import refuse_transforms, transform_reason
from peft_kernels.ops.dropout.functional import as_seed
from peft_kernels.ops.dropout.schema import FLOAT_DTYPES
from peft_kernels.ops.linear.autograd import AdaptedLinear, flatten
from peft_kernels.ops.linear.schema import (
    ForwardArgs,
    Int8Args,
    check_activation,
    check_adapted_linear,
    check_nf4_linear_int8,
)
from peft_kernels.ops.nf4.functional import require_nf4_weight
from peft_kernels.ops.nf4.schema import BaseWeight
from peft_kernels.ops.nf4.weight import NF4Weight


def adapted_linear(
    x: torch.Tensor,
    weight: torch.Tensor | NF4Weight,
    *,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float | torch.Tensor = 1.0,
    column_scale: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """A frozen linear layer with any of: low-rank update, output scale, input scale, bias, dropout.

        y = c * ((x * l_in) W^T + scaling * u B^T) + bias        u = D(x) A^T

    with A = `lora_a`, B = `lora_b`, c = `column_scale`, l_in = `input_scale` and dropout D. Everything is
    summed in fp32 and rounded once, to the dtype of `x`. Differentiable in x, lora_a, lora_b, column_scale,
    input_scale and bias, once. The backward pass keeps `x` itself and u [M, r] (and z [M, N] only when
    column_scale is trained): never a dense weight, a dropout mask or D(x).

    Under autocast `x` and a dense `weight` are cast as torch.nn.functional.linear casts them; the adapter is
    not.

    Args:
        x: [..., K]; float32, bfloat16, float16, or float64 (on the reference backend).
        weight: frozen; `NF4Weight` of shape [N, K], or dense [N, K] of the dtype of `x`.
        lora_a: [r, K]; float32 or the dtype of `x`. An fp32 adapter over bf16 `x` does not cast `x` up.
        lora_b: [N, r], dtype of `lora_a`.
        scaling: factor of the low-rank part, alpha/r for LoRA; a float, or a tensor with one element. A
            tensor, or under torch.compile a float too, is multiplied into `lora_b`, in its dtype.
        column_scale: [N]; float32 or the dtype of `x`.
        input_scale: [K]; float32 or the dtype of `x`. Not applied to the low-rank part.
        bias: [N]; float32 or the dtype of `x`. Not multiplied by `column_scale`.
        dropout_p: dropout on the input of the low-rank part, in [0, 1); pass 0 when not training.
        seed: int, or int64 0-dim tensor on the device of `x`; fixes the mask (`philox_dropout_mask` on the
            [M, K] input). Drawn from torch's default generator when None and `dropout_p` > 0.

    Returns:
        [..., N], dtype of `x`.

    Raises:
        TypeError: an argument is not a tensor where it must be one.
        ValueError: a shape, dtype, device or value does not fit (the message says which), or `weight`
            requires a gradient.
        NotImplementedError: called inside a torch.func transform or under forward-mode differentiation; or,
            from the backward pass, a second derivative is wanted.

    Source: LoRA, arXiv 2106.09685, section 4.1; QLoRA, 2305.14314, equation 5; IA3, 2205.05638, section 3.3;
    DoRA, 2402.09353, equation 5.
    """
    refuse_transforms("adapted_linear", "torch.nn.functional.linear on w.dequantize()")
    check_tensor("x", x)
    check_probability("dropout_p", dropout_p)
    x, weight = under_autocast(x, weight)
    base, out_features = split_weight(weight, x)
    if lora_a is None and lora_b is None:
        scaling = _no_scaling(scaling)
    elif isinstance(scaling, torch.Tensor) or torch.compiler.is_compiling():
        lora_b, scaling = None if lora_b is None else fold_scaling(lora_b, scaling), 1.0
    seed = as_seed(seed, x.device) if dropout_p > 0.0 else None
    rest = (*base, out_features, lora_a, lora_b, scaling, column_scale, input_scale, bias, dropout_p, seed)
    args = ForwardArgs(flatten(x), *rest)
    check_adapted_linear(args)
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad
        for tensor in (x, lora_a, lora_b, column_scale, input_scale, bias)
    ):
        out: torch.Tensor = AdaptedLinear.apply(x, *rest)  # type: ignore[no-untyped-call]
        return out
    y: torch.Tensor = resolve("adapted_linear", x)(*args, False)[0]
    return y.reshape(*x.shape[:-1], out_features)


def nf4_linear(
    x: torch.Tensor, w: NF4Weight, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """y = x W^T + bias with a frozen NF4 weight, which is never materialised.

    With `activation="int8"`, for inference, x is rounded to 8 bits and products are summed as integers, which
    is faster (docs/cpu.md says by how much). Every 64 inputs of a token share a scale: their largest
    magnitude / 127. The 16 levels of W are rounded to multiples of absmax / 124. The relative error, root
    mean square against float64, is 0.8 % for normally distributed x and W, and 1.3 % (1.7 %) where six
    features of 4096 are 20 (60) times as large as the others; ops/linear/README.md has the bound on a single
    result. A result has the same bits on every backend and instruction set, for any number of threads and
    whatever the other tokens are. A token with an input that is not finite gives NaN.

    Args:
        x: [..., K]; float32, bfloat16 or float16.
        w: shape [N, K].
        bias: [N]; float32 or the dtype of `x`.
        activation: None, or "int8" to round x to 8 bits. It has no gradient.

    Returns:
        [..., N], dtype of `x`.

    Raises:
        TypeError: `w` is not an NF4Weight.
        ValueError: see `adapted_linear`; `activation` is neither None nor "int8", or is "int8" where `x` or
            `bias` requires a gradient.
        NotImplementedError: called inside a torch.func transform or under forward-mode differentiation.

    Source: QLoRA, arXiv 2305.14314, equation 5; a scale for a few dozen inputs: VS-Quant, arXiv 2102.04503.
    """
    w = require_nf4_weight("w", w)
    check_activation(activation)
    return adapted_linear(x, w, bias=bias) if activation is None else _nf4_linear_int8(x, w, bias)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + scaling * (D(x) A^T) B^T + bias: LoRA over a frozen dense weight.

    Args:
        x: [..., K]; float32, bfloat16, float16, or float64 (on the reference backend).
        weight: frozen, [N, K], dtype of `x`.
        lora_a: [r, K]; float32 or the dtype of `x`.
        lora_b: [N, r], dtype of `lora_a`.
        scaling: alpha/r, or alpha/sqrt(r) for rsLoRA; a float, or a tensor with one element.
        bias: [N]; float32 or the dtype of `x`.
        dropout_p: dropout on the input of the low-rank part, in [0, 1); pass 0 when not training.
        seed: fixes the dropout mask; see `adapted_linear`.

    Returns:
        [..., N], dtype of `x`.

    Raises:
        TypeError: see `adapted_linear`.
        ValueError: see `adapted_linear`.
        NotImplementedError: see `adapted_linear`.

    Source: LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732.
    """
    return adapted_linear(
        x, weight, lora_a=lora_a, lora_b=lora_b, scaling=scaling, bias=bias, dropout_p=dropout_p, seed=seed
    )


def nf4_lora_linear(
    x: torch.Tensor,
    w: NF4Weight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x W^T + scaling * (D(x) A^T) B^T + bias: QLoRA, the base weight in NF4.

    Args:
        x: [..., K]; float32, bfloat16 or float16.
        w: frozen, shape [N, K].
        lora_a: [r, K]; float32 or the dtype of `x`.
        lora_b: [N, r], dtype of `lora_a`.
        scaling: alpha/r, or alpha/sqrt(r) for rsLoRA; a float, or a tensor with one element.
        bias: [N]; float32 or the dtype of `x`.
        dropout_p: dropout on the input of the low-rank part, in [0, 1); pass 0 when not training.
        seed: fixes the dropout mask; see `adapted_linear`.

    Returns:
        [..., N], dtype of `x`.

    Raises:
        TypeError: `w` is not an NF4Weight.
        ValueError: see `adapted_linear`.
        NotImplementedError: see `adapted_linear`.

    Source: QLoRA, arXiv 2305.14314, equation 5.
    """
    return adapted_linear(
        x,
        require_nf4_weight("w", w),
        lora_a=lora_a,
        lora_b=lora_b,
        scaling=scaling,
        bias=bias,
        dropout_p=dropout_p,
        seed=seed,
    )


def _nf4_linear_int8(x: torch.Tensor, w: NF4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """`nf4_linear` on activations rounded to int8."""
    reason = transform_reason()
    if reason:
        raise NotImplementedError(
            f"activation='int8' is not available {reason}: it has no derivatives; call it outside, or use "
            "torch.nn.functional.linear on w.dequantize()"
        )
    check_tensor("x", x)
    x, _ = under_autocast(x, w)
    base, out_features = split_weight(w, x)
    args = Int8Args(flatten(x), *base, out_features, bias)
    check_nf4_linear_int8(args)
    for name, tensor in (("x", x), ("bias", bias)):
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"{name} must not require a gradient with activation='int8', which has none, got "
                "requires_grad=True; call it under torch.inference_mode() or torch.no_grad(), or pass "
                "activation=None"
            )
    y: torch.Tensor = resolve("nf4_linear_int8", x)(*args)
    return y.reshape(*x.shape[:-1], out_features)


def under_autocast(
    x: torch.Tensor, weight: torch.Tensor | NF4Weight
) -> tuple[torch.Tensor, torch.Tensor | NF4Weight]:
    """x and a dense weight in the autocast dtype, where autocast is on; float64 is left alone."""
    device_type = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return x, weight  # (meta tensors have no autocast)
    dtype = torch.get_autocast_dtype(device_type)
    check_memory("x", x)
    if isinstance(weight, torch.Tensor):
        check_tensor("weight", weight)
        check_memory("weight", weight)
        weight = weight.to(dtype)
    return x.to(dtype), weight


def split_weight(weight: torch.Tensor | NF4Weight, x: torch.Tensor | None) -> tuple[BaseWeight, int]:
    """The parts of a frozen weight [N, K] and N, checked; K against x [..., K] where that is given."""
    check_weight(weight, x)
    if isinstance(weight, NF4Weight):
        return weight.base_weight(), weight.shape[0]
    return BaseWeight(weight, None, None, None, None, 0, 0), weight.shape[0]


def check_weight(weight: torch.Tensor | NF4Weight, x: torch.Tensor | None) -> None:
    """Require a frozen weight [N, K], and x [..., K] where that is given."""
    if not isinstance(weight, NF4Weight):
        check_tensor("weight", weight)
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "weight must be frozen, got requires_grad=True; call weight.requires_grad_(False), "
                "or use torch.nn.functional.linear to train it"
            )
    if len(weight.shape) != 2:
        kind = "an NF4Weight of shape " if isinstance(weight, NF4Weight) else ""
        raise ValueError(f"weight must be [N, K], got {kind}{list(weight.shape)}")
    if x is not None and x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x must be [..., K] = [..., {weight.shape[1]}], got {list(x.shape)}")


def _no_scaling(scaling: float | torch.Tensor) -> float:
    """Require the default: there is no adapter to scale."""
    if not isinstance(scaling, torch.Tensor):
        check_finite("scaling", scaling)
        if scaling == 1.0:
            return scaling
    raise ValueError(f"scaling must be 1.0 without lora_a and lora_b, got {scaling}")


def fold_scaling(lora_b: torch.Tensor, scaling: float | torch.Tensor) -> torch.Tensor:
    """lora_b * scaling: gradients reach a scaling tensor, and no value is read back from the device.

    To torch.compile the ops' own `scaling` is a constant: each new value would compile once more.
    """
    check_tensor("lora_b", lora_b)
    check_dtype("lora_b", lora_b, FLOAT_DTYPES)
    check_memory("lora_b", lora_b)
    if not isinstance(scaling, torch.Tensor):
        check_finite("scaling", scaling)
        return lora_b * scaling
    check_tensor("scaling", scaling)
    if scaling.numel() != 1:
        raise ValueError(f"scaling must have one element, got {list(scaling.shape)}")
    check_dtype("scaling", scaling, FLOAT_DTYPES, "convert it")
    if scaling.device.type != "cpu" and scaling.device != lora_b.device:
        raise ValueError(
            f"scaling must be on the device of lora_b, {lora_b.device}, or on the CPU, got {scaling.device}"
        )
    check_memory("scaling", scaling)
    return lora_b * scaling.reshape(())
