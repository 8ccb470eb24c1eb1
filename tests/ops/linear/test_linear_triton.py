"""The adapted linear's Triton kernels, as compiled, on emulated GPUs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_linear_op import BACKWARD, FORWARD, backward_args, forward_args

import gpuless
import peft_kernels as pk
from factories import PARTS, WEIGHTS, make_problem
from peft_kernels.core import plan
from peft_kernels.core.gpu import GPU
from peft_kernels.ops.linear import regimes, triton_plan
from peft_kernels.ops.linear.triton_plan import Plan, Product, Tile, backward_plan, forward_plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
A100, H100 = GPU("cuda", 80, 108, 166912), GPU("cuda", 90, 132, 232448)
full = pytest.mark.gpuless_full


def check(*shape: int, **options: Any) -> None:
    problem = make_problem(*shape, **options)
    y, grads = problem.run_with_gradients()
    problem.check(y)
    problem.check_gradients(grads)


@pytest.mark.parametrize(
    ("m", "n", "k", "weight", "dtype", "dropout_p"),
    [
        (1, 70, 192, "nf4", torch.bfloat16, 0.0),
        (2, 33, 128, "nf4_double", torch.float32, 0.3),
        (17, 65, 256, "nf4_double", torch.bfloat16, 0.3),
        (130, 70, 128, "nf4", torch.bfloat16, 0.0),
        (20, 34, 128, "nf4", torch.float16, 0.3),
        (5, 33, 100, "nf4", torch.bfloat16, 0.3),  # K of partial blocks
        (3, 9, 35, "nf4_double", torch.float32, 0.3),  # odd K: a row begins inside a byte
        (33, 34, 70, "dense", torch.bfloat16, 0.3),
        (7, 19, 33, "dense", torch.float32, 0.0),
    ],
)
def test_results_and_gradients(
    gpu: Any, m: int, n: int, k: int, weight: str, dtype: torch.dtype, dropout_p: float
) -> None:
    check(m, n, k, weight=weight, dtype=dtype, dropout_p=dropout_p)


@full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 3, 64), (2, 130, 64), (4, 65, 320), (16, 64, 128), (31, 97, 192), (64, 33, 256), (130, 129, 64)],
)
def test_every_dtype_and_weight(
    gpu: Any, m: int, n: int, k: int, weight: str, dtype: torch.dtype, dropout_p: float
) -> None:
    check(m, n, k, weight=weight, dtype=dtype, dropout_p=dropout_p)


@full
@pytest.mark.parametrize("parts", [(), *((part,) for part in PARTS), ("lora", "bias")], ids=" ".join)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("m", [1, 20, 130])
def test_every_part_alone(gpu: Any, m: int, weight: str, parts: tuple[str, ...]) -> None:
    check(m, 34, 128, weight=weight, dtype=torch.bfloat16, parts=parts)


@full
@pytest.mark.parametrize("blocksize", [32, 128, 256])
@pytest.mark.parametrize("k", [256, 96])
@pytest.mark.parametrize("m", [1, 20, 70])
def test_every_blocksize(gpu: Any, m: int, k: int, blocksize: int) -> None:
    check(m, 34, k, blocksize=blocksize, dtype=torch.bfloat16)


@pytest.mark.parametrize("r", [1, pytest.param(20, marks=full), pytest.param(64, marks=full), 72])
def test_every_rank(gpu: Any, r: int) -> None:
    for m in (1, 20):
        check(m, 34, 128, r=r, dtype=torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.3)


SPLIT = Plan("matmul", Tile(16, 64, 64, stages=2), splits=3)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_split_sums(gpu: Any, monkeypatch: pytest.MonkeyPatch, direction: str) -> None:
    monkeypatch.setattr(triton_plan, f"{direction}_plan", lambda *_: SPLIT)
    check(18, 200, 192, dtype=torch.bfloat16, dropout_p=0.3)


def test_split_low_rank_sums(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """u over inputs, du over outputs, dlora_a over tokens."""
    monkeypatch.setattr(triton_plan, "splits", lambda *_, **__: 2)
    check(129, 129, 129, weight="dense", r=40, dtype=torch.bfloat16, dropout_p=0.3)


def test_panels_and_chunks_of_tokens(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several panels, ragged at the end, and products of 64 tokens at a time; backward 32.
    monkeypatch.setattr(triton_plan, "PANEL_BYTES", 2 * 32 * 64)
    monkeypatch.setattr(triton_plan, "SCRATCH_BYTES", 4 * 80 * 16)  # partial sums of 64 tokens at a time
    for name in ("forward_plan", "backward_plan"):
        monkeypatch.setattr(triton_plan, name, lambda *_: Plan("panels"))
    for weight, k in zip(WEIGHTS, (160, 160, 150), strict=True):
        check(150, 80, k, r=16, weight=weight, blocksize=32, dtype=torch.bfloat16, dropout_p=0.3)


def test_scratch_is_bounded(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of tokens: here three blocks of them, and outputs that would be split in two."""
    m, n, r = 130, 600, 16
    monkeypatch.setattr(triton_plan, "SCRATCH_BYTES", 4 * m * r)  # less than one block's part of dlora_b
    check(m, n, 64, r=r, parts=("lora",), dtype=torch.bfloat16)
    launches = [launch for launch in gpu.launches if launch.name == "output_gradients_kernel"]
    assert len(launches) == 3
    assert all(launch.tensors["du_ptr"].nbytes <= triton_plan.SCRATCH_BYTES for launch in launches)
    sums = [launch.tensors["partials_ptr"].nbytes for launch in gpu.launches if launch.name == "sum_kernel"]
    assert max(sums) <= 2 * 4 * n * r  # a block's part, and the sum of those before it


@pytest.mark.parametrize("weight", WEIGHTS)
def test_no_tokens(gpu: Any, weight: str) -> None:
    check(0, 34, 128, weight=weight, dtype=torch.bfloat16, dropout_p=0.3)


def test_loops_longer_than_the_pipeline(gpu: Any) -> None:
    """Whole tiles, whose loads are pipelined as in production: what is used too early shows here."""
    check(64, 640, 640, dtype=torch.bfloat16, dropout_p=0.3)


def _runs_alike(problem: Any) -> None:
    y, grads = problem.run_with_gradients()
    again, grads_again = problem.run_with_gradients()
    assert torch.equal(y, again)
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), name


def test_same_bits_on_every_run(gpu: Any) -> None:
    _runs_alike(make_problem(20, 34, 128, dtype=torch.bfloat16, dropout_p=0.3))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("variant", ["transposed", "stride 0", "no tokens"])
def test_opcheck(weight: str, variant: str, poison: None) -> None:
    problem = make_problem(0 if variant == "no tokens" else 4, 9, 64, weight=weight, dropout_p=0.3)
    if variant == "transposed":
        problem.tensors["x"] = problem.tensors["x"].t().contiguous().t()
        problem.grad = problem.grad.t().contiguous().t()
    elif variant == "stride 0":
        problem.tensors["x"] = problem.tensors["x"][:1].expand(4, 64)
        problem.grad = problem.grad[:1, :1].expand(4, 9)
    with gpuless.device(80):
        torch.library.opcheck(FORWARD.triton, (*forward_args(problem), True))
        torch.library.opcheck(BACKWARD.triton, tuple(backward_args(problem)))


def test_compile(fresh_compiler: None) -> None:
    problem = make_problem(3, 9, 64)
    a = forward_args(problem)

    def run(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = FORWARD.triton(x, *a[1:], False)[0]
        return y + 1

    with gpuless.device(90):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(a.x), run(a.x))


def test_infinity_and_nan_stay_in_their_token(gpu: Any) -> None:
    problem = make_problem(18, 20, 128, dtype=torch.bfloat16)
    clean = problem.run()
    x = problem.tensors["x"].clone()
    x[3, 5], x[4, 7] = torch.inf, torch.nan
    y = problem.run(x=x)
    assert not y[3].isfinite().any()
    assert y[4].isnan().all()
    rest = [i for i in range(18) if i not in (3, 4)]
    assert torch.equal(y[rest], clean[rest])


def test_float64_is_refused(gpu: Any) -> None:
    problem = make_problem(3, 9, 64, weight="dense")
    forward, backward = ((*forward_args(problem), True), tuple(backward_args(problem)))
    for op, args in ((FORWARD, forward), (BACKWARD, backward)):
        doubled = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        with pytest.raises(ValueError, match=r"x must be float32 .* got float64; or leave"):
            op.triton(*doubled)


@pytest.mark.parametrize(
    ("m", "weight", "dtype"),
    [(3, "nf4", torch.float32), (20, "nf4_double", torch.bfloat16), (20, "dense", torch.bfloat16)],
)
def test_strides(gpu: Any, m: int, weight: str, dtype: torch.dtype) -> None:
    """Rows that lie apart and begin anywhere; adapters and scales with gaps between elements."""
    problem = make_problem(m, 34, 128, weight=weight, dtype=dtype, dropout_p=0.3)
    tensors = problem.tensors
    tensors["x"], problem.grad = (torch.cat([t[:, :3], t], 1)[:, 3:] for t in (tensors["x"], problem.grad))
    for name in tensors.keys() - {"x"}:
        tensors[name] = _with_gaps(tensors[name])
    if weight != "dense":
        problem.weight = replace(problem.weight, absmax=_with_gaps(problem.weight.absmax))
    y, grads = problem.run_with_gradients()
    problem.check(y)
    problem.check_gradients(grads)


def _with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor + 1], -1)[..., 0]


def test_inputs_are_not_changed(gpu: Any) -> None:
    problem = make_problem(20, 34, 128, dtype=torch.bfloat16, dropout_p=0.3)
    before = {name: tensor.clone() for name, tensor in problem.tensors.items()}
    problem.run_with_gradients()
    for name, tensor in problem.tensors.items():
        assert torch.equal(tensor, before[name]), name


def test_plans() -> None:
    llama = Product(1, 4096, 4096, 64, torch.bfloat16)
    assert forward_plan(llama, H100).method == "decode"
    assert forward_plan(llama._replace(tokens=16), H100).method == "matmul"
    assert forward_plan(llama._replace(tokens=64), H100).method == "matmul"
    assert forward_plan(llama._replace(tokens=65), H100).method == "panels"
    assert forward_plan(llama._replace(tokens=65), A100).method == "matmul"
    assert backward_plan(llama, H100).method == "matmul"
    assert forward_plan(llama._replace(in_features=4100), H100).method == "panels"
    assert forward_plan(llama._replace(tokens=16, dtype=torch.float32), H100).method == "panels"
    unknown = replace(H100, arch="gfx942", backend="hip")
    assert forward_plan(llama._replace(tokens=16), unknown).method == "matmul"


@pytest.mark.parametrize("tokens", [2, 16, 100])
@pytest.mark.parametrize("out_features", [1024, 4096, 14336])
def test_plans_fill_the_gpu_in_bounded_scratch(tokens: int, out_features: int) -> None:
    product = Product(tokens, out_features, 4096, 64, torch.bfloat16)
    found = forward_plan(product, A100)
    assert found.tile is not None
    ctas = -(-tokens // found.tile.block_m) * -(-out_features // found.tile.block_n) * found.splits
    assert ctas >= 0.75 * A100.multiprocessors
    assert found.splits == 1 or 4 * found.splits * tokens * out_features <= triton_plan.SCRATCH_BYTES


def test_explain_knows_the_methods() -> None:
    product = plan.Product(4096, 64, torch.bfloat16, torch.device("cpu"))
    with gpuless.device(90), pk.use_backend("triton"):
        plans = {direction: str(found) for direction, found in regimes.plans(product).items()}
    registers = "Triton, decoded in registers, without tensor cores"
    tensor_cores = "Triton, decoded tile by tile into tensor cores for M"
    panels = "dequantised panels and a vendor GEMM for M >= 65"
    assert plans == {
        "forward": f"{registers} for M = 1, {tensor_cores} = 2 to 64, {panels}",
        "input gradient": f"{tensor_cores} = 1 to 64, {panels}",
    }
