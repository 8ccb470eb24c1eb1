"""Problems for `dora_linear`: inputs, the meaning in float64, and what rounding may do to results."""

from dataclasses import dataclass
from typing import Any

import torch

import numerics
import peft_kernels as pk
from factories import Problem, make_problem

NORM_ERROR = 1e-6  # of dora_norm: tests/ops/dora/test_dora_norm.py


@dataclass
class DoRAProblem:
    """One call of `dora_linear`.

    Attributes:
        problem: x, weight, adapter, bias, upstream gradient, scaling, dropout.
        magnitude: [N].
    """

    problem: Problem
    magnitude: torch.Tensor

    @property
    def tensors(self) -> numerics.Tensors:
        """The float inputs."""
        return {**self.problem.tensors, "magnitude": self.magnitude}

    @property
    def norm(self) -> torch.Tensor:
        """||W + scaling * B A|| in float64 [N]."""
        a, b = (self.problem.tensors[name].double() for name in ("lora_a", "lora_b"))
        return (self.problem.exact_weight + self.problem.scaling * b @ a).norm(dim=1)

    def run(self, **overrides: Any) -> torch.Tensor:
        """The public call."""
        p = self.problem
        options = {"weight": p.weight, "scaling": p.scaling, "dropout_p": p.dropout_p, "seed": p.seed}
        return pk.functional.dora_linear(**options | self.tensors | overrides)

    def run_with_gradients(self) -> tuple[torch.Tensor, numerics.Tensors]:
        """Result, and its gradients with respect to every input."""
        leaves = {name: t.detach().clone().requires_grad_() for name, t in self.tensors.items()}
        y = self.run(**leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), self.problem.grad)
        return y.detach(), dict(zip(leaves, grads, strict=True))

    def formula(self, t: numerics.Tensors, absolute: bool = False) -> torch.Tensor:
        """PEFT's definition in float64, the norm a constant; with `absolute` on |W| and |scaling|."""
        p, g = self.problem, t["magnitude"].double() / self.norm
        weight, scaling = (p.exact_weight.abs(), abs(p.scaling)) if absolute else (p.exact_weight, p.scaling)
        x = dropped = t["x"].double()
        if p.dropout_p:
            keep = pk.functional.philox_dropout_mask(x.shape, p.dropout_p, p.seed)
            dropped = x * keep / (1 - p.dropout_p)
        low = scaling * (dropped @ t["lora_a"].double().t()) @ t["lora_b"].double().t()
        rest = g + 1 if absolute else g - 1
        y = x @ weight.t() + rest * (dropped @ weight.t()) + g * low
        return y + t["bias"].double() if "bias" in t else y

    def exact(self) -> tuple[numerics.Tensors, numerics.Tensors]:
        """Result and gradients in float64, and the same formulas on absolute values."""
        absolute = {name: tensor.abs() for name, tensor in self.tensors.items()}
        grad = self.problem.grad
        exact = {"y": self.formula(self.tensors), **numerics.gradients(self.formula, self.tensors, grad)}
        size = {"y": self.formula(absolute, absolute=True)}
        size |= numerics.gradients(lambda t: self.formula(t, absolute=True), absolute, grad.abs())
        return exact, size

    def check(self, y: torch.Tensor, grads: numerics.Tensors, extra: float = 0.0) -> None:
        """Compare a result and its gradients with float64; `extra` allows more, relative to magnitudes."""
        p = self.problem
        exact, size = self.exact()
        roundings = {**p.roundings(), "magnitude": p.roundings()["y"] + p.tensors["x"].shape[0]}
        # The norm; z and, with dropout, D(x), x - D(x) and their two results are kept in the dtype of x; so
        # are a 16-bit GEMM's operands and result, or the weight in bf16 panels.
        kept = 1 + (2 if p.dropout_p else 0)
        share = NORM_ERROR + kept * numerics.unit_roundoff(p.grad.dtype) + extra
        share += max(p.base_roundoff(direction) for direction in ("forward", "backward"))
        for name, got in {"y": y, **grads}.items():
            assert got.dtype == (p.grad.dtype if name == "y" else self.tensors[name].dtype), name
            allowed = numerics.bound(exact[name], size[name], roundings[name] + 4, got.dtype)
            numerics.assert_within(name, got, exact[name], allowed + share * size[name])


def make_dora(m: int, n: int, k: int, **options: Any) -> DoRAProblem:
    """A random problem, with magnitudes around the norms; options as of `make_problem`."""
    problem = make_problem(m, n, k, **{"parts": ["lora", "bias"], **options})
    dora = DoRAProblem(problem, torch.ones(n))
    generator = torch.Generator().manual_seed(n)
    magnitude = dora.norm * (1 + 0.2 * torch.randn(n, generator=generator, dtype=torch.float64))
    return DoRAProblem(problem, magnitude.to(problem.tensors["lora_a"].dtype))
