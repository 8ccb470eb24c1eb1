"""How the native library computes a product with an NF4 weight: a pure function, asked of the library."""

import ctypes
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peft_kernels.core.backend import backend_of
from peft_kernels.core.library import native_library

NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of DType in csrc/cpu/api.h
MOST_TOKENS = 4096  # that `plans` looks at


@dataclass(frozen=True)
class Regime:
    """Numbers of tokens that one method takes.

    Attributes:
        first: the fewest.
        last: the most; None where there is no limit.
        method: its name, as in docs/cpu.md and docs/gpu.md.
    """

    first: int
    last: int | None
    method: str

    def __str__(self) -> str:
        if self.last is None:
            return self.method if self.first == 1 else f"{self.method} for M >= {self.first}"
        tokens = f"{self.first}" if self.first == self.last else f"{self.first} to {self.last}"
        return f"{self.method} for M = {tokens}"


@dataclass(frozen=True)
class Plan:
    """The methods that compute one product. Its text: "look-up GEMV for M = 1 to 8, ...".

    Attributes:
        regimes: by number of tokens M, without gaps, from 1 on.
    """

    regimes: tuple[Regime, ...]

    def __str__(self) -> str:
        return ", ".join(map(str, self.regimes))


@dataclass(frozen=True)
class Product:
    """A product with an NF4 weight [N, K], as far as it decides what computes it.

    Attributes:
        in_features: K.
        blocksize: of the weight, a power of two.
        dtype: of x [M, K], and of the gradient [M, N].
        device: where the weight is.
        input_scale: whether x is scaled, column by column, by a trained vector: IA3's feed-forward layers.
    """

    in_features: int
    blocksize: int
    dtype: torch.dtype
    device: torch.device
    input_scale: bool = False


def method(product: Product, tokens: int, *, backward: bool = False) -> str:
    """What computes x W^T, or with `backward` dz W, for M = `tokens` on this machine's CPU.

    Args:
        product: the weight and the dtype.
        tokens: M.
        backward: the input gradient.

    Returns:
        "look-up GEMV": each 4-bit code is looked up straight into a sum; "fp32 panels" and "bf16 panels":
        blocks of the weight are decoded, multiplied in that arithmetic, and used by a block of tokens.

    Raises:
        RuntimeError: the native library is not loaded, or PEFT_KERNELS_CPU_CAPABILITY names an instruction
            set that this machine lacks.
    """
    blocksize_log2, dtype = product.blocksize.bit_length() - 1, NATIVE_DTYPES.index(product.dtype)
    name: bytes | None = _native_plan()(backward, tokens, product.in_features, blocksize_log2, dtype)
    if name is None:
        raise RuntimeError(
            "PEFT_KERNELS_CPU_CAPABILITY must be one of "
            f"{', '.join(native_library().capabilities_found)} on this machine, got "
            f"{os.environ.get('PEFT_KERNELS_CPU_CAPABILITY')}; unset it to use the best"
        )
    return name.decode()


def plans(product: Product) -> dict[str, Plan]:
    """The methods for every number of tokens, by direction; none where the reference computes the product."""
    native = backend_of("adapted_linear", product.device).startswith("cpu")
    if not native or native_library().capability is None or product.dtype not in NATIVE_DTYPES:
        return {}
    return {"forward": _plan(product, backward=False), "input gradient": _plan(product, backward=True)}


def plan_of(methods: Sequence[str]) -> Plan:
    """The plan whose method for M tokens is `methods[M - 1]`, the last of them also for more."""
    regimes, first = [], 1
    for name, run in itertools.groupby(methods):
        last = first + len(list(run)) - 1
        regimes.append(Regime(first, last if last < len(methods) else None, name))
        first = last + 1
    return Plan(tuple(regimes))


@functools.cache
def _plan(product: Product, *, backward: bool) -> Plan:
    return plan_of([method(product, tokens, backward=backward) for tokens in range(1, MOST_TOKENS + 1)])


@functools.cache
def _native_plan() -> Callable[..., Any]:
    library = native_library()
    if not library.loaded:
        raise RuntimeError(f"the native library is not loaded: {library.reason}")
    function = ctypes.CDLL(str(library.path)).peft_kernels_cpu_plan
    function.argtypes = [ctypes.c_bool, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]
    function.restype = ctypes.c_char_p
    return function
