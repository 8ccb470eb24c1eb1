"""Threads: the same bits for any number and any caller, in DataLoader workers and after a fork too."""

import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

import numerics
import peft_kernels as pk
from factories import PARTS, Problem, make_problem
from peft_kernels.core.library import native_library

pytestmark = [  # the reference goes through torch's GEMM, whose bits depend on the number of threads
    pytest.mark.skipif(not native_library().loaded, reason="native library not loaded"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),  # Python 3.12
]

THREADS = (1, 7, 2, 1, 3)  # up and down again
TOKENS = (1, 2, 5, 8, 17, 200, 400)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
OS_THREADS = Path("/proc/self/task")
COUNTS_OS_THREADS = pytest.mark.skipif(not OS_THREADS.is_dir(), reason=f"needs {OS_THREADS}")
PATIENCE = 100  # seconds, after which a child counts as hung


def assert_same_bits(actual: numerics.Tensors, expected: numerics.Tensors, context: object) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), (name, context)


def results(problem: Problem) -> numerics.Tensors:
    y, grads = problem.run_with_gradients()
    return {"y": y, **grads}


def qlora(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    parts: Sequence[str] = ("lora", "bias"),
    seed: int = 0,
) -> Problem:
    """With double quantisation, dropout and an fp32 adapter."""
    return make_problem(
        m, n, k, r=8, weight="nf4_double", dtype=dtype, adapter_dtype=torch.float32,
        parts=parts, dropout_p=0.2, seed=seed,
    )  # fmt: skip


@DTYPES
@pytest.mark.parametrize("parts", [("lora", "bias"), PARTS], ids="+".join)
@pytest.mark.parametrize(
    ("n", "k"), [(24, 2048), (1100, 192), (390, 1090)], ids=["few columns", "many columns", "ragged rows"]
)
def test_linear(n: int, k: int, parts: tuple[str, ...], dtype: torch.dtype) -> None:
    for m in TOKENS:
        problem = qlora(m, n, k, dtype, parts)
        expected = results(problem)
        for threads in THREADS:
            torch.set_num_threads(threads)
            assert_same_bits(results(problem), expected, (m, threads))
        torch.set_num_threads(1)


@DTYPES
def test_linear_of_the_size_of_a_real_layer(dtype: torch.dtype) -> None:
    """Where a kernel may hand a part of its work to a library with threads of its own."""
    problem = qlora(1024, 1280, 1024, dtype)
    expected = results(problem)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_same_bits(results(problem), expected, threads)


@DTYPES
def test_codec_and_dropout(dtype: torch.dtype) -> None:
    """Up to 32768 blocks: double quantisation takes torch's mean of them, which beyond depends on threads."""
    for shape in ((3, 33), (257, 515), (1024, 1000)):
        weight = torch.randn(shape).to(dtype)

        def ops(weight: torch.Tensor = weight) -> numerics.Tensors:
            w = pk.functional.nf4_quantize(weight, double_quant=True)
            assert w.nested is not None
            return {
                "packed": w.packed,
                "absmax": w.absmax,
                "nested absmax": w.nested.absmax,
                "dense": w.dequantize(),
                "dropout": pk.functional.philox_dropout(weight, 0.2, 5),
            }

        expected = ops()
        for threads in THREADS:
            torch.set_num_threads(threads)
            assert_same_bits(ops(), expected, (shape, threads))
        torch.set_num_threads(1)


def test_the_number_changes_inside_one_graph() -> None:
    """Between two layers on the way forward, and between them again on the way back."""
    first, second = qlora(70, 130, 192), qlora(70, 300, 130, seed=1)

    def run(on_the_way: tuple[int, int, int, int]) -> numerics.Tensors:
        torch.set_num_threads(on_the_way[0])
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in first.tensors.items()}
        hidden = first.run(**leaves)
        hidden.register_hook(lambda _: torch.set_num_threads(on_the_way[3]))
        torch.set_num_threads(on_the_way[1])
        y = second.run(x=hidden)
        torch.set_num_threads(on_the_way[2])
        grads = torch.autograd.grad(y, list(leaves.values()), second.grad)
        return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}

    expected = run((1, 1, 1, 1))
    for on_the_way in ((2, 2, 1, 1), (1, 3, 2, 7), (7, 1, 1, 2)):
        assert_same_bits(run(on_the_way), expected, on_the_way)


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_from_several_python_threads(threads: int) -> None:
    """At the same time, of different sizes, so that each needs scratch of its own."""
    problems = [qlora(m, 200, k) for m, k in ((1, 640), (5, 1024), (40, 130), (200, 320))]
    expected = [results(problem) for problem in problems]
    torch.set_num_threads(threads)
    start = threading.Barrier(len(problems))

    def calls(offset: int) -> list[tuple[int, numerics.Tensors]]:
        start.wait(PATIENCE)
        order = [(offset + i) % len(problems) for i in range(40)]
        return [(i, results(problems[i])) for i in order]

    with ThreadPoolExecutor(len(problems)) as pool:
        for got in pool.map(calls, range(len(problems))):
            for i, actual in got:
                assert_same_bits(actual, expected[i], i)


class Calls(torch.utils.data.Dataset):
    """What a call in a DataLoader worker gives, and how many threads it starts there.

    One item for each of two workers: once an item is on its way, multiprocessing starts threads too.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[numerics.Tensors, int, int]:
        before = os_threads()
        actual = results(self.problem)
        return actual, torch.get_num_threads(), os_threads() - before


def os_threads() -> int:
    return len(list(OS_THREADS.iterdir()))


@pytest.mark.slow
@COUNTS_OS_THREADS
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_dataloader_workers(start_method: str) -> None:
    """torch gives each worker one thread, and no kernel starts another."""
    problem = qlora(200, 260, 320)
    torch.set_num_threads(2)
    expected = results(problem)
    loader = torch.utils.data.DataLoader(
        Calls(problem), batch_size=None, num_workers=2, multiprocessing_context=start_method, timeout=PATIENCE
    )
    items = list(loader)
    assert len(items) == 2
    for actual, threads, started in items:
        assert_same_bits(actual, expected, start_method)
        assert (threads, started) == (1, 0)


def answer(pipe: Connection, problem: Problem) -> None:
    torch.set_num_threads(1)
    pipe.send({name: tensor.numpy() for name, tensor in results(problem).items()})


def test_after_a_fork() -> None:
    """With one thread in the child, as DataLoader has it: more hang there in any torch op (GNU OpenMP)."""
    problem = qlora(200, 260, 320)
    torch.set_num_threads(2)
    expected = results(problem)
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=answer, args=(theirs, problem))
    child.start()
    try:
        assert ours.poll(PATIENCE), "the child hangs"
        actual = {name: torch.from_numpy(array) for name, array in ours.recv().items()}
    finally:
        child.kill()
        child.join()
    assert_same_bits(actual, expected, "child")
    assert_same_bits(results(problem), expected, "parent, afterwards")


FRESH_PROCESS = """
import os
import torch
import peft_kernels as pk

def count():
    return len(os.listdir("/proc/self/task"))

def call():
    y = pk.functional.nf4_linear(x, w)
    return [y, *torch.autograd.grad(y, x, grad)]

def report(name, threads):
    torch.set_num_threads(threads)
    at_first = count()
    actual = call()
    after_ours = count()
    torch.randn(1000, 1000).exp()
    same = all(map(torch.equal, actual, expected))
    print(name, same, after_ours - at_first, count() - at_first, flush=True)

torch.set_num_threads(1)
at_first = count()
w = pk.functional.nf4_quantize(torch.randn(600, 320), double_quant=True)
x, grad = torch.randn(200, 320, requires_grad=True), torch.randn(200, 600)
expected = call()
print("one thread:", count() - at_first, flush=True)
if (child := os.fork()) == 0:
    report("child:", 3)
    os._exit(0)
os.waitpid(child, 0)
report("parent:", 3)
"""


@pytest.mark.slow
@COUNTS_OS_THREADS
def test_threads_are_those_of_torch() -> None:
    """Two beside the caller where torch has three, which its own ops then use as well; in a fork, too."""
    run = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["one thread: 0", "child: True 2 2", "parent: True 2 2"]
