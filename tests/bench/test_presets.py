"""Cases made of the layers of real models."""

import pytest
from peft_kernels.bench.__main__ import main
from peft_kernels.bench.case import GATE_BASELINES
from peft_kernels.bench.cases_ia3 import FEEDFORWARD, IA3
from peft_kernels.bench.oracle import compare
from peft_kernels.bench.presets import DIRECTIONS, FULL, MODELS, QUICK, Grid, preset_cases
from peft_kernels.bench.registry import FAMILIES, prepare
from torch.utils.flop_counter import FlopCounterMode


def listed(capsys, *arguments):
    assert main(["--list", *arguments]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # of all blocks, in millions: the published sizes without embeddings and norms
        ("minilm", 10.617 / 6),
        ("llama-3.2-1b", 973.1 / 16),
        ("llama-3.1-8b", 6979.3 / 32),
        ("llama-3.1-70b", 68451.0 / 80),
        ("qwen3-0.6b", 440.4 / 28),
        ("qwen3-8b", 6945.7 / 36),
    ],
)
def test_layers_have_the_size_of_the_model(name, parameters):
    weights = sum(k * n for k, n in MODELS[name].layers().values())
    assert weights / 1e6 == pytest.approx(parameters, rel=1e-3)


def test_every_family_has_cases_of_a_preset_but_the_whole_model():
    for grid, suite in ((QUICK, "quick"), (FULL, "full")):
        cases = preset_cases(list(MODELS), grid, suite)
        assert {case.family for case in cases} == set(FAMILIES) - {"model"}
        assert {case.direction for case in cases} == {"forward", "backward", "both"}
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert set(FAMILIES[case.family].baselines(case)) & set(GATE_BASELINES), case.name


def test_projections_of_one_shape_share_a_case(capsys):
    names = listed(capsys, "--preset", "llama-3.1-8b", "--filter", "nf4_linear/forward/M1-*")
    assert names == [
        "nf4_linear/forward/M1-K4096-N4096/nf4/float32@llama-3.1-8b:q,o",
        "nf4_linear/forward/M1-K4096-N1024/nf4/float32@llama-3.1-8b:k,v",
        "nf4_linear/forward/M1-K4096-N14336/nf4/float32@llama-3.1-8b:gate,up",
        "nf4_linear/forward/M1-K14336-N4096/nf4/float32@llama-3.1-8b:down",
    ]


def test_tensor_parallel_layers_are_split_as_megatron_does():
    layers = MODELS["llama-3.1-70b"].layers(16)
    assert layers["q"] == (8192, 512)
    assert layers["k"] == layers["v"] == (8192, 128)  # 8 heads on 16 devices: a copy each
    assert layers["o"] == (512, 8192)
    assert layers["gate"] == layers["up"] == (8192, 1792)
    assert layers["down"] == (1792, 8192)
    assert "gate" not in MODELS["minilm"].layers()


def test_the_options_make_the_grid(capsys):
    arguments = ["--preset", "qwen3-0.6b,qwen3-8b", "--family", "linear", "--tp", "1,2"]
    names = listed(
        capsys, *arguments, "--tokens", "7", "--rank", "4,8", "--dtype", "bfloat16", "--direction", "both"
    )
    assert all("M7-" in name and "/bfloat16@qwen3-" in name and "/both/" in name for name in names)
    assert {name.split("-r")[1].split("/")[0] for name in names} == {"4", "8"}
    assert {name.split("@")[1].split(":")[0] for name in names} == {
        "qwen3-0.6b", "qwen3-0.6b-tp2", "qwen3-8b", "qwen3-8b-tp2",
    }  # fmt: skip


def test_dtype_and_direction_choose_from_any_suite(capsys):
    names = listed(capsys, "--suite", "full", "--dtype", "bfloat16", "--direction", "forward")
    assert names
    assert all("/forward/" in name and "/bfloat16" in name for name in names)


SMALL = Grid((5,), ("float32",), ("both", "forward"), (4,), (3,))


@pytest.mark.parametrize("case", preset_cases(["minilm"], SMALL, "quick"), ids=lambda case: case.name)
def test_cases_of_a_preset_compute_what_the_oracle_says(case):
    prepared = prepare(case)
    program = prepared.contestants["peft_kernels"]()[0]
    check = compare(program.outputs(program.call()), prepared.oracle("peft_kernels"))
    assert check.passed, check


COUNTED = [
    case
    for case in preset_cases(["minilm"], Grid((5,), ("float32",), DIRECTIONS, (4,)), "quick")
    if case.family in ("linear", "ia3", "adapter")  # eager's DoRA computes norms that ours keeps
]


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_flops_and_written_bytes_are_those_of_plain_pytorch(case):
    prepared = prepare(case)
    program = prepared.contestants["eager"]()[0]
    with FlopCounterMode(display=False) as counted:
        results = program.call()
    assert prepared.flops == counted.get_total_flops()
    written = sum(result.nbytes for result in program.outputs(results).values())
    z = 4 * case.m * case.n if (case.op, case.direction) == ("ia3_linear", "both") else 0
    assert prepared.write_bytes == written + z


def test_ia3_reads_its_vector_in_every_pass():
    def read(op, direction):
        return prepare(IA3(op, 5, 128, 64, direction=direction)).read_bytes

    weight, x, y = 128 * 64 // 2 + 128 * 64 // 64 * 4, 4 * 5 * 128, 4 * 5 * 64
    assert read("ia3_linear", "forward") == weight + x + 4 * 64
    assert read("ia3_linear", "backward") == weight + y + y + 4 * 64  # the second is z
    assert read(FEEDFORWARD, "forward") == weight + x + 4 * 128
    assert read(FEEDFORWARD, "backward") == weight + y + x + 4 * 128
    assert read(FEEDFORWARD, "both") == read(FEEDFORWARD, "forward") + read(FEEDFORWARD, "backward")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "gpt-5"], "preset must be one of minilm, llama-3.2-1b"),
        (["--preset", "minilm", "--tp", "5"], "tp must split the 384 query features of minilm"),
        (["--preset", "qwen3-8b", "--tp", "64"], "query features of qwen3-8b into multiples of 128, got 64"),
        (["--preset", "minilm", "--suite", "sweep"], "suite must be quick or full with --preset, got sweep"),
        (["--preset", "minilm", "--tokens", "0"], "tokens must be positive numbers such as 1 or 1,2, got 0"),
        (["--tokens", "8"], "tokens must come with --preset"),
        (["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got int8"),
        (["--direction", "up"], "direction must be one of forward, backward, both, got up"),
        (["--passes", "0"], "passes must be 1 or more, got 0"),
    ],
)  # fmt: skip
def test_bad_options_are_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as status:
        main(arguments)
    assert status.value.code == 2
    assert message in capsys.readouterr().err
