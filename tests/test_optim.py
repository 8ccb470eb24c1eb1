"""LoRA+: the groups are those of PEFT's own optimiser, and training with them is its training."""

import copy
import itertools
from typing import Any

import adapters
import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import BertConfig, BertModel

import peft_kernels as pk
from surgery.peft_models import VOCABULARY, adapt, make_llama, make_mlp, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LR, RATIO, WEIGHT_DECAY, EMBEDDING_LR = 3e-4, 16.0, 0.02, 5e-5


class Embedder(nn.Module):
    """An embedding, a layer norm, a linear layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.linear(self.norm(self.embedding(ids))))
        return result


def embedder(**config: Any) -> peft.PeftModel:
    return adapt(Embedder(), **({"targets": ["embedding", "linear"]} | config))


def trained_norm() -> peft.PeftModel:
    """Norm, head and the embedding's own weight are trained in full beside LoRA."""
    model = embedder(modules_to_save=["norm", "head"], bias="all")
    model.get_submodule("base_model.model.embedding").base_layer.requires_grad_(True)
    return model


def our_layers() -> nn.Module:
    """Layers of pk.nn, dense and 4-bit, with a norm and a head of their own."""
    return nn.Sequential(
        pk.nn.LoRALinear(64, 32, r=4),
        nn.LayerNorm(32),
        pk.nn.LoRALinear.from_linear(pk.nn.NF4Linear.from_linear(nn.Linear(32, 64)), r=2),
        nn.Linear(64, 2),
    )


def adapters_lora() -> nn.Module:
    """The LoRA of the adapters library, whose parameters go by the same names."""
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCABULARY)
    model = BertModel(config)
    adapters.init(model)
    model.add_adapter("task", config=adapters.LoRAConfig(r=2))
    model.train_adapter("task")
    return model


MODELS = {
    "dense": make_mlp,
    "nf4": lambda: make_mlp("nf4"),
    "nf4, double quantisation": lambda: make_llama("nf4_double"),
    "dora": lambda: make_mlp(use_dora=True),
    "bias": lambda: make_mlp(bias="lora_only"),
    "lora_bias": lambda: make_mlp(lora_bias=True),
    "embedding": embedder,
    "norm, head and embedding": trained_norm,
    "lm_head saved": lambda: make_llama(modules_to_save=["lm_head", "norm"]),
    "layers of pk.nn": our_layers,
    "layers of adapters": adapters_lora,
    "one layer": lambda: pk.nn.LoRALinear(8, 4, r=2),
    "norm alone": lambda: nn.LayerNorm(4),
    "parameter of its own": lambda: nn.ParameterList([torch.ones(2, 2), torch.ones(2)]),
}


def pefts_optimizer(model: nn.Module, optimizer: Any = torch.optim.AdamW, **kwargs: Any) -> Any:
    settings = {"loraplus_weight_decay": WEIGHT_DECAY, "loraplus_lr_embedding": EMBEDDING_LR} | kwargs
    return create_loraplus_optimizer(model, optimizer, lr=LR, loraplus_lr_ratio=RATIO, **settings)


def our_groups(model: nn.Module) -> list[dict[str, Any]]:
    return pk.optim.loraplus_param_groups(
        model, LR, RATIO, weight_decay=WEIGHT_DECAY, embedding_lr=EMBEDDING_LR
    )


def assert_same_groups(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) == 4
    for group, expected in zip(ours, theirs, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]]
        assert {k: v for k, v in group.items() if k != "params"} == {
            k: v for k, v in expected.items() if k != "params"
        }


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_pefts(name):
    model = MODELS[name]()
    theirs = pefts_optimizer(model)
    ours = torch.optim.AdamW(our_groups(model))
    assert_same_groups(ours.param_groups, theirs.param_groups)
    assert ours.state_dict() == theirs.state_dict()  # which also holds the defaults


def test_each_group_is_met_by_some_model():
    """Or the comparison above would show little."""
    sizes = [[len(group["params"]) for group in our_groups(MODELS[name]())] for name in MODELS]
    assert all(any(column) for column in zip(*sizes, strict=True))


def test_defaults_are_pefts():
    model = trained_norm()
    theirs = create_loraplus_optimizer(model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO)
    ours = torch.optim.SGD(pk.optim.loraplus_param_groups(model, LR, RATIO))
    assert_same_groups(ours.param_groups, theirs.param_groups)


def test_fused_layers_are_grouped_like_stock_ones():
    model = trained_norm()
    expected = our_groups(model)
    pk.replace_layers(model)
    assert_same_groups(our_groups(model), expected)


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, bnb.optim.Lion],
)
def test_training_is_pefts_bit_for_bit(optimizer):
    """Three steps with a schedule: the same parameters, whichever optimiser takes the groups."""
    stock = embedder(modules_to_save=["head"])
    start, ours = copy.deepcopy(stock), copy.deepcopy(stock)
    for model, make in (
        (stock, lambda model: pefts_optimizer(model, optimizer)),
        (ours, lambda model: optimizer(our_groups(model), lr=LR)),
    ):
        stepper = make(model)
        schedule = torch.optim.lr_scheduler.LinearLR(stepper, 0.5, 1.0, total_iters=3)
        torch.manual_seed(0)
        for _ in range(3):
            model(tokens()).square().sum().backward()
            stepper.step()
            schedule.step()
            stepper.zero_grad()
    for left, right, before in zip(stock.parameters(), ours.parameters(), start.parameters(), strict=True):
        assert torch.equal(left, right)
        assert left.requires_grad != torch.equal(left, before)  # all that is trained has moved


def test_b_moves_ratio_times_as_far_as_a():
    """Where gradients are equal: SGD's step is lr * gradient."""
    layer = pk.nn.LoRALinear(4, 4, r=2)
    optimizer = torch.optim.SGD(pk.optim.loraplus_param_groups(layer, lr=0.5, ratio=8))
    before = [p.detach().clone() for p in layer.adapter]
    for parameter in layer.adapter:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter, start, rate in zip(layer.adapter, before, (0.5, 4.0), strict=True):
        torch.testing.assert_close(start - parameter.detach(), torch.full_like(start, rate))


def test_every_trainable_parameter_is_in_one_group():
    model = trained_norm()
    grouped = list(itertools.chain(*(group["params"] for group in our_groups(model))))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, grouped)) == sorted(map(id, trainable))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": [torch.ones(1)]}, TypeError, "model must be an nn.Module, got .*pass the model"),
        ({"model": nn.ReLU()}, ValueError, "model must have trainable parameters, got none; add an adapter"),
        ({"lr": 0.0}, ValueError, "lr must be positive, got 0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite, got nan"),
        ({"ratio": -16}, ValueError, "ratio must be positive, got -16"),
        ({"ratio": float("inf")}, ValueError, "ratio must be finite, got inf"),
        ({"ratio": "16"}, TypeError, "ratio must be a number, got '16'"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must not be negative, got -0.1"),
        ({"embedding_lr": -1}, ValueError, "embedding_lr must not be negative, got -1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, error, message):
    arguments = {"model": pk.nn.LoRALinear(4, 4, r=2), "lr": 1e-3, "ratio": 16} | changes
    with pytest.raises(error, match=message):
        pk.optim.loraplus_param_groups(**arguments)


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="trainable parameters"):
        pk.optim.loraplus_param_groups(make_mlp().requires_grad_(False), 1e-3, 16)
