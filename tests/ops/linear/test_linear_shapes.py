"""Random shapes, options and strides against float64; inputs stay as they are, and NaN stays in its row."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

import peft_kernels as pk
from factories import PARTS, Problem, make_problem
from peft_kernels.ops.nf4.schema import BLOCKSIZES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = list(
    itertools.product(
        DTYPES,
        ("whole blocks", "ragged rows"),
        ("few tokens", "many tokens"),
        ([], ["input_scale"], ["column_scale"], ["input_scale", "column_scale"]),
    )
)
MARGIN = 17  # elements around a tensor: odd, so that nothing in it is aligned to more than one element


def surrounded(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy inside a larger buffer of NaN (bytes of 255): what is read past its ends shows."""
    filling = math.nan if tensor.is_floating_point() else 255
    buffer = tensor.new_full((tensor.numel() + 2 * MARGIN,), filling)
    inside = buffer[MARGIN : MARGIN + tensor.numel()].view(tensor.shape)
    return inside.copy_(tensor)


def restrided(tensor: torch.Tensor, view: str) -> torch.Tensor:
    """`tensor` under other strides; "expanded" ones repeat its first row, "constant" its first column."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    if view == "transposed" and tensor.dim() == 2:
        return surrounded(tensor.t()).t()
    if view == "strided":
        return surrounded(tensor.repeat_interleave(3, dim=-1))[..., 1::3]
    if view == "expanded" and tensor.dim() == 2:
        return surrounded(tensor[:1]).expand_as(tensor)
    if view == "constant":
        return surrounded(tensor[..., :1]).expand_as(tensor)
    return surrounded(tensor)


def with_nested_blocksize(w: pk.NF4Weight, blocksize: int) -> pk.NF4Weight:
    """A double-quantised weight with other second-level scales."""
    assert w.nested is not None
    absmax = (1 + torch.rand(-(-w.absmax.numel() // blocksize))) * w.nested.offset / 2
    return replace(w, nested=replace(w.nested, absmax=absmax, blocksize=blocksize))


def restrided_weight(w: pk.NF4Weight, pick: random.Random) -> pk.NF4Weight:
    views = ("surrounded", "strided")
    nested = w.nested
    if nested is not None:
        nested = replace(
            nested,
            absmax=restrided(nested.absmax, pick.choice(views)),
            code=restrided(nested.code, pick.choice(views)),
        )
    return replace(
        w, packed=surrounded(w.packed), absmax=restrided(w.absmax, pick.choice(views)), nested=nested
    )


def replace_weight(problem: Problem, w: pk.NF4Weight) -> None:
    problem.weight = w
    with pk.use_backend("reference"):
        problem.exact_weight = w.dequantize(torch.float32).double()


def random_problem(index: int) -> Problem:
    """Drawn from `index`, all but what decides by which method a product is computed: KINDS in turn."""
    dtype, rows, tokens, scales = KINDS[index % len(KINDS)]
    pick = random.Random(index)

    def size(least: int, most: int) -> int:
        return pick.randint(least, pick.choice((most, min(most, least + 70), min(most, least + 8))))

    blocksize = pick.choice(BLOCKSIZES)
    if rows == "whole blocks":
        k = blocksize * pick.randint(1, max(1, 1024 // blocksize))
    else:
        k = blocksize * pick.randint(0, 1024 // blocksize) + size(1, blocksize - 1)
    parts = [*scales, *pick.choice(((), ("lora",), ("lora", "bias"), ("bias",)))]
    torch.manual_seed(index)
    problem = make_problem(
        size(9, 300) if tokens == "many tokens" else pick.randint(0, 8), size(1, 400), k,
        r=size(1, 70),
        weight=pick.choice(("nf4", "nf4_double")),
        blocksize=blocksize,
        dtype=dtype,
        adapter_dtype=pick.choice((dtype, torch.float32)),
        parts=parts,
        dropout_p=pick.choice((0.0, 0.3)) if "lora" in parts else 0.0,
        seed=index,
    )  # fmt: skip
    problem.seed = pick.choice((0, -1, pick.getrandbits(63)))
    views = ("surrounded", "surrounded", "transposed", "strided", "expanded", "constant")
    problem.tensors = {name: restrided(t, pick.choice(views)) for name, t in problem.tensors.items()}
    problem.grad = restrided(problem.grad, pick.choice(views))
    w = problem.weight
    if w.nested is not None:
        w = with_nested_blocksize(w, pick.choice(BLOCKSIZES))
    replace_weight(problem, restrided_weight(w, pick))
    return problem


def bytes_of_inputs(problem: Problem) -> list[torch.Tensor]:
    """Of whole storages, what lies around the tensors included."""
    base = [t for t in problem.weight.base_weight()[:5] if t is not None]
    inputs = [*problem.tensors.values(), problem.grad, *base]
    return [torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone() for t in inputs]


@pytest.mark.parametrize("index", range(3 * len(KINDS)))
def test_random_problems(backend: str, index: int) -> None:
    problem = random_problem(index)
    before = bytes_of_inputs(problem)
    y, grads = problem.run_with_gradients()
    problem.check(y)
    problem.check_gradients(grads)
    with torch.no_grad():
        assert torch.equal(problem.run(), y)
    assert all(map(torch.equal, bytes_of_inputs(problem), before))
    assert torch.equal(problem.weight.dequantize(torch.float32).double(), problem.exact_weight)


@pytest.mark.parametrize("nested_blocksize", [32, 64, 256])
@pytest.mark.parametrize("m", [1, 3, 6, 8, 40])
def test_second_level_scales_change_inside_a_row(backend: str, m: int, nested_blocksize: int) -> None:
    """Rows of 37 blocks; of 37 and a half."""
    for k, dtype in itertools.product((37 * 32, 37 * 32 + 16), DTYPES):
        problem = make_problem(m, 70, k, weight="nf4_double", blocksize=32, dtype=dtype, parts=["lora"])
        replace_weight(problem, with_nested_blocksize(problem.weight, nested_blocksize))
        y, grads = problem.run_with_gradients()
        problem.check(y)
        problem.check_gradients(grads)


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 1, 1), (1, 5, 1), (2, 1, 4097), (9, 3, 1)])
@pytest.mark.parametrize("weight", ["nf4", "nf4_double"])
def test_one_input_or_output_feature(backend: str, weight: str, m: int, n: int, k: int) -> None:
    for dtype in DTYPES:
        for blocksize in (32, 4096):
            problem = make_problem(
                m, n, k, r=1, weight=weight, blocksize=blocksize, dtype=dtype, dropout_p=0.3
            )
            y, grads = problem.run_with_gradients()
            problem.check(y)
            problem.check_gradients(grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [256, 250], ids=["whole blocks", "ragged"])
@pytest.mark.parametrize("m", [3, 5, 7, 40, 250])
@pytest.mark.parametrize("parts", [("lora", "bias"), PARTS], ids="+".join)
def test_what_is_not_finite_stays_in_its_row(
    backend: str, parts: tuple[str, ...], m: int, k: int, dtype: torch.dtype
) -> None:
    """One NaN in one token and one infinity in another: of x for y, of the upstream gradient for dx."""
    problem = make_problem(m, 70, k, dtype=dtype, parts=parts, dropout_p=0.3)
    y, grads = problem.run_with_gradients(["x"])
    nan_row, inf_row = m // 2, m - 1
    spared = torch.tensor([row not in (nan_row, inf_row) for row in range(m)])
    for tensor in (problem.tensors["x"], problem.grad):
        tensor[nan_row, 3] = math.nan
        tensor[inf_row, -1] = math.inf
    y_not_finite, grads_not_finite = problem.run_with_gradients(["x"])
    for actual, finite in ((y_not_finite, y), (grads_not_finite["x"], grads["x"])):
        assert torch.equal(actual[spared], finite[spared])
        assert actual[nan_row].isnan().all()
        assert not actual[inf_row].isfinite().any()
