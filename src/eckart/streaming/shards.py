"""The weight files of the compressed model: which tensor lies where, before any is computed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.arch import get_module, site_module
from eckart.checkpoint.weights import Layout, Mark, TensorWriter
from eckart.hf.mapped import Sources, sources
from eckart.layers import dense_keys, describe, narrow_layer
from eckart.modules import Piece, narrow_sites
from eckart.planning import Plan, Step
from eckart.records import Site

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One weight file."""

    name: str
    layout: Layout
    """Every tensor in it."""
    sites: tuple[Site, ...]
    """The changed sites whose tensors it holds."""


def entries_of(plan: Plan, sites: Mapping[str, Site]) -> dict[str, dict[str, Any]]:
    """What config.json says of every site that a plan factors or stores in few bits; narrower ones apart."""
    found: dict[str, dict[str, Any]] = {}
    for step in plan.steps:
        if step.form == "narrow" or (step.form == "dense" and not step.bits):
            continue
        site = sites[step.site]
        if site.kind == "experts":
            owner, _, name = site.name.rpartition(".")
            entry = found.setdefault(owner, {"kind": "experts", "weights": {}})
            entry["weights"][name] = {"form": step.form, "rank": step.rank}
            continue
        m, n, k = site.out_features, site.in_features, step.rank
        if step.form == "dense":
            found[site.name] = _in_bits(step, n, step.repair, site.bias)
            continue
        found[site.name] = {"kind": site.kind, "form": step.form, "rank": k, "bias": site.bias}
        if step.bits:
            bias = site.bias and step.form == "pivoted"  # a low-rank pair has its bias behind the second factor
            found[f"{site.name}.a"] = _in_bits(step, n, 0, bias)
            if step.form == "lowrank" or k < m:
                found[f"{site.name}.b"] = _in_bits(step, k, 0, site.bias)
    return found


def _in_bits(step: Step, columns: int, repair: int, bias: bool) -> dict[str, Any]:
    return {"kind": "quantised", "bits": step.bits, "group": min(step.group, columns), "rank": repair, "bias": bias}


def narrow_layers(
    model: nn.Module, sites: Mapping[str, Site], pieces: Sequence[Piece], wanted: Sequence[str]
) -> dict[str, nn.Module]:
    """Those of the narrower layers whose names are ``wanted``."""
    chosen = [piece for piece in pieces if piece.site in wanted]
    return {
        name: narrow_layer(
            site_module(model, sites[name]),
            one.weight,
            one.bias,
            rows=one.rows,
            columns=one.columns,
            blocks=one.blocks,
        )
        for name, one in narrow_sites(model, sites, chosen).items()
    }


def lay_out(
    model: nn.Module, blocks: Sequence[str], sites: Mapping[str, Site], most: int, known: Sources | None = None
) -> list[Shard]:
    """The files of ``model``, which has its new layers and no numbers: one per block, the rest in further ones.

    A file has at most ``most`` bytes, unless a single tensor is larger. A weight that several modules share is stored
    once, and each factored one leaves an empty tensor under its dense name, without which transformers would load
    random weights where Eckart is not imported. What stays as it is keeps the names that it has in the files.
    """
    state = model.state_dict()
    once = {name for name, _ in model.named_parameters()}
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in state.items() if name not in shared}
    for name, entry in describe(model).items():
        inside = [value[0] for key, value in layout.items() if key.startswith(f"{name}.")]
        dtype = next(found for found in inside if found.is_floating_point)
        layout.update(dict.fromkeys(dense_keys(name, entry), (dtype, (0,))))
    if known is not None:
        for key in list(layout):
            stored = known.stored(key) if layout[key][1] != (0,) else {}
            if stored:
                dtype, _ = layout.pop(key)
                layout.update({name: (dtype, shape) for name, shape in stored.items()})
    parts: dict[str, list[list[str]]] = {}
    room: dict[str, int] = {}
    for key, (dtype, shape) in layout.items():
        block = next((block for block in blocks if key.startswith(f"{block}.")), "")
        size = torch.Size(shape).numel() * dtype.itemsize
        held = parts.setdefault(block, [])
        if not held or size > room[block]:
            held.append([])
            room[block] = max(most, size)
        held[-1].append(key)
        room[block] -= size
    files = [keys for block in ("", *blocks) for keys in parts.get(block, [])]
    return [
        Shard(
            f"model-{number:05d}-of-{len(files):05d}.safetensors",
            TensorWriter.ordered({key: layout[key] for key in keys}),
            _sites_of(keys, sites),
        )
        for number, keys in enumerate(files, start=1)
    ]


def _sites_of(keys: Iterable[str], sites: Mapping[str, Site]) -> tuple[Site, ...]:
    """The sites to whose modules the tensors belong; fused experts are several sites of one module."""
    by_module: dict[str, list[Site]] = {}
    for site in sites.values():
        by_module.setdefault(_module(site), []).append(site)
    found: dict[str, Site] = {}
    for key in keys:
        parts = key.split(".")
        for end in range(1, len(parts)):
            found |= {site.name: site for site in by_module.get(".".join(parts[:end]), ())}
    return tuple(found.values())


def _module(site: Site) -> str:
    return site.name.rpartition(".")[0] if site.kind == "experts" else site.name


def write_shard(
    folder: Path,
    shard: Shard,
    model: nn.Module,
    make: Callable[[Site, nn.Module], nn.Module],
) -> tuple[Mark, float]:
    """Make the new layers of one file and write it; all other tensors come from ``model``.

    ``make(site, original)`` gives the layer in the place of ``original``. Returns the file's mark and the seconds of
    its CRC. Memory: the new layers of this file.
    """
    known = sources(model)
    layers: dict[str, nn.Module] = {}
    for site in shard.sites:
        path = _module(site)
        layers[path] = make(site, layers.get(path, get_module(model, path)))
    made = {f"{path}.{key}": value for path, layer in layers.items() for key, value in layer.state_dict().items()}
    state = model.state_dict()
    with TensorWriter(folder / shard.name, shard.layout) as writer:
        for key, (dtype, shape) in shard.layout.items():
            if key in made:
                value = made[key]
            elif shape == (0,):
                value = torch.empty(0, dtype=dtype)
            elif key in state:
                value = state[key]
            else:
                assert known is not None
                value = known.weights[key]
            writer.write(key, value)
    return writer.mark, writer.seconds


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The index that makes the files one checkpoint."""
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shard in shards for dtype, shape in shard.layout.values()]
    content = {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {key: shard.name for shard in shards for key in sorted(shard.layout)},
    }
    (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
