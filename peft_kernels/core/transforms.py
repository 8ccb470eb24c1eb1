"""Ways of differentiating that the kernels have no formula for, found so that none is silently ignored."""

import torch


def transform_reason() -> str:
    """Why a kernel must not be called here, or "".

    torch.func transforms (grad, jvp, vmap, …) and forward-mode differentiation would go past the ops'
    hand-written `autograd.Function`s: a tangent, for one, would silently be zero.
    """
    if _is_inside_transform():
        return "inside a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:  # torch.compile guards on what is read here
        return "under forward-mode differentiation"
    return ""


def _is_inside_transform() -> bool:
    """Asked by torch.compile while it traces: it has then entered the transforms of what it traces."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# What @torch.compiler.assume_constant_result sets; that would import all of torch._dynamo here.
_is_inside_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def refuse_transforms(op_name: str, remedy: str) -> None:
    """Raise where `transform_reason` has a reason.

    Raises:
        NotImplementedError: naming the op, the reason and the remedy.
    """
    reason = transform_reason()
    if reason:
        raise NotImplementedError(
            f"{op_name} is not available {reason}: it has backward derivatives only, and others would "
            f"silently be zero; differentiate backward, outside torch.func, or use {remedy}"
        )
