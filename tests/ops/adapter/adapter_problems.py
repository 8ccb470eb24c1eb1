"""Problems for the bottleneck adapter: inputs, the meaning in float64, and what rounding may do to results.

Errors are followed through the formula: each step passes on what its inputs have, by the largest slope there
is, and adds what its own sums and roundings cause (numerics.gamma).
"""

from dataclasses import dataclass
from typing import Any

import torch

import numerics
import peft_kernels as pk
from peft_kernels.core.backend import backend_of
from peft_kernels.core.library import native_library
from peft_kernels.ops.adapter.reference import slope
from peft_kernels.ops.adapter.schema import ACTIVATIONS, LEAKY_SLOPE

NAMES = ("hidden", "down_weight", "down_bias", "up_weight", "up_bias", "scale", "gate", "residual")
# Largest |f'| and |f''| of each activation.
SLOPES = {"gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1}
CURVATURES = {"gelu": 0.8, "gelu_tanh": 0.81, "silu": 0.5, "tanh": 0.77}
# Error of f and f' themselves in float32, relative to max(|f|, |z|) and 1: eight units (activation-inl.h).
ACTIVATION_ERROR = 8 * 2.0**-23


@dataclass
class Problem:
    """One call: the float inputs that are there, by NAMES, and the gradient of its result."""

    tensors: numerics.Tensors
    grad: torch.Tensor
    activation: str = "gelu"
    scaling: float = 1.0
    dropout_p: float = 0.0
    seed: int | None = 1234
    residual_is_hidden: bool = False

    def run(self, **overrides: Any) -> torch.Tensor:
        return self.run_all(need_down=False, need_up=False, **overrides)[0]

    def run_all(self, need_down: bool = True, need_up: bool = True, **overrides: Any) -> tuple[Any, Any, Any]:
        t = {**self.tensors, **overrides}
        return pk.functional.bottleneck_adapter_with_intermediates(
            t["hidden"], t["down_weight"], t.get("down_bias"), t["up_weight"], t.get("up_bias"),
            activation=self.activation, scaling=t.get("scale", self.scaling),
            residual=t["hidden"] if self.residual_is_hidden else t.get("residual"),
            dropout_p=self.dropout_p, seed=self.seed, gate=t.get("gate"),
            need_down=need_down, need_up=need_up,
        )  # fmt: skip

    def run_with_gradients(self) -> tuple[torch.Tensor, numerics.Tensors]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        out = self.run(**leaves)
        grads = torch.autograd.grad(out, list(leaves.values()), self.grad)
        return out.detach(), dict(zip(leaves, grads, strict=True))

    def check(self, out: torch.Tensor, grads: numerics.Tensors, dtype: torch.dtype | None = None) -> None:
        """Compare with float64; `dtype` where the tensors given were cast to it (autocast)."""
        exact, allowed = self._exact(dtype or self.tensors["hidden"].dtype)
        for name, result in {"out": out, **grads}.items():
            accumulated, value = allowed[name], exact[name].reshape(result.shape)
            accumulated = accumulated.reshape(result.shape)
            rounding = numerics.unit_roundoff(result.dtype) * (value.abs() + accumulated)
            numerics.assert_within(
                name, result, value, accumulated + rounding + numerics.smallest(result.dtype)
            )

    def _exact(self, dtype: torch.dtype) -> tuple[numerics.Tensors, numerics.Tensors]:
        t = {name: tensor.double() for name, tensor in self.tensors.items()}
        accumulate = numerics.accumulate_dtype(dtype)
        h, w_d, w_u, g = t["hidden"], t["down_weight"], t["up_weight"], self.grad.double()
        (m, d), (n, r) = h.shape, w_u.shape
        b_d, b_u = t.get("down_bias", torch.zeros(r).double()), t.get("up_bias", torch.zeros(n).double())
        scale = t.get("scale", torch.tensor(self.scaling).double())
        gate = t["gate"].reshape(m, 1) if "gate" in t else torch.ones(m, 1).double()
        residual = h if self.residual_is_hidden else t.get("residual", torch.zeros(m, n).double())
        keep = torch.ones(m, n).double()
        if self.dropout_p:
            mask = pk.functional.philox_dropout_mask((m, n), self.dropout_p, self.seed)
            keep = mask * torch.tensor(1 / (1 - self.dropout_p), dtype=torch.float32).double()

        operands, tiny = operand_errors(dtype)

        def gamma(count: int) -> float:
            return numerics.gamma(count, accumulate) + operands

        def size(operand: torch.Tensor) -> torch.Tensor:
            return operand.abs() + tiny

        own = ACTIVATION_ERROR if accumulate == torch.float32 else 1e-13
        index = ACTIVATIONS.index(self.activation)
        z = h @ w_d.t() + b_d
        dz_error = gamma(d + 2) * (size(h) @ size(w_d).t() + b_d.abs())
        f, f1 = activated(self.activation, z), slope(index, z)
        f_error = SLOPES.get(self.activation, 1.0) * dz_error + own * torch.maximum(f.abs(), z.abs())
        f1_error = CURVATURES.get(self.activation, 0.0) * dz_error + own
        if self.activation in ("relu", "leaky_relu"):
            jump = 1.0 if self.activation == "relu" else 1.0 - LEAKY_SLOPE
            f1_error = torch.where(z.abs() <= dz_error, jump, own)
        v, v_size = f @ w_u.t() + b_u, size(f) @ size(w_u).t() + b_u.abs()
        v_error = f_error @ w_u.abs().t() + gamma(r + 2) * (v_size + f_error @ w_u.abs().t())
        few = gamma(8)
        out = v * scale * keep * gate + residual
        factor = (scale * keep * gate).abs()
        out_error = factor * v_error + few * (factor * v_size + residual.abs())
        dropped = g * keep
        dup, e = dropped * gate, dropped * gate * scale
        df = e @ w_u
        df_error = gamma(n + 8) * (size(e) @ size(w_u))
        dz = df * f1
        grad_error = df_error * f1.abs() + (df.abs() + df_error) * f1_error + few * dz.abs()
        dz_size = size(dz) + grad_error
        dh = dz @ w_d + (g if self.residual_is_hidden else 0)
        dscale = (dup * v).sum(0)
        dscale_error = (dup.abs() * v_error).sum(0) + gamma(m + r + 8) * (dup.abs() * v_size).sum(0)
        if "scale" in t and t["scale"].shape == (1,):
            dscale_error = dscale_error.sum(0, keepdim=True) + gamma(n) * dscale.abs().sum(0, keepdim=True)
            dscale = dscale.sum(0, keepdim=True)
        ungated = (dropped * scale).abs()
        exact = {
            "out": out,
            "hidden": dh,
            "down_weight": dz.t() @ h,
            "down_bias": dz.sum(0),
            "up_weight": e.t() @ f,
            "up_bias": e.sum(0),
            "scale": dscale,
            "gate": (dropped * scale * v).sum(1),
            "residual": g,
        }
        errors = {
            "out": out_error,
            "hidden": grad_error @ w_d.abs() + gamma(r + 3) * (dz_size @ size(w_d) + g.abs().max()),
            "down_weight": grad_error.t() @ h.abs() + gamma(m + 2) * (dz_size.t() @ size(h)),
            "down_bias": grad_error.sum(0) + gamma(m) * dz_size.sum(0),
            "up_weight": e.abs().t() @ f_error + gamma(m + 8) * (size(e).t() @ (size(f) + f_error)),
            "up_bias": gamma(m + 8) * e.abs().sum(0),
            "scale": dscale_error,
            "gate": (ungated * v_error).sum(1) + gamma(n + r + 8) * (ungated * v_size).sum(1),
            "residual": torch.zeros_like(g),
        }
        return exact, errors


def operand_errors(dtype: torch.dtype) -> tuple[float, float]:
    """What the backend in force loses of a product by rounding its operands, for `hidden` of this dtype.

    Relative to |a| |b|, with the second number added to each of |a| and |b|: below it, the smallest normal
    number, the error of an operand is no longer relative.
    """
    backend, unit = backend_of("bottleneck_adapter", "cpu"), numerics.unit_roundoff(dtype)
    if backend == "triton" and dtype == torch.float32:
        # tf32x3: a is a' = tf32(a), to nearest, and a - a', of which 11 bits are kept; the product of the two
        # remainders is left out. 2 (2^-11 2^-10) + 2^-11 2^-11.
        return 5 * 2.0**-22, 0.0
    native_bf16 = backend.startswith("cpu") and native_library().capability == "avx512_bf16"
    if dtype.itemsize == 2 and (backend == "triton" or (native_bf16 and dtype == torch.bfloat16)):
        return (2 + unit) * unit, torch.finfo(dtype).tiny  # both operands are rounded to dtype
    return 0.0, 0.0


def activated(activation: str, z: torch.Tensor) -> torch.Tensor:
    functions = {
        "identity": lambda x: x,
        "relu": torch.relu,
        "leaky_relu": torch.nn.functional.leaky_relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "tanh": torch.tanh,
    }
    return functions[activation](z)


def make_problem(
    m: int,
    d: int,
    r: int,
    n: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    parts: tuple[str, ...] = ("down_bias", "up_bias", "scale", "gate", "residual"),
    scale_size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """A random problem of about unit size; `parts` are the optional inputs that are there."""
    generator = torch.Generator().manual_seed(seed)
    n = d if n is None else n
    parameter_dtype = parameter_dtype or dtype

    def normal(*shape: int, size: float = 1.0, mean: float = 0.0, to: torch.dtype = parameter_dtype) -> Any:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * size + mean
        return values.to(to)

    tensors = {
        "hidden": normal(m, d, to=dtype),
        "down_weight": normal(r, d, size=d**-0.5),
        "up_weight": normal(n, r, size=r**-0.5),
    }
    optional = {
        "down_bias": lambda: normal(r, size=0.5),
        "up_bias": lambda: normal(n, size=0.5),
        "scale": lambda: normal(scale_size or n, size=0.2, mean=-1.0),
        "gate": lambda: normal(m, 1, size=0.2, mean=0.5, to=dtype),
        "residual": lambda: normal(m, n, to=dtype),
    }
    tensors |= {name: make() for name, make in optional.items() if name in parts}
    return Problem(tensors, normal(m, n, to=dtype), scaling=1.0 if "scale" in parts else -1.5, **options)
