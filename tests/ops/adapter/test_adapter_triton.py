"""The bottleneck adapter's Triton kernels on emulated GPUs, against float64."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from adapter_problems import Problem, make_problem
from test_adapter_autograd import BACKWARD, FORWARD, backward_args, operands

import gpuless
import peft_kernels as pk
from gpuless.driver import EmulatedGPU
from peft_kernels.core.gpu import GPU
from peft_kernels.ops.adapter import triton as launchers
from peft_kernels.ops.adapter import triton_plan
from peft_kernels.ops.adapter.schema import ACTIVATIONS

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [
    (FLOAT32, FLOAT32),
    (BFLOAT16, BFLOAT16),
    (BFLOAT16, FLOAT32),
    (FLOAT16, FLOAT32),
    (FLOAT16, FLOAT16),
]
PLANS = ["fused", "split", "whole"]


@pytest.fixture
def gpu_80() -> Iterator[EmulatedGPU]:
    with gpuless.device(80) as device, pk.use_backend("triton"):
        yield device


def choose(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have small problems cut up as large ones are."""
    if plan == "fused":
        real = launchers.gpu
        monkeypatch.setattr(launchers, "gpu", lambda: dataclasses.replace(real(), multiprocessors=1))
    elif plan == "split":
        monkeypatch.setattr(triton_plan, "STEPS", 1)


def names(gpu: EmulatedGPU) -> set[str]:
    return {launch.name for launch in gpu.launches}


def check(problem: Problem) -> None:
    problem.check(*problem.run_with_gradients())


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_values(
    gpu: EmulatedGPU, monkeypatch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    plan = PLANS[DTYPES.index(dtypes) % len(PLANS)]
    choose(plan, monkeypatch)
    check(make_problem(33, 136, 7, 36, dtype=dtypes[0], parameter_dtype=dtypes[1], dropout_p=0.3))
    assert ("fused_kernel" in names(gpu)) == (plan == "fused")
    assert ("finish_kernel" in names(gpu)) == (plan == "split")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(gpu_80: EmulatedGPU, activation: str) -> None:
    check(make_problem(9, 20, 5, 18, activation=activation, parts=("down_bias",)))


def test_loops_longer_than_the_pipeline(gpu: EmulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers are used again; without gate and dropout, so that tiles go into products as they are."""
    choose("fused", monkeypatch)
    check(make_problem(270, 272, 16, dtype=BFLOAT16, parts=("up_bias", "scale"), residual_is_hidden=True))


@pytest.mark.gpuless_full
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("r", [48, 160])
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=str)
def test_long_loops(
    gpu: EmulatedGPU,
    monkeypatch: pytest.MonkeyPatch,
    dtypes: tuple[torch.dtype, torch.dtype],
    r: int,
    dropout_p: float,
    gate: bool,
) -> None:
    choose("fused", monkeypatch)
    parts = ("down_bias", "up_bias", "scale", *(["gate"] if gate else []))
    check(
        make_problem(
            280, 200, r, dtype=dtypes[0], parameter_dtype=dtypes[1], parts=parts, dropout_p=dropout_p,
            activation="silu", residual_is_hidden=True,
        )
    )  # fmt: skip


@pytest.mark.gpuless_full
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_activation_and_dtype(
    gpu: EmulatedGPU,
    monkeypatch: pytest.MonkeyPatch,
    dtypes: tuple[torch.dtype, torch.dtype],
    activation: str,
) -> None:
    choose(PLANS[ACTIVATIONS.index(activation) % len(PLANS)], monkeypatch)
    check(
        make_problem(
            37, 136, 18, 70, dtype=dtypes[0], parameter_dtype=dtypes[1], activation=activation, dropout_p=0.1
        )
    )


@pytest.mark.gpuless_full
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1),
        (1, 300, 5, 33),
        (2, 65, 48, 64),
        (17, 17, 300, 64),
        (64, 128, 64, 128),
        (130, 40, 130, 101),
    ],
)
def test_sizes(
    gpu: EmulatedGPU,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, int, int, int],
    plan: str,
    dtype: torch.dtype,
) -> None:
    choose(plan, monkeypatch)
    check(make_problem(*sizes, dtype=dtype, activation="silu", dropout_p=0.5))


@pytest.mark.parametrize("wide", [False, True])
def test_residual_that_is_hidden_itself_or_wider(
    gpu_80: EmulatedGPU, monkeypatch: pytest.MonkeyPatch, wide: bool
) -> None:
    choose("fused", monkeypatch)
    problem = make_problem(
        17, 40, 6, parts=("residual",) if wide else (), dtype=BFLOAT16, residual_is_hidden=not wide
    )
    if wide:
        problem.tensors["residual"], problem.grad = problem.tensors["residual"].float(), problem.grad.float()
    out, grads = problem.run_with_gradients()
    assert out.dtype == (FLOAT32 if wide else BFLOAT16)
    problem.check(out, grads)


@pytest.mark.parametrize("plan", PLANS)
def test_intermediates_and_the_same_bits_again(
    gpu_80: EmulatedGPU, monkeypatch: pytest.MonkeyPatch, plan: str
) -> None:
    """Also where only down, or only up, has a gradient."""
    choose(plan, monkeypatch)
    problem = make_problem(17, 136, 5, parts=("down_bias", "scale", "gate"), scale_size=1, dropout_p=0.2)
    leaves = {name: tensor.requires_grad_() for name, tensor in problem.tensors.items()}

    def run(need: tuple[bool, bool]) -> list[torch.Tensor]:
        results = [result for result in problem.run_all(*need, **leaves) if result is not None]
        loss = sum((result * result).sum() for result in results)
        return [*results, *torch.autograd.grad(loss, list(leaves.values()))]

    first = run((True, True))
    for one, two in zip(first, run((True, True)), strict=True):
        assert torch.equal(one, two)
    with pk.use_backend("reference"):
        expected = run((True, True))
    for one, two in zip(first, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert torch.equal(run((False, False))[0], first[0])


def test_gradients_alone_are_those_of_all(gpu_80: EmulatedGPU) -> None:
    problem = make_problem(5, 20, 3, dropout_p=0.3)
    _, expected = problem.run_with_gradients()
    for name, tensor in problem.tensors.items():
        leaf = tensor.detach().requires_grad_()
        problem.run(**{name: leaf}).backward(problem.grad)
        assert torch.equal(leaf.grad, expected[name]), name


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(
    gpu_80: EmulatedGPU, monkeypatch: pytest.MonkeyPatch, bad: float, plan: str
) -> None:
    choose(plan, monkeypatch)
    problem = make_problem(20, 136, 5, parts=("down_bias",), activation="tanh")
    problem.tensors["down_weight"] = problem.tensors["down_weight"].abs()
    expected, hidden = problem.run(), problem.tensors["hidden"].clone()
    hidden[7, 3] = bad
    out, others = problem.run(hidden=hidden), torch.arange(20) != 7
    assert torch.equal(out[others], expected[others])
    assert out[7].isfinite().all() if bad == math.inf else out[7].isnan().all()


@pytest.mark.parametrize("variant", ["transposed", "stride 0", "no tokens"])
def test_opcheck(gpu_80: EmulatedGPU, variant: str) -> None:
    problem = make_problem(0 if variant == "no tokens" else 4, 20, 3, dtype=BFLOAT16, dropout_p=0.3)
    t = problem.tensors
    if variant == "transposed":
        t["hidden"], t["up_weight"] = t["hidden"].t().contiguous().t(), t["up_weight"].t().contiguous().t()
        problem.grad = problem.grad.t().contiguous().t()
    elif variant == "stride 0":
        t["hidden"] = t["hidden"][:1].expand(4, 20)
        problem.grad = problem.grad[:1, :1].expand(4, 20)
    torch.library.opcheck(FORWARD.triton, (t["hidden"], t["residual"], *operands(problem), True, True))
    torch.library.opcheck(BACKWARD.triton, tuple(backward_args(problem)))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile(gpu_80: EmulatedGPU) -> None:
    problem = make_problem(4, 20, 3, dropout_p=0.3)
    t = problem.tensors
    arguments = (t["hidden"], t["residual"], *operands(problem), True, True)
    expected = FORWARD.triton(*arguments)
    pk.core.backend._forced_backend.set(
        None
    )  # use_backend has functions compiled by torch.compile run eagerly
    compiled = torch.compile(FORWARD.triton, fullgraph=True, backend="aot_eager")
    for one, two in zip(compiled(*arguments), expected, strict=True):
        assert torch.equal(one, two)


def test_float64_is_refused(gpu_80: EmulatedGPU) -> None:
    problem = make_problem(4, 20, 3, dtype=torch.float64)
    t = problem.tensors
    with pytest.raises(
        ValueError, match="hidden must be float32 or bfloat16 or float16, got float64; or leave"
    ):
        FORWARD.triton(t["hidden"], t["residual"], *operands(problem), False, False)


def test_plan() -> None:
    """Few tokens: sums are split until CTAs fill the GPU. Many: one kernel, while r fits in registers."""
    h100 = GPU("cuda", 90, 132, 232448)

    def plan(m: int, r: int = 64, dtype: torch.dtype = BFLOAT16) -> triton_plan.Plan:
        return triton_plan.make_plan(m, 4096, r, 4096, dtype, dtype.itemsize, h100)

    assert [plan(m).fused for m in (1, 8384, 8385, 2**20)] == [False, False, True, True]
    assert not plan(2**20, 256).fused
    assert not plan(2**20, 128, FLOAT32).fused
    assert [plan(m, dtype=FLOAT32).fused for m in (4192, 4193)] == [False, True]
    assert plan(1).splits == 16
    assert plan(2**20).splits == 1
    assert plan(1).token_splits == (1, 1)
    assert plan(2**20).precision == "ieee"
    assert plan(1, dtype=FLOAT32).precision == "tf32x3"
    for m in (1, 100, 10000):
        for r in (1, 64, 2048):
            assert all(4 * splits * 4096 * r <= 2**25 for splits in plan(m, r).token_splits)
            assert plan(m, r).splits * math.ceil(m / 64) * math.ceil(r / 64) <= max(
                264, math.ceil(m / 64) * 32
            )
