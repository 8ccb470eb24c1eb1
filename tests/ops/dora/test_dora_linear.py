"""`dora_linear` against float64, under autograd, autocast, checkpointing and torch.compile; and bad input."""

import itertools
import re
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from dora_problem import make_dora
from factories import WEIGHTS

EACH_WEIGHT = pytest.mark.parametrize("weight", WEIGHTS)
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),  # PEFT's default over a 16-bit base
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


@EACH_WEIGHT
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "r"), [(1, 5, 64, 3), (7, 33, 96, 4), (40, 20, 130, 16)])
def test_against_float64(
    backend: str, weight: str, dropout_p: float, dtypes: tuple[torch.dtype, torch.dtype],
    m: int, n: int, k: int, r: int,
) -> None:  # fmt: skip
    dtype, adapter_dtype = dtypes
    dora = make_dora(
        m, n, k, r=r, weight=weight, dtype=dtype, adapter_dtype=adapter_dtype, dropout_p=dropout_p
    )
    dora.check(*dora.run_with_gradients())


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_gradcheck_in_float64(weight: str, dropout_p: float) -> None:
    """The norm is a constant: gradcheck gets it from outside."""
    dora = make_dora(3, 5, 33, r=2, weight=weight, blocksize=32, dtype=torch.float64, dropout_p=dropout_p)
    names, norm = list(dora.tensors), dora.norm

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return dora.run(**dict(zip(names, tensors, strict=True)), norm=norm)

    assert torch.autograd.gradcheck(call, [dora.tensors[name].requires_grad_() for name in names])


def test_no_tokens(backend: str) -> None:
    dora = make_dora(0, 9, 64, dropout_p=0.3)
    y, grads = dora.run_with_gradients()
    assert y.shape == (0, 9)
    assert not grads["magnitude"].any()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_subset_of_gradients(backend: str, dropout_p: float) -> None:
    dora = make_dora(4, 9, 48, weight="nf4_double", dropout_p=dropout_p)
    _, all_grads = dora.run_with_gradients()
    for subset in itertools.chain.from_iterable(
        itertools.combinations(dora.tensors, size) for size in (1, 2, 4)
    ):
        leaves = {name: t.detach().clone().requires_grad_(name in subset) for name, t in dora.tensors.items()}
        dora.run(**leaves).backward(dora.problem.grad)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in subset)
            if name in subset:
                assert torch.equal(leaf.grad, all_grads[name]), (name, subset)


@EACH_WEIGHT
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_saved_for_backward(backend: str, weight: str, dropout_p: float) -> None:
    """x (or D(x)), u [M, r], one z [M, N]; beside these only vectors and the seed."""
    m, n, k, r = 32, 96, 128, 4
    dora = make_dora(m, n, k, r=r, weight=weight, dropout_p=dropout_p)
    leaves = {name: t.detach().requires_grad_() for name, t in dora.tensors.items()}
    saved: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
    ):
        dora.run(**leaves)
    w = dora.problem.weight
    parts = (w,) if isinstance(w, torch.Tensor) else w.base_weight()[:5]
    for given in (*parts, *(leaf for name, leaf in leaves.items() if name != "x")):
        saved.pop(given.data_ptr() if given is not None else 0, None)
    vectors = 2 * n * 4 + (8 if dropout_p else 0)
    assert sum(saved.values()) <= m * (k + r + n) * 4 + vectors
    assert max(saved.values()) <= m * k * 4


def test_a_zero_row_gives_the_bias_and_finite_gradients(backend: str) -> None:
    dora = make_dora(6, 9, 64, weight="dense")
    dora.problem.weight[4] = 0.0
    dora.tensors["lora_b"][4] = 0.0
    for magnitude in (0.0, 1.0):
        dora.magnitude[4] = magnitude
        y, grads = dora.run_with_gradients()
        assert torch.equal(y[:, 4], dora.tensors["bias"][4].expand(6))
        assert all(grad.isfinite().all() for grad in grads.values())
        assert grads["magnitude"][4] == 0


def test_starts_as_the_base_layer(backend: str) -> None:
    """B = 0 and magnitude = norm: g is exactly one."""
    dora = make_dora(6, 9, 64, weight="nf4")
    b = torch.zeros_like(dora.tensors["lora_b"])
    norm = pk.functional.dora_norm(dora.problem.weight, dora.tensors["lora_a"], b, 1.0)
    y = dora.run(lora_b=b, magnitude=norm)
    t = dora.tensors
    assert torch.equal(y, pk.functional.nf4_linear(t["x"], dora.problem.weight, t["bias"]))


def test_given_norm_is_used(backend: str) -> None:
    dora = make_dora(6, 9, 64)
    t, p = dora.tensors, dora.problem
    norm = pk.functional.dora_norm(p.weight, t["lora_a"], t["lora_b"], p.scaling)
    assert torch.equal(dora.run(norm=norm), dora.run())
    assert torch.equal(
        dora.run(norm=2 * norm, magnitude=2 * t["magnitude"]), dora.run()
    )  # powers of two round nothing
    assert not torch.equal(dora.run(norm=2 * norm), dora.run())


def test_scaling_as_a_trained_tensor(backend: str) -> None:
    dora = make_dora(6, 9, 64, weight="dense")
    scaling = torch.tensor(dora.problem.scaling, requires_grad=True)
    y = dora.run(scaling=scaling)
    torch.testing.assert_close(y, dora.run(), rtol=1e-5, atol=1e-5)
    y.backward(dora.problem.grad)
    t = {name: tensor.double() for name, tensor in dora.tensors.items()}
    low = (t["x"] @ t["lora_a"].t()) @ t["lora_b"].t() * (t["magnitude"] / dora.norm)
    exact = (low * dora.problem.grad.double()).sum()
    torch.testing.assert_close(scaling.grad.double(), exact, rtol=1e-4, atol=0)


@EACH_WEIGHT
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compile_equals_eager(weight: str, dropout_p: float, fresh_compiler: None) -> None:
    dora = make_dora(6, 12, 64, weight=weight, dropout_p=dropout_p)
    dora.problem.scaling = -2.0  # torch.compile multiplies it into lora_b: a power of two brings no rounding
    expected, grads = dora.run_with_gradients()
    leaves = {name: t.detach().requires_grad_() for name, t in dora.tensors.items()}
    compiled = torch.compile(pk.functional.dora_linear, fullgraph=True, backend="aot_eager")
    options = {"scaling": -2.0, "dropout_p": dropout_p, "seed": torch.tensor(dora.problem.seed)}
    y = compiled(weight=dora.problem.weight, **options, **leaves)
    assert torch.equal(y, expected)
    y.backward(dora.problem.grad)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, grads[name]), name


def test_autocast(backend: str) -> None:
    dora = make_dora(6, 12, 64, weight="dense")
    with torch.autocast("cpu", torch.bfloat16):
        y = dora.run()
    assert y.dtype == torch.bfloat16
    t, w = dora.tensors, dora.problem.weight
    norm = pk.functional.dora_norm(w, t["lora_a"], t["lora_b"], dora.problem.scaling)  # of W as it is
    cast = {"x": t["x"].bfloat16(), "weight": w.bfloat16(), "norm": norm}
    assert torch.equal(y, dora.run(**cast))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_with_a_16_bit_adapter(backend: str, weight_dtype: torch.dtype) -> None:
    dora = make_dora(6, 12, 64, weight="dense")
    narrow = {name: tensor.bfloat16() for name, tensor in dora.tensors.items() if name != "x"}
    with torch.autocast("cpu", torch.bfloat16):
        y = dora.run(**narrow, weight=dora.problem.weight.to(weight_dtype))
    torch.testing.assert_close(y.float(), dora.run(), rtol=0.05, atol=0.15)  # each a sum of 64 terms of 2^-8


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(backend: str, use_reentrant: bool) -> None:
    dora = make_dora(6, 12, 64, dropout_p=0.3)
    dora.problem.seed = None  # drawn anew, and the same one in the recomputation
    results = []
    for wrap in (False, True):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in dora.tensors.items()}
        torch.manual_seed(3)

        def call(x: torch.Tensor, leaves: Any = leaves) -> torch.Tensor:
            return dora.run(**{**leaves, "x": x})

        y = checkpoint(call, leaves["x"], use_reentrant=use_reentrant) if wrap else call(leaves["x"])
        y.backward(dora.problem.grad)
        results.append((y, *(leaf.grad for leaf in leaves.values())))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_inference_mode_and_leading_dimensions(backend: str) -> None:
    dora = make_dora(6, 12, 64)
    with torch.inference_mode():
        y = dora.run(x=dora.tensors["x"].reshape(2, 3, 64))
    assert torch.equal(y.reshape(6, 12), dora.run())


def test_inputs_are_not_changed(backend: str) -> None:
    dora = make_dora(6, 12, 64, weight="dense", dropout_p=0.3)
    before = {name: tensor.clone() for name, tensor in dora.tensors.items()}
    weight = dora.problem.weight.clone()
    dora.run_with_gradients()
    assert torch.equal(dora.problem.weight, weight)
    assert all(torch.equal(dora.tensors[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_same_bits_for_any_number_of_threads(dropout_p: float) -> None:
    dora = make_dora(40, 150, 192, weight="nf4_double", dropout_p=dropout_p)
    expected, expected_grads = dora.run_with_gradients()
    for threads in (2, 7, 3):
        torch.set_num_threads(threads)
        y, grads = dora.run_with_gradients()
        assert torch.equal(y, expected)
        assert all(torch.equal(grads[name], grad) for name, grad in expected_grads.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"magnitude": torch.ones(11)}, "magnitude must be [N] = [12], got [11]"),
        ({"magnitude": torch.ones(12, 1)}, "magnitude must be [N] = [12], got [12, 1]"),
        ({"magnitude": torch.ones(12).double()}, "magnitude must be float32, got float64; convert it"),
        ({"magnitude": torch.ones(12, device="meta")}, "magnitude must be on the device of x, cpu, got meta"),
        ({"norm": torch.ones(13)}, "norm must be [N] = [12], got [13]"),
        ({"norm": torch.ones(12).half()}, "norm must be float32, got float16; convert it"),
        ({"x": torch.zeros(4, 65)}, "x must be [..., K] = [..., 64], got [4, 65]"),
        ({"lora_a": torch.zeros(3, 63)}, "lora_a must be [r, K] = [*, 64], got [3, 63]"),
        ({"bias": torch.zeros(3)}, "bias must be [N] = [12], got [3]"),
        ({"dropout_p": 1.0}, "p must be in [0, 1), got 1.0"),
        (
            {"weight": torch.zeros(12, 64, requires_grad=True)},
            "weight must be frozen, got requires_grad=True",
        ),
    ],
)
def test_public_call_refuses(backend: str, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.randn(4, 64), "weight": torch.randn(12, 64), "lora_a": torch.randn(3, 64),
        "lora_b": torch.randn(12, 3), "magnitude": torch.ones(12), "scaling": 2.0, **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.functional.dora_linear(**arguments)


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "magnitude", "bias", "norm"])
def test_public_call_refuses_what_is_no_tensor(name: str) -> None:
    shapes = {"x": (4, 64), "weight": (12, 64), "lora_a": (3, 64), "lora_b": (12, 3), "magnitude": (12,)}
    arguments = {key: torch.zeros(shape) for key, shape in shapes.items()}
    with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got list; "):
        pk.functional.dora_linear(**{**arguments, name: [1.0]}, scaling=1.0)
