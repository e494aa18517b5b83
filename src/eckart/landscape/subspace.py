"""A model trained through few numbers: θ = θ₀ + P θ_d, with θ_d = 0 at the start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from eckart.errors import InputError, NotFiniteError
from eckart.landscape.projections import ProjectionKind, projection


class SubspaceModel(nn.Module):
    """``model`` with its trainable parameters replaced by θ₀ + P θ_d; train and call it like any module.

    θ₀ are the parameters as they are, all D of them that require a gradient, laid end to end; they are frozen in place
    and stay part of the state_dict. ``theta`` (d,) starts at zero, so the first output is the model's own. With
    ``layer_scales`` (SAID) there is one factor λ_l per layer, a module that owns parameters, starting at 1:
    θ_l = θ₀,l + λ_l (P θ_{d−m})_l, and the m factors are taken out of ``dimension``.

    ``dimension`` is everything that is trained: d, or d − m numbers and m scales. θ_d is float32, float64 where the
    parameters are; sums are formed in that and rounded to the parameter's own dtype. P is a function of ``seed``; see
    :mod:`eckart.landscape.projections` for the kinds and their cost. Only ``forward`` of the model goes through the
    subspace; :meth:`merged` gives the plain model back.

    Raises InputError for a model without trainable parameters, with parameters on several devices, or a dimension out
    of range; NotFiniteError for NaN or Inf in θ₀.
    """

    def __init__(
        self,
        model: nn.Module,
        dimension: int,
        *,
        kind: ProjectionKind = "fastfood",
        layer_scales: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
        _check(chosen)
        owners = [name.rpartition(".")[0] for name in chosen]
        layers = {owner: place for place, owner in enumerate(dict.fromkeys(owners))}
        scales = len(layers) if layer_scales else 0
        if isinstance(dimension, int) and dimension <= scales:
            raise InputError(
                f"SubspaceModel: {scales} layers take one scale each out of the dimension; "
                f"it has to be at least {scales + 1}; got {dimension}."
            )
        first = next(iter(chosen.values()))
        self.total = sum(p.numel() for p in chosen.values())
        """D: parameters that move."""
        wide = any(p.dtype == torch.float64 for p in chosen.values())
        dtype = torch.float64 if wide else torch.float32
        self.projection = projection(kind, self.total, dimension - scales, seed=seed).to(first.device, dtype)
        self.theta = nn.Parameter(torch.zeros(dimension - scales, dtype=dtype, device=first.device))
        if scales:
            self.scales: nn.Parameter | None = nn.Parameter(torch.ones(scales, dtype=dtype, device=first.device))
        else:
            self.register_parameter("scales", None)
        self.moved = tuple(zip(chosen, (layers[owner] for owner in owners), strict=True))
        """(name of a parameter, index of its layer), in the order of the rows of P."""
        for p in chosen.values():
            p.requires_grad_(False)
        self.model = model

    @property
    def dimension(self) -> int:
        """d: how many numbers are trained, scales included."""
        return self.theta.numel() + (0 if self.scales is None else self.scales.numel())

    def parameters_now(self) -> dict[str, Tensor]:
        """Name → θ₀ + P θ_d of every moved parameter; gradients reach ``theta`` and ``scales``."""
        origin = {name: self.model.get_parameter(name) for name, _ in self.moved}
        offsets = self.projection(self.theta).split([p.numel() for p in origin.values()])
        now = {}
        for (name, layer), offset in zip(self.moved, offsets, strict=True):
            step = offset if self.scales is None else offset * self.scales[layer]
            now[name] = (origin[name].to(step.dtype) + step.view(origin[name].shape)).to(origin[name].dtype)
        return now

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.parameters_now(), args, kwargs)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The model itself with θ written into it and its parameters trainable again; this wrapper is spent."""
        for name, value in self.parameters_now().items():
            self.model.get_parameter(name).copy_(value).requires_grad_(True)
        self.theta.zero_()
        return self.model

    def extra_repr(self) -> str:
        return f"dimension={self.dimension}, total={self.total}"


def _check(chosen: dict[str, nn.Parameter]) -> None:
    if not chosen:
        raise InputError(
            "SubspaceModel: no parameter of the model requires a gradient; set requires_grad on those to be trained."
        )
    devices = {str(p.device) for p in chosen.values()}
    if len(devices) > 1:
        raise InputError(f"SubspaceModel: the parameters have to lie on one device; got {', '.join(sorted(devices))}.")
    if wrong := [name for name, p in chosen.items() if not p.is_floating_point()]:
        raise InputError(
            f"SubspaceModel: only real floating point parameters can move; got others in {', '.join(wrong)}."
        )
    if wrong := [name for name, p in chosen.items() if not bool(torch.isfinite(p).all())]:
        raise NotFiniteError(f"SubspaceModel: NaN or Inf in {', '.join(wrong)}; there is no θ₀ to start from.")
