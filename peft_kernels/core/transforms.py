"""Ways of differentiating that the kernels have no formula for: found, so that they are refused and not ignored."""

import torch


def transform_reason() -> str:
    """Why a kernel must not be called here, or "".

    torch.func transforms (grad, jvp, vmap, …) and forward-mode differentiation would go past the ops'
    hand-written `autograd.Function`s: a tangent, for one, would silently be zero.
    """
    if torch.compiler.is_compiling():
        return ""  # a trace does not see them; torch.compile inside a transform is refused by torch itself
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    if torch.autograd.forward_ad._current_level >= 0:
        return "under forward-mode differentiation"
    return ""
