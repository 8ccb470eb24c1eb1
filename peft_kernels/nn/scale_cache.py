"""DoRA in a module: norms in every call in training mode, kept in eval mode while their sources stay."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from peft_kernels.core.checks import check_module
from peft_kernels.functional import adapted_linear, dora_linear, dora_norm
from peft_kernels.ops.dora.functional import row_scale
from peft_kernels.ops.nf4.weight import NF4Weight

_ATTRIBUTE = "_scale_cache"  # of a module


def run_dora(
    module: nn.Module,
    x: torch.Tensor,
    weight: torch.Tensor | NF4Weight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """`dora_linear`; in eval mode the module keeps the norms (and drops nothing)."""
    cache = scale_cache(module)
    if module.training:
        cache.clear()
        return dora_linear(x, weight, lora_a, lora_b, magnitude, scaling, bias, dropout_p)
    scale = cache.scale(weight, lora_a, lora_b, magnitude, scaling)
    return adapted_linear(
        x, weight, lora_a=lora_a, lora_b=lora_b, scaling=scaling, column_scale=scale, bias=bias
    )


class _Kept(NamedTuple):
    """A norm and its sources; g and the magnitude it was made with, once needed without a gradient."""

    state: list[int]  # of W, A, B
    aliases: tuple[torch.Tensor, ...]  # of their memory: no other tensor can come to lie there
    scaling: float
    norm: torch.Tensor
    magnitude_state: list[int] | None = None
    magnitude: torch.Tensor | None = None  # an alias
    scale: torch.Tensor | None = None


def _state(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Where tensors lie, and how often they were written: the same only if nothing has changed."""
    return [number for tensor in tensors for number in (tensor.data_ptr(), tensor._version)]


class ScaleCache:
    """Keeps the norms of a DoRA layer in eval mode, and g = magnitude / norm where that needs no gradient.

    A change to a tensor is noticed by its memory and by torch's version counter, which every in-place
    operation advances. Writes past it, through `.data`, NumPy or a raw pointer, are not: call
    `invalidate_norms` after them. Some optimizers write so, bitsandbytes' among them: therefore this is not
    for training mode.

    Copies and pickles of a cache are empty. What it keeps is replaced as a whole, so threads may share it.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def scale(
        self,
        weight: torch.Tensor | NF4Weight,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        magnitude: torch.Tensor,
        scaling: float | torch.Tensor,
    ) -> torch.Tensor:
        """`row_scale(magnitude, dora_norm(weight, lora_a, lora_b, scaling))`, or what is kept of it."""
        base = weight.base_weight()[:5] if isinstance(weight, NF4Weight) else (weight,)
        sources = (*(tensor for tensor in base if tensor is not None), lora_a, lora_b)
        # In a graph, what is kept would be a constant; and writes to some tensors go unnoticed.
        noticed = not (torch.compiler.is_compiling() or _may_be_gathered())
        noticed = noticed and all(map(_counts_writes, (*sources, magnitude)))
        if isinstance(scaling, torch.Tensor) or not noticed:
            return row_scale(magnitude, dora_norm(weight, lora_a, lora_b, scaling))
        kept, state = self._kept, _state(sources)
        if kept is None or kept.state != state or kept.scaling != scaling:
            # Normal tensors even in inference mode: they may be used outside of it later.
            with torch.inference_mode(False), torch.no_grad():
                norm = dora_norm(weight, lora_a, lora_b, scaling)
                aliases = tuple(tensor.detach() for tensor in sources)
            kept = self._kept = _Kept(state, aliases, scaling, norm)
        if magnitude.requires_grad and torch.is_grad_enabled():
            return row_scale(magnitude, kept.norm)
        state = _state((magnitude,))
        if kept.scale is None or kept.magnitude_state != state:
            with torch.inference_mode(False), torch.no_grad():
                scale, alias = row_scale(magnitude, kept.norm), magnitude.detach()
            self._kept = kept._replace(magnitude_state=state, magnitude=alias, scale=scale)
            return scale
        return kept.scale

    def clear(self) -> None:
        """Forget everything."""
        self._kept = None

    def __reduce__(self) -> tuple[type["ScaleCache"], tuple[()]]:
        return ScaleCache, ()


def _counts_writes(tensor: torch.Tensor) -> bool:
    return (type(tensor) is torch.Tensor or type(tensor) is nn.Parameter) and not tensor.is_inference()


def _may_be_gathered() -> bool:
    """Whether FSDP may be in use, which writes parameters when it gathers them, and leaves their counters."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def scale_cache(module: nn.Module) -> ScaleCache:
    """The cache of a module, made on first use; not part of its state_dict."""
    cache: ScaleCache | None = module.__dict__.get(_ATTRIBUTE)
    if cache is None:
        cache = module.__dict__[_ATTRIBUTE] = ScaleCache()
    return cache


def invalidate_norms(model: nn.Module) -> None:
    """Make every DoRA layer of `model` compute its norms anew.

    To be called after weights of a model in eval mode were changed past torch's notice: through `.data`
    (`p.data.copy_(ema)`), NumPy or a raw pointer. In training mode norms are not kept, any other change is
    noticed, and so are PEFT's own changes of the base weight.

    Args:
        model: with `pk.nn.DoRALinear` or fused DoRA layers; others are left as they are.

    Raises:
        TypeError: `model` is not a module.
    """
    check_module("model", model, "pass the model itself")
    for module in model.modules():
        cache: ScaleCache | None = module.__dict__.get(_ATTRIBUTE)
        if cache is not None:
            cache.clear()
