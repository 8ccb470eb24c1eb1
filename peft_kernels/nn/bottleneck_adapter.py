"""`BottleneckAdapter`: the adapters of Houlsby, Pfeiffer and He, with parameters as `adapters` names them."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import nn

from peft_kernels.core.checks import check_finite, check_flag, check_probability, check_size
from peft_kernels.functional import bottleneck_adapter
from peft_kernels.nn.plain_linear import check_place
from peft_kernels.ops.adapter.functional import LayerNorm, activation_name

Activation = str | Callable[[torch.Tensor], torch.Tensor]

_HOULSBY = {
    "mh_adapter": True,
    "output_adapter": True,
    "reduction_factor": 16,
    "non_linearity": "swish",
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "dropout": 0.0,
}
_PFEIFFER = _HOULSBY | {"mh_adapter": False, "non_linearity": "relu", "original_ln_before": True}
_PARALLEL = _HOULSBY | {
    "mh_adapter": False,
    "non_linearity": "relu",
    "reduction_factor": 2,
    "init_weights": "mam_adapter",
    "is_parallel": True,
    "scaling": 4.0,
}

# The options of DoubleSeqBnConfig, SeqBnConfig and ParBnConfig in `adapters`. Where adapters are put
# (mh_adapter, output_adapter) and what surrounds them (original_ln_*, residual_before_ln): the model's code.
BOTTLENECK_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        name: MappingProxyType(p)
        for name, p in zip(("houlsby", "pfeiffer", "parallel"), (_HOULSBY, _PFEIFFER, _PARALLEL), strict=True)
    }
)
INIT_WEIGHTS = ("bert", "mam_adapter", "houlsby")


class BottleneckAdapter(nn.Module):
    """out = D(scaling * (W_u f(W_d h + b_d) + b_u)) * gate + residual, in one pass over the tokens.

    W_d is [r, d] and W_u [d, r], with r = input_size // reduction_factor, at least 1. Parameters have the
    names that `adapters` 1.3 gives them (`adapter_down.0.weight`, `adapter_up.bias`, `scaling`, ...), and
    the same initial values, so the state_dict of an `adapters` `Adapter` fits and the other way round.

        >>> adapter = pk.nn.BottleneckAdapter.pfeiffer(768)
        >>> h = torch.randn(2, 5, 768)
        >>> adapter(h, residual=h).shape  # h + adapter(h), in one pass
        torch.Size([2, 5, 768])

    Args:
        input_size: d.
        reduction_factor: d / r; below 1 it makes r larger than d.
        non_linearity: f, by the name it has in transformers, or any callable (`functional.bottleneck_adapter`
            says which run fused).
        scaling: a number; "learned" for one trained factor, or "channel" for d of them, starting at 1.
        is_parallel: the adapter stands beside a layer instead of behind it, and adds no residual itself.
        ln_before: a layer norm of its own on the input.
        ln_after: one on the output.
        adapter_residual_before_ln: add the residual before `ln_after`, not after it.
        use_gating: multiply with sigmoid(W_g h + b_g), averaged over each sequence.
        dropout: probability, in [0, 1), of dropout on the up product in training mode. The mask is recomputed
            in the backward pass, not stored.
        init_weights: "bert" (normal, 0.02), "mam_adapter" (Kaiming, and W_u zero: starts as the identity) or
            "houlsby" (truncated normal, 0.01).
        device: where to make it.
        dtype: of the parameters.

    Raises:
        TypeError: `input_size` is not an int, or `scaling` no number.
        ValueError: an option is out of range, or a name not known.

    Source: Houlsby et al., arXiv 1902.00751; Pfeiffer et al., 2005.00247; He et al., 2110.04366.
    """

    def __init__(
        self,
        input_size: int,
        reduction_factor: float = 16,
        *,
        non_linearity: Activation = "relu",
        scaling: float | str = 1.0,
        is_parallel: bool = False,
        ln_before: bool = False,
        ln_after: bool = False,
        adapter_residual_before_ln: bool = False,
        use_gating: bool = False,
        dropout: float = 0.0,
        init_weights: str = "bert",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_size("input_size", input_size)
        check_finite("reduction_factor", reduction_factor)
        check_probability("dropout", dropout)
        check_place(device, dtype)
        for flag, value in (
            ("is_parallel", is_parallel),
            ("ln_before", ln_before),
            ("ln_after", ln_after),
            ("adapter_residual_before_ln", adapter_residual_before_ln),
            ("use_gating", use_gating),
        ):
            check_flag(flag, value)
        if not reduction_factor > 0:
            raise ValueError(f"reduction_factor must be positive, got {reduction_factor}")
        if input_size / reduction_factor >= 2**31:
            raise ValueError(
                "reduction_factor must not be so small that the rank input_size / reduction_factor exceeds "
                f"2^31, got {reduction_factor}"
            )
        if not isinstance(non_linearity, str) and not callable(non_linearity):
            raise TypeError(f"non_linearity must be a name or a callable, got {non_linearity!r}")
        if isinstance(non_linearity, str) and activation_name(non_linearity) is None:
            raise ValueError(
                f"non_linearity must be a name that bottleneck_adapter knows, got {non_linearity!r}; "
                "for another pass a callable, such as transformers.activations.get_activation(...)"
            )
        if init_weights not in INIT_WEIGHTS:
            raise ValueError(f"init_weights must be one of {', '.join(INIT_WEIGHTS)}, got {init_weights!r}")
        super().__init__()
        made: Any = {"device": device, "dtype": dtype}
        self.input_size = input_size
        self.down_sample = max(1, int(input_size // reduction_factor))
        self.non_linearity = non_linearity
        self.is_parallel, self.use_gating = is_parallel, use_gating
        self.adapter_residual_before_ln = adapter_residual_before_ln
        layers: list[nn.Module] = []
        if ln_before:
            self.adapter_norm_before = nn.LayerNorm(input_size, **made)
            layers.append(self.adapter_norm_before)
        self.adapter_down = nn.Sequential(*layers, nn.Linear(input_size, self.down_sample, **made))
        self.adapter_up = nn.Linear(self.down_sample, input_size, **made)
        self.scaling: float | nn.Parameter
        if isinstance(scaling, str):
            if scaling not in ("learned", "channel"):
                raise ValueError(f"scaling must be a number, 'learned' or 'channel', got {scaling!r}")
            self.scaling = nn.Parameter(torch.ones(1 if scaling == "learned" else input_size, **made))
        else:
            check_finite("scaling", scaling)
            self.scaling = scaling
        if ln_after:
            self.adapter_norm_after = nn.LayerNorm(input_size, **made)
        if use_gating:
            self.gate = nn.Linear(input_size, 1, **made)
        self.dropout = nn.Dropout(dropout)
        self._init_weights(init_weights)

    @classmethod
    def houlsby(cls, input_size: int, **changes: Any) -> Self:
        """The adapter of Houlsby et al. (DoubleSeqBn in `adapters`): swish, reduction 16.

        Args:
            input_size: d.
            **changes: options of the class that differ.
        """
        return cls.from_config(input_size, BOTTLENECK_PRESETS["houlsby"], **changes)

    @classmethod
    def pfeiffer(cls, input_size: int, **changes: Any) -> Self:
        """The adapter of Pfeiffer et al. (SeqBn in `adapters`): relu, reduction 16.

        Args:
            input_size: d.
            **changes: options of the class that differ.
        """
        return cls.from_config(input_size, BOTTLENECK_PRESETS["pfeiffer"], **changes)

    @classmethod
    def parallel(cls, input_size: int, **changes: Any) -> Self:
        """The parallel adapter of He et al. (ParBn in `adapters`): relu, reduction 2, scaling 4.

        Args:
            input_size: d.
            **changes: options of the class that differ.
        """
        return cls.from_config(input_size, BOTTLENECK_PRESETS["parallel"], **changes)

    @classmethod
    def from_config(cls, input_size: int, config: Mapping[str, Any], **changes: Any) -> Self:
        """An adapter by a config of `adapters`, such as `SeqBnConfig()` or that of an AdapterHub file.

        Args:
            input_size: d.
            config: its options; those that concern the model around the adapter are left aside.
            **changes: options that differ from it, and `device` and `dtype`.

        Raises:
            ValueError: an option asks for what this class does not have: PHM layers (Compacter), stochastic
                depth, or a reduction factor for each layer.
        """
        for option in ("phm_layer", "stochastic_depth"):
            if config.get(option):
                raise ValueError(
                    f"config must not have {option}, got {config[option]!r}; run such adapters in the "
                    "adapters library, where replace_layers leaves them as they are"
                )
        if isinstance(config.get("reduction_factor"), Mapping):
            raise ValueError("reduction_factor must be a number, got a mapping; pass that of this layer")
        known = {name: config[name] for name in _OPTIONS if name in config}
        return cls(input_size, **(known | changes))

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The formula of the class.

        Args:
            hidden: h, [..., d], with gating [batch, sequence, d]; float32, bfloat16, float16 or float64.
            residual: [..., d], dtype of `hidden` or float32; added to the result. None for none.

        Returns:
            [..., d], in the dtype of `hidden`, or of `residual` if that is wider.

        Raises:
            ValueError: a residual is given to a parallel adapter, which has none; or gating and `hidden` is
                not [batch, sequence, d].
        """
        if self.is_parallel and residual is not None:
            raise ValueError("residual must be None for a parallel adapter, which adds none, got a tensor")
        down, up = self._linears
        return bottleneck_adapter(
            hidden,
            down.weight,
            down.bias,
            up.weight,
            up.bias,
            activation=self.non_linearity,
            scaling=self.scaling,
            residual=residual,
            ln_before=_parameters(getattr(self, "adapter_norm_before", None)),
            ln_after=_parameters(getattr(self, "adapter_norm_after", None)),
            adapter_residual_before_ln=self.adapter_residual_before_ln,
            dropout_p=self.dropout.p if self.training else 0.0,
            gate=self._gate(hidden) if self.use_gating else None,
        )

    def extra_repr(self) -> str:
        """Settings that no sub-module shows."""
        scaling = self.scaling if isinstance(self.scaling, float | int) else list(self.scaling.shape)
        return f"non_linearity={self.non_linearity!r}, scaling={scaling}, is_parallel={self.is_parallel}"

    @property
    def _linears(self) -> tuple[nn.Linear, nn.Linear]:
        down: Any = self.adapter_down[-1]
        return down, self.adapter_up

    def _gate(self, hidden: torch.Tensor) -> torch.Tensor:
        """One factor for each sequence, [batch, 1, 1]."""
        if hidden.dim() != 3:
            raise ValueError(f"hidden must be [batch, sequence, d] for gating, got {list(hidden.shape)}")
        weight, bias = self.gate.weight.to(hidden.dtype), self.gate.bias.to(hidden.dtype)
        gate = torch.sigmoid(nn.functional.linear(hidden, weight, bias))
        return gate.mean(dim=1, keepdim=True)

    @torch.no_grad()
    def _init_weights(self, how: str) -> None:
        down, up = self._linears
        for linear in (down, up, *([self.gate] if self.use_gating and how != "houlsby" else [])):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if how == "mam_adapter":
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
        elif how == "houlsby":  # which leaves a gate as nn.Linear has it
            for linear in (down, up):
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)


_OPTIONS = (
    "reduction_factor",
    "non_linearity",
    "scaling",
    "is_parallel",
    "ln_before",
    "ln_after",
    "adapter_residual_before_ln",
    "use_gating",
    "dropout",
    "init_weights",
)


def _parameters(norm: nn.LayerNorm | None) -> LayerNorm | None:
    return None if norm is None else (norm.weight, norm.bias, norm.eps)
