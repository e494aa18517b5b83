"""The units of a model that can become narrower, out of the facts about its family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from eckart.arch import MLP, Attention, find_units
from eckart.records import Site, Unit, UnitKind

ALL_KINDS: tuple[UnitKind, ...] = ("neurons", "values", "queries")
"""What becomes narrower where nothing is said."""
KNOWN_KINDS: tuple[UnitKind, ...] = (*ALL_KINDS, "heads")
"""Heads go whole, which is coarser than fewer directions of each; so only where they are asked for."""
NATIVE_KINDS: tuple[UnitKind, ...] = ("neurons",)
"""Those whose width the config of a family can state: one size of the MLPs. Heads share one size among queries, keys
and values, which rotary frequencies are computed from, so an attention whose heads are narrower needs Eckart's loader;
one with fewer heads only where the config divides its width by their number (BERT)."""


NORMALISED = (
    "queries and keys are normalised head by head, over all coordinates, and keep their width; factors of the same "
    "size lose less"
)


@dataclass(frozen=True)
class UnitFacts:
    """A unit and the module that it belongs to."""

    unit: Unit
    facts: MLP | Attention


def module_units(
    model: nn.Module, sites: Sequence[Site], kinds: Sequence[UnitKind] = ALL_KINDS
) -> tuple[list[UnitFacts], list[tuple[str, str]]]:
    """The units whose maps are all among ``sites``, and (module, reason) of what stays as it is.

    Queries and keys that are normalised head by head (Qwen3) keep their width: a norm over fewer coordinates is
    another function, and factors of the same size lose less (:mod:`eckart.modules.queries` has the figures).
    """
    by_name = {site.name: site for site in sites}
    found = find_units(model)
    skipped = list(found.skipped)
    units: list[UnitFacts] = []
    units += [_neurons(mlp, by_name) for mlp in found.mlps if _there(mlp, by_name)]
    for attention in found.attentions:
        if not _there(attention, by_name):
            continue
        units.append(_heads(attention, by_name))
        units.append(_values(attention, by_name))
        if attention.query_norm is None and attention.key_norm is None:
            units.append(_queries(attention, by_name))
        else:
            skipped.append((attention.name, NORMALISED))
    wanted = [each for each in units if each.unit.kind in kinds]
    order = {site.name: i for i, site in enumerate(sites)}
    return sorted(wanted, key=lambda each: min(order[name] for name in each.unit.sites)), skipped


def _names(facts: MLP | Attention) -> tuple[str, ...]:
    if isinstance(facts, MLP):
        return tuple(dict.fromkeys([*(rows.site for rows in facts.inputs), facts.down]))
    return tuple(dict.fromkeys([facts.query.site, facts.key.site, facts.value.site, facts.output]))


def _there(facts: MLP | Attention, sites: Mapping[str, Site]) -> bool:
    return all(name in sites and not sites[name].tied for name in _names(facts))


def _neurons(mlp: MLP, sites: Mapping[str, Site]) -> UnitFacts:
    per_width = sum(sites[rows.site].in_features for rows in mlp.inputs) + sites[mlp.down].out_features
    unit = Unit(
        name=f"{mlp.name}#neurons",
        kind="neurons",
        sites=_names(mlp),
        full_rank=mlp.width,
        width_parameters=per_width,
        width_indices=0,
        width_rows=tuple((1, sites[rows.site].in_features) for rows in mlp.inputs),
        width_columns=((sites[mlp.down].out_features, 1),),
    )
    return UnitFacts(_placed(unit, sites[mlp.down]), mlp)


def _values(attention: Attention, sites: Mapping[str, Site]) -> UnitFacts:
    group = attention.heads // attention.kv_heads
    value, output = sites[attention.value.site], sites[attention.output]
    unit = Unit(
        name=f"{attention.name}#values",
        kind="values",
        sites=(value.name, output.name),
        full_rank=attention.kv_heads * attention.head_dim,
        width_parameters=value.in_features + group * output.out_features,
        width_indices=1 + group,
        width_rows=((1, value.in_features),),
        width_columns=((output.out_features, group),),
    )
    return UnitFacts(_placed(unit, output), attention)


def _queries(attention: Attention, sites: Mapping[str, Site]) -> UnitFacts:
    group = attention.heads // attention.kv_heads
    query, key = sites[attention.query.site], sites[attention.key.site]
    unit = Unit(
        name=f"{attention.name}#queries",
        kind="queries",
        sites=tuple(dict.fromkeys((query.name, key.name))),
        full_rank=attention.kv_heads * attention.head_dim,
        step=2 if attention.rotary else 1,
        width_parameters=group * query.in_features + key.in_features,
        width_indices=1 + group,
        width_rows=((group, query.in_features), (1, key.in_features)),
    )
    return UnitFacts(_placed(unit, query), attention)


def _heads(attention: Attention, sites: Mapping[str, Site]) -> UnitFacts:
    size, group = attention.head_dim, attention.heads // attention.kv_heads
    query, key, value, output = (
        sites[name] for name in (attention.query.site, attention.key.site, attention.value.site, attention.output)
    )
    columns = group * size
    rows = ((columns, query.in_features), (size, key.in_features), (size, value.in_features))
    unit = Unit(
        name=f"{attention.name}#heads",
        kind="heads",
        sites=_names(attention),
        full_rank=attention.kv_heads,
        width_parameters=sum(number * inputs for number, inputs in rows) + columns * output.out_features,
        width_indices=0 if attention.resizable else 2 * (size + columns),
        width_rows=rows,
        width_columns=((output.out_features, columns),),
    )
    return UnitFacts(_placed(unit, output), attention)


def _placed(unit: Unit, site: Site) -> Unit:
    role = f"{site.role.rpartition('.')[0]}#{unit.kind}".lstrip(".")
    return replace(unit, role=role, depth=site.depth)
