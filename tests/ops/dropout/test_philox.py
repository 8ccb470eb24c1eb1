"""Philox against published vectors; the dropout op's mask, values, gradient and behaviour as a torch op."""

import math
import re
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.ops.dropout.reference import philox4x32

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
dropout, mask = pk.functional.philox_dropout, pk.functional.philox_dropout_mask


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123 1.14, tests/kat_vectors, "philox4x32 10"
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor([int(word, 16)]) for word in text.split())

    assert philox4x32(words(counter), words(key)) == words(expected)


def philox_word(element: int, seed: int) -> int:
    """The word of one element, in plain integers: an independent implementation."""
    group, seed = element >> 2, seed % 2**64
    c, k = [group % 2**32, group >> 32, 0, 0], [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[element & 3]


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_mask_is_the_definition(p: float, seed: int) -> None:
    expected = [philox_word(e, seed) >= math.floor(p * 2**32) for e in range(7 * 9)]
    assert mask((7, 9), p, seed).flatten().tolist() == expected
    assert torch.equal(mask((7, 9), p, torch.tensor(seed)), mask((7, 9), p, seed))


def test_a_word_equal_to_the_threshold_is_kept(backend: str) -> None:
    for element in range(8):
        word = philox_word(element, 99)
        at, above = word / 2**32, (word + 1) / 2**32
        assert dropout(torch.ones(8), at, 99)[element] > 0
        assert dropout(torch.ones(8), above, 99)[element] == 0


def test_share_of_kept_elements() -> None:
    """Within five standard deviations of 1 - p."""
    n, p = 2**18, 0.3
    assert abs(mask((n,), p, 5).sum() - n * (1 - p)) < 5 * math.sqrt(n * p * (1 - p))


@DTYPES
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (17, 33), (2, 3, 5), (0, 4), (1000, 131)], ids=str)
def test_values(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Kept: x times fp32(1/(1-p)), rounded once. Dropped: +0."""
    x = torch.randn(shape).to(dtype)
    y = dropout(x, 0.1, seed=42)
    scale = torch.tensor(1 / 0.9, dtype=torch.float32)
    exact = x.to(torch.promote_types(dtype, torch.float32)) * scale
    assert torch.equal(y, torch.where(mask(shape, 0.1, 42), exact, 0.0).to(dtype))
    assert not (y.signbit() & (y == 0) & (x != 0)).any()


def test_dropped_elements_are_zero_whatever_they_were(backend: str) -> None:
    x = torch.full((64,), math.nan)
    x[::2] = -math.inf
    kept = mask((64,), 0.5, 3)
    y = dropout(x, 0.5, 3)
    assert torch.equal(y[~kept], torch.zeros(int((~kept).sum())))
    assert not y[kept].isfinite().any()


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_mask_follows_row_major_order_whatever_the_strides(backend: str, view: str) -> None:
    base = torch.randn(12, 20)
    x = {"transposed": base.t(), "strided": base[:, ::3], "expanded": base[:1].expand(5, 20)}[view]
    assert torch.equal(dropout(x, 0.4, 1), dropout(x.contiguous(), 0.4, 1))


def test_seed_comes_from_the_default_generator(backend: str) -> None:
    x = torch.ones(1000)
    torch.manual_seed(11)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(11)
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    assert torch.equal(dropout(x, 0.5, seed), first)
    assert not torch.equal(first, second)


def test_without_dropout_it_is_the_input_itself() -> None:
    x = torch.ones(3)
    before = torch.get_rng_state()
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), before)


@DTYPES
def test_gradient_goes_through_the_same_mask(backend: str, dtype: torch.dtype) -> None:
    x = torch.randn(9, 7).to(dtype).requires_grad_()
    grad = torch.randn(7, 9).to(dtype).t()
    y = dropout(x, 0.3, 8)
    assert torch.equal(torch.autograd.grad(y, x, grad)[0], dropout(grad, 0.3, 8))


def test_gradients_of_all_orders_in_float64() -> None:
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.3, 8), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, 0.3, 8), x)


def test_only_the_seed_is_saved(backend: str) -> None:
    saved: list[torch.Tensor] = []
    x = torch.randn(64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x, 0.3)
    assert [t.nbytes for t in saved] == [8]


@pytest.mark.parametrize("threads", [2, 3])
def test_any_thread_count_gives_the_same_bits(backend: str, threads: int) -> None:
    x = torch.randn(700, 301)
    one = dropout(x, 0.2, 5)
    torch.set_num_threads(threads)
    assert torch.equal(dropout(x, 0.2, 5), one)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_repeats_the_mask(backend: str, use_reentrant: bool) -> None:
    x = torch.randn(20, 20, requires_grad=True)
    torch.manual_seed(3)
    expected = torch.autograd.grad(dropout(x * 2, 0.5).sum(), x)[0]
    torch.manual_seed(3)
    checkpoint(lambda x: dropout(x * 2, 0.5), x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(fresh_compiler: None, dynamic: bool) -> None:
    compiled = torch.compile(dropout, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (4, 9):
        x = torch.randn(rows, 6, requires_grad=True)
        expected = dropout(x, 0.5, 1)
        y = compiled(x, 0.5, 1)
        assert torch.equal(y, expected)
        y.sum().backward()
        assert torch.equal(x.grad != 0, mask(x.shape, 0.5, 1))
    torch.manual_seed(0)
    first, second = compiled(torch.ones(1000), 0.5), compiled(torch.ones(1000), 0.5)
    assert not torch.equal(first, second)  # the seed is drawn in the graph, not when it was compiled


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 5),
        torch.randn(5, 3).t().bfloat16(),
        torch.ones(1, 4).expand(3, 4),
        torch.empty(0, 2).half(),
    ],
)
@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(x: torch.Tensor, overload: str) -> None:
    op = getattr(torch.ops.peft_kernels.philox_dropout, overload)
    torch.library.opcheck(op, (x, 0.25, torch.tensor(6)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), 1.0), "p must be in [0, 1), got 1.0"),
        ((torch.ones(3), -0.5), "p must be in [0, 1), got -0.5"),
        ((torch.ones(3), math.nan), "p must be in [0, 1), got nan"),
        (
            (torch.ones(3, dtype=torch.int64), 0.5),
            "x must be float32 or bfloat16 or float16 or float64, got int64",
        ),
        ((torch.ones(3), 0.5, 2**63), "seed must fit in int64, got 9223372036854775808"),
        ((torch.ones(3), 0.5, torch.tensor(1.0)), "seed must be int64, got float32"),
        ((torch.ones(3), 0.5, torch.tensor([1])), "seed must be 0-dim = [], got [1]"),
        (
            (torch.ones(3), 0.5, torch.ones((), dtype=torch.int64, device="meta")),
            "seed must be on the device of x",
        ),
    ],
)
def test_refuses(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dropout(*arguments)


def test_refuses_wrong_types() -> None:
    with pytest.raises(TypeError, match=r"^seed must be an int, got 1.5$"):
        dropout(torch.ones(3), 0.5, 1.5)
    with pytest.raises(TypeError, match=r"^seed must be an int, got 1.5$"):
        mask((3,), 0.5, 1.5)
    with pytest.raises(TypeError, match=r"^x must be a torch.Tensor, got list; "):
        dropout([1.0], 0.5)
