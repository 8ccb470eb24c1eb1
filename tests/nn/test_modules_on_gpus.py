"""Modules as on a GPU: a training step of each on Triton's kernels, emulated, beside the reference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import peft_kernels as pk


def _quantised() -> pk.nn.NF4Linear:
    return pk.nn.NF4Linear.from_linear(nn.Linear(128, 48), double_quant=True)


MODULES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LoRA": (lambda: pk.nn.LoRALinear.from_linear(_quantised(), r=4, lora_dropout=0.2), "panel_kernel"),
    "DoRA": (lambda: pk.nn.DoRALinear.from_linear(_quantised(), r=4), "panel_kernel"),
    "IA3 outputs": (lambda: pk.nn.IA3Linear.from_linear(_quantised()), "panel_kernel"),
    "IA3 inputs": (
        lambda: pk.nn.IA3Linear.from_linear(nn.Linear(128, 48), feedforward=True),
        "epilogue_kernel",
    ),
    "bottleneck": (lambda: pk.nn.BottleneckAdapter.houlsby(128), "narrow_kernel"),
    "dropout": (lambda: pk.nn.PhiloxDropout(0.3), "dropout"),
}


def step(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients, of the input and of what is trained."""
    torch.manual_seed(1)  # of dropout
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    wanted = [leaf, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


@pytest.mark.parametrize("name", MODULES)
def test_training_step_on_an_emulated_gpu(gpu: Any, name: str) -> None:
    make, kernel = MODULES[name]
    module, x = make(), torch.randn(2, 10, 128)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    found = step(module, x)
    assert any(kernel in launch.name for launch in gpu.launches)
    with pk.use_backend("reference"):
        expected = step(module, x)
    for actual, wanted in zip(found, expected, strict=True):  # their bounds are derived in tests/ops
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "IA3 outputs"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_training_step_with_cuda_kernels(cuda_gpu: Any, name: str, tokens: int) -> None:
    module, x = MODULES[name][0](), torch.randn(tokens, 128, dtype=torch.bfloat16)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    found = step(module, x)
    names = " ".join(launch.shown for launch in cuda_gpu.launches)
    assert "linear_" in names
    assert "input_gradient_kernel" in names
    with pk.use_backend("reference"):
        expected = step(module, x)
    for actual, wanted in zip(found, expected, strict=True):  # bf16: bounds are derived in tests/ops
        torch.testing.assert_close(actual, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max()))
