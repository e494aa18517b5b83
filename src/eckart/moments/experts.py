"""The experts of a fused mixture, one call per expert, so that each one's inputs and outputs can be seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eckart.arch import get_module
from eckart.errors import InputError
from eckart.records import Site

ExpertCall = Callable[[Site, int, Tensor, Tensor, Tensor, int], Tensor]
"""Told (site, expert, inputs (N, in), output (N, out), index (N,) among all tokens, their number); gives the output
that takes its place."""


@contextmanager
def watch_experts(model: nn.Module, sites: Sequence[Site], call: ExpertCall) -> Iterator[None]:
    """Run the modules that own ``sites`` as a loop over experts while this is open.

    The first call of each module is compared with its own forward; InputError where they differ.
    """
    owners: dict[str, dict[str, Site]] = {}
    for site in sites:
        path, _, name = site.name.rpartition(".")
        owners.setdefault(path, {})[name] = site
    before: list[tuple[nn.Module, Any]] = []
    try:
        for path, named in owners.items():
            module = get_module(model, path)
            before.append((module, module.__dict__.get("forward")))
            module.forward = _loop(path, module, named, call)
        yield
    finally:
        for module, forward in before:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def _loop(path: str, module: nn.Module, named: Mapping[str, Site], call: ExpertCall) -> Callable[..., Tensor]:
    """``gate_up_proj`` or ``up_proj`` (E, ·, H) and ``down_proj`` (E, H, I): Σ over a token's experts of
    w · down(act(up x)), or w · down(act(gate x) · up x)."""
    original = module.forward
    parameters = dict(module.named_parameters(recurse=False))
    first = "gate_up_proj" if "gate_up_proj" in parameters else "up_proj"
    if not {first, "down_proj"} <= parameters.keys():
        raise InputError(f"the layout of the experts in {path} is not known; got {sorted(parameters)}. Exclude them.")
    checked = False

    def apply(name: str, expert: int, x: Tensor, token: Tensor, total: int) -> Tensor:
        y = linear(x, parameters[name][expert])
        return call(named[name], expert, x, y, token, total) if name in named else y

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal checked
        hidden, index, weights = _routing(path, [*args, *kwargs.values()])
        flat = hidden.reshape(-1, hidden.shape[-1])
        index, weights = index.reshape(len(flat), -1), weights.reshape(len(flat), -1)
        result = torch.zeros_like(flat)
        for expert in range(parameters[first].shape[0]):
            token, slot = (index == expert).nonzero(as_tuple=True)
            if not token.numel():
                continue
            inner = _activate(module, apply(first, expert, flat[token], token, len(flat)), first == "gate_up_proj")
            out = apply("down_proj", expert, inner, token, len(flat))
            if getattr(module, "has_post_expert_norm", False):
                out = module.get_submodule("post_expert_norm")(out)
            result.index_add_(0, token, (out * weights[token, slot, None]).to(result.dtype))
        result = result.reshape(hidden.shape)
        if not checked:
            with torch.no_grad():
                expected = original(*args, **kwargs)
            # Rounding of another order of sums stays below √ε of the largest number.
            allowed = torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
            difference = float((result.detach() - expected).abs().max())
            if difference > allowed:
                raise InputError(
                    f"the experts in {path} compute something else than act(gate) · up: their output differs by "
                    f"{difference:.2g}. Exclude them."
                )
            checked = True
        return result

    return forward


def _routing(path: str, values: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, chosen experts and their weights, whatever their names and order are."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    chosen = [value for value in tensors if not value.is_floating_point()]
    floating = [value for value in tensors if value.is_floating_point()]
    if len(chosen) != 1 or len(floating) != 2 or floating[1].shape != chosen[0].shape:
        raise InputError(
            f"the experts in {path} are called with {[tuple(t.shape) for t in tensors]}; expected hidden states, the "
            "indices of the chosen experts and weights of the same shape. Exclude them."
        )
    return floating[0], chosen[0], floating[1]


def _activate(module: nn.Module, inner: Tensor, gated: bool) -> Tensor:
    gate: Any = getattr(module, "_apply_gate", None)
    activation: Any = getattr(module, "act_fn", None)
    if gated and gate is not None:
        activated: Tensor = gate(inner)
        return activated
    if activation is None:
        raise InputError(f"{type(module).__name__} has no act_fn; its experts cannot be followed. Exclude them.")
    if gated:
        left, right = inner.chunk(2, dim=-1)
        return activation(left) * right  # type: ignore[no-any-return]
    return activation(inner)  # type: ignore[no-any-return]
