"""The bottleneck adapter under autograd, torch.compile and autocast, as a torch op; and what it refuses."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
from adapter_problems import NAMES, Problem, make_problem
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.ops.adapter.schema import ACTIVATIONS, BackwardArgs, Operands

FORWARD = torch.ops.peft_kernels.bottleneck_adapter
BACKWARD = torch.ops.peft_kernels.bottleneck_adapter_backward


def operands(problem: Problem) -> Operands:
    t = problem.tensors
    return Operands(
        t["down_weight"], t.get("down_bias"), t["up_weight"], t.get("up_bias"),
        ACTIVATIONS.index(problem.activation), problem.scaling, t.get("scale"),
        t["gate"].flatten() if "gate" in t else None, problem.dropout_p, torch.tensor(problem.seed),
    )  # fmt: skip


def backward_args(problem: Problem, need: bool = True) -> BackwardArgs:
    t = problem.tensors
    grad_down = torch.randn(t["hidden"].shape[0], t["down_weight"].shape[0]).to(t["hidden"].dtype)
    needs = [need and (name in t) for name in NAMES[1:-1]]
    return BackwardArgs(problem.grad, grad_down, t["hidden"], *operands(problem), True, True, *needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["contiguous", "transposed", "stride 0", "no parts", "no tokens"])
@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(dtype: torch.dtype, variant: str, overload: str) -> None:
    forward, backward = getattr(FORWARD, overload), getattr(BACKWARD, overload)
    parts = {"parts": ()} if variant == "no parts" else {"dropout_p": 0.3}
    problem = make_problem(0 if variant == "no tokens" else 4, 20, 3, dtype=dtype, **parts)
    t = problem.tensors
    if variant == "transposed":
        t["hidden"] = t["hidden"].t().contiguous().t()
        problem.grad = problem.grad.t().contiguous().t()
    elif variant == "stride 0":
        t["hidden"] = t["hidden"][:1].expand(4, 20)
        problem.grad = problem.grad[:1, :1].expand(4, 20)
    torch.library.opcheck(forward, (t["hidden"], t.get("residual"), *operands(problem), True, True))
    torch.library.opcheck(forward, (t["hidden"], t.get("residual"), *operands(problem), False, False))
    torch.library.opcheck(backward, tuple(backward_args(problem)))
    torch.library.opcheck(backward, tuple(backward_args(problem, need=False)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_in_float64(activation: str) -> None:
    problem = make_problem(3, 6, 2, dtype=torch.float64, activation=activation, dropout_p=0.3)
    names = list(problem.tensors)

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return problem.run_all(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, [problem.tensors[name].requires_grad_() for name in names])


def test_every_pair_of_gradients(backend: str) -> None:
    """Each gradient is the same whatever else is asked for, and nothing else gets one."""
    problem = make_problem(5, 20, 3, dropout_p=0.3)
    _, expected = problem.run_with_gradients()
    for wanted in (*itertools.combinations(NAMES, 1), *itertools.combinations(NAMES, 2)):
        leaves = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in problem.tensors.items()}
        problem.run(**leaves).backward(problem.grad)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in wanted)
            assert leaf.grad is None or torch.equal(leaf.grad, expected[name]), (name, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_but_the_inputs_is_saved(backend: str, dtype: torch.dtype) -> None:
    problem = make_problem(16, 32, 4, dtype=dtype, parameter_dtype=torch.float32, dropout_p=0.3)
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        problem.run_all(**leaves)
    own = {t.data_ptr() for t in leaves.values()}
    others = [t.nbytes for t in saved if t.data_ptr() not in own]
    wide_gate = [] if dtype == torch.float32 else [16 * 4]
    assert others == [*wide_gate, 8]  # and the seed


def test_nothing_is_recorded_where_nothing_needs_a_gradient(backend: str) -> None:
    problem = make_problem(4, 20, 3)
    assert problem.run().grad_fn is None
    hidden = problem.tensors["hidden"].detach().requires_grad_()
    with torch.inference_mode():
        out = problem.run(hidden=hidden)
    assert out.is_inference()
    assert torch.equal(out, problem.run())


def test_second_derivatives_are_refused(backend: str) -> None:
    problem = make_problem(4, 20, 3)
    hidden = problem.tensors["hidden"].requires_grad_()
    (dh,) = torch.autograd.grad(problem.run(hidden=hidden).square().sum(), hidden, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"^bottleneck_adapter has no second derivative: .* or use "
    ):
        dh.sum().backward()


def test_transforms_are_refused() -> None:
    problem = make_problem(4, 20, 3)
    with pytest.raises(
        NotImplementedError, match=r"^bottleneck_adapter is not available inside a torch\.func"
    ):
        torch.func.grad(lambda h: problem.run(hidden=h).sum())(problem.tensors["hidden"])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_with_dropout(backend: str, use_reentrant: bool) -> None:
    problem = make_problem(5, 20, 3, dropout_p=0.4)
    problem.seed = None  # drawn from the default generator, which checkpoint rewinds
    torch.manual_seed(21)
    _, expected = problem.run_with_gradients()
    leaves = {name: t.detach().clone().requires_grad_() for name, t in problem.tensors.items()}
    torch.manual_seed(21)
    out = checkpoint(
        lambda h: problem.run(**{**leaves, "hidden": h}), leaves["hidden"], use_reentrant=use_reentrant
    )
    out.backward(problem.grad)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, expected[name]), name


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_compile_equals_eager(dynamic: bool, same: bool) -> None:
    parts = ("down_bias", "up_bias", "scale", "gate", *(() if same else ("residual",)))

    def call(problem: Problem, leaves: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return problem.run_all(**leaves)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for m in (4, 7):
        problem = make_problem(m, 20, 3, parts=parts, residual_is_hidden=same)
        results = []
        for function in (call, compiled):
            leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
            outputs = function(problem, leaves)
            loss = sum((output * output).sum() for output in outputs)
            results.append((*outputs, *torch.autograd.grad(loss, list(leaves.values()))))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_hidden_alone(backend: str, dtype: torch.dtype) -> None:
    problem = make_problem(5, 20, 3, parts=("down_bias", "up_bias", "gate"))
    leaves = {name: t.detach().requires_grad_() for name, t in problem.tensors.items()}
    with torch.autocast("cpu", dtype):
        out = problem.run(**leaves)
    assert out.dtype == dtype
    by_hand = problem.run(hidden=problem.tensors["hidden"].to(dtype))
    assert torch.equal(out, by_hand)
    out.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves.values())
    with torch.autocast("cpu", dtype):  # a residual in float32 keeps the result there, as in eager PyTorch
        wide = problem.run(residual=problem.tensors["hidden"])
    assert wide.dtype == torch.float32


def test_export_and_meta() -> None:
    problem = make_problem(5, 20, 3)
    on_meta = {name: t.to("meta").requires_grad_() for name, t in problem.tensors.items()}
    out = problem.run(**on_meta)
    assert (out.shape, out.device.type) == ((5, 20), "meta")
    (dh,) = torch.autograd.grad(out.sum(), on_meta["hidden"])
    assert dh.shape == (5, 20)


def test_outputs_share_no_memory(backend: str) -> None:
    problem = make_problem(5, 20, 3, parts=(), activation="identity")
    problem.scaling = 1.0
    outputs = problem.run_all()
    tensors = [*outputs, *problem.tensors.values()]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": torch.zeros(4, 65)},
            "hidden must be [..., d] and down_weight [r, d], got [4, 65] and [8, 64]",
        ),
        ({"hidden": torch.zeros(())}, "hidden must be [..., d] and down_weight [r, d], got [] and"),
        (
            {"hidden": torch.zeros(4, 64).int()},
            "hidden must be float32 or bfloat16 or float16 or float64, got int32",
        ),
        ({"down_bias": torch.zeros(9)}, "down_bias must be [r] = [8], got [9]"),
        ({"up_weight": torch.zeros(64)}, "up_weight must be [N, r], got [64]"),
        (
            {"up_weight": torch.zeros(64, 9)},
            "up_weight must be [N, r] = [*, 8], got [64, 9]; pass the adapter",
        ),
        ({"up_weight": torch.zeros(0, 8)}, "must have elements, got [8, 64] and [0, 8]"),
        ({"up_bias": torch.zeros(63)}, "up_bias must be [N] = [64], got [63]"),
        ({"down_weight": torch.zeros(8, 64).half()}, "down_weight must be float32, got float16; convert it"),
        (
            {"up_weight": torch.zeros(64, 8, device="meta")},
            "up_weight must be on the device of hidden, cpu, got meta",
        ),
        ({"residual": torch.zeros(4, 63)}, "residual must be [..., N] = [4, 64], got [4, 63]"),
        ({"residual": torch.zeros(4, 64).half()}, "residual must be float32, got float16"),
        ({"gate": torch.zeros(4)}, "gate must be expandable to [..., 1] = [4, 1], got [4]"),
        ({"gate": torch.zeros(3, 1)}, "gate must be expandable to [..., 1] = [4, 1], got [3, 1]"),
        ({"scaling": torch.zeros(3)}, "scaling must be [N] = [64], [1] or 0-dim, got [3]"),
        ({"scaling": math.nan}, "scaling must be finite, got nan"),
        ({"dropout_p": 1.0}, "dropout_p must be in [0, 1), got 1.0"),
        ({"dropout_p": 0.5, "seed": torch.tensor(1).int()}, "seed must be int64, got int32"),
        ({"activation": "swoosh"}, "activation must be one of identity, relu, leaky_relu"),
        ({"ln_after": (torch.zeros(3), None, 1e-5)}, "ln_after weight must be [d] = [64], got [3]"),
    ],
)
def test_public_call_refuses(backend: str, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.randn(4, 64, requires_grad=True),
        "down_weight": torch.randn(8, 64),
        "down_bias": torch.randn(8),
        "up_weight": torch.randn(64, 8),
        "up_bias": None,
        "activation": "relu",
        **change,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        pk.functional.bottleneck_adapter(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": [[1.0]]}, "hidden must be a torch.Tensor, got list"),
        (
            {"down_weight": torch.nn.Linear(64, 8)},
            "down_weight must be a torch.Tensor, got .*Linear; pass its",
        ),
        ({"gate": 0.5}, "gate must be a torch.Tensor, got float"),
        ({"scaling": "1"}, "scaling must be a number, got '1'"),
        ({"activation": 3}, "activation must be a name or a callable, got 3"),
        ({"ln_before": torch.zeros(64)}, "ln_before must be a tuple of weight, bias and eps"),
    ],
)
def test_public_call_refuses_what_is_of_another_type(change: dict[str, Any], message: str) -> None:
    arguments = {
        "hidden": torch.zeros(4, 64),
        "down_weight": torch.zeros(8, 64),
        "up_weight": torch.zeros(64, 8),
    }
    options = {"down_bias": None, "up_bias": None, "activation": "relu"}
    with pytest.raises(TypeError, match=f"^{message}"):
        pk.functional.bottleneck_adapter(**{**arguments, **options, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 2, 20)}, "hidden must be [M, d], got [2, 2, 20]"),
        ({"grad": torch.zeros(4, 21)}, "grad must be [M, N] = [4, 20], got [4, 21]"),
        ({"grad": torch.zeros(4, 20).half()}, "grad must be float32, got float16"),
        ({"grad_down": torch.zeros(4, 4)}, "grad_down must be [M, r] = [4, 3], got [4, 4]"),
        ({"gate": None}, "gate must be given when need_gate is True, got None"),
        ({"scale": torch.zeros(2)}, "scale must be [N] = [20], got [2]"),
        ({"activation": 7}, "activation must be from 0 to 6, got 7"),
        ({"seed": None}, "seed must be given when dropout_p > 0, got None"),
    ],
)
def test_backward_op_refuses(change: dict[str, Any], message: str) -> None:
    arguments = tuple(backward_args(make_problem(4, 20, 3, dropout_p=0.2))._replace(**change))
    with pytest.raises(ValueError, match=re.escape(message)):
        BACKWARD.reference(*arguments)
    with pytest.raises((ValueError, RuntimeError)):
        BACKWARD.default(*arguments)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=re.escape(message)):
        BACKWARD.default(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments])
