"""Groups of parameters as plain data: defaults, faults, and whether a saved state fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from eckart.errors import InputError, unknown
from eckart.optim.feedback import STORED, Feedback
from eckart.optim.guards import GUARDS
from eckart.optim.layout import local
from eckart.optim.matrices import SCALES, Parts, Unit
from eckart.optim.parts import built, keys_of, knobs_of, name_of, number_fault
from eckart.optim.residuals import RESIDUALS
from eckart.optim.rules import RULES, Adam
from eckart.optim.sharded import layout_of
from eckart.optim.subspaces import SUBSPACES
from eckart.optim.view import pieces

STRUCTURE = ("rule", "subspace", "residual", "guards", "feedback", "state_dtype", "rank", "side", "view", "split",
             "transposed", "matrix")  # fmt: skip
"""Entries of a group that decide what is in the state."""


def parts_of(group: Mapping[str, Any]) -> Parts:
    name = group["subspace"]
    return Parts(
        built(RULES[group["rule"]], group),
        None if name is None else built(SUBSPACES[name], group),
        built(RESIDUALS[group["residual"]], group),
        tuple(built(GUARDS[guard], group) for guard in group["guards"]),
        None if group["feedback"] is None else built(Feedback, group),
        group["state_dtype"],
        group["compute_dtype"],
    )


def flat_group(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A group of plain data: names of parts, and all of their numbers. What is given wins over the defaults."""
    group = dict(given)
    if "rank" in given and given["rank"] is None:
        group["subspace"] = None
    for key in ("rule", "subspace", "residual", "guards", "feedback"):
        group.setdefault(key, defaults.get(key))
    numbers: dict[str, Any] = {}
    classes: list[type] = [Adam]  # its betas and eps are those of vectors
    for kind, table in (("rule", RULES), ("subspace", SUBSPACES), ("residual", RESIDUALS)):
        value = group[kind]
        if value is not None:
            group[kind] = name_of(kind, value, table)
            numbers |= knobs_of(value)
            classes.append(table[group[kind]])
    guards = group["guards"]
    names = []
    for value in guards if isinstance(guards, (list, tuple)) else [guards]:
        names.append(name_of("guard", value, GUARDS))
        numbers |= knobs_of(value)
        classes.append(GUARDS[names[-1]])
    group["guards"] = tuple(names)
    if isinstance(group["feedback"], Feedback):
        numbers |= knobs_of(group["feedback"])
        group["feedback"] = numbers.pop("feedback")
    if group["feedback"] is not None:
        classes.append(Feedback)
    for key, value in numbers.items():
        if key not in given:
            group[key] = value
    for key, value in defaults.items():
        group.setdefault(key, value)
    for cls in classes[::-1]:
        if cls is not Adam or "betas" not in group or "eps" not in group:
            for key, value in knobs_of(cls()).items():
                group.setdefault(key, value)
    if group["subspace"] is None and "feedback" not in given and not group.get("feedback_keep"):
        group["feedback"] = None  # which has nothing to bring back
    if isinstance(group.get("split"), (list, tuple)):
        group["split"] = tuple(group["split"])
    return group


def refuse_unused(name: str, given: Mapping[str, Any], rule: Any, subspace: Any, feedback: Any) -> None:
    """Options of parts that are not there are errors."""
    if subspace is None and feedback is not None and not getattr(feedback, "keep", 0):
        raise InputError(f"{name}: feedback without a subspace has nothing to bring back; give subspace=.")
    of_subspace = sorted({"rank", "every", "side", "carry"} & set(given))
    if subspace is None and of_subspace:
        raise InputError(f"{name}: {', '.join(of_subspace)} without a subspace; give subspace= one of "
                         f"{', '.join(SUBSPACES)}.")  # fmt: skip
    rule_class = RULES[name_of("rule", rule, RULES)]
    unused = sorted({"momentum", "nesterov"} & set(given) - keys_of([rule_class]))
    if unused:
        raise InputError(f"{name}: rule {rule!r} has no {' and no '.join(unused)}.")


def group_faults(group: Mapping[str, Any]) -> list[str]:
    found = number_fault("lr", group["lr"], 0) + number_fault("weight_decay", group["weight_decay"], 0)
    found += number_fault("vector_scale", group["vector_scale"], 0)
    if isinstance(group["scale"], str):
        found += [] if group["scale"] in SCALES else [unknown("scale", group["scale"], SCALES)]
    else:
        found += number_fault("scale", group["scale"], 0)
    if group["state_dtype"] not in STORED:
        found.append(f"state_dtype is one of {', '.join(STORED)}; got {group['state_dtype']!r}")
    if group["compute_dtype"] not in (None, "fp32", "bf16"):
        found.append(f"compute_dtype is 'bf16', 'fp32' or None; got {group['compute_dtype']!r}")
    if group["nonfinite"] not in (None, "skip", "raise"):
        found.append(f"nonfinite is 'skip', 'raise' or None; got {group['nonfinite']!r}")
    if group["view"] not in ("auto", "stack", "flatten"):
        found.append(f"view is 'auto', 'stack' or 'flatten'; got {group['view']!r}")
    found += number_fault("seed", group["seed"], 0, 2**31)
    parts = parts_of(group)
    for part in (parts.rule, parts.subspace, parts.residual, *parts.guards, parts.feedback):
        if part is not None:
            found += part.faults()
    return found


def parameter_faults(name: str, p: Tensor, group: Mapping[str, Any]) -> list[str]:
    if p.is_complex():
        return [f"{name} {tuple(p.shape)} is complex; give torch.view_as_real of it, or its parts"]
    if not p.is_floating_point():
        return [f"{name} {tuple(p.shape)} is {p.dtype}; expected floating point numbers"]
    split = group["split"]
    if split is not None and is_matrix(p, group):
        whole = pieces(tuple(p.shape), group["view"], None, group["transposed"])[0]
        if any(not isinstance(s, int) or s < 1 for s in split) or sum(split) != whole.rows:
            return [f"{name} has {whole.rows} rows, and split={split!r} does not add up to them in positive parts"]
    return []


def is_matrix(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether it goes through the pipeline."""
    return p.ndim >= 2 and p.numel() > 0 and bool(group["matrix"]) and not is_plain_adam(p, group)


def is_plain_adam(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the pipeline would do to a matrix what torch's AdamW does, which reads memory once."""
    asked = group["subspace"], group["feedback"], *group["guards"]
    return (
        p.ndim >= 2
        and bool(group["matrix"])
        and group["rule"] == "adam"
        and all(part is None for part in asked)
        and group["state_dtype"] == "fp32"
        and not isinstance(group["scale"], str)
        and group["scale"] > 0
        and p.dtype in (torch.float32, torch.float64)
    )


def plain_data(value: Any) -> Any:
    """Lists and tuples alike, since JSON and DCP do not tell them apart."""
    return [plain_data(v) for v in value] if isinstance(value, (list, tuple)) else value


def device_of(key: str, p: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Where an entry of the state lives: with the parameter, but for counters and seeds of the pipeline."""
    counts = key.partition(".")[0] in ("step", "age", "seed") and is_matrix(p, group)
    return torch.device("cpu") if counts else p.device


def state_faults(name: str, p: Tensor, group: dict[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What a saved state says that does not fit a parameter."""
    if not saved:
        return []
    if not is_matrix(p, group):
        expected = {"exp_avg": tuple(local(p).shape)}
    else:
        parts = parts_of(group)
        expected = {}
        for piece in pieces(tuple(p.shape), group["view"], group["split"], group["transposed"]):
            unit = Unit(0, 0, p, group, parts, piece, {}, 0, 1, layout_of(p, group), True)
            batch, d, k = unit.shape
            for n in parts.rule.moments:
                coded = "_codes" if parts.stored == "int8" else ""
                expected[f"{n}{coded}{piece.suffix}"] = (batch, unit.rank or d, k)
    wrong = []
    for key, shape in expected.items():
        got = saved.get(key)
        if got is None:
            wrong.append(f"{name} {tuple(p.shape)} lacks {key} in the state")
        elif tuple(local(got).shape) != shape:
            wrong.append(f"{name} {tuple(p.shape)} needs {key} of {shape}; saved is {tuple(got.shape)}")
    return wrong
