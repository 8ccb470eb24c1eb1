"""Public calls of the bottleneck adapter."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from peft_kernels.core.backend import resolve
from peft_kernels.core.checks import (
    check_device,
    check_dtype,
    check_finite,
    check_flag,
    check_memory,
    check_probability,
    check_shape,
    check_tensor,
)
from peft_kernels.core.transforms import refuse_transforms
from peft_kernels.ops.adapter.autograd import BottleneckAdapter, flatten
from peft_kernels.ops.adapter.schema import (
    ACTIVATIONS,
    Operands,
    accumulate_dtype,
    check_bottleneck_adapter,
)
from peft_kernels.ops.dropout.functional import as_seed, philox_dropout
from peft_kernels.ops.dropout.schema import FLOAT_DTYPES

Activation = str | Callable[[torch.Tensor], torch.Tensor]
LayerNorm = tuple[torch.Tensor | None, torch.Tensor | None, float]  # weight, bias, eps

# Other names of the kernels' activations, as transformers and adapters have them.
_ALIASES = {
    "linear": "identity",
    "leakyrelu": "leaky_relu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "swish": "silu",
}


def bottleneck_adapter(
    hidden: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    *,
    activation: Activation,
    scaling: float | torch.Tensor = 1.0,
    residual: torch.Tensor | None = None,
    ln_before: LayerNorm | None = None,
    ln_after: LayerNorm | None = None,
    adapter_residual_before_ln: bool = False,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> torch.Tensor:
    """A bottleneck adapter: a small two-layer network beside, or behind, a frozen layer.

        down = f(h W_d^T + b_d)      up = scaling * (down W_u^T + b_u)      out = D(up) * gate + residual

    with h = `hidden`, W_d = `down_weight`, W_u = `up_weight` and dropout D. One kernel goes over tiles of
    tokens; down and up exist only a tile at a time. Everything is summed in fp32 and rounded once; with bf16
    `hidden`, on CPUs with bf16 arithmetic, the operands of products are rounded to bf16, as PyTorch's are.
    Differentiable, once, in everything but `seed`. The backward pass keeps `hidden` itself and computes down
    again. Pass the very tensor `hidden` as `residual` where it is the residual: its two gradients are then
    added inside the kernel.

    The layer norms run outside the kernel, as torch.nn.functional.layer_norm: with `ln_before` h is the
    normalised hidden, which then is what is kept for the backward pass; `ln_after` is applied to the result,
    before the residual is added or, with `adapter_residual_before_ln`, after that. Dropout, gate and
    activations that are no name below are likewise what the `adapters` library means by them.

    Under autocast `hidden` is cast as torch.nn.functional.linear casts it; the parameters are not.

    Args:
        hidden: [..., d]; float32, bfloat16, float16, or float64 (on the reference backend).
        down_weight: [r, d]; float32 or the dtype of `hidden`.
        down_bias: [r] or None; float32 or the dtype of `hidden`.
        up_weight: [N, r], float32 or the dtype of `hidden`; N is d in an adapter proper.
        up_bias: [N] or None; float32 or the dtype of `hidden`.
        activation: f. "relu", "gelu" (erf), "gelu_tanh", "silu", "tanh", "leaky_relu" (slope 0.01) and
            "identity" run in the kernel, as do their names in transformers ("gelu_new", "swish", ...). A
            callable is called on tensors: the adapter is then composed of PyTorch's operations, rounded after
            each, and not fused.
        scaling: a number, or a tensor [1] (or 0-dim) or [N], one factor for each channel; float32 or the
            dtype of `hidden`.
        residual: [..., N] or None; float32 or the dtype of `hidden`.
        ln_before: weight and bias [d], either of them None, in the dtype of `hidden`, and eps; applied to
            `hidden`.
        ln_after: the same with [N], in the dtype of the result, to which it is applied.
        adapter_residual_before_ln: add the residual before `ln_after`. Without `ln_after` no difference.
        dropout_p: dropout on `up`, in [0, 1); pass 0 when not training.
        seed: int, or int64 0-dim tensor on the device of `hidden`; fixes the mask (`philox_dropout_mask` on
            the [M, N] `up`). Drawn from torch's default generator when None and `dropout_p` > 0.
        gate: [..., 1], expandable to `hidden` but for the last dimension: one factor for each token, or for
            each sequence; float32 or the dtype of `hidden`. None for 1.

    Returns:
        [..., N], in the dtype of `hidden`, or of `residual` if that is wider.

    Raises:
        TypeError: an argument is not a tensor where it must be one.
        ValueError: a shape, dtype, device, name or value does not fit; the message says which.
        NotImplementedError: called inside a torch.func transform or under forward-mode differentiation; or,
            from the backward pass, a second derivative is wanted.

    Source: Houlsby et al., arXiv 1902.00751, section 2.1; Pfeiffer et al., 2005.00247, section 3; parallel
    and scaled: He et al., 2110.04366, section 4; gate: UniPELT, 2110.07577, section 3.2.
    """
    return bottleneck_adapter_with_intermediates(
        hidden, down_weight, down_bias, up_weight, up_bias,
        activation=activation, scaling=scaling, residual=residual, ln_before=ln_before, ln_after=ln_after,
        adapter_residual_before_ln=adapter_residual_before_ln, dropout_p=dropout_p, seed=seed, gate=gate,
        need_down=False, need_up=False,
    )[0]  # fmt: skip


def bottleneck_adapter_with_intermediates(
    hidden: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    *,
    activation: Activation,
    scaling: float | torch.Tensor = 1.0,
    residual: torch.Tensor | None = None,
    ln_before: LayerNorm | None = None,
    ln_after: LayerNorm | None = None,
    adapter_residual_before_ln: bool = False,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    need_down: bool = True,
    need_up: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`bottleneck_adapter`, and what AdapterFusion needs of it: down, and `up` after its scale.

        down = f(h W_d^T + b_d)      up = scaling * (down W_u^T + b_u)      out = D(up) * gate + residual

    Args:
        hidden: [..., d]; float32, bfloat16, float16, or float64. More on all but the last two arguments: see
            `bottleneck_adapter`.
        down_weight: [r, d]; float32 or the dtype of `hidden`, as all other tensors here.
        down_bias: [r] or None; float32 or the dtype of `hidden`.
        up_weight: [N, r]; float32 or the dtype of `hidden`.
        up_bias: [N] or None; float32 or the dtype of `hidden`.
        activation: f.
        scaling: of up; a number, or a tensor [1] or [N], float32 or the dtype of `hidden`.
        residual: [..., N] or None; float32 or the dtype of `hidden`.
        ln_before: on `hidden`; weight and bias [d], in the dtype of `hidden`, and eps.
        ln_after: on the result; weight and bias [N], in its dtype, and eps.
        adapter_residual_before_ln: where the residual is added.
        dropout_p: on up.
        seed: of the mask; int, or int64 0-dim tensor.
        gate: [..., 1] or None; float32 or the dtype of `hidden`.
        need_down: whether to return down; it is written to memory then.
        need_up: whether to return up.

    Returns:
        out [..., N]; down [..., r] or None; up [..., N], before dropout, gate and residual, or None. Down and
        up are rounded to the dtype of `hidden`, are differentiable, and have no part in computing out.

    Raises:
        TypeError: see `bottleneck_adapter`.
        ValueError: see `bottleneck_adapter`.
        NotImplementedError: see `bottleneck_adapter`.

    Source: AdapterFusion, arXiv 2005.00247, section 3.2.
    """
    refuse_transforms("bottleneck_adapter", "torch.nn.functional.linear and the activation")
    _check_tensors(hidden=hidden, down_weight=down_weight, up_weight=up_weight)
    _check_tensors(optional=True, down_bias=down_bias, up_bias=up_bias, residual=residual, gate=gate)
    check_dtype("hidden", hidden, FLOAT_DTYPES)
    check_probability("dropout_p", dropout_p)
    for flag, value in (
        ("adapter_residual_before_ln", adapter_residual_before_ln),
        ("need_down", need_down),
        ("need_up", need_up),
    ):
        check_flag(flag, value)
    if hidden.dim() == 0 or down_weight.dim() != 2 or hidden.shape[-1] != down_weight.shape[1]:
        raise ValueError(
            f"hidden must be [..., d] and down_weight [r, d], got {list(hidden.shape)} and "
            f"{list(down_weight.shape)}; pass the adapter made for this layer"
        )
    if up_weight.dim() != 2:
        raise ValueError(f"up_weight must be [N, r], got {list(up_weight.shape)}")
    lead, out_features = hidden.shape[:-1], up_weight.shape[0]
    if residual is not None and residual.shape != (*lead, out_features):
        wanted = [*lead, out_features]
        raise ValueError(f"residual must be [..., N] = {wanted}, got {list(residual.shape)}")
    added = residual if ln_after is None or adapter_residual_before_ln else None
    hidden = _autocast(hidden if ln_before is None else _layer_norm("ln_before", hidden, ln_before))
    is_hidden = added is hidden
    gates = None if gate is None else _gate_of_tokens(gate, lead)
    seed = as_seed(seed, hidden.device) if dropout_p > 0.0 else None
    constant, scale = _scale(scaling, out_features)
    rest = (constant, scale, gates, dropout_p, seed)
    if isinstance(activation, str):
        index = _activation_index(activation)
        operands = Operands(down_weight, down_bias, up_weight, up_bias, index, *rest)
        out, down, up = _fused(hidden, added, is_hidden, operands, need_down, need_up)
    else:
        out, down, up = _composed(
            hidden, added, Operands(down_weight, down_bias, up_weight, up_bias, 0, *rest), activation
        )
    if ln_after is not None:
        out = _layer_norm("ln_after", out, ln_after)
        if residual is not None and added is None:
            out = out + residual
    return out, down if need_down else None, up if need_up else None


def activation_name(name: str) -> str | None:
    """The kernel's name for an activation that goes by `name` in transformers; None if it has none."""
    known = _ALIASES.get(name.lower(), name.lower())
    return known if known in ACTIVATIONS else None


def _fused(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    residual_is_hidden: bool,
    operands: Operands,
    need_down: bool,
    need_up: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The op, through autograd where something needs a gradient."""
    x = flatten(hidden)
    shortcut = None if residual is None else flatten(residual)
    check_bottleneck_adapter(x, shortcut, operands)
    tensors = (hidden, residual, *operands[:4], operands.scale, operands.gate)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        if residual_is_hidden:
            residual = None
        results: tuple[torch.Tensor, Any, Any] = BottleneckAdapter.apply(  # type: ignore[no-untyped-call]
            hidden, residual, residual_is_hidden, need_down, need_up, *operands
        )
        return results
    out, down, up = resolve("bottleneck_adapter", hidden)(x, shortcut, *operands, need_down, need_up)
    lead = hidden.shape[:-1]
    return (
        out.reshape(*lead, out.shape[-1]),
        down.reshape(*lead, down.shape[-1]) if need_down else None,
        up.reshape(*lead, up.shape[-1]) if need_up else None,
    )


def _composed(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    a: Operands,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of PyTorch's operations, for an activation that no kernel has."""
    if not callable(activation):
        raise TypeError(f"activation must be a name or a callable, got {activation!r}")
    check_bottleneck_adapter(flatten(hidden), None if residual is None else flatten(residual), a)
    for name, tensor in {"hidden": hidden, "residual": residual, **a._asdict()}.items():
        if isinstance(tensor, torch.Tensor):
            check_memory(name, tensor)
    dtype = hidden.dtype
    down = activation(_linear(hidden, a.down_weight, a.down_bias))
    up = _linear(down.to(dtype), a.up_weight, a.up_bias) * (a.scaling if a.scale is None else a.scale)
    up = up.to(dtype)
    out = philox_dropout(flatten(up), a.dropout_p, a.seed).reshape(up.shape) if a.dropout_p else up
    if a.gate is not None:
        out = (out * a.gate.reshape(*hidden.shape[:-1], 1)).to(dtype)
    return out if residual is None else out + residual, down, up


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _activation_index(name: str) -> int:
    known = activation_name(name)
    if known is None:
        names = ", ".join((*ACTIVATIONS, *_ALIASES))
        raise ValueError(f"activation must be one of {names}, got {name!r}; for another pass a callable")
    return ACTIVATIONS.index(known)


def _scale(scaling: float | torch.Tensor, out_features: int) -> tuple[float, torch.Tensor | None]:
    """The constant and the learned factor, of which one is 1."""
    if not isinstance(scaling, torch.Tensor):
        check_finite("scaling", scaling)
        return scaling, None
    check_tensor("scaling", scaling)
    check_dtype("scaling", scaling, FLOAT_DTYPES, "convert it")
    if scaling.shape not in ((), (1,), (out_features,)):
        raise ValueError(f"scaling must be [N] = [{out_features}], [1] or 0-dim, got {list(scaling.shape)}")
    check_memory("scaling", scaling)
    return 1.0, scaling.reshape(1) if scaling.dim() == 0 else scaling


def _gate_of_tokens(gate: torch.Tensor, lead: torch.Size) -> torch.Tensor:
    """One factor a token, [M], of a gate that may be one a sequence."""
    if gate.dim() != len(lead) + 1 or any(
        have not in (1, want) for have, want in zip(gate.shape, (*lead, 1), strict=True)
    ):
        raise ValueError(f"gate must be expandable to [..., 1] = {[*lead, 1]}, got {list(gate.shape)}")
    check_dtype("gate", gate, FLOAT_DTYPES, "convert it")
    check_memory("gate", gate)
    # In fp32, so that the gradient of a sequence's gate, a sum over its tokens, is rounded once.
    return gate.to(accumulate_dtype(gate.dtype)).expand(*lead, 1).reshape(-1)


def _layer_norm(name: str, x: torch.Tensor, parameters: LayerNorm) -> torch.Tensor:
    if not isinstance(parameters, tuple) or len(parameters) != 3:
        raise TypeError(f"{name} must be a tuple of weight, bias and eps, got {parameters!r}")
    weight, bias, eps = parameters
    dtypes: tuple[torch.dtype, ...] = (x.dtype, accumulate_dtype(x.dtype))
    check_memory("hidden", x)
    for part, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_tensor(f"{name} {part}", tensor)
            check_shape(f"{name} {part}", tensor, "[d]", tuple(x.shape[-1:]))
            check_dtype(f"{name} {part}", tensor, dtypes, "convert it")
            check_device(f"{name} {part}", tensor, "hidden", x)
            check_memory(f"{name} {part}", tensor)
            dtypes = (tensor.dtype,)  # torch takes both of one
    check_finite(f"{name} eps", eps)
    if weight is None and bias is not None and bias.dtype != x.dtype:
        weight = torch.ones_like(bias)  # torch has no gradient for a wider bias alone
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _autocast(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden in the autocast dtype, where autocast is on; float64 is left alone."""
    device_type = hidden.device.type
    if hidden.is_meta or not torch.is_autocast_enabled(device_type) or hidden.dtype == torch.float64:
        return hidden  # (meta tensors have no autocast)
    check_memory("hidden", hidden)
    return hidden.to(torch.get_autocast_dtype(device_type))


def _check_tensors(optional: bool = False, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None or not optional:
            check_tensor(name, tensor)
