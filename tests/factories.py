"""Problems for the adapted linear: inputs, the meaning in float64, and what rounding may do to results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import numerics
import peft_kernels as pk
from peft_kernels.core import plan
from peft_kernels.core.backend import backend_of
from peft_kernels.core.gpu import gpu
from peft_kernels.core.plan import Product
from peft_kernels.ops.linear import regimes, triton_plan

WEIGHTS = ("dense", "nf4", "nf4_double")
PARTS = ("lora", "column_scale", "input_scale", "bias")


@dataclass
class Problem:
    """One call of the adapted linear.

    Attributes:
        tensors: the float inputs that are there: x [M, K], lora_a [r, K], lora_b [N, r], column_scale [N],
            input_scale [K], bias [N].
        weight: as the public call takes it.
        exact_weight: float64 [N, K], exactly what `weight` stands for.
        grad: upstream gradient [M, N].
    """

    tensors: numerics.Tensors
    weight: Any
    exact_weight: torch.Tensor
    grad: torch.Tensor
    scaling: float = 1.0
    dropout_p: float = 0.0
    seed: int = 1234

    def run(self, **overrides: Any) -> torch.Tensor:
        """The public call."""
        tensors = {**self.tensors, **overrides}
        x = tensors.pop("x")
        return pk.functional.adapted_linear(
            x, self.weight, scaling=self.scaling, dropout_p=self.dropout_p, seed=self.seed, **tensors
        )

    def run_with_gradients(self, wrt: Sequence[str] | None = None) -> tuple[torch.Tensor, numerics.Tensors]:
        """Result, and its gradients with respect to the inputs named (all by default)."""
        names = list(self.tensors) if wrt is None else list(wrt)
        leaves = {name: self.tensors[name].detach().requires_grad_() for name in names}
        y = self.run(**leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), self.grad)
        return y.detach(), dict(zip(names, grads, strict=True))

    def formula(self, t: numerics.Tensors, absolute: bool = False) -> torch.Tensor:
        """The definition in float64; with `absolute` on |W| and |scaling|, for magnitudes."""
        x = t["x"].double()
        weight, scaling = self.exact_weight, self.scaling
        if absolute:
            weight, scaling = weight.abs(), abs(scaling)
        z = (x * t["input_scale"].double() if "input_scale" in t else x) @ weight.t()
        if "lora_a" in t:
            if self.dropout_p:
                keep = pk.functional.philox_dropout_mask(x.shape, self.dropout_p, self.seed)
                x = x * keep * torch.tensor(1 / (1 - self.dropout_p), dtype=torch.float32).double()
            z = z + scaling * (x @ t["lora_a"].double().t()) @ t["lora_b"].double().t()
        y = z * t["column_scale"].double() if "column_scale" in t else z
        return y + t["bias"].double() if "bias" in t else y

    def check(self, y: torch.Tensor) -> None:
        """Compare a result with float64."""
        exact, magnitude = self.formula(self.tensors), self.formula(self.absolute(), absolute=True)
        allowed = numerics.bound(exact, magnitude, self.roundings()["y"], y.dtype)
        numerics.assert_within("y", y, exact, allowed + self.base_roundoff("forward") * magnitude)

    def check_gradients(self, grads: numerics.Tensors) -> None:
        """Compare gradients with float64."""
        exact = numerics.gradients(self.formula, self.tensors, self.grad)
        magnitude = numerics.gradients(
            lambda t: self.formula(t, absolute=True), self.absolute(), self.grad.abs()
        )
        for name, grad in grads.items():
            assert grad.dtype == self.tensors[name].dtype, name
            allowed = numerics.bound(exact[name], magnitude[name], self.roundings()[name], grad.dtype)
            if name == "bias":  # the op returns it in the dtype of grad; the caller's dtype comes after
                allowed = allowed + numerics.unit_roundoff(self.grad.dtype) * exact[name].abs()
            if name == "column_scale":  # from z, which is kept rounded to the dtype of x
                allowed = allowed + numerics.unit_roundoff(self.grad.dtype) * magnitude[name]
            if name in ("x", "input_scale", "column_scale"):  # the last comes from z, a result of the forward
                direction = "forward" if name == "column_scale" else "backward"
                allowed = allowed + self.base_roundoff(direction) * magnitude[name]
            numerics.assert_within(f"gradient of {name}", grad, exact[name], allowed)

    def roundings(self) -> dict[str, int]:
        """How many roundings a term of each result passes through, besides the last one.

        One for each product and sum, and one for each of the factors scaling, dropout scale, column scale and
        input scale and for the sum of the base and low-rank parts: 8 covers those everywhere.
        """
        m, k = self.tensors["x"].shape
        n = self.grad.shape[1]
        r = self.tensors["lora_a"].shape[0] if "lora_a" in self.tensors else 0
        forward = k + r + 8
        return {
            "y": forward,
            "x": n + r + 8,
            "lora_a": n + m + 8,
            "lora_b": k + m + 8,
            "column_scale": forward + m,
            "input_scale": n + m + 8,
            "bias": m,
        }

    def base_roundoff(self, direction: str) -> float:
        """What 16-bit products with the weight may add, relative to their magnitude.

        On the CPU a dense weight's is torch's GEMM: it takes 16-bit operands (x * l_in, or c * g, rounded
        once) and returns a 16-bit result (rounded once), as torch.nn.functional.linear does. On a GPU the
        result is not rounded. An NF4 weight (times its scale) is rounded once, except where
        the plan looks up its codes without tensor cores, or has fp32 panels.
        """
        dtype = self.grad.dtype
        backend = backend_of("adapted_linear", "cpu")
        if backend == "reference" or dtype.itemsize != 2:
            return 0.0
        if isinstance(self.weight, torch.Tensor):
            return (2 if backend.startswith("cpu") else 1) * numerics.unit_roundoff(dtype)
        method = self._method(backend, backward=direction == "backward")
        exact = (regimes.TRITON_METHODS["decode"], "look-up GEMV", "fp32 panels")
        return 0.0 if method in exact else numerics.unit_roundoff(dtype)

    def _method(self, backend: str, backward: bool) -> str:
        (m, k), n = self.tensors["x"].shape, self.grad.shape[1]
        if backend.startswith("cpu"):
            product = Product(k, self.weight.blocksize, self.grad.dtype, self.grad.device)
            return plan.method(product, m, backward=backward)
        on_gpu = triton_plan.Product(m, n, k, self.weight.blocksize, self.grad.dtype)
        return regimes.method(on_gpu, gpu(), backend, backward=backward)

    def absolute(self) -> numerics.Tensors:
        """Inputs by magnitude."""
        return {name: tensor.abs() for name, tensor in self.tensors.items()}


def make_problem(
    m: int,
    n: int,
    k: int,
    *,
    r: int = 4,
    weight: str = "nf4",
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    parts: Sequence[str] = PARTS,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Problem:
    """A random problem; inputs of a size that keeps results near 1, scales around 1, a negative scaling."""
    generator = torch.Generator().manual_seed(seed)
    adapter_dtype = dtype if adapter_dtype is None else adapter_dtype

    def normal(shape: Sequence[int], scale: float, dtype: torch.dtype, mean: float = 0.0) -> torch.Tensor:
        values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale + mean
        return values.to(dtype)

    tensors = {"x": normal((m, k), 1.0, dtype)}
    if "lora" in parts:
        tensors["lora_a"] = normal((r, k), k**-0.5, adapter_dtype)
        tensors["lora_b"] = normal((n, r), r**-0.5, adapter_dtype)
    if "column_scale" in parts:
        tensors["column_scale"] = normal((n,), 0.2, adapter_dtype, mean=1.0)
    if "input_scale" in parts:
        tensors["input_scale"] = normal((k,), 0.2, adapter_dtype, mean=1.0)
    if "bias" in parts:
        tensors["bias"] = normal((n,), 1.0, adapter_dtype)
    dense = normal((n, k), k**-0.5, dtype)
    base: Any = dense
    if weight != "dense":
        source = dense if dtype != torch.float64 else dense.float()
        base = pk.functional.nf4_quantize(source, blocksize, double_quant=weight == "nf4_double")
        dense = base.dequantize(torch.float32)
    return Problem(
        tensors=tensors,
        weight=base,
        exact_weight=dense.double(),
        grad=normal((m, n), 1.0, dtype),
        scaling=-1.5 if "lora" in parts else 1.0,
        dropout_p=dropout_p,
    )
