"""Types of `pk.functional` and `NF4Weight`, as user code meets them under mypy --strict."""

from typing import assert_type

import torch

import peft_kernels as pk

x = torch.randn(4, 64)
weight, bias = torch.randn(32, 64), torch.randn(32)
lora_a, lora_b = torch.randn(4, 64), torch.randn(32, 4)

w = pk.functional.nf4_quantize(weight, blocksize=64, double_quant=True)
assert_type(w, pk.NF4Weight)
assert_type(w.shape, tuple[int, ...])
assert_type(w.dequantize(torch.bfloat16), torch.Tensor)
assert_type(w.to("cpu"), pk.NF4Weight)
assert_type(w.nbytes, int)
assert_type(w.state_dict("layer."), dict[str, torch.Tensor])
assert_type(pk.NF4Weight.from_state_dict(w.state_dict()), pk.NF4Weight)

assert_type(pk.functional.nf4_dequantize(w), torch.Tensor)
assert_type(pk.functional.nf4_linear(x, w, bias, activation="int8"), torch.Tensor)
assert_type(pk.functional.nf4_lora_linear(x, w, lora_a, lora_b, scaling=2.0, dropout_p=0.1), torch.Tensor)
assert_type(pk.functional.lora_linear(x, weight, lora_a, lora_b, torch.tensor(2.0), seed=7), torch.Tensor)
for base in (w, weight):  # dense or NF4
    assert_type(pk.functional.adapted_linear(x, base, bias=bias), torch.Tensor)
    assert_type(pk.functional.ia3_linear(x, base, torch.ones(64), feedforward=True), torch.Tensor)
    norm = pk.functional.dora_norm(base, lora_a, lora_b, 2.0)
    assert_type(pk.functional.dora_linear(x, base, lora_a, lora_b, norm, 2.0, norm=norm), torch.Tensor)

down, up = torch.randn(8, 64), torch.randn(64, 8)
y = pk.functional.bottleneck_adapter(x, down, None, up, None, activation=torch.tanh, residual=x)
assert_type(y, torch.Tensor)
assert_type(
    pk.functional.bottleneck_adapter_with_intermediates(x, down, None, up, None, activation="relu"),
    tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
)
assert_type(pk.functional.philox_dropout(x, 0.5), torch.Tensor)
assert_type(pk.functional.philox_dropout_mask((4, 64), 0.5, seed=7), torch.Tensor)
assert_type(pk.__version__, str)
