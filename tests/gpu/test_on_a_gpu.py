"""What only a GPU can show: streams, CUDA graphs, the vendor's GEMMs, and the same numbers as elsewhere."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import peft_kernels as pk
from factories import WEIGHTS, Problem, make_problem
from peft_kernels.core.backend import has_cuda_kernels

if not torch.cuda.is_available():
    pytest.skip("needs a GPU; tests/gpuless runs the same kernels without one", allow_module_level=True)


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run every test on Triton's kernels, and on CUDA C++ ones with Triton's for the rest."""
    if request.param == "cuda" and not has_cuda_kernels():
        pytest.skip("the native library was built without CUDA C++ kernels: make gpu-check builds them")
    with pk.use_backend(request.param):
        yield


def on_gpu(problem: Problem) -> Problem:
    """The same problem with its tensors on the GPU; its checks stay on the CPU."""
    weight = problem.weight.to("cuda")
    return Problem(
        {name: tensor.cuda() for name, tensor in problem.tensors.items()},
        weight,
        problem.exact_weight,
        problem.grad.cuda(),
        problem.scaling,
        problem.dropout_p,
        problem.seed,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("m", [0, 1, 3, 17, 64, 130, 1025])
def test_adapted_linear(m: int, weight: str, dtype: torch.dtype) -> None:
    problem = make_problem(m, 515, 1024, r=16, weight=weight, dtype=dtype, dropout_p=0.1)
    y, grads = on_gpu(problem).run_with_gradients()
    problem.check(y.cpu())
    problem.check_gradients({name: grad.cpu() for name, grad in grads.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [64, 576, 4096])
@pytest.mark.parametrize("m", [1, 4, 8, 9, 16, 32, 33, 64, 128])
def test_few_tokens(m: int, k: int, dtype: torch.dtype) -> None:
    """Small enough for compute-sanitizer; all tiles of the CUDA C++ kernels, which take no input_scale."""
    parts = ("lora", "column_scale", "bias")
    problem = make_problem(m, 515, k, r=20, weight="nf4_double", dtype=dtype, parts=parts, dropout_p=0.1)
    y, grads = on_gpu(problem).run_with_gradients()
    problem.check(y.cpu())
    problem.check_gradients({name: grad.cpu() for name, grad in grads.items()})


@pytest.mark.parametrize("m", [1, 17, 300])
def test_other_stream(m: int) -> None:
    parts = ("lora", "column_scale", "bias")
    problem = on_gpu(make_problem(m, 512, 1024, dtype=torch.bfloat16, parts=parts, dropout_p=0.1))
    expected, _ = problem.run_with_gradients()
    stream = torch.cuda.Stream()
    x = problem.tensors["x"]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # a kernel on another stream would overtake this, and read zeros
        late = torch.zeros_like(x).copy_(x)
        y = problem.run(x=late)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("m", [1, 17, 300])
def test_cuda_graph(m: int) -> None:
    problem = on_gpu(make_problem(m, 512, 1024, dtype=torch.bfloat16))
    a = {name: tensor.detach() for name, tensor in problem.tensors.items()}
    with torch.no_grad():
        expected = problem.run(**a)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = problem.run(**a)
        y.zero_()
        graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("m", [1, 17, 300])
def test_cuda_graph_of_a_training_step(m: int) -> None:
    parts = ("lora", "column_scale", "bias")
    problem = on_gpu(make_problem(m, 512, 1024, dtype=torch.bfloat16, parts=parts))
    expected, expected_grads = problem.run_with_gradients()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # on a side stream
        y, grads = problem.run_with_gradients()
    for tensor in (y, *grads.values()):
        tensor.zero_()
    graph.replay()
    assert torch.equal(y, expected)
    for name, grad in grads.items():
        assert torch.equal(grad, expected_grads[name]), name


def graphed_layer(dropout_p: float = 0.0) -> Any:
    """A QLoRA layer, trained, and its input."""
    layer = pk.nn.LoRALinear.from_linear(pk.nn.NF4Linear(1024, 512), r=16, lora_dropout=dropout_p).cuda()
    torch.nn.init.normal_(layer.adapter[1])
    x = torch.randn(17, 1024, device="cuda", requires_grad=True)
    layer(x).sum().backward()  # compiles
    layer.zero_grad()
    x.grad = None
    return layer, x


def test_replays_of_a_cuda_graph_draw_masks_of_their_own() -> None:
    """The seed is drawn inside the graph; forward and backward of one replay share it."""
    layer, x = graphed_layer(dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    replays = []
    for seed in (1, 2, 1):
        torch.cuda.manual_seed(seed)
        graph.replay()
        replays.append((y.detach().clone(), dx.clone()))
    for of_seed_1, of_seed_2, again in zip(*replays, strict=True):
        assert torch.equal(of_seed_1, again)
        assert not torch.equal(of_seed_1, of_seed_2)


def test_make_graphed_callables() -> None:
    """torch's own wrapper of a module's forward and backward."""
    layer, x = graphed_layer()
    y = layer(x)
    y.sum().backward()
    expected = [y.detach(), x.grad, *(p.grad for p in layer.adapter)]
    layer.zero_grad()
    x.grad = None
    graphed = torch.cuda.make_graphed_callables(layer, (torch.randn_like(x, requires_grad=True),))
    y = graphed(x)
    y.sum().backward()
    for got, wanted in zip([y.detach(), x.grad, *(p.grad for p in layer.adapter)], expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("m", [1, 17, 300])
def test_no_host_synchronisation(m: int) -> None:
    problem = on_gpu(make_problem(m, 512, 1024, dtype=torch.bfloat16, dropout_p=0.1))
    problem.seed = torch.tensor(5, device="cuda")  # type: ignore[assignment]
    problem.run_with_gradients()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.run_with_gradients()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_same_bits_on_every_run() -> None:
    problem = on_gpu(make_problem(130, 512, 1024, dtype=torch.bfloat16, dropout_p=0.1))
    first: Any = problem.run_with_gradients()
    for _ in range(5):
        again: Any = problem.run_with_gradients()
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_codec(dtype: torch.dtype, double_quant: bool) -> None:
    weight = torch.randn(515, 1001).to(dtype)
    expected, found = (pk.functional.nf4_quantize(w, 64, double_quant) for w in (weight, weight.cuda()))
    assert torch.equal(found.packed.cpu(), expected.packed)
    if not double_quant:  # the mean of absmax is torch's own, and differs between devices
        assert torch.equal(found.absmax.cpu(), expected.absmax)
    assert torch.equal(expected.to("cuda").dequantize().cpu(), expected.dequantize())


def test_dora_norm() -> None:
    w, a, b = torch.randn(130, 1001), torch.randn(20, 1001), torch.randn(130, 20)
    expected = pk.functional.dora_norm(w.double(), a.double(), b.double(), 0.5)
    found = pk.functional.dora_norm(w.cuda(), a.cuda(), b.cuda(), 0.5)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-6, atol=0)


def test_compiled_training_step() -> None:
    problem = on_gpu(make_problem(17, 512, 1024, dtype=torch.bfloat16))
    eager, _ = problem.run_with_gradients()
    compiled = torch.compile(problem.run, fullgraph=True)
    assert torch.equal(compiled(), eager)
