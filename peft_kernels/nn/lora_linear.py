"""`LoRALinear`: a frozen linear layer, dense or NF4, with a trainable low-rank update."""

import math
from typing import Any, Self

import torch
from torch import nn

from peft_kernels.core.checks import check_probability
from peft_kernels.functional import adapted_linear
from peft_kernels.nn.nf4_linear import NF4Linear
from peft_kernels.nn.plain_linear import has_forward_of, is_linear4bit, require_plain
from peft_kernels.ops.nf4.weight import NF4Weight

ADAPTER = "default"  # the name PEFT gives an adapter that is given none


class LoRALinear(nn.Module):
    """y = x W^T + bias + scaling * (D(x) A^T) B^T with W and bias frozen, A [r, K] and B [N, r] trained.

    scaling is lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA. A starts as the weight of an `nn.Linear`
    (Kaiming uniform, a = sqrt(5)) and B at zero, so the layer starts as its base layer. As in PEFT, A and B
    are fp32 even over a bf16 or fp16 base; unlike there, x is not cast up for that.

    Parameters have PEFT's names, so that the state_dict of a PEFT model fits: `base_layer.weight`,
    `base_layer.bias`, `lora_A.default.weight`, `lora_B.default.weight`. The keys of PEFT's adapter files,
    which lack the adapter's name, are understood too, once their prefix is off:

        state = safetensors.torch.load_file("adapter_model.safetensors")
        state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        model.load_state_dict(state, strict=False)

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
        TypeError: `r` is not an int.
        ValueError: `r` is not positive, or `lora_dropout` is out of range.

    Source: LoRA, arXiv 2106.09685, section 4.1; rsLoRA, arXiv 2312.03732; QLoRA, arXiv 2305.14314.
    """

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
        base_layer = nn.Linear(in_features, out_features, bias, device, dtype)
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
        accepted = has_forward_of(linear, nn.Linear) or has_forward_of(linear, NF4Linear)
        wanted = "a plain nn.Linear, an NF4Linear or a bitsandbytes Linear4bit"
        require_plain(linear, accepted or is_linear4bit(linear), wanted)
        if isinstance(linear, nn.Linear) and is_linear4bit(linear):
            linear = NF4Linear.from_bitsandbytes(linear)
        layer = cls.__new__(cls)
        layer._init(linear, r, lora_alpha, lora_dropout, use_rslora)
        return layer.train(linear.training)

    _parts: tuple[str, ...] = ("lora_A.weight", "lora_B.weight")  # of an adapter, as its file has them
    base_layer: nn.Linear | NF4Linear
    unmerged_base_layer: nn.Linear | NF4Linear | None  # the base layer proper, while merged

    def _init(
        self,
        base_layer: nn.Linear | NF4Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
    ) -> None:
        super().__init__()
        if not isinstance(r, int):
            raise TypeError(f"r must be an int, got {r!r}")
        if r < 1:
            raise ValueError(f"r must be positive, got {r}")
        check_probability("lora_dropout", lora_dropout)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.base_layer = base_layer.requires_grad_(False)
        self.unmerged_base_layer = None
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

    @property
    def frozen_weight(self) -> torch.Tensor | NF4Weight:
        """W [N, K] of the base layer, without the update even while merged."""
        base = self.unmerged_base_layer or self.base_layer
        return base.nf4_weight if isinstance(base, NF4Linear) else base.weight

    @property
    def merged(self) -> bool:
        """Whether the update is part of the base layer's weight now."""
        return self.unmerged_base_layer is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] to y [..., N], in the dtype of x."""
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

    def merge(self) -> None:
        """Put the update into the base layer's weight, for inference with A and B as they are now.

        The base layer is exchanged for a merged one and kept, so `unmerge` is exact; it costs a second base
        weight until then. Over NF4 the sum is quantised again, which moves each weight by up to half a step
        of the code; `merge_to_dense` does not. Merging a merged layer does nothing.

        Raises:
            ValueError: the merged weight has NaN or infinite elements; the layer is as it was.
        """
        if self.merged:
            return
        base, dense = self.base_layer, self.merge_to_dense()
        merged: nn.Linear | NF4Linear = dense
        if isinstance(base, NF4Linear):
            double_quant = base.nested_absmax is not None
            merged = NF4Linear.from_linear(dense, blocksize=base.blocksize, double_quant=double_quant)
        self.base_layer, self.unmerged_base_layer = merged.requires_grad_(False), base

    def unmerge(self) -> None:
        """Undo `merge`: the base layer is the very one it was. Does nothing if not merged."""
        if self.unmerged_base_layer is not None:
            self.base_layer, self.unmerged_base_layer = self.unmerged_base_layer, None

    @torch.no_grad()
    def merge_to_dense(self) -> nn.Linear:
        """A new `nn.Linear` with the update in its weight, computed in fp32 and rounded once.

        Over NF4 this is exact up to that rounding, to the dtype of the weight before it was quantised.

        Raises:
            ValueError: the result has NaN or infinite elements.
        """
        base = self.unmerged_base_layer or self.base_layer
        weight = base.nf4_weight.dequantize(torch.float32) if isinstance(base, NF4Linear) else base.weight
        dtype = base.weight_dtype if isinstance(base, NF4Linear) else weight.dtype
        merged = self._adapted(weight.to(torch.promote_types(weight.dtype, torch.float32))).to(dtype)
        if not merged.isfinite().all():
            raise ValueError("the merged weight must be finite, got NaN or inf; check the adapter")
        linear = nn.Linear(self.in_features, self.out_features, base.bias is not None, device="meta")
        linear.weight = nn.Parameter(merged)
        if base.bias is not None:
            linear.bias = nn.Parameter(base.bias.detach().clone())
        return linear.train(self.training)

    def _adapted(self, weight: torch.Tensor) -> torch.Tensor:
        """W + scaling * B A for W [N, K]."""
        lora_a, lora_b = (part.to(weight.dtype) for part in self.adapter)
        return torch.addmm(weight, lora_b, lora_a, alpha=self.scaling)

    def extra_repr(self) -> str:
        """Sizes and settings."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"scaling={self.scaling:g}, lora_dropout={self.lora_dropout}, merged={self.merged}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.merged:
            raise RuntimeError(
                f"{prefix.removesuffix('.') or 'the layer'} must not be merged to be saved: the update would "
                "be in lora_A, lora_B and the merged weight; call unmerge(), or save merge_to_dense()"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.merged:
            raise RuntimeError(
                f"{prefix.removesuffix('.') or 'the layer'} must not be merged to be loaded; call unmerge()"
            )
        for in_file in self._parts:
            if prefix + in_file in state_dict:
                part = in_file.removesuffix(".weight")
                state_dict[f"{prefix}{part}.{ADAPTER}.weight"] = state_dict.pop(prefix + in_file)
        super()._load_from_state_dict(state_dict, prefix, *args)
