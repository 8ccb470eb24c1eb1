"""More elements than 32 bits count, in weights and in activations: results that lie beyond, against float64.

Inputs repeat after a prime number of elements, so that an index which has lost its upper bits finds other
values. Where a sum is long, all but a few of its terms are exact zeros, so that its bound stays tight.
"""

import os
import re
from pathlib import Path

import pytest
import torch

import numerics
import peft_kernels as pk
from peft_kernels.core.library import native_library
from peft_kernels.ops.dropout.reference import philox4x32
from peft_kernels.ops.nf4.reference import NF4_CODE
from peft_kernels.ops.nf4.weight import NestedAbsmax

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native_library().loaded, reason="native library not loaded"),
]

PERIOD = 16_777_213  # prime
P, SEED = 0.25, 77


def needs(gib: int) -> pytest.MarkDecorator:
    """Skip where less memory is available, to the machine or to the control group that we run in."""
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    found = re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    available = int(found[1]) * 1024 if found else 0
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        available = min(available, int(most) - int(limit.with_name("memory.current").read_text()))
    reason = f"needs {gib} GiB of memory, {available / 2**30:.1f} are available"
    return pytest.mark.skipif(available < gib * 2**30, reason=reason)


@pytest.fixture(autouse=True)
def _all_cores() -> None:
    torch.set_num_threads(os.cpu_count() or 1)


def repeated(period: torch.Tensor, count: int) -> torch.Tensor:
    return period.repeat(-(-count // period.numel()))[:count]


def weight_at(w: pk.NF4Weight, element: torch.Tensor) -> torch.Tensor:
    """The elements of a weight with these flat indices, as the format defines them, in float64."""
    byte, block = w.packed[element >> 1], element // w.blocksize
    nibble = torch.where(element % 2 == 0, byte >> 4, byte & 15)
    absmax = w.absmax[block]
    if w.nested is not None:
        scale = w.nested.absmax[block // w.nested.blocksize]
        absmax = w.nested.code[absmax.long()] * scale + w.nested.offset
    return (torch.tensor(NF4_CODE)[nibble.long()] * absmax).double()


def kept(element: torch.Tensor) -> torch.Tensor:
    """Whether dropout keeps the elements with these flat indices."""
    group, zero = element >> 2, torch.zeros_like(element)
    words = philox4x32(
        (group & 0xFFFFFFFF, group >> 32, zero, zero), (torch.tensor(SEED), torch.tensor(SEED >> 32))
    )
    return torch.stack(words).gather(0, (element & 3)[None])[0] >= int(P * 2**32)


@needs(4)
@pytest.mark.parametrize(
    ("elements", "k"), [(2**32, 2**16), (2**31, 2**16 + 1)], ids=["whole blocks", "ragged rows"]
)
def test_weight(elements: int, k: int) -> None:
    """Every output from 64 input features, and every input gradient from 64 output features."""
    n = elements // k + 17
    blocks = -(-n * k // 64)
    w = pk.NF4Weight(
        packed=repeated(torch.randint(256, (PERIOD,), dtype=torch.uint8), (n * k + 1) // 2),
        absmax=repeated(torch.randint(256, (PERIOD,), dtype=torch.uint8), blocks),
        nested=NestedAbsmax(
            torch.rand(-(-blocks // 256)), torch.linspace(-1, 1, 256), torch.tensor(0.1), 256
        ),
        shape=(n, k),
        blocksize=64,
        dtype=torch.float32,
    )
    inputs = torch.cat([torch.randint(k, (62,)), torch.tensor([0, k - 1])]).unique()
    outputs = torch.cat([torch.randint(n, (31,)), n - 1 - torch.arange(32), torch.zeros(1)]).long().unique()
    columns = weight_at(w, torch.arange(n)[:, None] * k + inputs)
    rows = weight_at(w, outputs[:, None] * k + torch.arange(k))
    for m in (1, 8):
        x, grad = torch.zeros(m, k), torch.zeros(m, n)
        x[:, inputs], grad[:, outputs] = torch.randn(m, len(inputs)), torch.randn(m, len(outputs))
        x.requires_grad_()
        y = pk.functional.nf4_linear(x, w)
        (dx,) = torch.autograd.grad(y, x, grad)
        for name, actual, factor, weight in (
            ("y", y.detach(), x.detach()[:, inputs], columns.t()),
            ("dx", dx, grad[:, outputs], rows),
        ):
            exact, magnitude = factor.double() @ weight, factor.abs().double() @ weight.abs()
            allowed = numerics.bound(exact, magnitude, len(weight), torch.float32)
            numerics.assert_within(f"{name} for {m} tokens", actual, exact, allowed)


@needs(14)
def test_activations() -> None:
    """Forward, dA and dB for over 2^32 inputs; dx for over 2^31 (it takes as much memory as x)."""
    k, n, r = 4096, 3, 2
    m = 2**32 // k + 5
    w = pk.functional.nf4_quantize(torch.randn(n, k) * k**-0.5)
    x = repeated(torch.randn(PERIOD).bfloat16(), m * k).view(m, k)
    lora_a = (torch.randn(r, k) * k**-0.5).requires_grad_()
    lora_b = torch.randn(n, r, requires_grad=True)

    def check(x: torch.Tensor, wrt: dict[str, torch.Tensor]) -> None:
        """On a few tokens, to which the upstream gradient is confined."""
        m = len(x)
        tokens = torch.tensor([0, 1, m // 2 - 1, m // 2, m - 6, m - 5, m - 2, m - 1])
        grad = torch.zeros(m, n, dtype=x.dtype)
        grad[tokens] = torch.randn(len(tokens), n).to(x.dtype)
        y = pk.functional.nf4_lora_linear(x, w, lora_a, lora_b, 1.0, dropout_p=P, seed=SEED)
        actual = dict(zip(wrt, torch.autograd.grad(y, list(wrt.values()), grad), strict=True))
        actual["y"] = y.detach()[tokens]

        dense, keep = w.dequantize().double(), kept(tokens[:, None] * k + torch.arange(k)) / (1 - P)
        inputs = {"x": x.detach()[tokens], "lora_a": lora_a.detach(), "lora_b": lora_b.detach()}
        absolute = {name: tensor.abs() for name, tensor in inputs.items()}

        def formula(t: numerics.Tensors, dense: torch.Tensor = dense) -> torch.Tensor:
            t = {name: tensor.double() for name, tensor in t.items()}
            return t["x"] @ dense.t() + (t["x"] * keep) @ t["lora_a"].t() @ t["lora_b"].t()

        def formula_absolute(t: numerics.Tensors) -> torch.Tensor:
            return formula(t, dense.abs())

        exact = {"y": formula(inputs), **numerics.gradients(formula, inputs, grad[tokens])}
        magnitude = {
            "y": formula_absolute(absolute),
            **numerics.gradients(formula_absolute, absolute, grad[tokens].abs()),
        }
        roundings = {"y": k + r, "x": n + r, "lora_a": n + len(tokens), "lora_b": k + len(tokens)}
        if "x" in actual:
            actual["x"] = actual["x"][tokens]
        for name, tensor in actual.items():
            bound = numerics.bound if name.startswith("lora") else numerics.nf4_bound
            allowed = bound(exact[name], magnitude[name], roundings[name] + 8, tensor.dtype)
            numerics.assert_within(name, tensor, exact[name], allowed)

    check(x, {"lora_a": lora_a, "lora_b": lora_b})
    half = x[: m // 2 + 5].requires_grad_()
    check(half, {"x": half})


@needs(12)
def test_codec_and_dropout() -> None:
    """Over 2^31 elements, a last partial block among them."""
    count = 2**31 + 3 * 4096 + 37
    dense = repeated(torch.randn(PERIOD).bfloat16(), count)
    w = pk.functional.nf4_quantize(dense)
    for first in (0, 2**30, 2**31 - 4096, 2**31, 2**31 + 2 * 4096):
        part = pk.functional.nf4_quantize(dense[first : first + 2 * 4096])
        assert torch.equal(w.packed[first // 2 :][: len(part.packed)], part.packed), first
        assert torch.equal(w.absmax[first // 64 :][: len(part.absmax)], part.absmax), first

    at = torch.cat([torch.randint(count, (10_000,)), count - 1 - torch.arange(10_000)])
    assert torch.equal(w.dequantize()[at], weight_at(w, at).to(torch.bfloat16))
    scale = torch.tensor(1 / (1 - P), dtype=torch.float32)
    expected = torch.where(kept(at), dense[at].float() * scale, 0.0).bfloat16()
    assert torch.equal(pk.functional.philox_dropout(dense, P, SEED)[at], expected)
