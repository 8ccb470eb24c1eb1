"""Types of `pk.nn`, `pk.optim` and `pk.trainable_parameters` in a training loop of the user's own."""

from typing import Any, assert_type

import torch
from torch import nn

import peft_kernels as pk


class Classifier(nn.Module):
    """A user's model with our layers in it."""

    def __init__(self) -> None:
        super().__init__()
        base = pk.nn.NF4Linear.from_linear(nn.Linear(64, 64))
        self.attention = pk.nn.LoRALinear.from_linear(base, r=4, lora_dropout=0.1)
        self.value = pk.nn.IA3Linear(64, 64)
        self.output = pk.nn.DoRALinear(64, 64, r=4, use_rslora=True)
        self.adapter = pk.nn.BottleneckAdapter.pfeiffer(64, dropout=0.1)
        self.dropout = pk.nn.PhiloxDropout(0.1)
        self.head = nn.Linear(64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [batch, 2] of x [batch, 64]."""
        hidden: torch.Tensor = self.output(self.value(self.attention(x)))
        logits: torch.Tensor = self.head(self.dropout(self.adapter(hidden, residual=hidden)))
        return logits


model = Classifier()
assert_type(model.attention, pk.nn.LoRALinear)
assert_type(model.attention.frozen_weight, torch.Tensor | pk.NF4Weight)
assert_type(model.attention.adapter, tuple[torch.Tensor, torch.Tensor])
assert_type(model.output, pk.nn.DoRALinear)
assert_type(model.output.magnitude, torch.Tensor)
assert_type(model.value.adapter, torch.Tensor)
assert_type(model.adapter, pk.nn.BottleneckAdapter)

groups = pk.optim.loraplus_param_groups(model, lr=1e-3, ratio=16)
assert_type(groups, list[dict[str, Any]])
optimizer = torch.optim.AdamW(groups)
for _ in range(2):
    loss = model(torch.randn(8, 64)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

counted = pk.trainable_parameters(model)
assert_type(counted.trainable, int)
assert_type(counted.share, float)
assert_type([kind.name for kind in counted.kinds], list[str])

model.attention.merge()
assert_type(model.attention.merged, bool)
model.attention.unmerge()
assert_type(model.output.merge_to_dense(), nn.Linear)
pk.invalidate_norms(model)
with pk.use_backend("reference"):
    model.eval()(torch.randn(8, 64))
