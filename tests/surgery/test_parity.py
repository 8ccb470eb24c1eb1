"""A fused layer computes what PEFT's own layer does: results, gradients, dtypes, dropout masks, training."""

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft_models import BASES, assert_close, layer, make_llama, make_mlp, pair, philox, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from factories import Problem
from numerics import Tensors, assert_within, bound, gamma, gradients
from peft_kernels.surgery import explain, replace_layers

# How often PEFT's layer rounds to the dtype it computes in, one step after the other: W when dequantised, x,
# dropout, x A^T, u B^T, times scaling, base plus update, the result; for a gradient the same in reverse.
STOCK_ROUNDINGS = 8


def draw_seed() -> int:
    """The dropout seed of the first call after `torch.manual_seed(5)`; leaves the generator so."""
    torch.manual_seed(5)
    seed = int(torch.randint(0, 2**63 - 1, ()))
    torch.manual_seed(5)
    return seed


def problem_of(stock: Any, x: torch.Tensor, grad: torch.Tensor) -> Problem:
    """What a LoRA layer has to compute for x [M, K], as a formula on exact weights."""
    base = stock.base_layer
    weight = base.weight.data
    if isinstance(base, bnb.nn.Linear4bit):
        state = copy.copy(base.weight.quant_state)
        state.dtype = torch.float32  # what the codes stand for, before rounding to the compute dtype
        weight = bnb.functional.dequantize_4bit(base.weight.data, state)
    tensors = {
        "x": x,
        "lora_a": stock.lora_A["default"].weight,
        "lora_b": stock.lora_B["default"].weight,
        "bias": base.bias,
    }
    return Problem(
        tensors={name: tensor.detach() for name, tensor in tensors.items()},
        weight=weight,
        exact_weight=weight.double(),
        grad=grad,
        scaling=stock.scaling["default"],
        dropout_p=getattr(stock.lora_dropout["default"], "p", 0.0) if stock.training else 0.0,
        seed=draw_seed(),
    )


def run(lora: Any, x: torch.Tensor, grad: torch.Tensor) -> Tensors:
    """Output and gradients of one call."""
    leaves = {
        "x": x.detach().requires_grad_(),
        "lora_a": lora.lora_A["default"].weight,
        "lora_b": lora.lora_B["default"].weight,
    }
    draw_seed()
    y = lora(leaves["x"])
    grads = torch.autograd.grad(y, list(leaves.values()), grad)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_agree(
    problem: Problem, stock: Tensors, fused: Tensors, compute_dtype: torch.dtype, rounds: int
) -> None:
    """Both within what their roundings allow of the exact values, and of the same dtype.

    Besides the result, the fused layer rounds `rounds` times to `compute_dtype`, PEFT STOCK_ROUNDINGS times.
    """
    exact = {
        "y": problem.formula(problem.tensors),
        **gradients(problem.formula, problem.tensors, problem.grad),
    }
    magnitude = {
        "y": problem.formula(problem.absolute(), absolute=True),
        **gradients(lambda t: problem.formula(t, absolute=True), problem.absolute(), problem.grad.abs()),
    }
    for name, ours in fused.items():
        assert ours.dtype == stock[name].dtype, name
        once = bound(exact[name], magnitude[name], problem.roundings()[name], ours.dtype)
        extra = gamma(rounds, compute_dtype) * magnitude[name] if rounds else 0.0
        assert_within(f"fused {name}", ours, exact[name], once + extra)
        extra = gamma(STOCK_ROUNDINGS, compute_dtype) * magnitude[name]
        assert_within(f"PEFT's {name}", stock[name], exact[name], once + extra)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("dtype", "fp32_adapter"),
    [
        (torch.float32, True),
        (torch.bfloat16, True),  # PEFT's default
        (torch.float16, True),
        (torch.bfloat16, False),
        (torch.float16, False),
    ],
)
@pytest.mark.parametrize("base", BASES)
def test_layer_agrees_with_peft(base: str, dtype: torch.dtype, fp32_adapter: bool, dropout: float) -> None:
    model = make_mlp(base, dtype, lora_dropout=dropout, autocast_adapter_dtype=fp32_adapter, use_rslora=True)
    stock, fused = (layer(m) for m in pair(model))
    philox(stock)  # the fused layer keeps its nn.Dropout
    assert replace_layers(fused, strict=True).rows[0].fused
    x, grad = torch.randn(24, 64).to(dtype), torch.randn(24, 128).to(dtype)
    problem = problem_of(stock, x, grad)
    # 16-bit GEMMs of a dense base round their operands and their result; bf16 panels the NF4 weight.
    rounds = (2 if base == "dense" else int(dtype == torch.bfloat16)) if dtype.itemsize == 2 else 0
    assert_agree(problem, run(stock, x, grad), run(fused, x, grad), dtype, rounds)
    assert explain(fused).rows[0].reason == ""


@pytest.mark.parametrize("base", BASES)
def test_eval_mode_drops_nothing(base: str) -> None:
    model = make_mlp(base, lora_dropout=0.5).eval()
    fused = layer(model)
    x, grad = torch.randn(24, 64), torch.randn(24, 128)
    problem = problem_of(fused, x, grad)
    replace_layers(fused, strict=True)
    generator = torch.get_rng_state()
    y = fused(x).detach()
    assert torch.equal(torch.get_rng_state(), generator)
    exact, magnitude = problem.formula(problem.tensors), problem.formula(problem.absolute(), absolute=True)
    assert_within("y", y, exact, bound(exact, magnitude, problem.roundings()["y"], torch.float32))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_compute_dtype_of_a_4bit_base(x_dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
    """x goes to the compute dtype and the result back to the dtype of x, whatever the two are."""
    model = make_mlp("nf4", base_kwargs={"compute_dtype": compute_dtype})
    stock, fused = (layer(m) for m in pair(model))
    replace_layers(fused, strict=True)
    x, grad = torch.randn(24, 64).to(x_dtype), torch.randn(24, 128).to(x_dtype)
    coarser = torch.bfloat16 if torch.bfloat16 in (x_dtype, compute_dtype) else torch.float32
    # Rounded besides the result: x, and the sum in the compute dtype; for a gradient dy, and that of x.
    # In bf16, the weight too.
    rounds = (0 if x_dtype == compute_dtype else 2) + int(compute_dtype == torch.bfloat16)
    assert_agree(problem_of(stock, x, grad), run(stock, x, grad), run(fused, x, grad), coarser, rounds)
    assert explain(fused).rows[0].reason == ""


def test_compute_dtype_is_taken_from_the_first_input_as_in_bitsandbytes() -> None:
    stock, fused = (layer(m) for m in pair(make_mlp("nf4", base_kwargs={"compute_dtype": None})))
    replace_layers(fused)
    x = torch.randn(3, 64).bfloat16()
    for lora in (stock, fused):
        lora(x)
        assert lora.base_layer.compute_dtype == torch.bfloat16
        assert lora.base_layer.compute_type_is_set
    assert stock(x.float()).dtype == fused(x.float()).dtype == torch.float32


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_autocast_gives_the_dtype_that_peft_gives(base: str) -> None:
    """F.linear takes part in autocast; a Linear4bit returns the dtype of its input."""
    stock, fused = (layer(m) for m in pair(make_mlp(base)))
    replace_layers(fused, strict=True)
    x, grad = torch.randn(24, 64), torch.randn(24, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, y_fused = stock(x), fused(x)
    assert y.dtype == y_fused.dtype == (torch.bfloat16 if base == "dense" else torch.float32)
    problem = problem_of(stock, x, grad)
    exact = problem.formula(problem.tensors)
    allowed = gamma(STOCK_ROUNDINGS, torch.bfloat16) * problem.formula(problem.absolute(), absolute=True)
    assert_within("PEFT's y", y, exact, allowed)
    if base == "nf4":  # the fused layer keeps the update in fp32 as well
        magnitude = problem.formula(problem.absolute(), absolute=True)
        allowed = bound(exact, magnitude, problem.roundings()["y"], torch.float32)
    assert_within("fused y", y_fused, exact, allowed)
    assert explain(fused).rows[0].reason == ""


@pytest.mark.parametrize("shape", [(64,), (1, 64), (0, 64), (2, 3, 64), (2, 2, 3, 64)])
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_any_number_of_leading_dimensions(base: str, shape: tuple[int, ...]) -> None:
    stock, fused = (layer(m) for m in pair(make_mlp(base)))
    replace_layers(fused)
    x = torch.randn(shape)
    assert_close(fused(x), stock(x))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_layouts_of_the_input(base: str) -> None:
    """Transposed and expanded inputs; the dropout mask counts elements in row-major order all the same."""
    model = make_mlp(base, lora_dropout=0.4)
    stock, fused = (layer(m) for m in pair(model))
    philox(stock)
    replace_layers(fused)
    for x in (torch.randn(64, 6).t(), torch.randn(1, 64).expand(6, 64), torch.randn(6, 128)[:, ::2]):
        draw_seed()
        expected = stock(x)
        draw_seed()
        assert_close(fused(x), expected)


@pytest.mark.parametrize("base", BASES)
def test_training_side_by_side(base: str) -> None:
    """Four AdamW steps of a transformers model, dropout included: the losses are the same."""
    stock, fused = pair(make_llama(base, lora_dropout=0.1))
    philox(stock)
    assert len(replace_layers(fused, strict=True)) == (6 if base == "dense" else 14)
    batch = tokens()
    losses: list[list[float]] = []
    for model in (stock, fused):
        torch.manual_seed(7)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(4):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < 0.97 * losses[0][0], "nothing was learnt"
    report = explain(fused)
    assert [row.reason for row in report] == [""] * len(report)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_generate(base: str) -> None:
    """Greedy decoding with a key-value cache: a prompt first, then one token at a time."""
    stock, fused = (model.eval() for model in pair(make_llama(base)))
    for module in stock.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # its bf16 kernel would choose other tokens
    replace_layers(fused, strict=True)
    prompt = tokens(2, 4)
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    expected, got = (
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        for model in (stock, fused)
    )
    assert got.shape[1] > 4
    assert torch.equal(got, expected)
    assert {row.reason for row in explain(fused)} == {""}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("base", ["dense", "nf4_double"])
def test_activation_checkpointing_repeats_the_mask(base: str, use_reentrant: bool) -> None:
    model = make_mlp(base, lora_dropout=0.5)
    replace_layers(model, strict=True)
    x = torch.randn(6, 64, requires_grad=True)
    results = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        y = call(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in (x, *model.parameters()) if p.grad is not None)])
        x.grad = None
        model.zero_grad()
    plain, checkpointed = results
    assert len(plain) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_layouts_of_the_weights() -> None:
    """PEFT ties an adapter to an embedding's by a transposed view."""
    stock, fused = (layer(m) for m in pair(make_mlp()))
    for lora in (stock, fused):
        for linear in (lora.base_layer, lora.lora_A["default"], lora.lora_B["default"]):
            weight = linear.weight.data.t().contiguous().t()
            linear.weight = nn.Parameter(weight, requires_grad=linear is not lora.base_layer)
    replace_layers(fused, strict=True)
    x, grad = torch.randn(24, 64), torch.randn(24, 128)
    assert_agree(problem_of(stock, x, grad), run(stock, x, grad), run(fused, x, grad), torch.float32, 0)
    assert explain(fused).rows[0].reason == ""


def test_a_tensor_for_scaling_is_fused() -> None:
    """As after peft's prepare_model_for_compiled_hotswap."""
    stock, fused = (layer(m) for m in pair(make_mlp()))
    replace_layers(fused)
    expected = stock(x := torch.randn(4, 64))
    fused.scaling["default"] = torch.tensor(fused.scaling["default"])
    assert explain(fused).rows[0].fused
    assert_close(fused(x), expected)


def test_trainable_bias_of_the_base() -> None:
    stock, fused = pair(make_mlp(bias="lora_only"))
    replace_layers(fused, strict=True)
    for model in (stock, fused):
        model(torch.linspace(-1, 1, 192).reshape(3, 64)).square().sum().backward()
    expected, grad = (layer(m).base_layer.bias.grad for m in (stock, fused))
    assert_close(grad, expected)


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_the_result_may_be_changed_in_place(base: str) -> None:
    """As a residual connection or an in-place activation does."""
    lora = layer(make_mlp(base))
    replace_layers(lora)
    y = lora(torch.randn(3, 64, requires_grad=True))
    y += 1
    y.sum().backward()
    assert lora.lora_A["default"].weight.grad is not None
