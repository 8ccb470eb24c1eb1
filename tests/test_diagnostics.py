"""`python -m peft_kernels`: what it reports is what is, and a wrong kernel does not pass its self-test."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from rich.console import Console

from peft_kernels import __main__ as command
from peft_kernels import __version__, diagnostics
from peft_kernels.core.library import BUILD_FAILURE_NOTE, CUDA_FAILURE_NOTE, NativeLibrary, native_library
from peft_kernels.core.text import as_text
from peft_kernels.diagnostics import environment, machine, text

OPS = (
    *("adapted_linear", "adapted_linear_backward", "bottleneck_adapter", "bottleneck_adapter_backward"),
    "dora_norm",
    *("nf4_dequantize", "nf4_linear_int8", "nf4_quantize", "philox_dropout"),
)
MISSING = NativeLibrary(Path("/nowhere/_native.so"), False, "/nowhere/_native.so does not exist", None, ())


def run_command(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    status = command.main(list(options))
    return status, capsys.readouterr().out


def test_runs_as_a_program_and_passes() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "peft_kernels", "--json"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["versions"]["peft_kernels"] == __version__
    assert data["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert tuple(data["backends"]) == OPS
    assert all(result["passed"] for result in data["self-test"])
    assert {"name", "level", "what", "why", "remedy", "gain"} == set().union(*data["advice"])


def test_report_names_the_library_and_the_kernels_in_use() -> None:
    native = native_library()
    inventory = diagnostics.inventory()
    if native.loaded:
        assert inventory["native library"]["loaded from"] == str(native.path)
        assert inventory["hardware"]["instruction set used"] == native.capability
        assert set(inventory["backends"].values()) == {f"cpu (C++ {native.capability}) for cpu tensors"}
    else:
        assert inventory["native library"]["NOT LOADED"] == native.reason
        assert set(inventory["backends"].values()) == {"reference for cpu tensors"}


def test_report_names_the_gpus_that_the_library_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels_for(*architectures: str) -> str:
        record = NativeLibrary(Path("_native.so"), True, None, "avx2", ("avx2",), architectures)
        monkeypatch.setattr(environment, "native_library", lambda: record)
        return environment.native()["CUDA C++ kernels for"]

    assert kernels_for("80", "90a") == "sm_80, sm_90a"
    assert kernels_for() == "no GPU: built without them"


def test_missing_library_is_explained_with_reason_remedy_and_build_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / BUILD_FAILURE_NOTE).write_text("g++: fatal error: no input files\n")
    missing = dataclasses.replace(MISSING, path=tmp_path / "_native.so")
    for module in (environment, machine):
        monkeypatch.setattr(module, "native_library", lambda: missing)
    section = environment.native()
    assert section == {"NOT LOADED": MISSING.reason, "when it was built": "g++: fatal error: no input files"}
    _, shown = run_command(capsys, "--no-self-test")
    assert "NOT LOADED" in shown
    assert "`make build`" in " ".join(shown.split())


def test_cuda_kernels_that_failed_to_build_are_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = NativeLibrary(tmp_path / "_native.so", True, None, "avx2", ("avx2",))
    monkeypatch.setattr(environment, "native_library", lambda: record)
    assert "when it was built" not in environment.native()
    (tmp_path / CUDA_FAILURE_NOTE).write_text("nvcc fatal: unsupported host compiler\n")
    assert environment.native()["when it was built"] == "nvcc fatal: unsupported host compiler"


def test_self_test_covers_every_family_in_every_dtype() -> None:
    cases = [result.case for result in diagnostics.self_test()]
    linear = ("nf4_linear", "nf4_lora_linear", "nf4_linear_int8")
    ia3 = ("ia3_linear", "ia3_linear_feedforward", "ia3_linear_dl")
    for op in ("nf4_quantize", "nf4_dequantize", *linear, *ia3, "philox_dropout", "bottleneck_adapter"):
        for dtype in ("float32", "bfloat16", "float16"):
            assert any(case.startswith(f"{op}/") and dtype in case.split("/") for case in cases), (op, dtype)


@pytest.mark.parametrize("relative_error", [1e-4, float("nan")])
def test_a_wrong_kernel_fails_the_self_test(
    relative_error: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error far below what anyone would notice in a loss curve, in one op only."""
    from peft_kernels import functional

    correct = functional.nf4_linear

    def slightly_wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        return correct(*args, **kwargs) * (1 + relative_error)

    monkeypatch.setattr(functional, "nf4_linear", slightly_wrong)
    status, shown = run_command(capsys, "--json")
    failed = [result["case"] for result in json.loads(shown)["self-test"] if not result["passed"]]
    assert status == 1
    assert failed
    assert all(case.startswith(("nf4_linear/", "nf4_linear_int8/")) for case in failed)


def test_self_test_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    diagnostics.self_test()
    assert torch.equal(before, torch.get_rng_state())


def test_unknown_instruction_set_is_said_and_nothing_crashes() -> None:
    environment = {**os.environ, "PEFT_KERNELS_CPU_CAPABILITY": "sse", "COLUMNS": "200"}
    command = [sys.executable, "-m", "peft_kernels"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "PEFT_KERNELS_CPU_CAPABILITY=sse names no instruction set" in result.stdout
    assert "Traceback" not in result.stderr


def test_text_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, shown = run_command(capsys)
    assert status == 0
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    whole = " ".join(shown.split())
    assert all(op in whole for op in OPS)
    assert re.search(r"self-test: (\d+) of \1 passed", whole)
    for title in ("versions", "hardware", "native library", "backends", "advice: "):
        assert re.search(f"^{title}", shown, re.MULTILINE), title


def test_what_is_longer_than_a_line_is_folded_and_not_cut_off() -> None:
    """The usual path of a library is longer than 80 columns have place for."""
    path = "/home/somebody/miniconda3/envs/finetuning/lib/python3.12/site-packages/peft_kernels/_native.so"
    remedy = f"`pip install --force-reinstall git+file://{path}`"
    advice = diagnostics.Advice("name", "slower", f"{path} is old", f"{path} it is", remedy, path)
    failed = diagnostics.SelfTestResult("nf4_linear_feedforward/both/M3/float32", 1e9, 3e12, False)
    views = [
        text.inventory_view({"native library": {"loaded from": path}}),
        text.advice_view([advice]),
        text.self_test_view([failed, dataclasses.replace(failed, case=failed.case.replace("32", "16"))]),
    ]
    console = Console(width=60, file=io.StringIO())
    with console.capture() as captured:
        console.print(*views)
    shown = captured.get()
    assert "…" not in shown
    assert shown.replace("\n", "").replace(" ", "").count(path) == 5


def test_hints_are_counted_apart() -> None:
    def headline(*levels: Literal["problem", "slower", "hint"]) -> str:
        advice = [diagnostics.Advice("name", level, "", "", "") for level in levels]
        return as_text(text.advice_view(advice)).splitlines()[0]

    assert headline() == "advice: nothing to change"
    assert headline("hint") == "advice: nothing to change, 1 hint for some uses only"
    assert headline("problem", "slower", "hint", "hint") == "advice: 2 to follow, 2 hints for some uses only"


def test_a_report_for_an_issue_says_all_but_who_you_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(native_library().path.parent.parent))
    failed = diagnostics.SelfTestResult("nf4_linear/forward/M3/float32", 1.0, 3.5, False)
    monkeypatch.setattr(diagnostics, "self_test", lambda: [failed])
    status, shown = run_command(capsys, "--issue")
    assert status == 1
    assert f"peft_kernels {__version__}**, self-test: 0 of 1 passed" in shown
    assert "- nf4_linear/forward/M3/float32: error 1.0e+00, 3.5 times what is allowed" in shown
    assert "~/peft_kernels/_native.so" in shown
    assert os.environ["HOME"] not in shown
    assert shown.count("```") == 2
    status, shown = run_command(capsys, "--issue", "--no-self-test")
    assert status == 0
    assert "self-test: not asked for" in shown


def test_a_self_test_that_was_not_asked_for_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = run_command(capsys, "--json", "--no-self-test")
    assert (status, json.loads(shown)["self-test"]) == (0, None)
