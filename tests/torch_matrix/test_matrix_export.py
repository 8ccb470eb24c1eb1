"""torch.export, strict and not, saved and loaded; AOTInductor; torch.jit.trace, and where it is refused."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from subjects import EACH_SUBJECT, inputs, make, results, run
from torch import nn
from torch.export import Dim
from torch.jit.frontend import NotSupportedError

from surgery.peft_models import assert_close

FUSED_OPS = {
    "peft_kernels.adapted_linear.default",
    "peft_kernels.bottleneck_adapter.default",
    "peft_kernels.philox_dropout.default",
}


def exported(module: nn.Module, strict: bool) -> torch.export.ExportedProgram:
    return torch.export.export(
        module, (inputs(),), strict=strict, dynamic_shapes=({0: Dim("rows", min=1, max=4096)},)
    )


def ops(program: torch.export.ExportedProgram) -> list[str]:
    """Names of all ops, those in subgraphs (strict mode's autograd functions) too."""
    graphs = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]


def saved_and_loaded(program: torch.export.ExportedProgram) -> Any:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@EACH_SUBJECT
def test_export(level: str, name: str, strict: bool) -> None:
    """The program has the fused op, runs for other numbers of rows, and draws the masks of the module."""
    module = make(level, name)
    program = exported(module, strict)
    assert FUSED_OPS & set(ops(program))
    loaded = saved_and_loaded(program)
    for rows in (1, 9):
        expected = run(module, inputs(rows)).detach()
        for call in (program.module(), loaded):
            assert_close(run(call, inputs(rows)).detach(), expected)


@pytest.mark.parametrize(("level", "name"), [("models", "LoRA over NF4"), ("modules", "BottleneckAdapter")])
def test_an_exported_program_refuses_to_be_trained(level: str, name: str) -> None:
    """It is for inference: what is traced are the forward ops, which have no gradient of their own."""
    module = make(level, name).eval()
    strict, non_strict = (exported(module, strict).module() for strict in (True, False))
    with pytest.raises(RuntimeError, match="does not require grad"):
        strict(inputs()).sum().backward()
    with pytest.warns(UserWarning, match="an autograd kernel was not registered to the Autograd key"):
        non_strict(inputs()).sum().backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_aot_inductor(tmp_path: Path) -> None:
    """Compiled ahead of time into a library that needs no Python code of the model."""
    model = make("models", "LoRA over NF4").eval()
    with torch.no_grad():
        program = exported(model, strict=False)
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled: Any = torch._inductor.aoti_load_package(path)
        for rows in (1, 9):
            assert_close(compiled(inputs(rows)), model(inputs(rows)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of shapes that are checked once
@EACH_SUBJECT
def test_jit_trace(level: str, name: str) -> None:
    """A trace of inference is an ordinary one; one that could be trained runs, and refuses to be saved."""
    module = make(level, name)
    with torch.no_grad():
        traced = torch.jit.trace(module, (inputs(),), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        for rows in (1, 9):
            assert_close(run(traced, inputs(rows)), run(module, inputs(rows)))
            assert_close(run(loaded, inputs(rows)), run(module, inputs(rows)))
    trained = torch.jit.trace(module, (inputs().requires_grad_(),), check_trace=False)
    eager, got = (results(call, module, inputs(9)) for call in (module, trained))
    assert list(eager) == list(got)
    for key in eager:
        assert_close(got[key], eager[key])
    with pytest.raises(RuntimeError, match="Could not export Python function call"):
        torch.jit.save(trained, io.BytesIO())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@EACH_SUBJECT
def test_jit_script(level: str, name: str) -> None:
    """Torch compiles sources, and refuses what TorchScript lacks; nothing wrong comes of it."""
    with pytest.raises((NotSupportedError, RuntimeError, OSError, AssertionError)):
        torch.jit.script(make(level, name))
