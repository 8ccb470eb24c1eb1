"""Small transformers models with bottleneck adapters of the `adapters` library."""

import warnings
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from peft_kernels.nn import PhiloxDropout

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its own, on being imported
    import adapters

HIDDEN, LAYERS = 32, 2


def make_model(*configs: Any, kind: str = "bert") -> Any:
    """A model with an adapter "a0", "a1", ... for each config, none of it zero; the first is active."""
    torch.manual_seed(0)
    if kind == "bert":
        config = BertConfig(
            vocab_size=50, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=4,
            intermediate_size=48, max_position_embeddings=16,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model: Any = BertModel(config)
    else:
        model = GPT2Model(
            GPT2Config(
                vocab_size=50, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=16,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip
    adapters.init(model)
    for index, adapter in enumerate(configs):
        model.add_adapter(f"a{index}", config=adapter)
    randomise(model)
    model.set_active_adapters("a0")
    model.train_adapter("a0")
    return model.train()


def randomise(model: nn.Module, seed: int = 1) -> None:
    """Give every parameter of every adapter a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name or "adapter_fusion" in name:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.2


def philox(model: nn.Module) -> None:
    """Give the adapters' dropout the masks of the fused layers."""
    for name, module in model.named_modules():
        if name.endswith(".dropout") and ".adapters." in name:
            model.get_submodule(name.rpartition(".")[0]).dropout = PhiloxDropout(module.p).train(
                module.training
            )


def tokens() -> torch.Tensor:
    return torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(3))


def run(model: Any) -> torch.Tensor:
    torch.manual_seed(11)  # of dropout masks
    output: torch.Tensor = model(input_ids=tokens())[0]
    return output


def run_with_gradients(model: Any) -> dict[str, torch.Tensor]:
    """The result, and the gradient of every parameter that is trained."""
    model.zero_grad()
    output = run(model)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output.dtype)
    output.backward(grad)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **grads}
