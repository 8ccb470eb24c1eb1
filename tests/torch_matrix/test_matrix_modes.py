"""Autocast, activation checkpointing, inference mode, torch.func, meta tensors, casts, accumulation."""

from typing import Any

import pytest
import torch
from subjects import EACH_SUBJECT, SUBJECTS, inputs, make, models, outcome, results, run, stock_and_fused
from torch.utils.checkpoint import checkpoint

import numerics
import peft_kernels as pk
from surgery.peft_models import philox

MODULES_AND_MODELS = [(level, name) for level, name in SUBJECTS if level != "functions"]
WITH_DROPOUT = {"lora_linear", "nf4_lora_linear", "bottleneck_adapter", "philox_dropout", "LoRALinear"}
WITH_DROPOUT |= {"BottleneckAdapter", "PhiloxDropout", "LoRA", "LoRA over NF4", "bottleneck adapter"}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """By norm."""
    difference = actual.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm())


def allowed(dtype: torch.dtype) -> float:
    """`relative_error` that rounding to `dtype` may cause in two layers, forward and backward.

    Rounded are x, the weight, the adapter's two factors and the result, of each layer and each direction: 20
    roundings of random sign and at most lambda = 5 times their root mean square (see `assert_close`).
    """
    return 5 * 20**0.5 * numerics.unit_roundoff(dtype)


def test_masks_are_tried() -> None:
    """The subjects that drop something, of which the tests below say that a mask is the same."""
    for level, name in SUBJECTS:
        module = make(level, name)
        assert torch.equal(module(inputs()), module(inputs())) == (name not in WITH_DROPOUT), name


@EACH_SUBJECT
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_activation_checkpointing(level: str, name: str, use_reentrant: bool) -> None:
    """The forward pass runs again in backward, with the mask it had: the same bits."""
    module = make(level, name)

    def checkpointed(x: torch.Tensor) -> Any:
        return checkpoint(module, x, use_reentrant=use_reentrant)

    expected, got = (results(call, module, inputs()) for call in (module, checkpointed))
    assert list(expected) == list(got)
    for key in expected:
        assert torch.equal(got[key], expected[key]), key


@EACH_SUBJECT
def test_autocast_in_bf16(level: str, name: str) -> None:
    """bf16 out of fp32 layers, at most a few bf16 roundings from fp32, and fp32 gradients of fp32 parameters.

    A 4-bit layer of bitsandbytes has a compute_dtype of its own, here fp32, and keeps the dtype of its input.
    """
    module = make(level, name)

    def autocast(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: torch.Tensor = module(x)
        return y

    exact, got = (results(call, module, inputs()) for call in (module, autocast))
    assert list(exact) == list(got)
    of_bitsandbytes = level == "models" and ("NF4" in name or name == "Linear4bit")
    # No product, as torch's dropout; a residual of fp32, which makes the sum wider.
    wide = name in ("philox_dropout", "PhiloxDropout", "bottleneck_adapter")
    assert got["y"].dtype == (torch.float32 if of_bitsandbytes or wide else torch.bfloat16)
    for key in exact:
        if key != "y":
            assert got[key].dtype == torch.float32
        assert relative_error(got[key], exact[key]) <= allowed(torch.bfloat16), key


@EACH_SUBJECT
def test_inference_mode(level: str, name: str) -> None:
    """Results are inference tensors, as all are there; afterwards the module trains as it did before."""
    module = make(level, name)
    expected = results(module, module, inputs())
    with torch.inference_mode():
        y = run(module, inputs())
        x = inputs()
        assert y.is_inference()
        assert x.is_inference()
    assert torch.equal(y, expected["y"])
    with torch.no_grad():
        assert torch.equal(run(module, x), y)  # an inference tensor outside of inference mode
    again = results(module, module, x.clone())  # and a normal tensor made of one
    for key in expected:
        assert torch.equal(again[key], expected[key]), key


@EACH_SUBJECT
def test_inference_tensors_in_training(level: str, name: str) -> None:
    """Torch refuses to save one for backward; where the backward pass needs none of x, it is welcome."""
    module = make(level, name)
    with torch.inference_mode():
        x = inputs()
    expected = results(module, module, inputs())
    module.zero_grad()
    y = outcome(module, x)
    keeps_x = any(part in name.lower() for part in ("lora", "dora", "bottleneck", "philox_"))
    assert isinstance(y, str) == keeps_x
    if isinstance(y, str):
        assert y.startswith("Inference tensors cannot be saved for backward")
        return
    assert torch.equal(y, expected["y"])
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)))
    for key, parameter in module.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, expected[key]), key


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")  # bitsandbytes' ops
@EACH_SUBJECT
def test_vmap(level: str, name: str) -> None:
    """Functions and modules refuse by name; a replaced layer runs its stock forward and says so."""
    x = inputs()[:, None]
    if level != "models":
        refusal = r"is not available inside a torch.func transform: .*, or use"
        with pytest.raises(NotImplementedError, match=refusal):
            torch.func.vmap(make(level, name))(x)
        return
    stock, fused = (model.eval() for model in stock_and_fused(name))
    expected, got = (outcome(torch.func.vmap(model), x) for model in (stock, fused))
    assert type(expected) is type(got)
    assert expected == got if isinstance(expected, str) else torch.equal(expected, got)
    assert pk.explain(fused).rows[0].reason.endswith("inside a torch.func transform")


@pytest.mark.parametrize(("level", "name"), MODULES_AND_MODELS)
def test_meta_device(level: str, name: str) -> None:
    """Shapes and dtypes without values. (Of functions: tests/ops/*/test_*_op.py.)"""
    module = make(level, name)
    y = module(inputs())
    if any(type(parameter).__name__ == "Params4bit" for parameter in module.parameters()):
        stock, _ = stock_and_fused(name)
        for model in (stock, module):
            with pytest.raises(
                RuntimeError, match="Creating a Parameter from an instance of type Params4bit"
            ):
                model.to("meta")  # torch's refusal, of the stock model too
        return
    on_meta = module.to("meta")(inputs().to("meta"))
    assert (on_meta.shape, on_meta.dtype, on_meta.device.type) == (y.shape, y.dtype, "meta")


@pytest.mark.parametrize("name", [name for level, name in SUBJECTS if level == "modules"])
def test_default_device(name: str) -> None:
    """Made without memory under torch.set_default_device("meta"), materialised by a state_dict."""
    source = make("modules", name)
    torch.set_default_device("meta")
    try:
        module = make("modules", name)
    finally:
        torch.set_default_device(None)
    assert {p.device.type for p in module.parameters()} <= {"meta"}
    module.load_state_dict(source.state_dict(), assign=True)
    expected, got = (results(m, m, inputs()) for m in (source, module))
    for key in expected:
        assert torch.equal(got[key], expected[key]), key


@EACH_SUBJECT
def test_gradient_accumulation(level: str, name: str) -> None:
    """Two backward passes add up; the sum of gradients is rounded once more."""
    module = make(level, name)
    single = [results(module, module, inputs(seed=seed)) for seed in (1, 2)]
    module.zero_grad()
    for seed in (1, 2):
        y = run(module, inputs(seed=seed).requires_grad_())
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)))
    for key, parameter in module.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, single[0][key] + single[1][key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for level, name in SUBJECTS if level == "modules"])
def test_modules_that_are_cast(name: str, dtype: torch.dtype) -> None:
    """As close to fp32 as the dtype allows; a 4-bit weight stays the weight that it is."""
    module = make("modules", name)
    exact = run(module, inputs())
    y = run(module.to(dtype), inputs().to(dtype))
    assert y.dtype == dtype
    assert relative_error(y, exact) <= allowed(max(dtype, torch.float32, key=numerics.unit_roundoff))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", models())
def test_models_that_are_cast(name: str, dtype: torch.dtype) -> None:
    """The stock model's result or error; what the kernels cannot take any more runs stock, with a reason."""
    stock, fused = stock_and_fused(name)
    philox(fused)  # the mask is the same where it runs stock
    before = run(fused, inputs())
    expected, got = (outcome(model.to(dtype), inputs().to(dtype)) for model in (stock, fused))
    rows = pk.explain(fused).rows
    if isinstance(expected, str):
        assert got == expected
        return
    assert got.dtype == expected.dtype
    assert relative_error(got, expected) <= allowed(max(dtype, torch.float32, key=numerics.unit_roundoff))
    # Over 4 bits compute_dtype stays fp32, and an adapter of another dtype is PEFT's business.
    own = "the adapter is" in rows[0].reason
    assert own == ("over NF4" in name)
    assert own or all(row.fused and not row.reason for row in rows)
    again = run(fused.to(torch.float32), inputs())
    assert relative_error(again, before) <= allowed(max(dtype, torch.float32, key=numerics.unit_roundoff))
    assert all(row.fused and not row.reason for row in pk.explain(fused))
