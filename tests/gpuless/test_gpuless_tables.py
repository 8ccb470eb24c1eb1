"""The report: cheap checks that docs/gpu.md is current, and the whole of it in the slow part."""

import dataclasses

import pytest
import torch

from gpuless import tables, wavefront_tables
from gpuless.launches import (
    WITHOUT_TRITON,
    Configuration,
    cases,
    configuration,
    configurations,
    launches,
    missing,
)
from gpuless.occupancy import Occupancy
from gpuless.sass import Counter, Mix
from gpuless.static import TARGETS, Budget
from gpuless.torch_calls import TorchCalls, bytes_of

GOOD = Budget(
    name="_product_kernel", target="sm_80", threads=128, registers=96, scalar_registers=None, spill_bytes=0,
    stack_bytes=0, local_instructions=0, shared_bytes=33792, occupancy=Occupancy(4, 0.25, "shared memory"),
    loop=Mix(Counter(tensor=32), Counter(HMMA=32), True),
)  # fmt: skip
PRODUCT = Configuration("product_kernel", (("BM", "64"),), 4, 3)


def of(**changes):
    return {PRODUCT: {80: dataclasses.replace(GOOD, **changes)}}


def test_every_op_has_a_kernel_or_a_reason():
    assert missing() == []
    ops = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("peft_kernels::")
    }
    assert set(WITHOUT_TRITON) <= ops


def test_the_document_lists_the_configurations_that_are_shipped():
    assert tables.documented(tables.DOCUMENT.read_text()) == tables.shipped()


@pytest.mark.gpuless_full
def test_the_document_is_what_the_code_is():
    assert tables.main(["--check"]) == 0


@pytest.mark.parametrize("arch", [90, "gfx942"])
def test_configurations_need_no_compiler(arch):
    for case in (case for case in cases() if case.family in ("nf4", "dropout")):
        found = configurations(case, arch)
        assert found
        assert found == [configuration(launch) for launch in launches(case, arch)]


def test_a_good_kernel_has_no_fault():
    assert tables.faults(of(), {}) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spill_bytes": 16}, "spills 16 bytes"),
        ({"stack_bytes": 8}, "a stack of 8"),
        ({"local_instructions": 2}, "spills 0 bytes"),
        ({"occupancy": Occupancy(1, 0.06, "registers")}, "has 1 CTAs a multiprocessor (registers)"),
    ],
)
def test_a_broken_rule_needs_a_reason(changes, words):
    (sentence,) = tables.faults(of(**changes), {})
    assert sentence.startswith("product_kernel(BM=64), 4 warps, 3 stages on sm_80 ")
    assert words in sentence
    assert tables.faults(of(**changes), {("product_kernel", 80): "because"}) == []
    assert tables.faults(of(**changes), {("product_kernel", 90): "because"})[0] == sentence


def test_a_reason_that_is_not_needed_is_a_fault():
    (sentence,) = tables.faults(of(), {("product_kernel", 80): "because"})
    assert "is not needed" in sentence


def test_the_table_says_what_a_kernel_takes():
    table = tables.budget_table(of(), targets=(80, "gfx942"))
    assert table.splitlines()[2] == (
        "| `product_kernel(BM=64), 4 warps, 3 stages` | 96 · 33 · 4 (25%) · 32 | – |"
    )
    assert "**spill 16 B, stack 0 B**" in tables.budget_table(of(spill_bytes=16), targets=(80,))


def test_the_mix_of_a_hot_loop():
    text = tables.mix_table(of(loop=Mix(Counter(alu=5, tensor=2), Counter(), True)), targets=(80, 90))
    assert text.splitlines() == [str(PRODUCT), "  sm_80: loop of 7: alu 5, tensor 2"]


def test_the_document_is_rewritten_between_its_markers():
    text = "before\n<!-- budgets: x -->\nold\n<!-- end of budgets -->\nafter\n"
    new = tables.with_section(text, "budgets", tables.budget_table(of(), (80, 90)))
    assert new.startswith("before\n<!-- budgets: x -->\n| kernel")
    assert new.endswith("\n<!-- end of budgets -->\nafter\n")
    assert tables.documented(new) == {str(PRODUCT): {"sm_80"}}
    with pytest.raises(ValueError, match="must have the markers of budgets"):
        tables.section("nothing", "budgets")


def test_one_entry_for_the_specialisations_of_a_configuration():
    few, many = (dataclasses.replace(GOOD, occupancy=Occupancy(n, 0.1, "registers")) for n in (2, 5))
    assert max([many, few], key=tables._demand) is few
    assert max([few, dataclasses.replace(many, spill_bytes=4)], key=tables._demand).spill_bytes == 4


def test_calls_without_values_have_the_right_shapes_and_bytes():
    with TorchCalls(execute=False) as calls:
        x = torch.randn(300_000, 4096, dtype=torch.bfloat16)  # 2.4 GB that nobody touches
        y = (x[:8] @ torch.randn(4096, 16, dtype=torch.bfloat16)).float()
        y.add_(1)
    assert (y.shape, y.dtype) == ((8, 16), torch.float32)
    product, cast, added = calls.calls[-3:]
    assert (product.flops, cast.flops) == (2 * 8 * 4096 * 16, 0)
    assert (product.name, product.read_bytes, product.write_bytes) == ("mm", 2 * (8 + 16) * 4096, 2 * 8 * 16)
    assert (cast.read_bytes, cast.write_bytes) == (2 * 8 * 16, 4 * 8 * 16)
    assert (added.read_bytes, added.write_bytes) == (4 * 8 * 16, 4 * 8 * 16)


def test_calls_may_be_executed():
    with TorchCalls(execute=True) as calls:
        assert torch.ones(3, 4).sum().item() == 12
    assert [call.name for call in calls.calls] == ["ones", "sum", "_local_scalar_dense"]


def test_a_launcher_must_not_wait_for_a_value():
    with TorchCalls(execute=False), pytest.raises(RuntimeError, match=r"item\(\)"):
        torch.ones(3, 4).sum().item()


def test_an_expanded_dimension_is_in_memory_once():
    assert bytes_of([torch.ones(4, 1).expand(4, 100), torch.ones(2, 3)]) == 4 * (4 + 6)
    assert bytes_of([torch.ones(0, 4)]) == 0


def test_targets_are_those_of_the_issue():
    assert TARGETS == (80, 86, 89, 90, 100, 120, "gfx90a", "gfx942", "gfx1100")


def test_transactions_beyond_the_fewest_need_a_reason():
    of_kernel = wavefront_tables.Transactions(
        2, {"global": 256, "shared": 512}, {"global": 8, "shared": 6}, {"global": 8, "shared": 4}
    )
    rows = {"product_kernel": {80: of_kernel}}
    (sentence,) = wavefront_tables.too_many(rows, {})
    assert sentence == "product_kernel makes 1.50 times the fewest shared transactions: no reason is given"
    assert wavefront_tables.too_many(rows, {("product_kernel", "shared"): "a reason"}) == []
    (sentence,) = wavefront_tables.too_many(
        rows, dict.fromkeys([("product_kernel", s) for s in ("shared", "global")], "")
    )
    assert sentence.endswith("[('product_kernel', 'global')] is not needed: take it out")
    assert "| `product_kernel` | 128 | 256 | 1.00 | – | 1.50 | – |" in wavefront_tables.table(rows)
