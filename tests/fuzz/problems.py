"""Valid arguments to start from: small, ragged, of every dtype and kind of weight."""

from typing import Any

import torch
from hypothesis import strategies as st

import peft_kernels as pk

from .odd import Draw, choose

TOKENS = (0, 1, 2, 3, 5, 16, 17, 33)
IN_FEATURES = (1, 2, 7, 31, 32, 33, 63, 64, 65, 96, 128, 130, 200)
OUT_FEATURES = (1, 2, 3, 8, 15, 16, 17, 33, 40)
RANKS = (1, 2, 3, 4, 8, 9, 17)
BLOCKSIZES = (32, 64, 128, 256, 512, 4096)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Maker:
    """Draws sizes and dtypes, and makes tensors with normally distributed elements."""

    def __init__(self, draw: Draw, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
        self.m, self.k = self.pick(TOKENS), self.pick(IN_FEATURES)
        self.n, self.r = self.pick(OUT_FEATURES), self.pick(RANKS)
        self.dtype = self.pick(dtypes)
        wide = torch.promote_types(self.dtype, torch.float32)
        self.adapter_dtype = self.pick((self.dtype, wide))

    def pick(self, choices: Any) -> Any:
        """One of them."""
        return choose(self.draw, choices)

    def maybe(self) -> bool:
        """Whether something is there."""
        return bool(self.draw(st.booleans()))

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Random elements; of a bias, a scale or an adapter where no dtype is given."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.adapter_dtype if dtype is None else dtype)

    def x(self) -> torch.Tensor:
        """[..., K], with any number of leading dimensions."""
        lead = self.pick(((self.m,), (self.m,), (), (2, self.m), (1, self.m, 2)))
        return self.normal(*lead, self.k, dtype=self.dtype)

    def nf4(self, n: int | None = None, k: int | None = None) -> pk.NF4Weight:
        """An NF4 weight [N, K], plain or doubly quantised."""
        source = self.normal(self.n if n is None else n, self.k if k is None else k, dtype=torch.float32)
        dtype = self.pick((torch.float32, torch.bfloat16, torch.float16))
        return pk.functional.nf4_quantize(source.to(dtype), self.pick(BLOCKSIZES), self.maybe())

    def weight(self) -> torch.Tensor | pk.NF4Weight:
        """Dense or NF4, [N, K]."""
        return self.normal(self.n, self.k, dtype=self.dtype) if self.maybe() else self.nf4()

    def lora(self) -> dict[str, Any]:
        """A and B."""
        return {"lora_a": self.normal(self.r, self.k), "lora_b": self.normal(self.n, self.r)}

    def scaling(self) -> float | torch.Tensor:
        """A number, or a tensor with one."""
        value = self.pick((1.0, -1.5, 0.0, 0.125))
        return self.pick((value, value, value, torch.tensor(value), torch.tensor([value])))

    def dropout(self) -> dict[str, Any]:
        """Probability and seed."""
        seed = self.pick((1, -1, 2**63 - 1, torch.tensor(7)))
        return {"dropout_p": self.pick((0.0, 0.0, 0.1, 0.5)), "seed": seed}

    def optional(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor | None:
        """A tensor, or None."""
        return self.normal(*shape, dtype=dtype) if self.maybe() else None
