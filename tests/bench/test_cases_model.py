"""Whole-model cases on a tiny Llama: what the oracle finds, repeatability, counts, the printed line."""

import dataclasses
import io

import pytest
import torch
from peft_kernels.bench import baselines, cases_model, memory, models
from peft_kernels.bench.case import OURS, Unavailable
from peft_kernels.bench.cases_model import DECODE, PREFILL, TRAIN, evaluate, flops, model_case
from peft_kernels.bench.gate import judge
from peft_kernels.bench.measure import Budget
from peft_kernels.bench.models import ARCHITECTURES, Model, trained
from peft_kernels.bench.oracle import compare
from peft_kernels.bench.report import case_view
from peft_kernels.bench.roofline import Roofline
from peft_kernels.bench.run import CaseRunner
from peft_kernels.bench.worker import Workers
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

TINY = "llama-tiny:2-layers"
CASES = [model_case(op, TINY, 1 if op == DECODE else 24) for op in (TRAIN, PREFILL, DECODE)]
BFLOAT16 = [dataclasses.replace(case, dtype="bfloat16") for case in CASES]

pytestmark = pytest.mark.filterwarnings("default")  # of the libraries that models are made of


def name_of(case):
    return f"{case.op}-{case.dtype}"


@pytest.fixture(scope="module")
def model_of():
    """A tiny model by data type, each made once."""
    made = {}

    def model_of(dtype=torch.float32):
        if dtype not in made:
            made[dtype] = Model(ARCHITECTURES[TINY], dtype)
        return made[dtype]

    return model_of


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(memory, "can_measure_scratch", lambda: False)

    def run(case, names=("peft", "dense")):
        with Workers() as workers:
            roofline = Roofline(1, 10.0, 10.0, {"float32": 100.0, "bfloat16": 100.0})
            return CaseRunner(names, Budget(0.0, 0.0), 0, workers, {1: roofline}).run(case, threads=1)

    return run


def program_of(case, made):
    return (cases_model._training_step if case.op == TRAIN else cases_model._generation)(case, *made)


def check(case, model, made):
    program = program_of(case, made)
    return compare(program.outputs(program.call()), cases_model._oracle(case, model))


@pytest.mark.parametrize("case", [*CASES, *BFLOAT16], ids=name_of)
def test_contestants_compute_the_same_model(run, case):
    result = run(case)
    ours, peft, dense = result.contestants
    assert result.status in ("measured", "noisy"), ours.reason
    assert ours.tolerance_used <= 1
    assert dense.tolerance_used <= 1
    # outside training bitsandbytes computes in bfloat16 where the processor can
    assert peft.tolerance_used <= 1 or (case.op != TRAIN and case.dtype == "float32" and peft.error < 0.05)
    assert (ours.saved_bytes is None) == (case.op != TRAIN)


@pytest.mark.parametrize("label", [TINY, "minilm"])
def test_the_oracle_is_float64_throughout(label):
    """The loss's slope along its gradient, by differences: one float32 rounding would show as 6e-8 / h."""
    case, h = model_case(TRAIN, label, 32), 1e-6
    model = Model(ARCHITECTURES[label], torch.float32).dense(torch.float64)
    results = evaluate(case, model)
    parameters = trained(model)
    gradient = {name: results[f"d{name}"] for name in parameters}
    norm = sum(float(each.square().sum()) for each in gradient.values()) ** 0.5
    losses = []
    for step in (-h, 2 * h):  # to -h, then to +h
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter += step / norm * gradient[name]
        losses.append(float(evaluate(case, model)["loss"]))
    below, above = losses
    assert (above - below) / (2 * h) == pytest.approx(norm, rel=1e-7)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("layer", ["layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"])
def test_an_error_of_1e_4_in_one_layer_is_found(model_of, case, layer):
    made = model_of().ours()
    assert check(case, model_of(), made).passed
    made[0].base_model.model.model.get_submodule(layer).register_forward_hook(
        lambda *args: args[2] * (1 + 1e-4)
    )
    assert not check(case, model_of(), made).passed


def test_an_error_of_1e_4_in_one_gradient_is_found(model_of):
    made = model_of().ours()
    layer = made[0].base_model.model.model.layers[1].mlp.gate_proj
    layer.register_full_backward_hook(lambda _, grads, __: tuple(each * (1 + 1e-4) for each in grads))
    found = check(CASES[0], model_of(), made)
    assert not found.passed
    assert found.worst.startswith("d")


@pytest.mark.parametrize("case", BFLOAT16, ids=name_of)
def test_a_missing_adapter_is_found_in_bfloat16(model_of, case):
    model = model_of(torch.bfloat16)
    made = model.ours()
    made[0].base_model.model.model.layers[1].mlp.down_proj.scaling["default"] = 0.0
    assert not check(case, model, made).passed


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_call_computes_the_same(model_of, case):
    program = program_of(case, model_of().ours())
    first = {name: value.clone() for name, value in program.outputs(program.call()).items()}
    for _ in range(2):
        again = program.outputs(program.call())
    assert all(torch.equal(again[name], value) for name, value in first.items())


def test_adamw_does_its_work_and_changes_nothing(model_of, monkeypatch):
    made, optimizers = model_of().stock(), []

    class Recorded(torch.optim.AdamW):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            optimizers.append(self)

    monkeypatch.setattr(torch.optim, "AdamW", Recorded)
    before = {name: p.detach().clone() for name, p in trained(made[0]).items()}
    program = program_of(CASES[0], made)
    for _ in range(2):
        program.call()
    (optimizer,) = optimizers
    for name, parameter in trained(made[0]).items():
        state = optimizer.state[parameter]
        assert state["step"] == 2
        assert state["exp_avg"].any()
        assert torch.equal(parameter, before[name])


def test_contestants_share_no_quantised_weight(model_of):
    """bitsandbytes rearranges its own in place, and none is to be found in cache after another's turn."""
    (_, ours), (_, stock) = model_of().ours(), model_of().stock()
    packed = [{t.data_ptr() for t in tensors if t.dtype == torch.uint8} for tensors in (ours, stock)]
    assert len(packed[0]) == 2 * 7 * 2  # nibbles and quantised scales of 7 layers in each of 2 blocks
    assert not packed[0] & packed[1]


@pytest.mark.parametrize("label", ["llama-3.2-1b:2-layers", "minilm"])
def test_sizes_are_those_of_the_model(label):
    sizes = ARCHITECTURES[label]
    with torch.device("meta"):
        model = Model(sizes, torch.bfloat16) if sizes.causal else None
    if model is None:  # its weights are on the disk
        model = Model(sizes, torch.float32)
    shapes = [weight.shape for weight in model._weights.values()]
    shapes = shapes if sizes.causal else shapes[:-1]  # without the pooler
    assert len(shapes) == sizes.layers * len(sizes.shapes)
    assert sorted(shapes) == sorted([(n, k) for k, n in sizes.shapes] * sizes.layers)
    assert sizes.head in (0, 128256 // 16 * 2048 * sizes.layers)


def test_models_are_made_on_the_default_device(model_of):
    """As on a GPU; what stayed on the CPU shows."""
    with torch.device("meta"):
        model = Model(ARCHITECTURES[TINY], torch.bfloat16)
        for case in BFLOAT16:
            assert {each.device.type for each in cases_model._inputs(case).values()} == {"meta"}
            past = cases_model._past(case, torch.bfloat16)
            assert {each.device.type for pair in past for each in pair} <= {"meta"}
        for made in (model.stock(), (model.dense(torch.bfloat16), ())):
            assert {each.device.type for each in program_of(BFLOAT16[0], made).frozen} == {"meta"}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_flops_are_those_of_the_products(model_of, case):
    model = model_of().dense(torch.float32)
    with FlopCounterMode(display=False) as counter:
        evaluate(case, model)
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    products = sum(counts.get(f"aten.{op}", 0) for op in ("mm", "addmm", "bmm"))
    sizes = ARCHITECTURES[TINY]
    rotation = case.m * sizes.hidden // sizes.heads  # positions times frequencies
    attention = cases_model._attention_flops(case, sizes) * (3 if case.op == TRAIN else 1)
    assert flops(case) - attention == products - rotation


def test_a_token_attends_to_those_before_it():
    sizes = ARCHITECTURES[TINY]
    pairs = {TRAIN: 24 * 25 // 2, PREFILL: 24 * 25 // 2, DECODE: cases_model.CACHED_TOKENS + 1}
    for case in CASES:  # a pair is a product over the head in Q K^T and one in P V, in every head and layer
        assert (
            cases_model._attention_flops(case, sizes) == pairs[case.op] * 2 * 2 * sizes.hidden * sizes.layers
        )


def printed(result):
    console = Console(width=200, file=io.StringIO())
    console.print(case_view(result))
    return console.file.getvalue()


def test_tokens_per_second_and_peak_memory_are_printed(result_of):
    case = model_case(TRAIN, "minilm", 128)
    text = printed(result_of(case, ms=20.0, ours={"scratch_bytes": 3 << 20}, peft=2.0))
    heading, ours, peft = text.splitlines()[1:4]
    assert "tokens/s" in heading
    assert "peak" in heading
    assert "GB/s" not in heading
    assert " 6400.0 " in ours
    assert " 3200.0 " in peft
    assert "3 MiB" in ours
    assert case.name.endswith("@minilm")
    assert case.name in text


@pytest.mark.parametrize("missing", ["bitsandbytes", "peft", "transformers"])
def test_without_its_libraries_a_model_is_missing(run, monkeypatch, missing):
    require = baselines.require

    def without(module):
        if module == missing:
            raise Unavailable(f"{module} is not installed")
        return require(module)

    monkeypatch.setattr(baselines, "require", without)
    result = run(CASES[0])
    assert result.status == "missing"
    assert [(each.name, each.reason) for each in result.contestants] == [
        (OURS, f"{missing} is not installed")
    ]
    assert f"peft_kernels: missing: {missing} is not installed" in printed(result)
    assert judge(result, None).kind == "passed"
    assert judge(result, 0.95).kind == "unjudged"


def test_a_layer_that_is_not_fused_is_no_contestant(run, monkeypatch):
    """Or stock would be measured against itself."""
    from peft_kernels.surgery import explain

    monkeypatch.setattr(models, "replace_layers", explain)
    result = run(CASES[0])
    assert result.status == "missing"
    assert "14 layers are not fused" in result.contestants[0].reason
