"""`IA3Linear`: a frozen linear layer, dense or NF4, with a trained scale on its outputs or inputs."""

from typing import ClassVar, Self

import torch
from torch import nn

from peft_kernels.core.checks import check_flag
from peft_kernels.functional import ia3_linear
from peft_kernels.nn.adapted_layer import ADAPTER, AdaptedLayer, as_base_layer
from peft_kernels.nn.nf4_linear import NF4Linear
from peft_kernels.nn.plain_linear import new_linear


class IA3Linear(AdaptedLayer):
    """y = (x W^T + bias) * l, or with `feedforward` y = (x * l) W^T + bias; W, bias frozen, l trained.

        >>> layer = pk.nn.IA3Linear.from_linear(nn.Linear(64, 32))
        >>> pk.trainable_parameters(layer).trainable
        32

    l starts at one, so the layer starts as its base layer. As in PEFT it is fp32 even over a bf16 or fp16
    base; unlike there, x is not cast up for that, and y has the dtype of x over NF4 too.

    The parameter has PEFT's name and shape, so that the state_dict of a PEFT model fits: `ia3_l.default`,
    [N, 1], or [1, K] with `feedforward`, beside `base_layer.weight` and `base_layer.bias`. The key of PEFT's
    adapter files, which lacks the adapter's name, is understood too, once its prefix is off (`LoRALinear`
    shows how).

    Over NF4, `merge` is exact, up to a rounding of absmax, for every row with l > 0 of an output-scaled layer
    that is not doubly quantised and whose rows are whole blocks: such a row times l is the same codes with
    absmax times l. All else is quantised again: NF4 is not symmetric, and doubly quantised absmax is 8 bits.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the base layer has a bias.
        feedforward: scale the inputs rather than the outputs; PEFT's `feedforward_modules`.
        device: where to make it.
        dtype: of the base layer, a new `nn.Linear`; `from_linear` takes over an existing one.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a size, `device` or `dtype` is one that a layer cannot have.

    Source: IA3, arXiv 2205.05638, section 3.3.
    """

    file_keys: ClassVar[dict[str, str]] = {"ia3_l": f"ia3_l.{ADAPTER}"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        feedforward: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._init(new_linear(in_features, out_features, bias, device, dtype), feedforward)

    @classmethod
    def from_linear(cls, linear: nn.Linear | NF4Linear, *, feedforward: bool = False) -> Self:
        """Adapt an existing layer, which becomes the base layer and is frozen; nothing is copied.

        Args:
            linear: `nn.Linear`, `NF4Linear`, or a bitsandbytes `Linear4bit` in NF4, which is taken over by
                `NF4Linear.from_bitsandbytes`.
            feedforward: see the class.

        Raises:
            TypeError: none of these, or one that does more (a PEFT layer, one with hooks, ...).
            ValueError: see `NF4Linear.from_bitsandbytes`.
        """
        layer = cls.__new__(cls)
        layer._init(as_base_layer(linear), feedforward)
        return layer.train(linear.training)

    def _init(self, base_layer: nn.Linear | NF4Linear, feedforward: bool) -> None:
        check_flag("feedforward", feedforward)
        super().__init__(base_layer)
        self.feedforward = feedforward
        weight = base_layer.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shape = (1, self.in_features) if feedforward else (self.out_features, 1)
        vector = nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype))
        self.ia3_l = nn.ParameterDict({ADAPTER: vector})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start afresh: l is one."""
        nn.init.ones_(self.adapter)

    @property
    def adapter(self) -> torch.Tensor:
        """l, [N, 1] or [1, K], the parameter."""
        vector: torch.Tensor = self.ia3_l[ADAPTER]
        return vector

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The formula of the class; while merged, the base layer alone.

        Args:
            x: [..., K]; the dtype of a dense base layer's weight, or float32, bfloat16 or float16 over NF4.

        Returns:
            y [..., N], in the dtype of x.
        """
        base = self.base_layer
        if self.merged:
            y: torch.Tensor = base(x)
            return y
        return ia3_linear(x, self.frozen_weight, self.adapter, base.bias, self.feedforward)

    def _adapted(self, weight: torch.Tensor) -> torch.Tensor:
        """diag(l) W, or W diag(l)."""
        return weight * self.adapter.to(weight.dtype)

    def _adapted_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """l * bias, or the bias."""
        return bias if self.feedforward else bias * self.adapter.flatten()

    @torch.no_grad()
    def _quantised(self, base: NF4Linear, dense: nn.Linear) -> NF4Linear:
        merged = super()._quantised(base, dense)
        if self.feedforward or base.nested_absmax is not None or self.in_features % base.blocksize:
            return merged
        rows, exact = self.out_features, self.adapter > 0  # [N, 1]
        scaled = base.absmax.view(rows, -1) * self.adapter
        merged.absmax = torch.where(exact, scaled, merged.absmax.view(rows, -1)).view(-1)
        merged.weight.copy_(
            torch.where(exact, base.weight.view(rows, -1), merged.weight.view(rows, -1)).view(-1)
        )
        return merged

    def extra_repr(self) -> str:
        """Sizes and settings."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"feedforward={self.feedforward}, merged={self.merged}"
        )
