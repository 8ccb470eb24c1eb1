"""Gradient of the bottleneck adapter: an autograd.Function around its two ops."""

import math
from typing import Any

import torch

from peft_kernels.core.backend import resolve
from peft_kernels.ops.adapter.schema import Operands

Gradients = tuple[torch.Tensor | None, ...]


class BottleneckAdapter(torch.autograd.Function):
    """Saves the caller's own hidden and parameters, nothing else: the rest is computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        residual_is_hidden: bool,
        need_down: bool,
        need_up: bool,
        *operands: Any,
    ) -> tuple[torch.Tensor | None, ...]:
        """hidden [..., d], residual [..., N] and `Operands` to out [..., N], down [..., r], up [..., N].

        With `residual_is_hidden` the residual is None, and hidden is meant. down and up are None where they
        are not needed.
        """
        a, x = Operands(*operands), flatten(hidden)
        shortcut = x if residual_is_hidden else None if residual is None else flatten(residual)
        results = resolve("bottleneck_adapter", hidden)(x, shortcut, *operands, need_down, need_up)
        # Not in backward: for a GPU's tensors autograd runs it in a thread that use_backend does not reach.
        ctx.backward_op = resolve("bottleneck_adapter_backward", hidden)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            hidden, a.down_weight, a.down_bias, a.up_weight, a.up_bias, a.scale, a.gate, a.seed
        )
        ctx.constants = (a.activation, a.scaling, a.dropout_p, residual_is_hidden)
        lead = hidden.shape[:-1]
        # Not reshape: autograd forbids in-place use of a view that a Function returns.
        return tuple(
            torch.ops.aten._unsafe_view(result, [*lead, result.shape[-1]]) if needed else None
            for result, needed in zip(results, (True, need_down, need_up), strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Gradients:
        """Gradients of out, down and up, each maybe None, to those of `forward`'s arguments."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            results: Gradients = _OnceDifferentiable.apply(  # type: ignore[no-untyped-call]
                ctx, *grads, *ctx.saved_tensors
            )
            return results
        return BottleneckAdapter.gradients(ctx, *grads, *ctx.saved_tensors)

    @staticmethod
    def gradients(
        ctx: Any,
        grad: torch.Tensor | None,
        grad_down: torch.Tensor | None,
        grad_up: torch.Tensor | None,
        *saved: Any,
    ) -> Gradients:
        """What `backward` returns, from what `forward` saved.

        Gradients are linear in (grad, grad_down, grad_up), and `up` is what out is without dropout, gate and
        residual: where its own gradient is given too, the op is called for it alone, and the two are added.
        """
        hidden, down_weight, down_bias, up_weight, up_bias, scale, gate, seed = saved
        activation, scaling, dropout_p, residual_is_hidden = ctx.constants
        needs = ctx.needs_input_grad
        need_hidden, need_residual = needs[0], needs[1]
        # In the order of Operands: the activation, scaling, dropout_p and seed have no gradient.
        wanted = (need_hidden, *needs[5:9], needs[11], needs[12])

        def run(
            upstream: torch.Tensor, gated: bool, to_hidden: bool, below: torch.Tensor | None
        ) -> list[torch.Tensor | None]:
            need = (*wanted[:6], wanted[6] and gated)
            results = ctx.backward_op(
                *(flatten(upstream), None if below is None else flatten(below), flatten(hidden)),
                *(down_weight, down_bias, up_weight, up_bias, activation, scaling, scale),
                *(gate if gated else None, dropout_p if gated else 0.0, seed if gated else None),
                *(to_hidden, *need),
            )
            return [result if needed else None for result, needed in zip(results, need, strict=True)]

        parts = []
        if any(wanted) and grad is not None:
            parts.append(run(grad, True, residual_is_hidden, grad_down))
        if any(wanted) and (grad_up is not None or (grad is None and grad_down is not None)):
            if grad_up is None:
                grad_up = hidden.new_zeros(()).expand(*hidden.shape[:-1], up_weight.shape[0])
            parts.append(run(grad_up, False, False, grad_down if grad is None else None))
        totals = parts[0] if parts else [None] * 7
        if len(parts) == 2:
            totals = [_sum(one, two) for one, two in zip(*parts, strict=True)]
        dhidden, *dparameters, dscale, dgate = totals
        if dhidden is not None:
            dhidden = dhidden.reshape(hidden.shape)
        dresidual = grad if need_residual else None
        return dhidden, dresidual, None, None, None, *dparameters, None, None, dscale, dgate, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """The gradients as a node of the graph, which refuses to be differentiated."""

    @staticmethod
    def forward(_: Any, first_ctx: Any, *grads_and_saved: Any) -> Gradients:
        return BottleneckAdapter.gradients(first_ctx, *grads_and_saved)

    @staticmethod
    def backward(_: Any, *grads: Any) -> None:
        raise NotImplementedError(
            "bottleneck_adapter has no second derivative: its gradients come from kernels with no formula "
            "for theirs; differentiate once, or use torch.nn.functional.linear and the activation"
        )


def flatten(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K]; a view where the strides allow it."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _sum(one: torch.Tensor | None, two: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or two is None:
        return two if one is None else one
    return one + two
