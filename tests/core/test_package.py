"""The public face of the package."""

import subprocess
import sys

import peft_kernels as pk


def test_public_names_exist() -> None:
    for name in pk.__all__:
        assert hasattr(pk, name)
    for name in pk.functional.__all__:
        assert getattr(pk.functional, name).__doc__


def test_import_brings_in_no_optional_library() -> None:
    code = (
        "import sys, peft_kernels; print([m for m in "
        "('bitsandbytes', 'peft', 'transformers', 'triton', 'torch._dynamo') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
