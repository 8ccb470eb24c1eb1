"""Calls that fuzzing found to be refused badly, to be taken silently, or to crash."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import peft_kernels as pk

F = pk.functional
X, W, A, B = torch.ones(2, 64), torch.ones(8, 64), torch.ones(4, 64), torch.ones(8, 4)
H, DOWN, UP = torch.ones(2, 8), torch.ones(4, 8), torch.ones(8, 4)


def freed(*shape: int) -> torch.Tensor:
    tensor = torch.ones(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def adapter(**changes: Any) -> Any:
    arguments = {"hidden": H, "down_weight": DOWN, "down_bias": None, "up_weight": UP, "up_bias": None}
    return F.bottleneck_adapter(**{**arguments, "activation": "relu", **changes})


def linear(**changes: Any) -> Any:
    return F.adapted_linear(X, W, lora_a=A, **{"lora_b": B, **changes})


FOUND: list[tuple[Callable[[], Any], str]] = [
    (lambda: linear(dropout_p="0.5"), "dropout_p must be a number, got '0.5'"),
    (lambda: linear(dropout_p=torch.ones(2)), "dropout_p must be a number, got a tensor [2]"),
    (lambda: linear(scaling=10**400), "scaling must be finite, got an int of 1329 bits"),
    (lambda: linear(scaling=torch.tensor(1j)), "scaling must be float32 or bfloat16 or float16 or float64"),
    (lambda: linear(scaling=torch.ones((), device="meta")), "scaling must be on the device of lora_b"),
    (lambda: linear(scaling=torch.ones(1).to_sparse()), "scaling must be a dense tensor"),
    (lambda: linear(scaling=torch.ones(1), lora_b={}), "lora_b must be a torch.Tensor"),
    (lambda: linear(scaling=torch.ones(1), lora_b=freed(8, 4)), "lora_b must have memory"),
    (lambda: F.adapted_linear(X.to_sparse(), W), "x must be a dense tensor"),
    (lambda: F.adapted_linear(X, freed(8, 64)), "weight must have memory"),
    (lambda: F.ia3_linear(X, W, torch.ones(8, dtype=torch.bool)), "ia3_l must be float32, got bool"),
    (
        lambda: F.ia3_linear(X, W, torch.ones(8), torch.ones(8, dtype=torch.int64)),
        "bias must be float32, got int64",
    ),
    (lambda: F.ia3_linear(X, W, torch.ones(8), freed(8)), "bias must have memory"),
    (
        lambda: F.ia3_linear(X, W, torch.ones(8), feedforward=torch.ones(2)),
        "feedforward must be True or False",
    ),  # type: ignore[arg-type]
    (lambda: F.nf4_linear(X, F.nf4_quantize(W), activation=[1]), "activation must be None or 'int8'"),  # type: ignore[arg-type]
    (lambda: F.dora_linear(X, W, A, B, torch.ones(8), 1.0, dropout_p=1.5), "dropout_p must be in [0, 1)"),
    (
        lambda: F.dora_linear(X, torch.ones(()), A, B, torch.ones(8), 1.0, norm=torch.ones(8)),
        "weight must be [N, K]",
    ),
    (lambda: F.dora_linear(X, W, A, B, freed(8), 1.0), "magnitude must have memory"),
    (lambda: F.dora_norm(W, A, B, 1.0, torch.int64), "dtype must be a float dtype"),
    (lambda: F.dora_norm(W, A, B, 1.0, "float32"), "dtype must be a float dtype"),  # type: ignore[arg-type]
    (lambda: F.philox_dropout(X, "0.5"), "p must be a number"),  # type: ignore[arg-type]
    (lambda: F.philox_dropout_mask((-1,), 0.5, 1), "shape must have no negative size"),
    (lambda: F.philox_dropout_mask((2**62, 4, 0), 0.5, 1), "shape must have fewer than 2^62 elements"),
    (lambda: F.philox_dropout_mask((2,), 0.5, None), "seed must be an int, got None"),  # type: ignore[arg-type]
    (lambda: F.philox_dropout_mask((2,), 0.5, torch.ones(())), "seed must be int64, got float32"),
    (lambda: F.nf4_quantize(W, 64.0), "blocksize must be an int, got 64.0"),  # type: ignore[arg-type]
    (lambda: F.nf4_quantize(W, double_quant=torch.ones(2)), "double_quant must be True or False"),  # type: ignore[arg-type]
    (lambda: F.nf4_dequantize(F.nf4_quantize(W), "float32"), "dtype must be float32, bfloat16 or float16"),  # type: ignore[arg-type]
    (lambda: adapter(hidden=torch.ones(2, 8, dtype=torch.int64)), "hidden must be float32 or bfloat16"),
    (lambda: adapter(scaling=torch.ones(2)), "scaling must be [N] = [8], [1] or 0-dim, got [2]"),
    (lambda: adapter(scaling=freed(8)), "scaling must have memory"),
    (lambda: adapter(gate=torch.ones(2, 1, dtype=torch.int64)), "gate must be float32"),
    (lambda: adapter(activation=torch.sin, down_bias=freed(4)), "down_bias must have memory"),
    (lambda: adapter(ln_before=(3, None, 1e-5)), "ln_before weight must be a torch.Tensor"),
    (lambda: adapter(ln_after=(torch.ones(8), torch.ones(8).half(), 1e-5)), "ln_after bias must be float32"),
    (lambda: adapter(ln_after=(None, None, "1e-5")), "ln_after eps must be a number"),
    (lambda: adapter(adapter_residual_before_ln=2), "adapter_residual_before_ln must be True or False"),
    (lambda: pk.nn.LoRALinear(-1, 8), "in_features must be positive"),
    (lambda: pk.nn.LoRALinear(8, 8, lora_alpha="8"), "lora_alpha must be a number"),  # type: ignore[arg-type]
    (lambda: pk.nn.IA3Linear(8, 8.0), "out_features must be an int"),  # type: ignore[arg-type]
    (
        lambda: pk.nn.NF4Linear(8, 8, dtype=torch.int8),
        "dtype must be one of float32, bfloat16, float16, or None",
    ),
    (
        lambda: pk.nn.NF4Linear(8, 8, device="nowhere"),
        "device must be one that torch has here, got 'nowhere'",
    ),
    (lambda: pk.nn.NF4Linear(8, 8, device=[]), "device must be a torch.device or its name"),  # type: ignore[arg-type]
    (lambda: pk.nn.BottleneckAdapter(8, 1e-320), "reduction_factor must not be so small"),
    (lambda: pk.nn.BottleneckAdapter(8, non_linearity=3), "non_linearity must be a name or a callable"),  # type: ignore[arg-type]
    (lambda: pk.nn.BottleneckAdapter(8, use_gating="no"), "use_gating must be True or False"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), FOUND, ids=[message for _, message in FOUND])
def test_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=f"(^|, ){re.escape(message)}"):
        call()
    if "must have memory" in message:  # where torch's own operations crash
        with pk.use_backend("reference"), pytest.raises(RuntimeError, match=re.escape(message)):
            call()


def test_a_layer_norm_with_a_wider_bias_alone_has_gradients() -> None:
    hidden, bias = H.bfloat16().requires_grad_(), torch.ones(8, requires_grad=True)
    adapter(hidden=hidden, ln_before=(None, bias, 1e-5)).sum().backward()
    assert hidden.grad is not None
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


def test_a_bias_of_the_dtype_of_x_is_scaled_exactly() -> None:
    y = F.ia3_linear(X.bfloat16(), W.bfloat16(), torch.full((8,), 0.5), torch.ones(8).bfloat16())
    assert torch.equal(y, torch.full((2, 8), 32.5).bfloat16())
