"""A linear layer on random features of its input; see :mod:`eckart.training.snnk`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from eckart.errors import InputError, problems
from eckart.linalg.hashed import check_seed, gaussians

Kind = Literal["exp", "relu", "gelu"]


class SNNKLinear(nn.Module):
    """y = Θ Ψ(x) + c for x (…, in): ``readout`` Θ (out, features) and ``bias`` are trained, Ψ is drawn from ``seed``.

    ``scale`` is a, the factor on the inputs. State dicts, deepcopy and ``.to`` work as for any module; loading one
    takes over its seed and scale. The forward pass draws nothing and touches no random generator. ``replaces`` names
    the tensors of the block that it takes the place of, which a checkpoint has to know. Raises InputError for sizes
    below 1 and unknown kinds.
    """

    seed: Tensor
    scale: Tensor
    projection: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        features: int,
        *,
        kind: Kind = "exp",
        scale: float = 1.0,
        seed: int = 0,
        bias: bool = True,
        replaces: Iterable[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_seed(seed, "SNNKLinear")
        _check(in_features, out_features, features, kind, scale)
        self.in_features, self.out_features, self.features = in_features, out_features, features
        self.kind: Kind = kind
        self.replaces = tuple(replaces)
        """Names of tensors inside of the replaced block, ``down.weight``."""
        self.readout = nn.Parameter(torch.zeros(out_features, features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("seed", torch.tensor(seed))
        self.register_buffer("scale", self.readout.new_tensor(scale))
        empty = self.readout.new_empty(0)
        self.register_buffer("projection", empty, persistent=False)
        self.draw()
        self.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.lift(x), self.readout, self.bias)

    def lift(self, x: Tensor) -> Tensor:
        """Ψ(x), (…, features)."""
        scale = self.scale.to(x)
        z = linear(x, self.projection.to(x)) * scale
        if self.kind == "exp":
            lifted = torch.exp(z - (scale * x).square().sum(-1, keepdim=True) / 2)
        else:
            lifted = z.relu() if self.kind == "relu" else gelu(z)
        return lifted / math.sqrt(self.features)

    @property
    def own_macs(self) -> int:
        """Multiply-adds per token: those of the projection and of the readout."""
        return self.features * (self.in_features + self.out_features)

    def to_dense(self) -> nn.Module:
        """Raises InputError: no dense layer computes this."""
        raise InputError(
            f"SNNKLinear with {self.features} random features of {self.kind} has no dense form; it can be saved and "
            "loaded with Eckart only."
        )

    def entry(self) -> dict[str, Any]:
        """What a checkpoint has to know to build this layer's skeleton. Raises InputError without ``replaces``."""
        if not self.replaces:
            raise InputError(
                "a checkpoint has to know which tensors an SNNKLinear takes the place of: set layer.replaces, as in "
                "layer.replaces = tuple(block.state_dict()), or give bundle the block itself, an nn.Module."
            )
        sizes = {"in": self.in_features, "out": self.out_features, "features": self.features}
        rest = {"function": self.kind, "bias": self.bias is not None, "replaces": list(self.replaces)}
        return {"kind": "random-features", **sizes, **rest}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, features={self.features}, "
            f"kind={self.kind!r}, bias={self.bias is not None}"
        )

    def draw(self) -> None:
        """Make the projection out of the seed; on the meta device there is nothing to draw."""
        if self.seed.is_meta or self.readout.is_meta:
            return
        self.projection = gaussians(int(self.seed), (self.features, self.in_features)).to(self.readout)


def _after_load(layer: SNNKLinear, _: object) -> None:
    layer.draw()


def _check(in_features: int, out_features: int, features: int, kind: str, scale: float) -> None:
    found = [
        f"{name} is at least 1; got {value}"
        for name, value in (("in_features", in_features), ("out_features", out_features), ("features", features))
        if value < 1
    ]
    if kind not in get_args(Kind):
        found.append(f"kind is one of {', '.join(get_args(Kind))}; got {kind!r}")
    if not 0 < scale < math.inf:
        found.append(f"scale is a positive number; got {scale!r}")
    if found:
        raise InputError(problems("SNNKLinear", found))
