import signal
import sys
from pathlib import Path

import pytest
from peft_kernels.bench.worker import Worker


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_ignores_ctrl_c_while_it_still_imports():
    ours = signal.getsignal(signal.SIGINT)  # in the background of a shell it is SIG_IGN
    worker = Worker({})
    process = worker._process
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        (ignored,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:"))
        assert int(ignored, 16) >> (signal.SIGINT - 1) & 1
        assert signal.getsignal(signal.SIGINT) is ours
    finally:
        process.kill()
        worker.close()
