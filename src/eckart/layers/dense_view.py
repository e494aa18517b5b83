"""The dense weight of a factored layer, computed only when someone computes with it.

Dozens of model files look at ``some_linear.weight`` for nothing but its dtype (T5: ``wo.weight.dtype``), in
every forward pass. A property that multiplies the factors would make each look cost a matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from eckart.errors import EckartError

# Answered from the wrapper itself; everything else multiplies the factors.
_ATTRIBUTES = "shape dtype device layout ndim requires_grad is_cuda is_meta is_cpu is_sparse nbytes itemsize"
_METHODS = "size dim numel nelement is_floating_point is_complex element_size __hash__ __len__"
_METADATA: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()]
    + [getattr(Tensor, name) for name in _METHODS.split()]
)


class DenseView(Tensor):
    """Stands for the product of the factors: shape, dtype and device are free, any computation builds it.

    Gradients reach the factors. Writing into it would be lost, so it raises :class:`EckartError`.
    """

    _build: Callable[[], Tensor]
    _is_hf_initialized = True
    """Tells transformers' initialisation, which writes into weights by name (T5), to leave it alone."""

    @staticmethod
    def __new__(cls, build: Callable[[], Tensor], shape: Iterable[int], like: Tensor, requires_grad: bool) -> DenseView:
        view: DenseView = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=like.dtype, device=like.device, requires_grad=requires_grad
        )
        view._build = build
        return view

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **(kwargs or {}))
            name = getattr(func, "__name__", "")
            writes = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
            written = args[0] if args else (kwargs or {}).get("tensor")  # torch.nn.init passes it by name
            if writes and isinstance(written, cls):
                raise EckartError(
                    f"the weight of a factored layer is computed from its factors, so {name!r} on it would "
                    "be lost. Change the factors (layer.a, layer.b), or call layer.to_dense() first."
                )
            args, full = tree_map_only(DenseView, lambda view: view._build(), (args, dict(kwargs or {})))
            return func(*args, **full)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args, full = tree_map_only(DenseView, lambda view: view._build(), (args, dict(kwargs or {})))
        return func(*args, **full)


def dense_view(build: Callable[[], Tensor], shape: Iterable[int], factor: Tensor, other: Tensor) -> Tensor:
    """The dense weight that ``build`` computes; under torch.compile and torch.export the plain product."""
    if torch.compiler.is_compiling():
        return build()
    return DenseView(build, shape, factor, factor.requires_grad or other.requires_grad)
