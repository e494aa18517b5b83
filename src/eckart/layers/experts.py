"""A drop-in layer for fused mixture-of-experts weights: 3-D parameters (experts × out × in), in factors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eckart.layers.linear import INDEX_DTYPE, reordered
from eckart.records import FormKind

_STANDARD = {
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
"""The layout that this layer computes, in the flags that transformers puts on expert modules."""


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the fused weights of an experts module in the order of use, () for any other module."""
    for up in ("gate_up_proj", "up_proj"):
        weights = [getattr(module, up, None), getattr(module, "down_proj", None)]
        if all(isinstance(weight, nn.Parameter) and weight.ndim == 3 for weight in weights):
            return (up, "down_proj")
    return ()


def unsupported_experts(module: nn.Module) -> str | None:
    """None, or why the forward pass of this experts module is not one that ``FactoredExperts`` computes."""
    if isinstance(module, FactoredExperts):
        return None
    kind = type(module).__name__
    if not expert_parameters(module):
        return f"{kind} holds no fused expert weights (gate_up_proj or up_proj, and down_proj)"
    for flag, expected in _STANDARD.items():
        found = getattr(module, flag, None if flag != "has_post_expert_norm" else False)
        if found != expected:
            return f"experts of {kind} have {flag}={found}; only {flag}={expected} is supported"
    gate = getattr(type(module), "_apply_gate", None)
    if gate is None or not gate.__module__.startswith("transformers.integrations"):
        return f"experts of {kind} have their own gating function"
    if not callable(getattr(module, "act_fn", None)):
        return f"experts of {kind} have no act_fn"
    return None


class FactoredExperts(nn.Module):
    """Expert e: y = down_e · (act(gate_e x) ∘ up_e x), each weight dense or in factors of one rank.

    A factored ``gate_up_proj`` becomes ``gate_up_a`` (experts × rank × in) and ``gate_up_b`` (experts × out ×
    rank); in pivoted form ``gate_up_b`` is (experts × out − rank × rank), and ``gate_up_index`` (experts ×
    out) puts the rows back in order. A weight that stays dense keeps its name.

    In eager mode each expert computes its own tokens. Under torch.compile and torch.export, where the number
    of tokens of an expert is not known, every token gathers the factors of its experts.
    """

    def __init__(self, original: nn.Module, factored: Mapping[str, tuple[FormKind, int]]) -> None:
        """``original``: a plain experts module or a ``FactoredExperts``, whose other weights are taken over.

        ``factored`` maps parameter names to form and rank; their factors are left uninitialised.
        """
        super().__init__()
        self.act_fn: Callable[[Tensor], Tensor] = original.act_fn  # type: ignore[assignment]
        self._template: tuple[nn.Module]  # in a tuple, so that it is no child
        self.names: tuple[str, ...]
        self.shapes: dict[str, tuple[int, int, int]]
        self.forms: dict[str, tuple[FormKind, int]] = {}
        if isinstance(original, FactoredExperts):
            self.names, self.shapes = original.names, dict(original.shapes)
        else:
            self.names = expert_parameters(original)
            self.shapes = {}
            for name in self.names:
                experts, m, n = original.get_parameter(name).shape
                self.shapes[name] = (experts, m, n)
        self.gated = self.names[0] == "gate_up_proj"
        if isinstance(original, FactoredExperts):
            self._template = original._template
        else:
            template = copy.copy(original)  # the module's own class and settings, its weights on meta
            weights = {name: original.get_parameter(name).to("meta") for name in self.names}
            template._parameters = {name: nn.Parameter(weight) for name, weight in weights.items()}
            self._template = (template,)
        self.num_experts = self.shapes[self.names[0]][0]
        for name in self.names:
            if name in factored:
                self._allocate(name, *factored[name], next(original.parameters()))
                continue
            taken = original.forms.get(name) if isinstance(original, FactoredExperts) else None
            if taken is not None:
                self.forms[name] = taken
            for key, value in original.named_parameters(recurse=False):
                if key == name or (taken and key.startswith(self.stem(name) + "_") and key not in self.names):
                    self.register_parameter(key, value)
            for key, buffer in original.named_buffers(recurse=False):
                if key == self.stem(name) + "_index":
                    self.register_buffer(key, buffer)

    @staticmethod
    def stem(name: str) -> str:
        """``gate_up`` of ``gate_up_proj``: where the names of its factors begin."""
        return name.removesuffix("_proj")

    def _allocate(self, name: str, form: FormKind, rank: int, like: Tensor) -> None:
        experts, m, n = self.shapes[name]
        rest = m - rank if form == "pivoted" else m
        stem = self.stem(name)
        self.register_parameter(f"{stem}_a", nn.Parameter(like.new_empty(experts, rank, n)))
        self.register_parameter(f"{stem}_b", nn.Parameter(like.new_empty(experts, rest, rank)))
        if form == "pivoted":
            index = torch.arange(m, dtype=INDEX_DTYPE, device=like.device).expand(experts, m).contiguous()
            self.register_buffer(f"{stem}_index", index)
        self.forms[name] = (form, rank)

    def dense(self, name: str) -> Tensor:
        """(experts × out × in): the weight ``name``, computed where it is factored."""
        if name not in self.forms:
            return self.get_parameter(name)
        stem = self.stem(name)
        a, b = self.get_parameter(f"{stem}_a"), self.get_parameter(f"{stem}_b")
        if self.forms[name][0] == "lowrank":
            return b @ a
        index = self.get_buffer(f"{stem}_index").long()
        return torch.cat([a, b @ a], dim=1).gather(1, index.unsqueeze(-1).expand(-1, -1, a.shape[-1]))

    def _apply_expert(self, name: str, x: Tensor, e: int) -> Tensor:
        """(tokens, in) to (tokens, out) through the weight ``name`` of expert e."""
        if name not in self.forms:
            return nn.functional.linear(x, self.get_parameter(name)[e])
        stem = self.stem(name)
        kept = nn.functional.linear(x, self.get_parameter(f"{stem}_a")[e])
        out = nn.functional.linear(kept, self.get_parameter(f"{stem}_b")[e])
        if self.forms[name][0] == "lowrank":
            return out
        return reordered(torch.cat([kept, out], dim=-1), self.get_buffer(f"{stem}_index")[e])

    def _apply_gathered(self, name: str, x: Tensor, ids: Tensor) -> Tensor:
        """(pairs, in) to (pairs, out), pair i through expert ids[i]; gathers one set of factors per pair."""

        def through(weight: str, z: Tensor) -> Tensor:
            return torch.bmm(self.get_parameter(weight)[ids], z.unsqueeze(-1)).squeeze(-1)

        if name not in self.forms:
            return through(name, x)
        stem = self.stem(name)
        kept = through(f"{stem}_a", x)
        out = through(f"{stem}_b", kept)
        if self.forms[name][0] == "lowrank":
            return out
        return torch.cat([kept, out], dim=-1).gather(-1, self.get_buffer(f"{stem}_index")[ids].long())

    def _between(self, hidden: Tensor) -> Tensor:
        if not self.gated:
            return self.act_fn(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, width), (tokens, k) expert ids, (tokens, k) weights to (tokens, width).

        Ids of ``num_experts`` (expert parallelism's "not here") contribute nothing.
        """
        up, down = self.names
        tokens, k = top_k_index.shape
        ids = top_k_index.reshape(-1)
        weights = top_k_weights.reshape(-1, 1)
        if torch.compiler.is_compiling():
            here = (ids < self.num_experts).unsqueeze(-1)
            ids = ids.clamp(0, self.num_experts - 1)
            hidden = hidden_states.repeat_interleave(k, dim=0)
            out = self._apply_gathered(down, self._between(self._apply_gathered(up, hidden, ids)), ids)
            pairs = torch.where(here, out * weights, torch.zeros_like(out))
        else:
            order = ids.argsort(stable=True)
            counts = ids.bincount(minlength=self.num_experts + 1).tolist()
            pairs = hidden_states.new_zeros(ids.numel(), hidden_states.shape[-1])
            start, parts = 0, []
            for e, count in enumerate(counts[: self.num_experts]):
                if count:
                    x = hidden_states[order[start : start + count] // k]
                    parts.append(self._apply_expert(down, self._between(self._apply_expert(up, x, e)), e))
                start += count
            if parts:
                out = torch.cat(parts)
                chosen = order[: out.shape[0]]
                out = out * weights[chosen]
                pairs = pairs.to(out.dtype).index_copy(0, chosen, out)
        return pairs.view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)

    def to_dense(self) -> nn.Module:
        """The experts in the class that this layer replaced, with the same outputs to rounding."""
        layer: nn.Module = copy.copy(self._template[0])
        learns = next(self.parameters()).requires_grad
        dense = {name: self.dense(name).detach() for name in self.names}
        layer._parameters = {name: nn.Parameter(W, requires_grad=learns) for name, W in dense.items()}
        layer._modules = dict(self._modules)
        layer.training = self.training
        return layer

    def entry(self) -> dict[str, Any]:
        """What a checkpoint has to know to build this layer's skeleton."""
        weights = {name: {"form": form, "rank": rank} for name, (form, rank) in self.forms.items()}
        return {"kind": "experts", "weights": weights}

    def extra_repr(self) -> str:
        parts = [f"{n} {self.forms[n][0]} rank={self.forms[n][1]}" for n in self.names if n in self.forms]
        return f"num_experts={self.num_experts}, " + ", ".join(parts)
