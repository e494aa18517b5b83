"""The weight files of the compressed model: which tensor lies where, before any is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from eckart.arch import site_module
from eckart.checkpoint.weights import Layout, Mark, TensorWriter
from eckart.compression import get_method
from eckart.layers import dense_keys, describe, layer_from_forms
from eckart.planning import Plan, Step
from eckart.records import Site
from eckart.streaming.factors import cut_from_file

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """One weight file."""

    name: str
    layout: Layout
    """Every tensor in it."""
    sites: tuple[Site, ...]
    """The factored sites whose tensors it holds."""


def entries_of(plan: Plan, sites: Mapping[str, Site]) -> dict[str, dict[str, object]]:
    """What config.json says of every site that a plan factors."""
    return {
        step.site: {
            "kind": sites[step.site].kind,
            "form": step.form,
            "rank": step.rank,
            "bias": sites[step.site].bias,
        }
        for step in plan.steps
        if step.form != "dense"
    }


def lay_out(model: nn.Module, blocks: Sequence[str], sites: Mapping[str, Site], most: int) -> list[Shard]:
    """The files of ``model``, which has factored layers and no numbers: one per block, the rest in further ones.

    A file has at most ``most`` bytes, unless a single tensor is larger. A weight that several modules share is stored
    once, and each factored one leaves an empty tensor under its dense name, without which transformers would load
    random weights where Eckart is not imported.
    """
    state = model.state_dict()
    once = {name for name, _ in model.named_parameters()}
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    layout = {name: (value.dtype, tuple(value.shape)) for name, value in state.items() if name not in shared}
    owner: dict[str, str] = {}
    for name, entry in describe(model).items():
        owner.update({key: name for key in layout if key.startswith(f"{name}.")})
        dtype = next(value[0] for key, value in layout.items() if key.startswith(f"{name}."))
        layout.update(dict.fromkeys(dense_keys(name, entry), (dtype, (0,))))
        owner.update(dict.fromkeys(dense_keys(name, entry), name))
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
            tuple(sites[name] for name in dict.fromkeys(owner[key] for key in keys if key in owner)),
        )
        for number, keys in enumerate(files, start=1)
    ]


def write_shard(
    folder: Path,
    shard: Shard,
    model: nn.Module,
    steps: Mapping[str, Step],
    factors: Mapping[str, Path],
) -> tuple[Mark, float]:
    """Cut the sites of one file out of their ``factors`` and write it; all other tensors come from ``model``.

    Returns the file's mark and the seconds of its CRC. Memory: the factored layers of this file.
    """
    made: dict[str, Tensor] = {}
    for site in shard.sites:
        step = steps[site.name]
        form = cut_from_file(factors[site.name], model, site, step, get_method(step.method))
        layer = layer_from_forms(site, site_module(model, site), [form])
        made.update({f"{site.name}.{key}": value for key, value in layer.state_dict().items()})
    state = model.state_dict()
    with TensorWriter(folder / shard.name, shard.layout) as writer:
        for key, (dtype, shape) in shard.layout.items():
            empty = shape == (0,)
            writer.write(key, made[key] if key in made else torch.empty(0, dtype=dtype) if empty else state[key])
    return writer.mark, writer.seconds


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """The index that makes the files one checkpoint."""
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shard in shards for dtype, shape in shard.layout.values()]
    content = {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {key: shard.name for shard in shards for key in sorted(shard.layout)},
    }
    (folder / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
