import signal
import sys
from pathlib import Path

import pytest
from peft_kernels.bench.worker import Worker


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_ignores_ctrl_c_while_it_still_imports():
    worker, handler = Worker({}), signal.getsignal(signal.SIGINT)
    process = worker._process
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        (ignored,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:"))
        assert int(ignored, 16) >> (signal.SIGINT - 1) & 1
        assert handler is signal.default_int_handler  # ours still ends by it
    finally:
        process.kill()
        worker.close()
