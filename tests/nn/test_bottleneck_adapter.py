"""`BottleneckAdapter`: presets, names, initial values and results of `adapters`' modules; what it refuses."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import numerics
import peft_kernels as pk
from peft_kernels.core.library import native_library
from peft_kernels.nn.bottleneck_adapter import BOTTLENECK_PRESETS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import adapters
    from adapters.methods.modeling import Adapter, ParallelAdapter

PRESETS = {
    "houlsby": adapters.DoubleSeqBnConfig,
    "pfeiffer": adapters.SeqBnConfig,
    "parallel": adapters.ParBnConfig,
}


def library_module(config: Any, size: int) -> Any:
    kind = ParallelAdapter if config.is_parallel else Adapter
    return kind("name", size, max(1, int(size // config.reduction_factor)), config)


def copied(module: nn.Module, into: nn.Module) -> Any:
    into.load_state_dict(module.state_dict(), strict=True)
    return into


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_configs_of_adapters(name: str) -> None:
    config = PRESETS[name]()
    for option, value in BOTTLENECK_PRESETS[name].items():
        assert config[option] == value, option
    module = getattr(pk.nn.BottleneckAdapter, name)(64)
    theirs = library_module(config, 64)
    assert {k: v.shape for k, v in module.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    x = torch.randn(3, 64)
    randomised(theirs)
    copied(theirs, module)
    residual = None if config.is_parallel else x
    torch.testing.assert_close(module(x, residual), theirs(x, x)[0])


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter) * 0.3
    return module


@pytest.mark.parametrize("init_weights", ["bert", "mam_adapter", "houlsby"])
def test_initial_values_have_the_library_s_distribution(init_weights: str) -> None:
    config = adapters.SeqBnConfig(reduction_factor=2, init_weights=init_weights, use_gating=True)
    theirs = library_module(config, 400).state_dict()
    ours = pk.nn.BottleneckAdapter.from_config(400, config).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # Of n values the deviation is known to 1 / sqrt(2 n): five of them.
        allowed = 5 * float(tensor.std()) / (2 * tensor.numel()) ** 0.5 if tensor.numel() > 1 else 0.0
        if name.startswith("gate") and init_weights == "houlsby":
            continue  # uniform in both, of another generator state
        if tensor.numel() > 1:
            assert abs(float(ours[name].std() - tensor.std())) <= 2 * allowed, name
            assert float(ours[name].abs().max()) <= 1.5 * float(tensor.abs().max()) + 1e-9, name


CONFIGS = st.fixed_dictionaries(
    {
        "non_linearity": st.sampled_from(
            ["relu", "gelu", "gelu_new", "swish", "silu", "tanh", "leakyrelu", "linear"]
        ),
        "reduction_factor": st.sampled_from([0.5, 2, 3, 16]),
        "scaling": st.sampled_from([1.0, 4.0, -0.5, "learned", "channel"]),
        "is_parallel": st.booleans(),
        "ln_before": st.booleans(),
        "ln_after": st.booleans(),
        "adapter_residual_before_ln": st.booleans(),
        "use_gating": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.0, 0.3]),
        "init_weights": st.sampled_from(["bert", "houlsby"]),
    }
)


@pytest.mark.parametrize("native", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    options=CONFIGS,
    size=st.integers(8, 70),
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
def test_parity_with_adapters(
    native: bool, dtype: torch.dtype, options: dict[str, Any], size: int, batch: int, length: int, seed: int
) -> None:
    """Results and all gradients are as close to the library's module in float64 as it is itself in `dtype`.

    More exactly: the largest relative error is at most four times its own, or what sums of that length and
    one rounding to `dtype` can cause. Masks of dropout are the same by PhiloxDropout and the seed. A layer
    norm behind a common factor takes it out again: gradients of such factors are but rounding, and left out.
    """
    if native and not native_library().loaded:
        pytest.skip("native library not loaded")
    torch.manual_seed(seed)
    config = adapters.BnConfig(mh_adapter=False, output_adapter=True, **options)
    stock = randomised(library_module(config, size)).to(dtype)
    stock.dropout = pk.nn.PhiloxDropout(config.dropout)
    ours = copied(stock, pk.nn.BottleneckAdapter.from_config(size, config, dtype=dtype))
    exact = copy.deepcopy(stock).double()
    x, residual, grad = (torch.randn(batch, length, size).to(dtype) for _ in range(3))
    parallel = config.is_parallel

    def results(module: Any, of: Any, to: torch.dtype) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        leaves = [t.detach().clone().to(to).requires_grad_() for t in (x, residual)]
        out = of(module, *leaves)
        out.backward(grad.to(to))
        grads = {name: p.grad for name, p in module.named_parameters()}
        named = {"out": out.detach(), "hidden": leaves[0].grad, "residual": leaves[1].grad, **grads}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def library(module: Any, h: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return module(h, r)[0]

    def own(module: Any, h: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return module(h, None if parallel else r)

    with pk.use_backend("cpu" if native else "reference"):
        got = results(ours, own, dtype)
    wanted, theirs = results(exact, library, torch.float64), results(stock, library, dtype)
    assert got.keys() == wanted.keys()
    count = 2 * size + stock.down_sample + batch * length + 32
    normed = config.ln_after and (parallel or not config.adapter_residual_before_ln)
    vanishing = ("gate.", *(("scaling",) if config.scaling == "learned" else ())) if normed else ("-",)
    compared = {name: value for name, value in wanted.items() if not name.startswith(vanishing)}

    of_all = float(
        (grad.double() * wanted["out"]).abs().sum()
    )  # by magnitude, what a single factor's gradient sums

    def worst(result: dict[str, torch.Tensor]) -> float:
        """The largest error, relative to the largest element of the tensor that it is in."""
        errors = []
        for name, value in compared.items():
            size = of_all if value.numel() == 1 else float(value.abs().max())
            errors.append(float((result[name].double() - value).abs().max()) / (size + 1e-30))
        return max(errors)

    rounding = numerics.gamma(count, torch.float32) + numerics.unit_roundoff(dtype)
    assert worst(got) <= 4 * worst(theirs) + rounding


def test_callable_activation_and_mixed_dtypes() -> None:
    module = pk.nn.BottleneckAdapter(32, 4, non_linearity=nn.functional.mish)
    assert module(torch.randn(3, 32)).shape == (3, 32)
    module = pk.nn.BottleneckAdapter(32, 4, use_gating=True, scaling="channel")
    assert module(torch.randn(2, 3, 32).bfloat16()).dtype == torch.bfloat16


def test_state_dict_of_every_option_fits_both_ways() -> None:
    config = adapters.SeqBnConfig(ln_before=True, ln_after=True, use_gating=True, scaling="channel")
    theirs = library_module(config, 32)
    ours = pk.nn.BottleneckAdapter.from_config(32, config)
    copied(randomised(theirs), ours)
    copied(ours, theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 0}, "input_size must be positive, got 0"),
        ({"reduction_factor": -1}, "reduction_factor must be positive, got -1"),
        ({"non_linearity": "mish"}, "non_linearity must be a name that bottleneck_adapter knows, got 'mish'"),
        ({"init_weights": "zeros"}, "init_weights must be one of bert, mam_adapter, houlsby, got 'zeros'"),
        ({"scaling": "all"}, "scaling must be a number, 'learned' or 'channel', got 'all'"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
    ],
)
def test_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.nn.BottleneckAdapter(**{"input_size": 8, **arguments})


def test_refuses_configs_and_calls_it_does_not_have() -> None:
    for option, value in (("phm_layer", True), ("stochastic_depth", 0.1)):
        with pytest.raises(ValueError, match=f"config must not have {option}"):
            pk.nn.BottleneckAdapter.from_config(32, adapters.SeqBnConfig(**{option: value}))
    with pytest.raises(ValueError, match="reduction_factor must be a number, got a mapping"):
        pk.nn.BottleneckAdapter.from_config(32, adapters.SeqBnConfig(reduction_factor={"default": 2}))
    with pytest.raises(ValueError, match="residual must be None for a parallel adapter"):
        pk.nn.BottleneckAdapter.parallel(8)(torch.ones(2, 8), torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"hidden must be \[batch, sequence, d\] for gating, got \[2, 8\]"):
        pk.nn.BottleneckAdapter(8, use_gating=True)(torch.ones(2, 8))


def test_dropout_is_for_training() -> None:
    module = pk.nn.BottleneckAdapter(64, 4, dropout=0.5)
    randomised(module)
    x = torch.randn(5, 64)
    assert not torch.equal(module(x), module(x))
    assert torch.equal(module.eval()(x), module(x))
