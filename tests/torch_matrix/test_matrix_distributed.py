"""DDP and FSDP on two processes over gloo: what one process computes on the whole batch."""

from pathlib import Path

import distributed_checks
import pytest
import torch.multiprocessing as mp

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """By check, what each process says of it."""
    folder: Path = tmp_path_factory.mktemp("two_processes")
    mp.spawn(distributed_checks.run, (str(folder),), nprocs=distributed_checks.PROCESSES)
    return distributed_checks.failures(folder)


@pytest.mark.parametrize("name", distributed_checks.CHECKS)
def test_two_processes(failures: dict[str, list[str]], name: str) -> None:
    assert failures[name] == [""] * distributed_checks.PROCESSES, "\n".join(failures[name])
