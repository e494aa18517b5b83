"""What the hooks of a calibration do with every call of a site's module."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eckart.errors import InputError, NotFiniteError
from eckart.moments.accumulators import GradientSums, InputSums
from eckart.moments.rows import batched, check_shapes, input_rows, leading_shape, output_rows, pieces
from eckart.moments.tokens import BatchTokens, Picks
from eckart.records import Site

Gradients = Literal["full", "scale", "none"]


@dataclass
class _Seen:
    """An input tensor of the current batch."""

    tensor: weakref.ref[Tensor]
    version: int
    """Of its values: a tensor that was changed in place is another input."""
    keys: set[str]
    """The accumulators that counted it, or would have."""
    kept: Tensor | None = None
    """Its values for the backward pass, where the Fisher sums pair them with gradients."""


@dataclass
class Observer:
    """Adds up the inputs and output gradients of the sites, batch by batch."""

    gradients: Gradients
    fisher: bool
    inputs: dict[str, InputSums] = field(default_factory=dict)
    gradient_sums: dict[str, GradientSums] = field(default_factory=dict)
    input_of: dict[str, str] = field(default_factory=dict)
    """For each site that was called the accumulator of its input, fixed by its first call."""
    unmasked: set[str] = field(default_factory=set)
    """Sites whose inputs did not fit a mask that marks padding."""
    leaves: list[Tensor] = field(default_factory=list)
    """Where the graph of the current batch begins: outputs of sites that nothing differentiable precedes."""
    weight: float = 1.0
    """Of one backward pass."""
    encoder_states: Tensor | None = None
    """Set while the decoder of an encoder-decoder model runs."""
    _tokens: BatchTokens | None = None
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _calls: Counter[str] = field(default_factory=Counter)

    def begin(self, tokens: BatchTokens) -> None:
        """Before a batch."""
        self._tokens = tokens
        self._seen, self.leaves, self.encoder_states, self._calls = {}, [], None, Counter()

    def end(self) -> None:
        """After a batch. Raises InputError where sites that share an input were not called alike."""
        for name, key in self.input_of.items():
            if self._calls[name] != self._calls[key]:
                raise _unshared(name, key)
        self._tokens, self._seen, self.leaves, self.encoder_states = None, {}, [], None

    def hook(self, site: Site) -> Callable[..., Any]:
        """The forward hook of a site's module, to be registered ``with_kwargs``."""

        def observe(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            original = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(original, Tensor) or not isinstance(output, Tensor):
                raise InputError(f"{site.name}: expected one tensor in and one out. Exclude this site.")
            return self._observe(site, module, original, output)

        return observe

    def _observe(self, site: Site, module: nn.Module, original: Tensor, output: Tensor) -> Tensor:
        x = batched(site, module, original.detach())
        y = output.detach() if x.ndim == original.ndim else output.detach().unsqueeze(0)
        check_shapes(site, module, x, y)
        decoder = self.encoder_states is not None and original is not self.encoder_states
        picks, unused = self._batch().picks(leading_shape(site, x), x.device, decoder=decoder)
        if unused:
            self.unmasked.add(site.name)
        seen = self._input(site, original)
        if self.input_of[site.name] == site.name:
            self._add_inputs(site, module, x, picks)
        self._check_output(site, module, x, y, picks)
        if self.gradients == "none":
            return output
        if self.fisher:
            if seen.kept is None:
                seen.kept = x.clone()
            x = seen.kept
        output = self._differentiable(site, output)

        def arrived(gradient: Tensor) -> None:
            g = gradient.detach()
            self._add_gradients(site, module, x, g if g.ndim == y.ndim else g.unsqueeze(0), picks)

        output.register_hook(arrived)  # type: ignore[no-untyped-call]
        return output

    def expert(self, site: Site, expert: int, inputs: Tensor, output: Tensor, index: Tensor, total: int) -> Tensor:
        """One expert's call: inputs (N, in), output (N, out), ``index`` (N,) of its rows among ``total`` tokens."""
        halves = torch.full((total,), -1, device=index.device)
        both, unused = self._batch().picks((total,), index.device, decoder=self.encoder_states is not None)
        if unused:
            self.unmasked.add(site.name)
        for half, pick in enumerate(both):
            halves[pick] = half
        a, b = ((halves[index] == half).nonzero().squeeze(1) for half in (0, 1))
        self.input_of[site.name] = site.name
        sums = self._sums(site)
        x = inputs.detach()
        if not sums.add(expert, x, (a, b)):
            raise _not_finite(f"{site.name}[{expert}]", "in its input")
        if self.gradients == "none":
            return output
        output = self._differentiable(site, output)

        def arrived(gradient: Tensor) -> None:
            kept = x if self.fisher else None
            if not self.gradient_sums[site.name].add(expert, gradient.detach(), (a, b), kept, self.weight):
                raise _not_finite(f"{site.name}[{expert}]", "in the gradients at its output")

        output.register_hook(arrived)  # type: ignore[no-untyped-call]
        return output

    def _batch(self) -> BatchTokens:
        if self._tokens is None:
            raise InputError("a site was called outside of a batch; collect() is not reentrant.")
        return self._tokens

    def _sums(self, site: Site) -> InputSums:
        if site.name not in self.inputs:
            matrix = site.kind != "embedding"
            self.inputs[site.name] = InputSums(site.slices, site.in_features, matrix=matrix)
        return self.inputs[site.name]

    def _input(self, site: Site, x: Tensor) -> _Seen:
        """Which accumulator the site's input belongs to. Sites that are called with one tensor share theirs."""
        seen = self._seen.get(id(x))
        if seen is None or seen.tensor() is not x or seen.version != x._version:
            seen = self._seen[id(x)] = _Seen(weakref.ref(x), x._version, set())
        shares = site.kind in ("linear", "conv1d")
        key = self.input_of.get(site.name)
        if key is None:
            key = min(seen.keys, default=site.name) if shares else site.name
            self.input_of[site.name] = key
        elif key != site.name and key not in seen.keys:
            raise _unshared(site.name, key)
        self._calls[site.name] += 1
        if shares:
            seen.keys.add(key)
        return seen

    def _add_inputs(self, site: Site, module: nn.Module, x: Tensor, picks: Picks) -> None:
        sums = self._sums(site)
        for part, inside in pieces(site, module, x, picks):
            for index, rows in enumerate(input_rows(site, module, x[part])):
                if not sums.add(index, rows, inside):
                    raise _not_finite(site.name, "in its input")

    def _check_output(self, site: Site, module: nn.Module, x: Tensor, y: Tensor, picks: Picks) -> None:
        # The sum of everything is cheap; only where it is not finite the padding is told apart.
        if bool(torch.isfinite(y.sum(dtype=torch.promote_types(y.dtype, torch.float32)))):
            return
        for part, inside in pieces(site, module, x, picks):
            for rows in output_rows(site, module, y[part]):
                if any(not bool(rows[pick].isfinite().all()) for pick in inside):
                    raise _not_finite(site.name, "in its output")

    def _differentiable(self, site: Site, output: Tensor) -> Tensor:
        """The output, with a graph. No weight needs a gradient, so graphs begin at the first sites' outputs."""
        if not torch.is_grad_enabled():
            raise InputError(
                f"the model runs {site.name} without gradients. Exclude this site, or take gradients='none'."
            )
        if site.name not in self.gradient_sums:
            self.gradient_sums[site.name] = GradientSums(
                site.slices,
                site.out_features,
                site.in_features,
                full=self.gradients == "full",
                fisher=self.fisher,
            )
        if output.requires_grad:
            return output
        leaf = output.detach().requires_grad_()
        self.leaves.append(leaf)
        return leaf.clone()  # what follows may change it in place, which a leaf does not allow

    def _add_gradients(self, site: Site, module: nn.Module, x: Tensor, g: Tensor, picks: Picks) -> None:
        sums = self.gradient_sums[site.name]
        for part, inside in pieces(site, module, x, picks):
            inputs = input_rows(site, module, x[part]) if self.fisher else [None] * site.slices
            for index, rows in enumerate(output_rows(site, module, g[part])):
                if not sums.add(index, rows, inside, inputs[index], self.weight):
                    raise _not_finite(site.name, "in the gradients at its output")


def _unshared(name: str, key: str) -> InputError:
    return InputError(
        f"{name} shared its input with {key} in one call and not in another. Calibrate it in a run of its own."
    )


def _not_finite(where: str, what: str) -> NotFiniteError:
    return NotFiniteError(
        f"{where}: NaN or infinite numbers {what}. Nothing was written. Check the weights of this layer and of the "
        "ones before it, or calibrate in float32."
    )
