"""The map of a model: a row per role, a column per block, and what lies outside of the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Placed(Protocol):
    """What has a place in a model."""

    @property
    def stack(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def depth(self) -> int | None: ...
    @property
    def group(self) -> str: ...


Item = TypeVar("Item", bound=Placed)


@dataclass(frozen=True, kw_only=True)
class Map(Generic[Item]):
    """What lies in one stack of blocks."""

    caption: str
    depths: tuple[int, ...]
    lines: tuple[tuple[str, str, tuple[Item | None, ...]], ...]
    """(role, its group, one cell per block)."""


def maps(items: Sequence[Item]) -> tuple[tuple[Map[Item], ...], tuple[Item, ...]]:
    """Maps of the stacks of blocks, and the items that lie outside of them or share a cell with another."""
    cells: dict[str, dict[str, dict[int, Item]]] = {}
    outside = []
    for item in items:
        if item.depth is None or not item.role:
            outside.append(item)
            continue
        line = cells.setdefault(item.stack, {}).setdefault(item.role, {})
        if item.depth in line:
            outside.append(item)
        else:
            line[item.depth] = item
    found = []
    for stack, roles in cells.items():
        depths = tuple(sorted({depth for line in roles.values() for depth in line}))
        lines = tuple(
            (role, next(iter(line.values())).group, tuple(line.get(depth) for depth in depths))
            for role, line in roles.items()
        )
        found.append(Map(caption=stack, depths=depths, lines=lines))
    return tuple(found), tuple(outside)


def stack_of(name: str, depth: int | None, role: str) -> str:
    """The path of the list of blocks: ``encoder.layer`` of ``encoder.layer.0.mlp.up`` and of its ``.weight``."""
    above, found, rest = name.rpartition(f".{depth}.{role}")
    return above if found and role and rest in ("", ".weight") else ""


def group_of(name: str, stack: str, depth: int | None, role: str) -> str:
    """What all maps of one row share: the part of the model and the role."""
    return name if depth is None else " ".join(part for part in (stack, role) if part)
