"""The last factor of every compressed map, fitted again to what the compressed model passes on.

*What it does.* A plan fits every map to the inputs of the original model, but behind other compressed maps it reads
something else. Block by block, in the order of the model, both models run on the same data, and of every compressed
map the factor that writes the output is fitted again by least squares; what it reads stays. Nothing is trained.

*Formula.* With x the input in the original and x̂ in the compressed model, z what the factor reads there (a x̂; the kept
rows of a pivoted map; the kept features of a narrowed one) and B₀ the present factor, B minimises

    E‖t − B z − c‖² + λ Σᵢ E[zᵢ²] ‖(B − B₀)ᵢ‖²,   t = β (W x + b) + (1 − β) (W x̂ + b),   λ = rank / tokens,

so B = (T + λ B₀ D)(S + λ D)⁻¹ with T = E[t zᵀ], S = E[z zᵀ] and D = diag(S); centred with c from the means where there
is a bias, else c = 0. For ``lowrank``, T is W P aᵀ with P = β E[x x̂ᵀ] + (1 − β) E[x̂ x̂ᵀ], and S = a E[x̂ x̂ᵀ] aᵀ. A
narrowed map no longer sees all of x̂: there B₀ z + c₀ stands for W x̂ + b, and β = 0 changes nothing. An error metric of
the outputs would drop out of the least squares.

*Cost.* The dense original beside the compressed model (twice the memory), and per block a forward pass of both over
the data (with β = 0 of the compressed one alone); per token rank · (in + out + rank) multiply-adds for each map, in
float32 (float64 on CUDA). No matrix is larger than out × rank.

*When it does not help.* Fitted on few tokens, or for data of another domain. β near 1 chases the original's activations
through maps that cannot give them (worse than no refit on a small encoder), so β ends at ¼. Measured on the default
plan of a small causal LM (``benchmarks/refine.py``; rise of the loss in nats per token at 20 / 40 / 60 % removed), 60
windows: .006 / .099 / .314 without and .006 / .097 / .308 with β = ¼, on
text of another domain .022 / .108 / .323 and .020 / .099 / .289. On 8 windows
.027 / .148 / .412 and .027 / .148 / .407, elsewhere
.026 / .177 / .477 and .026 / .172 / .455: little gained, and at 20 % a little
lost. β = 0 changes next to nothing. So it is off by default; with ample data take β = ¼.

*Departs from the paper in.* One pass per block, not per map. B is drawn towards B₀ rather than towards 0, by as much
as rank / tokens says, so that directions the data do not reach stay as they were.

*Reference.* The blended target: A. K. Sinha, F. Fleuret, “AA-SVD: Anchored and Adaptive SVD for Large Language Model
Compression”, 2026, https://arxiv.org/abs/2604.02119, whose anchored objective is β = 1. Refitting a factor on the
compressed stream: X. Wang, Y. Zheng, Z. Wan, M. Zhang, “SVD-LLM: Truncation-aware Singular Value Decomposition for
Large Language Model Compression”, 2024, https://arxiv.org/abs/2403.07378, the layer-wise update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from eckart.arch import get_module
from eckart.errors import InputError, NotFiniteError
from eckart.layers import FactoredLinear, NarrowColumns, PivotedLinear, is_narrowed
from eckart.layers.linear import is_conv1d
from eckart.moments import Batch
from eckart.moments.accumulators import to_float64
from eckart.moments.collect import evaluating
from eckart.moments.tokens import BatchTokens
from eckart.records import Progress, Site, silent

MOST = 0.25
"""The largest β."""
Tap = Callable[[Tensor, Tensor], None]
"""Told the input and the output of a call."""


@dataclass(eq=False)
class _Part:
    """A compressed map: the layer that is solved for, and the sums over tokens."""

    layer: nn.Module
    solved: nn.Module
    rows: Tensor | None
    """Places among the outputs that ``solved`` writes; None for all."""
    narrow: bool
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, t: Tensor, z: Tensor) -> None:
        """Tokens with targets t (N, out) and features z (N, rank)."""
        # As in a calibration: products of one batch in float32 on a CPU, sums over batches in float64.
        precise = torch.float64 if z.is_cuda else torch.promote_types(z.dtype, torch.float32)
        t, z = t.to(precise), z.to(precise)
        new = {"t": to_float64(t).sum(0), "z": to_float64(z).sum(0), "tz": t.T @ z, "zz": z.T @ z}
        for name, value in new.items():
            wide = value.cpu().to(torch.float64)
            self.sums[name] = self.sums[name] + wide if name in self.sums else wide
        self.count += len(t)

    def solve(self, where: str) -> None:
        """Put the solution in its place."""
        old = self.solved.get_parameter("weight").detach()
        present = (old.T if is_conv1d(self.solved) else old).to("cpu", torch.float64)
        bias = getattr(self.solved, "bias", None)
        t, z, T, S = (self.sums[name] / self.count for name in ("t", "z", "tz", "zz"))
        if not all(bool(sums.isfinite().all()) for sums in (T, S)):
            raise NotFiniteError(f"{where}: NaN or infinite numbers in its input or output; it cannot be refitted.")
        if bias is not None:
            T, S = T - t.outer(z), S - z.outer(z)
        scale = S.diagonal()
        pull = len(S) / self.count * scale.clamp(min=1e-9 * float(scale.max()))
        if float(scale.max()) <= 0:
            return
        found = torch.linalg.solve(S + torch.diag(pull), T + present * pull, left=False)
        with torch.no_grad():
            self.solved.get_parameter("weight").copy_(found.T if is_conv1d(self.solved) else found)
            if bias is not None:
                bias.copy_(t - found @ z)


def check_blend(blend: object) -> None:
    """Raise InputError unless it is a number in [0, 0.25]."""
    if isinstance(blend, bool) or not isinstance(blend, (int, float)) or not 0 <= blend <= MOST:
        raise InputError(f"refit: the blend is a number in [0, {MOST}]; got {blend!r}.")


def refittable(layer: nn.Module) -> str | None:
    """Why a layer has no factor to fit again; None where it has one."""
    if isinstance(layer, (FactoredLinear, PivotedLinear)):
        if not isinstance(layer.b, nn.Linear):
            return "its factors are quantised"
        return None if layer.b.out_features else "all of its rows are kept"
    if isinstance(layer, NarrowColumns):
        return None if isinstance(layer.a, nn.Linear) else "it is quantised"
    if is_narrowed(layer) and (isinstance(layer, nn.Linear) or is_conv1d(layer)):
        return None
    return "it is no linear map in two factors, and none with fewer inputs"


def refit(
    model: nn.Module,
    base: nn.Module,
    batches: Sequence[Batch],
    sites: Sequence[Site],
    *,
    blend: float = 0.0,
    progress: Progress = silent,
) -> tuple[str, ...]:
    """Fit the last factor of the compressed maps of ``model`` again, in place; returns the names of those maps.

    Args:
        model: a plan was applied to it. In float32 or less the solution is rounded once.
        base: the dense original; left as it is.
        batches: as in :func:`eckart.moments.collect`; those of the calibration will do.
        sites: of the original, in the order of the model. Maps that stayed dense, lost rows only, are quantised, tied,
            convolutions, experts or embeddings are passed over.
        blend: β in [0, 0.25].

    Raises InputError for a β out of range, no batches, encoder-decoder models, and where the two models do not call
    their maps alike; NotFiniteError. Predicted and held-out errors of an outcome are those before the refit.
    """
    check_blend(blend)
    if not len(batches):
        raise InputError("refit needs batches; got none.")
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise InputError("refit does not know which tokens of an encoder-decoder model are padding; leave it out.")
    todo = [site for site in sites if _part_of(model, site) is not None]
    done: list[str] = []
    for _, group in groupby(todo, key=lambda site: site.depth if site.depth is not None else site.name):
        known = {site.name: part for site in group if (part := _part_of(model, site)) is not None}
        with torch.no_grad(), evaluating(model), evaluating(base):
            for batch in batches:
                progress("refit", len(done), len(todo))
                _observe(model, base, batch, known, float(blend))
        for name, part in known.items():
            if not part.count:
                raise InputError(f"{name}: no token reached this map, so it cannot be refitted. Use other data.")
            part.solve(name)
        done += known
    progress("refit", len(todo), len(todo))
    return tuple(done)


def _part_of(model: nn.Module, site: Site) -> _Part | None:
    if site.kind not in ("linear", "conv1d") or site.tied:
        return None
    layer = get_module(model, site.name)
    if refittable(layer) is not None:
        return None
    if isinstance(layer, PivotedLinear):
        return _Part(layer, layer.b, layer.index.long().argsort()[layer.rank :], narrow=False)
    if isinstance(layer, FactoredLinear):
        return _Part(layer, layer.b, None, narrow=False)
    if isinstance(layer, NarrowColumns):
        return _Part(layer, layer.a, None, narrow=True)
    weight = layer.get_parameter("weight")
    fewer_rows = weight.shape[1 if is_conv1d(layer) else 0] != site.out_features
    return None if fewer_rows else _Part(layer, layer, None, narrow=True)


@contextmanager
def _tapped(taps: Sequence[tuple[nn.Module, Tap]]) -> Iterator[None]:
    """Every call of a module tells its tap input and output."""

    def hook(tap: Tap) -> Callable[..., None]:
        def tell(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            tap(args[0] if args else next(iter(kwargs.values())), output)

        return tell

    handles = [module.register_forward_hook(hook(tap), with_kwargs=True) for module, tap in taps]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observe(model: nn.Module, base: nn.Module, batch: Batch, parts: Mapping[str, _Part], blend: float) -> None:
    """Run both models on a batch and add what the parts see."""
    wanted: dict[str, list[Tensor]] = {name: [] for name in parts}
    tokens = BatchTokens.of(batch, 0)

    def original(name: str) -> tuple[nn.Module, Tap]:
        # What follows may change an output in place.
        return get_module(base, name), lambda x, y: wanted[name].append(y.clone())

    def taps(name: str, part: _Part) -> list[tuple[nn.Module, Tap]]:
        features: list[Tensor] = []

        def seen(x: Tensor, y: Tensor) -> None:
            target = y if part.narrow else get_module(base, name)(x)
            if blend:
                if not wanted[name]:
                    raise _unlike(name)
                target = blend * wanted[name].pop(0) + (1 - blend) * target
            z = features.pop()
            a, b = tokens.picks(tuple(z.shape[:-1]), z.device, decoder=False)[0]
            keep = torch.cat([a, b])
            t = target.flatten(0, -2)[keep]
            part.add(t if part.rows is None else t[:, part.rows], z.flatten(0, -2)[keep])

        return [(part.solved, lambda x, y: features.append(x)), (part.layer, seen)]

    if blend:
        with _tapped([original(name) for name in parts]):
            _run(base, batch)
    with _tapped([tap for name, part in parts.items() for tap in taps(name, part)]):
        _run(model, batch)
    for name, left in wanted.items():
        if left:
            raise _unlike(name)


def _unlike(name: str) -> InputError:
    return InputError(f"{name}: the two models call this map a different number of times; leave the refit out.")


def _run(model: nn.Module, batch: Batch) -> None:
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})
    else:
        model(batch.to(device))
