"""The suite `gpu`: production cases are built where no GPU is, on `meta` and under `TorchCalls`."""

import dataclasses

import pytest
import torch
from peft_kernels.bench import baselines
from peft_kernels.bench.case import GPU_BASELINES, OURS, Unavailable
from peft_kernels.bench.machine import weight_copies
from peft_kernels.bench.registry import FAMILIES, prepare, select
from peft_kernels.bench.registry import baselines as baselines_of
from torch.utils._pytree import tree_leaves


def test_every_family_is_in_the_suite_and_has_something_to_compare_with():
    cases = select("gpu")
    assert {case.family for case in cases} == set(FAMILIES) - {"int8"}  # which is for the CPU
    assert {case.dtype for case in cases} == {"bfloat16"}
    compared = {name for case in cases for name in baselines_of(case)}
    assert compared == {"eager", "compile", "bitsandbytes", "peft", "adapters", "dense", *GPU_BASELINES}
    compiled = [case for case in cases if "compile" in baselines_of(case)]
    assert 1 <= len(compiled) <= 20  # tens of seconds each: the suite has ten minutes


@pytest.mark.parametrize(
    "case", [case for case in select("gpu") if case.family != "model"], ids=lambda case: case.name
)
def test_production_cases_are_built_on_the_default_device(case):
    """As they will be on a GPU; on `meta` nothing is allocated, and what stayed on the CPU shows."""
    with torch.device("meta"):
        prepared = prepare(case)
        assert prepared.copies == 1  # the flush does what copies are for
        if case.family == "dora" and case.direction == "forward" and case.op == "dora_linear":
            return  # a layer in eval mode, whose builder looks at a weight's table of codes
        (ours,) = prepared.contestants[OURS]()
        (eager,) = prepared.contestants["eager"]()
        for program in (ours, eager):
            results = program.call()
            assert {each.device.type for each in tree_leaves(results)} == {"meta"}


@pytest.mark.filterwarnings("default")  # of the libraries compared with
@pytest.mark.parametrize("case", select("gpu"), ids=lambda case: case.name)
def test_every_baseline_of_production_cases_can_be_built(case, monkeypatch):
    pytest.importorskip("triton")
    from gpuless.torch_calls import TorchCalls

    # torch.compile has no part in the mode below
    monkeypatch.setattr(baselines, "compiled", lambda function: function)
    with TorchCalls(execute=False, compute_up_to=4096):
        prepared = prepare(case)
        for name in baselines_of(case):
            if name in GPU_BASELINES:
                with pytest.raises(Unavailable):
                    prepared.contestants[name]()
            else:
                assert prepared.contestants[name]()


def test_a_gpu_needs_one_copy_of_a_weight():
    assert weight_copies(64 << 20) >= 1
    with torch.device("meta"):
        assert weight_copies(8 << 20) == 1


def test_dorafactors_is_a_peft_of_its_own(monkeypatch):
    case = dataclasses.replace(select("smoke", ["dora"])[1], dropout=0.0)
    prepared = prepare(case)
    with pytest.raises(Unavailable, match="dorafactors is not installed"):
        prepared.contestants["dorafactors"]()
    monkeypatch.setattr(baselines, "has_dorafactors", lambda: True)
    with pytest.raises(Unavailable, match="the installed PEFT is that of dorafactors"):
        prepared.contestants["peft"]()
    assert prepared.contestants["dorafactors"]()
