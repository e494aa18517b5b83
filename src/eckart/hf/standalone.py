"""Factored layers for one transformers model: needs torch and transformers, nothing else.

Written by Eckart (Apache-2.0) beside the weights that it belongs to. ``config.factored_layers`` names each
factored layer with its form and rank.

- lowrank: W = b a. ``a`` maps to few numbers, ``b`` from there to the outputs.
- pivoted: ``a`` computes some of the outputs as they are, ``b`` the others from those, ``index`` orders them.
"""

# mypy: ignore-errors
import re

import torch
from torch import nn


class Factored(nn.Module):
    """``b`` after ``a``; in pivoted form the results of both, put in order along ``axis``."""

    def __init__(self, a, b, axis, index, transposed=False):
        super().__init__()
        self.a = a
        self.b = b
        self.axis = axis
        self.register_buffer("index", index)
        self.transposed = transposed

    def forward(self, x):
        kept = self.a(x)
        out = self.b(kept)
        if self.index is None:
            return out
        both = torch.cat([kept, out], dim=self.axis)
        if self.axis == -1:
            return both.gather(-1, self.index.long().expand(both.shape))
        return both.index_select(self.axis, self.index)

    @property
    def bias(self):
        """A bias where there is one, for code that asks whether there is."""
        return getattr(self.b, "bias", None)

    @property
    def weight(self):
        """The dense matrix, computed: some models look at its dtype or values."""
        a, b = self.a.weight, self.b.weight
        if isinstance(self.a, nn.Embedding):
            rows = b @ a.T
            dense = rows if self.index is None else torch.cat([a.T, rows]).index_select(0, self.index)
            return dense.T
        groups = getattr(self.a, "groups", 1)
        shape = a.shape[1:]
        a = a.reshape(groups, a.shape[0] // groups, -1)
        b = b.reshape(groups, b.shape[0] // groups, -1)
        dense = (b @ a).flatten(0, 1)
        if self.index is not None:
            dense = torch.cat([a[0], dense]).index_select(0, self.index)
        dense = dense.reshape(-1, *shape)
        return dense.T if self.transposed else dense


def factored(old, entry):
    """The empty factored layer in the place of ``old``."""
    rank, pivoted, bias = entry["rank"], entry["form"] == "pivoted", entry["bias"]
    where = {"device": old.weight.device, "dtype": old.weight.dtype}

    def order(size):
        return torch.arange(size, dtype=torch.int32, device=old.weight.device) if pivoted else None

    if entry["kind"] in ("linear", "conv1d"):
        transposed = entry["kind"] == "conv1d"
        m, n = old.weight.T.shape if transposed else old.weight.shape
        a = nn.Linear(n, rank, bias=bias and pivoted, **where)
        return Factored(a, nn.Linear(rank, m - rank * pivoted, bias=bias, **where), -1, order(m), transposed)
    if entry["kind"] == "embedding":
        m = old.embedding_dim
        a = nn.Embedding(old.num_embeddings, rank, padding_idx=old.padding_idx, **where)
        return Factored(a, nn.Linear(rank, m - rank * pivoted, bias=bias, **where), -1, order(m))
    if entry["kind"] == "conv":
        m, groups = old.out_channels, old.groups
        a = type(old)(
            old.in_channels,
            groups * rank,
            old.kernel_size,
            stride=old.stride,
            padding=old.padding,
            dilation=old.dilation,
            groups=groups,
            bias=bias and pivoted,
            padding_mode=old.padding_mode,
            **where,
        )
        b = type(old)(groups * rank, m - rank * pivoted, 1, groups=groups, bias=bias, **where)
        return Factored(a, b, 1 - old.weight.ndim, order(m))
    raise ValueError(f"unknown kind of layer: {entry['kind']!r}")


class WithFactoredLayers:
    """Mixed into a model class: builds the model, then puts the factored layers in their places."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        prefix = self.base_model_prefix + "."
        there = dict(self.named_modules())
        ignored = set(self._keys_to_ignore_on_load_unexpected or ())
        gone = set()
        for name, entry in config.factored_layers.items():
            names = [n for n in (name, prefix + name, name.removeprefix(prefix)) if n in there]
            if not names:
                continue
            parent, _, child = names[0].rpartition(".")
            setattr(there[parent], child, factored(there[names[0]], entry))
            gone |= {f"{names[0]}.weight", f"{names[0]}.bias"}
            ignored |= {rf"^{re.escape(n)}\.weight$" for n in (name, names[0])}
        self._keys_to_ignore_on_load_unexpected = ignored
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(self, attribute, None)
            if isinstance(ties, dict):
                kept = {a: b for a, b in ties.items() if a not in gone and b not in gone}
                setattr(self, attribute, kept)
