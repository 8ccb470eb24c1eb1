"""Launches of dx = l_in ⊙ (dz W) + D'(du A) and of dl_in = sum_m x ⊙ (dz W)."""

from dataclasses import dataclass

import torch
from triton import cdiv

from peft_kernels.core.gpu import gpu
from peft_kernels.core.triton_reduce import sum_partials
from peft_kernels.ops.linear import triton_backward_kernels as kernels
from peft_kernels.ops.linear import triton_launch as launch
from peft_kernels.ops.linear import triton_plan
from peft_kernels.ops.linear.schema import ForwardArgs, base_weight
from peft_kernels.ops.linear.triton_plan import Plan, Product, Tile, part, rank_tile

Gradients = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass
class InputGradient:
    """One gradient of the input.

    Attributes:
        f: arguments of the forward.
        grad: [M, N].
        du: fp32 [M, r], or None.
        dx: [M, K] to write, or None.
        parts: fp32 [blocks of tokens, K] to write, the parts of dl_in, or None.
        block_m: tokens of such a block.
    """

    f: ForwardArgs
    grad: torch.Tensor
    du: torch.Tensor | None
    dx: torch.Tensor | None
    parts: torch.Tensor | None
    block_m: int

    def matmul(self, tile: Tile, splits: int) -> None:
        """Decode W tile by tile into tensor-core products."""
        f, (m, n), k, base = self.f, self.grad.shape, self.f.x.shape[1], base_weight(self.f)
        partials = None if splits == 1 else self.grad.new_empty(splits, m, k, dtype=torch.float32)
        kernels.input_gradient_kernel[(cdiv(k, tile.block_k), cdiv(m, tile.block_m), splits)](
            self.grad, *base[:5], f.column_scale, partials, *self._tail(),
            m, n, k, self.grad.stride(0), f.x.stride(0), launch.rank(f), part(n, splits, tile.block_n),
            BM=tile.block_m, BN=tile.block_n, BK=tile.block_k, R=rank_tile(launch.rank(f)),
            GROUPED=k % 4 == 0, PRECISION=launch.precision(), **launch.nf4_format(base),
            **launch.options(tile),
        )  # fmt: skip
        if partials is not None:
            self._epilogue(partials, 0, 0)

    def panels(self) -> None:
        """A panel of inputs at a time, so that each product is a whole sum; NF4 is dequantised into one."""
        f, grad, (n, k) = self.f, self.grad, (self.grad.shape[1], self.f.x.shape[1])
        width = triton_plan.panel_size(k, n * grad.element_size(), launch.PANEL.block_k)
        if f.absmax is None:
            grad = launch.scaled(grad, f.column_scale)
            for first in range(0, k, width):
                self._product(grad, f.weight[:, first : first + width], first)
            return
        scratch = grad.new_empty(n * width)
        for first in range(0, k, width):
            panel = scratch[: n * min(width, k - first)].view(n, -1)
            launch.dequantize(base_weight(f), (n, k), panel, (0, first), f.column_scale, None)
            self._product(grad, panel, first)

    def _product(self, grad: torch.Tensor, panel: torch.Tensor, first: int) -> None:
        """Inputs `first` and on, from their columns of the weight, [N, width]."""
        width = panel.shape[1]
        if self.parts is None and self.du is None and self.f.input_scale is None and self.dx is not None:
            torch.mm(grad, panel, out=self.dx[:, first : first + width])
            return
        tokens = triton_plan.panel_size(grad.shape[0], 2 * width, self.block_m)
        for token in range(0, grad.shape[0], tokens):
            self._epilogue(launch.gemm(grad[token : token + tokens], panel)[None], token, first)

    def _epilogue(self, partials: torch.Tensor, first_token: int, first_input: int) -> None:
        (splits, tokens, width), f, tile = partials.shape, self.f, launch.EPILOGUE
        kernels.input_gradient_epilogue_kernel[(cdiv(tokens, self.block_m), cdiv(width, tile.block_k))](
            partials, *self._tail(), *f.x.shape, f.x.stride(0), launch.rank(f),
            splits, first_token, tokens, first_input, width,
            BM=self.block_m, BK=tile.block_k, R=rank_tile(launch.rank(f)), GROUPED=f.x.shape[1] % 4 == 0,
            PRECISION=launch.precision(), **launch.options(tile),
        )  # fmt: skip

    def _tail(self) -> tuple[torch.Tensor | float | None, ...]:
        """Arguments of every kernel that has the epilogue in it."""
        f, lora_a = self.f, self.f.lora_a if self.du is not None else None
        return self.dx, self.du, lora_a, f.input_scale, f.x, self.parts, *launch.dropout(f)


def input_gradient(
    f: ForwardArgs, grad: torch.Tensor, du: torch.Tensor | None, need_x: bool, need_input_scale: bool
) -> Gradients:
    """dx [M, K] and dl_in [K], those that are needed; rows of grad and all of f are plain."""
    if not (need_x or need_input_scale):
        return None, None
    (m, n), k = grad.shape, f.x.shape[1]
    plan = Plan("panels")
    if f.absmax is not None:
        plan = triton_plan.backward_plan(Product(m, n, k, f.blocksize, f.x.dtype), gpu())
    block_m = launch.token_tile(launch.EPILOGUE.block_m, max(m, 1))
    if plan.tile is not None and plan.splits == 1:  # the product's kernel has the epilogue in it
        block_m = plan.tile.block_m
    dx = f.x.new_empty(m, k) if need_x else None
    parts = f.x.new_empty(cdiv(m, block_m), k, dtype=torch.float32) if need_input_scale else None
    if m:
        run = InputGradient(f, grad, du if need_x else None, dx, parts, block_m)
        if plan.tile is None:
            run.panels()
        else:
            run.matmul(plan.tile, plan.splits)
    if parts is None or f.input_scale is None:
        return dx, None
    return dx, sum_partials(parts, f.input_scale.dtype)
