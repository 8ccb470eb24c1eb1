"""Launches of the adapted linear's backward: the sums over the gradient, and dlora_a."""

from typing import NamedTuple

import torch
from triton import cdiv

from peft_kernels.core.gpu import gpu
from peft_kernels.core.triton_reduce import sum_partials
from peft_kernels.ops.linear import triton_backward_kernels as kernels
from peft_kernels.ops.linear import triton_launch as launch
from peft_kernels.ops.linear import triton_plan
from peft_kernels.ops.linear.schema import BackwardArgs, ForwardArgs
from peft_kernels.ops.linear.triton_plan import part, rank_tile


class SumsOverGrad(NamedTuple):
    """What is summed from the gradient; None where it is not needed."""

    du: torch.Tensor | None  # fp32 [M, r]
    dlora_b: torch.Tensor | None  # [N, r]
    dcolumn_scale: torch.Tensor | None  # [N]
    dbias: torch.Tensor | None  # [N]


def sums_over_grad(a: BackwardArgs, f: ForwardArgs, grad: torch.Tensor) -> SumsOverGrad:
    """One pass over the gradient [M, N], in which blocks of tokens leave partial sums."""
    (m, n), lora = grad.shape, f.lora_b is not None
    need_du = lora and (a.need_x or a.need_lora_a)
    rank = launch.rank(f) if need_du or a.need_lora_b else 1
    wanted = (
        ((n, rank), f.lora_b if a.need_lora_b else None),
        ((n,), f.column_scale if a.need_column_scale else None),
        ((n,), grad if a.need_bias else None),
    )  # shape, and a tensor of the result's dtype
    if not need_du and all(of is None for _, of in wanted):
        return SumsOverGrad(None, None, None, None)
    tile, ranks = triton_plan.grad_tile(gpu()), rank_tile(rank)
    block_m = launch.token_tile(tile.block_m, max(m, 1))
    scratch = triton_plan.SCRATCH_BYTES // 4
    chunk = max(1, scratch // (n * rank))  # blocks whose partial sums are kept at a time
    ctas = max(1, min(chunk, cdiv(m, block_m))) * cdiv(rank, ranks)
    most = max(1, scratch // (max(m, 1) * rank))
    columns = part(n, min(most, triton_plan.splits(ctas, n, tile.block_n, gpu())), tile.block_n)
    du = grad.new_empty(cdiv(n, columns), m, rank, dtype=torch.float32) if need_du else None
    z, u = (None if saved is None else saved.contiguous() for saved in (a.z, a.u))
    totals = [of.new_zeros(shape) if of is not None and m == 0 else None for shape, of in wanted]
    for first in range(0, m, chunk * block_m):
        blocks = cdiv(min(m - first, chunk * block_m), block_m)
        partials = [  # the last is the sum over the chunks before
            None if of is None else grad.new_empty(blocks + (first > 0), *shape, dtype=torch.float32)
            for shape, of in wanted
        ]
        kernels.output_gradients_kernel[(blocks, cdiv(n, columns), cdiv(rank, ranks))](
            grad, z, u, f.lora_b, f.column_scale, du, *partials,
            first, m, n, grad.stride(0), rank, columns, f.scaling,
            BM=block_m, BN=tile.block_n, R=ranks, PRECISION=launch.precision(), **launch.options(tile),
        )  # fmt: skip
        last = first + chunk * block_m >= m
        for i, ((_, of), partial) in enumerate(zip(wanted, partials, strict=True)):
            if of is None or partial is None:
                continue
            if (total := totals[i]) is not None:
                partial[blocks] = total
            totals[i] = sum_partials(partial, of.dtype if last else torch.float32)
    return SumsOverGrad(None if du is None else sum_partials(du), *totals)


def lora_a_gradient(f: ForwardArgs, du: torch.Tensor) -> torch.Tensor:
    """dlora_a = du^T D(x), [r, K]."""
    assert f.lora_a is not None
    (m, k), rank = f.x.shape, f.lora_a.shape[0]
    if m == 0:
        return f.lora_a.new_zeros(rank, k)
    tile, ranks = launch.LORA_A_GRADIENT, rank_tile(rank)
    block_m = launch.token_tile(gpu().tile_rows, m)
    ctas = cdiv(k, tile.block_k) * cdiv(rank, ranks)
    most = max(1, triton_plan.SCRATCH_BYTES // (4 * rank * k))
    rows = part(m, min(most, triton_plan.splits(ctas, m, block_m, gpu())), block_m)
    partials = f.x.new_empty(cdiv(m, rows), rank, k, dtype=torch.float32)
    kernels.lora_a_gradient_kernel[(cdiv(k, tile.block_k), cdiv(m, rows), cdiv(rank, ranks))](
        f.x, du, partials, *launch.dropout(f), m, k, f.x.stride(0), rank, rows,
        BM=block_m, BK=tile.block_k, R=ranks, GROUPED=k % 4 == 0, PRECISION=launch.precision(),
        **launch.options(tile),
    )  # fmt: skip
    return sum_partials(partials, f.lora_a.dtype)
