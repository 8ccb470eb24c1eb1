"""`DoRALinear`: a frozen linear layer whose rows are given a trainable direction and length."""

from typing import Any, ClassVar, Self

import torch
from torch import nn

from peft_kernels.functional import dora_norm
from peft_kernels.nn.adapted_layer import ADAPTER
from peft_kernels.nn.lora_linear import LoRALinear
from peft_kernels.nn.scale_cache import run_dora, scale_cache
from peft_kernels.ops.dora.functional import row_scale


class DoRALinear(LoRALinear):
    """y = g * (x W^T + scaling * (x A^T) B^T) + bias, g = m / ||W + scaling * B A||, row by row.

        >>> layer = pk.nn.DoRALinear(64, 32, r=4, lora_alpha=8)
        >>> [(kind.name, kind.parameters) for kind in pk.trainable_parameters(layer).kinds]
        [('LoRA A', 256), ('LoRA B', 128), ('DoRA magnitude', 32)]

    W and bias are frozen; A [r, K], B [N, r] and the magnitude m [N] are trained. m starts as the norms of
    the rows of W, so the layer starts as its base layer. The rest is as in `LoRALinear`: arguments,
    `from_linear`, merging and saving. The magnitude is `lora_magnitude_vector.default.weight`, and
    `lora_magnitude_vector` in an adapter file, as in PEFT.

    The norms are computed in every call in training mode. In eval mode they are kept until a weight changes,
    so that the layer costs what LoRA costs. After writes that torch does not notice, such as
    `p.data.copy_(ema)`, call `peft_kernels.invalidate_norms`.

    Source: DoRA, arXiv 2402.09353, equation 5.
    """

    file_keys: ClassVar[dict[str, str]] = {
        **LoRALinear.file_keys,
        "lora_magnitude_vector": f"lora_magnitude_vector.{ADAPTER}.weight",
    }

    def _add_adapter(self, device: torch.device, dtype: torch.dtype) -> None:
        super()._add_adapter(device, dtype)
        magnitude = nn.Parameter(torch.empty(self.out_features, device=device, dtype=dtype))
        self.lora_magnitude_vector = nn.ModuleDict({ADAPTER: nn.ParameterDict({"weight": magnitude})})

    def reset_parameters(self) -> None:
        """Start afresh: A Kaiming uniform, B zero, the magnitude the norms of the rows of W."""
        super().reset_parameters()
        with torch.no_grad():
            self.magnitude.copy_(self._norm())

    @property
    def magnitude(self) -> torch.Tensor:
        """m [N], the parameter."""
        vectors = self.lora_magnitude_vector[ADAPTER]
        assert isinstance(vectors, nn.ParameterDict)
        magnitude: torch.Tensor = vectors["weight"]
        return magnitude

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The formula of the class; while merged, the base layer alone.

        Args:
            x: [..., K]; the dtype of a dense base layer's weight, or float32, bfloat16 or float16 over NF4.

        Returns:
            y [..., N], in the dtype of x.
        """
        if self.merged:
            return super().forward(x)
        return run_dora(
            self,
            x,
            self.frozen_weight,
            *self.adapter,
            self.magnitude,
            self.scaling,
            self.base_layer.bias,
            self.lora_dropout,
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        scale_cache(self).clear()  # or it would hold the memory that is left
        return super()._apply(*args, **kwargs)  # type: ignore[no-any-return, no-untyped-call]

    def _norm(self) -> torch.Tensor:
        """||W + scaling * B A|| [N]."""
        return dora_norm(self.frozen_weight, *self.adapter, self.scaling)

    def _adapted(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows of W + scaling * B A, made as long as the magnitude says."""
        scale = row_scale(self.magnitude, self._norm())  # [N]
        return super()._adapted(weight) * scale[:, None]
