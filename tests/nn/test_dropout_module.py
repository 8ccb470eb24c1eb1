"""PhiloxDropout: nn.Dropout with the mask of the functional."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_kernels import functional
from peft_kernels.nn import PhiloxDropout


def test_seed_is_drawn_as_the_functional_draws_it() -> None:
    x = torch.randn(4, 5, 6, requires_grad=True)
    torch.manual_seed(2)
    y = PhiloxDropout(0.3)(x)
    torch.manual_seed(2)
    assert torch.equal(y, functional.philox_dropout(x, 0.3))
    torch.manual_seed(2)
    mask = functional.philox_dropout_mask((4, 5, 6), 0.3, int(torch.randint(0, 2**63 - 1, ())))
    assert torch.equal(y != 0, mask)
    y.sum().backward()
    assert torch.equal(x.grad != 0, mask)


def test_eval_and_p_zero_are_the_identity_and_draw_nothing() -> None:
    x = torch.randn(3, 4)
    state = torch.get_rng_state()
    assert PhiloxDropout(0.5).eval()(x) is x
    assert PhiloxDropout(0.0)(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_every_call_has_its_own_mask_and_checkpointing_repeats_it() -> None:
    dropout = PhiloxDropout(0.5)
    x = torch.randn(64, 64, requires_grad=True)
    y = dropout(x)
    assert not torch.equal(y, dropout(x))
    assert abs((y != 0).float().mean() - 0.5) < 5 * 0.5 / 64  # five standard deviations of 4096 coin tosses
    z = checkpoint(dropout, x, use_reentrant=False)
    z.sum().backward()
    assert torch.equal(x.grad != 0, z != 0)


def test_is_a_dropout_module() -> None:
    dropout = PhiloxDropout(0.25)
    assert isinstance(dropout, nn.Dropout)
    assert repr(dropout) == "PhiloxDropout(p=0.25, inplace=False)"
    assert copy.deepcopy(dropout).p == pickle.loads(pickle.dumps(dropout)).p == 0.25
    for p in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
            PhiloxDropout(p)


def test_compile_fullgraph() -> None:
    dropout = PhiloxDropout(0.5)
    x = torch.randn(8, 8)
    torch.manual_seed(1)
    y = torch.compile(dropout, fullgraph=True, backend="aot_eager")(x)
    torch.manual_seed(1)
    assert torch.equal(y, dropout(x))
