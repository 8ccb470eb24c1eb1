"""Parameter groups for torch's optimisers: LoRA+, which trains B faster than A."""

from typing import Any

from torch import nn

from peft_kernels.core.checks import check_finite, check_module

_PEFT_EMBEDDING = "peft.tuners.lora.layer.Embedding"


def loraplus_param_groups(
    model: nn.Module,
    lr: float,
    ratio: float,
    *,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in LoRA+'s groups: A at the rate lr, B at lr * ratio.

        >>> optimizer = torch.optim.AdamW(pk.optim.loraplus_param_groups(model, lr=1e-4, ratio=16))
        >>> [group["lr"] for group in optimizer.param_groups]  # A, embeddings, B, B without decay
        [0.0001, 1e-06, 0.0016, 0.0016]

    A and B should not move at one rate: as the width n of a layer grows, features are learned efficiently
    where the rate of A is of order 1/n and that of B of order 1. The paper recommends a ratio of about
    2^4 = 16, larger where the task is harder, and an lr somewhat smaller than for LoRA.

    The groups are those of PEFT's `create_loraplus_optimizer`, always four, empty or not, in this order, so
    that the optimiser's state_dict loads there and the other way round:

    | group | parameters | lr | weight_decay |
    |---|---|---|---|
    | A | A; all that is in no other group, such as the weight of a new head | lr | weight_decay |
    | embeddings | A and B of PEFT's LoRA over `nn.Embedding` | embedding_lr | weight_decay |
    | B | B; vectors such as DoRA's magnitude | lr * ratio | weight_decay |
    | B without decay | biases, and the weights of layer norms | lr * ratio | 0 |

    For the 8-bit optimisers of bitsandbytes, PEFT also has it keep the state of every `nn.Embedding` in 32
    bits; if you train one, do so with its `GlobalOptimManager`.

    Args:
        model: with PEFT's LoRA layers, fused or not, or with `pk.nn.LoRALinear`.
        lr: learning rate of A.
        ratio: learning rate of B over that of A, `loraplus_lr_ratio` in PEFT; 1 or more in the paper.
        weight_decay: of what is decayed at all, `loraplus_weight_decay` in PEFT. The groups carry it, so that
            the optimiser's own `weight_decay` does not apply.
        embedding_lr: `loraplus_lr_embedding` in PEFT.

    Returns:
        Groups for any optimiser of `torch.optim` or with its interface, and for learning rate schedules.

    Raises:
        TypeError: `model` is not a module, or a number is none.
        ValueError: `model` has no trainable parameters; `lr` or `ratio` is not positive, `weight_decay` or
            `embedding_lr` is negative, or one of them is not finite.

    Source: LoRA+, arXiv 2402.12354, section 4 (efficient feature learning).
    """
    check_module("model", model, "pass the model that is to be trained")
    for name, value in (("lr", lr), ("ratio", ratio)):
        check_finite(name, value)
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name, value in (("weight_decay", weight_decay), ("embedding_lr", embedding_lr)):
        check_finite(name, value)
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay, "lr": lr},
        {"params": [], "weight_decay": weight_decay, "lr": embedding_lr},
        {"params": [], "weight_decay": weight_decay, "lr": lr * ratio},
        {"params": [], "weight_decay": 0.0, "lr": lr * ratio},
    ]
    a, embeddings, b, b_without_decay = groups
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        ancestors = _ancestors(model, name)
        if len(ancestors) > 2 and _is_peft_embedding(ancestors[-2]):  # <embedding>.lora_embedding_A.<adapter>
            group = embeddings
        elif "lora_B" in name or parameter.ndim == 1:
            in_norm = any(isinstance(module, nn.LayerNorm) for module in ancestors[1:])
            group = b_without_decay if in_norm or "bias" in name else b
        else:
            group = a
        group["params"].append(parameter)
    if not any(group["params"] for group in groups):
        raise ValueError(
            "model must have trainable parameters, got none; add an adapter first, or load it with "
            "is_trainable=True"
        )
    return groups


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules on the way from `model`, which comes first, to the owner of a parameter."""
    modules = [model]
    for part in name.split(".")[:-1]:
        modules.append(modules[-1].get_submodule(part))
    return modules


def _is_peft_embedding(module: nn.Module) -> bool:
    """By name, because PEFT need not be installed and is never imported here."""
    return any(f"{base.__module__}.{base.__qualname__}" == _PEFT_EMBEDDING for base in type(module).__mro__)
