"""`NF4Linear`: a linear layer whose weight is frozen in 4-bit NormalFloat."""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from peft_kernels.core.checks import check_shape
from peft_kernels.functional import nf4_linear, nf4_quantize
from peft_kernels.nn.plain_linear import has_forward_of, is_linear4bit, new_linear, require_plain
from peft_kernels.ops.linear.schema import check_activation
from peft_kernels.ops.nf4.functional import require_nf4_weight
from peft_kernels.ops.nf4.schema import WEIGHT_DTYPES
from peft_kernels.ops.nf4.weight import NestedAbsmax, NF4Weight

_STATISTICS = ("absmax", "nested_absmax", "nested_code", "nested_offset")


class NF4Linear(nn.Module):
    """y = x W^T + bias with W [N, K] frozen in NF4, about 4.5 bits an element, and never materialised.

        >>> layer = pk.nn.NF4Linear.from_linear(nn.Linear(64, 32), double_quant=True)
        >>> layer(torch.ones(2, 64)).shape, layer.nf4_weight.dtype
        (torch.Size([2, 32]), torch.float32)

    Its state_dict has the keys and the bytes of bitsandbytes' `Linear4bit`; each loads what the other saved.
    `.to(dtype)` and the like change the bias only, `.to(device)` moves everything.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias; it is a parameter like that of `nn.Linear`.
        blocksize: elements that share one absmax: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
        double_quant: store absmax in 8 bits.
        device: where to make it.
        dtype: of the bias, and of the initial values (those of `nn.Linear`) that are quantised.
        activation: None, or "int8", for inference: see the attribute.

    Attributes:
        weight: packed codes, uint8 [(N*K+1)//2], a parameter that is never trained. `nf4_weight` is the
            weight with all that belongs to it.
        activation: with "int8", x is rounded to 8 bits in eval mode, which is faster on a CPU; `nf4_linear`
            says what it costs. It has no gradient: call the layer under torch.inference_mode() or
            torch.no_grad() then. In training mode it makes no difference. May be set on any layer.

    Raises:
        ValueError: `blocksize`, `dtype` or `activation` is none of those.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_code: torch.Tensor | None
    nested_offset: torch.Tensor | None
    activation: str | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        blocksize: int = 64,
        double_quant: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: str | None = None,
    ) -> None:
        check_activation(activation)
        linear = new_linear(in_features, out_features, bias, device, dtype, WEIGHT_DTYPES)
        self._init(nf4_quantize(linear.weight, blocksize, double_quant), linear.bias)
        self.activation = activation

    def _init(self, weight: NF4Weight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)
        self._set_weight(weight)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, blocksize: int = 64, double_quant: bool = False) -> Self:
        """Quantise a layer's weight; the bias is shared with it.

        Args:
            linear: weight in float32, bfloat16 or float16. It is left as it is.
            blocksize: see the class.
            double_quant: see the class.

        Raises:
            TypeError: not a plain `nn.Linear` (a PEFT layer, one with hooks, ...).
            ValueError: unsupported dtype or blocksize.
        """
        remedy = "use NF4Linear.from_bitsandbytes" if is_linear4bit(linear) else ""
        require_plain(linear, has_forward_of(linear, nn.Linear), "a plain nn.Linear", remedy)
        weight = nf4_quantize(linear.weight, blocksize, double_quant)
        return cls.from_weight(weight, linear.bias).train(linear.training)

    @classmethod
    def from_bitsandbytes(cls, linear: nn.Linear) -> Self:
        """Take over a quantised bitsandbytes `Linear4bit` without copying: both share their tensors.

        The result computes in the dtype of its input, whatever the layer's `compute_dtype` is.

        Args:
            linear: a `Linear4bit` in NF4, on its device (which is what quantises it).

        Raises:
            TypeError: not a plain `Linear4bit` (a PEFT layer, one with hooks, ...).
            ValueError: it is not quantised yet, or not in NF4.
        """
        remedy = "use NF4Linear.from_linear" if has_forward_of(linear, nn.Linear) else ""
        require_plain(linear, is_linear4bit(linear), "a bitsandbytes Linear4bit", remedy)
        return cls.from_weight(NF4Weight.from_bitsandbytes(linear.weight), linear.bias).train(linear.training)

    @classmethod
    def from_weight(cls, weight: NF4Weight, bias: nn.Parameter | None = None) -> Self:
        """Make a layer of a weight that is quantised already, without copying: both share their tensors.

        Args:
            weight: [N, K], of `pk.functional.nf4_quantize` for example.
            bias: [N], float32 or the dtype of the inputs; or None.

        Raises:
            TypeError: `weight` is not an `NF4Weight`, or `bias` not an nn.Parameter.
            ValueError: `weight` is not a matrix, or `bias` does not fit it.
        """
        shape = require_nf4_weight("weight", weight).shape
        if len(shape) != 2:
            raise ValueError(f"weight must be [N, K], got an NF4Weight of shape {list(shape)}")
        if bias is not None:
            if not isinstance(bias, nn.Parameter):
                raise TypeError(
                    f"bias must be an nn.Parameter or None, got {type(bias).__name__}; "
                    "wrap it in nn.Parameter"
                )
            check_shape("bias", bias, "[N]", shape[:1])
        layer = cls.__new__(cls)
        layer._init(weight, bias)
        return layer

    @property
    def nf4_weight(self) -> NF4Weight:
        """The weight, sharing the layer's tensors."""
        nested = None
        if self.nested_absmax is not None and self.nested_code is not None and self.nested_offset is not None:
            nested = NestedAbsmax(
                self.nested_absmax, self.nested_code, self.nested_offset, self.nested_blocksize
            )
        shape = (self.out_features, self.in_features)
        return NF4Weight(
            self.weight, self.absmax, nested, shape, self.blocksize, self.weight_dtype, self.quant_storage
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The formula of the class.

        Args:
            x: [..., K]; float32, bfloat16 or float16.

        Returns:
            y [..., N], in the dtype of x.
        """
        return nf4_linear(x, self.nf4_weight, self.bias, None if self.training else self.activation)

    def extra_repr(self) -> str:
        """As of `nn.Linear`, and the format."""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"blocksize={self.blocksize}, double_quant={self.nested_absmax is not None}{activation}"
        )

    def _set_weight(self, weight: NF4Weight) -> None:
        self.weight = nn.Parameter(weight.packed, requires_grad=False)
        self.blocksize, self.weight_dtype, self.quant_storage = (
            weight.blocksize,
            weight.dtype,
            weight.quant_storage,
        )
        nested = weight.nested
        self.nested_blocksize = 0 if nested is None else nested.blocksize
        tensors = (
            weight.absmax,
            *((None,) * 3 if nested is None else (nested.absmax, nested.code, nested.offset)),
        )
        for name, tensor in zip(_STATISTICS, tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)  # saved by _save_to_state_dict

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move, but never cast, the statistics: bf16 absmax would be another weight."""
        before = {name: getattr(self, name) for name in _STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            after = getattr(self, name)
            if tensor is not None and after.dtype != tensor.dtype:
                setattr(self, name, tensor.to(after.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.nf4_weight.state_dict(prefix))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix + "weight")}
        rest = {key: value for key, value in state_dict.items() if key not in own}
        if prefix + "weight" in own:
            try:
                self._load_weight(NF4Weight.from_state_dict(own, prefix), local_metadata)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                error_msgs.append(f"{prefix}weight: {error.args[0]}")
            rest[prefix + "weight"] = self.weight
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_weight(self, weight: NF4Weight, local_metadata: dict[str, Any]) -> None:
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"must be {[self.out_features, self.in_features]}, got {list(weight.shape)}")
        if not local_metadata.get("assign_to_params_buffers", False):
            weight = copy.deepcopy(weight).to(self.weight.device)
        self._set_weight(weight)
