"""Coupled groups: weights of several layers that are one neuron, head or channel, and stay or go as one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from eckart.arch import Rows, find_stream, find_units, get_module
from eckart.arch.kinds import is_transformers_conv1d
from eckart.errors import InputError, problems, unknown


@dataclass(frozen=True)
class Part:
    """What the groups of a set own of one parameter: group j has ``size`` indices of ``dim`` from start + j · size."""

    parameter: str
    """Its dotted name in the model."""
    dim: int
    start: int = 0
    size: int = 1


@dataclass(frozen=True)
class GroupSet:
    """``count`` groups of the same make: the neurons of one MLP, the heads of one attention, the model's channels."""

    name: str
    count: int
    parts: tuple[Part, ...]

    def size(self, model: nn.Module) -> int:
        """Weights of one group."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        shapes = [(parameters[part.parameter].shape, part) for part in self.parts]
        return sum(part.size * shape.numel() // shape[part.dim] for shape, part in shapes)


def check_groups(model: nn.Module, sets: Sequence[GroupSet]) -> None:
    """Raises InputError that names every set that does not fit the model, is empty, or has a name twice."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    faults = [] if sets else ["there are none"]
    names = [s.name for s in sets]
    faults += [f"{name} is there twice" for name in sorted({n for n in names if names.count(n) > 1})]
    for group in sets:
        if group.count < 1 or not group.parts:
            faults.append(f"{group.name} has {group.count} groups of {len(group.parts)} parts")
        for part in group.parts:
            if part.parameter not in parameters:
                faults.append(f"{group.name}: {part.parameter} is no parameter of the model")
                continue
            shape = tuple(parameters[part.parameter].shape)
            if not 0 <= part.dim < len(shape) or part.start + group.count * part.size > shape[part.dim]:
                faults.append(f"{group.name}: {part.parameter} of shape {shape} does not hold {part}")
    if faults:
        raise InputError(problems("coupled groups", faults))


def chained(model: nn.Module, first: str, second: str) -> GroupSet:
    """The neurons between two layers by name, with only element-wise functions (or pooling) between them.

    One neuron is a row of ``first``, its bias, and a column of ``second``; where a convolution is flattened into a
    Linear, as many columns as it has positions. Linear, convolutions of one group, ``Conv1D`` of transformers. Raises
    InputError where the widths do not fit.
    """
    rows, columns = get_module(model, first), get_module(model, second)
    faults = [
        f"{name} is a {type(m).__name__}{' of several groups' if getattr(m, 'groups', 1) != 1 else ''}"
        for name, m in ((first, rows), (second, columns))
        if getattr(m, "groups", 1) != 1
        or not (isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d)) or is_transformers_conv1d(m))
    ]
    if faults:
        raise InputError(problems("chained takes Linear, Conv1D and convolutions of one group", faults))
    out_dim, in_dim = int(is_transformers_conv1d(rows)), int(not is_transformers_conv1d(columns))
    width = rows.get_parameter("weight").shape[out_dim]
    inputs = columns.get_parameter("weight").shape[in_dim]
    if inputs % width:
        raise InputError(f"{second} has {inputs} inputs, which are not the {width} outputs of {first} or a multiple.")
    parts = [Part(f"{first}.weight", out_dim)]
    if getattr(rows, "bias", None) is not None:
        parts.append(Part(f"{first}.bias", 0))
    parts.append(Part(f"{second}.weight", in_dim, 0, inputs // width))
    return GroupSet(f"{first}→{second}", width, tuple(parts))


KINDS = ("neurons", "heads", "residual")
"""What :func:`find_groups` finds."""


def find_groups(model: nn.Module, kinds: Sequence[str] = ("neurons",)) -> tuple[GroupSet, ...]:
    """The coupled groups of a transformers model whose family :func:`eckart.arch.find_units` knows.

    ``kinds``: "neurons" of every MLP; "heads" of every attention: a head of keys and values with the query heads that
    read it, and the columns of the output map that read those; "residual": the channels of the residual stream, each
    with its entries of tables, norms and of all maps that read or write it (:func:`eckart.arch.find_stream`). A
    channel overlaps every neuron and head, so take it alone. Raises InputError for other kinds, for a stream that is
    not known, and where nothing is found; :func:`chained` makes sets for other networks.
    """
    if strange := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(unknown("kind of groups", str(strange[0]), KINDS))
    if "residual" in kinds:
        if len(kinds) > 1:
            raise InputError(f"residual channels overlap {' and '.join(kind for kind in kinds if kind != 'residual')}; "
                             "take them alone.")  # fmt: skip
        stream = find_stream(model)
        return (GroupSet("residual", stream.width, tuple(Part(name, dim) for name, dim in stream.parameters)),)
    units = find_units(model)
    sets = []
    for mlp in units.mlps if "neurons" in kinds else ():
        parts = [part for rows in mlp.inputs for part in _rows(model, rows, 1)]
        parts.append(_columns(model, mlp.down, 1))
        sets.append(GroupSet(mlp.name, mlp.width, tuple(parts)))
    for attention in units.attentions if "heads" in kinds else ():
        size, wide = attention.head_dim, attention.head_dim * (attention.heads // attention.kv_heads)
        sides = ((attention.query, wide), (attention.key, size), (attention.value, size))
        parts = [part for rows, each in sides for part in _rows(model, rows, each)]
        parts.append(_columns(model, attention.output, wide))
        sets.append(GroupSet(attention.name, attention.kv_heads, tuple(parts)))
    if not sets:
        reasons = [f"{name or 'the model'}: {reason}" for name, reason in units.skipped]
        reasons = reasons or [f"no {' and no '.join(kinds)} in it are known"]
        raise InputError(
            problems("no coupled groups were found; make them with chained(model, first, second)", reasons)
        )
    return tuple(sets)


def _rows(model: nn.Module, rows: Rows, size: int) -> Iterable[Part]:
    """The rows of a map, ``size`` to a group, and their biases."""
    module = get_module(model, rows.site)
    yield Part(f"{rows.site}.weight", int(is_transformers_conv1d(module)), rows.start, size)
    if getattr(module, "bias", None) is not None:
        yield Part(f"{rows.site}.bias", 0, rows.start, size)


def _columns(model: nn.Module, name: str, size: int) -> Part:
    return Part(f"{name}.weight", int(not is_transformers_conv1d(get_module(model, name))), 0, size)
