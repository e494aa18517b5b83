"""The linear maps of a model: found, named, selected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import nn

from eckart.arch.kinds import Weight, unfit, weights_of
from eckart.arch.modules import Block, find_blocks, is_below
from eckart.errors import InputError, problems, unknown
from eckart.records import Site


def find_sites(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: bool = False,
    head: bool = False,
) -> tuple[Site, ...]:
    """The linear maps of a model, in its order.

    By default every nn.Linear, ``Conv1D`` of transformers, nn.Conv1d, nn.Conv2d and fused expert weight
    inside of the repeated blocks; in a model without repeated blocks, everywhere. ``embeddings`` adds
    the embedding tables and the maps that come before the first block, ``head`` the maps outside of the
    blocks that come after it. A weight that several modules share is one site, named after the first of
    them, with the others in ``tied``; it is taken as soon as one of its modules is asked for. Maps that
    cannot be taken are left out, and :func:`skipped_sites` says why.

    ``include`` keeps only the sites that match one of the patterns, ``exclude`` drops those that match
    one. A pattern is a glob, matched against the dotted name or any tail of it that starts after a dot
    (``attention.self.*``), or ``re:`` and a regular expression, searched for in the name.

    Raises InputError for a pattern that matches nothing, and where the patterns leave nothing.
    """
    survey = _survey(model)
    wanted = {"block"} | ({"embeddings"} if embeddings else set()) | ({"head"} if head else set())
    pool = [found for found in survey.found if found.places & wanted]
    faults = [fault for pattern in (*include, *exclude) if (fault := _fault(pattern, pool, survey))]
    if faults:
        raise InputError(problems("layer patterns", faults))
    sites = tuple(
        found.site
        for found in pool
        if (not include or any(name_matches(pattern, found.names) for pattern in include))
        and not any(name_matches(pattern, found.names) for pattern in exclude)
    )
    if pool and not sites:
        raise InputError(
            f"the layer patterns leave none of the {len(pool)} sites: include {list(include)}, "
            f"exclude {list(exclude)}. Widen the first or drop one of the second."
        )
    return sites


def skipped_sites(model: nn.Module) -> list[tuple[str, str]]:
    """(module name, reason) of every module that holds linear maps but is left alone, in model order."""
    return list(_survey(model).skipped)


@dataclass(frozen=True)
class _Found:
    site: Site
    places: frozenset[str]
    """Where its modules stand: "block", "embeddings", "head"."""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.site.name, *self.site.tied)


@dataclass(frozen=True)
class _Survey:
    found: tuple[_Found, ...]
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Use:
    """One module that holds one weight."""

    module: str
    weight: Weight
    place: str
    block: Block | None


def _survey(model: nn.Module) -> _Survey:
    blocks = find_blocks(model)
    skipped: list[tuple[str, str]] = []
    uses: dict[int, list[_Use]] = {}
    compressed: list[str] = []
    before_blocks = bool(blocks)
    for name, module in model.named_modules():
        if is_below(name, compressed):
            continue
        if hasattr(module, "to_dense"):
            compressed.append(name)
            skipped.append((name, "it is compressed already"))
            continue
        if reason := unfit(module):
            skipped.append((name, reason))
            continue
        block = next((block for block in blocks if is_below(name, [block.name])), None)
        before_blocks = before_blocks and block is None
        for weight in weights_of(module):
            place = _place(weight, inside=block is not None or not blocks, before_blocks=before_blocks)
            parameter = module.get_parameter(weight.parameter)
            uses.setdefault(id(parameter), []).append(_Use(name, weight, place, block))
    found: list[_Found] = []
    owners = _owners(model)
    for parameter_id, sharing in uses.items():
        if reason := _unfit_sharing(sharing, owners[parameter_id]):
            skipped.extend((use.module, reason) for use in sharing)
        else:
            found.append(_found(model, sharing))
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return _Survey(tuple(found), tuple(sorted(skipped, key=lambda entry: order[entry[0]])))


def _place(weight: Weight, *, inside: bool, before_blocks: bool) -> str:
    if weight.kind == "embedding":
        return "embeddings"
    if inside:
        return "block"
    return "embeddings" if before_blocks else "head"


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by its identity."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in {id(p) for p in module._parameters.values() if p is not None}:
            owners.setdefault(parameter, []).append(name)
    return owners


def _unfit_sharing(sharing: Sequence[_Use], owners: Sequence[str]) -> str | None:
    """Why a weight that several modules hold cannot be taken."""
    strangers = set(owners) - {use.module for use in sharing}
    if strangers:
        return f"it shares its weight with {', '.join(sorted(strangers))}, which is left alone"
    kinds = {use.weight.kind for use in sharing}
    if len(kinds) > 1 and kinds != {"linear", "embedding"}:
        return f"its weight is shared by maps of different kinds ({', '.join(sorted(kinds))})"
    if len(sharing) > 1 and kinds & {"conv", "experts"}:
        return "its weight is shared by several modules"
    return None


def _found(model: nn.Module, sharing: Sequence[_Use]) -> _Found:
    first = sharing[0]
    weight = first.weight
    shape = tuple(model.get_submodule(first.module).get_parameter(weight.parameter).shape)
    slices, out, columns = 1, shape[0], prod(shape[1:])
    if weight.kind == "conv":
        slices, out = weight.groups, shape[0] // weight.groups
    elif weight.kind == "experts":
        slices, out, columns = shape
    elif weight.kind in ("conv1d", "embedding"):
        out, columns = shape[1], shape[0]
    name = f"{first.module}.{weight.parameter}" if weight.kind == "experts" else first.module
    site = Site(
        name=name,
        kind=weight.kind,
        out_features=out,
        in_features=columns,
        slices=slices,
        bias=weight.bias,
        role=_role(name, first.block),
        depth=None if first.block is None else first.block.depth,
        tied=tuple(use.module for use in sharing[1:]),
    )
    return _Found(site, frozenset(use.place for use in sharing))


def _role(name: str, block: Block | None) -> str:
    if block is None:
        return name
    path = name.removeprefix(f"{block.name}.")
    return f"{block.label}.{path}" if block.label else path


def name_matches(pattern: str, names: Sequence[str]) -> bool:
    """Whether one of the dotted names fits a pattern, read as :func:`find_sites` reads its patterns."""
    if pattern.startswith("re:"):
        return any(re.search(pattern[3:], name) for name in names)
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for name in names)


def _fault(pattern: str, pool: Sequence[_Found], survey: _Survey) -> str | None:
    """What is wrong with a pattern, in one sentence."""
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            return f"{pattern!r} is not a regular expression: {error}."
    if any(name_matches(pattern, found.names) for found in pool):
        return None
    for found in survey.found:
        if name_matches(pattern, found.names):
            flag = "embeddings" if "embeddings" in found.places else "head"
            return f"{pattern!r} matches {found.site.name}, which is left out by default. Ask for it with {flag}=True."
    for name, reason in survey.skipped:
        if name_matches(pattern, [name]):
            return f"{pattern!r} matches {name}, which is left alone: {reason}."
    roles = dict.fromkeys(found.site.role for found in pool)
    names = dict.fromkeys(found.site.name for found in pool)
    return unknown("layer pattern", pattern, [*roles, *(name for name in names if name not in roles)])
