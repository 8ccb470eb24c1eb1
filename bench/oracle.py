"""What the results must be: the mathematics in float64, with rounding-error bounds derived from it.

Nothing here shares code with the package: the dequantised weight comes from the table look-up of
`baselines.py`, the Philox generator is written out again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .case import CHECK_SEED, OURS, Case, Oracle

# 4096 tokens in float64, on a weight of 4096 x 4096, take 4 s on 2 cores: longer than their measurement.
CHECKED_TOKENS = 512
_DEVIATIONS = 7  # by more, rounding the weight is off with probability 2 exp(-7^2 / 2) = 5e-11 an element
_ROW_CHUNK = 512  # rows of the weight that are float64 at one time


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def philox_words(n: int, seed: int) -> Tensor:
    """The first n uint32 words of a seed, as int64.

    Philox4x32-10 of counters (lo32(i), hi32(i), 0, 0), i = 0, 1, ... and key (lo32(seed), hi32(seed)).

    Source: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3 (SC'11).
    """
    mask = 0xFFFFFFFF
    group = torch.arange((n + 3) // 4)
    c0, c1 = group & mask, group >> 32
    c2, c3 = torch.zeros_like(group), torch.zeros_like(group)
    key0, key1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        high0, low0 = _multiply32(c0, 0xD2511F53)
        high1, low1 = _multiply32(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3), dim=1).view(-1)[:n]


def philox_keep_scale(shape: tuple[int, ...], p: float, seed: int) -> Tensor:
    """Dropout factors as float64: float32(1 / (1 - p)) where an element's word >= floor(p 2^32), else 0."""
    scale = torch.tensor(1.0 / (1.0 - p), dtype=torch.float32).double()
    return ((philox_words(math.prod(shape), seed) >= math.floor(p * 2**32)) * scale).view(shape)


def _multiply32(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b in int64 arithmetic, by halves of b as the product may have 64 bits."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    return (high + (low >> 16)) >> 16, (low + (high << 16)) & 0xFFFFFFFF


def keep_scale(case: Case, contestant: str) -> Tensor | None:
    """Dropout factors [M, K] that a contestant draws from `CHECK_SEED`; None without dropout."""
    if not case.dropout:
        return None
    torch.manual_seed(CHECK_SEED)
    if contestant == OURS:
        seed = int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))
        return philox_keep_scale((case.m, case.k), case.dropout, seed)
    return F.dropout(torch.ones(case.m, case.k, dtype=case.torch_dtype), case.dropout).double()


def checked_tokens(m: int) -> Tensor | None:
    """Mask [m] of the tokens whose results are checked; None, for all of them, up to `CHECKED_TOKENS`.

    Beyond, that many from the first to the last, as evenly as whole numbers go: the remainders by the sizes
    of a kernel's blocks of tokens are then all among them.
    """
    if m <= CHECKED_TOKENS:
        return None
    mask = torch.zeros(m, dtype=torch.bool)
    mask[torch.linspace(0, m - 1, CHECKED_TOKENS, dtype=torch.float64).round().long()] = True
    return mask


@dataclass(frozen=True)
class LinearTerms:
    """Operands of an adapted linear layer: x [M, K], weight [N, K], A [r, K], B [N, r], dL/dy [M, N]."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float
    grad: Tensor

    def evaluate(
        self, keep_scale: Tensor | None, forward: bool, backward: bool, tokens: Tensor | None = None
    ) -> dict[str, Tensor]:
        """y and the gradients in float64.

        Args:
            keep_scale: dropout factors [M, K].
            forward: whether y is wanted.
            backward: whether dx, dA and dB are.
            tokens: mask [M] of the rows of y and dx that are wanted; None: all.
        """
        x, grad = self.x.double(), self.grad.double()
        wanted = slice(None) if tokens is None else tokens
        results: dict[str, Tensor] = {}
        blocks = range(0, self.weight.shape[0], _ROW_CHUNK)
        if forward:
            rows = (self.weight[start : start + _ROW_CHUNK].double() for start in blocks)
            results["y"] = torch.cat([x[wanted] @ block.T for block in rows], dim=1)
        if backward:
            results["dx"] = torch.zeros_like(x[wanted])
            for start in blocks:
                block = self.weight[start : start + _ROW_CHUNK].double()
                results["dx"] += grad[wanted, start : start + _ROW_CHUNK] @ block
        if self.lora_a is not None and self.lora_b is not None:
            a, b = self.lora_a.double(), self.lora_b.double()
            factors = torch.ones_like(x) if keep_scale is None else keep_scale
            u, du = (x * factors) @ a.T, self.scaling * grad @ b  # both [M, r]
            if forward:
                results["y"] += self.scaling * u[wanted] @ b.T
            if backward:
                results["dx"] += factors[wanted] * (du[wanted] @ a)
                results["dlora_a"] = du.T @ (x * factors)
                results["dlora_b"] = self.scaling * grad.T @ u
        return results

    def magnitudes(self) -> LinearTerms:
        """The same terms with the absolute value of every operand: sums become sums of magnitudes."""
        return replace(
            self,
            x=self.x.abs(),
            weight=self.weight.abs(),
            lora_a=None if self.lora_a is None else self.lora_a.abs(),
            lora_b=None if self.lora_b is None else self.lora_b.abs(),
            scaling=abs(self.scaling),
            grad=self.grad.abs(),
        )

    def squares(self) -> LinearTerms:
        """The base product with every operand squared: sums become sums of squared products."""
        return replace(
            self,
            x=self.x.double().square(),
            weight=self.weight.square(),
            lora_a=None,
            lora_b=None,
            grad=self.grad.double().square(),
        )


def linear_oracle(
    case: Case,
    terms: LinearTerms,
    keep_scale: Tensor | None,
    weight_roundoffs: Mapping[str, float] | None = None,
) -> Oracle:
    """Expected results of an adapted linear layer that accumulates in float32 and rounds once at the end.

    A sum of n products accumulated in precision u is off by at most lambda sqrt(n) u times the sum of
    their magnitudes, lambda standing for standard deviations (Higham and Mary, SIAM J. Sci. Comput. 41
    (2019), theorem 2.4). That takes partial sums for as large as the sum of magnitudes; ours, of random
    signs, are smaller by about sqrt(n), so that lambda = 1 holds in any order of summation. What breaks
    it is a weight rounded to bfloat16 on the way. The tolerance is (sqrt(n1) + sqrt(n2)) u32 times the
    sum of magnitudes + u_out |value|, n1 being the length of the long reduction and n2 that of the one
    behind it (u and du are themselves sums).

    Of many tokens, only the `checked_tokens` are in y and dx; the gradients of A and B sum over all.

    `weight_roundoffs` (result -> u_w) names the base products whose weight ours rounds before it multiplies.
    Such an error is a sum of terms of at most u_w |x_i w_i| of random signs, those of x, and exceeds
    lambda u_w sqrt(sum (x_i w_i)^2) with probability 2 exp(-lambda^2 / 2) (Hoeffding, J. Amer. Statist.
    Assoc. 58 (1963), theorem 2). That, with lambda = 7, is added.
    """
    forward, backward = case.direction != "backward", case.direction != "forward"
    tokens = checked_tokens(case.m)
    values = terms.evaluate(keep_scale, forward, backward, tokens)
    magnitudes = terms.magnitudes().evaluate(keep_scale, forward, backward, tokens)
    m, k, n, r = (math.sqrt(size) for size in (case.m, case.k, case.n, case.r))
    lengths = {"y": k + r, "dx": n + r, "dlora_a": n + m, "dlora_b": k + m}
    accumulated, rounded = unit_roundoff(torch.float32), unit_roundoff(case.torch_dtype)
    tolerances = {
        name: accumulated * lengths[name] * magnitudes[name] + rounded * value.abs()
        for name, value in values.items()
    }
    if weight_roundoffs:
        squares = terms.squares().evaluate(None, forward, backward, tokens)
        for name in weight_roundoffs.keys() & values.keys():
            tolerances[name] += _DEVIATIONS * weight_roundoffs[name] * squares[name].sqrt()
    return Oracle(values, tolerances, {} if tokens is None else dict.fromkeys(("y", "dx"), tokens))


@dataclass(frozen=True)
class Check:
    """How far results are from the oracle.

    Attributes:
        error: largest absolute error over the largest absolute value, the worst of all results.
        tolerance_used: largest error over its own tolerance; the check is green up to 1.
        worst: the result that used most of its tolerance.
    """

    error: float
    tolerance_used: float
    worst: str

    @property
    def passed(self) -> bool:
        """Whether every element of every result is within its tolerance (NaN is not)."""
        return self.tolerance_used <= 1.0


def compare(results: dict[str, Tensor], oracle: Oracle) -> Check:
    """Compare results with the oracle, element by element.

    Raises:
        ValueError: names or shapes of the results are not those of the oracle.
    """
    if set(results) != set(oracle.values):
        raise ValueError(f"results must be {sorted(oracle.values)}, got {sorted(results)}")
    checks = []
    for name, value in oracle.values.items():
        result, rows = results[name], oracle.rows.get(name)
        shape = list(value.shape) if rows is None else [len(rows), *value.shape[1:]]
        if list(result.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {list(result.shape)}")
        error = ((result if rows is None else result[rows]).double() - value).abs()
        # 0 / 0 is an exact zero and fine; nan_to_num would hide a NaN result as well.
        used = (error / oracle.tolerances[name]).where(error != 0, 0.0)
        scale = max(float(value.abs().max()), torch.finfo(torch.float64).tiny)
        checks.append(Check(float(error.max()) / scale, float(used.max()), name))  # max keeps NaN
    # NaN compares as nothing: it must come out as the worst.
    worst = max(
        checks, key=lambda check: math.inf if math.isnan(check.tolerance_used) else check.tolerance_used
    )
    largest = worst.error if math.isnan(worst.error) else max(check.error for check in checks)
    return Check(largest, worst.tolerance_used, worst.worst)
