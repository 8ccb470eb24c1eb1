"""What ours is measured against: plain PyTorch, bitsandbytes and PEFT, each as its users have it.

The builders here know libraries, not cases; `cases_*.py` puts them together. A missing library raises
`Unavailable`.
"""

from __future__ import annotations

import copy
import importlib.util
import shutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peft_kernels import NF4Weight
from peft_kernels.ops.nf4.reference import NESTED_BLOCKSIZE, NF4_CODE

from .case import Unavailable


def require(module: str) -> ModuleType:
    """Import an optional library.

    Raises:
        Unavailable: it is not installed.
    """
    package = module.partition(".")[0]
    if module not in sys.modules and importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")
    return importlib.import_module(module)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` through torch.compile with static shapes.

    Raises:
        Unavailable: there is no C++ compiler, which torch.compile needs on CPU.
    """
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        raise Unavailable("torch.compile needs a C++ compiler on CPU")
    torch.compiler.reset()  # or the cases before this one count as recompilations, of which 8 are allowed
    return torch.compile(function, dynamic=False, fullgraph=True)


def eager_operands(weight: NF4Weight) -> tuple[Tensor, ...]:
    """Tensors of a weight for `eager_dequantize`: packed, pairs, absmax and what undoes its nesting."""
    code = torch.tensor(NF4_CODE, dtype=torch.float32)
    pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)  # high nibble first; [256, 2]
    nested = weight.nested
    if nested is None:
        return weight.packed, pairs, weight.absmax
    return weight.packed, pairs, weight.absmax, nested.absmax, nested.code, nested.offset


def eager_absmax(absmax: Tensor, *nested: Tensor) -> Tensor:
    """absmax in float32 [blocks], double quantisation (its absmax, code and offset) undone."""
    if not nested:
        return absmax
    nested_absmax, code, offset = nested
    return code[absmax.int()] * nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.numel()] + offset


def eager_dequantize(shape: tuple[int, ...], packed: Tensor, pairs: Tensor, *absmax: Tensor) -> Tensor:
    """NF4 look-up in plain PyTorch: a byte selects two values, a block of them takes its absmax; float32.

    Of four ways to write it (stack or pairs, indexing, index_select or embedding) the fastest on CPU.
    """
    scale = eager_absmax(*absmax)
    values = F.embedding(packed.int(), pairs)  # [n / 2, 2]
    return (values.view(scale.numel(), -1) * scale[:, None]).view(shape)


class _EagerNF4Linear(torch.autograd.Function):
    """F.linear on a looked-up weight that is looked up again for the gradient.

    Plain autograd would save the dense weight, 4 N K bytes a layer: nobody can train that way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.shape = (n, x.shape[-1])
        return F.linear(x, eager_dequantize(ctx.shape, *operands).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        operands = ctx.saved_tensors
        dx = grad @ eager_dequantize(ctx.shape, *operands).to(grad.dtype)
        return dx, None, *(None for _ in operands)


def eager_nf4_linear(x: Tensor, n: int, *operands: Tensor) -> Tensor:
    """Y = x W^T with W [n, K] looked up in plain PyTorch; x [M, K]."""
    apply: Callable[..., Tensor] = _EagerNF4Linear.apply
    return apply(x, n, *operands)


def eager_lora(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, p: float) -> Tensor:
    """Base output y plus the low-rank part, in plain PyTorch."""
    return y + scaling * F.linear(F.linear(F.dropout(x, p), lora_a), lora_b)


def bitsandbytes_linear(weight: NF4Weight) -> Callable[[Tensor], Tensor]:
    """`bnb.matmul_4bit` on the standard layout: what `Linear4bit` runs in training, on every CPU."""
    bnb = require("bitsandbytes")
    packed, state = weight.to_bitsandbytes()

    def forward(x: Tensor) -> Tensor:
        result: Tensor = bnb.matmul_4bit(x, packed, quant_state=state)
        return result

    return forward


def bitsandbytes_module(weight: NF4Weight, dtype: torch.dtype) -> Any:
    """A `bnb.nn.Linear4bit` without bias around an existing weight, in training mode."""
    bnb = require("bitsandbytes")
    packed, state = weight.to_bitsandbytes()
    n, k = weight.shape
    module = bnb.nn.Linear4bit(
        k, n, bias=False, compute_dtype=dtype, compress_statistics=weight.nested is not None,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    module.weight = bnb.nn.Params4bit(
        packed, quant_state=state, blocksize=weight.blocksize, compress_statistics=weight.nested is not None,
        quant_type="nf4", bnb_quantized=True, module=module,
    )  # fmt: skip
    return module.train()


def bitsandbytes_repacked(weight: NF4Weight, x: Tensor) -> Callable[[Tensor], Tensor]:
    """`Linear4bit` in evaluation mode: with AVX512_BF16 it repacks the weight and computes in bfloat16.

    Raises:
        Unavailable: the CPU, or the shape, does not take that path.
    """
    module = bitsandbytes_module(copy.deepcopy(weight), x.dtype).eval()
    with torch.no_grad():
        module(x)
    if not getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        raise Unavailable("bitsandbytes does not repack here (needs a CPU with AVX512_BF16)")
    forward: Callable[[Tensor], Tensor] = module
    return forward


def unsloth_linear(
    weight: NF4Weight, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Callable[[Tensor], Tensor]:
    """Unsloth's autograd Function for one LoRA layer on a bitsandbytes weight; x [M, K].

    Raises:
        Unavailable: the library is not installed, or not for this machine.
    """
    try:
        function = require("unsloth.kernels.fast_lora").LoRA_W
    except (ImportError, NotImplementedError, RuntimeError) as error:  # it looks for a GPU when imported
        raise Unavailable(f"unsloth cannot be imported: {error}") from error
    packed, state = weight.to_bitsandbytes()

    def forward(x: Tensor) -> Tensor:
        y: Tensor = function.apply(x[None], packed, state, lora_a, lora_b, scaling)  # takes batches only
        return y[0]

    return forward


def has_dorafactors() -> bool:
    """Whether the installed PEFT is that of dorafactors, with fused DoRA kernels in PEFT's own layer."""
    return (
        importlib.util.find_spec("peft") is not None
        and importlib.util.find_spec("peft.tuners.lora.dora_fused") is not None
    )


def dense_module(weight: Tensor) -> nn.Linear:
    """A frozen `nn.Linear` without bias around an existing weight [N, K]."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def peft_layer(
    base: nn.Module, r: int, scaling: float, p: float, lora_a: Tensor, lora_b: Tensor, use_dora: bool = False
) -> tuple[nn.Module, Tensor, Tensor]:
    """PEFT's LoRA or DoRA layer over `base`, in training mode, with its own copies of A and B."""
    peft = require("peft")
    model = nn.Module()
    model.proj = base
    config = peft.LoraConfig(
        r=r, lora_alpha=scaling * r, lora_dropout=p, target_modules=["proj"], use_dora=use_dora
    )
    peft.inject_adapter_in_model(config, model)
    layer: Any = model.proj.train()
    own_a, own_b = (nn.Parameter(values.detach().clone()) for values in (lora_a, lora_b))
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = own_a, own_b
    return layer, own_a, own_b


def peft_ia3_layer(base: nn.Module, feedforward: bool, vector: Tensor) -> tuple[nn.Module, Tensor]:
    """PEFT's IA3 layer over `base`, in training mode, with its own copy of the vector."""
    peft = require("peft")
    model = nn.Module()
    model.proj = base
    weight: Any = base.weight
    model.is_loaded_in_4bit = weight.dtype == torch.uint8  # how PEFT knows
    config = peft.IA3Config(target_modules=["proj"], feedforward_modules=["proj"] if feedforward else [])
    peft.inject_adapter_in_model(config, model)
    layer: Any = model.proj.train()
    own = nn.Parameter(vector.detach().clone().view_as(layer.ia3_l["default"]))
    layer.ia3_l["default"] = own
    return layer, own


def adapters_module(
    size: int, rank: int, scaling: float, parameters: tuple[Tensor, ...]
) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """An `Adapter` of the adapters library (SeqBn, relu) and its parameters, which start as those given.

    Raises:
        Unavailable: the library is not installed.
    """
    require("adapters")
    modeling = importlib.import_module("adapters.methods.modeling")
    config = importlib.import_module("adapters").SeqBnConfig(scaling=scaling)
    module = modeling.Adapter("adapter", size, rank, config).to(parameters[0].dtype)
    own = (module.adapter_down[0].weight, module.adapter_down[0].bias, *module.adapter_up.parameters())
    with torch.no_grad():
        for mine, given in zip(own, parameters, strict=True):
            mine.copy_(given)
    return module, own
