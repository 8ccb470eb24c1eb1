"""`NormCache`: the norms of a DoRA layer, kept while nothing they depend on changes."""

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import nn

_ATTRIBUTE = "_norm_cache"  # of a module


class _Snapshot(NamedTuple):
    """A tensor as it was: it is still so if it is the same one, at the same place, with no write since."""

    reference: weakref.ref[torch.Tensor]
    address: int
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        return cls(weakref.ref(tensor), tensor.data_ptr(), tensor._version)

    def is_of(self, tensor: torch.Tensor) -> bool:
        return self.reference() is tensor and self[1:] == (tensor.data_ptr(), tensor._version)


class NormCache:
    """Keeps the result of `dora_norm` between calls in eval mode.

    A change to a tensor is noticed by its identity, its address and torch's version counter, which every
    in-place operation advances. Writes past it, through `.data`, NumPy or a raw pointer, are not: call
    `invalidate_norms` after them. Some optimizers write so, bitsandbytes' among them: therefore nothing is
    kept in training mode.

    Copies and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self._norm: torch.Tensor | None = None
        self._sources: tuple[_Snapshot, ...] = ()
        self._scaling = 0.0

    def get(
        self,
        compute: Callable[[], torch.Tensor],
        sources: Sequence[torch.Tensor],
        scaling: float | torch.Tensor,
        training: bool,
    ) -> torch.Tensor:
        """`compute()`, or what it gave before from the same tensors and scaling."""
        if torch.compiler.is_compiling():  # a kept norm would be a constant of the graph
            return compute()
        if training or isinstance(scaling, torch.Tensor) or any(tensor.is_inference() for tensor in sources):
            self.clear()
            return compute()
        fresh = scaling == self._scaling and all(map(_Snapshot.is_of, self._sources, sources))
        if self._norm is None or not fresh:
            # A normal tensor even where this is called in inference mode: it may be used outside of it later.
            with torch.inference_mode(False):
                self._norm = compute()
            self._sources, self._scaling = tuple(map(_Snapshot.of, sources)), scaling
        return self._norm

    def clear(self) -> None:
        """Forget the norm."""
        self._norm, self._sources = None, ()

    def __reduce__(self) -> tuple[type["NormCache"], tuple[()]]:
        return NormCache, ()


def norm_cache(module: nn.Module) -> NormCache:
    """The cache of a module, made on first use; not part of its state_dict."""
    cache: NormCache | None = module.__dict__.get(_ATTRIBUTE)
    if cache is None:
        cache = module.__dict__[_ATTRIBUTE] = NormCache()
    return cache


def invalidate_norms(model: nn.Module) -> None:
    """Make every DoRA layer of `model` compute its norms anew.

    To be called after weights of a model in eval mode were changed through `.data`, NumPy or a raw pointer,
    which torch does not notice. Any other change is noticed, and in training mode norms are not kept.
    """
    for module in model.modules():
        cache: NormCache | None = module.__dict__.get(_ATTRIBUTE)
        if cache is not None:
            cache.clear()
