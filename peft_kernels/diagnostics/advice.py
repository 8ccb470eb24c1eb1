"""What would be faster, or work at all, with what installed or set: rules over the facts of `machine.py`.

A rule is a pure function of the facts. It speaks only where what it says is so on this machine, and claims a
gain only where there is a measurement; docs/diagnostics.md has each of them with its command.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from peft_kernels.bench.worker import TUNED_ALLOCATOR
from peft_kernels.core.library import CUDA_FAILURE_NOTE
from peft_kernels.diagnostics.machine import Machine


@dataclass(frozen=True)
class Advice:
    """One thing to change.

    Attributes:
        name: what it goes by, for programs: "few-threads".
        level: "problem": something is broken, or runs on the slow reference; "slower": all is right, but
            slower than it could be here; "hint": it helps some uses only, as `why` says.
        what: what was found here.
        why: why that matters.
        remedy: what to do about it; commands, as they are to be typed, stand in backquotes.
        gain: what that brings, as measured, and where it is documented; None where nobody has measured.
    """

    name: str
    level: Literal["problem", "slower", "hint"]
    what: str
    why: str
    remedy: str
    gain: str | None = None


def advise(machine: Machine) -> list[Advice]:
    """What to change on this machine, problems first; nothing where all is well."""
    found = [advice for rule in RULES if (advice := rule(machine))]
    return sorted(found, key=lambda advice: ("problem", "slower", "hint").index(advice.level))


def native_library_missing(machine: Machine) -> Advice | None:
    """Everything runs on the reference."""
    if machine.native.loaded:
        return None
    return Advice(
        "native-library-missing",
        "problem",
        f"the native library is not loaded: {machine.native.reason}",
        "every operation on the CPU runs on the PyTorch reference, which is there to be right, not fast",
        f"with a C++20 compiler (Debian: `apt-get install g++`): `{machine.install}`",
        "against plain PyTorch 130 times at 1 token, 6.8 times in a QLoRA step of 64 tokens "
        "(docs/diagnostics.md)",
    )


def capability_unknown(machine: Machine) -> Advice | None:
    """Native kernels refuse to run."""
    if not machine.native.loaded or machine.native.capability is not None:
        return None
    return Advice(
        "capability-unknown",
        "problem",
        f"PEFT_KERNELS_CPU_CAPABILITY={machine.environment.get('PEFT_KERNELS_CPU_CAPABILITY')} names no "
        f"instruction set of this machine: {', '.join(machine.native.capabilities_found)}",
        "every call of a native kernel fails",
        "`unset PEFT_KERNELS_CPU_CAPABILITY`",
    )


def capability_capped(machine: Machine) -> Advice | None:
    """A lower instruction set than the best is forced."""
    native = machine.native
    if native.capability is None or native.capability == native.capabilities_found[-1]:
        return None
    measured = {
        "portable": "21 times at 1 token, 4.7 times in a QLoRA step of 64 tokens",
        "avx2": "3.0 times at 1 token, 1.8 times in a QLoRA step of 64 tokens",
    }
    best = native.capabilities_found[-1]
    gain = measured.get(native.capability) if best.startswith("avx512") else None
    return Advice(
        "capability-capped",
        "slower",
        f"PEFT_KERNELS_CPU_CAPABILITY={native.capability} keeps this machine's {best} from being used",
        "a better set computes more numbers at a time, or has instructions for bf16 and int8 products",
        "`unset PEFT_KERNELS_CPU_CAPABILITY`",
        gain and f"{gain}, from {native.capability} to avx512_bf16, fp32 (docs/diagnostics.md)",
    )


def gpu_without_cuda_torch(machine: Machine) -> Advice | None:
    """The driver has a GPU, and torch is built without CUDA."""
    if not machine.system_gpus or machine.torch_cuda:
        return None
    return Advice(
        "gpu-without-cuda-torch",
        "slower",
        f"nvidia-smi lists {', '.join(machine.system_gpus)}, but this torch is built without CUDA",
        "nothing runs on the GPU",
        "`pip install --force-reinstall torch` from PyPI, which on Linux is a CUDA build (several GB), then "
        "install peft_kernels again",
    )


def gpu_out_of_reach(machine: Machine) -> Advice | None:
    """The driver has a GPU, torch is built for CUDA, and sees none."""
    if not machine.system_gpus or not machine.torch_cuda:
        return None
    hidden = machine.environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return Advice(
        "gpu-out-of-reach",
        "slower",
        f"nvidia-smi lists {', '.join(machine.system_gpus)}, but torch (for CUDA {machine.torch_cuda}) sees "
        "no GPU" + ("; CUDA_VISIBLE_DEVICES hides it" if hidden else ""),
        "nothing runs on the GPU",
        "`unset CUDA_VISIBLE_DEVICES`"
        if hidden
        else "`python -c 'import torch; torch.cuda.init()'` says why; most often the driver is older than "
        f"CUDA {machine.torch_cuda}: update it, or install a torch for an older CUDA",
    )


def triton_missing(machine: Machine) -> Advice | None:
    """A GPU, and no Triton, or one that is too old."""
    requirement = _requirement(machine, "triton")
    version = machine.libraries.get("triton")
    if not machine.torch_gpus or requirement is None:
        return None
    if machine.triton_found if version is None else _is_new_enough(version, requirement):
        return None
    return Advice(
        "triton-missing",
        "problem",
        f"Triton is {'not installed' if version is None else f'{version}'}, and {requirement} is needed "
        f"for {machine.torch_gpus[0]}",
        "operations on the GPU that have no CUDA C++ kernel run on the PyTorch reference, or fail",
        f"`pip install '{requirement}'`",
    )


def triton_interpreted(machine: Machine) -> Advice | None:
    """Triton's own emulation is switched on beside a GPU."""
    if not machine.torch_gpus or machine.environment.get("TRITON_INTERPRET") != "1":
        return None
    return Advice(
        "triton-interpreted",
        "slower",
        "TRITON_INTERPRET=1 is set",
        "Triton kernels are interpreted line by line in Python instead of running on the GPU",
        "`unset TRITON_INTERPRET`",
    )


def cuda_kernels_missing(machine: Machine) -> Advice | None:
    """An NVIDIA GPU that Triton serves alone, where CUDA C++ kernels could serve it too."""
    served = machine.triton_refuses or machine.cuda_kernels_run
    if not machine.torch_gpus or not machine.torch_cuda or served or not machine.native.loaded:
        return None
    if machine.native.cuda_architectures:
        there = ", ".join(f"sm_{arch}" for arch in machine.native.cuda_architectures)
        what = f"the CUDA C++ kernels are built for {there}, and have no code for {machine.torch_gpus[0]}"
        remedy = f"`unset PEFT_KERNELS_CUDA_ARCHS`, then `{machine.install}`"
    else:
        what = f"the native library is built without CUDA C++ kernels, and there is {machine.torch_gpus[0]}"
        nvcc = "nvcc (12.4 or newer; 12.8 for sm_100 and sm_120)"
        remedy = f"with {nvcc} on PATH: `PEFT_KERNELS_CUDA=1 {machine.install}`"
        if machine.native.path.with_name(CUDA_FAILURE_NOTE).is_file():
            what += "; nvcc failed, see above"
    return Advice(
        "cuda-kernels-missing",
        "slower",
        what,
        "products of few tokens with a 4-bit weight run on Triton's kernels, which are correct, and "
        "predicted to be slower",
        remedy,
        "predicted, never measured: docs/gpu.md",
    )


def few_threads(machine: Machine) -> Advice | None:
    """OMP_NUM_THREADS leaves processors idle; torchrun and some schedulers set it to 1."""
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    name = next((name for name in variables if machine.environment.get(name) == str(machine.threads)), None)
    cores = min(machine.processors, machine.cores or machine.processors)
    if name is None or machine.threads >= cores:
        return None
    return Advice(
        "few-threads",
        "slower",
        f"{name}={machine.threads}, and this process may use {cores} cores",
        "torch, and our kernels with it, use no more threads than that (torchrun sets 1 where it is not set)",
        f"`export {name}={cores}`; of several processes on one machine, give each its share",
        "2 threads instead of 1: bottleneck adapters of 512 tokens 2.0 times forward, 1.8 times with "
        "backward (docs/cpu.md)",
    )


def too_many_threads(machine: Machine) -> Advice | None:
    """More threads than processors: they wait for one another."""
    if machine.threads <= machine.processors:
        return None
    return Advice(
        "too-many-threads",
        "slower",
        f"torch uses {machine.threads} threads, and this process may use {machine.processors} processors "
        "(its affinity, and its cgroup's quota)",
        "every parallel region ends when its last thread has had its turn, and threads that wait take "
        "processors from those that work",
        f"`export OMP_NUM_THREADS={machine.processors}`, or `torch.set_num_threads({machine.processors})`",
    )


def threads_share_cores(machine: Machine) -> Advice | None:
    """Two threads to a core: the arithmetic units are shared."""
    if not machine.cores or not machine.cores < machine.threads <= machine.processors:
        return None
    return Advice(
        "threads-share-cores",
        "hint",
        f"torch uses {machine.threads} threads on {machine.cores} physical cores",
        "two threads of a core share its arithmetic units, which large products fill with one; time both",
        f"`export OMP_NUM_THREADS={machine.cores}`",
    )


def two_openmp_runtimes(machine: Machine) -> Advice | None:
    """Two thread pools in one process."""
    if len(machine.openmp) < 2:
        return None
    return Advice(
        "two-openmp-runtimes",
        "hint",
        f"{len(machine.openmp)} OpenMP runtimes are loaded: {', '.join(machine.openmp)}",
        "each has threads of its own; where two take turns, those of one spin for a while after their work "
        "and take processors from the other's",
        "install torch and what brought the others from one source (all by pip, or all from conda-forge); "
        "until then `export OMP_WAIT_POLICY=PASSIVE` makes idle threads sleep",
    )


def library_too_old(machine: Machine) -> Advice | None:
    """A library whose layers are replaced is older than we know it."""
    wanted = [
        (requirement, machine.libraries[requirement.name])
        for extra in ("peft", "adapters")
        for requirement in machine.requirements.get(extra, ())
        if requirement.name in machine.libraries
        and not _is_new_enough(machine.libraries[requirement.name], requirement)
    ]
    if not wanted:
        return None
    found = ", ".join(f"{requirement.name} is {version}" for requirement, version in wanted)
    return Advice(
        "library-too-old",
        "problem",
        f"{found}: older than peft_kernels is made for",
        "`replace_layers` may not know its layers, and leaves what it does not know as it is",
        f"`pip install {' '.join(_quoted(requirement) for requirement, _ in wanted)}`",
    )


def library_missing(machine: Machine) -> Advice | None:
    """A library whose layers could be replaced is not there."""
    wanted = [
        requirement
        for extra in ("peft", "adapters")
        for requirement in machine.requirements.get(extra, ())
        if requirement.name not in machine.libraries
    ]
    if not wanted:
        return None
    return Advice(
        "library-missing",
        "hint",
        f"not installed: {', '.join(requirement.name for requirement in wanted)}",
        "only models that are made with them need them; `replace_layers` serves their layers",
        f"`pip install {' '.join(map(_quoted, wanted))}`",
    )


def default_allocator(machine: Machine) -> Advice | None:
    """glibc gives large blocks back at once, and stock 4-bit layers ask for them at every call."""
    tuned = any(name.startswith("MALLOC_") for name in machine.environment)
    tuned |= "glibc.malloc" in machine.environment.get("GLIBC_TUNABLES", "")
    if machine.allocator != "glibc" or tuned or machine.torch_gpus or "bitsandbytes" not in machine.libraries:
        return None
    settings = " ".join(f"{name}={value}" for name, value in TUNED_ALLOCATOR.items())
    return Advice(
        "default-allocator",
        "hint",
        "glibc's allocator is at its defaults, and bitsandbytes is installed",
        "a 4-bit layer on the CPU that stays stock (`pk.explain` says which) dequantises its whole weight "
        "into fresh pages at every call; fused layers do not, and gain nothing",
        f"`export {settings}` before Python starts; freed memory then stays with the process",
        "bitsandbytes' own layers 3.6 times at 1 token, PEFT's QLoRA step of 64 tokens 1.4 times "
        "(docs/diagnostics.md)",
    )


Rule = Callable[[Machine], Advice | None]
RULES: tuple[Rule, ...] = (
    native_library_missing,
    capability_unknown,
    library_too_old,
    triton_missing,
    gpu_without_cuda_torch,
    gpu_out_of_reach,
    triton_interpreted,
    cuda_kernels_missing,
    capability_capped,
    few_threads,
    too_many_threads,
    two_openmp_runtimes,
    threads_share_cores,
    default_allocator,
    library_missing,
)


def _requirement(machine: Machine, name: str) -> Requirement | None:
    for group in machine.requirements.values():
        for requirement in group:
            if requirement.name == name:
                return requirement
    return None


def _is_new_enough(version: str, requirement: Requirement) -> bool:
    return requirement.specifier.contains(Version(version), prereleases=True)


def _quoted(requirement: Requirement) -> str:
    return f"'{requirement.name}{requirement.specifier}'"
