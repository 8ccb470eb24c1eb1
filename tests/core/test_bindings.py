"""Ops called directly, past the public functions: the native binding checks for itself and never crashes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from peft_kernels.core.library import native_library
from peft_kernels.ops.linear.schema import ForwardArgs

pytestmark = pytest.mark.skipif(
    not native_library().loaded, reason=f"native library: {native_library().reason}"
)

M, K, N, R = 3, 64, 8, 4
OPS = torch.ops.peft_kernels


def arguments(**changes: Any) -> tuple[Any, ...]:
    """Valid arguments of `adapted_linear`, NF4 and LoRA with dropout, but for `changes`."""
    packed, absmax = OPS.nf4_quantize(torch.randn(N, K), 64)
    valid = ForwardArgs(
        *(torch.randn(M, K), packed, absmax, None, None, None, 0, 64, N),
        *(torch.randn(R, K), torch.randn(N, R), 0.5, None, None, None, 0.1, torch.tensor(1)),
    )
    return (*valid._replace(**changes), False)


def freed(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory, as FSDP leaves its parameters between uses."""
    tensor = torch.zeros(shape, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


def dequantize(shape: list[int]) -> Any:
    """A weight of 512 elements, as one of another shape."""
    packed, absmax = OPS.nf4_quantize(torch.randn(512), 64)
    return OPS.nf4_dequantize(packed, absmax, None, None, None, 0, 64, shape, torch.float32)


def backward(op: Any = OPS.adapted_linear_backward, x: torch.Tensor | None = None, **changes: Any) -> Any:
    """`adapted_linear_backward` with valid arguments, dx alone wanted, but for `changes`."""
    valid = ForwardArgs(*arguments()[:-1])
    valid = valid if x is None else valid._replace(x=x)
    kept = {"u": torch.ones(M, R), "z": torch.ones(M, N)} | changes
    rest = (valid.column_scale, valid.input_scale, valid.dropout_p, valid.seed, *kept.values())
    needs = (True, False, False, False, False, False)
    return op(torch.ones(M, N), *valid[:8], *valid[9:12], *rest, *needs)


def adapter(**changes: Any) -> Any:
    """`bottleneck_adapter` with valid arguments, but for `changes`."""
    weights = {"down_weight": torch.ones(2, 4), "down_bias": None, "up_weight": torch.ones(4, 2)} | changes
    rest = (None, 0, 1.0, None, None, 0.0, None, False, False)
    return OPS.bottleneck_adapter(torch.ones(3, 4), None, *weights.values(), *rest)


def test_a_dense_weight_without_memory_is_refused() -> None:
    base = {"weight": freed(N, K), "absmax": None, "blocksize": 0}
    with pytest.raises(RuntimeError, match="weight must have memory"):
        OPS.adapted_linear(*arguments(**base))


def test_valid_arguments_pass() -> None:
    assert OPS.adapted_linear(*arguments())[0].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": freed(N)}, "bias must have memory"),
        ({"column_scale": freed(N)}, "column_scale must have memory"),
        ({"x": freed(M, K)}, "x must have memory"),
        ({"weight": freed(N * K // 2, dtype=torch.uint8)}, "packed weight must have memory"),
        ({"absmax": freed(N)}, "absmax must have memory"),
        ({"seed": freed(dtype=torch.int64)}, "seed must have memory"),
        ({"scaling": float("nan")}, "scaling must be finite"),
        ({"dropout_p": 7.0}, r"dropout_p must be in \[0, 1\)"),
        ({"seed": None}, "seed must be given"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must be"),
        ({"lora_a": None, "lora_b": None}, "dropout_p must be 0 without lora_a and lora_b"),
        ({"lora_a": torch.randn(R, K).half()}, "lora_a must be"),
        ({"lora_b": torch.randn(N, R).bfloat16()}, "lora_b must be"),
        ({"column_scale": torch.ones(N).bfloat16()}, "column_scale must be"),
        ({"bias": torch.ones(N + 1)}, r"bias must be \[8\], got \[9\]"),
        ({"blocksize": 63}, "blocksize must be a power of two"),
        ({"out_features": 2**60}, "weight must have sizes of 0 and more and fewer"),
        ({"out_features": -8}, "weight must be"),
        ({"absmax": torch.ones(N, dtype=torch.uint8)}, "absmax must be"),
        ({"x": torch.randn(M, K).double()}, "must be float32"),
        ({"x": torch.randn(M, K, device="meta")}, None),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str | None) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        OPS.adapted_linear(*arguments(**changes))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: OPS.nf4_quantize(torch.randn(64, dtype=torch.float64), 64),
            "weight must be float32, bfloat16 or",
        ),
        (lambda: OPS.nf4_quantize(freed(64), 64), "weight must have memory"),
        (lambda: OPS.philox_dropout(torch.randn(4), 1.0, torch.tensor(1)), r"must be in \[0, 1\)"),
        (lambda: OPS.philox_dropout(torch.randn(4), 1.0, torch.tensor(1)), "cpp:[0-9]+, p must be in"),
        (lambda: OPS.philox_dropout(torch.randn(4), 0.0, torch.zeros(2)), "seed must be"),
        (
            lambda: OPS.philox_dropout(torch.ones(4, dtype=torch.int64), 0.5, torch.tensor(1)),
            "x must be float32",
        ),
        (lambda: OPS.philox_dropout(torch.randn(4), 0.5, None), "seed must be a tensor, got None"),
        (lambda: OPS.philox_dropout(None, 0.5, torch.tensor(1)), "x must be a tensor, got None"),
        (lambda: OPS.adapted_linear(*arguments(x=None)), "x must be a tensor, got None"),
        (
            lambda: OPS.adapted_linear(*arguments(dropout_p=0.0, seed=freed(dtype=torch.int64))),
            "seed must have",
        ),
        (
            lambda: backward(OPS.adapted_linear_backward.reference, x=torch.ones(())),
            r"x must be \[M, K\] = \[\*, \*\], got \[\]",
        ),
        (
            lambda: backward(u=torch.ones(M, R, device="meta")),
            "u must be on the device of grad, cpu, got meta",
        ),
        (
            lambda: backward(z=torch.ones(M, N, device="meta")),
            "z must be on the device of grad, cpu, got meta",
        ),
        (lambda: dequantize([-8, -64]), "shape must have sizes of 0 and more"),
        (lambda: dequantize([2**63 - 1]), "shape must have .* fewer than 2.62 elements"),
        (lambda: adapter(down_weight=torch.ones(2, 4).half()), "down_weight must be Float"),
        (lambda: adapter(up_weight=torch.ones(4, 2).half()), "up_weight must be Float"),
    ],
)
def test_other_ops_refuse_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        call()


def test_failed_allocation_says_so() -> None:
    packed, absmax = OPS.nf4_quantize(torch.zeros(32), 32)
    with pytest.raises(RuntimeError, match="no memory for a contiguous copy: "):
        OPS.adapted_linear(
            *(torch.zeros(1, 1).expand(2**40, 1), packed[:1], absmax, None, None, None, 0, 32, 2),
            *(None, None, 1.0, None, None, None, 0.0, None, False),
        )
