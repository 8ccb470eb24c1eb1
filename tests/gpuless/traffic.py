"""Bytes that an op moves, beside the fewest it could: counted by the emulator, or by what launches are given.

Three counts by one rule, that a kernel reads what it needs once and writes what it makes once:

- of ours, run in the emulator: the distinct bytes that each launch touches, and of torch ops beside them (a
  vendor GEMM) their inputs and outputs;
- of ours on tensors too large to run: every tensor that the launches of a kernel are given, once a pass, but
  for inputs that the kernel hardly touched wherever it was run, such as the weight of one for rare rows;
- of eager PyTorch: inputs and outputs of every op that autograd runs.

What an op makes and uses up itself, such as a panel of a weight, counts apart as scratch: at most 32 MiB,
less than the L2 caches of these GPUs, from which it is read back.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

import torch
from peft_kernels.bench import registry
from peft_kernels.bench.case import Case
from peft_kernels.bench.cases_nf4 import quantized_bytes
from torch.utils._pytree import tree_leaves

from gpuless.driver import Launch, device
from gpuless.launches import build, call
from gpuless.torch_calls import TorchCalls, bytes_of

_ARCH = 80  # on which everything runs in the emulator, products on mma.sync


@dataclass(frozen=True)
class Accelerator:
    """Peaks of a GPU: bytes a second of its memory, FLOP a second of bf16 tensor cores that sum in fp32."""

    name: str
    arch: int
    bandwidth: float
    flops: float


ACCELERATORS = (  # NVIDIA's data sheets and white papers, dense figures
    Accelerator("A100", 80, 2.039e12, 312e12),
    Accelerator("H100", 90, 3.35e12, 989e12),
    Accelerator("L40S", 89, 0.864e12, 362e12),
    Accelerator("RTX 4090", 89, 1.008e12, 165.2e12),
    Accelerator("RTX 5090", 120, 1.792e12, 209.5e12),
)


@dataclass(frozen=True)
class Step:
    """Something that runs alone on a GPU: it takes the longer of its memory traffic and its arithmetic."""

    bytes: int
    flops: int

    def seconds(self, gpu: Accelerator) -> float:
        """By the roofline: predicted, and never reached."""
        return max(self.bytes / gpu.bandwidth, self.flops / gpu.flops)


@dataclass(frozen=True)
class Traffic:
    """What one call of a case moves.

    Attributes:
        least: bytes that the problem needs: every input once a pass, every result once.
        moved: bytes that ours moves, scratch left out.
        given: the most it could be, by the tensors that launches are given.
        scratch: bytes of scratch written and read.
        steps: torch ops one by one, and our launches together.
        shares: of every argument (kernel, name), the part that launches touched.
    """

    least: int
    moved: int
    given: int
    scratch: int
    steps: tuple[Step, ...]
    shares: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Bytes moved over the fewest."""
        return self.moved / self.least


def ours(
    case: Case, execute: bool, arch: int = _ARCH, untouched: frozenset[tuple[str, str]] = frozenset()
) -> Traffic | None:
    """Traffic of ours; None where an op that the case needs has no Triton kernel.

    Args:
        case: the problem.
        execute: run it in the emulator; otherwise `moved` is what launches are given.
        arch: whose plans and code are taken.
        untouched: arguments (kernel, name) that launches hardly touch: as inputs, they do not count as given.
    """
    saved: list[torch.Tensor] = []
    forward_launches = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal forward_launches
        saved.append(tensor)
        forward_launches = len(gpu.launches)  # those so far: a Function saves when its forward is done
        return tensor

    with device(arch, execute=execute, counts=execute) as gpu:
        built = build(case, execute)
        gpu.launches.clear()
        if built is None:
            return None
        prepared, program = built
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            calls = call(program, execute)
        if calls is None:
            return None
    made = {_storage(tensor) for tensor in calls.made}
    kept = _tensors_of(calls.results) + saved
    scratch = made - {_storage(tensor) for tensor in kept}

    def split(tensors: Iterable[torch.Tensor]) -> tuple[int, int]:
        """Bytes that are not scratch, and bytes that are."""
        both = list(tensors)
        used = bytes_of(tensor for tensor in both if _storage(tensor) in scratch)
        return bytes_of(both) - used, used

    passes = gpu.launches[:forward_launches], gpu.launches[forward_launches:]
    given = [split(tensors) for launches in passes for tensors in _given(launches, made, scratch, untouched)]
    touched = [_touched(launch, scratch) for launch in gpu.launches] if execute else given
    shares: dict[tuple[str, str], float] = {}
    for launch in gpu.launches if execute else ():
        for name, tensor in launch.tensors.items():
            part = _count(launch, name) / max(bytes_of([tensor]), 1)
            shares[launch.name, name] = max(part, shares.get((launch.name, name), 0.0))
    beside = [(call, split((*call.read, *call.written))) for call in calls.calls]
    flops = max(prepared.flops - sum(call.flops for call in calls.calls), 0)
    together = Step(sum(main for main, _ in touched), flops)
    return Traffic(
        least=prepared.read_bytes + prepared.write_bytes,
        moved=together.bytes + sum(main for _, (main, _) in beside),
        given=sum(main for main, _ in given) + sum(main for _, (main, _) in beside),
        scratch=sum(used for _, used in touched) + sum(used for _, (_, used) in beside),
        shares=shares,
        steps=(together, *(Step(main, call.flops) for call, (main, _) in beside)),
    )


def untouched(traffic: Iterable[Traffic | None]) -> frozenset[tuple[str, str]]:
    """Arguments (kernel, name) of which no launch touched more than a tenth."""
    most: dict[tuple[str, str], float] = {}
    for each in traffic:
        for argument, share in each.shares.items() if each else ():
            most[argument] = max(share, most.get(argument, 0.0))
    return frozenset(argument for argument, share in most.items() if share <= 0.1)


def _given(
    launches: Sequence[Launch], made: set[int], scratch: set[int], untouched: frozenset[tuple[str, str]]
) -> Iterator[list[torch.Tensor]]:
    """Tensors that launches are given: what several of one kernel are given, but for scratch, they share."""
    seen: set[tuple[str, int]] = set()
    for launch in launches:
        keys = {
            (launch.name, each.data_ptr()): each
            for name, each in launch.tensors.items()
            if _storage(each) in made or (launch.name, name) not in untouched
        }
        yield [each for key, each in keys.items() if key not in seen or _storage(each) in scratch]
        seen |= set(keys)


def _tensors_of(results: Any) -> list[torch.Tensor]:
    """Those of a result, which may be one of our dataclasses."""
    leaves = tree_leaves(results)
    fields = [
        getattr(leaf, field.name) for leaf in leaves if is_dataclass(leaf) for field in dataclass_fields(leaf)
    ]
    return [value for value in (*leaves, *fields) if isinstance(value, torch.Tensor)]


def _touched(launch: Launch, scratch: set[int]) -> tuple[int, int]:
    """Distinct bytes read, and written, in what is not scratch, and in what is."""
    main = used = 0
    for name, tensor in launch.tensors.items():
        count = _count(launch, name)
        if _storage(tensor) in scratch:
            used += count
        else:
            main += count
    return main, used


def _count(launch: Launch, name: str) -> int:
    """Distinct bytes of an argument that a launch read, and that it wrote."""
    return launch.result.bytes_read.get(name, 0) + launch.result.bytes_written.get(name, 0)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def eager(case: Case) -> tuple[Step, ...]:
    """What eager PyTorch runs, op by op."""
    with TorchCalls(execute=False, compute_up_to=4096):
        (program, *_) = registry.prepare(case).contestants["eager"]()
    with TorchCalls(execute=False) as calls:
        program.call()
    return tuple(Step(call.read_bytes + call.write_bytes, call.flops) for call in calls.calls)


_BITSANDBYTES_FUSES_UP_TO = 64  # tokens: its `gemm_4bit` on an H100; elsewhere it is 32 to 256


def bitsandbytes(case: Case) -> tuple[Step, ...] | None:
    """What bitsandbytes 0.50 runs on CUDA, op by op; None where it has no such op.

    Quantising and dequantising are one kernel. A product of few tokens decodes on the way (`gemv_4bit`,
    `gemm_4bit`); of more, and for every gradient, the weight is dequantised to memory for a vendor GEMM.
    Doubly quantised scales are first decoded to fp32, and their offset added in a second kernel.
    """
    weight, dense = quantized_bytes(case), case.n * case.k * case.element_size
    scales = 4 * (case.n * case.k // 64)
    steps = [] if case.weight == "nf4" else [Step(scales // 4 + scales, 0), Step(2 * scales, 0)]
    packed = Step(case.n * case.k // 2 + scales, 0).bytes
    x, y = (size * case.m * case.element_size for size in (case.k, case.n))
    product = 2 * case.m * case.n * case.k
    if case.family == "nf4":
        return (*steps, Step((weight if not steps else packed) + dense, 0))
    if case.op != "nf4_linear":
        return None
    if case.direction == "forward" and case.m <= _BITSANDBYTES_FUSES_UP_TO:
        return (*steps, Step(packed + x + y, product))
    return (*steps, Step(packed + dense, 0), Step(dense + x + y, product))


def seconds(steps: Iterable[Step], gpu: Accelerator) -> float:
    """Predicted time of steps that run one after the other."""
    return sum(step.seconds(gpu) for step in steps)
