"""Gradient of the adapted linear: an autograd.Function around its two ops."""

import math
from typing import Any

import torch

from peft_kernels.core.backend import resolve
from peft_kernels.ops.linear.schema import ForwardArgs, base_weight


class AdaptedLinear(torch.autograd.Function):
    """Saves the caller's own x, u [M, r] and z [M, N], each only if a gradient that is wanted needs it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        """`ForwardArgs`, but for x [..., K], to y [..., N]."""
        args, need = ForwardArgs(x, *rest), ForwardArgs(*ctx.needs_input_grad)
        y, u, z = resolve("adapted_linear", x)(flatten(x), *rest, need.column_scale)
        # Not in backward: for a GPU's tensors autograd runs it in a thread that use_backend does not reach.
        ctx.backward_op = resolve("adapted_linear_backward", x)
        ctx.save_for_backward(
            x if need.lora_a or need.input_scale else None,
            *base_weight(args)[:5],
            args.lora_a,
            args.lora_b,
            args.column_scale,
            args.input_scale,
            args.seed,
            u if need.lora_b else None,
            z if need.column_scale else None,
        )
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.blocksizes = base_weight(args)[5:]
        ctx.scaling, ctx.dropout_p = args.scaling, args.dropout_p
        ctx.bias_dtype = None if args.bias is None else args.bias.dtype
        # Not reshape: autograd forbids in-place use of a view that a Function returns, as in `y += residual`.
        out: torch.Tensor = torch.ops.aten._unsafe_view(y, [*x.shape[:-1], args.out_features])
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """grad [..., N] to one gradient, or None, for each argument of `forward`."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            results: tuple[torch.Tensor | None, ...] = _OnceDifferentiable.apply(  # type: ignore[no-untyped-call]
                ctx, grad, *ctx.saved_tensors
            )
            return results
        return AdaptedLinear.gradients(ctx, grad, *ctx.saved_tensors)

    @staticmethod
    def gradients(ctx: Any, grad: torch.Tensor, *saved: Any) -> tuple[torch.Tensor | None, ...]:
        """What `backward` returns, from what `forward` saved."""
        x, *base, lora_a, lora_b, column_scale, input_scale, seed, u, z = saved
        if x is None:  # its values are not needed: a stand-in without memory carries its shape and dtype
            x = grad.new_empty((), dtype=ctx.x_dtype).expand(ctx.x_shape)
        need = ForwardArgs(*ctx.needs_input_grad)
        needs = (need.x, need.lora_a, need.lora_b, need.column_scale, need.input_scale, need.bias)
        gradients = ctx.backward_op(
            *(flatten(grad), flatten(x), *base, *ctx.blocksizes),
            *(lora_a, lora_b, ctx.scaling, column_scale, input_scale, ctx.dropout_p, seed, u, z, *needs),
        )
        dx, dlora_a, dlora_b, dcolumn_scale, dinput_scale, dbias = (
            gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
        )
        if dx is not None:
            dx = dx.reshape(ctx.x_shape)
        if dbias is not None:
            dbias = dbias.to(ctx.bias_dtype)
        no_base = (None,) * 8  # weight … out_features
        return dx, *no_base, dlora_a, dlora_b, None, dcolumn_scale, dinput_scale, dbias, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """The gradients as a node of the graph, which refuses to be differentiated."""

    @staticmethod
    def forward(_: Any, first_ctx: Any, grad: torch.Tensor, *saved: Any) -> tuple[torch.Tensor | None, ...]:
        return AdaptedLinear.gradients(first_ctx, grad, *saved)

    @staticmethod
    def backward(_: Any, *grads: Any) -> None:
        raise NotImplementedError(
            "adapted_linear has no second derivative: its gradients come from kernels with no formula for "
            "theirs; differentiate once, or use torch.nn.functional.linear on w.dequantize()"
        )


def flatten(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K]; a view where the strides allow it."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
