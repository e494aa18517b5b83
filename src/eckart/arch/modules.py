"""Where modules hang in a model: look-up, replacement, and the repeated blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from eckart.errors import InputError, unknown
from eckart.records import Site


def get_module(model: nn.Module, name: str) -> nn.Module:
    """The module under a dotted name; ``""`` is the model itself. Raises InputError for an unknown name."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        names = [known for known, _ in model.named_modules() if known]
        raise InputError(unknown("module", name, names)) from None


def set_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts ``new`` under a dotted name, and under every other name of the module that was there.

    So a module that is used in several places stays one module. ``new`` takes over the training mode.
    Raises InputError for an unknown name and for the model itself.
    """
    if not name:
        raise InputError("set_module replaces a module inside of a model; got the empty name.")
    old = get_module(model, name)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    new.train(old.training)


def site_module(model: nn.Module, site: Site) -> nn.Module:
    """The module that holds the weight of a site; for fused experts the one that owns the parameter."""
    return get_module(model, site.name.rpartition(".")[0] if site.kind == "experts" else site.name)


@dataclass(frozen=True)
class Block:
    """One of the repeated blocks of a model, such as a layer of an encoder."""

    name: str
    """Dotted name of the block."""
    depth: int
    """Its index in its list."""
    label: str
    """What tells its list from the others of the model ("encoder", "decoder"); empty where there is one."""


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """The repeated blocks of a model, in its order; those inside of another block are not listed.

    A ModuleList counts when its members have children and some type occurs among them twice, or there
    is only one member. A Sequential counts when it has two members or more, all of one type and with
    children.
    """
    lists: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if _repeats(module) and not any(is_below(name, lists[held]) for held in lists):
            prefix = f"{name}." if name else ""
            lists[name] = [f"{prefix}{child}" for child, _ in module.named_children()]
    labels = _labels(list(lists))
    return tuple(Block(name, depth, labels[held]) for held, names in lists.items() for depth, name in enumerate(names))


def is_below(name: str, tops: Iterable[str]) -> bool:
    """Whether a dotted name is one of ``tops`` or lies below one."""
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def _repeats(module: nn.Module) -> bool:
    members = list(module.children())
    if not members or any(not list(member.children()) for member in members):
        return False
    types = {type(member) for member in members}
    if isinstance(module, nn.ModuleList):
        return len(types) < len(members) or len(members) == 1
    return isinstance(module, nn.Sequential) and len(members) > 1 and len(types) == 1


def _labels(lists: list[str]) -> dict[str, str]:
    """Each dotted name without the components that all of them begin and end with."""
    if len(lists) < 2:
        return dict.fromkeys(lists, "")
    parts = [name.split(".") for name in lists]
    start = _common(parts)
    end = _common([list(reversed(part[start:])) for part in parts])
    return {name: ".".join(part[start : len(part) - end]) for name, part in zip(lists, parts, strict=True)}


def _common(rows: list[list[str]]) -> int:
    """How many leading entries all rows share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))
