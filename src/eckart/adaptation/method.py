"""What an adaptation method is: a change ΔW of a weight with few numbers to train, zero at the start.

Note [Zero at the start, in one product]. PiSSA and its kin train factors that start at a part of W, B₀A₀, and take that
part out of W. Here W stays as it is, and ΔW = B A − B₀A₀ is written as (B − B₀) A + B₀ (A − A₀): the same matrix and
the same gradients, Bᵀ-weighted for A and A-weighted for B. At the start both differences are exactly zero, and so is ΔW
x in any precision; later no large terms cancel. And it is one product of rank 2r, [B − B₀, B₀] [A; A − A₀], which is
what a LoRA file stores, so that a model with the exported file computes bit for bit what the adapter computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eckart.compression import Need
from eckart.errors import EckartError
from eckart.linalg import SVD, leading_svd
from eckart.moments import SiteMoments
from eckart.records import Claim, Paper, SiteKind

DEFAULT_RANK = 8
"""Of a method without a rule of its own, where neither a rank nor a budget is given."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The matrices W (slices × out × in) that one adapter changes, as :func:`eckart.linalg.matricize` gives them."""

    name: str
    """Dotted path of the layer."""
    kind: SiteKind
    out_features: int
    in_features: int
    slices: int = 1
    """Groups of a convolution; 1 for everything else."""
    kernel: tuple[int, ...] = ()
    """Of a convolution: ``in_features`` is channels per group × Π kernel, ordered as ``torch.nn.functional.unfold``."""

    @property
    def full_rank(self) -> int:
        return min(self.out_features, self.in_features)

    @property
    def weight_parameters(self) -> int:
        return self.slices * self.out_features * self.in_features


@dataclass(frozen=True, kw_only=True)
class Source:
    """What an adapter may start from. Methods read it in ``start`` and never keep it."""

    layout: Layout
    weight: Tensor
    """(slices, out, in), detached, in the dtype and on the device of the layer (dequantised)."""
    seed: int = 0
    moments: Sequence[SiteMoments] = ()
    """One per slice where the method needs moments, else empty."""
    decompose: Callable[[Tensor, int], SVD] = field(default=leading_svd)
    """``decompose(matrix, rank)``: the leading triplets, from a cache where there is one."""

    def leading(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """U (slices, out, rank), S (slices, rank), Vh (slices, rank, in) of the weight, float64 on the CPU."""
        found = [self.decompose(matrix, rank) for matrix in self.weight]
        return torch.stack([f.U for f in found]), torch.stack([f.S for f in found]), torch.stack([f.Vh for f in found])

    def generator(self) -> torch.Generator:
        """Draws that depend on the seed and the name of the layer, not on torch's state or the order of layers."""
        digest = sha256(f"{self.seed} {self.layout.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Delta(nn.Module):
    """ΔW (slices × out × in) of one layer: what it adds to the layer's output, and how it is stored.

    A method subclasses it. ``__init__(layout, rank, options)`` only allocates, by :meth:`trained` and :meth:`fixed`
    (zeros, float32, one level below the module), and looks at no weight: loading a file must work without one.
    :meth:`start` fills in the numbers; after it ΔW is zero. Then at least one of :meth:`factors`, :meth:`delta`
    and :meth:`forward`.
    """

    linear: ClassVar[bool] = True
    """Whether it is a change of the weight; False for adapters that are not linear in x, which cannot be merged."""

    def __init__(self, layout: Layout, rank: int, options: Any) -> None:
        super().__init__()
        self.layout, self.rank, self.options = layout, rank, options
        self.started = False
        """Whether it holds numbers, from :meth:`start` or from a file, and not only room for them."""

    @classmethod
    def fits(cls, layout: Layout, options: Any) -> str | None:
        """None, or why this layer cannot be served: a sentence without a subject, as “embeddings have no …”."""
        return None

    @classmethod
    def most(cls, layout: Layout, options: Any) -> int:
        """The highest rank that makes sense."""
        return layout.full_rank

    @classmethod
    def default_rank(cls, source: Source, options: Any) -> int:
        """The rank where neither ``r`` nor a budget was given."""
        return min(DEFAULT_RANK, cls.most(source.layout, options))

    @classmethod
    def cost(cls, layout: Layout, rank: int, options: Any) -> int:
        """Numbers to train at this rank."""
        with torch.device("meta"):
            return cls(layout, rank, options).parameter_count()

    def trained(self, name: str, *shape: int) -> None:
        """Room for numbers to train."""
        self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32)))

    def fixed(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """Room for numbers that are saved and not trained."""
        self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    @torch.no_grad()
    def fill(self, **values: Tensor) -> None:
        """Copy numbers of any dtype into parameters and buffers by name."""
        for name, value in values.items():
            getattr(self, name).copy_(value)

    def start(self, source: Source) -> None:
        """Fill in the numbers of an untrained adapter. Deterministic in ``source``."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """B (slices, out, k) and A (slices, k, in) with ΔW = B A to the last bit, or None where there are none."""
        return None

    def delta(self) -> Tensor:
        """ΔW (slices, out, in), differentiable. Raises EckartError where it is no change of a weight."""
        if not self.linear:
            raise EckartError(f"{type(self).__name__} is not linear in its input, so it is no change of a weight.")
        factors = self.factors()
        if factors is None:
            raise NotImplementedError
        return factors[0] @ factors[1]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What is added to the layer's output ``y`` (…, out) for the input ``x`` (…, in), for layers of one slice."""
        factors = self.factors()
        if factors is None:
            return linear(x, self.delta()[0])
        B, A = factors
        return linear(linear(x, A[0]), B[0])

    def arrived(self) -> None:
        """Called where numbers were put in place without ``load_state_dict``, once, before they are used."""

    def penalty(self) -> Tensor | None:
        """A scalar that the method adds to the loss, or None."""
        return None

    def after_step(self, step: int) -> bool:
        """Called after every step of the optimiser, counted from 1, without gradients.

        True asks for a restart of the optimiser: what it keeps of earlier steps is no longer about these numbers.
        """
        return False

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, trained={self.parameter_count()}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(key.startswith(prefix) for key in state_dict):
            self.started = True


@dataclass(frozen=True, kw_only=True)
class AdaptMethod:
    """A way of changing a weight with few numbers, as a value."""

    name: str
    summary: str
    paper: Paper
    options: type[Any]
    """Frozen keyword-only dataclass of JSON values; the only place of the method's defaults."""
    delta: type[Delta]
    exact: bool
    """Whether ``factors()`` gives a LoRA that is the adapter, not close to it."""
    needs: frozenset[Need] = frozenset()
    """Moments that ``start`` reads; they come from a calibration."""
    budgeted: bool = True
    """Whether a budget can be spread over its layers; False where they share their numbers."""
    settle: Callable[[Any, Iterable[Source]], Any] | None = None
    """Called with the options and all layers of a fresh adapter, for options that are measured: what it returns is
    stored with the adapter, so that all sizes follow from it."""
    tie: Callable[[Sequence[Delta]], None] | None = None
    """Called with all of an adapter's deltas after they were made and after they were loaded, to share numbers."""
    claim: Claim


def difference(B: Tensor, A: Tensor, B0: Tensor, A0: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of B A − B₀A₀: see Note [Zero at the start, in one product]. Batches of (out, k) and (k, in)."""
    return torch.cat([B - B0, B0], dim=-1), torch.cat([A, A - A0], dim=-2)
