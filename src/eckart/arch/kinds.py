"""Which modules are linear maps, how they store their weights, and which ones are left alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from eckart.records import SiteKind

_CALLED: dict[type[nn.Module], SiteKind] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.Embedding: "embedding",
}
_UNHANDLED = (
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.EmbeddingBag,
)
_EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Weight:
    """A parameter of a module that acts as a linear map."""

    parameter: str
    """Its name inside of the module."""
    kind: SiteKind
    groups: int = 1
    bias: bool = False


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether this is the ``Conv1D`` of transformers: a linear map that stores its weight (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_experts(module: nn.Module) -> bool:
    """Whether this module fuses the experts of a mixture into parameters of three dimensions."""
    marked = hasattr(module, "is_transposed") or "experts" in type(module).__name__.lower()
    return marked and any(p is not None and p.ndim == 3 for p in module._parameters.values())


def weights_of(module: nn.Module) -> tuple[Weight, ...]:
    """The linear maps among a module's own parameters; none where :func:`unfit` has something against it."""
    if unfit(module) is not None:
        return ()
    if is_experts(module):
        return tuple(Weight(name, "experts") for name in module._parameters if name in _EXPERT_WEIGHTS)
    kind = _kind(module)
    if kind is None:
        return ()
    groups = module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d)) else 1
    return (Weight("weight", kind, groups, bias=getattr(module, "bias", None) is not None),)


def unfit(module: nn.Module) -> str | None:
    """Why a module that holds linear maps is left alone; None where it is taken, and where it holds none."""
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weights without calling them"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return "nn.MultiheadAttention reads this weight without calling it"
    if isinstance(module, _UNHANDLED):
        return f"{type(module).__name__} is not handled"
    if is_experts(module):
        return _unfit_experts(module)
    kind = _kind(module)
    if kind is None:
        return None
    base = next((base for base in _CALLED if isinstance(module, base)), None)
    if base is not None and type(module).forward is not base.forward:
        return f"{type(module).__name__} has a forward of its own"
    return _unfit_options(module) or _unfit_weight(module._parameters.get("weight"), kind, module)


def _kind(module: nn.Module) -> SiteKind | None:
    if is_transformers_conv1d(module):
        return "conv1d"
    return next((kind for base, kind in _CALLED.items() if isinstance(module, base)), None)


def _unfit_options(module: nn.Module) -> str | None:
    if hasattr(module, "parametrizations"):
        return "it is parametrised; remove the parametrisation first"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.padding_mode != "zeros":
        return f"its padding mode is {module.padding_mode!r}; only 'zeros' is handled"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm changes its weight in every forward pass"
    if isinstance(module, nn.Embedding) and module.sparse:
        return "its gradients are sparse"
    return None


def _unfit_weight(weight: Tensor | None, kind: SiteKind, module: nn.Module) -> str | None:
    if weight is None:
        return "its weight is not a parameter of its own"
    if is_lazy(weight):
        return "its weight has no shape yet; call the model once"
    if not weight.is_floating_point() or torch.finfo(weight.dtype).bits < 16:
        return f"its weight is stored as {str(weight.dtype).removeprefix('torch.')}"
    if weight.numel() == 0:
        return "its weight is empty"
    rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
    if kind == "conv" and isinstance(module, (nn.Conv1d, nn.Conv2d)):
        rows //= module.groups
    if kind == "experts":
        rows, columns = weight.shape[1], weight.shape[2]
    return "its rank is 1 already" if min(rows, columns) == 1 else None


def _unfit_experts(module: nn.Module) -> str | None:
    weights = {name: p for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    strange = [name for name in weights if name not in _EXPERT_WEIGHTS]
    if strange or not hasattr(module, "is_transposed"):
        return f"the layout of {type(module).__name__} ({', '.join(strange or weights)}) is not known"
    if module.is_transposed:
        return f"{type(module).__name__} stores its weights (experts, in, out)"
    if getattr(module, "has_bias", False):
        return f"the experts of {type(module).__name__} have biases"
    return next((why for p in weights.values() if (why := _unfit_weight(p, "experts", module))), None)
