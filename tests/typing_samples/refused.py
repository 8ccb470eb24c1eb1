"""What mypy must refuse: each line is an error of the kind that its comment names. It is not run."""

import torch

import peft_kernels as pk

x, w = torch.randn(4, 64), pk.functional.nf4_quantize(torch.randn(32, 64))

pk.functional.nf4_linear(x, torch.randn(32, 64))  # error: arg-type
pk.functional.nf4_linear(x, w, activation=8)  # error: arg-type
pk.functional.nf4_lora_linear(x, w)  # error: call-arg
pk.functional.bottleneck_adapter(x, x, None, x, None)  # error: call-arg
pk.nn.LoRALinear(64, 32, r="8")  # error: arg-type
pk.nn.NF4Linear.from_linear(torch.randn(32, 64))  # error: arg-type
pk.replace_layers(torch.nn.Linear(1, 1), only=3)  # error: arg-type
pk.replace_layers(torch.nn.Linear(1, 1), "q_proj")  # error: call-arg
_ = pk.explain(torch.nn.Linear(1, 1)).no_such_attribute  # error: attr-defined
pk.optim.loraplus_param_groups(torch.nn.Linear(1, 1), lr=1e-4)  # error: call-arg
w.shape = (1, 1)  # error: misc
pk.io.load_adapterhub(3)  # error: arg-type
