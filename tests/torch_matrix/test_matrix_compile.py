"""torch.compile with inductor, really run on the CPU: one graph for any number of rows."""

from typing import Any

import pytest
import torch
from subjects import LEVELS, inputs, make, results
from torch._dynamo.utils import counters
from torch._inductor import config
from torch.nn import ModuleDict

from surgery.peft_models import assert_close

pytestmark = [pytest.mark.usefixtures("fresh_compiler"), pytest.mark.slow]


class All(ModuleDict):
    """Every subject of a level on the same input, to be compiled as one graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([subject(x) for subject in self.values()], dim=-1)


@pytest.mark.parametrize("level", LEVELS)
def test_inductor(level: str) -> None:
    """Forward and backward; dropout masks are those of eager mode where inductor uses torch's generator."""
    subjects = All({name: make(level, name) for name in LEVELS[level]()})
    counters.clear()
    with config.patch(fallback_random=True):
        compiled = torch.compile(subjects, fullgraph=True, dynamic=True)
        for rows in (3, 17):
            eager, fast = (results(call, subjects, inputs(rows)) for call in (subjects, compiled))
            assert list(eager) == list(fast)
            for name in eager:
                assert_close(fast[name], eager[name])
    assert counters["stats"]["unique_graphs"] == 1, "another number of rows was compiled anew"


def test_the_mask_of_inductor_s_own_generator_is_one_mask() -> None:
    """By default inductor draws other seeds than eager mode: forward and backward must still share each."""
    dropout = make("modules", "PhiloxDropout")
    compiled: Any = torch.compile(dropout, fullgraph=True)
    x = torch.ones(20, 64, requires_grad=True)
    masks = []
    for _ in range(2):
        y = compiled(x)
        (mask,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y.detach(), mask)
        masks.append(mask)
    assert not torch.equal(*masks)
    kept = int((masks[0] != 0).sum())
    assert abs(kept - 0.75 * 1280) < 6 * (1280 * 0.75 * 0.25) ** 0.5  # six standard deviations
