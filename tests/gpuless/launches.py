"""What our ops launch for the benchmark's GPU cases: configurations in milliseconds, or compiled kernels."""

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from peft_kernels.bench import registry
from peft_kernels.bench.case import OURS, Case, Prepared, Program
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction

import peft_kernels as pk
from gpuless.driver import Launch, device, target_of
from gpuless.torch_calls import MissingKernel, TorchCalls, has_launcher

for _family in pkgutil.iter_modules(pk.ops.__path__):  # now: they compute their tables when imported
    if importlib.util.find_spec(_module := f"peft_kernels.ops.{_family.name}.triton"):
        importlib.import_module(_module)

# Registered ops that no GPU kernel is meant for, with the reason.
WITHOUT_TRITON = {"nf4_linear_int8": "rounds activations for the CPU's int8 dot products (VNNI)"}


@dataclass(frozen=True, order=True)
class Configuration:
    """A kernel as it is shipped: its name, its constants, its options."""

    kernel: str
    constants: tuple[tuple[str, str], ...]
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        constants = ", ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel}({constants}), {self.num_warps} warps, {self.num_stages} stages"


def cases() -> list[Case]:
    """Production shapes: the suite that `python -m peft_kernels.bench --device cuda` measures."""
    return [case for case in registry.select("gpu") if case.family != "model"]  # which is made of the others


def missing() -> list[str]:
    """Registered ops that have no Triton kernel and no reason to have none."""
    names = (name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if _is_ours(name))
    return sorted(
        name
        for name in names
        if name not in WITHOUT_TRITON and not has_launcher(f"peft_kernels::{name}.triton")
    )


def _is_ours(name: str) -> bool:
    return name.startswith("peft_kernels::") and "." not in name


def build(case: Case, execute: bool = False) -> tuple[Prepared, Program] | None:
    """A case's tensors, and ours ready to be called; None if an op it needs has no kernel.

    A gradient is computed where its forward was, so what is built for one has launched that forward.

    Args:
        case: the problem.
        execute: give the tensors values; otherwise they are memory that nobody has touched.
    """
    # Tables of codes are looked at, whatever happens.
    with nullcontext() if execute else TorchCalls(execute=False, compute_up_to=4096):
        prepared = registry.prepare(case)
        try:
            with pk.use_backend("triton"):
                (program, *_) = prepared.contestants[OURS]()
        except MissingKernel:
            return None
    return prepared, program


def call(program: Program, execute: bool = False) -> TorchCalls | None:
    """Call ours once, and say which torch ops it called; None if an op it needs has no kernel."""
    try:
        with pk.use_backend("triton"), TorchCalls(execute) as calls:
            calls.results = program.call()
    except MissingKernel:
        return None
    return calls


def launches(case: Case, arch: int | str) -> list[Launch]:
    """Launches of ours for a case, compiled for an architecture; their code does not run."""
    with device(arch, execute=False) as gpu:
        built = build(case)
        gpu.launches.clear()
        if built is None or call(built[1]) is None:
            return []
    return gpu.launches


def configurations(case: Case, arch: int | str) -> list[Configuration]:
    """The same as `launches`, without compiling anything."""
    found: list[Configuration] = []
    backend = make_backend(target_of(arch))

    def note(kernel: JITFunction[Any], *args: Any, **keywords: Any) -> None:
        names = {parameter.name for parameter in kernel.params}
        arguments = {name: value for name, value in keywords.items() if name in names}
        bound = inspect.signature(kernel.fn).bind(*args, **arguments)
        bound.apply_defaults()
        options = backend.parse_options(
            {name: value for name, value in keywords.items() if name not in names}
        )
        found.append(_configuration(kernel, bound.arguments, options))

    with device(arch, execute=False), mock.patch.object(JITFunction, "run", note):
        built = build(case)
        found.clear()
        if built is None or call(built[1]) is None:
            return []
    return found


def configuration(launch: Launch) -> Configuration:
    """The configuration of a launch."""
    kernel, constants = launch.source.fn, launch.source.constants
    values = {kernel.params[path[0]].name: value for path, value in constants.items() if len(path) == 1}
    return _configuration(kernel, values, launch)


def _configuration(kernel: JITFunction[Any], values: Mapping[str, Any], options: Any) -> Configuration:
    """With what the source calls a constant; an argument that is 1 or None is none."""
    constants = tuple(
        (parameter.name, str(getattr(values[parameter.name], "value", values[parameter.name])))
        for parameter in kernel.params
        if parameter.is_constexpr
    )
    return Configuration(kernel.fn.__name__.strip("_"), constants, options.num_warps, options.num_stages)
