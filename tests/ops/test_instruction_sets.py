"""Every instruction set that this machine has passes the native tests, not only the best one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_kernels.core.library import native_library

FILES = sorted(str(path) for path in Path(__file__).parent.glob("*/test_*.py"))  # not this one
OTHERS = sorted({*native_library().capabilities_found} - {native_library().capability})
PROBE = "from peft_kernels.core.library import native_library; print(native_library().capability)"


@pytest.mark.slow
@pytest.mark.skipif(not native_library().loaded, reason="native library not loaded")
@pytest.mark.parametrize("capability", OTHERS)
def test_ops_pass_on(capability: str) -> None:
    environment = {**os.environ, "PEFT_KERNELS_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    probe = [sys.executable, "-c", PROBE]
    assert subprocess.check_output(probe, env=environment, text=True).strip() == capability
    tests = [sys.executable, "-m", "pytest", "-q", "-k", "native", "-p", "no:cacheprovider", *FILES]
    result = subprocess.run(tests, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
