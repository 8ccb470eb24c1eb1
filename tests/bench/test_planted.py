"""What --compare is for, measured for real: a kernel that has become 20 % slower, and one that has not."""

import pytest
from peft_kernels.bench import memory
from peft_kernels.bench.__main__ import main
from peft_kernels.bench.gate import EXIT_FAILED, EXIT_UNJUDGED
from planted import slower

# A call of 0.3 ms, against baselines of 0.7 ms
CASE = ["--filter", "nf4_linear/forward/M64-K384-N1536/*", "--baseline", "eager,bitsandbytes,dense"]
RUN = ["--suite", "quick", "--seconds", "0.9", *CASE]
ATTEMPTS = 4  # on a machine too busy to judge by


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the libraries compared with
@pytest.mark.parametrize(("share", "status"), [(0.0, 0), (0.2, EXIT_FAILED)])
def test_a_planted_slow_down_is_caught_and_nothing_else(monkeypatch, tmp_path, capsys, share, status):
    monkeypatch.setattr(memory, "can_measure_scratch", lambda: False)  # child processes take seconds
    old = tmp_path / "old.json"
    for _ in range(ATTEMPTS):
        assert main([*RUN, "--json", str(old)]) == 0
        with slower("nf4_linear", share):
            found = main([*RUN, "--compare", str(old), "--fail-regression", "10%"])
        if found != EXIT_UNJUDGED:
            break
    out = capsys.readouterr().out
    if found == EXIT_UNJUDGED:
        pytest.skip("this machine is too busy to judge speed by")
    assert found == status, out
    if share:
        assert "1 slower by more than 10%" in out
