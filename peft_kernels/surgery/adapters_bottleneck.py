"""The bottleneck adapters of the `adapters` library, sequential and parallel, in one kernel.

An adapter returns (output, down, up), because compositions consume them: AdapterFusion the `up` of each of
its adapters and nothing else, all others the output. An adapter cannot know which composition it is called
in, so a fused one writes all three, as the stock one does; what is not used costs no gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from peft_kernels.core.transforms import transform_reason
from peft_kernels.functional import bottleneck_adapter_with_intermediates
from peft_kernels.nn.dropout import PhiloxDropout
from peft_kernels.nn.plain_linear import bypass_reason, is_exactly, is_plain_tensor
from peft_kernels.ops.dropout.schema import FLOAT_DTYPES
from peft_kernels.surgery.peft_common import linear_reason
from peft_kernels.surgery.registry import FusedLayer, Status, handles

# The kernel's name for what `adapters` takes for f, by the class of the module.
_ACTIVATIONS = {
    "torch.nn.modules.activation.LeakyReLU": "leaky_relu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.linear.Identity": "identity",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.LinearActivation": "identity",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.SiLUActivation": "silu",
}


class Parts(NamedTuple):
    """An adapter as the kernel takes it."""

    norm_before: nn.Module | None
    down: nn.Linear
    up: nn.Linear
    activation: str
    dropout_p: float


@handles("adapters.methods.modeling:Adapter")
class FusedAdapter(FusedLayer):
    """A sequential adapter: its layer norms and its gate are called as they are, the rest is one kernel."""

    takes_residual = True

    @staticmethod
    def status(layer: nn.Module) -> Status:
        """Fused: plain linear layers in one dtype, an activation that the kernel has, plain dropout."""
        parts = find_parts(layer)
        reason = parts if isinstance(parts, str) else _dtype_reason(layer, parts, parts.down.weight.dtype)
        return Status(not reason, reason)

    def forward(self, x: torch.Tensor, residual_input: Any, output_gating: bool = False) -> Any:
        """The stock forward, fused where it can be."""
        layer: Any = self
        parts = find_parts(layer)
        if isinstance(parts, str):
            return super().forward(x, residual_input, output_gating)
        residual = residual_input if self.takes_residual else None
        reason = _input_reason(layer, parts, x, residual, self.takes_residual)
        if reason:
            return self.run_stock(reason, x, residual_input, output_gating)
        gate = None
        if layer.use_gating:
            gate = torch.mean(torch.sigmoid(layer.gate(x)), dim=1).unsqueeze(-1)  # [batch, 1, 1]
        norm_after = layer.adapter_norm_after if layer.add_layer_norm_after else None
        inside = norm_after is None or layer.adapter_residual_before_ln  # the residual comes before any norm
        output, down, up = bottleneck_adapter_with_intermediates(
            x if parts.norm_before is None else parts.norm_before(x),
            parts.down.weight,
            parts.down.bias,
            parts.up.weight,
            parts.up.bias,
            activation=parts.activation,
            scaling=layer.scaling,
            residual=residual if inside else None,
            dropout_p=parts.dropout_p,
            gate=gate,
        )
        if norm_after is not None:
            output = norm_after(output)
        if residual is not None and not inside:
            output = output + residual
        self.ran_fused()
        return (output, down, up, gate) if layer.use_gating and output_gating else (output, down, up)


@handles("adapters.methods.modeling:ParallelAdapter")
class FusedParallelAdapter(FusedAdapter):
    """A parallel adapter: the residual is the model's business."""

    takes_residual = False


def find_parts(layer: Any) -> Parts | str:
    """What the kernel takes of an adapter, or why its own forward must run."""
    if hasattr(layer, "DropPath") and layer.DropPath.training:
        return "stochastic depth"
    sequence, up, dropout = layer.adapter_down, layer.adapter_up, layer.dropout
    reason = bypass_reason(sequence)
    if not is_exactly(sequence, nn.Sequential) or len(sequence) != 2 + layer.add_layer_norm_before:
        reason = "its layers are not as adapters makes them"
    if reason:
        return f"adapter_down: {reason}"
    *before, down, non_linearity = sequence
    reason = linear_reason("adapter_down", down) or linear_reason("adapter_up", up)
    if reason:
        return reason
    reason = bypass_reason(dropout)
    if not is_exactly(dropout, nn.Dropout, PhiloxDropout):
        reason = f"a {type(dropout).__name__}, not an nn.Dropout"
    elif dropout.training and (dropout.p >= 1 or dropout.inplace):
        reason = "p must be below 1 and inplace False"
    if reason:
        return f"dropout: {reason}"
    activation = _activation(non_linearity)
    if activation is None:
        function = getattr(non_linearity, "f", non_linearity)
        name = getattr(function, "__name__", type(function).__name__)
        return f"no kernel has its activation, {name}"
    p = dropout.p if dropout.training else 0.0
    return Parts(before[0] if before else None, down, up, activation, p)


def _activation(module: Any) -> str | None:
    """The kernel's name for the activation of an adapter, if it has it."""
    if f"{type(module).__module__}.{type(module).__qualname__}" == (
        "adapters.methods.modeling.Activation_Function_Class"
    ):
        if bypass_reason(module):
            return None
        module = module.f
    if module is nn.functional.leaky_relu:
        return "leaky_relu"
    if not isinstance(module, nn.Module) or bypass_reason(module):
        return None
    name = _ACTIVATIONS.get(f"{type(module).__module__}.{type(module).__qualname__}")
    if name == "leaky_relu" and module.negative_slope != 0.01:
        return None
    return name


def _dtype_reason(layer: Any, parts: Parts, dtype: torch.dtype) -> str:
    """Why the kernel cannot compute in `dtype` with the adapter's parameters, or ""."""
    if dtype not in FLOAT_DTYPES:
        return f"it computes in {dtype}"
    allowed = (dtype, torch.promote_types(dtype, torch.float32))
    tensors = [parts.down.weight, parts.down.bias, parts.up.weight, parts.up.bias]
    tensors += [layer.scaling] if isinstance(layer.scaling, torch.Tensor) else []
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in allowed:
            return f"a parameter is {tensor.dtype}, the layer computes in {dtype}"
    return ""


def _input_reason(layer: Any, parts: Parts, x: Any, residual: Any, takes_residual: bool) -> str:
    """Why the kernel cannot take these inputs, or ""."""
    for name, tensor in (("input", x), ("residual", residual)):
        if tensor is None and name == "residual" and not takes_residual:
            continue
        if not is_plain_tensor(tensor):
            return f"the {name} is a {type(tensor).__name__}"
        if tensor.device.type == "meta":
            return f"the {name} is on the meta device"
    if residual is not None and residual.shape != x.shape:
        return f"the residual is {list(residual.shape)}, the input {list(x.shape)}"
    if layer.use_gating and x.dim() != 3:
        return f"gating takes [batch, sequence, features], got {list(x.shape)}"
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    elif parts.down.weight.dtype != dtype:
        return f"the input is {dtype}, the adapter {parts.down.weight.dtype}"
    if isinstance(layer.scaling, torch.Tensor) and layer.scaling.dtype != dtype:  # adapters' result is wider
        return f"its scaling is {layer.scaling.dtype}, the layer computes in {dtype}"
    if residual is not None and residual.dtype not in (dtype, torch.promote_types(dtype, torch.float32)):
        return f"the residual is {residual.dtype}, the layer computes in {dtype}"
    return _dtype_reason(layer, parts, dtype) or transform_reason()
