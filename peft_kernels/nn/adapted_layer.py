"""What the adapted layers share: a frozen base layer, and merging the adapter into its weight."""

from typing import Any, ClassVar

import torch
from torch import nn

from peft_kernels.nn.nf4_linear import NF4Linear
from peft_kernels.nn.plain_linear import has_forward_of, is_linear4bit, require_plain
from peft_kernels.ops.nf4.weight import NF4Weight

ADAPTER = "default"  # the name PEFT gives an adapter that is given none


class AdaptedLayer(nn.Module):
    """Base of the layers that adapt a frozen linear layer: they add parameters, a forward and `_adapted`.

    Attributes:
        base_layer: the frozen layer; while merged, one with the adapter in its weight.
        unmerged_base_layer: the frozen layer while merged, otherwise None.
        file_keys: names in PEFT's adapter files, which lack the adapter's name, and what they are here.
    """

    base_layer: nn.Linear | NF4Linear
    unmerged_base_layer: nn.Linear | NF4Linear | None
    file_keys: ClassVar[dict[str, str]]

    def __init__(self, base_layer: nn.Linear | NF4Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.base_layer = base_layer.requires_grad_(False)
        self.unmerged_base_layer = None

    @property
    def frozen_weight(self) -> torch.Tensor | NF4Weight:
        """W [N, K] of the base layer, without the adapter even while merged."""
        base = self.unmerged_base_layer or self.base_layer
        return base.nf4_weight if isinstance(base, NF4Linear) else base.weight

    @property
    def merged(self) -> bool:
        """Whether the adapter is part of the base layer's weight now."""
        return self.unmerged_base_layer is not None

    def merge(self) -> None:
        """Put the adapter into the base layer's weight, for inference with its values of now.

        The base layer is exchanged for a merged one and kept, so `unmerge` is exact; it costs a second base
        weight until then. Over NF4 the result is quantised again, which moves each weight by up to half a
        step of the code; `merge_to_dense` does not. Merging a merged layer does nothing.

        Raises:
            ValueError: the merged weight has NaN or infinite elements; the layer is as it was.
        """
        if self.merged:
            return
        base, dense = self.base_layer, self.merge_to_dense()
        merged = self._quantised(base, dense) if isinstance(base, NF4Linear) else dense
        self.base_layer, self.unmerged_base_layer = merged.requires_grad_(False), base

    def unmerge(self) -> None:
        """Undo `merge`: the base layer is the very one it was. Does nothing if not merged."""
        if self.unmerged_base_layer is not None:
            self.base_layer, self.unmerged_base_layer = self.unmerged_base_layer, None

    @torch.no_grad()
    def merge_to_dense(self) -> nn.Linear:
        """A new `nn.Linear` with the adapter in its weight, computed in fp32 and rounded once.

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
            linear.bias = nn.Parameter(self._adapted_bias(base.bias.detach()).to(base.bias.dtype, copy=True))
        return linear.train(self.training)

    def _adapted(self, weight: torch.Tensor) -> torch.Tensor:
        """What the adapter makes of W [N, K], in the dtype of W, which is float32 or float64."""
        raise NotImplementedError

    def _adapted_bias(self, bias: torch.Tensor) -> torch.Tensor:
        """What the adapter makes of the bias [N]."""
        return bias

    def _quantised(self, base: NF4Linear, dense: nn.Linear) -> NF4Linear:
        """`dense` in the format of `base`."""
        double_quant = base.nested_absmax is not None
        return NF4Linear.from_linear(dense, blocksize=base.blocksize, double_quant=double_quant)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.merged:
            raise RuntimeError(
                f"{prefix.removesuffix('.') or 'the layer'} must not be merged to be saved: the adapter "
                "would be saved twice, by itself and in the weight; call unmerge(), or save merge_to_dense()"
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.merged:
            raise RuntimeError(
                f"{prefix.removesuffix('.') or 'the layer'} must not be merged to be loaded; call unmerge()"
            )
        for in_file, here in self.file_keys.items():
            if prefix + in_file in state_dict:
                state_dict[prefix + here] = state_dict.pop(prefix + in_file)
        super()._load_from_state_dict(state_dict, prefix, *args)


def as_base_layer(linear: nn.Linear | NF4Linear) -> nn.Linear | NF4Linear:
    """A linear layer as the base of an adapted one; a bitsandbytes `Linear4bit` is taken over.

    Raises:
        TypeError: neither an `nn.Linear`, an `NF4Linear` nor a `Linear4bit`, or one that does more.
        ValueError: see `NF4Linear.from_bitsandbytes`.
    """
    accepted = has_forward_of(linear, nn.Linear) or has_forward_of(linear, NF4Linear)
    wanted = "a plain nn.Linear, an NF4Linear or a bitsandbytes Linear4bit"
    require_plain(linear, accepted or is_linear4bit(linear), wanted)
    if isinstance(linear, nn.Linear) and is_linear4bit(linear):
        return NF4Linear.from_bitsandbytes(linear)
    return linear
