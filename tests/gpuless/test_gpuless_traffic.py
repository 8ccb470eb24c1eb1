"""Bytes: counted by hand where that is possible, and by the emulator where it runs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft_kernels.bench.case import Case
from peft_kernels.bench.cases_adapter import adapter
from peft_kernels.bench.cases_linear import NF4

from gpuless import traffic, traffic_tables
from gpuless.traffic import ACCELERATORS, Accelerator, Step, Traffic, bitsandbytes, eager, ours, seconds

LINEAR = replace(NF4(16, 1024, 256), dtype="bfloat16")
PACKED, SCALES, X, Y = 1024 * 256 // 2, 4 * 1024 * 256 // 64, 2 * 16 * 1024, 2 * 16 * 256
WEIGHT = 2 * 1024 * 256


def total(steps):
    return sum(step.bytes for step in steps)


def test_a_fused_product_moves_what_it_needs():
    found = ours(LINEAR, execute=True)
    assert found.least == PACKED + SCALES + X + Y
    assert found.moved == found.least
    assert found.ratio == 1.0
    assert found.scratch > 0  # partial sums of parts of K
    assert found.moved <= found.given <= 1.1 * found.least
    assert found.steps == (Step(found.moved, 2 * 16 * 1024 * 256),)


def test_a_panel_is_scratch_and_its_product_a_step():
    case = replace(LINEAR, m=512)
    found = ours(case, execute=True)
    x, y = 32 * X, 32 * Y
    assert found.moved == found.given == PACKED + SCALES + x + y
    decoding, product = found.steps
    assert decoding == Step(PACKED + SCALES, 0)
    assert product == Step(x + y, 2 * 512 * 1024 * 256)
    assert found.scratch == 2 * WEIGHT  # written and read


def test_what_launches_are_given_needs_no_emulator():
    large = replace(LINEAR, m=512, k=4096, n=14336)
    found = ours(large, execute=False)
    assert found.moved == found.given > found.least
    assert found.scratch >= 2 * 2 * 4096 * 14336  # panels: the whole weight, in parts of at most 32 MiB


def test_the_launches_of_a_kernel_share_what_they_are_given():
    tensors = {name: torch.ones(4) for name in "xyz"}

    def launch(name, *given):
        return SimpleNamespace(name=name, tensors={each: tensors[each] for each in given})

    launches = [launch("a", "x", "y"), launch("a", "x", "z"), launch("b", "x")]
    assert [len(each) for each in traffic._given(launches, set(), set(), frozenset())] == [2, 1, 1]
    scratch = {tensors["x"].untyped_storage().data_ptr()}
    assert [len(each) for each in traffic._given(launches, scratch, scratch, frozenset())] == [2, 2, 1]


def test_what_kernels_hardly_touch_is_not_given():
    few, many = (Traffic(1, 1, 1, 0, (), {("k", "w"): 0.05, ("k", "x"): share}) for share in (0.1, 0.9))
    assert traffic.untouched([few, None]) == {("k", "w"), ("k", "x")}
    assert traffic.untouched([few, None, many]) == {("k", "w")}
    quantize = Case("nf4", "nf4_quantize", 0, 256, 64, weight="nf4", dtype="bfloat16")
    found = ours(quantize, execute=False, untouched=frozenset({("quantize_kernel", "weight_ptr")}))
    assert found.given == found.least - 2 * 256 * 64


def test_a_quantised_weight_is_a_result():
    found = ours(Case("nf4", "nf4_quantize", 0, 256, 64, weight="nf4", dtype="bfloat16"), execute=False)
    assert (found.moved, found.scratch) == (found.least, 0)


def test_an_op_without_a_kernel_has_no_traffic(monkeypatch):
    monkeypatch.setattr("gpuless.torch_calls.has_launcher", lambda overload: False)
    assert ours(LINEAR, execute=False) is None


def test_eager_reads_and_writes_once_an_op():
    case = adapter(8, 256, 16, "forward", dtype="bfloat16")
    down, relu, up, scaled, added = eager(case)
    h, f, w = 2 * 8 * 256, 2 * 8 * 16, 2 * 256 * 16
    assert down == Step(h + w + 2 * 16 + f, 2 * 8 * 256 * 16)
    assert relu == Step(2 * f, 0)
    assert up == Step(f + w + 2 * 256 + h, 2 * 8 * 256 * 16)
    assert scaled == Step(2 * h, 0)
    assert added == Step(3 * h, 0)


def test_bitsandbytes_by_hand():
    assert total(bitsandbytes(LINEAR)) == PACKED + SCALES + X + Y
    assert total(bitsandbytes(replace(LINEAR, m=65))) == PACKED + SCALES + 2 * WEIGHT + (65 * (X + Y)) // 16
    assert total(bitsandbytes(replace(LINEAR, direction="backward"))) == PACKED + SCALES + 2 * WEIGHT + X + Y
    dequantize = Case("nf4", "nf4_dequantize", 0, 1024, 256, weight="nf4", dtype="bfloat16")
    assert total(bitsandbytes(dequantize)) == PACKED + SCALES + WEIGHT
    # The 8-bit scales decoded to fp32, their offset added in place, and only then the weight
    nested = replace(dequantize, weight="nf4_double")
    assert total(bitsandbytes(nested)) == SCALES // 4 + SCALES + 2 * SCALES + PACKED + SCALES + WEIGHT
    assert bitsandbytes(adapter(8, 256, 16)) is None


def test_the_roofline_by_hand():
    gpu = Accelerator("", 80, bandwidth=1e12, flops=1e14)
    steps = (Step(10**9, 10**9), Step(10**6, 10**12))
    assert seconds(steps, gpu) == pytest.approx(1e-3 + 1e-2)
    assert {each.arch for each in ACCELERATORS} == {80, 89, 90, 120}


def of(moved):
    return {LINEAR: Traffic(least=100, moved=moved, given=moved, scratch=0, steps=())}


def test_too_many_bytes_need_a_reason():
    assert traffic_tables.too_many_bytes(of(110), {}) == []
    (sentence,) = traffic_tables.too_many_bytes(of(111), {})
    assert sentence == f"{LINEAR.name} moves 1.11 times the fewest bytes: no reason is given"
    reasons = {("nf4_linear", "forward"): "because"}
    assert traffic_tables.too_many_bytes(of(111), reasons) == []
    assert "is not needed" in traffic_tables.too_many_bytes(of(110), reasons)[0]
    assert traffic_tables.too_many_bytes({LINEAR: None}, {}) == []


def test_the_table_of_bytes():
    rows = traffic_tables.bytes_table(of(111)).splitlines()
    assert rows[2].startswith(f"| `{LINEAR.name}` | 0 KiB | 1.11 ¹ | 0.00 | ")
    assert rows[-1].startswith("¹ `nf4_lora_linear`, `lora_linear`: ")


def test_every_op_of_the_suite_is_run_and_predicted():
    ops = {case.op for case in traffic_tables.cases()}
    assert {case.op for case in traffic_tables.EXECUTED} == ops


@pytest.mark.gpuless_full
def test_ours_moves_no_more_than_it_should():
    assert traffic_tables.too_many_bytes(traffic_tables.executed_traffic()) == []
