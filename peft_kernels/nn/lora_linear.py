"""`LoRALinear`: a frozen linear layer, dense or NF4, with a trainable low-rank update."""

import math
from typing import ClassVar, Self

import torch
from torch import nn

from peft_kernels.core.checks import check_finite, check_flag, check_probability, check_size
from peft_kernels.functional import adapted_linear
from peft_kernels.nn.adapted_layer import ADAPTER, AdaptedLayer, as_base_layer
from peft_kernels.nn.nf4_linear import NF4Linear
from peft_kernels.nn.plain_linear import new_linear


class LoRALinear(AdaptedLayer):
    """y = x W^T + bias + scaling * (D(x) A^T) B^T with W and bias frozen, A [r, K] and B [N, r] trained.

    scaling is lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA. A starts as the weight of an `nn.Linear`
    (Kaiming uniform, a = sqrt(5)) and B at zero, so the layer starts as its base layer. As in PEFT, A and B
    are fp32 even over a bf16 or fp16 base; unlike there, x is not cast up for that.

    Parameters have PEFT's names, so that the state_dict of a PEFT model fits: `base_layer.weight`,
    `base_layer.bias`, `lora_A.default.weight`, `lora_B.default.weight`. The keys of PEFT's adapter files,
    which lack the adapter's name, are understood too, once their prefix is off:

        >>> state = peft.get_peft_model_state_dict(model)  # or the file: safetensors.torch.load_file(...)
        >>> state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        >>> ours = nn.Sequential(pk.nn.LoRALinear(8, 16, r=2), nn.GELU(), pk.nn.LoRALinear(16, 8, r=2))
        >>> ours.load_state_dict(state, strict=False).unexpected_keys
        []

    Args:
        in_features: K.
        out_features: N.
        bias: whether the base layer has a bias.
        r: rank.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability, in [0, 1), with which D drops an element of x in training mode. The mask is
            recomputed in the backward pass, not stored.
        use_rslora: divide by sqrt(r) instead of r.
        device: where to make it.
        dtype: of the base layer, a new `nn.Linear`; `from_linear` takes over an existing one.

    Raises:
        TypeError: a size or `r` is not an int, or `lora_alpha` no number.
        ValueError: one of them is not positive, `lora_dropout` is out of range, or there is no such dtype or
            device.

    Source: LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732; QLoRA, arXiv 2305.14314.
    """

    file_keys: ClassVar[dict[str, str]] = {
        "lora_A.weight": f"lora_A.{ADAPTER}.weight",
        "lora_B.weight": f"lora_B.{ADAPTER}.weight",
    }

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        base_layer = new_linear(in_features, out_features, bias, device, dtype)
        self._init(base_layer, r, lora_alpha, lora_dropout, use_rslora)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | NF4Linear,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> Self:
        """Adapt an existing layer, which becomes the base layer and is frozen; nothing is copied.

        For QLoRA pass an `NF4Linear`, for example `NF4Linear.from_linear(linear)`.

        Args:
            linear: `nn.Linear`, `NF4Linear`, or a bitsandbytes `Linear4bit` in NF4, which is taken over by
                `NF4Linear.from_bitsandbytes`.
            r: see the class, as for the others.
            lora_alpha: see the class.
            lora_dropout: see the class.
            use_rslora: see the class.

        Raises:
            TypeError: none of these, or one that does more (a PEFT layer, one with hooks, ...).
            ValueError: see the class and `NF4Linear.from_bitsandbytes`.
        """
        layer = cls.__new__(cls)
        layer._init(as_base_layer(linear), r, lora_alpha, lora_dropout, use_rslora)
        return layer.train(linear.training)

    def _init(
        self,
        base_layer: nn.Linear | NF4Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
    ) -> None:
        check_size("r", r)
        check_finite("lora_alpha", lora_alpha)
        check_probability("lora_dropout", lora_dropout)
        check_flag("use_rslora", use_rslora)
        super().__init__(base_layer)
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        weight = base_layer.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self._add_adapter(weight.device, dtype)
        self.reset_parameters()

    def _add_adapter(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the parameters that `reset_parameters` fills."""
        lora_a = nn.Linear(self.in_features, self.r, bias=False, device=device, dtype=dtype)
        lora_b = nn.Linear(self.r, self.out_features, bias=False, device=device, dtype=dtype)
        self.lora_A = nn.ModuleDict({ADAPTER: lora_a})
        self.lora_B = nn.ModuleDict({ADAPTER: lora_b})

    def reset_parameters(self) -> None:
        """Start afresh: A Kaiming uniform, B zero."""
        lora_a, lora_b = self.adapter
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        nn.init.zeros_(lora_b)

    @property
    def adapter(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(A [r, K], B [N, r]), the parameters."""
        lora_a, lora_b = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        assert isinstance(lora_a, nn.Linear)
        assert isinstance(lora_b, nn.Linear)
        return lora_a.weight, lora_b.weight

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
        lora_a, lora_b = self.adapter
        return adapted_linear(
            x,
            self.frozen_weight,
            lora_a=lora_a,
            lora_b=lora_b,
            scaling=self.scaling,
            bias=base.bias,
            dropout_p=self.lora_dropout if self.training else 0.0,
        )

    def _adapted(self, weight: torch.Tensor) -> torch.Tensor:
        """W + scaling * B A."""
        lora_a, lora_b = (part.to(weight.dtype) for part in self.adapter)
        return torch.addmm(weight, lora_b, lora_a, alpha=self.scaling)

    def extra_repr(self) -> str:
        """Sizes and settings."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"scaling={self.scaling:g}, lora_dropout={self.lora_dropout}, merged={self.merged}"
        )
