"""Launches of the adapted linear's forward."""

import torch
from triton import cdiv

from peft_kernels.core.gpu import gpu
from peft_kernels.core.triton_reduce import sum_partials
from peft_kernels.ops.linear import triton_forward_kernels as kernels
from peft_kernels.ops.linear import triton_launch as launch
from peft_kernels.ops.linear import triton_plan
from peft_kernels.ops.linear.schema import ForwardArgs, base_weight
from peft_kernels.ops.linear.triton_plan import Product, part, rank_tile


class Forward:
    """One forward: its arguments, and the tensors it writes.

    Attributes:
        y: [M, N].
        u: fp32 [M, r], or [0].
        z: [M, N], or None where it is not kept.
    """

    def __init__(self, a: ForwardArgs, save_preactivation: bool) -> None:
        self._a = a = launch.with_plain_strides(a)
        m, n = a.x.shape[0], a.out_features
        self.y = a.x.new_empty(m, n)
        self.z = a.x.new_empty(m, n) if save_preactivation else None
        self.u = a.x.new_empty(0, dtype=torch.float32) if a.lora_a is None else self._project(a.lora_a)
        if m == 0:
            return
        if a.absmax is None:
            self._dense()
            return
        plan = triton_plan.forward_plan(Product(m, n, a.x.shape[1], a.blocksize, a.x.dtype), gpu())
        if plan.tile is None:
            self._panels()
        elif plan.method == "decode":
            self._decode(plan.tile)
        else:
            self._matmul(plan.tile, plan.splits)

    def _project(self, lora_a: torch.Tensor) -> torch.Tensor:
        """u = D(x) A^T."""
        a, (m, k), rank = self._a, self._a.x.shape, lora_a.shape[0]
        if m == 0:
            return a.x.new_empty(0, rank, dtype=torch.float32)
        tile, ranks = launch.PROJECTION, rank_tile(rank)
        block_m = launch.token_tile(tile.block_m, m)
        ctas = cdiv(m, block_m) * cdiv(rank, ranks)
        columns = part(k, triton_plan.splits(ctas, k, tile.block_k, gpu()), tile.block_k)
        partials = a.x.new_empty(cdiv(k, columns), m, rank, dtype=torch.float32)
        kernels.project_kernel[(cdiv(m, block_m), partials.shape[0], cdiv(rank, ranks))](
            a.x, lora_a, partials, *launch.dropout(a), m, k, a.x.stride(0), rank, columns,
            BM=block_m, BK=tile.block_k, R=ranks, GROUPED=k % 4 == 0, PRECISION=launch.precision(),
            **launch.options(tile),
        )  # fmt: skip
        return sum_partials(partials)

    def _tail(self) -> tuple[torch.Tensor | float | None, ...]:
        """Arguments of every kernel that has the epilogue in it."""
        a = self._a
        return self.y, self.z, self.u, a.lora_b, a.column_scale, a.bias, a.scaling

    def _decode(self, tile: triton_plan.Tile) -> None:
        a, (m, k), base = self._a, self._a.x.shape, base_weight(self._a)
        kernels.decode_kernel[(cdiv(a.out_features, tile.block_n),)](
            a.x, *base[:5], a.input_scale, *self._tail(), m, a.out_features, k, a.x.stride(0), launch.rank(a),
            BM=tile.block_m, BN=tile.block_n, BK=tile.block_k, R=rank_tile(launch.rank(a)),
            **launch.nf4_format(base), **launch.options(tile),
        )  # fmt: skip

    def _matmul(self, tile: triton_plan.Tile, splits: int) -> None:
        a, (m, k), base, n = self._a, self._a.x.shape, base_weight(self._a), self._a.out_features
        partials = None if splits == 1 else a.x.new_empty(splits, m, n, dtype=torch.float32)
        kernels.matmul_kernel[(cdiv(n, tile.block_n), cdiv(m, tile.block_m), splits)](
            a.x, *base[:5], a.input_scale, partials, *self._tail(), m, n, k, a.x.stride(0), launch.rank(a),
            part(k, splits, tile.block_k),
            BM=tile.block_m, BN=tile.block_n, BK=tile.block_k, R=rank_tile(launch.rank(a)),
            PRECISION=launch.precision(), **launch.nf4_format(base), **launch.options(tile),
        )  # fmt: skip
        if partials is not None:
            self._epilogue(partials, 0, 0)

    def _epilogue(self, partials: torch.Tensor, first_token: int, first_output: int) -> None:
        """Finish the outputs whose base products' parts are [splits, tokens, width]."""
        (splits, tokens, width), a, tile = partials.shape, self._a, launch.EPILOGUE
        block_m = launch.token_tile(tile.block_m, tokens)
        kernels.epilogue_kernel[(cdiv(tokens, block_m), cdiv(width, tile.block_n))](
            partials, *self._tail(), *self.y.shape, launch.rank(a), splits, first_token, tokens, first_output,
            width, BM=block_m, BN=tile.block_n, R=rank_tile(launch.rank(a)), PRECISION=launch.precision(),
            **launch.options(tile),
        )  # fmt: skip

    def _panels(self) -> None:
        """Dequantise a panel of outputs, multiply it while it is in L2, and on to the next."""
        a, n, k = self._a, self._a.out_features, self._a.x.shape[1]
        height = triton_plan.panel_size(n, k * a.x.element_size(), launch.PANEL.block_n)
        scratch = a.x.new_empty(height, k)
        for first in range(0, n, height):
            panel = scratch[: n - first]
            launch.dequantize(base_weight(a), (n, k), panel, (first, 0), None, a.input_scale)
            self._product(a.x, panel, first)

    def _dense(self) -> None:
        a = self._a
        x = launch.scaled(a.x, a.input_scale)
        height = triton_plan.panel_size(a.out_features, x.shape[1] * x.element_size(), launch.PANEL.block_n)
        for first in range(0, a.out_features, height):
            self._product(x, a.weight[first : first + height], first)

    def _product(self, x: torch.Tensor, panel: torch.Tensor, first: int) -> None:
        """Outputs `first` and on, of the dense weight `panel` [width, K]."""
        a, width = self._a, panel.shape[0]
        if a.lora_b is None and a.column_scale is None and a.bias is None and self.z is None:
            torch.mm(x, panel.t(), out=self.y[:, first : first + width])
            return
        tokens = triton_plan.panel_size(x.shape[0], 2 * width, launch.EPILOGUE.block_m)
        for token in range(0, x.shape[0], tokens):
            self._epilogue(launch.gemm(x[token : token + tokens], panel.t())[None], token, first)
