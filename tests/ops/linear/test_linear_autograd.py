"""The adapted linear under autograd: gradcheck, what is saved, which gradients are made, checkpointing."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from factories import WEIGHTS, make_problem

EACH_WEIGHT = pytest.mark.parametrize("weight", WEIGHTS)


@EACH_WEIGHT
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_in_float64(weight: str, dropout_p: float) -> None:
    problem = make_problem(
        3, 5, 33, r=2, weight=weight, blocksize=32, dtype=torch.float64, dropout_p=dropout_p
    )
    names = list(problem.tensors)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return problem.run(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, [problem.tensors[name].requires_grad_() for name in names])


@pytest.mark.parametrize("weight", ["dense", "nf4_double"])
@pytest.mark.parametrize("with_dropout", [False, True])
def test_every_subset_of_gradients(backend: str, weight: str, with_dropout: bool) -> None:
    """Each gradient is the same whatever else is asked for, and nothing else gets one."""
    problem = make_problem(4, 9, 48, weight=weight, dropout_p=0.3 if with_dropout else 0.0)
    _, all_grads = problem.run_with_gradients()
    names = list(problem.tensors)
    for subset in itertools.chain.from_iterable(itertools.combinations(names, size) for size in range(1, 7)):
        leaves = {
            name: t.detach().clone().requires_grad_(name in subset) for name, t in problem.tensors.items()
        }
        problem.run(**leaves).backward(problem.grad)
        for name, leaf in leaves.items():
            if name in subset:
                assert torch.equal(leaf.grad, all_grads[name]), (name, subset)
            else:
                assert leaf.grad is None


def saved_by(problem: object, wrt: list[str]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """The leaves, and every tensor autograd saved that is none of the inputs' own memory, weight included."""
    tensors = problem.tensors
    leaves = {name: t.detach().requires_grad_(name in wrt) for name, t in tensors.items()}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = problem.run(**leaves)
    weight = problem.weight
    base = weight.base_weight()[:5] if isinstance(weight, pk.NF4Weight) else (weight,)
    frozen = {t.data_ptr() for t in (*base, *leaves.values()) if t is not None} - {leaves["x"].data_ptr()}
    assert y.grad_fn is not None
    return leaves, [t for t in saved if t.data_ptr() not in frozen]


@EACH_WEIGHT
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_saved_for_backward_is_x_and_u(
    backend: str, weight: str, dropout_p: float, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    m, r = 32, 4
    dtype, adapter_dtype = dtypes
    problem = make_problem(
        m, 96, 128, r=r, weight=weight, dtype=dtype, adapter_dtype=adapter_dtype,
        parts=["lora", "bias"], dropout_p=dropout_p,
    )  # fmt: skip
    leaves, saved = saved_by(problem, ["x", "lora_a", "lora_b"])
    x, others = saved[0], saved[1:]
    assert x.data_ptr() == leaves["x"].data_ptr()  # the caller's own, not a copy, not cast up
    assert sorted(t.nbytes for t in others) == ([8] if dropout_p else []) + [m * r * 4]


def test_x_is_saved_as_it_is_even_where_flattening_copies(backend: str) -> None:
    problem = make_problem(6, 8, 64, parts=["lora"])
    problem.tensors["x"] = torch.randn(3, 2, 64).transpose(0, 1)
    leaves, saved = saved_by(problem, ["x", "lora_a", "lora_b"])
    assert [t.data_ptr() for t in saved if t.shape[-1] == 64] == [leaves["x"].data_ptr()]


@EACH_WEIGHT
@pytest.mark.parametrize(
    ("wrt", "expected"),
    [
        (["x"], []),  # a frozen layer in the middle keeps no activation at all
        (["lora_a"], ["x"]),
        (["lora_b"], ["u"]),
        (["x", "lora_b"], ["u"]),
        (["bias"], []),
        (["input_scale"], ["x"]),
        (["column_scale"], ["z"]),
        (["x", "lora_a", "lora_b", "column_scale", "input_scale", "bias"], ["x", "u", "z"]),
    ],
    ids=lambda value: "+".join(value) or "nothing",
)
def test_only_what_a_gradient_needs_is_saved(
    backend: str, weight: str, wrt: list[str], expected: list[str]
) -> None:
    m, n, k, r = 8, 24, 64, 4
    sizes = {"x": m * k * 2, "u": m * r * 4, "z": m * n * 2}
    _, saved = saved_by(make_problem(m, n, k, r=r, weight=weight, dtype=torch.bfloat16), wrt)
    assert [t.nbytes for t in saved] == [sizes[name] for name in expected]


@EACH_WEIGHT
def test_nothing_is_recorded_where_nothing_needs_a_gradient(backend: str, weight: str) -> None:
    problem = make_problem(4, 8, 64, weight=weight)
    assert problem.run().grad_fn is None
    x = problem.tensors["x"].detach().requires_grad_()
    with torch.no_grad():
        assert problem.run(x=x).grad_fn is None
    with torch.inference_mode():
        y = problem.run(x=x)
    assert y.is_inference()
    assert torch.equal(y, problem.run())


def test_second_derivatives_are_refused(backend: str) -> None:
    problem = make_problem(4, 8, 64)
    x = problem.tensors["x"].detach().requires_grad_()
    (dx,) = torch.autograd.grad(problem.run(x=x).square().sum(), x, create_graph=True)
    assert torch.equal(dx, torch.autograd.grad(problem.run(x=x).square().sum(), x)[0])
    with pytest.raises(
        NotImplementedError, match=r"^adapted_linear has no second derivative: .*; .* or use "
    ):
        dx.sum().backward()


def test_second_derivatives_by_way_of_the_adapter_are_refused(backend: str) -> None:
    """The upstream gradient is a constant here, but dx depends on A."""
    problem = make_problem(4, 8, 64)
    x, a = (problem.tensors[name].detach().requires_grad_() for name in ("x", "lora_a"))
    (dx,) = torch.autograd.grad(problem.run(x=x, lora_a=a), x, problem.grad, create_graph=True)
    with pytest.raises(NotImplementedError, match="adapted_linear has no second derivative"):
        torch.autograd.grad(dx.sum(), a)


def test_create_graph_is_allowed_where_the_second_derivative_goes_elsewhere(backend: str) -> None:
    problem = make_problem(4, 8, 64)
    x = problem.tensors["x"].detach().requires_grad_()
    v = torch.randn(4, 8, requires_grad=True)
    dx, dv = torch.autograd.grad(problem.run(x=x).sum() + (v**3).sum(), [x, v], create_graph=True)
    assert dx.isfinite().all()
    assert torch.equal(torch.autograd.grad(dv.sum(), v)[0], 6 * v)


def test_a_changed_saved_tensor_is_noticed(backend: str) -> None:
    problem = make_problem(4, 8, 64)
    x = problem.tensors["x"].clone()
    y = problem.run(x=x, lora_a=problem.tensors["lora_a"].requires_grad_())
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@EACH_WEIGHT
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_with_dropout(backend: str, weight: str, use_reentrant: bool) -> None:
    problem = make_problem(5, 12, 64, weight=weight, dropout_p=0.4)
    problem.seed = None  # drawn from the default generator, which checkpoint rewinds
    names = ["x", "lora_a", "lora_b"]
    torch.manual_seed(21)
    _, expected = problem.run_with_gradients(names)
    leaves = {name: problem.tensors[name].detach().clone().requires_grad_() for name in names}

    def call(x: torch.Tensor) -> torch.Tensor:
        return problem.run(**{**leaves, "x": x})

    torch.manual_seed(21)
    checkpoint(call, leaves["x"], use_reentrant=use_reentrant).backward(problem.grad)
    for name in names:
        assert torch.equal(leaves[name].grad, expected[name]), name


def test_gradients_accumulate_over_shared_adapters(backend: str) -> None:
    """One adapter in two layers: autograd adds the two gradients and neither is written into an input."""
    problem = make_problem(5, 64, 64, parts=["lora"])
    a, b = (problem.tensors[name].clone().requires_grad_() for name in ("lora_a", "lora_b"))
    hidden = problem.run(lora_a=a, lora_b=b)
    problem.run(x=hidden, lora_a=a, lora_b=b).backward(problem.grad)
    total = [a.grad.clone(), b.grad.clone()]
    first = torch.autograd.grad(
        problem.run(x=hidden.detach().requires_grad_(), lora_a=a, lora_b=b), [a, b], problem.grad
    )
    x = hidden.detach().requires_grad_()
    (upstream,) = torch.autograd.grad(problem.run(x=x, lora_a=a, lora_b=b), x, problem.grad)
    second = torch.autograd.grad(problem.run(lora_a=a, lora_b=b), [a, b], upstream)
    for got, one, two in zip(total, first, second, strict=True):
        assert torch.equal(got, one + two)
