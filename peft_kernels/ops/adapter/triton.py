"""Launchers of the bottleneck adapter's Triton kernels."""

from typing import Any

import torch
import triton

from peft_kernels.core.gpu import check_kernel_dtype, gpu, launch_options, with_plain_rows
from peft_kernels.core.triton_reduce import sum_partials
from peft_kernels.ops.adapter import triton_kernels as kernels
from peft_kernels.ops.adapter.schema import (
    BackwardArgs,
    Operands,
    check_bottleneck_adapter,
    check_bottleneck_adapter_backward,
    differentiated,
)
from peft_kernels.ops.adapter.triton_plan import Plan, make_plan, padded, share
from peft_kernels.ops.dropout.triton import keep_arguments

_COLUMNS, _UNITS = 16, 64  # of a tile of up_gradient_kernel
_CAST_ROWS = 1024  # from which on weights of another dtype are rounded before the kernels


def bottleneck_adapter(
    hidden: torch.Tensor, residual: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch the forward kernels; see `reference.bottleneck_adapter`."""
    a, need_down, need_up = Operands(*rest[:-2]), rest[-2], rest[-1]
    check_bottleneck_adapter(hidden, residual, a)
    check_kernel_dtype("hidden", hidden)
    hidden, a = with_plain_rows(hidden), _prepared(a, hidden)
    residual = None if residual is None else with_plain_rows(residual)
    (m, d), (n, r) = hidden.shape, a.up_weight.shape
    plan = _plan(hidden, a)
    out = hidden.new_empty([m, n], dtype=hidden.dtype if residual is None else residual.dtype)
    up = hidden.new_empty([m, n]) if need_up else None
    down = hidden.new_empty([m, r]) if need_down or not plan.fused else None
    if m and plan.fused:
        kernels.fused_kernel[(triton.cdiv(m, plan.block_m),)](
            hidden, hidden.stride(0), a.down_weight, a.down_weight.stride(0), a.down_bias,
            a.up_weight, a.up_weight.stride(0), a.up_bias, *_scale(a), a.gate, *_dropout(a),
            residual, 0 if residual is None else residual.stride(0), out, down, up, m, d, r, n,
            ACTIVATION=a.activation, GROUPED=n % 4 == 0, BM=plan.block_m, BK=plan.block_k,
            BN=plan.fused_block_n, BR=padded(r),
            PRECISION=plan.precision, **launch_options(plan.warps, plan.stages),
        )  # fmt: skip
    elif m:
        assert down is not None
        _narrow(plan, hidden, a, down=down)
        _widen(plan, down, a.up_weight, residual, out, up, a.up_bias, _scale(a), a.gate, _dropout(a))
    return (
        out,
        down if need_down and down is not None else hidden.new_empty(0),
        hidden.new_empty(0) if up is None else up,
    )


def bottleneck_adapter_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    """Launch the backward kernels; see `reference.bottleneck_adapter_backward`."""
    b = BackwardArgs(*args)
    check_bottleneck_adapter_backward(b)
    check_kernel_dtype("hidden", b.hidden)
    wanted = differentiated(b)
    gradients = _gradients(b) if b.hidden.shape[0] and any(needed for _, needed in wanted) else [None] * 7
    return tuple(
        (b.hidden if of is None else of).new_zeros(of.shape if needed and of is not None else 0)
        if gradient is None
        else gradient
        for gradient, (of, needed) in zip(gradients, wanted, strict=True)
    )


def _gradients(b: BackwardArgs) -> list[torch.Tensor | None]:
    """The gradients that are needed, in the order of the op's results, of at least one token."""
    hidden, grad, a = with_plain_rows(b.hidden), with_plain_rows(b.grad), _prepared(b.operands, b.hidden)
    (m, d), r = hidden.shape, a.up_weight.shape[1]
    plan = _plan(hidden, a)
    down = hidden.new_empty([m, r]) if b.need_up_weight or b.need_scale else None
    dz = hidden.new_empty([m, r]) if b.need_hidden or b.need_down_weight else None
    dbiases = _sums(hidden, triton.cdiv(m, plan.finish[0]), r) if b.need_down_bias else None
    dgates = _sums(hidden, triton.cdiv(r, plan.finish[1]), m) if b.need_gate else None
    upstream = any(part is not None for part in (dz, dbiases, dgates))
    if upstream or down is not None:
        grad_down = None if b.grad_down is None else with_plain_rows(b.grad_down)
        _narrow(plan, hidden, a, grad if upstream else None, grad_down, down, dz, dbiases, dgates)
    dhidden = ddown_weight = None
    if b.need_hidden:
        assert dz is not None
        dhidden = hidden.new_empty([m, d])
        _widen(plan, dz, a.down_weight.t(), grad if b.residual_is_hidden else None, dhidden)
    if b.need_down_weight:
        sums = _sums(hidden, plan.token_splits[0], r, d)
        _token_product(plan, hidden, dz, sums.transpose(1, 2))
        ddown_weight = sum_partials(sums, b.down_weight.dtype)
    return [
        dhidden,
        ddown_weight,
        None if dbiases is None or b.down_bias is None else sum_partials(dbiases, b.down_bias.dtype),
        *_up_gradients(b, plan, grad, down, a),
        None if dgates is None or b.gate is None else sum_partials(dgates, b.gate.dtype),
    ]


def _up_gradients(
    b: BackwardArgs, plan: Plan, grad: torch.Tensor, down: torch.Tensor | None, a: Operands
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of up_weight, up_bias and scale, where they are needed."""
    if not (b.need_up_weight or b.need_up_bias or b.need_scale):
        return None, None, None
    (n, r), splits = b.up_weight.shape, plan.token_splits[1]
    sums = None if down is None else _sums(grad, splits, n, r)
    column_sums = _sums(grad, splits, n) if b.need_up_bias or b.need_scale else None
    _token_product(plan, grad, down, sums, column_sums, a.gate, _dropout(a))
    weight, bias, scale = with_plain_rows(b.up_weight), b.up_bias, b.scale
    dweight = weight.new_empty([n, r]) if b.need_up_weight else None
    dbias = bias.new_empty([n]) if b.need_up_bias and bias is not None else None
    dscale = _sums(grad, n) if b.need_scale else None
    kernels.up_gradient_kernel[(triton.cdiv(n, _COLUMNS),)](
        sums, column_sums, splits, weight, weight.stride(0), a.up_bias, *_scale(a), dweight, dbias, dscale,
        r, n, BN=_COLUMNS, BR=_UNITS, **launch_options(4),
    )  # fmt: skip
    if dscale is not None and scale is not None:
        # One number is a sum over the columns, [N] a sum of one part.
        dscale = sum_partials(dscale.view(-1, scale.numel()), scale.dtype)
    return dweight, dbias, dscale


def _narrow(
    plan: Plan,
    hidden: torch.Tensor,
    a: Operands,
    grad: torch.Tensor | None = None,
    grad_down: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    dz: torch.Tensor | None = None,
    dbias: torch.Tensor | None = None,
    dgate: torch.Tensor | None = None,
) -> None:
    """Write those given of down and dz [M, r] and of the partial sums of ddown_bias and dgate.

    The last three come from `grad`.
    """
    (m, d), (n, r) = hidden.shape, a.up_weight.shape
    split, chunks = plan.splits > 1, triton.cdiv(r, plan.block_r)
    sums = _sums(hidden, plan.splits, 1 if grad is None else 2, m, r) if split else None
    bias_sums = _sums(hidden, plan.splits, m) if split and dgate is not None else None
    finishing = (a.down_bias, a.gate, grad_down, _stride(grad_down), down, dz, dbias, dgate)
    kernels.narrow_kernel[(triton.cdiv(m, plan.block_m) * chunks, plan.splits)](
        hidden, hidden.stride(0), a.down_weight, a.down_weight.stride(0), grad, _stride(grad),
        a.up_weight, a.up_weight.stride(0), a.up_bias, *_scale(a), *_dropout(a), *finishing, sums, bias_sums,
        m, d, r, n, share(d, plan.splits, plan.block_k), share(n, plan.splits, plan.block_k), chunks,
        ACTIVATION=a.activation, SPLIT=split, GROUPED=n % 4 == 0, BM=plan.block_m, BK=plan.block_k,
        BR=plan.block_r, PRECISION=plan.precision, **launch_options(plan.warps, plan.stages),
    )  # fmt: skip
    if split:
        block_m, block_r = plan.finish
        chunks = triton.cdiv(r, block_r)
        kernels.finish_kernel[(triton.cdiv(m, block_m) * chunks,)](
            sums, bias_sums, plan.splits, *finishing, m, r, chunks, ACTIVATION=a.activation,
            PRODUCTS=1 if grad is None else 2, BM=block_m, BR=block_r, **launch_options(1),
        )  # fmt: skip


def _widen(
    plan: Plan,
    down: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: tuple[torch.Tensor | None, int, float] = (None, 0, 1.0),
    gate: torch.Tensor | None = None,
    dropout: tuple[torch.Tensor | None, int, float] = (None, 0, 1.0),
) -> None:
    """out = gate D(up) + residual, up = scale (down weightᵀ + bias), [M, N]; down [M, r], weight [N, r]."""
    (m, r), n = down.shape, weight.shape[0]
    kernels.up_kernel[(triton.cdiv(m, plan.block_m) * triton.cdiv(n, plan.block_n),)](
        down, weight, weight.stride(1), weight.stride(0), bias, *scale, gate, *dropout,
        residual, _stride(residual), out, up, m, r, n,
        GROUPED=n % 4 == 0, BM=plan.block_m, BK=min(plan.block_k, plan.block_r), BN=plan.block_n,
        PRECISION=plan.precision, **launch_options(plan.warps, plan.stages),
    )  # fmt: skip


def _token_product(
    plan: Plan,
    x: torch.Tensor,
    p: torch.Tensor | None,
    sums: torch.Tensor | None,
    column_sums: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    dropout: tuple[torch.Tensor | None, int, float] = (None, 0, 1.0),
) -> None:
    """Shares of (gate D'(x))ᵀ p, into sums [S, C, r] of any strides; and of the sums of its columns."""
    m, columns = x.shape
    r = 1 if p is None else p.shape[1]
    given = column_sums if sums is None else sums
    assert given is not None
    splits, chunks = given.shape[0], triton.cdiv(r, plan.block_r)
    strides = (0, 0) if sums is None else sums.stride()[1:]
    kernels.token_product_kernel[(triton.cdiv(columns, plan.block_c) * chunks, splits)](
        x, x.stride(0), gate, *dropout, p, sums, *strides, column_sums, m, columns, r,
        share(m, splits, plan.block_k), chunks,
        GROUPED=columns % 4 == 0, BT=plan.block_k, BC=plan.block_c, BR=plan.block_r,
        PRECISION=plan.precision, **launch_options(plan.warps, plan.stages),
    )  # fmt: skip


def _plan(hidden: torch.Tensor, a: Operands) -> Plan:
    (m, d), (n, r) = hidden.shape, a.up_weight.shape
    itemsize = max(hidden.itemsize, a.down_weight.itemsize, a.up_weight.itemsize)
    return make_plan(m, d, r, n, hidden.dtype, itemsize, gpu())


def _scale(a: Operands) -> tuple[torch.Tensor | None, int, float]:
    """The scale's tensor, its stride, and the factor where there is no tensor."""
    if a.scale is None:
        return None, 0, a.scaling
    return a.scale, int(a.scale.numel() > 1), 1.0


def _dropout(a: Operands) -> tuple[torch.Tensor | None, int, float]:
    return keep_arguments(a.dropout_p, a.seed)


def _prepared(a: Operands, hidden: torch.Tensor) -> Operands:
    """The same with strides that the kernels take, and for many tokens weights in the dtype of hidden.

    The kernels round them to it anyway; doing it once saves every row tile half of their bytes.
    """
    dtype = hidden.dtype if hidden.shape[0] >= _CAST_ROWS else None
    vectors = {name: getattr(a, name) for name in ("down_bias", "up_bias", "scale", "gate")}
    return a._replace(
        down_weight=with_plain_rows(a.down_weight).to(dtype),
        up_weight=with_plain_rows(a.up_weight).to(dtype),
        **{name: vector.contiguous() for name, vector in vectors.items() if vector is not None},
    )


def _stride(matrix: torch.Tensor | None) -> int:
    return 0 if matrix is None else matrix.stride(0)


def _sums(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Room for fp32 partial sums."""
    return like.new_empty(shape, dtype=torch.float32)
