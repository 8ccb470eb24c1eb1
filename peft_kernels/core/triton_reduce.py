"""The last step of sums that many CTAs share: their partial sums, added in an order that shapes alone fix."""

import torch
import triton
import triton.language as tl

_WARPS = 4
_TILE = 2048  # elements that a CTA loads at a time: 16 a thread


@triton.jit
def sum_kernel(partials_ptr, out_ptr, count, n, scale, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [n] = scale * the sum of partials [count, n], ROWS of them at a time."""
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < count)[:, None] & (columns < n)[None, :]
        offsets = rows.to(tl.int64)[:, None] * n + columns[None, :]
        total += tl.load(partials_ptr + offsets, mask=mask, other=0.0)
    result = tl.sum(total, 0) * scale
    tl.store(out_ptr + columns, result.to(out_ptr.dtype.element_ty), mask=columns < n)


def sum_partials(
    partials: torch.Tensor, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> torch.Tensor:
    """scale * Σ_s partials[s], summed in fp32 and rounded once.

    The order of the sum depends on the shape of `partials` alone.

    Args:
        partials: [S, ...], contiguous, float32; S may be 0.
        dtype: of the result.
        scale: factor; it is rounded to fp32.

    Returns:
        [...] in `dtype`.
    """
    out = partials.new_empty(partials.shape[1:], dtype=dtype)
    count, n = partials.shape[0], out.numel()
    if n:
        # Few columns a CTA where there are few columns: there are then CTAs for about every multiprocessor.
        columns = min(128, max(16, triton.next_power_of_2(n) // 128))
        rows = min(_TILE // columns, triton.next_power_of_2(max(1, count)))
        sum_kernel[(triton.cdiv(n, columns),)](
            partials, out, count, n, scale,
            ROWS=rows, COLUMNS=columns, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out
