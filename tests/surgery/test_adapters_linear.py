"""4-bit layers of the adapters library: fused unless its own LoRA is active on them."""

import copy
from typing import Any

import adapters
import pytest
import torch
from adapters import IA3Config, LoRAConfig, SeqBnConfig
from peft_models import assert_close, quantise
from transformers import BertConfig, BertModel

from peft_kernels.surgery import explain, replace_layers, restore_layers

LAYER = "encoder.layer.0.attention.self.query"


def make_model() -> Any:
    """One BERT layer in 4 bits, through `adapters.init`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = BertModel(BertConfig(vocab_size=32, max_position_embeddings=16, **sizes)).eval()
    quantise(model.encoder, "nf4")
    adapters.init(model)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its bf16 kernel in eval mode
    return model


def reason_of(model: Any) -> str:
    return next(row.reason for row in explain(model) if row.name == LAYER)


def outputs(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(12).reshape(2, 6)).last_hidden_state


def test_layers_are_fused_when_another_method_is_used() -> None:
    model = make_model()
    model.add_adapter("task", config=SeqBnConfig())
    model.set_active_adapters("task")
    expected = outputs(model)
    report = replace_layers(model, only="*.query")
    assert next(row for row in report if row.name == LAYER).fused
    assert_close(outputs(model), expected)
    assert reason_of(model) == ""
    restore_layers(model)
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize(
    "config", [LoRAConfig(r=4, attn_matrices=["q"]), IA3Config(attn_matrices=["q"])], ids=["LoRA", "IA3"]
)
def test_an_active_lora_runs_the_librarys_forward(config: Any) -> None:
    stock = make_model()
    stock.add_adapter("task", config=config)
    for name, parameter in stock.named_parameters():
        if "loras" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    fused = copy.deepcopy(stock)
    replace_layers(fused)
    assert_close(outputs(fused), outputs(stock))
    assert reason_of(fused) == ""
    for model in (stock, fused):
        model.set_active_adapters("task")
    assert "adapter of the adapters library is active" in reason_of(fused)
    assert_close(outputs(fused), outputs(stock))
    with pytest.raises(ValueError, match="adapter of the adapters library is active"):
        replace_layers(fused, strict=True)
    for model in (stock, fused):
        model.set_active_adapters(None)
    assert_close(outputs(fused), outputs(stock))
    assert reason_of(fused) == ""


def test_adapter_setup_of_a_block_of_calls() -> None:
    """`AdapterSetup` activates an adapter for the calls inside it."""
    stock = make_model()
    stock.add_adapter("task", config=LoRAConfig(r=4, attn_matrices=["q"], init_weights="bert"))
    fused = copy.deepcopy(stock)
    replace_layers(fused)
    plain = outputs(fused)
    with adapters.AdapterSetup("task"):
        expected, got = outputs(stock), outputs(fused)
    assert_close(got, expected)
    assert not torch.equal(got, plain)
    assert torch.equal(outputs(fused), plain)
