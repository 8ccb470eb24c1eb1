"""Small PEFT models to operate on: dense and 4-bit, plain and from transformers."""

import copy
import math
from typing import Any

import bitsandbytes as bnb
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from numerics import assert_within, smallest, unit_roundoff
from peft_kernels.nn import PhiloxDropout

BASES = ("dense", "nf4", "nf4_double")
IA3_BASES = tuple(f"ia3 {base}" for base in BASES)  # what `make_mlp` knows besides
VOCABULARY = 64
# Of a term on its way through two layers of at most 128 features and their adapters and back.
ROUNDINGS = 512


def linear4bit(linear: nn.Linear, base: str = "nf4_double", **kwargs: Any) -> bnb.nn.Linear4bit:
    """A bitsandbytes layer holding the weight of `linear` in 4 bits."""
    kwargs = {"quant_type": "nf4", "compute_dtype": linear.weight.dtype} | kwargs
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compress_statistics=base == "nf4_double",
        **kwargs,
    )
    layer.weight.data = linear.weight.data.clone()
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.data.clone())
    return layer.to("cpu")  # this quantises


def make_linear4bit(
    base: str = "nf4", in_features: int = 128, seed: int = 0, **kwargs: Any
) -> bnb.nn.Linear4bit:
    """A frozen layer of 96 outputs."""
    torch.manual_seed(seed)
    layer = linear4bit(nn.Linear(in_features, 96), base, **kwargs)
    return layer.requires_grad_(False)


def quantise(model: nn.Module, base: str, **kwargs: Any) -> None:
    """Put a bitsandbytes layer in the place of every `nn.Linear`, as transformers does."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, linear4bit(child, base, **kwargs))
    model.is_loaded_in_4bit = True  # how PEFT knows


def adapt(model: nn.Module, targets: list[str], **config: Any) -> PeftModel:
    """Add a LoRA adapter that does something: B is not zero."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": targets} | config
    autocast = config.pop("autocast_adapter_dtype", True)
    peft_model = get_peft_model(model, LoraConfig(**config), autocast_adapter_dtype=autocast)
    fill_adapter(peft_model)
    return peft_model


def fill_adapter(model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    """Give A and B, or l, of an adapter the values that `seed` stands for."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((f"lora_A.{adapter}.weight", f"lora_B.{adapter}.weight")):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith(f"ia3_l.{adapter}"):
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))


def add_second_adapter(model: PeftModel) -> None:
    """An adapter "second" of the model's own kind, filled and not active."""
    if isinstance(model.peft_config["default"], IA3Config):
        model.add_adapter("second", IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]))
    else:
        model.add_adapter("second", LoraConfig(target_modules=["0", "2"], r=2, lora_dropout=0.0))
    fill_adapter(model, "second", seed=2)


def philox(model: nn.Module) -> None:
    """Give a stock model the dropout whose mask the fused layers share."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                setattr(module, name, PhiloxDropout(child.p).train(child.training))


def make_mlp(base: str = "dense", dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    """Linear, GELU, Linear with an adapter on both: 64 -> 128 -> 32 features.

    The adapter is LoRA, or IA3 for a `base` of IA3_BASES, which scales the outputs of the first layer and the
    inputs of the second.
    """
    kwargs = config.pop("base_kwargs", {})
    ia3, base = base.startswith("ia3 "), base.removeprefix("ia3 ")
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32)).to(dtype)
    if base != "dense":
        quantise(model, base, **kwargs)
    if not ia3:
        return adapt(model, ["0", "2"], **config)
    peft_model = get_peft_model(
        model, IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]), **config
    )
    fill_adapter(peft_model)
    return peft_model


def make_llama(base: str = "dense", **config: Any) -> PeftModel:
    """Two decoder layers of width 64 with an adapter on three of their seven projections."""
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            use_cache=False,
        )
    )
    if base != "dense":
        quantise(llama.model.layers, base)
        llama.is_loaded_in_4bit = True
    return adapt(llama, ["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **config)


def layer(model: nn.Module, name: str = "base_model.model.0") -> Any:
    """One layer, untyped."""
    return model.get_submodule(name)


def tokens(rows: int = 2, length: int = 8) -> torch.Tensor:
    """Random input ids."""
    return torch.randint(0, VOCABULARY, (rows, length))


def pair(model: PeftModel) -> tuple[PeftModel, PeftModel]:
    """The model and an independent copy of it."""
    return model, copy.deepcopy(model)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same keys with the same bits."""
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[key], right[key]) for key in left)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Two fp32 results of one of these models differ by no more than the order of their sums can explain.

    n roundings of random sign add up to at most lambda sqrt(n) u of the size of a result, in each of the two,
    but for a probability of 2 exp(-lambda^2 / 2), 7e-6 for the 5 here (Higham and Mary, A New Approach to
    Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41(5), 2019). The size is the largest element.
    """
    assert actual.dtype == expected.dtype == torch.float32
    relative = 2 * 5 * math.sqrt(ROUNDINGS) * unit_roundoff(torch.float32)
    size = expected.detach().double().abs().max() if expected.numel() else torch.tensor(0.0)
    allowed = relative * size + smallest(torch.float32)
    assert_within("result", actual.detach(), expected.detach().double(), allowed)
