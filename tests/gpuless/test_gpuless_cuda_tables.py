"""The tables of the CUDA C++ kernels: rules are kept, and docs/gpu.md knows every kernel."""

from dataclasses import replace

import pytest

from gpuless import cuda_tables, sass
from gpuless.cuda_tables import Cost, Moved, Problem, Shipped
from gpuless.tables import DOCUMENT, section


@pytest.fixture(scope="module")
def on_an_a100() -> list[Shipped]:
    return list(cuda_tables.shipped(80))


def test_kernels_keep_the_rules(on_an_a100: list[Shipped]) -> None:
    assert [fault for fault in cuda_tables.faults(on_an_a100, []) if "not needed" not in fault] == []


def test_the_document_has_every_kernel(on_an_a100: list[Shipped]) -> None:
    text = DOCUMENT.read_text()
    for each in on_an_a100:
        assert f"`{each.name}`" in section(text, "cuda budgets"), "run `make gpu-report`"
        assert each.cost is None or f"`{each.name}` | sm_80 | {each.cost} |" in section(text, "cuda costs")


def test_what_breaks_a_rule_is_said(on_an_a100: list[Shipped]) -> None:
    gemv = next(each for each in on_an_a100 if each.name.startswith("linear_gemv_kernel"))
    assert gemv.cost is not None
    slow = replace(gemv, cost=replace(gemv.cost, instructions=4.1, lsu=7.1))
    alone = replace(gemv, budget=replace(gemv.budget, occupancy=replace(gemv.budget.occupancy, ctas=1)))
    spilling = replace(gemv, budget=replace(gemv.budget, stack_bytes=8))
    sentences = "\n".join(cuda_tables.faults([slow, alone, spilling], [Moved(Problem(1), 90, 106, 100)]))
    for said in (
        "4.10 instructions",
        "7.10 load/store",
        "has 1 CTAs",
        "stack of 8 bytes",
        "1.060 times",
        "not needed",
    ):
        assert said in sentences


def test_cost_of_a_loop() -> None:
    body = [
        sass.Instruction(opcode)
        for opcode in ("LDS.64", "LDG.E.128", "FMUL", "PRMT", "NOP", "HMMA.16816.F32")
    ]
    assert Cost.of(body, 2, wide_load=8) == Cost(2.5, 0.5, 0.5, 0.5, 20.0)


def test_bitsandbytes_is_read_from_its_wheel() -> None:
    costs = cuda_tables.their_costs()
    assert costs.keys() == cuda_tables.THEIRS.keys()
    assert all(8 < cost.instructions < 11 for cost in costs.values())
