"""How much memory training needs, counted exactly, allocation by allocation.

The size of the process would tell less: it mixes both models, the libraries, and memory that was freed but is
kept for later by the C library.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from peft_kernels.bench.memory import saved_by
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], None]) -> int:
    """The most bytes that `run` held at one time through torch's allocator, above those held when it began.

    Temporaries inside operators count. What native code allocates past torch does not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: float(e["ts"])):
        held += event["args"]["Bytes"]  # negative where memory is given back
        peak = max(peak, held)
    return peak


def saved_for_backward_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that `forward` keeps alive for the backward pass, not counting the model's own tensors."""
    saved: int = saved_by(forward, (*model.parameters(), *model.buffers()))
    return saved
