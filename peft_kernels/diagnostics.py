"""What this installation is and whether it computes correctly: the report behind `python -m peft_kernels`.

The self-test runs every op the way a user's call does and compares it, element by element, with the
mathematics in float64, allowing the error that rounding may cause there (`peft_kernels.bench.oracle`, which
shares no code with the kernels).
"""

import importlib.metadata
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peft_kernels import __version__
from peft_kernels.bench import registry
from peft_kernels.bench.case import CHECK_SEED, OURS, Case
from peft_kernels.bench.oracle import compare
from peft_kernels.core.backend import backend_of, op_names
from peft_kernels.core.gpu import gpu, why_no_gpu
from peft_kernels.core.library import BUILD_FAILURE_NOTE, native_library

LIBRARIES = ("torch", "triton", "bitsandbytes", "peft", "transformers", "numpy")
ENVIRONMENT = ("PEFT_KERNELS_CPU_CAPABILITY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_INTERPRET")

ABSENT = "not installed"

GPU_PARTS = ("nf4_linear_backward_input",)  # ops that only other ops call, and on GPUs alone

Section = dict[str, str]


@dataclass(frozen=True)
class SelfTestResult:
    """One self-test case.

    Attributes:
        case: op, direction, sizes, weight format and dtype.
        error: largest absolute error over the largest absolute value expected.
        tolerance_used: largest error over what rounding may cause there; at most 1 in a correct kernel.
        passed: whether no element is off by more than that.
    """

    case: str
    error: float
    tolerance_used: float
    passed: bool


def versions() -> Section:
    """Versions of Python and of every library that matters here."""
    return {
        "peft_kernels": __version__,
        "python": f"{platform.python_version()} ({platform.platform()})",
        **{name: _version(name) for name in LIBRARIES},
    }


def hardware() -> Section:
    """Processor, threads, GPU, and the environment variables that change what runs on them."""
    native = native_library()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cuda_build = torch.version.cuda or torch.version.hip or "no: this torch is built for CPUs only"
    return {
        "processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "instruction sets found": ", ".join(native.capabilities_found) or "unknown (no native library)",
        "instruction set used": native.capability or "none (see native library)",
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads)",
        "CUDA in torch": cuda_build,
        "GPUs": ", ".join(gpus) or "none visible",
        "Triton": f"idle: {reason}" if (reason := why_no_gpu()) else f"ready for {gpu().arch}",
        **{name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def native() -> Section:
    """The native library: where it was loaded from, or why not and what to do about it."""
    record = native_library()
    if record.loaded and record.capability is None:
        name = os.environ.get("PEFT_KERNELS_CPU_CAPABILITY")
        return {
            "loaded from": str(record.path),
            "NOT USABLE": f"PEFT_KERNELS_CPU_CAPABILITY={name} names "
            f"no instruction set of this machine ({', '.join(record.capabilities_found)})",
            "consequence": "every call of a native kernel fails; there was no self-test",
            "remedy": "unset PEFT_KERNELS_CPU_CAPABILITY",
        }
    if record.loaded:
        gpus = ", ".join(f"sm_{arch}" for arch in record.cuda_architectures)
        return {"loaded from": str(record.path), "CUDA C++ kernels for": gpus or "no GPU: built without them"}
    section = {
        "NOT LOADED": str(record.reason),
        "consequence": "every operation runs on the slow PyTorch reference",
        "remedy": "install a C++20 compiler (Debian: apt-get install g++), then `make build` in a checkout; "
        "elsewhere `pip install -v --force-reinstall --no-deps --no-cache-dir` the package again",
    }
    note = record.path.with_name(BUILD_FAILURE_NOTE)
    if note.is_file():
        section["when it was built"] = note.read_text().rstrip()
    return section


def backends() -> Section:
    """What runs each op on each kind of device that is here."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    ops = [op for op in op_names() if op not in GPU_PARTS]
    return {
        op: ", ".join(f"{backend_of(op, device)} for {device} tensors" for device in devices) for op in ops
    }


def inventory() -> dict[str, Section]:
    """Everything but the self-test, by section title."""
    return {
        "versions": versions(),
        "hardware": hardware(),
        "native library": native(),
        "backends": backends(),
    }


def self_test() -> list[SelfTestResult]:
    """Run the benchmarks' smoke suite, which has every op, in each dtype, and check every element.

    Nothing is run, and nothing returned, where every native kernel would refuse to (see `native`).
    """
    if native_library().loaded and native_library().capability is None:
        return []
    dtypes = ("float32", "bfloat16", "float16")
    with torch.random.fork_rng(devices=[]):
        return [_check(replace(case, dtype=dtype)) for case in registry.select("smoke") for dtype in dtypes]


def inventory_view(sections: dict[str, Section]) -> Group:
    """The inventory as rich text."""
    parts: list[RenderableType] = []
    for title, section in sections.items():
        table = Table.grid(padding=(0, 2))
        for name, value in section.items():
            table.add_row(Text(f"  {name}", style="bold red" if name.isupper() else "cyan"), Text(value))
        parts += [Text(title, style="bold"), table, Text("")]
    return Group(*parts)


def self_test_view(results: list[SelfTestResult]) -> Table:
    """The self-test as a table."""
    passed = sum(result.passed for result in results)
    table = Table(
        title=f"self-test: {passed} of {len(results)} passed",
        box=box.SIMPLE_HEAD,
        title_style="bold green" if passed == len(results) else "bold red",
        caption="against float64; tolerance: what rounding may do to that element",
    )
    table.add_column("op")
    table.add_column("case")
    for column in ("error", "of tolerance", ""):
        table.add_column(column, justify="right")
    for result in results:
        verdict = "[green]ok" if result.passed else "[red]WRONG"
        op, _, case = result.case.partition("/")
        table.add_row(
            op, case.replace("/", " "), f"{result.error:.1e}", f"{result.tolerance_used:.0%}", verdict
        )
    return table


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ABSENT


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty on most distributions
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _check(case: Case) -> SelfTestResult:
    prepared = registry.prepare(case)
    oracle = prepared.oracle(OURS)
    if oracle is None:
        raise RuntimeError(f"case {case.name} has no float64 oracle for {OURS}: it cannot be self-tested")
    torch.manual_seed(CHECK_SEED)  # the oracle's dropout mask is drawn from it
    program = prepared.contestants[OURS]()[0]
    torch.manual_seed(CHECK_SEED)
    check = compare(program.outputs(program.call()), oracle)
    return SelfTestResult(case.name, check.error, check.tolerance_used, check.passed)
