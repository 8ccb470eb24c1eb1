"""Which class handles which layer type, and how a layer is given its fused forward.

A layer is fused by giving the *instance* another class: a subclass of its own class, with the handler's
`forward` in front. It keeps its parameters and its state, `isinstance` stays true, and the subclass goes by
the name of the stock class, because PEFT compares `__class__.__name__` in places.
"""

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import nn

from peft_kernels.core.plan import Product


class Status(NamedTuple):
    """Whether a plain call of a layer runs fused as things stand, and why not (or a remark)."""

    fused: bool
    reason: str = ""


class FusedLayer(nn.Module):
    """Base of the handlers: a handler has the fused `forward` of one stock class, and judges its layers.

    Attributes:
        stock_class: what the layer is an instance of apart from the handler.
        handler: the handler itself. Both are set on the classes that `fused_class` makes.
    """

    stock_class: ClassVar[type[nn.Module]]
    handler: ClassVar[type["FusedLayer"]]

    # What fused layers add to their __dict__: not copied, not pickled, not left behind.
    scratch: ClassVar[tuple[str, ...]] = ("_nf4_cache", "_scale_cache", "_stock_reason")

    @staticmethod
    def status(layer: nn.Module) -> Status:
        """Judge a layer of the handled type, fused already or not, as it is now."""
        raise NotImplementedError

    @staticmethod
    def parts(layer: nn.Module) -> Iterable[nn.Module]:
        """Layers inside `layer` that are fused along with it and share its row in the report."""
        return ()

    @staticmethod
    def product(layer: nn.Module) -> Product | None:
        """The layer's product with an NF4 weight, where it has one that can be read."""
        return None

    def on_fused(self) -> None:
        """Called once the layer has its fused forward."""

    def run_stock(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        """The stock forward; `reason` is kept for `explain`."""
        if not torch.compiler.is_compiling():
            self.__dict__["_stock_reason"] = reason
        return super().forward(*args, **kwargs)

    def ran_fused(self) -> None:
        """Forget why an earlier call was not."""
        if not torch.compiler.is_compiling():
            self.__dict__.pop("_stock_reason", None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "stock_class" not in vars(type(self)):
            return super().__reduce_ex__(protocol)  # of a class that others made since, and copy in their way
        # The class cannot be imported by its name, so pickle and deepcopy are told how to make it.
        state = {key: value for key, value in self.__dict__.items() if key not in self.scratch}
        return _new_fused_layer, (self.stock_class, self.handler), state


HandlerT = TypeVar("HandlerT", bound=type[FusedLayer])
_handlers: dict[str, type[FusedLayer] | str] = {}


def handles(stock: str) -> Callable[[HandlerT], HandlerT]:
    """Decorator: register a handler for the layer type `stock`, "module:name".

    By name, because the library that defines the type need not be installed and is never imported here.
    """

    def register(handler: HandlerT) -> HandlerT:
        _handlers[stock] = handler
        return handler

    return register


def leaves_alone(stock: str, reason: str) -> None:
    """Register why there is no handler for the layer type `stock`, "module:name"."""
    _handlers[stock] = reason


def find_handler(layer: nn.Module) -> type[FusedLayer] | str:
    """The handler for a layer, or why there is none."""
    if isinstance(layer, FusedLayer):
        return layer.handler
    layer_class: Any = type(layer)
    for base in layer_class.__mro__:
        handler = _handlers.get(f"{base.__module__}:{base.__qualname__}")
        if handler is not None:
            known = isinstance(handler, str) or layer_class.forward is base.forward
            return handler if known else f"its class overrides {base.__name__}.forward"
    return "no fused kernel for this type of layer"


@functools.cache
def fused_class(stock_class: Any, handler: Any) -> type[FusedLayer]:
    """The subclass of `stock_class` that has the forward of `handler` and the name of `stock_class`."""
    namespace = {
        "__module__": stock_class.__module__,
        "__qualname__": stock_class.__qualname__,
        "__doc__": stock_class.__doc__,
        "stock_class": stock_class,
        "handler": handler,
    }
    return types.new_class(
        stock_class.__name__, (handler, stock_class), exec_body=lambda body: body.update(namespace)
    )


def restored_class(layer_class: Any) -> type[nn.Module]:
    """The class of a fused layer without its handler.

    fully_shard and torch.nn.utils.parametrize, too, give a layer a subclass of its class: what they added
    after the handler stays.
    """
    if "stock_class" in vars(layer_class):
        stock_class: type[nn.Module] = layer_class.stock_class
        return stock_class
    bases = [restored_class(base) if issubclass(base, FusedLayer) else base for base in layer_class.__bases__]
    namespace = {
        key: value for key, value in vars(layer_class).items() if key not in ("__dict__", "__weakref__")
    }
    return types.new_class(layer_class.__name__, tuple(bases), exec_body=lambda body: body.update(namespace))


def _new_fused_layer(stock_class: Any, handler: Any) -> FusedLayer:
    fused = fused_class(stock_class, handler)
    return fused.__new__(fused)
