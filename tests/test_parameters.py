"""Counting parameters: against PEFT, by kind, and against the formulas of the papers."""

import io
from collections.abc import Callable
from typing import Any

import adapters
import bitsandbytes as bnb
import peft
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

import peft_kernels as pk
from peft_kernels.parameters import Kind, TrainableParameters
from surgery.peft_models import linear4bit, make_llama, make_mlp

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

D, D_FF, LAYERS, RANK = 32, 96, 3, 4  # of the small encoder below
LLAMA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
PROMPT = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION")
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def kinds(model: nn.Module) -> dict[str, int]:
    return {kind.name: kind.parameters for kind in pk.trainable_parameters(model).kinds}


def bert() -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=D,
            intermediate_size=D_FF,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
        )
    )


def with_adapter(config: Any) -> BertModel:
    """The encoder with an adapter of the adapters library."""
    model = bert()
    adapters.init(model)
    model.add_adapter("task", config=config)
    model.train_adapter("task")
    return model


def llama_7b(config: peft.PeftConfig) -> peft.PeftModel:
    """LLaMA-2 7B on the meta device, which takes no memory, with an adapter."""
    with torch.device("meta"):
        return peft.get_peft_model(LlamaForCausalLM(LLAMA_7B), config)


# Totals.


def tied() -> peft.PeftModel:
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )
    return peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    "make",
    [
        make_mlp,
        lambda: make_mlp("nf4"),
        lambda: make_llama("nf4_double"),
        lambda: make_mlp("nf4", base_kwargs={"quant_storage": torch.bfloat16}),
        lambda: make_mlp("nf4", base_kwargs={"quant_type": "fp4"}),
        lambda: make_llama("nf4", modules_to_save=["lm_head"]),
        lambda: make_mlp("nf4", use_dora=True),
        lambda: make_mlp(bias="all"),
        tied,
        lambda: peft.get_peft_model(bert(), peft.IA3Config(target_modules=["key"], feedforward_modules=[])),
        lambda: peft.get_peft_model(bert(), PROMPT),
        lambda: llama_7b(peft.LoraConfig(target_modules=ALL_LINEAR)),
    ],
)
def test_totals_are_pefts(make: Callable[[], peft.PeftModel]):
    model = make()
    expected = model.get_nb_trainable_parameters()
    counted = pk.trainable_parameters(model)
    assert (counted.trainable, counted.total) == expected
    assert counted.share == expected[0] / expected[1]
    pk.replace_layers(model)
    assert pk.trainable_parameters(model) == counted


def test_tied_parameters_count_once():
    first, second = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    second.weight = first.weight
    counted = pk.trainable_parameters(nn.Sequential(first, second, first))
    assert (counted.trainable, counted.total) == (12, 12)
    assert counted.kinds == (Kind("other", tensors=1, parameters=12, nbytes=48),)


def test_4bit_weights_count_by_their_logical_shape():
    """Two to a byte, in our layer and in bitsandbytes'; an odd number of them, of which PEFT counts 16."""
    linear = nn.Linear(5, 3)
    ours = pk.nn.NF4Linear.from_linear(linear)
    assert ours.weight.numel() == 8
    for quantised in (ours, linear4bit(linear)):
        counted = pk.trainable_parameters(quantised.requires_grad_(False))
        assert (counted.trainable, counted.total) == (0, 18)


def test_4bit_weights_count_alike_before_and_after_they_are_quantised():
    assert pk.trainable_parameters(bnb.nn.Linear4bit(64, 32, bias=False)).total == 64 * 32


def test_4bit_weights_count_alike_after_bitsandbytes_has_rearranged_them():
    """It does so in evaluation mode on CPUs with bf16 arithmetic; elsewhere this shows nothing."""
    base = linear4bit(nn.Linear(64, 32), compute_dtype=torch.float32).eval().requires_grad_(False)
    with torch.no_grad():
        base(torch.ones(3, 64))
    assert pk.trainable_parameters(base).total == 64 * 32 + 32


def test_parameters_that_deepspeed_has_sharded_count_in_full():
    """ZeRO-3 leaves an empty tensor that knows its former size, as PEFT reads it."""
    linear = nn.Linear(4, 3, bias=False)
    linear.weight.data = torch.empty(0)
    linear.weight.ds_numel = 12
    assert pk.trainable_parameters(linear).total == 12


def test_our_qlora_layer():
    linear = pk.nn.LoRALinear.from_linear(pk.nn.NF4Linear.from_linear(nn.Linear(64, 32)), r=RANK)
    counted = pk.trainable_parameters(linear)
    assert counted.total - counted.trainable == 64 * 32 + 32
    assert kinds(linear) == {"LoRA A": RANK * 64, "LoRA B": RANK * 32}


# Kinds.


def test_kinds_of_peft():
    config = {
        "task_type": "SEQ_CLS",
        "modules_to_save": ["classifier"],
        "bias": "lora_only",
        "use_dora": True,
    }
    model = peft.get_peft_model(
        BertForSequenceClassification(bert().config),
        peft.LoraConfig(r=RANK, target_modules=["query"], **config),
    )
    assert kinds(model) == {
        "LoRA A": LAYERS * RANK * D,
        "LoRA B": LAYERS * RANK * D,
        "DoRA magnitude": LAYERS * D,
        "head or saved module": 2 * D + 2,
        "other": LAYERS * D,  # the biases
    }


@pytest.mark.parametrize(
    ("config", "kind", "count"),
    [
        (adapters.SeqBnConfig(reduction_factor=8), "bottleneck adapter", LAYERS * (2 * D * 4 + 4 + D)),
        (
            adapters.ParBnConfig(reduction_factor=8, scaling="learned"),
            "bottleneck adapter",
            LAYERS * (2 * D * 4 + 4 + D + 1),
        ),
        (adapters.IA3Config(), "IA3 vector", LAYERS * (2 * D + D_FF)),
        (adapters.PrefixTuningConfig(prefix_length=5, flat=True), "prompt or prefix", LAYERS * 2 * 5 * D),
    ],
)
def test_kinds_of_adapters(config, kind, count):
    assert kinds(with_adapter(config)) == {kind: count}


def test_kinds_add_up():
    counted = pk.trainable_parameters(make_llama("nf4", modules_to_save=["lm_head"]))
    assert counted.trainable == sum(kind.parameters for kind in counted.kinds)
    assert counted.nbytes == 4 * counted.trainable


# The value.


def test_it_prints_a_table():
    counted = pk.trainable_parameters(make_mlp())
    text = str(counted)
    assert text.startswith(
        f"{counted.trainable:,} of {counted.total:,} parameters are trained (10.162%), 0.01 MiB"
    )
    (line,) = (line for line in text.splitlines() if "LoRA A" in line)
    assert f"{kinds(make_mlp())['LoRA A']:,}" in line
    assert text == repr(counted)
    screen = io.StringIO()
    Console(file=screen, width=100).print(counted)
    assert "LoRA B" in screen.getvalue()


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 3).requires_grad_(False)])
def test_nothing_to_train(model):
    counted = pk.trainable_parameters(model)
    assert counted == TrainableParameters((), sum(p.numel() for p in model.parameters()))
    assert counted.share == counted.nbytes == 0
    assert str(counted).startswith("0 of ")
    assert len(str(counted).splitlines()) == 1


def test_not_a_module():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got 3; pass the loaded model itself"):
        pk.trainable_parameters(3)


# The formulas of the papers and of introductions to them: L layers, width d, feed-forward width d_ff, rank r.
# Where the usual formula is not the exact count, both are given and their difference is stated.


def test_lora_formula():
    """LoRA, arXiv 2106.09685, section 4.1: A is r x d_in, B is d_out x r: r (d_in + d_out) per matrix."""
    model = peft.get_peft_model(
        bert(), peft.LoraConfig(r=RANK, target_modules=["query", "intermediate.dense"])
    )
    assert pk.trainable_parameters(model).trainable == LAYERS * RANK * ((D + D) + (D + D_FF))


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        # "~40M": r (d_in + d_out) over all seven matrices
        (ALL_LINEAR, 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))),
        # "~8M" is often said of these four at r = 16; it is their count at r = 8, or that of the next line
        (["q_proj", "k_proj", "v_proj", "o_proj"], 32 * 16 * 4 * (4096 + 4096)),
        (["q_proj", "v_proj"], 32 * 16 * 2 * (4096 + 4096)),
    ],
)
def test_lora_on_a_7b_model(targets, count):
    assert count in (39_976_960, 16_777_216, 8_388_608)
    assert pk.trainable_parameters(llama_7b(peft.LoraConfig(r=16, target_modules=targets))).trainable == count


def test_dora_adds_a_magnitude_per_output():
    """DoRA, arXiv 2402.09353, section 4.1: one magnitude per output of an adapted matrix, d_out in all.

    "d per layer" is thus d per adapted square matrix: 32 x 4096 = 131,072 for one of them in each of the 32
    blocks of a 7B model, and 32 (5 d + 2 d_ff) = 1,359,872 for all seven.
    """
    for targets, extra in ((["q_proj"], 131_072), (ALL_LINEAR, 1_359_872)):
        lora, dora = (
            pk.trainable_parameters(
                llama_7b(peft.LoraConfig(r=16, target_modules=targets, use_dora=use_dora))
            )
            for use_dora in (False, True)
        )
        assert dora.trainable - lora.trainable == extra
        assert {kind.name: kind.parameters for kind in dora.kinds}["DoRA magnitude"] == extra
    assert extra == 32 * (5 * 4096 + 2 * 11008)


def test_ia3_formula():
    """IA3, arXiv 2205.05638, section 3.3: l_k and l_v of width d, l_ff of d_ff: L (2 d + d_ff)."""
    feedforward = r".*layer\.\d+\.output\.dense"
    config = peft.IA3Config(target_modules=rf".*(key|value)|{feedforward}", feedforward_modules=feedforward)
    assert kinds(peft.get_peft_model(bert(), config)) == {"IA3 vector": LAYERS * (2 * D + D_FF)}
    # on a 7B model: 614,400
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    counted = pk.trainable_parameters(llama_7b(config)).trainable
    assert counted == 32 * (2 * 4096 + 11008) == 614_400


def test_ia3_as_peft_has_it_for_bert():
    """PEFT's own targets for BERT, "output.dense", also match the attention's output: another d per layer."""
    assert kinds(peft.get_peft_model(bert(), peft.IA3Config())) == {"IA3 vector": LAYERS * (3 * D + D_FF)}


def test_bottleneck_adapter_formula():
    """Adapters, arXiv 1902.00751, section 2.1: two per layer, each of 2 d r + d + r with its biases.

    The form 2 L 2 (d r + r), two adapters of two matrices with r for the bias of either, is too small by
    2 L (d - r), since the bias of the way up has d elements: at d = 4096, r = 64, L = 32 it gives 33.6
    million, and there are 33.8.
    """
    reduction = D // RANK
    counted = pk.trainable_parameters(
        with_adapter(adapters.DoubleSeqBnConfig(reduction_factor=reduction))
    ).trainable
    assert counted == 2 * LAYERS * (2 * D * RANK + D + RANK)
    assert counted - 2 * LAYERS * 2 * (D * RANK + RANK) == 2 * LAYERS * (D - RANK)
    assert (round(2 * 32 * 2 * (4096 * 64 + 64), -5), round(2 * 32 * 528_448, -5)) == (33_600_000, 33_800_000)


def test_one_bottleneck_adapter():
    """d = 4096, r = 64: 262,208 down and 266,240 up."""
    with torch.device("meta"):
        module = nn.ModuleDict({"adapter_down": nn.Linear(4096, 64), "adapter_up": nn.Linear(64, 4096)})
    assert kinds(module) == {"bottleneck adapter": 262_208 + 266_240}


def test_prefix_formula():
    """Prefix tuning, arXiv 2101.00190: p keys and p values of width d per layer, 2 L p d."""
    config = peft.PrefixTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    assert kinds(llama_7b(config)) == {"prompt or prefix": 5_242_880}
    assert 2 * 32 * 20 * 4096 == 5_242_880


def test_prompt_formula():
    """Prompt tuning, arXiv 2104.08691: p rows of width d ahead of the embeddings."""
    config = peft.PromptTuningConfig(num_virtual_tokens=20, task_type="CAUSAL_LM")
    assert kinds(llama_7b(config)) == {"prompt or prefix": 20 * 4096}
