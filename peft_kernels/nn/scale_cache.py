"""`ScaleCache`: what DoRA multiplies a layer's outputs with, kept while nothing it depends on changes."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from peft_kernels.functional import dora_norm
from peft_kernels.ops.dora.functional import row_scale
from peft_kernels.ops.nf4.weight import NF4Weight

_ATTRIBUTE = "_scale_cache"  # of a module


class _Snapshot(NamedTuple):
    """A tensor as it was: it is still so if it is the same one, in the same memory, with no write since."""

    reference: weakref.ref[torch.Tensor]
    storage: StorageWeakRef  # says whether the memory at `address` was freed, and perhaps used again
    address: int
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        return cls(weakref.ref(tensor), storage, tensor.data_ptr(), tensor._version)

    def is_of(self, tensor: torch.Tensor) -> bool:
        return (
            self.reference() is tensor
            and self.version == tensor._version
            and self.address == tensor.data_ptr()
            and not self.storage.expired()  # type: ignore[no-untyped-call]
        )


class ScaleCache:
    """Keeps the norms of a DoRA layer in eval mode, and g = magnitude / norm where that needs no gradient.

    A change to a tensor is noticed by its identity, its memory and torch's version counter, which every
    in-place operation advances. Writes past it, through `.data`, NumPy or a raw pointer, are not: call
    `invalidate_norms` after them. Some optimizers write so, bitsandbytes' among them: therefore this is not
    for training mode.

    Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self._sources: tuple[_Snapshot, ...] = ()  # of the norm: W, A, B
        self._scaling = 0.0
        self._norm: torch.Tensor | None = None
        self._magnitude: _Snapshot | None = None
        self._scale: torch.Tensor | None = None

    def scale(
        self,
        weight: torch.Tensor | NF4Weight,
        parameter: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        magnitude: torch.Tensor,
        scaling: float | torch.Tensor,
    ) -> torch.Tensor:
        """`row_scale(magnitude, dora_norm(weight, lora_a, lora_b, scaling))`, or what is kept of it.

        Args:
            weight: W [N, K].
            parameter: the tensor that W is stored in.
            lora_a: [r, K].
            lora_b: [N, r].
            magnitude: [N].
            scaling: as `dora_norm` takes it.
        """
        sources = (parameter, lora_a, lora_b)
        # In a graph a kept result would be a constant; tensors made in inference mode have no version.
        if (
            torch.compiler.is_compiling()
            or isinstance(scaling, torch.Tensor)
            or any(tensor.is_inference() for tensor in (*sources, magnitude))
        ):
            return row_scale(magnitude, dora_norm(weight, lora_a, lora_b, scaling))
        if self._norm is None or scaling != self._scaling or not self._unchanged(sources):
            # Normal tensors even in inference mode: they may be used outside of it later.
            with torch.inference_mode(False):
                self._norm = dora_norm(weight, lora_a, lora_b, scaling)
            self._sources, self._scaling = tuple(map(_Snapshot.of, sources)), scaling
            self._scale = None
        if magnitude.requires_grad and torch.is_grad_enabled():
            return row_scale(magnitude, self._norm)
        if self._scale is None or self._magnitude is None or not self._magnitude.is_of(magnitude):
            with torch.inference_mode(False), torch.no_grad():
                self._scale = row_scale(magnitude, self._norm)
            self._magnitude = _Snapshot.of(magnitude)
        return self._scale

    def _unchanged(self, sources: Sequence[torch.Tensor]) -> bool:
        return all(map(_Snapshot.is_of, self._sources, sources))

    def clear(self) -> None:
        """Forget everything."""
        self._norm = self._scale = None

    def __reduce__(self) -> tuple[type["ScaleCache"], tuple[()]]:
        return ScaleCache, ()


def scale_cache(module: nn.Module) -> ScaleCache:
    """The cache of a module, made on first use; not part of its state_dict."""
    cache: ScaleCache | None = module.__dict__.get(_ATTRIBUTE)
    if cache is None:
        cache = module.__dict__[_ATTRIBUTE] = ScaleCache()
    return cache


def invalidate_norms(model: nn.Module) -> None:
    """Make every DoRA layer of `model` compute its norms anew.

    To be called after weights of a model in eval mode were changed through `.data`, NumPy or a raw pointer,
    which torch does not notice. Any other change is noticed, and in training mode norms are not kept.
    """
    for module in model.modules():
        cache: ScaleCache | None = module.__dict__.get(_ATTRIBUTE)
        if cache is not None:
            cache.clear()
